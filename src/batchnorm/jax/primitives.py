"""A step over one array as JAX primitives, with a rule for every transformation.

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
from batchnorm.jax.checks import working_type
from batchnorm.jax.operands import Operands, Static
from batchnorm.jax.private import refuse_context, varying_axes
from batchnorm.kernels import explanation
from batchnorm.kernels.kept import STATISTICS
from batchnorm.kernels.select import refuse_fused

DIFFERENTIABLE = ("x", "gamma", "beta")


class Stepped(NamedTuple):
    """Results of a step: y; rows of statistics as in `STATISTICS`; each group's count.

    If it moves them, the running mean and variance after it too.
    """

    y: Array
    statistics: Array
    counts: Array
    mean: Array | None = None
    var: Array | None = None


def run_step(operands: Operands, static: Static) -> Stepped:
    """Normalize, after noting in `static` which operands there are."""
    static = static._replace(present=tuple(a is not None for a in operands))
    return Stepped(*step_p.bind(*_alike([a for a in operands if a is not None]), static=static))


def _alike(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, made to vary over the same axes of shard_map: its rule for primitives."""
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
    def compiled(static: Static, **params: Any) -> Callable[..., Any]:
        return jax.jit(partial(primitive.bind, static=static, **params))

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
def _step_avals(x: Any, *_: Any, static: Static) -> tuple[Any, ...]:
    layout, work = static.layout, working_type(x)
    rows = (len(STATISTICS), *layout.moments)
    moved = [_aval(x, layout.channels, work)] * (2 if static.update else 0)
    return (
        x.update(weak_type=False),
        _aval(x, rows, work),
        _aval(x, (1 if layout.groups is None else layout.groups,), work),
        *moved,
    )


@tangent_p.def_abstract_eval
def _tangent_avals(*avals: Any, static: Static, names: tuple[str, ...]) -> tuple[Any, ...]:
    x = avals[len(names) + 2]
    moments = _aval(x, static.layout.moments, working_type(x))
    return x.update(weak_type=False), moments, moments


