"""009: pruning keeps what writes most, and the study compares equal FLOPs."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments.e009_real_model.prune import Prune, narrower, prune_params
from experiments.e009_real_model.run import join
from experiments.e009_real_model.study import Scale, entries, write_texts
from experiments.e009_real_model.table import plot, table
from experiments.shared.part import Part
from tests.compare import assert_close
from uoe_jax.config import ModelConfig
from uoe_jax.decompose.plan import Cut
from uoe_jax.decompose.split import union_config
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import flat_params, make_model, with_params

SMOL = ModelConfig(
    vocab_size=49_152, max_seq_len=8192, d_model=576, d_ff=1536, num_layers=30,
    num_heads=9, num_kv_heads=3, head_dim=64, activation="swiglu",
)  # fmt: skip
SMALL = ModelConfig(
    vocab_size=61, max_seq_len=32, d_model=16, d_ff=24, num_layers=3, num_heads=6,
    num_kv_heads=3, head_dim=4, activation="swiglu",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model(SMALL, jax.random.key(3))


@pytest.fixture
def batch(rng):
    tokens = rng.integers(0, 61, (4, 16)).astype(np.int32)
    return {"tokens": tokens, "segments": np.ones_like(tokens)}


def logits_of(config, params, batch):
    return np.asarray(with_params(config, params, {})(batch["tokens"])[0])


def test_nothing_pruned_changes_nothing(model, batch):
    params = flat_params(model)
    wanted = Prune(d_ff=24, num_kv_heads=3, refit=False)
    pruned = prune_params(model, params, wanted, batch)
    assert pruned.keys() == params.keys()
    for name, array in pruned.items():
        assert array.tobytes() == np.asarray(params[name]).tobytes(), name


def test_neurons_and_heads_that_write_nothing_are_pruned_for_nothing(model, batch, rng):
    params = dict(flat_params(model))
    for layer in range(3):  # silence other ones in each layer
        quiet = rng.permutation(24)[:8]
        w_down = np.array(params["trunk.blocks.0.mlp.w_down"])
        w_down[layer, 0, quiet] = 0
        params["trunk.blocks.0.mlp.w_down"] = w_down
        wo = np.array(params["trunk.blocks.0.attention.wo"])
        wo[layer, 0, rng.integers(3)] = 0
        params["trunk.blocks.0.attention.wo"] = wo
    silent = with_params(SMALL, params, {})
    for refit in (False, True):
        wanted = Prune(d_ff=16, num_kv_heads=2, refit=refit)
        pruned = prune_params(silent, params, wanted, batch)
        small = narrower(SMALL, wanted)
        assert (small.num_heads, small.num_kv_heads, small.d_ff) == (4, 2, 16)
        before = logits_of(SMALL, params, batch)
        assert_close(logits_of(small, pruned, batch), before, 1e-4)


def test_a_refit_brings_the_last_layer_closer(model, batch):
    params = flat_params(model)
    found = {}
    for refit in (False, True):
        wanted = Prune(d_ff=12, refit=refit)
        pruned = prune_params(model, params, wanted, batch)
        small = narrower(SMALL, wanted)
        difference = logits_of(small, pruned, batch) - logits_of(SMALL, params, batch)
        found[refit] = np.linalg.norm(difference)
    assert found[True] < found[False]


def test_models_are_compared_at_the_same_flops():
    listed = {entry.name: entry for entry in entries(SMOL, Scale())}
    assert [*listed][:4] == [
        "dense", "union 12 of 16", "union 12 of 16, taught", "pruned to 75%"
    ]  # fmt: skip
    cost = lambda model: flops_per_token(model, 1024).forward
    for on, share in ((12, "75%"), (8, "50%")):
        for heads in ("", ", heads too"):
            cut, cut_plain = (
                listed[f"union {on} of 16{heads}"].made,
                listed[f"union {on} of 16{heads}"].plain,
            )
            assert isinstance(cut, Cut) and cut.refit and cut.shared == 4
            assert not cut_plain.refit and cut_plain.shared == 0
            union = union_config(
                SMOL, 16, cut.chosen, cut.parts, cut.attention_experts, cut.shared
            )
            pruned = narrower(SMOL, listed[f"pruned to {share}{heads}"].made)
            # Routers cost something; routed heads see fewer keys.
            assert abs(cost(union) / cost(pruned) - 1) < 0.05
    assert listed["union 12 of 16, taught"].taught
    assert abs(Scale().steps * 32 * 1024 - 20e6) < 2e5
    assert Scale().steps % 4 == 0


def test_texts_are_split_by_article_and_by_file(tmp_path):
    lines = [json.dumps({"title": str(i), "text": f"article {i}\n"}) for i in range(60)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    write_texts(tmp_path / "a.jsonl", tmp_path / "texts", most=60)
    read = lambda name: [
        json.loads(line)["text"]
        for line in (tmp_path / "texts" / name).read_text().splitlines()
    ]
    assert read("wikipedia/valid.jsonl") == [f"article {i}\n" for i in (18, 38, 58)]
    mixed, held = read("mix/train.jsonl"), read("mix/valid.jsonl")
    assert not set(mixed) & set(held)
    assert set(read("python/valid.jsonl")) <= set(held)
    # Of every 20 one article is left alone.
    assert not {f"article {i}\n" for i in (19, 39, 59)} & (set(mixed) | set(held))


def test_what_is_there_becomes_a_table_and_a_picture():
    loss = lambda x: {"wikipedia": x, "python": x + 1}
    entry = {
        "flops_share": 0.75, "at_once": loss(3.0), "plain_at_once": loss(4.0),
        "curve": {"5000000": loss(2.5)}, "train_tokens_per_second": 1e5,
        "decode_tokens_per_second": {"1": 300.0},
    }  # fmt: skip
    results = {"entries": {"union": entry, "later": {}}, "model": "m", "device": "d"}
    text = table(results)
    assert "after 5M" in text and "2.5000 / 3.5000" in text and "300 (1)" in text
    assert plot(results).startswith(b"\x89PNG")
    assert table({"entries": {}})
    assert dataclasses.is_dataclass(Scale())


def test_parts_share_the_models_and_their_results_are_joined():
    assert Part.parse("1/1").file == "results.json"
    assert Part.parse("2/3").file == "results-2.json"
    for wrong in ("0/2", "3/2", "1", "a/b"):
        with pytest.raises((ValueError, TypeError)):
            Part.parse(wrong)
    results = {"entries": {"dense": {"done": True}}, "steps": 4}
    join(results, {"entries": {"dense": {"speed": 2.0}, "union": {}}, "steps": 4})
    assert results["entries"] == {"dense": {"done": True, "speed": 2.0}, "union": {}}
