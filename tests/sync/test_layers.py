"""Synchronized layers together with torch's other features for layers."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from contextlib import closing

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, BatchNorm2d, batch_norm, convert_batchnorm
from batchnorm.torch.ranks import messages
from processes import World, results
from torch_world import join, make_world

pytestmark = pytest.mark.sample(2)

PATHS = pytest.mark.parametrize("fused", [None, False], ids=["kernels", "plain"])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def run(world: World, function: Callable[..., object], *arguments: object) -> list:
    """`function(rank, size, *arguments)` on every rank."""
    return results(world.run(function, [(r, world.size, *arguments) for r in range(world.size)]))


def rows(rank: int | None, size: int, channels: int = 4) -> Tensor:
    """A rank's part of a batch of unequal parts; None: the whole batch."""
    parts = [_rows(r, channels) for r in range(size)]
    return torch.cat(parts) if rank is None else parts[rank]


def _rows(rank: int, channels: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2 + 3 * rank, channels, 3, 3, generator=generator)


def loss(y: Tensor) -> Tensor:
    """A sum over samples that no symmetry of the normalization cancels."""
    return (y**3 + y.abs().sqrt() * y).sum()


class Calls:
    """Counts what is sent to one other rank."""

    def __init__(self) -> None:
        self._peers, self.sent = messages.Peers, []

    def __enter__(self) -> Calls:
        self._original = self._peers.receive

        def count(peers, expected, message, waiting):
            self.sent.append((waiting.split()[-2], message.dtype, message.numel()))
            return self._original(peers, expected, message, waiting)

        self._peers.receive = count
        return self

    def __exit__(self, *_: object) -> None:
        self._peers.receive = self._original


# Messages


def count_messages(rank, size, dtype, fused, varying):
    layer = BatchNorm2d(4, synchronized=True, fused=fused)
    x = rows(rank, size).to(dtype).requires_grad_()
    mask = torch.ones(x.shape if varying else x.shape[:1], dtype=torch.bool)
    if varying:
        mask[0, 0, 0, 0] = False
    layer(x, mask)  # agrees
    with Calls() as calls:
        loss(layer(x, mask).float()).backward()
    return calls.sent


