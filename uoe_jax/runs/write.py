"""A model written as a run that nobody trained: the one writer of derived runs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.config import ExperimentConfig
from uoe_jax.data.progress import note_once
from uoe_jax.data.record import DataRecord
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.files import write_atomically
from uoe_jax.model import abstract_model, check_params, whole_buffers
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import CHECKPOINTS, write_environment, write_settings
from uoe_jax.runs.lock import NAME, FolderLost, RunLock
from uoe_jax.runs.result import write_result
from uoe_jax.runs.state import Progress
from uoe_jax.runs.store_lock import StoreLock
from uoe_jax.runs.stored import holds_any, publish, run_folder, take_back
from uoe_jax.stores.mirror import mirror_of
from uoe_jax.stores.objects import StoreError
from uoe_jax.tree import named_leaves


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a new run's model comes from, and what it has cost so far."""

    made_by: str  # the verb: decompose, adapt, import
    source: str  # a run's folder, or a file
    step: int = 0  # that the new run stands at
    spent: Progress = field(default_factory=Progress)  # on the model, by whoever
    # The tokenizer and hashes that the run keeps; `record_of_tokenizer` without data.
    data: DataRecord | None = None
    report: Mapping[str, Any] = field(default_factory=dict)  # of `runs/result.py`
    texts: Mapping[str, str] = field(default_factory=dict)  # kept beside it, by name
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)  # by file name, .npy
    # Other files, by name, and what writes each.
    files: Mapping[str, Callable[[Path], None]] = field(default_factory=dict)


def check_free(out: Path) -> None:
    """Raise ConfigError if a folder holds anything."""
    full = holds_any(out) or (out.is_dir() and any(out.iterdir()))
    if full or (out.exists() and not out.is_dir()):
        raise ConfigError(f"{out} isn't empty; choose another --out")


def write_run(
    folder: Path,
    config: ExperimentConfig,
    params: Mapping[str, Any],
    origin: Origin,
    *,
    buffers: Mapping[str, Any] | None = None,
) -> None:
    """Write a model as the checkpoint of a run, which trains and evaluates as any does.

    `params` are the model's by name (`trunk.blocks.0.attention.wq`); they are stored in
    the config's dtype. `buffers` are as `whole_buffers` says.
    The optimizer has no state yet: it starts when the run trains. There are no metrics
    either, so the first `uoe train` may change any field. The folder appears whole or
    not at all.

    Raises ConfigError if the folder isn't free or can't be written, or the parameters
    aren't the config's; CheckpointError if there is no room.
    """
    folder = run_folder(folder, "out", writes=True)
    check_free(folder)
    arrays = _arrays(config, params, buffers or {}, origin.step)
    with _appearing(folder) as unfinished:
        write_settings(unfinished, config, origin.data)
        about = {"by": origin.made_by, "source": origin.source}
        write_environment(unfinished, {"made_from": about})
        for name, array in origin.arrays.items():
            np.save(unfinished / name, array, allow_pickle=False)
        for name, write in origin.files.items():
            write(unfinished / name)
        if origin.report:
            write_result(unfinished, origin.report)
        for name, text in origin.texts.items():
            (unfinished / name).parent.mkdir(exist_ok=True)
            write_atomically(unfinished / name, text)
        checkpoints = Checkpoints(unfinished / CHECKPOINTS, compress=False)
        described = dataclasses.asdict(config)
        spent = dataclasses.replace(origin.spent, first_step=origin.step).as_json()
        try:
            checkpoints.save(origin.step, arrays, described, spent)
            checkpoints.close()
        except BaseException:
            # A signal ends the waiting, not the thread: nobody may write into a folder
            # that is removed.
            with suppress(CheckpointError):
                checkpoints.close()
            raise


def _arrays(
    config: ExperimentConfig,
    params: Mapping[str, Any],
    buffers: Mapping[str, Any],
    step: int,
) -> dict[str, np.ndarray]:
    """Return what a checkpoint holds of a model that hasn't trained, by name.

    Arrays that have their dtype aren't copied: a large model is in memory once.
    """
    check_params(config.model, params)
    weights = abstract_model(config.model)[1]
    arrays = {name: np.asarray(n, np.int32) for name, n in _counts(step).items()}
    for name, leaf in named_leaves(weights).items():
        arrays[f"params.{name}"] = np.asarray(params[name], leaf.dtype)
    for name, value in whole_buffers(config.model, buffers).items():
        arrays[f"buffers.{name}"] = value
    return arrays


def _counts(step: int) -> dict[str, int]:
    return {"step": step, "bad_steps": 0}


@contextmanager
def _appearing(folder: Path) -> Iterator[Path]:
    """Yield a locked folder beside the wanted one, which it becomes at the end.

    What a killed process left in it is removed; so is everything after an error. In a
    store the wanted one is locked there, too, until all is sent: of two commands that
    name it one writes.
    """
    wanted, found = folder, mirror_of(folder)
    folder = folder.resolve()
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    lock, ours, sending = None, False, False
    try:
        try:
            unfinished.mkdir(parents=True, exist_ok=True)
            if found is None:
                lock = RunLock(unfinished, note_once)
            else:
                lock = StoreLock(found[0], note_once, unfinished)
            lock.acquire()
            ours = True
            check_free(wanted)  # another may have written it since
            _clear(unfinished)
            yield unfinished
            lock.move(folder)
            sending = found is not None
            publish(wanted)
        except BaseException:
            if ours:
                shutil.rmtree(unfinished, ignore_errors=True)
            if sending and lock is not None:
                _take_back(wanted, lock)
            with suppress(OSError):  # not where another process has begun to write
                unfinished.rmdir()
            raise
        finally:
            if lock is not None:
                lock.release()
    except OSError as error:
        raise ConfigError(
            f"{folder} can't be written ({error.strerror}); choose another --out"
        ) from None
    except (CheckpointError, ConfigError) as error:
        text = str(error).replace(str(unfinished), str(folder))
        text = text.replace("is training in", "is at work in")  # or it writes, too
        raise type(error)(text.replace("--run-dir", "--out")) from None


def _take_back(folder: Path, lock: RunLock) -> None:
    """Remove a run that couldn't be sent whole, here and what the store has of it."""
    # Not where another process has taken it over: what is there may be that one's. A
    # store that is away keeps what it got.
    with suppress(StoreError, FolderLost):
        lock.look()
        lock.check()
        take_back(folder)
    shutil.rmtree(folder, ignore_errors=True)


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != NAME:
            path.unlink()
