"""The control of a union: a plain dense model of its FLOPs, within stated bounds."""

import dataclasses
import json

import jax
import pytest

from uoe_jax.bench.sizes import SIZES
from uoe_jax.bench.train import bench_train
from uoe_jax.bench.union import CONTROL, _mlp, _smha
from uoe_jax.config import LayerWidths, UnionConfig, UnionOverrides
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.presets import PRESETS, as_control, dense_control, get_preset
from uoe_jax.validation import validate

UNIONS = sorted(
    name for name in PRESETS if {"union"} & {*get_preset(name).model.attention}
)


def by_part(model, length):
    return flops_per_token(model, length).parts


@pytest.mark.parametrize("name", UNIONS)
def test_products_cost_the_same_and_scores_a_share_more(name):
    config = get_preset(name)
    union, control = config.model, dense_control(config.model)
    assert control.attention == control.mlp == ("dense",)
    validate(as_control(config))
    length = config.seq_len if union.kind == "decoder" else union.num_image_tokens
    ours, theirs = by_part(union, length), by_part(control, length)
    scores = [parts.pop("attention scores") for parts in (ours, theirs)]
    router = ours.pop("routers")
    assert "routers" not in theirs
    # All presets' heads and neurons divide: products of weights are equal.
    assert abs(sum(ours.values()) - sum(theirs.values())) < 1
    keep = union.union_for("attention").keep
    assert scores[0] < scores[1] <= scores[0] / keep + 1
    total = sum(ours.values()) + scores[0] + router
    ratio = (sum(theirs.values()) + scores[1]) / total
    assert 1 - router / total <= ratio <= 1 + ((1 / keep - 1) * scores[0] + 1) / total


def test_the_control_of_1b_union_is_half_of_its_heads_and_mlp():
    dense, union = get_preset("1b").model, get_preset("1b-union").model
    control = dense_control(union)
    assert control.num_heads == control.num_kv_heads == dense.num_heads // 2
    assert control.d_ff == dense.d_ff // 2
    # As it was measured by hand on an H200: 12% more FLOPs a token, by its scores.
    flops = [flops_per_token(m, 8192).training for m in (control, union)]
    assert 1.11 < flops[0] / flops[1] < 1.13


def test_layers_that_are_dense_and_heads_that_share_keys_are_counted():
    model = get_preset("7b-union").model
    assert model.num_query_groups == 4
    control = dense_control(model)
    assert (control.num_heads, control.num_kv_heads) == (16, 4)
    mixed = dataclasses.replace(
        model,
        attention=("dense", "union"),
        mlp=("union", "dense", "dense", "dense"),
        union_attention=UnionOverrides(num_experts=4, top_k=1),
    )
    control = dense_control(mixed)
    assert control.num_kv_heads == round(8 * (1 + 1 / 4) / 2)
    assert control.d_ff == round(14_336 * (1 / 2 + 3) / 4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": ("moh", "union")}, "moh layers"),
        ({"attention": ("moba",), "mlp": ("union", "moe")}, "moba layers and moe"),
        ({"union": UnionConfig(shared_kv=True)}, "shared_kv"),
        ({"widths": LayerWidths(d_ff=(8,) * 24)}, "layers of other widths"),
    ],
)
def test_a_model_whose_share_is_another_has_no_control(changes, said):
    model = dataclasses.replace(get_preset("1b-union").model, **changes)
    with pytest.raises(ConfigError, match=f"with {said}.* has no dense control"):
        dense_control(model)


def test_a_control_that_fails_leaves_the_unions_row(tmp_path, monkeypatch):
    from benchmarks import bench_train

    def time_step(config, *rest):
        if config.name.endswith("-control"):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")
        names = ("milliseconds", "tokens_per_second", "teraflops", "mfu")
        return dict.fromkeys((*names, "temporary_gigabytes", "compile_seconds"), 1.0)

    monkeypatch.setattr(bench_train, "time_step", time_step)
    out = tmp_path / "record.json"
    monkeypatch.setattr("sys.argv", ["bench_train.py", "tiny-union", "--out", str(out)])
    bench_train.main()
    (row,) = json.loads(out.read_text())["results"]
    assert row["tokens_per_second"] == 1.0
    assert row["control"]["failed"] == "RESOURCE_EXHAUSTED: out of memory"


def test_layers_are_timed_beside_their_control():
    sizes = SIZES["small"]
    for make, cases in ((_mlp, sizes.mlp), (_smha, sizes.smha)):
        programs = make(cases[0], sizes.dtype)
        assert [p.labels["name"] for p in programs] == ["dense", "union", CONTROL]
        sizes_of = [sum(a.size for a in leaves(p.args[0])) for p in programs]
        assert sizes_of[2] < 0.8 * sizes_of[0]


def leaves(tree):
    return jax.tree.leaves(tree)


def test_a_unions_steps_are_timed_beside_its_controls():
    train = (("tiny", 8, 16), ("tiny-union", 8, 16))
    sizes = dataclasses.replace(SIZES["small"], train=train)
    rows = list(bench_train(sizes, 1))
    names = ["tiny", "tiny-union", "tiny-union-control"]
    assert [row.name for row in rows] == names
    assert all(row.milliseconds > 0 for row in rows)
