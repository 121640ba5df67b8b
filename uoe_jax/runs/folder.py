"""The folder of a run: its lock, its config, the environment it ran in."""

from __future__ import annotations

import dataclasses
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from uoe_jax.appearing import remove_unfinished
from uoe_jax.config import ExperimentConfig, to_json
from uoe_jax.data.prepare import absolute_paths
from uoe_jax.data.record import DataRecord, read_record, write_record
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.files import (
    format_json,
    parse_json,
    read_json,
    read_json_lines,
    write_atomically,
)
from uoe_jax.hardware.recompute import adopt_recompute
from uoe_jax.mixture import read_mix
from uoe_jax.runs.lock import FolderLost, RunLock
from uoe_jax.runs.store_lock import make_lock
from uoe_jax.runs.stored import publish
from uoe_jax.stores.objects import StoreError, address_of
from uoe_jax.validation import parse_config

CONFIG, ENVIRONMENT, METRICS = "config.json", "env.json", "metrics.jsonl"
CHECKPOINTS, BEST = "checkpoints", "best"
# In the environment of a run that `write_run` wrote, and that hasn't trained yet; the
# others are names of older versions.
MADE_FROM = ("made_from", "decomposed_from", "merged_from")

# What a resumed run may change: budgets, cadence, where things go. The rest decides
# which numbers come out.
FREE_FIELDS = frozenset(
    {
        "name",
        "data.cache_dir",
        "data.data_dir",
        "data.allow_changed",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
        "mesh.sequence",
        "layout.tensor_reduce",
        "layout.experts",
        "layout.dispatch",
        "layout.sequence_attention",
        "layout.rules",
        "layout.device_order",
        "train.steps",
        "train.max_seconds",
        "train.log_every",
        "train.eval_every",
        "train.eval_batches",
        "train.save_every",
        "train.keep_checkpoints",
        "train.max_bad_steps",
        "train.max_loss_jump",
        "train.replay_every",
        "train.tensorboard",
        "train.wandb",
        "train.profile",
    }
)
# What decides how much memory a step takes, and nothing of the state that a run begins
# with: free until a step is taken, as the first may not fit.
_MEMORY_FIELDS = frozenset(
    {"data.batch_size", "model.remat", "model.scan_layers", "train.accumulate"}
)
# Where data and tokenizer lie, and how a tokenizer was asked for: a run's record of
# its data has the hashes of both.
_MOVED_FIELDS = frozenset({"data.path", "data.tokenizer", "data.bpe_vocab_size"})
# Where a teacher lies: a run's record has its hash, the config whether there is one.
_TEACHER = "train.distill_from"
_MIX = "data.mix"
_OPTIONAL = ("jax-cuda13-plugin", "jax-triton", "triton", "libtpu")
_PACKAGES = ("uoe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def open_run_dir(
    path: Path,
    config: ExperimentConfig,
    *,
    resume: bool = True,
    note: Callable[[str], None] = print,
    data: DataRecord | None = None,
) -> Iterator[RunLock]:
    """Create or reopen a run's folder and hold its lock.

    The folder keeps what reading the run needs: its config with absolute paths, and
    `data`, the tokenizer and hash of what it trains on.

    Raises ConfigError when the folder can't be written, another process trains in it,
    it belongs to another config, or it has a run and `resume` is off; DataError when
    the run recorded other data.
    """
    config = absolute_settings(config)
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = make_lock(path, note)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        try:
            lock.acquire()
            remove_unfinished(path)
            data = _check_config(path, config, resume, data)
            write_settings(path, config, data)
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            yield lock
        except FolderLost:
            raise
        except BaseException as error:
            try:
                publish(path)  # what a failure left written
            except StoreError as other:  # what ended the run counts
                error.add_note(str(other))
            raise
        publish(path)  # the last metrics
    finally:
        lock.release()


def write_settings(
    path: Path, config: ExperimentConfig, data: DataRecord | None
) -> None:
    """Write a run's config, with absolute paths, and what it keeps of its data."""
    write_atomically(path / CONFIG, to_json(absolute_settings(config)))
    if data is not None:
        write_record(path, data)


def absolute_settings(config: ExperimentConfig) -> ExperimentConfig:
    """Return a config that means the same files from every working folder."""
    train, teacher = config.train, config.train.distill_from
    if teacher is not None and address_of(teacher) is None:
        teacher = str(Path(teacher).expanduser().absolute())
        train = dataclasses.replace(train, distill_from=teacher)
    return dataclasses.replace(config, data=absolute_paths(config.data), train=train)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run folder {path} can't be written ({error.strerror}); "
        "choose another --run-dir"
    )


def check_settings(path: Path, config: ExperimentConfig) -> None:
    """Raise ConfigError for other settings than a run's, those of its data left out.

    Nothing is read but two files: this is for before jax is loaded.
    """
    if (path / CONFIG).is_file() and has_begun(path):
        before = parse_config(path)
        data = {name for name in _flatten(config) if name.startswith("data.")}
        _refuse_others(path, before, config, _free_fields(path) | data)


def as_recorded(path: Path, config: ExperimentConfig) -> ExperimentConfig:
    """Return a config with what auto settled in a folder's run, once a step is taken.

    Before that it is settled anew: the step may not have fitted.
    """
    if (path / CONFIG).is_file() and has_begun(path) and _has_trained(path):
        return adopt_recompute(config, parse_config(path))
    return config


def _refuse_others(
    path: Path, before: ExperimentConfig, config: ExperimentConfig, free: Set[str]
) -> None:
    old, new = _flatten(before), _flatten(config)
    moved = "data.path" in free  # as the data is the same
    differing = [
        f"{name} is {new[name]!r}, was {old[name]!r}"
        for name in new
        if name not in free and not _agree(name, old[name], new[name], moved)
    ]
    if differing:
        raise ConfigError(
            f"{path} belongs to another config: {'; '.join(differing)}; "
            "restore these or choose another --run-dir"
        )


