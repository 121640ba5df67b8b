"""Entries are read from whatever users have; what can't be is named by its line."""

import bz2
import csv
import gzip
import io
import lzma
import random
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from uoe_jax.data.entries import read_entries, read_pairs
from uoe_jax.errors import ConfigError, DataError

CASES = Path(__file__).parent / "cases"
ROWS = [(36, 16, 2.5), (6, 10, 3.0), (30, 13, 1.5), (6, 16, -4.0), (7, 10, 0.5)]


def triplets(table):
    """The entries in their order, by the file's own ids."""
    rows, cols = table.row_ids[table.rows], table.col_ids[table.cols]
    return list(zip(rows.tolist(), cols.tolist(), table.values.tolist(), strict=True))


def lines(delimiter=",", decimal=".", header="user,item,rating", extra=None, end="\n"):
    """ROWS as a text."""
    text = [header.replace(",", delimiter)] if header else []
    for number, (row, col, value) in enumerate(ROWS):
        fields = [str(row), str(col), str(value).replace(".", decimal)]
        text.append(delimiter.join(fields + ([extra(number)] if extra else [])))
    return end.join(text) + end


def stamp(number):
    return str(978300760 + number)


TEXTS = {
    "commas": lines(),
    "no header": lines(header=""),
    "no line end at the end": lines().rstrip("\n"),
    "semicolons": lines(";"),
    "decimal commas": lines(";", ","),
    "decimal commas, no header": lines(";", ",", ""),
    "decimal commas, tabs": lines("\t", ","),
    "decimal commas in quotes": lines(';', '.').replace(";", ",").replace(
        "2.5", '"2,5"').replace("3.0", '"3,0"').replace("1.5", '"1,5"').replace(
        "-4.0", '"-4,0"').replace("0.5", '"0,5"'),
    "tabs": lines("\t"),
    "bars": lines("|", header=""),
    "two colons": lines("::", header="", extra=stamp),
    "two colons, header": lines("::"),
    "blanks": lines(" ", header=""),
    "blanks in runs": lines("   ").replace("36", "  36").replace("2.5", "2.5  "),
    "a blank after each comma": lines(", "),
    "time beside": lines(header="user,item,rating,ts", extra=stamp),
    "time beside, no header": lines(header="", extra=stamp),
    "dates beside, no header": lines(header="", extra=lambda n: f"2005-09-0{n + 1}"),
    "MovieLens": lines("\t", header="", extra=stamp),
    "RecBole": lines("\t", header="user_id:token,item_id:token,rating:float"),
    "quotes": '"User-ID";"ISBN";"Book-Rating"\n' + "".join(
        f'"{a}";"{b}";"{c}"\n' for a, b, c in ROWS),
    "CRLF": lines(end="\r\n"),
    "CR": lines(end="\r"),
    "empty lines": lines(end="\n\n"),
    "lines of blanks": lines().replace("\n", "\n   \n", 3),
    "comments": "# made by hand\n% twice\n" + lines(),
    "names in a comment": "# rating user item\n" + "".join(
        f"{c} {a} {b}\n" for a, b, c in ROWS),
    "a spreadsheet's hint": "sep=;\n" + lines(";", ","),
    "R's row names": '"user" "item" "rating"\n' + "".join(
        f'"{n + 1}" {a} {b} {c}\n' for n, (a, b, c) in enumerate(ROWS)),
    "delimiters at the lines' ends": lines().replace("\n", ",\n").replace(
        "rating,", "rating"),
    "pandas' index": ",user,item,rating\n" + "".join(
        f"{n},{a},{b},{c}\n" for n, (a, b, c) in enumerate(ROWS)),
    "genres": "userId,movieId,rating,genres\n" + "".join(
        f"{a},{b},{c},Action|Comedy|Drama\n" for a, b, c in ROWS),
    "rating first": "rating,user_id,movie_id\n" + "".join(
        f"{c},{a},{b}\n" for a, b, c in ROWS),
    "rating first, odd names": "score,foo,bar\n" + "".join(
        f"{c},{a},{b}\n" for a, b, c in ROWS),
    "item first": "Rating,MovieID,UserID\n" + "".join(
        f"{c},{b},{a}\n" for a, b, c in ROWS),
    "time first": "timestamp,rating,itemId,userId\n" + "".join(
        f"{n},{c},{b},{a}\n" for n, (a, b, c) in enumerate(ROWS)),
    "unknown names": lines(header="who,what,much"),
    "ids as floats": "user,item,rating\n" + "".join(
        f"{a}.0,{b}.0,{c}\n" for a, b, c in ROWS),
    "exponents": "user,item,rating\n" + "".join(
        f"{a},{b},{c:.3e}\n" for a, b, c in ROWS),
}  # fmt: skip


