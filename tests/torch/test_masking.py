"""padding_mask: masks that reach layers deep inside a model, at whatever resolution they run."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import threading

import pytest
import torch
from seen_masks import close, last, lengths, mean_of
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, padding_mask

pytestmark = pytest.mark.sample(2)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


N, C, L, H, W = 4, 3, 8, 4, 6
INTEGERS = [
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
]
SHAPES = {
    "(N,) at (N, C)": ((N,), (N, C)),
    "(N,) at (N, C, L)": ((N,), (N, C, L)),
    "(N,) at (N, C, H, W)": ((N,), (N, C, H, W)),
    "(N, L) at (N, C, L)": ((N, L), (N, C, L)),
    "(N, H) at (N, C, H, W)": ((N, H), (N, C, H, W)),
    "(N, H, W) at (N, C, H, W)": ((N, H, W), (N, C, H, W)),
}


class Deep(nn.Module):
    """A model whose layer gets no mask argument."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"stack": nn.Sequential(nn.Identity(), layer)})

    def forward(self, x: Tensor) -> Tensor:
        return self.inner["stack"](x)


class TestReach:
    @pytest.mark.parametrize(("sizes", "shape"), SHAPES.values(), ids=SHAPES.keys())
    def test_deep_layer_computes_as_with_the_mask_by_hand(self, sizes, shape):
        mask, x = torch.rand(sizes) > 0.4, torch.randn(shape)
        layer = BatchNorm(C)
        expected = copy.deepcopy(layer)(x, mask=mask)
        with padding_mask(mask):
            assert torch.equal(Deep(layer)(x), expected)

    @pytest.mark.parametrize(("sizes", "shape"), SHAPES.values(), ids=SHAPES.keys())
    def test_deep_layer_stores_the_real_rows_statistics(self, sizes, shape):
        mask, x = torch.rand(sizes) > 0.4, torch.randn(shape)
        layer = last(C, BatchNorm)
        with padding_mask(mask):
            Deep(layer)(x)
        rows = mask.reshape(*sizes, *(1,) * (len(shape) - 1 - len(sizes)))
        rows = rows.expand(shape[0], *shape[2:])
        close(mean_of(layer), x.movedim(1, -1)[rows].mean(0))

    @pytest.mark.parametrize("dtype", [torch.bool, *INTEGERS], ids=str)
    def test_integer_mask_means_the_same_as_a_boolean_one(self, dtype):
        mask, x = lengths(8, 3, 5, 1), torch.randn(N, C, L)
        expected = BatchNorm1d(C)(x, mask=mask)
        with padding_mask(mask.to(dtype)):
            assert torch.equal(BatchNorm1d(C)(x), expected)

    def test_channels_last_layer_gets_the_mask(self):
        mask, x = lengths(8, 3, 5, 1), torch.randn(N, L, C)
        expected = BatchNorm(C, axis=-1)(x, mask=mask)
        with padding_mask(mask):
            assert torch.equal(BatchNorm(C, axis=-1)(x), expected)

    def test_explicit_mask_wins(self):
        x, explicit = torch.randn(N, C, L), lengths(2, 8, 4, 7)
        expected = BatchNorm1d(C)(x, mask=explicit)
        with padding_mask(lengths(8, 3, 5, 1)):
            assert torch.equal(BatchNorm1d(C)(x, mask=explicit), expected)

    def test_explicit_mask_wins_over_one_that_would_not_fit(self):
        x, explicit = torch.randn(N, C, L), lengths(2, 8, 4, 7)
        expected = BatchNorm1d(C)(x, mask=explicit)
        with padding_mask(torch.ones(N + 1, dtype=torch.bool)):
            assert torch.equal(BatchNorm1d(C)(x, mask=explicit), expected)

    def test_nan_in_padding_changes_no_real_row(self):
        mask, x = lengths(8, 3, 5, 1), torch.randn(N, C, L)
        rows = mask[:, None].expand_as(x)
        expected = BatchNorm1d(C)(x, mask=mask)[rows]
        with padding_mask(mask):
            y = BatchNorm1d(C)(torch.where(rows, x, math.nan))
        assert torch.equal(y[rows], expected)