@gradient_p.def_abstract_eval
def _gradient_avals(*avals: Any, static: Static, wanted: tuple[bool, ...]) -> tuple[Any, ...]:
    operands = static.operands(avals[3:])._asdict()
    names = [n for n, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    return tuple(operands[name].update(weak_type=False) for name in names)


def _step_arrays(*arrays: Array, static: Static) -> tuple[Array, ...]:
    return array_code.step(static.operands(arrays), static)


def _tangent_arrays(*arrays: Array, static: Static, names: tuple[str, ...]) -> tuple[Array, ...]:
    """Tangents of y, mean and var from those of the operands named."""
    tangents, operands = arrays[: len(names)], static.operands(arrays[len(names) + 2 :])
    primals = tuple(getattr(operands, name) for name in names)
    function = array_code.as_function(operands, static, names)
    _, found = jax.jvp(function, primals, tuple(tangents))
    return tuple(found)


def _gradient_arrays(*arrays: Array, static: Static, wanted: tuple[bool, ...]) -> tuple[Array, ...]:
    """The closed form, from the statistics that the step left."""
    dy, statistics, count, *rest = arrays
    found: Any = array_code.gradients(dy, statistics, count, static.operands(rest), static)
    return tuple(a for a, want in zip(found, wanted, strict=True) if want)


def _gradient_function(
    *arrays: Array, static: Static, wanted: tuple[bool, ...]
) -> tuple[Array, ...]:
    """The same as a function of dy, x and gamma alone, for its own derivatives (S8)."""
    dy, _, _, *rest = arrays
    operands = static.operands(rest)
    names = [n for n, want in zip(DIFFERENTIABLE, wanted, strict=True) if want]
    function = array_code.as_function(operands, static, names)
    primals = tuple(getattr(operands, name) for name in names)
    y, transpose = jax.vjp(lambda *a: function(*a)[0], *primals)
    return tuple(transpose(dy.astype(y.dtype)))


def _moves(tangent: Any) -> bool:
    """True for a tangent that is more than a symbolic zero."""
    return not (
        tangent is None or isinstance(tangent, ad.Zero) or tangent.dtype == jax.dtypes.float0
    )


def _step_jvp(primals: Sequence[Array], tangents: Sequence[Any], *, static: Static) -> Any:
    y, statistics, count, *moved = step_p.bind(*primals, static=static)
    moving = static.operands(tangents)._asdict()
    names = tuple(n for n in DIFFERENTIABLE if _moves(moving[n]))
    given = _alike([*(moving[n] for n in names), statistics, count, *primals])
    dy, dmean, dvar = tangent_p.bind(*given, static=static, names=names)
    rows = [jnp.zeros_like(dmean) for _ in STATISTICS]
    rows[STATISTICS["mean"]], rows[STATISTICS["var"]] = dmean, dvar
    constant = (jnp.zeros_like(a) for a in (count, *moved))
    return (y, statistics, count, *moved), (dy, jnp.stack(rows), *constant)


def _tangent_transpose(
    cotangents: Sequence[Any], *arrays: Any, static: Static, names: tuple[str, ...]
) -> list[Any]:
    linear, rest = arrays[: len(names)], arrays[len(names) :]
    operands = static.operands(rest[2:])
    dy, dmean, dvar = cotangents
    unknown = [n for n, a in zip(names, linear, strict=True) if ad.is_undefined_primal(a)]
    found: dict[str, Any] = {}
    if not isinstance(dy, ad.Zero):
        wanted = tuple(name in unknown for name in DIFFERENTIABLE)
        parts = gradient_p.bind(*_alike([dy, *rest]), static=static, wanted=wanted)
        found = dict(zip([n for n in DIFFERENTIABLE if n in unknown], parts, strict=True))
    if "x" in unknown and not (isinstance(dmean, ad.Zero) and isinstance(dvar, ad.Zero)):
        part = array_code.moment_gradient(
            operands, static, ad.instantiate_zeros(dmean), ad.instantiate_zeros(dvar)
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
        static: Static = params["static"]
        if static.demanded:
            raise refuse_fused("there is none under vmap").named(static.owner)
        mapped = jax.vmap(partial(function, **params), in_axes=tuple(dims))
        found = mapped(*arrays)
        return found, [0] * len(found)

    return rule


def _lower(
    name: str, by_kernel: Callable[..., Any], by_arrays: Callable[..., Any]
) -> Callable[..., Any]:
    """The rule for the CPU: kernels if the program runs on one device."""

    def rule(context: mlir.LoweringRuleContext, *arrays: Any, static: Static, **params: Any) -> Any:
        reason = refuse_context(context)
        if reason is not None and static.demanded:
            raise refuse_fused(reason).named(static.owner)
        if reason is not None:
            _report(static, reason)
        function = by_kernel if reason is None else by_arrays
        lowered = mlir.lower_fun(function, multiple_results=True)
        return lowered(context, *arrays, static=static, **params)

    return rule


def _report(static: Static, reason: str) -> None:
    explanation.report(static.owner, explanation.ARRAY_CODE, ((explanation.KERNELS, reason),))


def _register(
    primitive: Primitive, by_arrays: Callable[..., Any], by_kernel: Callable[..., Any] | None
) -> None:
    where = "for this device" if by_kernel is not None else "for forward-mode derivatives"

    def elsewhere(
        context: mlir.LoweringRuleContext, *arrays: Any, static: Static, **params: Any
    ) -> Any:
        if static.demanded:
            raise refuse_fused(f"there is none {where}").named(static.owner)
        _report(static, f"there is none {where}")
        return mlir.lower_fun(by_arrays, multiple_results=True)(
            context, *arrays, static=static, **params
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
    # The closed form takes the statistics as operands, apart from x: derivatives of the mapped
    # program would leave out that they depend on x. The function of x has them inside.
    (gradient_p, _gradient_function),
):
    batching.primitive_batchers[_primitive] = _batch(_function)
