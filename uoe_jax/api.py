"""The functions of `import uoe_jax as uoe` that put several rooms together.

What is a run is given as its folder, its name under runs/, or as `load_run` returned
it; what is an experiment as a config or a preset's name. Raises what the rooms raise:
`UoeError`, one line with the value, the rule and the fix.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig
from uoe_jax.errors import ConfigError, shown
from uoe_jax.given import fill, one_of
from uoe_jax.presets import get_preset
from uoe_jax.runs.find import RUNS, find_run, run_or_preset, with_teacher_found
from uoe_jax.validation import validate

if TYPE_CHECKING:
    import optax
    from flax import nnx

    from uoe_jax.adapt import AdapterConfig
    from uoe_jax.decompose import Cut
    from uoe_jax.generate import Sampling
    from uoe_jax.leakcheck import Finding
    from uoe_jax.plan.layouts import Plan
    from uoe_jax.runs.load import LoadedRun

Which = Literal["last", "best"]


def train(
    config: ExperimentConfig | str,
    run_dir: str | Path | None = None,
    *,
    resume: bool = True,
    quiet: bool = False,
    init_from: str | Path | None = None,
    optimizer: optax.GradientTransformationExtraArgs | None = None,
) -> dict[str, Any]:
    """Train an experiment, or go on with one that was stopped; return a summary.

    Args:
      config: an experiment or a preset's name.
      run_dir: the run's folder; runs/NAME if not given. Called again with the same
        config it goes on from the newest checkpoint, bit for bit.
      resume: False: the folder must be new.
      quiet: print warnings only.
      init_from: the run whose parameters a new run starts with.
      optimizer: instead of the config's; its `update` gets the step as `step=`.

    Returns:
      run_dir, step, seconds, tokens, flops, train_loss, valid (the last validation),
      best_loss, best_step and what compiling took.
    """
    config = _experiment(config)
    validate(config)
    config = with_teacher_found(config)
    folder = RUNS / config.name if run_dir is None else Path(run_dir)

    from uoe_jax.train.initial import recorded_start, start_from
    from uoe_jax.train.loop import train as run_training

    if init_from is None:
        make_subject = recorded_start(folder, config)
    else:
        make_subject = start_from(find_run(str(init_from)), config, folder)
    return run_training(
        config,
        folder,
        resume=resume,
        quiet=quiet,
        optimizer=optimizer,
        make_subject=make_subject,
    )


def load_run(
    run: str | Path | LoadedRun,
    *,
    which: Which = "last",
    step: int | None = None,
    cut: float | None = None,
) -> LoadedRun:
    """Return a run's `config`, `model`, `step` and `folder`.

    Args:
      run: its folder, or its name under runs/.
      which: its newest checkpoint or the best one.
      step: of the checkpoint; the newest or best if not given.
      cut: the share of its blocks that a run of `uoe compress --anytime` opens without.

    Raises ConfigError for a choice among checkpoints of a run that is loaded already.
    """
    from uoe_jax.compress.anytime import open_run
    from uoe_jax.runs.load import LoadedRun

    if isinstance(run, LoadedRun):
        if (which, step, cut) != ("last", None, None):
            raise ConfigError(
                f"the run of {run.folder} is loaded already, at step {run.step}; give "
                "its folder to choose which, step or cut"
            )
        return run
    return open_run(find_run(_path(run)), which=which, step=step, cut=cut)


def evaluate(
    run: str | Path | LoadedRun,
    *,
    split: Literal["train", "valid", "test"] = "valid",
    data: DataConfig | str | None = None,
    max_batches: int | None = None,
    which: Which = "last",
) -> dict[str, Any]:
    """Return a run's numbers on a split of its data, or of other data.

    Args:
      run: its folder, its name, or what `load_run` returned.
      split: which part of the data.
      data: other data: a path, or a config.
      max_batches: only the first batches; all of the split if not given.
      which: the newest checkpoint or the best one.

    Returns:
      loss (nats a token or example), perplexity, bits_per_byte (None where the data has
      no bytes), accuracy, balance_loss, z_loss and router (load and entropy by layer).
    """
    from uoe_jax.data.source import without_unread
    from uoe_jax.evaluate import evaluate as run_evaluation
    from uoe_jax.runs.load import run_dataset

    found = load_run(run, which=which)
    if isinstance(data, str):
        data = dataclasses.replace(
            found.config.data, source="auto", path=data, mix=None
        )
        data = without_unread(data, found.config.model.kind)
    if data is not None:
        validate(dataclasses.replace(found.config, data=data))
    dataset = run_dataset(found.folder, found.config, split, data)
    return run_evaluation(
        found.model, dataset.config, max_batches=max_batches, dataset=dataset
    )


def generate(
    run: str | Path | LoadedRun,
    prompt: str,
    *,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    **options: Any,
) -> str:
    """Return the prompt and what a run makes of it.

    Args:
      run: its folder, its name, or what `load_run` returned.
      prompt: text, at least one character.
      max_new_tokens: how many tokens are made.
      sampling: how tokens are drawn.
      seed: the same one gives the same text.
      **options: fields of `uoe_jax.generate.Sampling` instead of `sampling`:
        temperature (0.8 if neither is given), top_k, top_p, greedy.
    """
    from uoe_jax.generate import Sampling, generate_text
    from uoe_jax.generate.sampling import TEMPERATURE

    if sampling is None:
        options = {"temperature": TEMPERATURE} | options
    wanted = one_of("sampling", Sampling, sampling, options)
    made = generate_text(load_run(run), prompt, max_new_tokens, wanted, seed=seed)
    return made.decode("utf-8", "replace")


def decompose(
    run: str | Path,
    out: str | Path | None = None,
    *,
    cut: Cut | None = None,
    which: Which = "last",
    **options: Any,
) -> dict[str, Any]:
    """Write a dense run as a union of experts, without training; return what was found.

    With all experts chosen, as by default, the union is the same function.

    Args:
      run: the dense run's folder or name.
      out: the new run's folder; runs/NAME-unionE or -unionauto if not given.
      cut: into how many experts, and how.
      which: the newest checkpoint or the best one.
      **options: fields of `uoe_jax.decompose.Cut` instead of `cut`: num_experts,
        max_experts, top_k, attention_experts, shared, parts, grouping, router, refit,
        calibrate, seed.

    Returns:
      run (the new folder), exact, max_logit_difference, losses before and after, ...
    """
    from uoe_jax.decompose.cut import Cut
    from uoe_jax.decompose.runs import decompose_run

    wanted = one_of("cut", Cut, cut, options)
    folder = find_run(_path(run))
    target = _target(folder, out, f"union{wanted.num_experts}")
    return decompose_run(folder, target, wanted, which=which) | {"out": str(target)}


def merge(
    run: str | Path, out: str | Path | None = None, *, which: Which = "last"
) -> dict[str, Any]:
    """Write a union run back as a dense one; return what was found.

    Args:
      run: the union run's folder or name.
      out: the new run's folder; runs/NAME-dense if not given.
      which: the newest checkpoint or the best one.
    """
    from uoe_jax.decompose.runs import merge_run

    folder = find_run(_path(run))
    target = _target(folder, out, "dense")
    return merge_run(folder, target, which=which) | {"out": str(target)}


def adapt(
    run: str | Path,
    out: str | Path | None = None,
    *,
    adapter: AdapterConfig | None = None,
    quiet: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Fit a run to other data by small factors; the run stays as it is.

    Args:
      run: its folder or name.
      out: the adapter's folder; runs/NAME-METHODRANK if not given.
      adapter: which factors; Tucker's of rank 8 if not given.
      quiet: print warnings only.
      **options: fields of `uoe_jax.adapt.request.AdaptRequest` (data, steps,
        learning_rate, batch_size, load, merge, which, seed, ...) and, instead of
        `adapter`, of `uoe_jax.adapt.AdapterConfig` (method, rank, targets, ...).

    Returns:
      The report: parameters, scores before and after, speed.
    """
    from uoe_jax.adapt.config import AdapterConfig
    from uoe_jax.adapt.request import AdaptRequest
    from uoe_jax.adapt.run import adapt_run

    folder = find_run(_path(run))
    shape = {f.name for f in dataclasses.fields(AdapterConfig)} & options.keys()
    given = {name: options.pop(name) for name in sorted(shape)}
    if options.get("load") is None:
        adapter = one_of("adapter", AdapterConfig, adapter, given)
    elif given:
        raise ConfigError(
            f"{', '.join(given)} with load; a loaded adapter keeps its own: leave one "
            "of them out"
        )
    asked = fill(AdaptRequest, AdapterConfig, adapter=adapter, **options)
    ending = f"{adapter.method}{adapter.rank}" if adapter else "adapted"
    target = _target(folder, out, ending)
    return adapt_run(folder, target, asked, quiet=quiet) | {"out": str(target)}


