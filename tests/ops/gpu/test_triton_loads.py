"""Kernels that move rows, compiled for a GPU that isn't here, for how they load."""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import re
import subprocess
import sys
from unittest import mock

import pytest

# Compiled for every change, each kernel once, and beside these every night.
# Of products: inner, outer: sides that fill no tile, of runs of 64 and of 8 columns;
# of heads: a head's width, queries of each of two key heads; of swiglu: a side's width,
# a block of a row, or less than blocks of many rows; of routers: experts; of attention
# to a cache: widths of keys and values, narrow ones those that a cache has.
OFTEN = {
    "products": [("ids ahead", 128, 256), ("products_in_turn", 192, 384)],
    "heads": [("split", 128, 1), ("join", 64, 3)],
    "swiglu": [("forward", 24), ("backward", 24)],
    "experts": [("forward", 128), ("backward", 128)],
    "router": [("route", 16), ("product_grads", 16)],
    "cached": [(64, 64), (48, 40)],
}
NIGHTLY = {
    "products": [
        *(("products", 64, 192), ("weight_grads", 72, 192), ("weight_grads", 192, 40)),
        ("products_scattered", 192, 384),  # rows stored by id
    ],
    "swiglu": [("backward", 3072)],
    "router": [("route", 64), ("product_grads", 64)],
}

# Loads of a thread that aren't copies: the offsets or a tile's numbers, of the first
# tile once more before the loop; four ids for each stage filled before it, and in it.
WAITED = {"products_in_turn": 6, "ids ahead": 2 + 5 * 4}
WAITED["products_scattered"] = 3 + 16  # and the ids of a thread's rows


