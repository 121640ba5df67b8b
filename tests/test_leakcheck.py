"""The leak checks pass on our models and catch leaks that are planted."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import uoe_jax.model.routing.token
import uoe_jax.model.sharded
import uoe_jax.model.transformer
from uoe_jax.config import MobaConfig, ModelConfig, MoeConfig, UnionConfig
from uoe_jax.leakcheck import (
    Finding,
    check_documents,
    check_future,
    check_padding,
    check_rows,
    format_findings,
    leakcheck,
)
from uoe_jax.model import make_model

KEY = jax.random.key(0)
CONFIG = ModelConfig(
    vocab_size=61,
    max_seq_len=32,
    d_model=16,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    attention=("union",),
    mlp=("union",),
    union=UnionConfig(num_experts=4, top_k=2, router_init_std=1.0),
)
DENSE = dataclasses.replace(CONFIG, attention=("dense",), mlp=("dense",))
UNION_MLP = dataclasses.replace(DENSE, mlp=("union",))


def run(config, **options):
    findings = leakcheck(make_model(config, KEY), jax.random.key(1), **options)
    return {finding.check: finding for finding in findings}


def planted(config):
    """The model as the checks call it, and two batches of tokens."""
    model = make_model(config, KEY)

    @jax.jit
    def forward(tokens, segments):
        logits, aux = model(tokens, segments=segments, collect_choices=True)
        return logits, {part: stats["choices"] for part, stats in aux.items()}

    tokens = jax.random.randint(KEY, (2, 2, 12), 0, config.vocab_size)
    return forward, tokens[0], tokens[1]


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(
            CONFIG,
            attention=("union", "dense"),
            mlp=("moe", "union"),
            union=UnionConfig(num_experts=2, top_k=1, patch_size=3),
            compute_dtype="bfloat16",
        ),
        pytest.param(
            dataclasses.replace(
                CONFIG,
                num_layers=3,
                attention=("moh", "moba", "dense"),
                mlp=("moe", "union", "dense"),
                blocks=("all", "all", "mod"),
                moba=MobaConfig(block_size=5, top_k=2),
                moe=MoeConfig(num_experts=4, top_k=2, num_shared=1, gate="softmax_all"),
            ),
            # Kind by kind: test_no_token_sees_a_later_one of test_router_kinds.py.
            marks=pytest.mark.nightly,
        ),
    ],
    ids=["union", "mixed", "baselines"],
)
def test_our_decoders_leak_nothing(config):
    found = run(config)
    assert set(found) == {"future", "rows", "padding", "documents", "gradient"}
    for finding in found.values():
        assert finding.passed and finding.moved == "nothing", finding


@pytest.mark.parametrize("kind", ["encoder", "vision"])
def test_our_classifiers_leak_nothing(kind):
    config = dataclasses.replace(CONFIG, kind=kind)
    found = run(config)
    assert set(found) == ({"rows"} if kind == "vision" else {"rows", "padding"})
    assert all(finding.passed for finding in found.values())


def test_expert_choice_in_a_causal_model_is_caught(monkeypatch):
    def choose(self, scores):
        # An expert's favourite tokens of the whole sequence rank it highest.
        rank = jnp.argsort(jnp.argsort(scores, axis=1), axis=1)
        return jax.lax.top_k(rank, self.top_k)[1]

    monkeypatch.setattr(uoe_jax.model.routing.token.PatchRouter, "choose", choose)
    forward, tokens, other = planted(UNION_MLP)
    finding = check_future(forward, tokens, other, 1e-5)
    assert not finding.passed and finding.max_diff > 1e-3
    assert check_rows(forward, tokens, other, 1e-5).passed


def test_a_gate_normalised_over_the_batch_is_caught(monkeypatch):
    def gates(scores, gate):
        return jax.nn.softmax(scores, axis=0) * scores.shape[0]

    monkeypatch.setattr(uoe_jax.model.routing.token, "gate_values", gates)
    forward, tokens, other = planted(UNION_MLP)
    finding = check_rows(forward, tokens, other, 1e-5)
    assert not finding.passed and finding.moved.startswith("logits of sample 0")
    assert check_future(forward, tokens, other, 1e-5).passed


def test_attention_that_sees_one_ahead_is_caught(monkeypatch):
    honest = uoe_jax.model.sharded.dense_attention

    def ahead(q, k, v, **options):
        return honest(q, jnp.roll(k, -1, axis=1), jnp.roll(v, -1, axis=1), **options)

    monkeypatch.setattr(uoe_jax.model.sharded, "dense_attention", ahead)
    found = run(DENSE)
    assert not found["future"].passed and not found["gradient"].passed
    assert found["gradient"].max_diff > 1e-4
    assert found["rows"].passed


def test_padding_in_the_mean_is_caught(monkeypatch):
    monkeypatch.setattr(
        uoe_jax.model.transformer, "mean_pool", lambda x, segments: jnp.mean(x, axis=1)
    )
    forward, tokens, other = planted(dataclasses.replace(DENSE, kind="encoder"))
    assert not check_padding(forward, tokens, other, 1e-5, per_token=False).passed
    assert check_rows(forward, tokens, other, 1e-5).passed


def test_documents_that_see_each_other_are_caught(monkeypatch):
    honest = uoe_jax.model.sharded.dense_attention

    def blind(q, k, v, *, segments, **options):
        return honest(q, k, v, segments=None, **options)

    monkeypatch.setattr(uoe_jax.model.sharded, "dense_attention", blind)
    forward, tokens, other = planted(DENSE)
    assert not check_documents(forward, tokens, other, 1e-5).passed
    assert not check_padding(forward, tokens, other, 1e-5, per_token=True).passed


def test_a_choice_that_looks_ahead_is_caught_even_if_no_logit_moves():
    tokens = jax.random.randint(KEY, (2, 9), 0, 50)

    def forward(tokens, segments):
        logits = jax.nn.one_hot(tokens, 50)
        choices = jnp.broadcast_to(tokens[:, -1:, None] % 4, (2, 9, 1))
        return logits, {"mlp": choices[None]}

    finding = check_future(forward, tokens, tokens + 1, 1e-5)
    assert not finding.passed and finding.max_diff == 0
    assert finding.moved.startswith("mlp choices of before token")


def test_the_table_names_every_check_and_its_result():
    findings = [
        Finding("rows", "the other samples of the batch", "nothing", 0.0, True),
        Finding("future", "tokens from 1 on", "logits before token 1", 0.5, False),
    ]
    lines = format_findings(findings).splitlines()
    assert lines[0].split() == ["check", "perturbed", "moved", "max", "diff", "result"]
    assert lines[1].startswith("rows") and lines[1].endswith("ok")
    assert lines[2].startswith("future") and lines[2].endswith("0.5       LEAK")
