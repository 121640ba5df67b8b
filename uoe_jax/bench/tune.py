"""Which tile and which backend is fastest here, as the table that dispatch reads."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from uoe_jax.bench.attention import draw
from uoe_jax.bench.record import made_with
from uoe_jax.bench.sizes import Sizes
from uoe_jax.bench.timing import Program, both_passes, measure
from uoe_jax.bench.union import uneven_offsets
from uoe_jax.files import format_json, write_atomically
from uoe_jax.ops import (
    dense_attention,
    expert_mlp,
    grouped_matmul,
    measured,
    pack_choices,
    split_heads,
    swiglu,
)
from uoe_jax.ops.dense_attention.api import BACKENDS as DENSE
from uoe_jax.ops.dense_attention.api import call_shape as dense_shape
from uoe_jax.ops.expert_mlp.api import BACKENDS as EXPERT_MLP
from uoe_jax.ops.expert_mlp.api import call_shape as expert_shape
from uoe_jax.ops.grouped_matmul.api import GROUPED_MATMUL
from uoe_jax.ops.grouped_matmul.api import call_shape as matmul_shape
from uoe_jax.ops.grouped_matmul.nvidia.launch import products, weight_grads
from uoe_jax.ops.grouped_matmul.nvidia.tiles import CANDIDATES, Tiles
from uoe_jax.ops.grouped_matmul.nvidia.triton import require
from uoe_jax.ops.router.api import BACKENDS as ROUTER
from uoe_jax.ops.router.api import call_shape as router_shape
from uoe_jax.ops.router.api import pick_experts
from uoe_jax.ops.split_heads import BACKENDS as SPLIT_HEADS
from uoe_jax.ops.split_heads import call_shape as heads_shape
from uoe_jax.ops.swiglu import BACKENDS as SWIGLU
from uoe_jax.ops.swiglu import call_shape as swiglu_shape


def tune(sizes: Sizes, rounds: int, say: Callable[[str], None]) -> Path:
    """Measure the cases' backends and tiles; return the table written.

    A case's backends are ordered by the time of both passes; those that can't serve it
    are left out.
    """
    found: dict[str, Any] = {
        **made_with(),
        "command": "uoe bench --tune",
        "order": {},
        "tiles": {},
    }
    for case in sizes.matmul:
        _tune_tiles(case, sizes.dtype, rounds, found["tiles"], say)
    _write(found)  # so that what follows runs with its own best tiles
    for case in sizes.matmul:
        _order_matmul(case, sizes.dtype, rounds, found["order"], say)
    for case in sizes.attention:
        _order_dense(case, sizes.dtype, rounds, found["order"], say)
    cases = (_head_case(case, heads) for case in sizes.smha for heads in (1, 2))
    for case in dict.fromkeys(cases):
        _order_heads(case, sizes.dtype, rounds, found["order"], say)
    for case in sizes.mlp:
        _order_swiglu(case, sizes.dtype, rounds, found["order"], say)
        _order_router(case, sizes.dtype, rounds, found["order"], say)
    for case in sizes.narrow:
        _order_expert_mlp(case, sizes.dtype, rounds, found["order"], say)
    return _write(found)


def _write(found: Mapping[str, Any]) -> Path:
    path = measured.user_folder() / f"{measured.device_name()}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, format_table(found))
    measured.load.cache_clear()
    jax.clear_caches()  # programs traced with another choice
    return path


def format_table(found: Mapping[str, Any]) -> str:
    """Return a table as JSON with one entry a line."""
    parts = []
    for key, value in found.items():
        text = format_json(value)
        if isinstance(value, dict):
            lists = [
                f"  {format_json(op)}: [\n   "
                + ",\n   ".join(format_json(entry) for entry in entries)
                + "\n  ]"
                for op, entries in value.items()
            ]
            text = "{\n" + ",\n".join(lists) + "\n }"
        parts.append(f" {format_json(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _ranked(times: Mapping[Any, float | None]) -> dict[Any, float]:
    """Return what was measured, fastest first, milliseconds rounded for the table."""
    known = [(key, time) for key, time in times.items() if time is not None]
    return {key: round(time, 4) for key, time in sorted(known, key=lambda kv: kv[1])}


def _order(
    op: str, shape: Mapping[str, Any], backends: Any, run: Callable, args: tuple,
    rounds: int, found: dict, say: Callable,
) -> None:  # fmt: skip
    names = [name for name in backends if name != "reference"]
    programs = [
        Program(
            fun=functools.partial(run, implementation=name),
            args=args,
            labels={"op": op, "case": "tune", "name": name},
        )
        for name in names
    ]
    rows = measure(programs, rounds)
    times = _ranked({row.name: row.milliseconds for row in rows})
    if times:
        entry = {"shape": dict(shape), "fastest": list(times), "ms": times}
        found.setdefault(op, []).append(entry)
        say(f"{op} {dict(shape)}: {times}")


def _both(call: Callable) -> Callable:
    """Return a function of a call's arguments and backend that takes both passes."""

    def run(*args: Any, implementation: str) -> Any:
        named = functools.partial(call, implementation=implementation)
        return both_passes(named)(*args)

    return run


