"""A run of a mixture of three sources, stopped and gone on with, ends bit for bit."""

import dataclasses
import json
import shutil

import numpy as np

from tests.train.test_loop import assert_same_bits, lines_of
from tests.train.tiny_runs import make_tiny
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.train import train


def test_a_mixture_of_three_sources_resumes_bit_for_bit(tmp_path, capsys):
    rng, mix = np.random.default_rng(0), []
    for name, letters, weight in (("a", "abc", 5), ("b", "ijk", 3), ("c", "xyz", 2)):
        words = ("".join(rng.choice(list(letters), 9)) for _ in range(300))
        (tmp_path / f"{name}.txt").write_text("\n".join(words))
        mix.append(f"{tmp_path / name}.txt={weight}")
    steps = {"steps": 6, "save_every": 2, "log_every": 1, "eval_every": 3}
    steps |= {"keep_checkpoints": 3}
    config = make_tiny(cache_dir=tmp_path / "data", **steps)
    data = dataclasses.replace(
        config.data, source="auto", mix=tuple(mix), tokenizer="byte", max_bytes=None
    )
    config = dataclasses.replace(config, data=data)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(config, whole, quiet=True)
    assert Checkpoints(whole / "checkpoints").steps() == [2, 4, 6]
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "checkpoints" / "6")  # as of one killed after step 4
    lines = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("step", 0) <= 4]
    assert 0 < len(kept) < len(lines)
    (killed / "metrics.jsonl").write_text("".join(kept))
    train(config, killed)
    assert "resuming from step 4" in capsys.readouterr().out
    losses = [line["loss"] for line in lines_of(killed, "train")]
    assert len(losses) == 6
    assert losses == [line["loss"] for line in lines_of(whole, "train")]
    assert_same_bits(whole, killed)
