"""Folding of flax nnx models: pairs that the caller names, and neighbours in `nnx.Sequential`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.tools.frameworks.nnx.linear_maps import fold_pair, is_map, spatial_axes
from batchnorm.tools.frameworks.nnx.stacked import module_of
from batchnorm.tools.frameworks.nnx.states import find_modules, is_batch_norm
from batchnorm.tools.frameworks.records import Folded, FoldedModel, FoundLayer, Kept
from batchnorm.tools.text import list_names

_SIZES = (32, 8)


class Passed(nnx.Module):
    """The module in the place of a folded batch norm: takes its arguments, returns x."""

    def __call__(
        self,
        x: Any,
        use_running_average: bool | None = None,
        *,
        mask: Any = None,
        update_statistics: bool = True,
    ) -> Any:
        """Return x."""
        return x


def fold_model(
    model: nnx.Module,
    layers: list[FoundLayer],
    example: Any,
    pairs: Sequence[tuple[str, str]] | None,
) -> FoldedModel:
    """As `Adapter.fold`."""
    old = nnx.clone(model)
    old.eval()
    new = nnx.clone(old)
    paths = {".".join(map(str, path)): path for path, _ in nnx.iter_modules(new)}
    chosen = _neighbours(new) if pairs is None else list(pairs)
    folded: list[Folded] = []
    reasons: dict[str, str] = {}
    for pair in chosen:
        first, second = (_at(new, paths, name) for name in pair)
        norm, linear = _roles(pair, first, second)
        reason = fold_pair(first, second)
        if reason is None:
            folded.append(Folded(norm, linear))
            new = _put(new, paths[norm], Passed())
        else:
            reasons[norm] = f"{linear} does not take it: {reason}"
    done = {layer.name for layer in folded}
    unnamed = "no pair names it" if pairs is not None else "no neighbour in nnx.Sequential takes it"
    names = {id(module): name for name, module in find_modules(model)}
    kept = [
        Kept(found.name, reasons.get(names[id(module_of(found.layer))], unnamed))
        for found in layers
        if found.name not in done
    ]
    depth = sum(is_map(module) or is_batch_norm(module) for _, module in nnx.iter_modules(old))
    method = "pairs" if pairs is not None else "nnx.Sequential"
    given = _make_example(old) if example is None else example
    before, after = _run(old, given), _run(new, given)
    types = [a.dtype for a in before if jnp.issubdtype(a.dtype, jnp.floating)]
    precision = max((float(jnp.finfo(dtype).eps) for dtype in types), default=0.0)
    return FoldedModel(new, folded, kept, method, depth, before, after, precision)


def _at(model: nnx.Module, paths: dict[str, Any], name: str) -> Any:
    if name not in paths:
        raise ValueError(
            f"fold: pairs must name modules of the model; got {name!r:.200}. There are "
            f"{list_names(sorted(filter(None, paths)), 8)}."
        )
    node: Any = model
    for key in paths[name]:
        node = _child(node, key)
    return node


def _roles(pair: tuple[str, str], first: Any, second: Any) -> tuple[str, str]:
    """The name of the batch norm, and that of the linear map."""
    if is_map(first) and is_batch_norm(second):
        return pair[1], pair[0]
    if is_batch_norm(first) and is_map(second):
        return pair[0], pair[1]
    raise ValueError(
        f"fold: a pair must be a Linear, Conv or ConvTranspose and a batch norm; got {pair}, "
        f"a {type(first).__name__} and a {type(second).__name__}."
    )


def _child(node: Any, key: Any) -> Any:
    return getattr(node, key) if isinstance(key, str) and hasattr(node, key) else node[key]


def _put(node: Any, path: tuple[Any, ...], value: Any) -> Any:
    """`node` with `value` at a path below it; tuples are made anew."""
    if not path:
        return value
    key = path[0]
    child = _put(_child(node, key), path[1:], value)
    if isinstance(node, tuple):
        return (*node[:key], child, *node[key + 1 :])
    if isinstance(key, str) and hasattr(node, key):
        setattr(node, key, child)
    else:
        node[key] = child
    return node


def _neighbours(model: nnx.Module) -> list[tuple[str, str]]:
    """Pairs that stand side by side in an `nnx.Sequential`, a map before its batch norm first."""
    uses: Counter[int] = Counter()
    found = []
    for path, module in nnx.iter_modules(model):
        if type(module) is not nnx.Sequential:
            continue
        uses.update(id(layer) for layer in module.layers)
        prefix = ".".join(map(str, (*path, "layers")))
        children = [
            (f"{prefix}.{i}", layer)
            for i, layer in enumerate(module.layers)
            if not isinstance(layer, nnx.Dropout)
        ]
        for i, (name, layer) in enumerate(children):
            if not is_batch_norm(layer):
                continue
            if i > 0 and is_map(children[i - 1][1]):
                found.append((children[i - 1], (name, layer)))
            elif i + 1 < len(children) and is_map(children[i + 1][1]):
                found.append(((name, layer), children[i + 1]))
    return [
        (first, second)
        for (first, a), (second, b) in found
        if uses[id(a)] == 1 and uses[id(b)] == 1
    ]


def _run(model: Any, example: Any) -> list[Any]:
    """All arrays in the model's output, as NumPy's."""
    if isinstance(example, dict):
        outputs = model(**example)
    else:
        outputs = model(*(example if isinstance(example, tuple) else (example,)))
    return [np.asarray(a) for a in jax.tree.leaves(outputs)]


def _make_example(model: nnx.Module) -> Any:
    """A random batch that the model accepts."""
    failure: Exception | None = None
    module: Any
    for _, module in nnx.iter_modules(model):
        if not is_map(module):
            continue
        for size in _SIZES:
            shape = (2, *(size,) * spatial_axes(module), module.in_features)
            batch = jax.random.normal(jax.random.key(0), shape, module.kernel[...].dtype)
            try:
                _run(model, batch)
            except Exception as error:  # a wrong shape may raise anything
                failure = error
            else:
                return batch
    raise ValueError(
        "fold: example is needed for a model whose input cannot be guessed: an array, a tuple "
        "of arguments or a dict of keyword arguments."
    ) from failure
