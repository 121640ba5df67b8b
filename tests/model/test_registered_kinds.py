"""A router and an attention of one's own, defined here and used everywhere."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.test_cache import decoded_logits
from tests.model.tiny_models import tiny, tokens_like
from uoe_jax import kinds
from uoe_jax.cli import main
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    TrainConfig,
    UnionConfig,
    from_json,
    to_json,
)
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.kinds import AttentionFacts, RouterFacts
from uoe_jax.leakcheck import leakcheck
from uoe_jax.model import (
    make_model,
    param_shapes,
    register_attention,
    register_mlp,
    register_router,
)
from uoe_jax.model.attention import AttentionWeights
from uoe_jax.model.cache import attend_cache, written_rows
from uoe_jax.model.context import document_span
from uoe_jax.model.mlp import DenseMlp
from uoe_jax.model.routing.token import Router
from uoe_jax.plan.layouts import make_plan
from uoe_jax.train import train
from uoe_jax.validation import find_problems

WINDOW = 4


class PreviousRouter(Router):
    """A token goes where the token before it in its document scores highest."""

    @staticmethod
    def state_shapes(config, batch):
        return {"before": ((batch, config.num_experts - config.num_shared), "float32")}

    def __call__(self, x, context):
        scores = self.scores(x)
        first = document_span(x.shape[:2], context.segments, True)[0]
        index = jnp.arange(x.shape[1])[None]
        before = jnp.maximum(index - 1, first)
        decision = jnp.take_along_axis(scores, before[..., None], axis=1)
        picks = self.choose(decision)
        gates = self.gates(decision, picks)
        routing = self.route(decision, decision, picks, gates, context)
        if context.lengths is None:
            return routing
        last = (context.lengths - 1)[:, None, None]
        state = {"before": jnp.take_along_axis(scores, last, axis=1)[:, 0]}
        return routing._replace(stats={**routing.stats, "state": state})

    def decode(self, x, state, lengths):
        scores = self.scores(x)
        decision = jnp.where((lengths == 0)[:, None], scores, state["before"])
        picks = self.choose(decision)
        gates = self.gates(decision, picks)
        routing = self.finish(picks[:, None], gates[:, None], None, {}, False)
        return routing, {"before": scores}


class WindowAttention(AttentionWeights):
    """Dense weights; a token sees itself and the three before it."""

    def __init__(self, config, *, rngs):
        super().__init__(config, 1, rngs=rngs)
        self.tilt = nnx.Param(jnp.zeros(config.num_heads, config.param_dtype))

    def __call__(self, x, context):
        q, k, v = self.project_qkv(x, context.positions)
        q = q + self.tilt[...].reshape(1, 1, -1, 1).astype(q.dtype)
        first = document_span(x.shape[:2], context.segments, True)[0]
        index = jnp.arange(x.shape[1])
        seen = (index[None] <= index[:, None]) & (index[None] > index[:, None] - WINDOW)
        mask = seen[None] & (index[None, None] >= first[..., None])
        out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None])
        return self.project_out(out), {}, (k, v)

    def decode(self, x, slot):
        q, k, v = self.project_qkv(x, slot.lengths)
        q = q + self.tilt[...].reshape(1, -1, 1).astype(q.dtype)
        slot, (keys, values) = slot.append_token(k, v)
        q = q.reshape(*k.shape[:2], -1, k.shape[2])
        row = jnp.arange(keys.shape[1])[None]
        near = (row > slot.row[:, None] - WINDOW)[:, None, None]
        out = attend_cache(q, keys, values, written_rows(keys, slot.row) & near)
        return self.project_out(out.reshape(x.shape[0], -1, k.shape[2])), slot


def tilt(model):
    from uoe_jax.weights import Param, Weight

    weight = Weight(axes="h", ins="", outs="h")
    return {"tilt": Param(weight=weight, shape=(model.num_heads,))}


@pytest.fixture(scope="module", autouse=True)
def registered():
    tables = (kinds.ROUTERS, kinds.ATTENTIONS, kinds.MLPS)
    before = [dict(table) for table in tables]
    register_router("previous", PreviousRouter, RouterFacts(sees="the token before it"))
    register_attention(
        "window",
        WindowAttention,
        AttentionFacts(
            keys_seen=lambda model, length: min(WINDOW, length),
            params=tilt,
            gathers=True,
        ),
    )
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


@pytest.fixture
def config(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 400)
    model = tiny(
        vocab_size=256,
        attention=("window", "union"),
        mlp=("union",),
        union=UnionConfig(num_experts=4, top_k=2, router="previous"),
    )
    return ExperimentConfig(
        model=model,
        data=DataConfig(
            path=str(text), batch_size=8, seq_len=16, cache_dir=str(tmp_path / "cache")
        ),
        train=TrainConfig(steps=20, log_every=5, eval_every=20, eval_batches=1),
    )


def test_they_are_checked_and_read_back(config):
    assert list(find_problems(config)) == []
    assert from_json(to_json(config)) == config
    with pytest.raises(ConfigError, match="is 'windo'; expected.*'window'"):
        dataclasses.replace(config.model, attention=("windo",))
    with pytest.raises(
        ConfigError, match="is 'prev'; expected one of.*'previous', or your own once"
    ):
        UnionConfig(router="prev")
    patched = dataclasses.replace(config.model.union, patch_size=2)
    wrong = dataclasses.replace(config.model, union=patched)
    (problem,) = set(find_problems(dataclasses.replace(config, model=wrong)))
    assert "router 'previous'; patches are for router token" in problem


def test_they_are_counted_as_they_are_built(config):
    shapes = param_shapes(config.model)
    assert sum(count_params(config.model).values()) == sum(
        math.prod(leaf.shape) for leaf in shapes.values()
    )
    window = dataclasses.replace(config.model, attention=("window",), mlp=("dense",))
    long, short = (flops_per_token(window, n).parts for n in (16, 8))
    scores = 4 * window.num_heads * window.head_dim * WINDOW * window.num_layers
    assert long["attention scores"] == short["attention scores"] == scores


def test_they_leak_nothing_and_decode_as_they_see(config):
    model = make_model(config.model, jax.random.key(0))
    findings = leakcheck(model, jax.random.key(1), length=12)
    assert findings and all(finding.passed for finding in findings), findings
    tokens = tokens_like(config.model, 2, 12, seed=1)
    lengths = jnp.array([6, 1])
    full = jax.jit(lambda m, t: m(t)[0])(model, tokens)
    found = decoded_logits(model, tokens, lengths, 6)
    for row, length in enumerate(np.asarray(lengths)):
        assert_close(found[row], full[row, length - 1 : length + 6], 1e-4)


def test_they_train_resume_and_are_read_by_the_commands(config, tmp_path, capsys):
    first = dataclasses.replace(
        config, train=dataclasses.replace(config.train, steps=12)
    )
    train(first, tmp_path / "run", quiet=True)
    found = train(config, tmp_path / "run", quiet=True)
    assert found["step"] == 20 and found["train_loss"] < math.log(256)
    for words in (
        ["report"],
        ["eval"],
        ["generate", "--prompt", "the", "--max-new-tokens", "4"],
        ["leakcheck"],
        ["cost"],
        ["plan", "--topology", "h100:4"],
    ):
        assert main([words[0], str(tmp_path / "run"), *words[1:]]) == 0, words
    said = capsys.readouterr().out
    assert "nothing moved" in said
    assert "bits per byte" in said
    assert main(["cost", str(tmp_path / "run"), "--json"]) == 0
    cost = json.loads(capsys.readouterr().out)
    assert cost["params"] == {
        **count_params(config.model),
        "total": sum(count_params(config.model).values()),
    }


def test_they_are_planned(config):
    plan = make_plan(config, parse_topology("h100:4"))
    assert plan.fitting and all(p.sizes["tensor"] == 1 for p in plan.fitting)
    assert any("'window' isn't split" in p for v in plan.illegal for p in v.problems)


def test_a_kind_that_cannot_be_is_one_line():
    facts = RouterFacts(sees="all")
    with pytest.raises(ConfigError, match="'token' is there already"):
        register_router("token", PreviousRouter, facts)
    with pytest.raises(ConfigError, match="can't be named so"):
        register_router("two words", PreviousRouter, facts)
    with pytest.raises(ConfigError, match="give a AttentionFacts"):
        kinds.add_kind(kinds.ATTENTIONS, "mine", facts, AttentionFacts)
    with pytest.raises(ConfigError, match="without decode"):
        register_mlp("mine", nnx.Linear, kinds.MlpFacts())
    assert "mine" not in kinds.ATTENTIONS and "mine" not in kinds.MLPS
    register_mlp("mine", DenseMlp, kinds.MlpFacts(field="model.d_ff"))
    model = tiny(mlp=("mine",))
    assert sum(count_params(model).values()) == sum(
        math.prod(leaf.shape) for leaf in param_shapes(model).values()
    )
