"""Tables that can be read in two ways are refused in one line that says how."""

import enum

import numpy as np
import pytest
from sklearn.base import clone

from uoe_jax.data.entries import read_entries, read_pairs
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.linalg.completion import MatrixCompleter, Solver, complete

LINES = [(f"u{i % 7}", f"m{i % 5}", f"{1 + i % 4}.5") for i in range(35)]


def table(tmp_path, header, row, name="ratings.csv"):
    """Write a table; `row` makes a line of a user, an item and a rating."""
    lines = [row(*line) for line in LINES]
    file = tmp_path / name
    file.write_text("\n".join([header, *lines] if header else lines) + "\n")
    return file


@pytest.mark.parametrize(
    ("header", "row", "name", "places"),
    [
        ("user,rating,item,rating", "{u},{r},{m},9", "rating", "2 and 4"),
        ("user,user,rating", "{u},{m},{r}", "user", "1 and 2"),
        ("user,item,Rating,rating,x", "{u},{m},{r},9,9", "Rating", "3 and 4"),
        ("id,id,rating", "{u},{m},{r}", "id", "1 and 2"),
    ],
)
@pytest.mark.parametrize("asked", [False, True])
def test_two_columns_of_one_name_are_refused(
    tmp_path, header, row, name, places, asked
):
    file = table(tmp_path, header, lambda u, m, r: row.format(u=u, m=m, r=r))
    names = header.split(",")
    columns = (
        [n for n in dict.fromkeys(names) if n.lower() != "x"][:3] if asked else None
    )
    if columns and len(columns) < 3:
        columns.insert(1, name)
    with pytest.raises(DataError) as error:
        read_entries(file, columns)
    said = str(error.value)
    assert f"2 columns called {name!r}, {places}; say which" in said
    assert "--columns 1,2,3" in said
    by_number = ",".join(str(1 + names.index(n)) for n in names[:2]) + ",3"
    if header == "user,item,Rating,rating,x":
        assert len(read_entries(file, by_number).values) == 35


def test_pairs_with_two_columns_of_one_name_are_refused(tmp_path):
    ids = np.array(["u0", "m0"], np.dtypes.StringDType())
    file = table(tmp_path, "user,item,item", lambda u, m, r: f"{u},{m},x")
    with pytest.raises(DataError, match="2 columns called 'item', 2 and 3"):
        read_pairs(file, ids, ids)


@pytest.mark.parametrize(
    ("word", "delimiter", "decimal"),
    [("1.234,5", ";", None), ("1.234,5", ";", ","), ("1.234.567", ";", None),
     ("1,234.5", ";", None), ("1 234,5", ";", None), ("1'234.5", ";", None),
     ("-12.345.678,25", ";", ","), ("1\u202f234,5", ";", None)],
)  # fmt: skip
def test_marks_of_thousands_are_named(tmp_path, word, delimiter, decimal):
    mark = decimal or "."
    row = lambda u, m, r: delimiter.join(
        (u, m, word if u == "u3" else r.replace(".", mark))
    )
    file = table(tmp_path, delimiter.join(("user", "item", "rating")), row)
    with pytest.raises(DataError) as error:
        read_entries(file, decimal=decimal)
    said = str(error.value)
    assert f"line 5: column 'rating' holds {word!r}, whose thousands are marked" in said


@pytest.mark.parametrize("word", ["abc", "1.2.3", "12,34,5", "1.23,4"])
def test_what_is_no_number_at_all_is_still_called_so(tmp_path, word):
    row = lambda u, m, r: f"{u};{m};{word if u == 'u3' else r}"
    with pytest.raises(DataError, match="it must be numbers"):
        read_entries(table(tmp_path, "user;item;rating", row))


@pytest.mark.parametrize("header", ["user,item,rating", "'user','item','rating'", None])
@pytest.mark.parametrize(
    "row", ["'{u}','{m}','{r}'", "'{u}','a, {m}',{r}", "{u},{m},'{r}'"]
)
def test_single_quotes_are_named(tmp_path, header, row):
    file = table(tmp_path, header, lambda u, m, r: row.format(u=u, m=m, r=r))
    with pytest.raises(DataError, match="has fields in single quotes, such as '"):
        read_entries(file)


def test_an_apostrophe_inside_a_name_is_no_quote(tmp_path):
    row = lambda u, m, r: f"'t {u},o'{m}',{r}"
    assert len(read_entries(table(tmp_path, "user,item,rating", row)).values) == 35


class Name(enum.Enum):
    """Solvers as an enum's members."""

    EXACT = "exact"


class Word(enum.StrEnum):
    """The same, which are texts."""

    EXACT = "exact"


@pytest.mark.parametrize(
    "solver", [Solver("exact"), Name.EXACT, Word.EXACT, np.str_("exact")]
)
def test_a_solver_is_taken_whole_or_by_any_name(solver):
    rng = np.random.default_rng(0)
    X = rng.integers(0, 9, (120, 2))
    y = rng.normal(size=120)
    options = {"rank": 2, "ridge": 0.5, "iters": 4}
    plain = MatrixCompleter(solver="exact", **options).fit(X, y)
    other = MatrixCompleter(**options).set_params(solver=solver).fit(X, y)
    np.testing.assert_array_equal(other.predict(X), plain.predict(X))


def test_a_solvers_own_settings_are_used():
    rng = np.random.default_rng(0)
    X, y = rng.integers(0, 9, (120, 2)), rng.normal(size=120)
    options = {"rank": 2, "ridge": 0.5, "iters": 2, "holdout": 0.0}
    one, many = (
        clone(MatrixCompleter(solver=Solver("cg", max_steps=n), **options)).fit(X, y)
        for n in (1, 50)
    )
    assert not np.allclose(one.predict(X), many.predict(X), rtol=0, atol=1e-6)


@pytest.mark.parametrize("solver", ["exakt", 5, None, b"exact", Solver])
def test_what_is_no_solver_is_refused_in_one_line(solver):
    X, y = np.array([[0, 0], [1, 1], [0, 1]]), np.array([1.0, 2.0, 3.0])
    with pytest.raises(ConfigError, match="solver is ") as error:
        MatrixCompleter().set_params(solver=solver).fit(X, y)
    assert len(str(error.value).splitlines()) == 1


def test_complete_takes_them_too():
    rows, cols = np.array([0, 1, 2, 0, 1]), np.array([0, 1, 2, 1, 2])
    values = np.array([1.0, 2.0, 3.0, 4.0, 5.0])
    options = {"rank": 1, "ridge": 0.5, "iters": 2}
    plain = complete(rows, cols, values, solver="exact", **options)
    for solver in (Word.EXACT, Solver("exact")):
        found = complete(rows, cols, values, solver=solver, **options)
        np.testing.assert_array_equal(found.u, plain.u)
