"""Routers' statistics are of the tokens whose loss counts, however batches are cut."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.tiny_runs import make_tiny
from uoe_jax.config import ModConfig, ModelConfig, MoeConfig, UnionConfig
from uoe_jax.data import make_dataset
from uoe_jax.evaluate import evaluate
from uoe_jax.model import make_model
from uoe_jax.model.context import make_context
from uoe_jax.model.routing.balance import router_stats, token_means
from uoe_jax.train.step import scored_tokens

KINDS = {
    "union": {"attention": ("union",), "mlp": ("union",)},
    "moe": {"mlp": ("moe",)},
    "mod": {"blocks": ("all", "mod")},
}


def model_of(kind, base):
    extra = {"moe": MoeConfig(num_experts=4, top_k=2), "mod": ModConfig(keep=0.5)}
    plain = {"attention": ("dense",), "mlp": ("dense",)}
    return dataclasses.replace(base, **extra, **(plain | KINDS[kind]))


def of_batch(config, size):
    data = dataclasses.replace(config.data, batch_size=size)
    return dataclasses.replace(config, data=data)


@pytest.mark.parametrize("kind", KINDS)
def test_evaluation_is_the_same_at_any_batch_size(tiny, kind):
    config = tiny()
    config = dataclasses.replace(config, model=model_of(kind, config.model))
    model = make_model(config.model, jax.random.key(1))

    def found(size):
        cut = make_dataset(of_batch(config, size), "valid")
        assert cut.num_examples % size  # the last batch is filled up
        return evaluate(model, of_batch(config, size), dataset=cut)

    first, second = found(8), found(32)
    for part, stats in first["router"].items():
        for name, values in stats.items():
            np.testing.assert_allclose(
                values, second["router"][part][name], atol=1e-5, err_msg=name
            )
    # Of its own batch, but without the rows that fill it up: hardly another number.
    assert first["balance_loss"] == pytest.approx(second["balance_loss"], abs=0.05)


def test_statistics_are_those_of_the_scored_tokens_alone(rng):
    scores = rng.normal(size=(3, 8, 4))
    scored = rng.random((3, 8)) < 0.6
    scored[0, 0] = True
    picks = np.argsort(-scores, axis=-1)[..., :2]
    config = ModelConfig(max_seq_len=8)
    context = make_context(config, (3, 8), scored=jnp.asarray(scored))
    x = jnp.asarray(scores, jnp.float32)
    found = router_stats(x, x, jnp.asarray(picks), context)
    chosen, kept = scores[scored], picks[scored]
    probs = np.exp(chosen) / np.exp(chosen).sum(-1, keepdims=True)
    load = np.bincount(kept.ravel(), minlength=4) / kept.size
    want = {
        "load": load,
        "entropy": -(probs * np.log(probs)).sum(-1).mean(),
        "balance_loss": 4 * (load * probs.mean(0)).sum(),
        "z_loss": np.square(np.log(np.exp(chosen).sum(-1))).mean(),
    }
    for name, value in want.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, err_msg=name)


def test_without_scores_padding_alone_is_left_out():
    values = {"x": jnp.arange(6.0).reshape(2, 3)}
    segments = jnp.array([[1, 1, 0], [0, 0, 1]])
    config = ModelConfig(max_seq_len=3)
    padded = make_context(config, (2, 3), segments=segments)
    assert float(token_means(values, padded)["x"]) == (0 + 1 + 5) / 3
    assert float(token_means(values, make_context(config, (2, 3)))["x"]) == 2.5


def test_what_is_scored_of_each_kind_of_model():
    union = dict(attention=("union",), union=UnionConfig(num_experts=4, top_k=2))
    config = make_tiny("union")
    mask = jnp.array([[1.0, 0.0], [jnp.nan, 2.0]])
    batch = {"mask": mask, "segments": jnp.ones((2, 2), jnp.int32)}
    assert scored_tokens(batch, config).tolist() == [[True, False], [False, True]]
    assert scored_tokens(batch, make_tiny()) is None  # no router asks
    labels = jnp.array([3, -1])
    encoder = ModelConfig(kind="encoder", num_heads=4, num_kv_heads=4, **union)
    config = dataclasses.replace(config, model=encoder)
    batch = {"labels": labels, "segments": jnp.array([[1, 0], [1, 1]])}
    assert scored_tokens(batch, config).tolist() == [[True, False], [False, False]]
    vision = dataclasses.replace(encoder, kind="vision", image_size=4, image_patch=2)
    config = dataclasses.replace(config, model=vision)
    batch = {"labels": labels, "images": jnp.zeros((2, 4, 4, 1))}
    assert scored_tokens(batch, config).tolist() == [[True] * 4, [False] * 4]
