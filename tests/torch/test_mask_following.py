"""padding_mask(follow=model): masks through convolutions, poolings and resamplings."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import random
import threading

import pytest
import torch
from seen_masks import Probe, close, last, lengths
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, padding_mask, sequence_mask
from batchnorm.torch.masks.blocks import find_block

SIZE = 23
SIZES = torch.tensor([23, 22, 17, 16, 9, 8, 5, 4, 3, 2, 1, 0])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()


def is_clean(model: nn.Module) -> bool:
    return not any(m._forward_hooks or m._forward_hooks_with_kwargs for m in model.modules())


def seen_behind(*modules: nn.Module, mask: Tensor, channels: int = 1) -> Tensor:
    """The mask of a layer behind these modules."""
    net = nn.Sequential(*modules, Probe(channels))
    x = torch.ones(mask.shape[0], 1, *mask.shape[1:], requires_grad=True)
    with padding_mask(mask, follow=net):
        net(x)
    assert is_clean(net)
    return net[-1].real


def length_behind(module: nn.Module, size: int) -> int:
    """The number of outputs of a sample alone; 0 where torch finds it too short."""
    if size == 0:
        return 0
    try:
        return module(torch.ones(1, 1, size)).shape[2]
    except RuntimeError:
        return 0


MODULES = {
    "same": nn.Conv1d(1, 1, 3, padding=1),
    "even window, same": nn.Conv1d(1, 1, 4, padding="same"),
    "valid": nn.Conv1d(1, 1, 4),
    "valid by name": nn.Conv1d(1, 1, 3, padding="valid", dilation=2),
    "strided": nn.Conv1d(1, 1, 3, stride=2, padding=1),
    "strided, valid": nn.Conv1d(1, 1, 5, stride=3),
    "strided, even window": nn.Conv1d(1, 1, 2, stride=2, padding=1),
    "strided, dilated": nn.Conv1d(1, 1, 3, stride=2, padding=2, dilation=3),
    "padded beyond its window": nn.Conv1d(1, 1, 1, padding=2),
    "transposed": nn.ConvTranspose1d(1, 1, 2, stride=2),
    "transposed, cropped": nn.ConvTranspose1d(1, 1, 4, stride=2, padding=1),
    "transposed, longer": nn.ConvTranspose1d(1, 1, 3, stride=2, padding=1, output_padding=1),
    "transposed, wide": nn.ConvTranspose1d(1, 1, 5, stride=2, dilation=2),
    "transposed, with gaps": nn.ConvTranspose1d(1, 1, 1, stride=3),
    "max": nn.MaxPool1d(2),
    "max, padded": nn.MaxPool1d(3, stride=2, padding=1, dilation=2),
    "max, ceil": nn.MaxPool1d(2, ceil_mode=True),
    "max, ceil, padded": nn.MaxPool1d(4, stride=3, padding=2, ceil_mode=True),
    "average": nn.AvgPool1d(3, stride=2),
    "average, ceil": nn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True),
    "power": nn.LPPool1d(2, 3, stride=2),
    "power, ceil": nn.LPPool1d(2, 3, ceil_mode=True),
    "nearest": nn.Upsample(scale_factor=2),
    "nearest, fraction": nn.Upsample(scale_factor=1.5),
    "nearest, smaller": nn.Upsample(scale_factor=0.5),
    "linear": nn.Upsample(scale_factor=3, mode="linear"),
    "zeros": nn.ConstantPad1d((2, 1), 0.0),
    "cropped": nn.ConstantPad1d((-1, -2), 0.0),
    "replicated": nn.ReplicationPad1d(2),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_a_padded_sample_has_as_many_real_positions_as_outputs_alone(module):
    real = seen_behind(module, mask=sequence_mask(SIZES, SIZE))
    alone = torch.tensor([length_behind(module, int(n)) for n in SIZES])
    assert torch.equal(real, sequence_mask(alone, real.shape[1]))


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_padding_in_front_counts_the_same_where_strides_come_out_even(module):
    size = 24  # samples begin at multiples of the strides
    sizes = torch.tensor([24, 18, 12, 6])
    alone = torch.tensor([length_behind(module, int(n)) for n in sizes])
    real = seen_behind(module, mask=sequence_mask(sizes, size).flip(1))
    assert torch.equal(real.sum(1), alone)
    last = [int(row.nonzero().max()) for row in real]
    assert [n - last[0] for n in last] == [0] * len(last)  # they end where the longest ends


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Conv2d(1, 1, 3, stride=2, padding=1), (4, 3)),
        (nn.Conv2d(1, 1, (3, 5), stride=(2, 1), padding=(1, 2)), (4, 5)),
        (nn.MaxPool2d(2), (3, 2)),
        (nn.ConvTranspose2d(1, 1, 2, stride=2), (14, 10)),
        (nn.ZeroPad2d((1, 0, 0, 2)), (9, 6)),
        (nn.Upsample(scale_factor=(2.0, 1.0)), (14, 5)),
        (nn.PixelUnshuffle(2), (3, 2)),
    ],
    ids=str,
)
def test_images_have_a_walk_along_each_axis(module, expected):
    mask = torch.zeros(1, 10, 8, dtype=torch.bool)
    mask[0, :7, :5] = True
    channels = 4 if isinstance(module, nn.PixelUnshuffle) else 1
    real = seen_behind(module, mask=mask, channels=channels)[0]
    assert (real.any(1).sum(), real.any(0).sum()) == expected
    assert real[: expected[0], : expected[1]].all()


def test_pixel_shuffle_repeats():
    mask = lengths(4, 2, total=4)[:, :, None].expand(2, 4, 3)
    net = nn.Sequential(nn.PixelShuffle(2), Probe())
    with padding_mask(mask, follow=net):
        net(torch.ones(2, 4, 4, 3, requires_grad=True))
    assert net[1].real[:, :, 0].sum(1).tolist() == [8, 4]


def test_volumes():
    mask = torch.zeros(1, 8, 8, 8, dtype=torch.bool)
    mask[0, :5, :3, :4] = True
    real = seen_behind(nn.Conv3d(1, 1, 3, stride=2, padding=1), nn.AvgPool3d(2), mask=mask)
    assert real.nonzero().tolist() == [[0, 0, 0, 0]]


def test_mask_of_the_first_axes_leaves_the_others_alone():
    net = nn.Sequential(nn.Conv2d(1, 1, 3, stride=2, padding=1), Probe())
    with padding_mask(lengths(7, 4, total=7), follow=net):
        net(torch.ones(2, 1, 7, 9, requires_grad=True))
    assert net[1].real.shape == (2, 4, 5)
    assert net[1].real[:, :, 0].sum(1).tolist() == [4, 2]
    assert torch.equal(net[1].real, net[1].real[:, :, :1].expand(2, 4, 5))


def test_mask_of_whole_samples_stays():
    net = nn.Sequential(nn.Conv1d(1, 1, 3, stride=2), Probe())
    with padding_mask(torch.tensor([True, False]), follow=net):
        net(torch.ones(2, 1, 9, requires_grad=True))
    assert net[1].real.sum(1).tolist() == [4, 0]


@pytest.mark.parametrize("rescale", [None, "any", "all"])
def test_adaptive_pooling_keeps_whole_samples(rescale):
    net = nn.Sequential(nn.AdaptiveAvgPool1d(1), Probe(), nn.Flatten(), Probe())
    with padding_mask(lengths(8, 3, 0), follow=net, rescale=rescale):
        net(torch.ones(3, 1, 8, requires_grad=True))
    assert net[1].real[:, 0].tolist() == [True, True, False]
    assert net[3].real.tolist() == [True, True, False]


def test_adaptive_pooling_is_real_where_a_position_is():
    real = seen_behind(nn.AdaptiveMaxPool1d(3), mask=lengths(8, 4, 1, 0))
    assert real.sum(1).tolist() == [3, 2, 1, 0]


def test_pooling_that_returns_indices():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pool, self.probe = nn.MaxPool1d(2, return_indices=True), Probe()

        def forward(self, x):
            return self.probe(self.pool(x)[0])

    net = Net()
    with padding_mask(lengths(5, 8), follow=net):
        net(torch.ones(2, 1, 8, requires_grad=True))
    assert net.probe.real.sum(1).tolist() == [2, 4]


def test_transposed_convolution_whose_output_size_was_asked_for():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.probe = nn.ConvTranspose1d(1, 1, 3, 2), Probe()

        def forward(self, x):
            return self.probe(self.conv(x, output_size=[18]))

    net = Net()
    with padding_mask(lengths(8, 5, 0), follow=net):
        net(torch.ones(3, 1, 8, requires_grad=True))
    assert net.probe.real.sum(1).tolist() == [18, 12, 0]


class Same(nn.Conv1d):
    """Pads by itself, as TensorFlow does."""

    def forward(self, x: Tensor) -> Tensor:
        total = max(0, (-(-x.shape[2] // 2) - 1) * 2 + 3 - x.shape[2])
        return super().forward(nn.functional.pad(x, (total // 2, total - total // 2)))


@pytest.mark.parametrize("size", [8, 9])
def test_convolution_that_pads_by_itself_has_as_many_outputs_as_strides(size):
    sizes = torch.tensor([size, 5, 4, 0])
    real = seen_behind(Same(1, 1, 3, stride=2), mask=sequence_mask(sizes, size))
    assert torch.equal(real, sequence_mask((sizes + 1) // 2, real.shape[1]))


def test_convolution_with_a_padding_of_its_own_is_not_guessed():
    class Odd(nn.Conv1d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[..., :-1]

    net = nn.Sequential(Odd(1, 1, 3, 2), Probe())
    block = padding_mask(lengths(7, 9, total=9), follow=net)
    with block, pytest.raises(ValueError, match=r"rows \(2, 3\): follow= has seen no"):
        net(torch.ones(2, 1, 9, requires_grad=True))


def test_name_of_a_subclass_does_not_count():
    class Pointwise1d(nn.Conv2d):
        pass

    real = seen_behind(Pointwise1d(1, 1, 1, 2), mask=torch.ones(1, 4, 6, dtype=torch.bool))
    assert real.shape == (1, 2, 3)


def test_scripted_convolution_is_not_seen():
    net = nn.Sequential(torch.jit.trace(nn.Conv1d(1, 1, 2, 2), torch.ones(1, 1, 8)), Probe())
    block = padding_mask(lengths(7, 8), follow=net)
    with block, pytest.raises(ValueError, match=r"rows \(2, 4\): follow= has seen no"):
        net(torch.ones(2, 1, 8, requires_grad=True))
    assert is_clean(net)


def test_causal_convolution_keeps_the_mask():
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.probe = nn.Conv1d(1, 1, 4), Probe()

        def forward(self, x):
            return self.probe(self.conv(nn.functional.pad(x, (3, 0))))

    net, mask = Causal(), lengths(5, 8)
    with padding_mask(mask, follow=net):
        net(torch.ones(2, 1, 8, requires_grad=True))
    assert torch.equal(net.probe.real, mask)


# Whole models


class Trim(nn.Module):
    """Zeros behind each sample's end, so that no padding leaks into the next module."""

    ends: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        return x if self.ends is None else x * sequence_mask(self.ends, x.shape[2])[:, None]