@pytest.mark.parametrize("kind", TEXTS)
def test_texts_of_all_kinds_hold_the_same_entries(kind, tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_bytes(TEXTS[kind].encode())
    assert triplets(read_entries(path)) == ROWS


@pytest.mark.parametrize(
    "encoding",
    ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"],
)
def test_encodings_are_found_out(encoding, tmp_path):
    path = tmp_path / "ratings.csv"
    text = "user,item,rating\nJosé,Crème,2.5\nZoë,Crème,3\n"
    path.write_bytes(text.encode(encoding))
    assert triplets(read_entries(path)) == [
        ("José", "Crème", 2.5),
        ("Zoë", "Crème", 3.0),
    ]


def zipped(content, *others):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as packed:
        packed.writestr("ml/ratings.csv", content)
        for name in others:
            packed.writestr(name, "x")
    return file.getvalue()


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        *[(f"r{end}", bytes) for end in (".csv", ".tsv", ".dat", ".data", ".txt", "")],
        ("u.data", bytes),
        ("RATINGS.CSV", bytes),
        ("r.csv.gz", gzip.compress),
        ("r.gz", gzip.compress),
        ("r.csv", gzip.compress),  # what it is, its content says
        ("r.csv.bz2", bz2.compress),
        ("r.dat.xz", lzma.compress),
        ("r.zip", zipped),
        ("ml.zip", lambda c: zipped(c, "ml/README", "ml/tags.csv", "__MACOSX/._r")),
        ("r.zip.gz", lambda c: gzip.compress(zipped(c))),
    ],
)
def test_endings_and_packers(name, pack, tmp_path):
    path = tmp_path / name
    path.write_bytes(pack(lines("\t").encode()))
    assert triplets(read_entries(path)) == ROWS


def test_a_packed_file_that_is_several_or_damaged_is_named(tmp_path):
    path = tmp_path / "two.zip"
    with zipfile.ZipFile(path, "w") as packed:
        packed.writestr("a.csv", lines())
        packed.writestr("b.csv", lines())
    with pytest.raises(DataError, match=r"2 files \(a.csv, b.csv\)"):
        read_entries(path)
    whole = gzip.compress(lines().encode())
    for name, content in {"cut.gz": whole[:-9], "none.gz": b"user,item"}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} can't be read as .gz"):
            read_entries(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "book.xlsx", "w") as packed:
        packed.writestr("[Content_Types].xml", "<x/>")
    with pytest.raises(DataError, match="spreadsheet"):
        read_entries(tmp_path / "book.xlsx")
    (tmp_path / "a.csv").write_text('{"user": 1, "item": 2}\n')
    with pytest.raises(DataError, match="JSON"):
        read_entries(tmp_path / "a.csv")
    with pytest.raises(DataError, match="is a folder"):
        read_entries(tmp_path)


