"""Models that leak padding, found with the layer that does, and models that do not, left alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

import batchnorm.jax
from batchnorm.tools import find_leaks, inspect
from batchnorm.tools.inspection.leaks import Leaks
from batchnorm.torch import BatchNorm1d, BatchNorm2d, padding_mask

pytestmark = pytest.mark.sample(2)

CHANNELS = 8
LENGTHS = torch.tensor([41, 30, 17, 5])
MASK = torch.arange(48) < LENGTHS[:, None]


def make_batch(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, CHANNELS, 48, generator=generator) * MASK[:, None]


def randomize(model: nn.Module) -> nn.Module:
    """Statistics and offsets as after training, so that padding does not come out as 0."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.running_mean, module.bias):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model


def make_plain(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Module:
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Conv1d(8, 8, 5, padding=2), norm(8), nn.SiLU(), nn.Conv1d(8, 8, 3, padding=1)
        )
    )


class Sealed(nn.Module):
    """Convolutions that read zeros at padding, norms with masks, dropout, a pooling of real rows.

    Args:
        stride: of the second convolution.
        mend: multiply by the mask; without, the second convolution leaks.
    """

    def __init__(self, stride: int = 1, mend: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(8, 8, 5, padding=2)
        self.norm = BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.second = nn.Conv1d(8, 16, 3, padding=1, stride=stride)
        self.late = BatchNorm1d(16)
        self.head = nn.Linear(16, 3)
        self.stride, self.mend = stride, mend
        randomize(self)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        real = mask[:, None]
        x = self.first(x.where(real, 0))
        x = self.drop(nn.functional.silu(self.norm(x, mask)))
        x = self.second(x.where(real, 0) if self.mend else x)
        mask = mask[:, :: self.stride]
        x = nn.functional.relu(self.late(x, mask)).where(mask[:, None], 0)
        return self.head(x.sum(-1) / mask.sum(-1, keepdim=True))


def test_second_convolution_reads_what_the_batch_norm_puts_into_padding() -> None:
    x = make_batch()[:1, :, :40]
    leaks = find_leaks(make_plain(), x, torch.ones(1, 40, dtype=torch.bool), more=60)
    assert (leaks.before, leaks.after) == ((40,), (100,))
    first = leaks.first
    assert first is not None
    assert (first.name, first.kind, first.norm) == ("3", "Conv1d", "1")
    assert first.modes == ("evaluation", "training")
    assert "not zero" in first.cause
    assert 'padded_output="zero"' in first.remedy
    assert [leak.name for leak in leaks.leaks] == ["3", "1"]  # the norm in training only
    assert leaks.leaks[1].modes == ("training",)
    assert [leak.name for leak in leaks.sensitive] == ["0"]
    assert not leaks.ok


def test_amount_is_the_difference_of_the_outputs() -> None:
    model, x = make_plain().eval(), make_batch()[:1, :, :40]
    with torch.no_grad():
        expected = float((model(nn.functional.pad(x, (0, 32)))[..., :40] - model(x)).abs().max())
    leaks = find_leaks(model, x, torch.ones(1, 40, dtype=torch.bool), more=32, training=False)
    assert expected > 0.1
    assert leaks.moved == pytest.approx(expected, rel=1e-4)
    assert leaks.first is not None
    assert leaks.first.amount == pytest.approx(expected, rel=1e-4)
    [last] = [layer for layer in leaks.layers if layer.name == "3"]
    moved = np.nan_to_num(last.profile) > 1e-3
    assert np.flatnonzero(moved).tolist() == [0]  # a kernel of 3 reads one position beyond


@pytest.mark.parametrize(
    ("stride", "dtype"),
    [
        (1, torch.float32), (2, torch.float32), (3, torch.float32),
        (1, torch.bfloat16), (2, torch.float16), (2, torch.float64),
    ],
)  # fmt: skip
def test_sealed_model_raises_no_alarm(stride: int, dtype: torch.dtype) -> None:
    leaks = find_leaks(Sealed(stride).to(dtype), make_batch().to(dtype), MASK)
    assert str(leaks).endswith("no leak")
    assert leaks.ok
    assert leaks.sensitive == ()
    assert leaks.modes == ("evaluation", "training")
    assert leaks.compared == 7


class Deep(nn.Module):
    """Many residual blocks, in which roundings add up."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convs = nn.ModuleList(nn.Conv1d(8, 8, 3, padding=1) for _ in range(10))
        self.norms = nn.ModuleList(BatchNorm1d(8) for _ in range(10))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        real = mask[:, None]
        x = x.where(real, 0)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = x + norm(conv(x), mask).relu() * real
        return x


def test_roundings_of_half_types_do_not_add_up() -> None:
    x = make_batch()
    half = find_leaks(Deep().bfloat16(), x.bfloat16(), MASK)
    assert half.ok
    assert half.sensitive == ()

    def run(model: nn.Module, x: Tensor, mask: Tensor) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x, mask)

    mixed = find_leaks(Deep(), x, MASK, run=run)
    assert mixed.ok
    assert mixed.tolerance == half.tolerance


@pytest.mark.parametrize("stride", [1, 2])
def test_one_unsealed_place_is_found(stride: int) -> None:
    leaks = find_leaks(Sealed(stride, mend=False), make_batch(), MASK)
    assert [leak.name for leak in leaks.leaks] == ["second"]
    assert leaks.leaks[0].norm == "norm"
    assert leaks.sensitive == ()


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 2, 1), (10, 5, 0), (8, 4, 4)])
def test_zeros_at_padding_mend_what_a_strided_model_leaks(
    kernel: int, stride: int, padding: int
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(8, 8, 3, padding=1), BatchNorm1d(8), nn.SiLU(),
        nn.Conv1d(8, 8, kernel, stride, padding), BatchNorm1d(8), nn.SiLU(),
        nn.Conv1d(8, 8, 3, padding=1),
    )  # fmt: skip

    def run(model: nn.Module, x: Tensor, mask: Tensor) -> None:
        with padding_mask(mask, follow=model, padded_output="zero"):
            model(x)

    randomize(model)
    found = find_leaks(model, make_batch(), MASK, more=40)
    assert {leak.norm for leak in found.leaks} <= {"1", "4"}
    assert "6" in {leak.name for leak in found.leaks}
    mended = find_leaks(model, make_batch(), MASK, more=40, run=run)
    assert mended.ok, str(mended)


class Patches(nn.Module):
    """Images as patches, `(N, H/4 · W/4, C)`, and heads on the batch axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.mix = nn.Linear(8, 8)
        self.split = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.embed(x).flatten(2).transpose(1, 2))
        return self.split(x.reshape(x.shape[0], -1, 2, 4).transpose(1, 2).flatten(0, 1))


