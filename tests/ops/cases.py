"""Which calls each backend of each operation is held to, and how it is run here."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial

import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as tpu_interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from tests.ops.suite import Case, changed
from uoe_jax.ops import nvidia, tpu
from uoe_jax.ops.as_segments import packed_attention
from uoe_jax.ops.cache_attention.nvidia import triton as cache_attention
from uoe_jax.ops.dense_attention import api as dense_attention
from uoe_jax.ops.expert_mlp.nvidia import triton as expert_mlp
from uoe_jax.ops.grouped_matmul import batched, serial, xla
from uoe_jax.ops.grouped_matmul.nvidia import launch
from uoe_jax.ops.grouped_matmul.nvidia import triton as grouped_matmul
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles
from uoe_jax.ops.segment_attention import api
from uoe_jax.ops.segment_attention import xla as plain_segments
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton as segment_attention
from uoe_jax.ops.token_products.nvidia import triton as token_products

BOTH_JAX, NIGHTLY = pytest.mark.both_jax, pytest.mark.nightly
FLOAT16 = pytest.mark.float16
STEP = {"bfloat16": 2.0**-7, "float16": 2.0**-10}  # from 1 to the next number
CAUSAL, FULL = (True, None), (False, None)  # masks; the second part is the window

# Tiles that no segment fills: the queries' gradient with the schedule of the forward
# pass, and with one of its own.
ATTENTION_TILES = {
    "forward": segment_attention.Tiles(32, 32, 4, 2),
    "query_gradient": segment_attention.Tiles(32, 16, 4, 2),
    "key_gradients": segment_attention.Tiles(16, 32, 4, 2),
}
OTHER_TILES = {
    "forward": segment_attention.Tiles(32, 16, 4, 2),
    "query_gradient": segment_attention.Tiles(16, 16, 4, 2),
    "key_gradients": segment_attention.Tiles(32, 16, 4, 2),
}
TILE = Tiles(16, 16, 16, 2, 4, 2)
AHEAD = TILE._replace(in_turn=2, ahead=True)
EXPERT_KERNELS = (expert_mlp.forward, expert_mlp.backward)


@contextlib.contextmanager
def on_triton(*changes) -> Iterator[None]:
    """Triton's kernels in its interpreter, with some choices changed."""
    from tests.ops.gpu import triton_on_cpu

    for traced in (launch.products, launch.weight_grads, *EXPERT_KERNELS):
        traced.clear_cache()  # of other tiles
    with nvidia.interpreted(triton_on_cpu.run), changed(*changes):
        yield


@contextlib.contextmanager
def on_hopper() -> Iterator[None]:
    """Mosaic's GPU kernels in jax's interpreter, on memory that starts as NaN."""
    params = plgpu.InterpretGPUParams(detect_races=True, uninitialized_memory="nan")
    with mosaic_gpu.interpreted(params):
        yield


@contextlib.contextmanager
def on_tpu(*, detect_races: bool = True, **tiles: int) -> Iterator[None]:
    """TPU kernels in jax's interpreter, on memory that starts as NaN."""
    with tpu.interpreted(detect_races=detect_races, **tiles):
        yield
        races = tpu_interpreter.races
        assert not detect_races or not (races and races.races_found)


def in_blocks(kind) -> contextlib.AbstractContextManager:
    """Several blocks a group, several groups a batch, and one that does not fit."""
    sizes = (serial, "_BLOCK", 16), (batched, "_BLOCK", 4), (batched, "_BATCH", 6)
    return changed((xla, "_choose", lambda blocks: kind), *sizes)


def attention_tiles(tiles) -> contextlib.AbstractContextManager:
    choose = lambda kernel, shape: tiles[kernel]
    return on_triton((segment_attention, "choose_tiles", choose))


def product_tiles(tile, dense=None) -> contextlib.AbstractContextManager:
    changes = [(launch, "choose_tiles", lambda op, shape: tile)]
    if dense is not None:
        changes.append((grouped_matmul, "dense_pays", lambda *sizes: dense))
    return on_triton(*changes)


