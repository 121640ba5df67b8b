"""Models beside a reference: differences and losses against plain numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import uoe_jax.runs.probe as room
from tests.compare import assert_close
from uoe_jax.config import ModelConfig
from uoe_jax.model import make_model
from uoe_jax.runs.probe import logits, probe, probe_each

CONFIG = ModelConfig(vocab_size=31, max_seq_len=16, d_model=16, d_ff=32, num_layers=2,
                     num_heads=2, num_kv_heads=2)  # fmt: skip


@pytest.fixture(scope="module")
def models():
    return [make_model(CONFIG, jax.random.key(seed)) for seed in range(3)]


@pytest.fixture
def batch(rng):
    tokens, targets = rng.integers(0, 31, (2, 6, 16)).astype(np.int32)
    mask = (rng.random((6, 16)) < 0.7).astype(np.float32)
    ones = np.ones_like(tokens)
    positions = np.tile(np.arange(16, dtype=np.int32), (6, 1))
    return {"tokens": tokens, "targets": targets, "mask": mask, "segments": ones,
            "positions": positions}  # fmt: skip


def whole(model, batch):
    return np.asarray(logits(model, {k: jnp.asarray(v) for k, v in batch.items()}))


def mean_loss(found, batch):
    values = np.asarray(found, np.float64)
    top = values.max(-1)
    log_sum = top + np.log(np.exp(values - top[..., None]).sum(-1))
    picked = np.take_along_axis(values, batch["targets"][..., None], -1)[..., 0]
    return ((log_sum - picked) * batch["mask"]).sum() / batch["mask"].sum()


def test_each_model_is_compared_as_alone_and_with_plain_numpy(
    models, batch, monkeypatch
):
    monkeypatch.setattr(room, "_CHUNK", 32)  # three parts of two rows
    reference, *others = models
    seen = probe_each(reference, dict(zip("ab", others, strict=True)), batch)
    first = whole(reference, batch)
    scored = batch["mask"] > 0
    for name, model in zip("ab", others, strict=True):
        second, found = whole(model, batch), seen[name]
        apart = np.abs(first - second)[scored].max()
        assert_close(found.max_logit_difference, apart, 1e-5)
        assert_close(found.max_logit, np.abs(first)[scored].max(), 1e-5)
        assert_close(found.reference_loss, mean_loss(first, batch), 1e-5)
        assert_close(found.loss, mean_loss(second, batch), 1e-5)
        assert probe(reference, model, batch) == found


def test_the_reference_runs_once_for_all_models(models, batch, monkeypatch):
    calls = []
    plain = room._reference_logits
    count = lambda model, part: calls.append(0) or plain(model, part)
    monkeypatch.setattr(room, "_reference_logits", count)
    reference, *others = models
    probe_each(reference, dict(zip("ab", others, strict=True)), batch)
    assert len(calls) == 1


def test_a_model_beside_itself_is_exact(models, batch):
    found = probe(models[0], models[0], batch)
    assert found.exact and found.max_logit_difference == 0
    assert found.loss == found.reference_loss
