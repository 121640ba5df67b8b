"""Models' compiled programs, made in a thread: one compiles while another trains."""

from __future__ import annotations

import argparse
import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from experiments.e012_evidence.measure import Measures, corpora, train_data
from experiments.e012_evidence.study import Job
from experiments.shared.branches import chunk_steps
from experiments.shared.case import program_key
from experiments.shared.programs import Programs
from experiments.shared.work import set_flax
from uoe_jax.config import ExperimentConfig

_KEPT = 16  # models whose programs are kept: later seeds use them again


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


class Built(NamedTuple):
    """A model's compiled programs, and what measures it."""

    measures: Measures
    programs: Programs
    seconds: float  # of compiling


class Builder:
    """Makes programs in the order in which they are asked for, and keeps the last."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.thread = ThreadPoolExecutor(1, initializer=set_flax)
        self.measures: dict[str, Measures] = {}
        self.built: dict[str, Future[Built]] = {}
        self.asked: list[Future[Built]] = []  # that may not be made yet

    @property
    def busy(self) -> bool:
        """Whether something that was asked for is still to be made."""
        return not all(made.done() for made in self.asked)

    def ready(self, job: Job) -> bool:
        """Whether a model's programs are made and kept."""
        made = self.built.get(self._key(job)[0])
        return made is not None and made.done() and made.exception() is None

    def ask(self, job: Job) -> Future[Built]:
        """Return a model's programs, which may still be made."""
        key, config = self._key(job)
        made = self.built.pop(key, None)
        if made is None:
            made = self.thread.submit(self._build, job, config)
            self.asked = [*(one for one in self.asked if not one.done()), made]
        self.built[key] = made  # the last one asked for is dropped last
        while len(self.built) > _KEPT:
            del self.built[next(iter(self.built))]
        return made

    def _key(self, job: Job) -> tuple[str, ExperimentConfig]:
        config = job.config(train_data(job, self.options))[1]
        key = f"{job.place} {job.steps} {job.optimizer} {program_key(config)}"
        return key, config

    def _build(self, job: Job, config: ExperimentConfig) -> Built:
        if job.place not in self.measures:
            start, parts = time.perf_counter(), corpora(job, self.options)
            made = Measures(config, parts, self.options.tiny)
            self.measures[job.place] = made
            say(f"data of {job.place} in {time.perf_counter() - start:.0f} s")
        measures = self.measures[job.place]
        programs = Programs(config, measures.arrays, chunk_steps(job.steps))
        return Built(measures, programs, programs.compile(tokens=True))
