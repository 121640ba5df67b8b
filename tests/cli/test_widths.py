"""A run whose layers are of unequal width goes through the commands."""

import dataclasses
import json

import numpy as np
import pytest

from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.cli import main
from uoe_jax.config import LayerWidths
from uoe_jax.model import flat_buffers, flat_params, make_model
from uoe_jax.runs.load import load_run
from uoe_jax.runs.write import Origin, write_run
from uoe_jax.train.loop import train

WIDTHS = LayerWidths(
    d_ff=(32, 20), key_dim=(2, 4), value_dim=(4, 3), up_rank=(5, 0), down_rank=(0, 6)
)
PAIRS = "trunk.blocks.0.attention.rotary_pairs"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a narrow run that has trained six steps, as three and three."""
    folder = tmp_path_factory.mktemp("widths")
    config = make_tiny(cache_dir=folder / "cache", steps=3, save_every=3)
    model = dataclasses.replace(config.model, widths=WIDTHS)
    config = dataclasses.replace(config, model=model)
    start = make_model(config)
    pairs = {PAIRS: np.array([[[1], [0], [1], [1]]])}
    origin = Origin(made_by="test", source="random", data=None)
    write_run(folder / "run", config, flat_params(start), origin, buffers=pairs)
    for steps in (3, 6):
        train(with_train(config, steps=steps), folder / "run", quiet=True)
    return folder


def run(capsys, *args):
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def test_it_trained_and_kept_its_pairs(place):
    lines = (place / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    losses = [line["loss"] for line in losses if line.get("kind") == "train"]
    assert losses and all(np.isfinite(losses))
    found = load_run(place / "run")
    assert found.step == 6
    pairs = flat_buffers(found.model)[PAIRS]
    np.testing.assert_array_equal(pairs, [[[1], [0], [1], [1]]])


def test_commands_open_it(place, capsys):
    found = json.loads(run(capsys, "eval", place / "run", "--json"))
    assert np.isfinite(found["loss"])
    args = ("--prompt", "def ", "--greedy", "--max-new-tokens", 4)
    assert run(capsys, "generate", place / "run", *args).startswith("def ")
    assert "nothing moved" in run(capsys, "leakcheck", place / "run")
    assert "parameters" in run(capsys, "cost", place / "run")
    said = run(capsys, "plan", place / "run", "--topology", "h100:2")
    assert "fits" in said or "tokens" in said


def test_an_adapter_trains_on_narrow_and_low_rank_products(place, capsys):
    args = ("--out", place / "adapted", "--steps", 2, "--rank", 2)
    run(capsys, "adapt", place / "run", *args, "--merge")
    merged = load_run(place / "adapted" / "merged")
    assert merged.config.model.widths == WIDTHS
    np.testing.assert_array_equal(
        flat_buffers(merged.model)[PAIRS], [[[1], [0], [1], [1]]]
    )


def test_it_does_not_decompose_in_one_line(place, capsys):
    args = ["decompose", str(place / "run"), "--out", str(place / "union")]
    assert main([*args, "--experts", "2", "--parts", "mlp"]) == 2
    said = capsys.readouterr().err
    assert "narrower than itself (model.widths)" in said and said.count("\n") == 1
    assert not (place / "union").exists()
