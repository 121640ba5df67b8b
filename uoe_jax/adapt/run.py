"""A run adapted to other data: the adapter trained, measured, saved and merged."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import sys
import warnings
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jaxtyping import PyTree

from uoe_jax.adapt.adapters import Adapters, count_adapter_params, init_adapters
from uoe_jax.adapt.config import AdapterConfig, check_adapter
from uoe_jax.adapt.experiment import adapted_experiment
from uoe_jax.adapt.files import digest_params, load_adapters, save_adapters
from uoe_jax.adapt.place import Names, llama_names, place_modules
from uoe_jax.adapt.plan import EMBEDDING, PACKAGE
from uoe_jax.adapt.request import AdaptRequest, check_request
from uoe_jax.adapt.store import (
    MERGED,
    check_out,
    merging,
    read_cut,
    read_trained,
    write_request,
)
from uoe_jax.adapt.subject import adapter_subject
from uoe_jax.compress.anytime import open_run
from uoe_jax.compress.options import ANYTIME
from uoe_jax.config import ExperimentConfig, LayerWidths, MeshConfig
from uoe_jax.data import Dataset
from uoe_jax.data.record import record_of
from uoe_jax.errors import ConfigError, MissingExtra
from uoe_jax.files import format_json, write_atomically
from uoe_jax.interop.adapter_folder import WEIGHTS, read_config
from uoe_jax.interop.families import FAMILIES
from uoe_jax.interop.modules import module_places
from uoe_jax.interop.peft import read_peft
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import CHECKPOINTS, METRICS
from uoe_jax.runs.load import LoadedRun, run_dataset
from uoe_jax.runs.result import read_result
from uoe_jax.runs.stored import publish, run_folder
from uoe_jax.stores.mirror import named
from uoe_jax.surgery import operate
from uoe_jax.train.loop import train
from uoe_jax.train.metrics import read_metrics
from uoe_jax.train.subject import Subject

REPORT, CURVE = "adapt.json", "adapt.png"
KEPT_WARNING = 0.9  # of the deltas; merges that keep less are warned of
SCORES = ("loss", "bits_per_byte", "accuracy")


def adapt_run(
    folder: Path, out: Path, request: AdaptRequest, *, quiet: bool = False
) -> dict[str, Any]:
    """Train an adapter of a run into `out` and return the report.

    `out` is a run's folder: the same request goes on where an earlier one stopped, bit
    for bit. The run in `folder` is never touched.

    Raises ConfigError, DataError or CheckpointError before anything compiles,
    NonFiniteError when training diverges, StopRun after a signal.
    """
    check_request(request)
    folder = run_folder(folder, "the run")
    out = run_folder(out, "out", writes=True)
    run = open_run(folder, which=request.which, cut=request.cut)
    config = adapted_experiment(run, request)
    graphdef, params, buffers = nnx.split(run.model, nnx.Param, ...)
    adapters, adapter = _start(request, params, run)
    digest = digest_params(params)
    asked = _describe(request, adapter, digest)
    check_out(out, asked)
    sets = [run_dataset(folder, run.config, s, config.data) for s in ("train", "valid")]
    if not quiet and request.mesh is None and config.mesh.data < jax.device_count():
        print(
            f"a pass of {config.data.batch_size // config.train.accumulate} rows goes "
            f"over {config.mesh.data} of {jax.device_count()} devices"
        )
    base, sizes = (graphdef, params, buffers), {}

    def make_subject(config: ExperimentConfig, optimizer: Any, mesh: Any) -> Subject:
        write_request(out, asked)  # now that the folder is this process's
        make = functools.partial(adapter_subject, path=request.path)
        subject = make(adapters, base, config, optimizer, mesh)
        sizes.update(_sizes(subject))
        return dataclasses.replace(subject, about={"adapter_of": named(folder)})

    try:
        summary = train(config, out, quiet=quiet, make_subject=make_subject)
    except ConfigError as error:
        raise ConfigError(str(error).replace("--run-dir", "--out")) from None
    trained = read_trained(out, adapters)
    report: dict[str, Any] = {
        "run": named(folder),
        "step": run.step,
        "cut": request.cut,
        "method": adapter.method,
        "rank": adapter.rank,
        "data": sets[0].info["source"],
        "params": _counts(params, adapters),
        **_measured(out, summary, sizes),
    }
    if request.merge:
        report |= _merge(run, out, config, trained, request, sets[0])
    save_adapters(out, trained, adapter, base=named(folder), digest=digest)
    report["file_bytes"] = (out / WEIGHTS).stat().st_size
    write_atomically(out / REPORT, format_json(report, indent=2) + "\n")
    if request.steps:
        _draw(report, out / CURVE)
    publish(out)
    return report


def _counts(params: PyTree, adapters: Adapters) -> dict[str, int]:
    """Return the numbers of the base's parameters and of the adapter's."""
    base = sum(leaf.size for leaf in jax.tree.leaves(params))
    return {"base": base, "adapter": count_adapter_params(adapters)}


def _draw(report: dict[str, Any], path: Path) -> None:
    """Write the curve; without matplotlib say so, for the adapter is there."""
    try:
        from uoe_jax.adapt.plot import plot_adaptation
    except MissingExtra as error:
        print(f"no {path.name}: {error}", file=sys.stderr)
        return
    plot_adaptation(report, path)


def _foreign_names(run: LoadedRun) -> Names:
    """Return where modules of other libraries lie in a run's weights.

    By the names that an imported run came with, otherwise by Llama's. Raises
    ConfigError for a run whose channels or layers are at other places than theirs.
    """
    found = read_result(run.folder)
    depth = found.get("did") == "compress" and found.get("method") == "depth"
    if depth or found.get("did") == "anytime":
        what = "has fewer layers" if depth else "has its channels in another order"
        raise ConfigError(
            f"{run.folder} {what} than {found.get('run')}, and an adapter of another "
            "library is of the latter's; merge it there with uoe adapt --load --merge "
            "and compress the merged run"
        )
    architecture = found.get("architecture")
    # Modules of theirs are of whole layers: they fit no narrower one.
    if architecture not in FAMILIES or run.config.model.widths != LayerWidths():
        return llama_names
    return module_places(run.config.model, architecture)


def _start(
    request: AdaptRequest, params: PyTree, run: LoadedRun
) -> tuple[Adapters, AdapterConfig]:
    """Return a fresh adapter, or the one in a folder with its own config."""
    load, adapter = request.load, request.adapter
    if load is None:
        assert adapter is not None
        key = jax.random.key(request.seed)
        return init_adapters(params, adapter, key), adapter
    raw = read_config(load)
    cut = read_cut(load) if (run.folder / ANYTIME).is_file() else None
    if cut not in (None, request.cut):
        raise ConfigError(
            f"{load} is an adapter of a run opened at cut {cut:g} and cut is "
            f"{request.cut}; open {run.folder} as the adapter has it: --cut {cut:g}"
        )
    if "uoe_jax" in raw:
        return load_adapters(load, params)
    adapters = place_modules(read_peft(load), params, _foreign_names(run))
    adapters = _with_dropout(adapters, raw.get("lora_dropout") or 0.0)
    ranks = [plan.ranks[0] for plan in adapters.plans]
    targets = tuple(plan.name for plan in adapters.plans)
    config = AdapterConfig(
        method="lora",
        rank=max(ranks),
        rank_pattern=dict(zip(targets, ranks, strict=True)),
        alpha=float(max(ranks)),
        targets=targets,
        use_dora=any(plan.dora for plan in adapters.plans),
        dropout=max(plan.dropout for plan in adapters.plans),
    )
    check_adapter(config)
    return adapters, config


def _with_dropout(adapters: Adapters, rate: float) -> Adapters:
    """Return a foreign adapter with its input dropout, where one is taken here.

    Lookups of an embedding take none, as in PEFT; neither do DoRA's fused weights.
    """
    if not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ConfigError(f"lora_dropout is {rate!r}; it must be in [0, 1)")
    takes = lambda plan: not plan.dora and plan.name != EMBEDDING
    plans = tuple(
        dataclasses.replace(plan, dropout=float(rate)) if takes(plan) else plan
        for plan in adapters.plans
    )
    return dataclasses.replace(adapters, plans=plans)


def _describe(
    request: AdaptRequest, adapter: AdapterConfig, digest: str
) -> dict[str, Any]:
    """Return what settles every bit of an adapter beyond its experiment's config."""
    loaded = None
    if request.load is not None:
        content = (request.load / WEIGHTS).read_bytes()
        loaded = hashlib.blake2b(content, digest_size=8).hexdigest()
    return {
        **dataclasses.asdict(adapter),
        "path": request.path,
        "cut": request.cut,
        "steps": request.steps,
        "base": digest,
        "loaded": loaded,
    }


