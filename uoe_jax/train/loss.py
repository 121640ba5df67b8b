"""Cross-entropy of language models and classifiers, without whole logits in memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.model import Decoder
from uoe_jax.varying import vary_together, zeros_varying

Pytree = Any


def output_layer(model: Decoder) -> tuple[Array, Array | None]:
    """Return the weight [D, V] and bias [V] that make a decoder's logits."""
    if model.head is None:
        return model.embed.embedding[...].T, None
    bias = model.head.bias
    return model.head.weight[...], None if bias is None else bias[...]


class LossSums(NamedTuple):
    """Sums over examples or tokens, each times its weight."""

    objective: Float[Array, ""]  # what is minimised: with smoothing and z-loss
    nll: Float[Array, ""]  # negative log-likelihood, nats


class TokenScores(NamedTuple):
    """Per token: negative log-likelihood in nats, and whether the argmax is right."""

    nll: Float[Array, " N"]
    correct: Bool[Array, " N"]


class Taught(NamedTuple):
    """What a frozen teacher says of the same tokens: its logits, not yet multiplied."""

    x: Float[Array, "N D2"]
    weight: Float[Array, "D2 V"]
    bias: Float[Array, " V"] | None


class LossTerms(NamedTuple):
    """What the objective is made of; `share` and `temperature` are of a teacher."""

    chunk: int  # tokens whose logits are alive at once
    z_loss: float = 0.0
    smoothing: float = 0.0
    share: float = 0.0
    temperature: float = 1.0


