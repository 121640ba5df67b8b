"""AdamW and Muon with a schedule, clipping and a weight-decay mask, on any pytree."""

from __future__ import annotations

import math
import typing
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jaxtyping import Array, Int, PyTree
from optax.contrib import MuonDimensionNumbers

from uoe_jax.config import OptimConfig
from uoe_jax.errors import ConfigError, choose, shown
from uoe_jax.tree import leaf_name
from uoe_jax.weights import BLOCKS, find_weight, is_decayed

# Muon's updates have AdamW's usual size (Liu et al. 2025, section 2.2), so that a rate
# and a decay serve both.
MUON_RMS = 0.2
WSD_DECAY_FRACTION = 0.2  # share of the steps in which warm-up-stable-decay falls


def make_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
    """Return step -> learning rate over a run of `steps` steps.

    Step s of the warm-up has rate `learning_rate * (s + 1) / warmup_steps`; the last
    step has `learning_rate * final_lr_fraction` (constant: no decay).
    wsd: Hu et al. 2024 (MiniCPM), section 4.2, with a linear decay; wsd_sqrt: by
    1 - sqrt(share of the decay), which Hägele et al. 2024 (section 4.2) found better.
    """
    peak, final = config.learning_rate, config.learning_rate * config.final_lr_fraction
    warmup = config.warmup_steps
    decay = max(steps - 1 - warmup, 1)
    stable = 0
    match config.schedule:
        case "cosine":
            fall = optax.cosine_decay_schedule(peak, decay, config.final_lr_fraction)
        case "linear":
            fall = optax.linear_schedule(peak, final, decay)
        case "wsd" | "wsd_sqrt":
            length = min(cooldown_steps(steps), decay)
            stable = decay - length
            fall = optax.linear_schedule(peak, final, length)
            if config.schedule == "wsd_sqrt":
                fall = _sqrt_schedule(peak, final, length)
        case "constant":
            fall = optax.constant_schedule(peak)
        case unknown:
            raise ConfigError(f"schedule is {shown(unknown)}; no such schedule")
    pieces: list[optax.Schedule] = []
    boundaries: list[int] = []
    if warmup > 0:
        pieces.append(optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1)))
        boundaries.append(warmup)
    if stable > 0:
        pieces.append(optax.constant_schedule(peak))
        boundaries.append(warmup + stable)
    return optax.join_schedules([*pieces, fall], boundaries)


def cooldown_steps(steps: int) -> int:
    """Return how many of the last steps have a falling rate (wsd, wsd_sqrt)."""
    return max(round(WSD_DECAY_FRACTION * steps), 1)


def _sqrt_schedule(peak: float, final: float, length: int) -> optax.Schedule:
    """Return the fall from `peak` to `final` in `length` steps by 1 - sqrt(share)."""

    def rate(step: Any) -> Array:
        share = jnp.clip(jnp.asarray(step) / length, 0.0, 1.0)
        return peak - (peak - final) * jnp.sqrt(share)  # exactly the peak at first

    return rate


