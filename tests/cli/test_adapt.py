"""`uoe adapt`: trained, saved, loaded again, merged; mistakes in one line."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

from uoe_jax.adapt import adapted_params
from uoe_jax.adapt.files import load_adapters
from uoe_jax.adapt.merge import merge
from uoe_jax.cli import main
from uoe_jax.evaluate import load_run


@pytest.fixture(scope="module")
def other_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("other") / "words.txt"
    path.write_text("the river carries every letter home. " * 800)
    return path


@pytest.fixture(scope="module")
def adapted(union_run, other_text, tmp_path_factory):
    """An adapter of the union, with its merged run."""
    out = tmp_path_factory.mktemp("adapters") / "lora"
    args = ["adapt", str(union_run), "--method", "lora", "--rank", "2", "--steps", "6",
            "--data", str(other_text), "--learning-rate", "0.03", "--merge",
            "--out", str(out), "--quiet"]  # fmt: skip
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
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-7)
        changed += bool(np.any(np.asarray(got) != np.asarray(old)))
    assert changed == len(adapters.plans)
    assert set(merge(params, adapters).originals) == {p.name for p in adapters.plans}


def test_a_saved_adapter_merges_untrained(adapted, union_run, tmp_path, capsys):
    out = tmp_path / "again"
    args = ["adapt", str(union_run), "--load", str(adapted), "--steps", "0", "--merge",
            "--out", str(out), "--json"]  # fmt: skip
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
        (["--data", "nowhere.txt"], "nowhere.txt"),
        (["--rank-pattern", "*.wq"], "PATTERN=RANK"),
        (["--load", "nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_one_line(options, words, union_run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["adapt", str(union_run), "--out", str(out), *options]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert not out.exists()


def test_an_adapter_is_never_overwritten(adapted, union_run, capsys):
    assert main(["adapt", str(union_run), "--out", str(adapted)]) == 2
    assert "holds an adapter already" in capsys.readouterr().err
