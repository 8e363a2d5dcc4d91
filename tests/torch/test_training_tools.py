"""Our layers work with torch's tools for training loops, as torch's own do (S9, S16, S17)."""

import copy
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm1d, BatchNorm2d, padding_mask

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of some dozens of values of size 1
TRAINED = {"rtol": 1e-4, "atol": 1e-4}  # the same after several steps that amplify rounding
SECONDS = 120  # for two processes to start, train and end

reentrant = pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def assert_same_state(actual, expected, **tolerance):
    torch.testing.assert_close(
        dict(actual.state_dict()), dict(expected.state_dict()), **(tolerance or CLOSE)
    )


def randomize(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# Autocast


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_autocast_output_has_torchs_type(dtype, training):
    x = torch.randn(8, 3).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        expected = nn.BatchNorm1d(3).train(training)(x).dtype
        assert BatchNorm1d(3).train(training)(x).dtype == expected


def network(norm):
    return nn.Sequential(nn.Linear(4, 3), norm(3), nn.ReLU(), nn.Linear(3, 1))


def test_autocast_network_leaves_statistics_float32():
    model = network(BatchNorm1d)
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(16, 4))
    assert model[1].running_mean.dtype == model[1].running_var.dtype == torch.float32


def test_autocast_network_takes_statistics_in_float32():
    model = network(BatchNorm1d)
    x = torch.randn(16, 4)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model[0](x)
        model(x)
    torch.testing.assert_close(model[1].running_mean, 0.1 * hidden.float().mean(0), **CLOSE)


def test_autocast_gradients_are_float32():
    model = network(BatchNorm1d)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(torch.randn(16, 4))
    (y.float() * torch.randn(16, 1)).sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}


