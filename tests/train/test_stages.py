"""`train.top_k_warmup_steps`: unions begin with all experts on."""

import dataclasses
import shutil

import numpy as np
import pytest

from tests.compare import assert_close
from tests.train.test_loop import assert_same_bits, lines_of
from tests.train.tiny_runs import with_train
from uoe_jax.config import ModelConfig, UnionConfig, UnionOverrides
from uoe_jax.decompose.runs import Cut, decompose_run
from uoe_jax.errors import ConfigError
from uoe_jax.evaluate import evaluate
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.runs.load import load_run
from uoe_jax.train import loop, train
from uoe_jax.train.stages import STAGES, describe_stages, experts_on, stage_at
from uoe_jax.validation import validate_model


def with_model(config, **model):
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model))


@pytest.fixture
def union(tiny):
    """8 experts in the MLP, 3 of them on; 4 of 4 heads' experts, 2 of them on."""
    config = with_model(
        tiny("union"),
        union=UnionConfig(num_experts=8, top_k=3),
        union_attention=UnionOverrides(num_experts=4, top_k=2),
    )
    return with_train(config, top_k_warmup_steps=9, steps=12, save_every=3)


def counts(config, step):
    model = stage_at(config, step).model
    return model.union_for("mlp").top_k, model.union_for("attention").top_k


def test_stages_go_from_all_down_to_top_k_and_stay_there(union):
    found = [counts(union, step) for step in range(12)]
    assert found[0] == (8, 4) and found[9:] == [(3, 2)] * 3
    assert found == sorted(found, reverse=True)
    assert len(set(found)) <= STAGES + 1
    assert stage_at(union, 9) is union  # exactly what the config says
    assert describe_stages(union) == (
        "experts on for 9 steps: 4, 3, then 2 in attention; 8, 7, 6, 5, then 3 in mlp"
    )
    assert describe_stages(with_train(union, top_k_warmup_steps=0)) is None


@pytest.mark.parametrize("seed", range(3))
def test_any_warm_up_is_monotone_few_stages_and_legal(union, seed):
    rng = np.random.default_rng(seed)
    for _ in range(50):
        experts = int(2 ** rng.integers(1, 6))
        top_k = int(rng.integers(1, experts))
        shared = int(rng.integers(0, top_k))
        steps = int(rng.integers(1, 40))
        config = with_model(
            union,
            d_ff=64,
            union=UnionConfig(num_experts=experts, top_k=top_k, num_shared=shared),
            attention=("dense",),
        )
        config = with_train(config, top_k_warmup_steps=steps)
        stages = [stage_at(config, step) for step in range(steps + 2)]
        ks = [stage.model.union.top_k for stage in stages]
        assert ks[0] == experts and ks[steps] == top_k
        assert ks == sorted(ks, reverse=True) and len(set(ks)) <= STAGES + 1
        for stage in stages:
            validate_model(stage.model)
        assert [experts_on(config.model.union, STAGES)] == [top_k]


def test_a_hierarchical_router_keeps_as_many_as_its_tokens_use(union):
    router = UnionConfig(
        num_experts=8, top_k=2, selected=4, router="hierarchical", segment_size=4
    )
    config = with_model(union, union=router, attention=("dense",))
    for step in range(12):
        validate_model(stage_at(config, step).model)
    kept = [stage_at(config, step).model.union.selected for step in range(12)]
    assert kept[0] == 8 and kept[-1] == 4


def test_a_run_compiles_once_a_stage_and_resumes_bitwise(union, tmp_path, monkeypatch):
    made = []
    real = loop.make_step

    def count(config, *rest):
        made.append(config.model.union.top_k)
        return real(config, *rest)

    monkeypatch.setattr(loop, "make_step", count)
    config = with_train(with_model(union, attention=("dense",)), keep_checkpoints=9)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole, quiet=True)
    assert made == [3, 8, 7, 6, 5, 3]  # the first is never compiled
    shutil.copytree(whole, resumed)
    for step in steps_after(resumed, 6):
        shutil.rmtree(resumed / "checkpoints" / str(step))
    shutil.rmtree(resumed / "best")
    train(config, resumed, quiet=True)
    assert_same_bits(whole, resumed)
    assert lines_of(whole, "train") == lines_of(resumed, "train")


def steps_after(run, after):
    steps = [int(p.name) for p in (run / "checkpoints").iterdir() if p.name.isdigit()]
    return [step for step in steps if step > after]


def test_flops_are_those_of_each_stage(union, tmp_path):
    config = with_model(union, attention=("dense",))
    train(with_train(config, keep_checkpoints=9), tmp_path / "run", quiet=True)
    lines = lines_of(tmp_path / "run", "train")
    flops = np.diff([0] + [line["flops"] for line in lines])
    tokens = np.diff([0] + [line["tokens"] for line in lines])
    for line, spent, seen in zip(lines, flops, tokens, strict=True):
        model = stage_at(config, line["step"] - 1).model
        each = flops_per_token(model, config.seq_len).training
        assert_close(spent, seen * each, 1e-6)


def test_a_cut_model_begins_as_the_dense_one_and_is_evaluated_as_it_will_be(
    tiny, tmp_path
):
    dense, cut, whole = (tmp_path / name for name in ("dense", "cut", "whole"))
    train(tiny(steps=3), dense, quiet=True)
    parts = {"num_experts": 4, "parts": ("mlp",), "router": "zero"}
    decompose_run(dense, cut, Cut(top_k=1, **parts))
    decompose_run(dense, whole, Cut(**parts))
    first = {}
    for name, run, steps in (("warm", cut, 4), ("cold", cut, 0), ("all", whole, 0)):
        copy, config = tmp_path / name, load_run(run).config
        shutil.copytree(run, copy)
        # The dense run's three steps count as steps, not as its own.
        config = with_train(config, steps=7, save_every=1, eval_every=4)
        train(with_train(config, top_k_warmup_steps=steps), copy, quiet=True)
        first[name] = lines_of(copy, "train")[0]
        assert first[name]["step"] == 4
    assert abs(first["warm"]["loss"] - first["all"]["loss"]) < 1e-5
    assert abs(first["cold"]["loss"] - first["all"]["loss"]) > 1e-4
    # Validation and what is loaded use the config's own top_k.
    run = load_run(tmp_path / "warm")
    assert run.config.model.union.top_k == 1
    valid = lines_of(tmp_path / "warm", "eval")[-1]["loss"]
    found = evaluate(run.model, run.config, max_batches=run.config.train.eval_batches)
    assert abs(found["loss"] - valid) < 1e-5


def test_a_warm_up_of_nothing_is_refused(tiny, tmp_path):
    for config in (
        with_train(tiny(), top_k_warmup_steps=3),
        with_train(
            with_model(tiny("union"), union=UnionConfig(num_experts=4, top_k=4)),
            top_k_warmup_steps=3,
        ),
    ):
        with pytest.raises(ConfigError, match="no union leaves an expert out"):
            train(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    assert ModelConfig().union.top_k == 4
