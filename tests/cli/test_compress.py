"""`uoe compress` on a tiny trained run: smaller, read by every verb; and refusals."""

import json

import pytest

from tests.cli.test_decompose import dense_run  # noqa: F401
from uoe_jax.cli import main
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
])  # fmt: skip
def test_lines_say_what_was_cut(dense_run, tmp_path, capsys, words):  # noqa: F811
    args = ["compress", str(dense_run), "--cut", "0.2", "--calibrate", "256"]
    assert main([*args, *words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "of them in blocks" in said and "perplexity" in said


@pytest.mark.parametrize("words, message", [
    ([], "no cut given; give a share of the blocks, such as 0.3"),
    (["--cut", "0"], "cut is 0.0; it must be in (0, 1)"),
    (["--cut", "1.5"], "cut is 1.5; it must be in (0, 1)"),
    (["--cut", "0.99"], "what the least widths cost; cut less"),
    (["--cut", "0.97", "--allocate", "bi"], "a layer can lose at most 0.95"),
    (["--cut", "0.3", "--method", "prune"], "prune"),
    (["--cut", "0.3", "--allocate", "seconds", "--device", "abacus"],
     "device is 'abacus', of which no model of products is known"),
    (["--cut", "0.3", "--calibrate", "nowhere.txt"], "nowhere.txt can't be read"),
    (["--cut", "0.3", "--calibrate", "0"], "0"),
    (["--cut", "0.3", "--temperature", "0"], "temperature is 0.0; it must be positive"),
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
    assert message in error and len(lines) <= 2 and not out.exists()


def test_too_little_text_is_refused(dense_run, tmp_path, capsys):  # noqa: F811
    text = tmp_path / "short.txt"
    text.write_text("a few words")
    args = ["compress", str(dense_run), "--cut", "0.3", "--calibrate", str(text)]
    assert main([*args, "--out", str(tmp_path / "out")]) == 2
    assert "tokens; at least 64 are needed" in capsys.readouterr().err