class TestScope:
    """The stored mean tells which mask a layer used: 1 with the mask, 2 without."""

    X = torch.tensor([[0.0], [2.0], [4.0]])
    FIRST = torch.tensor([True, True, False])
    LAST = torch.tensor([False, True, True])
    ALL = 2.0

    def seen(self) -> float:
        layer = last(1)
        layer(self.X)
        return mean_of(layer).item()

    def test_mask_ends_with_the_block(self):
        with padding_mask(self.FIRST):
            pass
        assert self.seen() == self.ALL

    def test_mask_ends_with_an_exception_in_the_block(self):
        with contextlib.suppress(KeyError), padding_mask(self.FIRST):
            raise KeyError
        assert self.seen() == self.ALL

    def test_exception_in_the_block_is_not_swallowed(self):
        with pytest.raises(KeyError, match="mine"), padding_mask(self.FIRST):
            raise KeyError("mine")

    def test_inner_mask_replaces_the_outer_one(self):
        with padding_mask(self.FIRST), padding_mask(self.LAST):
            assert self.seen() == 3.0

    def test_outer_mask_is_back_after_the_inner_block(self):
        with padding_mask(self.FIRST):
            with padding_mask(self.LAST):
                pass
            assert self.seen() == 1.0

    def test_outer_mask_is_back_after_an_exception_in_the_inner_block(self):
        with padding_mask(self.FIRST):
            with contextlib.suppress(KeyError), padding_mask(self.LAST):
                raise KeyError
            assert self.seen() == 1.0

    def test_none_switches_the_outer_mask_off(self):
        with padding_mask(self.FIRST), padding_mask(None):
            assert self.seen() == self.ALL

    def test_outer_mask_is_back_after_none(self):
        with padding_mask(self.FIRST):
            with padding_mask(None):
                pass
            assert self.seen() == 1.0

    def test_none_outside_of_any_block_changes_nothing(self):
        with padding_mask(None):
            assert self.seen() == self.ALL

    def test_rule_of_the_outer_block_does_not_reach_the_inner_one(self):
        mask = lengths(3, 8, total=8)
        outer, inner = padding_mask(mask, rescale="any"), padding_mask(mask)
        with outer, inner, pytest.raises(ValueError, match="partly padding"):
            BatchNorm1d(C)(torch.randn(2, C, 4))

    def test_failed_entry_leaves_no_mask(self):
        with pytest.raises(TypeError, match="boolean or integer"), padding_mask(self.X):
            pass
        assert self.seen() == self.ALL

    def test_works_as_a_decorator(self):
        assert padding_mask(self.FIRST)(self.seen)() == 1.0

    def test_decorated_function_works_a_second_time(self):
        decorated = padding_mask(self.FIRST)(self.seen)
        decorated()
        assert decorated() == 1.0

    def test_generator_closed_early_takes_its_mask_along(self):
        def steps():
            with padding_mask(self.FIRST):
                yield self.seen()
                yield self.seen()

        generator = steps()
        next(generator)
        generator.close()
        assert self.seen() == self.ALL

    def test_generator_sees_its_mask_after_it_is_resumed(self):
        def steps():
            with padding_mask(self.FIRST):
                yield self.seen()
                yield self.seen()

        assert list(steps()) == [1.0, 1.0]


