"""`uoe complete` from files: results written, mistakes named in one line."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.cli import main
from uoe_jax.complete.command import describe, run_complete
from uoe_jax.complete.fit import split
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.data.entries import Table, read_entries
from uoe_jax.errors import DataError
from uoe_jax.linalg.completion import load_factors, predict


@pytest.fixture
def ratings(tmp_path, rng):
    """A rank-2 matrix seen in half its places, ids starting at 10 and 5."""
    matrix = 3 + rng.normal(size=(50, 2)) @ rng.normal(size=(2, 40))
    rows, cols = np.nonzero(rng.random(matrix.shape) < 0.5)
    values = matrix[rows, cols]
    path = tmp_path / "ratings.npz"
    np.savez(path, user=rows + 10, item=cols + 5, rating=values)
    return path, rows, cols, values


def test_command_writes_factors_plot_and_history(ratings, tmp_path):
    path, *_ = ratings
    out = tmp_path / "out"
    args = CompleteArgs(
        file=path, rank="3", ridge=0.02, solver="exact", out=out, holdout=0.2
    )
    assert run_complete(args) == 0
    factors = load_factors(out / "factors.safetensors")
    assert factors.shape == (50, 40)
    assert factors.info["row_ids"][0] == 10
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")
    history = json.loads((out / "history.json").read_text())
    low, high = history["heldout"]["interval95"]
    assert low <= history["heldout"]["rmse"] <= high
    assert history["heldout"]["rmse"] < 0.5  # the values' deviation is near 1.4
    model = predict(factors, np.arange(5), np.arange(5))
    assert np.isfinite(np.asarray(model)).all()


def test_csv_and_parquet_read_like_npz(ratings, tmp_path):
    path, rows, cols, values = ratings
    table = read_entries(path)
    csv = tmp_path / "ratings.csv"
    lines = [
        f"{r + 10},{c + 5},{v!r}"
        for r, c, v in zip(rows, cols, values.tolist(), strict=True)
    ]
    csv.write_text("userId,movieId,rating\n" + "\n".join(lines))
    others = [read_entries(csv)]
    csv.write_text("\n".join(lines))  # no header
    others.append(read_entries(csv))
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    columns = {"a": rows + 10, "b": cols + 5, "c": values}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet")
    others.append(read_entries(tmp_path / "x.parquet", ("a", "b", "c")))
    dense = np.full((50, 40), np.nan)
    dense[rows, cols] = values
    np.savez(tmp_path / "dense.npz", matrix=dense)
    whole = read_entries(tmp_path / "dense.npz")
    np.testing.assert_array_equal(whole.values, table.values)
    assert table.names == ("user", "item", "rating")
    assert others[0].names == ("userId", "movieId", "rating")
    for other in others:
        for a, b in zip(other[:5], table[:5], strict=True):
            np.testing.assert_array_equal(a, b)


def test_ids_keep_all_their_digits(tmp_path):
    path = tmp_path / "long.csv"
    path.write_text("1,9007199254740993,1\n1,9007199254740992,2\n")
    assert read_entries(path).col_ids.tolist() == [2**53, 2**53 + 1]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.2, 0.5]))
@settings(max_examples=25, deadline=None)
def test_a_split_keeps_the_entries_of_a_position_together(seed, holdout):
    draw = np.random.default_rng(seed)
    rows, cols = draw.integers(0, 6, 60), draw.integers(0, 5, 60)
    ids = (np.arange(6), np.arange(5))
    table = Table(rows, cols, draw.normal(size=60), *ids, ("r", "c", "v"))
    parts = split(table, holdout, seed)
    picked = parts[:3]
    assert sorted(np.concatenate(picked).tolist()) == list(range(60))
    places = [set(zip(rows[p], cols[p], strict=True)) for p in picked]
    count = len(set(zip(rows, cols, strict=True)))
    assert parts.repeats == 60 - count
    assert sum(map(len, places)) == count  # so no position is in two parts
    assert len(places[1]) + len(places[2]) == round(holdout * count)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user,item,rating\n1,2,good\n", "good"),
        ("user,item,rating\n1.5,2,3\n", "1.5"),
        ("user,item,rating\ninf,2,3\n", "ids must be integers"),
        ("user,item,rating\n1,2,3\n1,3,nan\n", "entry 2 is nan"),
        ("user,item,rating\n1,2,-inf\n", "entry 1 is -inf"),
        ("time,user,item,unheard\n0,1,2,3\n", "--columns"),
        ("user,item,rating\n", "no entries"),
        ("user,item,rating\n1,2\n", "line 2"),
        ("user,item\n1,2\n", "needs a row"),
        ("", "empty"),
    ],
)
def test_bad_tables_are_named(text, words, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=words) as caught:
        read_entries(path)
    assert "\n" not in str(caught.value)


def test_codes_are_text_and_stars_are_ratings(tmp_path):
    path = tmp_path / "odd.csv"
    path.write_text("time,user,item,stars\n0,1e30,2,3\n")
    found = read_entries(path)
    assert (list(found.row_ids), list(found.col_ids)) == (["1e30"], [2])
    assert list(found.values) == [3] and found.names == ("user", "item", "stars")


def test_bad_files_and_requests_are_named(ratings, tmp_path):
    path, *_ = ratings
    with pytest.raises(DataError, match="doesn't exist"):
        read_entries(tmp_path / "none.csv")
    with pytest.raises(DataError, match=".xlsx"):
        read_entries(Path("x.xlsx"))
    with pytest.raises(DataError, match="did you mean rating"):
        read_entries(path, ("user", "item", "ratin"))
    damaged = {
        "junk.npz": b"junk",
        "empty.npz": b"",
        "cut.npz": path.read_bytes()[:300],
        "text.csv": b"\xff\xfe\x00",
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} can't be read"):
            read_entries(tmp_path / name)
    arrays = {
        "none seen": {"matrix": np.full((2, 2), np.nan)},
        "an infinite one": {"matrix": np.array([[np.inf, 1.0]])},
        "complex": {"row": [0], "col": [0], "value": [1j]},
        "two axes": {"row": [[0]], "col": [0], "value": [1.0]},
        "two lengths": {"row": [0], "col": [0, 1], "value": [1.0]},
    }
    words = ("no entries", "is inf", "complex128", "shape", "lengths")
    for held, word in zip(arrays.values(), words, strict=True):
        np.savez(tmp_path / "bad.npz", **held)
        with pytest.raises(DataError, match=word):
            read_entries(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--rank=many", "rank is 'many'"),
        ("--holdout=1.0", "holdout is 1.0"),
        ("--solver=exakt", "did you mean exact"),
        ("--ridg=1", "--ridge"),
        ("--ridge=-1", "ridge is -1"),
        ("--ridge-power=nan", "ridge-power is nan"),
        ("--rank=99", "50 x 40"),
        ("--rank=0", "rank is 0"),
        ("--iters=0", "iters is 0"),
        ("--seed=-1", "uoe: --seed is -1"),
        ("--holdout=0.0001", "2 held out"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(
    option, words, ratings, capsys, tmp_path, monkeypatch
):
    path, *_ = ratings
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert main(["complete", str(path), option, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_in_the_place_of_the_folder_is_kept(ratings, tmp_path, capsys):
    place = tmp_path / "taken"
    place.write_text("mine")
    args = ["complete", str(ratings[0]), "--out", str(place), "--quiet"]
    assert main(args) == 2
    assert "is a file" in capsys.readouterr().err and place.read_text() == "mine"


def test_what_a_file_holds_is_said_before_the_fit(tmp_path):
    dense = np.full((3, 4), np.nan)
    dense[:2, :3] = 1.0
    np.savez(tmp_path / "m.npz", m=dense)
    table = read_entries(tmp_path / "m.npz")
    lines = describe(Path("m.npz"), table, split(table, 0.0, 0))
    assert "6 entries (m) of a 3 x 4 matrix, 0 held out" in lines[0]
    assert [line.split(" have")[0] for line in lines[1:]] == ["1 rows", "1 columns"]
    twice = table._replace(rows=np.zeros_like(table.rows))
    assert any("3 entries repeat" in s for s in describe(
        Path("m.npz"), twice, split(twice, 0.0, 0)))  # fmt: skip
