"""A corpus of installed source: packages are held out whole, nothing is there twice."""

import json

import pytest

from experiments.shared.python_corpus import (
    assign_packages,
    drop_repeats,
    main,
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
    about = write_corpus(packages, tmp_path / "corpus", 2)
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
        made.append(write_corpus(packages, tmp_path / "c", drop_repeats(packages)))
    assert made[0] == made[1]


def test_its_splits_are_those_of_the_data(found, tmp_path):
    packages = read_packages(found)
    assign_packages(packages, 0.2, 0.2)
    about = write_corpus(packages, tmp_path / "c", drop_repeats(packages))
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
