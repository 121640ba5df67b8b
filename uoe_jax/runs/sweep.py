"""A sweep: one experiment with some settings varied, each point a run of its own.

Every point is trained by a `uoe train` process, one at a time or one a GPU. What ended
is written into the sweep's folder, so the same sweep started again goes on: finished
points stay, an interrupted one resumes. Imports no jax.
"""

from __future__ import annotations

import math
import os
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
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.files import format_json, local_path, read_json, write_atomically
from uoe_jax.runs.lock import Locked, RunLock, holder
from uoe_jax.runs.read import CONFIG, RunRecord, read_run

RECORD = "sweep.json"  # in the sweep's folder: which points ended, and how
_GRACE = 60.0  # seconds that a process has to save before it is killed
_LOOK = 0.5  # seconds between two looks at a run that somebody else trains


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
        self._problem: Exception | None = None  # of a worker
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
            known = self.ended.get(name, {"code": None})
            if known["code"] == 0 and known["config"] != config_hash(config):
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
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise ConfigError(f"{self.folder / RECORD} isn't a sweep's; restore it")
        return entries

    def left(self) -> list[str]:
        """Return the names of the points that haven't ended well, or are gone."""
        done = {n for n, entry in self.ended.items() if entry["code"] == 0}
        is_there = lambda name: (self.folder / name / CONFIG).is_file()
        return [n for n in self.configs if n not in done or not is_there(n)]

    def run(self) -> int:
        """Train what is left; return how many points failed.

        A signal is passed on to what is training, which saves and ends; then it is
        raised again. At the end of the budget likewise, but for the raising.
        """
        try:
            lock = RunLock(self.folder, self.note)
            lock.acquire()
        except Locked:
            raise ConfigError(
                f"{holder(self.folder) or 'another process'} is sweeping in "
                f"{self.folder}; stop it or choose another --out"
            ) from None
        except OSError as error:
            raise self._unwritable(error) from None
        try:
            self.ended = self._read_record()  # of a sweep that has ended meanwhile
            self._run()
        finally:
            lock.release()
        ended = [self.ended.get(name, {"code": 0}) for name in self.configs]
        return sum(entry["code"] != 0 for entry in ended)

    def _unwritable(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"{error.filename or self.folder} can't be written ({error.strerror}); "
            "make room there or choose another --out"
        )

    def _run(self) -> None:
        waiting = deque(self.left())
        if self.budget_seconds is not None:
            self._deadline = time.monotonic() + self.budget_seconds
        workers = [
            threading.Thread(target=self._work, args=(waiting, gpu), daemon=True)
            for gpu in (self.gpus or (None,))
        ]
        try:
            for worker in workers:
                worker.start()
            self._watch(workers)
        except KeyboardInterrupt as stop:
            self._stop = getattr(stop, "number", signal.SIGINT)
            self._end_all(self._stop)
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            raise
        if isinstance(self._problem, OSError):
            raise self._unwritable(self._problem) from None
        if self._problem is not None:
            raise self._problem

    def _watch(self, workers: Sequence[threading.Thread]) -> None:
        while any(worker.is_alive() for worker in workers):
            workers[0].join(0.1)
            for worker in workers[1:]:
                worker.join(0.01)
            late = time.monotonic() > self._deadline
            if self._stop is None and (late or self._problem):
                self._stop = signal.SIGTERM
                if late:
                    self.note(
                        "the budget is used up; what trains is saved and ends ..."
                    )
                self._end_all(self._stop)

    def _work(self, waiting: deque[str], gpu: int | None) -> None:
        """Train points until none is left, the first of them first."""
        while self._stop is None:
            try:
                name = waiting.popleft()
            except IndexError:
                return
            try:
                self._train(name, gpu)
            except Exception as error:  # the main thread raises it
                self._problem = self._problem or error
                return

    def _train(self, name: str, gpu: int | None) -> None:
        folder, start = self.folder / name, time.monotonic()
        folder.mkdir(exist_ok=True)
        if not self._is_free(name):
            return
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

    def _is_free(self, name: str) -> bool:
        """Wait while a process of a sweep that was killed still trains a point.

        Returns False if this sweep was to stop before it ended.
        """
        if who := holder(self.folder / name):
            self.note(f"{name}: {who} is training it; waiting until it ends ...")
        while self._stop is None and holder(self.folder / name):
            time.sleep(_LOOK)
        return self._stop is None

    def _write(self, name: str, code: int, seconds: float) -> None:
        """Keep how a point ended, and say it; one that was stopped goes on later."""
        ended = sum(known in self.ended for known in self.configs)
        place = f"[{ended + 1}/{len(self.configs)}] {name}"
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
        times = [e["seconds"] for e in self.ended.values() if e["code"] == 0]
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


def _is_entry(entry: Any) -> bool:
    """Whether an entry of sweep.json says how a point ended."""
    if not isinstance(entry, dict):
        return False
    seconds, code = entry.get("seconds"), entry.get("code")
    if not isinstance(seconds, (int, float)) or not isinstance(code, int):
        return False
    flags = isinstance(seconds, bool) or isinstance(code, bool)
    return not flags and seconds >= 0 and isinstance(entry.get("config"), str)


def _last_line(file: Path) -> str:
    """Return the last line that a process printed, without the command's name."""
    try:
        lines = file.read_bytes()[-4096:].decode("utf-8", "replace").split("\n")
    except OSError:
        lines = []
    text = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return text.removeprefix("uoe: ")
