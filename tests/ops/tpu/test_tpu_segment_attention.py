from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops.tpu import tpu_oracle
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.tpu import mosaic as mosaic_tpu
from uoe_jax.ops.segment_attention.tpu import parts


def test_a_missing_wait_is_caught(monkeypatch):
    def careless(self, count, use):
        def body(index, _):
            pl_when = index + 1 < count
            jax.lax.cond(pl_when, lambda: self.start(index + 1), lambda: None)
            use(index, jax.lax.rem(index, 2))
            self._each(index, lambda copy: copy.wait())

        jax.lax.fori_loop(0, count, body, None)

    monkeypatch.setattr(parts.Ring, "run", careless)
    draw = np.random.default_rng(3)
    q, k, v = (jnp.asarray(draw.normal(size=(500, 64)), jnp.float32) for _ in range(3))
    offsets = jnp.asarray([0, 500], jnp.int32)
    attend = lambda q, k, v: mosaic_tpu.segment_attention(
        Call(q[:, None], k, v, offsets, Mask(causal=True), 0.125)
    )
    out, races = tpu_oracle.interpreted(attend, q, k, v, rows=256, chunk=256)
    assert races or not np.isfinite(np.asarray(out)).all()
