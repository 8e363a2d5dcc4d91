"""A step over one array as JAX primitives, so that every transformation finds its way.

`step_p` normalizes, `gradient_p` is its transpose, `tangent_p` its derivative forwards. Compiled
for one CPU device they are custom calls into the kernels; elsewhere, and wherever a derivative or
a vmap asks for more than the kernels can do, they are array code (`array_code.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from batchnorm.jax import array_code, custom_calls
from batchnorm.jax.call import Call, Operands
from batchnorm.jax.checks import working_type
from batchnorm.jax.synchronize import varying_axes
from batchnorm.kernels import explanation
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.select import refuse_fused

DIFFERENTIABLE = ("x", "gamma", "beta")


class Stepped(NamedTuple):
    """What a step returns: y; rows of statistics as in `STATISTICS`; each group's count."""

    y: Array
    statistics: Array
    counts: Array


def run_step(operands: Operands, call: Call) -> Stepped:
    """Normalize; `call.present` is filled in here."""
    call = call._replace(present=tuple(a is not None for a in operands))
    return Stepped(*step_p.bind(*_alike([a for a in operands if a is not None]), call=call))


def _alike(arrays: Sequence[Array]) -> list[Array]:
    """All of them varying over the same axes of shard_map, as its rules for primitives ask."""
    axes = frozenset[Any]().union(*(varying_axes(a) for a in arrays))
    found = []
    for a in arrays:
        missing = tuple(axes - varying_axes(a))
        found.append(jax.lax.pcast(a, missing, to="varying") if missing else a)
    return found


def _make_primitive(name: str) -> Primitive:
    primitive = Primitive(f"batchnorm_{name}")
    primitive.multiple_results = True

    @lru_cache(maxsize=1024)
    def compiled(call: Call, **params: Any) -> Callable[..., Any]:
        return jax.jit(partial(primitive.bind, call=call, **params))

    @primitive.def_impl
    def run(*arrays: Array, **params: Any) -> Any:
        with jax.disable_jit(False):  # where jit is off, it would come back here for ever
            return compiled(**params)(*arrays)

    return primitive


step_p = _make_primitive("step")
tangent_p = _make_primitive("tangent")
gradient_p = _make_primitive("gradient")


def _aval(like: Any, shape: Sequence[int], dtype: Any) -> Any:
    sharding = NamedSharding(like.sharding.mesh, PartitionSpec(*(None,) * len(shape)))
    return like.update(shape=tuple(shape), dtype=dtype, weak_type=False, sharding=sharding)


@step_p.def_abstract_eval
def _step_avals(x: Any, *_: Any, call: Call) -> tuple[Any, ...]:
    layout, work = call.layout, working_type(x)
    rows = (len(STATISTICS), *layout.moments)
    return (
        x.update(weak_type=False),
        _aval(x, rows, work),
        _aval(x, (1 if layout.groups is None else layout.groups,), work),
    )


@tangent_p.def_abstract_eval
def _tangent_avals(*avals: Any, call: Call, names: tuple[str, ...]) -> tuple[Any, ...]:
    x = avals[len(names) + 2]
    moments = _aval(x, call.layout.moments, working_type(x))
    return x.update(weak_type=False), moments, moments


