"""Single tokens against float64 numpy: products by pick, routers, cached attention."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import assume

from uoe_jax.ops.cache_attention.api import Heads, Place, Store, attend
from uoe_jax.ops.token_products.api import (
    Addition,
    Parts,
    Picks,
    Projection,
    Scale,
    add,
    project,
)
from uoe_jax.ops.token_products.eight_bits import in_int8
from uoe_jax.ops.token_products.xla import join
from uoe_jax.ops.token_router import RouterWeights, route

EPS = 1e-5


def near(got, want, tolerance):
    """Errors are relative to the largest entry that is wanted, or to 1.

    Sums of numbers near 1 may all be small; their errors are those of the terms.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    bound = tolerance * max(1.0, float(np.abs(want).max()))
    np.testing.assert_allclose(got, want, rtol=0, atol=bound)


def norm64(x, scale):
    x = np.asarray(x, np.float64)
    return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + EPS) * np.asarray(scale)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def activate(sums, activation):
    if activation == "none":
        return sums[:, :, 0]
    if activation == "swiglu":
        return sums[:, :, 0] * sums[:, :, 1] * sigmoid(sums[:, :, 1])
    x = sums[:, :, 0]
    if activation == "gelu_erf":
        return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))
    return x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def draw_picks(draw, batch, experts, chosen, by_pick):
    order = np.argsort(draw.random((batch, experts)), axis=1)[:, :chosen]
    gates = draw.random((batch, chosen)) + 0.1
    table = np.zeros((batch, experts))
    np.put_along_axis(table, order, gates, axis=1)
    floats = lambda a: jnp.asarray(a, jnp.float32)
    return Picks(
        jnp.asarray(order, jnp.int32), floats(gates), floats(table), bool(by_pick)
    )


def of_eight_bits(part, int8):
    """A part, of eight bits if asked for, and the weights that it then has."""
    if not int8:
        return part, np.asarray(part.weight, np.float64)
    part = in_int8(part, part.weight.dtype)
    scales = np.asarray(part.scales, np.float64)
    return part, np.asarray(part.weight, np.float64) * scales[..., None]


def check_project(seed, case, implementation, dtype, tolerance):
    (
        batch,
        experts,
        chosen,
        inputs,
        outputs,
        activation,
        biased,
        normed,
        int8,
        *apart,
    ) = case
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    sides = 2 if activation == "swiglu" else 1
    width = inputs * sides if apart else inputs
    x, weight = array(batch, width), array(experts, sides, outputs, inputs)
    weight = weight * inputs**-0.5
    bias = array(experts, sides, outputs) if biased else None
    scale = array(inputs) if normed else None
    picks = draw_picks(draw, batch, experts, chosen, True) if chosen else None
    projection = Projection(weight, bias, activation, apart=bool(apart))
    projection, whole = of_eight_bits(projection, int8)
    got = project(
        x,
        projection,
        None if scale is None else Scale(scale, EPS),
        picks,
        implementation=implementation,
    )
    assert got.dtype == dtype
    value = np.asarray(x, np.float64)
    if normed:
        value = norm64(x, np.asarray(scale, np.float64))
    index = np.zeros((batch, 1), int) if picks is None else np.asarray(picks.experts)
    w = whole[index]
    each = value.reshape(batch, -1, inputs)  # what each side reads
    each = np.broadcast_to(each, (batch, sides, inputs))
    sums = np.einsum("bsi,bxsoi->bxso", each, w)
    if biased:
        sums = sums + np.asarray(bias, np.float64)[index]
    want = activate(sums, activation)
    if picks is not None and activation != "none":
        want = want * np.asarray(picks.gates, np.float64)[..., None]
    near(got, want, tolerance)


