"""A process that trains runs of a queue until there are none, or no time."""

from __future__ import annotations

import dataclasses
import datetime
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from flax import nnx

from experiments.shared.ahead import Ahead
from experiments.shared.arrays import Arrays, load_split, num_examples
from experiments.shared.case import Case, program_key, without_folders
from experiments.shared.fit import Limits, OutOfTime, TooSlow, describe, run_seed
from experiments.shared.programs import Programs
from experiments.shared.queue import TOO_SLOW, Job, Task, open_jobs, outlook
from experiments.shared.results import write_result
from uoe_jax.bench.record import made_with
from uoe_jax.config import config_hash
from uoe_jax.data.split import SPLITS
from uoe_jax.ops.nvidia import installed_fault

_POLL = 1.0  # seconds between looks at what other processes do
_GRACE = 20.0  # seconds after the budget in which a run may finish its chunk


def prepare(compiled: Path) -> None:
    """Make the process's settings; say what it computes on."""
    set_process(compiled.absolute())
    _say(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    if jax.default_backend() == "gpu" and (fault := installed_fault()):
        _say(f"SLOW: unions and mixtures run without kernels: {fault}")


def set_process(compiled: Path) -> None:
    """Make the settings that processes with one cache of programs share."""
    set_flax()
    jax.config.update("jax_compilation_cache_dir", str(compiled))


def set_flax() -> None:
    """Make flax's settings; they are each thread's own."""
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)


def work(tasks: Sequence[Task], worker: Worker, processes: int = 1) -> int:
    """Train what can be claimed until nothing is left; return how many runs failed.

    `processes`, this one included, share the queue.
    """
    try:
        _work(tasks, worker, processes)
    finally:
        worker.ahead.stop()
    return worker.failed


def _work(tasks: Sequence[Task], worker: Worker, processes: int) -> None:
    while (job := worker.next(tasks)) is not None:
        worker.look_ahead(tasks, processes)
        try:
            with worker.alarm(0.0 if job.case is None else _GRACE):
                worker.run(job)
        except OutOfTime as stop:
            _say(f"{job.name}: {stop}")
        except TooSlow as reason:
            _say(f"{job.name}: {TOO_SLOW}: {reason}")
            job.fail(f"{TOO_SLOW}: {reason}")
        except Exception:  # one run must not end the others
            traceback.print_exc()
            job.fail(traceback.format_exc())
            worker.failed += 1
        done, all_runs, seconds = outlook(tasks)
        left = seconds / processes / 60
        _say(
            f"{done} of {all_runs} runs are over; the others take about {left:.1f} min"
        )


