"""Softmax attention of whole sequences, or of the documents packed in them."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtyping import Array, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.as_segments import packed_attention, packed_attention_on_tpu
from uoe_jax.ops.dense_attention import cudnn, peers, reference, splash, xla
from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton

# In order of preference where nothing was measured near a call's shape: the first that
# can serve. Libraries of others come last, so that only a measurement chooses them.
BACKENDS = {
    "cudnn": cudnn.dense_attention,
    "splash": splash.dense_attention,
    "mosaic_tpu": packed_attention_on_tpu,
    "mosaic_gpu": partial(packed_attention, mosaic_gpu.segment_attention),
    "triton": partial(packed_attention, triton.segment_attention),
    "xla": xla.dense_attention,
    "reference": reference.dense_attention,
    "tokamax": peers.tokamax,
    "linear_attention": peers.linear_attention,
}


def call_shape(q: Float[Array, "B T N H"], causal: bool) -> dict[str, Any]:
    """Return what a plain call's fastest backend depends on."""
    batch, length, heads, width = q.shape
    return {
        "sequences": batch * heads,
        "length": length,
        "width": width,
        "causal": causal,
        "dtype": q.dtype.name,
    }


def _settle(given: checks.Given) -> None:
    checks.floats(given, "q", "B T N H")
    checks.floats(given, "k", "B T K H")
    checks.floats(given, "v", "B T K H")
    checks.flag(given, "causal")
    checks.whole(given, "window", optional=True)
    checks.number(given, "scale")
    checks.backend(given)
    if given["sink"] is not None:
        checks.floats(given, "sink", "N")
        if given["sink"].shape != given["q"].shape[2:3]:
            raise ConfigError(
                f"sink is {list(given['sink'].shape)} beside q "
                f"{list(given['q'].shape)}; each query head needs one"
            )
    if given["segments"] is not None:
        checks.ints(given, "segments", "B T")
        if given["segments"].shape != given["q"].shape[:2]:
            raise ConfigError(
                f"segments is {list(given['segments'].shape)} beside q "
                f"{list(given['q'].shape)}; each of its {list(given['q'].shape[:2])} "
                "tokens needs a document id"
            )


@checks.checked(_settle)
def dense_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "Bk Tk K Hk"],
    v: Float[Array, "Bv Tv Kv Hv"],
    *,
    causal: bool,
    segments: Int[Array, "B T"] | None = None,
    window: int | None = None,
    sink: Float[Array, " N2"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "B T N H"]:
    """Return attention of each token to the tokens of its sequence.

    Args:
      q: queries; N = G * K, heads that share a key head side by side.
      k: keys `[B, T, K, H]`.
      v: values `[B, T, K, H]`.
      causal: token t sees only tokens s <= t.
      segments: document ids; a token sees only its own run of equal ids.
      window: token t sees only tokens with |t - s| < window.
      sink: a logit [N] a head of what tokens may attend to instead, with value zero.
      scale: factor of the scores; None: 1 / sqrt(H).
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: ranks, shapes or dtypes that don't fit, window < 1, unknown or
        unfit backend.
    """
    batch, length, num_heads, width = q.shape
    want = (batch, length, k.shape[2], width)
    if k.shape != want or v.shape != want or not k.shape[2] or num_heads % k.shape[2]:
        raise ConfigError(
            f"k is {list(k.shape)} and v {list(v.shape)} beside q {list(q.shape)}; "
            f"both need [{batch}, {length}, K, {width}] with K dividing {num_heads}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype"
        )
    if window is not None and window < 1:
        raise ConfigError(f"window is {window}; tokens it sees must be >= 1, or None")
    # Tables hold plain calls; others go by the order above.
    plain = segments is None and window is None and sink is None
    shape = call_shape(q, causal) if plain else None
    return dispatch(
        "dense_attention",
        BACKENDS,
        implementation,
        Call(
            q,
            k,
            v,
            Mask(causal, window),
            segments,
            scale=width**-0.5 if scale is None else scale,
            sink=sink,
        ),
        shape=shape,
    )