def linear_cross_entropy(
    x: Float[Array, "N D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " N"],
    token_weights: Float[Array, " N"],
    terms: LossTerms,
    taught: Taught | None = None,
) -> LossSums:
    """Return weighted sums of the cross-entropy of the logits `x @ weight + bias`.

    Logits exist for `chunk` tokens at a time, in x's dtype (products accumulate in
    float32); everything from there on is float32. Differentiation computes the gradient
    in the same pass over the chunks, so nothing is recomputed; only `objective` has
    one, to `x`, `weight` and `bias`.
    objective: `(1-s) nll + s (logsumexp - mean logit) + z_loss logsumexp^2`
    (Szegedy et al. 2016, section 7; z-loss as in PaLM, Chowdhery et al. 2022); with a
    teacher of logits t, `(1-share)` times that and `share T^2` times the cross-entropy
    of softmax(logits/T) to softmax(t/T) (Hinton et al. 2015, section 2).
    """
    said, tree = jax.tree.flatten(taught)
    x, weight, targets, token_weights, *said = vary_together(
        x, weight, targets, token_weights, *said
    )
    if bias is not None:
        bias, _ = vary_together(bias, x)
    taught = jax.tree.unflatten(tree, said)
    return _chunked_loss(x, weight, bias, targets, token_weights, taught, terms)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _chunked_loss(
    x: Array,
    weight: Array,
    bias: Array | None,
    targets: Array,
    token_weights: Array,
    taught: Taught | None,
    terms: LossTerms,
) -> LossSums:
    w, teach = weight.astype(x.dtype), _teacher_logits(taught)

    def body(sums: LossSums, part: Pytree) -> tuple[LossSums, None]:
        xc, tc, wc, other = part
        logits = _logits(xc, w, bias, x.dtype)
        objective, nll, _ = _token_losses(logits, tc, terms)
        if taught is not None:
            soft, _ = _soft_losses(logits, teach(other), terms.temperature)
            objective = (1 - terms.share) * objective + terms.share * soft
        return _add(sums, LossSums(jnp.sum(objective * wc), jnp.sum(nll * wc))), None

    zero = zeros_varying((), jnp.float32, x)
    rows = (x, targets, token_weights, None if taught is None else taught.x)
    parts = _chunked(rows, terms.chunk)
    return jax.lax.scan(body, LossSums(zero, zero), parts)[0]


def _forward(
    x: Array,
    weight: Array,
    bias: Array | None,
    targets: Array,
    token_weights: Array,
    taught: Taught | None,
    terms: LossTerms,
) -> tuple[LossSums, Pytree]:
    w, teach = weight.astype(x.dtype), _teacher_logits(taught)
    z_loss, smoothing = terms.z_loss, terms.smoothing

    def body(carry: Pytree, part: Pytree) -> tuple[Pytree, Array]:
        sums, d_weight, d_bias = carry
        xc, tc, wc, other = part
        logits = _logits(xc, w, bias, x.dtype)
        objective, nll, lse = _token_losses(logits, tc, terms)
        d_logits = jnp.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
        vocab = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
        hit = vocab == tc[:, None].astype(jnp.int32)
        d_logits -= jnp.where(hit, 1 - smoothing, 0.0) + smoothing / logits.shape[1]
        if taught is not None:
            soft, d_soft = _soft_losses(logits, teach(other), terms.temperature)
            objective = (1 - terms.share) * objective + terms.share * soft
            d_logits = (1 - terms.share) * d_logits + terms.share * d_soft
        d_logits = d_logits * wc[:, None]
        if d_bias is not None:
            d_bias += jnp.sum(d_logits, axis=0)
        d_logits = d_logits.astype(x.dtype)
        dx = jax.lax.dot_general(d_logits, w, (((1,), (1,)), ((), ())))
        d_weight += jax.lax.dot_general(
            xc, d_logits, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
        )
        sums = _add(sums, LossSums(jnp.sum(objective * wc), jnp.sum(nll * wc)))
        return (sums, d_weight, d_bias), dx

    zeros = lambda a: zeros_varying(a.shape, jnp.float32, x)
    zero = zeros_varying((), jnp.float32, x)
    carry = (LossSums(zero, zero), *jax.tree.map(zeros, (weight, bias)))
    rows = (x, targets, token_weights, None if taught is None else taught.x)
    parts = _chunked(rows, terms.chunk)
    (sums, d_weight, d_bias), dx = jax.lax.scan(body, carry, parts)
    dx = dx.reshape(-1, x.shape[1])[: x.shape[0]]
    as_saved = lambda d, p: d.astype(p.dtype)
    return sums, (dx, *jax.tree.map(as_saved, (d_weight, d_bias), (weight, bias)))


def _backward(
    terms: LossTerms, saved: Pytree, ct: LossSums
) -> tuple[Array | None, ...]:
    del terms
    scale = lambda d: (d.astype(jnp.float32) * ct.objective).astype(d.dtype)
    return *jax.tree.map(scale, saved), None, None, None


_chunked_loss.defvjp(_forward, _backward)


def token_scores(
    x: Float[Array, "N D"],
    weight: Float[Array, "D V"],
    bias: Float[Array, " V"] | None,
    targets: Int[Array, " N"],
    chunk: int,
) -> TokenScores:
    """Return every token's loss and correctness, `chunk` tokens' logits at a time."""
    x, weight, targets = vary_together(x, weight, targets)
    w = weight.astype(x.dtype)

    def score(part: Pytree) -> TokenScores:
        xc, tc = part
        logits = _logits(xc, w, bias, jnp.float32)
        nll = _token_losses(logits, tc, LossTerms(chunk))[1]
        return TokenScores(nll, jnp.argmax(logits, axis=-1) == tc)

    scores = jax.lax.map(score, _chunked((x, targets), chunk))
    return jax.tree.map(lambda a: a.reshape(-1)[: x.shape[0]], scores)


def class_losses(
    logits: Float[Array, "B C"],
    labels: Int[Array, " B"],
    weights: Float[Array, " B"],
    z_loss: float = 0.0,
    smoothing: float = 0.0,
) -> LossSums:
    """Return weighted sums of a classifier's cross-entropy."""
    logits = logits.astype(jnp.float32)
    terms = LossTerms(len(labels), z_loss, smoothing)
    objective, nll, _ = _token_losses(logits, labels, terms)
    return LossSums(jnp.sum(objective * weights), jnp.sum(nll * weights))


def _logits(x: Array, w: Array, bias: Array | None, dtype: Any) -> Array:
    """Return float32 logits, rounded to `dtype` on their way through memory.

    In bfloat16 that halves what the softmax reads and writes: 5% of the step of a
    125M-parameter model on an H200.
    """
    logits = jnp.dot(x, w, preferred_element_type=dtype).astype(jnp.float32)
    return logits if bias is None else logits + bias[None].astype(jnp.float32)


def _teacher_logits(taught: Taught | None) -> Callable[[Array], Array]:
    """Return what gives the teacher's float32 logits of a chunk of its states."""
    if taught is None:
        return lambda x: x
    w = taught.weight.astype(taught.x.dtype)
    return lambda x: _logits(x, w, taught.bias, x.dtype)


def _soft_losses(
    logits: Array, teacher: Array, temperature: float
) -> tuple[Array, Array]:
    """Return T^2 times every row's cross-entropy to the teacher, and its gradient."""
    logits, teacher = logits / temperature, teacher / temperature
    lse = jax.nn.logsumexp(logits, axis=-1)
    wanted = jax.nn.softmax(teacher, axis=-1)
    loss = temperature**2 * (lse - jnp.sum(wanted * logits, axis=-1))
    return loss, temperature * (jnp.exp(logits - lse[:, None]) - wanted)


def _token_losses(
    logits: Array, targets: Array, terms: LossTerms
) -> tuple[Array, Array, Array]:
    """Return objective, negative log-likelihood and logsumexp of every row."""
    lse = jax.nn.logsumexp(logits, axis=-1)
    picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    nll = lse - picked
    objective = nll
    if terms.smoothing:
        uniform = lse - jnp.mean(logits, axis=-1)
        objective = (1 - terms.smoothing) * nll + terms.smoothing * uniform
    if terms.z_loss:
        objective = objective + terms.z_loss * jnp.square(lse)
    return objective, nll, lse


def _add(a: LossSums, b: LossSums) -> LossSums:
    return LossSums(a.objective + b.objective, a.nll + b.nll)


def _chunked(arrays: tuple[Array | None, ...], chunk: int) -> tuple[Any, ...]:
    """Split the leading axis into chunks, the last one filled with zeros."""
    rows = jax.tree.leaves(arrays)[0].shape[0]
    chunk = min(chunk, rows)
    count = -(-rows // chunk)

    def split(a: Array) -> Array:
        pad = [(0, count * chunk - rows)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, pad).reshape(count, chunk, *a.shape[1:])

    return jax.tree.map(split, arrays)
