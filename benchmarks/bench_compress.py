"""Time compressed models: `python benchmarks/bench_compress.py --run RUN --out FILE`.

Of a dense run that has data: seconds of its statistics, of sorting and of each cut;
then, of the dense model and of each compressed one, how fast prompts are read and how
fast greedy decoding makes tokens, at one row and at many, in bfloat16. A token's time
is that of all new tokens but the first over their number; medians. Prompts are read
with low ranks as two products; decoding multiplies out what is faster so. A second call
with the same --out goes on with the rows that are missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from uoe_jax.bench.record import arguments, header, read_record, write_record
from uoe_jax.bench.timing import first_and_median
from uoe_jax.compress.methods import prepare
from uoe_jax.compress.observed import Observed, Smaller, block_params, take_apart
from uoe_jax.compress.options import Compress
from uoe_jax.compress.statistics import observe
from uoe_jax.errors import ConfigError
from uoe_jax.generate import generate
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import calibration_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32

RATIOS = (0.1, 0.2, 0.3, 0.4, 0.5)  # whose cuts are timed
CUTS = (0.2, 0.4)  # whose models are
# method, allocation, multiple of the MLPs' widths; unequal widths compile longest
ROWS = {
    "modegpt": ("modegpt", "uniform", 64),
    "lord": ("lord", None, 8),
    "depth": ("depth", None, 8),
    "curve": ("modegpt", "curve", 8),
}
# Alike in all rows of a file.
KEPT = ("run", "calibrate", "prompt", "new", "device", "jax")
LEAST = 30.0  # seconds left in which a row may begin


def look(run: Any, args: argparse.Namespace) -> tuple[Observed, dict[str, float]]:
    """Return what a text shows of a run, and the seconds that it took, twice."""
    model = in_float32(run.config.model)
    params, buffers = flat_params(run.model), flat_buffers(run.model)
    batch = calibration_batch(run.config, args.calibrate)
    whole = with_params(model, params, buffers)
    took, seen = [], ()
    for _ in range(2):
        start = time.perf_counter()
        seen = observe(whole, batch)
        took.append(time.perf_counter() - start)
    observed = take_apart(model, params, buffers, seen)
    return observed, {"statistics_first": took[0], "statistics": took[1]}


class Bench:
    """A file of rows, those that it lacks, and the time that is left for them."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.began = args, time.perf_counter()
        run = load_run(args.run)
        self.found: dict[str, Any] = {"rows": [], "seconds": {}}
        about = {"run": run.config.name, "prompt": args.prompt, "new": args.new}
        about |= {"calibrate": args.calibrate} | header(stated=args.commit)
        if args.out is not None and args.out.is_file():
            self.found = read_record(args.out)
            wrong = [n for n in KEPT if self.found.get(n) != about[n]]
            if wrong:
                raise SystemExit(
                    f"{args.out} has {wrong[0]} {self.found.get(wrong[0])!r}, and this "
                    f"is {about[wrong[0]]!r}; give another --out"
                )
        self.found |= about
        self.observed, took = look(run, args)
        self.took: dict[str, float] = self.found["seconds"]
        self.took |= took
        arrays = flat_params(run.model), flat_buffers(run.model)
        self.dense = Smaller(self.observed.model, *arrays)

    def lacks(self, about: dict[str, Any]) -> list[int]:
        """Return the batches of which a model has no row."""
        rows = self.found["rows"]
        has = lambda batch: any(
            all(row.get(k) == v for k, v in {**about, "batch": batch}.items())
            for row in rows
        )
        return [batch for batch in self.args.batches if not has(batch)]

    def put(self, about: dict[str, Any], made: Smaller) -> None:
        """Time a model at the batches that it lacks, while there is time."""
        flops = lambda model: flops_per_token(model, self.args.prompt).forward
        dense = self.dense.config
        size = {
            "blocks": block_params(made.config) / block_params(dense),
            "flops": flops(made.config) / flops(dense),
        }
        for batch in self.lacks(about):
            spent = time.perf_counter() - self.began
            if spent > 60 * self.args.minutes - LEAST:
                print(f"no time for {about}, {batch} rows", flush=True)
                return
            row = {**about, **size, **time_model(made, batch, self.args)}
            self.found["rows"].append(row | {"commit": self.found["commit"]})
            print(f"[{time.perf_counter() - self.began:5.0f} s] {row}", flush=True)
            write_record(self.args.out, self.found)

    def put_method(self, method: str, allocate: Any, multiple: int) -> None:
        """Cut by a method and time each model; add the seconds of all ratios."""
        about = {"method": method, "allocate": allocate}
        cuts = [cut for cut in CUTS if self.lacks({**about, "cut": cut})]
        if not cuts:
            return
        start = time.perf_counter()
        ready = prepare(self.observed, method)
        self.took[f"prepare_{method}"] = time.perf_counter() - start
        options = Compress(method=method, allocate=allocate, multiple=multiple)
        at = lambda cut: dataclasses.replace(options, cut=cut)
        if method == "modegpt" and "five_cuts" not in self.took:
            start = time.perf_counter()
            for cut in RATIOS:
                ready(at(cut))
            self.took["five_cuts"] = time.perf_counter() - start
        for cut in cuts:
            try:
                made = ready(at(cut))
            except ConfigError as error:  # of few layers none can go
                print(f"{method} at {cut}: {error}", flush=True)
                continue
            self.put({**about, "cut": cut}, made)


def time_model(made: Smaller, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """Return how fast a model reads prompts and makes tokens, in bfloat16."""
    half = dataclasses.replace(
        made.config, param_dtype="bfloat16", compute_dtype="bfloat16"
    )
    model = with_params(half, made.params, made.buffers)
    shape = (batch, args.prompt)
    tokens = jax.random.randint(jax.random.key(batch), shape, 0, half.vocab_size)
    lengths = jnp.full(batch, args.prompt, jnp.int32)
    run = lambda count: jax.block_until_ready(
        generate(model, tokens, lengths, count, greedy=True)
    )
    first, one = first_and_median(lambda: run(1), args.rounds)
    second, whole = first_and_median(lambda: run(args.new), args.rounds)
    step = (whole - one) / (args.new - 1)
    return {
        "batch": batch,
        "prefill_tokens_a_second": batch * args.prompt / one,
        "decode_tokens_a_second": batch / step,
        "compile_s": [first - one, second - whole],
    }


def main() -> None:
    """Time the run's statistics and cuts, then each model; write as it goes."""
    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True, help="dense, with data")
    parser.add_argument("--calibrate", type=int, default=16_384, help="tokens")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument(
        "--methods", nargs="*", choices=[*ROWS], default=[*ROWS], help="beside dense"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="to start rows in")
    bench = Bench(parser.parse_args())
    bench.put({"method": "dense", "cut": 0.0}, bench.dense)
    for name in bench.args.methods:
        bench.put_method(*ROWS[name])
    write_record(bench.args.out, bench.found)


if __name__ == "__main__":
    main()