@gradient_p.def_abstract_eval
def _gradient_avals(*avals: Any, call: Call, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    operands = call.operands(avals[3:])._asdict()
    names = [n for n, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    return tuple(operands[name].update(weak_type=False) for name in names)


# ------------------------------------------------------------------ what they compute


def _step_arrays(*arrays: Array, call: Call) -> tuple[Array, ...]:
    return array_code.step(call.operands(arrays), call)


def _tangent_arrays(*arrays: Array, call: Call, names: tuple[str, ...]) -> tuple[Array, ...]:
    """Tangents of y, mean and var from those of the operands named."""
    tangents, operands = arrays[: len(names)], call.operands(arrays[len(names) + 2 :])
    primals = tuple(getattr(operands, name) for name in names)
    function = array_code.as_function(operands, call, names)
    _, found = jax.jvp(function, primals, tuple(tangents))
    return tuple(found)


def _gradient_arrays(*arrays: Array, call: Call, wanted: tuple[bool, ...]) -> tuple[Array, ...]:
    """The closed form, from the statistics that the step left."""
    dy, statistics, count, *rest = arrays
    found: Any = array_code.gradients(dy, statistics, count, call.operands(rest), call)
    return tuple(a for a, want in zip(found, wanted, strict=True) if want)


def _gradient_function(*arrays: Array, call: Call, wanted: tuple[bool, ...]) -> tuple[Array, ...]:
    """The same as a function of dy, x and gamma alone, for its own derivatives (S8)."""
    dy, _, _, *rest = arrays
    operands = call.operands(rest)
    names = [n for n, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    function = array_code.as_function(operands, call, names)
    primals = tuple(getattr(operands, name) for name in names)
    y, transpose = jax.vjp(lambda *a: function(*a)[0], *primals)
    return tuple(transpose(dy.astype(y.dtype)))


# ------------------------------------------------------------------ transformations


def _moves(tangent: Any) -> bool:
    """Whether a tangent is more than a zero that stands for itself."""
    return not (
        tangent is None or isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0
    )


def _step_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, call: Call) -> Any:
    y, statistics, count = step_p.bind(*primals, call=call)
    moving = call.operands(tangents)._asdict()
    names = tuple(n for n in DIFFERENTIABLE if _moves(moving[n]))
    given = _alike([*(moving[n] for n in names), statistics, count, *primals])
    dy, dmean, dvar = tangent_p.bind(*given, call=call, names=names)
    rows = [jnp.zeros_like(dmean) for _ in STATISTICS]
    rows[STATISTICS["mean"]], rows[STATISTICS["var"]] = dmean, dvar
    return (y, statistics, count), (dy, jnp.stack(rows), jnp.zeros_like(count))


def _tangent_transpose(
    cotangents: Sequence[Any], *arrays: Any, call: Call, names: tuple[str, ...]
) -> list[Any]:
    linear, rest = arrays[: len(names)], arrays[len(names) :]
    operands = call.operands(rest[2:])
    dy, dmean, dvar = cotangents
    unknown = [n for n, a in zip(names, linear, strict=True) if ad.is_undefined_primal(a)]
    found: dict[str, Any] = {}
    if not isinstance(dy, ad.Zero):
        wanted = tuple(name in unknown for name in DIFFERENTIABLE)
        parts = gradient_p.bind(*_alike([dy, *rest]), call=call, wanted=wanted)
        found = dict(zip([n for n in DIFFERENTIABLE if n in unknown], parts, strict=True))
    if "x" in unknown and not (isinstance(dmean, ad.Zero) and isinstance(dvar, ad.Zero)):
        part = array_code.moment_gradient(
            operands, call, ad.instantiate_zeros(dmean), ad.instantiate_zeros(dvar)
        )
        found["x"] = found["x"] + part if "x" in found else part
    return [*(found.get(name) for name in names), *(None for _ in rest)]


def _differentiate(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a primitive that is differentiated as array code."""

    def rule(primals: Sequence[Array], tangents: Sequence[Any], **params: Any) -> Any:
        moving = [i for i, t in enumerate(tangents) if _moves(t)]

        def partially(*some: Array) -> tuple[Array, ...]:
            arrays = list(primals)
            for i, a in zip(moving, some, strict=True):
                arrays[i] = a
            return function(*arrays, **params)

        return jax.jvp(
            partially, tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
        )

    return rule


def _batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a primitive that is vmapped as array code."""

    def rule(arrays: Sequence[Array], dims: Sequence[Any], **params: Any) -> Any:
        call: Call = params["call"]
        if call.demanded:
            raise refuse_fused("there is none under vmap").named(call.owner)
        mapped = jax.vmap(partial(function, **params), in_axes=tuple(dims))
        found = mapped(*arrays)
        return found, [0] * len(found)

    return rule


def _lower(
    name: str, by_kernel: Callable[..., Any], by_arrays: Callable[..., Any]
) -> Callable[..., Any]:
    """The rule for the CPU: the kernels, where the program runs on one device."""

    def rule(context: mlir.LoweringRuleContext, *arrays: Any, call: Call, **params: Any) -> Any:
        reason = custom_calls.refuse_context(context)
        if reason is not None and call.demanded:
            raise refuse_fused(reason).named(call.owner)
        if reason is not None:
            _report(call, reason)
        function = by_kernel if reason is None else by_arrays
        lowered = mlir.lower_fun(function, multiple_results=True)
        return lowered(context, *arrays, call=call, **params)

    return rule


def _report(call: Call, reason: str) -> None:
    explanation.report(call.owner, explanation.ARRAY_CODE, ((explanation.KERNELS, reason),))


def _register(
    primitive: Primitive, by_arrays: Callable[..., Any], by_kernel: Callable[..., Any] | None
) -> None:
    where = "for this device" if by_kernel is not None else "for forward-mode derivatives"

    def elsewhere(
        context: mlir.LoweringRuleContext, *arrays: Any, call: Call, **params: Any
    ) -> Any:
        if call.demanded:
            raise refuse_fused(f"there is none {where}").named(call.owner)
        _report(call, f"there is none {where}")
        return mlir.lower_fun(by_arrays, multiple_results=True)(
            context, *arrays, call=call, **params
        )

    mlir.register_lowering(primitive, elsewhere)
    if by_kernel is not None:
        rule = _lower(primitive.name, by_kernel, by_arrays)
        mlir.register_lowering(primitive, rule, platform="cpu")


_register(step_p, _step_arrays, custom_calls.step)
_register(gradient_p, _gradient_arrays, custom_calls.gradient)
_register(tangent_p, _tangent_arrays, None)

ad.primitive_jvps[step_p] = _step_jvp
ad.primitive_jvps[tangent_p] = _differentiate(_tangent_arrays)
ad.primitive_jvps[gradient_p] = _differentiate(_gradient_function)
ad.primitive_transposes[tangent_p] = _tangent_transpose
for _primitive, _function in (
    (step_p, _step_arrays),
    (tangent_p, _tangent_arrays),
    # As a function of x: under vmap over cotangents alone, the statistics' own derivatives are
    # those of this primitive's operands, which its rules leave out.
    (gradient_p, _gradient_function),
):
    batching.primitive_batchers[_primitive] = _batch(_function)