def anywhere(operation, kinds, rounded, *, backends=("xla", "reference"), **more):
    """Float32 by plain JAX; the first kind in bfloat16 and float64 as well."""
    at = partial(Case, operation, marks=(BOTH_JAX,), **more)
    for backend in backends:
        # The reference masks by products: NaN would reach everything.
        how = {"spoilt": False} if backend == "reference" else {}
        for about, sizes in kinds.items():
            yield at(backend, about, sizes, examples=6, **how)
    about, sizes = next(iter(kinds.items()))
    at = partial(at, backends[0])
    yield at(f"{about}, bfloat16", sizes, dtype="bfloat16", tolerance=rounded)
    yield at(f"{about}, float64", sizes, dtype="float64", tolerance=2.0**-40)


def segment_attention_cases():
    whole, few = {"rows": 96, "count": 6}, {"rows": 44, "count": 3}
    kinds = {
        "causal": {"mask": CAUSAL, "groups": 1, "width": 32},
        "causal window": {"mask": (True, 20), "groups": 4, "width": 16, "scale": 0.4},
        "full": {"mask": FULL, "groups": 4, "width": 64},
        "full window": {"mask": (False, 20), "groups": 1, "width": 128},
        "documents": {"mask": CAUSAL, "groups": 2, "width": 16, "documents": True},
        "full documents": {"mask": FULL, "groups": 2, "width": 16, "documents": True},
        "sink": {"mask": (True, 20), "groups": 2, "width": 16, "sink": True},
        "full sink": {"mask": FULL, "groups": 1, "width": 16, "sink": True},
    }
    kinds = {about: whole | sizes for about, sizes in kinds.items()}
    # In 16 bits weights, gradients of scores and results are each rounded once, and a
    # score's gradient is a difference of larger numbers: six half-steps.
    yield from anywhere("segment_attention", kinds, 3 * STEP["bfloat16"])

    at = partial(Case, "segment_attention", "triton", dtype="float16", marks=(FLOAT16,))
    at = partial(at, tolerance=3 * STEP["float16"])
    usual, other = (partial(attention_tiles, t) for t in (ATTENTION_TILES, OTHER_TILES))
    few |= {"scale": 0.3, "groups": 1, "width": 16}
    yield at("causal", few | {"mask": CAUSAL, "groups": 2}, running=usual)
    yield at("full window", few | {"mask": (False, 9)}, running=other)
    sizes = few | {"mask": (True, 20), "documents": True}
    yield at("causal documents", sizes, running=usual)
    yield at("sink", few | {"mask": CAUSAL, "groups": 2, "sink": True}, running=usual)
    sizes = few | {"mask": FULL, "width": 32}
    at = partial(at, dtype="bfloat16", tolerance=3 * STEP["bfloat16"], marks=())
    yield at("full, bfloat16", sizes, running=other)

    # Rows that aren't a multiple of the 8 that copies are aligned to.
    sizes = {"rows": 150, "count": 3, "scale": 0.2}
    at = partial(Case, "segment_attention", "mosaic_gpu")
    any_order = partial(mosaic_gpu.segment_attention, deterministic=False)

    @contextlib.contextmanager
    def unordered():
        with on_hopper(), changed((api, "BACKENDS", {"mosaic_gpu": any_order})):
            yield

    # list_attention adds the keys' gradients up in any order, too.
    yield at(
        "causal, sums in any order",
        sizes | {"mask": CAUSAL, "groups": 1, "width": 128},
        dtype="bfloat16",
        tolerance=3 * STEP["bfloat16"],
        running=unordered,
        marks=(NIGHTLY,),
    )
    yield at(
        "full window documents",
        sizes | {"mask": (False, 70), "groups": 2, "width": 64, "documents": True},
        dtype="float16",
        tolerance=3 * STEP["float16"],
        running=on_hopper,
        marks=(FLOAT16,),
    )

    yield at(
        "sink",
        sizes | {"mask": CAUSAL, "groups": 1, "width": 64, "sink": True},
        dtype="float16",
        tolerance=3 * STEP["float16"],
        running=on_hopper,
    )

    sizes = {"rows": 330, "count": 5}
    at = partial(Case, "segment_attention", "mosaic_tpu")
    sides = ("rows", "chunk", "key_rows", "key_chunk")
    large, small = (partial(on_tpu, **dict.fromkeys(sides, n)) for n in (256, 128))
    one = sizes | {"mask": CAUSAL, "groups": 1, "width": 64}
    yield at("causal", one, running=large)
    rounded = {"dtype": "bfloat16", "tolerance": 3 * STEP["bfloat16"], "examples": 0}
    yield at("causal, bfloat16", one, running=large, **rounded)
    yield at("causal documents", one | {"documents": True}, running=large)
    yield at("sink", one | {"groups": 2, "sink": True}, running=small)
    two = sizes | {"mask": (True, 170), "groups": 2, "width": 128}
    yield at("causal window", two, running=small)
    wide = sizes | {"mask": (False, 90), "groups": 2, "width": 192}
    yield at("full window", wide, running=small)


