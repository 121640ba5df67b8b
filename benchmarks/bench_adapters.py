"""Adapters against full fine-tuning: step time, memory, forward overhead, switching.

    python benchmarks/bench_adapters.py --out FILE [--preset small] [--batch 32]

Random tokens, resident on the device; medians over rounds of back-to-back calls. Memory
is the compiler's: arguments (parameters, optimizer state, batch) and temporaries.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from uoe_jax.adapt import (
    AdapterConfig,
    Adapters,
    adapted_params,
    apply_adapted,
    count_adapter_params,
    init_adapters,
    select_adapter,
)
from uoe_jax.adapt.subject import adapter_subject, freeze_params
from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.timing import round_seconds, summarise
from uoe_jax.bench.train import random_batch
from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.model import make_model
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.presets import get_preset
from uoe_jax.runs.state import init_state
from uoe_jax.train.step import make_step, put_batch

STEPS = (
    ("lora", 8, "auto"),
    ("lora", 8, "factored"),
    ("lora", 64, "auto"),
    ("tucker", 8, "auto"),
)
FORWARDS = (
    ("lora", 8, "factored"),
    ("lora", 8, "fused"),
    ("lora", 8, "delta"),
    ("lora", 64, "factored"),
    ("tucker", 8, "factored"),
    ("tucker", 8, "fused"),
)


def rounds_of(call: Callable[[], Any], rounds: int, calls: int) -> list[float]:
    """Return a call's seconds in each round, after two calls to warm up."""
    round_seconds(call, 1, calls=2)
    return round_seconds(call, rounds, calls)


def memory(compiled: Any) -> dict[str, float]:
    sizes = compiled.memory_analysis()
    return {
        "arguments_gb": sizes.argument_size_in_bytes / 1e9,
        "temporary_gb": sizes.temp_size_in_bytes / 1e9,
    }


