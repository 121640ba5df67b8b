"""Models' compiled programs; the next model's are compiled while another trains."""

from __future__ import annotations

import argparse
import time
from typing import NamedTuple

from experiments.e012_evidence.measure import Measures, corpora, train_data
from experiments.e012_evidence.study import Job
from experiments.shared.ahead import Ahead
from experiments.shared.branches import chunk_steps
from experiments.shared.case import program_key
from experiments.shared.programs import Programs
from uoe_jax.config import ExperimentConfig

_KEPT = 16  # models whose programs are kept: later seeds use them again


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


class Built(NamedTuple):
    """A model's compiled programs, and what measures it."""

    measures: Measures
    programs: Programs
    seconds: float  # of compiling, ahead or not


class Builder:
    """Makes programs when they are asked for, and keeps the last."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.ahead = Ahead(say)
        self.measures: dict[str, Measures] = {}
        self.built: dict[str, Built] = {}

    @property
    def busy(self) -> bool:
        """Whether a model is being compiled beside what this process does."""
        return self.ahead.busy

    def ready(self, job: Job) -> bool:
        """Whether a model's programs are made and kept, or compiled on disk."""
        key = self._key(job)[0]
        return key in self.built or self.ahead.done(key)

    def begin(self, job: Job) -> None:
        """Begin to compile a model in another process, unless that was tried.

        Only where its texts are there: a run doesn't wait for them.
        """
        key, config = self._key(job)
        if key not in self.built and job.place in self.measures:
            arrays = self.measures[job.place].arrays
            self.ahead.begin(key, config, arrays, chunk_steps(job.steps), tokens=True)

    def build(self, job: Job) -> Built:
        """Return a model's programs; nothing may run on the device meanwhile."""
        key, config = self._key(job)
        made = self.built.pop(key, None) or self._build(job, key, config)
        self.built[key] = made  # the last one asked for is dropped last
        while len(self.built) > _KEPT:
            del self.built[next(iter(self.built))]
        return made

    def _key(self, job: Job) -> tuple[str, ExperimentConfig]:
        config = job.config(train_data(job, self.options))[1]
        key = f"{job.place} {job.steps} {job.optimizer} {program_key(config)}"
        return key, config

    def _build(self, job: Job, key: str, config: ExperimentConfig) -> Built:
        measures = self._measures(job, config)
        before = self.ahead.wait(key)
        programs = Programs(config, measures.arrays, chunk_steps(job.steps))
        seconds = programs.compile(tokens=True)
        ahead = f"ahead in {before:.0f} s, loaded" if before else "compiled"
        say(f"{job.setting} {job.optimizer} {job.name}: {ahead} in {seconds:.0f} s")
        return Built(measures, programs, before + seconds)

    def _measures(self, job: Job, config: ExperimentConfig) -> Measures:
        if job.place not in self.measures:
            start, parts = time.perf_counter(), corpora(job, self.options)
            made = Measures(config, parts, self.options.tiny)
            self.measures[job.place] = made
            say(f"data of {job.place} in {time.perf_counter() - start:.0f} s")
        return self.measures[job.place]
