"""Which columns are ids and which the ratings: by names of many languages, or asked."""

import numpy as np
import pytest

from uoe_jax.data.entries import read_entries
from uoe_jax.errors import DataError

RNG = np.random.default_rng(0)
PLACES = RNG.choice(40 * 30, 60, replace=False)
USERS, ITEMS = 1 + PLACES // 30, 1 + PLACES % 30
RATINGS = RNG.integers(1, 6, 60)  # whole numbers: nothing but the name tells them
RIGHT = sorted(
    (str(u), str(i), float(r)) for u, i, r in zip(USERS, ITEMS, RATINGS, strict=True)
)


def write(path, names, columns, delimiter=",", encoding="utf-8"):
    lines = [*([names] if names else []), *zip(*columns, strict=True)]
    text = "".join(delimiter.join(map(str, line)) + "\n" for line in lines)
    path.write_bytes(text.encode(encoding))
    return path


def triplets(path, **options):
    t = read_entries(path, **options)
    ids = (t.row_ids[t.rows], t.col_ids[t.cols])
    entries = zip(*ids, t.values, strict=True)
    return sorted((str(a), str(b), float(v)) for a, b, v in entries)


NAMES = [
    ("user", "film", "stars"),
    ("Nutzer", "Artikel", "Bewertung"),
    ("kunden_id", "produkt", "Sterne"),
    ("utilisateur", "article", "note"),
    ("client", "livre", "Évaluation"),
    ("usuario", "película", "puntuación"),
    ("usuário", "filme", "avaliação"),
    ("utente", "prodotto", "voto"),
    ("gebruiker", "boek", "beoordeling"),
    ("użytkownik", "książka", "ocena"),
    ("пользователь", "фильм", "оценка"),
    ("kullanıcı", "ürün", "puan"),
    ("用户", "电影", "评分"),
    ("ユーザー", "商品", "評価"),
    ("사용자", "영화", "평점"),
]


@pytest.mark.parametrize("names", NAMES, ids=lambda names: names[2])
def test_names_of_many_languages_are_known_in_any_order(names, tmp_path):
    columns = (USERS, ITEMS, RATINGS)
    encodings = ["utf-8", "utf-8-sig", "utf-16"]
    for order in ([2, 0, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0], [0, 1, 2]):
        path = tmp_path / "r.csv"
        delimiter, encoding = RNG.choice([",", ";", "\t", "|"]), RNG.choice(encodings)
        head = [names[k] for k in order]
        write(path, head, [columns[k] for k in order], delimiter, encoding)
        assert triplets(path) == RIGHT, head


@pytest.mark.parametrize("names", [None, ("quux", "foo", "bar")], ids=["none", "odd"])
def test_ratings_before_ids_are_asked_about(names, tmp_path):
    """In order they would be taken for ids, and ids for ratings."""
    path = tmp_path / "r.csv"
    for order in ([2, 0, 1], [0, 2, 1]):
        columns = [(USERS, ITEMS, RATINGS)[k] for k in order]
        write(path, names, columns)
        with pytest.raises(DataError, match="say which .*--columns user,item,rating"):
            read_entries(path)
        said = ",".join(str(1 + order.index(k)) for k in range(3))
        assert triplets(path, columns=said) == RIGHT
    write(path, names, (USERS, ITEMS, RATINGS))
    assert triplets(path) == RIGHT
    write(path, names, (USERS, ITEMS, RATINGS * 1.5))
    assert len(triplets(path)) == 60


def test_codes_with_an_e_stay_apart(tmp_path):
    """12E4 and 120E3 are the same number and other articles."""
    path = tmp_path / "r.csv"
    codes = [f"{n}E4" if k % 2 else f"{n}0E3" for k, n in enumerate(USERS)]
    write(path, ("user", "item", "rating"), (codes, ITEMS, RATINGS))
    assert set(read_entries(path).row_ids) == set(codes)
    # R writes 100000 so.
    codes = ["1e+05" if k == 3 else n for k, n in enumerate(USERS)]
    write(path, ("user", "item", "rating"), (codes, ITEMS, RATINGS))
    assert 100_000 in read_entries(path).row_ids


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_quotes_after_a_backslash_are_refused(delimiter, tmp_path):
    path = tmp_path / "r.csv"
    names = [f'"the \\"{n}\\" film"' for n in ITEMS]
    write(path, ("user", "item", "rating"), (USERS, names, RATINGS), delimiter)
    with pytest.raises(DataError, match="written twice"):
        read_entries(path)
    # A backslash at the end of a field, or before doubled quotes, is only itself.
    for name in ('"C:\\"', '"a\\b ""c"" d"', "plain\\"):
        names = [name] * 60
        write(path, ("user", "item", "rating"), (USERS, names, RATINGS), delimiter)
        (held,) = read_entries(path).col_ids
        assert held == name.strip('"').replace('""', '"')


def test_a_matrix_market_file_says_where_ids_begin(tmp_path):
    path = tmp_path / "r.mtx"
    entries = zip(USERS, ITEMS, RATINGS, strict=True)
    lines = [f"{u} {i} {r}" for u, i, r in entries]
    head = "%%MatrixMarket matrix coordinate real general\n40 30 60\n"
    path.write_text(head + "\n".join(lines) + "\n")
    table = read_entries(path)
    assert table.notes == ("row 1 of the file is id 0",)
    rows, cols = table.rows + 1, table.cols + 1
    assert {*zip(rows, cols, strict=True)} == {*zip(USERS, ITEMS, strict=True)}
