"""Speed of the GPU's kernels against torch's and what people write by hand, on a CUDA device.

    python benchmarks/run_gpu.py                # all of it; writes benchmarks/results/gpu.json
    python benchmarks/run_gpu.py --case rows    # a few cases; writes nothing
    python benchmarks/run_gpu.py --check-only   # small shapes, no times; without a GPU too

Each variant's results are compared with float64 before it is timed. Times are those of CUDA
events around a block of steps, in turns; small shapes are also timed as replayed CUDA graphs.
Without a GPU, `--check-only` runs the kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

if not torch.cuda.is_available():  # before Triton is imported
    os.environ["TRITON_INTERPRET"] = "1"

from batchnorm.benchmark.case import Case, count_bytes
from batchnorm.benchmark.machine import describe_versions
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import check_all, measure, write_record
from batchnorm.benchmark.torch_steps import make_variants
from batchnorm.benchmark.variant import Variant
from batchnorm.torch.kernels.decision import choose
from judging import RESULTS, Target, print_targets, quotient

ROWS = (4194304, 64)  # 1 GiB of float32: any card's L2 cache is a small part of it
IMAGE = (256, 256, 56, 56)
_SECONDS, _LEAST = 2.0, 15  # of taking turns for a case, and rounds at least
GRAPH = ", graph"


def _make_cases() -> list[Case]:
    cases = []
    for dtype in ("float32", "bfloat16"):
        kind = {"dtype": dtype, "compiled": True}
        cases += [
            Case(f"inference-{dtype}", "(256, 256, 56, 56), inference", IMAGE, "inference", **kind),
            Case(f"rows-{dtype}", "(4194304, 64)", ROWS, **kind),
            Case(f"image-{dtype}", "(256, 256, 56, 56)", IMAGE, **kind),
            Case(
                f"image-last-{dtype}",
                "(256, 256, 56, 56), channels last",
                IMAGE,
                channels_last=True,
                **kind,
            ),
            Case(f"mask-rows-{dtype}", "(4194304, 64), half padded", ROWS, padded=0.5, **kind),
            Case(
                f"mask-image-{dtype}", "(256, 256, 56, 56), half padded", IMAGE, padded=0.5, **kind
            ),
            Case(
                f"add-relu-{dtype}",
                "(256, 256, 56, 56), add, ReLU",
                IMAGE,
                activation="relu",
                residual=True,
                **kind,
            ),
        ]
    cases += [  # that suit visits; larger than any card's L2 cache
        Case(f"visits-{kind}-{dtype}", str(shape), shape, dtype=dtype, visits=True)
        for dtype in ("float32", "bfloat16")
        for kind, shape in (("image", (32, 16384, 14, 14)), ("rows", (512, 262144)))
    ]
    cases += [
        Case("small-rows", "(32, 64)", (32, 64)),
        Case("small-image", "(32, 64, 7, 7)", (32, 64, 7, 7)),
    ]
    return cases


CASES = _make_cases()


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    chosen = [c for c in CASES if not options.case or any(n in c.name for n in options.case)]
    if not chosen:
        sys.exit(
            f"run_gpu: no case has a name like {options.case}; there are "
            f"{', '.join(c.name for c in CASES)}."
        )
    if options.check_only:
        for case in chosen:
            _check_small(case)
        return
    if not torch.cuda.is_available():
        sys.exit("run_gpu: there is no CUDA device here; --check-only compares results without.")
    kernel = choose("cuda", "float32", False, False, False)
    if kernel.kernel is None:
        sys.exit(f"run_gpu: there are no kernels to measure: {kernel.reason}.")
    record = _describe_run() | {"cases": {case.name: _measure(case) for case in chosen}}
    record["targets"] = [target.judge(record) for target in TARGETS]
    _print(record)
    if not options.case:
        write_record(record, RESULTS / "gpu.json")
        print(f"Written: {RESULTS / 'gpu.json'}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure batchnorm against torch on a GPU.")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="only cases with NAME in their name; may be repeated",
    )
    parser.add_argument("--check-only", action="store_true", help="small shapes, and no times")
    return parser.parse_args()


def _describe_run() -> dict[str, Any]:
    card = torch.cuda.get_device_properties(0)
    return {
        "measured": True,
        "command": " ".join(["python", "benchmarks/run_gpu.py", *sys.argv[1:]]),
        "card": card.name,
        "multiprocessors": card.multi_processor_count,
        "memory, GiB": round(card.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "versions": describe_versions("torch", "triton"),
    }


def _check_small(case: Case) -> None:
    """Every variant's result on a small copy of the case, wherever it can run."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and case.dtype == "bfloat16":
        return  # the interpreter cuts off where a GPU rounds
    shape = (min(case.shape[0], 16), min(case.shape[1], 8), *(min(n, 7) for n in case.shape[2:]))
    fused = None if device == "cuda" else True  # which reaches the interpreter
    problem = make_problem(replace(case, shape=shape))
    variants = make_variants(problem, device=device, fused=fused)
    if device == "cpu":  # what the CPU's compiler makes of a variant says nothing of a GPU's
        variants = {name: v for name, v in variants.items() if "compiled" not in name}
    for name, error in check_all(problem, variants).items():
        print(f"{case.name:<22}{name:<24}error {error:.0e}")


