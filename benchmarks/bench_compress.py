"""Time compressed models: `python benchmarks/bench_compress.py --run RUN --out FILE`.

Of a dense run that has data: seconds of its statistics, of sorting and of each cut;
then, of the dense model and of each compressed one, how fast prompts are read and how
fast greedy decoding makes tokens, at one row and at many, in bfloat16. A token's time
is that of all new tokens but the first over their number; medians. Low ranks are timed
as two products; multiplied out they are the dense model's shapes.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from uoe_jax.bench.record import arguments, header, write_record
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
# method, allocation, multiple of the MLPs' widths
ROWS = (
    ("modegpt", "curve", 8),
    ("modegpt", "uniform", 64),
    ("depth", None, 8),
    ("lord", None, 8),
)


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


def models(
    observed: Observed, took: dict[str, float]
) -> Iterator[tuple[dict, Smaller]]:
    """Yield each model to be timed, and what it is; add the seconds of all ratios."""
    for method, allocate, multiple in ROWS:
        start = time.perf_counter()
        ready = prepare(observed, method)
        took[f"prepare_{method}"] = time.perf_counter() - start
        options = Compress(method=method, allocate=allocate, multiple=multiple)
        at = lambda cut, given=options: dataclasses.replace(given, cut=cut)
        if (method, allocate) == ("modegpt", "curve"):
            start = time.perf_counter()
            for cut in RATIOS:
                ready(at(cut))
            took["five_cuts"] = time.perf_counter() - start
        for cut in CUTS:
            about = {"method": method, "allocate": allocate, "cut": cut}
            try:
                yield about, ready(at(cut))
            except ConfigError as error:  # of few layers none can go
                print(f"{method} at {cut}: {error}", flush=True)


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
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--minutes", type=float, default=1e9, help="to start models in")
    args = parser.parse_args()
    began = time.perf_counter()
    run = load_run(args.run)
    observed, took = look(run, args)
    dense = Smaller(observed.model, flat_params(run.model), flat_buffers(run.model))
    found: dict[str, Any] = {
        "run": run.config.name,
        **header(stated=args.commit),
        "prompt": args.prompt,
        "new": args.new,
        "seconds": took,
        "rows": [],
    }
    flops = lambda model: flops_per_token(model, args.prompt).forward

    def put(about: dict[str, Any], made: Smaller) -> None:
        size = {
            "blocks": block_params(made.config) / block_params(dense.config),
            "flops": flops(made.config) / flops(dense.config),
        }
        for batch in args.batches:
            if time.perf_counter() - began > 60 * args.minutes:
                return
            row = {**about, **size, **time_model(made, batch, args)}
            found["rows"].append(row)
            print(f"[{time.perf_counter() - began:5.0f} s] {row}", flush=True)
            write_record(args.out, found)

    put({"method": "dense", "cut": 0.0}, dense)
    for about, made in models(observed, took):
        put(about, made)
    write_record(args.out, found)


if __name__ == "__main__":
    main()
