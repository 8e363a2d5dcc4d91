"""All arrays of checkpoints, merged into one file of their layout, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from adversaries import pickled_tensors, write_pt
from files import linen_variables, torch_model, write_keras, write_orbax
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner, Result

from batchnorm.cli import app
from batchnorm.tools import merge
from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
from batchnorm.tools.merging.files import merge_checkpoints

pytestmark = pytest.mark.sample(2)

COUNTS = [100, 300]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


def state_of(offset: float = 0.0, **more: torch.Tensor) -> dict[str, torch.Tensor]:
    """The state dict of a convolution and two batch norms, moved by `offset`."""
    state = torch_model().state_dict()
    torch.manual_seed(0)
    state["conv.weight"] = torch.randn(4, 3, 3, 3) + offset
    state["conv.bias"] = torch.randn(4).to(torch.bfloat16) + offset
    for name in ("bn1.running_mean", "bn1.running_var", "bn1.weight"):
        state[name] += offset
    state["bn1.num_batches_tracked"] += int(offset)
    return {**state, **more}


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two training checkpoints of torch, with an optimizer's state."""
    paths = [tmp_path / f"{name}.pt" for name in "ab"]
    for path, offset in zip(paths, (0.0, 2.0), strict=True):
        state = state_of(offset, table=torch.arange(3), small=torch.full((2,), offset).half())
        state["scalar"] = torch.tensor(offset, dtype=torch.bfloat16)
        moments = {0: {"step": torch.tensor(offset), "exp_avg": torch.ones(3)}}
        optimizer = {"state": moments, "param_groups": [{"lr": 0.1}]}
        torch.save({"epoch": 3, "net": {"model": state}, "optimizer": optimizer}, path)
    return paths


def test_torch_files_merge_as_state_dicts_do(pair: list[Path], tmp_path: Path) -> None:
    report = merge_checkpoints(pair, tmp_path / "c.pth", counts=COUNTS, everything=True)
    states = [torch.load(path)["net"]["model"] for path in pair]
    wanted = merge(states, COUNTS, everything=True)
    written = torch.load(tmp_path / "c.pth", weights_only=True)
    assert list(written) == ["net"]
    assert list(written["net"]["model"]) == list(wanted)
    for name, tensor in wanted.items():
        found = written["net"]["model"][name]
        assert found.dtype == tensor.dtype, name
        assert torch.equal(found, tensor), name
    assert written["net"]["model"]["bn1.num_batches_tracked"] == 7 + 9
    assert (report.others, report.written.left_out) == (5, 2)
    assert report.layers[0].missed > 0.1


def test_what_is_left_out_of_a_file_is_said(pair: list[Path], tmp_path: Path) -> None:
    done = run(*pair, "-o", tmp_path / "c.pt", "--all")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert lines[0] == (
        f"{tmp_path / 'c.pt'}: 2 batch norms and 5 other arrays of 2 files merged, the first "
        "file's names, 2 other arrays left out"
    )
    assert "bn1: means up to" in lines[1]
    for path in pair:
        optimizer = "2 arrays of optimizers or callbacks are left out: 'optimizer.state.0.step', "
        assert f"  note: {path}: {optimizer}'optimizer.state.0.exp_avg'." in lines
        values = "2 values that are no arrays are left out: 'epoch', 'optimizer.param_groups.0.lr'"
        assert f"  note: {path}: {values}." in lines


def test_files_from_before_torch_1_6_merge(tmp_path: Path) -> None:
    for name, offset in (("a", 0.0), ("b", 2.0)):
        torch.save(state_of(offset), tmp_path / name, _use_new_zipfile_serialization=False)
    merge_checkpoints([tmp_path / "a", tmp_path / "b"], tmp_path / "c.pt", everything=True)
    wanted = merge([state_of(0.0), state_of(2.0)], everything=True)
    written = torch.load(tmp_path / "c.pt")
    assert all(torch.equal(written[name], tensor) for name, tensor in wanted.items())


def arrays_of(offset: float) -> dict[str, np.ndarray]:
    """The arrays of a safetensors file, of many types."""
    rng = np.random.default_rng(0)
    arrays = {
        f"bn.running_{k}": rng.uniform(1, 2, 3).astype("f4") + offset for k in ("var", "mean")
    }
    arrays["bn.weight"] = (rng.uniform(1, 2, 3) + offset).astype(np.float16)
    for dtype in ("float64", "float16", "bfloat16"):
        arrays[f"x/{dtype}"] = (rng.normal(size=(2, 3)) + offset).astype(dtype)
    return arrays | {
        "scalar": np.array(offset, np.float32),
        "empty": np.zeros((0, 3), "f4"),
        "mask": np.array([True, False]),
        "bytes": np.arange(3, dtype=np.uint8),
    }