def _check_config(
    path: Path, config: ExperimentConfig, resume: bool, data: DataRecord | None
) -> DataRecord | None:
    """Refuse other settings or data than a run's; return the record to write."""
    if not (path / CONFIG).exists():
        return data
    if not resume and (path / METRICS).exists():
        raise ConfigError(
            f"{path} has a run already; resume it or choose another --run-dir"
        )
    before = absolute_settings(parse_config(path))
    record, begun = read_record(path), has_begun(path)
    free = _free_fields(path)
    if begun and record is not None and data is not None:
        free |= record.moved_fields(data)
    if begun:
        _refuse_others(path, before, config, free)
    if record is None or data is None:
        return data
    return record.followed_by(data, path, accept=config.data.allow_changed or not begun)


def check_saved(
    path: Path, config: ExperimentConfig, saved: Mapping[str, Any], step: int
) -> None:
    """Refuse another config than `saved`, which a run's checkpoint of `step` has.

    A config.json has no checksum: one flipped digit of it can give other numbers. What
    a run may change as it goes on may differ, and where its data lies, as the data's
    record says whether it is the same. A checkpoint that the run was made with, of
    another run, settles the model alone. Fields that an older version didn't save
    aren't compared. Raises CheckpointError.
    """
    if not has_begun(path):
        return
    now = parse_json(format_json(dataclasses.asdict(config)), CONFIG)
    if not _has_trained_to(path, step):
        now = {"model": now["model"]}
    free = FREE_FIELDS | _MOVED_FIELDS
    free |= _MEMORY_FIELDS if step == 0 else set()
    differing = [text for name, text in _differing(now, saved) if name not in free]
    if differing:
        raise CheckpointError(
            f"{path / CONFIG} isn't of the run that was trained: "
            f"{'; '.join(differing[:8])}; restore the file"
        )


def _agree(name: str, one: Any, other: Any, moved: bool) -> bool:
    """Whether two values of a field give the same numbers.

    `moved`: the data may lie elsewhere; a mixture's weights must still be the same.
    """
    if name == _TEACHER:
        return (one is None) == (other is None)
    if name == _MIX and moved and one and other:
        one, other = ([s.weight for s in read_mix(mix)] for mix in (one, other))
    return one == other


def _has_trained_to(path: Path, step: int) -> bool:
    """Whether the run itself saved the checkpoint of a step, after training to it.

    True where its metrics are lost: then nobody can say.
    """
    file = path / METRICS
    if not file.is_file():
        return True
    lines = read_json_lines(file, step=True).records
    return any(line["kind"] == "train" and line["step"] <= step for line in lines)


def _has_trained(path: Path) -> bool:
    """Whether a run has taken a step, by its metrics or its checkpoints."""
    file = path / METRICS
    if file.is_file() and file.stat().st_size:  # one without a line is left by failures
        return True
    return any((path / CHECKPOINTS).glob("[1-9]*"))


def _free_fields(path: Path) -> frozenset[str]:
    """Return what the run in a folder may change as it goes on."""
    return FREE_FIELDS if _has_trained(path) else FREE_FIELDS | _MEMORY_FIELDS


def _differing(now: Any, before: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Yield the dotted name of each field that both have and that differs, and how."""
    if isinstance(now, dict) and isinstance(before, Mapping):
        for key in [key for key in now if key in before]:
            inner = f"{name}.{key}" if name else key
            yield from _differing(now[key], before[key], inner)
    elif not _agree(name, now, before, True):
        yield name, f"{name} is {now!r}, was {before!r}"


def has_begun(path: Path) -> bool:
    """Whether a folder's run has trained, so that its settings are settled.

    A run made of another one has a checkpoint, and says in its environment of which,
    until it trains itself.
    """
    if (path / METRICS).exists():
        return True
    if not any((path / CHECKPOINTS).glob("*")):
        return False
    try:
        about = read_json(path / ENVIRONMENT)
        return not any(name in about for name in MADE_FROM)
    except (OSError, ValueError, TypeError):
        return True


def _flatten(config: Any) -> dict[str, Any]:
    """Return a config's fields by dotted name."""
    flat: dict[str, Any] = {}

    def visit(value: Any, prefix: str) -> None:
        for field in dataclasses.fields(value):
            child = getattr(value, field.name)
            if dataclasses.is_dataclass(child):
                visit(child, f"{prefix}{field.name}.")
            else:
                flat[prefix + field.name] = child

    visit(config, "")
    return flat


def write_environment(path: Path, about: Mapping[str, Any]) -> None:
    """Write `env.json`: versions, devices, the working folder's git commit."""
    import jax  # not above: a folder is looked at before jax is loaded

    devices = jax.devices()
    content = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES}
        | {name: found for name in _OPTIONAL if (found := _version(name))},
        "devices": {"kind": devices[0].device_kind, "visible": len(devices)},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        **about,
    }
    write_atomically(path / ENVIRONMENT, format_json(content, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(*args: str) -> str | None:
    try:
        out = subprocess.run(["git", *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() if out.returncode == 0 else None


def read_origin(file: Path, types: Mapping[str, type]) -> dict[str, Any] | None:
    """Return a run's note of what it began from, None where there is none.

    Raises CheckpointError unless it is an object with values of these types.
    """
    try:
        record = read_json(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        record = None
    record = record if isinstance(record, dict) else {}
    if not all(type(record.get(name)) is kind for name, kind in types.items()):
        raise CheckpointError(f"{file} is damaged; restore the file")
    return record
