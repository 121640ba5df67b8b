"""Runs that lie in a store: what goes up when, so that a reader never sees a half one.

A run is there once its config.json is, a checkpoint once its integrity.json is, which
are sent last and deleted first. Metrics and other files go up whole before each
checkpoint, so that they reach at least as far. Imports no jax.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from uoe_jax.files import (
    format_json,
    local_path,
    parse_json,
    read_json,
    write_atomically,
)
from uoe_jax.stores.mirror import Mirror, mirror_of, named, open_mirror
from uoe_jax.stores.objects import StoreError, address_of

_CONFIG, _MANIFEST = "config.json", "integrity.json"
LOCK = ".lock"
# A checkpoint's folder; a folder such as `merged` may hold a run of its own.
_STEP = re.compile(r"((?:.*/)?(?:checkpoints|best)/[^/]+)/(.*)", re.DOTALL)
_CHUNK = re.compile(r"state/[^/]+/[^.][^/]*")
_PART = "part-{}.json"  # checksums of what a process sent
_ARRAY = re.compile(r"state/[^/]+/")
# The lock, what a process is writing, and the folder that W&B sends by itself.
_KEPT = re.compile(r"\.lock|wandb/.*|(?:.*/)?\.[^/]+\.\d+|(?:.*/)?[^/]*orbax[^/]*tmp.*")


# What commands that read a run draw of it.
_DRAWN = re.compile(r".*\.(?:html|png|svg)", re.DOTALL)


def run_folder(
    path: str | os.PathLike[str], what: str, *, writes: bool = False
) -> Path:
    """Return the local folder of a run, of one in a store a copy of it.

    `what` names it in messages. A copy lacks the arrays of checkpoints, which
    `Checkpoints.restore` brings; what is written there goes up by `publish`. Of a
    folder that holds no run, such as one of many runs, nothing is brought. Raises
    ConfigError for what names no folder, StoreError where a store can't be used.
    """
    address = address_of(path)
    found = mirror_of(Path(path)) if writes and isinstance(path, Path) else None
    if found is not None and not found[0].own:  # that others may read
        address = named(Path(path))
    if address is None:
        return local_path(path, what)
    how = {"lazy": _is_array, "kept": _is_kept, "needs": _CONFIG}
    return open_mirror(address, writes=writes, **how).folder


def refresh(folder: Path) -> None:
    """Make a copy of a run what its store has now; a local run stays as it is."""
    if (found := mirror_of(folder)) is not None:
        found[0].pull()


def publish(folder: Path) -> None:
    """Send what changed in a run's folder; nothing is done for one that isn't a copy.

    Of a copy that others read too only pages and pictures: they bring newer files,
    which look as if this process had changed them. Raises StoreError where that fails.
    """
    found = mirror_of(folder)
    if found is None:
        return
    mirror = found[0]
    if not mirror.own:
        drawn = [n for n in mirror.changed() if _DRAWN.fullmatch(n)]
        mirror.push(n for n in drawn if not _STEP.fullmatch(n))
        return
    steps = {m[1] for name in mirror.changed() if (m := _STEP.fullmatch(name))}
    for step in sorted(steps):
        if _is_whole(mirror.folder / step):
            push_step(mirror, step)
    push_files(mirror)


def take_back(folder: Path) -> None:
    """Delete from the store what was sent of a run's folder, its config.json first.

    The lock stays. Raises StoreError where something can't be deleted.
    """
    found = mirror_of(folder)
    if found is None:
        return
    mirror, place = found
    below = f"{place}/" if place else ""
    names = [name for name in list(mirror.sizes) if name.startswith(below)]
    names = [name for name in names if not _is_kept(name)]
    mirror.remove(names, first=f"{below}{_CONFIG}")


def holds_any(folder: Path) -> bool:
    """Whether a store has something in the folder that this is the copy of."""
    found = mirror_of(folder)
    return found is not None and found[0].holds_any()


def push_files(mirror: Mirror) -> None:
    """Send what changed outside checkpoints; a new run's config.json comes last."""
    names = [name for name in mirror.changed() if not _STEP.fullmatch(name)]
    mirror.push(names, last=None if _CONFIG in mirror.sizes else _CONFIG)


def push_step(mirror: Mirror, step: str) -> None:
    """Send a complete checkpoint, such as `checkpoints/8`."""
    remove_step(mirror, step)  # of a future that a resumed run repeats
    names = files_below(mirror, step)
    mirror.push(names, last=f"{step}/{_MANIFEST}")


def remove_step(mirror: Mirror, step: str) -> None:
    """Delete a checkpoint from the store."""
    names = [name for name in list(mirror.sizes) if name.startswith(f"{step}/")]
    mirror.remove(names, first=f"{step}/{_MANIFEST}")


