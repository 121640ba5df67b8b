"""Softmax attention inside the segments of packed rows."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, Int

from uoe_jax import checks
from uoe_jax.errors import ConfigError
from uoe_jax.ops.dispatch import dispatch
from uoe_jax.ops.segment_attention import reference, xla
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton
from uoe_jax.ops.segment_attention.tpu import mosaic as mosaic_tpu

# In order of preference; `implementation=None` takes the first that can serve.
BACKENDS = {
    "mosaic_tpu": mosaic_tpu.segment_attention,
    "mosaic_gpu": mosaic_gpu.segment_attention,
    "triton": triton.segment_attention,
    "xla": xla.segment_attention,
    "reference": reference.segment_attention,
}


def _settle(given: checks.Given) -> None:
    checks.floats(given, "q", "M G H")
    checks.floats(given, "k", "M H")
    checks.floats(given, "v", "M H")
    checks.ints(given, "offsets", "S+1")
    checks.ascending(given, "offsets", given["q"].shape[0])
    checks.flag(given, "causal")
    checks.whole(given, "window", optional=True)
    checks.number(given, "scale")
    checks.backend(given)
    if given["sink"] is not None:
        checks.floats(given, "sink", "M G")
        if given["sink"].shape != given["q"].shape[:2]:
            raise ConfigError(
                f"sink is {list(given['sink'].shape)} beside q "
                f"{list(given['q'].shape)}; each row and query head needs one"
            )
    if given["bounds"] is not None:
        given["bounds"] = _settle_bounds(given["bounds"], given["q"].shape[0])


def _settle_bounds(bounds: Any, rows: int) -> tuple[Any, Any]:
    if not isinstance(bounds, (tuple, list)) or len(bounds) != 2:
        raise ConfigError(
            f"bounds is {type(bounds).__name__}; it must be (first, last), arrays [M] "
            "of the rows that each row may see"
        )
    ends = dict(zip(("first bounds", "last bounds"), bounds, strict=True))
    for name in ends:
        checks.ints(ends, name, "M")
        if ends[name].shape[0] != rows:
            raise ConfigError(
                f"{name} are {ends[name].shape[0]} for {rows} rows; each needs one"
            )
    return ends["first bounds"], ends["last bounds"]


@checks.checked(_settle)
def segment_attention(
    q: Float[Array, "M G H"],
    k: Float[Array, "Mk Hk"],
    v: Float[Array, "Mv Hv"],
    offsets: Int[Array, " S1"],
    *,
    causal: bool,
    window: int | None = None,
    bounds: tuple[Int[Array, " M"], Int[Array, " M"]] | None = None,
    sink: Float[Array, "M2 G2"] | None = None,
    scale: float | None = None,
    implementation: str | None = None,
) -> Float[Array, "M G H"]:
    """Return attention of each row to the rows of its own segment.

    Segment s is rows `offsets[s]:offsets[s + 1]`; it may be empty. Rows past
    `offsets[-1]` return zeros and get zero gradients. G query heads share one
    key/value row. FlashAttention-2 (arXiv 2307.08691), equations of section 3.

    Args:
      q: queries.
      k: keys `[M, H]`.
      v: values `[M, H]`.
      offsets: ascending first rows of the segments and the end of the last.
      causal: row i sees only rows j <= i.
      window: row i sees only rows with |i - j| < window.
      bounds: first and last row of its segment that each row may see, as where a
        segment holds several documents; a row always sees itself.
      sink: logits [M, G] of what each row may attend to instead, whose value is zero.
      scale: factor of the scores; None: 1 / sqrt(H).
      implementation: backend name; None: the fastest that can serve.

    Raises:
      ConfigError: ranks, shapes or dtypes that don't fit, offsets that descend or
        end past the rows, window < 1, unknown or unfit backend.
    """
    want = (q.shape[0], q.shape[2])
    if k.shape != want or v.shape != want:
        raise ConfigError(
            f"k is {list(k.shape)} and v {list(v.shape)} beside q {list(q.shape)}; "
            f"both need q's rows and head width, {list(want)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ConfigError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; cast them to one dtype"
        )
    if offsets.shape[0] < 2:
        raise ConfigError(
            f"offsets has {offsets.shape[0]} entries; S segments need S + 1 >= 2"
        )
    if window is not None and window < 1:
        raise ConfigError(f"window is {window}; rows it sees must be >= 1, or None")
    return dispatch(
        "segment_attention",
        BACKENDS,
        implementation,
        Call(
            q,
            k,
            v,
            offsets,
            Mask(causal, window),
            scale=q.shape[2] ** -0.5 if scale is None else scale,
            bounds=bounds,
            sink=sink,
        ),
    )
