"""`uoe decompose` on a tiny trained run: out, on with half the experts, and back."""

import json

import chex
import pytest

from uoe_jax.cli import main
from uoe_jax.model import flat_params
from uoe_jax.runs.load import load_run


@pytest.fixture(scope="session")
def dense_run(tmp_path_factory, text_file):
    run = tmp_path_factory.mktemp("runs") / "dense"
    args = ["train", "tiny", "--run-dir", str(run), "--quiet", "--no-report",
            "--data.path", str(text_file), "--data.cache-dir", str(text_file.parent),
            "--data.batch-size", "8", "--model.d-model", "16", "--model.d-ff", "32",
            "--model.num-layers", "1", "--model.head-dim", "4",
            "--model.max-seq-len", "32", "--mesh.data", "1", "--train.steps", "4",
            "--train.log-every", "1", "--train.eval-every", "2",
            "--train.eval-batches", "2", "--train.save-every", "4"]  # fmt: skip
    assert main(args) == 0
    return run


@pytest.fixture(scope="session")
def halved_run(dense_run):
    """The dense run as a union of 8 experts, of which each token uses 4."""
    out = dense_run.parent / "halved"
    args = ["decompose", str(dense_run), "--experts", "8", "--top-k", "4",
            "--grouping", "coactivation", "--out", str(out)]  # fmt: skip
    assert main(args) == 0
    return out


def read(folder):
    return json.loads((folder / "surgery.json").read_text())


