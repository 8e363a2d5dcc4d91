"""Masks at layers of other sizes, of which only the sizes are known."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from seen_masks import close, lengths, seen_at, seen_by
from torch.utils.checkpoint import checkpoint

from batchnorm.core.resolution import find_anchors, guess_anchors
from batchnorm.torch import (
    BatchNorm,
    BatchNorm1d,
    BatchNorm2d,
    masking,
    padding_mask,
    sequence_mask,
)
from batchnorm.torch.masks.walks import walk_axis

pytestmark = pytest.mark.sample(2)

N, C, L, H, W = 4, 3, 8, 4, 6


class TestRescaling:
    @pytest.mark.parametrize("rescale", [None, "any", "all"])
    def test_whole_blocks_merge_under_every_rule(self, rescale):
        real = seen_at(lengths(8, 4), (2, 1, 2), rescale=rescale)
        assert real.tolist() == [[True, True], [True, False]]

    @pytest.mark.parametrize(
        ("rescale", "expected"),
        [("any", [[True, True], [True, False]]), ("all", [[True, False], [False, False]])],
    )
    def test_partly_padded_blocks_follow_the_rule(self, rescale, expected):
        assert seen_at(lengths(6, 3), (2, 1, 2), rescale=rescale).tolist() == expected

    @pytest.mark.parametrize(("rescale", "expected"), [("any", True), ("all", False)])
    def test_two_dimensional_block_with_one_padded_pixel_follows_the_rule(self, rescale, expected):
        mask = torch.ones(2, 4, 4, dtype=torch.bool)
        mask[1, 3, 2] = False
        real = seen_at(mask, (2, 1, 2, 2), rescale=rescale)
        assert real.tolist() == [[[True, True], [True, True]], [[True, True], [True, expected]]]

    def test_axes_may_shrink_by_different_factors(self):
        mask = torch.zeros(2, 4, 6, dtype=torch.bool)
        mask[:, :2, :3] = True
        real = seen_at(mask, (2, 1, 2, 2))
        assert real.tolist() == [[[True, False], [False, False]]] * 2

    @pytest.mark.parametrize("rescale", [None, "any", "all"])
    @pytest.mark.parametrize("shape", [(2, C, 12), (2, C, 18), (2, C, 7)])
    def test_finer_layer_does_not_repeat_the_mask(self, shape, rescale):
        said = rf"\(2, 6\).*rows \(2, {shape[2]}\): {shape[2]} is finer than 6 on axis 1"
        given = padding_mask(lengths(4, 1, total=6), rescale=rescale)
        with given, pytest.raises(ValueError, match=said):
            BatchNorm1d(C)(torch.randn(shape))

    def test_one_axis_may_not_grow_while_another_shrinks(self):
        given = padding_mask(torch.ones(2, 4, 2, dtype=torch.bool))
        with given, pytest.raises(ValueError, match="4 is finer than 2 on axis 2"):
            BatchNorm2d(C)(torch.randn(2, C, 2, 4))

    @pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1)], ids=["pooled", "flattened"])
    @pytest.mark.parametrize("rescale", [None, "any", "all"])
    def test_without_spatial_axes_whole_samples_count_under_every_rule(self, shape, rescale):
        mask = torch.tensor([True, False, True])[:, None, None].expand(3, 4, 4)
        assert seen_at(mask, shape, rescale=rescale).flatten().tolist() == [True, False, True]

    @pytest.mark.parametrize("shape", [(3, 1, 1, 1), (3, 1)], ids=["pooled", "flattened"])
    @pytest.mark.parametrize(
        ("rescale", "expected"), [("any", [True, True, False]), ("all", [True, False, False])]
    )
    def test_without_spatial_axes_partly_padded_samples_follow_the_rule(
        self, shape, rescale, expected
    ):
        mask = torch.ones(3, 4, 4, dtype=torch.bool)
        mask[1, 2:] = False
        mask[2] = False
        assert seen_at(mask, shape, rescale=rescale).flatten().tolist() == expected

    @pytest.mark.parametrize(
        "shape", [(3, 1, 2, 2), (3, 1, 1, 1), (3, 1)], ids=["coarser", "pooled", "flattened"]
    )
    def test_partly_padded_block_without_a_rule_raises(self, shape):
        mask = torch.ones(3, 4, 4, dtype=torch.bool)
        mask[1, 3, 3] = False
        with padding_mask(mask), pytest.raises(ValueError, match="partly padding"):
            BatchNorm(1)(torch.randn(shape))

    @pytest.mark.parametrize(
        "said", [r"\(2, 8\)", r"\(2, 4\)", "whole blocks", 'rescale="any"', 'rescale="all"']
    )
    def test_message_of_a_partly_padded_block_names_shapes_and_remedies(self, said):
        with padding_mask(lengths(8, 3)), pytest.raises(ValueError, match=said):
            BatchNorm1d(C)(torch.randn(2, C, 4))

    @pytest.mark.parametrize("batch", [1, 2, 3, 8])
    def test_another_batch_size_raises(self, batch):
        given = padding_mask(torch.ones(N, L, dtype=torch.bool), rescale="any")
        with given, pytest.raises(ValueError, match="batch axis"):
            BatchNorm1d(C)(torch.randn(batch, C, L))

    def test_mask_of_fewer_axes_at_another_resolution_raises(self):
        given = padding_mask(torch.ones(N, H, dtype=torch.bool))
        with given, pytest.raises(ValueError, match="number of axes"):
            BatchNorm2d(C)(torch.randn(N, C, H // 2, W))

    @pytest.mark.parametrize(
        "said",
        [
            *(r"\(4, 8\)", r"rows \(4, 9\)", r"sequence_mask\(lengths, 9\)", "Hugging Face"),
            *("_get_feat_extract_output_lengths", "_get_subsampling_output_length"),
            *("follow=model", "pass mask= to this layer", r"padding_mask\(None\)"),
        ],
    )
    def test_message_of_a_misfit_names_shapes_and_remedies(self, said):
        with padding_mask(lengths(8, 3, 5, 1)), pytest.raises(ValueError, match=said):
            BatchNorm1d(C)(torch.randn(N, C, 9))

    def test_layer_wrapped_in_none_needs_no_fit(self):
        x = torch.randn(N, C, 9)
        expected = BatchNorm1d(C)(x)
        with padding_mask(lengths(8, 3, 5, 1)), padding_mask(None):
            assert torch.equal(BatchNorm1d(C)(x), expected)

    @pytest.mark.parametrize("shape", [(0, C, 8), (0, C, 4), (0, C, 16), (0, C)])
    def test_empty_batch_fits_at_every_resolution(self, shape):
        with padding_mask(torch.ones(0, 8, dtype=torch.bool)):
            assert BatchNorm1d(C)(torch.randn(shape)).shape == shape

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
    @pytest.mark.parametrize(
        "shape", [(N, C, 9), (N + 1, C, L), (N, C, L // 4)], ids=["size", "batch", "partly padded"]
    )
    def test_failed_forward_leaves_statistics_unchanged(self, name, shape):
        layer = BatchNorm1d(C)
        before = getattr(layer, name).clone()
        with padding_mask(lengths(8, 3, 5, 1)), pytest.raises(ValueError, match="padding_mask"):
            layer(torch.randn(shape))
        assert torch.equal(getattr(layer, name), before)


class TestOddSizes:
    """Sizes that do not divide: windows of one stride, counted from both ends."""

    SIZES = torch.tensor([401, 300, 251, 250, 3, 2, 1, 0])

    @pytest.mark.parametrize("rescale", [None, "any", "all"])
    def test_stride_two_of_401_gives_the_lengths_of_the_convolution(self, rescale):
        real = seen_by((8, 1, 201), sequence_mask(self.SIZES, 401), rescale=rescale)
        assert torch.equal(real, sequence_mask((self.SIZES + 1) // 2, 201))

    @pytest.mark.parametrize("rescale", [None, "any", "all"])
    def test_three_strides_of_161_give_the_lengths_of_the_convolutions(self, rescale):
        sizes = torch.tensor([161, 160, 153, 152, 9, 8, 1, 0])
        after = sizes
        for _ in range(3):
            after = (after + 1) // 2
        real = seen_by((8, 1, 21), sequence_mask(sizes, 161), rescale=rescale)
        assert torch.equal(real, sequence_mask(after, 21))

    def test_valid_windows_shorten_each_sample_by_as_much(self):
        sizes = torch.tensor([100, 70, 3, 2, 0])
        real = seen_by((5, 1, 98), sequence_mask(sizes, 100))
        assert torch.equal(real, sequence_mask((sizes - 2).clamp(0), 98))

    def test_any_counts_what_may_be_real(self):
        sizes = torch.tensor([100, 70])
        real = seen_by((2, 1, 98), sequence_mask(sizes, 100), rescale="any")
        assert real.sum(1).tolist() == [98, 70]

    def test_padding_in_front_is_the_mirror_image(self):
        mask = sequence_mask(self.SIZES, 401)
        real = seen_by((8, 1, 201), mask.flip(1))
        assert torch.equal(real, seen_by((8, 1, 201), mask).flip(1))

    def test_holes_are_padding_where_a_window_may_have_them(self):
        mask = torch.ones(1, 10, dtype=torch.bool)
        mask[0, 4] = False
        assert seen_by((1, 1, 8), mask).tolist() == [[True] * 2 + [False] * 3 + [True] * 3]

    def test_each_axis_has_its_own_sizes(self):
        mask = sequence_mask(torch.tensor([5, 4]), 7)[:, :, None].expand(2, 7, 9)
        real = seen_by((2, 1, 4, 5), mask)
        assert real[:, :, 0].sum(1).tolist() == [3, 2]
        assert torch.equal(real, real[:, :, :1].expand(2, 4, 5))

    def test_no_padded_position_counts_as_real_whatever_the_window_was(self):
        """Windows of two strides beside their padding, which is at most half the window."""
        seen = 0
        for stride, kernel, dilation in itertools.product((1, 2, 3, 4), (1, 2, 3, 4, 5), (1, 2)):
            reach = dilation * (kernel - 1) + 1
            for padding, size in itertools.product(range(reach // 2 + 1), range(2, 30)):
                walk = find_anchors(kernel, stride, (padding, padding), dilation)
                goal = walk.count(size)
                wide = reach - 2 * padding > 2 * stride
                if not 0 < goal < size or size % goal == 0 or wide:
                    continue
                known = guess_anchors(size, goal)
                seen += 1
                prefixes = sequence_mask(torch.arange(size + 1), size)
                found = walk_axis(prefixes, 1, goal, known).sum(1)
                right = walk_axis(prefixes, 1, goal, walk).sum(1)
                assert (found <= right).all(), (stride, kernel, dilation, padding, size)
        assert seen > 1000

    def test_positions_do_not_become_none(self):
        given = padding_mask(torch.ones(2, 4, dtype=torch.bool))
        with given, pytest.raises(ValueError, match="4 positions on axis 1 do not become none"):
            BatchNorm(C)(torch.ones(2, C, 0))


class TestLayouts:
    MASK = lengths(5, 2, 3, total=5)

    def test_flattened_rows_have_the_flattened_mask(self):
        assert torch.equal(seen_by((15, C), self.MASK), self.MASK.flatten())

    def test_flattened_batch_of_images_keeps_their_axes(self):
        real = seen_by((15, C, 2, 2), self.MASK)
        assert torch.equal(real, self.MASK.flatten()[:, None, None].expand(15, 2, 2))

    def test_axes_next_to_each_other_may_merge(self):
        mask = torch.rand(2, 3, 4) < 0.5
        assert torch.equal(seen_by((2, C, 12), mask), mask.flatten(1))
        assert torch.equal(seen_by((6, C, 4), mask), mask.flatten(0, 1))

    def test_flattening_is_not_any_reshape(self):
        given = padding_mask(torch.ones(2, 6, dtype=torch.bool))
        with given, pytest.raises(ValueError, match="batch axis"):
            BatchNorm1d(C)(torch.randn(3, C, 4))

    def test_rows_in_the_other_order_have_the_mask_turned(self):
        assert torch.equal(seen_by((5, 3, C), self.MASK, axis=-1), self.MASK.T)

    def test_layer_with_rows_in_the_other_order_raises_where_sizes_do_not_tell(self):
        layer, square = BatchNorm(C, axis=-1), lengths(3, 1, 2, total=3)
        with padding_mask(square):
            layer(torch.randn(3, 3, C))  # nothing speaks for another order
        with padding_mask(self.MASK):
            layer(torch.randn(5, 3, C))
        with padding_mask(square), pytest.raises(ValueError, match="turned around as in its earl"):
            layer(torch.randn(3, 3, C))

    def test_compiled_layer_with_rows_in_the_other_order_raises(self):
        layer = torch.compile(BatchNorm(C, axis=-1), backend="eager")
        with padding_mask(self.MASK), pytest.raises(ValueError, match=r"mask\.T"):
            layer(torch.randn(5, 3, C))
        with padding_mask(self.MASK.T):
            layer(torch.randn(5, 3, C))

    def test_compiled_layer_has_flattened_and_coarser_masks(self):
        for x, sizes in ((torch.randn(15, C), (3, 5)), (torch.randn(3, C, 3), (3, 5))):
            mask = self.MASK.reshape(sizes)
            layer, expected = BatchNorm(C), BatchNorm(C)
            with padding_mask(mask):
                torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
                expected(x)
            torch.testing.assert_close(layer.running_var, expected.running_var)


class TestSeveralMasks:
    TEXT, MEL = lengths(4, 2, total=4), lengths(12, 5, total=12)

    def test_each_layer_has_the_mask_of_its_rows(self):
        for mask in (self.TEXT, self.MEL):
            shape = (2, C, mask.shape[1])
            assert torch.equal(seen_by(shape, [self.TEXT, self.MEL]), mask)

    def test_tuple_is_a_list(self):
        assert torch.equal(seen_by((2, C, 4), (self.MEL, self.TEXT)), self.TEXT)

    def test_mask_of_all_rows_wins_over_one_of_whole_samples(self):
        samples = torch.tensor([True, False])
        assert torch.equal(seen_by((2, C, 4), [samples, self.TEXT]), self.TEXT)
        assert seen_by((2, C, 7), [samples, self.TEXT]).sum(1).tolist() == [7, 0]

    def test_coarser_layer_takes_the_only_mask_that_is_finer(self):
        real = seen_by((2, C, 6), [self.TEXT, self.MEL], rescale="any")
        assert real.sum(1).tolist() == [6, 3]

    def test_coarser_layer_that_could_have_either_raises(self):
        given = padding_mask([self.TEXT, self.MEL], rescale="all")
        said = r"shapes \(2, 4\), \(2, 12\).*rows \(2, 2\): several could be meant, and they differ"
        with given, pytest.raises(ValueError, match=said):
            BatchNorm1d(C)(torch.randn(2, C, 2))

    def test_coarser_layer_that_could_have_either_needs_them_to_agree(self):
        sizes = torch.tensor([401, 250, 7])
        masks = [sequence_mask(sizes, 401), sequence_mask((sizes + 1) // 2, 201)]
        real = seen_by((3, C, 101), masks)
        assert torch.equal(real, sequence_mask((sizes + 3) // 4, 101))

    def test_jagged_input_takes_the_mask_of_its_samples(self):
        rows = [torch.randn(n, C) for n in (2, 3, 1)]
        x = torch.nested.nested_tensor(rows, layout=torch.jagged)
        other, mask = torch.tensor([True, True]), torch.tensor([True, False, True])
        layer = BatchNorm(C, axis=-1, momentum=1.0)
        with padding_mask([other, mask, self.MEL]):
            layer(x)
        close(layer.running_mean, torch.cat([rows[0], rows[2]]).mean(0))

    def test_layer_that_none_fits_raises(self):
        given = padding_mask([self.TEXT, self.MEL])
        said = r"shapes \(2, 4\), \(2, 12\).*rows \(2, 20\): none of them is finer"
        with given, pytest.raises(ValueError, match=said):
            BatchNorm1d(C)(torch.randn(2, C, 20))

    def test_rows_that_flatten_two_masks_raise(self):
        given = padding_mask([lengths(1, 2, 3, total=5), lengths(1, 2, 3, 1, 2, total=3)])
        with given, pytest.raises(ValueError, match="several fit it"):
            BatchNorm1d(C)(torch.randn(15, C))

    def test_masks_of_one_shape_are_refused_at_once(self):
        with pytest.raises(ValueError, match=r"told apart by their shapes.*\(2, 4\)"):
            padding_mask([self.TEXT, self.TEXT]).__enter__()

    def test_empty_list_is_refused(self):
        with pytest.raises(ValueError, match="must not be empty"):
            padding_mask([]).__enter__()

    def test_none_in_a_list_is_refused(self):
        with pytest.raises(TypeError, match="None in a list"):
            padding_mask([None]).__enter__()

    @pytest.mark.exhaustive
    def test_compiled_layers_have_the_masks_of_their_rows(self):
        layers = [BatchNorm(C, momentum=1.0) for _ in range(2)]
        xs = [torch.randn(2, C, n) for n in (4, 12)]
        run = torch.compile(
            lambda a, b: (layers[0](a), layers[1](b)), fullgraph=True, backend="aot_eager"
        )
        with padding_mask([self.MEL, self.TEXT]):
            run(*xs)
        for layer, x, mask in zip(layers, xs, (self.TEXT, self.MEL), strict=True):
            close(layer.running_mean, x.movedim(1, -1)[mask].mean(0))

    def test_recomputation_outside_of_the_block_has_the_mask(self):
        layer, x = BatchNorm1d(C), torch.randn(2, C, 4, requires_grad=True)
        dy = torch.randn(2, C, 4)
        (expected,) = torch.autograd.grad(layer(x, mask=self.TEXT), x, dy)
        for other in (self.MEL, lengths(1, 1, total=12)):
            with padding_mask([self.TEXT, other]):
                y = checkpoint(layer, x, use_reentrant=False)
            assert torch.equal(torch.autograd.grad(y, x, dy)[0], expected)

    @pytest.mark.parametrize("other", [[MEL], [TEXT, lengths(1, 1, total=12)]])
    def test_blocks_with_other_masks_are_not_one_answer(self, other):
        layer, x = BatchNorm1d(C), torch.randn(2, C, 4, requires_grad=True)
        with padding_mask([self.TEXT, self.MEL]):
            y = checkpoint(layer, x, use_reentrant=False)
        with padding_mask(other, rescale="any"):
            layer(x)
        with pytest.raises(RuntimeError, match="several masks"):
            y.backward(torch.randn(2, C, 4))


class TestPaddedOutput:
    MASK = lengths(4, 2, total=4)

    @pytest.mark.parametrize("value", ["Zero", True, 0, "none"])
    def test_other_values_are_refused(self, value):
        with pytest.raises(ValueError, match='padded_output must be None, "normalize" or "zero"'):
            padding_mask(self.MASK, padded_output=value).__enter__()

    @pytest.mark.parametrize("value", [None, "normalize", "zero"])
    def test_block_holds_it(self, value):
        with padding_mask(self.MASK, padded_output=value):
            assert masking.padded_output_in(masking.find_block()) == value
        assert masking.padded_output_in(masking.find_block()) is None

    def test_block_inside_that_does_not_say_keeps_it(self):
        with padding_mask(self.MASK, padded_output="zero"):
            for mask in (self.MASK, None):
                with padding_mask(mask):
                    assert masking.padded_output_in(masking.find_block()) == "zero"
            with padding_mask(None, padded_output="normalize"):
                assert masking.padded_output_in(masking.find_block()) == "normalize"

    def test_block_without_a_mask_gives_none(self):
        x = torch.randn(2, C, 4)
        expected = BatchNorm1d(C)(x)
        with padding_mask(None, padded_output="zero"):
            assert torch.equal(BatchNorm1d(C)(x), expected)

    def test_blocks_that_differ_in_it_are_not_alike(self):
        found = []
        for value in ("zero", "normalize", "zero"):
            with padding_mask(self.MASK, padded_output=value):
                found.append(masking.find_block())
        assert masking.is_alike(found[0], found[2])
        assert not masking.is_alike(found[0], found[1])

    def test_graph_sees_each_value(self):
        @torch.compile(fullgraph=True, backend="aot_eager")
        def ask(x: torch.Tensor) -> torch.Tensor:
            return x + torch.as_tensor(masking.traced_zeroing(x, "normalize")).to(x.dtype)

        torch._dynamo.reset()
        x, found = torch.zeros(1), [ask(torch.zeros(1)).item()]
        for value in ("zero", "normalize", None, "zero"):
            with padding_mask(self.MASK, padded_output=value):
                found.append(ask(x).item())
        assert [*found, ask(x).item()] == [0, 1, 0, 0, 1, 0]

    def test_graph_keeps_the_layers_own_where_no_block_says(self):
        @torch.compile(fullgraph=True, backend="aot_eager")
        def ask(x: torch.Tensor) -> torch.Tensor:
            return x + torch.as_tensor(masking.traced_zeroing(x, "zero")).to(x.dtype)

        torch._dynamo.reset()
        found = [ask(torch.zeros(1)).item()]
        with padding_mask(self.MASK):
            found.append(ask(torch.zeros(1)).item())
        with padding_mask(self.MASK, padded_output="normalize"):
            found.append(ask(torch.zeros(1)).item())
            other = []
            thread = threading.Thread(target=lambda: other.append(ask(torch.zeros(1)).item()))
            thread.start()
            thread.join()
        assert [*found, *other] == [1, 1, 0, 1]