@pytest.mark.parametrize(
    ("ids", "want"),
    [
        (["9", "-3", "10"], [-3, 9, 10]),
        (["18446744073709550245", "9223372036854775808", "1"],
         [1, 2**63, 18446744073709550245]),
        ([" 18446744073709550245", "1", "2"], [1, 2, 18446744073709550245]),
        (["u9", "u10", "7"], ["7", "u10", "u9"]),
        (["007", "7", "12"], ["007", "12", "7"]),  # 007 isn't 7
        (["-1", "18446744073709551615", "0"], ["-1", "0", "18446744073709551615"]),
        (["99999999999999999999", "1", "2"], ["1", "2", "99999999999999999999"]),
        (["NA", "DE", "FR"], ["DE", "FR", "NA"]),  # Namibia
        (['"a,b"', '"say ""x"""', "c"], ["a,b", "c", 'say "x"']),
        (['"two\nlines"', "b", "c"], ["b", "c", "two\nlines"]),
        (["b4b7c2", "12e5", "x"], ["12e5", "b4b7c2", "x"]),
        (["Ö", "a", "Z"], ["Z", "a", "Ö"]),
        (["  a", "a  ", "b"], ["a", "b"]),
    ],
)  # fmt: skip
def test_ids_are_numbers_or_text(ids, want, tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("user,item,rating\n" + "".join(f"{i},1,2.5\n" for i in ids))
    table = read_entries(path)
    assert table.row_ids.tolist() == want
    kept = [next(csv.reader(io.StringIO(i)))[0].strip() for i in ids]
    assert [str(i) for i in table.row_ids[table.rows].tolist()] == kept


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_any_ids_survive_any_delimiter(tmp_path_factory, data):
    delimiter = data.draw(st.sampled_from([",", ";", "\t", "|"]))
    letters = st.text(st.sampled_from("abcÄ09-_.'# \"," + delimiter), min_size=1)
    names = st.one_of(st.integers().map(str), letters.map(lambda s: "x" + s.strip()))
    ids = data.draw(st.lists(st.tuples(names, names), min_size=1, max_size=20))
    values = np.round(np.random.default_rng(len(ids)).normal(size=len(ids)), 3).tolist()
    quote = lambda s: '"' + s.replace('"', '""') + '"'
    path = tmp_path_factory.mktemp("any") / "r.csv"
    path.write_text(
        delimiter.join(("user", "item", "rating")) + "\n" + "".join(
            delimiter.join([quote(a), quote(b), repr(v)]) + "\n"
            for (a, b), v in zip(ids, values, strict=True)
        )
    )  # fmt: skip
    found = triplets(read_entries(path, delimiter=delimiter))
    assert [(str(a), str(b)) for a, b, _ in found] == ids
    assert [v for *_, v in found] == values


HEADERS = [
    ("user", "item", "rating"),
    ("User-ID", "ISBN", "Book-Rating"),
    ("customer_id", "product_id", "score"),
    ("rows", "cols", "vals"),
    ("USERS", "ITEMS", "RATINGS"),
]
IDS = {
    "numbers": lambda draw: str(draw.randint(-50, 50)),
    "large": lambda draw: str(2**64 - draw.randint(1, 50)),
    "codes": lambda draw: draw.choice(["0195153448", "034545104X", "0060973129"]),
    "names": lambda draw: draw.choice(["José", "Zoë_Ä", "Bob", "u7"]),
}


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", "::", " "])
@pytest.mark.parametrize("kind", IDS)
def test_quirks_of_all_sorts_together(delimiter, kind, tmp_path):
    for seed in range(15):
        draw = random.Random(f"{delimiter}{kind}{seed}")
        rows = [
            (IDS[kind](draw), f"B{draw.randint(0, 30)}", f"{draw.uniform(-9, 9):.2f}")
            for _ in range(draw.choice([1, 2, 30]))
        ]
        comma = delimiter != "," and draw.random() < 0.5
        header = list(draw.choice(HEADERS)) if draw.random() < 0.5 else None
        order = draw.sample(range(3), 3) if header else [0, 1, 2]
        text = [[line[place] for place in order] for line in [header, *rows] if line]
        if draw.random() < 0.5:
            text = [[*line, str(978300760 + k)] for k, line in enumerate(text)]
            if header:
                text[0][3] = "timestamp"
        if comma:
            text = [[cell.replace(".", ",") for cell in line] for line in text]
        if delimiter != "::" and draw.random() < 0.5:
            text = [[f'"{cell}"' for cell in line] for line in text]
        end = draw.choice(["\n", "\r\n", "\n\n"])
        content = end.join(map(delimiter.join, text)) + draw.choice(["", end])
        encoding = draw.choice(["utf-8", "utf-8-sig", "latin-1", "utf-16", "utf-32"])
        pack = draw.choice([bytes, gzip.compress, bz2.compress, lzma.compress])
        path = tmp_path / draw.choice(["r.csv", "r.dat", "r.txt.gz.old", "r"])
        path.write_bytes(pack(content.encode(encoding)))
        found = [(str(a), b, c) for a, b, c in triplets(read_entries(path))]
        assert found == [(a, b, float(c)) for a, b, c in rows], (seed, content[:200])


ARRAYS = {
    "int16": (np.int16, np.float32),
    "uint64": (np.uint64, np.float64),
    "big-endian": (">i4", ">f8"),
    "whole floats": (np.float32, np.int8),
    "text": ("U8", "S8"),
    "bytes": ("S8", np.float64),
    "long doubles": (np.int64, np.longdouble),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_npz_and_npy_of_all_kinds(kind, tmp_path):
    of_ids, of_values = ARRAYS[kind]
    whole = [(a, b, round(2 * c)) for a, b, c in ROWS]
    rows, cols, values = (np.array(c) for c in zip(*whole, strict=True))
    arrays = {"rating": values.astype(of_values)}
    arrays |= {"item": cols.astype(of_ids), "user": rows.astype(of_ids)}
    np.savez_compressed(tmp_path / "r.npz", **arrays)
    fields = np.rec.fromarrays(list(arrays.values()), names=list(arrays))
    np.save(tmp_path / "r.npy", fields)
    for name in ("r.npz", "r.npy"):
        assert triplets(read_entries(tmp_path / name)) == whole


def test_arrays_of_rows_and_matrices(tmp_path):
    path = tmp_path / "r.npy"
    many = [*ROWS, (1, 2, 3.0)]
    np.save(path, np.array(many))
    table = read_entries(path)
    assert triplets(table) == many and "a row of the array" in table.notes[0]
    np.save(path, np.array(many).astype(str))
    assert [v for *_, v in triplets(read_entries(path))] == [v for *_, v in many]
    np.savez(tmp_path / "xy.npz", X=np.array(many)[:, :2], y=np.array(many)[:, 2])
    assert triplets(read_entries(tmp_path / "xy.npz")) == many
    dense = np.array(
        [[1.5, np.nan, 2.0], [np.nan, np.nan, 3.0], [np.nan] * 3, [0, 1, 2]]
    )
    np.save(path, dense)
    table = read_entries(path)
    assert (len(table.row_ids), len(table.col_ids), len(table.values)) == (4, 3, 6)
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(DataError, match="can't be read as .npy"):
        read_entries(path)
    with pytest.raises(DataError, match="no columns"):
        read_entries(CASES / "sparse.npz", "user,item,rating")


@pytest.mark.parametrize("kind", ["csr", "csc", "coo", "bsr", "dia"])
@pytest.mark.parametrize("made", [scipy.sparse.coo_matrix, scipy.sparse.coo_array])
def test_sparse_matrices_of_scipy(kind, made, tmp_path):
    draw = np.random.default_rng(0)
    dense = np.where(draw.random((7, 5)) < 0.4, draw.integers(1, 6, (7, 5)), 0)
    dense[2] = 0
    scipy.sparse.save_npz(tmp_path / "s.npz", made(dense).asformat(kind))
    table = read_entries(tmp_path / "s.npz")
    found = np.zeros((len(table.row_ids), len(table.col_ids)))
    found[table.rows, table.cols] = table.values
    np.testing.assert_array_equal(found, dense)
    scipy.io.mmwrite(tmp_path / "s.mtx", made(dense))
    assert len(read_entries(tmp_path / "s.mtx").values) == len(table.values)


def test_a_sparse_matrix_that_is_mostly_empty_keeps_rows_that_occur(tmp_path):
    at = ([5, 1_999_999_999], [1, 0])
    matrix = scipy.sparse.coo_matrix(([3.0, 2.0], at), shape=(2_000_000_000, 2))
    scipy.sparse.save_npz(tmp_path / "s.npz", matrix)
    table = read_entries(tmp_path / "s.npz")
    assert triplets(table) == [(5, 1, 3.0), (1_999_999_999, 0, 2.0)]
    assert len(table.row_ids) == 2


def test_a_stored_zero_is_an_entry(tmp_path):
    matrix = scipy.sparse.csr_matrix(([0.0, 2.0], ([0, 1], [1, 0])), shape=(2, 2))
    scipy.sparse.save_npz(tmp_path / "s.npz", matrix)
    assert sorted(read_entries(tmp_path / "s.npz").values) == [0.0, 2.0]
    scipy.sparse.save_npz(tmp_path / "s.npz", matrix * 1j)
    with pytest.raises(DataError, match="complex128"):
        read_entries(tmp_path / "s.npz")


def test_parquet_columns_of_all_kinds(tmp_path):
    rows, cols, values = zip(*ROWS, strict=True)
    texts = [f"u{r}" for r in rows]
    kinds = [
        (pa.array(rows, pa.uint64()), pa.array(cols, pa.int8()), pa.float32()),
        (pa.array(texts).dictionary_encode(), pa.array(map(str, cols)), pa.float64()),
        (
            pa.array(texts, pa.large_string()),
            pa.array(cols, pa.float64()),
            pa.float64(),
        ),
        (
            pa.array([str(r).encode() for r in rows]),
            pa.array(cols),
            pa.decimal128(4, 2),
        ),
    ]
    for user, item, kind in kinds:
        value = pa.array(values).cast(kind)
        columns = {"rating": value, "item": item, "time": value, "user": user}
        parquet.write_table(pa.table(columns), tmp_path / "r.parquet", row_group_size=2)
        found = triplets(read_entries(tmp_path / "r.parquet"))
        assert [int(str(a).strip("u")) for a, *_ in found] == list(rows)
        assert [(int(b), c) for _, b, c in found] == [(b, c) for _, b, c in ROWS]
    for name, array in (
        ("rating", pa.array([1.0, None])),
        ("user", pa.array([1, None])),
        ("user", pa.array([1, 2], pa.timestamp("s"))),
        ("user", pa.array([b"\xff1", b"\xff2"])),
        ("user", pa.array([b"\xff1", b"\xff2"], pa.large_binary())),
    ):
        columns = {"user": [1, 2], "item": [1, 2], "rating": [1.0, 2.0], name: array}
        parquet.write_table(pa.table(columns), tmp_path / "r.parquet")
        with pytest.raises(
            DataError, match=f"{name}.*(entry 2|timestamp|UTF-8)|entry 2.*{name}"
        ):
            read_entries(tmp_path / "r.parquet")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user,item,rating\n1,2,3\n\n1,3,\n", ["line 4", "'rating'", "missing"]),
        ("user,item,rating\n1,2,3\n1,3,NA\n", ["line 3", "nan", "left out"]),
        ("# c\nuser,item,rating\n1,2,3\n1,3,inf\n", ["line 4", "inf"]),
        ("1,2,3\n1,3,good\n", ["line 2", "'good'", "numbers"]),
        ("user,item,rating\n1,2,3\n,3,4\n", ["line 3", "'user'", "missing"]),
        ("user,item,rating\n1,2,3\n1,nan,4\n", ["line 3", "'item'", "missing"]),
        ("user,item,rating\n1,2,3\n1.5,3,4\n", ["line 3", "1.5", "--columns"]),
        ("user,item,rating\n1,2,3\n1,2\n1,2,3\n", ["line 3", "2 fields", "line 1"]),
        ("user;item;rating\n1;2;1.234,5\n", ["line 2", "1.234,5"]),
        ('user,item,rating\n1,2,"1,234"\n', ["thousands", "--decimal"]),
        ('user,item,rating\n"a\nb",2,3\nc,3,x\n', ["line 4", "'x'"]),
        ("user,item,rating\n", ["no entries"]),
        ("1,2\n3,4\n", ["only columns", "implicit"]),
        ("1^2^3\n3^4^5\n", ["one column", "--delimiter"]),
        ("1,2,978300760,3\n3,4,978300761,5\n", ["--columns"]),
        ("978300760,1,2,3.5\n978300761,4,5,2.5\n", ["--columns"]),
        ("user,item,rating\nnan,2,3\n", ["line 2", "'user'", "missing"]),
        ("2005-09-01,36,16,3\n2005-09-02,6,10,4\n", ["--columns"]),
        ("978300760,1,2,3\n978300761,4,5,2\n", ["--columns"]),
        ("1,2,one,3\n3,4,two,5\n", ["--columns"]),
        ("foo,user,bar\n1,2,3\n", ["--columns"]),
        ("a,b,c,d\n1,2,3,4\n", ["--columns"]),
        ("\n\n  \n", ["empty"]),
        ("\ufeff", ["empty"]),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_their_line(text, words, tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read_entries(path)
    said = str(caught.value)
    assert all(word in said for word in words) and "\n" not in said


def test_columns_by_name_and_by_number(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text(
        "t,stars,who,what\n" + "".join(f"9,{c},{a},{b}\n" for a, b, c in ROWS)
    )
    for columns in (
        "who,what,stars",
        "3,4,2",
        ["who", "what", "stars"],
        "who, 4,stars",
    ):
        assert triplets(read_entries(path, columns)) == ROWS
    path.write_text("".join(f"9;{c};{a};{b}\n" for a, b, c in ROWS))
    assert triplets(read_entries(path, "3,4,2")) == ROWS
    for columns, error, words in (
        ("0,1,2", DataError, "counted from 1"),
        ("1,2,5", DataError, "no column 5"),
        ("1,2", ConfigError, "give three"),
        ("1,2,2", ConfigError, "twice"),
        ("who,2,3", DataError, "no column 'who'"),
    ):
        with pytest.raises(error, match=words):
            read_entries(path, columns)


def test_what_sniffing_cannot_know_can_be_said(tmp_path):
    path = tmp_path / "r.csv"
    path.write_text("".join(f"{a}^{b}^{c}\n" for a, b, c in ROWS))
    assert triplets(read_entries(path, delimiter="^")) == ROWS
    path.write_text("user\titem\trating\n1\t2\t1,234\n")
    assert read_entries(path, delimiter="tab", decimal=",").values.tolist() == [1.234]
    with pytest.raises(DataError, match="line 2.*'1,234'"):
        read_entries(path, decimal=".")
    for options in ({"delimiter": "x"}, {"delimiter": ""}, {"decimal": "?"}):
        with pytest.raises(ConfigError, match=next(iter(options))):
            read_entries(path, **options)


def test_pairs_are_looked_up_by_the_users_own_ids(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("movie_id,user_id\n10,u6\n99,u7\n10,v\n")
    ids = np.array(["u6", "u7"], np.dtypes.StringDType())
    pairs = read_pairs(path, ids, np.array([10, 16]), ("user_id", "movie_id", "rating"))
    assert pairs.rows.tolist() == [0, 1, -1] and pairs.cols.tolist() == [0, -1, 0]
    assert pairs.row_ids.tolist() == ["u6", "u7", "v"]
    path.write_text("36 16\n6 10\n")
    big = np.array([6, 36, 2**64 - 1], np.uint64)
    assert read_pairs(path, big, np.array([10, 16])).rows.tolist() == [1, 0]
    path.write_text("user,item\n1,\n")
    with pytest.raises(DataError, match="line 2.*'item' is missing"):
        read_pairs(path, big, big)


CASE_ENTRIES = {
    "date_noheader.csv": 711,
    "euro.csv": 119,
    "implicit_ones.csv": 711,
    "ml1m_colons.csv": 120,
    "order_rating_first.csv": 711,
    "semi_noheader.csv": 20,
    "sparse.npz": 711,
    "strings.csv": 119,
    "tiny20.csv": 20,
    "u64.csv": 119,
}


def test_files_that_users_had_are_read_whole():
    sizes = {n: len(read_entries(CASES / n).values) for n in CASE_ENTRIES}
    assert sizes == CASE_ENTRIES
    table = read_entries(CASES / "order_rating_first.csv")
    assert triplets(table)[0] == (36, 16, 3.0) and set(table.values) == {1, 2, 3, 4, 5}
    assert read_entries(CASES / "u64.csv").row_ids.min() == 18446744073709550000
    with pytest.raises(
        DataError, match="line 9: 'rating'.*what is unknown is left out"
    ):
        read_entries(CASES / "missing_rating.csv")
