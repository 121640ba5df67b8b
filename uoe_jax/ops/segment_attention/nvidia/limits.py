"""What both kernels of NVIDIA GPUs ask of a call."""

from __future__ import annotations

import numbers

import jax.numpy as jnp

from uoe_jax.ops.segment_attention.call import Call


def check_call(call: Call, widths: tuple[int, ...]) -> None:
    """Return if a call has a dtype, a head width and a scale that kernels take.

    Their softmax multiplies scores by scale * log2(e) after it has found the largest,
    so the scale must be positive, and a number when the kernel is compiled.

    Raises:
      NotImplementedError: it hasn't.
    """
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"it takes bfloat16 or float16, not {call.q.dtype}")
    if call.q.shape[2] not in widths:
        *first, last = map(str, widths)
        raise NotImplementedError(
            f"heads of {call.q.shape[2]}; it takes {', '.join(first)} or {last}"
        )
    if not isinstance(call.scale, numbers.Real) or call.scale <= 0:
        raise NotImplementedError(f"scale is {call.scale}; it takes a number above 0")