def check_add(seed, case, implementation, dtype, tolerance):
    batch, experts, chosen, inputs, outputs, splits, width, gated, biased, int8 = case
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    picks = draw_picks(draw, batch, experts, chosen, True) if chosen else None
    slots = chosen or 1
    values = array(batch, splits, slots, inputs)
    sums = None
    if splits > 1:
        heads = slots * inputs // width
        sums = jnp.asarray(draw.normal(size=(batch, splits, heads)) * 3, jnp.float32)
        # A part that saw nothing.
        sums = sums.at[:, 1, 0].set(-jnp.inf)
    weight = array(outputs, experts, inputs) * (slots * inputs) ** -0.5
    bias = array(outputs) if biased else None
    residual = array(batch, outputs)
    addition, whole = of_eight_bits(Addition(weight, bias, gated), int8)
    got = add(
        Parts(values, sums, width),
        addition,
        residual,
        picks,
        implementation=implementation,
    )
    value = np.asarray(values, np.float64)
    if splits > 1:
        share = np.exp2(np.asarray(sums, np.float64))
        share = share / share.sum(1, keepdims=True)
        value = value.reshape(batch, splits, -1, width) * share[..., None]
        value = value.reshape(values.shape)
    value = value.sum(1)
    index = np.zeros((batch, 1), int) if picks is None else np.asarray(picks.experts)
    if picks is not None and gated:
        value = value * np.asarray(picks.gates, np.float64)[..., None]
    w = whole[:, index]
    want = np.asarray(residual, np.float64) + np.einsum("bxi,obxi->bo", value, w)
    if biased:
        want = want + np.asarray(bias, np.float64)
    near(got, want, tolerance)


def gates64(scores, picks, rule):
    chosen = np.take_along_axis(scores, picks, axis=1)
    soft = lambda s: np.exp(s - s.max(1, keepdims=True))
    if rule == "one":
        return np.ones_like(chosen)
    if rule == "sigmoid":
        return 2 * sigmoid(chosen)
    if rule == "affinity":
        return sigmoid(chosen) / sigmoid(chosen).sum(1, keepdims=True)
    if rule == "softmax_all":
        whole = soft(scores)
        whole = whole / whole.sum(1, keepdims=True)
        return np.take_along_axis(whole, picks, axis=1)
    share = soft(chosen) / soft(chosen).sum(1, keepdims=True)
    return share * (picks.shape[1] if rule == "scaled_softmax" else 1)


def check_route(seed, case, implementation, dtype, tolerance):
    batch, width, experts, top_k, shared, rule, affine = case
    draw = np.random.default_rng(seed)
    x = jnp.asarray(draw.normal(size=(batch, width)), dtype)
    scale = jnp.asarray(draw.normal(size=width), jnp.float32)
    # Whole numbers of which many are equal would be ties; these are clear choices.
    weight = jnp.asarray(draw.normal(size=(width, experts)), jnp.float32)
    bias = jnp.asarray(draw.normal(size=experts) * 0.1, jnp.float32)
    router = RouterWeights(weight, bias, top_k, shared, rule, affine)
    got = route(x, Scale(scale, EPS), router, implementation=implementation)
    normed = norm64(x, np.asarray(scale, np.float64))
    near(got.x, normed, tolerance / 10)
    scores = normed @ np.asarray(weight, np.float64)
    key = (sigmoid(scores) if affine else scores) + np.asarray(bias, np.float64)
    # Nearer than rounding either expert may be picked first.
    assume(np.diff(np.sort(key, axis=1), axis=1).min(initial=1.0) > 1e-4)
    picks = np.argsort(-key, axis=1, kind="stable")[:, :top_k]
    gates = gates64(scores, picks, rule)
    always = np.broadcast_to(np.arange(shared), (batch, shared))
    experts_wanted = np.concatenate([always, picks + shared], axis=1)
    gates_wanted = np.concatenate([np.ones((batch, shared)), gates], axis=1)
    np.testing.assert_array_equal(got.experts, experts_wanted)
    near(got.gates, gates_wanted, tolerance)
    table = np.zeros((batch, shared + experts))
    np.put_along_axis(table, experts_wanted, gates_wanted, axis=1)
    near(got.table, table, tolerance)


