"""Splits share no content and cuts fall between articles, lines or characters."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.data.split import assign_splits, find_articles, find_cut, hash_fraction

KEYS = st.lists(st.integers(0, 60), min_size=3, max_size=80)
FRACTIONS = st.sampled_from([0.0, 0.05, 0.2])


def fractions_of(keys):
    return np.array([hash_fraction(str(k).encode()) for k in keys])


@given(keys=KEYS, valid=FRACTIONS, test=FRACTIONS)
@settings(max_examples=100, deadline=None)
def test_equal_content_is_in_one_split(keys, valid, test):
    splits = assign_splits(np.full(len(keys), -1), fractions_of(keys), valid, test)
    for key in set(keys):
        assert len({s for s, k in zip(splits, keys, strict=True) if k == key}) == 1


@given(keys=KEYS, valid=FRACTIONS, test=FRACTIONS)
@settings(max_examples=100, deadline=None)
def test_every_split_asked_for_gets_something(keys, valid, test):
    splits = assign_splits(np.full(len(keys), -1), fractions_of(keys), valid, test)
    wanted = {0} | ({1} if valid else set()) | ({2} if test else set())
    assert set(splits.tolist()) <= wanted
    if len(set(keys)) >= 3:
        assert set(splits.tolist()) == wanted


def test_fractions_are_met_by_many_documents():
    keys = fractions_of(range(20_000))
    splits = assign_splits(np.full(20_000, -1), keys, 0.05, 0.1)
    share = np.bincount(splits) / 20_000
    # Binomial: standard deviation at most 0.0021; five of them.
    assert np.allclose(share, [0.85, 0.05, 0.1], atol=0.0106)


@given(keys=st.sets(st.integers(0, 10_000), min_size=40, max_size=80))
@settings(max_examples=50, deadline=None)
def test_a_new_document_moves_no_old_one(keys):
    # With half the documents in valid and test no split falls short of its one.
    keys = sorted(keys)
    free = np.full(len(keys), -1)
    before = assign_splits(free[:-1], fractions_of(keys[:-1]), 0.3, 0.3)
    after = assign_splits(free, fractions_of(keys), 0.3, 0.3)
    assert np.array_equal(before, after[:-1])


def test_named_splits_are_kept_and_get_nothing_else():
    given_splits = np.array([2, 2] + [-1] * 50)
    splits = assign_splits(given_splits, fractions_of(range(52)), 0.1, 0.5)
    assert (splits == 2).tolist() == [True, True] + [False] * 50
    assert (splits[2:] == 1).any()


@given(
    text=st.lists(st.sampled_from(["word ", "é", "\n", "\n\n", "漢"]), max_size=300),
    share=st.floats(0, 1),
)
@settings(max_examples=150, deadline=None)
def test_a_cut_breaks_no_character(text, share):
    data = "".join(text).encode()
    cut = find_cut(data, find_articles(data), int(len(data) * share))
    assert data[:cut].decode() + data[cut:].decode() == data.decode()
    assert int(len(data) * share) <= cut <= len(data)


def test_a_cut_prefers_articles_then_lines():
    data = b"a line\n" * 100 + b"\n" + b"other lines\n" * 100
    articles = find_articles(data)
    assert articles.tolist() == [0, 701]
    assert find_cut(data, articles, 680) == 701
    assert find_cut(data, articles, 705) == 713
    assert find_cut(data, articles, 7) == 7
    assert find_cut(b"abcdef", np.zeros(1, np.int64), 3) == 3


def test_extracted_wiki_articles_end_at_their_tags():
    page = b'<doc id="1" title="x">\nx\n\nText.\n\nMore.\n\n</doc>\n'
    assert find_articles(page * 3).tolist() == [0, len(page), 2 * len(page)]
