"""A router of tokens by kernels of NVIDIA GPUs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32

from uoe_jax.ops import nvidia
from uoe_jax.ops.split_matmul import PIECES, split

MOST_EXPERTS = 64  # whose scores of 64 tokens fit into a program's registers
ROWS = 64  # tokens of a program, forward; at a time, backward
BLOCK = 64  # inputs that a program takes at a time, forward
COLUMNS = 128  # inputs of a program, backward
PROGRAMS = 2  # a multiprocessor, backward
WARPS = 4
SCALARS = 4  # places behind a program's sums by expert: z, entropy, two that are free


def require(x: Float[Array, "*N D"], weight: Float[Array, "D E"]) -> None:
    """Return if the kernels can serve such arrays here.

    Raises:
      NotImplementedError: no fit device, package or dtype, an empty array, too many
        experts.
    """
    nvidia.require(x.dtype)
    if weight.dtype != jnp.float32:
        raise NotImplementedError(f"it takes float32 weights, not {weight.dtype}")
    if 0 in (*x.shape, *weight.shape):
        raise NotImplementedError("it takes no empty arrays")
    if weight.shape[1] > MOST_EXPERTS:
        raise NotImplementedError(f"{weight.shape[1]} experts; it takes {MOST_EXPERTS}")


def pick_experts(
    x: Float[Array, "N D"],
    weight: Float32[Array, "D E"],
    bias: Float[Array, " E"],
    counted: Float32[Array, " N"] | None,
    *,
    top_k: int,
) -> tuple[Array, ...]:
    """Return the fields of a `Picked`.

    Raises:
      NotImplementedError: see `require`.
    """
    require(x, weight)
    return _pick(x, weight, bias.astype(jnp.float32), counted, top_k)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _pick(x, weight, bias, counted, top_k):
    return _forward(x, weight, bias, counted, top_k)[0]


def _forward(x, weight, bias, counted, top_k):
    scores, picks, chosen, parts = route(
        x, pieces(weight, x.dtype), bias, counted, top_k
    )
    experts, block = weight.shape[1], _block(weight.shape[1])
    total = jnp.sum(parts, axis=0)
    counts, probs = total[:experts], total[block : block + experts]
    z, entropy = total[2 * block], total[2 * block + 1]
    return (picks, chosen, counts, probs, z, entropy), scores


def _pick_fwd(x, weight, bias, counted, top_k):
    out, scores = _forward(x, weight, bias, counted, top_k)
    return out, (x, weight, counted, scores, out[0])


def _pick_bwd(top_k, saved, grads):
    del top_k
    x, weight, counted, scores, picks = saved
    _, d_chosen, _, d_probs, d_z, d_entropy = grads
    missing = _block(weight.shape[1]) - weight.shape[1]
    d_sums = jnp.concatenate(
        [jnp.pad(d_probs, (0, missing)), d_z[None], d_entropy[None]]
    )
    d_scores = score_grads(scores, picks, d_chosen, d_sums, counted)
    dx, parts = product_grads(x, pieces(weight, x.dtype), d_scores)
    return dx, jnp.sum(parts, axis=0)[:, : weight.shape[1]], None, None


_pick.defvjp(_pick_fwd, _pick_bwd)


def pieces(weight: Float32[Array, "D E"], dtype: jnp.dtype) -> Float[Array, "P D E2"]:
    """Return a weight's bfloat16 pieces, or itself beside inputs of another dtype.

    Experts are filled up with zeros to what a program's product takes.
    """
    missing = _block(weight.shape[1]) - weight.shape[1]
    parts = split(weight) if dtype == jnp.bfloat16 else [weight]
    return jnp.pad(jnp.stack(parts), ((0, 0), (0, 0), (0, missing)))


def _block(experts: int) -> int:
    return max(16, 1 << (experts - 1).bit_length())


@functools.partial(jax.jit, static_argnums=4)
def route(
    x: Float[Array, "N D"],
    weight: Float[Array, "P D E2"],
    bias: Float32[Array, " E"],
    counted: Float32[Array, " N"] | None,
    top_k: int,
) -> list[Array]:
    """Return scores, picks, their scores, and each program's sums."""
    from uoe_jax.ops.router import kernels

    (count, width), experts = x.shape, bias.shape[0]
    programs = -(-count // ROWS)
    return nvidia.launch(
        kernels.route,
        x,
        weight,
        bias,
        bias if counted is None else counted,
        out_shape=[
            ((count, experts), jnp.float32),
            ((count, top_k), jnp.int32),
            ((count, top_k), jnp.float32),
            ((programs, 2 * weight.shape[2] + SCALARS), jnp.float32),
        ],
        grid=programs,
        num_warps=WARPS,
        num_stages=4,
        N=count,
        D=width,
        E=experts,
        EE=weight.shape[2],
        K=top_k,
        SPLIT=weight.shape[0] == PIECES,
        COUNTED=counted is not None,
        SCALARS=SCALARS,
        ROWS=ROWS,
        BLOCK=BLOCK,
    )


@jax.jit
def score_grads(
    scores: Float32[Array, "N E"],
    picks: Int32[Array, "N X"],
    d_chosen: Float32[Array, "N X"],
    d_sums: Float32[Array, " S"],
    counted: Float32[Array, " N"] | None,
) -> Float32[Array, "N E2"]:
    """Return the gradient of scores by those of the picks' scores and of the sums."""
    from uoe_jax.ops.router import kernels

    (count, experts), block = scores.shape, _block(scores.shape[1])
    return nvidia.launch(
        kernels.score_grads,
        scores,
        picks,
        d_chosen,
        d_sums,
        d_sums if counted is None else counted,
        out_shape=((count, block), jnp.float32),
        grid=-(-count // ROWS),
        num_warps=WARPS,
        num_stages=1,
        N=count,
        E=experts,
        EE=block,
        K=picks.shape[1],
        COUNTED=counted is not None,
        ROWS=ROWS,
    )


@jax.jit
def product_grads(
    x: Float[Array, "N D"],
    weight: Float[Array, "P D E2"],
    d_scores: Float32[Array, "N E2"],
) -> list[Array]:
    """Return the gradient of x, and parts of the weight's that are to be added."""
    from uoe_jax.ops.router import kernels

    (count, width), (parts, _, block) = x.shape, weight.shape
    few = parts == PIECES and block < MOST_EXPERTS
    across = -(-width // COLUMNS)
    run = -(-count * across // (PROGRAMS * nvidia.cores()))
    run = -(-run // ROWS) * ROWS
    runs = -(-count // run)
    return nvidia.launch(
        kernels.product_grads,
        x,
        weight,
        d_scores,
        out_shape=[
            (x.shape, x.dtype),
            ((runs, width, block), jnp.float32),
        ],
        grid=runs * across,
        num_warps=WARPS if few else 2 * WARPS,  # which have the registers for more
        num_stages=3,
        N=count,
        D=width,
        EE=block,
        SPLIT=parts == PIECES,
        RUN=run,
        ACROSS=across,
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
