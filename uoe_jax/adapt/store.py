"""The folder of an adapter's run: its request, its factors, and what is merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.merge import kept_share, merge
from uoe_jax.config import ExperimentConfig
from uoe_jax.data.record import DataRecord
from uoe_jax.errors import ConfigError, DataError, NonFiniteError
from uoe_jax.files import format_json, parse_json, read_json, write_atomically
from uoe_jax.interop.adapter_folder import WEIGHTS
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import BEST, CHECKPOINTS, has_begun
from uoe_jax.runs.load import ADAPTATION
from uoe_jax.surgery import Changed, Form, Source, Surgery
from uoe_jax.tree import Arrays, fill_leaves, named_leaves

MERGED = "merged"


def check_out(out: Path, asked: Mapping[str, Any]) -> None:
    """Raise ConfigError for a folder whose content would be mixed or lost.

    A folder that was begun with the same request is gone on with.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"{out} is a file; choose a folder with --out")
    file = out / ADAPTATION
    if not file.is_file():
        for name, kind in ((WEIGHTS, "an adapter"), (MERGED, "a merged run")):
            if (out / name).exists():
                raise ConfigError(f"{out} holds {kind} already; choose another --out")
        if has_begun(out):
            raise ConfigError(f"{out} holds a run already; choose another --out")
        return
    try:
        before = dict(read_json(file))
    except ValueError as error:
        raise DataError(f"{file} is damaged ({error}); restore it") from None
    # As JSON has it: tuples are lists there.
    for name, value in parse_json(format_json(asked), "the request").items():
        if before.get(name) != value:
            differs = f"{name} {before.get(name)!r} where this asks for {value!r}"
            raise ConfigError(
                f"{out} holds an adapter already, with {differs}; give the same "
                "options to go on with it, or choose another --out"
            )


def write_request(out: Path, asked: Mapping[str, Any]) -> None:
    """Write what an adapter's run was asked for, which makes the folder its own."""
    write_atomically(out / ADAPTATION, format_json(asked, indent=2) + "\n")


def read_cut(folder: Path) -> float | None:
    """Return at which cut an adapter's run was opened; None for the whole one."""
    try:
        return dict(read_json(folder / ADAPTATION)).get("cut")
    except FileNotFoundError:  # a folder of another library, or of the factors alone
        return None
    except (ValueError, TypeError) as error:
        file = folder / ADAPTATION
        raise DataError(f"{file} is damaged ({error}); restore it") from None


def read_trained(
    out: Path, adapters: Adapters, which: Literal["last", "best"] = "last"
) -> Adapters:
    """Return the adapter with the factors of the run's newest or best checkpoint.

    Raises CheckpointError where it has none.
    """
    template = {"params": adapters.weights, "buffers": adapters.anchor}
    store = Checkpoints(out / (BEST if which == "best" else CHECKPOINTS))
    arrays = store.restore(named_leaves(template))[1]
    state = jax.tree.map(jnp.asarray, fill_leaves(template, arrays))
    return dataclasses.replace(
        adapters, weights=state["params"], anchor=state["buffers"]
    )


def merging(adapters: Adapters, config: ExperimentConfig, data: DataRecord) -> Surgery:
    """Return the change that adds an adapter's deltas into the weights, in float32.

    `config` is the new run's, `data` what it keeps of its data. The change reports the
    share of the deltas that is left by the dtypes that round: of the weights, and of
    the products that they are cast for. It raises NonFiniteError if a merged weight
    isn't finite.
    """

    def change(_: ExperimentConfig, params: Arrays, source: Source) -> Changed:
        base = {name: jnp.asarray(array) for name, array in params.items()}
        merged = jax.jit(lambda p, a: merge(p, a).params)(base, adapters)
        for plan in adapters.plans:
            if not np.all(np.isfinite(np.asarray(merged[plan.name], np.float32))):
                raise NonFiniteError(
                    f"{plan.name} isn't finite with its delta; the adapter's factors "
                    "are too large to merge"
                )
        return Changed(
            did="merge an adapter",
            config=config,
            params=merged,
            buffers=source.buffers,
            report={"merged_kept": _kept(base, adapters, config)},
            forms={"merged": Form(config.model, merged, source.buffers)},
            same=False,
            data=data,
        )

    return change


def _kept(
    base: Mapping[str, Any], adapters: Adapters, config: ExperimentConfig
) -> dict[str, float]:
    share = jax.jit(kept_share, static_argnums=2)
    stored = str(jnp.result_type(base[adapters.plans[0].name]))
    dtypes = {stored, config.model.compute_dtype} - {"float32"}
    return {dtype: float(share(base, adapters, dtype)) for dtype in sorted(dtypes)}
