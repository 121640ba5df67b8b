"""What dense attention is asked for: one object, from the call to the kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.varying import vary_together

_ARRAYS = ("q", "k", "v", "segments", "sink")


@dataclass(frozen=True)
class Call:
    """Attention of whole sequences, as `dense_attention` defines it.

    Tokens with `segments` see only their own run of equal ids; None: all are one.
    `sink` is a logit a head that its softmaxes have beside their scores.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    mask: Mask
    segments: Int[Array, "B T"] | None
    scale: float
    sink: Float[Array, " N"] | None = None

    def together(self) -> Call:
        """Return the call with arrays that vary over the same mesh axes."""
        given = {name: getattr(self, name) for name in _ARRAYS}
        given = {name: a for name, a in given.items() if a is not None}
        arrays = vary_together(*given.values())
        return dataclasses.replace(self, **dict(zip(given, arrays, strict=True)))