def leakcheck(
    subject: str | Path | ModelConfig | ExperimentConfig | LoadedRun | nnx.Module,
    *,
    length: int | None = None,
    seed: int = 0,
) -> list[Finding]:
    """Perturb what an output must not depend on; return what was found, check by check.

    A finding has `check`, `perturbed`, `moved`, `max_diff` and `passed`. A preset or a
    config is checked as a small model of the same structure.

    Args:
      subject: a run, a preset, a config or a model.
      length: tokens of the probes; enough for every router to decide a few times.
      seed: of weights and probes.
    """
    import jax

    from uoe_jax.leakcheck import leakcheck as check
    from uoe_jax.model import make_model
    from uoe_jax.probes import check_length, probe_length, scaled_down
    from uoe_jax.runs.load import LoadedRun

    if isinstance(subject, (str, Path)):
        folder, config = run_or_preset(_path(subject))
        subject = config if folder is None else load_run(folder)
    if isinstance(subject, ExperimentConfig):
        subject = subject.model
    model: Any = subject.model if isinstance(subject, LoadedRun) else subject
    if isinstance(subject, ModelConfig):
        model = make_model(scaled_down(subject), seed)
    check_length(length, model.config)
    most = model.config.max_seq_len
    length = length or min(most, probe_length(model.config))
    return check(model, jax.random.fold_in(jax.random.key(seed), 1), length=length)


