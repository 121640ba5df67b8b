"""Where a run's numbers go: metrics.jsonl always, TensorBoard and W&B on request."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from uoe_jax.config import ExperimentConfig
from uoe_jax.files import write_atomically

Line = Mapping[str, Any]
Sink = tuple[Callable[[Line], None], Callable[[], Any]]  # write a line, close


class MetricsLog:
    """Appends lines to `path`, and to the sinks a config asks for.

    Lines after `step`, the one the run resumes from, are dropped first, so that every
    step is there once. Lines that a full disk refuses wait for the next write.
    """

    def __init__(self, path: Path, step: int):
        if path.exists():
            kept = [line for line in read_metrics(path) if line["step"] <= step]
            text = "".join(json.dumps(line) + "\n" for line in kept)
            write_atomically(path, text)
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._waiting = b""
        self._failure: str | None = None
        self._sinks: list[Sink] = []

    def add_sinks(
        self, config: ExperimentConfig, run_dir: Path, note: Callable[[str], None]
    ) -> None:
        """Open TensorBoard and W&B if asked for; a missing one costs one line."""
        if config.train.tensorboard:
            self._add(lambda: tensorboard_sink(run_dir), "tensorboard", note)
        if config.train.wandb:
            self._add(lambda: wandb_sink(config, run_dir), "wandb", note)

    def _add(
        self, make: Callable[[], Sink], name: str, note: Callable[[str], None]
    ) -> None:
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        try:
            self._sinks.append(make())
        except ImportError as error:
            note(
                f"train.{name} is on but {error.name} isn't installed; going on "
                f"without (pip install {package})"
            )
        except Exception as error:  # no network, no account: whatever it raises
            reason = " ".join(str(error).split())[:200]
            note(f"train.{name} is on but {package} fails ({reason}); going on without")

    def write(self, line: Line) -> None:
        """Append one line; numbers that aren't finite become null."""
        self._waiting += json.dumps(_finite(line)).encode() + b"\n"
        self._write_waiting()
        for write, _ in self._sinks:
            write(line)

    def _write_waiting(self) -> None:
        size = os.fstat(self._file.fileno()).st_size
        try:
            view = memoryview(self._waiting)
            while view:
                view = view[self._file.write(view) :]
            self._waiting = b""
        except OSError as error:
            os.ftruncate(self._file.fileno(), size)
            self._failure = f"{self._path} can't be written ({error.strerror})"

    def poll(self) -> list[str]:
        """Return what went wrong since the last call."""
        failure, self._failure = self._failure, None
        return [failure] if failure else []

    def sync(self) -> None:
        """Bring every line to the disk, as a checkpoint counts on them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._failure = f"{self._path} can't be written ({error.strerror})"

    def close(self) -> None:
        """Write what is left and close everything."""
        self._write_waiting()
        self._file.close()
        for _, close in self._sinks:
            close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl; a last line cut short is left out."""
    with path.open() as file:
        for text in file:
            try:
                yield json.loads(text)
            except ValueError:
                return


def scalars(line: Line, prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield (name, value) of every number in a line, nested ones by path."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from scalars(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            for index, item in enumerate(value):
                yield from scalars({f"{index:02d}": item}, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name != "step":
            yield prefix + name, value


def tensorboard_sink(run_dir: Path) -> Sink:
    """Return a writer of event files into RUN/tensorboard."""
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(str(run_dir / "tensorboard"))

    def write(line: Line) -> None:
        for name, value in scalars(line):
            writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    return write, writer.close


def wandb_sink(config: ExperimentConfig, run_dir: Path) -> Sink:
    """Return a writer to a W&B run named as the run's folder; resumed runs continue."""
    import wandb  # pyrefly: ignore[missing-import]

    run = wandb.init(
        project="uoe_jax",
        name=config.name,
        id=hashlib.sha256(str(run_dir.absolute()).encode()).hexdigest()[:16],
        resume="allow",
        dir=str(run_dir),
        config=dataclasses.asdict(config),
    )

    def write(line: Line) -> None:
        values = {f"{line['kind']}/{name}": value for name, value in scalars(line)}
        run.log(values, step=line["step"])

    return write, run.finish


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