def dense_attention_cases():
    # 40 tokens take the plain path on CPU, 80 the blockwise one.
    kinds = {
        "long causal": {"length": 80, "mask": CAUSAL},
        "long": {"length": 80, "mask": FULL},
        "long causal window documents": {
            "length": 75, "mask": (True, 9), "documents": True
        },
        "long documents": {"length": 75, "mask": FULL, "documents": True},
        "long sink": {"length": 75, "mask": CAUSAL, "sink": True, "documents": True},
        "causal": {"length": 40, "mask": CAUSAL},
        "sink": {"length": 40, "mask": (False, 9), "sink": True},
        "window documents": {"length": 40, "mask": (False, 9), "documents": True},
    }  # fmt: skip
    kinds = {about: {"width": 16} | sizes for about, sizes in kinds.items()}
    for case in anywhere("dense_attention", kinds, 3 * STEP["bfloat16"]):
        if case.backend == "xla" or not case.about.startswith("long"):
            yield case

    at = partial(Case, "dense_attention", "splash", tolerance=5e-6)
    sizes = {"length": 256, "width": 64, "batch": 1, "heads": 1, "kv_heads": 1}
    # Races aren't looked for: the kernel isn't ours, and its copies are the compiler's.
    running = partial(on_tpu, detect_races=False, block=128)
    at = partial(at, running=running)
    yield at("causal, grouped", sizes | {"mask": CAUSAL, "heads": 2})
    at = partial(at, marks=(BOTH_JAX,))
    yield at("full window", sizes | {"mask": (False, 70)})
    yield at("causal documents", sizes | {"mask": CAUSAL, "documents": True})

    # By the kernels of segment attention, whose own cases are above, and by plain JAX
    # in their place.
    packing = partial(packed_attention, plain_segments.segment_attention)
    running = partial(changed, (dense_attention, "BACKENDS", {"mosaic_gpu": packing}))
    at = partial(Case, "dense_attention", "mosaic_gpu", running=running)
    for about, sizes in kinds.items():
        if sizes["length"] < 80:
            yield at(f"packing of {about}", sizes)
    sizes = {"batch": 1, "heads": 2, "kv_heads": 1, "length": 20, "width": 16}
    sizes |= {"mask": (True, 9), "documents": True}
    at = partial(Case, "dense_attention", "triton", dtype="float16", marks=(FLOAT16,))
    running = partial(attention_tiles, ATTENTION_TILES)
    yield at("packed", sizes, tolerance=3 * STEP["float16"], running=running)
    sizes |= {"width": 64, "heads": 1}
    at = partial(Case, "dense_attention", about="packed", sizes=sizes)
    at = partial(at, examples=0)
    yield at("mosaic_tpu", running=on_tpu)
    rounded = {"dtype": "bfloat16", "tolerance": 3 * STEP["bfloat16"]}
    yield at("mosaic_gpu", running=on_hopper, marks=(NIGHTLY,), **rounded)


def list_attention_cases():
    sizes = {"rows": 40, "count": 5, "keys": 7, "groups": 2, "width": 4}
    kinds = {"lists": sizes}
    # Its tiles read queries of no segment, too, and mask them by products.
    at = partial(anywhere, "list_attention", kinds, 3 * STEP["bfloat16"], spoilt=False)
    yield from at(backends=("xla",))
    sizes = {"rows": 14, "count": 3, "keys": 8, "groups": 1, "width": 16}
    at = partial(Case, "list_attention", "triton", dtype="float16", marks=(FLOAT16,))
    running = partial(attention_tiles, ATTENTION_TILES)
    yield at("lists", sizes, tolerance=3 * STEP["float16"], running=running)
    sizes = {"rows": 50, "count": 3, "keys": 30, "groups": 1, "width": 64}
    at = partial(Case, "list_attention", "mosaic_gpu", dtype="bfloat16")
    at = partial(at, examples=0, running=on_hopper)
    yield at("lists", sizes, tolerance=3 * STEP["bfloat16"])


