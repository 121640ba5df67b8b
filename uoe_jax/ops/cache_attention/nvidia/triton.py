"""Attention of one new token a row over its cache, in one kernel on NVIDIA GPUs.

It rotates the token, adds it to the cache in place, and attends. A row's log is shared
out among programs where the batch is too small to fill the device; the parts are joined
by whoever reads them.
"""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.ops import nvidia
from uoe_jax.ops.token_products.nvidia.triton import power

WIDEST = 256  # of a head
MOST_QUERIES = 64  # of a program: picks times groups
# Rows that a program takes at a time: of a log more, as not all of them are read.
BLOCK, LOG_BLOCK = 64, 128
# Programs for each multiprocessor, the most that share a log, and the least of each.
FILL = 2
MOST_SPLITS = 20
LEAST_BLOCKS = 2
WARPS = 4
STAGES = 2


def attend(
    token: Float[Array, "B S W"], store: Any, place: Any, heads: Any, picks: Any
) -> tuple[Any, Any]:
    """Return a token's attention to its log and itself, and the store with it added.

    Raises:
      NotImplementedError: no fit device, package or dtype; heads or picks too large for
        a program; a layer that isn't a number when the program is compiled.
    """
    nvidia.require(token.dtype)
    if store.keys.dtype != token.dtype:
        raise NotImplementedError(
            f"the cache is {store.keys.dtype} and the token {token.dtype}; it takes one"
        )
    if not isinstance(place.layer, int):
        raise NotImplementedError("it takes the layer as a number, not as an array")
    if max(heads.width, heads.values) > WIDEST or heads.width % 2:
        raise NotImplementedError(
            f"heads are {heads.width} wide, of values {heads.values}; it takes even "
            f"widths to {WIDEST}, of values any"
        )
    chosen = 1 if picks is None else picks.experts.shape[1]
    if chosen * heads.groups > MOST_QUERIES:
        raise NotImplementedError(
            f"{chosen} picks of {heads.groups} queries; it takes {MOST_QUERIES} in all"
        )
    return _attend(token, store, place, heads, picks)


def shares(rows: int, block: int, programs: int, cores: int) -> tuple[int, int]:
    """Return how many rows of a log a program has, and how many programs share it.

    `programs` are there without sharing a log out.
    """
    blocks = math.ceil(rows / block)
    most = min(MOST_SPLITS, math.ceil(blocks / LEAST_BLOCKS))
    wanted = min(math.ceil(FILL * cores / programs), most)
    share = math.ceil(blocks / wanted) * block
    return share, math.ceil(rows / share)


def _attend(token, store, place, heads, picks):
    from uoe_jax.ops.cache_attention.nvidia import kernels
    from uoe_jax.ops.token_products.api import Parts

    _, batch, rows, kv_heads, width = store.keys.shape
    values_wide = heads.values
    slots, groups = token.shape[1], heads.groups
    chosen = 1 if picks is None else picks.experts.shape[1]
    block = BLOCK if picks is None else LOG_BLOCK
    share, splits = shares(rows, block, batch * kv_heads, nvidia.cores())
    inner = kv_heads * groups * values_wide
    log = place.stored if store.experts is None else store.experts
    norms = heads.norms
    parts = [
        ((batch, splits, slots, inner), token.dtype),
        ((batch, splits, slots * kv_heads * groups), jnp.float32),
    ]
    cache = [(a.shape, a.dtype) for a in (store.keys, store.values)]
    # Where there is no log of experts nothing is written to what stands for it.
    aliases = {7: 2, 8: 3} | ({} if picks is None else {9: 4})
    written = ((1,), jnp.int32) if picks is None else (log.shape, log.dtype)
    values, sums, keys, stored_values, new_log = nvidia.launch(
        kernels.attend,
        token,
        token if place.cosines is None else place.cosines,
        token if place.sines is None else place.sines,
        token if norms is None else norms[0].scale,
        token if norms is None else norms[1].scale,
        place.stored,
        place.stored if picks is None else picks.experts,
        store.keys,
        store.values,
        log,
        place.layer,
        place.stored if heads.pairs is None else heads.pairs,
        out_shape=[*parts, *cache, written],
        aliases=aliases,
        grid=batch * kv_heads * splits,
        num_warps=WARPS,
        num_stages=1 if share == block else STAGES,
        small=True,
        B=batch,
        R=rows,
        X=chosen,
        J=kv_heads,
        G=groups,
        H=width,
        SLOTS=slots,
        M=power(chosen * groups, 16),
        HH=power(width // 2, 16),
        W=values_wide,
        WW=power(values_wide, 16),
        ANGLES=0 if place.cosines is None else place.cosines.shape[1],
        PAIRED=heads.pairs is not None and place.cosines is not None,
        SCORES=heads.scores,
        BLOCK=block,
        SPLITS=splits,
        SHARE=share,
        WINDOW=heads.window or 0,
        ROUTED=picks is not None,
        NORM=norms is not None,
        EPS=heads.eps,
        ROTATE=place.cosines is not None,
        PRECISION="ieee" if token.dtype == jnp.float32 else "tf32",
    )
    experts = None if store.experts is None else new_log
    whole = Parts(values, None if splits == 1 else sums, values_wide)
    return whole, store._replace(keys=keys, values=stored_values, experts=experts)