class TestConcurrency:
    X, FIRST, LAST, ALL = TestScope.X, TestScope.FIRST, TestScope.LAST, TestScope.ALL
    seen = TestScope.seen

    def test_thread_started_inside_sees_no_mask(self):
        found: list[float] = []
        thread = threading.Thread(target=lambda: found.append(self.seen()))
        with padding_mask(self.FIRST):
            thread.start()
            thread.join()
        assert found == [self.ALL]

    def test_two_threads_each_see_their_own_mask_at_once(self):
        barrier = threading.Barrier(2, timeout=30)
        found: dict[str, float] = {}

        def work(name: str, mask: Tensor) -> None:
            with padding_mask(mask):
                barrier.wait()
                found[name] = self.seen()
                barrier.wait()

        threads = [
            threading.Thread(target=work, args=args)
            for args in (("first", self.FIRST), ("last", self.LAST))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == {"first": 1.0, "last": 3.0}

    def test_mask_survives_another_threads_leaving_its_block(self):
        def work() -> None:
            with padding_mask(self.LAST):
                pass

        thread = threading.Thread(target=work)
        with padding_mask(self.FIRST):
            thread.start()
            thread.join()
            assert self.seen() == 1.0

    def test_two_tasks_each_see_their_own_mask_across_awaits(self):
        async def work(mask: Tensor) -> float:
            with padding_mask(mask):
                await asyncio.sleep(0)
                found = self.seen()
                await asyncio.sleep(0)
                return found

        async def both() -> list[float]:
            return await asyncio.gather(work(self.FIRST), work(self.LAST))

        assert asyncio.run(both()) == [1.0, 3.0]

    @pytest.mark.parametrize("elsewhere", [False, True], ids=["alone", "another block is open"])
    def test_task_started_inside_sees_no_mask_once_the_block_has_ended(self, elsewhere):
        """This holds whatever happens in unrelated threads."""
        opened, done = threading.Event(), threading.Event()

        def other() -> None:
            with padding_mask(self.LAST) if elsewhere else contextlib.nullcontext():
                opened.set()
                done.wait(30)

        async def late() -> float:
            await asyncio.sleep(0)
            return self.seen()

        async def main() -> float:
            with padding_mask(self.FIRST):
                task = asyncio.create_task(late())
            return await task

        thread = threading.Thread(target=other)
        thread.start()
        opened.wait(30)
        found = asyncio.run(main())
        done.set()
        thread.join()
        assert found == self.ALL

    def test_task_that_set_a_mask_does_not_show_it_to_its_parent(self):
        async def main() -> float:
            entered, leave = asyncio.Event(), asyncio.Event()

            async def hold() -> None:
                with padding_mask(self.FIRST):
                    entered.set()
                    await leave.wait()

            task = asyncio.create_task(hold())
            await entered.wait()
            found = self.seen()
            leave.set()
            await task
            return found

        assert asyncio.run(main()) == self.ALL


class TestArguments:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.complex64])
    def test_mask_that_is_not_boolean_or_integer_is_a_type_error(self, dtype):
        with pytest.raises(TypeError, match="mask must be boolean or integer"):
            padding_mask(torch.ones(4, dtype=dtype)).__enter__()

    @pytest.mark.parametrize("mask", [[True, False], 1, "mask", True])
    def test_mask_that_is_no_tensor_is_a_type_error(self, mask):
        with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor"):
            padding_mask(mask).__enter__()

    def test_scalar_mask_is_a_value_error(self):
        with pytest.raises(ValueError, match="scalar"):
            padding_mask(torch.tensor(True)).__enter__()

    @pytest.mark.parametrize("rescale", ["most", "ANY", True, 0])
    def test_unknown_rule_is_a_value_error(self, rescale):
        with pytest.raises(ValueError, match='rescale must be None, "any" or "all"'):
            padding_mask(torch.ones(4, dtype=torch.bool), rescale=rescale).__enter__()

    def test_unknown_rule_is_a_value_error_without_a_mask_too(self):
        with pytest.raises(ValueError, match="rescale"):
            padding_mask(None, rescale="most").__enter__()

    def test_jagged_mask_is_a_value_error(self):
        mask = torch.nested.nested_tensor_from_jagged(
            torch.ones(5, dtype=torch.bool), torch.tensor([0, 2, 5])
        )
        with pytest.raises(ValueError, match="dense"):
            padding_mask(mask).__enter__()