def random_stack(rng: random.Random) -> tuple[list[nn.Module], int]:
    """Modules of one channel without bias, whose values are positive: a maximum ignores zeros."""
    made: list[nn.Module] = []
    for _ in range(rng.randint(1, 4)):
        kernel, stride, dilation = rng.randint(1, 5), rng.randint(1, 3), rng.randint(1, 2)
        padding = rng.randint(0, kernel // 2)
        kind = rng.choice(["conv", "conv", "max", "average", "transposed", "nearest"])
        if kind == "conv":
            conv = nn.Conv1d(1, 1, kernel, stride, rng.randint(0, 3), dilation, bias=False)
        elif kind == "transposed":
            conv = nn.ConvTranspose1d(1, 1, kernel, stride, bias=False)
        elif kind == "max":
            padding = padding if dilation == 1 else 0  # no window of padding alone
            conv = nn.MaxPool1d(kernel, stride, padding, dilation)
        elif kind == "average":
            conv = nn.AvgPool1d(kernel, stride, padding)
        else:
            conv = nn.Upsample(scale_factor=2)
        for parameter in conv.parameters():
            nn.init.uniform_(parameter, 0.1, 1.0)
        made.append(conv.double())
    return made, rng.randint(30, 80)


@pytest.mark.parametrize("seed", range(40))
def test_random_stack_has_the_statistics_of_each_sample_alone(seed):
    """S5: the mean over the padded batch is that over what each sample gives alone."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    stack, size = random_stack(rng)
    sizes = torch.tensor([size, *(rng.randint(size // 2, size) for _ in range(3))])
    samples = [torch.rand(1, 1, int(n), dtype=torch.float64) for n in sizes]
    layers = [nn.Sequential(module, Trim()) for module in stack]
    probe, norm = Probe().double(), last(1).double()
    alone = []
    ends = torch.zeros(len(samples), len(layers), dtype=torch.int64)
    for i, sample in enumerate(samples):
        for j, layer in enumerate(layers):
            try:
                sample = layer(sample)
            except RuntimeError:  # too short for this stack
                sample = sample[..., :0]
                break
            ends[i, j] = sample.shape[2]
        alone.append(sample)
    if alone[0].shape[2] == 0:
        return
    for j, layer in enumerate(layers):
        layer[1].ends = ends[:, j]
    x = torch.zeros(len(samples), 1, size, dtype=torch.float64)
    for row, sample in zip(x, samples, strict=True):
        row[:, : sample.shape[2]] = sample[0]
    net = nn.Sequential(*layers, probe, norm)
    with padding_mask(sequence_mask(sizes, size), follow=net):
        net(x.requires_grad_())
    assert torch.equal(probe.real, sequence_mask(ends[:, -1], probe.real.shape[1]))
    packed = torch.cat([sample.flatten() for sample in alone])
    close(norm.running_mean, packed.mean()[None].detach(), count=size * 4, depth=8)


class Encoder(nn.Module):
    """Speech: two strides, then a block at their resolution, channels last."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.front = nn.Sequential(
            nn.Conv1d(channels, 4, 3, stride=2),
            BatchNorm1d(4, momentum=1.0),
            nn.ReLU(),
            nn.Conv1d(4, 4, 3, stride=2, padding=1),
        )
        self.linear = nn.Linear(4, 4)
        self.norm = BatchNorm(4, axis=-1, momentum=1.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(self.front(x).relu().movedim(1, -1)))

    def by_hand(self, x: Tensor, lengths: Tensor) -> Tensor:
        conv, norm, relu, other = self.front
        lengths = ((lengths - 3) // 2 + 1).clamp(0)
        h = relu(norm(conv(x), sequence_mask(lengths, (x.shape[2] - 3) // 2 + 1)))
        h = self.linear(other(h).relu().movedim(1, -1))
        return self.norm(h, sequence_mask((lengths + 1) // 2, h.shape[1]))


LENGTHS = torch.tensor([41, 30, 17, 2])
MASK = sequence_mask(LENGTHS, 41)


def encoder_case() -> tuple[Encoder, Encoder, Tensor, Tensor]:
    net, x = Encoder(), torch.randn(4, 3, 41)
    twin = copy.deepcopy(net)
    expected = twin.by_hand(x, LENGTHS)
    return net, twin, x, expected


def assert_same_statistics(net: nn.Module, twin: nn.Module) -> None:
    for (name, a), (_, b) in zip(net.named_buffers(), twin.named_buffers(), strict=True):
        assert torch.equal(a, b), name


def test_encoder_computes_as_with_masks_by_hand():
    net, twin, x, expected = encoder_case()
    with padding_mask(MASK, follow=net):
        assert torch.equal(net(x), expected)
    assert_same_statistics(net, twin)
    assert is_clean(net)


@pytest.mark.sample(2)
@pytest.mark.parametrize("whole", [False, True], ids=["graph breaks", "whole graph"])
def test_compiled_encoder_runs_as_eager_code_with_the_masks(whole):
    net, twin, x, expected = encoder_case()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=whole)
    compiled(x)  # a graph without a mask
    net.load_state_dict(Encoder().state_dict() | dict(twin.named_parameters()))
    with padding_mask(MASK, follow=compiled):
        assert torch.equal(compiled(x), expected)
    assert_same_statistics(net, twin)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_block_inside_a_compiled_function_raises():
    net = Encoder()

    def run(x):
        with padding_mask(MASK, follow=net):
            return net(x)

    with pytest.raises(RuntimeError, match=r"padding_mask: follow= .*around the compiled function"):
        torch.compile(run, backend="eager")(torch.randn(4, 3, 41))
    assert is_clean(net)


def test_graph_that_runs_all_the_same_raises():
    layer = BatchNorm1d(3)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    block, compiling = padding_mask(MASK, follow=layer), torch.compiler.set_stance
    said = "does not reach compiled code"
    with block, compiling("default"), pytest.raises(RuntimeError, match=said):
        compiled(torch.randn(4, 3, 41))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("outside", [False, True])
def test_checkpointed_encoder_has_the_gradients_of_the_masks(reentrant, outside):
    net, twin, x, _ = encoder_case()
    dy = torch.randn(4, 10, 4)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(twin.by_hand(x, LENGTHS), x, dy)
    for _ in range(2):  # each step has a block of its own
        x.grad = None
        with padding_mask(MASK, follow=net):
            y = checkpoint(net, x, use_reentrant=reentrant)
            if not outside:
                y.backward(dy)
        if outside:
            y.backward(dy)
        assert torch.equal(x.grad, expected)
    assert is_clean(net)


def test_checkpoint_in_another_thread_has_the_gradients_of_the_masks():
    net, twin, x, _ = encoder_case()
    dy = torch.randn(4, 10, 4)
    x.requires_grad_()
    (expected,) = torch.autograd.grad(twin.by_hand(x, LENGTHS), x, dy)
    with padding_mask(MASK, follow=net):
        y = checkpoint(net, x, use_reentrant=False)
        thread = threading.Thread(target=lambda: y.backward(dy))
        thread.start()
        thread.join()
    assert torch.equal(x.grad, expected)


def test_layer_that_ran_with_two_masks_of_one_size_is_not_recomputed():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv1d(1, 1, 3, 2, padding=1), nn.Conv1d(1, 1, 2, 2)
            self.norm = BatchNorm1d(1)

        def forward(self, x):
            return self.norm(self.a(x)) + self.norm(self.b(x))

    net = Twice()
    x = torch.randn(2, 1, 8, requires_grad=True)
    with padding_mask(lengths(7, 5), follow=net):
        y = checkpoint(net, x, use_reentrant=False)
    with pytest.raises(RuntimeError, match="more than once inside padding_mask"):
        y.sum().backward()


# Branches


class Branches(nn.Module):
    """Two paths to four positions: a sample of 7 has 4 by the one and 3 by the other."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv1d(1, 1, 3, stride=2, padding=1)
        self.b = nn.AvgPool1d(2)
        self.probes = nn.ModuleList(Probe() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.a(x), self.b(x)
        a, b = self.probes[0](a), self.probes[1](b)
        return self.probes[3](self.probes[2](a + b))


def test_layers_straight_behind_a_branch_have_its_mask():
    net = Branches()
    net.probes[2] = net.probes[3] = nn.Identity()
    with padding_mask(lengths(8, 7), follow=net):
        net(torch.ones(2, 1, 8, requires_grad=True))
    assert net.probes[0].real.sum(1).tolist() == [4, 4]
    assert net.probes[1].real.sum(1).tolist() == [4, 3]


@pytest.mark.parametrize(("rescale", "expected"), [("any", 4), ("all", 3)])
def test_layers_behind_a_sum_of_branches_follow_the_rule(rescale, expected):
    net = Branches()
    with padding_mask(lengths(8, 7), follow=net, rescale=rescale):
        net(torch.ones(2, 1, 8, requires_grad=True))
    for probe in net.probes[2:]:
        assert probe.real.sum(1).tolist() == [4, expected]


def test_layers_behind_a_sum_of_branches_raise_without_a_rule():
    net = Branches()
    block, said = padding_mask(lengths(8, 7), follow=net), 'branches; rescale="all" takes'
    with block, pytest.raises(ValueError, match=said):
        net(torch.ones(2, 1, 8, requires_grad=True))


def test_branches_that_agree_need_no_rule():
    net = Branches()
    with padding_mask(lengths(8, 6), follow=net):
        net(torch.ones(2, 1, 8, requires_grad=True))
    assert net.probes[3].real.sum(1).tolist() == [4, 3]


def test_residual_network_needs_no_rule():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, stride=2, padding=1)
            self.short = nn.Conv2d(1, 1, 1, stride=2)
            self.norms = nn.ModuleList(Probe() for _ in range(3))

        def forward(self, x):
            y = self.norms[0](self.conv(x)).relu() + self.norms[1](self.short(x))
            return self.norms[2](y)

    net = nn.Sequential(Block(), Block())
    mask = lengths(15, 7, total=15)[:, :, None].expand(2, 15, 15)
    with padding_mask(mask, follow=net):
        net(torch.rand(2, 1, 15, 15, requires_grad=True))
    for block, size in zip(net, (4, 2), strict=True):
        for probe in block.norms:
            assert probe.real[1, :, 0].sum() == size


# Several resolutions


class Speech(nn.Module):
    """A text encoder and a mel decoder, each with a convolution of stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(1, 1, 3, 2, padding=1), Probe())
        self.decoder = nn.Sequential(nn.Conv1d(1, 1, 3, 2, padding=1), Probe())
        self.head = nn.ModuleDict({"norm": Probe()})

    def forward(self, text: Tensor, mel: Tensor) -> Tensor:
        text, mel = self.encoder(text), self.decoder(mel)
        return self.head["norm"](torch.cat([text, mel], 2))


@pytest.mark.parametrize("sizes", [(8, 12), (8, 8)], ids=["sizes differ", "sizes agree"])
def test_masks_by_name(sizes):
    net = Speech()
    text, mel = (torch.ones(2, 1, n, requires_grad=True) for n in sizes)
    masks = {
        "encoder": lengths(5, 2, total=sizes[0]),
        "decoder": lengths(6, 8, total=sizes[1]),
        "head": None,
    }
    with padding_mask(masks, follow=net):
        net(text, mel)
    assert net.encoder[1].real.sum(1).tolist() == [3, 1]
    assert net.decoder[1].real.sum(1).tolist() == [3, 4]
    assert net.head["norm"].real.all()
    assert is_clean(net)


def test_masks_by_size_follow_too():
    net = Speech()
    net.head["norm"] = nn.Identity()
    with padding_mask([lengths(5, 2, total=8), lengths(6, 12, total=12)], follow=net):
        net(torch.ones(2, 1, 8, requires_grad=True), torch.ones(2, 1, 12, requires_grad=True))
    assert net.encoder[1].real.sum(1).tolist() == [3, 1]
    assert net.decoder[1].real.sum(1).tolist() == [3, 6]


def test_innermost_name_counts_and_the_empty_one_is_the_rest():
    net = Speech()
    masks = {
        "": lengths(5, 2, total=8),
        "decoder": [lengths(1, 1, total=99), lengths(6, 8, total=8)],
        "head.norm": lengths(7, 3, total=8),
    }
    with padding_mask(masks, follow=net):
        net(torch.ones(2, 1, 8, requires_grad=True), torch.ones(2, 1, 8, requires_grad=True))
    assert net.encoder[1].real.sum(1).tolist() == [3, 1]
    assert net.decoder[1].real.sum(1).tolist() == [3, 4]
    assert net.head["norm"].real.sum(1).tolist() == [7, 3]


def test_layer_without_a_name_raises():
    net = Speech()
    masks = {"encoder": lengths(5, 2), "decoder": lengths(5, 2)}
    x, said = torch.ones(2, 1, 8, requires_grad=True), r"of the submodules \['decoder', 'encoder'\]"
    with padding_mask(masks, follow=net), pytest.raises(ValueError, match=said):
        net(x, x)


@pytest.mark.parametrize(
    ("shared", "said"), [(0, "padding_mask: a Conv1d"), (1, "BatchNorm: a BatchNorm")]
)
def test_module_with_two_names_raises(shared, said):
    net = Speech()
    net.decoder[shared] = net.encoder[shared]
    masks = {"encoder": lengths(5, 2), "decoder": lengths(5, 2), "head": None}
    x, said = torch.ones(2, 1, 8, requires_grad=True), f"^{said} is part of several of the submodul"
    with padding_mask(masks, follow=net), pytest.raises(ValueError, match=said):
        net(x, x)


REFUSED = {
    "names without a model": ({"mask": {"encoder": MASK}}, ValueError, "need follow=model"),
    "unknown name": (
        {"mask": {"coder": MASK}, "follow": Speech()},
        ValueError,
        "submodules of Speech, such as 'encoder', 'decoder', 'head'.*got 'coder'",
    ),
    "number": ({"mask": {1: MASK}, "follow": Speech()}, ValueError, "got 1"),
    "function": ({"mask": MASK, "follow": len}, TypeError, "follow must be the model.*builtin"),
    "two of a shape": ({"mask": {"": [MASK, MASK]}, "follow": Speech()}, ValueError, "shapes"),
}


@pytest.mark.parametrize(("given", "error", "said"), REFUSED.values(), ids=REFUSED)
def test_refused_arguments(given, error, said):
    with pytest.raises(error, match=f"padding_mask: .*{said}"):
        padding_mask(**given).__enter__()
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_jagged_input_takes_the_mask_of_its_submodule():
    net = nn.ModuleDict({name: BatchNorm(3, axis=-1, momentum=1.0) for name in "abc"})
    rows = [torch.randn(n, 3) for n in (2, 3)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    masks = {"a": torch.tensor([True, False]), "b": torch.tensor([False, True]), "c": None}
    with padding_mask(masks, follow=net):
        for layer in net.values():
            layer(x)
    for layer, expected in zip(net.values(), (*rows, torch.cat(rows)), strict=True):
        close(layer.running_mean, expected.mean(0))


# Sizes that no module makes


def test_sizes_that_no_module_makes_raise_with_the_masks_at_hand():
    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv1d(1, 1, 2, 2), BatchNorm1d(1)

        def forward(self, x):
            return self.norm(self.conv(x)[..., ::2])

    net = Sliced()
    said = r"shapes \(2, 16\), \(2, 8\) are at hand.*rows \(2, 4\): follow= has seen no convol"
    block = padding_mask(lengths(9, 16, total=16), follow=net)
    with block, pytest.raises(ValueError, match=said + r".*sequence_mask\(lengths, 4\)"):
        net(torch.ones(2, 1, 16))
    assert is_clean(net)


def test_mask_beside_for_what_follow_does_not_see():
    net = nn.Sequential(nn.Conv1d(1, 1, 2, 2), Probe())
    with padding_mask([lengths(9, 16, total=16), lengths(1, 2, total=5)], follow=net):
        net(torch.ones(2, 1, 16, requires_grad=True))
        assert net[1].real.sum(1).tolist() == [4, 8]
        net[1](torch.ones(2, 1, 5, requires_grad=True))
        assert net[1].real.sum(1).tolist() == [1, 2]


@pytest.mark.parametrize(("rescale", "expected"), [("any", [True, True]), ("all", [False, True])])
def test_mean_over_positions_leaves_whole_samples(rescale, expected):
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.probe = nn.Conv1d(1, 1, 2, 2), Probe()

        def forward(self, x):
            return self.probe(self.conv(x).mean(2))

    net, mask = Mean(), lengths(3, 8)
    x = torch.ones(2, 1, 8, requires_grad=True)
    with padding_mask(mask, follow=net, rescale=rescale):
        net(x)
    assert net.probe.real.tolist() == expected
    with padding_mask(mask, follow=net), pytest.raises(ValueError, match="partly padding"):
        net(x)


# Scope


def test_hooks_end_with_an_exception():
    net = Encoder()
    with contextlib.suppress(KeyError), padding_mask(MASK, follow=net):
        assert not is_clean(net)
        raise KeyError
    assert is_clean(net)


def test_hooks_of_others_stay():
    net, calls = Encoder(), []
    handle = net.front[0].register_forward_hook(lambda *_: calls.append(1))
    with padding_mask(MASK, follow=net):
        net(torch.randn(4, 3, 41))
    assert len(net.front[0]._forward_hooks) == len(calls) == 1
    handle.remove()


def test_inner_blocks_of_the_same_model():
    net = nn.Sequential(nn.Conv1d(1, 1, 2, 2), Probe())
    x, outer, inner = torch.ones(2, 1, 8, requires_grad=True), lengths(8, 4), lengths(2, 6)
    with padding_mask(outer, follow=net):
        with padding_mask(inner, follow=net):
            net(x)
            assert net[1].real.sum(1).tolist() == [1, 3]
        with padding_mask(None):
            net(x)
            assert net[1].real.all()
        with padding_mask(lengths(1, 4, total=4)):
            net(x)
            assert net[1].real.sum(1).tolist() == [1, 4]
        net(x)
        assert net[1].real.sum(1).tolist() == [4, 2]
    assert is_clean(net)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_no_mask_follows_nothing():
    net = Encoder()
    with padding_mask(None, follow=net):
        assert is_clean(net)
        net(torch.randn(4, 3, 41))


def test_two_threads_with_one_model_each_have_their_masks():
    net, barrier = nn.Sequential(nn.Conv1d(1, 1, 2, 2), last(1)), threading.Barrier(2, timeout=30)
    net[1].track_running_stats = True
    found = {}

    def work(name: str, mask: Tensor | None) -> None:
        own = BatchNorm1d(1, momentum=1.0)
        with padding_mask(mask, follow=net):
            barrier.wait()
            x = torch.arange(8.0).expand(2, 1, 8)
            own(net[0](x))
            barrier.wait()
            found[name] = own.running_mean.item()

    pairs = (("a", lengths(8, 2)), ("b", lengths(2, 2)))
    threads = [threading.Thread(target=work, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    y = net[0](torch.arange(8.0).expand(2, 1, 8))[0, 0]
    assert found["b"] == pytest.approx(y[0].item(), abs=1e-5)
    assert found["a"] == pytest.approx(((y.sum() + y[0]) / 5).item(), abs=1e-5)
    assert is_clean(net)
    assert torch._dynamo.eval_frame._stance.stance == "default"


def test_thread_without_a_block_is_not_followed():
    net, seen = nn.Sequential(nn.Conv1d(1, 1, 2, 2), last(1)), []
    x = torch.arange(8.0).expand(2, 1, 8)

    def work() -> None:
        net(x)
        seen.append(net[1].running_mean.item())

    with padding_mask(lengths(8, 2), follow=net):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen[0] == pytest.approx(net[0](x).mean().item(), abs=1e-5)


def test_tasks_each_have_their_masks():
    net = nn.Sequential(nn.Conv1d(1, 1, 2, 2), Probe())
    x = torch.ones(2, 1, 8, requires_grad=True)

    async def work(mask: Tensor) -> list[int]:
        with padding_mask(mask, follow=net):
            await asyncio.sleep(0)
            net(x)
            found = net[1].real.sum(1).tolist()
            await asyncio.sleep(0)
            return found

    async def both() -> list[list[int]]:
        return await asyncio.gather(work(lengths(8, 2)), work(lengths(4, 6)))

    assert asyncio.run(both()) == [[4, 1], [2, 3]]
    assert is_clean(net)


def test_mask_that_is_written_to_inside_the_block_counts_anew():
    net, mask = nn.Sequential(nn.Conv1d(1, 1, 2, 2), Probe()), lengths(8, 2)
    x = torch.ones(2, 1, 8, requires_grad=True)
    with padding_mask(mask, follow=net):
        net(x)
        mask.copy_(lengths(4, 6))
        net(x)
        assert net[1].real.sum(1).tolist() == [2, 3]


def test_works_as_a_decorator():
    net = nn.Sequential(nn.Conv1d(1, 1, 2, 2), Probe())
    run = padding_mask(lengths(8, 2), follow=net)(net)
    for _ in range(2):
        run(torch.ones(2, 1, 8, requires_grad=True))
        assert net[1].real.sum(1).tolist() == [4, 1]
        assert is_clean(net)


def test_layers_are_shared_by_calls_in_one_block():
    net = nn.Sequential(nn.Conv1d(1, 1, 2, 2), BatchNorm1d(1), nn.ReLU(), nn.Conv1d(1, 1, 2, 2))
    with padding_mask(lengths(8, 2), follow=net):
        for _ in range(3):
            net(torch.rand(2, 1, 8))
        (scope,) = find_block().follower._scopes.values()
        assert len(scope.masks) == 3  # made once


def test_image_network_with_flattened_frames():
    class Video(nn.Module):
        """(N, L, C, H, W), frames flattened into the batch."""

        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(1, 1, 3, 2), BatchNorm2d(1, momentum=1.0)

        def forward(self, x):
            return self.norm(self.conv(x.flatten(0, 1)))

    net, mask = Video(), lengths(5, 2, total=5)
    x = torch.randn(2, 5, 1, 7, 7)
    with padding_mask(mask, follow=net):
        net(x)
    close(net.norm.running_mean, net.conv(x[mask]).mean()[None].detach())
