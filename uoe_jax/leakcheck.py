"""Leak tests for any model: perturb what an output may not depend on, see what moves.

Logits and routing choices are both compared: a choice that moves is a leak even where
the logits hide it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.model import Decoder, make_model

# (inputs, segments or None) -> (logits, choices by part [L, B, T, X])
Forward = Callable[[Array, Array | None], tuple[Array, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Finding:
    """Outcome of one check: what was perturbed, what moved and by how much."""

    check: str
    perturbed: str
    moved: str
    max_diff: float
    passed: bool


def check_future(
    forward: Forward,
    tokens: Int[Array, "B T"],
    other: Int[Array, "B T"],
    tolerance: float,
) -> Finding:
    """Replace the tokens from t on by `other`'s; nothing before t may move."""
    length = tokens.shape[1]
    base = forward(tokens, None)
    diffs = _Diffs(tolerance)
    cuts = sorted({1, length // 3, length // 2, 2 * length // 3, length - 1} - {0})
    for cut in cuts:
        keep = jnp.arange(length)[None] < cut
        changed = forward(jnp.where(keep, tokens, other), None)
        diffs.compare(base, changed, np.s_[:, :cut], f"before token {cut}")
    return diffs.finding("future", f"tokens from {', '.join(map(str, cuts))} on")


def check_rows(
    forward: Forward, inputs: Array, other: Array, tolerance: float
) -> Finding:
    """Replace all other samples of the batch; a sample may not move."""
    base = forward(inputs, None)
    diffs = _Diffs(tolerance)
    rows = inputs.shape[0]
    for row in range(rows):
        mine = (jnp.arange(rows) == row).reshape(-1, *[1] * (inputs.ndim - 1))
        changed = forward(jnp.where(mine, inputs, other), None)
        diffs.compare(base, changed, np.s_[row : row + 1], f"sample {row}")
    return diffs.finding("rows", "the other samples of the batch")


def check_padding(
    forward: Forward,
    tokens: Int[Array, "B T"],
    other: Int[Array, "B T"],
    tolerance: float,
    per_token: bool,
) -> Finding:
    """Replace padding, before and after the real tokens; these may not move."""
    length = tokens.shape[1]
    diffs = _Diffs(tolerance)
    for begin, end in ((0, length // 2), (length // 3, length)):
        index = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
        real = (index >= begin) & (index < end)
        segments = real.astype(jnp.int32)
        base = forward(tokens, segments)
        changed = forward(jnp.where(real, tokens, other), segments)
        where = f"real tokens {begin} to {end - 1}"
        span = np.s_[:, begin:end]
        diffs.compare(base, changed, span, where, None if per_token else np.s_[:])
    return diffs.finding("padding", "tokens with segment 0")


def check_documents(
    forward: Forward,
    tokens: Int[Array, "B T"],
    other: Int[Array, "B T"],
    tolerance: float,
) -> Finding:
    """Replace one document of a pack; the other may not move."""
    length = tokens.shape[1]
    cut = length // 2
    index = jnp.broadcast_to(jnp.arange(length)[None], tokens.shape)
    segments = 1 + (index >= cut).astype(jnp.int32)
    base = forward(tokens, segments)
    diffs = _Diffs(tolerance)
    for document, span in ((1, np.s_[:, :cut]), (2, np.s_[:, cut:])):
        changed = forward(jnp.where(segments == document, tokens, other), segments)
        diffs.compare(base, changed, span, f"document {document}")
    return diffs.finding("documents", "the other document of a pack")


def check_gradient(
    logits_of: Callable[[Float[Array, "B T D"]], Float[Array, "B T V"]],
    x: Float[Array, "B T D"],
    key: jax.Array,
    tolerance: float,
) -> Finding:
    """Differentiate the logits at each t by the embeddings; none after t may count."""
    index = jnp.arange(x.shape[1])

    @jax.jit
    def largest_after(x: Array) -> Array:
        logits, pullback = jax.vjp(logits_of, x)
        weights = jax.random.normal(key, logits.shape, logits.dtype)

        def of_position(t: Array) -> Array:
            (grad,) = pullback(jnp.where((index == t)[None, :, None], weights, 0))
            after = jnp.where((index > t)[None, :, None], jnp.abs(grad), 0)
            return jnp.max(after)

        return jax.lax.map(of_position, index)

    largest = np.asarray(largest_after(x), np.float32)
    worst = float(largest.max())
    passed = worst <= tolerance
    moved = "nothing" if passed else f"gradient of logits at {int(largest.argmax())}"
    return Finding("gradient", "embeddings after t", moved, worst, passed)


def leakcheck(
    model: nnx.Module, key: jax.Array, *, batch: int = 3, length: int | None = None
) -> list[Finding]:
    """Return the findings of every check that applies to a model of this package.

    Weights are used as they are, but computed with in float32: a leak is a matter of
    structure, and rounding would hide small ones. `length` defaults to at most 24.
    """
    config: ModelConfig = model.config  # pyrefly: ignore[missing-attribute]
    model = _as_float32(model, config)
    keys = jax.random.split(key, 3)
    tolerance = 1e-5

    @jax.jit
    def forward(inputs: Array, segments: Array | None) -> tuple[Array, dict[str, Any]]:
        options = {} if segments is None else {"segments": segments}
        logits, aux = model(inputs, collect_choices=True, **options)
        return logits, {part: stats["choices"] for part, stats in aux.items()}

    if config.kind == "vision":
        shape = (batch, config.image_size, config.image_size, config.image_channels)
        images, others = (jax.random.normal(k, shape) for k in keys[:2])
        return [check_rows(forward, images, others, tolerance)]
    shape = (batch, length or min(config.max_seq_len, 24))
    tokens, other = (
        jax.random.randint(k, shape, 0, config.vocab_size) for k in keys[:2]
    )
    per_token = config.causal or config.encoder_head != "classes"
    findings = [
        check_rows(forward, tokens, other, tolerance),
        check_padding(forward, tokens, other, tolerance, per_token=per_token),
    ]
    if isinstance(model, Decoder):
        positions = jnp.broadcast_to(jnp.arange(shape[1])[None], shape)
        logits_of = lambda x: model.logits(model.hidden_from_embeddings(x)[0])
        x = model.embed(tokens, positions)
        findings.insert(0, check_future(forward, tokens, other, tolerance))
        findings += [
            check_documents(forward, tokens, other, tolerance),
            check_gradient(logits_of, x, keys[2], tolerance),
        ]
    return findings


def format_findings(findings: list[Finding]) -> str:
    """Return the findings as a plain text table."""
    head = ("check", "perturbed", "moved", "max diff", "result")
    rows = [head] + [
        (
            f.check,
            f.perturbed,
            f.moved,
            f"{f.max_diff:.2g}",
            "ok" if f.passed else "LEAK",
        )
        for f in findings
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) for r in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


def _verdict(finding: Finding) -> str:
    return "ok" if finding.passed else "LEAK"


class _Diffs:
    """Largest difference seen and where the first one was."""

    def __init__(self, tolerance: float):
        self.tolerance = tolerance
        self.largest = 0.0
        self.moved: list[str] = []

    def compare(
        self,
        base: tuple[Array, dict[str, Array]],
        changed: tuple[Array, dict[str, Array]],
        span: Any,
        where: str,
        logits_span: Any = None,
    ) -> None:
        """Compare logits [B, ...] and choices [L, B, T, X] inside a [B, T] span."""
        span = span if isinstance(span, tuple) else (span,)
        if logits_span is None:
            logits_span = span
        a, b = (np.asarray(logits)[logits_span] for logits, _ in (base, changed))
        diff = float(np.max(np.abs(a - b))) if np.isfinite(a - b).all() else np.inf
        self.largest = max(self.largest, diff)
        if diff > self.tolerance * max(1.0, float(np.max(np.abs(a)))):
            self.moved.append(f"logits of {where}")
        for part, choices in base[1].items():
            pair = (choices, changed[1][part])
            a, b = (np.asarray(c)[(slice(None), *span)] for c in pair)
            if not np.array_equal(a, b):
                self.moved.append(f"{part} choices of {where}")

    def finding(self, check: str, perturbed: str) -> Finding:
        """Return the outcome."""
        moved = self.moved[0] if self.moved else "nothing"
        if len(self.moved) > 1:
            moved += f" and {len(self.moved) - 1} more"
        return Finding(check, perturbed, moved, self.largest, not self.moved)


def _as_float32(model: nnx.Module, config: ModelConfig) -> nnx.Module:
    """Return the model with the same weights, computing in float32."""
    config = dataclasses.replace(config, compute_dtype="float32", float8="none")
    shapes = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    graphdef = nnx.split(shapes)[0]
    return nnx.merge(graphdef, nnx.split(model)[1])
