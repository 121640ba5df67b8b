"""A sweep: one experiment with some settings varied, each point a run of its own.

Every point is trained by a `uoe train` process, one at a time or one a GPU. What ended
is written into the sweep's folder, so the same sweep started again goes on: finished
points stay, an interrupted one resumes. Imports no jax.
"""

from __future__ import annotations

import itertools
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uoe_jax.config import ExperimentConfig, config_hash, to_json
from uoe_jax.errors import ConfigError, DataError, shown
from uoe_jax.files import format_json, local_path, read_json, write_atomically
from uoe_jax.runs.lock import RunLock
from uoe_jax.runs.read import RunRecord, read_run

RECORD = "sweep.json"  # in the sweep's folder: which points ended, and how
_GRACE = 60.0  # seconds that a process has to save before it is killed

Values = tuple[str, ...]
Point = tuple[tuple[str, str], ...]  # (option, value as it is typed) pairs


@dataclass(frozen=True, kw_only=True)
class Range:
    """Numbers between two ends, drawn so that each doubling is as likely as another."""

    low: float
    high: float
    whole: bool

    def draw(self, rng: random.Random) -> str:
        """Return a number as it is typed."""
        value = math.exp(rng.uniform(math.log(self.low), math.log(self.high)))
        return str(round(value)) if self.whole else f"{value:.4g}"


def parse_axis(text: str) -> tuple[str, Values | Range]:
    """Return the option and the values of NAME=A,B,C or NAME=LOW..HIGH.

    Raises ConfigError for a text that is neither.
    """
    name, equals, right = text.partition("=")
    name = name.strip().lstrip("-").replace("_", "-")
    values = tuple(value.strip() for value in right.split(","))
    if not name or not equals or not all(values):
        raise ConfigError(
            f"--grid {shown(text)} can't be read; write NAME=A,B,C or NAME=LOW..HIGH, "
            "such as optim.learning-rate=1e-3,3e-3"
        )
    if len(values) == 1 and ".." in right:
        return name, _range(text, right)
    if len(set(values)) < len(values):
        raise ConfigError(f"--grid {shown(text)} has a value twice; name each once")
    return name, values


def _range(text: str, right: str) -> Range:
    low, _, high = right.partition("..")
    try:
        ends = float(low), float(high)
    except ValueError:
        ends = math.nan, math.nan
    if not 0 < ends[0] < ends[1] < math.inf:
        raise ConfigError(
            f"--grid {shown(text)}: a range goes from a positive number to a larger "
            "one, such as 1e-4..1e-2"
        )
    whole = all(end.strip().isdigit() for end in (low, high))
    return Range(low=ends[0], high=ends[1], whole=whole)


def make_points(
    axes: Sequence[tuple[str, Values | Range]], samples: int | None, seed: int
) -> list[Point]:
    """Return all combinations of the axes' values, or so many drawn at random.

    Points are drawn without repeats; the same seed draws the same. Raises ConfigError
    for an option that is named twice, and for a range without `samples`.
    """
    names = [name for name, _ in axes]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"--grid names {twice[0]} twice; give all its values at once")
    ranges = [name for name, values in axes if isinstance(values, Range)]
    if samples is None:
        if ranges:
            raise ConfigError(
                f"--grid {ranges[0]} is a range: say how many points to draw with "
                "--samples N, or list its values"
            )
        grids = [values for _, values in axes if isinstance(values, tuple)]
        return [
            tuple(zip(names, values, strict=True))
            for values in itertools.product(*grids)
        ]
    rng = random.Random(seed)
    every = math.prod(len(v) for _, v in axes if isinstance(v, tuple))
    found: dict[Point, None] = {}
    for _ in range(100 * samples):
        if len(found) == samples or (not ranges and len(found) == every):
            break
        draw = lambda v: v.draw(rng) if isinstance(v, Range) else rng.choice(v)
        found[tuple((name, draw(values)) for name, values in axes)] = None
    return list(found)


def point_name(point: Point) -> str:
    """Return a point's name, which is its folder's: learning-rate=0.001,seed=2."""
    leaves = [name.rpartition(".")[2] for name, _ in point]
    parts = []
    for (name, value), leaf in zip(point, leaves, strict=True):
        short = leaf if leaves.count(leaf) == 1 else name
        parts.append(f"{short}={value}")
    kept = "".join(c if c.isalnum() or c in "._-=,+" else "_" for c in ",".join(parts))
    return kept or "run"


