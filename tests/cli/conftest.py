"""Tiny runs for the verbs that read them."""

import dataclasses

import pytest

from uoe_jax.cli import main
from uoe_jax.config import DataConfig, TrainConfig
from uoe_jax.presets import get_preset

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(400))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="session")
def tiny_config(text_file):
    """A preset shrunk to two narrow layers, a few steps, local text."""

    def make(preset="tiny-union", **model):
        config = get_preset(preset)
        small = dict(d_model=16, d_ff=32, num_layers=1, head_dim=4, max_seq_len=32)
        return dataclasses.replace(
            config,
            model=dataclasses.replace(config.model, **small | model),
            data=DataConfig(
                path=str(text_file), batch_size=8, cache_dir=str(text_file.parent)
            ),
            optim=dataclasses.replace(config.optim, warmup_steps=2),
            train=TrainConfig(
                steps=4, log_every=1, eval_every=2, eval_batches=2, save_every=4
            ),
        )

    return make


@pytest.fixture(scope="session")
def union_run(tmp_path_factory, text_file):
    """A union trained for four steps through the command line."""
    run = tmp_path_factory.mktemp("runs") / "union"
    args = ["train", "tiny-union", "--run-dir", str(run), "--quiet",
            "--data.path", str(text_file), "--data.cache-dir", str(text_file.parent),
            "--data.batch-size", "8", "--model.d-model", "16", "--model.d-ff", "32",
            "--model.num-layers", "1", "--model.head-dim", "4",
            "--model.max-seq-len", "32", "--train.steps", "4",
            "--train.log-every", "1", "--train.eval-every", "2",
            "--train.eval-batches", "2", "--train.save-every", "4"]  # fmt: skip
    assert main(args) == 0
    return run
