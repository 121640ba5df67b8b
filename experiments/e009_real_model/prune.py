"""A dense run made narrower: the neurons and heads that write most are kept.

Every layer keeps as many, so that the result is a plain smaller dense model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from uoe_jax.config import ModelConfig
from uoe_jax.data.record import carried_record
from uoe_jax.decompose.group import contributions
from uoe_jax.decompose.refit import Refit, core_first, fit_down
from uoe_jax.model import flat_params, with_params
from uoe_jax.model.observe import LayerValues, Stream
from uoe_jax.model.stacks import from_layers, to_layers
from uoe_jax.runs.batches import CALIBRATION_TOKENS, calibration_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32
from uoe_jax.runs.write import Origin, write_run
from uoe_jax.weights import ATTENTION, MLP


@dataclass(frozen=True, kw_only=True)
class Prune:
    """How narrow each layer becomes; `refit` fits the MLP's outputs to what is left."""

    d_ff: int
    num_kv_heads: int | None = None  # with their query heads; None: all
    refit: bool = True
    calibrate: int = CALIBRATION_TOKENS  # tokens of the run's training data


def prune_run(folder: Path, out: Path, wanted: Prune) -> None:
    """Write a dense run with narrower layers into `out`."""
    run = load_run(folder)
    config = run.config
    params = flat_params(run.model)
    batch = calibration_batch(config, wanted.calibrate)
    dense = with_params(in_float32(config.model), params, {})
    model = narrower(config.model, wanted)
    new = prune_params(dense, params, wanted, batch)
    origin = Origin(
        made_by="prune",
        source=str(folder),
        step=run.step,
        spent=run.progress.spent(),
        data=carried_record(folder, config),
    )
    name = f"{config.name}-{wanted.d_ff}"
    write_run(out, dataclasses.replace(config, name=name, model=model), new, origin)


def narrower(model: ModelConfig, wanted: Prune) -> ModelConfig:
    """Return the config of what is left."""
    heads = wanted.num_kv_heads or model.num_kv_heads
    return dataclasses.replace(
        model,
        d_ff=wanted.d_ff,
        num_kv_heads=heads,
        num_heads=heads * model.num_query_groups,
    )


def prune_params(
    model: Any,
    params: Mapping[str, np.ndarray],
    wanted: Prune,
    batch: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the parameters of the narrower model.

    Layers are fitted one after another: each sees what the pruned ones before it write.
    Heads are chosen and cut, not fitted.
    """
    rest, layers = to_layers(params, model.config)
    seen, after = Stream(model, batch), Stream(model, batch)
    found = []
    for layer in layers:
        before = seen.run_layer()
        now = after.run_layer()
        w_down = layer["mlp.w_down"][0].astype(np.float32)
        written = contributions(before.neurons, w_down)
        kept = np.flatnonzero(core_first(written, wanted.d_ff))
        new = take(layer, "mlp", MLP, kept)
        if wanted.num_kv_heads is not None:
            heads = np.asarray(before.heads)
            heads = heads_first(layer, heads, wanted.num_kv_heads)
            new = take(new, "attention", ATTENTION, np.flatnonzero(heads))
        if wanted.refit:
            fit = refit(w_down, kept, before, now)
            after.replace_output(fit.outputs)
            old = new["mlp.w_down"]
            new["mlp.w_down"] = fit.w_down.reshape(old.shape).astype(old.dtype)
        found.append(new)
    return from_layers(rest, found, narrower(model.config, wanted))


def refit(
    w_down: Float[np.ndarray, "F D"],
    kept: Int[np.ndarray, " F2"],
    before: LayerValues,
    now: LayerValues,
) -> Refit:
    """Return the down-projection of the kept neurons that is closest to all of them."""
    wanted = before.residual + before.output - now.residual
    ones = np.ones((len(wanted), 1), np.float32)
    return fit_down(now.neurons[:, kept], ones, w_down[kept], wanted)


def heads_first(
    layer: Mapping[str, np.ndarray], heads: Float[np.ndarray, "N Q H"], size: int
) -> Bool[np.ndarray, " K"]:
    """Return the key/value heads whose query heads write most, root mean square."""
    wo = layer["attention.wo"][0].astype(np.float32)  # [K, G, H, D]
    groups = heads.reshape(len(heads), wo.shape[0], -1).swapaxes(0, 1)
    out = groups @ wo.reshape(len(groups), groups.shape[2], -1)  # [K, N, D]
    return core_first(np.linalg.norm(out, axis=-1).T, size)


def take(
    layer: Mapping[str, np.ndarray],
    part: str,
    weights: Mapping[str, Any],
    kept: Int[np.ndarray, " K"],
) -> dict[str, Any]:
    """Return a layer with some of a part's neurons or heads."""
    new = dict(layer)
    for name, weight in weights.items():
        if weight.cut and f"{part}.{name}" in layer:
            axis = weight.axes.index(weight.cut)
            new[f"{part}.{name}"] = np.take(layer[f"{part}.{name}"], kept, axis)
    return new
