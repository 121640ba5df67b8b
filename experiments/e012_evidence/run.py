"""Train blocks of the study, one run after the other, as long as there is time.

    python -m experiments.e012_evidence.run --block 1 --minutes 45 \
        --articles enwiki_articles.jsonl.xz --python CORPUS/texts --out runs/e012

Writes OUT/results.json after every run; the same line goes on where it stopped, inside
a run too. `--python` is the folder `texts` of experiments.shared.python_corpus; both
corpora then have half of the training. `--tiny` is the same program on minutes of CPU
and on data that every machine has. The planned comparisons are noted before the first
run: what is written into planned.json later is refused by the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.e012_evidence.measure import Measures, corpora, train_data
from experiments.e012_evidence.study import BLOCKS, PLANNED, Job, best_rate, jobs
from experiments.shared.branches import Run, chunk_steps, run_lengths
from experiments.shared.case import program_key, without_folders
from experiments.shared.compare import read_plan
from experiments.shared.fit import Limits, OutOfTime, describe
from experiments.shared.programs import Programs
from experiments.shared.work import prepare
from uoe_jax.bench.record import commit, made_with, write_record
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError, UoeError
from uoe_jax.files import parse_json
from uoe_jax.hardware.count import cache_bytes

_LEAST = 45.0  # seconds left in which a run is worth to begin: it compiles first
_KEPT = 3  # models whose programs and data stay on the device


class Session:
    """What a call trains on, and the file of its results."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.file = options, options.out / "results.json"
        self.deadline = time.perf_counter() + 60 * options.minutes
        plan = read_plan(PLANNED)
        self.results: dict[str, Any] = {"planned": plan.digests(), "runs": []}
        if self.file.is_file():
            self.results = parse_json(self.file.read_text("utf-8"), self.file.name)
        self.measures: dict[str, Measures] = {}
        self.programs: dict[str, Programs] = {}

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The runs so far."""
        return self.results["runs"]

    def run_block(self, block: str) -> None:
        """Train what the block still lacks; what it lacks may follow from its runs."""
        while time.perf_counter() < self.deadline - _LEAST:
            open_jobs = [j for j in self._jobs(block) if not self._is_done(j)]
            if not open_jobs:
                break
            self._say(f"block {block}: {len(open_jobs)} runs to go")
            self._train(open_jobs[0])

    def _jobs(self, block: str) -> list[Job]:
        wanted = jobs(block, self.rows, self.options.tiny)
        only, seeds = self.options.only, self.options.seeds
        named = [job for job in wanted if not only or job.name in only]
        return [job for job in named if not seeds or job.seed in seeds]

    def _is_done(self, job: Job) -> bool:
        """Whether a run is there; ConfigError if it is of another configuration."""
        _, config = job.config(train_data(job, self.options))
        key, told = program_key(config), ("setting", "seed", "optimizer")
        for row in self.rows:
            alike = all(row[name] == getattr(job, name) for name in told)
            if job.rate is not None:
                alike &= row["rate"] == job.rate
            # Blocks share runs: a model is trained once for a setting and its lengths.
            if alike and row["key"] == key and row["planned_steps"] == list(job.steps):
                return True
            if alike and (row["block"], row["case"]) == (job.block, job.name):
                raise ConfigError(
                    f"{self.file} has {job.name!r} of another configuration; give "
                    "another --out, or the version and data that it was made with"
                )
        return False

    def _train(self, job: Job) -> None:
        start = time.perf_counter()
        family, config = job.config(train_data(job, self.options))
        searched = best_rate(self.rows, job, family)
        rate = job.rate or searched or config.optim.learning_rate
        name = f"{job.block} {job.setting} {job.optimizer} {job.name} {rate:g}"
        say = lambda text: self._say(f"{name}, seed {job.seed}: {text}")
        measures, programs = self._prepared(job, config, say)
        result = run_lengths(
            programs,
            Run(job.seed, rate, job.steps),
            (measures.with_budgets if job.kind == "budgets" else measures.of)(programs),
            Limits(self.deadline),
            say,
            self.options.out / "paused" / f"{name.replace('/', ' ')}-{job.seed}.npz",
        )
        row = about(job, family, config) | result
        row |= {
            "rate_by": "given" if job.rate else "search" if searched else "default",
            "wall_seconds": time.perf_counter() - start,
        }
        self.rows.append(row)
        write_record(self.file, self.results)
        say(f"{row['wall_seconds']:.0f} s")

    def _prepared(
        self, job: Job, config: ExperimentConfig, say: Any
    ) -> tuple[Measures, Programs]:
        """Return a model's programs, compiled, and what measures its kind of data."""
        place = f"{job.task} {job.length}"
        if place not in self.measures:
            parts = corpora(job, self.options)
            self.measures[place] = Measures(config, parts, self.options.tiny)
            self._note(place, self.measures[place].contents)
        measures = self.measures[place]
        key = f"{place} {job.steps} {job.optimizer} {program_key(config)}"
        if key not in self.programs:
            while len(self.programs) >= _KEPT:
                del self.programs[next(iter(self.programs))]
            made = Programs(config, measures.arrays, chunk_steps(job.steps))
            say(f"compiled in {made.compile():.0f} s")
            self.programs[key] = made
        return measures, self.programs[key]

    def _note(self, place: str, contents: dict[str, str]) -> None:
        """Note what identifies the texts; ConfigError if they aren't those of before.

        An environment with other packages makes another corpus of Python.
        """
        noted = self.results.setdefault("texts", {}).setdefault(place, contents)
        for name in contents:
            if noted.get(name) != contents[name]:
                raise ConfigError(
                    f"{self.file} was made with another text of {name}; give that one, "
                    "or another --out"
                )

    def _say(self, text: str) -> None:
        print(text, flush=True)


def about(job: Job, family: str, config: ExperimentConfig) -> dict[str, Any]:
    """Return what a run's entry says of what was trained, and where."""
    model = config.model
    # A cache holds no more tokens than the widest window.
    seen = job.length if 0 in model.windows else min(max(model.windows), job.length)
    return describe(config) | {
        "block": job.block,
        "case": job.name,
        "family": family,
        "kind": job.kind,
        "size": job.size,
        "setting": job.setting,
        "optimizer": job.optimizer,
        "planned_steps": list(job.steps),
        "cache_bytes": cache_bytes(model, 1, seen, "bfloat16"),
        "key": program_key(config),
        "config": dataclasses.asdict(without_folders(config)),
        "commit": commit(),
        **made_with(),
        "date": datetime.date.today().isoformat(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the blocks asked for; 0, or 2 for a bad request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--block", nargs="+", choices=BLOCKS, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--articles", type=Path, help="Wikipedia as JSON lines")
    parser.add_argument("--python", type=Path, help="folder of a Python corpus' texts")
    parser.add_argument("--only", nargs="+", default=[], help="names of models")
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU")
    options = parser.parse_args(argv)
    try:
        session = Session(options)
        prepare(options.out / "compiled")
        for block in options.block:
            session.run_block(block)
    except OutOfTime as stop:
        print(f"time is up: {stop}; the same line goes on", flush=True)
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