def test_autocast_arithmetic_stays_float32():
    # 0.1 and 3 have no short binary form: bfloat16 gamma and beta would show.
    layer = BatchNorm1d(3)
    nn.init.constant_(layer.weight, 0.1), nn.init.constant_(layer.bias, 3.001)
    x = torch.randn(16, 3)
    expected = copy.deepcopy(layer)(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    torch.testing.assert_close(y, expected, **CLOSE)


def test_overflowing_step_of_a_grad_scaler_spoils_nothing():
    model = network(BatchNorm1d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(model)
    loss = model(torch.randn(16, 4) * torch.tensor(3e38) * 10).square().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_same_state(model, before, rtol=0, atol=0)


def test_training_goes_on_after_an_overflowing_step():
    model = network(BatchNorm1d)
    model(torch.full((16, 4), float("inf")))
    x = torch.randn(16, 4)
    model(x)
    assert model.eval()(x).isfinite().all()


# Stochastic weight averaging


def loader():
    return list((torch.randn(6, 16, 3) * 2 + 5).unbind())


def test_update_bn_gives_the_mean_of_the_population():
    layer, batches = BatchNorm1d(3), loader()
    update_bn(batches, layer)
    torch.testing.assert_close(layer.running_mean, torch.cat(batches).mean(0), **CLOSE)


def test_update_bn_gives_the_average_of_the_variances():
    layer, batches = BatchNorm1d(3), loader()
    update_bn(batches, layer)
    expected = torch.stack([batch.var(0) for batch in batches]).mean(0)
    torch.testing.assert_close(layer.running_var, expected, **CLOSE)


def test_update_bn_gives_torchs_statistics():
    ours, theirs, batches = network(BatchNorm1d), network(nn.BatchNorm1d), loader()
    theirs.load_state_dict(ours.state_dict())
    batches = [nn.functional.pad(batch, (0, 1)) for batch in batches]
    update_bn(batches, ours), update_bn(batches, theirs)
    assert_same_state(ours, theirs)


def test_update_bn_restores_momentum():
    layer = BatchNorm1d(3, momentum=0.3)
    update_bn(loader(), layer)
    assert layer.momentum == 0.3


def test_update_bn_starts_afresh():
    used, fresh, batches = BatchNorm1d(3), BatchNorm1d(3), loader()
    used(torch.randn(8, 3) * 100)
    update_bn(batches, used), update_bn(batches, fresh)
    assert_same_state(used, fresh)


# Distributed data parallel


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train_rank(rank, port, results, broadcast_buffers):
    """Four steps of a network with our layer and of one with torch's, on half of the data."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=SECONDS),
    )
    try:
        found = {}
        for name, norm in (("ours", BatchNorm1d), ("theirs", nn.BatchNorm1d)):
            found[name] = train_distributed(rank, norm, broadcast_buffers)
        torch.save(found, f"{results}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def train_distributed(rank, norm, broadcast_buffers):
    torch.manual_seed(0)
    model = network(norm)
    ddp = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 32, 4, generator=generator)[rank] + rank
    target = x.sum(1, keepdim=True)
    losses, gradients = [], []
    for _ in range(8):
        optimizer.zero_grad()
        loss = (ddp(x) - target).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "gradients": gradients, "state": dict(model.state_dict())}


@pytest.fixture(scope="module", params=[True, False], ids=["broadcast", "own-buffers"])
def ranks(request, tmp_path_factory):
    """The results of both ranks."""
    results = str(tmp_path_factory.mktemp("ddp"))
    context = mp.spawn(train_rank, (free_port(), results, request.param), nprocs=2, join=False)
    finished = False
    try:
        for _ in range(3):  # each join returns when one process ends, or after its time
            finished = context.join(timeout=SECONDS)
            if finished:
                break
    finally:
        for process in context.processes:
            if process.is_alive():
                process.kill()
    assert finished, f"the two processes did not end within {SECONDS} s"
    return [torch.load(f"{results}/{rank}.pt") for rank in range(2)]


@pytest.mark.sample(2)
def test_distributed_loss_falls(ranks):
    losses = [sum(step) for step in zip(*(r["ours"]["losses"] for r in ranks), strict=True)]
    assert losses[-1] < losses[0]


def test_distributed_gradients_are_the_same_on_both_ranks(ranks):
    first, second = (rank["ours"]["gradients"] for rank in ranks)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


@pytest.mark.parametrize("rank", [0, 1])
def test_distributed_gradients_are_those_with_torchs_layer(ranks, rank):
    torch.testing.assert_close(
        ranks[rank]["ours"]["gradients"], ranks[rank]["theirs"]["gradients"], **TRAINED
    )


@pytest.mark.parametrize("rank", [0, 1])
def test_distributed_state_is_that_with_torchs_layer(ranks, rank):
    torch.testing.assert_close(
        ranks[rank]["ours"]["state"], ranks[rank]["theirs"]["state"], **TRAINED
    )


# Activation checkpointing


def step(call, layer, x, dy):
    """y, dx and the parameters' gradients."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = call(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "ghost": {"virtual_batch_size": 4},
    "renorm": {"renorm": True},
}
options = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def prepared(option):
    """A layer, its twin, x and dy."""
    layer = randomize(BatchNorm1d(3, **option))
    return layer, copy.deepcopy(layer), torch.randn(8, 3), torch.randn(8, 3)


@reentrant
@options
def test_checkpoint_updates_statistics_once(use_reentrant, option):
    layer, twin, x, dy = prepared(option)
    step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x, dy)
    twin(x)
    assert_same_state(layer, twin, rtol=0, atol=0)


@reentrant
@pytest.mark.parametrize("option", [{}, {"virtual_batch_size": 4}], ids=["default", "ghost"])
def test_checkpoint_leaves_gradients_unchanged(use_reentrant, option):
    layer, twin, x, dy = prepared(option)
    found = step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x, dy)
    torch.testing.assert_close(found, step(twin, twin, x, dy), rtol=0, atol=0)


@reentrant
def test_checkpoint_of_renorm_leaves_gradients_unchanged(use_reentrant):
    # r and d must be those of the forward pass, although the statistics have changed since.
    layer, twin, x, dy = prepared({"renorm": True})
    found = step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x, dy)
    torch.testing.assert_close(found, step(twin, twin, x, dy), **CLOSE)


@reentrant
def test_checkpoint_of_an_empty_channel_leaves_gradients_unchanged(use_reentrant):
    layer, twin, x, dy = prepared({})
    mask = torch.zeros(8, dtype=torch.bool)
    found = step(lambda x: checkpoint(layer, x, mask, use_reentrant=use_reentrant), layer, x, dy)
    torch.testing.assert_close(found, step(lambda x: twin(x, mask), twin, x, dy), **CLOSE)


