"""What segment attention is asked for: one object, from the call to the kernels."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.varying import vary_together


class Mask(NamedTuple):
    """Which rows of its own segment a row sees."""

    causal: bool  # row i sees only rows j <= i
    window: int | None = None  # row i sees only rows with |i - j| < window

    def among(self, num_rows: int) -> Mask:
        """Return the same mask without a window that hides none of `num_rows` rows.

        Kernels add the window to row numbers, and a huge one would overflow.
        """
        if self.window is not None and self.window >= num_rows:
            return self._replace(window=None)
        return self


@dataclass(frozen=True)
class Call:
    """Attention of M rows inside their segments, as `segment_attention` defines it.

    `bounds` are the first and last row that each row may see; None: its whole segment.
    `sink` are logits that the rows' softmaxes have beside their scores.
    """

    q: Float[Array, "M G H"]
    k: Float[Array, "M H"]
    v: Float[Array, "M H"]
    offsets: Int[Array, " S1"]
    mask: Mask
    scale: float
    bounds: tuple[Int[Array, " M"], Int[Array, " M"]] | None = None
    sink: Float[Array, "M G"] | None = None

    @property
    def real(self) -> Bool[Array, " M"]:
        """Which rows are of a segment."""
        row = jnp.arange(self.q.shape[0], dtype=jnp.int32)
        return row < self.offsets[-1]

    def together(self) -> Call:
        """Return the call with arrays that vary over the same mesh axes."""
        q, k, v, offsets = vary_together(self.q, self.k, self.v, self.offsets)
        bounds = self.bounds
        if bounds is not None:
            first, last, _ = vary_together(*bounds, q)
            bounds = first, last
        sink = self.sink
        if sink is not None:
            sink, _ = vary_together(sink, q)
        parts = {"q": q, "k": k, "v": v, "offsets": offsets}
        return dataclasses.replace(self, **parts, bounds=bounds, sink=sink)
