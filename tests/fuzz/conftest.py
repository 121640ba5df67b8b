"""What is fuzzed is what users run: without the tests' checks of annotations.

A workshop holds one small file of every kind that a verb takes.
"""

import json
import os
import shutil
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from uoe_jax.adapt import AdapterConfig, init_adapters
from uoe_jax.adapt.files import save_adapters
from uoe_jax.cli import main
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.hardware.roofline import UNCALIBRATED
from uoe_jax.plan.layouts import make_plan, write_layout
from uoe_jax.presets import get_preset
from uoe_jax.runs.load import load_run
from uoe_jax.validation import read_config

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf"

# In a process of their own: see tests/test_fuzz.py.
collect_ignore_glob = [] if "UOE_FUZZ" in os.environ else ["test_*.py"]

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(400))
SHAPE = ["--model.d-model", "16", "--model.d-ff", "32", "--model.num-layers", "1",
         "--model.head-dim", "4", "--model.max-seq-len", "32"]  # fmt: skip
BUDGET = ["--train.steps", "4", "--train.log-every", "1", "--train.eval-every", "2",
          "--train.eval-batches", "2", "--train.save-every", "4"]  # fmt: skip


@pytest.fixture(autouse=True, scope="session")
def unchecked_annotations():
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory, unchecked_annotations):
    """A folder with text, a table, a trained run, an adapter, factors and a layout."""
    folder = tmp_path_factory.mktemp("workshop")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        (folder / "text.txt").write_text(TEXT)
        lines = [json.dumps({"text": f"a line, number {i}"}) for i in range(60)]
        (folder / "lines.jsonl").write_text("\n".join(lines) + "\n")
        command = ["train", "tiny-union", "--run-dir", "runs/union", "--quiet",
                   "--data.path", "text.txt", "--data.batch-size", "8"]  # fmt: skip
        assert main([*command, *SHAPE, *BUDGET, "--no-report"]) == 0
        make_tables(folder)
        assert main(["complete", "table.csv", "--rank", "1", "--iters", "2",
                     "--out", "completed", "--quiet"]) == 0  # fmt: skip
        make_adapter(folder / "runs" / "union", folder / "adapter")
        plan = make_plan(
            get_preset("tiny"), parse_topology("cpu:2"), UNCALIBRATED, None
        )
        write_layout(folder / "layout.json", plan.config, plan.fitting[0].sizes)
        shutil.copytree(GOLDENS / "llama", folder / "hf")
        (folder / "empty").mkdir()
        shutil.copytree(folder / "runs" / "union", folder / "runs" / "no-checkpoints")
        shutil.rmtree(folder / "runs" / "no-checkpoints" / "checkpoints")
    return folder


def make_tables(folder):
    rng = np.random.default_rng(0)
    rows, cols = rng.integers(0, 12, (2, 90))
    values = np.round(rng.normal(3, 1, 90), 2)
    lines = [f"{r},{c},{v}" for r, c, v in zip(rows, cols, values, strict=True)]
    (folder / "table.csv").write_text("user,item,rating\n" + "\n".join(lines) + "\n")
    np.savez_compressed(folder / "table.npz", rows=rows, cols=cols, values=values)
    tokens = rng.integers(0, 200, 5000).astype(np.uint8)
    np.savez(folder / "tokens.npz", tokens=tokens)
    kind = rng.integers(0, 3, 60)
    points = 5 * np.eye(3)[kind] + rng.normal(size=(60, 3))
    np.savez(folder / "points.npz", points=points, labels=kind)


def make_adapter(run, folder):
    config = AdapterConfig(method="lora", rank=2, targets=("*.mlp.w_*",))
    params = nnx.split(load_run(run).model, nnx.Param, ...)[1]
    adapters = init_adapters(params, config, jax.random.key(0))
    save_adapters(folder, adapters, config, base=read_config(run).name)
