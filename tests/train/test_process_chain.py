"""One run taken over by 4, then 1, then 2 processes: 8 devices in all, the same run.

What was measured is in benchmarks/results/process_chain.json.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from tests.train.test_multihost import start
from uoe_jax.config import MeshConfig, UnionConfig
from uoe_jax.files import read_json, read_json_lines
from uoe_jax.presets import get_preset
from uoe_jax.runs.checkpoint import Checkpoints

STAGES, STEPS, DEVICES = (4, 1, 2), 4, 8
# Restores on this stage's mesh, compares with the file bit by bit, and trains on.
WORKER = f"""
import os, sys
from pathlib import Path
import jax
from flax import nnx
from jax.experimental import multihost_utils
from uoe_jax.config import from_json
from uoe_jax.files import format_json, read_json
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.state import init_state, layout_of
from uoe_jax.train import train
from uoe_jax.train.peers import is_primary, join
from uoe_jax.tree import fill_leaves, named_leaves

count = int(os.environ["JAX_NUM_PROCESSES"])
jax.config.update("jax_num_cpu_devices", {DEVICES} // count)
nnx.set_graph_mode(False)
nnx.set_graph_updates(False)
if count > 1:
    join()
config, run_dir = from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
store = Checkpoints(run_dir / "checkpoints")
if store.steps():
    mesh = mesh_for(config)
    optimizer = make_optimizer(config.optim, config.train.steps)
    _, state = init_state(config, optimizer, mesh)
    step, arrays, _ = store.restore(named_leaves(state))
    placed = named_leaves(layout_of(config, mesh).place(fill_leaves(state, arrays)))
    whole = {{n: multihost_utils.process_allgather(a, tiled=True)
             for n, a in placed.items()}}
    same = [n for n, a in whole.items() if a.tobytes() == arrays[n].tobytes()]
    if is_primary():
        told = format_json({{"from": step, "all": len(arrays), "same": len(same)}})
        (run_dir / f"restored-{{config.train.steps}}.json").write_text(told)
train(config, run_dir, quiet=True)
"""


def experiment(steps):
    """A union of one layer; the schedule must not know where a stage ends."""
    config = get_preset("tiny-union")
    sizes = {"num_layers": 1, "d_model": 32, "d_ff": 64, "head_dim": 8}
    sizes |= {"num_heads": 4, "num_kv_heads": 4}
    union = UnionConfig(num_experts=4, top_k=2)
    data = {"batch_size": 8, "seq_len": 32, "max_bytes": 200_000}
    train = {"steps": steps, "save_every": STEPS, "eval_every": 1000}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, union=union, **sizes),
        data=dataclasses.replace(config.data, **data),
        train=dataclasses.replace(config.train, **train),
        optim=dataclasses.replace(config.optim, schedule="constant"),
        mesh=MeshConfig(data=1, fsdp=4, tensor=2),
    )


def run_stage(folder, run_dir, steps, count):
    """Run the processes of a stage to their end."""
    workers = start(experiment(steps), folder, run_dir, count, WORKER)
    codes = [worker.wait(timeout=900) for worker in workers]
    said = [(folder / f"worker-{i}.log").read_text()[-2000:] for i in range(count)]
    assert codes == [0] * count, said


def final_arrays(run_dir):
    """Return the arrays of the newest checkpoint by name, in float64."""
    store = Checkpoints(run_dir / "checkpoints")
    step = store.steps()[-1]
    about = read_json(store.folder / str(step) / "integrity.json")["arrays"]
    wanted = {name: np.empty(a["shape"], a["dtype"]) for name, a in about.items()}
    found = store.restore(wanted, step=step)[1]
    return {name: np.asarray(array, np.float64) for name, array in found.items()}


# Held in short by the two processes of test_multihost.
@pytest.mark.nightly
def test_a_run_passed_from_4_to_1_to_2_processes_is_that_of_one(tmp_path):
    chain, alone = tmp_path / "chain", tmp_path / "alone"
    for number, count in enumerate(STAGES, 1):
        run_stage(tmp_path, chain, number * STEPS, count)
        if number > 1:
            told = read_json(chain / f"restored-{number * STEPS}.json")
            assert told["from"] == (number - 1) * STEPS
            assert told["same"] == told["all"] > 30
    run_stage(tmp_path, alone, len(STAGES) * STEPS, 1)
    ours, theirs = (
        [line for line in read_json_lines(run / "metrics.jsonl")[0]
         if line["kind"] == "train"]
        for run in (chain, alone)
    )  # fmt: skip
    assert [line["step"] for line in ours] == list(range(1, len(STAGES) * STEPS + 1))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["tokens"] == other["tokens"]
        assert abs(mine["loss"] - other["loss"]) <= 1e-6
    arrays = final_arrays(chain)
    for name, other in final_arrays(alone).items():
        assert np.abs(arrays[name] - other).max() <= 1e-6
