"""The grouped product of eight bits compiled for a GPU that isn't here."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path


def test_an_h100_multiplies_eight_bits_and_moves_16_bytes_at_a_time(tmp_path):
    """Compiled in a process of its own: this one's triton is interpreted."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment |= {"JAX_PLATFORMS": "cpu"}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-m", "tests.ops.gpu.test_triton_float8_compile"],
        env=environment,
        cwd=Path(__file__).parents[3],
        check=True,
        capture_output=True,
    )
    for found in json.loads(done.stdout):
        assert found["products"] and set(found["products"]) == {"e4m3.e4m3"}
        assert set(found["copied"]) == {"16"}
        assert found["stored"] == ["v4.b32"]
        assert found["shared"] <= 227 << 10


def compile_all():
    """How the kernel is made for an H100: deep, and with sides that fill no tile."""
    import jax
    import jax.numpy as jnp

    from tests.ops.gpu.test_triton_loads import compiled
    from uoe_jax.ops import nvidia
    from uoe_jax.ops.grouped_matmul.nvidia import float8
    from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles

    nvidia.shared_memory = lambda: nvidia.SHARED_MEMORY[9.0]
    found = []
    turns = Tiles(128, 128, 128, 8, 4, 3, in_turn=2)
    cases = (2048, 768, None), (384, 2048, turns), (144, 80, None)
    for inner, outer, tiles in cases:
        struct = jax.ShapeDtypeStruct
        x, w = (
            struct((512, inner), jnp.bfloat16),
            struct((4, inner, outer), jnp.bfloat16),
        )
        ids = struct((5,), jnp.int32)
        options = {"scales": "rows", "tiles": tiles}
        run = functools.partial(float8.forward_products, **options)
        made = compiled(run, x, w, ids, ids)
        text = made.asm["ptx"]
        copies = re.findall(r"cp\.async\.\w+\.shared\.global.*\], (\w+)", text)
        found.append(
            {
                "products": re.findall(r"wgmma\S+\.f32\.(e4m3\.e4m3)", text),
                "copied": sorted({str(int(size, 0)) for size in copies}),
                "stored": sorted(set(re.findall(r"st\.global\.(\S+)", text))),
                "shared": made.metadata.shared,
            }
        )
    return found


if __name__ == "__main__":
    print(json.dumps(compile_all()))
