"""`uoe compress` on a tiny trained run: smaller, read by every verb; and refusals."""

import json
import math

import pytest

from tests.adapt.test_foreign import write_peft
from tests.cli.test_decompose import dense_run  # noqa: F401
from uoe_jax.cli import main
from uoe_jax.cli.compress import _lines
from uoe_jax.compress.options import percent
from uoe_jax.data.progress import note_once
from uoe_jax.runs.load import load_run


def test_a_run_becomes_smaller_and_every_verb_reads_it(dense_run, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "small"
    args = ["compress", str(dense_run), "--cut", "0.3", "--calibrate", "512"]
    assert main([*args, "--multiple", "2", "--out", str(out), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said == json.loads((out / "surgery.json").read_text())
    before, after = said["block_parameters"]
    assert 0.25 * before <= before - after <= 0.4 * before
    assert said["loss_after"] < said["loss_before"] + 0.5
    model = load_run(out).config.model
    assert model.of_layer(0).d_ff < 32 or model.of_layer(0).value_dim < 4
    assert main(["eval", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(said["loss_after"], abs=0.2)
    assert main(["generate", str(out), "--prompt", "a", "--max-new-tokens", "2"]) == 0
    assert main(["train", str(out), "--train.steps", "6", "--quiet"]) == 0
    capsys.readouterr()
    assert main(["compress", str(out), "--cut", "0.3", "--out", str(tmp_path / "x")])
    assert "of unequal width already" in capsys.readouterr().err


@pytest.mark.parametrize("words", [
    ["--method", "flap", "--allocate", "bi", "--temperature", "3"],
    ["--method", "magnitude", "--allocate", "seconds", "--device", "H200"],
    ["--method", "sort", "--allocate", "uniform", "--checkpoint", "best"],
    ["--method", "lord", "--allocate", "curve", "--multiple", "2"],
])  # fmt: skip
def test_lines_say_what_was_cut(dense_run, tmp_path, capsys, words):  # noqa: F811
    args = ["compress", str(dense_run), "--cut", "0.2", "--calibrate", "256"]
    assert main([*args, *words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "of them in blocks" in said and "perplexity" in said


@pytest.mark.parametrize("words, message", [
    ([], "no cut given; give a share of the blocks, such as 0.3"),
    (["--method", "lord", "--rank", "11"],
     "rank 11 of mlp.w_up (16 x 32) saves nothing"),
    (["--cut", "0.3", "--method", "svd", "--rank", "4"], "one settles the other"),
    (["--cut", "0.2", "--method", "depth"], "cut is 0.2, which of 1 layers is none"),
    (["--cut", "0.3", "--anytime"], "cut is 0.3 with anytime"),
    (["--cut", "0.3", "--curve", "0.2"], "cut is 0.3 with curve"),
    (["--curve", "0.2", "0.2"], "curve is '0.2 0.2'; give each once"),
    (["--curve", "0.2", "1.2"], "1.2"),
    (["--cut", "0.3", "--statistics", "nowhere/s.safetensors", "--calibrate", "256"],
     "--statistics nowhere/s.safetensors can't be written"),
    (["--cut", "0"], "cut is 0.0; it must be in (0, 1)"),
    (["--cut", "1.5"], "cut is 1.5; it must be in (0, 1)"),
    (["--cut", "0.99"], "cut is 0.99; every part keeps some of its width, so at most"),
    (["--cut", "0.97", "--allocate", "bi"], "a layer can lose at most 0.95"),
    (["--cut", "0.3", "--method", "prune"], "prune"),
    (["--cut", "0.3", "--allocate", "seconds", "--device", "abacus"],
     "device is 'abacus', of which no model of products is known"),
    (["--anytime", "--allocate", "seconds", "--device", "abacus"],
     "device is 'abacus', of which no model of products is known"),
    (["--cut", "0.3", "--calibrate", "nowhere.txt"], "nowhere.txt can't be read"),
    (["--cut", "0.3", "--calibrate", "0"], "0"),
    (["--cut", "0.3", "--temperature", "0"], "temperature is 0.0; it must be positive"),
    (["--cut", "0.3", "--temperature", "3"], "only --allocate bi reads it"),
    (["--cut", "0.3", "--method", "slice", "--device", "H200"],
     "only --allocate seconds reads it"),
    (["--cut", "0.3", "--method", "svd", "--multiple", "2"], "multiple is 2 with"),
    (["--curve", "0.1", "--methods", "slice", "--allocate", "bi"],
     "allocate is 'bi' with slice, which don't read it"),
    (["--curve", "0.1", "--temperature", "2"], "only --allocate bi reads it"),
    (["--curve", "0.1", "--allocate", "bi", "--device", "H200"],
     "device is 'H200', and the cut is spread by 'bi'; only --allocate seconds"),
    (["--curve", "0.1", "--methods", "svd", "depth", "--multiple", "2"],
     "multiple is 2 with method svd"),
    (["--cut", "0.3", "--methods", "sort", "drop"],
     "methods is 'sort drop' without curve"),
    (["--anytime", "--methods", "sort"], "methods is 'sort' without curve"),
])  # fmt: skip
def test_requests_that_cannot_be_are_one_line(
    dense_run,  # noqa: F811
    tmp_path,
    capsys,
    words,
    message,
):
    out = tmp_path / "out"
    assert main(["compress", str(dense_run), *words, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("uoe: ")]
    assert message in error and len(lines) == 1 and not out.exists()


def test_too_little_text_is_refused(dense_run, tmp_path, capsys):  # noqa: F811
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    args = ["compress", str(dense_run), "--cut", "0.3", "--calibrate", str(text)]
    assert main([*args, "--out", str(tmp_path / "out")]) == 2
    assert "tokens; at least 64 are needed" in capsys.readouterr().err


def test_what_was_seen_is_read_again_and_that_of_another_checkpoint_refused(
    dense_run,  # noqa: F811
    anytime_run,
    tmp_path,
    capsys,
):
    kept = tmp_path / "seen.safetensors"
    args = ["compress", str(dense_run), "--calibrate", "256", "--statistics", str(kept)]
    said = []
    for cut in ("0.2", "0.3"):
        assert main([*args, "--cut", cut, "--out", str(tmp_path / cut)]) == 0
        said.append("observing what 1 layers do" in capsys.readouterr().err)
    assert said == [True, False] and kept.is_file()
    wrong = {
        "another checkpoint": [str(anytime_run), "--anytime", "--calibrate", "256"],
        "another calibration text": [*args[1:2], "--cut", "0.3", "--calibrate", "512"],
    }
    for words, given in wrong.items():
        out = ["--statistics", str(kept), "--out", str(tmp_path / "x")]
        assert main(["compress", *given, *out]) == 2
        error = capsys.readouterr().err
        assert f"holds statistics of {words}; give another --statistics" in error
        assert not (tmp_path / "x").exists()


@pytest.fixture(scope="module")
def anytime_run(dense_run, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("runs") / "anytime"
    args = ["compress", str(dense_run), "--anytime", "--calibrate", "512"]
    assert main([*args, "--multiple", "2", "--out", str(out)]) == 0
    return out


def test_a_run_of_any_cut_is_opened_by_every_verb(
    dense_run,  # noqa: F811
    anytime_run,
    tmp_path,
    capsys,
):
    said = json.loads((anytime_run / "surgery.json").read_text())
    assert said["exact"] and said["did"] == "anytime" and said["file_share"] < 1.7
    apart, opened = tmp_path / "apart", tmp_path / "opened"
    cut = ["--cut", "0.3", "--multiple", "2"]
    args = ["compress", str(dense_run), *cut, "--calibrate", "512", "--out", str(apart)]
    assert main(args) == 0
    assert (
        main(["compress", str(anytime_run), "--cut", "0.3", "--out", str(opened)]) == 0
    )
    capsys.readouterr()
    losses = []
    for words in ([str(apart)], [str(opened)], [str(anytime_run), "--cut", "0.3"]):
        assert main(["eval", *words, "--json"]) == 0
        losses.append(json.loads(capsys.readouterr().out)["loss"])
    assert losses == pytest.approx([losses[0]] * 3, abs=1e-4)
    assert main(["eval", str(anytime_run), "--json"]) == 0
    assert abs(json.loads(capsys.readouterr().out)["loss"] - losses[0]) > 1e-4
    args = ["generate", str(anytime_run), "--prompt", "a", "--max-new-tokens", "2"]
    assert main([*args, "--cut", "0.3"]) == 0
    assert load_run(opened).config.model.widths.value_dim is not None


def test_a_cut_is_healed_by_an_adapter_and_merged(anytime_run, tmp_path, capsys):
    out = tmp_path / "healed"
    args = ["adapt", str(anytime_run), "--cut", "0.4", "--steps", "30", "--merge"]
    args += ["--rank", "4", "--learning-rate", "0.02", "--out", str(out), "--json"]
    assert main(args) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["after"]["loss"] < said["before"]["loss"]
    assert main(["eval", said["merged"], "--json", "--max-batches", "8"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] == pytest.approx(said["after"]["loss"], abs=1e-3)
    widths = load_run(out / "merged").config.model.widths
    assert widths != load_run(anytime_run).config.model.widths
    assert said["cut"] == 0.4
    # The adapter is of that cut: neither another one nor another library has it.
    wrong = [
        ["export", str(out), str(tmp_path / "peft")],
        ["adapt", str(anytime_run), "--load", str(out), "--out", str(tmp_path / "x"),
         "--steps", "0", "--merge"],
    ]  # fmt: skip
    for args in wrong:
        assert main(args) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "opened at cut 0.4" in lines[0]
    again = [*wrong[1], "--cut", "0.4"]
    assert main(again) == 0
    small = tmp_path / "small"
    args = ["compress", str(anytime_run), "--cut", "0.4", "--out", str(small)]
    assert main(args) == 0
    args = ["adapt", str(small), "--load", str(out), "--out", str(tmp_path / "y")]
    assert main([*args, "--steps", "0", "--merge"]) == 0


def test_an_adapter_of_another_library_is_not_laid_on_channels_in_order(
    anytime_run, tmp_path, capsys
):
    peft = write_peft(tmp_path / "peft")
    args = ["adapt", str(anytime_run), "--load", str(peft), "--steps", "0", "--merge"]
    assert main([*args, "--out", str(tmp_path / "x")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "has its channels in another order than" in lines[0]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("words", [
    ["--method", "lord", "--rank", "8"], ["--method", "svd", "--cut", "0.2"],
])  # fmt: skip
def test_products_of_low_rank_are_healed_by_an_adapter(
    dense_run,  # noqa: F811
    tmp_path,
    capsys,
    words,
):
    out, healed = tmp_path / "low", tmp_path / "healed"
    args = ["compress", str(dense_run), *words, "--calibrate", "256"]
    assert main([*args, "--out", str(out)]) == 0
    assert load_run(out).config.model.widths.up_rank is not None
    args = ["adapt", str(out), "--steps", "30", "--learning-rate", "0.02", "--json"]
    capsys.readouterr()
    assert main([*args, "--out", str(healed)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["after"]["loss"] < said["before"]["loss"]


@pytest.mark.parametrize("verb", ["eval", "generate", "adapt", "compress"])
def test_cuts_that_a_run_does_not_open_at_are_one_line(
    dense_run,  # noqa: F811
    anytime_run,
    tmp_path,
    capsys,
    verb,
):
    more = {"generate": ["--prompt", "a"], "eval": []}
    more = more.get(verb, ["--out", str(tmp_path / "out")])
    wrong = [(anytime_run, "1.5", "cut is 1.5; it must be in (0, 1)")]
    if verb == "compress":
        wrong.append((anytime_run, "0.3 --calibrate 512", "leave out --calibrate"))
        wrong.append((anytime_run, "0.3 --method drop", "is sorted by modegpt"))
    else:
        wrong.append((dense_run, "0.3", "doesn't open at a cut: it has no anytime"))
    for run, cut, message in wrong:
        assert main([verb, str(run), "--cut", *cut.split(), *more]) == 2
        error = capsys.readouterr().err
        lines = [line for line in error.splitlines() if line.startswith("uoe: ")]
        assert message in error and len(lines) == 1, error


def test_methods_and_cuts_are_compared(dense_run, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "curve"
    args = ["compress", str(dense_run), "--calibrate", "256", "--multiple", "2"]
    args += ["--curve", "0.2", "0.4", "--methods", "modegpt", "lord", "depth"]
    assert main([*args, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "-: cut is 0.4, which of 1 layers is none" in said
    assert said.startswith((out / "curve.txt").read_text().strip())
    found = json.loads((out / "curve.json").read_text())
    rows = {(row["method"], row["cut"]): row for row in found["rows"]}
    assert len(rows) == 7 and (out / "curve.png").is_file()
    low = rows["lord", 0.2]
    assert low["blocks"] <= 0.8 and low["allocate"] == "uniform"
    assert "refused" in rows["depth", 0.2]
    made = tmp_path / "made"
    args = ["compress", str(dense_run), "--cut", "0.2", "--calibrate", "256"]
    assert main([*args, "--multiple", "2", "--out", str(made), "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    row = rows["modegpt", 0.2]
    assert row["held_out"] == pytest.approx(math.exp(one["loss_after"]), abs=1e-2)
    assert rows["dense", 0.0]["held_out"] == pytest.approx(
        math.exp(one["loss_before"]), abs=1e-2
    )


@pytest.mark.parametrize("method, warned", [("modegpt", True), ("magnitude", False)])
def test_few_tokens_are_said_where_they_fit_something(
    dense_run,  # noqa: F811
    tmp_path,
    capsys,
    method,
    warned,
):
    note_once.cache_clear()
    args = ["compress", str(dense_run), "--cut", "0.2", "--calibrate", "128"]
    assert main([*args, "--method", method, "--out", str(tmp_path / "out")]) == 0
    assert ("on fits are good" in capsys.readouterr().err) == warned


def test_a_model_that_grew_says_so():
    """A tied embedding that became two matrices: SmolLM2's sizes at a cut of 10%."""
    found = {"did": "compress", "parameters": [134_515_008, 146_996_200],
             "block_parameters": [100, 90], "flops_per_token": [100, 95],
             "loss_before": 1.0, "loss_after": 1.1, "probe_tokens": 64}  # fmt: skip
    lines = _lines(found, "out")
    assert lines[0] == "parameters: 134,515,008 -> 146,996,200 (+9.3%)"
    assert lines[1] == "of them in blocks: 100 -> 90 (-10.0%)"
    assert lines[3].startswith("the whole grew: the embedding and the head were one")
    less = _lines(found | {"parameters": [100, 95]}, "out")
    assert less == ["parameters: 100 -> 95 (-5.0%)", *lines[1:3], *lines[4:]]


def test_cuts_that_differ_have_names_that_differ():
    assert [percent(cut) for cut in (0.3, 0.29, 0.004, 0.001)] == [
        "30", "29", "0.4", "0.1"
    ]  # fmt: skip


def test_a_text_that_is_not_there_is_one_line_without_an_error_number(
    dense_run,  # noqa: F811
    tmp_path,
    capsys,
):
    words = ["--cut", "0.3", "--calibrate", str(tmp_path / "none.txt")]
    assert main(["compress", str(dense_run), *words, "--out", str(tmp_path / "a")]) == 2
    said = capsys.readouterr().err
    assert said.endswith(
        "none.txt can't be read (No such file or directory); give a text file in "
        "UTF-8, or a number of tokens\n"
    )
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("words, message", [
    (["--method", "slice", "--cut", "0.01"], "leaves 16 in steps of 8"),
    (["--method", "depth", "--cut", "0.2"], "of 1 layers is none"),
    (["--method", "lord", "--rank", "11"], "saves nothing"),
    (["--method", "svd", "--cut", "0.9"], "loses less than"),
])  # fmt: skip
def test_what_the_config_tells_is_refused_before_a_text_is_looked_at(
    dense_run,  # noqa: F811
    tmp_path,
    capsys,
    words,
    message,
):
    seen = tmp_path / "statistics.safetensors"
    given = ["--calibrate", "256", "--statistics", str(seen)]
    out = ["--out", str(tmp_path / "out")]
    assert main(["compress", str(dense_run), *words, *given, *out]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not seen.exists()
