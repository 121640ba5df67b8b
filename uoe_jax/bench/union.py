"""Grouped products, and whole layers: dense beside a union of its parts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.bench import peers
from uoe_jax.bench.attention import draw
from uoe_jax.bench.sizes import Sizes
from uoe_jax.bench.timing import Program, Row, both, measure
from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.model.attention import DenseAttention, UnionAttention
from uoe_jax.model.context import make_context
from uoe_jax.model.mlp import DenseMlp, UnionMlp
from uoe_jax.ops import grouped_matmul
from uoe_jax.ops.grouped_matmul.api import GROUPED_MATMUL
from uoe_jax.presets import dense_control

CONTROL = "dense of its FLOPs"  # the control: a union's share of heads and of the MLP
_REFERENCE_ROWS = 4096  # the oracle does E times the work


def bench_union(sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Yield grouped products, then the layers of the union beside dense ones."""
    for case in sizes.matmul:
        yield from measure(_matmul(case, sizes.dtype), rounds)
    for case in sizes.mlp:
        yield from measure(_mlp(case, sizes.dtype), rounds)
    for case in sizes.smha:
        yield from measure(_smha(case, sizes.dtype), rounds)


def bench_sweep(sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Yield layer times by sequence length and keep ratio X/E; X = E also dense."""
    d, f, experts, width, tokens = sizes.sweep
    kinds = {
        "attention": (DenseAttention, UnionAttention),
        "mlp": (DenseMlp, UnionMlp),
    }
    for length in sizes.sweep_lengths:
        shape = (max(1, tokens // length), length)
        for part, (dense, union) in kinds.items():
            labels = {"op": "sweep", "case": f"{part} B{shape[0]} T{length}"}
            make = functools.partial(layer_config, d, f, experts, width, length)
            run = functools.partial(layer_program, shape=shape, dtype=sizes.dtype)
            programs = [run(dense, make(experts), name="dense", **labels)]
            for picks in sizes.sweep_picks:
                name = f"X{picks}/{experts}"
                programs.append(run(union, make(picks), name=name, **labels))
            yield from measure(programs, rounds)


def layer_config(
    d: int, f: int, experts: int, width: int, length: int, picks: int
) -> ModelConfig:
    """Return the config of one layer's width, heads and union; weights in bfloat16."""
    return ModelConfig(
        max_seq_len=length,
        d_model=d,
        d_ff=f,
        num_heads=experts,
        num_kv_heads=experts,
        head_dim=width,
        use_bias=True,
        union=UnionConfig(num_experts=experts, top_k=picks),
    )


def as_union_model(config: ModelConfig) -> ModelConfig:
    """Return a layer's config with both of its parts unions."""
    return dataclasses.replace(config, attention=("union",), mlp=("union",))


def layer_program(
    kind: Callable, config: ModelConfig, *, shape: tuple[int, int], dtype: str,
    **labels: Any,
) -> Program:  # fmt: skip
    """Return a layer's forward and backward pass at [B, T], its router included."""
    module = kind(config, rngs=nnx.Rngs(0))
    graphdef, params, rest = nnx.split(module, nnx.Param, ...)
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    x, grad = draw(dtype, *[(*shape, config.d_model)] * 2)

    def run(params: Any, x: jax.Array, grad: jax.Array) -> Any:
        def apply(params: Any, x: jax.Array) -> jax.Array:
            context = make_context(config, x.shape[:2], train=True)
            return nnx.merge(graphdef, params, rest)(x, context)[0]

        out, vjp = jax.vjp(apply, params, x)
        return out, vjp(grad)

    return Program(fun=run, args=(params, x, grad), labels={**labels, "what": "both"})


def _mlp(case: tuple, dtype: str) -> list[Program]:
    d, f, experts, picks, batch, length = case
    config = layer_config(d, f, experts, max(8, d // experts), length, picks)
    name = f"B{batch} T{length} D{d} F{f} E{experts} X{picks}"
    run = functools.partial(
        layer_program, config=config, shape=(batch, length), dtype=dtype,
        op="MLP layer", case=name,
    )  # fmt: skip
    half = run(DenseMlp, config=dense_control(as_union_model(config)), name=CONTROL)
    return [run(DenseMlp, name="dense"), run(UnionMlp, name="union"), half]


def _smha(case: tuple, dtype: str) -> list[Program]:
    d, heads, picks, width, batch, length = case
    config = layer_config(d, 4 * d, heads, width, length, picks)
    name = f"B{batch} T{length} D{d} N{heads} X{picks} H{width}"
    run = functools.partial(
        layer_program, config=config, shape=(batch, length), dtype=dtype,
        op="attention layer", case=name,
    )  # fmt: skip
    half = dense_control(as_union_model(config))
    return [
        run(DenseAttention, name="dense"),
        run(UnionAttention, name="union"),
        run(DenseAttention, config=half, name=CONTROL),
    ]


def uneven_offsets(rows: int, groups: int) -> np.ndarray:
    """Return offsets of groups of random sizes that fill all rows."""
    share = np.random.default_rng(0).dirichlet(np.full(groups, 8.0))
    ends = np.floor(np.cumsum(share) * rows).astype(np.int32)
    return np.concatenate([[0], ends[:-1], [rows]]).astype(np.int32)


def _matmul(case: tuple, dtype: str) -> list[Program | Row]:
    rows, inner, outer, groups = case
    offsets = uneven_offsets(rows, groups)
    args = draw(dtype, (rows, inner), (groups, inner, outer), (rows, outer))
    flops = 2.0 * rows * inner * outer
    case_name = f"M{rows} I{inner} O{outer} E{groups}"
    labels = {"op": "grouped matmul", "case": case_name}
    plain = lambda x, w: x @ w[0]
    found: list[Program | Row] = []
    found += both(plain, args, flops, 3.0, name="one dense product", **labels)
    for backend in GROUPED_MATMUL:
        if backend == "reference" and rows > _REFERENCE_ROWS:
            continue
        product = functools.partial(
            grouped_matmul, offsets=jnp.asarray(offsets), implementation=backend
        )
        found += both(product, args, flops, 3.0, name=backend, **labels)
    counts = jnp.asarray(np.diff(offsets))
    for peer, product in peers.matmul_peers().items():
        if isinstance(product, str):
            found.append(Row(name=peer, note=product, **labels))
            continue
        run = lambda x, w, product=product: product(x, w, counts)
        found += both(run, args, flops, 3.0, name=peer, **labels)
    return found