@pytest.fixture(
    scope="module", params=["often", pytest.param("nightly", marks=pytest.mark.nightly)]
)
def loads(request, tmp_path_factory):
    """Of every case, by the kind of operation, how it loads and stores."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("ptx"))}
    environment |= {"JAX_PLATFORMS": "cpu"}
    # Other tests of this process use triton's interpreter.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, __file__, request.param],
        env=environment,
        check=True,
        capture_output=True,
    )
    return json.loads(done.stdout)


def test_operands_are_copied_16_bytes_at_a_time(loads):
    for case, found in loads["products"]:
        assert set(found["copied"]) == {"16"}, case
        assert found["waited"] <= WAITED.get(case[0], 3), case


def test_results_are_stored_16_bytes_at_a_time(loads):
    """Tiles in turn once stored two, and took up to four times as long."""
    for case, found in loads["products"]:
        assert set(found["stored"]) == {"v4.b32"}, case


@pytest.mark.parametrize("loads", ["often"], indirect=True)
def test_tiles_in_turn_are_one_loop(loads):
    """Two would wait for a tile's store before the next one's first rows are loaded."""
    _, (_, found) = loads["products"]
    assert found["loops"] == 1 and found["last copy"] < found["store"]


@pytest.mark.parametrize("loads", ["often"], indirect=True)
def test_ids_read_ahead_leave_all_stages_to_rows(loads):
    """Read in the same step they take half of the stages: two of four hold rows."""
    # Of two operands: three before the loop, one in.
    assert loads["products"][0][1]["copies"] == 2 * 4


@pytest.mark.parametrize("loads", ["often"], indirect=True)
def test_heads_are_moved_16_bytes_at_a_time_through_registers(loads):
    for case, found in loads["heads"]:
        # Of 32 rows a thread has two ids; all else are four words at once.
        assert found["loads"].pop("b32") <= 2, case
        assert set(found["loads"]) == set(found["stores"]) == {"v4.b32"}, case
        assert found["shared"] == 0, case


def test_swiglu_is_moved_16_bytes_at_a_time_through_registers(loads):
    for (kernel, width), found in loads["swiglu"]:
        backward = kernel == "backward"
        # Of 2048 entries a thread has 16 of each side, in two rows or in one.
        assert found["loads"].pop("v4.b32") == (6 if backward else 4), width
        assert found["stores"].pop("v4.b32") == (4 if backward else 2), width
        # Beside its rows' factors and the sums that are their gradient.
        assert sum(found["loads"].values()) <= 2, width
        assert sum(found["stores"].values()) == backward, width
        # Room for the sums of a row's threads, of 64 rows at most.
        assert found["shared"] <= (256 if backward else 0), width


@pytest.mark.parametrize("loads", ["often"], indirect=True)
def test_experts_compute_gelu_once_and_move_16_bits(loads):
    """In two layouts it took twice the registers, and up to 1.4 times as long."""
    for case, found in loads["experts"]:
        assert found["exponentials"] == 1, case
        assert "f32" not in found["moved"], case
        assert found["shared"] <= 227 << 10, case


def test_a_router_copies_16_bytes_at_a_time_and_spills_nothing(loads):
    for case, found in loads["router"]:
        assert set(found["copied"]) == {"16"} and found["wgmma"], case
        assert found["stores"]["v4.b32"] and found["spilled"] == 0, case


@pytest.mark.parametrize("loads", ["often"], indirect=True)
def test_rows_of_a_cache_are_copied_16_bytes_at_a_time(loads):
    """Of keys 38 wide, without zeros between, two: loads that each thread waits for."""
    for case, found in loads["cached"]:
        assert set(found["copied"]) == {"16"}, case
        assert "b16" not in found["loads"], case


def compiled(call, *arrays):
    """The one kernel that a call launches, made for an H100."""
    import jax
    import jax.numpy as jnp
    import triton as compiler
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from uoe_jax.ops import nvidia

    kernels = []

    def launch(
        kernel, *args, out_shape, grid, num_warps, num_stages, aliases=None,
        small=False, **constants,
    ):  # fmt: skip
        many = isinstance(out_shape, list)
        outs = [jnp.zeros(*each) for each in (out_shape if many else [out_shape])]
        names = {"bfloat16": "*bf16", "int32": "*i32", "float32": "*fp32"}
        names["float8_e4m3fn"] = "*fp8e4nv"
        pointers = [name for name in kernel.arg_names if name not in constants]
        number = [isinstance(a, int) for a in (*args, *outs)]
        types = (
            "i32" if whole else names[a.dtype.name]
            for a, whole in zip((*args, *outs), number, strict=True)
        )
        types = dict(zip(pointers, types, strict=True))
        source = ASTSource(
            kernel,
            signature={n: types.get(n, "constexpr") for n in kernel.arg_names},
            constexprs=constants,
            attrs={
                (i,): [["tt.divisibility", 16]]
                for i, whole in enumerate(number)
                if not whole
            },
        )
        options = {"num_warps": num_warps, "num_stages": num_stages}
        target = GPUTarget("cuda", 90, 32)
        kernels.append(compiler.compile(source, target=target, options=options))
        return outs if many else outs[0]

    with mock.patch.object(nvidia, "launch", launch), nvidia.interpreted(launch):
        jax.eval_shape(call, *arrays)
    (kernel,) = kernels
    return kernel


def product_loads(kernel, inner, outer):
    """How a product loads 16-bit operands."""
    import jax
    import jax.numpy as jnp

    from uoe_jax.ops.grouped_matmul.nvidia.launch import products, weight_grads
    from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles

    shape = jax.ShapeDtypeStruct
    x, offsets = shape((512, inner), jnp.bfloat16), shape((5,), jnp.int32)
    if kernel.startswith("products"):
        right = shape((4, inner, outer), x.dtype)
        tiles = Tiles(128, 64, 256, 8, 8, 3, in_turn=1)
        tiles = tiles if kernel == "products_in_turn" else None
        scatter = kernel == "products_scattered"
        options = {"transpose": False, "scatter": scatter, "tiles": tiles}
        call = lambda x, w, o: products(x, w, o, o if scatter else None, **options)
    else:
        right = shape((512, outer), x.dtype)
        tiles = Tiles(64, 128, 256, 8, 8, 4, ahead=True)
        tiles, ids = (tiles, offsets) if kernel == "ids ahead" else (None, None)
        call = lambda x, g, o: weight_grads(x, g, o, ids, None, tiles)
    asm = compiled(call, x, right, offsets).asm
    text, earlier = asm["ptx"], asm["ttgir"]
    copies = re.findall(r"cp\.async\.\w+\.shared\.global.*\], (\w+)", text)
    copied = collections.Counter(str(int(size, 0)) for size in copies)
    return {
        "copied": copied,
        "waited": len(re.findall(r"ld\.global", text)),
        "copies": earlier.count("async_copy_global"),
        "loops": earlier.count("scf.for"),
        "last copy": earlier.rfind("async_copy_global"),
        "store": earlier.find("tt.store"),
        "stored": words(text, "st"),
    }


def head_loads(kernel, width, groups):
    """How heads are loaded and stored in 16 bits."""
    import jax
    import jax.numpy as jnp

    from uoe_jax.ops.split_heads import join, split

    shape, size = jax.ShapeDtypeStruct, 1000
    table, ids = shape((500, width), jnp.float32), shape((size,), jnp.int32)
    key = shape((2, size, width), jnp.bfloat16)
    if kernel == "split":
        rows = shape((size, 2 * (groups + 2) * width), key.dtype)
        call = lambda *arrays: split(*arrays, 2, groups)
        made = compiled(call, rows, table, ids)
    else:
        query = shape((2, size, groups, width), key.dtype)
        made = compiled(join, query, key, key, table, ids)
    text = made.asm["ptx"]
    return {
        "loads": words(text, "ld"),
        "stores": words(text, "st"),
        "shared": made.metadata.shared,
    }


def swiglu_loads(kernel, width):
    """How rows are loaded and stored in 16 bits."""
    import jax
    import jax.numpy as jnp

    from uoe_jax.ops.swiglu import backward, forward

    shape, size = jax.ShapeDtypeStruct, 1000
    rows = shape((size, 2 * width), jnp.bfloat16)
    factors, grad = shape((size,), jnp.float32), shape((size, width), rows.dtype)
    arrays = (rows, factors) if kernel == "forward" else (rows, factors, grad)
    made = compiled({"forward": forward, "backward": backward}[kernel], *arrays)
    text = made.asm["ptx"]
    return {
        "loads": words(text, "ld"),
        "stores": words(text, "st"),
        "shared": made.metadata.shared,
    }


def expert_loads(kernel, hidden):
    """How often gelu is computed, and the types that change their layout."""
    import jax
    import jax.numpy as jnp

    from uoe_jax.ops.expert_mlp.nvidia.triton import backward, forward
    from uoe_jax.ops.packing import Packing

    shape, half = jax.ShapeDtypeStruct, jnp.bfloat16
    ids, picks = shape((512,), jnp.int32), shape((256, 2), jnp.int32)
    offsets = shape((5,), jnp.int32)
    packing = Packing(ids, picks, offsets, offsets)
    x, factors = shape((256, 128), half), shape((512,), jnp.float32)
    up, down = shape((4, 128, hidden), half), shape((4, hidden, 128), half)
    if kernel == "forward":
        made = compiled(forward, x, up, down, factors, packing)
    else:
        ups = shape((512, hidden), half)
        made = compiled(backward, x, up, down, factors, ups, packing)
    text = made.asm["ttgir"]
    # Of tensors: sums of rows are vectors.
    moved = re.findall(r"convert_layout .*: tensor<\d+x\d+x(\w+),", text)
    return {
        "exponentials": text.count("math.exp"),
        "moved": sorted(set(moved)),
        "shared": made.metadata.shared,
    }


def router_loads(kernel, experts):
    """How tokens and weights are copied, and what registers have no room for."""
    import jax
    import jax.numpy as jnp

    from uoe_jax.ops.router.triton import product_grads, route

    shape, size, width = jax.ShapeDtypeStruct, 24576, 2048
    x = shape((size, width), jnp.bfloat16)
    weight = shape((3, width, experts), x.dtype)
    if kernel == "route":
        bias = shape((experts,), jnp.float32)
        made = compiled(lambda *arrays: route(*arrays, None, 8), x, weight, bias)
    else:
        made = compiled(product_grads, x, weight, shape((size, experts), jnp.float32))
    text = made.asm["ptx"]
    copies = re.findall(r"cp\.async\.\w+\.shared\.global.*\], (\w+)", text)
    return {
        "copied": collections.Counter(str(int(size, 0)) for size in copies),
        "wgmma": text.count("wgmma.mma_async"),
        "stores": words(text, "st"),
        "spilled": spilled(text),
    }


def spilled(text):
    """Bytes of a thread that PTX for an H100 has no registers for."""
    import triton as compiler

    command = [compiler.knobs.nvidia.ptxas.path, "-v", "--gpu-name=sm_90a", "-"]
    done = subprocess.run(
        [*command, "-o", os.devnull], input=text, capture_output=True, text=True
    )
    return int(re.findall(r"(\d+) bytes spill stores", done.stderr)[0])


def cache_loads(keys, values):
    """How a token's attention loads the rows of a cache in 16 bits."""
    import jax
    import jax.numpy as jnp

    from uoe_jax.ops.cache_attention.api import Heads, Place, Store
    from uoe_jax.ops.cache_attention.nvidia.triton import attend

    shape, half, rows = jax.ShapeDtypeStruct, jnp.bfloat16, (2, 4, 640, 3)
    heads = Heads(3, 3, keys, value_width=values, score_width=64)
    if keys < 64:
        pairs = jnp.zeros((3, keys // 2), jnp.int32)
        heads = dataclasses.replace(heads, pairs=pairs)
    made = compiled(
        lambda token, k, v, stored, angles: attend(
            token, Store(k, v), Place(1, stored, angles, angles), heads, None
        )[0],
        shape((4, 1, heads.token), half),
        shape((*rows, keys), half),
        shape((*rows, values), half),
        shape((4,), jnp.int32),
        shape((4, 32), jnp.float32),
    )
    text = made.asm["ptx"]
    copies = re.findall(r"cp\.async\.\w+\.shared\.global.*\], (\w+)", text)
    copied = collections.Counter(str(int(size, 0)) for size in copies)
    return {"copied": copied, "loads": words(text, "ld")}


def words(text, kind):
    """How many loads or stores of each width there are in PTX."""
    return collections.Counter(re.findall(rf"{kind}\.global\.((?:v\d\.)?b\d+)", text))


if __name__ == "__main__":
    measure = {"products": product_loads, "heads": head_loads, "swiglu": swiglu_loads}
    measure |= {"experts": expert_loads, "router": router_loads}
    measure |= {"cached": cache_loads}
    found = {
        kind: [(case, measure[kind](*case)) for case in cases]
        for kind, cases in (NIGHTLY if sys.argv[1] == "nightly" else OFTEN).items()
    }
    print(json.dumps(found))
