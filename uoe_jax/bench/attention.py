"""Dense and selective attention: our backends beside cuDNN and installed peers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from uoe_jax.bench import peers
from uoe_jax.bench.sizes import Sizes
from uoe_jax.bench.timing import Program, Row, both, measure
from uoe_jax.ops import dense_attention, pack_choices, segment_attention
from uoe_jax.ops.dense_attention.api import BACKENDS as DENSE
from uoe_jax.ops.segment_attention.api import BACKENDS as SEGMENT

# The oracle keeps all scores: only where they fit easily.
_REFERENCE_SCORES = 2**26
_BACKWARD = 3.5  # products of both passes over those of the forward one: 7 to 2


def bench_attention(sizes: Sizes, rounds: int) -> Iterator[Row]:
    """Yield the rows of all attention cases."""
    for case in sizes.attention:
        yield from measure(_dense(case, sizes.dtype), rounds)
        yield from _torch(case, sizes.dtype, rounds)
    for case in sizes.selective:
        yield from measure(_selective(case, sizes.dtype), rounds)


def draw(dtype: str, *shapes: tuple[int, ...]) -> list:
    """Return normal arrays; never zeros, which multiply faster than data."""
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.standard_normal(shape, dtype=np.float32), dtype)
        for shape in shapes
    ]


def _dense(case: tuple, dtype: str) -> list[Program | Row]:
    batch, length, heads, width, causal = case
    args = draw(dtype, *[(batch, length, heads, width)] * 4)
    labels, flops = _describe(case)
    found: list[Program | Row] = []
    for backend in DENSE:
        if backend == "reference" and batch * heads * length**2 > _REFERENCE_SCORES:
            continue
        attend = functools.partial(
            dense_attention, causal=causal, implementation=backend
        )
        found += both(attend, args, flops, _BACKWARD, name=backend, **labels)
    for peer, attend in peers.attention_peers(causal).items():
        if isinstance(attend, str):
            found.append(Row(name=peer, note=attend, **labels))
        else:
            found += both(attend, args, flops, _BACKWARD, name=peer, **labels)
    return found


def _torch(case: tuple, dtype: str, rounds: int) -> list[Row]:
    labels, flops = _describe(case)
    *shape, causal = case
    return peers.torch_attention(tuple(shape), causal, dtype, flops, rounds, labels)


def _describe(case: tuple) -> tuple[dict[str, Any], float]:
    """Return a dense case's labels and the FLOPs of its forward pass."""
    batch, length, heads, width, causal = case
    name = f"{'causal' if causal else 'full'} B{batch} T{length} N{heads} H{width}"
    flops = 4.0 * batch * heads * length**2 * width * (0.5 if causal else 1.0)
    return {"op": "dense attention", "case": name}, flops


def _selective(case: tuple, dtype: str) -> list[Program]:
    batch, length, heads, picks, width = case
    score = np.random.default_rng(0).random((batch, length, heads))
    choices = np.argsort(score, axis=-1)[..., :picks].astype(np.int32)
    offsets = pack_choices(jnp.asarray(choices), heads).segment_offsets
    lengths = np.diff(np.asarray(offsets)).astype(float)
    flops = 4.0 * width * float((lengths**2).sum()) / 2
    rows = batch * length * picks
    args = draw(dtype, (rows, 1, width), (rows, width), (rows, width), (rows, 1, width))
    case_name = f"B{batch} T{length} N{heads} X{picks} H{width}"
    labels = {"op": "selective attention", "case": case_name}
    found = []
    for backend in SEGMENT:
        if backend == "reference" and rows * rows > _REFERENCE_SCORES:
            continue
        attend = functools.partial(
            segment_attention, offsets=offsets, causal=True, implementation=backend
        )
        found += both(attend, args, flops, _BACKWARD, name=backend, **labels)
    return found