def grouped_matmul_cases():
    sizes = {"rows": 70, "count": 5, "inner": 24, "outer": 40}
    for kind in (serial, batched):
        about = kind.__name__.rpartition(".")[2]
        # Only the result is rounded: half a step.
        at = partial(anywhere, "grouped_matmul", {about: sizes}, 2.0**-8)
        yield from at(backends=("xla",), running=partial(in_blocks, kind))
    at = partial(Case, "grouped_matmul", "reference", marks=(BOTH_JAX,))
    yield at("oracle", sizes, spoilt=False, examples=6)
    sizes = {"rows": 40, "count": 3, "inner": 20, "outer": 24}
    for turns in (0, 1):
        running = partial(product_tiles, TILE._replace(in_turn=turns))
        about = "tile after tile" if turns else "tiles at once"
        yield Case(
            "grouped_matmul", "triton", about, sizes, examples=2, running=running
        )
    sizes = {"rows": 330, "count": 4}
    at = partial(Case, "grouped_matmul", "mosaic_tpu", tolerance=1e-5)
    narrow = sizes | {"inner": 40, "outer": 72}
    yield at("narrower than a register", narrow, running=partial(on_tpu, rows=256))
    running = partial(on_tpu, rows=256, inner=128, outer=128)
    yield at("sums in two steps", sizes | {"inner": 256, "outer": 200}, running=running)


def packed_matmul_cases(op):
    sizes = {"op": op, "tokens": 9, "experts": 5, "inner": 24, "outer": 40}
    for kind in (serial, batched):
        about = kind.__name__.rpartition(".")[2]
        # Each of two rows is rounded, and their sum.
        at = partial(anywhere, op, {about: sizes}, 3 * 2.0**-8)
        yield from at(backends=("xla",), running=partial(in_blocks, kind))
    at = partial(Case, op, "reference", marks=(BOTH_JAX,), spoilt=False)
    yield at("oracle", sizes)
    sizes |= {"experts": 3, "inner": 20, "outer": 24, "kept": 8 / 9}
    at = partial(Case, op, "triton")
    cut = sizes | {"num_rows": 32}  # picks past M are rows 32 to 35 of 32
    for about, how, tile, dense in (
        ("two steps, cut", cut, TILE, False),
        ("dense, cut, ids ahead", cut, AHEAD, True),
        ("dense", sizes, TILE, True),
    ):
        yield at(about, how, running=partial(product_tiles, tile, dense))
    at = partial(at, dtype="bfloat16", tolerance=1.5 * STEP["bfloat16"])
    for about, tile, dense in (("two steps", AHEAD, False), ("dense", TILE, True)):
        running = partial(product_tiles, tile, dense)
        yield at(f"{about}, bfloat16", sizes, running=running)
    # A third of the picks found no room, and the packing has no rows for them.
    inner, outer = (256, 64) if op == "gather_project" else (64, 256)
    sizes = {"op": op, "tokens": 38, "experts": 4, "inner": inner, "outer": outer}
    sizes |= {"kept": 0.6, "num_rows": 140}  # the last tile is nearly empty
    at = partial(Case, op, "mosaic_tpu", examples=0, running=partial(on_tpu, rows=128))
    yield at("rows picked", sizes, tolerance=1e-5)


def expert_mlp_cases():
    sizes = {"tokens": 9, "experts": 5, "width": 24, "hidden": 20}
    # Activations and results are rounded, rows before their sum and after it.
    rounded = 4 * STEP["bfloat16"]
    yield from anywhere("expert_mlp", {"few": sizes}, rounded, backends=("steps",))
    # In blocks that no side fills, and rows that are several tiles of an expert.
    tile = expert_mlp.Tiles(16, 16, 16, 16, 4, 2)
    changes = [(expert_mlp, name, tile) for name in ("FORWARD", "BACKWARD")]
    changes.append((launch, "choose_tiles", lambda op, shape: TILE))
    # Of scores far from zero, whose exponentials overflow; GPUs say nothing.
    quiet = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
    at = partial(Case, "expert_mlp", "triton", marks=(quiet,))
    at = partial(at, running=partial(on_triton, *changes))
    yield at("sides past tiles", sizes, examples=2)
    long = {"tokens": 30, "experts": 3, "width": 32, "hidden": 40}
    yield at("tiles of an expert", long)
    # Rows of picks that aren't kept are zero; picks past M have no rows.
    cut = sizes | {"experts": 3, "kept": 8 / 9, "num_rows": 32}
    yield at("cut", cut, examples=2)
    yield at("most past", sizes | {"tokens": 20, "kept": 0.3})
    one = sizes | {"picks": 1, "hidden": 16, "width": 16}
    yield at("one row a token", one)
    yield at("bfloat16", sizes, dtype="bfloat16", tolerance=rounded)


