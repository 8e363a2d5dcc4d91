"""Processes of jax.distributed over gloo, and how a case runs in them."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

from cases import Case, Data, Result
from processes import World
from splitting import Split

DEVICES = 2  # of each process where there are two; one otherwise


def make_world(size: int) -> World:
    return World(size, start, stop, fresh=True)


def devices_of(size: int) -> int:
    """The number of devices of a process."""
    return DEVICES if size == 2 else 1


def start(rank: int, size: int, address: str | None, timeout: None) -> str:
    """Agree on the coordinator's address; `join` then connects to it."""
    warnings.simplefilter("error")
    os.environ["JAX_PLATFORMS"] = "cpu"
    if address is None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
    _join.update(coordinator_address=address, num_processes=size, process_id=rank)
    return address


def join() -> None:
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_num_cpu_devices", devices_of(_join["num_processes"]))
    jax.distributed.initialize(**_join)


def stop() -> None:
    """Do nothing: the coordinator may be gone already, and the process ends anyway."""


def run(case: Case, data: Data, way: str) -> Result:
    """A step on arrays whose rows are spread over all devices of all processes.

    Args:
        case: the case of this process's part.
        data: the data of this process's part.
        way: "shard_map" merges over a named axis; "jit" leaves it to arrays that are global.
    """
    import jax_path

    named = way == "shard_map"
    call = _Spread(case, named).call
    found = jax_path.run(case, data, fused=None, axis_name="rows" if named else None, call=call)
    if _join["process_id"] == 0:
        return found
    # Every process has the global gradients of the parameters; the test adds them up later.
    return found._replace(
        dgamma=None if found.dgamma is None else 0 * found.dgamma,
        dbeta=None if found.dbeta is None else 0 * found.dbeta,
    )


class _Spread:
    """Calls a step on one mesh of all devices.

    Args:
        case: of this process's part.
        named: whether the step runs on each device, and not on global arrays.
    """

    def __init__(self, case: Case, named: bool) -> None:
        import jax

        self._rank, self._named = len(case.shape), named
        self._axis = Split(case, ()).axis  # along which rows are spread
        self._rows = case.shape[self._axis]
        count = jax.device_count()
        self._mesh = jax.make_mesh((count,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))

    def call(self, step: Callable[..., Any], rows: Any, others: Any) -> Any:
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        specs = jax.tree.map(self._spec, rows)
        every = PartitionSpec()
        into = (specs["x"], specs["x"], every)

        def place(a: Any, spec: Any) -> Any:
            return jax.make_array_from_process_local_data(NamedSharding(self._mesh, spec), a)

        placed = jax.tree.map(place, rows, specs)
        shared = jax.tree.map(lambda a: place(a, every), others)
        if self._named:
            step = jax.shard_map(step, mesh=self._mesh, in_specs=(specs, every), out_specs=into)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(self._mesh, spec),
            into,
            is_leaf=lambda a: isinstance(a, PartitionSpec),
        )
        y, dx, same = jax.jit(step, out_shardings=shardings)(placed, shared)
        return self._own(y), self._own(dx), jax.tree.map(lambda a: a.addressable_data(0), same)

    def _spec(self, a: Any) -> Any:
        """The sharding of an array; an array of one row, which serves all rows, is not split."""
        from jax.sharding import PartitionSpec

        axis = self._axis if a.ndim == self._rank else 0
        if a.shape[axis] != self._rows:
            return PartitionSpec()
        return PartitionSpec(*(None,) * axis, "rows")

    def _own(self, a: Any) -> Any:
        """This process's rows of an array."""
        shards = sorted(a.addressable_shards, key=lambda shard: shard.index[self._axis].start or 0)
        return np.concatenate([np.asarray(shard.data) for shard in shards], self._axis)


_join: dict[str, Any] = {}
