"""An imported model goes through every verb: cut, merged, trained on, given back."""

import json
import math

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.interop.tiny_folders import GOLDENS, TEXT, write_folder
from uoe_jax.cli import main
from uoe_jax.data.tokenize import train_bpe
from uoe_jax.runs.load import load_run
from uoe_jax.tree import named_leaves


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, its run, and a text."""
    folder = tmp_path_factory.mktemp("interop")
    write_folder(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    args = ["--run-dir", str(folder / "run"), "--dtype", "float32", "--json"]
    assert main(["import", str(folder / "model"), *args]) == 0
    return folder


def run(capsys, *args):
    """What a command that succeeds prints."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def data_args(place):
    return ["--data.path", place / "text.txt", "--data.cache-dir", place / "cache"]


def test_perplexity_and_bits_per_byte_agree(place, capsys):
    found = json.loads(run(capsys, "eval", place / "run", "--json", *data_args(place)))
    want = math.exp(found["loss"])
    assert abs(found["perplexity"] - want) < 1e-6 * want
    assert 0 < found["bits_per_byte"] < found["loss"] / math.log(2)


def test_it_generates_and_checks_and_costs(place, capsys):
    said = run(capsys, "generate", place / "run", "--prompt", "the 7", "--greedy",
               "--max-new-tokens", 5)  # fmt: skip
    assert said.startswith("the 7")
    assert "nothing moved" in run(capsys, "leakcheck", place / "run")
    assert "parameters" in run(capsys, "cost", place / "run")
    said = run(capsys, "plan", place / "run", "--topology", "h100:2")
    assert "fits" in said or "tokens" in said


def test_cut_merged_and_exported_every_tensor_is_what_came_in(place, capsys, tmp_path):
    options = ["--experts", 2]
    config = json.loads((place / "run" / "config.json").read_text())
    config["data"]["path"] = str(place / "text.txt")
    config["data"]["cache_dir"] = str(place / "cache")
    (place / "run" / "config.json").write_text(json.dumps(config))
    said = run(
        capsys, "decompose", place / "run", *options, "--out", tmp_path / "union"
    )
    assert "bit" in said
    run(capsys, "decompose", tmp_path / "union", "--merge", "--out", tmp_path / "dense")
    for source in ("union", "dense"):
        out = tmp_path / f"{source}-out"
        said = run(
            capsys, "export", tmp_path / source, out, "--checkpoint", "last", "--json"
        )
        assert json.loads(said)["architecture"] == "LlamaForCausalLM"
        before = load_file(place / "model" / "model.safetensors")
        after = load_file(out / "model.safetensors")
        assert before.keys() == after.keys()
        for name, array in before.items():
            np.testing.assert_array_equal(after[name], array, err_msg=name)
        text = (place / "model" / "tokenizer.json").read_text()
        assert json.loads((out / "tokenizer.json").read_text()) == json.loads(text)


def test_it_trains_on_and_adapts(place, capsys, tmp_path):
    folder = tmp_path / "run"
    args = ["--run-dir", folder]
    assert main([str(a) for a in ("import", place / "model", *args)]) == 0
    before = named_leaves(load_run(folder).model)
    options = ["--train.steps", 2, "--train.eval-batches", 1, "--train.log-every", 1]
    options += ["--data.batch-size", 8, "--data.seq-len", 32, "--quiet", "--no-report"]
    run(capsys, "train", folder, *data_args(place), *options)
    loaded = load_run(folder)
    assert loaded.step == 2
    moved = [n for n, a in named_leaves(loaded.model).items() if (a != before[n]).any()]
    assert len(moved) == len(before)
    # A second command goes on with the optimizer's state.
    options[1] = 3
    run(capsys, "train", folder, *data_args(place), *options)
    assert load_run(folder).step == 3
    run(capsys, "export", folder, tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert not np.array_equal(
        after["model.norm.weight"],
        load_file(place / "model" / "model.safetensors")["model.norm.weight"],
    )


def test_an_encoder_without_classes_is_run_but_not_evaluated(tmp_path, capsys):
    assert (
        main(["import", str(GOLDENS / "bert"), "--run-dir", str(tmp_path / "r")]) == 0
    )
    run(capsys, "leakcheck", tmp_path / "r")
    for verb in ("eval", "train"):
        assert main([verb, str(tmp_path / "r")]) == 2
        said = capsys.readouterr().err.strip()
        assert "model.encoder_head is 'tokens', which has no targets" in said
        assert "\n" not in said


def test_a_model_without_a_tokenizer_says_where_to_put_one(tmp_path, capsys):
    write_folder(tmp_path / "model", tokenizer=False)
    imported = tmp_path / "run"
    run(capsys, "import", tmp_path / "model", "--run-dir", imported)
    (tmp_path / "text.txt").write_text(TEXT)
    ask = ["generate", imported, "--prompt", "the 7", "--max-new-tokens", "2"]
    data = ["--data.path", tmp_path / "text.txt"]
    cut = ["decompose", imported, "--experts", "2", "--out", tmp_path / "cut"]
    for command in (ask, ["eval", imported, *data], ["train", imported, *data], cut):
        assert main([str(a) for a in command]) == 2
        said = capsys.readouterr().err
        assert f"put the model's tokenizer.json into {imported}" in said
        assert said.count("\n") == 1 and not (tmp_path / "cut").exists()
    (imported / "tokenizer.json").write_text(train_bpe([TEXT.encode()], 320))
    assert run(capsys, *ask).startswith("the 7")
