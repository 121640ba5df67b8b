"""Import a model, cut it, train the cuts on; losses and speeds beside plainer models.

    python -m experiments.e009_real_model.run --model SmolLM2.gguf \
        --articles enwiki_articles.jsonl.xz --out runs/e009 --minutes 60

Every model is one entry of OUT/results.json, the most telling first; the same line goes
on where the last one ended, within a training run too. `--part 1/2` takes every second
model and writes OUT/results-1.json, so that two devices share the work; a later line
without it reads all parts. `--speeds` measures decoding alone, as the process that
trains does without CUDA graphs. `--tiny` is the same program on seconds of CPU with a
small model.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.e009_real_model.prune import Prune, narrower, prune_run
from experiments.e009_real_model.study import (
    MARKS,
    TINY,
    Entry,
    Scale,
    base_config,
    entries,
    held_out,
    training_config,
    write_texts,
)
from experiments.e009_real_model.table import write_summary
from experiments.shared.case import change
from experiments.shared.flags import switch_off_command_buffers
from experiments.shared.part import Part
from experiments.shared.work import prepare, set_flax
from uoe_jax.bench.record import made_with, write_record
from uoe_jax.config import ExperimentConfig, ModelConfig, config_hash
from uoe_jax.data import make_dataset
from uoe_jax.data.record import read_record
from uoe_jax.decompose.plan import Cut
from uoe_jax.decompose.runs import decompose_run
from uoe_jax.decompose.split import union_config
from uoe_jax.errors import UoeError
from uoe_jax.files import read_json
from uoe_jax.generate import generate
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.interop.importing import import_run
from uoe_jax.model import make_model
from uoe_jax.partition.mesh import evaluation_mesh
from uoe_jax.runs.folder import write_settings
from uoe_jax.runs.load import load_run
from uoe_jax.train import train
from uoe_jax.train.metrics import read_metrics
from uoe_jax.train.validate import make_eval_step, run_validation

TEXTS = ("wikipedia", "python")
LEAST_SECONDS = 75  # that an entry takes, before one has shown


def join(results: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add another part's results to some; an entry may be in both."""
    entries = results["entries"]
    for name, found in more["entries"].items():
        entries[name] = entries.get(name, {}) | found
    results |= {key: value for key, value in more.items() if key != "entries"}


