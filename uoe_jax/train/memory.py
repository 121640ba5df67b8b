"""What a run takes of memory: what fits is chosen, what doesn't is told the causes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import OutOfMemory, first_line
from uoe_jax.hardware.devices import find_device
from uoe_jax.hardware.recompute import (
    open_settings,
    settle_recompute,
    with_settings,
)
from uoe_jax.hardware.roofline import memory_bytes
from uoe_jax.partition.legal import AXES
from uoe_jax.train.peers import gather

_SHOWN = 3  # ways out, or as many as there are


def explain_memory(
    config: ExperimentConfig, mesh: Mesh, error: BaseException
) -> OutOfMemory:
    """Return the error to raise for one that says that memory ran out.

    With what the run was predicted to take, what a device has, and the changes that are
    predicted to help, those that fit first.
    """
    sizes = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    need, have = _predict(config, sizes), device_bytes(mesh)
    facts = [] if need is None else [f"about {_gigabytes(need)} a device predicted"]
    if have is not None:
        facts.append(f"{_gigabytes(have)} there")
    ways = []
    for text, changed in _ways_out(config, mesh):
        bytes_then = _predict(changed, sizes)
        if bytes_then is None or (need is not None and bytes_then >= need):
            continue
        fits = have is not None and bytes_then <= have
        ways.append((not fits, bytes_then, f"{text} ({_gigabytes(bytes_then)})"))
    found = [text for _, _, text in sorted(ways)[:_SHOWN]]
    fix = f"what would take less: {'; '.join(found)}" if found else "use more devices"
    known = f" ({', '.join(facts)})" if facts else ""
    return OutOfMemory(f"out of memory{known}: {first_line(error)}; {fix}")


def _ways_out(
    config: ExperimentConfig, mesh: Mesh
) -> Iterator[tuple[str, ExperimentConfig]]:
    """Yield changes that need less memory, as options and as the config they make."""
    train, data, model = config.train, config.data, config.model
    rows = mesh.shape["data"] * mesh.shape.get("fsdp", 1)
    change = lambda part, **values: dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **values)}
    )
    for parts in (2 * train.accumulate, data.batch_size // rows):
        if parts > train.accumulate and data.batch_size % (parts * rows) == 0:
            text = f"--train.accumulate {parts}, the same result in parts"
            yield text, change("train", accumulate=parts)
    for remat in ("dots", "full"):
        now = model.recompute
        if now == "none" or (now, remat) == ("dots", "full"):
            yield f"--model.remat {remat}, slower", change("model", remat=remat)
    for batch in (data.batch_size // 2, data.batch_size // 8):
        if batch and batch % (rows * train.accumulate) == 0:
            yield f"--data.batch-size {batch}", change("data", batch_size=batch)
    if model.kind == "decoder" and config.seq_len > 1:
        half = config.seq_len // 2
        yield f"--data.seq-len {half}", change("data", seq_len=half)


def _predict(config: ExperimentConfig, sizes: dict[str, int]) -> float | None:
    try:
        return sum(memory_bytes(config, sizes).values())
    except (ValueError, ArithmeticError, KeyError):
        return None


def settle_memory(
    config: ExperimentConfig, mesh: Mesh
) -> tuple[ExperimentConfig, str | None]:
    """Return a config whose recomputation is settled for a mesh, and a line about it.

    See `settle_recompute`; None if the config left nothing open. All processes of a run
    settle alike, as they compile one program: by the least memory that one of them
    has, and by what the first one read of the run. All of them must call it.
    """
    sizes = {axis: mesh.shape.get(axis, 1) for axis in AXES}
    memory = device_bytes(mesh)
    # 0: unknown. Float32 rounds it, alike in all.
    found = gather(*open_settings(config), memory or 0.0)
    if len(found) > 1:
        config = with_settings(config, *map(int, found[0, :3]))
        memory = float(found[:, 3].min()) or None
    return settle_recompute(config, sizes, memory)


def device_bytes(mesh: Mesh) -> float | None:
    """Return what a device of this process has: by its own word, else its data sheet.

    Those of others say nothing here.
    """
    device: Any = mesh.local_devices[0]
    try:
        limit = (device.memory_stats() or {}).get("bytes_limit")
    except jax.errors.JaxRuntimeError:
        limit = None
    if limit:
        return float(limit)
    known = find_device(device.device_kind)
    return None if known is None else known.memory_bytes


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:,.3g} GB" if number >= 1e8 else f"{number / 1e6:,.3g} MB"
