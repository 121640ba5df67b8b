"""Compile what eight bits take for an H100 that isn't here; say what becomes of it.

    python benchmarks/aot_gpu.py

Needs jax's plugin for CUDA (`pip install --no-deps jax-cuda13-plugin jax-cuda13-pjrt`
beside the same jax), no GPU and no CUDA libraries. Fails where a product isn't one call
of cuBLASLt in eight bits, or where rounding experts' weights needs memory of its own,
as copies in float32 do. XLA decides by the versions that the description names.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import jax.numpy as jnp
import numpy as np
from jax._src.lib import xla_client
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uoe_jax.ops import float8
from uoe_jax.ops.grouped_matmul.nvidia.float8 import round_operands

# Of an H100, as XLA describes its devices.
H100 = """gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  driver_version: "13.2.0"
  runtime_version: "13.2.0"
  compile_time_toolkit_version: "13.2.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}


def describe() -> NamedSharding:
    """Return a sharding on one H100 of the plugin's compiler."""
    plugin = Path(importlib.import_module("jax_plugins.xla_cuda13").__file__ or "")
    library = str(plugin.parent / "xla_cuda_plugin.so")
    client = xla_client.load_pjrt_plugin_dynamically("cuda", library)
    xla_client.initialize_pjrt_plugin("cuda")
    given = {"target_config": H100, "topology": "1x1x1"}
    make = xla_client._xla
    if hasattr(make, "get_c_api_topology"):
        topology = make.get_c_api_topology(client, "cuda", given)
    else:
        topology = make.get_default_c_api_topology("cuda", "", given)
    devices = np.array(topology._make_compile_only_devices()[:1])
    return NamedSharding(Mesh(devices, ("device",)), PartitionSpec())


def compiled(run: Any, sharding: NamedSharding, *shapes: tuple[int, ...]) -> Any:
    """Return a compiled function of bfloat16 arrays."""
    make = lambda shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)
    traced = jax.jit(run, in_shardings=sharding, out_shardings=sharding)
    lowered = traced.lower(*map(make, shapes))
    return lowered.compile(compiler_options=OPTIONS)


def calls(program: Any) -> list[str]:
    """Return the library calls of a compiled program."""
    return re.findall(r'custom_call_target="([^"]+)"', program.as_text() or "")


def product(scales: str) -> Any:
    def run(x, w):
        with float8.float8_products(scales):
            return float8.matmul(x, w)

    return run


def main() -> int:
    sharding, failed = describe(), False
    for scales in float8.SCALES:
        found = calls(compiled(product(scales), sharding, (4096, 2048), (2048, 6144)))
        wanted = "__cublas$lt$matmul" + ("" if scales == "none" else "$f8")
        failed |= found != [wanted]
        print(f"{scales:7} {' '.join(found)}", flush=True)
    for scales in float8.SCALES[1:]:
        run = lambda x, w, scales=scales: round_operands(x, w, scales)[2:]
        program = compiled(run, sharding, (4096, 2048), (16, 2048, 768))
        spare = program.memory_analysis().temp_size_in_bytes
        failed |= spare > 1 << 20
        print(f"{scales:7} a weight of 50 MB is rounded in {spare} bytes", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
