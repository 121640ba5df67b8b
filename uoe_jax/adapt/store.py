"""The folder of an adapter's run: its request, its factors, and the merged run."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.folder import WEIGHTS
from uoe_jax.adapt.merge import kept_share, merge
from uoe_jax.config import ExperimentConfig
from uoe_jax.data import Prepared
from uoe_jax.data.record import record_of
from uoe_jax.errors import ConfigError, DataError, NonFiniteError
from uoe_jax.files import format_json, parse_json, read_json, write_atomically
from uoe_jax.optim import make_optimizer
from uoe_jax.runs.checkpoint import Checkpoints, snapshot
from uoe_jax.runs.folder import (
    CHECKPOINTS,
    has_begun,
    open_run_dir,
    write_environment,
)
from uoe_jax.runs.load import ADAPTATION
from uoe_jax.runs.state import Progress, TrainState
from uoe_jax.tree import fill_leaves, named_leaves

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


def read_trained(out: Path, adapters: Adapters) -> Adapters:
    """Return the adapter with the factors of the run's newest checkpoint."""
    template = {"params": adapters.weights, "buffers": adapters.anchor}
    arrays = Checkpoints(out / CHECKPOINTS).restore(named_leaves(template))[1]
    state = jax.tree.map(jnp.asarray, fill_leaves(template, arrays))
    return dataclasses.replace(
        adapters, weights=state["params"], anchor=state["buffers"]
    )


def write_merged(
    folder: Path,
    config: ExperimentConfig,
    base: tuple[PyTree, PyTree, int],
    adapters: Adapters,
    *,
    prepared: Prepared,
    spent: Progress,
    about: Mapping[str, Any],
) -> dict[str, float]:
    """Write a run whose weights have the deltas in them, added in float32.

    `base` is (params, buffers, step). Returns the share of the deltas that is left by
    the dtypes that round: of the weights, and of the products that they are cast for.
    Raises NonFiniteError, before anything is written, if a merged weight isn't finite.
    """
    params, buffers, step = base
    merged = jax.jit(lambda p, a: merge(p, a).params)(params, adapters)
    leaves = named_leaves(merged)
    for plan in adapters.plans:
        if not np.all(np.isfinite(np.asarray(leaves[plan.name], np.float32))):
            raise NonFiniteError(
                f"{plan.name} isn't finite with its delta; the adapter's factors are "
                "too large to merge"
            )
    share = jax.jit(kept_share, static_argnums=2)
    stored = str(jnp.result_type(leaves[adapters.plans[0].name]))
    dtypes = {stored, config.model.compute_dtype} - {"float32"}
    kept = {dtype: float(share(params, adapters, dtype)) for dtype in sorted(dtypes)}
    if not Checkpoints(folder / CHECKPOINTS).steps():
        write_run(
            folder,
            config,
            (merged, buffers, step),
            prepared=prepared,
            spent=spent,
            about=about,
        )
    return kept


def write_run(
    folder: Path,
    config: ExperimentConfig,
    model: tuple[PyTree, PyTree, int],
    *,
    prepared: Prepared | None = None,
    spent: Progress | None = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write a model (params, buffers, step) as a run of one checkpoint.

    The optimizer starts anew; `spent` is what was spent on the model so far, `about`
    goes into env.json. Raises what `open_run_dir` does for a folder that is in use.
    """
    params, buffers, step = model
    optimizer = make_optimizer(config.optim, config.train.steps)
    state = TrainState(
        step=jnp.int32(step),
        params=params,
        opt_state=optimizer.init(params),
        buffers=buffers,
        bad_steps=jnp.int32(0),
    )
    data = None if prepared is None else record_of(prepared)
    with open_run_dir(folder, config, data=data):
        write_environment(folder, about or {})
        checkpoints = Checkpoints(folder / CHECKPOINTS)
        described = dataclasses.asdict(config)
        progress = (spent or Progress()).as_json()
        checkpoints.save(step, snapshot(state), described, progress)
        checkpoints.close()
