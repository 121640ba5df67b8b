"""Speed of the array functions on this machine: `python benchmarks/bench_ops.py`.

Segment attention beside dense attention of the same scores, and grouped matmul beside
one dense product. A time is the best of interleaved rounds, so that a busy machine
slows all candidates alike.
"""

from __future__ import annotations

import argparse
import functools
import json
import platform
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax import ops

RESULTS = Path(__file__).parent / "results"
# batch, T, experts, chosen, G, H
ATTENTION = [(16, 256, 8, 4, 1, 32), (4, 1024, 8, 4, 1, 64), (8, 512, 4, 2, 2, 32)]
# rows, I, O, groups
MATMUL = [
    (8192, 128, 64, 8),
    (8192, 128, 512, 8),
    (8192, 256, 256, 16),
    (8192, 512, 64, 16),
    (8192, 512, 512, 16),
]


def race(programs, rounds, clock):
    """Best seconds of each program, run in turns, each time warm."""
    best = dict.fromkeys(programs, float("inf"))
    for _ in range(rounds):
        for name, (fun, args) in programs.items():
            jax.block_until_ready(fun(*args))
            start = clock()
            jax.block_until_ready(fun(*args))
            best[name] = min(best[name], clock() - start)
    return best


def both_passes(fun):
    """fun's value and gradients, given arguments and a cotangent."""

    def run(*args):
        *args, grad = args
        out, vjp = jax.vjp(fun, *args)
        return out, vjp(grad)

    return jax.jit(run)


def bench_attention(case, rounds, clock):
    """Dense attention of N = E heads beside each token choosing X of them."""
    batch, length, experts, top_k, groups, width = case
    rng = np.random.default_rng(0)
    score = rng.random((batch, length, experts))
    choices = jnp.asarray(np.argsort(score, axis=-1)[..., :top_k], jnp.int32)
    packing = ops.pack_choices(choices, experts)
    rows = batch * length * top_k

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def segment(q, k, v):
        return ops.segment_attention(q, k, v, packing.segment_offsets, causal=True)

    def dense(q, k, v, implementation=None):
        return ops.dense_attention(q, k, v, causal=True, implementation=implementation)

    def plain(q, k, v):
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=True, implementation="xla"
        )

    q, grad = (draw(rows, groups, width) for _ in range(2))
    k, v = (draw(rows, width) for _ in range(2))
    qd, gd = (draw(batch, length, experts * groups, width) for _ in range(2))
    kd, vd = (draw(batch, length, experts, width) for _ in range(2))
    programs = {}
    for name, fun, args in (
        ("segment", segment, (q, k, v, grad)),
        ("dense", dense, (qd, kd, vd, gd)),
        ("plain", plain, (qd, kd, vd, gd)),
    ):
        programs[name] = jax.jit(fun), args[:3]
        programs[name + "+grad"] = both_passes(fun), args
    seconds = race(programs, rounds, clock)
    lengths = np.diff(np.asarray(packing.segment_offsets)).astype(float)
    # Two products of the scores each token sees.
    flops = {
        "segment": 4 * groups * width * (lengths * (lengths + 1) / 2).sum(),
        "dense": 4 * groups * width * batch * experts * length * (length + 1) / 2,
    }
    flops["plain"] = flops["dense"]
    name = f"B{batch} T{length} X{top_k}/{experts} G{groups} H{width}"
    return [
        row("attention", name, key, seconds[key], flops[key.split("+")[0]])
        for key in programs
    ]


def bench_matmul(case, rounds, clock):
    """One product of all rows beside one product per group."""
    num_rows, ins, outs, groups = case
    rng = np.random.default_rng(0)
    sizes = rng.multinomial(num_rows, np.full(groups, 1 / groups))
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(sizes)]), jnp.int32)
    x, w, grad = (
        jnp.asarray(rng.normal(size=s), jnp.float32)
        for s in ((num_rows, ins), (groups, ins, outs), (num_rows, outs))
    )
    grouped = functools.partial(ops.grouped_matmul, offsets=offsets)
    programs = {
        "dense": (jax.jit(jnp.matmul), (x, w[0])),
        "grouped": (jax.jit(grouped), (x, w)),
        "dense+grad": (both_passes(jnp.matmul), (x, w[0], grad)),
        "grouped+grad": (both_passes(grouped), (x, w, grad)),
    }
    seconds = race(programs, rounds, clock)
    name = f"M{num_rows} I{ins} O{outs} E{groups}"
    flops = 2 * num_rows * ins * outs
    return [row("matmul", name, key, seconds[key], flops) for key in programs]


def row(op, case, name, seconds, forward_flops):
    """One line of the table; a backward pass counts 2.5 or 2 forward ones."""
    both = 3.5 if op == "attention" else 3
    flops = forward_flops * (both if "grad" in name else 1)
    return {
        "op": op,
        "case": case,
        "name": name,
        "milliseconds": seconds * 1e3,
        "gflops_per_second": flops / seconds / 1e9,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cpu-time", action="store_true", help="processor time")
    parser.add_argument("--out", help="name of a file to write in benchmarks/results")
    args = parser.parse_args()
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{'op':<10}{'case':<28}{'name':<14}{'ms':>9}{'GFLOP/s':>10}")
    rows = []
    for bench, cases in ((bench_attention, ATTENTION), (bench_matmul, MATMUL)):
        for case in cases:
            for line in bench(case, args.rounds, clock):
                rows.append(line)
                print(
                    f"{line['op']:<10}{line['case']:<28}{line['name']:<14}"
                    f"{line['milliseconds']:>9.2f}{line['gflops_per_second']:>10.1f}",
                    flush=True,
                )
    if args.out:
        device = jax.devices()[0].device_kind
        record = {
            "device": device,
            "processor": platform.processor() or platform.machine(),
            "jax": jax.__version__,
            "clock": "processor" if args.cpu_time else "wall",
            "rows": rows,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / args.out).write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