def decay_mask(params: PyTree) -> PyTree:
    """Return a tree of bools like `params`: True where weight decay acts."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: is_decayed(leaf_name(path)), params
    )


def _no_state(params: PyTree) -> optax.EmptyState:
    del params
    return optax.EmptyState()


def scale_routers(factor: float) -> optax.GradientTransformation:
    """Return a transformation that scales the updates of router parameters."""

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> Any:
        del params
        scaled = jax.tree_util.tree_map_with_path(
            lambda path, u: u * factor if "router" in leaf_name(path) else u, updates
        )
        return scaled, state

    return optax.GradientTransformation(_no_state, update)


def scale_by_step(schedule: optax.Schedule) -> optax.GradientTransformationExtraArgs:
    """Return a transformation by -rate(step), the step given to `update(step=...)`.

    The rate follows the run's step, so a skipped update doesn't shift the schedule.
    """

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, **extra: Any
    ) -> Any:
        del params
        rate = -jnp.asarray(schedule(extra["step"]), jnp.float32)
        return jax.tree.map(lambda u: u * rate, updates), state

    return optax.GradientTransformationExtraArgs(_no_state, update)


def muon_matrices(params: PyTree) -> PyTree:
    """Return a tree like `params`: which axes of a weight make a matrix, None: none do.

    Those of attention and MLP. Layers and experts are matrices of their own: an
    expert's update depends on no other expert.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> MuonDimensionNumbers | None:
        name = leaf_name(path)
        weight = find_weight(name)
        if weight is None or not name.startswith(BLOCKS) or "router" in name:
            return None
        if not weight.ins or not weight.outs:
            return None
        places = lambda letters: tuple(weight.axes.index(a) for a in letters)
        return MuonDimensionNumbers(places(weight.ins), places(weight.outs))

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon(
    config: OptimConfig, adam: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Return Muon for matrices (Jordan et al. 2024), `adam` for all else."""

    def labels(params: PyTree) -> PyTree:
        is_axes = lambda leaf: leaf is None or isinstance(leaf, MuonDimensionNumbers)
        name = lambda axes: "adam" if axes is None else "muon"
        return jax.tree.map(name, muon_matrices(params), is_leaf=is_axes)

    orthogonal = optax.contrib.scale_by_muon(
        beta=config.momentum,
        mu_dtype=jnp.float32,
        weight_dimension_numbers=muon_matrices,
    )
    matrices = optax.chain(orthogonal, optax.stateless(_to_rms))
    return optax.partition({"muon": matrices, "adam": adam}, labels)


def _to_rms(updates: PyTree, params: PyTree) -> PyTree:
    """Return orthogonal matrices with entries of root mean square `MUON_RMS`."""
    del params

    def scale(update: Array, axes: MuonDimensionNumbers) -> Array:
        sides = typing.cast(tuple[tuple[int, ...], ...], tuple(axes))
        longest = max(math.prod(update.shape[a] for a in side) for side in sides)
        return update * (MUON_RMS * longest**0.5)

    return jax.tree.map(scale, updates, muon_matrices(updates))


def _wide_moments(
    adam: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """Return Adam with moments in float32 or wider, whatever the parameters are in.

    A second moment in bfloat16 would stand still: 1 - beta2 is below its last bit.
    """

    def init(params: PyTree) -> Any:
        widen = lambda p: p.astype(jnp.promote_types(p.dtype, jnp.float32))
        return adam.init(jax.tree.map(widen, params))

    return optax.GradientTransformation(init, adam.update)


def follow_weights(
    mean: PyTree, params: PyTree, step: Int[Array, ""], decay: float
) -> PyTree:
    """Return the exponential mean of weights after a step, counted from 0.

    It forgets faster at first, so that the start is soon forgotten: (step + 1) /
    (step + 10) of it stays, at most `decay`.
    """
    kept = jnp.minimum(decay, (step + 1) / (step + 10))
    return jax.tree.map(lambda m, p: p + kept * (m - p), mean, params)


def make_optimizer(
    config: OptimConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW (Loshchilov and Hutter 2019) or Muon with it, as `init` and
    `update(..., step=s)`.

    Gradients are clipped by their global norm first.
    """
    adam = _wide_moments(
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps)
    )
    known = {"adamw": lambda: adam, "muon": lambda: _muon(config, adam)}
    pieces = [
        choose("optim.kind", config.kind, known)(),
        optax.add_decayed_weights(config.weight_decay, mask=decay_mask),
        scale_by_step(make_schedule(config, steps)),
    ]
    if config.clip_norm > 0:
        pieces.insert(0, optax.clip_by_global_norm(config.clip_norm))
    if config.router_lr_scale != 1:
        pieces.insert(-1, scale_routers(config.router_lr_scale))
    return optax.chain(*pieces)
