"""Compress an imported model by every method; perplexity on two held-out texts.

    python -m experiments.e010_compression.run --model SmolLM2.gguf \
        --articles enwiki_articles.jsonl.xz --out runs/e010

The texts are those of experiment 009. Each row is written as soon as it is there, and
the same line goes on where the last one ended. Parts: `rows` (methods and allocations
at each cut), `ranks` (low ranks against perplexity), `anytime` (cuts opened from one
file beside cuts made one by one), `heal` (the same LoRA steps on several cuts).
`--tiny` is the same on seconds of CPU with a small model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from experiments.e009_real_model.run import (
    Part,
    Study,
    set_flax,
    switch_off_command_buffers,
)
from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.request import AdaptRequest
from uoe_jax.adapt.run import adapt_run
from uoe_jax.bench.record import made_with, read_record, write_record
from uoe_jax.compress.anytime import open_run
from uoe_jax.compress.apply import compress_run
from uoe_jax.compress.curve import score, sizes
from uoe_jax.compress.methods import prepare
from uoe_jax.compress.observed import Observed, Smaller, take_apart
from uoe_jax.compress.options import LOW_RANK, Compress
from uoe_jax.compress.statistics import observe
from uoe_jax.errors import UoeError
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import calibration_batch, probe_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32

CUTS = (0.2, 0.3, 0.4, 0.1)
ROWS = (
    ("modegpt", "curve"),
    ("modegpt", "uniform"),
    ("sort", "uniform"),
    ("depth", None),
    ("lord", None),
    ("svd", None),
    ("magnitude", "uniform"),
    ("sort", "curve"),
    ("modegpt", "bi"),
    ("drop", "uniform"),
    ("flap", "uniform"),
)
SHARES = (0.99, 0.96, 0.9, 0.83, 0.69)  # of the rank from which nothing is saved
OPENED = (0.1, 0.2, 0.3, 0.4, 0.5)
HEALED = (
    ("modegpt", "curve", 0.3),
    ("drop", "uniform", 0.3),
    ("lord", None, 0.2),
    ("svd", None, 0.2),
)
PARTS = ("anytime", "rows", "ranks", "heal")


class Experiment:
    """The imported model, what its text shows, and a file of rows."""

    def __init__(self, options: argparse.Namespace):
        self.out: Path = options.out
        self.tiny: bool = options.tiny
        self.started, self.minutes = time.perf_counter(), options.minutes
        self.study = Study(
            argparse.Namespace(
                out=options.out / "work",
                work=options.out / "work",
                tiny=options.tiny,
                minutes=math.inf,
                part=Part(1, 1),
            )
        )
        self.study.begin(options.model, options.articles)
        self.dense = self.study.work / "imported"
        tokens = self.study.scale.held_out
        held = {n: probe_batch(data, tokens) for n, data in self.study.data.items()}
        self.held = held
        self.file = self.out / "results.json"
        self.results: dict[str, Any] = read_record(self.file) or {"rows": []}
        self.results |= {
            "model": options.model.name,
            **made_with(),
            "calibration_tokens": self.study.scale.calibration,
            "held_out_tokens": {n: int(b["mask"].sum()) for n, b in held.items()},
        }

    def has(self, **about: Any) -> bool:
        """Whether a row of these is there, or the time is over."""
        late = time.perf_counter() - self.started > 60 * self.minutes
        same = lambda row: all(row.get(k) == v for k, v in about.items())
        return late or any(same(row) for row in self.results["rows"])

    def put(self, **row: Any) -> None:
        """Add a row and write the file."""
        self.results["rows"].append(row)
        self.study.say(str(row))
        write_record(self.file, self.results)

    def observe(self) -> Observed:
        """Return the model by layer with what its text shows; the dense row too."""
        run = load_run(self.dense)
        model = in_float32(run.config.model)
        params, buffers = flat_params(run.model), flat_buffers(run.model)
        if not self.has(method="dense"):
            whole = Smaller(model, params, buffers)
            self.put(method="dense", cut=0.0, **score(whole, self.held))
        start = time.perf_counter()
        batch = calibration_batch(run.config, self.study.scale.calibration)
        seen = observe(with_params(model, params, buffers), batch)
        self.results["observe_seconds"] = time.perf_counter() - start
        return take_apart(model, params, buffers, seen)


def cut_rows(experiment: Experiment, observed: Observed) -> None:
    """Add the rows of methods, allocations and cuts, and those of ranks."""
    ready: dict[str, Callable[[Compress], Smaller]] = {}
    for about in wanted_rows(experiment, observed):
        if experiment.has(**about):
            continue
        wanted, method = Compress(**about), about["method"]
        try:
            if method not in ready:
                ready[method] = prepare(observed, method)
            start = time.perf_counter()
            made = ready[method](wanted)
        except UoeError as error:
            experiment.put(**about, refused=str(error))
            continue
        seconds = time.perf_counter() - start
        size = sizes(observed, made, experiment.study.scale.length)
        scores = score(made, experiment.held)
        experiment.put(**about, **size, cut_seconds=seconds, **scores)


def wanted_rows(experiment: Experiment, observed: Observed) -> Iterator[dict[str, Any]]:
    """Yield what is to be cut, by the parts that are asked for."""
    parts, model = experiment.results["parts"], observed.model
    if "rows" in parts:
        cuts = CUTS[1:2] if experiment.tiny else CUTS
        for cut, (method, allocate) in itertools.product(cuts, ROWS):
            yield {"method": method, "allocate": allocate, "cut": cut}
    if "ranks" in parts:
        most = model.d_model * model.d_ff / (model.d_model + model.d_ff)
        for share, method in itertools.product(SHARES, LOW_RANK):
            yield {"method": method, "rank": max(math.floor(share * most), 1)}


def anytime_rows(experiment: Experiment, observed: Observed) -> None:
    """Add what one file opens as at each cut, beside the cuts made one by one."""
    out = experiment.study.work / "anytime"
    tokens = experiment.study.scale.calibration
    if not out.is_dir():
        options = Compress(anytime=True, calibrate=tokens)
        found = compress_run(experiment.dense, out, options)
        experiment.results["anytime_file_share"] = found["file_share"]
    ready = prepare(observed, "modegpt")
    for cut in OPENED:
        about = {"method": "anytime", "cut": cut}
        if experiment.has(**about):
            continue
        start = time.perf_counter()
        run = open_run(out, cut=cut)
        seconds = time.perf_counter() - start
        parts = (flat_params(run.model), flat_buffers(run.model))
        opened = Smaller(run.config.model, *parts)
        scores = [score(m, experiment.held) for m in (opened, ready(Compress(cut=cut)))]
        experiment.put(**about, open_seconds=seconds, **scores[0], apart=scores[1])


def healed_rows(experiment: Experiment) -> None:
    """Add what the same LoRA steps bring back of several cuts."""
    work, scale = experiment.study.work, experiment.study.scale
    steps = 4 if experiment.tiny else 200
    for method, allocate, cut in HEALED[: 1 if experiment.tiny else None]:
        about = {"method": method, "allocate": allocate, "cut": cut, "steps": steps}
        if experiment.has(**about):
            continue
        name = f"{method}{round(100 * cut)}"
        made, healed = work / "cut" / name, work / "healed" / name
        options = Compress(
            cut=cut, method=method, allocate=allocate, calibrate=scale.calibration
        )
        try:
            if not made.is_dir():
                compress_run(experiment.dense, made, options)
            adapter = AdapterConfig(method="lora", rank=4 if experiment.tiny else 16)
            request = AdaptRequest(
                adapter=adapter, steps=steps, learning_rate=1e-3, merge=True
            )
            report = adapt_run(made, healed, request, quiet=True)
        except UoeError as error:
            experiment.put(**about, refused=str(error))
            continue
        found = {}
        for when, folder in (("before", made), ("after", healed / "merged")):
            run = load_run(folder)
            parts = (flat_params(run.model), flat_buffers(run.model))
            found[when] = score(Smaller(run.config.model, *parts), experiment.held)
        curve = report["losses"][:: max(len(report["losses"]) // 20, 1)]
        experiment.put(**about, **found, losses=curve, seconds=report["seconds"])


def main(argv: list[str] | None = None) -> None:
    """Observe the model once, then cut and score it row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF or a folder")
    parser.add_argument("--articles", type=Path, required=True, help="JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="begin no row after"
    )
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    options = parser.parse_args(argv)
    switch_off_command_buffers()
    set_flax()
    experiment = Experiment(options)
    experiment.results["parts"] = list(options.parts)
    observed = experiment.observe()
    if "anytime" in options.parts:
        anytime_rows(experiment, observed)
    cut_rows(experiment, observed)
    if "heal" in options.parts:
        healed_rows(experiment)


if __name__ == "__main__":
    main()
