"""An article is the unit of the split: whole, and in one part only."""

import json
import lzma

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data import prepare
from uoe_jax.data.split import SPLITS

# Repeats are likely; none has the zero byte that ends a document.
ARTICLES = st.lists(
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1),
    min_size=5,
)


def parts(path, folder, **data):
    """Return the articles of each split as prepared."""
    data = {"valid_fraction": 0.2, "test_fraction": 0.2} | data
    config = ExperimentConfig(
        data=DataConfig(path=str(path), cache_dir=str(folder / "cache"), **data)
    )
    prepared, found = prepare(config), {}
    for split in SPLITS:
        tokens = np.asarray(prepared.array(split, "tokens")).astype(np.uint8)
        starts = prepared.array(split, "starts").tolist()
        pieces = zip(starts, starts[1:], strict=False)
        found[split] = [tokens[a : b - 1].tobytes().decode() for a, b in pieces]
    return found


@given(articles=ARTICLES)
@settings(max_examples=40, deadline=None)
def test_no_article_is_cut_or_in_two_parts(articles, tmp_path_factory):
    if len(set(articles)) < 4:
        return  # so few are cut, that each split gets some
    folder = tmp_path_factory.mktemp("articles")
    path = folder / "articles.jsonl"
    path.write_text("".join(json.dumps({"text": a}) + "\n" for a in articles))
    found = parts(path, folder)
    assert sorted(sum(found.values(), [])) == sorted(articles)
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not set(found[one]) & set(found[other])


@pytest.mark.parametrize("name", ["articles.jsonl", "articles.jsonl.xz"])
def test_shares_are_of_articles_and_new_ones_move_none(tmp_path, name):
    articles = [f"article {n} of the tale\n" * (1 + n % 7) for n in range(400)]
    path = tmp_path / name
    opened = lzma.open if name.endswith("xz") else open
    with opened(path, "wt") as file:
        file.writelines(json.dumps({"title": "t", "text": a}) + "\n" for a in articles)
    found = parts(path, tmp_path, valid_fraction=0.05, test_fraction=0.05)
    assert {s: len(a) for s, a in found.items()} == {
        "train": 366, "valid": 20, "test": 14
    }  # fmt: skip
    with opened(path, "at") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    more = parts(
        path, tmp_path, valid_fraction=0.05, test_fraction=0.05, allow_changed=True
    )
    assert all(set(found[split]) <= set(more[split]) for split in SPLITS)
