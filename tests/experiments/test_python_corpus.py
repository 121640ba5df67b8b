"""A corpus of installed source: packages are held out whole, nothing is there twice."""

import json
from pathlib import Path

import pytest

from experiments.shared.python_corpus import (
    assign_packages,
    build,
    drop_repeats,
    main,
    make_texts,
    read_packages,
    write_corpus,
)
from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data import make_dataset
from uoe_jax.data.split import SPLITS
from uoe_jax.errors import DataError


@pytest.fixture
def found(tmp_path):
    """Thirty packages of two files; every tenth has a copy of the first one's."""
    packages = []
    for number in range(30):
        folder = tmp_path / f"site/p{number}"
        folder.mkdir(parents=True)
        own = "".join(f"value_{number}_{line} = {line}\n" for line in range(60))
        (folder / "own.py").write_text(own)
        (folder / "short.py").write_text("x = 1\n")
        (folder / "latin.py").write_bytes(b"# caf\xe9\n" * 60)
        if number % 10 == 0:
            copied = "".join(f"shared_{line} = {line}\n" for line in range(60))
            # As a copy is: another head, other line ends.
            head = f"# copied into p{number}\n\n"
            (folder / "vendored.py").write_text(head + copied, newline="\r\n")
        files = {f"p{number}/{f.name}": f for f in folder.iterdir()}
        files[f"p{number}/gone.py"] = folder / "gone.py"
        packages.append((f"p{number}", "1.0", files))
    return packages


def test_packages_are_whole_and_contents_in_one_place(found, tmp_path):
    packages = read_packages(found)
    assign_packages(packages, 0.2, 0.2)
    assert drop_repeats(packages) == 2
    about = write_corpus(packages, make_texts(packages), tmp_path / "corpus", 2)
    names, texts = {}, {}
    for split in SPLITS:
        lines = (tmp_path / "corpus" / "texts" / f"{split}.jsonl").open()
        rows = [json.loads(line) for line in lines]
        names[split] = {row["package"] for row in rows}
        texts[split] = {row["text"] for row in rows}
        assert len(texts[split]) == len(rows) == about["splits"][split]["files"]
    assert len(names["test"]) > 3 and len(names["valid"]) > 3
    assert sum(map(len, names.values())) == len(set().union(*names.values())) == 30
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == 31
    total = sum(about["splits"][split]["bytes"] for split in SPLITS)
    for split in ("valid", "test"):
        assert 0.1 * total < about["splits"][split]["bytes"] <= 0.2 * total + 1
    # The copied file is trained on where any of its packages is.
    where = [s for s in SPLITS if any("shared_1 " in text for text in texts[s])]
    homes = [s for s in SPLITS if names[s] & {"p0", "p10", "p20"}]
    assert where == homes[:1]


def test_the_same_packages_make_the_same_bytes_in_any_order(found, tmp_path):
    made = []
    for order in (found, found[::-1]):
        packages = read_packages(order)
        assign_packages(packages, 0.2, 0.2)
        dropped = drop_repeats(packages)
        texts = make_texts(packages)
        made.append(write_corpus(packages, texts, tmp_path / "c", dropped))
    assert made[0] == made[1]


def test_its_splits_are_those_of_the_data(found, tmp_path):
    packages = read_packages(found)
    assign_packages(packages, 0.2, 0.2)
    about = write_corpus(packages, make_texts(packages), tmp_path / "c", 0)
    config = ExperimentConfig(
        data=DataConfig(path=str(tmp_path / "c/texts"), cache_dir=str(tmp_path / "k"))
    )
    for split in SPLITS:
        counts = make_dataset(config, split).info["splits"][split]
        assert counts["documents"] == about["splits"][split]["files"]


def test_shares_that_no_package_fits_are_refused(found):
    with pytest.raises(DataError, match="no package is as small"):
        assign_packages(read_packages(found), 0.2, 0.01)


def test_what_is_installed_here_makes_a_corpus(tmp_path, monkeypatch, capsys):
    module = "experiments.shared.python_corpus"
    monkeypatch.setattr(f"{module}.LONGEST", 4000)  # a few megabytes
    monkeypatch.setattr(f"{module}.stdlib_files", lambda: ())
    assert main(["--out", str(tmp_path), "--valid", "0", "--test", "0.04"]) == 0
    assert "packages" in capsys.readouterr().out
    about = json.loads((tmp_path / "corpus.json").read_text())
    assert about["packages"]["pytest"][0] == pytest.__version__
    assert about["splits"]["test"]["packages"] >= 3
    assert main(["--out", str(tmp_path), "--test", "0.0000001"]) == 2
    assert capsys.readouterr().err.startswith("corpus: no package is as small")


def test_a_list_makes_the_same_corpus_whatever_else_is_installed(
    found, tmp_path, monkeypatch, capsys
):
    here = list(found)
    monkeypatch.setattr("experiments.shared.python_corpus.installed", lambda: here)
    first = build(tmp_path / "first", 0.2, 0.2)
    listed = tmp_path / "packages.json"
    listed.write_bytes((tmp_path / "first" / "corpus.json").read_bytes())
    # More packages move the shares, and here one has what another's file has.
    for number in range(30, 40):
        folder = tmp_path / f"site/p{number}"
        folder.mkdir()
        text = "".join(f"more_{number}_{line} = {line}\n" for line in range(90))
        (folder / "own.py").write_text(text)
        (folder / "same.py").write_text((tmp_path / "site/p1/own.py").read_text())
        files = {f"a{number}/{f.name}": f for f in folder.iterdir()}
        here.insert(0, (f"a{number}", "2.0", files))
    assert build(tmp_path / "other", 0.2, 0.2)["splits"] != first["splits"]
    again = build(tmp_path / "again", listed=listed)
    assert again == first
    for split in SPLITS:
        texts = [tmp_path / f / "texts" / f"{split}.jsonl" for f in ("first", "again")]
        assert texts[0].read_bytes() == texts[1].read_bytes()

    args = ["--out", str(tmp_path / "new"), "--packages", str(listed)]
    file = tmp_path / "site/p7/own.py"
    before = file.read_text()
    file.write_text(before.replace("value_7_1 ", "value_7_x "))
    assert main(args) == 2
    said = capsys.readouterr().err
    split = first["packages"]["p7"][1]
    assert f"have other files here: {split} would differ" in said
    file.write_text(before)
    here[:] = [(n, "9" if n == "p3" else v, f) for n, v, f in here if n != "p5"]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "p3==1.0 (here 9), p5==1.0 (missing); install these" in said
    assert said.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", '{"packages": {"a": ["1", "tset"]}}', '{"packages": {"a": 1}}'],
)
def test_what_is_no_list_of_packages_is_refused(content, tmp_path, capsys):
    file = tmp_path / "packages.json"
    args = ["--out", str(tmp_path / "c"), "--packages", str(file)]
    assert main(args) == 2
    assert "packages.json doesn't exist; give" in capsys.readouterr().err
    file.write_text(content)
    assert main(args) == 2
    said = capsys.readouterr().err
    assert "isn't a corpus.json" in said and said.count("\n") == 1


def test_the_list_of_experiment_012_is_of_the_texts_of_its_results():
    folder = Path(__file__).parents[2] / "experiments" / "e012_evidence"
    about = json.loads((folder / "packages.json").read_text())
    for split, counts in about["splits"].items():
        mine = [p for p in about["packages"].values() if p[1] == split]
        assert len(mine) == counts["packages"] and len(counts["sha256"]) == 64
