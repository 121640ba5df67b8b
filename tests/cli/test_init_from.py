"""`uoe train --init-from`: a new run starts with another run's parameters."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.model import attention
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.train import initial

SIZES = {"d-model": 16, "d-ff": 32, "num-layers": 1, "num-heads": 4,
         "num-kv-heads": 4, "head-dim": 4, "max-seq-len": 32,
         "vocab-size": 256, "union.num-experts": 4, "union.top-k": 2}  # fmt: skip


def saved(folder, step=0):
    store = Checkpoints(folder / "checkpoints")
    arrays = store.about(step)["arrays"]
    shapes = {k: np.empty(v["shape"]) for k, v in arrays.items()}
    return store.restore(shapes, step=step)[1]


def content(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def train(text_file, tmp_path_factory):
    """Run `uoe train tiny-union` in a folder; returns the exit status."""

    def train(run, *options, preset="tiny-union", steps=0, **sizes):
        given = {**SIZES, **{k.replace("_", "-"): v for k, v in sizes.items()}}
        args = [x for k, v in given.items() for x in (f"--model.{k}", str(v))]
        args += ["--data.path", str(text_file), "--data.cache-dir",
                 str(text_file.parent), "--data.batch-size", "8", "--no-report",
                 "--train.steps", str(steps), "--train.eval-batches", "1"]  # fmt: skip
        first = [preset] if preset else []
        return main(["train", *first, "--run-dir", str(run), *args, *options])

    return train


@pytest.fixture(scope="module")
def source(train, tmp_path_factory):
    """A run of another seed, whose parameters no fresh model has."""
    run = tmp_path_factory.mktemp("init") / "source"
    assert train(run, "--train.seed", "7", "--quiet") == 0
    return run


def same(first, second):
    return {
        name
        for name in first
        if name.startswith("params.")
        and name in second
        and first[name].shape == second[name].shape
        and first[name].tobytes() == second[name].tobytes()
    }


def test_a_new_run_has_the_parameters_and_the_source_is_as_it_was(
    train, source, tmp_path, capsys
):
    before = content(source)
    assert train(tmp_path, "--init-from", str(source)) == 0
    out = capsys.readouterr().out
    assert f"parameters from step 0 of {source}" in out and "fresh" not in out
    first, second = saved(source), saved(tmp_path)
    params = {name for name in first if name.startswith("params.")}
    assert same(first, second) == params
    assert content(source) == before
    record = json.loads((tmp_path / "init_from.json").read_text())
    assert record["source"] == str(source) and record["step"] == 0
    assert len(record["loaded"]) == len(params) and not record["fresh"]


@pytest.mark.parametrize(
    "sizes",
    [{"union.num-experts": 2, "union.top-k": 1}, {"d_model": 24}, {"vocab_size": 300},
     {"num_layers": 2}],
    ids=str,
)  # fmt: skip
def test_what_does_not_match_is_refused_with_both_shapes_or_left_fresh(
    train, source, tmp_path, capsys, sizes
):
    run = tmp_path / "run"
    assert train(run, "--init-from", str(source), **sizes) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert not run.exists()
    if "d_model" in sizes:  # every parameter has an axis of the model's width
        assert "none matches: try another run" in line
        both = ("--init-from", str(source), "--init-partial")
        assert train(run, *both, **sizes) == 2 and not run.exists()
        return
    assert "--init-partial loads the others" in line
    assert train(tmp_path / "fresh", "--quiet", **sizes) == 0
    capsys.readouterr()
    assert train(run, "--init-from", str(source), "--init-partial", **sizes) == 0
    out = capsys.readouterr().out
    first, second, fresh = saved(source), saved(run), saved(tmp_path / "fresh")
    fits = {n for n in first if n in second and first[n].shape == second[n].shape}
    fits = {n for n in fits if n.startswith("params.")}
    others = {n for n in second if n.startswith("params.")} - fits
    assert fits and others
    assert same(first, second) == fits
    for name in others:
        assert second[name].tobytes() == fresh[name].tobytes(), name
        shapes = [list(a[name].shape) for a in (first, second)]
        short = name.removeprefix("params.")
        assert f"{short} is {shapes[0]} there, {shapes[1]} here" in line
    assert f"{len(fits)} parameters from step 0" in out
    assert f"{len(others)} parameter{'s' * (len(others) > 1)} fresh (" in out
    record = json.loads((run / "init_from.json").read_text())
    assert {f"params.{n}" for n in record["loaded"]} == fits


def test_narrow_keys_are_not_those_of_another_head(train, tmp_path, capsys):
    """Four numbers of a head of eight rotate otherwise than a head of four."""
    dense = dict(preset="tiny", head_dim=8, **{"widths.key-dim": 4})
    plain = dict(dense, **{"widths.value-dim": 4})
    wide, run = tmp_path / "wide", tmp_path / "run"
    assert train(wide, "--train.seed", "7", "--quiet", **plain) == 0
    capsys.readouterr()
    for other in (
        dict(preset="tiny", head_dim=4),
        dict(plain, head_dim=16),
    ):
        assert train(run, "--init-from", str(wide), **other) == 2
        (line,) = capsys.readouterr().err.splitlines()
        there, here = 8, other["head_dim"]
        for name in ("wq", "wk"):
            told = f"{name} keeps pairs of a head of {there} there, of {here} here"
            assert told in line
        assert line.startswith("uoe: 2 parameters") and "--init-partial" in line
        assert not run.exists()
    options = ("--init-from", str(wide), "--init-partial", "--quiet")
    assert train(run, *options, preset="tiny", head_dim=4) == 0
    first, second = saved(wide), saved(run)
    names = {name for name in second if name.startswith("params.")}
    rest = {name for name in names if not name.endswith((".wq", ".wk"))}
    assert same(first, second) == rest and len(names) == len(rest) + 2
    assert train(tmp_path / "again", *options[:2], "--quiet", **plain) == 0
    assert same(first, saved(tmp_path / "again")) == names


def test_pairs_that_cannot_be_are_refused_where_a_run_is_read(
    train, tmp_path, monkeypatch, capsys
):
    narrow = dict(preset="tiny", head_dim=8, **{"widths.key-dim": 4})
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        pairs = lambda config: attention.RotaryPairs(jnp.full((4, 2), 9, "int32"))
        patch.setattr(attention, "_first_pairs", pairs)
        assert train(run, "--quiet", **narrow) == 0
    capsys.readouterr()
    said = "rotary_pairs has pairs 9 to 9; a head of the model's width has 0 to 3"
    new = ("--init-from", str(run))
    learn = ("--train.distill-from", str(run))
    assert train(run, "--quiet", steps=1, **narrow) == 2
    assert said in capsys.readouterr().err
    assert train(tmp_path / "new", *new, "--quiet", **narrow) == 2
    assert said in capsys.readouterr().err
    assert train(tmp_path / "new", *learn, "--quiet", preset="tiny") == 2
    assert said in capsys.readouterr().err
    for verb in (["eval", str(run)], ["export", str(run), str(tmp_path / "out")]):
        assert main(verb) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line and "write the run anew" in line


def test_pairs_come_with_the_queries_and_keys_that_they_are_of(
    train, tmp_path, monkeypatch
):
    narrow = dict(preset="tiny", **{"widths.key-dim": 4})
    source = tmp_path / "source"
    with monkeypatch.context() as patch:
        given = lambda config: attention.RotaryPairs(jnp.array([[2, 3]] * 4, "int32"))
        patch.setattr(attention, "_first_pairs", given)
        assert train(source, "--quiet", head_dim=8, **narrow) == 0
    # Of a head of six there is no pair 3: its queries and keys are fresh.
    for head_dim, options, pairs in ((8, (), [2, 3]), (6, ("--init-partial",), [0, 1])):
        run = tmp_path / str(head_dim)
        start = ("--init-from", str(source), *options, "--quiet")
        assert train(run, *start, head_dim=head_dim, **narrow) == 0
        (found,) = (a for n, a in saved(run).items() if n.endswith("rotary_pairs"))
        assert (found == pairs).all()


def test_a_routers_bias_comes_with_its_weights():
    bias, weight = "trunk.blocks.0.mlp.router.bias", "trunk.blocks.0.mlp.router.weight"
    assert initial._is_of(bias, [weight])
    assert not initial._is_of(bias, ["trunk.blocks.0.mlp.w_up", f"x.{weight}"])


def test_a_run_that_goes_on_keeps_its_start(train, source, tmp_path, capsys):
    options = ("--init-from", str(source))
    assert train(tmp_path / "run", *options, steps=2) == 0
    assert train(tmp_path / "run", *options, steps=3) == 0
    assert "resuming from step 2" in capsys.readouterr().out
    assert train(tmp_path / "run", steps=4) == 0
    assert train(tmp_path / "run", *options, "--init-partial", steps=5) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"was started from {source}, partial False" in line
    # Killed before its first save: the record says what it starts from.
    shutil.rmtree(tmp_path / "run/checkpoints")
    (tmp_path / "run/metrics.jsonl").unlink()
    assert train(tmp_path / "run", steps=0) == 0
    capsys.readouterr()
    assert len(same(saved(source), saved(tmp_path / "run"))) > 5


def test_a_run_that_began_otherwise_is_refused(train, source, tmp_path, capsys):
    assert train(tmp_path / "run", "--quiet") == 0
    assert train(tmp_path / "run", "--init-from", str(source)) == 2
    assert "was started with fresh parameters" in capsys.readouterr().err
    assert train(tmp_path / "new", "--init-partial") == 2
    assert "give --init-from RUN too" in capsys.readouterr().err
    assert train(tmp_path / "new", "--init-from", str(tmp_path / "none")) == 2
    assert "no run at" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


BPE = ("--data.tokenizer", "bpe", "--data.bpe-vocab-size", "257", "--train.steps", "1")


def test_another_tokenizer_is_refused_and_of_a_part_said(
    train, tmp_path, capsys, text_file
):
    """Ids of equal vocabularies, of which each means another piece of text."""
    size = {"vocab_size": 300}
    first, second = tmp_path / "bytes", tmp_path / "bpe"
    assert train(first, "--quiet", **size) == 0
    assert train(second, *BPE, "--quiet", **size) == 0
    capsys.readouterr()
    new = tmp_path / "new"
    assert train(new, *BPE, "--init-from", str(first), **size) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1 and not new.exists()
    assert f"{first} was trained with another tokenizer" in said
    assert "the same ids mean other words; set --data.tokenizer byte" in said
    assert train(new, "--init-from", str(second), **size) == 2
    said = capsys.readouterr().err
    assert f"set --data.tokenizer {second / 'tokenizer.json'}" in said
    # What the line says is what it takes.
    same = ("--data.tokenizer", str(second / "tokenizer.json"), "--quiet")
    assert train(new, *same, "--init-from", str(second), **size) == 0
    part = tmp_path / "part"
    start = ("--init-from", str(second), "--init-partial")
    assert train(part, *start, **size) == 0
    assert "warning: " in (said := capsys.readouterr().err)
    assert "the same ids mean other words" in said