def _measure(case: Case) -> dict[str, Any]:
    """The case's record: its title and sizes, and each variant's figures."""
    problem = make_problem(case)
    variants = make_variants(problem, device="cuda")
    if case.name.startswith("small"):
        for name in ("ours", "torch"):
            variants[name + GRAPH] = _capture(variants[name])
    size = count_bytes(case, problem.mask)
    print(f"{case.name} ...", file=sys.stderr, flush=True)
    found = measure(problem, variants, _SECONDS, _LEAST, size=size, clock=_time)
    return {"title": case.title, "dtype": case.dtype, "bytes": size, "variants": found}


def _capture(variant: Variant) -> Variant:
    """The variant's step as a CUDA graph, replayed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            variant.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = variant.step()

    def step() -> Any:
        graph.replay()
        return found  # the graph's memory, which every replay writes anew

    return replace(variant, step=step)


def _time(step: Callable[[], object], calls: int) -> float:
    """Seconds a call, by CUDA events."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    step()  # what the previous variant left in the caches is not this one's
    begin.record()
    for _ in range(calls):
        step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def _print(record: dict[str, Any]) -> None:
    print(record["card"])
    for case in record["cases"].values():
        for name, v in case["variants"].items():
            figures = f"{v['ms']:>9g} ms{v['GB/s']:>8g} GB/s"
            print(f"{case['title']:<36}{case['dtype']:<10}{name:<24}{figures}")
    print_targets(record["targets"])


def _worst(
    prefix: str, above: str, below: str = "ours"
) -> Callable[[dict[str, Any]], tuple[float, str] | None]:
    """The least quotient of two variants over the cases whose name begins so."""

    def find(record: dict[str, Any]) -> tuple[float, str] | None:
        names = [name for name in record["cases"] if name.startswith(prefix)]
        found = [(quotient(record, name, above, below), name) for name in names]
        return min(((value, name) for value, name in found if value is not None), default=None)

    return find


def _of_copy(record: dict[str, Any]) -> tuple[float, str] | None:
    """The least share of the copy's bandwidth, in bytes that the job must move."""
    found = []
    for name, case in record["cases"].items():
        v = case["variants"]
        if "copy" in v and not name.startswith("small"):
            found.append((v["ours"]["GB/s"] / v["copy"]["GB/s"], name))
    return min(found, default=None)


def _compiled(record: dict[str, Any]) -> tuple[float, str] | None:
    """The least quotient of eager code and torch.compile, in training and inference."""
    names = [name for name, case in record["cases"].items() if "ours, compiled" in case["variants"]]
    found = [(quotient(record, name, "ours", "ours, compiled"), name) for name in names]
    return min(((value, name) for value, name in found if value is not None), default=None)


_FIRST = ("image-float32", "image-bfloat16")
TARGETS = (
    Target("half padded, against the compiled formula", 2.0, _worst("mask", "formula, compiled")),
    Target("half padded, times as fast as packing", 4.0, _worst("mask", "pack")),
    *(Target(f"{name}, against torch", 1.0, _worst(name, "torch")) for name in _FIRST),
    Target("channels last, against torch", 1.2, _worst("image-last", "torch")),
    Target("rows, against torch", 1.2, _worst("rows", "torch")),
    Target("add and ReLU, against separate operators", 1.8, _worst("add-relu", "torch")),
    Target("visits, against passes", 1.0, _worst("visits", "ours", "ours, visits")),
    Target("share of the copy's bandwidth", 0.8, _of_copy),
    Target("under torch.compile, against eager", 1.0, _compiled),
    Target(
        "small, replayed graphs, against torch",
        1 / 1.1,
        _worst("small", f"torch{GRAPH}", f"ours{GRAPH}"),
    ),
)


if __name__ == "__main__":
    main()