@PATHS
@pytest.mark.parametrize("varying", [False, True], ids=["one_count", "counts"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_step_sends_one_message_each_way(worlds, dtype, fused, varying):
    forward = ("forward", torch.float64, 3 * 4 if varying else 2 * 4 + 1)
    for sent in run(worlds[2], count_messages, dtype, fused, varying):
        assert sent == [forward, ("backward", torch.float64, 2 * 4)]


def count_silent(rank, size, fused):
    layer = BatchNorm2d(4, synchronized=True, fused=fused)
    layer(rows(rank, size))
    x = rows(rank, size).requires_grad_()
    with Calls() as calls:
        for quiet in (layer.eval(), layer.train().freeze()):
            loss(quiet(x)).backward()
        loss(layer.unfreeze()(x)).backward()
    return [kind for kind, _, _ in calls.sent]


@PATHS
def test_evaluation_and_frozen_layers_send_nothing(worlds, fused):
    assert run(worlds[2], count_silent, fused) == [["forward", "backward"]] * 2


def repeat(rank, size, fused):
    bits = []
    for _ in range(2):
        torch.manual_seed(0)
        layer = BatchNorm2d(4, synchronized=True, fused=fused, momentum=None)
        x = (rows(rank, size) + 1e3).requires_grad_()
        for _ in range(3):
            y = layer(x)
        loss(y).backward()
        bits.append((y.detach(), x.grad, layer.running_mean.clone(), layer.running_var.clone()))
    return bits


@PATHS
def test_ranks_and_reruns_agree_to_the_bit(worlds, fused):
    found = run(worlds[3], repeat, fused)
    for first, second in found:
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert torch.equal(first[2], found[0][0][2])
        assert torch.equal(first[3], found[0][0][3])


class Collectives:
    """Makes gloo run its collectives, as other backends do; collectives have no tags."""

    def __enter__(self) -> None:
        self._original = messages.Peers.expect
        messages.Peers.expect = lambda *arguments: None

    def __exit__(self, *_: object) -> None:
        messages.Peers.expect = self._original


def by_collectives(rank, size, fused):
    layer = BatchNorm2d(4, synchronized=True, fused=fused)
    x = rows(rank, size).requires_grad_()
    with Collectives():
        y = layer(x)
        loss(y).backward()
    reference = nn.BatchNorm2d(4)
    whole = rows(None, size).requires_grad_()
    loss(reference(whole)).backward()
    first = sum(2 + 3 * r for r in range(rank))
    return (
        (x.grad - whole.grad[first : first + len(x)]).abs().max().item(),
        (layer.running_var - reference.running_var).abs().max().item(),
    )


@PATHS
def test_backends_that_run_collectives(worlds, fused):
    for of_gradient, of_variance in run(worlds[3], by_collectives, fused):
        assert of_gradient < 1e-4
        assert of_variance < 1e-5


def mixed_up(rank, size):
    """Ranks that enter the same collective for different layers of one size."""
    layers = [BatchNorm2d(4, synchronized=True) for _ in range(2)]
    with Collectives():
        for layer in layers:
            layer(rows(rank, size))
        before = [layer.running_mean.clone() for layer in layers]
        layer = layers[rank]
        y = layer(rows(rank, size))
        total = messages.find_peers(None).total(torch.ones(3).double(), f"{rank}", "test")
    return (
        y.isnan().all().item(),
        torch.equal(layer.running_mean, before[rank]),
        total.isnan().all(),
    )


def test_collectives_that_do_not_belong_together_give_nan(worlds):
    assert run(worlds[2], mixed_up) == [(True, True, True)] * 2


# Data


def with_offset(rank, size, dtype, fused):
    """float32 at S3's offsets; float64, whose mean is sent as one number."""
    layer = BatchNorm2d(4, synchronized=True, fused=fused, affine=False, eps=1e-5)
    x = (rows(rank, size, 4).double() + 1e6).to(dtype)
    whole = (rows(None, size, 4).double() + 1e6).to(dtype).double()
    expected = torch.nn.functional.batch_norm(whole - 1e6, None, None, training=True)
    first = sum(2 + 3 * r for r in range(rank))
    return (layer(x).double() - expected[first : first + len(x)]).abs().max().item()


@PATHS
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 5e-6), (torch.float64, 1e-9)])
def test_large_offsets(worlds, dtype, bound, fused):
    assert max(run(worlds[3], with_offset, dtype, fused)) < bound


def all_empty(rank, size, fused, masked):
    layer = BatchNorm2d(4, synchronized=True, fused=fused)
    with torch.no_grad():
        layer.running_mean.fill_(2.0)
    x = torch.randn(3 if masked else 0, 4, 2, 2, requires_grad=True)
    mask = torch.zeros(3, dtype=torch.bool) if masked else None
    y = layer(x, mask)
    loss(y).backward()
    unchanged = layer.running_mean.eq(2.0).all() and layer.num_batches_tracked == 0
    zero = x.grad.eq(0).all() and layer.weight.grad.eq(0).all() and layer.bias.grad.eq(0).all()
    return bool(y.isfinite().all()), bool(unchanged), bool(zero)


@PATHS
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "no_rows"])
def test_all_ranks_empty(worlds, masked, fused):
    assert run(worlds[2], all_empty, fused, masked) == [(True, True, True)] * 2


def half_and_empty(rank, size, fused):
    """Ranks of different types, one of them without rows."""
    dtype = [torch.bfloat16, torch.float32, torch.float16][rank]
    layer = BatchNorm2d(4, synchronized=True, fused=fused, affine=False)
    x = rows(rank, size).to(torch.bfloat16).float()
    x = (x[:0] if rank == 0 else x).to(dtype).requires_grad_()
    y = layer(x)
    loss(y.float()).backward()
    return y.dtype, x.grad.shape, layer.running_mean