def _order_matmul(case: tuple, dtype: str, rounds: int, found: dict, say: Any) -> None:
    rows, inner, outer, groups = case
    x, w, grad = draw(dtype, (rows, inner), (groups, inner, outer), (rows, outer))
    offsets = jnp.asarray(uneven_offsets(rows, groups))

    def call(x: Any, w: Any, implementation: str) -> Any:
        return grouped_matmul(x, w, offsets, implementation=implementation)

    shape, run = matmul_shape(rows, w), _both(call)
    args = (x, w, grad)
    _order("grouped_matmul", shape, GROUPED_MATMUL, run, args, rounds, found, say)
    for op in ("gather_project", "project_scatter"):
        # The same products, moved alike.
        found[op] = found.get("grouped_matmul", [])


def _order_dense(case: tuple, dtype: str, rounds: int, found: dict, say: Any) -> None:
    batch, length, heads, width, causal = case
    args = tuple(draw(dtype, *[(batch, length, heads, width)] * 4))
    call = functools.partial(dense_attention, causal=causal)
    shape = dense_shape(args[0], causal)
    _order("dense_attention", shape, DENSE, _both(call), args, rounds, found, say)


def _head_case(case: tuple, kv_heads: int) -> tuple[int, int, int, int]:
    """Return tokens, rows, key/value heads and width of experts of so many heads."""
    _, _, picks, width, batch, length = case
    tokens = batch * length
    return tokens, tokens * picks // kv_heads, kv_heads, width


def _order_heads(case: tuple, dtype: str, rounds: int, found: dict, say: Any) -> None:
    tokens, rows, kv_heads, width = case
    part = (kv_heads, rows, width)
    x, *grads = draw(
        dtype, (rows, 3 * kv_heads * width), (kv_heads, rows, 1, width), part, part
    )
    place = jnp.arange(tokens, dtype=jnp.int32)
    ids = jnp.arange(rows, dtype=jnp.int32) % tokens

    def run(x: Any, place: Any, ids: Any, grads: Any, implementation: str) -> Any:
        call = functools.partial(
            split_heads,
            positions=place,
            token_ids=ids,
            kv_heads=kv_heads,
            groups=1,
            theta=1e4,
            implementation=implementation,
        )
        return both_passes(call)(x, grads)

    shape = heads_shape(x, kv_heads, 1)
    args = (x, place, ids, tuple(grads))
    _order("split_heads", shape, SPLIT_HEADS, run, args, rounds, found, say)


def _order_swiglu(case: tuple, dtype: str, rounds: int, found: dict, say: Any) -> None:
    _, neurons, experts, picks, batch, length = case
    count, width = batch * length * picks, neurons // experts
    x, grad = draw(dtype, (count, 2 * width), (count, width))
    args = (x, *draw("float32", (count,)), grad)

    def run(x: Any, factors: Any, grad: Any, implementation: str) -> Any:
        call = functools.partial(swiglu, implementation=implementation)
        out, vjp = jax.vjp(call, x, factors)
        # A step's passes lie far apart; here XLA could read rows once for both.
        out, grad = jax.lax.optimization_barrier((out, grad))
        return out, vjp(grad)

    _order("swiglu", swiglu_shape(x), SWIGLU, run, args, rounds, found, say)