class Study:
    """One folder of results, and the programs that score its models."""

    def __init__(self, options: argparse.Namespace):
        self.out: Path = options.out
        self.scale = TINY if options.tiny else Scale()
        self.started = time.perf_counter()
        self.limit = options.minutes * 60
        self.work: Path = options.work or self.out / "work"
        self.steps: dict[Any, Any] = {}  # compiled evaluations by model
        # Models that are made while others train.
        self.maker = ThreadPoolExecutor(1, initializer=set_flax)
        self.making: dict[Any, Future[Path]] = {}
        self.part: Part = options.part
        self.file = self.out / self.part.file
        # What other parts have found is not done again; only one part writes it.
        self.results: dict[str, Any] = {"entries": {}}
        self.others: dict[str, Any] = {"entries": {}}
        for file in sorted(self.out.glob("results*.json")):
            mine = file == self.file or self.part.count == 1
            join(self.results if mine else self.others, read_json(file))

    @property
    def left(self) -> float:
        """Seconds until the limit."""
        return self.limit - (time.perf_counter() - self.started)

    def say(self, text: str) -> None:
        """Print a line with the time since the start."""
        print(f"[{time.perf_counter() - self.started:6.1f} s] {text}", flush=True)

    def write(self) -> None:
        """Write the results so far, and what is drawn from them."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_record(self.file, self.results)
        if self.part.count == 1:
            names = [entry.name for entry in self.entries]
            at = lambda item: names.index(item[0])
            ordered = dict(sorted(self.results["entries"].items(), key=at))
            write_summary(self.out, self.results | {"entries": ordered})

    def begin(self, model: Path, articles: Path) -> None:
        """Import the model and prepare the texts, once."""
        texts, dense = self.work / "texts", self.work / "imported"
        if not (texts / "python" / "valid.jsonl").is_file():
            write_texts(articles, texts, most=60 if self.scale is TINY else None)
            self.say("texts are written")
        if not dense.is_dir():
            import_run(model, dense, dtype="float32")
            config = base_config(load_run(dense).config, texts, self.scale)
            write_settings(dense, config, read_record(dense))
            self.say(f"imported {model.name}")
        config = load_run(dense).config
        self.entries = entries(config.model, self.scale)
        self.texts = {name: held_out(config, texts, name) for name in TEXTS}
        self.data = {n: make_dataset(c, "valid") for n, c in self.texts.items()}
        train_data = make_dataset(config, "train")
        tokens = train_data.num_examples * self.scale.length
        row = self.scale.rows * self.scale.length
        self.batches = max(round(self.scale.held_out / row), 1)
        self.results |= {
            **made_with(),
            "model": model.name,
            "steps": config.train.steps,
            "tokens_a_step": row,
            "training_tokens_there_are": tokens,
            "held_out_tokens": {
                n: min(self.batches, d.num_batches) * row for n, d in self.data.items()
            },
            "learning_rate": config.optim.learning_rate,
        }
        self.say(f"{tokens:,} tokens to train on")

    def score(self, folder: Path, step: int | None = None) -> dict[str, float]:
        """Return a run's mean loss on each held-out text, nats a token."""
        run = load_run(folder, step=step)
        graphdef, params, buffers = nnx.split(run.model, nnx.Param, ...)
        mesh = evaluation_mesh(run.config)
        if run.config.model not in self.steps:
            made = make_eval_step(run.config, graphdef, mesh)
            self.steps[run.config.model] = made
        scored = self.steps[run.config.model]
        found = {}
        for name, data in self.data.items():
            values = run_validation(scored, params, buffers, data, mesh, self.batches)
            found[name] = values["loss"]
        return found

    def look_ahead(self, jobs: list[tuple[str, Entry]]) -> None:
        """Begin to make the models of all jobs, in their order."""
        for kind, entry in jobs:
            known = self.results["entries"].get(entry.name, {})
            needed = {"plain_at_once": entry.plain, "at_once": entry.made}
            wanted = [m for name, m in needed.items() if name not in known]
            for made in [*wanted, entry.made] if kind == "train" else []:
                if made is not None and made not in self.making:
                    folder = self.work / "made" / config_hash(made)
                    job = self.maker.submit(make, made, self.work / "imported", folder)
                    self.making[made] = job

    def made(self, wanted: Cut | Prune | None) -> Path:
        """Return the folder of a model that is made, or wait for it."""
        return (
            self.work / "imported" if wanted is None else self.making[wanted].result()
        )

    def add(self, entry: Entry) -> None:
        """Make, score and train one entry as far as the time goes."""
        found = self.results["entries"].setdefault(entry.name, {})
        dense, folder = self.work / "imported", self.work / "runs" / _slug(entry.name)
        if "plain_at_once" not in found and entry.plain is not None:
            found["plain_at_once"] = self.score(self.made(entry.plain))
            self.say(f"{entry.name}, plain: {found['plain_at_once']}")
            self.write()
        if not folder.is_dir():
            part = folder.with_name(folder.name + "-copying")
            shutil.rmtree(part, ignore_errors=True)
            folder.parent.mkdir(exist_ok=True)
            shutil.copytree(self.made(entry.made), part).rename(folder)
        if "at_once" not in found:
            found["at_once"] = self.score(self.made(entry.made))
            found |= describe(load_run(dense).config, load_run(folder).config)
            self.say(f"{entry.name}, at once: {found['at_once']}")
            self.write()
        if not entry.trains:
            return
        config = training_config(entry, load_run(folder).config, dense)
        spent = load_run(folder).progress.elapsed
        limit = spent + max(self.left - 20, 1) if math.isfinite(self.left) else None
        summary = train(_with_limit(config, limit), folder, quiet=True)
        self.follow(folder, config, found)
        self.say(f"{entry.name}: {summary['step']} steps, {found['curve']}")
        found["compile_seconds"] = summary.get("compile_seconds")
        found["training_seconds"] = summary["seconds"]
        found["train_tokens_per_second"] = training_rate(folder)
        done = summary["step"] >= config.train.steps
        if done:
            shutil.rmtree(folder)
        found["done"] = done
        self.write()

    def follow(
        self, folder: Path, config: ExperimentConfig, found: dict[str, Any]
    ) -> None:
        """Score the checkpoints of an entry's marks that aren't yet."""
        curve = found.setdefault("curve", {})
        for mark in range(1, MARKS + 1):
            step = config.train.steps // MARKS * mark
            tokens = str(step * self.scale.rows * self.scale.length)
            saved = (folder / "checkpoints" / str(step)).is_dir()
            if tokens not in curve and saved:
                curve[tokens] = self.score(folder, step=step)

    def speed(self, entry: Entry) -> None:
        """Measure how fast an entry's model decodes, by fresh weights of its shape."""
        found = self.results["entries"].setdefault(entry.name, {})
        dense = load_run(self.work / "imported").config.model
        make_fresh = jax.jit(make_model, static_argnums=0)
        model = make_fresh(shape_of(entry.plain, dense), jax.random.key(0))
        rates = {}
        for rows in self.scale.decode_rows:
            rates[str(rows)] = decode_rate(model, rows, self.scale)
        found["decode_tokens_per_second"] = rates
        self.say(f"{entry.name} decodes {rates} tokens/s")
        self.write()


