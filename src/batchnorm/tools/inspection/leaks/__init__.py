"""The search for layers through which padding reaches real positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.tools.frameworks.switch import adapter_of
from batchnorm.tools.inspection.leaks.padding import pad_batch
from batchnorm.tools.inspection.leaks.records import Leak, Movement
from batchnorm.tools.inspection.leaks.report import Leaks
from batchnorm.tools.inspection.leaks.searching import Search
from batchnorm.tools.models import find_layers

__all__ = ["Leak", "Leaks", "Movement", "find_leaks"]

_OWNER = "find_leaks"


@names_errors(_OWNER)
def find_leaks(
    model: Any,
    batch: Any,
    mask: Any,
    *,
    run: Callable[[Any, Any, Any], Any] | None = None,
    more: int | None = None,
    axes: Sequence[int] | None = None,
    multiple: int = 1,
    fill: float | None = None,
    training: bool = True,
    tolerance: float | None = None,
) -> Leaks:
    """Find the layers through which padding reaches real positions.

    The model runs on the batch with as little padding as its longest sample allows, and with more,
    and the outputs of every layer are compared at real positions. A layer leaks if its real
    outputs move though its real inputs do not. In the run that finds them, what has moved is put
    back behind each layer, so each is judged by itself, and later leaks are found too.

    Three kinds of runs: in evaluation; with the batch norms as in training, by the statistics of
    the batch, and all else (dropout) as in evaluation; and each of them once with random numbers
    in the padding of floating arrays. The model is unchanged afterwards, also after an error.

    Args:
        model: a `torch.nn.Module`, `flax.nnx.Module` or Keras model. Its layers must run eagerly;
            what a compiled part computes counts as the layer around it.
        batch: what the model takes: an array, a mapping of keyword arguments (Keras: one input),
            or with `run` any nesting of arrays. Samples on axis 0. A few samples do: all
            activations are kept. Arrays equal to the mask are padded as the mask is.
        mask: `(N, *padded axes)`, or `(rows,)` for rows of no sample in particular; True, or not
            0, at real positions (S1). Padding is added behind the end, whatever the mask.
        run: function of model, batch and mask that calls the model. The default passes the mask as
            `mask=` if the model's call has such an argument; torch models run inside
            `padding_mask(mask, rescale="any", follow=model)` as well. Keras's functional and
            sequential models get none: they make their masks themselves.
        more: positions that are added along each padded axis; None for half as much again, in
            steps of 32, or along a single long axis of 96, 480 or 960. Strides that divide it are
            recognized exactly.
        axes: the padded axes of the batch's arrays, where their sizes leave it open.
        multiple: the model takes sizes that are multiples of this only, as a U-Net does.
        fill: the value of padding. None takes, for each array, the one that all of its padding
            holds, such as a padding token, and else 0.
        training: try the statistics of the batch too, if the model has batch norms.
        tolerance: largest difference, relative to the root mean square of a layer's real outputs
            plus the value itself, that counts as rounding. None derives it from the model's
            coarsest type: 1.2e-4 for float32 (1024 eps: sums of 10⁵ terms in another order),
            2.3e-13 for float64, 7.8e-3 for float16 and 6.3e-2 for bfloat16 (8 eps). In half
            precision only big leaks show, so search in float32.

    Returns:
        The leaks, the first one first; `print` it, or use `to_json` or `save_html`.

    Raises:
        TypeError: not a model; a mask without values.
        ValueError: a mask that fits no array, or fits several ways; a model that has no layers to
            follow, runs none eagerly, or differs from run to run on the same batch.

    Source: S4, S5.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ArgumentTypeError(
            "model must be a torch.nn.Module, a flax.nnx.Module or a Keras layer, whose layers can "
            f"be followed; got {type(model).__name__}. A tree of arrays has none: compare the "
            "outputs of your own functions."
        )
    if not isinstance(batch, dict) and run is None and isinstance(batch, (tuple, list)):
        raise ArgumentTypeError(
            f"batch must be an array or a mapping of keyword arguments; got a "
            f"{type(batch).__name__} of {len(batch)}. Say what of it the model gets, for instance "
            "run=lambda model, batch, mask: model(batch[0])."
        )
    following = adapter.following()
    _check_number("more", more)
    _check_number("multiple", multiple)
    padded = pad_batch(following, batch, mask, more, axes, multiple, fill)
    search = Search(adapter, model, padded, run or following.run, tolerance)
    search.run("evaluation", ())
    layers = find_layers(model) if training else []
    layers = [found for found in layers if adapter.refuse_update(found.layer) is None]
    if layers:
        search.run("training", layers)
    return search.result()


def _check_number(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int) and value > 0):
        raise ArgumentValueError(f"{name} must be a positive integer; got {value!r}.")
