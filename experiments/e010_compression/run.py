"""Compress a model by every method; perplexity on two held-out texts.

    python -m experiments.e010_compression.run --model SmolLM2.gguf \
        --articles enwiki_articles.jsonl.xz --out runs/e010
    python -m experiments.e010_compression.run --ours --python CORPUS/texts \
        --articles enwiki_articles.jsonl.xz --out runs/e010_ours

An imported model has the texts of experiment 009. With `--ours` it is one that is
trained first, on articles and on `experiments.shared.python_corpus`. Each row is
written as soon as it is there, `table.md` and `healing.png` at the end; the same line
goes on where the last one ended.
Parts: `rows` (methods and allocations at each cut), `ranks` (low ranks against
perplexity), `anytime` (cuts opened from one file beside cuts made one by one), `heal`
(the same LoRA steps on several cuts). `--tiny` is the same on seconds of CPU with a
small model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.e010_compression.heal import heal, write_cut
from experiments.e010_compression.subject import (
    Unfinished,
    imported,
    planned,
    trained,
)
from experiments.e010_compression.table import write_summary
from experiments.shared.flags import switch_off_command_buffers
from experiments.shared.work import prepare as prepare_process
from uoe_jax.bench.record import commit, made_with, read_record, write_record
from uoe_jax.compress.anytime import open_run
from uoe_jax.compress.apply import compress_run
from uoe_jax.compress.curve import score, sizes
from uoe_jax.compress.methods import prepare
from uoe_jax.compress.observed import Observed, Smaller, take_apart
from uoe_jax.compress.options import LOW_RANK, Compress
from uoe_jax.compress.statistics import observe
from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, UoeError
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import calibration_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32
from uoe_jax.train.signals import StopRun

CUTS = (0.2, 0.3, 0.4, 0.1)
ROWS = (
    ("modegpt", "curve"),
    ("modegpt", "uniform"),
    ("sort", "uniform"),
    ("magnitude", "uniform"),
    ("depth", None),
    ("svd", None),
    ("lord", None),
    ("sort", "curve"),
    ("modegpt", "bi"),
    ("drop", "uniform"),
    ("flap", "uniform"),
    ("slice", None),
)
SHARES = (0.99, 0.96, 0.9, 0.83, 0.69)  # of the rank from which nothing is saved
SMALL = (0.01, 0.02, 0.05, 0.1)  # cuts by ranks of each matrix
OPENED = (0.1, 0.2, 0.3, 0.4, 0.5)
# Pairs of the same widths, which are the same programs.
HEALED = (
    ("lord", None, 0.2),
    ("svd", None, 0.2),
    ("modegpt", "uniform", 0.3),
    ("drop", "uniform", 0.3),
    ("modegpt", "curve", 0.3),
    ("slice", None, 0.3),
)
PARTS = ("ranks", "rows", "anytime", "heal")
_SECONDS = {"row": 10.0, "anytime": 30.0, "heal": 75.0}  # what one takes, about


class Experiment:
    """A dense model, what its text shows, and a file of rows."""

    def __init__(self, options: argparse.Namespace):
        self.out: Path = options.out
        self.tiny: bool = options.tiny
        self.parts: list[str] = options.parts
        self.started, self.limit = time.perf_counter(), 60 * options.minutes
        self.file = self.out / "results.json"
        self.results: dict[str, Any] = read_record(self.file) or {"rows": []}
        self.agree(**planned(options))
        self.subject = (
            trained(options, self.left) if options.ours else imported(options)
        )
        held = self.subject.held.items()
        self.agree(held_out_tokens={n: int(b["mask"].sum()) for n, b in held})
        self.ready: dict[str, Callable[[Compress], Smaller]] = {}
        self.results |= made_with()
        write_record(self.file, self.results)

    def agree(self, **about: Any) -> None:
        """Note what all rows are of; raise ConfigError where the file is of another."""
        for name, value in about.items():
            known = self.results.setdefault(name, value)
            if known != value:
                raise ConfigError(
                    f"{self.file} has {name} {known!r}, and this is {value!r}; give "
                    "another --out"
                )

    @property
    def left(self) -> float:
        """Seconds until no row may begin."""
        return self.limit - (time.perf_counter() - self.started)

    def lacks(self, kind: str, **about: Any) -> bool:
        """Whether a row of these isn't there yet, and may begin."""
        # A healed row has steps too; without them it is another row.
        wanted = {"steps": None} | about
        same = lambda row: all(row.get(k) == v for k, v in wanted.items())
        if any(same(row) for row in self.results["rows"]):
            return False
        if self.left < _SECONDS[kind]:
            print(f"no time for {about}: the same line goes on", flush=True)
            return False
        return True

    def put(self, **row: Any) -> None:
        """Add a row and write the file."""
        self.results["rows"].append(row | {"commit": commit()})
        print(f"[{time.perf_counter() - self.started:6.1f} s] {row}", flush=True)
        write_record(self.file, self.results)

    def observe(self) -> Observed:
        """Return the model by layer with what its text shows; the dense row too."""
        run = load_run(self.subject.folder)
        model = in_float32(run.config.model)
        params, buffers = flat_params(run.model), flat_buffers(run.model)
        if self.lacks("row", method="dense"):
            whole = Smaller(model, params, buffers)
            self.put(method="dense", cut=0.0, **score(whole, self.subject.held))
        start = time.perf_counter()
        batch = calibration_batch(run.config, self.subject.calibration)
        seen = observe(with_params(model, params, buffers), batch)
        self.results["observe_seconds"] = time.perf_counter() - start
        return take_apart(model, params, buffers, seen)

    def cut(self, observed: Observed, wanted: Compress) -> Smaller:
        """Return the model of a cut; what a method looks at is looked at once."""
        method = wanted.chosen
        if method not in self.ready:
            start = time.perf_counter()
            self.ready[method] = prepare(observed, method)
            self.results[f"sort_seconds_{method}"] = time.perf_counter() - start
        return self.ready[method](wanted)


