"""Attention of one new token a row over its cache, in plain JAX."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.ops.token_products.xla import pick, rms_norm


def attend(
    token: Float[Array, "B S W"], store: Any, place: Any, heads: Any, picks: Any
) -> tuple[Any, Any]:
    """Return a token's attention to its log and itself, and the store with it added."""
    from uoe_jax.ops.token_products.api import Parts

    if picks is not None and not picks.by_pick:
        token = pick(token, picks.experts)
    q, k, v = split(token, place, heads)
    rows = {"keys": k, "values": v}
    if picks is not None:
        rows["experts"] = picks.experts
    first = place.stored * k.shape[1]
    store = store._replace(
        **{
            name: append_rows(getattr(store, name), place.layer, first, new)
            for name, new in rows.items()
        }
    )
    keys, values = store.keys[place.layer], store.values[place.layer]
    if picks is None:
        visible = written_rows(keys, place.stored, heads.window)
        out = attend_cache(q[:, 0], keys, values, visible, width=heads.scores)[:, None]
    else:
        log = (keys, values, store.experts[place.layer])
        if heads.scores != heads.width:
            q = q * (heads.width / heads.scores) ** 0.5
        out = attend_log(q, picks.experts, *log, place.stored, heads.window)
    out = out.reshape(*out.shape[:2], -1)
    if picks is not None and not picks.by_pick:
        row = jnp.arange(out.shape[0])[:, None]
        zeros = jnp.zeros((out.shape[0], picks.table.shape[1], out.shape[2]), out.dtype)
        out = zeros.at[row, picks.experts].set(out, unique_indices=True)
    return Parts(out[:, None]), store


def split(
    token: Float[Array, "B X W"], place: Any, heads: Any
) -> tuple[Array, Array, Array]:
    """Return a token's queries [B, X, J, G, H], keys [B, X, J, H] and values."""
    j, g, h = heads.kv_heads, heads.groups, heads.width
    ends = [j * g * h, j * (g + 1) * h]
    q, k, v = (
        part.reshape(*token.shape[:2], -1, width)
        for part, width in zip(
            jnp.split(token, ends, axis=2), (h, h, heads.values), strict=True
        )
    )
    if heads.norms is not None:
        q, k = (rms_norm(a, *norm) for a, norm in zip((q, k), heads.norms, strict=True))
    if place.cosines is not None:
        cosines, sines = place.cosines[:, None], place.sines[:, None]
        if heads.pairs is not None:
            cosines, sines = (a[:, 0, heads.pairs] for a in (cosines, sines))
        # Of each key head, and of the query heads that share it.
        many = lambda a, count: jnp.repeat(a, count, axis=1) if a.shape[1] > 1 else a
        q = turn(q, many(cosines, g), many(sines, g))
        k = turn(k, cosines, sines)
    return q.reshape(*q.shape[:2], j, g, h), k, v


def turn(
    x: Float[Array, "B X K H"],
    cosines: Float[Array, "B K2 half"],
    sines: Float[Array, "B K2 half"],
) -> Float[Array, "B X K H"]:
    """Return heads with pairs (i, i + H/2) rotated by their token's angles.

    Of each head its own, or of all the same.
    """
    cos, sin = cosines[:, None], sines[:, None]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cos.dtype)), 2, -1)
    rotated = (first * cos - second * sin, second * cos + first * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def append_rows(
    stored: Array, index: int | Array, first: Int[Array, " B"], rows: Array
) -> Array:
    """Return [n, B, S, ...] with a layer's rows [B, R, ...] written from `first` on."""
    batch, count = rows.shape[:2]
    sample = jnp.arange(batch)[:, None]
    place = first[:, None] + jnp.arange(count)[None]
    return stored.at[index, sample, place].set(rows.astype(stored.dtype))


def attend_cache(
    q: Float[Array, "B K G H"],
    keys: Float[Array, "B S K H"],
    values: Float[Array, "B S K W"],
    visible: Bool[Array, "B K2 G2 S"],
    sink: Float[Array, "K G"] | None = None,
    width: int | None = None,
) -> Float[Array, "B K G W"]:
    """Return the attention of one query a head over the visible rows, at least one.

    Scores are divided by the root of `width`, None: that of the queries.
    """
    divisor = q.shape[-1] if width is None else width
    scores = jnp.einsum("bkgh,bskh->bkgs", q, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(visible, scores * divisor**-0.5, -jnp.inf)
    weights = softmax(scores, -1, None if sink is None else sink[None, :, :, None])
    weights = weights.astype(values.dtype)
    return jnp.einsum("bkgs,bskh->bkgh", weights, values)


def softmax(
    scores: Float[Array, ...], axis: int, sink: Float[Array, ...] | None
) -> Float[Array, ...]:
    """Return weights that with the sink's sum to 1; its axis has one entry."""
    if sink is None:
        return jax.nn.softmax(scores, axis=axis)
    shape = [*scores.shape]
    shape[axis] = 1
    sink = jnp.broadcast_to(sink.astype(scores.dtype), shape)
    whole = jax.nn.softmax(jnp.concatenate([scores, sink], axis=axis), axis=axis)
    return jax.lax.slice_in_dim(whole, 0, scores.shape[axis], axis=axis)


def written_rows(
    keys: Float[Array, "B S K H"],
    last: Int[Array, " B"],
    window: int | None = None,
) -> Bool[Array, "B 1 1 S"]:
    """Return which rows of a cache are seen: 0 to `last`, or the last `window` of
    these."""
    row = jnp.arange(keys.shape[1])[None]
    seen = row <= last[:, None]
    if window is not None:
        seen &= row > last[:, None] - window
    return seen[:, None, None]


def attend_log(
    q: Float[Array, "B X J G H"],
    choices: Int[Array, "B X"],
    keys: Float[Array, "B R J H"],
    values: Float[Array, "B R J W"],
    experts: Int[Array, "B R"],
    position: Int[Array, " B"],
    window: int | None = None,
    sink: Float[Array, "B X J G"] | None = None,
) -> Float[Array, "B X J G W"]:
    """Return the attention of each pick over the log rows of its expert, of the last
    `window` tokens; zeros where there are none.

    Each row is multiplied by the one query of its expert, so scores cost X/E of dense.
    """
    top_k = choices.shape[1]
    match = experts[:, :, None] == choices[:, None]
    token = jnp.arange(keys.shape[1]) // top_k
    match = match & (token[None] <= position[:, None])[..., None]
    if window is not None:
        match = match & (token[None] > position[:, None] - window)[..., None]
    pick = jnp.argmax(match, axis=-1)
    q_rows = jnp.take_along_axis(q, pick[:, :, None, None, None], axis=1)
    scores = jnp.sum(q_rows * keys[:, :, :, None], axis=-1, dtype=jnp.float32)
    scores = scores[:, :, None] * q.shape[-1] ** -0.5
    scores = jnp.where(match[..., None, None], scores, -jnp.inf)
    weights = softmax(scores, 1, None if sink is None else sink[:, None])
    weights = jnp.where(match[..., None, None], weights, 0).astype(values.dtype)
    return jnp.einsum("brxjg,brjh->bxjgh", weights, values)
