"""`uoe complete` from files: results written, mistakes named in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.complete.command import run_complete
from uoe_jax.complete.options import CompleteArgs
from uoe_jax.complete.read import read_entries
from uoe_jax.errors import DataError
from uoe_jax.linalg.completion import load_factors, predict


@pytest.fixture
def ratings(tmp_path):
    """A rank-2 matrix seen in half its places, ids starting at 10 and 5."""
    draw = np.random.default_rng()
    matrix = 3 + draw.normal(size=(50, 2)) @ draw.normal(size=(2, 40))
    rows, cols = np.nonzero(draw.random(matrix.shape) < 0.5)
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
    for other in others:
        for a, b in zip(other, table, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user,item,rating\n1,2,good\n", "good"),
        ("user,item,rating\nann,2,3\n", "ann"),
        ("user,item,rating\n1.5,2,3\n", "1.5"),
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


def test_bad_files_and_requests_are_named(ratings, tmp_path):
    path, *_ = ratings
    with pytest.raises(DataError, match="doesn't exist"):
        read_entries(tmp_path / "none.csv")
    with pytest.raises(DataError, match=".xlsx"):
        read_entries(Path("x.xlsx"))
    with pytest.raises(DataError, match="did you mean rating"):
        read_entries(path, ("user", "item", "ratin"))
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match="junk.npz"):
        read_entries(tmp_path / "junk.npz")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("--rank=many", "rank is 'many'"),
        ("--holdout=1.0", "holdout is 1.0"),
        ("--solver=exakt", "did you mean exact"),
        ("--ridg=1", "--ridge"),
        ("--rank=99", "50 x 40"),
    ],
)
def test_bad_requests_are_one_line_and_exit_2(option, words, ratings, capsys):
    path, *_ = ratings
    assert main(["complete", str(path), option, "--quiet"]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1