def plan(
    config: ExperimentConfig | str,
    topology: str = "cpu:8",
    *,
    budget: float | None = None,
    mesh: Mapping[str, int] | None = None,
) -> Plan:
    """Return the layouts of an experiment on a topology: what fits, and how fast.

    `show` prints it. No accelerator is needed.

    Args:
      config: an experiment or a preset's name.
      topology: such as v5p:4x4x4, h100:8 or cpu:8.
      budget: GB of memory that a chip may use; its own if not given.
      mesh: devices of some axes (data, fsdp, tensor, sequence); the others vary.
    """
    from uoe_jax.hardware import fit, gemm
    from uoe_jax.hardware.devices import parse_topology
    from uoe_jax.hardware.roofline import LEARNED, UNCALIBRATED
    from uoe_jax.hardware.step_products import step_products
    from uoe_jax.plan.layouts import make_plan

    config = _experiment(config)
    validate(config)
    place = parse_topology(topology)
    model = gemm.choose(None, place.device)
    known = model is not None and step_products(config, fit.ONE) is not None
    return make_plan(
        config,
        place,
        LEARNED if known else UNCALIBRATED,
        None if budget is None else budget * 1e9,
        mesh,
        model,
    )


def _experiment(config: Any) -> ExperimentConfig:
    return get_preset(config) if isinstance(config, str) else config


def _path(run: Any) -> str:
    if isinstance(run, (str, Path)):
        return str(run)
    raise ConfigError(f"run is {shown(run)}; give its folder or its name under runs/")


def _target(folder: Path, out: str | Path | None, ending: str) -> Path:
    return RUNS / f"{folder.name}-{ending}" if out is None else Path(out)