class Rows(nn.Module):
    """Samples flattened to rows and back; real rows alone; time first."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.packed, self.first = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x.transpose(1, 2)  # (N, L, C)
        x = self.flat(x.reshape(-1, 8)).reshape(x.shape)
        packed = self.packed(x[mask])
        return self.first(x.transpose(0, 1)), packed


class Relative(nn.Module):
    """A table of relative positions `(1, 2·L - 1, C)`, which grows at both ends.

    Args:
        samples: of this table; several make it `(N, 2·L - 1, C)`.
    """

    def __init__(self, samples: int = 1) -> None:
        super().__init__()
        self.table, self.use, self.samples = nn.Identity(), nn.Linear(8, 8), samples

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[-1]
        places = torch.arange(1 - length, length, dtype=torch.float32)
        table = self.table(torch.sin(places)[None, :, None].expand(self.samples, -1, 8))
        # A position's relation to itself, in the middle of the table.
        return self.use(x.transpose(1, 2) + table[:, length - 1 : length])


class Causal(nn.Module):
    """A convolution padded at both ends, of which the end is cut off."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.wide, self.up = nn.Conv1d(8, 8, 5, padding=4), nn.ConvTranspose1d(8, 8, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.wide(x)[..., : x.shape[-1]])


class Backward(nn.Module):
    """A sample without padding, read from its end."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flip(-1)).flip(-1)


def images() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 24, 16, dtype=torch.bool)
    mask[0], mask[1, :16, :8] = True, True
    return torch.randn(2, 3, 24, 16) * mask[:, None], mask


HARMLESS: dict[str, Any] = {
    "patches": lambda: find_leaks(Patches(), *images(), more=16),
    "images": lambda: find_leaks(
        nn.Sequential(nn.Conv2d(3, 4, 1), BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), *images()
    ),
    "rows": lambda: find_leaks(Rows(), make_batch(), MASK),
    "flat batch": lambda: find_leaks(
        nn.Sequential(nn.Linear(8, 4), BatchNorm1d(4)), torch.randn(20, 8), torch.arange(20) < 13
    ),
    "relative positions": lambda: find_leaks(Relative(), make_batch()[:1], MASK[:1]),
    "relative positions of several": lambda: find_leaks(Relative(), make_batch(), MASK),
    "relative positions for each": lambda: find_leaks(Relative(4), make_batch(), MASK),
    "causal and finer": lambda: find_leaks(Causal(), make_batch(), MASK),
    "backward": lambda: find_leaks(Backward(), make_batch(), MASK),
    "time first": lambda: find_leaks(
        nn.Linear(8, 8), make_batch().permute(2, 0, 1), MASK, axes=(0,)
    ),
    "pooling": lambda: find_leaks(nn.AvgPool1d(3, ceil_mode=True), make_batch(), MASK),
    "no padding": lambda: find_leaks(nn.Conv1d(8, 8, 7, stride=3), make_batch(), MASK),
    "masked attention": lambda: find_leaks(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        make_batch().transpose(1, 2),
        MASK,
        run=lambda model, x, mask: model(x, src_key_padding_mask=~mask),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HARMLESS)
def test_positions_are_found_in_any_form(name: str) -> None:
    leaks = HARMLESS[name]()
    assert leaks.ok, str(leaks)
    assert leaks.compared == len(leaks.layers), str(leaks)


class Subsampled(nn.Module):
    """A strided convolution, a batch norm without mask, attention to `ceil(length / 2)`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.down, self.norm = nn.Conv1d(8, 8, 3, 2, 1), nn.BatchNorm1d(8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = self.norm(self.down(x)).transpose(1, 2)
        return self.attend(x, x, x, key_padding_mask=~mask[:, ::2], need_weights=False)[0]


@pytest.mark.parametrize("size", [40, 48])
def test_positions_that_are_not_surely_real_accuse_no_layer_behind(size: int) -> None:
    model = randomize(Subsampled())
    leaks = find_leaks(model, make_batch()[..., :size], MASK[:, :size])
    assert [(leak.name, leak.modes) for leak in leaks.leaks] == [("norm", ("training",))]
    assert leaks.shown == "training"


class Mixing(nn.Module):
    """A mean over all positions in the model's own code."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before, self.after = nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.after(x + x.mean(-1, keepdim=True))


def channels_last(model: nn.Module) -> Leaks:
    return find_leaks(model, make_batch().transpose(1, 2), MASK)


LEAKING: dict[str, tuple[Callable[[], Leaks], str, str]] = {
    "attention": (lambda: channels_last(Attention()), "attend", "attention mask"),
    "recurrence": (
        lambda: channels_last(nn.GRU(8, 4, bidirectional=True, batch_first=True)), "", "pack"
    ),
    "pooling": (
        lambda: find_leaks(nn.Sequential(nn.AdaptiveAvgPool1d(1)), make_batch(), MASK), "0",
        "real positions",
    ),
    "convolution": (
        lambda: find_leaks(
            nn.Sequential(nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3, padding=1)), make_batch(), MASK
        ), "1", "x * mask",
    ),
    "norm over positions": (
        lambda: find_leaks(nn.Sequential(nn.GroupNorm(2, 8)), make_batch(), MASK), "0", "channels"
    ),
}  # fmt: skip


class Attention(nn.Module):
    """Self-attention without a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.attend(x, x, x)


@pytest.mark.parametrize("name", LEAKING)
def test_kind_of_layer_decides_the_remedy(name: str) -> None:
    run, layer, remedy = LEAKING[name]
    leaks = run()
    assert leaks.first is not None
    assert leaks.first.name == layer
    assert remedy in leaks.first.remedy


def test_own_code_of_a_model_is_named_with_the_layers_around_it() -> None:
    leaks = find_leaks(Mixing(), make_batch(), MASK)
    [leak] = leaks.leaks
    assert (leak.name, leak.between) == ("", ("before", "after"))
    assert "between before and after" in leak.cause


class Functional(nn.Module):
    """A convolution in the model's own code, behind a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.after = BatchNorm1d(8), nn.ReLU()
        self.weight = nn.Parameter(torch.randn(8, 8, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(nn.functional.conv1d(self.norm(x), self.weight, padding=1))


def test_own_code_behind_a_batch_norm_is_named_with_it() -> None:
    [leak] = find_leaks(randomize(Functional()), make_batch(), MASK).leaks
    assert (leak.between, leak.norm) == (("norm", "after"), "norm")
    assert leak.cause.startswith("Its own code between norm and after reads padding")


def test_zeros_behind_another_norm_do_not_blame_the_batch_norm() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(BatchNorm1d(8), nn.Conv1d(8, 8, 1), nn.Conv1d(8, 8, 3, padding=1))
    [leak] = find_leaks(randomize(model), make_batch(), MASK).leaks
    assert (leak.name, leak.norm) == ("2", "")  # the first convolution's bias is at padding


@pytest.mark.parametrize("training", [True, False])
def test_model_is_as_before(training: bool) -> None:
    model = make_plain().train(training)
    model[2].train(not training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.get_rng_state()
    fast = torch.backends.mha.get_fastpath_enabled()
    find_leaks(model, make_batch(), MASK)
    calls = 0

    def fail(model: Any, x: Any, mask: Any) -> None:
        nonlocal calls
        model(x)
        calls += 1
        if calls == 7:  # in the mode of training
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        find_leaks(model, make_batch(), MASK, run=fail)
    assert calls == 7
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [module.training for module in model] == [training, training, not training, training]
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_mappings_and_nested_batches_are_padded_with_their_masks() -> None:
    model = Sealed()
    seen: list[Any] = []

    def run(model: nn.Module, batch: Any, mask: Tensor) -> None:
        seen.append(batch)
        model(batch["x"], batch["masks"][0] == 1)

    batch = {"x": make_batch(), "masks": [MASK.long()], "labels": torch.arange(4), "name": "a"}
    leaks = find_leaks(model, batch, MASK, run=run, more=7)
    assert leaks.ok
    sizes = {given["x"].shape[-1] for given in seen}
    assert sizes == {41, 48}
    for given in seen:
        assert given["masks"][0].shape == (4, given["x"].shape[-1])
        assert torch.equal(given["masks"][0].sum(1), LENGTHS)
        assert given["labels"] is batch["labels"]
    assert find_leaks(model, {"x": make_batch(), "mask": MASK}, MASK, more=7).ok


def test_padding_is_filled_as_the_batch_is() -> None:
    def read(model: nn.Module, batch: Any, mask: Tensor) -> None:
        seen.append(batch)
        model(batch[0])

    noise = torch.randn(4, 48, generator=torch.Generator().manual_seed(0))
    batch = (
        make_batch().where(MASK[:, None], -3.0),
        torch.full((4, 48), 9).where(~MASK, 1),
        noise,
    )
    for fill, expected in ((None, [-3.0, 9, 0.0]), (2.0, [2.0, 2, 2.0])):
        seen: list[Any] = []
        find_leaks(nn.Conv1d(8, 8, 1), batch, MASK, run=read, more=8, fill=fill)
        assert [float(array[..., -1].unique()) for array in seen[2]] == expected


def test_what_is_cropped_to_a_multiple_is_padding() -> None:
    assert find_leaks(Sealed(), make_batch(), MASK, multiple=16).ok
    assert find_leaks(Sealed(), {"x": make_batch(), "mask": MASK}, MASK, multiple=16).ok


def test_sizes_are_multiples_where_the_model_needs_that() -> None:
    leaks = find_leaks(nn.Conv1d(8, 8, 1), make_batch(), MASK, multiple=16)
    assert (leaks.before, leaks.after) == ((32,), (64,))
    assert find_leaks(nn.Conv1d(8, 8, 1), make_batch(), MASK, multiple=16, more=1).after == (48,)


class Noisy(nn.Module):
    """Noise that no mode switches off."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.noise(x), 0.5, training=True)


ERRORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "noise": (lambda: find_leaks(Noisy(), make_batch(), MASK), ValueError, "same outputs"),
    "tree": (lambda: find_leaks({"a": np.ones(3)}, make_batch(), MASK), TypeError, "tree of"),
    "tuple": (
        lambda: find_leaks(make_plain(), (make_batch(), 1), MASK), TypeError, "run=lambda"
    ),
    "mask of other sizes": (
        lambda: find_leaks(make_plain(), make_batch(), MASK[:, :9]), ValueError, "must fit"
    ),
    "no mask": (lambda: find_leaks(make_plain(), make_batch(), None), TypeError, "mask must be"),
    "nothing real": (
        lambda: find_leaks(make_plain(), make_batch(), ~MASK & MASK), ValueError, "real position"
    ),
    "several axes fit": (
        lambda: find_leaks(make_plain(), torch.ones(4, 8, 8), MASK[:, :8]), ValueError, "axes=(2,)"
    ),
    "no number": (
        lambda: find_leaks(make_plain(), make_batch(), MASK, more=0), ValueError, "more must be"
    ),
    "multiple": (
        lambda: find_leaks(make_plain(), make_batch(), MASK, multiple=64), ValueError, "multiple"
    ),
    "leaks without mask": (
        lambda: inspect(make_plain(), [make_batch()], leaks=True), ValueError, "mask"
    ),
    "leaks without batches": (lambda: inspect(make_plain(), leaks=True), ValueError, "batches"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_the_rule(name: str) -> None:
    run, kind, part = ERRORS[name]
    with pytest.raises(kind) as raised:
        run()
    assert part in str(raised.value)
    assert str(raised.value).startswith(("find_leaks: ", "inspect: "))


def test_axes_decide_where_sizes_do_not() -> None:
    x, mask = make_batch()[:, :, :8], MASK[:, :8]
    assert find_leaks(make_plain(), x, mask, axes=(2,)).before == (8,)


def test_inspect_shows_leaks_in_its_report() -> None:
    model, batch = make_plain(), (make_batch(), MASK)
    report = inspect(
        model,
        iter([batch, batch]),
        call=lambda model, batch: model(batch[0]),
        mask=lambda batch: batch[1],
        leaks=True,
    )
    assert report.batches == 2
    assert report.leaks is not None
    assert [leak.name for leak in report.leaks.leaks] == ["3", "1"]
    found = {finding.code: finding for finding in report.layers[0].findings}
    assert found["padding-read"].level == "error"
    assert "3 (Conv1d)" in found["padding-read"].message
    assert found["padding-in-batch"].level == "warning"
    assert json.loads(report.to_json())["leaks"]["leaks"][0]["name"] == "3"
    assert "3 (Conv1d)" in str(report)
    sealed = inspect(
        Sealed(),
        [batch],
        call=lambda model, batch: model(*batch),
        mask=lambda batch: batch[1],
        leaks=True,
    )
    assert sealed.leaks is not None
    assert sealed.leaks.ok


class Jax(nnx.Module):
    """As `Sealed`, on nnx: channels last, an attribute for each layer.

    Args:
        norm: the batch norm's class.
        mend: put zeros at padding; without, the second convolution leaks.
        compiled: the head runs under `nnx.jit`.
    """

    def __init__(self, norm: Any, mend: bool, compiled: bool = False) -> None:
        rngs = nnx.Rngs(0)
        self.first = nnx.Conv(8, 8, (5,), rngs=rngs)
        self.norm = norm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.second = nnx.Conv(8, 8, (3,), strides=2, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)
        self.mend, self.compiled = mend, compiled
        self.norm.bias[...] = jax.random.normal(jax.random.key(1), (8,))

    def __call__(self, x: Any, mask: Any) -> Any:
        real = mask[..., None]
        x = self.drop(nnx.silu(self.norm(self.first(jnp.where(real, x, 0)), mask=real)))
        x = self.second(jnp.where(real, x, 0) if self.mend else x)
        real = real[:, ::2]
        x = jnp.where(real, x, 0).sum(1) / real.sum(1)
        return nnx.jit(lambda head, x: head(x))(self.head, x) if self.compiled else self.head(x)


def make_jax_batch() -> tuple[Any, Any]:
    return jnp.asarray(make_batch().transpose(1, 2).numpy()), jnp.asarray(MASK.numpy())


@pytest.mark.parametrize("norm", [nnx.BatchNorm, batchnorm.jax.BatchNorm])
@pytest.mark.parametrize("mend", [True, False])
def test_nnx_models(norm: Any, mend: bool) -> None:
    model = Jax(norm, mend)
    before, original = nnx.to_pure_dict(nnx.state(model)), norm.__call__
    leaks = find_leaks(model, *make_jax_batch())
    assert [leak.name for leak in leaks.leaks] == ([] if mend else ["second"])
    assert all(leak.norm == "norm" for leak in leaks.leaks)
    assert leaks.sensitive == ()
    assert [layer.name for layer in leaks.layers if not layer.inner] == [
        "first", "norm", "drop", "second", "head"
    ]  # fmt: skip
    after = nnx.to_pure_dict(nnx.state(model))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, before, after))
    assert norm.__call__ is original


def test_zeros_at_padding_mend_a_leak_of_nnx() -> None:
    def zeroed(size: int, rngs: nnx.Rngs) -> Any:
        return batchnorm.jax.BatchNorm(size, padded_output="zero", rngs=rngs)

    assert find_leaks(Jax(zeroed, mend=False), *make_jax_batch()).ok


def test_what_jax_compiles_is_part_of_the_layer_around_it() -> None:
    leaks = find_leaks(Jax(nnx.BatchNorm, True, compiled=True), *make_jax_batch())
    assert leaks.ok
    assert "head" not in {layer.name for layer in leaks.layers}
    with pytest.raises(ValueError, match="find_leaks: model must run its layers eagerly"):
        find_leaks(
            Jax(nnx.BatchNorm, True),
            *make_jax_batch(),
            run=lambda model, x, mask: nnx.jit(lambda m, x, k: m(x, k))(model, x, mask),
        )
