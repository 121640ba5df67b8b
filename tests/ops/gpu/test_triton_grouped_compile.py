"""The grouped matmul kernels compiled for a GPU that isn't here, for how they load."""

from __future__ import annotations

import collections
import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest

# kernel, inner, outer: sides that fill no tile, of runs of 64 and of 8 columns
CASES = [("products", 64, 192), ("weight_grads", 72, 192), ("weight_grads", 192, 40)]
CASES += [("ids ahead", 128, 256), ("products_in_turn", 192, 512)]

# Loads of a thread that aren't copies: the offsets or a tile's numbers, of the first
# tile once more before the loop; four ids for each stage filled before it, and in it.
WAITED = {"products_in_turn": 6, "ids ahead": 2 + 5 * 4}


@pytest.fixture(scope="module")
def loads(tmp_path_factory):
    """Bytes of every load from global memory, by case and whether it waits."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("ptx"))}
    environment |= {"JAX_PLATFORMS": "cpu"}
    # Other tests of this process use triton's interpreter.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__], env=environment, check=True, capture_output=True
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_operands_are_copied_16_bytes_at_a_time(loads, case):
    found = loads[case]
    assert set(found["copied"]) == {"16"}
    assert found["waited"] <= WAITED.get(CASES[case][0], 3)


def test_tiles_in_turn_are_one_loop(loads):
    """Two would wait for a tile's store before the next one's first rows are loaded."""
    assert loads[-1]["loops"] == 1
    assert loads[-1]["last copy"] < loads[-1]["store"]


def test_ids_read_ahead_leave_all_stages_to_rows(loads):
    """Read in the same step they take half of the stages: two of four hold rows."""
    assert (
        loads[-2]["copies"] == 2 * 4
    )  # of two operands: three before the loop, one in


def compiled_loads(kernel, inner, outer):
    """How a kernel loads 16-bit operands on an H100."""
    import jax
    import jax.numpy as jnp
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from uoe_jax.ops import _triton
    from uoe_jax.ops.grouped_matmul import triton

    texts = []

    def launch(kernel, *args, out_shape, grid, num_warps, num_stages, **constants):
        names = {"bfloat16": "*bf16", "int32": "*i32", "float32": "*fp32"}
        dtypes = [a.dtype.name for a in args] + [jnp.dtype(out_shape[1]).name]
        pointers = [name for name in kernel.arg_names if name not in constants]
        types = dict(zip(pointers, (names[d] for d in dtypes), strict=True))
        source = ASTSource(
            kernel,
            signature={n: types.get(n, "constexpr") for n in kernel.arg_names},
            constexprs=constants,
            attrs={(i,): [["tt.divisibility", 16]] for i in range(len(pointers))},
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        made = compiler.compile(
            source, target=GPUTarget("cuda", 90, 32), options=options
        )
        texts.append((made.asm["ptx"], made.asm["ttgir"]))
        return jnp.zeros(*out_shape)

    shape = jax.ShapeDtypeStruct
    x, offsets = shape((512, inner), jnp.bfloat16), shape((5,), jnp.int32)
    with mock.patch.object(_triton, "launch", launch), _triton.interpreted(launch):
        if kernel.startswith("products"):
            w = shape((4, inner, outer), x.dtype)
            tiles = triton.Tiles(128, 64, 256, 8, 8, 3, in_turn=True)
            tiles = tiles if kernel == "products_in_turn" else None
            call = lambda x, w, o: triton.products(
                x, w, o, None, transpose=False, tiles=tiles
            )
            jax.eval_shape(call, x, w, offsets)
        else:
            grad = shape((512, outer), x.dtype)
            tiles = triton.Tiles(64, 128, 256, 8, 8, 4, ahead=True)
            tiles, ids = (tiles, offsets) if kernel == "ids ahead" else (None, None)
            call = lambda x, g, o: triton.weight_grads(x, g, o, ids, None, tiles)
            jax.eval_shape(call, x, grad, offsets)
    ((text, earlier),) = texts
    copies = re.findall(r"cp\.async\.\w+\.shared\.global.*\], (\w+)", text)
    copied = collections.Counter(str(int(size, 0)) for size in copies)
    return {
        "copied": copied,
        "waited": len(re.findall(r"ld\.global", text)),
        "copies": earlier.count("async_copy_global"),
        "loops": earlier.count("scf.for"),
        "last copy": earlier.rfind("async_copy_global"),
        "store": earlier.find("tt.store"),
    }


if __name__ == "__main__":
    print(json.dumps([compiled_loads(*case) for case in CASES]))
