"""Train blocks of the study, one run after the other, as long as there is time.

    python -m experiments.e012_evidence.run --block 1 --minutes 45 \
        --articles enwiki_articles.jsonl.xz --python CORPUS/texts --out runs/e012

Writes OUT/results.json after every run; the same line goes on where it stopped, inside
a run too. A model is compiled by another process beside the run before it, after that
one's first steps, whose seconds count; till it is ready further seeds of others train;
if that process fails it is compiled when its turn comes. `--part 1/2` takes
about half of the runs and writes OUT/results-1.json, so that two devices share the
work; a run's name, rate and seed say whose it is. `--python` is the folder `texts` of
experiments.shared.python_corpus; both corpora then have half of the training. `--tiny`
is the same program on minutes of CPU and on data that every machine has. The planned
comparisons are noted before the first run: what is written into planned.json later is
refused by the report.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from jaxtyping import PyTree

from experiments.e012_evidence.build import Builder, Built, say
from experiments.e012_evidence.cut import go_on, save_model
from experiments.e012_evidence.measure import train_data
from experiments.e012_evidence.pick import check_picked
from experiments.e012_evidence.rates import choose_rate
from experiments.e012_evidence.study import BLOCKS, PLANNED, Job, jobs
from experiments.shared.branches import Run, run_lengths
from experiments.shared.case import program_key, without_folders
from experiments.shared.compare import read_plan
from experiments.shared.fit import Limits, OutOfTime, describe
from experiments.shared.flags import switch_off_command_buffers
from experiments.shared.part import Part
from experiments.shared.work import prepare
from uoe_jax.bench.record import commit, made_with, write_record
from uoe_jax.config import ExperimentConfig, from_json
from uoe_jax.errors import ConfigError, UoeError
from uoe_jax.files import format_json, parse_json
from uoe_jax.hardware.count import cache_bytes

_LEAST = 30.0  # seconds left in which a run is worth to begin; it can wait half done
_ALONE = 3  # chunks of steps of every run beside which nothing is compiled
_AHEAD = 60.0  # seconds left in which the next model is worth to be compiled already
_FURTHER_SEED = 1000  # added for the order of the data of runs that go on


class Session:
    """What a call trains on, and the file of its results."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.file = options, options.out / options.part.file
        self.deadline = time.perf_counter() + 60 * options.minutes
        plan = read_plan(PLANNED)
        self.results: dict[str, Any] = {"planned": plan.digests(), "runs": []}
        if self.file.is_file():
            self.results = parse_json(self.file.read_text("utf-8"), self.file.name)
        self.builder = Builder(options)
        self.later: Job | None = None  # whose model is compiled beside the run now
        self.failed: set[Job] = set()  # of this call; the next one tries them again

    @property
    def mine(self) -> list[dict[str, Any]]:
        """The runs of this part."""
        return self.results["runs"]

    def _others(self) -> dict[Path, dict[str, Any]]:
        """Return what is in the results files of other parts and machines."""
        files = sorted(self.options.out.glob("results*.json"))
        return {f: parse_json(f.read_text("utf-8"), f.name) for f in files
                if f != self.file}  # fmt: skip

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The runs so far, those of other parts too."""
        others = self._others().values()
        return [*self.mine, *(row for found in others for row in found["runs"])]

    def run(self, blocks: Sequence[str]) -> int:
        """Train blocks as long as there is time; 1 if some run failed, else 0.

        Raises ConfigError for a name or a seed asked for that no run of them has.
        """
        check_picked(self.options.only, self.options.seeds, blocks, self.rows)
        try:
            for block in blocks:
                self.run_block(block)
        except OutOfTime as stop:
            say(f"time is up: {stop}; the same line goes on")
        finally:
            self.builder.ahead.stop()
        return 1 if self.failed else 0

    def run_block(self, block: str) -> None:
        """Train what the block still lacks; what it lacks may follow from its runs."""
        while self._left > _LEAST:
            rows = self.rows
            open_jobs = [
                job for job in self._jobs(block, rows)
                if job not in self.failed and not self._done(job, rows)
            ]  # fmt: skip
            if not open_jobs:
                say(f"block {block}: no run is left")
                break
            say(f"block {block}: {len(open_jobs)} runs to go")
            job, self.later = self._next(open_jobs)
            try:
                self._note(job, self.builder.build(job).measures.contents)
                self._train(job, rows)
            except (OutOfTime, UoeError):
                raise
            except Exception:  # one model that fails must not end the others
                traceback.print_exc()
                say(f"block {block}: {job.name}, seed {job.seed}, FAILED")
                self.failed.add(job)

    def _next(self, open_jobs: list[Job]) -> tuple[Job, Job | None]:
        """Return what is trained now, and what is compiled beside it.

        While a model is compiled a further seed of one that is ready goes first.
        """
        ready = list(filter(self.builder.ready, open_jobs))
        job = ready[0] if ready else open_jobs[0]
        others = (one for one in open_jobs if one not in (job, *ready))
        return job, next(others, None)

    def _disturbed(self) -> Callable[[], bool]:
        """Return what tells before each chunk of steps whether a model is compiled.

        That begins after the first chunks: every run has seconds without it.
        """
        alone = 0

        def disturbed() -> bool:
            nonlocal alone
            if alone == _ALONE and self.later is not None and self._left > _AHEAD:
                self.builder.begin(self.later)
            busy = self.builder.busy
            alone += not busy
            return busy

        return disturbed

    @property
    def _left(self) -> float:
        return self.deadline - time.perf_counter()

    def _jobs(self, block: str, rows: list[dict[str, Any]]) -> list[Job]:
        wanted = jobs(block, rows, self.options.tiny)
        only, seeds = self.options.only, self.options.seeds
        named = [job for job in wanted if not only or job.name in only]
        seeded = [job for job in named if not seeds or job.seed in seeds]
        part = self.options.part
        return [job for job in seeded if part.has(job.shared_by, job.seed)]

    def _done(self, job: Job, rows: list[dict[str, Any]]) -> bool:
        """Whether a run is there; ConfigError if it is of another configuration."""
        _, config = job.config(train_data(job, self.options))
        key, told = program_key(config), ("setting", "seed", "optimizer")
        for row in rows:
            alike = all(row[name] == getattr(job, name) for name in told)
            if job.rate is not None:
                alike &= row["rate"] == job.rate
            # Blocks share runs: a model is trained once for a setting and its lengths.
            lengths = row["planned_steps"] == list(job.steps)
            if alike and lengths and key_of(row) == key:
                return True
            if alike and (row["block"], row["case"]) == (job.block, job.name):
                raise ConfigError(
                    f"{self.file} has {job.name!r} of another configuration; give "
                    "another --out, or the version and data that it was made with"
                )
        return False

    def _train(self, job: Job, rows: list[dict[str, Any]]) -> None:
        start = time.perf_counter()
        family, config = job.config(train_data(job, self.options))
        rate, by = choose_rate(rows, job, family, config.optim.learning_rate)
        weights, seed = None, job.seed
        if job.start is not None:
            seed += _FURTHER_SEED
            weights = partial(self._weights, job, rows)
            if not self._end(job.start).is_file():
                self._train(job.start, rows)
        name = f"{job.block} {job.setting} {job.optimizer} {job.name} {rate:g}"
        tell = lambda text: say(f"{name}, seed {job.seed}: {text}")
        built = self.builder.build(job)
        result = run_lengths(
            built.programs,
            Run(seed, rate, job.steps, weights, self._disturbed()),
            partial(self._measure, job, built),
            Limits(self.deadline),
            tell,
            self.options.out / "paused" / f"{name.replace('/', ' ')}-{job.seed}.npz",
        )
        row = about(job, family, config) | result | {"seed": job.seed}
        row |= {
            "rate_by": by,
            "compile_seconds": built.seconds,
            "wall_seconds": time.perf_counter() - start,
        }
        self.mine.append(row)
        write_record(self.file, self.results)
        tell(f"{row['wall_seconds']:.0f} s")

    def _measure(self, job: Job, built: Built, *model: PyTree) -> dict[str, Any]:
        """Return what is known of a trained model; keep an end that others start at."""
        found = built.measures.of(job, built.programs, *model)
        if job.kind == "cut" and job.start is None:
            save_model(self._end(job), built.programs.config, *model)
        return found

    def _weights(self, job: Job, rows: list[dict[str, Any]]) -> tuple[PyTree, PyTree]:
        """Return what a run that goes on starts with."""
        data = train_data(job, self.options)
        assert job.start is not None
        dense, mine = job.start.config(data)[1], job.config(data)[1]
        return go_on(self._end(job.start), dense, mine)

    def _end(self, job: Job) -> Path:
        """Return the file of a trained model that others go on from."""
        name = f"{job.name} {job.size} {job.length} {job.seed}.npz"
        return self.options.out / "models" / name

    def _note(self, job: Job, contents: dict[str, str]) -> None:
        """Note what identifies the texts; ConfigError if they aren't those of before.

        An environment with other packages makes another corpus of Python. The texts of
        other parts and machines are looked at too.
        """
        self.results.setdefault("texts", {}).setdefault(job.place, contents)
        for file, found in {self.file: self.results, **self._others()}.items():
            noted = found.get("texts", {}).get(job.place, contents)
            for name in contents:
                if noted.get(name) != contents[name]:
                    raise ConfigError(
                        f"{file} was made with another text of {name}; give that one, "
                        "or another --out"
                    )


def key_of(row: dict[str, Any]) -> str:
    """Return the key of a run's configuration as it would be written today.

    Options that came later are at their defaults.
    """
    return program_key(from_json(format_json(row["config"]), ExperimentConfig))


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
    """Run the blocks asked for; 0, 1 where a run failed, 2 for a bad request."""
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
    parser.add_argument(
        "--part",
        type=Part.parse,
        default=Part(1, 1),
        metavar="I/N",
        help="one of N parts of about as many runs: a device for each",
    )
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU")
    options = parser.parse_args(argv)
    try:
        switch_off_command_buffers()
        session = Session(options)
        prepare(options.out / "compiled")
        return session.run(options.block)
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