def test_all_experts_compute_what_the_dense_run_does(dense_run, tmp_path, capsys):
    out = tmp_path / "union"
    args = ["decompose", str(dense_run), "--experts", "4", "--grouping", "random"]
    assert main([*args, "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == read(out)
    assert said["weights_bitwise"] and said["exact"]
    assert said["max_logit_difference"] <= 1e-5 * max(1, said["max_logit"])
    assert said["loss_as_written"] == pytest.approx(said["loss_dense"], abs=1e-5)

    back = tmp_path / "back"
    assert main(["decompose", str(out), "--merge", "--out", str(back)]) == 0
    assert "exact" in capsys.readouterr().out
    assert read(back)["neuron_order_restored"]
    first, second = (flat_params(load_run(run).model) for run in (dense_run, back))
    chex.assert_trees_all_equal(first, second)


def test_half_of_the_experts_go_on_training(halved_run, capsys):
    found = read(halved_run)
    assert found["exact"] and found["router"] == "least_squares"
    assert found["loss_as_written"] != found["loss_dense"]
    assert set(found["router_explains"]) == {"attention 0", "mlp 0"}
    # The first training after a cut may choose yet another number of them.
    args = ["train", str(halved_run), "--train.steps", "6", "--quiet", "--no-report"]
    assert main([*args, "--model.union.top-k", "3"]) == 0
    run = load_run(halved_run)
    assert (run.step, run.config.model.union.top_k) == (6, 3)
    capsys.readouterr()
    assert main(["eval", str(halved_run), "--max-batches", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 6


def test_an_always_on_core_and_fitted_projections(dense_run, tmp_path, capsys):
    losses = {}
    for name, more in (("plain", []), ("both", ["--shared", "2", "--refit"])):
        out = tmp_path / name
        args = ["decompose", str(dense_run), "--experts", "8", "--top-k", "4"]
        assert main([*args, "--parts", "mlp", *more, "--out", str(out)]) == 0
        said = capsys.readouterr().out
        assert ("fitted again" in said) == bool(more)
        losses[name] = read(out)["loss_as_written"] - read(out)["loss_dense"]
    assert losses["both"] < losses["plain"]
    found = read(out)
    assert found["exact"] and found["weights_bitwise"] and found["shared"] == 2
    before, after = found["refits"]["mlp 0"]
    assert after < before
    union = load_run(out).config.model.union
    assert (union.num_shared, union.top_k) == (2, 4)


def test_groupings_stand_side_by_side_and_the_best_is_written(
    dense_run, tmp_path, capsys
):
    args = ["decompose", str(dense_run), "--experts", "8", "--top-k", "4", "--parts"]
    words = ["mlp", "--grouping", "all", "--router", "clusters", "--calibrate", "512"]
    assert main([*args, *words, "--out", str(tmp_path / "best")]) == 0
    said = capsys.readouterr()
    assert "groupings are tried on held-out data" in said.err
    lines = said.out.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("grouping"))
    assert lines[first].split() == "grouping error worst layer oracle loss".split()
    table = [line.split() for line in lines[first + 2 : first + 8]]
    found = read(tmp_path / "best")
    assert [row[0] for row in table] == [row["grouping"] for row in found["groupings"]]
    losses = {row["grouping"]: row["loss"] for row in found["groupings"]}
    assert found["grouping"] == min(losses, key=losses.get)
    assert found["router"] == "clusters" and found["exact"]
    assert found["loss_as_written"] == pytest.approx(min(losses.values()), abs=1e-5)


def test_as_many_experts_as_ppp_finds_or_one_line(dense_run, tmp_path, capsys):
    args = ["decompose", str(dense_run), "--experts", "auto", "--parts", "mlp"]
    out = tmp_path / "auto"
    assert main([*args, "--max-experts", "8", "--out", str(out)]) == 1
    said = capsys.readouterr()
    assert "experts auto: one." in said.err and "give --experts" in said.err
    assert not said.out and not out.exists()


def test_a_cut_says_what_takes_its_time(dense_run, tmp_path, capsys, monkeypatch):
    args = ["decompose", str(dense_run), "--experts", "4", "--parts", "mlp"]
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main([*args, "--out", str(tmp_path / "new")]) == 0
    said = capsys.readouterr().err.splitlines()
    assert said[0] == f"loading {dense_run} ..."
    assert said[-1].startswith("decompose: comparing both models on ")


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ([], "--experts E"),
        (["--experts", "0"], "--experts is 0"),
        (["--experts", "3"], "3 experts can't share out"),
        (["--experts", "3", "--parts", "mlp"], "num_experts 3"),
        (["--experts", "4", "--top-k", "5"], "--top-k is 5"),
        (["--merge", "--experts", "4"], "leave out --experts"),
        (["--merge", "--refit"], "leave out --refit"),
        (["--experts", "4", "--top-k", "2", "--shared", "2"], "use 0 to 1"),
        (["--experts", "4", "--refit"], "a token uses all 4"),
        (["--experts", "4", "--shared", "1", "--parts", "attention"], "the MLP's"),
        (["--experts", "4", "--max-experts", "8"], "it is for experts auto"),
        (["--experts", "4", "--grouping", "all"], "a token uses all 4"),
        (["--experts", "auto", "--parts", "attention"], "the MLP's"),
        (["--experts", "auto", "--max-experts", "1"], "no number from 2 to 1"),
        (["--experts", "auto", "--top-k", "99"], "no number from 99 to 64"),
        (["--experts", "auto", "--refit"], "a token uses all; give a smaller top_k"),
        (["--experts", "auto", "--top-k", "2", "--shared", "2"], "use 0 to 1"),
        (["--experts", "auto", "--top-k", "0"], "--top-k is 0"),
        (["--experts", "many"], "many"),
        (["--merge"], "dense already"),
        (["--experts", "4", "--top-k", "2", "--calibrate", "0"], "calibrate is 0"),
        (["--experts", "4", "--top-k", "2", "--calibrate", "no.txt"], "no.txt"),
    ],
)
def test_bad_requests_are_one_line(dense_run, tmp_path, capsys, options, part):
    out = tmp_path / "new"
    assert main(["decompose", str(dense_run), *options, "--out", str(out)]) == 2
    said = capsys.readouterr().err.splitlines()
    # A note of what is looked for comes before, the first time in a process.
    (error,) = [line for line in said if not line.startswith("decompose: ")]
    assert part in error
    assert not out.exists()


def test_a_folder_in_use_and_a_union_are_refused(dense_run, halved_run, capsys):
    args = ["decompose", str(dense_run), "--experts", "4", "--out", str(halved_run)]
    assert main(args) == 2
    assert "isn't empty" in capsys.readouterr().err
    args = ["decompose", str(halved_run), "--experts", "4", "--out", "x"]
    assert main(args) == 2
    assert "union already" in capsys.readouterr().err