class Worker:
    """Compiled models and splits of a process, kept for further seeds."""

    def __init__(self, limits: Limits):
        self.limits, self.failed = limits, 0
        self.programs: dict[str, Programs] = {}
        self.splits: dict[str, dict[str, Arrays]] = {}
        self.compiled: dict[str, float] = {}  # seconds
        self.upcoming: Job | None = None  # claimed ahead
        self.ahead = Ahead(_say)

    @property
    def seconds_left(self) -> float:
        """Seconds until the budget ends."""
        return self.limits.deadline - time.perf_counter()

    def next(self, tasks: Sequence[Task]) -> Job | None:
        """Claim a run of the first round: rather of a model that is compiled here, then
        of one that no other process has.

        Waits while the runs that others work on decide what follows.
        """
        if (job := self.upcoming) is not None:
            self.upcoming = None
            return job if self.seconds_left > 0 else None
        while self.seconds_left > 0:
            job, waiting = self._claim(tasks)
            if job is not None or not waiting:
                return job
            time.sleep(_POLL)
        return None

    def look_ahead(self, tasks: Sequence[Task], processes: int) -> None:
        """Claim the run after this one; another process compiles it beside this one.

        Not the last ones: another of the processes may be free for them sooner.
        """
        free = [job for job in open_jobs(tasks)[0] if not job.claimed]
        if len(free) > processes - 1:
            self.upcoming, _ = self._claim(tasks)
        job = self.upcoming
        if job is None or job.case is None:
            return
        key, data = program_key(job.case.config), self.splits.get(_data_key(job.case))
        if key not in self.programs and data is not None:
            self.ahead.begin(key, job.case.config, data)

    def _claim(self, tasks: Sequence[Task]) -> tuple[Job | None, bool]:
        """Return a claimed run, if any may begin, and whether others wait for some."""
        jobs, waiting = open_jobs(tasks)
        first = [job for job in jobs if job.round == jobs[0].round]
        taken = self._keys(
            job for task in tasks for job in task.jobs()[0] if job.claimed
        )
        mine = self.programs.keys() | self.ahead.begun
        own = [job for job in first if self._keys([job]) & mine]
        new = [job for job in first if not self._keys([job]) & taken]
        for job in (*own, *new, *jobs):
            if job.claim():
                return job, waiting
        return None, waiting

    @staticmethod
    def _keys(jobs: Iterable[Job]) -> set[str]:
        return {program_key(job.case.config) for job in jobs if job.case is not None}

    @contextmanager
    def alarm(self, grace: float) -> Iterator[None]:
        """Raise OutOfTime so long after the budget's end, wherever the process is."""
        if self.limits.deadline == float("inf"):
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            raise OutOfTime("the budget is used up")

        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(self.seconds_left, 0.01) + grace)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def run(self, job: Job) -> None:
        """Train one run and write its result."""
        start = time.perf_counter()
        case, out, study = job.case, job.task.out, job.task.study
        if case is None or study is None:
            _say(job.task.module.program(out, job.task.tiny))
            return
        say = lambda text: _say(f"{job.name}: {text}")
        programs = self._programs(case, say)
        result = run_seed(
            programs,
            job.seed,
            case.config.optim.learning_rate,
            study.metric,
            self.limits,
            say,
            job.paused,
        )
        took = time.perf_counter() - start
        compiled = self.compiled[program_key(case.config)]
        about = _about(case) | {"compile_seconds": compiled, "wall_seconds": took}
        write_result(out, about | result)
        speed = about["tokens_per_step"] / result["step_seconds"]
        say(f"{took:.1f} s, {speed:,.0f} tokens/s, test {result.get('test')}")

    def _programs(self, case: Case, say: Callable[[str], None]) -> Programs:
        """Return a case's programs, compiled."""
        key = program_key(case.config)
        if key not in self.programs:
            start = time.perf_counter()
            before = self.ahead.wait(key)
            programs = Programs(case.config, self._data(case))
            seconds = before + programs.compile()
            self.programs[key], self.compiled[key] = programs, seconds
            waited = time.perf_counter() - start
            say(f"compiled in {seconds:.1f} s, {waited:.1f} of them waited for")
        return self.programs[key]

    def _data(self, case: Case) -> dict[str, Arrays]:
        """Return a case's splits on the device, shared by cases with the same data."""
        key = _data_key(case)
        if key not in self.splits:
            start = time.perf_counter()
            found = {split: load_split(case.config, split) for split in SPLITS}
            sizes = {split: num_examples(arrays) for split, arrays in found.items()}
            _say(f"data in {time.perf_counter() - start:.1f} s, examples {sizes}")
            self.splits[key] = found
        return self.splits[key]


def _data_key(case: Case) -> str:
    """Return what identifies the data that a case is trained on."""
    model = case.config.model
    shape = (case.config.seq_len, model.kind, model.vocab_size, model.image_size)
    own = dataclasses.replace(case.config.data, batch_size=1)
    return f"{config_hash(own)} {shape}"


def _about(case: Case) -> dict[str, Any]:
    """Return what a result says of its case, and where it was made."""
    return describe(case.config) | {
        "case": case.name,
        "key": program_key(case.config),
        "config": dataclasses.asdict(without_folders(case.config)),
        **made_with(),
        "date": datetime.date.today().isoformat(),
    }


def _say(text: str) -> None:
    print(text, flush=True)