class ConvNet(nn.Module):
    """Strides of 2, pooling to one pixel, flattening; `masks` by hand, one for each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 2, stride=2)
        self.bn1 = BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 2, stride=2)
        self.bn2 = BatchNorm2d(6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.bn3 = BatchNorm2d(6)
        self.bn4 = BatchNorm1d(6)

    def forward(self, x: Tensor, masks: tuple = (None,) * 4) -> Tensor:
        x = self.bn1(self.conv1(x), masks[0]).relu()
        x = self.bn2(self.conv2(x), masks[1]).relu()
        x = self.bn3(self.pool(x), masks[2])
        return self.bn4(x.flatten(1), masks[3])


def blocks_any(mask: Tensor, factor: int) -> Tensor:
    return nn.functional.max_pool2d(mask[:, None].float(), factor)[:, 0] > 0


def blocks_all(mask: Tensor, factor: int) -> Tensor:
    return ~blocks_any(~mask, factor)


def by_hand(mask: Tensor, reduce) -> tuple[Tensor, ...]:
    whole = reduce(mask, mask.shape[1])
    return reduce(mask, 2), reduce(mask, 4), whole, whole.flatten()


class TestConvNet:
    CASES = pytest.mark.parametrize(
        ("rescale", "reduce", "heights"),
        [
            (None, blocks_any, [8, 0, 8, 0, 8, 8]),
            ("any", blocks_any, [8, 5, 3, 0, 1, 7]),
            ("all", blocks_all, [8, 5, 8, 0, 1, 8]),
        ],
        ids=["whole samples", "any", "all"],
    )

    @staticmethod
    def case(heights: list[int]) -> tuple[Tensor, Tensor]:
        mask = lengths(*heights)[:, :, None].expand(-1, 8, 8)
        return torch.randn(len(heights), 2, 8, 8), mask

    @CASES
    def test_output_equals_masks_passed_by_hand(self, rescale, reduce, heights):
        x, mask = self.case(heights)
        net = ConvNet()
        expected = copy.deepcopy(net)(x, by_hand(mask, reduce))
        with padding_mask(mask, rescale=rescale):
            assert torch.equal(net(x), expected)

    @CASES
    def test_statistics_equal_masks_passed_by_hand(self, rescale, reduce, heights):
        x, mask = self.case(heights)
        net = ConvNet()
        twin = copy.deepcopy(net)
        twin(x, by_hand(mask, reduce))
        with padding_mask(mask, rescale=rescale):
            net(x)
        torch.testing.assert_close(
            dict(net.named_buffers()), dict(twin.named_buffers()), rtol=0, atol=0
        )

    @CASES
    def test_gradients_equal_masks_passed_by_hand(self, rescale, reduce, heights):
        x, mask = self.case(heights)
        net = ConvNet()
        twin, dy = copy.deepcopy(net), torch.randn(len(heights), 6)
        twin(x, by_hand(mask, reduce)).backward(dy)
        with padding_mask(mask, rescale=rescale):
            net(x).backward(dy)
        torch.testing.assert_close(
            {n: p.grad for n, p in net.named_parameters()},
            {n: p.grad for n, p in twin.named_parameters()},
            rtol=0,
            atol=0,
        )

    def test_whole_blocks_of_partly_padded_images_need_no_rule_before_pooling(self):
        x, mask = self.case([8, 4, 8, 0])
        net = nn.Sequential(nn.Conv2d(2, 4, 4, stride=4), last(4, BatchNorm2d))
        with padding_mask(mask):
            net(x)
        rows = mask[:, ::4, ::4]
        close(mean_of(net[1]), net[0](x).movedim(1, -1)[rows].mean(0).detach())


class PointNet(nn.Module):
    """Per-point layers (N, L, C); each layer treats every point alike."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(3, 8),
            BatchNorm(8, axis=-1),
            nn.ReLU(),
            nn.Linear(8, 8),
            BatchNorm(8, axis=-1),
            nn.Tanh(),
            nn.Linear(8, 2),
            BatchNorm(2, axis=-1),
        ).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TestPackingPrinciple:
    """S5 through a whole network: padded clouds give what the packed points give."""

    MASK = lengths(8, 3, 5, 1, 0)

    def both(self) -> tuple[PointNet, Tensor, Tensor, PointNet, Tensor, Tensor]:
        """Networks, inputs and outputs after a training step, padded and packed."""
        padded, x = PointNet(), torch.randn(5, 8, 3, dtype=torch.float64)
        x[~self.MASK] = 1e6
        packed, points = copy.deepcopy(padded), x[self.MASK].requires_grad_()
        x.requires_grad_()
        with padding_mask(self.MASK):
            y = padded(x)
        z = packed(points)
        dy = torch.randn_like(y)
        y.backward(dy)
        z.backward(dy[self.MASK])
        return padded, x, y, packed, points, z

    def test_real_rows_of_the_output(self):
        _, _, y, _, _, z = self.both()
        close(y[self.MASK], z, depth=3)

    def test_gradient_of_real_rows(self):
        _, x, _, _, points, _ = self.both()
        close(x.grad[self.MASK], points.grad, depth=3)

    def test_gradient_of_padded_rows_is_zero(self):
        _, x, _, _, _, _ = self.both()
        assert not x.grad[~self.MASK].any()

    @pytest.mark.parametrize("index", [1, 4, 7])
    def test_statistics_of_every_layer(self, index):
        padded, _, _, packed, _, _ = self.both()
        close(padded.layers[index].running_var, packed.layers[index].running_var, depth=3)

    @pytest.mark.parametrize("index", [1, 4, 7])
    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_parameter_gradients_of_every_layer(self, index, name):
        padded, _, _, packed, _, _ = self.both()
        grads = (getattr(net.layers[index], name).grad for net in (padded, packed))
        close(*grads, depth=3)


