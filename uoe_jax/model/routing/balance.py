"""Load of the experts: statistics of a router, losses, and loss-free balance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from uoe_jax.config import ModConfig, ModelConfig, MoeConfig, UnionConfig
from uoe_jax.kinds import ROUTERS, router_of
from uoe_jax.model.context import Context
from uoe_jax.ops.router.xla import token_statistics
from uoe_jax.weights import layer_period

# Arrays by name; "state" holds what decoding remembers, by name again.
Stats = dict[str, Any]


def router_stats(
    scores: Float[Array, "B T E"],
    decision: Float[Array, "B T E"],
    picks: Int[Array, "B T X"],
    context: Context,
    kept: Bool[Array, "B T X"] | None = None,
    on: Bool[Array, "B T X"] | None = None,
) -> Stats:
    """Return load, entropy, drop rate and the two losses over the counted tokens.

    load [E]: fraction of picks, sums to 1. balance_loss: `E * sum_e load_e * prob_e`,
    1 when balanced (Fedus et al. 2021, Switch Transformer, eq. 4). z_loss: mean squared
    log-partition of the scores (Zoph et al. 2022, ST-MoE, eq. 5). entropy: of the
    router's softmax, nats. dropped: fraction of picks that are not `kept`. Of picks
    that are not `on` nothing is counted. With an `axis_name` the sums run over that
    mesh axis too.
    """
    each = token_statistics(scores, decision, picks, on)
    lost = jnp.zeros(picks.shape[:2])
    if kept is not None:
        missing = ~kept if on is None else on & ~kept
        lost = jnp.sum(missing, axis=-1).astype(jnp.float32)
    means = token_means({**each, "dropped": lost}, context)
    return stats_of_means(means, _picks(picks, on))


def stats_of_means(means: dict[str, Array], num_picks: int | Float[Array, ""]) -> Stats:
    """Return a router's statistics by the means over tokens, which have so many picks.

    means: those of `token_statistics` and of the picks that were dropped.
    """
    load = means["picks"] / jnp.maximum(jnp.sum(means["picks"]), 1e-9)
    return {
        "load": load,
        "entropy": means["entropy"],
        "dropped": means["dropped"] / num_picks,
        "balance_loss": load.size * jnp.sum(load * means["probs"]),
        "z_loss": means["z"],
    }


def _picks(
    picks: Int[Array, "B T X"], on: Bool[Array, "B T X"] | None
) -> int | Float[Array, ""]:
    """Return how many picks a token has: as many in all of them."""
    count = picks.shape[-1]
    return count if on is None else jnp.sum(on[0, 0]).astype(jnp.float32)


def token_means(values: dict[str, Array], context: Context) -> dict[str, Array]:
    """Return means over the tokens [B, T, ...] that the context counts."""
    shape = next(iter(values.values())).shape[:2]
    valid = _valid(shape, context)

    def total(value: Array) -> Array:
        weight = valid.reshape(*valid.shape, *[1] * (value.ndim - 2))
        return jnp.sum(value * weight, axis=(0, 1))

    sums = {name: total(value) for name, value in values.items()}
    return means_of_sums(sums, shape, context)


def means_of_sums(
    sums: dict[str, Array], shape: tuple[int, ...], context: Context
) -> dict[str, Array]:
    """Return means by the sums over those of [B, T] tokens that the context counts."""
    count = jnp.sum(_valid(shape, context))
    if context.axis_name is not None:
        sums, count = jax.lax.psum((sums, count), context.axis_name)
    count = jnp.maximum(count, 1.0)
    return {name: value / count for name, value in sums.items()}


def _valid(shape: tuple[int, ...], context: Context) -> Float[Array, "B T"]:
    if context.counted is None:
        return jnp.ones(shape, jnp.float32)
    return context.counted.astype(jnp.float32)


def exceeded_by(
    scores: Float[Array, "B T"], share: float, context: Context
) -> Float[Array, ""]:
    """Return the score that a share of the counted tokens exceed; 0: one token.

    With an `axis_name` of all that mesh axis' tokens.
    """
    scores = jax.lax.stop_gradient(scores)
    valid = jnp.ones(scores.shape, bool)
    if (counted := context.counted) is not None:
        valid = counted
    own = jnp.where(valid, scores, jnp.inf).reshape(-1)
    if (axes := context.axis_name) is not None:
        # A sum, not a gather: the same on every device also to shard_map's checks.
        all_ranks = jnp.zeros((jax.lax.axis_size(axes), own.size))
        own = jax.lax.psum(all_ranks.at[jax.lax.axis_index(axes)].set(own), axes)
    ordered = jnp.sort(own.reshape(-1))
    count = jnp.sum(jnp.isfinite(ordered))
    first = jnp.floor((1 - share) * count).astype(jnp.int32)  # of those that enter
    first = jnp.clip(first, 1, jnp.maximum(count - 1, 1))
    return jnp.where(count > 1, (ordered[first - 1] + ordered[first]) / 2, 0.0)


# "attention", "mlp" and "depth", each only where some layer of it is routed. Each
# holds, for the L routed layers in order: load [L, E], entropy [L], dropped [L],
# balance_loss [L], z_loss [L], of depth threshold [L] (of threshold routers [L, E], 0
# in a part's other layers), and choices [L, B, T, X] when
# they were asked for.
Aux = dict[str, dict[str, Array]]

PARTS = ("attention", "mlp", "depth")
_PADDING = {"load": 0, "choices": -1, "threshold": 0}


def stack_stats(outs: Sequence[dict[str, dict[str, Array]]], num_layers: int) -> Aux:
    """Return the statistics of all stacks, interleaved to layer order.

    Where union and mixture layers of different widths alternate, the narrower ones'
    load is padded with 0 and their choices with -1.
    """
    period = len(outs)
    aux: Aux = {}
    for part in PARTS:
        stacks = [i for i, out in enumerate(outs) if part in out]
        if stacks:
            layers = [n for i in stacks for n in range(i, num_layers, period)]
            order = np.argsort(np.array(layers))
            found = [outs[i][part] for i in stacks]
            if any("threshold" in one for one in found):
                # Other routers beside threshold ones have none.
                found = [
                    one if "threshold" in one else {**one, "threshold": 0 * one["load"]}
                    for one in found
                ]
            aux[part] = {
                name: _interleave([one[name] for one in found], order, name)
                for name in found[0]
            }
    return aux


def _interleave(values: list[Array], order: np.ndarray, name: str) -> Array:
    if len(values) == 1:
        return values[0]
    if name in _PADDING:
        width = max(value.shape[-1] for value in values)
        values = [_pad(value, width, _PADDING[name]) for value in values]
    return jnp.concatenate(values)[order]


def _pad(value: Array, width: int, fill: int) -> Array:
    missing = width - value.shape[-1]
    padding = [(0, 0)] * (value.ndim - 1) + [(0, missing)]
    return jnp.pad(value, padding, constant_values=fill) if missing else value


def router_configs(
    config: ModelConfig, part: str
) -> dict[int, UnionConfig | MoeConfig | ModConfig]:
    """Return the router config of each routed layer of a part, by layer number."""
    if part == "depth":
        kinds = enumerate(config.block_kinds)
        return {i: config.mod for i, kind in kinds if kind == "mod"}
    kinds = enumerate(kinds[PARTS.index(part)] for kinds in config.layer_kinds)
    found = {i: router_of(config, part, kind) for i, kind in kinds}
    return {i: router for i, router in found.items() if router is not None}


def router_losses(aux: Aux, config: ModelConfig) -> Float[Array, ""]:
    """Return the weighted balance and z losses, summed over routed layers."""
    total = jnp.zeros(())
    for part, stats in aux.items():
        routers = list(router_configs(config, part).values())
        # A mixture of depths is balanced by its bias alone.
        weights = [getattr(router, "balance_loss", 0.0) for router in routers]
        balance = np.array(weights, np.float32)
        z = np.array([r.router_z_loss for r in routers], np.float32)
        total = total + jnp.sum(stats["balance_loss"] * balance)
        total = total + jnp.sum(stats["z_loss"] * z)
    return total


def update_router_bias(buffers: PyTree, aux: Aux, config: ModelConfig) -> PyTree:
    """Return the model's `RouterBias` state moved against each expert's load error.

    Adds `rate * sign(1/E - load)` to each expert's bias, which only selection sees
    (Wang et al. 2024, auxiliary-loss-free load balancing, algorithm 1). That of a
    mixture of depths goes the `rate` of the way to where `keep` of the tokens enter,
    that of a threshold router to where X/E of them do.
    """
    flat, period = [], layer_period(config)
    for path, variable in nnx.to_flat_state(buffers):
        # trunk, blocks, STACK, PART, router, bias; the block's own without a PART
        if "router" not in map(str, path):  # pairs that are rotated
            flat.append((path, variable))
            continue
        stack, part = int(str(path[2])), str(path[3])
        part = "depth" if part == "router" else part
        routers = router_configs(config, part)
        rows = [row for row, layer in enumerate(routers) if layer % period == stack]
        bias = variable[...]
        router: Any = routers[stack]
        if part == "depth":
            error = -aux[part]["threshold"][np.array(rows), None] - bias
        elif ROUTERS[router.router].varies:
            wanted = aux[part]["threshold"][np.array(rows), : bias.shape[-1]]
            flat.append((path, _toward(variable, -wanted, router.threshold_rate)))
            continue
        else:
            load = aux[part]["load"][np.array(rows), : bias.shape[-1]]
            error = jnp.sign(1.0 / bias.shape[-1] - load)
        step = router.bias_update_rate * error
        flat.append((path, variable.replace(bias + step.astype(bias.dtype))))
    return nnx.from_flat_state(flat)


def _toward(variable: Any, wanted: Array, rate: float) -> Any:
    """Return a variable `rate` of the way to what is wanted."""
    value = variable[...]
    return variable.replace(value + (rate * (wanted - value)).astype(value.dtype))
