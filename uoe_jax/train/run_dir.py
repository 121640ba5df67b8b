"""The folder of a run: its lock, its config, the environment it ran in."""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from uoe_jax.config import ExperimentConfig, from_json, to_json
from uoe_jax.errors import ConfigError
from uoe_jax.files import write_atomically

CONFIG, ENVIRONMENT, METRICS = "config.json", "env.json", "metrics.jsonl"
CHECKPOINTS, BEST = "checkpoints", "best"
_LOCK = ".lock"

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
        "train.steps",
        "train.max_seconds",
        "train.log_every",
        "train.eval_every",
        "train.eval_batches",
        "train.save_every",
        "train.keep_checkpoints",
        "train.max_bad_steps",
        "train.tensorboard",
        "train.wandb",
        "train.profile",
    }
)
_PACKAGES = ("uoe_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


@contextmanager
def open_run_dir(
    path: Path,
    config: ExperimentConfig,
    *,
    resume: bool = True,
    note: Callable[[str], None] = print,
) -> Iterator[Path]:
    """Create or reopen a run's folder and hold its lock.

    Raises ConfigError when the folder can't be written, another process trains in it,
    it belongs to another config, or it has a run and `resume` is off.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        try:
            _acquire(lock, path, note)
            _check_config(path, config, resume)
            write_atomically(path / CONFIG, to_json(config))
        except OSError as error:
            raise _unwritable(path, error) from None
        yield path
        os.ftruncate(lock, 0)
    except BaseException as error:
        # Whoever refuses to start leaves the owner's name in place.
        if not isinstance(error, _Locked):
            os.ftruncate(lock, 0)
        raise
    finally:
        os.close(lock)


def _unwritable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"run folder {path} can't be written ({error.strerror}); "
        "choose another --run-dir"
    )


class _Locked(ConfigError):
    """Another process holds the lock."""


def _acquire(lock: int, path: Path, note: Callable[[str], None]) -> None:
    """Take the lock; the kernel frees it when its holder dies, however it dies."""
    here = socket.gethostname()
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        taken = False
    except BlockingIOError:
        taken = True
    except OSError:  # a file system without locks
        taken = False
    owner = _read_owner(lock)
    who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
    if taken:
        raise _Locked(
            f"{who} is training in {path}; stop it or choose another --run-dir"
        )
    if owner and owner.get("host") != here:
        raise _Locked(
            f"{who} was training in {path} and didn't end cleanly; if it is gone, "
            f"delete {path / _LOCK}"
        )
    if owner:
        note(f"recovered the lock of {who}, which is gone")
    os.ftruncate(lock, 0)
    os.pwrite(lock, json.dumps({"pid": os.getpid(), "host": here}).encode(), 0)


def _read_owner(lock: int) -> dict[str, Any]:
    try:
        owner = json.loads(os.pread(lock, 4096, 0))
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _check_config(path: Path, config: ExperimentConfig, resume: bool) -> None:
    file = path / CONFIG
    if not file.exists():
        return
    if not resume and (path / METRICS).exists():
        raise ConfigError(
            f"{path} has a run already; resume it or choose another --run-dir"
        )
    old, new = _flatten(from_json(file.read_text())), _flatten(config)
    differing = [
        f"{name} is {new[name]!r}, was {old[name]!r}"
        for name in new
        if name not in FREE_FIELDS and old[name] != new[name]
    ]
    if differing and (path / METRICS).exists():
        raise ConfigError(
            f"{path} belongs to another config: {'; '.join(differing)}; "
            "restore these or choose another --run-dir"
        )


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
    devices = jax.devices()
    content = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "devices": {"kind": devices[0].device_kind, "visible": len(devices)},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        **about,
    }
    write_atomically(path / ENVIRONMENT, json.dumps(content, indent=2) + "\n")


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
