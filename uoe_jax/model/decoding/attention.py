"""Attention layers of one token a row, on weights laid out for it."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from uoe_jax.model.attention import AttentionWeights
from uoe_jax.model.cache import Slot
from uoe_jax.model.decoding.routing import TokenRouter, enter
from uoe_jax.model.layers import Norm
from uoe_jax.ops.cache_attention.api import Heads, Place, Store, attend
from uoe_jax.ops.cache_attention.xla import (
    append_rows,
    attend_cache,
    split,
    turn,
    written_rows,
)
from uoe_jax.ops.rotary import cosines_and_sines
from uoe_jax.ops.token_products.api import (
    Addition,
    Parts,
    Picks,
    Projection,
    add,
    project,
    static,
)
from uoe_jax.ops.token_products.xla import rms_norm


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rotation:
    """How heads of `width` are rotated; `theta` None: not at all."""

    width: int = static()
    theta: float | None = static(None)
    scaling: Any = static(None)

    def angles(self, slot: Slot) -> tuple[Array | None, Array | None]:
        """Return cosines and sines of a token's place in its row."""
        if self.theta is None:
            return None, None
        return cosines_and_sines(slot.lengths, self.width, self.theta, self.scaling)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenAttention:
    """Dense attention, or with a router that of a union.

    Where a layer's keys or values are narrower than the model's, weights have zeros up
    to the widths that a cache has: the kernels then read rows of whole 16 bytes.
    """

    inputs: Projection
    heads: Heads
    rotation: Rotation
    outputs: Addition
    router: TokenRouter | None = None
    gated_values: bool = static(False)

    @classmethod
    def of(cls, layer: Any, dtype: Any) -> TokenAttention:
        """Return a dense or union attention's weights as decoding reads them."""
        router = getattr(layer, "router", None)
        return cls(
            inputs=_inputs(layer, ("q", "k", "v"), dtype),
            heads=_heads(layer),
            rotation=Rotation(layer.head_dim, layer.theta, layer.scaling),
            outputs=_outputs(layer, dtype),
            router=None if router is None else TokenRouter.of(router, "attention"),
            gated_values=getattr(layer, "gated_values", False),
        )

    def add_to(
        self,
        x: Float[Array, "B D"],
        norm: Norm | None,
        slot: Slot,
        to: Float[Array, "B D"] | None = None,
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return `to` (default x) plus the attention of norm(x), and its slot."""
        to = x if to is None else to
        inner, scale, picks, slot = enter(self.router, x, norm, slot)
        token = project(inner, self.inputs, scale, picks)
        if self.gated_values and picks is not None:
            token = self.weigh(token, picks)
        # A log counts all tokens, a cache those that entered: the same but in a
        # mixture of depths, which has no log.
        stored = slot.row if picks is None else slot.lengths
        place = Place(slot.index, stored, *self.rotation.angles(slot))
        entry = slot.entry
        store = Store(entry["k"], entry["v"], entry.get("experts"))
        parts, store = attend(token, store, place, self.heads, picks)
        new = {"k": store.keys, "v": store.values}
        if store.experts is not None:
            new["experts"] = store.experts
        slot = slot._replace(entry={**entry, **new})
        return add(parts, self.outputs, to, picks), slot

    def weigh(self, token: Float[Array, "B S W"], picks: Picks) -> Array:
        """Return a token's projections with its values times their gates."""
        values = self.heads.kv_heads * self.heads.width
        rest, values = jnp.split(token, [token.shape[2] - values], axis=2)
        gates = picks.gates if picks.by_pick else picks.table
        values = values * gates[..., None].astype(values.dtype)
        return jnp.concatenate([rest, values], axis=2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SharedKvTokenAttention:
    """Routed queries over keys and values that all tokens have."""

    queries: Projection
    keys: Projection
    heads: Heads
    rotation: Rotation
    outputs: Addition
    router: TokenRouter

    @classmethod
    def of(cls, layer: Any, dtype: Any) -> SharedKvTokenAttention:
        """Return the weights of a union with shared keys and values for decoding."""
        everybody = lambda name: _all_heads(layer, name)
        weights = [everybody(f"w{name}")[0] for name in "kv"]
        biases = [everybody(f"b{name}") for name in "kv" if layer.bk is not None]
        return cls(
            queries=_inputs(layer, ("q",), dtype),
            keys=_projection(weights, [b[0] for b in biases], dtype),
            heads=_heads(layer),
            rotation=Rotation(layer.wq.shape[-1], layer.theta, layer.scaling),
            outputs=_outputs(layer, dtype),
            router=TokenRouter.of(layer.router, "attention"),
        )

    def add_to(
        self,
        x: Float[Array, "B D"],
        norm: Norm | None,
        slot: Slot,
        to: Float[Array, "B D"] | None = None,
    ) -> tuple[Float[Array, "B D"], Slot]:
        """Return `to` (default x) plus the attention of norm(x), and its slot."""
        to = x if to is None else to
        heads = self.heads
        batch, j, h = x.shape[0], heads.kv_heads, heads.width
        inner, picks, slot = self.router(x, norm, slot)
        place = Place(slot.index, slot.row, *self.rotation.angles(slot))
        token = project(inner, self.keys)
        # Of the picks' queries only; keys and values of all experts are one expert's.
        every = dataclasses.replace(heads, kv_heads=token.shape[2] // (2 * h), groups=0)
        _, k, v = split(token, place, every)
        entry = {
            name: append_rows(slot.entry[name], slot.index, slot.row, rows)
            for name, rows in (("k", k), ("v", v))
        }
        slot = slot._replace(entry={**slot.entry, **entry})
        q = project(inner, self.queries, None, picks)
        q = q.reshape(*q.shape[:2], -1, h)
        if not picks.by_pick:
            index = picks.experts[:, :, None, None]
            q = jnp.take_along_axis(q, index, axis=1)
        if heads.norms is not None:
            q = rms_norm(q, *heads.norms[0])
        if place.cosines is not None and place.sines is not None:
            q = turn(q, place.cosines[:, None], place.sines[:, None])

        def chosen(name: str) -> Array:
            cached = entry[name][slot.index]
            cached = cached.reshape(*cached.shape[:2], -1, j, h)
            index = picks.experts[:, None, :, None, None]
            cached = jnp.take_along_axis(cached, index, axis=2)
            return cached.reshape(*cached.shape[:2], -1, h)

        keys, values = chosen("k"), chosen("v")
        q = q.reshape(batch, -1, heads.groups, h)
        visible = written_rows(keys, slot.row, heads.window)
        out = attend_cache(q, keys, values, visible)
        out = out.reshape(batch, picks.experts.shape[1], -1)
        if not picks.by_pick:
            row = jnp.arange(batch)[:, None]
            zeros = jnp.zeros((batch, picks.table.shape[1], out.shape[2]), out.dtype)
            out = zeros.at[row, picks.experts].set(out, unique_indices=True)
        return add(Parts(out[:, None]), self.outputs, to, picks), slot


def _heads(layer: AttentionWeights) -> Heads:
    _, _, j, g, _ = layer.wq.shape
    keys, values = layer.cached_dims
    heads = Heads(
        kv_heads=j,
        groups=g,
        width=keys,
        window=layer.window,
        value_width=values,
        score_width=layer.head_dim,
        pairs=layer.cached_pairs,
    )
    q_norm, k_norm = layer.q_norm, layer.k_norm
    if q_norm is None or k_norm is None:
        return heads
    return dataclasses.replace(
        heads, q_scale=q_norm.scale[...], k_scale=k_norm.scale[...], eps=q_norm.eps
    )


def _inputs(layer: Any, names: tuple[str, ...], dtype: Any) -> Projection:
    """Return the projections of queries, keys, ... of each expert side by side."""
    e, d = layer.wq.shape[:2]
    wide = {"q": layer.cached_queries, "k": layer.cached_keys, "v": layer.cached_values}
    weights, biases = [], []
    for name in names:
        weight, bias = (getattr(layer, f"{kind}{name}") for kind in "wb")
        weights.append(wide[name](weight[...]).reshape(e, d, -1))
        if bias is not None:
            biases.append(wide[name](bias[...]).reshape(e, -1))
    return _projection(weights, biases, dtype)


def _all_heads(layer: Any, name: str) -> Array:
    """Return a weight [1, D, K*H] or bias [1, K*H] of all experts as one's."""
    array = getattr(layer, name)[...]
    if name.startswith("b"):
        return array.reshape(1, -1)
    return jnp.moveaxis(array, 0, 1).reshape(1, array.shape[1], -1)


def _projection(weights: list, biases: list, dtype: Any) -> Projection:
    """Return weights [E, D, O] and biases [E, O], side by side, rows first."""
    joined = jnp.concatenate([w[None] if w.ndim == 2 else w for w in weights], axis=-1)
    bias = None
    if biases:
        rows = [b[None] if b.ndim == 1 else b for b in biases]
        bias = jnp.concatenate(rows, axis=-1)[:, None].astype(dtype)
    return Projection(jnp.swapaxes(joined, 1, 2)[:, None].astype(dtype), bias)


def _outputs(layer: AttentionWeights, dtype: Any) -> Addition:
    e, d = layer.wo.shape[0], layer.wo.shape[-1]
    weight = jnp.swapaxes(layer.wo[...], -1, -2)
    weight = jnp.swapaxes(layer.cached_values(weight), -1, -2).reshape(e, -1, d)
    return Addition(
        jnp.transpose(weight, (2, 0, 1)).astype(dtype),
        None if layer.bo is None else layer.bo[...].astype(dtype),
        gated=True,
    )
