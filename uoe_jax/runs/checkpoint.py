"""Checkpoints of a run: written in the background by Orbax, complete with checksums.

A folder holds one step directory per checkpoint: `state/` (one zarr array per leaf),
`config/`, `progress/` and `integrity.json`, which is written last. A step without it
is unfinished and is never restored.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from uoe_jax.errors import CheckpointError
from uoe_jax.files import read_json
from uoe_jax.runs import integrity
from uoe_jax.runs.stored import stored_steps
from uoe_jax.stores.mirror import named
from uoe_jax.tree import named_leaves

_LEAST_SHARE = 0.8  # of an array's bytes: compression saves less of trained weights
_FILE_BYTES = 2 * 4096  # of blocks for an array's two files
_AT_ONCE = 64 << 20  # bytes of arrays that are written together, uncompressed
_MEET_SECONDS = 24 * 3600  # for the slowest process's part to reach a store
_SHOWN = 6  # problems spelled out in one message
_TEMPORARY = ".orbax-checkpoint-tmp"


def snapshot(tree: PyTree) -> dict[str, Any]:
    """Return host copies of a pytree's arrays by name; the originals may be donated.

    Of arrays that several processes hold together the arrays themselves: `save` copies
    each process's part before it returns.
    """
    if jax.process_count() > 1:
        return named_leaves(tree)
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return {name: np.array(leaf) for name, leaf in named_leaves(tree).items()}


def _is_worth_reading(record: logging.LogRecord) -> bool:
    # Orbax logs a traceback for every array and thread that a full disk fails, and at
    # every save what it skips. What matters is raised, and told by `poll` in a line.
    return "orbax" not in record.pathname


# What of a storage library's long message matters.
_CAUSES = tuple(
    os.strerror(number)
    for number in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EFBIG,
        errno.EROFS,
        errno.EACCES,
        errno.EIO,
        errno.ESTALE,
    )
)


def _is_told_already(record: logging.LogRecord) -> bool:
    """Whether a record is about the write of an array whose save failed by another's.

    Orbax waits for the first that fails; the event loop logs each of the others.
    """
    error = record.exc_info[1] if record.exc_info else None
    forgotten = "exception was never retrieved" in record.getMessage()
    return forgotten and any(cause in str(error) for cause in _CAUSES)


def _is_news(record: logging.LogRecord) -> bool:
    return not _is_told_already(record)


def _reason(error: Exception) -> str:
    """Return in a few words why a save failed."""
    text = " ".join(str(error).split())
    causes = [cause for cause in _CAUSES if cause in text]
    return causes[0] if causes else text[:300] or type(error).__name__


def _check_room(folder: Path, arrays: Mapping[str, Any]) -> None:
    """Raise OSError where arrays certainly don't fit, before anything is written."""
    size = sum(array.nbytes + _FILE_BYTES for array in arrays.values())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < _LEAST_SHARE * size:
        raise OSError(
            f"{os.strerror(errno.ENOSPC)}: {size / 1e6:,.1f} MB of arrays, "
            f"{free / 1e6:,.1f} MB free"
        )


def _drop_late_errors() -> None:
    """Keep quiet of writes that end after their save has failed already.

    TensorStore hands the result of each to an event loop that Orbax has closed by then,
    and prints a traceback where that fails; what failed before it closed is logged.
    """
    logging.getLogger("asyncio").addFilter(_is_news)
    before, unraisable = sys.excepthook, sys.unraisablehook
    late = lambda error: str(error) == "Event loop is closed"
    if not getattr(before, "drops_late_errors", False):

        def hook(kind: Any, error: BaseException, trace: Any) -> None:
            if not late(error):
                before(kind, error, trace)

        hook.drops_late_errors = True  # pyrefly: ignore[missing-attribute]
        sys.excepthook = hook
    # Some of its threads can't raise, and go by Python's other hook.
    if not getattr(unraisable, "drops_late_errors", False):

        def ignore(dropped: Any) -> None:
            if not late(dropped.exc_value):
                unraisable(dropped)

        ignore.drops_late_errors = True  # pyrefly: ignore[missing-attribute]
        sys.unraisablehook = ignore


