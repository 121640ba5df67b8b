"""One run taken over by 4, then 1, then 2 processes on CPU, 8 devices in all.

    python benchmarks/process_chain.py [--folder DIR]

Each stage restores what the one before saved, compares its parameters with the file
bit by bit, and trains 4 more steps; at the end losses and tokens are compared with a
run of one process that never stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

STAGES = (4, 1, 2)
STEPS = 4
DEVICES = 8


def experiment(steps: int):
    from uoe_jax.config import MeshConfig, UnionConfig
    from uoe_jax.presets import get_preset

    config = get_preset("tiny-union")
    model = dataclasses.replace(
        config.model,
        num_layers=1,
        d_model=32,
        d_ff=64,
        num_heads=4,
        num_kv_heads=4,
        head_dim=8,
        union=UnionConfig(num_experts=4, top_k=2),
    )
    data = dataclasses.replace(config.data, batch_size=8, seq_len=32, max_bytes=200_000)
    train = dataclasses.replace(
        config.train, steps=steps, save_every=STEPS, eval_every=1000
    )
    # Constant: the schedule must not know where a stage ends.
    optim = dataclasses.replace(config.optim, schedule="constant")
    mesh = MeshConfig(data=1, fsdp=4, tensor=2)
    return dataclasses.replace(
        config, model=model, data=data, train=train, optim=optim, mesh=mesh
    )


def work(run_dir: Path, steps: int, count: int) -> None:
    """Be one process of a stage."""
    import jax
    import numpy as np
    from flax import nnx
    from jax.experimental import multihost_utils

    from uoe_jax.checkpoint import Checkpoints, from_arrays, named_leaves
    from uoe_jax.optim import make_optimizer
    from uoe_jax.partition.mesh import mesh_for
    from uoe_jax.train import train
    from uoe_jax.train.peers import join
    from uoe_jax.train.state import init_state, layout_of

    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    jax.config.update("jax_disable_most_optimizations", True)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    if count > 1:
        join()
    config = experiment(steps)
    store = Checkpoints(run_dir / "checkpoints")
    if store.steps():
        mesh = mesh_for(config)
        optimizer = make_optimizer(config.optim, steps)
        _, state = init_state(config, optimizer, mesh)
        layout = layout_of(config, mesh)
        step, arrays, _ = store.restore(named_leaves(state))
        placed = layout.place(from_arrays(state, arrays))
        for name, leaf in named_leaves(placed).items():
            whole = multihost_utils.process_allgather(leaf, tiled=True)
            assert np.array_equal(np.asarray(whole), arrays[name]), name
        print(f"step {step}: {len(arrays)} arrays equal bit by bit", flush=True)
    train(config, run_dir, quiet=True)


def run_stage(run_dir: Path, steps: int, count: int) -> None:
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    workers = []
    for index in range(count):
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, __file__, "--folder", str(run_dir)]
        command += ["--work", str(steps), str(count)]
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    print(f"{count} processes to step {steps}: exit codes {codes}", flush=True)
    if any(codes):
        raise SystemExit(1)


def losses(run_dir: Path) -> dict[int, tuple[float, int]]:
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    found = [line for line in lines if line["kind"] == "train"]
    return {line["step"]: (line["loss"], line["tokens"]) for line in found}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--work", nargs=2, type=int, metavar=("STEPS", "COUNT"))
    args = parser.parse_args(argv)
    if args.work:
        work(args.folder, *args.work)
        return
    folder = args.folder or Path(tempfile.mkdtemp())
    for number, count in enumerate(STAGES, 1):
        run_stage(folder / "chain", number * STEPS, count)
    run_stage(folder / "alone", len(STAGES) * STEPS, 1)
    chain, alone = losses(folder / "chain"), losses(folder / "alone")
    assert sorted(chain) == sorted(alone) == list(range(1, len(STAGES) * STEPS + 1))
    worst = max(abs(chain[step][0] - alone[step][0]) for step in alone)
    same = all(chain[step][1] == alone[step][1] for step in alone)
    print(f"largest difference of the loss {worst:.1e}; tokens equal: {same}")


if __name__ == "__main__":
    main(sys.argv[1:])