def randomised(adapters: Adapters, key: jax.Array) -> Adapters:
    """Factors none of which is zero, so that every path has something to add."""
    leaves, tree = jax.tree.flatten(adapters.weights)
    keys = jax.random.split(key, len(leaves))
    leaves = [
        a + 0.02 * jax.random.normal(k, a.shape)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return adapters.with_weights(jax.tree.unflatten(tree, leaves))


def split_model(config: ModelConfig) -> tuple[Any, Any, Any]:
    """A fresh model's static half, parameters and buffers; one compilation."""
    make = lambda: nnx.split(make_model(config, jax.random.key(0)), nnx.Param, ...)
    return jax.eval_shape(make)[0], *jax.jit(lambda: make()[1:])()


class Bench:
    """One preset, its parameters, and a file of results."""

    def __init__(self, args: argparse.Namespace):
        config = get_preset("tiny" if args.tiny else args.preset)
        model = dataclasses.replace(config.model, scan_layers=True)
        sizes = {"batch_size": args.batch, "seq_len": args.seq_len}
        data = dataclasses.replace(config.data, **sizes)
        self.config = dataclasses.replace(config, model=model, data=data)
        self.args, self.rows = args, []
        self.graphdef, self.params, self.buffers = split_model(self.config.model)
        self.frozen = freeze_params(self.params, self.config)

    def put(self, **row: Any) -> None:
        self.rows.append(row)
        print(" ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                       for k, v in row.items()), flush=True)  # fmt: skip
        record = {
            **header(stated=self.args.commit),
            "preset": self.config.name,
            "batch": self.config.data.batch_size,
            "seq_len": self.config.seq_len,
            "scan_layers": self.config.model.scan_layers,
            "base_params": sum(a.size for a in jax.tree.leaves(self.params)),
            "results": self.rows,
        }
        write_record(self.args.out, record)

    def maker(self, method: str, rank: int) -> Callable[[jax.Array], Adapters]:
        """Return seed -> adapter, factors random and none of them zero."""
        config = AdapterConfig(method=method, rank=rank, alpha=2.0 * rank)

        def make(seed: jax.Array) -> Adapters:
            key = jax.random.key(seed)
            return randomised(init_adapters(self.params, config, key), key)

        return make

    def adapters(self, method: str, rank: int) -> Adapters:
        return jax.jit(self.maker(method, rank))(jnp.uint32(0))

    def time_call(self, fn: Any, *args: Any, calls: int) -> dict[str, float]:
        start = time.perf_counter()
        compiled = jax.jit(fn).lower(*args).compile()
        seconds = time.perf_counter() - start
        times = rounds_of(lambda: compiled(*args), self.args.rounds, calls)
        return {**summarise(times), **memory(compiled), "compile_s": seconds}

    def full_step(self) -> None:
        config, mesh = self.config, self.mesh()
        optimizer = make_optimizer(config.optim, config.train.steps)
        graphdef, state = init_state(config, optimizer, mesh)
        step = make_step(config, graphdef, optimizer, mesh)
        self.time_step(step, state, None, method="full")

    def adapter_step(self, method: str, rank: int, path: str) -> None:
        config, mesh = self.config, self.mesh()
        optimizer = make_optimizer(config.optim, config.train.steps)
        adapters = self.adapters(method, rank)
        base = (self.graphdef, self.params, self.buffers)
        subject = adapter_subject(adapters, base, config, optimizer, mesh, path=path)
        about = (mesh, subject.layout, subject.objective)
        step = make_step(config, self.graphdef, optimizer, *about)
        row = {"method": method, "rank": rank, "path": path}
        row["params"] = count_adapter_params(adapters)
        self.time_step(step, subject.state, subject.frozen, **row)

    def time_step(self, step: Any, state: Any, frozen: Any, **row: Any) -> None:
        """Put the time and memory of a training step."""
        batch = put_batch(random_batch(self.config), self.mesh(), 1)
        compiled = step.lower(state, batch, frozen).compile()

        def call() -> Any:
            nonlocal state
            state, metrics = compiled(state, batch, frozen)
            return metrics["loss"]

        times = rounds_of(call, self.args.rounds, self.args.calls)
        self.put(case="step", **row, **summarise(times), **memory(compiled))

    def mesh(self) -> Any:
        devices = jax.devices()[:1]
        return make_mesh(
            self.config.mesh, batch_size=self.config.data.batch_size, devices=devices
        )

    def hidden(self, params: Any, tokens: Any) -> Any:
        return nnx.merge(self.graphdef, params, self.buffers).hidden(tokens)[0]

    def forwards(self) -> None:
        """Forward passes of the trunk: the base, and every path on top of it."""
        rng = np.random.default_rng(0)
        for rows, length in ((8, self.config.seq_len), (1, 16)):
            tokens = rng.integers(0, self.config.model.vocab_size, (rows, length))
            tokens = jnp.asarray(tokens, jnp.int32)
            calls = self.args.calls * 4
            base = self.time_call(self.hidden, self.frozen, tokens, calls=calls)
            self.put(case="forward", tokens=tokens.size, path="base", **base)
            for method, rank, path in (*FORWARDS, ("lora", 8, "auto")):
                adapters = self.adapters(method, rank)
                run = lambda params, adapters, tokens, path=path: apply_adapted(
                    self.hidden, params, adapters, tokens, path=path
                )
                found = self.time_call(run, self.frozen, adapters, tokens, calls=calls)
                found["over_base"] = found["ms"] / base["ms"] - 1
                row = {"method": method, "rank": rank, "path": path, **found}
                self.put(case="forward", tokens=tokens.size, **row)

    def switching(self) -> None:
        """Eight adapters in turn through one compiled function."""
        make = jax.jit(jax.vmap(self.maker("lora", 8)))
        stacked = make(jnp.arange(8, dtype=jnp.uint32))
        plans = tuple(dataclasses.replace(p, bank=True) for p in stacked.plans)
        bank = dataclasses.replace(stacked, plans=plans)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, self.config.model.vocab_size, (1, self.config.seq_len))
        tokens = jnp.asarray(tokens, jnp.int32)

        @jax.jit
        def run(params: Any, bank: Adapters, index: Any, tokens: Any) -> Any:
            one = select_adapter(bank, index)
            return apply_adapted(self.hidden, params, one, tokens, path="factored")

        outs = [run(self.frozen, bank, i, tokens) for i in range(8)]
        merge = jax.jit(lambda p, b: adapted_params(p, select_adapter(b, 5)))
        wanted = jax.jit(self.hidden)(merge(self.params, bank), tokens)
        difference = jnp.max(jnp.abs(outs[5].astype(jnp.float32) - wanted))
        turn = [0]

        def call() -> Any:
            turn[0] = (turn[0] + 1) % 8
            return run(self.frozen, bank, turn[0], tokens)

        switching = rounds_of(call, self.args.rounds, 16)
        same = lambda: run(self.frozen, bank, 3, tokens)
        staying = rounds_of(same, self.args.rounds, 16)
        row = {"adapters": 8, "compilations": run._cache_size()}
        row["distinct"] = len({float(jnp.sum(o.astype(jnp.float32))) for o in outs})
        row |= {"difference_from_merged": float(difference), **summarise(switching)}
        self.put(case="switch", **row, staying_ms=statistics.median(staying) * 1e3)


def union(args: argparse.Namespace, bench: Bench) -> None:
    """A union's forward pass: routed rows only, against the fused weights."""
    config = get_preset("tiny-union" if args.tiny else "small-union")
    model = dataclasses.replace(config.model, scan_layers=True)
    config: ExperimentConfig = dataclasses.replace(config, model=model)
    graphdef, params, buffers = split_model(model)
    frozen = freeze_params(params, config)
    hidden = lambda p, t: nnx.merge(graphdef, p, buffers).hidden(t)[0]
    tokens = jnp.zeros((4, min(args.seq_len, model.max_seq_len)), jnp.int32)
    tokens = tokens + jnp.arange(tokens.shape[1]) % model.vocab_size
    found = bench.time_call(hidden, frozen, tokens, calls=args.calls)
    bench.put(case="union", path="base", **found)
    for shared in (False, True):
        options = AdapterConfig(method="lora", rank=8, alpha=16.0, share_experts=shared)
        make = lambda key, options=options: randomised(
            init_adapters(params, options, key), key
        )
        adapters = jax.jit(make)(jax.random.key(1))
        for path in ("auto", "fused"):
            run = lambda p, a, t, path=path: apply_adapted(hidden, p, a, t, path=path)
            found = bench.time_call(run, frozen, adapters, tokens, calls=args.calls)
            row = {"path": "routed" if path == "auto" else path}
            row |= {"share_experts": shared, "params": count_adapter_params(adapters)}
            bench.put(case="union", **row, **found)


def parse() -> argparse.Namespace:
    parser = arguments(__doc__)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=5)
    cases = ["switch", "forward", "step", "union"]
    parser.add_argument("--cases", nargs="*", choices=cases, default=cases)
    parser.add_argument("--tiny", action="store_true", help="try it on a CPU")
    return parser.parse_args()


def main() -> None:
    args = parse()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    bench = Bench(args)
    cases: list[tuple[str, Callable[[], None]]] = [("switch", bench.switching)]
    cases += [("forward", bench.forwards), ("step", bench.full_step)]
    for case in STEPS[:1] if args.tiny else STEPS:
        cases.append(("step", lambda case=case: bench.adapter_step(*case)))
    cases.append(("union", lambda: union(args, bench)))
    for name, run in cases:
        if name not in args.cases:
            continue
        try:
            run()
        except Exception as error:  # the other cases still count
            print(f"{name} failed: {type(error).__name__}: {error}"[:1500], flush=True)


if __name__ == "__main__":
    main()