class _InTurn(ocp.type_handlers.NumpyHandler):
    """Saves host arrays a few at a time.

    TensorStore holds a copy of every array that it is writing, and Orbax writes all at
    once: the whole model twice.
    """

    async def serialize(
        self, values: Any, infos: Any, args: Any = None
    ) -> Sequence[ocp.future.Future]:
        """Write the arrays, and return when they are on disk."""
        args = args or [ocp.SaveArgs()] * len(values)
        for part in _parts([value.nbytes for value in values]):
            for saved in await super().serialize(values[part], infos[part], args[part]):
                saved.result()
        return []


def _parts(sizes: Sequence[int]) -> Iterator[slice]:
    """Yield slices of a sequence that hold `_AT_ONCE` bytes, or one item."""
    start, held = 0, 0
    for place, size in enumerate(sizes):
        if place > start and held + size > _AT_ONCE:
            yield slice(start, place)
            start, held = place, 0
        held += size
    yield slice(start, len(sizes))


def _without_copies(compress: bool) -> dict[str, Any]:
    """Return what lets Orbax save host arrays without copying them first.

    Nobody changes the arrays of a `snapshot`. Several processes save none of these.
    Compression keeps all cores busy only where it has all arrays at once.
    """
    if jax.process_count() > 1:
        return {}
    handlers = ocp.type_handlers
    kind = handlers.NumpyHandler if compress else _InTurn
    host = kind(deepcopy_host_arrays=False)
    registry = handlers.create_type_handler_registry(
        (np.ndarray, host), (jax.Array, handlers.ArrayHandler())
    )
    return {"type_handler_registry": registry}


def _items(
    arrays: dict[str, Any], config: dict[str, Any], progress: dict[str, Any]
) -> ocp.args.Composite:
    return ocp.args.Composite(
        state=ocp.args.PyTreeSave(arrays),
        config=ocp.args.JsonSave(config),
        progress=ocp.args.JsonSave(progress),
    )


def _digest(manifest: Mapping[str, Any], name: str) -> str | None:
    # An array that the manifest doesn't know at all has to be checked, and fails.
    return manifest["arrays"].get(name, {"blake2b": "absent"}).get("blake2b")


def _check_name(folder: Path) -> None:
    """Raise CheckpointError for bytes in a path that TensorStore can't take."""
    try:
        str(folder.absolute()).encode()
    except UnicodeEncodeError:
        raise CheckpointError(
            f"{folder} has bytes in its name that aren't UTF-8, which checkpoints "
            "can't be stored under; rename it"
        ) from None


