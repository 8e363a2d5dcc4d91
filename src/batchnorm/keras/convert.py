"""Exchanging the batch norms of a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from batchnorm.core.conversion import Conversion, check_choice, check_report, describe_left
from batchnorm.core.declaration import check_known, list_arguments
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.core.layout import normalize_axis
from batchnorm.core.running import LONG_RUNNING
from batchnorm.keras.dropped import warn_converted
from batchnorm.keras.layers import BatchNormalization
from batchnorm.keras.options import OPTIONS, check_ghost_axes, make_attributes
from batchnorm.keras.private import open_name_scope, replace_build, unlocked
from batchnorm.keras.walking import walk_layers

__all__ = ["convert_batchnorm"]


@names_errors("convert_batchnorm")
def convert_batchnorm(
    model: keras.layers.Layer,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    report: list[Conversion] | None = None,
    **options: Any,
) -> keras.layers.Layer:
    """Make every Keras batch norm inside `model` one of this library's, in place.

    Args:
        model: functional, sequential or subclassed, or a layer; built or not.
        only: pattern for names, as of `fnmatch`, or several: other layers keep their class. A
            name is the path of layer names below the model, like `block/norm`.
        skip: patterns for names of layers to leave alone; they win over `only`.
        report: a list that gets one `Conversion` for each batch norm that is not yet this
            library's.
        **options: options of `BatchNormalization` for all of them: momentum, epsilon, renorm,
            renorm_clipping, renorm_momentum, virtual_batch_size, adjustment, padded_output,
            debias, synchronized, axis_name, process_group, fused.

    Layers stay the very same objects, wherever they are held: in functional graphs, nested models
    and composite layers. So do their weights, names, `trainable` flags, and the model's optimizer;
    compiled steps are made anew. Renormalization's statistics start from the moving ones (S11);
    with `debias` steps count from 0 where these are still 0 and 1, else as many (S23).
    A model or composite layer that builds its layers in its own constructor does so again when it
    is loaded, with Keras's: convert it after loading.

    Returns:
        `model`.

    Raises:
        TypeError: not a layer, or an unknown option.
        ValueError: a bad option. The model is unchanged then.

    Warns:
        UserWarning: layers that were left alone, with the reasons; layers of a functional model
            that get no mask because a layer before them drops it.

    >>> model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    >>> type(convert_batchnorm(model).layers[0]).__module__
    'batchnorm.keras.layers'
    """
    _check_arguments(model, options)
    choice = check_choice(only, skip)
    report = check_report(report)
    left: list[Conversion] = []
    found: list[tuple[Any, Conversion]] = []
    for name, layer in walk_layers(model):
        if not isinstance(layer, keras.layers.BatchNormalization):
            continue
        if isinstance(layer, BatchNormalization.__bases__[0]):
            continue
        refused = choice.refuse(name)
        reason = refused or _reason_to_leave(layer)
        after = None if reason else BatchNormalization
        found.append((layer, Conversion(name, type(layer), after, reason)))
        if reason and not refused:
            left.append(found[-1][1])
    chosen = [layer for layer, one in found if not one.reason]
    made = [_attributes_for(layer, options) for layer in chosen]
    for layer, attributes in zip(chosen, made, strict=True):
        _become_ours(layer, attributes)
    if chosen:
        _forget_compiled_steps(model)
        warn_converted((one.name, layer) for layer, one in found if not one.reason)
    report.extend(one for _, one in found)
    if left:
        warnings.warn(f"convert_batchnorm: left alone: {describe_left(left)}.", stacklevel=3)
    return model


def _reason_to_leave(layer: Any) -> str:
    """The reason why a layer cannot be exchanged, or an empty string."""
    if type(layer) is not keras.layers.BatchNormalization:
        return "a subclass may compute something else"
    if "call" in vars(layer):
        return "its call is patched; convert first, then patch"
    types = sorted({str(w.dtype) for w in layer.weights} & {"float16", "bfloat16"})
    if types:
        return f"its statistics are {types[0]}, ours are float32; build it with a mixed policy"
    return ""


def _attributes_for(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The attributes that make a layer ours, all of them checked."""
    held = {name: getattr(layer, name) for name in list_arguments(OPTIONS) if hasattr(layer, name)}
    attributes = make_attributes(held | options)
    if layer.built:
        if layer.renorm and not attributes["renorm"]:
            raise ArgumentValueError(
                f"renorm must stay True for layer {layer.name!r}, which has renormalization's "
                "weights; got False. Leave it out."
            )
        rank = layer.input_spec.ndim
        axes = normalize_axis(attributes["axis"], rank)
        check_ghost_axes(attributes["virtual_batch_size"], axes, attributes["axis"])
    return attributes


def _become_ours(layer: Any, attributes: dict[str, Any]) -> None:
    """Change the class of a layer; its graph, holders, weights and optimizer stay valid."""
    had_renorm = layer.renorm
    with unlocked(layer):
        object.__setattr__(layer, "__class__", BatchNormalization)
        for name, value in attributes.items():
            setattr(layer, name, value)
        layer._read_options()
        replace_build(layer, BatchNormalization.build.__get__(layer))
        if layer.built:
            rank = layer.input_spec.ndim
            layer._channel_axes = normalize_axis(layer._plain_axis(), rank)
            layer._channels = tuple(layer.moving_mean.shape)
            layer._flat_weights = True
            with open_name_scope(layer):
                _add_statistics(layer, had_renorm)


def _add_statistics(layer: Any, had_renorm: bool) -> None:
    """Add the weights of options to a built layer, as its moving statistics say (S11, S23)."""
    values = layer.get_weights()
    if layer.renorm and not had_renorm:
        layer._add_renorm_weights(tuple(layer.moving_mean.shape))
    if layer.debias:
        values.append(np.asarray(_guess_steps(layer)))
        layer._add_steps()
    layer.set_weights(values)


def _guess_steps(layer: Any) -> int:
    """0 for statistics that are still 0 and 1; Keras's layers do not count."""
    mean, variance = (
        keras.ops.convert_to_numpy(weight) for weight in (layer.moving_mean, layer.moving_variance)
    )
    return 0 if (mean == 0).all() and (variance == 1).all() else LONG_RUNNING


def _forget_compiled_steps(model: Any) -> None:
    """Let compiled models trace their steps anew."""
    for _, layer in walk_layers(model):
        if isinstance(layer, keras.Model):
            layer.train_function = layer.test_function = layer.predict_function = None


def _check_arguments(model: Any, options: dict[str, Any]) -> None:
    if not isinstance(model, keras.layers.Layer):
        raise ArgumentTypeError(
            f"model must be a Keras model or layer; got {type(model).__name__}."
        )
    check_known((option for option in OPTIONS if option.converts), options)
    make_attributes(options)
