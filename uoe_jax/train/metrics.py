"""Where a run's numbers go: metrics.jsonl always, TensorBoard and W&B on request."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError, extra_packages, first_line
from uoe_jax.files import format_json, read_json_lines, write_atomically
from uoe_jax.train.events import drop_events_after

Line = Mapping[str, Any]
Sink = tuple[Callable[[Line], None], Callable[[], Any]]  # write a line, close


def check_sinks(config: ExperimentConfig) -> None:
    """Raise ConfigError if what is to follow the training isn't installed."""
    for name, package in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        if not getattr(config.train, name):
            continue
        if package not in sys.modules and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"train.{name} is on but {package} isn't installed; pip install "
                f"'uoe_jax[{name}]', or leave it off"
            )


class MetricsLog:
    """Appends lines to `path`, and to the sinks a config asks for.

    Lines after `step`, the one the run resumes from, are dropped at the first write, so
    that every step is there once. Lines that aren't metrics are left out, told of by
    `note`, and the file as it was is kept. Lines that a full disk refuses wait for the
    next write.
    """

    def __init__(
        self, path: Path, step: int, note: Callable[[str], None] = lambda text: None
    ):
        self._path, self._step, self._note = path, step, note
        self._opened: io.FileIO | None = None
        self._waiting = b""
        self._failures: list[str] = []
        self._sinks: dict[str, Sink] = {}

    @property
    def _file(self) -> io.FileIO:
        if self._opened is None:
            if self._path.exists():
                self._drop_lines()
            self._opened = self._path.open("ab", buffering=0)
        return self._opened

    def _drop_lines(self) -> None:
        lines = read_json_lines(self._path, step=True)
        # A line that is there twice, as in a file appended to itself, stays once.
        records = dict(zip(lines.texts, lines.records, strict=True))
        kept = [text for text, line in records.items() if line["step"] <= self._step]
        content = b"".join(kept)
        if content == self._path.read_bytes():
            return
        if lines.broken:
            self._note(self._keep_original(lines.broken))
        write_atomically(self._path, content)

    def _keep_original(self, broken: list[int]) -> str:
        copy = next(
            copy
            for number in itertools.count(1)
            if not (copy := self._path.with_suffix(f".broken-{number}")).exists()
        )
        write_atomically(copy, self._path.read_bytes())
        count = len(broken)
        which = "line" if count == 1 else "lines"
        shown = ", ".join(map(str, broken[:5])) + (", ..." if count > 5 else "")
        return (
            f"{count} {which} of {self._path} ({shown}) held no metrics and "
            f"{'is' if count == 1 else 'are'} left out; the file as it was is {copy}"
        )

    def add_sinks(
        self, config: ExperimentConfig, run_dir: Path, note: Callable[[str], None]
    ) -> None:
        """Open TensorBoard and W&B if asked for; a missing one costs one line."""
        self._note = note
        if config.train.tensorboard:
            make = lambda: tensorboard_sink(run_dir, self._step)
            self._add(make, "tensorboard", note)
        if config.train.wandb:
            self._add(lambda: wandb_sink(config, run_dir), "wandb", note)

    def _add(
        self, make: Callable[[], Sink], name: str, note: Callable[[str], None]
    ) -> None:
        package = {"tensorboard": "tensorboardX"}.get(name, name)
        try:
            self._sinks[name] = make()
        except ImportError as error:
            note(f"train.{name} is off: {error}")
        except Exception as error:  # no network, no account: whatever it raises
            reason = " ".join(str(error).split())[:200]
            note(f"train.{name} is on but {package} fails ({reason}); going on without")

    def write(self, line: Line) -> None:
        """Append one line; numbers that aren't finite become null."""
        self._waiting += format_json(line).encode() + b"\n"
        self._write_waiting()
        for name, (write, _) in list(self._sinks.items()):
            self._guard(name, lambda write=write: write(line))

    def _guard(self, name: str, act: Callable[[], Any]) -> None:
        """Switch a sink off that fails: training doesn't depend on it."""
        try:
            act()
        except (Exception, SystemExit) as error:  # whatever a logger may raise
            self._sinks.pop(name, None)
            self._note(
                f"train.{name} is off from here on: {type(error).__name__}: "
                f"{first_line(error)}"
            )

    def _write_waiting(self) -> None:
        size: int | None = None
        try:
            size = os.fstat(self._file.fileno()).st_size
            view = memoryview(self._waiting)
            while view:
                view = view[self._file.write(view) :]
            self._waiting = b""
        except OSError as error:
            if size is not None:
                os.ftruncate(self._file.fileno(), size)
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        text = f"{self._path} can't be written ({error.strerror})"
        if text not in self._failures:
            self._failures.append(text)

    def poll(self) -> list[str]:
        """Return what went wrong since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def sync(self) -> None:
        """Bring every line to the disk, as a checkpoint counts on them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._fail(error)

    def close(self) -> None:
        """Write what is left and close everything."""
        if self._waiting:
            self._write_waiting()
        if self._opened is not None:
            self._opened.close()
        for name, (_, close) in list(self._sinks.items()):
            self._guard(name, close)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl; what isn't one is left out."""
    yield from read_json_lines(path, step=True).records


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


def tensorboard_sink(run_dir: Path, step: int) -> Sink:
    """Return a writer of event files into RUN/tensorboard.

    What an earlier process wrote after `step`, the one the run goes on from, is
    dropped, also by a TensorBoard that has read it already.
    """
    with extra_packages():
        from tensorboardX import SummaryWriter

    folder = run_dir / "tensorboard"
    drop_events_after(folder, step)
    # Files are named by the second; two processes may share one.
    suffix = f".{os.getpid()}.{time.monotonic_ns()}"
    writer = SummaryWriter(str(folder), purge_step=step + 1, filename_suffix=suffix)
    file_writer: Any = writer.file_writer

    def check() -> None:
        # Its thread dies of a full disk without a word, and then its queue blocks.
        worker = file_writer.event_writer._worker
        if not worker.is_alive():
            raise OSError(f"{folder} can't be written; is the disk full?")

    def write(line: Line) -> None:
        for name, value in scalars(line):
            check()
            writer.add_scalar(f"{line['kind']}/{name}", value, line["step"])

    def close() -> None:
        check()
        writer.close()

    return write, close


def wandb_sink(config: ExperimentConfig, run_dir: Path) -> Sink:
    """Return a writer to a W&B run named as the run's folder; resumed runs continue."""
    with extra_packages():
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