def make(made: Cut | Prune, dense: Path, folder: Path) -> Path:
    """Write a model before it trains on, unless it is there; return its folder."""
    if not folder.is_dir():
        write = prune_run if isinstance(made, Prune) else decompose_run
        write(dense, folder, made)  # type: ignore[arg-type]
    return folder


def shape_of(made: Cut | Prune | None, dense: ModelConfig) -> ModelConfig:
    """Return the config of what `make` makes of a dense model."""
    if made is None:
        return dense
    if isinstance(made, Prune):
        return narrower(dense, made)
    where = (made.parts, made.attention_experts, made.shared)
    return union_config(dense, made.num_experts, made.chosen, *where)


def describe(dense: ExperimentConfig, config: ExperimentConfig) -> dict[str, Any]:
    """Return a model's size, and its FLOPs over those of the imported model."""
    cost = [flops_per_token(c.model, c.seq_len).forward for c in (config, dense)]
    return {
        "parameters": sum(count_params(config.model).values()),
        "forward_flops_per_token": cost[0],
        "flops_share": cost[0] / cost[1],
    }


def training_rate(folder: Path) -> float | None:
    """Return tokens a second of the later half of the steps, the median line."""
    lines = [line for line in read_metrics(folder / "metrics.jsonl")]
    rates = [line["tokens_per_second"] for line in lines if line["kind"] == "train"]
    rates = [rate for rate in rates[len(rates) // 2 :] if rate]
    return float(np.median(rates)) if rates else None


def decode_rate(model: Any, rows: int, scale: Scale) -> float:
    """Return new tokens a second of greedy decoding, prompts of 64 tokens."""
    rng = np.random.default_rng(0)
    length = min(64, scale.length // 2)
    tokens = jnp.asarray(rng.integers(0, 200, (rows, length)), jnp.int32)
    lengths = jnp.full((rows,), length, jnp.int32)
    run = lambda: jax.block_until_ready(
        generate(model, tokens, lengths, scale.new_tokens, greedy=True)
    )
    run()
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return rows * scale.new_tokens / min(seconds)


def _with_limit(config: ExperimentConfig, seconds: float | None) -> ExperimentConfig:
    return change(config, train={"max_seconds": seconds})


def _slug(name: str) -> str:
    return name.replace(" ", "-").replace(",", "").replace("/", "-of-")


def plan(study: Study, speeds: bool) -> list[tuple[str, Entry]]:
    """Return what this process is to do: models to train in order, or all speeds."""
    listed = study.entries
    done: dict[str, Any] = {"entries": {}}
    join(done, study.results)
    join(done, study.others)
    if speeds:
        # A taught or warmed-up union decodes as the one that it began as.
        own = [e for e in listed if e.plain is not None or e.made is None]
        kind, key = "speed", "decode_tokens_per_second"
    else:
        kind, key, own = "train", "done", list(listed)
    # Of all models, so that a part stays the same one while others finish theirs.
    mine = study.part.take(own)
    left = [e for e in mine if not done["entries"].get(e.name, {}).get(key)]
    return [(kind, entry) for entry in left]


def main(argv: list[str] | None = None) -> int:
    """Run the program; 1 if an entry failed, 2 for a bad request."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF or a folder")
    parser.add_argument("--articles", type=Path, required=True, help="JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, help="runs; OUT/work if not given")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument(
        "--part", type=Part.parse, default=Part(1, 1), metavar="I/N", help="of N"
    )
    parser.add_argument("--speeds", action="store_true", help="measure decoding alone")
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    options = parser.parse_args(argv)
    if not options.speeds:
        switch_off_command_buffers()
    study, failed = Study(options), 0
    prepare(study.work / "compiled")
    try:
        study.begin(options.model, options.articles)
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    took = LEAST_SECONDS if math.isfinite(study.left) else 0
    jobs = plan(study, options.speeds)
    study.look_ahead(jobs)
    for kind, entry in jobs:
        # A model that can't reach its first mark in time says nothing.
        if study.left < took * (0.6 if kind == "train" else 0.5):
            study.say(f"no time for {entry.name} ({kind})")
            continue
        start = time.perf_counter()
        try:
            study.add(entry) if kind == "train" else study.speed(entry)
        except jax.errors.JaxRuntimeError as error:
            # A device that failed computes nothing more in this process.
            study.say(f"{entry.name} ({kind}) failed on the device: {error}"[:500])
            study.say("the same line goes on in a new process")
            failed += 1
            break
        except Exception as error:  # the others are worth having
            failed += 1
            study.say(f"{entry.name} ({kind}) failed: {type(error).__name__}: {error}")
            failures = study.results.setdefault("failures", {})
            failures[f"{entry.name} {kind}"] = str(error)[:500]
            study.write()
            continue
        if kind == "train":
            took = min(max(time.perf_counter() - start, 1.0), 150.0)
    study.maker.shutdown(wait=False, cancel_futures=True)
    study.write()
    study.say("the end")
    return 1 if failed else 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a model that is still being made would be waited for
