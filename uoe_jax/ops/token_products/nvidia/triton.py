"""Products of single tokens with the experts they picked, on NVIDIA GPUs.

A program reads the weights of a few outputs of one pick, and no others'. Where more
picks are made than there are experts, XLA's product with all of them is as fast.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float

from uoe_jax.ops import nvidia

WIDEST = 16384  # inputs that a program holds at once
# Weights that a program reads, and its warps: where it computes the norm too, more of
# them share that.
AREA, WARPS = 4096, 1
NORM_AREA, NORM_WARPS = 8192, 4
# Of sums into the residual: inputs and outputs of a program at a time.
ADD_INPUTS, ADD_OUTPUTS, ADD_WARPS = 1024, 8, 4
# Where a program joins parts first: of all inputs at once, or of several times as many.
JOINED_OUTPUTS = 16, 4
WIDTH = 128  # inputs of a piece, at most


def require(dtype: Any, batch: int, experts: int, picks: Any) -> None:
    """Return if the kernels serve a call.

    Raises:
      NotImplementedError: no fit device, package or dtype; slots by expert, or a batch
        whose rows share their weights.
    """
    nvidia.require(dtype)
    if picks is not None and not picks.by_pick:
        raise NotImplementedError("it takes slots by pick, not by expert")
    if picks is None and batch > 1:
        raise NotImplementedError(
            f"{batch} rows share the weights of one expert; it takes 1"
        )


def project(
    x: Float[Array, "B I"], projection: Any, norm: Any, picks: Any, dtype: Any
) -> Float[Array, "B X O"]:
    """Return act(norm(x) weight + bias) of each row's picks.

    Raises:
      NotImplementedError: as `require`, or a wider input than it holds.
    """
    require(x.dtype, x.shape[0], projection.weight.shape[0], picks)
    inputs = projection.weight.shape[-1]
    if inputs > WIDEST:
        raise NotImplementedError(f"inputs are {inputs} wide; it takes {WIDEST}")
    return _project(x, projection, norm, picks, dtype)


def add(
    parts: Any, addition: Any, residual: Float[Array, "B O"], picks: Any
) -> Float[Array, "B O"]:
    """Return the residual plus the bias plus the products of all picks, summed.

    Raises:
      NotImplementedError: as `require`.
    """
    require(residual.dtype, residual.shape[0], addition.weight.shape[1], picks)
    return _add(parts, addition, residual, picks)


def power(number: int, least: int = 1) -> int:
    """Return the least power of two that is neither below `number` nor `least`."""
    return max(least, 1 << (number - 1).bit_length())


def _project(x, projection, norm, picks, dtype):
    from uoe_jax.ops.token_products.nvidia import kernels

    weight, bias = projection.weight, projection.bias
    _, sides, outputs, inputs = weight.shape
    chosen = 1 if picks is None else picks.experts.shape[1]
    area, warps = (AREA, WARPS) if norm is None else (NORM_AREA, NORM_WARPS)
    block = max(1, area // power(inputs))
    # An argument that isn't there is never read: anything stands for it.
    return nvidia.launch(
        kernels.project,
        x,
        x if norm is None else norm.scale,
        weight,
        x if bias is None else bias,
        x if projection.scales is None else projection.scales,
        x if picks is None else picks.experts,
        x if picks is None else picks.gates,
        out_shape=((x.shape[0], chosen, outputs), dtype),
        grid=x.shape[0] * chosen * -(-outputs // block),
        num_warps=warps,
        num_stages=1,
        small=True,
        I=inputs,
        II=power(inputs),
        O=outputs,
        X=chosen,
        BLOCK=block,
        ACTIVATION=projection.activation,
        BIAS=bias is not None,
        SCALED=projection.scales is not None,
        GATED=picks is not None and projection.activation != "none",
        ROUTED=picks is not None,
        NORM=norm is not None,
        EPS=0.0 if norm is None else norm.eps,
        APART=projection.apart,
    )


def _add(parts, addition, residual, picks):
    from uoe_jax.ops.token_products.nvidia import kernels

    values, weight = parts.values, addition.weight
    batch, splits, chosen, inputs = values.shape
    outputs, experts, _ = weight.shape
    heads = parts.width if splits > 1 else inputs
    # A piece is of one head, whose parts have one sum; a divisor wastes nothing.
    divisor = min(heads & -heads, WIDTH)
    width = divisor if divisor >= 16 or splits > 1 else min(power(inputs, 16), WIDTH)
    pieces = min(power(chosen * -(-inputs // width)), max(1, ADD_INPUTS // width))
    block = ADD_OUTPUTS
    if splits > 1:
        block = JOINED_OUTPUTS[chosen * inputs > ADD_INPUTS]
    block = min(power(outputs), block)
    bias = addition.bias
    return nvidia.launch(
        kernels.add,
        values,
        values if parts.sums is None else parts.sums,
        residual if picks is None else picks.gates,
        weight,
        residual if bias is None else bias,
        residual if addition.scales is None else addition.scales,
        residual if picks is None else picks.experts,
        residual,
        out_shape=(residual.shape, residual.dtype),
        grid=batch * -(-outputs // block),
        num_warps=ADD_WARPS,
        num_stages=1,
        small=True,
        I=inputs,
        O=outputs,
        X=chosen,
        E=experts,
        H=heads,
        SPLITS=splits,
        BLOCK=block,
        PIECES=pieces,
        WIDTH=width,
        BIAS=bias is not None,
        SCALED=addition.scales is not None,
        GATED=addition.gated and picks is not None,
        ROUTED=picks is not None,
    )
