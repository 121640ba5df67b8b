"""The runs of some experiments in order, shared by the processes that train them.

State is files of an experiment's folder: `results/RUN.json` where a run is done,
`failed/RUN.txt` where it can't be, `paused/RUN.npz` where it goes on, `claims/RUN`
while a process works on it.
"""

from __future__ import annotations

import dataclasses
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from experiments.shared.case import Case, Study, program_key, with_rates
from experiments.shared.results import read_results, result_file
from experiments.shared.stats import badness
from uoe_jax.errors import ConfigError

TOO_SLOW = "too slow"  # how the reason of a run begins that was given up for its time
SEARCH = -1  # round of the learning rates; seed number n of each case is round n


@dataclass(frozen=True)
class Task:
    """An experiment, what of it is asked for, and the folder of its results.

    Without a study its `module` has a program of its own.
    """

    name: str
    module: ModuleType
    study: Study | None
    out: Path
    tiny: bool = False
    only: tuple[str, ...] = ()  # names of cases to train; empty: all

    def settled(self) -> Study | None:
        """Return the study at the rates its search found; None: it isn't over."""
        assert self.study is not None
        if any(not job.over for job in self._search(self.study)):
            return None
        return with_rates(self.study, best_rates(self.out, self.study))

    def jobs(self) -> tuple[list[Job], bool]:
        """Return the runs that may begin, and whether others wait for these."""
        if self.study is None:
            return [Job(self)], False
        study = self.settled()
        if study is None:
            return self._search(self.study), True
        return self._seeds(study), False

    def all_jobs(self) -> list[Job]:
        """Return every run, at whatever rate."""
        if self.study is None:
            return [Job(self)]
        return self._search(self.study) + self._seeds(self.study)

    def _wanted(self, study: Study) -> list[Case]:
        return [c for c in study.cases if not self.only or c.name in self.only]

    def _search(self, study: Study) -> list[Job]:
        families = {case.family for case in self._wanted(study)}
        search = [case for case in study.search if case.family in families]
        return [Job(self, case, seed, SEARCH) for case in search for seed in case.seeds]

    def _seeds(self, study: Study) -> list[Job]:
        return [
            Job(self, case, seed, number)
            for case in self._wanted(study)
            for number, seed in enumerate(case.seeds)
        ]


@dataclass(frozen=True)
class Job:
    """One run, or the program of an experiment that isn't a set of runs."""

    task: Task
    case: Case | None = None
    seed: int = 0
    round: int = 0

    @property
    def name(self) -> str:
        """Return the run's name in files."""
        return f"{self.case.name}-{self.seed}" if self.case else "program"

    @property
    def paused(self) -> Path:
        """Return where its state is kept when time runs out."""
        # Names hold rates, as 0.003: the dot begins no suffix.
        return self.task.out / "paused" / f"{self.name}.npz"

    @property
    def over(self) -> bool:
        """Whether it has a result, or can't have one."""
        if self._failed.is_file():
            return True
        if self.case is None:
            return self.task.module.finished(self.task.out, self.task.tiny)
        return result_file(self.task.out, self.case.name, self.seed).is_file()

    @property
    def _failed(self) -> Path:
        return self.task.out / "failed" / f"{self.name}.txt"

    @property
    def _claim(self) -> Path:
        return self.task.out / "claims" / self.name

    @property
    def claimed(self) -> bool:
        """Whether a process of this call has it or had it."""
        return self._claim.is_file()

    def claim(self) -> bool:
        """Take the run, unless it is claimed."""
        self._claim.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._claim.touch(exist_ok=False)
        except FileExistsError:
            return False
        return not self.over

    def fail(self, reason: str) -> None:
        """Note why the run has no result."""
        self._failed.parent.mkdir(parents=True, exist_ok=True)
        self._failed.write_text(reason + "\n")


def open_jobs(tasks: Sequence[Task]) -> tuple[list[Job], bool]:
    """Return the runs that may begin, in order, and whether others wait for these.

    Every case of every experiment gets its first seed before any gets its second.
    """
    found, waiting = [], False
    for task in tasks:
        ready, more = task.jobs()
        found += [job for job in ready if not job.over]
        waiting |= more
    return sorted(found, key=lambda job: job.round), waiting


def begin(tasks: Sequence[Task]) -> None:
    """Take back claims of processes that are gone; let what broke try again.

    What was too slow stays given up: delete its file in `failed` to try it again.

    Raises ConfigError for results of another configuration.
    """
    for task in tasks:
        shutil.rmtree(task.out / "claims", ignore_errors=True)
        for file in (task.out / "failed").glob("*.txt"):
            if not file.read_text().startswith(TOO_SLOW):
                file.unlink()
        if task.study is None:
            continue
        cases = (*task.study.search, *task.study.cases)
        for case, results in read_results(task.out, cases).items():
            config = next(c for c in cases if c.name == case).config
            wanted = program_key(config)
            for result in results:
                if result["key"] != wanted:
                    file = result_file(task.out, case, result["seed"])
                    raise ConfigError(
                        f"{file} is of another configuration; move {task.out} away "
                        "or give another --out"
                    )


def best_rates(out: Path, study: Study) -> dict[str, float]:
    """Return each family's learning rate by validation, from its search."""
    found = read_results(out, study.search)
    best: dict[str, tuple[float, float]] = {}
    for case in study.search:
        runs = [r for r in found.get(case.name, ()) if "valid" in r]
        bad = [badness(r["valid"], study.metric) for r in runs]
        if bad:
            scored = (statistics.fmean(bad), case.config.optim.learning_rate)
            best[case.family] = min(scored, best.get(case.family, scored))
    return {family: rate for family, (_, rate) in best.items()}


def outlook(tasks: Sequence[Task]) -> tuple[int, int, float]:
    """Return how many runs are over, of how many, and the seconds the others may take.

    A run is expected to take as long as the case's other seeds, or else as the mean;
    so is an experiment's own program, which may well take longer.
    """
    jobs = [job for task in tasks for job in task.all_jobs()]
    spent: dict[tuple[str, str], list[float]] = {}
    for task in tasks:
        if task.study is not None:
            cases = (*task.study.search, *task.study.cases)
            for name, results in read_results(task.out, cases).items():
                spent[task.name, name] = [r["wall_seconds"] for r in results]
    known = [seconds for several in spent.values() for seconds in several]
    mean = statistics.fmean(known) if known else 0.0
    left = [job for job in jobs if not job.over]
    seconds = 0.0
    for job in left:
        same = spent.get((job.task.name, job.case.name if job.case else ""))
        seconds += statistics.fmean(same) if same else mean
    return len(jobs) - len(left), len(jobs), seconds


def restricted(study: Study, seeds: Sequence[int]) -> Study:
    """Return the study with other seeds, if any are given."""
    if not seeds:
        return study
    cases = [dataclasses.replace(c, seeds=tuple(seeds)) for c in study.cases]
    return dataclasses.replace(study, cases=tuple(cases))
