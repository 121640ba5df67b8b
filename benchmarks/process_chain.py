"""One run taken over by 4, then 1, then 2 processes on CPU, 8 devices in all.

    python benchmarks/process_chain.py [--folder DIR] [--out FILE]

Each stage restores what the one before saved, compares its parameters with the file
bit by bit, and trains 4 more steps. At the end losses, tokens and parameters are
compared with those of a run of one process that never stopped.
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
import time
from pathlib import Path
from typing import Any

import numpy as np

STAGES = (4, 1, 2)
STEPS = 4
DEVICES = 8
TOLERANCE = 1e-6
# Nearly all of the time is compilation; code that runs once needn't be optimised.
FLAGS = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)


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
    from flax import nnx

    from uoe_jax.train import train
    from uoe_jax.train.peers import is_primary, join

    jax.config.update("jax_num_cpu_devices", DEVICES // count)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    if count > 1:
        join()
    restored = compare_restored(run_dir, steps)
    if restored and is_primary():
        (run_dir / f"restored-{steps}.json").write_text(json.dumps(restored))
    train(experiment(steps), run_dir, quiet=True)


def compare_restored(run_dir: Path, steps: int) -> dict[str, int] | None:
    """Restore on this stage's mesh and count the arrays that equal the file's bits."""
    from jax.experimental import multihost_utils

    from uoe_jax.optim import make_optimizer
    from uoe_jax.partition.mesh import mesh_for
    from uoe_jax.runs.checkpoint import Checkpoints
    from uoe_jax.runs.state import init_state, layout_of
    from uoe_jax.tree import fill_leaves, named_leaves

    store = Checkpoints(run_dir / "checkpoints")
    if not store.steps():
        return None
    config = experiment(steps)
    mesh = mesh_for(config)
    _, state = init_state(config, make_optimizer(config.optim, steps), mesh)
    step, arrays, _ = store.restore(named_leaves(state))
    placed = layout_of(config, mesh).place(fill_leaves(state, arrays))
    for name, leaf in named_leaves(placed).items():
        whole = multihost_utils.process_allgather(leaf, tiled=True)
        if np.asarray(whole).tobytes() != arrays[name].tobytes():
            raise SystemExit(f"{name} of step {step} differs from the file")
    return {"from_step": step, "arrays_equal_bit_by_bit": len(arrays)}


def run_stage(run_dir: Path, steps: int, count: int) -> dict[str, Any]:
    """Run the processes of a stage to their end."""
    start = time.perf_counter()
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = found.getsockname()[1]
    workers = []
    for index in range(count):
        environment = {"XLA_FLAGS": FLAGS} | os.environ
        environment |= {
            "JAX_PLATFORMS": "cpu",
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": str(count),
            "JAX_PROCESS_ID": str(index),
        }
        command = [sys.executable, __file__, "--folder", str(run_dir)]
        command += ["--work", str(steps), str(count)]
        workers.append(subprocess.Popen(command, env=environment))
    codes = [worker.wait() for worker in workers]
    seconds = round(time.perf_counter() - start, 1)
    print(f"{count} processes to step {steps}: {codes}, {seconds} s", flush=True)
    if any(codes):
        raise SystemExit(1)
    stage = {"processes": count, "to_step": steps, "seconds": seconds}
    restored = run_dir / f"restored-{steps}.json"
    return stage | (json.loads(restored.read_text()) if restored.exists() else {})


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the log's training steps, in the order in which they were written."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]


def final_arrays(run_dir: Path) -> dict[str, np.ndarray]:
    """Return the arrays of the newest checkpoint by name."""
    from uoe_jax.runs.checkpoint import Checkpoints

    store = Checkpoints(run_dir / "checkpoints")
    step = store.steps()[-1]
    manifest = json.loads((store.folder / str(step) / "integrity.json").read_text())
    shapes = {
        name: np.empty(about["shape"], about["dtype"])
        for name, about in manifest["arrays"].items()
    }
    return store.restore(shapes, step=step)[1]


def compare_runs(chain: Path, alone: Path) -> dict[str, Any]:
    """Return how far the chain is from the run that never stopped."""
    ours, theirs = lines_of(chain), lines_of(alone)
    every = list(range(1, len(STAGES) * STEPS + 1))
    pairs = list(zip(ours, theirs, strict=False))
    arrays, others = final_arrays(chain), final_arrays(alone)
    differences = [
        float(np.abs(arrays[n].astype(float) - others[n].astype(float)).max())
        for n in others
    ]
    return {
        "every_step_once": [line["step"] for line in ours] == every,
        "tokens_equal": all(a["tokens"] == b["tokens"] for a, b in pairs),
        "loss_difference": max(abs(a["loss"] - b["loss"]) for a, b in pairs),
        "parameter_and_moment_difference": max(differences),
    }


def passes(found: dict[str, Any]) -> bool:
    """Whether nothing was skipped or repeated and nothing differs by too much."""
    worst = max(found["loss_difference"], found["parameter_and_moment_difference"])
    return found["every_step_once"] and found["tokens_equal"] and worst <= TOLERANCE


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", nargs=2, type=int, metavar=("STEPS", "COUNT"))
    args = parser.parse_args(argv)
    if args.work:
        work(args.folder, *args.work)
        return 0
    folder = args.folder or Path(tempfile.mkdtemp())
    stages = [
        run_stage(folder / "chain", number * STEPS, count)
        for number, count in enumerate(STAGES, 1)
    ]
    run_stage(folder / "alone", len(STAGES) * STEPS, 1)
    found = compare_runs(folder / "chain", folder / "alone")
    from uoe_jax.bench.record import commit

    record = {
        "command": "python benchmarks/process_chain.py " + " ".join(argv),
        "commit": commit(),
        "device": f"{DEVICES} simulated cpu, shared among the processes",
        "tolerance": TOLERANCE,
        "stages": stages,
        "against_one_process": found,
    }
    print(json.dumps(record, indent=1))
    if args.out:
        args.out.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if passes(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
