"""What a run says before it trains: the model, its devices, its data, its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax.sharding import Mesh

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.count import count_params, flops_per_token, num_tokens
from uoe_jax.stores.mirror import mirror_of


def describe_run(
    config: ExperimentConfig, mesh: Mesh, manifest: Mapping[str, Any], run_dir: Path
) -> list[str]:
    """Return four lines: model and budget, devices, data, folder."""
    model, length = config.model, num_tokens(config.model, config.seq_len)
    size = sum(count_params(model).values())
    flops = flops_per_token(model, length).forward
    kinds = f"{'+'.join(model.attention)} attention, {'+'.join(model.mlp)} MLP"
    count, kind = mesh.size, mesh.devices.flat[0].device_kind
    axes = ", ".join(f"{axis} {n}" for axis, n in mesh.shape.items() if n > 1)
    split = manifest["splits"]["train"]
    amount = next(
        f"{split[unit]:,} {unit}"
        for unit in ("tokens", "examples", "documents")
        if split.get(unit)
    )
    if "scored" in split:
        amount += f", {split['scored']:,} of them"
    stored = mirror_of(run_dir) is not None
    return [
        f"{config.name}: {model.kind}, {kinds}; {size:,} parameters, "
        f"{flops / 1e6:,.3g} MFLOP a token; {config.train.steps:,} steps of "
        f"{config.data.batch_size} x {length} tokens",
        f"devices: {count} x {kind}" + (f" ({axes})" if axes else ""),
        f"data: {manifest['source']}, {amount} to train on",
        f"folder: {run_dir}" + stored * ", sent there at each checkpoint",
    ]


def describe_operations(served: Mapping[str, Mapping[str, None]]) -> str:
    """Return which backend computes each operation, as one line."""
    found = (f"{op} {'+'.join(names)}" for op, names in sorted(served.items()))
    return "operations: " + ", ".join(found)