class TestEvaluation:
    MASK = lengths(8, 3, 5, 1)

    @staticmethod
    def layer(mode: str) -> BatchNorm1d:
        layer = BatchNorm1d(C)
        layer(torch.randn(N, C, L))
        return layer.eval() if mode == "eval" else layer.freeze()

    MODES = pytest.mark.parametrize("mode", ["eval", "frozen"])

    @MODES
    @pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
    def test_without_gradients_the_mask_is_ignored_even_if_it_does_not_fit(self, mode, guard):
        layer, x = self.layer(mode), torch.randn(N, C, 5)
        expected = layer(x)
        with padding_mask(self.MASK), guard():
            assert torch.equal(layer(x), expected)

    @MODES
    def test_with_gradients_the_output_is_that_without_a_mask(self, mode):
        layer, x = self.layer(mode), torch.randn(N, C, L)
        expected = layer(x)
        with padding_mask(self.MASK):
            assert torch.equal(layer(x), expected)

    @MODES
    def test_with_gradients_dx_is_zero_at_padded_rows(self, mode):
        layer, x = self.layer(mode), torch.randn(N, C, L, requires_grad=True)
        with padding_mask(self.MASK):
            layer(x).backward(torch.randn(N, C, L))
        assert not x.grad.movedim(1, -1)[~self.MASK].any()

    @MODES
    def test_with_gradients_dx_at_real_rows_is_that_without_a_mask(self, mode):
        layer, dy = self.layer(mode), torch.randn(N, C, L)
        x = torch.randn(N, C, L, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x), x, dy)
        with padding_mask(self.MASK):
            (dx,) = torch.autograd.grad(layer(x), x, dy)
        rows = self.MASK[:, None].expand_as(x)
        assert torch.equal(dx[rows], expected[rows])

    @MODES
    def test_with_gradients_parameters_get_real_rows_only(self, mode):
        layer, x, dy = self.layer(mode), torch.randn(N, C, L), torch.randn(N, C, L)
        with padding_mask(self.MASK):
            layer(x).backward(dy)
        close(layer.bias.grad, dy.movedim(1, -1)[self.MASK].sum(0))

    def test_layer_without_running_statistics_uses_the_mask_without_gradients(self):
        layer = BatchNorm1d(C, track_running_stats=False).eval()
        x = torch.randn(N, C, L)
        expected = layer(x, mask=self.MASK)
        with padding_mask(self.MASK), torch.no_grad():
            assert torch.equal(layer(x), expected)

    def test_training_without_gradients_uses_the_mask(self):
        layer, x = last(C), torch.randn(N, C, L)
        with padding_mask(self.MASK), torch.no_grad():
            layer(x)
        close(mean_of(layer), x.movedim(1, -1)[self.MASK].mean(0))