@reentrant
def test_checkpoint_inside_padding_mask_updates_statistics_once(use_reentrant):
    layer, twin, x, dy = prepared({})
    mask = torch.rand(8) < 0.6
    with padding_mask(mask):
        step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x, dy)
    twin(x, mask)
    assert_same_state(layer, twin, rtol=0, atol=0)


@reentrant
def test_checkpoint_inside_padding_mask_has_the_gradients_of_the_mask(use_reentrant):
    layer, twin, x, dy = prepared({})
    mask = torch.rand(8) < 0.6
    with padding_mask(mask):
        found = step(lambda x: checkpoint(layer, x, use_reentrant=use_reentrant), layer, x, dy)
    torch.testing.assert_close(found, step(lambda x: twin(x, mask), twin, x, dy), rtol=0, atol=0)


@reentrant
def test_backward_outside_of_padding_mask_has_the_gradients_of_the_mask(use_reentrant):
    layer, twin, x, dy = prepared({})
    mask = torch.rand(8) < 0.6

    def masked(x):
        with padding_mask(mask):
            return checkpoint(layer, x, use_reentrant=use_reentrant)

    found = step(masked, layer, x, dy)
    torch.testing.assert_close(found, step(lambda x: twin(x, mask), twin, x, dy), rtol=0, atol=0)


@reentrant
def test_backward_outside_of_padding_mask_works_with_an_explicit_mask(use_reentrant):
    layer, twin, x, dy = prepared({})
    mask = torch.rand(8) < 0.6
    with padding_mask(torch.rand(8) < 0.6):
        leaf = x.clone().requires_grad_()
        y = checkpoint(layer, leaf, mask, use_reentrant=use_reentrant)
    y.backward(dy)
    _, dx, _ = step(lambda x: twin(x, mask), twin, x, dy)
    torch.testing.assert_close(leaf.grad, dx, rtol=0, atol=0)


@reentrant
def test_two_checkpoints_of_one_layer_update_twice(use_reentrant):
    layer, twin, x, dy = prepared({})
    step(
        lambda x: (
            checkpoint(layer, x, use_reentrant=use_reentrant)
            + checkpoint(layer, 2 * x, use_reentrant=use_reentrant)
        ),
        layer,
        x,
        dy,
    )
    twin(x), twin(2 * x)
    assert_same_state(layer, twin, rtol=0, atol=0)


@reentrant
def test_checkpointed_network_trains_like_a_plain_one(use_reentrant):
    model = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))
    twin = copy.deepcopy(model)
    for _ in range(3):
        x, dy = torch.randn(16, 4), torch.randn(16, 1)
        call = lambda x: checkpoint(model, x, use_reentrant=use_reentrant)  # noqa: E731
        torch.testing.assert_close(step(call, model, x, dy), step(twin, twin, x, dy), **CLOSE)
    assert_same_state(model, twin, rtol=0, atol=0)


# Several passes of one layer


def test_two_forwards_before_one_backward_have_their_own_gradients():
    layer, twin = prepared({})[:2]
    first, second = torch.randn(8, 3, requires_grad=True), torch.randn(6, 3, requires_grad=True)
    dy, dz = torch.randn(8, 3), torch.randn(6, 3)
    y, z = layer(first), layer(second)
    torch.autograd.backward((y, z), (dy, dz))
    torch.testing.assert_close(first.grad, step(twin, twin, first.detach(), dy)[1], **CLOSE)
    torch.testing.assert_close(second.grad, step(twin, twin, second.detach(), dz)[1], **CLOSE)


def test_evaluation_survives_a_training_pass_before_its_backward():
    layer, twin, x, dy = prepared({})
    first = x.clone().requires_grad_()
    y = layer.eval()(first)
    layer.train()(torch.randn(8, 3) + 5)
    y.backward(dy)
    torch.testing.assert_close(first.grad, step(twin.eval(), twin, x, dy)[1], **CLOSE)


def test_training_survives_a_training_pass_before_its_backward():
    layer, twin, x, dy = prepared({"renorm": True})
    first = x.clone().requires_grad_()
    y = layer(first)
    layer(torch.randn(8, 3) + 5)
    y.backward(dy)
    torch.testing.assert_close(first.grad, step(twin, twin, x, dy)[1], **CLOSE)