def test_safetensors_keep_types_and_metadata(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in "ab"]
    for path, offset in zip(paths, (0.0, 2.0), strict=True):
        save_file(arrays_of(offset), path, {"format": "pt", "step": str(offset)})
    target = tmp_path / "c.safetensors"
    done = merge_checkpoints(paths, target, counts=COUNTS, everything=True)
    found, (a, b) = load_file(target), map(arrays_of, (0.0, 2.0))
    assert list(found) == list(load_file(paths[0]))
    for name, ours in a.items():
        assert (found[name].dtype, found[name].shape) == (ours.dtype, ours.shape), name
        if not name.startswith("bn."):
            mean = ours if ours.dtype.kind in "bu" else (ours / 4 + b[name] * 0.75)
            digits = {"float16": 1e-3, "bfloat16": 1e-2}.get(ours.dtype.name, 1e-6)
            np.testing.assert_allclose(found[name].astype("f8"), mean.astype("f8"), rtol=digits)
    assert found["bn.running_var"].max() > 2 + a["bn.running_var"].max(), "the means' distance"
    with safe_open(target, "numpy") as file:
        assert file.metadata() == {"format": "pt", "step": "0.0"}
    (note,) = done.written.notes
    assert (
        note
        == f"Metadata and attributes are those of {paths[0]}; 1 differ between the files: step."
    )


def test_flax_files_merge_as_variables_do(tmp_path: Path) -> None:
    from flax import serialization

    trees = [linen_variables(), linen_variables()]
    for number, tree in enumerate(trees):
        tree["params"]["a/b"] = {"kernel": np.full((2, 2), number, ml_dtypes.bfloat16)}
        tree["batch_stats"]["bn1"]["mean"] += number
        whole = {**tree, "opt_state": {"0": {"mu": np.ones(3)}}, "step": 7}
        (tmp_path / str(number)).write_bytes(serialization.msgpack_serialize(whole))
    target = tmp_path / "c.msgpack"
    done = merge_checkpoints([tmp_path / "0", tmp_path / "1"], target, everything=True)
    wanted = merge(trees, everything=True)
    written = serialization.msgpack_restore(target.read_bytes())
    assert set(written) == {"params", "batch_stats"}
    assert written["params"]["a/b"]["kernel"].dtype == ml_dtypes.bfloat16
    assert float(written["params"]["a/b"]["kernel"][0, 0]) == 0.5
    for collection, layer, role in (
        ("batch_stats", "bn1", "var"),
        ("batch_stats", "bn1", "mean"),
        ("params", "bn2", "scale"),
    ):
        ours, theirs = written[collection][layer][role], wanted[collection][layer][role]
        np.testing.assert_array_equal(ours, theirs)
    assert (
        "1 array of an optimizer or callback is left out: 'opt_state/0/mu'."
        in done.written.notes[0]
    )
    assert "1 value that is no array is left out: 'step'." in done.written.notes[1]


def test_checkpoint_of_lightning_gives_its_weights(tmp_path: Path) -> None:
    """Paths of files, and what callbacks and optimizers keep, differ from run to run."""
    for offset in (0.0, 2.0):
        score = {"best_model_score": torch.tensor(offset), f"/{offset}": torch.tensor(offset)}
        whole = {
            "state_dict": state_of(offset),
            "callbacks": {"ModelCheckpoint": score},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(int(offset) + 1)}}}],
        }
        torch.save(whole, tmp_path / f"{offset}")
    done = merge_checkpoints(
        [tmp_path / "0.0", tmp_path / "2.0"], tmp_path / "c.pt", everything=True
    )
    written = torch.load(tmp_path / "c.pt")
    assert list(written) == ["state_dict"]
    assert list(written["state_dict"]) == list(state_of())
    assert "3 arrays of optimizers or callbacks are left out" in done.written.notes[0]


def test_keys_that_are_numbers_are_not_written_as_texts(tmp_path: Path) -> None:
    import msgpack

    array = msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"\0\0\0\0")))
    (tmp_path / "a").write_bytes(msgpack.packb({"layers": {0: {"kernel": array}}}))
    assert list(read_checkpoint(tmp_path / "a").entries) == ["layers/0/kernel"]
    with pytest.raises(CheckpointError, match="under a key that is a number"):
        read_checkpoint(tmp_path / "a", everything=True)


def test_models_of_weight_0_may_hold_anything(tmp_path: Path) -> None:
    for name, offset in (("a", 1.0), ("b", torch.nan)):
        torch.save({**state_of(), "x": torch.tensor([offset])}, tmp_path / name)
    paths = [tmp_path / "a", tmp_path / "b"]
    merge_checkpoints(paths, tmp_path / "c.pt", counts=[9, 0], everything=True)
    assert torch.load(tmp_path / "c.pt")["x"] == 1.0