class TestCheckpointing:
    MASK = lengths(8, 3, 5, 1)

    def test_backward_inside_the_block_gives_the_plain_gradient(self):
        layer, dy = BatchNorm1d(C), torch.randn(N, C, L)
        x = torch.randn(N, C, L, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x, mask=self.MASK), x, dy)
        with padding_mask(self.MASK):
            y = checkpoint(layer, x, use_reentrant=False)
            (dx,) = torch.autograd.grad(y, x, dy)
        assert torch.equal(dx, expected)

    @pytest.mark.parametrize("reentrant", [False, True])
    def test_backward_outside_the_block_takes_the_mask_of_the_forward_pass(self, reentrant):
        layer, dy = BatchNorm1d(C), torch.randn(N, C, L)
        x = torch.randn(N, C, L, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x, mask=self.MASK), x, dy)
        for _ in range(3):  # each step has a block of its own
            with padding_mask(self.MASK):
                y = checkpoint(layer, x, use_reentrant=reentrant)
            y.backward(dy)
            assert torch.equal(x.grad, expected)
            x.grad = None

    def test_backward_in_another_block_takes_the_mask_of_the_forward_pass(self):
        layer, dy = BatchNorm1d(C), torch.randn(N, C, L)
        x = torch.randn(N, C, L, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x, mask=self.MASK), x, dy)
        with padding_mask(self.MASK):
            y = checkpoint(layer, x, use_reentrant=False)
        with padding_mask(lengths(1, 2, 3, 4)):
            assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)

    def test_backward_after_passes_with_several_masks_raises_with_the_remedy(self):
        layer, x = BatchNorm1d(C), torch.randn(N, C, L, requires_grad=True)
        ys = []
        for mask in (self.MASK, lengths(1, 2, 3, 4)):
            with padding_mask(mask):
                ys.append(checkpoint(layer, x, use_reentrant=False))
        with pytest.raises(RuntimeError, match="Call backward inside the with block"):
            ys[0].backward(torch.randn(N, C, L))

    def test_equal_masks_are_one_answer(self):
        layer, x = BatchNorm1d(C), torch.randn(N, C, L, requires_grad=True)
        ys = []
        for _ in range(2):
            with padding_mask(self.MASK.clone()):
                ys.append(checkpoint(layer, x, use_reentrant=False))
        (ys[0] + ys[1]).sum().backward()

    def test_a_pass_without_a_mask_is_recomputed_without(self):
        layer, dy = BatchNorm1d(C), torch.randn(N, C, L)
        x = torch.randn(N, C, L, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x), x, dy)
        with padding_mask(self.MASK):
            layer(x)
        y = checkpoint(layer, x, use_reentrant=False)
        with padding_mask(self.MASK), pytest.raises(RuntimeError, match="several masks"):
            y.backward(dy)  # of the two passes either may be meant
        y = checkpoint(layer, x, use_reentrant=False)
        y.backward(dy)
        assert torch.equal(x.grad, expected)

    @pytest.mark.parametrize("outside", [False, True])
    def test_deep_nesting_moves_to_other_threads_and_keeps_the_mask(self, outside):
        # From 60 nested reentrant backward passes on, torch's engine goes on in other threads.
        layer, threads = BatchNorm1d(C, momentum=0.5), set()
        x, dy = torch.randn(N, C, L), torch.randn(N, C, L)
        leaf = x.clone().requires_grad_()
        layer(leaf, mask=self.MASK).backward(dy)
        expected, layer = leaf.grad, BatchNorm1d(C, momentum=0.5)

        def nest(a, depth):
            threads.add(threading.get_ident())
            if depth == 0:
                return layer(a)
            return checkpoint(nest, a, depth - 1, use_reentrant=True)

        leaf = x.clone().requires_grad_()
        with padding_mask(self.MASK):
            y = nest(leaf, 70)
            if not outside:
                y.backward(dy)
        if outside:
            y.backward(dy)
        assert len(threads) > 1
        assert torch.equal(leaf.grad, expected)
        assert layer.num_batches_tracked == 1

    def test_a_compiled_layer_in_another_thread_keeps_the_mask(self):
        layer = torch.compile(BatchNorm1d(C), backend="aot_eager")
        x, dy = torch.randn(N, C, L), torch.randn(N, C, L)
        leaf = x.clone().requires_grad_()
        BatchNorm1d(C)(leaf, mask=self.MASK).backward(dy)
        expected = leaf.grad

        def nest(a, depth):
            return layer(a) if depth == 0 else checkpoint(nest, a, depth - 1, use_reentrant=True)

        leaf = x.clone().requires_grad_()
        with padding_mask(self.MASK):
            nest(leaf, 70).backward(dy)
        close(leaf.grad, expected)

    def test_plain_backward_outside_the_block_is_fine(self):
        layer, dy = BatchNorm1d(C), torch.randn(N, C, L)
        x = torch.randn(N, C, L, requires_grad=True)
        (expected,) = torch.autograd.grad(layer(x, mask=self.MASK), x, dy)
        with padding_mask(self.MASK):
            y = layer(x)
        assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)


