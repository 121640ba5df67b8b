"""What dense attention is asked for: one object, from the call to the kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from jaxtyping import Array, Float, Int

from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.varying import vary_together


@dataclass(frozen=True)
class Call:
    """Attention of whole sequences, as `dense_attention` defines it.

    Tokens with `segments` see only their own run of equal ids; None: all are one.
    """

    q: Float[Array, "B T N H"]
    k: Float[Array, "B T K H"]
    v: Float[Array, "B T K H"]
    mask: Mask
    segments: Int[Array, "B T"] | None
    scale: float

    def together(self) -> Call:
        """Return the call with arrays that vary over the same mesh axes."""
        if self.segments is None:
            q, k, v = vary_together(self.q, self.k, self.v)
            return dataclasses.replace(self, q=q, k=k, v=v)
        q, k, v, ids = vary_together(self.q, self.k, self.v, self.segments)
        return dataclasses.replace(self, q=q, k=k, v=v, segments=ids)