def test_empty_channel_survives_a_training_pass_before_its_backward():
    layer, _, x, dy = prepared({})
    first = x.clone().requires_grad_()
    y = layer(first, torch.zeros(8, dtype=torch.bool))
    layer(torch.randn(8, 3) + 5)
    y.backward(dy)
    assert torch.equal(first.grad, torch.zeros(8, 3))


def test_retained_graph_gives_the_same_gradient_twice():
    layer, _, x, dy = prepared({})
    y = layer(x.requires_grad_())
    (first,) = torch.autograd.grad(y, x, dy, retain_graph=True)
    (second,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(first, second)


def test_no_grad_training_updates_statistics():
    layer, twin, x, _ = prepared({})
    with torch.no_grad():
        layer(x)
    twin(x)
    assert_same_state(layer, twin, rtol=0, atol=0)


def test_inference_mode_training_updates_statistics():
    layer, twin, x, _ = prepared({})
    with torch.inference_mode():
        layer(x)
    twin(x)
    assert_same_state(layer, twin, rtol=0, atol=0)


# Determinism (S17)

SHAPES = {
    "long": (BatchNorm1d, (65536, 8)),
    "images": (BatchNorm2d, (8, 16, 32, 32)),
    "one-channel": (BatchNorm1d, (100003, 1)),
    "sequences": (BatchNorm1d, (64, 3, 224)),
    "odd-channels": (BatchNorm1d, (70000, 37)),
}
DETERMINISTIC = {
    "plain": ({}, False),
    "mask": ({}, True),
    "ghost": ({"virtual_batch_size": 1}, False),
    "renorm": ({"renorm": True}, False),
}


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def numbers(make, shape, option, masked, threads):
    """All results of one step, with this number of threads."""
    torch.manual_seed(0)
    x, dy = torch.randn(shape) + 3, torch.randn(shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    if option.get("virtual_batch_size"):
        option = {"virtual_batch_size": shape[0] // (4 if shape[0] % 4 == 0 else 1)}
    layer = randomize(make(shape[1], **option))
    torch.set_num_threads(threads)
    y, dx, parameters = step(lambda x: layer(x, mask), layer, x, dy)
    names = {"y": y, "dx": dx, "dgamma": parameters[0], "dbeta": parameters[1]}
    return names | {name: buffer.clone() for name, buffer in layer.named_buffers()}


@pytest.mark.parametrize("threads", [2, 3, 8])
@pytest.mark.parametrize(("make", "shape"), SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize(("option", "masked"), DETERMINISTIC.values(), ids=DETERMINISTIC)
@pytest.mark.usefixtures("restored_threads")
def test_number_of_threads_changes_no_bit(make, shape, option, masked, threads):
    expected = numbers(make, shape, option, masked, 1)
    found = numbers(make, shape, option, masked, threads)
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.parametrize(("make", "shape"), SHAPES.values(), ids=SHAPES)
def test_repetition_changes_no_bit(make, shape):
    threads = torch.get_num_threads()
    expected, found = (numbers(make, shape, {}, False, threads) for _ in range(2))
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


# Threads of the caller


def test_layers_in_several_threads_do_not_disturb_each_other():
    layers = [randomize(BatchNorm1d(3)) for _ in range(8)]
    twins = copy.deepcopy(layers)
    inputs, dy = torch.randn(8, 20, 64, 3), torch.randn(64, 3)

    def train(layer, batches):
        return [step(layer, layer, x, dy) for x in batches]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(train, layers, inputs))
    expected = [train(twin, x) for twin, x in zip(twins, inputs, strict=True)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_padding_masks_of_several_threads_do_not_mix():
    inputs, masks = torch.randn(8, 64, 3), torch.rand(8, 64) < 0.6

    def run(x, mask):
        layer = BatchNorm1d(3)
        with padding_mask(mask):
            return [layer(x) for _ in range(20)][-1].detach()

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(run, inputs, masks))
    expected = [BatchNorm1d(3)(x, mask).detach() for x, mask in zip(inputs, masks, strict=True)]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
