"""Check and time a router of tokens in two unions' shapes, each backend in one process.

    python benchmarks/bench_router.py --out FILE

Forward, and both passes with gates and losses. Before that, each backend's picks, gates
and gradients are compared with plain JAX's; it fails where they aren't the same to
rounding. Of both passes every device kernel's time is listed.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.bench.profile import kernel_times
from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.timing import Program, measure
from uoe_jax.model.routing.balance import stats_of_means
from uoe_jax.model.routing.token import gate_values
from uoe_jax.ops.router.api import BACKENDS, pick_experts

# Tokens of a batch, width, experts, picks: of the presets.
CASES = {
    "1b-union, batch 3": (3 * 8192, 2048, 16, 8),
    "small-union, batch 64": (64 * 2048, 768, 6, 3),
}
TINY = {"tiny": (96, 64, 4, 2)}
# Of the largest entry: picks' gates and sums are float32, dx is rounded to bfloat16.
BOUNDS = {"gates": 1e-5, "losses": 1e-5, "dx": 2.0**-7, "dw": 1e-4}


def draw(case: tuple[int, int, int, int]) -> tuple[jax.Array, ...]:
    """Return tokens, weights, biases and a gradient for the gate of each expert."""
    tokens, width, experts, _ = case
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (tokens, width), jnp.bfloat16)
    weight = 0.02 * jax.random.normal(keys[1], (width, experts))
    grads = jax.random.normal(keys[2], (tokens, experts))
    return x, weight, jnp.zeros(experts), grads


def routed(x, weight, bias, *, top_k: int, implementation: str) -> tuple:
    """Return picks, gates and weighted losses of a union's router, as in training."""
    how = {"implementation": implementation}
    found = pick_experts(x, weight, bias, top_k, **how)
    sums = {"picks": found.counts, "probs": found.probs, "z": found.z}
    sums |= {"entropy": found.entropy, "dropped": jnp.zeros(())}
    means = {name: value / x.shape[0] for name, value in sums.items()}
    stats = stats_of_means(means, top_k)
    losses = 0.01 * stats["balance_loss"] + 0.001 * stats["z_loss"]
    return found.picks, gate_values(found.scores, "sigmoid"), losses


def both(x, weight, bias, grads, *, top_k: int, implementation: str) -> dict:
    """Return what is routed and the gradients of x and weights."""

    def call(x, weight):
        how = {"top_k": top_k, "implementation": implementation}
        picks, gates, losses = routed(x, weight, bias, **how)
        return (gates, losses), picks

    (gates, losses), vjp, picks = jax.vjp(call, x, weight, has_aux=True)
    d_gates = jnp.take_along_axis(grads, picks, axis=1)
    # A step's passes lie far apart; here XLA could fuse them.
    gates, losses, d_gates = jax.lax.optimization_barrier((gates, losses, d_gates))
    dx, dw = vjp((d_gates, jnp.ones(())))
    return {"picks": picks, "gates": gates, "losses": losses, "dx": dx, "dw": dw}


def compare(got: dict, want: dict) -> dict[str, float]:
    """Return the share of tokens with other experts, and the others' errors."""
    got, want = (jax.tree.map(np.asarray, found) for found in (got, want))
    same = (np.sort(got["picks"]) == np.sort(want["picks"])).all(axis=1)
    found = {"other_experts": 1 - float(same.mean())}
    for name in BOUNDS:
        mine, plain = (np.asarray(a[name], np.float64) for a in (got, want))
        if mine.ndim and len(mine) == len(same):
            mine, plain = mine[same], plain[same]
        size = np.abs(plain).max(initial=1e-30)
        found[name] = float(np.abs(mine - plain).max(initial=0) / size)
    return found


def fits(errors: dict[str, float]) -> bool:
    """Whether errors are rounding; scores as good as equal may be picked either way."""
    small = all(errors[name] <= bound for name, bound in BOUNDS.items())
    return errors["other_experts"] <= 1e-3 and small


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="one small case")
    args = parser.parse_args()
    record: dict[str, Any] = {**header(stated=args.commit), "rows": [], "errors": {}}
    failed = False
    for about, case in (TINY if args.tiny else CASES).items():
        inputs, results = draw(case), {}
        programs = []
        for name in BACKENDS:
            how = {"top_k": case[3], "implementation": name}
            labels = {"op": "router", "case": about, "name": name}
            forward = functools.partial(routed, **how)
            backward = functools.partial(both, **how)
            programs += [
                Program(fun=forward, args=inputs[:3], labels=labels),
                Program(fun=backward, args=inputs, labels=labels | {"what": "both"}),
            ]
        for row, program in zip(measure(programs, args.rounds), programs, strict=True):
            kernels = {}
            if row.milliseconds is not None and row.what == "both":
                run = functools.partial(jax.jit(program.fun), *inputs)
                results[row.name] = jax.block_until_ready(run())
                kernels = kernel_times(run)
            record["rows"].append({**row.as_dict(), "kernels": kernels})
            print(f"{about} {row.name} {row.what}: {row.milliseconds} ms {row.note}")
            for kernel, time in list(kernels.items())[:14]:
                print(f"    {time:8.4f} ms  {kernel}", flush=True)
        for name in results.keys() - {"xla"}:
            errors = compare(results[name], results["xla"])
            failed |= not fits(errors)
            record["errors"][f"{about}, {name}"] = errors
            print(f"{about} {name}: {errors}", flush=True)
        write_record(args.out, record)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
