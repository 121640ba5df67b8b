"""Run an experiment: every case and seed in one process, resumable, within a budget.

    python -m experiments.run 001 --budget-seconds 900

Writes FOLDER/results/CASE-SEED.json (FOLDER: runs/experiments/NAME or --out), and from
them table.md and plot.png. What has a result is skipped. `--tiny` is the same program
on minutes of CPU and on data that every machine has.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from experiments.shared.arrays import Arrays, load_split
from experiments.shared.case import Case, Study, find_experiment, load_config
from experiments.shared.fit import Fit, OutOfTime, describe
from experiments.shared.results import result_file, write_result, write_summary
from uoe_jax.config import config_hash
from uoe_jax.data.split import SPLITS
from uoe_jax.errors import UoeError


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0, 1 if a case failed, 2 for a bad request."""
    options = _parse(argv)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    try:
        folder = find_experiment(options.experiment)
        name = folder.name + ("-tiny" if options.tiny else "")
        out = options.out or Path("runs") / "experiments" / name
        module = load_config(folder)
        if hasattr(module, "program"):  # not a set of models to train
            out.mkdir(parents=True, exist_ok=True)
            told = module.summary if options.summary else module.program
            print(told(out) if options.summary else told(out, options.tiny))
            return 0
        study = pick(module.study(options.tiny), options.only, options.seeds)
        failed = 0 if options.summary else run(study, out, options.budget_seconds)
        print(write_summary(out, study))
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if failed else 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiment", help="number or folder, as 001")
    parser.add_argument("--out", type=Path, help="where results go")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument("--only", nargs="+", default=[], help="names of cases")
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU")
    parser.add_argument("--summary", action="store_true", help="table and plot only")
    return parser.parse_args(argv)


def pick(study: Study, only: list[str], seeds: list[int]) -> Study:
    """Return the study with the named cases and seeds; empty lists take all."""
    cases = [c for c in study.cases if not only or c.name in only]
    if seeds:
        cases = [dataclasses.replace(c, seeds=tuple(seeds)) for c in cases]
    return dataclasses.replace(study, cases=tuple(cases))


def run(study: Study, out: Path, budget: float) -> int:
    """Train what has no result yet; return how many cases failed.

    Every case gets its first seed before any gets its second.
    """
    deadline = time.perf_counter() + budget
    runs = Runs(out, deadline)
    failed: set[str] = set()
    for number in range(max((len(c.seeds) for c in study.cases), default=0)):
        for case in study.cases:
            seed = case.seeds[number] if number < len(case.seeds) else None
            if seed is None or case.name in failed:
                continue
            try:
                runs.run(case, seed)
            except OutOfTime as stop:
                _say(f"{case.name}: seed {seed} {stop}")
            except Exception:  # one case must not end the others
                traceback.print_exc()
                failed.add(case.name)
    return len(failed)


class Runs:
    """Compiled cases and data of a process, kept for later seeds."""

    def __init__(self, out: Path, deadline: float):
        self.out, self.deadline = out, deadline
        self.fits: dict[str, tuple[Fit, dict[str, Any]]] = {}
        self.took: dict[str, float] = {}
        self.arrays: dict[str, dict[str, Arrays]] = {}

    def run(self, case: Case, seed: int) -> None:
        """Train one seed and write its result, unless it has one."""
        if result_file(self.out, case.name, seed).is_file():
            return
        start = time.perf_counter()
        if start + self.took.get(case.name, 0.0) > self.deadline:
            raise OutOfTime("doesn't fit the budget")
        say = lambda text: _say(f"{case.name}: {text}")
        if case.name not in self.fits:
            self.fits[case.name] = self.compile(case)
            start = time.perf_counter()
        fit, about = self.fits[case.name]
        result = fit.run(seed, self.deadline, say)
        took = self.took[case.name] = time.perf_counter() - start
        write_result(self.out, about | result)
        rate = about["tokens_per_step"] * result["steps"] / result["seconds"]
        say(f"seed {seed}: {took:.1f} s, {rate:,.0f} tokens/s, {result.get('test')}")

    def compile(self, case: Case) -> tuple[Fit, dict[str, Any]]:
        """Return a case's programs and what its results say of it."""
        fit = Fit(case.config, self.data(case))
        compiled = fit.compile()
        about = describe(case.config) | {
            "case": case.name,
            "config": dataclasses.asdict(case.config),
            "config_hash": config_hash(case.config),
            "compile_seconds": compiled,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
            "date": datetime.date.today().isoformat(),
        }
        size = about["parameters"] / 1e6
        _say(f"{case.name}: compiled in {compiled:.1f} s, {size:.1f}M parameters")
        return fit, about

    def data(self, case: Case) -> dict[str, Arrays]:
        """Return a case's splits on the device, shared by cases with the same data."""
        model = case.config.model
        shape = (case.config.seq_len, model.kind, model.vocab_size, model.image_size)
        own = dataclasses.replace(case.config.data, batch_size=1)
        key = f"{config_hash(own)} {shape}"
        if key not in self.arrays:
            start = time.perf_counter()
            found = {split: load_split(case.config, split) for split in SPLITS}
            sizes = {s: len(next(iter(a.values()))) for s, a in found.items()}
            _say(f"data in {time.perf_counter() - start:.1f} s, examples {sizes}")
            self.arrays[key] = found
        return self.arrays[key]


def _say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