class Checkpoints:
    """The checkpoints in one folder; saves run on one background thread.

    `keep` complete steps stay on disk; an older one is deleted only when a newer one
    is complete. `about` is written into each step's manifest. Without `compress` saving
    takes the memory of one array beside those saved; trained weights hardly get
    smaller. `poll` reports failed saves, `close` the last one if it failed.
    """

    # Of all stores: Orbax's barriers between processes allow one save at a time.
    _together: Future[None] | None = None
    _sent = 0  # steps that processes have sent to a store together

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        about: Mapping[str, Any] | None = None,
        compress: bool = True,
    ):
        _check_name(folder)
        self._compress = compress
        self.folder, self.keep, self._about = folder, keep, dict(about or {})
        self._stored = stored_steps(folder)  # where the run lies in a store
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._pending_step = -1
        self._failures: list[str] = []
        self._last_failure: str | None = None
        logging.getLogger("absl").addFilter(_is_worth_reading)

    def steps(self) -> list[int]:
        """Return the complete steps, oldest first."""
        return sorted(s for s in self._directories() if self._complete(s))

    def discard_unfinished(self) -> list[int]:
        """Delete what an interrupted save left behind; return the steps concerned."""
        found = {s for s in self._directories() if not self._complete(s)}
        found |= self._stored.unfinished() if self._stored else set()
        for step in found:
            self._remove(step)
        for path in self.folder.glob(f"*{_TEMPORARY}*"):
            if (number := path.name.split(".")[0]).isdigit():
                found.add(int(number))
                shutil.rmtree(path)
        return sorted(found)

    def newer_than(self, step: int) -> list[int]:
        """Return the complete steps after one; the next save deletes them."""
        return [newer for newer in self.steps() if newer > step]

    def save(
        self,
        step: int,
        arrays: Mapping[str, Any],
        config: Mapping[str, Any],
        progress: Mapping[str, Any],
    ) -> None:
        """Start saving a `snapshot`; waits first for the save before this one.

        All processes of a run must call it; each writes what it holds.
        """
        self.wait()
        _drop_late_errors()
        self._pending_step = step
        content = (dict(arrays), dict(config), dict(progress))
        if jax.process_count() > 1:
            self._pending = self._write_together(step, *content)
        else:
            self._pending = self._pool.submit(self._write, step, *content)

    def wait(self) -> None:
        """Wait for the save in progress; a failure is kept for `poll` and `close`."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
            self._last_failure = None
        except Exception as error:  # whatever the storage raises: the run goes on
            self._last_failure = (
                f"saving step {self._pending_step} into {self.folder} failed: "
                f"{_reason(error)}"
            )
            self._failures.append(self._last_failure)
            self._clean_up(self._pending_step)

    def poll(self) -> list[str]:
        """Return the failures since the last call, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        """Wait for the last save; raise CheckpointError if it failed."""
        self.wait()
        self._pool.shutdown()
        if self._last_failure:
            self._clean_up(self._pending_step)  # of writes that ended later
            kept = self.steps()
            newest = f"step {kept[-1]} is the newest kept" if kept else "none is kept"
            raise CheckpointError(
                f"{self._last_failure}; {newest}: make room there and run the same "
                "command again"
            )

    def confirm(self) -> None:
        """Wait for the save of a run's first state; raise CheckpointError if it failed.

        Nothing is lost then: nothing was trained.
        """
        self.wait()
        if self._last_failure:
            self._failures.clear()
            raise CheckpointError(
                f"{self._last_failure}; nothing was trained: make room or choose "
                "another --run-dir"
            )

    def about(self, step: int) -> dict[str, Any]:
        """Return what a step's manifest says of it."""
        return integrity.read_manifest(self.folder / str(step))

    def config(self, step: int) -> dict[str, Any]:
        """Return the config that a step was saved with, {} where there is none."""
        try:
            file = self.folder / str(step) / "config" / "metadata"
            return dict(read_json(file))
        except (OSError, ValueError, TypeError):
            return {}

    def restore(
        self,
        template: Mapping[str, Any],
        *,
        step: int | None = None,
        optional: Container[str] = (),
    ) -> tuple[int, dict[str, np.ndarray], dict[str, Any]]:
        """Return (step, arrays, progress) of the newest or the asked-for checkpoint.

        `template` gives name -> anything with `shape`; other saved arrays stay unread.
        Of `optional` names those that weren't saved are left out.
        Raises CheckpointError if nothing is there, bytes have changed (naming files and
        arrays, and the newest step that is intact) or shapes differ.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"{self.folder} holds no checkpoint; train first")
        if step is None:
            step = steps[-1]
        if step not in steps:
            have = ", ".join(map(str, steps))
            raise CheckpointError(f"{self.folder} has no step {step}; it has {have}")
        self._fetch(step, template)
        if problems := self._problems(step, template):
            raise CheckpointError(self._refusal(step, problems, template))
        manifest = integrity.read_manifest(self.folder / str(step))
        saved = manifest["arrays"]
        template = {
            n: t for n, t in template.items() if n in saved or n not in optional
        }
        self._check_shapes(step, template, saved)
        shapes = {name: list(leaf.shape) for name, leaf in template.items()}
        if problems := integrity.check_headers(self.folder / str(step), shapes):
            raise CheckpointError(self._refusal(step, problems, template))
        arrays, progress = self._read(step, template)
        # Of arrays that several processes wrote only the files have checksums.
        digested = {n: a for n, a in arrays.items() if _digest(manifest, n)}
        if problems := integrity.check_arrays(digested, manifest):
            raise CheckpointError(self._refusal(step, problems, template))
        return step, arrays, progress

    def _directories(self) -> list[int]:
        if not self.folder.is_dir():
            return []
        return [int(p.name) for p in self.folder.iterdir() if p.name.isdigit()]

    def _complete(self, step: int) -> bool:
        folder = self.folder / str(step)
        manifest = folder / integrity.MANIFEST
        # Alone it came late, when its step had been deleted from a store.
        return manifest.is_file() and any(path != manifest for path in folder.iterdir())

    def _manager(self, background: bool = False) -> ocp.CheckpointManager:
        # Of a run in a store each process has a folder of its own.
        alone = self._stored is not None and jax.process_count() > 1
        processes = ocp.options.MultiprocessingOptions(
            primary_host=None if alone else 0
        )
        # One file tree per array (no OCDBT), so a damaged file names its array.
        return ocp.CheckpointManager(
            self.folder.absolute(),
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=background,
                multiprocessing_options=processes,
                enable_per_process_directory_creation=alone,
            ),
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(
                    use_ocdbt=False,
                    use_compression=self._compress,
                    multiprocessing_options=processes,
                    **_without_copies(self._compress),
                ),
                "config": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
                "progress": ocp.JsonCheckpointHandler(
                    multiprocessing_options=processes
                ),
            },
        )

    def _write(
        self,
        step: int,
        arrays: dict[str, np.ndarray],
        config: dict[str, Any],
        progress: dict[str, Any],
    ) -> None:
        _check_room(self.folder, arrays)
        described = integrity.describe_arrays(arrays)
        folder = self.folder / str(step)
        if folder.exists():  # of a future that a resumed run repeats
            self._remove(step)
        with self._manager() as manager:
            manager.save(step, args=_items(arrays, config, progress), force=True)
            integrity.write_manifest(folder, described, step=step, **self._about)
        self._send(step)
        self._prune(step)

    def _send(self, step: int) -> None:
        """Send a step to the run's store; one that fails isn't kept here either."""
        if self._stored is None:
            return
        try:
            self._stored.push(step)
        except Exception:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            raise

    def _write_together(
        self,
        step: int,
        arrays: dict[str, jax.Array],
        config: dict[str, Any],
        progress: dict[str, Any],
    ) -> Future[None]:
        """Copy this process's part of the arrays and start writing it."""
        described = {
            name: {"shape": list(array.shape), "dtype": str(array.dtype)}
            for name, array in arrays.items()
        }
        primary = jax.process_index() == 0
        if Checkpoints._together is not None:
            futures.wait([Checkpoints._together])
        folder = self.folder / str(step)
        if primary and folder.exists():
            self._remove(step)
        elif self._stored is not None:  # what a pull brought
            shutil.rmtree(folder, ignore_errors=True)
        multihost_utils.sync_global_devices(f"checkpoint {named(self.folder)} {step}")
        manager = self._manager(background=True)
        manager.save(step, args=_items(arrays, config, progress), force=True)

        def write() -> None:
            with manager:
                manager.wait_until_finished()

        def finish() -> None:
            if self._stored is not None:
                self._send_together(step, described, write)
            else:
                write()
                if primary:
                    integrity.write_manifest(
                        folder, described, step=step, **self._about
                    )
            if primary:
                self._prune(step)

        Checkpoints._together = self._pool.submit(finish)
        return Checkpoints._together

    def _send_together(
        self, step: int, described: Mapping[str, Any], write: Callable[[], None]
    ) -> None:
        """Write and send this process's part of a step; the first one completes it."""
        assert self._stored is not None
        folder, index = self.folder / str(step), jax.process_index()
        Checkpoints._sent += 1
        name = f"sent {self.folder.name} {step} {Checkpoints._sent}"
        # Not a device's barrier: the main thread uses those meanwhile.
        barrier = ocp.multihost.get_barrier_sync_fn()
        meet = lambda: barrier(key=name, timeout_ms=1000 * _MEET_SECONDS)
        try:
            self._stored.push_part(step, index, write, meet)
            if index == 0:
                files = self._stored.take_parts(step, jax.process_count())
                integrity.write_manifest(
                    folder, described, files, step=step, **self._about
                )
                self._stored.complete(step)
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        if index:  # a part alone is of no use here
            shutil.rmtree(folder, ignore_errors=True)

    def _prune(self, step: int) -> None:
        """Delete complete steps before the newest `keep` ones, and all after `step`.

        Step 0, which any start makes again, stays only until there is a later one.
        """
        steps = self.steps()
        current = [s for s in steps if s <= step][-self.keep :]
        if step > 0:
            current = [s for s in current if s > 0]
        for other in set(steps) - set(current):
            self._remove(other)

    def _remove(self, step: int) -> None:
        # Without its manifest a step half removed doesn't pass for a whole one.
        if self._stored is not None:
            self._stored.remove(step)
        folder = self.folder / str(step)
        (folder / integrity.MANIFEST).unlink(missing_ok=True)
        if folder.exists() or self._stored is None:
            shutil.rmtree(folder)

    def _read(
        self, step: int, template: Mapping[str, Any]
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        target = {name: 0 for name in template}
        as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in target}
        try:
            with self._manager() as manager:
                restored = manager.restore(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.PyTreeRestore(
                            item=target, restore_args=as_numpy, partial_restore=True
                        ),
                        progress=ocp.args.JsonRestore(),
                    ),
                )
        except (ValueError, OSError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            path = self.folder / str(step)
            raise CheckpointError(f"{path} can't be read: {reason}") from None
        return dict(restored["state"]), restored["progress"]

    def _problems(self, step: int, template: Mapping[str, Any]) -> list[str]:
        folder = self.folder / str(step)
        try:
            manifest = integrity.read_manifest(folder)
        except CheckpointError as error:
            return [str(error)]
        return integrity.check_files(folder, manifest, wanted=template)

    def _fetch(self, step: int, template: Mapping[str, Any]) -> None:
        """Bring the files of a stored step that aren't here as its manifest says."""
        if self._stored is None:
            return
        folder = self.folder / str(step)
        with suppress(CheckpointError):  # a damaged manifest is refused later
            manifest = integrity.read_manifest(folder)
            wrong = integrity.find_wrong(folder, manifest, wanted=template)
            self._stored.fetch(step, list(wrong))

    def _refusal(
        self, step: int, problems: list[str], template: Mapping[str, Any]
    ) -> str:
        shown = "; ".join(problems[:_SHOWN])
        if len(problems) > _SHOWN:
            shown += f"; and {len(problems) - _SHOWN} more"
        older = [s for s in reversed(self.steps()) if s < step]
        for other in older:
            if not self._problems(other, template):
                fix = f"step {other} is intact: continue with --resume-step {other}"
                break
        else:
            fix = "no older step is intact: train again in another --run-dir"
        return f"checkpoint of step {step} is corrupt: {shown}; {fix}"

    def _check_shapes(
        self, step: int, template: Mapping[str, Any], saved: Mapping[str, Any]
    ) -> None:
        problems = []
        for name, leaf in template.items():
            want, have = list(leaf.shape), saved.get(name, {}).get("shape")
            if have is None:
                problems.append(f"{name} is absent, expected {want}")
            elif have != want:
                problems.append(f"{name} is {have}, expected {want}")
        if problems:
            count, shown = len(problems), "; ".join(problems[:_SHOWN])
            more = f"; and {count - _SHOWN} more" if count > _SHOWN else ""
            raise CheckpointError(
                f"checkpoint of step {step} in {self.folder} is of another model: "
                f"{shown}{more}; use the config it was trained with"
            )

    def _clean_up(self, step: int) -> None:
        """Free the space of a save that failed; what can't be deleted stays ignored."""
        for path in self.folder.glob(f"{step}{_TEMPORARY}*"):
            shutil.rmtree(path, ignore_errors=True)
        if not self._complete(step):
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
