"""A run holds what reading it needs: its data may move, change or be gone."""

import json
import os
import shutil

import pytest

from uoe_jax.cli import main

SMALL = ["--model.d-model", "16", "--model.d-ff", "32", "--model.num-layers", "1",
         "--model.num-heads", "2", "--model.num-kv-heads", "2", "--model.head-dim", "8",
         "--model.vocab-size", "300", "--model.max-seq-len", "32",
         "--data.batch-size", "8", "--train.eval-every", "2", "--train.save-every", "2",
         "--train.eval-batches", "2", "--no-report", "--quiet"]  # fmt: skip
BPE = ["--data.tokenizer", "bpe", "--data.bpe-vocab-size", "280"]
FIRST = "".join(f"the cat number {i} sat on the mat\n\n" for i in range(400))
OTHER = "".join(f"zwei {i} Hunde bellen laut im Hof\n\n" for i in range(400))


class Project:
    """A folder with a text, a cache and a run trained there with relative paths."""

    def __init__(self, folder):
        self.folder, self.run = folder, folder / "run"
        self.text, self.cache = folder / "text.txt", folder / "cache"

    def train(self, *more, steps=2):
        bpe = [] if "--data.tokenizer" in more else BPE
        args = ["train", "tiny", "--data.path", "text.txt", *bpe, *SMALL,
                "--data.cache-dir", "cache", "--run-dir", "run",
                "--train.steps", str(steps), *more]  # fmt: skip
        return main(args)

    def generate(self, capsys):
        args = ["generate", str(self.run), "--prompt", "the cat", "--greedy",
                "--max-new-tokens", "12"]  # fmt: skip
        assert main(args) == 0
        return capsys.readouterr().out

    def evaluate(self, capsys, *more):
        capsys.readouterr()
        assert main(["eval", str(self.run), "--json", *more]) == 0
        return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("project"))
    project.text.write_text(FIRST)
    before = os.getcwd()
    os.chdir(project.folder)
    try:
        assert project.train() == 0
    finally:
        os.chdir(before)
    return project.folder


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A copy of the trained project, standing in it."""
    shutil.copytree(trained, tmp_path / "project")
    config = tmp_path / "project" / "run" / "config.json"
    config.write_text(
        config.read_text().replace(str(trained), str(tmp_path / "project"))
    )
    monkeypatch.chdir(tmp_path / "project")
    return Project(tmp_path / "project")


def refusal(capsys, args):
    capsys.readouterr()
    code = main([str(a) for a in args])
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("uoe: ")]
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


def test_a_run_holds_its_tokenizer_and_hashes_and_absolute_paths(trained):
    run = trained / "run"
    record = json.loads((run / "data.json").read_text())
    config = json.loads((run / "config.json").read_text())
    assert config["data"]["path"] == str(trained / "text.txt") == record["path"]
    assert config["data"]["cache_dir"] == str(trained / "cache")
    (prepared,) = (trained / "cache").glob("text.txt-*")
    manifest = json.loads((prepared / "manifest.json").read_text())
    assert record["hash"] == manifest["hash"]
    assert (run / "tokenizer.json").read_text() == (
        prepared / "tokenizer.json"
    ).read_text()
    assert record["tokenizer_sha256"] == manifest["outputs"]["tokenizer.json"]["sha256"]


@pytest.mark.parametrize("harm", ["other text", "deleted", "moved"])
def test_generate_needs_no_data_at_all(project, capsys, harm):
    said = project.generate(capsys)
    shutil.rmtree(project.cache)
    if harm == "other text":
        project.text.write_text(OTHER)
    elif harm == "deleted":
        project.text.unlink()
    else:
        project.text.rename(project.folder / "renamed.txt")
    assert project.generate(capsys) == said
    assert not project.cache.exists()


def test_a_damaged_tokenizer_is_refused_by_name(project, capsys):
    file = project.run / "tokenizer.json"
    file.write_text(file.read_text().replace("the", "teh", 1))
    args = ["generate", project.run, "--prompt", "the cat"]
    assert "isn't the tokenizer the run was trained with" in refusal(capsys, args)
    file.unlink()
    assert "can't be read (No such file" in refusal(capsys, args)


def test_eval_takes_the_text_where_it_lies_now(project, capsys):
    before = project.evaluate(capsys)
    shutil.rmtree(project.cache)
    moved = project.folder / "elsewhere" / "text.txt"
    moved.parent.mkdir()
    project.text.rename(moved)
    said = refusal(capsys, ["eval", project.run])
    assert "text.txt doesn't exist" in said and "--data.path" in said
    after = project.evaluate(capsys, "--data.path", str(moved))
    assert after["loss"] == before["loss"] and after["data"] == "text.txt"
    # Another text is another number, told through the run's own vocabulary.
    other = project.folder / "other.txt"
    other.write_text(OTHER)
    found = project.evaluate(capsys, "--data.path", "other.txt")
    assert found["loss"] != before["loss"] and found["data"] == "other.txt"


def test_eval_elsewhere_reads_the_runs_text_not_one_of_the_same_name(
    project, capsys, monkeypatch
):
    before = project.evaluate(capsys)
    other = project.folder / "other"
    other.mkdir()
    (other / "text.txt").write_text(OTHER)
    monkeypatch.chdir(other)
    assert project.evaluate(capsys) == before


@pytest.mark.parametrize("cache", ["emptied", "another"])
def test_a_changed_text_is_refused_wherever_the_cache_is(project, capsys, cache):
    hash_before = json.loads((project.run / "data.json").read_text())["hash"]
    project.text.write_text(FIRST + OTHER)
    more = []
    if cache == "emptied":
        shutil.rmtree(project.cache)
    else:
        more = ["--data.cache-dir", str(project.folder / "second")]
    said = refusal(capsys, ["eval", project.run, *more])
    assert "tokenizer" in said or "isn't the data" in said
    assert project.train(*more, steps=4) == 2
    said = capsys.readouterr().err
    assert "another tokenizer than" in said or "isn't the data that" in said
    assert json.loads((project.run / "data.json").read_text())["hash"] == hash_before


def test_a_changed_text_is_accepted_on_request_and_the_old_hash_kept(project, capsys):
    file = project.run / "data.json"
    hash_before = json.loads(file.read_text())["hash"]
    project.text.write_text(FIRST + OTHER)
    shutil.rmtree(project.cache)
    # The vocabulary of another text would give the ids other meanings.
    assert project.train("--data.allow-changed", steps=4) == 2
    own = ["--data.tokenizer", str(project.run / "tokenizer.json")]
    assert own[0] in capsys.readouterr().err
    assert project.train(*own, steps=4) == 2
    assert "isn't the data that run was trained on" in capsys.readouterr().err
    assert project.train(*own, "--data.allow-changed", steps=4) == 0
    record = json.loads(file.read_text())
    assert record["earlier"] == [hash_before] and record["hash"] != hash_before


def test_without_metrics_the_config_is_still_checked(project, capsys):
    (project.run / "metrics.jsonl").unlink()
    assert project.train("--optim.learning-rate", "0.5", steps=4) == 2
    assert "belongs to another config: optim.learning_rate" in capsys.readouterr().err
    project.text.write_text(OTHER)
    shutil.rmtree(project.cache)
    assert project.train(steps=4) == 2
    assert "text.txt" in capsys.readouterr().err


def test_resume_goes_on_with_the_same_text_moved(project, capsys):
    moved = project.folder / "moved" / "text.txt"
    moved.parent.mkdir()
    project.text.rename(moved)
    assert project.train("--data.path", str(moved), steps=4) == 0
    config = json.loads((project.run / "config.json").read_text())
    assert config["data"]["path"] == str(moved)
    assert sorted(p.name for p in (project.run / "checkpoints").iterdir()) == ["2", "4"]


@pytest.mark.parametrize("harm", ["deleted", "changed"])
def test_what_was_prepared_serves_where_the_text_is_gone(project, capsys, harm):
    before = project.evaluate(capsys)
    # The copy of the project has a cache of its own: prepared above.
    project.text.unlink()
    if harm == "changed":
        project.text.write_text(OTHER)
    assert project.evaluate(capsys) == before
    # Going on trains on it, so it must be there.
    assert project.train(steps=4) == 2


def make_old(project):
    """Turn a run into one of a version that kept no tokenizer and relative paths."""
    (project.run / "data.json").unlink()
    (project.run / "tokenizer.json").unlink()
    config = json.loads((project.run / "config.json").read_text())
    config["data"]["path"], config["data"]["cache_dir"] = "text.txt", "cache"
    for name in ("encoding", "bad_records"):
        del config["data"][name]
    (project.run / "config.json").write_text(json.dumps(config))


def test_old_runs_still_open(project, capsys):
    said, scores = project.generate(capsys), project.evaluate(capsys)
    copy = (project.run / "tokenizer.json").read_text()
    make_old(project)
    # The cache is of another place: the text is prepared again.
    assert project.evaluate(capsys) == scores
    assert project.generate(capsys) == said
    # Its recorded hash guards it as well.
    shutil.rmtree(project.cache)
    project.text.write_text(OTHER)
    assert "isn't the data" in refusal(capsys, ["eval", project.run])
    args = ["generate", project.run, "--prompt", "the cat"]
    assert "put the tokenizer.json it was trained with" in refusal(capsys, args)
    (project.run / "tokenizer.json").write_text(copy)
    assert project.generate(capsys) == said


def test_runs_made_of_a_run_carry_its_tokenizer_along(project, capsys):
    tokenizer = (project.run / "tokenizer.json").read_text()
    union, dense = project.folder / "union", project.folder / "dense"
    args = ["decompose", str(project.run), "--experts", "2", "--out", str(union)]
    assert main(args) == 0
    args = ["decompose", str(union), "--merge", "--out", str(dense)]
    assert main(args) == 0
    other = project.folder / "other.txt"
    other.write_text(OTHER)
    adapted = project.folder / "adapted"
    args = ["adapt", str(project.run), "--rank", "2", "--steps", "2", "--data",
            str(other), "--merge", "--out", str(adapted)]  # fmt: skip
    assert main(args) == 0
    project.text.unlink()
    other.unlink()
    shutil.rmtree(project.cache)
    for run in (union, dense, adapted / "merged"):
        assert (run / "tokenizer.json").read_text() == tokenizer
        capsys.readouterr()
        args = ["generate", str(run), "--prompt", "the cat", "--max-new-tokens", "3"]
        assert main(args) == 0
        assert capsys.readouterr().out.startswith("the cat")


def test_report_goes_on_without_the_data(project, capsys):
    project.text.unlink()
    shutil.rmtree(project.cache)
    assert main(["report", str(project.run), "--out", "page.html"]) == 0
    captured = capsys.readouterr()
    assert "page.html" in captured.out
    assert captured.err.count("no routing of real text") == 1
