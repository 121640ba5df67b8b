"""How factors start: published variants by name, orthonormal, and HOSVD of the weight.

All but `hosvd` start with a zero core (Tucker) or a zero B (LoRA).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from uoe_jax.adapt.plan import LeafPlan
from uoe_jax.linalg.tucker import hosvd

Parts = dict[str, Array]


def init_leaf(
    plan: LeafPlan, init: str, key: jax.Array, weight: Array, scale: float
) -> Parts:
    """Return the parts of one adapter, float32.

    flora: factors kaiming normal with a = sqrt(3), std sqrt(1/2)/sqrt(r_i) (FLoRA's
    layers). loralib: N(0, 0.02). peft: what a torch linear of that factor draws,
    U(+-1/sqrt(fan in)). gaussian: A ~ N(0, 1/r^2) (PEFT's option). orthonormal: QR of
    a normal draw. hosvd: the leading part of the weight itself, over the scale; for
    LoRA that is its SVD (PiSSA, Meng et al. 2024).
    """
    if plan.method == "vector":
        return {"delta": jnp.zeros(plan.shape)}
    if init == "hosvd":
        parts = _from_weight(plan, weight, scale)
    else:
        parts = {
            part: _draw(plan, part, word, init, jax.random.fold_in(key, number))
            for number, (part, word) in enumerate(plan.labels)
            if part != "magnitude"
        }
    if plan.dora:
        parts["magnitude"] = column_norms(plan, weight.astype(jnp.float32))
    return parts


def column_norms(plan: LeafPlan, weight: Array, split: tuple[str, ...] = ()) -> Array:
    """Return the norm of each output's weights [batch, outs] (DoRA, section 4.1).

    Inside `jax.shard_map` each device's are summed over the mesh axes `split`.
    """
    labels = plan.axes.axes
    kept = plan.axes.batch + plan.axes.outs
    axes = tuple(i for i, a in enumerate(labels) if a not in kept)
    squares = jnp.sum(jnp.square(weight), axis=axes)
    norms = jnp.sqrt(jax.lax.psum(squares, split) if split else squares)
    left = [a for a in labels if a in kept]
    return jnp.transpose(norms, [left.index(a) for a in kept])


def _draw(plan: LeafPlan, part: str, word: str, init: str, key: jax.Array) -> Array:
    shape, sizes = plan.shapes[part], plan.sizes
    if part in ("core", "b"):
        return jnp.zeros(shape)
    rank = sizes[word[-1]]
    inputs = part == "a" or part.removeprefix("factor_") == plan.axes.ins
    mode = [a for a in word[:-1] if a not in plan.axes.batch]
    width = math.prod(sizes[a] for a in mode)
    match init:
        case "flora":
            return jax.random.normal(key, shape) * (0.5 / rank) ** 0.5
        case "loralib":
            return jax.random.normal(key, shape) * 0.02
        case "gaussian":
            return jax.random.normal(key, shape) / rank
        case "orthonormal":
            return _over_batch(
                lambda k: _orthonormal(k, width, rank), plan, word, key, shape
            )
    # torch stores the input factor [r, in] and every other factor [d, r].
    bound = (width if inputs else rank) ** -0.5
    return jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _over_batch(
    make: Callable[[jax.Array], Array],
    plan: LeafPlan,
    word: str,
    key: jax.Array,
    shape: tuple[int, ...],
) -> Array:
    count = math.prod(plan.sizes[a] for a in word if a in plan.axes.batch)
    return jax.vmap(make)(jax.random.split(key, count)).reshape(shape)


def _orthonormal(key: jax.Array, width: int, rank: int) -> Array:
    """Return a uniformly drawn [width, rank] with orthonormal columns."""
    q, r = jnp.linalg.qr(jax.random.normal(key, (width, rank)))
    return q * jnp.sign(jnp.diagonal(r))[None]


def _from_weight(plan: LeafPlan, weight: Array, scale: float) -> Parts:
    """Return factors whose delta, times the scale, is the weight's leading part."""
    axes, sizes = plan.axes, plan.sizes
    batch = axes.batch
    if plan.method == "lora":
        modes = [axes.kernel + axes.ins, axes.outs]
        ranks = plan.ranks * 2
    else:
        words = [word for part, word in plan.labels if part.startswith("factor")]
        modes = ["".join(a for a in word[:-1] if a not in batch) for word in words]
        ranks = plan.ranks
    order = [axes.axes.index(a) for a in batch + "".join(modes)]
    widths = [math.prod(sizes[a] for a in mode) for mode in modes]
    blocks = weight.astype(jnp.float32).transpose(order).reshape(-1, *widths)
    core, factors = jax.vmap(lambda block: hosvd(block, ranks))(blocks)
    shapes = plan.shapes
    if plan.method == "lora":
        # In two modes the core is diagonal; half of it goes to each side.
        root = jnp.sqrt(jnp.abs(jnp.diagonal(core, axis1=1, axis2=2)) / scale)
        b = jnp.einsum("brs,bos->bro", core / scale, factors[1])
        b = b / root[:, :, None]
        return {
            "a": (factors[0] * root[:, None]).reshape(shapes["a"]),
            "b": b.reshape(shapes["b"]),
        }
    parts = {"core": (core / scale).reshape(shapes["core"])}
    names = [part for part, _ in plan.labels if part.startswith("factor")]
    for part, factor in zip(names, factors, strict=True):
        parts[part] = factor.reshape(shapes[part])
    return parts