@PATHS
def test_ranks_of_different_types(worlds, fused):
    found = run(worlds[3], half_and_empty, fused)
    whole = torch.cat([rows(r, 3) for r in (1, 2)]).bfloat16().float()
    for (dtype, shape, mean), wanted in zip(
        found, (torch.bfloat16, torch.float32, torch.float16), strict=True
    ):
        assert dtype == wanted
        assert shape[1:] == (4, 3, 3)
        torch.testing.assert_close(mean, 0.1 * whole.mean((0, 2, 3)), **CLOSE)


def one_value(rank, size, fused):
    layer = BatchNorm(3, synchronized=True, fused=fused)
    x = torch.full((1, 3), float(rank), requires_grad=True)
    y = layer(x)
    loss(y).backward()
    return y.detach(), layer.running_var


@PATHS
def test_one_value_on_each_rank(worlds, fused):
    """torch's ValueError is for shapes of one value per channel; other ranks' rows count (S7)."""
    (low, var), (high, _) = run(worlds[2], one_value, fused)
    assert torch.allclose(low, torch.tensor(-1.0), atol=1e-4)
    assert torch.allclose(high, torch.tensor(1.0), atol=1e-4)
    assert torch.allclose(var, torch.full((3,), 0.9 + 0.1 * 0.5))


def overflow(rank, size, fused):
    layer = BatchNorm2d(4, synchronized=True, fused=fused)
    x = rows(rank, size)
    if rank == 1:
        x[0, 2, 0, 0] = torch.inf
    y = layer(x)
    return layer.running_mean, y.isnan().any(dim=(0, 2, 3))


@PATHS
def test_a_value_that_is_not_finite_reaches_no_rank_s_statistics(worlds, fused):
    for mean, bad in run(worlds[2], overflow, fused):
        assert bad.tolist() == [False, False, True, False]
        assert mean[2] == 0
        assert (mean[[0, 1, 3]] != 0).all()


def ghost(rank, size, renorm, masked):
    layer = BatchNorm2d(4, synchronized=True, virtual_batch_size=2, renorm=renorm, momentum=0.5)
    x = torch.randn(2 + 4 * rank, 4, 3, 3, generator=torch.Generator().manual_seed(rank))
    mask = torch.arange(len(x)) % (len(x) // 2) != 0 if masked else None  # group 0 is padding
    y = layer(x, mask)
    return x, mask, y.detach(), layer.running_mean, layer.running_var


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "empty_groups"])
@pytest.mark.parametrize("renorm", [False, True])
def test_ghost_groups_stay_local_and_their_averages_are_merged(worlds, renorm, masked):
    found = run(worlds[3], ghost, renorm, masked)
    means, variances = [], []
    for x, mask, y, *_ in found:
        groups = len(x) // 2
        for g in range(groups):
            of_group = x[g::groups]
            if mask is not None and not mask[g::groups].any():
                continue
            means.append(of_group.mean((0, 2, 3)))
            variances.append(of_group.var((0, 2, 3), correction=0 if renorm else 1))
            if not renorm:
                expected = nn.functional.batch_norm(of_group, None, None, training=True)
                torch.testing.assert_close(y[g::groups], expected, **CLOSE)
    mean, var = torch.stack(means).mean(0), torch.stack(variances).mean(0)
    running = 0.5 + 0.5 * var
    if renorm:
        running = (0.5 + 0.5 * (var + 1e-5).sqrt()).square() - 1e-5
    for *_, running_mean, running_var in found:
        torch.testing.assert_close(running_mean, 0.5 * mean, **CLOSE)
        torch.testing.assert_close(running_var, running, **CLOSE)


# Groups, layers, passes


