"""Attributes of jax that no page of its documentation promises, and the ways without them.

A release may take each of these names away; what stands here for it is then slower, never wrong.
"""

from __future__ import annotations

from typing import Any

import jax

_PARTITIONED = "XLA would gather an array that is sharded over devices in front of it"
_EXPORTED = "an exported program must not depend on this library"
_UNKNOWN = f"jax {jax.__version__} does not say what the program is compiled for"


def refuse_context(context: Any) -> str | None:
    """The reason against kernels in the program that is being compiled, or None.

    Without the attributes of jax's compiler the reason is that they are missing: array code is
    right in every program.
    """
    module = getattr(context, "module_context", None)
    axes = getattr(module, "axis_context", None)
    exported = getattr(getattr(module, "lowering_parameters", None), "for_export", None)
    if axes is None or exported is None:
        return _UNKNOWN
    if exported:
        return _EXPORTED
    if hasattr(axes, "manual_axes"):
        manual = set(axes.manual_axes) == set(axes.mesh.axis_names)
        return None if manual or axes.mesh.size == 1 else _PARTITIONED
    return None if getattr(axes, "num_devices", None) == 1 else _PARTITIONED


def varying_axes(a: jax.Array) -> frozenset[Any]:
    """The manual axes along which jax knows `a` to vary: those of shard_map, if it checks them.

    Without the attribute of a's type each axis is tried: what varies cannot be made to.
    """
    varying = getattr(getattr(jax.typeof(a), "mat", None), "varying", None)
    if varying is not None:
        return frozenset(varying)
    return frozenset(n for n in jax.sharding.get_abstract_mesh().manual_axes if _varies(a, n))


def _varies(a: jax.Array, axis: Any) -> bool:
    try:
        jax.lax.pcast(a, axis, to="varying")
    except ValueError:
        return True
    return False