class TestJagged:
    X = torch.nested.nested_tensor_from_jagged(
        torch.randn(11, C, generator=torch.Generator().manual_seed(3)),
        torch.tensor([0, 4, 6, 11]),
    )

    def test_compiled_layer_breaks_the_graph_and_takes_the_mask(self):
        mask = torch.tensor([True, False, True])
        expected = BatchNorm(C, axis=-1)(self.X, mask).values()
        torch._dynamo.reset()
        layer = torch.compile(BatchNorm(C, axis=-1), backend="eager")
        with padding_mask(mask):
            torch.testing.assert_close(layer(self.X).values(), expected)
        assert not torch.allclose(BatchNorm(C, axis=-1)(self.X).values(), expected)

    def test_whole_graph_refuses_rather_than_ignores_the_mask(self):
        torch._dynamo.reset()
        layer = torch.compile(BatchNorm(C, axis=-1), backend="eager", fullgraph=True)
        mask = torch.ones(3, dtype=torch.bool)
        with padding_mask(mask), pytest.raises(Exception, match="does not reach a jagged input"):
            layer(self.X)

    def test_mask_of_another_number_of_samples_raises(self):
        mask = torch.ones(2, dtype=torch.bool)
        with padding_mask(mask), pytest.raises(ValueError, match=r"shape \(3,\).*got \(2,\)"):
            BatchNorm(C, axis=-1)(self.X)

    @pytest.mark.parametrize("sizes", [(3, 5), (3, 7)], ids=["same", "other"])
    def test_mask_of_positions_does_not_concern_a_jagged_input(self, sizes):
        expected = BatchNorm(C, axis=-1)(self.X).values()
        with padding_mask(torch.ones(sizes, dtype=torch.bool)):
            assert torch.equal(BatchNorm(C, axis=-1)(self.X).values(), expected)

    def test_explicit_mask_of_a_jagged_input_counts(self):
        mask = torch.tensor([True, False, True])
        expected = BatchNorm(C, axis=-1)(self.X, mask=mask).values()
        with padding_mask(torch.tensor([False, True, True])):
            assert torch.equal(BatchNorm(C, axis=-1)(self.X, mask=mask).values(), expected)

    def test_mask_of_whole_samples_reaches_a_jagged_input(self):
        mask = torch.tensor([True, False, True])
        expected = BatchNorm(C, axis=-1)(self.X, mask=mask).values()
        with padding_mask(mask):
            assert torch.equal(BatchNorm(C, axis=-1)(self.X).values(), expected)