def by_pairs(rank, size, fused):
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = BatchNorm2d(4, synchronized=True, process_group=pairs[rank // 2], fused=fused)
    shared = copy.deepcopy(layer).process_group is layer.process_group
    layer(rows(rank, size))
    return layer.running_mean, shared


@PATHS
def test_sub_groups(worlds, fused):
    found = run(worlds[4], by_pairs, fused)
    for pair in ((0, 1), (2, 3)):
        whole = torch.cat([rows(r, 4) for r in pair])
        for r in pair:
            mean, shared = found[r]
            torch.testing.assert_close(mean, 0.1 * whole.mean((0, 2, 3)), **CLOSE)
            assert shared


def in_many_ways(rank, size, way, fused):
    """The gradients of a small network, all ranks' parameter gradients added up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 1), BatchNorm2d(6, fused=fused), nn.Conv2d(6, 4, 1))
    model.append(BatchNorm2d(4, activation="relu", renorm=way == "renorm", fused=fused))
    convert_batchnorm(model, synchronized=rank is not None)
    x = rows(rank, size).requires_grad_()

    def again() -> Tensor:
        if way in ("reentrant", "recomputed", "renorm"):
            return checkpoint(model, x, use_reentrant=way == "reentrant")
        return model(x)

    if way == "twice":  # two forward passes before a backward pass
        first = loss(model(x))
        (first + loss(model(2 * x + 1))).backward()
    elif way == "retained":
        y = loss(again())
        y.backward(retain_graph=True)
        y.backward()
    else:
        for _ in range(2):
            loss(again()).backward()
    gradients = [p.grad for p in model.parameters()]
    if rank is not None:
        for gradient in gradients:
            dist.all_reduce(gradient)
    return x.grad, gradients, list(model.buffers())


@PATHS
@pytest.mark.parametrize("way", ["plain", "twice", "retained", "reentrant", "recomputed", "renorm"])
def test_gradients_are_those_of_one_process(worlds, way, fused):
    x_grad, gradients, buffers = in_many_ways(None, 3, way, fused)
    found = run(worlds[3], in_many_ways, way, fused)
    close = {"rtol": 1e-4, "atol": 1e-4 * max(g.abs().max() for g in gradients)}
    torch.testing.assert_close(torch.cat([f[0] for f in found]), x_grad, **close)
    for _, some, state in found:
        for a, b in zip(some, gradients, strict=True):
            torch.testing.assert_close(a, b, **close)
        for a, b in zip(state, buffers, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def count_recomputed(rank, size, fused):
    layer = BatchNorm2d(4, synchronized=True, fused=fused)
    x = rows(rank, size).requires_grad_()
    layer(x)
    with Calls() as calls:
        loss(checkpoint(layer, x, use_reentrant=False)).backward()
    return [kind for kind, _, _ in calls.sent]


@PATHS
def test_a_recomputed_forward_pass_sends_nothing(worlds, fused):
    assert run(worlds[2], count_recomputed, fused) == [["forward", "backward"]] * 2


def as_function(rank, size):
    mean, var = torch.zeros(4), torch.ones(4)
    y = batch_norm(
        rows(rank, size), mean, var, training=True, synchronized=True, process_group=None
    )
    return y, mean


def test_function(worlds):
    expected = nn.functional.batch_norm(rows(None, 2), None, None, training=True)
    found = run(worlds[2], as_function)
    torch.testing.assert_close(torch.cat([y for y, _ in found]), expected, **CLOSE)
    assert torch.equal(found[0][1], found[1][1])


# Higher derivatives


def second_order(rank, size, fused, masked):
    """The gradient of a gradient's norm, in float64."""
    torch.manual_seed(0)
    layer = BatchNorm2d(4, dtype=torch.float64, fused=fused, synchronized=rank is not None)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 1.5)
    x = rows(rank, size).double().requires_grad_()
    mask = None
    if masked:
        mask = x.detach()[:, 0, :, :] > -0.5
    y = loss(layer(x, mask))
    (dx,) = torch.autograd.grad(y, x, create_graph=True)
    return torch.autograd.grad(dx.pow(3).sum(), [x, layer.weight])


@PATHS
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_second_derivatives(worlds, masked, fused):
    dx, dweight = second_order(None, 3, fused, masked)
    found = run(worlds[3], second_order, fused, masked)
    close = {"rtol": 1e-8, "atol": 1e-8 * dx.abs().max()}
    torch.testing.assert_close(torch.cat([part for part, _ in found]), dx, **close)
    total = sum(part for _, part in found)
    torch.testing.assert_close(total, dweight, rtol=1e-8, atol=1e-8 * dweight.abs().max())


def transformed(rank, size, kind):
    layer = BatchNorm2d(4, synchronized=True)
    x = rows(rank, size)
    layer(x)
    before = layer.running_mean.clone()
    call = torch.func.vmap(layer) if kind == "vmap" else lambda x: torch.func.jvp(layer, (x,), (x,))
    with pytest.raises(RuntimeError):
        call(torch.stack([x, x]) if kind == "vmap" else x)
    return torch.equal(layer.running_mean, before)


@pytest.mark.parametrize("kind", ["vmap", "jvp"])
def test_transformations_that_cannot_be_right_raise(kind):
    with closing(make_world(2, 5.0)) as world:
        world.values(join)
        assert run(world, transformed, kind) == [True, True]


# torch's own wrappers


class Branching(nn.Module):
    """A model with a synchronized layer that has no part in the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.unused = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        self.unused(x.detach())
        return self.used(x)


def in_ddp(rank, size, unused, accumulate, static):
    torch.manual_seed(0)
    model = convert_batchnorm(Branching(), synchronized=True)
    wrapped = model
    if rank is not None:
        wrapped = DistributedDataParallel(model, find_unused_parameters=unused, static_graph=static)
    x = rows(rank, size)
    if accumulate and rank is not None:
        with wrapped.no_sync():
            loss(wrapped(x)).backward()
    elif accumulate:
        loss(wrapped(x)).backward()
    loss(wrapped(x)).backward()
    scale = 1 if rank is None else size  # DDP averages what the ranks add up
    return [p.grad * scale for p in model.used.parameters()], list(model.buffers())


@pytest.mark.parametrize(
    ("unused", "accumulate"),
    [(True, False), (True, True), (False, False)],
    ids=["find_unused", "no_sync", "static_graph"],
)
def test_ddp(worlds, unused, accumulate):
    gradients, buffers = in_ddp(None, 3, unused, accumulate, not unused)
    for some, state in run(worlds[3], in_ddp, unused, accumulate, not unused):
        for a, b in zip(some, gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
        for a, b in zip(state, buffers, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def in_fsdp(rank, size):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1))
    model = convert_batchnorm(model, synchronized=True)
    if rank is not None:
        mesh = init_device_mesh("cpu", (size,))
        for layer in model:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(2):
        optimizer.zero_grad()
        # FSDP averages over ranks; so does the loss of the whole batch here.
        (loss(model(rows(rank, size))) / (size if rank is None else 1)).backward()
        optimizer.step()
    found = [p.full_tensor() if rank is not None else p for p in model.parameters()]
    return [p.detach().clone() for p in found], list(model.buffers())


def test_fsdp(worlds):
    parameters, buffers = in_fsdp(None, 2)
    for some, state in run(worlds[2], in_fsdp):
        for a, b in zip(some, parameters, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        for a, b in zip(state, buffers, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)


def compiled(rank, size, backend, way):
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv2d(4, 4, 1), BatchNorm2d(4), nn.Conv2d(4, 4, 1), BatchNorm2d(4))
    convert_batchnorm(model, synchronized=rank is not None)
    x = rows(rank, size).requires_grad_()
    call = model
    if way == "checkpoint_inside":
        call = Checkpointed(model)
    if rank is not None:
        call = torch.compile(call, fullgraph=True, backend=backend)
    for _ in range(2):
        outside = way == "checkpoint_outside"
        y = checkpoint(call, x, use_reentrant=False) if outside else call(x)
        loss(y).backward()
    return x.grad, list(model.buffers())


class Checkpointed(nn.Module):
    """A checkpoint that compilers see."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=False)


COMPILED = [
    *itertools.product(["aot_eager"], ["plain", "checkpoint_inside", "checkpoint_outside"]),
    ("inductor", "plain"),
]


@pytest.mark.sample(4)
@pytest.mark.parametrize(("backend", "way"), COMPILED)
def test_compiled(worlds, backend, way):
    x_grad, buffers = compiled(None, 2, backend, way)
    found = run(worlds[2], compiled, backend, way)
    close = {"rtol": 1e-4, "atol": 1e-4 * x_grad.abs().max()}
    torch.testing.assert_close(torch.cat([part for part, _ in found]), x_grad, **close)
    for _, state in found:
        for a, b in zip(state, buffers, strict=True):
            torch.testing.assert_close(a, b, **CLOSE)