def rotated(x, angle):
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def check_attend(seed, case, implementation, dtype, tolerance):
    """A case is: rows, experts (0: dense), picks, J, G, H, tokens kept, window, norms,
    rotation, slots by pick; and of narrow heads the values' width W and the model's,
    whose pairs they have some of and by whose root scores are divided."""
    batch, experts, chosen, j, g, h, length, window, normed, turned, by_pick, *own = (
        case
    )
    w, whole = own or (h, h)
    draw = np.random.default_rng(seed)
    array = lambda *shape: jnp.asarray(draw.normal(size=shape), dtype)
    picks = draw_picks(draw, batch, experts, chosen, by_pick) if experts else None
    slots = (chosen if by_pick else experts) if experts else 1
    token = array(batch, slots, j * (g + 1) * h + j * w)
    rows, layers, layer = length * chosen, 3, 2
    stored = draw.integers(0, length, batch)
    log = None
    if experts:
        order = np.argsort(draw.random((layers, batch, length, experts)), axis=-1)
        log = jnp.asarray(order[..., :chosen].reshape(layers, batch, rows), jnp.int32)
    # What no token wrote yet may be anything; plain JAX multiplies it by zeros.
    unwritten = 1e3 if implementation == "xla" else float("nan")
    keys, values = (
        np.asarray(array(layers, batch, rows, j, n), np.float64) for n in (h, w)
    )
    for b in range(batch):
        keys[:, b, stored[b] * chosen :] = unwritten
        values[:, b, stored[b] * chosen :] = unwritten
    store = Store(jnp.asarray(keys, dtype), jnp.asarray(values, dtype), log)
    q_scale, k_scale = (array(h), array(h)) if normed else (None, None)
    pairs = np.stack([draw.permutation(whole // 2)[: h // 2] for _ in range(j)])
    pairs = jnp.asarray(pairs, jnp.int32) if own else None
    heads = Heads(j, g, h, window, q_scale, k_scale, EPS, w, whole, pairs)
    angle = draw.random((batch, whole // 2)) * 6
    floats = lambda a: jnp.asarray(a, jnp.float32) if turned else None
    place = Place(
        layer,
        jnp.asarray(stored, jnp.int32),
        floats(np.cos(angle)),
        floats(np.sin(angle)),
    )
    call = jax.jit(
        lambda token, store: attend(
            token, store, place, heads, picks, implementation=implementation
        )
    )
    parts, after = call(token, store)
    got = np.asarray(join(parts, dtype), np.float64)

    index = np.zeros((batch, 1), int)
    if experts:
        index = np.asarray(picks.experts)
    slot = np.arange(index.shape[1])[None] if by_pick or not experts else index
    t = np.asarray(token, np.float64)
    t = np.take_along_axis(t, np.broadcast_to(slot, index.shape)[..., None], axis=1)
    parts = np.split(t, [j * g * h, j * (g + 1) * h], axis=2)
    split = lambda part, n: part.reshape(batch, index.shape[1], -1, n)
    q, k, v = (split(part, n) for part, n in zip(parts, (h, h, w), strict=True))
    if normed:
        q = norm64(q, np.asarray(q_scale, np.float64))
        k = norm64(k, np.asarray(k_scale, np.float64))
    if turned:
        each = angle[:, None] if pairs is None else angle[:, np.asarray(pairs)]
        q, k = rotated(q, np.repeat(each, g if own else 1, axis=1)), rotated(k, each)
    for b in range(batch):
        at = stored[b] * chosen
        first = 0 if window is None else max(stored[b] - window + 1, 0) * chosen
        new = slice(at, at + index.shape[1])
        near(np.asarray(after.keys, np.float64)[layer, b, new], k[b], tolerance)
        near(np.asarray(after.values, np.float64)[layer, b, new], v[b], tolerance)
        if experts:
            np.testing.assert_array_equal(after.experts[layer, b, new], index[b])
        for x, expert in enumerate(index[b]):
            mine = np.ones(at, bool)
            if experts:
                mine = np.asarray(log)[layer, b, :at] == expert
            mine[:first] = False
            for head in range(j * g):
                kept = keys[layer, b, :at][mine][:, head // g]
                score = np.append(
                    kept @ q[b, x, head], k[b, x, head // g] @ q[b, x, head]
                )
                share = np.exp((score - score.max()) / math.sqrt(whole))
                rows_v = values[layer, b, :at][mine][:, head // g]
                rows_v = np.concatenate([rows_v, v[b, x, head // g][None]])
                want = share @ rows_v / share.sum()
                place_got = got[b, np.broadcast_to(slot, index.shape)[b, x]]
                found = place_got.reshape(j * g, w)[head]
                np.testing.assert_allclose(found, want, rtol=0, atol=10 * tolerance)