def _measured(
    out: Path, summary: dict[str, Any], sizes: dict[str, Any]
) -> dict[str, Any]:
    """Return the report's numbers: before and after, and what the training took."""
    lines = list(read_metrics(out / METRICS))
    evaluated = {line["step"]: line for line in lines if line["kind"] == "eval"}
    steps = summary["step"]
    # A line that was damaged has been left out, with a word.
    found: dict[str, Any] = {
        when: {key: evaluated[step].get(key) for key in SCORES}
        for when, step in {"before": 0, **({"after": steps} if steps else {})}.items()
        if step in evaluated
    }
    if not steps:
        return found
    seconds, memory = summary["seconds"], summary.get("temporary_bytes")
    return found | {
        "steps": steps,
        "losses": [line.get("loss") for line in lines if line["kind"] == "train"],
        "seconds": seconds,
        "compile_seconds": summary.get("compile_seconds"),
        "tokens_per_second": summary["tokens"] / seconds,
        "memory_bytes": {**sizes, "temporary": memory},
        "skipped_steps": summary["skipped"],
    }


def _merge(
    run: LoadedRun,
    out: Path,
    config: ExperimentConfig,
    trained: Adapters,
    request: AdaptRequest,
    data: Dataset,
) -> dict[str, Any]:
    """Write the merged run; warn where its weights round much of the deltas away.

    It has spent what the source spent; the adapter's own is in the adapter's report.
    """
    config = dataclasses.replace(
        config, name=f"{run.config.name}-merged", mesh=MeshConfig()
    )
    change = merging(trained, config, record_of(data.prepared))
    merged = out / MERGED
    if Checkpoints(merged / CHECKPOINTS).steps():  # by the same command, before
        found = read_result(merged)
    else:
        load = functools.partial(open_run, cut=request.cut)
        found = operate(
            run.folder, merged, change, verb="adapt", which=request.which, load=load
        )
    kept = found.get("merged_kept", {})
    for dtype, share in kept.items():
        if share < KEPT_WARNING:
            warnings.warn(
                f"{share:.0%} of the deltas survives the merge into {dtype} weights; "
                "the rest is below their last bit: keep the adapter apart",
                skip_file_prefixes=(PACKAGE,),
            )
    return {"merged": str(merged), "merged_kept": kept}


def _sizes(subject: Subject) -> dict[str, int]:
    """Return the bytes of what stays in memory between steps, all devices together."""
    size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    return {
        "frozen_base": size(subject.frozen),
        "adapter": size(subject.state.params),
        "optimizer": size(subject.state.opt_state),
    }