@dataclass(kw_only=True)
class Sweep:
    """The runs of a sweep by name, in the order in which they are trained."""

    folder: Path
    configs: Mapping[str, ExperimentConfig]
    gpus: Sequence[int] = ()
    budget_seconds: float | None = None
    note: Callable[[str], None] = print
    ended: dict[str, Any] = field(default_factory=dict)  # name -> how, of sweep.json

    def __post_init__(self):
        self.folder = local_path(self.folder, "out")
        self._lock, self._running = threading.Lock(), {}
        self._stop: signal.Signals | None = None
        self._deadline = math.inf

    def open(self) -> None:
        """Make the folder and read what ended before.

        Raises ConfigError where it can't be written, or holds a run of one of these
        names with other settings.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"{self.folder} can't be made ({error.strerror}); choose another --out"
            ) from None
        self.ended = self._read_record()
        for name, config in self.configs.items():
            known = self.ended.get(name)
            if known is not None and known.get("config") != config_hash(config):
                raise ConfigError(
                    f"{self.folder / name} was swept with other settings; choose "
                    "another --out"
                )

    def _read_record(self) -> dict[str, Any]:
        try:
            found = read_json(self.folder / RECORD)
        except FileNotFoundError:
            return {}
        except (OSError, DataError) as error:
            raise ConfigError(f"{self.folder / RECORD} is damaged: {error}") from None
        entries = found.get("ended") if isinstance(found, dict) else None
        if not isinstance(entries, dict) or not all(
            isinstance(entry, dict) for entry in entries.values()
        ):
            raise ConfigError(f"{self.folder / RECORD} isn't a sweep's; restore it")
        return entries

    def left(self) -> list[str]:
        """Return the names of the points that haven't ended well."""
        done = {n for n, entry in self.ended.items() if entry.get("code") == 0}
        return [name for name in self.configs if name not in done]

    def run(self) -> int:
        """Train what is left; return how many points failed.

        A signal is passed on to what is training, which saves and ends; then it is
        raised again. At the end of the budget likewise, but for the raising.
        """
        lock = RunLock(self.folder, self.note)
        lock.acquire()
        try:
            self._run()
        finally:
            lock.release()
        return sum(entry.get("code") != 0 for entry in self.ended.values())

    def _run(self) -> None:
        waiting = deque(self.left())
        if self.budget_seconds is not None:
            self._deadline = time.monotonic() + self.budget_seconds
        workers = [
            threading.Thread(target=self._work, args=(waiting, gpu), daemon=True)
            for gpu in (self.gpus or (None,))
        ]
        for worker in workers:
            worker.start()
        try:
            self._watch(workers)
        except KeyboardInterrupt as stop:
            self._stop = getattr(stop, "number", signal.SIGINT)
            self._end_all(self._stop)
            for worker in workers:
                worker.join()
            raise

    def _watch(self, workers: Sequence[threading.Thread]) -> None:
        while any(worker.is_alive() for worker in workers):
            workers[0].join(0.1)
            for worker in workers[1:]:
                worker.join(0.01)
            if time.monotonic() > self._deadline and self._stop is None:
                self._stop = signal.SIGTERM
                self.note("the budget is used up; what trains is saved and ends ...")
                self._end_all(self._stop)

    def _work(self, waiting: deque[str], gpu: int | None) -> None:
        """Train points until none is left, the first of them first."""
        while self._stop is None:
            try:
                name = waiting.popleft()
            except IndexError:
                return
            self._train(name, gpu)

    def _train(self, name: str, gpu: int | None) -> None:
        folder, start = self.folder / name, time.monotonic()
        folder.mkdir(exist_ok=True)
        write_atomically(self.folder / f"{name}.json", to_json(self.configs[name]))
        environment = dict(os.environ)
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
        command = [
            sys.executable, "-m", "uoe_jax", "train", "--no-report", "--no-recall",
            "--config", str(self.folder / f"{name}.json"), "--run-dir", str(folder),
        ]  # fmt: skip
        with open(folder / "output.txt", "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                # A Ctrl-C reaches it through us, once.
                start_new_session=True,
            )
            with self._lock:
                self._running[name] = process
                stopped = self._stop
            if stopped is not None:
                process.send_signal(stopped)
            code = process.wait()
        with self._lock:
            del self._running[name]
            self._write(name, code, time.monotonic() - start)

    def _write(self, name: str, code: int, seconds: float) -> None:
        """Keep how a point ended, and say it; one that was stopped goes on later."""
        place = f"[{len(self.ended) + 1}/{len(self.configs)}] {name}"
        if self._stop is not None and code != 0:
            self.note(f"{name}: stopped, saved; the same command goes on with it")
            return
        entry: dict[str, Any] = {"code": code, "seconds": round(seconds, 3)}
        entry["config"] = config_hash(self.configs[name])
        if code != 0:
            entry["problem"] = _last_line(self.folder / name / "output.txt")
        before = self.ended.get(name)
        self.ended[name] = entry
        write_atomically(
            self.folder / RECORD, format_json({"ended": self.ended}, indent=2) + "\n"
        )
        place = place if before is None else name
        if code != 0:
            self.note(f"{place}: failed, {entry['problem']}")
        else:
            loss = (read_run(self.folder / name) or RunRecord("", ""))["loss"]
            about = "" if loss is None else f", loss {loss:.4f}"
            self.note(f"{place}: {seconds:.0f} s{about}{self._outlook()}")

    def _outlook(self) -> str:
        """Return how long the rest will take, by what the others took."""
        left = len(self.left())
        times = [e["seconds"] for e in self.ended.values() if e.get("code") == 0]
        if not left or not times:
            return ""
        seconds = left * sum(times) / len(times) / max(len(self.gpus), 1)
        unit, size = ("h", 3600) if seconds > 5400 else ("min", 60)
        return f"; {left} left, about {seconds / size:.1f} {unit}"

    def _end_all(self, number: signal.Signals) -> None:
        """Ask what is training to save and end; what doesn't in a minute is killed."""
        with self._lock:
            running = list(self._running.values())
        for process in running:
            process.send_signal(number)
        limit = time.monotonic() + _GRACE
        for process in running:
            try:
                process.wait(max(limit - time.monotonic(), 0))
            except subprocess.TimeoutExpired:
                process.kill()


def _last_line(file: Path) -> str:
    """Return the last line that a process printed, without the command's name."""
    try:
        lines = file.read_bytes()[-4096:].decode("utf-8", "replace").split("\n")
    except OSError:
        lines = []
    text = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return text.removeprefix("uoe: ")