def changed(**changes: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        state = state_of()
        for name, value in changes.items():
            state.pop(name.replace("_", "."), None)
            if value is not None:
                state[name.replace("_", ".")] = value
        torch.save(state, path)

    return write


def in_list(path: Path) -> None:
    torch.save({"models": [state_of()]}, path)


def quantized(path: Path) -> None:
    torch.save({**state_of(), "x": torch.zeros(2, dtype=torch.float8_e4m3fn)}, path)


@pytest.mark.parametrize(
    ("write", "options", "message"),
    [
        (changed(conv_bias=None), "", "B has no array 'conv.bias', A an array 'conv.bias'"),
        (changed(x=torch.ones(1)), "", "B has an array 'x', A no array 'x'"),
        (changed(conv_bias=torch.ones(3)), "", "B has 'conv.bias' of shape (3,), A (4,)"),
        (changed(conv_bias=torch.ones(4)), "", "'conv.bias' of type float32, A bfloat16"),
        (
            changed(conv_bias=torch.full((4,), torch.nan).to(torch.bfloat16)),
            "",
            "'conv.bias' must be finite in all models to be averaged; B has nan in 4 of 4 values",
        ),
        (changed(bn1_weight=torch.full((4,), torch.inf)), "", "gamma must be finite in every"),
        (write_keras, "", "B has the format keras, A torch"),
        (in_list, "", "lies in a list, or under a key that is a number or empty"),
        (quantized, "", "'x' is a tensor of torch._utils._rebuild_tensor_v3, which cannot be"),
        (changed(), "--names torch", "names (--names) must be left out with everything=True"),
        (changed(), "--limit 500", "raise limit= (--limit on the command line)"),
        (changed(), "-o C.safetensors", "A is a file like .pt; only batch norms are converted"),
    ],
)
def test_refused_with_one_line(
    write: Callable[[Path], None], options: str, message: str, tmp_path: Path
) -> None:
    a, b, target = tmp_path / "A", tmp_path / "B", tmp_path / "C.pt"
    torch.save(state_of(), a)
    write(b)
    words = options.replace("C.s", f"{tmp_path / 'C.s'}").split()
    done = run(a, b, "-o", target, "--all", *words)
    assert done.exit_code == 2, done.output
    lines = " ".join(done.output.split()).replace(f"{tmp_path}/", "")
    assert message in lines
    assert "Traceback" not in lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["A", "B"]


def test_integers_that_differ_are_refused_with_the_files_and_the_remedy(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path, last in zip(paths, (1, 1, 2), strict=True):
        torch.save({**state_of(), "index": torch.tensor([0, last])}, path)
    with pytest.raises(ValueError, match="'index' holds int64") as caught:
        merge_checkpoints(paths, tmp_path / "d.pt", everything=True)
    assert f"differs between {paths[0]} and {paths[2]}; make it the same" in str(caught.value)
    assert "leave everything=True (--all) out" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("write", "suffix", "message"),
    [
        (write_keras, "weights.h5", r"in a format that is not written \(keras\)"),
        (write_orbax, "msgpack", r"in a format that is not written \(orbax\)"),
    ],
)
def test_formats_that_are_not_written_are_refused(
    write: Callable[[Path], None], suffix: str, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        merge_checkpoints([tmp_path / "a"] * 2, tmp_path / f"b.{suffix}", everything=True)


def test_arrays_beyond_the_limit_are_refused_only_where_they_are_loaded(tmp_path: Path) -> None:
    path = tmp_path / "a.pt"
    torch.save({**state_of(), "big": torch.zeros(1 << 19)}, path)
    assert len(read_checkpoint(path, limit=1 << 20).layers) == 2
    with pytest.raises(CheckpointError, match=r"needs 2097152 bytes, which exceeds the limit of"):
        read_checkpoint(path, limit=1 << 20, everything=True)
    found = read_checkpoint(path, limit=1 << 22, everything=True).contents
    assert found is not None
    assert found.others["big"].shape == (1 << 19,)


@pytest.mark.parametrize("shape", [(1 << 40,), (1 << 20, 1 << 20), (1 << 28,), (5,)])
@pytest.mark.parametrize("stride", [0, 1])
def test_arrays_that_lie_about_their_size_are_refused(
    shape: tuple[int, ...], stride: int, tmp_path: Path
) -> None:
    places = dict.fromkeys(("other", "another"), 0)
    pickled = pickled_tensors(places, 4, shape, (stride,) * len(shape))
    write_pt(tmp_path / "x", pickled, struct.pack("<4f", 1, 2, 3, 4))
    if stride == 0 and shape == (5,):  # one value, five times
        found = read_checkpoint(tmp_path / "x", everything=True).contents
        assert found is not None
        assert found.others["other"].tolist() == [1.0] * 5
        return
    with pytest.raises(CheckpointError, match=r"beyond its storage|exceeds the limit"):
        read_checkpoint(tmp_path / "x", limit=1 << 20, everything=True)


def test_safetensors_header_that_lies_is_refused(tmp_path: Path) -> None:
    header = {"x": {"dtype": "F32", "shape": [1 << 30], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    (tmp_path / "x").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 4)
    with pytest.raises(CheckpointError, match="no intact safetensors file"):
        read_checkpoint(tmp_path / "x", everything=True)