def files_below(mirror: Mirror, place: str) -> list[str]:
    """Return the names of all files of a copy below one of its folders."""
    folder = mirror.folder / place
    return sorted(
        path.relative_to(mirror.folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file()
    )


class StoredSteps:
    """The checkpoints of one folder of a run as its store has them."""

    def __init__(self, mirror: Mirror, place: str):
        self._mirror, self._place = mirror, place

    def unfinished(self) -> set[int]:
        """Return the steps in the store that lack their manifest, or all but that."""
        steps: dict[int, set[str]] = {}
        for name in list(self._mirror.sizes):  # another thread may send the best
            folder, _, rest = name.removeprefix(f"{self._place}/").partition("/")
            if name.startswith(f"{self._place}/") and folder.isdigit():
                steps.setdefault(int(folder), set()).add(rest)
        return {
            step
            for step, files in steps.items()
            if _MANIFEST not in files or len(files) == 1
        }

    def push(self, step: int) -> None:
        """Send the run's other files, then a complete step.

        Before, what was sent of steps that failed is deleted, but for one of which a
        request that was given up may still come: that waits for a later save. If its
        manifest comes, all else of it is there.
        """
        for failed in self.unfinished() - {step}:
            if not self._mirror.objects.is_late(f"{self._place}/{failed}/"):
                self.remove(failed)
        push_files(self._mirror)
        push_step(self._mirror, f"{self._place}/{step}")

    def push_part(
        self, step: int, index: int, write: Callable[[], None], meet: Callable[[], None]
    ) -> None:
        """Write and send one of several processes' part of a step, and meet the others.

        All but the first send what they hold of arrays, and the checksums of it. The
        others are met even where that fails: nobody waits in vain.
        """
        from uoe_jax.runs.integrity import describe_files  # which imports numpy

        try:
            write()
            place = f"{self._place}/{step}"
            push_files(self._mirror)
            names = files_below(self._mirror, place)
            if index:
                names = [n for n in names if _CHUNK.fullmatch(n[len(place) + 1 :])]
                folder = self._mirror.folder / place
                kept = {n[len(place) + 1 :] for n in names}
                found = describe_files(folder)
                part = {name: found[name] for name in found if name in kept}
                write_atomically(folder / _PART.format(index), format_json(part))
                names.append(f"{place}/{_PART.format(index)}")
            self._mirror.push(names, last=f"{place}/{_PART.format(index)}")
        finally:
            meet()

    def take_parts(self, step: int, count: int) -> dict[str, Any]:
        """Return bytes and digest of the files that the other processes sent.

        Raises StoreError where one of them didn't.
        """
        files: dict[str, Any] = {}
        for index in range(1, count):
            name = f"{self._place}/{step}/{_PART.format(index)}"
            content = self._mirror.objects.read(name)
            if content is None:
                raise StoreError(f"process {index} of {count} couldn't send its part")
            files |= parse_json(content, name)
        for name, about in files.items():
            self._mirror.sizes[f"{self._place}/{step}/{name}"] = about["bytes"]
        for index in range(1, count):
            self._mirror.sizes[f"{self._place}/{step}/{_PART.format(index)}"] = 0
        return files

    def complete(self, step: int) -> None:
        """Send the manifest of a step whose parts are there."""
        place = f"{self._place}/{step}"
        self._mirror.push([f"{place}/{_MANIFEST}"])
        parts = [n for n in list(self._mirror.sizes) if n.startswith(f"{place}/part-")]
        self._mirror.remove(parts)

    def remove(self, step: int) -> None:
        """Delete a step."""
        remove_step(self._mirror, f"{self._place}/{step}")

    def fetch(self, step: int, names: list[str]) -> None:
        """Bring files of a step, by their names in its manifest."""
        self._mirror.fetch(f"{self._place}/{step}/{name}" for name in names)


def stored_steps(folder: Path) -> StoredSteps | None:
    """Return the store's side of a folder of checkpoints; None of a local run."""
    found = mirror_of(folder)
    return None if found is None else StoredSteps(*found)


def _is_whole(step: Path) -> bool:
    """Whether all files of a checkpoint are here: not of one that others send too."""
    try:
        files = read_json(step / _MANIFEST)["files"]
        return all((step / name).is_file() for name in files)
    except (OSError, ValueError, TypeError, KeyError):
        return False


def _is_array(name: str) -> bool:
    found = _STEP.fullmatch(name)
    return found is not None and _ARRAY.match(found[2]) is not None


def _is_kept(name: str) -> bool:
    return _KEPT.fullmatch(name) is not None
