"""The way that a call of a layer takes."""

from __future__ import annotations

from typing import Any

from batchnorm.kernels.explanation import Explanation

__all__ = ["explain"]


def explain(layer: Any, x: Any, **arguments: Any) -> Explanation:
    """The way that `layer(x, ...)` would take now, and why each faster one refuses.

    The call runs its checks and the choice of a way, and stops: nothing is computed, and no
    statistic changes. With the environment variable BATCHNORM_EXPLAIN=1, set before the import,
    every choice that a program makes is logged once by the logger "batchnorm", on standard error
    unless logging has another handler.

    Args:
        layer: a layer of `batchnorm.torch`, `.jax` or `.keras`, initialized or built; or one
            that `torch.compile` has returned, for the way in its graph.
        x: its input.
        **arguments: the call's other arguments, such as `mask`, `residual` or `training`.

    Returns:
        An `Explanation` with `way` and `refused` (pairs of a way and its reason, the fastest
        first); its text shows all fields.

    Raises:
        TypeError: no layer of this library.
        ValueError: a layer that has no weights yet; and the errors of the call itself, such as
            for fused=True where no kernel serves it.

    >>> import torch
    >>> from batchnorm.torch import BatchNorm
    >>> print(explain(BatchNorm(3, fused=False), torch.randn(8, 3)).way)
    array code
    """
    inner = getattr(layer, "_orig_mod", layer)  # what torch.compile wraps
    if any(cls.__module__.startswith("batchnorm.") for cls in type(inner).__mro__):
        if inner is not layer:
            arguments["graph"] = True
        if hasattr(inner, "_explain"):
            found: Explanation = inner._explain(x, **arguments)
            return found
    raise TypeError(
        "explain: layer must be a batch norm of batchnorm.torch, batchnorm.jax or "
        f"batchnorm.keras; got {type(layer).__name__}."
    )
