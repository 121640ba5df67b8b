"""ListOps: the evaluator, the generator, and the file of published labels."""

import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.data.tasks.check import check_labels, main
from uoe_jax.data.tasks.listops import (
    END,
    OPERATORS,
    ListOpsRules,
    evaluate,
    generate,
    to_words,
)
from uoe_jax.errors import DataError

SHORT = ListOpsRules(min_length=4, max_length=40)


def value_of(tree):
    """An oracle on nested lists, written apart from the evaluator's stack."""
    if isinstance(tree, int):
        return tree
    name, *rest = tree
    values = [value_of(t) for t in rest]
    if name == "[MED":
        return int(np.floor(np.median(values)))
    if name == "[SM":
        return int(np.sum(values)) % 10
    if name in ("[FIRST", "[LAST"):
        return values[0 if name == "[FIRST" else -1]
    return {"[MIN": min, "[MAX": max}[name](values)


def text_of(tree):
    if isinstance(tree, int):
        return str(tree)
    return " ".join([tree[0], *map(text_of, tree[1:]), END])


TREES = st.recursive(
    st.integers(0, 9),
    lambda inner: st.tuples(
        st.sampled_from(OPERATORS), st.lists(inner, min_size=1, max_size=5)
    ).map(lambda pair: (pair[0], *pair[1])),
    max_leaves=30,
)


@given(TREES)
def test_values_are_those_of_the_tree(tree):
    assert evaluate(text_of(tree)) == value_of(tree)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 3 9 4 ]", 4),
        ("[SM 9 8 7 ]", 4),
        ("( ( [MIN 4 ) [MAX 2 1 ] )".replace(")", ") ").replace("  ", " ") + " ]", 2),
        ("[FIRST [LAST 1 2 ] 9 ]", 2),
    ],
)
def test_known_expressions(text, value):
    assert evaluate(text) == value


@pytest.mark.parametrize("text", ["", "1 2", "[MIN ]", "[MIN 1", "1 ]", "[SUM 1 ]"])
def test_what_is_no_expression_is_refused(text):
    with pytest.raises(DataError, match="ListOps token"):
        evaluate(text)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 2**31))
def test_generated_labels_are_the_values(seed):
    made = generate(60, seed, SHORT)
    rows = np.split(made.tokens, made.starts[1:-1])
    words = [to_words(row) for row in rows]
    assert [evaluate(row) for row in words] == made.labels.tolist()
    assert all(SHORT.min_length < len(row) < SHORT.max_length for row in rows)
    assert len({row.tobytes() for row in rows}) == len(rows) == 60


def test_more_expressions_begin_with_the_same_ones():
    few, many = generate(20, 3, SHORT), generate(50, 3, SHORT)
    end = few.starts[-1]
    assert np.array_equal(few.tokens, many.tokens[:end])
    assert np.array_equal(few.labels, many.labels[:20])
    assert not np.array_equal(many.labels, generate(50, 4, SHORT).labels)


def test_published_lengths_and_arguments():
    made = generate(40, 0)
    lengths = np.diff(made.starts)
    assert lengths.min() > 500 and lengths.max() < 2000
    seen = {w for w in to_words(made.tokens) if w[0] == "["}
    assert seen == {"[MIN", "[MAX", "[MED", "[SM"}
    for row in np.split(made.tokens, made.starts[1:-1])[:10]:
        depth = deepest = 0
        for word in to_words(row):
            depth += (word[0] == "[") - (word == END)
            deepest = max(deepest, depth)
        assert deepest < 10  # the tenth level holds digits only


def test_rules_that_allow_too_few_say_so():
    with pytest.raises(DataError, match="not 1000"):
        generate(1000, 0, ListOpsRules(min_length=2, max_length=5, max_args=2))


def test_labels_of_a_file_are_checked_line_by_line(tmp_path, capsys):
    made = generate(30, 1, SHORT)
    rows = np.split(made.tokens, made.starts[1:-1])
    lines = [
        f"{label}\t{' '.join(to_words(row))}"
        for row, label in zip(rows, made.labels, strict=True)
    ]
    good, bad = tmp_path / "good.tsv.xz", tmp_path / "bad.tsv"
    good.write_bytes(lzma.compress("\n".join(lines).encode()))
    assert check_labels(good)[:2] == (30, [])
    assert main([str(good)]) == 0
    lines[4] = f"{(made.labels[4] + 1) % 10}{lines[4][1:]}"
    bad.write_text("\n".join(lines))
    assert check_labels(bad)[1] == [5]
    assert main([str(bad)]) == 1
    assert "29 labels agree, 1 differ" in capsys.readouterr().out
    bad.write_text("no label\n")
    assert main([str(bad)]) == 2
    assert "line 1" in capsys.readouterr().err