def cut_rows(experiment: Experiment, observed: Observed, part: str) -> None:
    """Add the rows of methods, allocations and cuts, or those of ranks."""
    for about in wanted_rows(experiment, observed, part):
        if not experiment.lacks("row", **about):
            continue
        try:
            start = time.perf_counter()
            made = experiment.cut(observed, Compress(**about))
        except ConfigError as error:
            experiment.put(**about, refused=str(error))
            continue
        seconds = time.perf_counter() - start
        size = sizes(observed, made, experiment.subject.length)
        scores = score(made, experiment.subject.held)
        experiment.put(**about, **size, cut_seconds=seconds, **scores)


def wanted_rows(
    experiment: Experiment, observed: Observed, part: str
) -> Iterator[dict[str, Any]]:
    """Yield what is to be cut for a part, the most telling first."""
    if part == "rows":
        cuts = CUTS[1:2] if experiment.tiny else CUTS
        for cut, (method, allocate) in itertools.product(cuts, ROWS):
            yield {"method": method, "allocate": allocate, "cut": cut}
    else:
        yield from wanted_ranks(observed.model)


def wanted_ranks(model: ModelConfig) -> Iterator[dict[str, Any]]:
    """Yield what is to be cut to find how little low ranks cost.

    One rank of all matrices, beside plain SVD; and ranks by curves, beside neurons,
    pairs and values that save as much.
    """
    most = model.d_model * model.d_ff / (model.d_model + model.d_ff)
    shares = list(itertools.product(SHARES, LOW_RANK))
    ranks = [
        {"method": method, "rank": max(math.floor(share * most), 1)}
        for share, method in shares
    ]
    yield from ranks[:2]
    for cut, method in itertools.product(SMALL, ("lord", "modegpt")):
        yield {"method": method, "allocate": "curve", "cut": cut}
    yield from ranks[2:]


def anytime_rows(experiment: Experiment, observed: Observed) -> None:
    """Add what one file opens as at each cut, beside the cuts made one by one."""
    out, subject = experiment.out / "work" / "anytime", experiment.subject
    if not out.is_dir() and experiment.left > _SECONDS["anytime"]:
        options = Compress(anytime=True, calibrate=subject.calibration)
        found = compress_run(subject.folder, out, options)
        experiment.results["anytime_file_share"] = found["file_share"]
    for cut in OPENED:
        about = {"method": "anytime", "cut": cut}
        if not experiment.lacks("anytime", **about):
            continue
        start = time.perf_counter()
        run = open_run(out, cut=cut)
        seconds = time.perf_counter() - start
        parts = (flat_params(run.model), flat_buffers(run.model))
        opened = Smaller(run.config.model, *parts)
        alone = experiment.cut(observed, Compress(cut=cut))
        scores = [score(made, subject.held) for made in (opened, alone)]
        experiment.put(**about, open_seconds=seconds, **scores[0], apart=scores[1])


def healed_rows(experiment: Experiment, observed: Observed) -> None:
    """Add what the same LoRA steps bring back of several cuts."""
    work, subject = experiment.out / "work", experiment.subject
    steps = 4 if experiment.tiny else 200
    for method, allocate, cut in HEALED[:: 4 if experiment.tiny else 1]:
        about = {"method": method, "allocate": allocate, "cut": cut, "steps": steps}
        if not experiment.lacks("heal", **about):
            continue
        name = f"{method}-{allocate}-{round(100 * cut)}"
        made, healed = work / "cut" / name, work / "healed" / name
        wanted = Compress(method=method, allocate=allocate, cut=cut)
        try:
            if not made.is_dir():
                write_cut(subject.folder, made, experiment.cut(observed, wanted))
            found = heal(made, healed, steps, 4 if experiment.tiny else 16)
        except ConfigError as error:
            experiment.put(**about, refused=str(error))
            continue
        scores = {when: score(model, subject.held) for when, model in found.models}
        experiment.put(**about, **scores, losses=found.losses, seconds=found.seconds)


def main(argv: list[str] | None = None) -> int:
    """Cut and score a model row by row; 2: a bad request, 128 + N: a signal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--model", type=Path, help="GGUF or a folder")
    which.add_argument("--ours", action="store_true", help="train a model first")
    parser.add_argument("--articles", type=Path, required=True, help="JSON lines")
    parser.add_argument("--python", type=Path, help="folder of a Python corpus' texts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no row that ends after"
    )
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    options = parser.parse_args(argv)
    if options.ours and options.python is None:
        parser.error("--ours needs --python FOLDER, a Python corpus' texts")
    if options.python is not None and not options.ours:
        parser.error("--python is of --ours; a model of --model has its own texts")
    switch_off_command_buffers()
    prepare_process(options.out / "work" / "compiled")
    try:
        add_rows(Experiment(options))
    except Unfinished as stop:
        print(f"time is up: {stop}; the same line goes on", flush=True)
    except StopRun as stop:
        print(f"experiment: {stop}; the same line goes on", file=sys.stderr)
        return stop.exit_code
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def add_rows(experiment: Experiment) -> None:
    """Observe the model once, and add the rows of each part that are missing."""
    observed = experiment.observe()
    for part in experiment.parts:
        if part == "anytime":
            anytime_rows(experiment, observed)
        elif part == "heal":
            healed_rows(experiment, observed)
        else:
            cut_rows(experiment, observed, part)
    write_summary(experiment.out, experiment.results)


if __name__ == "__main__":
    sys.exit(main())
