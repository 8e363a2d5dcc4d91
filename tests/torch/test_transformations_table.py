"""The rows on PyTorch of the table in docs/transformations.md, each measured.

A row's second cell is what its measurement must find.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from statistics_moves import (
    CASES,
    Case,
    after,
    clones,
    moves,
    moves_of,
    refusal,
    row,
    slices,
    stacked,
)
from torch import Tensor, nn
from torch.func import (
    functional_call,
    functionalize,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    linearize,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vjp,
    vmap,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm1d, accumulate_statistics, keep_statistics

PAGE = (Path(__file__).parents[2] / "docs" / "transformations.md").read_text()
SECTION = PAGE.split("## PyTorch\n")[1].split("\n## ")[0]
ROWS = dict(re.findall(r"^\| (?!transformation)(.+?) \| (.+?) \| .*\|$", SECTION, re.MULTILINE))

pytestmark = [
    # torch scripts decompositions of its own, in forward mode and in compiled graphs.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.export traces this layer:UserWarning"),
    pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning"),  # linearize
]


def with_clones(layer: BatchNorm1d) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
    """A function of x that moves clones of the statistics, and returns them."""

    def call(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        buffers = clones(layer)
        return functional_call(layer, buffers, (x,)).pow(3).sum(), buffers

    return call


def differentiate(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    function(x).sum().backward()


def checkpointed(layer: BatchNorm1d, reentrant: bool = False) -> Callable[[Tensor], Tensor]:
    return lambda x: checkpoint(layer, x, use_reentrant=reentrant)


def compiled(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return torch.compile(function, backend="aot_eager", fullgraph=True)


row(
    "`torch.utils.checkpoint`, reentrant or not",
    reentrant=after(lambda layer, x: differentiate(checkpointed(layer, True), x)),
    not_reentrant=after(lambda layer, x: differentiate(checkpointed(layer), x)),
)
row(
    "`torch.compile`",
    alone=after(lambda layer, x: differentiate(compiled(layer), x)),
    checkpoint=after(lambda layer, x: differentiate(compiled(checkpointed(layer)), x)),
)


def exported(layer: BatchNorm1d, x: Tensor) -> str:
    program = torch.export.export(layer, (x,)).module()
    assert moves_of(layer, x) == "stay"
    program(x)
    return "the program's " + moves_of(program, x)


row("`torch.export`", exported=exported)
row(
    "`torch.fx.symbolic_trace`, `make_fx`",
    symbolic_trace=after(lambda layer, x: torch.fx.symbolic_trace(nn.Sequential(layer))(x)),
    make_fx=after(lambda layer, x: make_fx(layer)(x)),
)


def called_with_buffers(layer: BatchNorm1d, x: Tensor) -> str:
    buffers = clones(layer)
    functional_call(layer, buffers, (x,))
    assert moves_of(layer, x) == "stay"
    return "those given " + moves(buffers, x)


row("`functional_call` with buffers", buffers=called_with_buffers)
row(
    "`functional_call` without buffers",
    parameters=after(lambda layer, x: functional_call(layer, dict(layer.named_parameters()), (x,))),
)

TRANSFORMED: dict[str, Callable[[BatchNorm1d, Tensor], Any]] = {
    "grad": lambda layer, x: grad(lambda x: layer(x).sum())(x),
    "vjp": lambda layer, x: vjp(layer, x),
    "jvp": lambda layer, x: jvp(layer, (x,), (x,)),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "jacfwd": lambda layer, x: jacfwd(layer)(x),
    "hessian": lambda layer, x: hessian(lambda x: layer(x).sum())(x),
}
row(
    "`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`",
    **{name: refusal(run, "clones of the buffers") for name, run in TRANSFORMED.items()},
)


def of_clones(transform: Callable[[Callable[..., Any], Tensor], Any]) -> Case:
    def case(layer: BatchNorm1d, x: Tensor) -> str:
        *_, buffers = transform(with_clones(layer), x)
        assert moves_of(layer, x) == "stay"
        return "the clones " + moves(buffers, x)

    return case


row(
    "the same, with clones made inside",
    grad=of_clones(lambda f, x: grad(f, has_aux=True)(x)),
    vjp=of_clones(lambda f, x: vjp(f, x, has_aux=True)),
    jvp=of_clones(lambda f, x: jvp(f, (x,), (x,), has_aux=True)),
    jacrev=of_clones(lambda f, x: jacrev(f, has_aux=True)(x)),
    jacfwd=of_clones(lambda f, x: jacfwd(f, has_aux=True)(x)),
)


def functionalized(layer: BatchNorm1d, x: Tensor) -> str:
    buffers = clones(layer)
    functionalize(lambda x, b: functional_call(layer, b, (x,)))(x, buffers)
    return "the argument's " + moves(buffers, x)


row(
    "`functionalize`",
    error=refusal(lambda layer, x: functionalize(layer)(x), "with an argument"),
)
row("`functionalize` with buffers as an argument", buffers=functionalized)
row("`linearize`", linearize=after(lambda layer, x: linearize(layer, x)))
row(
    "`torch.autograd.functional`",
    jacobian=after(lambda layer, x: torch.autograd.functional.jacobian(layer, x)),
    hessian=after(lambda layer, x: torch.autograd.functional.hessian(lambda x: layer(x).sum(), x)),
)


def mapped_gradient(layer: BatchNorm1d, x: Tensor) -> Tensor:
    return vmap(grad(lambda x: with_clones(layer)(x)[0]))(slices(x))


row(
    "`vmap`, any `randomness`",
    error=refusal(lambda layer, x: vmap(layer)(slices(x)), "stack_module_state"),
    different=refusal(
        lambda layer, x: vmap(layer, randomness="different")(slices(x)), "stack_module_state"
    ),
    same=refusal(lambda layer, x: vmap(layer, randomness="same")(slices(x)), "stack_module_state"),
    gradients=refusal(mapped_gradient, "stack_module_state"),
)


def mapped_buffers(layer: BatchNorm1d, x: Tensor) -> str:
    buffers = stacked(layer)
    vmap(lambda b, x: functional_call(layer, b, (x,)))(buffers, slices(x))
    return "each slice's " + moves(buffers, slices(x))


row("`vmap` with mapped buffers", mapped=mapped_buffers)
row(
    "`vmap` in evaluation or frozen",
    evaluation=after(lambda layer, x: vmap(layer.eval())(slices(x))),
    frozen=after(lambda layer, x: vmap(layer.freeze())(slices(x))),
)


def ensemble(layer: BatchNorm1d, x: Tensor) -> str:
    parameters, buffers = stack_module_state([copy.deepcopy(layer) for _ in range(4)])
    vmap(lambda p, b, x: functional_call(layer, (p, b), (x,)))(parameters, buffers, slices(x))
    assert moves_of(layer, x) == "stay"
    return "each member's " + moves(buffers, slices(x))


row("`stack_module_state` and `vmap`", ensemble=ensemble)


def replaced(layer: BatchNorm1d, x: Tensor) -> str:
    replace_all_batch_norm_modules_(layer)
    y = vmap(layer)(slices(x))
    torch.testing.assert_close(y.mean(1), torch.zeros(4, 3), atol=1e-5, rtol=0)
    return "none left" if layer.running_mean is None else "some left"


row("`replace_all_batch_norm_modules_`", replaced=replaced)
row(
    "`torch.no_grad`, `torch.inference_mode`",
    no_grad=after(lambda layer, x: torch.no_grad()(layer)(x)),
    inference_mode=after(lambda layer, x: torch.inference_mode()(layer)(x)),
)


def copied(layer: BatchNorm1d, x: Tensor) -> str:
    other = copy.deepcopy(layer)
    other(x)
    assert moves_of(layer, x) == "stay"
    return "the copy's " + moves_of(other, x)


row("`copy.deepcopy`", copied=copied)


def averaged(layer: BatchNorm1d, x: Tensor) -> str:
    average = AveragedModel(layer)
    for _ in range(2):
        layer(x)
        average.update_parameters(layer)
    same = torch.equal(average.module.running_mean, layer.running_mean)
    return "the latest" if same else "others"


def averaged_buffers(layer: BatchNorm1d, x: Tensor) -> str:
    average = AveragedModel(layer, use_buffers=True)
    seen = []
    for _ in range(2):
        layer(x)
        average.update_parameters(layer)
        seen.append(layer.running_mean.clone())
    same = torch.allclose(average.module.running_mean, sum(seen) / 2)
    return "their average" if same else "others"


def recalibrated(layer: BatchNorm1d, x: Tensor) -> str:
    batches = slices(x)
    update_bn(list(batches), layer)
    same = torch.allclose(layer.running_mean, batches.mean((0, 1)))
    return "the average of all batches" if same and layer.momentum == 0.5 else "others"


row("`AveragedModel`", averaged=averaged)
row("`AveragedModel(use_buffers=True)`", averaged=averaged_buffers)
row("`update_bn`", recalibrated=recalibrated)
row("`DataParallel` without GPUs", module=after(lambda layer, x: nn.DataParallel(layer)(x)))


def accumulated(layer: BatchNorm1d, x: Tensor) -> str:
    for _ in range(2):
        layer(x).sum().backward()
    moved = moves_of(layer, x)
    return "move once each" if moved == "move twice" else moved


row("gradient accumulation, for its two micro-batches", accumulated=accumulated)


def in_one_step(layer: BatchNorm1d, x: Tensor) -> str:
    with accumulate_statistics(layer):
        for half in x.chunk(2):
            differentiate(layer, half)
    return moves_of(layer, x)


def kept(layer: BatchNorm1d, x: Tensor) -> str:
    with keep_statistics():
        differentiate(checkpointed(layer), x)
        differentiate(compiled(layer), x)
    return moves_of(layer, x)


row("the same inside `accumulate_statistics`", in_one_step=in_one_step)
row("inside `keep_statistics`", kept=kept)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("name", "case"), [(n, c) for n, _, c in CASES], ids=[f"{n}: {i}" for n, i, _ in CASES]
)
def test_statistics_do_what_the_row_says(name: str, case: Case) -> None:
    torch.manual_seed(0)
    x = (torch.randn(6, 3) + 2).requires_grad_()
    assert case(BatchNorm1d(3, momentum=0.5), x) == ROWS[name]


def test_every_row_is_measured_and_every_measurement_has_a_row() -> None:
    assert list(dict.fromkeys(name for name, _, _ in CASES)) == list(ROWS)