def _order_router(case: tuple, dtype: str, rounds: int, found: dict, say: Any) -> None:
    width, _, experts, picks, batch, length = case
    tokens = batch * length
    (x,) = draw(dtype, (tokens, width))
    weight, grads = draw("float32", (width, experts), (tokens, picks))

    def run(x: Any, weight: Any, grads: Any, implementation: str) -> Any:
        def call(x: Any, weight: Any) -> Any:
            how = {"implementation": implementation}
            out = pick_experts(x, weight, jnp.zeros(experts), picks, **how)
            # Of these a step's losses are made.
            return (out.scores, out.probs, out.z), (out.picks, out.counts)

        out, vjp, aux = jax.vjp(call, x, weight, has_aux=True)
        out, grads = jax.lax.optimization_barrier((out, grads))
        return out, aux, vjp((grads, jnp.ones(experts), jnp.ones(())))

    shape, args = router_shape(x, weight), (x, weight, grads)
    _order("router", shape, ROUTER, run, args, rounds, found, say)


def _order_expert_mlp(
    case: tuple, dtype: str, rounds: int, found: dict, say: Any
) -> None:
    width, hidden, experts, chosen, tokens = case
    ranks = jax.random.uniform(jax.random.key(0), (1, tokens, experts))
    picks = jax.lax.top_k(ranks, chosen)[1].astype(jnp.int32)
    packing = pack_choices(picks, experts)
    weights = (experts, width, hidden), (experts, hidden, width)
    x, up, down, grad = draw(dtype, (tokens, width), *weights, (tokens, width))
    factors = jnp.ones(tokens * chosen, jnp.float32)

    def call(x: Any, up: Any, down: Any, factors: Any, implementation: str) -> Any:
        return expert_mlp(x, up, down, factors, packing, implementation=implementation)

    shape, args = expert_shape(up, packing), (x, up, down, factors, grad)
    run = _both(call)
    _order("expert_mlp", shape, EXPERT_MLP, run, args, rounds, found, say)


def _tune_tiles(case: tuple, dtype: str, rounds: int, found: dict, say: Any) -> None:
    for op, shape, candidates, run, args in _tile_calls(case, dtype):
        programs = [
            Program(
                fun=functools.partial(run, tiles=tile),
                args=args,
                labels={"op": op, "case": "tune", "name": str(tuple(tile))},
            )
            for tile in candidates
        ]
        rows = measure(programs, rounds)
        times = [row.milliseconds for row in rows]
        ranked = _ranked(dict(zip(candidates, times, strict=True)))
        for tile, time in list(ranked.items())[:1]:
            entry = {"shape": shape, "tile": tile._asdict(), "ms": time}
            found.setdefault(op, []).append(entry)
            say(f"{op} {shape}: {tuple(tile)} {time} ms")


def _tile_calls(case: tuple, dtype: str) -> Iterator[tuple]:
    """Yield (operation, shape, tiles to try, function, arguments) of one product."""
    rows, inner, outer, groups = case
    offsets = jnp.asarray(uneven_offsets(rows, groups))
    ids = jnp.arange(rows, dtype=jnp.int32)
    x, w, grad = draw(dtype, (rows, inner), (groups, inner, outer), (rows, outer))
    for transpose in (False, True):
        left, right = (grad, w) if transpose else (x, w)
        sides = (outer, inner) if transpose else (inner, outer)
        for gather in (False, True):
            shape = _shape(rows, *sides, dtype, gather=gather, transpose=transpose)
            run = functools.partial(_product, transpose=transpose, gather=gather)
            yield (
                "products",
                shape,
                CANDIDATES["products"],
                run,
                (left, right, offsets, ids),
            )
    for gather in ("none", "x", "grad"):
        shape = _shape(rows, inner, outer, dtype, gather=gather)
        run = functools.partial(_weights, gather=gather)
        yield (
            "weight_grads",
            shape,
            CANDIDATES["weight_grads"],
            run,
            (x, grad, offsets, ids),
        )


def _shape(rows: int, inner: int, outer: int, dtype: str, **flags: Any) -> dict:
    return {"rows": rows, "inner": inner, "outer": outer, "dtype": dtype, **flags}


def _product(x, w, offsets, ids, *, transpose: bool, gather: bool, tiles: Tiles):
    require(x, w)
    ids = ids if gather else None
    return products(x, w, offsets, ids, transpose=transpose, tiles=tiles)


def _weights(x, grad, offsets, ids, *, gather: str, tiles: Tiles):
    require(x, grad)
    x_ids, grad_ids = (ids if gather == side else None for side in ("x", "grad"))
    return weight_grads(x, grad, offsets, x_ids, grad_ids, tiles)