def elementwise_cases():
    # float32's error in products of a few numbers and sums of them, of the largest;
    # bfloat16 is rounded once, half a step of 8 bits whatever the value's size.
    exact, rounded = {"tolerance": 2.0**-20}, {"relative": 2.0**-8}
    at = partial(Case, "swiglu", "xla", marks=(BOTH_JAX,), **exact)
    yield at("few", {"rows": 5, "width": 3})
    yield at("one", {"rows": 1, "width": 1})
    rows = {"rows": 40, "width": 24}
    yield at("bfloat16", rows, dtype="bfloat16", **rounded)
    yield at("float64", {"rows": 7, "width": 5}, dtype="float64", tolerance=2.0**-48)
    # Of a shut gate numpy says so, GPUs don't.
    quiet = pytest.mark.filterwarnings("ignore:overflow encountered in exp")
    at = partial(Case, "swiglu", "triton", running=on_triton, marks=(quiet,), **exact)
    # Widths of one block and of three, that no large power of two divides, odd, of
    # several blocks and a part; rows that fill a program, a part of one, and more.
    for size in (
        *((16, 128), (20, 384), (9, 192), (64, 24), (130, 7), (3, 682)),
        *((2, 2048), (1, 1500), (5, 3072)),
    ):
        yield at(
            "x".join(map(str, size)), dict(zip(("rows", "width"), size, strict=True))
        )
    for size in ((7, 256), (40, 30)):
        sizes = dict(zip(("rows", "width"), size, strict=True))
        about = "x".join(map(str, size)) + ", bfloat16"
        yield at(about, sizes, dtype="bfloat16", **rounded)

    # Values up to 5, turned by up to 500 radians in float32, two roundings.
    exact = {"tolerance": 500 * 2.0**-23}
    at = partial(Case, "split_heads", "xla", marks=(BOTH_JAX,), **exact)
    sizes = {"rows": 14, "width": 8, "tokens": 9, "theta": 100.0}
    yield at("one head", sizes | {"kv_heads": 1, "groups": 1}, examples=3)
    yield at("many heads", sizes | {"kv_heads": 2, "groups": 3}, examples=3)
    still = sizes | {"kv_heads": 2, "groups": 1, "theta": None}
    yield at("not rotated", still, examples=3)
    two = {"rows": 40, "width": 16, "theta": 100.0, "kv_heads": 2, "groups": 2}
    yield at("bfloat16", two, dtype="bfloat16", **rounded)
    at = partial(Case, "split_heads", "triton", running=on_triton, **exact)
    # Rows that fill one program, a part of one, and two and a part.
    names = ("rows", "kv_heads", "groups", "width")
    for size in ((32, 1, 1, 16), (5, 2, 1, 32), (70, 1, 3, 16), (40, 3, 2, 16)):
        sizes = dict(zip(names, size, strict=True)) | {"theta": 100.0}
        yield at("x".join(map(str, size)), sizes)
    yield at("bfloat16", two, dtype="bfloat16", **rounded)


