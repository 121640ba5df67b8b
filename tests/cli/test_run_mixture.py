"""A run of a mixture: from other folders, moved, on other data, adapted."""

import dataclasses
import json

import pytest

from tests.cli.test_run_data import FIRST, OTHER, SMALL
from uoe_jax import evaluate
from uoe_jax.cli import main
from uoe_jax.cli.parse import parse
from uoe_jax.cli.runs import EvalOptions
from uoe_jax.config import DataConfig
from uoe_jax.data.source import without_unread

BYTES = ["--data.tokenizer", "byte"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of a.txt and b.jsonl, which were named from within it."""
    folder = tmp_path_factory.mktemp("mixture")
    (folder / "a.txt").write_text(FIRST)
    records = [json.dumps({"body": line}) for line in OTHER.split("\n\n") if line]
    (folder / "b.jsonl").write_text("\n".join(records))
    (folder / "c.txt").write_text(OTHER)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train(folder, "a.txt=1", "b.jsonl=3", steps=2) == 0
    return folder


def train(folder, *mix, steps):
    args = ["train", "tiny", "--data.mix", *mix, *SMALL, *BYTES, "--data.text-key",
            "body", "--data.cache-dir", str(folder / "cache"), "--run-dir",
            str(folder / "run"), "--train.steps", str(steps)]  # fmt: skip
    return main(args)


def test_it_is_evaluated_from_another_folder_and_on_one_text(
    trained, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    run, other = str(trained / "run"), str(trained / "c.txt")
    found = {}
    for more in ([], ["--data.path", other]):  # a text has no --data.text-key
        capsys.readouterr()
        assert main(["eval", run, "--json", *more]) == 0
        found[bool(more)] = json.loads(capsys.readouterr().out)
    assert found[False]["data"] == "a.txt + b.jsonl"
    assert found[True]["data"] == "c.txt"
    assert found[True]["loss"] != found[False]["loss"]
    assert evaluate(run, data=other)["loss"] == found[True]["loss"]
    # What is typed is used or refused.
    args = ["eval", run, "--data.path", other, "--data.text-key", "body"]
    assert main(args) == 2
    assert "data.text_key is 'body', but data.source text" in capsys.readouterr().err
    out = str(tmp_path / "adapter")
    more = ["--steps", "1", "--batch-size", "2", "--quiet"]
    assert main(["adapt", run, "--data", other, "--out", out, *more]) == 0


def test_it_goes_on_where_its_sources_were_moved_but_with_its_weights(trained, capsys):
    (trained / "moved").mkdir()
    for name in ("a.txt", "b.jsonl"):
        (trained / name).rename(trained / "moved" / name)
    try:
        places = [f"{trained / 'moved' / name}" for name in ("a.txt", "b.jsonl")]
        assert train(trained, f"{places[0]}=1", f"{places[1]}=2", steps=4) == 2
        assert "belongs to another config: data.mix is" in capsys.readouterr().err
        assert train(trained, f"{places[0]}=1", f"{places[1]}=3", steps=4) == 0
        config = json.loads((trained / "run" / "config.json").read_text())
        assert config["data"]["mix"] == [f"{places[0]}=1.0", f"{places[1]}=3.0"]
        assert main(["eval", str(trained / "run"), "--json"]) == 0
    finally:
        for name in ("a.txt", "b.jsonl"):
            (trained / "moved" / name).rename(trained / name)


def test_a_path_that_is_typed_takes_a_mixtures_place_and_the_other_way():
    mixed = EvalOptions(data=DataConfig(mix=("a=1", "b=2"), batch_size=3))
    plain = EvalOptions(data=DataConfig(path="a", source="text"))
    read = lambda default, *args: parse(EvalOptions, args, "eval", default=default).data
    assert read(mixed, "run", "--data.path", "c") == DataConfig(path="c", batch_size=3)
    assert read(mixed, "run", "--data.source=stdlib").mix is None
    assert read(plain, "run", "--data.mix", "c=1", "d=1") == DataConfig(
        mix=("c=1", "d=1")
    )
    both = read(mixed, "run", "--data.path", "c", "--data.mix", "c=1", "d=1")
    assert both.path == "c" and both.mix == ("c=1", "d=1")  # which is refused
    assert read(mixed, "run").mix == ("a=1", "b=2")


def test_what_other_data_does_not_read_is_not_taken_from_a_run(tmp_path):
    (file := tmp_path / "a.txt").write_text("a text")
    of_run = DataConfig(source="listops", num_examples=7, max_length=30, batch_size=3)
    data = dataclasses.replace(of_run, source="auto", path=str(file))
    assert without_unread(data, "decoder") == DataConfig(path=str(file), batch_size=3)
    kept = without_unread(data, "decoder", ["num_examples"])  # refused where it is read
    assert kept.num_examples == 7 and kept.max_length == DataConfig().max_length
