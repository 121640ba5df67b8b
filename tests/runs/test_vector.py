"""Vectors of JSON: algebra, order, bits, capacity, and what is refused."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError, DataError
from uoe_jax.runs.binding import HadamardOperators, MatrixOperators, Operators
from uoe_jax.runs.decode import Codebook
from uoe_jax.runs.leaves import leaves_of, parse_path, show_path
from uoe_jax.runs.vector import JsonVector

DIM = 1024
NOISE = 5 / DIM**0.5
ENCODER = JsonVector(DIM)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.text(max_size=8)
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)  # fmt: skip


class Commutative(Operators):
    """A control: binding by signs, which forgets which key is outside."""

    def bind(self, steps, starts, x):
        keys, y = HadamardOperators(self.dim), x.copy()
        for step, a, b in zip(steps, starts[:-1], starts[1:], strict=True):
            y[a:b] *= keys._key(str(step)).first
        return y


def cosine(a, b, encoder=ENCODER):
    u, v = encoder.encode_many([a, b])
    return float(u @ v)


@pytest.mark.parametrize(
    "operators", [HadamardOperators(256), MatrixOperators(256)], ids=["fast", "haar"]
)
@pytest.mark.parametrize("step", ["key", "ключ", 0, 5, -1])
def test_matrices_are_orthogonal(operators, step):
    bound = operators.bind([step], [0, 256], np.eye(256, dtype=np.float32))
    assert np.abs(bound @ bound.T - np.eye(256)).max() < 1e-5
    assert np.abs(operators.unbind(step, bound) - np.eye(256)).max() < 1e-5


def test_positions_are_powers_of_one_matrix():
    fast = HadamardOperators(256)
    x = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    third = x
    for _ in range(3):
        third = fast.bind([0], [0, 3], third)
    assert (fast.bind([2], [0, 3], x) == third).all()


def test_rows_of_several_keys_are_bound_as_alone():
    fast = HadamardOperators(256)
    x = np.random.default_rng(1).normal(size=(5, 256)).astype(np.float32)
    steps, starts = ["a", 3, "b", 0], [0, 1, 2, 4, 5]
    together = fast.bind(steps, starts, x)
    for step, a, b in zip(steps, starts[:-1], starts[1:], strict=True):
        assert (together[a:b] == fast.bind([step], [0, b - a], x[a:b])).all()


@settings(max_examples=25, deadline=None)
@given(value=JSON, seed=st.integers(0, 99))
def test_vectors_have_length_one_and_know_no_order_of_keys(value, seed):
    def shuffled(x):
        if isinstance(x, dict):
            keys = list(x)
            np.random.default_rng(seed).shuffle(keys)
            return {k: shuffled(x[k]) for k in keys}
        return [shuffled(i) for i in x] if isinstance(x, list) else x

    try:
        vector = ENCODER.encode(value)
    except DataError as error:  # two keys that are one after NFC
        assert "twice" in str(error)
        return
    assert (ENCODER.encode(shuffled(value)) == vector).all()
    assert abs(float(vector @ vector) - 1) < 1e-4


def test_a_reversed_list_is_another_and_as_a_set_the_same():
    items = ["red", "green", "blue", "white"]
    assert cosine(items, items[::-1]) < 0.3
    sets = ENCODER.as_set("colours")
    one, other = sets.encode_many([{"colours": items}, {"colours": items[::-1]}])
    assert (one == other).all()
    assert cosine({"colours": items}, {"colours": items[::-1]}) < 0.3


def test_nesting_has_an_order_and_commuting_keys_have_none():
    a, b = {"a": {"b": 1}}, {"b": {"a": 1}}
    assert abs(cosine(a, b)) < NOISE
    assert cosine(a, b, JsonVector(DIM, operators=Commutative(DIM))) > 0.999


@pytest.mark.parametrize(
    ("a", "b"),
    [(True, 1), ("1", 1), ([], {}), (None, "null"), (False, 0), ([1], 1),
     (float("nan"), float("inf")), (2**60, float(2**60)), ("a", ["a"])],
)  # fmt: skip
def test_values_of_other_kinds_are_not_alike(a, b):
    assert abs(cosine({"x": a}, {"x": b})) < NOISE


def test_equal_values_written_otherwise_are_equal():
    for a, b in [(1, 1.0), (-0.0, 0), ("\u00e9", "e\u0301"), ((1, 2), [1, 2])]:
        assert (ENCODER.encode({"x": a}) == ENCODER.encode({"x": b})).all()
    assert (ENCODER.encode({"\u00e9": 1}) == ENCODER.encode({"e\u0301": 1})).all()


def test_bits_are_the_same_in_every_process():
    code = (
        "import hashlib; from uoe_jax.runs.vector import JsonVector;"
        "value = {'a': [1, 'two', None, {'b': 0.3}], 'c': 'some words', 'd': True};"
        "print(hashlib.sha256(JsonVector(256).encode(value).tobytes()).hexdigest())"
    )
    found = set()
    for seed in ("0", "1", "4242"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=_env(seed), capture_output=True, text=True
        )
        found.add(done.stdout.strip())
    value = {"d": True, "c": "some words", "a": [1, "two", None, {"b": 0.3}]}
    here = hashlib.sha256(JsonVector(256).encode(value).tobytes()).hexdigest()
    assert found == {here}


def _env(seed):
    import os

    return os.environ | {"PYTHONHASHSEED": seed}


def test_alone_and_in_a_batch_are_the_same_bits():
    values = [{"a": i, "b": [str(i), {"c": i / 7}]} for i in range(40)]
    together = JsonVector(256).encode_many(values)
    for value, row in zip(values, together, strict=True):
        assert (JsonVector(256).encode(value) == row).all()


@pytest.mark.parametrize("number", ["fourier", "thermometer"])
@pytest.mark.parametrize("sign", [1, -1])
def test_numbers_further_apart_are_less_alike(number, sign):
    encoder = JsonVector(4096, number=number)
    near = [cosine({"x": sign * 1e-3}, {"x": sign * 1e-3 * r}, encoder)
            for r in (1, 1.5, 8, 1000)]  # fmt: skip
    assert near[0] > 0.999 and all(np.diff(near) <= 0.02) and near[-1] < near[1] - 0.02
    if number == "fourier":
        # exp(-d^2 / 2) for numbers d doublings apart.
        twice = cosine({"x": 0.3}, {"x": 0.6}, encoder)
        assert abs(twice - np.exp(-0.5)) < 0.05


def test_shares_near_one_are_told_apart():
    beta = lambda x: {"optim": {"beta2": x}}
    assert cosine(beta(0.95), beta(0.999)) < 0.1 < 0.9 < cosine(beta(0.95), beta(0.94))
    seed = lambda x: {"train": {"seed": x}}
    assert abs(cosine(seed(1), seed(2))) < NOISE


def test_half_of_a_text_is_its_words():
    text = "the quick brown fox"
    assert 0.3 < cosine({"t": text}, {"t": "quick the fox brown"}) < 0.9
    assert abs(cosine({"t": text}, {"t": "something else entirely here"})) < NOISE


def decode_accuracy(encoder, depth, leaves, objects=20):
    """Share of leaves read back among 1,000 values, all below `depth` keys."""
    draw = np.random.default_rng(depth)
    values = [f"v{i}" for i in range(1000)]
    codes = np.stack([encoder.value("text", v) for v in values])
    right = 0
    for _ in range(objects):
        chosen = draw.integers(1000, size=leaves)
        outer = [f"outer {d}" for d in range(depth - 1)]
        paths = [(*outer, f"key {j}") for j in range(leaves)]
        tree = {path[-1]: values[c] for path, c in zip(paths, chosen, strict=True)}
        for key in reversed(outer):
            tree = {key: tree}
        vector = encoder.encode(tree)
        for path, c in zip(paths, chosen, strict=True):
            right += np.argmax(codes @ encoder.unbind(vector, path)[0]) == c
    return right / (objects * leaves)


def test_sixteen_leaves_are_read_back_from_1024_dimensions():
    assert decode_accuracy(ENCODER, 1, 16) >= 0.99


def test_orthogonal_matrices_read_deep_leaves_that_gaussian_ones_lose():
    gaussian = MatrixOperators(128, orthogonal=False)
    rough = decode_accuracy(JsonVector(128, operators=gaussian), 4, 8)
    assert decode_accuracy(JsonVector(128), 4, 8) - rough >= 0.4
    assert decode_accuracy(JsonVector(128, exact=True), 4, 8) - rough >= 0.4


def test_lengths_stay_one_through_twelve_keys():
    value = 1
    for i in range(12):
        value = {f"k{i}": value}
    bound = ENCODER._bind(ENCODER.leaves(value))
    assert abs(np.linalg.norm(bound) - 1) < 1e-5


def test_a_changed_copy_is_found_among_a_thousand():
    draw = np.random.default_rng(7)

    def config():
        return {
            "optim": {"rate": float(10 ** draw.uniform(-5, -1)), "kind": _one(draw)},
            "model": {f"m{i}": int(2 ** draw.integers(1, 12)) for i in range(8)},
            "tags": [_one(draw) for _ in range(3)],
        }

    configs = [config() for _ in range(1000)]
    encoder = JsonVector(DIM)
    index, right = encoder.encode_many(configs), 0
    for i in range(0, 1000, 5):
        changed = {**configs[i], "optim": {**configs[i]["optim"], "kind": "new"}}
        changed["model"] = {**changed["model"], "m3": 3}
        right += int(np.argmax(index @ encoder.encode(changed))) == i
    assert right / 200 >= 0.95


def _one(draw):
    return str(draw.choice(["adam", "sgd", "lion", "muon"]))


def test_values_are_read_back_by_path():
    value = {"optim": {"rate": 0.003, "kind": "adam"}, "layers": [4, 8],
             "tags": ["a", "b", "c"], "note": None, "on": True, "odd": []}  # fmt: skip
    other = {"optim": {"rate": 0.1, "kind": "sgd"}, "layers": [2, 16, 9], "on": False}
    encoder = JsonVector(4096)
    book = Codebook(encoder, [value, other])
    vector = encoder.encode(value)
    assert book.get(vector, "optim.kind").value == "adam"
    assert book.get(vector, "tags[1]").value == "b"
    assert book.get(vector, "layers[1]").value == 8
    assert book.get(vector, "layers.#len").value == 2
    assert book.get(vector, "on").value is True
    assert book.get(vector, "odd").value == []
    rate = book.get(vector, ("optim", "rate"))
    assert abs(np.log2(rate.value / 0.003)) < 0.15
    assert rate.cosine > 0.2 and rate.margin > 3 / 64
    assert book.get(vector, "note").value is None
    assert book.get(vector, "optim.nothing") is None
    assert book.get(vector, "nothing.at.all") is None


def test_thermometers_are_read_back_too():
    encoder = JsonVector(4096, number="thermometer",
                         thresholds={("x",): (1, 2, 4, 8, 16)})  # fmt: skip
    book = Codebook(encoder, [{"x": 1, "y": "a"}, {"x": 16, "y": "b"}])
    found = book.get(encoder.encode({"x": 5, "y": "a"}), "x").value
    assert 4 <= found < 8


def test_the_papers_form_makes_each_object_a_unit():
    value = {"big": {str(i): i for i in range(30)}, "small": "x"}
    nested, flat = JsonVector(DIM, weights="paper"), JsonVector(DIM)
    changed = {**value, "small": "y"}
    # One of two units differs, not one of 31 leaves.
    assert abs(cosine(value, changed, nested) - 0.5) < NOISE
    assert cosine(value, changed, flat) > 0.9
    leaf = {"a": 3}
    assert np.abs(nested.encode(leaf) - flat.encode(leaf)).max() < 1e-6
    thermometer = JsonVector(DIM, weights="paper", number="thermometer",
                             thresholds={("a", "b"): (1, 2, 3)})  # fmt: skip
    assert cosine({"a": {"b": 1.5}}, {"a": {"b": 1.7}}, thermometer) > 0.999


def test_weights_say_what_counts():
    weighted = JsonVector(DIM, weights={("a",): 1.0, ("b",): 0.0})
    assert cosine({"a": 1, "b": "x"}, {"a": 1, "b": "y"}, weighted) > 0.999


def deep(levels):
    value = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "part"),
    [
        (deep(1000), "64 levels"),
        ("x" * (10 << 20), "10,485,760 characters"),
        ({1: 2}, "JSON's keys are strings"),
        ({"a": {2, 3}}, "a is a set"),
        ({"\u00e9": 1, "e\u0301": 2}, "twice"),
        ([0] * 100_001, "100,000 leaves"),
    ],
)
def test_what_cannot_be_encoded_is_refused_in_one_line(value, part):
    with pytest.raises(DataError) as caught:
        ENCODER.encode(value)
    assert part in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"dim": 1000}, "power of two"),
        ({"dim": True}, "power of two"),
        ({"number": "roman"}, "fourier or thermometer"),
        ({"weights": "heavy"}, "equal, paper"),
    ],
)
def test_encoders_that_cannot_be_are_refused(options, part):
    with pytest.raises(ConfigError, match=part):
        JsonVector(**options)


@settings(max_examples=25, deadline=None)
@given(value=JSON)
def test_leaves_are_sorted_and_paths_can_be_shown(value):
    try:
        found = leaves_of({"x": value})
    except DataError:
        return
    assert all(isinstance(show_path(leaf.path), str) for leaf in found)
    assert len({(l.path, l.kind, l.value) for l in found}) == len(found)
    assert parse_path("a.b[3].c") == ("a", "b", 3, "c")


def test_the_room_gives_its_public_names_without_jax():
    code = (
        "import sys; from uoe_jax.runs import JsonVector, RunIndex;"
        "import uoe_jax.runs;"
        "assert {'JsonVector', 'RunIndex'} <= set(dir(uoe_jax.runs));"
        "assert not hasattr(uoe_jax.runs, 'Absent');"
        "print(JsonVector(64).encode({'a': 1}).shape, 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["(64,)", "False"]