# rows, experts, picks (0: one expert), inputs, outputs, activation, bias, norm, int8
PROJECT = [
    (1, 1, 0, 32, 48, "none", False, True, False),
    (1, 1, 0, 20, 7, "swiglu", True, True, False),
    (1, 4, 2, 32, 24, "swiglu", False, False, False),
    (3, 16, 2, 24, 10, "gelu", True, False, False),
    (2, 5, 3, 16, 8, "gelu_erf", False, True, False),
    (1, 1, 0, 20, 7, "swiglu", True, True, True),
    (3, 16, 2, 24, 10, "gelu", True, False, True),
    (2, 5, 3, 16, 8, "none", False, True, True),
    (1, 1, 0, 24, 10, "swiglu", True, False, False, "apart"),
    (1, 1, 0, 24, 10, "swiglu", True, False, True, "apart"),
    (1, 1, 0, 16, 7, "gelu", False, False, False, "apart"),
]
# rows, experts, picks, inputs of a pick, outputs, parts, head width, gated, bias, int8
ADD = [
    (1, 1, 0, 48, 20, 1, 48, False, True, False),
    (1, 1, 0, 64, 20, 3, 16, False, False, False),
    (1, 4, 2, 32, 24, 2, 16, True, True, False),
    (3, 16, 2, 24, 10, 1, 24, True, False, False),
    (2, 5, 3, 21, 8, 1, 21, False, False, False),
    (1, 1, 0, 64, 20, 3, 16, False, True, True),
    (3, 16, 2, 24, 10, 1, 24, True, False, True),
    (2, 5, 3, 21, 8, 1, 21, False, False, True),
]
# rows, width, experts, picks, always on, rule, bias of the sigmoid
ROUTE = [
    (1, 32, 4, 2, 0, "sigmoid", False),
    (3, 20, 5, 3, 1, "scaled_softmax", False),
    (2, 16, 8, 1, 0, "softmax_all", False),
    (2, 24, 6, 4, 2, "affinity", True),
    (1, 16, 3, 3, 0, "one", False),
    (1, 16, 33, 5, 0, "softmax", False),
]
# rows, experts, picks, J, G, H, tokens, window, norms, rotation, by pick;
# of narrow heads their values' width and the model's
ATTEND = [
    (2, 0, 1, 2, 3, 8, 20, None, False, True, True),
    (1, 0, 1, 3, 1, 16, 40, 7, True, True, True),
    (1, 4, 2, 1, 1, 8, 30, None, False, True, True),
    (3, 4, 2, 2, 2, 12, 12, 5, True, False, False),
    (2, 5, 3, 1, 2, 16, 70, None, False, True, False),
    (2, 0, 1, 2, 3, 12, 20, None, False, True, True, 8, 32),
    (1, 0, 1, 3, 1, 16, 40, 7, False, False, True, 24, 20),
    (2, 4, 2, 2, 2, 8, 20, None, False, True, True, 5, 16),
]


def decoding_cases():
    # Of scores that no row has, and of gates that are shut; GPUs say nothing.
    quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")
    logs = [(cache_attention, name, 16) for name in ("BLOCK", "LOG_BLOCK")]
    whole = [(cache_attention, name, 32) for name in ("BLOCK", "LOG_BLOCK")]
    # Logs of several small blocks, shared out among programs and not.
    shared = partial(on_triton, *logs, (cache_attention, "LEAST_BLOCKS", 1))
    alone = partial(on_triton, *whole, (cache_attention, "LEAST_BLOCKS", 100))
    pieces = partial(on_triton, (token_products, "ADD_INPUTS", 32))
    for operation, tried, tolerance, rounded, kernels in (
        ("token_project", PROJECT, 2e-6, 2.0**-7, {"": on_triton}),
        ("token_add", ADD, 2e-6, 2.0**-6, {"in pieces ": pieces}),
        ("token_router", ROUTE, 1e-5, None, {"": on_triton}),
        ("cache_attention", ATTEND, 3e-6, 2.0**-6, {"alone ": alone, "split ": shared}),
    ):
        ways = [("xla", "", contextlib.nullcontext, BOTH_JAX)]
        ways += [("triton", about, way, quiet) for about, way in kernels.items()]
        for backend, about, running, mark in ways:
            at = partial(Case, operation, backend, running=running, marks=(mark,))
            for number, sizes in enumerate(tried):
                yield at(f"{about}{number}", sizes, tolerance=tolerance)
            if rounded is not None:
                more = {"dtype": "bfloat16", "tolerance": rounded}
                yield at(f"{about}2, bfloat16", tried[2], **more)


def every() -> list[Case]:
    """All cases that this system can run: triton has wheels for Linux alone."""
    found = [
        *segment_attention_cases(),
        *dense_attention_cases(),
        *list_attention_cases(),
        *grouped_matmul_cases(),
        *packed_matmul_cases("gather_project"),
        *packed_matmul_cases("project_scatter"),
        *expert_mlp_cases(),
        *elementwise_cases(),
        *decoding_cases(),
    ]
    linux = sys.platform == "linux"
    return [case for case in found if linux or case.backend != "triton"]
