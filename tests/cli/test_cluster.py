"""`uoe cluster`: tables, files and one line for every bad array."""

import json
import subprocess
import sys

import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.cluster.metrics import accuracy

CENTRES = np.array([[0, 0, 0], [3, 0, 0], [0, 3, 0], [0, 0, 3]])
BAD = np.array([[1.0, 2.0], [np.nan, 3.0]])
GOOD = np.arange(8.0).reshape(4, 2)


@pytest.fixture
def blobs(tmp_path):
    """A file of four blobs, and which blob each point is of."""
    draw = np.random.default_rng(0)
    label = draw.permutation(np.repeat(np.arange(4), [40, 30, 20, 10]))
    points = CENTRES[label] + 0.1 * draw.normal(size=(100, 3))
    path = tmp_path / "blobs.npz"
    np.savez(path, points=points, labels=label)
    return path, label


def test_clusters_are_found_printed_and_written(blobs, tmp_path, capsys):
    path, label = blobs
    assert main(["cluster", str(path)]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert "100 points of 3 numbers; ppp: 4 clusters, found by PPP" in lines[0]
    assert lines[1] == "against labels: ACC 1.000, NMI 1.000, ARI 1.000"
    assert lines[2].split() == ["cluster", "size", "share", "rank"]
    assert [line.split()[:3] for line in lines[4:8]] == [
        [str(n), str(size), f"{size}.0%"] for n, size in enumerate((40, 30, 20, 10))
    ]
    out = tmp_path / "blobs_clusters"
    assert sorted(f.name for f in out.iterdir()) == [
        "clusters.png",
        "labels.npy",
        "report.json",
    ]
    assert accuracy(np.load(out / "labels.npy"), label) == 1.0
    report = json.loads((out / "report.json").read_text())
    assert report["sizes"] == [40, 30, 20, 10] and report["accuracy"] == 1.0
    assert (out / "clusters.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("method", ["ppp", "kmeans", "spectral"])
def test_methods_cluster_the_only_table_of_a_file(method, tmp_path, capsys):
    draw = np.random.default_rng(1)
    label = np.repeat([0, 1], [30, 20])  # two lines through the origin
    points = np.eye(3)[label] * 5 + 0.05 * draw.normal(size=(50, 3))
    path = tmp_path / "lines.npy"
    np.save(path, points)
    words = ["--method", method, "--k", "2", "--json", "--out", str(tmp_path / "o")]
    assert main(["cluster", str(path), *words]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["method"] == method and report["how"] == "given"
    assert report["sizes"] == [30, 20] and "accuracy" not in report
    assert (np.load(tmp_path / "o" / "labels.npy") == label).all()


def test_all_methods_stand_side_by_side(tmp_path, capsys, monkeypatch):
    draw = np.random.default_rng(2)
    label = np.repeat([0, 1], [30, 20])
    points = np.eye(3)[label] * 5 + 0.05 * draw.normal(size=(50, 3))
    path, out = tmp_path / "two.npz", tmp_path / "o"
    np.savez(path, x=points, labels=label.astype("U"))
    words = ["--compare", "--k", "2", "--out", str(out), "--method", "kmeans"]
    assert main(["cluster", str(path), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[-3:] == ["ACC", "NMI", "ARI"]
    rows = {line.split()[0]: line.split() for line in lines[2:6]}
    assert list(rows) == ["ppp", "mlc", "spectral", "kmeans"]
    for method in ("ppp", "spectral", "kmeans"):
        assert rows[method][1:4] == ["2", "30", "20"]
        assert rows[method][-3:] == ["1.000"] * 3
    report = json.loads((out / "report.json").read_text())
    assert report["method"] == "kmeans" and len(report["compared"]) == 4


def test_the_seed_decides_on_starts_and_none_of_ppp(tmp_path, capsys):
    path, out = tmp_path / "cube.npy", tmp_path / "o"
    np.save(path, np.random.default_rng(5).uniform(size=(300, 8)))
    for method, same in (("kmeans", False), ("ppp", True)):
        labels = []
        for seed in ("1", "1", "2"):
            words = ["--method", method, "--k", "9", "--seed", seed, "--out", str(out)]
            assert main(["cluster", str(path), *words, "--json"]) == 0
            assert json.loads(capsys.readouterr().out)["seed"] == int(seed)
            labels.append(np.load(out / "labels.npy"))
        assert (labels[0] == labels[1]).all()
        assert (labels[0] == labels[2]).all() == same


def test_options_are_read_without_jax():
    code = """
import sys
from uoe_jax.cli.cluster import ClusterOptions
assert not {"jax", "flax", "scipy"} & set(sys.modules), "heavy modules"
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("points", [np.ones((5, 3)), np.ones((1, 2)), np.zeros((4, 1))])
def test_points_that_are_all_the_same_are_one_cluster(points, tmp_path, capsys):
    path = tmp_path / "same.npy"
    np.save(path, points)
    for method in ("ppp", "kmeans", "spectral"):
        assert main(["cluster", str(path), "--method", method]) == 0
        assert "1 cluster, found" in capsys.readouterr().out
        assert (np.load(tmp_path / "same_clusters" / "labels.npy") == 0).all()


def test_a_constant_column_changes_nothing(blobs, tmp_path):
    path, _ = blobs
    with np.load(path) as found:
        points = found["points"]
    wider = np.hstack([points, np.full((100, 1), 7.0)])
    np.savez(tmp_path / "wider.npz", points=wider)
    for name in ("blobs", "wider"):
        assert main(["cluster", str(tmp_path / f"{name}.npz")]) == 0
    labels = [
        np.load(tmp_path / f"{n}_clusters/labels.npy") for n in ("blobs", "wider")
    ]
    assert (labels[0] == labels[1]).all()


@pytest.mark.parametrize(
    ("arrays", "words", "wanted"),
    [
        ({"points": BAD}, (), "row 1, column 0 is nan"),
        ({"points": np.array([[{}]])}, (), "points can't be read: it holds Python"),
        ({"points": np.ones(4)}, (), "points have shape [4]"),
        ({"points": np.ones((2, 2, 2))}, (), "points have shape [2, 2, 2]"),
        ({"points": np.ones((0, 2))}, (), "points have shape [0, 2]"),
        ({"points": np.array([["a"]])}, (), "points are of type <U1"),
        ({"a": GOOD, "b": GOOD}, (), "2 arrays of two dimensions: a, b"),
        ({"a": np.ones(3)}, (), "no `points` and no table"),
        ({"points": GOOD, "labels": np.ones(3)}, (), "labels have shape [3]"),
        ({"points": GOOD, "labels": np.full(4, np.nan)}, (), "not finite"),
        ({"points": GOOD}, ("--k", "5"), "k is 5 and there are 4 points"),
        ({"points": np.ones((4, 2))}, ("--k", "2"), "too few different"),
        (
            {"points": np.ones((4, 2))},
            ("--k", "2", "--method", "kmeans"),
            "fewer different values",
        ),
        ({"points": GOOD}, ("--k", "0"), "k is '0'; give a whole number"),
        ({"points": GOOD}, ("--k", "two"), "k is 'two'; give a whole number"),
        ({"points": GOOD}, ("--out", "there.txt"), "is a file; give a folder"),
    ],
)
def test_what_cant_be_clustered_is_one_line(
    arrays, words, wanted, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.txt").write_text("mine")
    np.savez(tmp_path / "bad.npz", **arrays)
    assert main(["cluster", "bad.npz", *words]) == 2
    said = capsys.readouterr()
    assert wanted in said.err and len(said.err.splitlines()) == 1 and not said.out
    assert sorted(f.name for f in tmp_path.iterdir()) == ["bad.npz", "there.txt"]


@pytest.mark.parametrize(
    "content", [b"", b"1,2\n3,4\n", b"PK\3\4 damaged", b"\x93NUMPY"]
)
def test_files_that_hold_no_arrays_are_one_line(content, tmp_path, capsys):
    path = tmp_path / "bad.npz"
    assert main(["cluster", str(path)]) == 2
    assert f"{path} can't be read (No such file" in (said := capsys.readouterr().err)
    assert "give .npz with `points`" in said and len(said.splitlines()) == 1
    assert main(["cluster", str(tmp_path)]) == 2
    assert f"{tmp_path} can't be read (Is a directory); give .npz" in (
        capsys.readouterr().err
    )
    path.write_bytes(content)
    assert main(["cluster", str(path)]) == 2
    said = capsys.readouterr().err
    assert "isn't a readable array file" in said and len(said.splitlines()) == 1


def test_without_matplotlib_labels_are_written_and_a_line_says_so(blobs):
    path, _ = blobs
    code = f"""
import sys
sys.modules["matplotlib"] = None
from uoe_jax.cli import main
raise SystemExit(main(["cluster", {str(path)!r}]))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.startswith("no clusters.png: this needs matplotlib")
    names = sorted(f.name for f in (path.parent / "blobs_clusters").iterdir())
    assert names == ["labels.npy", "report.json"]
