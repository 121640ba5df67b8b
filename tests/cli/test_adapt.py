"""`uoe adapt`: trained, saved, loaded again, merged; mistakes in one line."""

import json
import math

import jax
import numpy as np
import pytest
from compare import assert_close
from flax import nnx

from uoe_jax.adapt import AdapterConfig, adapted_params
from uoe_jax.adapt.files import load_adapters
from uoe_jax.adapt.merge import merge
from uoe_jax.adapt.plan import make_plans, warn_of
from uoe_jax.adapt.run import write_run
from uoe_jax.adapt.session import StepLog
from uoe_jax.cli import main
from uoe_jax.cli.notes import plain_warnings
from uoe_jax.config import ExperimentConfig, OptimConfig, TrainConfig
from uoe_jax.errors import NonFiniteError
from uoe_jax.evaluate import load_run
from uoe_jax.model import make_model


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "words.txt"
    path.write_text("the river carries every letter home. " * 800)
    return path


@pytest.fixture(scope="module")
def union_run(tiny_config, tmp_path_factory):
    """A union as it starts: what it has learned plays no part here."""
    config, folder = tiny_config(), tmp_path_factory.mktemp("runs") / "fresh"
    model = make_model(config.model, jax.random.key(0))
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    write_run(folder, config, params, buffers, 0)
    return folder


@pytest.fixture(scope="module")
def adapted(union_run, other_text, tmp_path_factory):
    """An adapter of the union, with its merged run; nine rows fit one device."""
    out = tmp_path_factory.mktemp("adapters") / "lora"
    args = ["adapt", str(union_run), "--method", "lora", "--rank", "2", "--steps", "6",
            "--data", str(other_text), "--learning-rate", "0.03", "--merge",
            "--batch-size", "9", "--out", str(out), "--quiet"]  # fmt: skip
    assert main(args) == 0
    return out


def test_an_adapter_is_trained_reported_and_merged(adapted, union_run, capsys):
    report = json.loads((adapted / "adapt.json").read_text())
    assert report["after"]["loss"] < report["before"]["loss"]
    assert report["params"]["adapter"] < report["params"]["base"]
    memory = report["memory_bytes"]
    assert 0 <= memory["optimizer"] - 2 * memory["adapter"] <= 16  # and a counter
    assert report["tokens_per_second"] > 0 and len(report["losses"]) == 6
    assert (adapted / "adapt.png").read_bytes().startswith(b"\x89PNG")
    base = load_run(union_run)
    params = nnx.split(base.model, nnx.Param, ...)[1]
    adapters, config = load_adapters(adapted, params)
    assert config.method == "lora" and config.rank == 2
    merged = nnx.split(load_run(adapted / "merged").model, nnx.Param, ...)[1]
    want = jax.jit(adapted_params)(params, adapters)
    changed = 0
    for got, wanted, old in zip(
        *map(jax.tree.leaves, (merged, want, params)), strict=True
    ):
        assert_close(got, wanted, 1e-6)
        changed += bool(np.any(np.asarray(got) != np.asarray(old)))
    assert changed == len(adapters.plans)
    assert set(merge(params, adapters).originals) == {p.name for p in adapters.plans}


def test_a_saved_adapter_merges_untrained(adapted, union_run, tmp_path, capsys):
    out = tmp_path / "again"
    args = ["adapt", str(union_run), "--load", str(adapted), "--steps", "0", "--merge",
            "--batch-size", "9", "--out", str(out), "--json"]  # fmt: skip
    assert main(args) == 0
    report = json.loads(capsys.readouterr().out)
    assert "after" not in report
    first, second = (
        jax.tree.leaves(nnx.split(load_run(f / "merged").model, nnx.Param, ...)[1])
        for f in (adapted, out)
    )
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "0"], "at least 1"),
        (["--targets", "*.wz"], "no weight matches"),
        (["--init", "gaussian"], "tucker takes"),
        (["--steps", "0"], "--load"),
        (["--data", "nowhere.txt", "--rank", "2"], "nowhere.txt"),
        (["--rank-pattern", "*.wq"], "PATTERN=RANK"),
        (["--load", "nowhere"], "nowhere"),
        (["--load", "nowhere", "--dora"], "--dora is True with --load"),
        (["--method", "loha"], "choose from 'tucker', 'lora'"),
        (["--alpha", "0"], "alpha is 0"),
        (["--learning-rate", "-1"], "learning_rate is -1"),
        (["--batch-size", "0"], "batch_size is 0"),
    ],
)
def test_mistakes_are_one_line(options, words, union_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["adapt", str(union_run), "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not out.exists()


def test_nothing_is_ever_overwritten(adapted, union_run, tmp_path, capsys):
    (tmp_path / "file").touch()
    (tmp_path / "half" / "merged").mkdir(parents=True)
    for out, words in (
        (adapted, "holds an adapter already"),
        (tmp_path / "half", "holds a merged run already"),
        (tmp_path / "file", "is a file"),
    ):
        assert main(["adapt", str(union_run), "--out", str(out)]) == 2
        assert words in capsys.readouterr().err


def test_a_loaded_adapter_needs_a_folder_for_what_becomes_of_it(union_run, capsys):
    assert main(["adapt", str(union_run), "--load", "some", "--merge"]) == 2
    assert "--out" in capsys.readouterr().err


def test_warnings_are_one_line_without_a_place_in_code(capsys):
    with plain_warnings():
        warn_of(make_plans({"w": (6, 4)}, AdapterConfig(rank=64, targets=("w",))))
    said = capsys.readouterr().err.splitlines()
    assert [line[:24] for line in said] == [
        "uoe: rank 64 is more tha",
        "uoe: adapters have 56 pa",
    ]


def test_training_that_diverges_stops_with_the_rate_to_lower(tmp_path):
    train = TrainConfig(max_bad_steps=2)
    log = StepLog(ExperimentConfig(train=train, optim=OptimConfig(learning_rate=0.5)))
    step = {"loss": 1.0, "tokens": 8, "bad_steps": 0}
    for metrics in (step, step | {"loss": math.nan, "bad_steps": 1}, step):
        log.read(metrics)
    assert (log.tokens, log.skipped, len(log.losses)) == (24, 1, 3)
    with pytest.raises(NonFiniteError, match="2 steps in a row up to step 4.*0.5"):
        log.read(step | {"bad_steps": 2})
