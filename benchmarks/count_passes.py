"""XLA's kernels for array code on a GPU, and the whole arrays that they read and write, counted.

Compiles for a card that need not be there, and runs nothing:

    python -m pip install jax-cuda12-plugin jax-cuda12-pjrt nvidia-cuda-nvcc-cu12
    python benchmarks/count_passes.py

Both packages of jax in the version of jax itself.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin must not look for a card

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from batchnorm.jax import batch_norm

H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132  fpus_per_core: 128  threads_per_warp: 32  clock_rate_ghz: 1.98
  threads_per_block_limit: 1024  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647  block_dim_limit_y: 65535  block_dim_limit_z: 65535
  shared_memory_per_block: 49152  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472  registers_per_core_limit: 65536
  registers_per_block_limit: 65536  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000  device_memory_size: 84978434048
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
INSTRUCTION = re.compile(r"\s+(?:ROOT )?%(\S+) = (.*?) (fusion|custom-call|copy|reduce)\((.*?)\)")
ARRAY = re.compile(r"\w+\[([\d,]+)\]")


def count(function: Callable[..., Any], arguments: Any, whole: int) -> tuple[int, int, int]:
    """Kernels of the compiled function, and arrays of `whole` values that they read and write."""
    text = jax.jit(function).lower(*arguments).compile().as_text()
    lines = text[text.index("\nENTRY") :].splitlines()
    sizes = {}
    kernels = reads = writes = 0
    for line in lines:
        if named := re.match(r"\s+(?:ROOT )?%(\S+) = (.*?) [\w\-]+\(", line):
            sizes[named[1]] = sum(_size(a) == whole for a in ARRAY.findall(named[2]))
        if found := INSTRUCTION.match(line):
            kernels += 1
            writes += sizes[found[1]]
            reads += sum(sizes.get(a, 0) for a in re.findall(r"%([\w.\-]+)", found[4]))
    return kernels, reads, writes


def _size(sizes: str) -> int:
    return math.prod(int(n) for n in sizes.split(","))


def main() -> None:
    """Count and print."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    card = jax.sharding.SingleDeviceSharding(topology.devices[0])
    for shape, axis in (((2**20, 64), -1), ((64, 256, 56, 56), 1)):
        for dtype in (jnp.float32, jnp.bfloat16):
            for fused in (None, False):
                for name, (function, arguments) in _passes(shape, axis, dtype, fused, card).items():
                    kernels, reads, writes = count(function, arguments, math.prod(shape))
                    print(
                        f"{shape!s:18} {jnp.dtype(dtype).name:9} fused={fused!s:6} {name:9}"
                        f"{kernels:3} kernels, whole arrays: {reads} read, {writes} written"
                    )


def _passes(shape: tuple[int, ...], axis: int, dtype: Any, fused: Any, card: Any) -> dict[str, Any]:
    """The forward and the backward pass as functions, each with the shapes of its arguments."""

    def like(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=card)

    def forward(*arguments: Any) -> Any:
        return batch_norm(*arguments, axis=axis, fused=fused)

    def differentiate(*arguments: Any) -> Any:
        return jax.vjp(lambda *a: forward(*a)[0], *arguments)

    x = like(jax.ShapeDtypeStruct(shape, dtype))
    channels = like(jax.ShapeDtypeStruct((shape[axis],), jnp.float32))
    arguments = (x, channels, channels)
    transpose = jax.tree.map(like, jax.eval_shape(differentiate, *arguments)[1])
    return {
        "forward": (forward, arguments),
        "backward": (lambda transpose, dy: transpose(dy), (transpose, x)),
    }


if __name__ == "__main__":
    main()
