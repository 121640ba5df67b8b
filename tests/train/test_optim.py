import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compare import assert_close
from uoe_jax.config import ModelConfig, OptimConfig
from uoe_jax.model import make_model
from uoe_jax.optim import (
    cooldown_steps,
    decay_mask,
    is_decayed,
    leaf_name,
    make_optimizer,
    make_schedule,
)

STEPS = 100
SCHEDULES = ("cosine", "linear", "constant", "wsd", "wsd_sqrt")


def rates(steps=STEPS, peak=2.0, **kwargs):
    config = OptimConfig(learning_rate=peak, final_lr_fraction=0.1, **kwargs)
    schedule = make_schedule(config, steps)
    return np.array([schedule(s) for s in range(steps)])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_linearly_to_the_peak(schedule):
    values = rates(schedule=schedule, warmup_steps=10)
    assert_close(values[:10], 2.0 * np.arange(1, 11) / 10, 1e-6)
    assert_close(values.max(), 2.0, 1e-6)


def test_cosine_follows_its_formula():
    values = rates(schedule="cosine", warmup_steps=10)
    t = (np.arange(10, STEPS) - 10) / (STEPS - 1 - 10)
    expected = 2.0 * (0.1 + 0.9 * 0.5 * (1 + np.cos(np.pi * t)))
    assert_close(values[10:], expected, 1e-5)


def test_linear_falls_evenly_to_the_final_fraction():
    values = rates(schedule="linear", warmup_steps=10)
    assert_close(np.diff(values[10:]), -1.8 / 89, 1e-4)
    assert_close(values[-1], 0.2, 1e-5)


def test_constant_stays():
    assert set(rates(schedule="constant", warmup_steps=0).tolist()) == {2.0}


def test_wsd_is_stable_then_falls_in_the_last_fifth():
    values = rates(schedule="wsd", warmup_steps=10)
    assert_close(values[10:80], 2.0, 1e-6)
    assert (np.diff(values[79:]) < 0).all()
    assert_close(values[-1], 0.2, 1e-5)


def test_wsd_sqrt_falls_by_one_less_the_root_in_the_last_fifth():
    values = rates(schedule="wsd_sqrt", warmup_steps=10)
    assert_close(values[10:80], 2.0, 1e-6)
    share = np.arange(1, 21) / 20
    assert_close(values[80:], 0.2 + 1.8 * (1 - np.sqrt(share)), 1e-5)


def test_runs_of_every_length_are_alike_before_they_cool_down():
    """So that one run's constant part serves them all."""
    for steps in (50, 100, 171):
        before = steps - cooldown_steps(steps)
        for peak in (2.0, 0.03, 0.0017):
            options = {"schedule": "wsd_sqrt", "warmup_steps": 10, "peak": peak}
            short, long = rates(steps, **options), rates(400, **options)
            assert (short[:before] == long[:before]).all()  # bit by bit
            assert short[before] < 0.99 * peak


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_short_runs_have_positive_finite_rates(schedule, steps):
    values = rates(steps, schedule=schedule, warmup_steps=50)
    assert np.isfinite(values).all() and (values > 0).all()


def real_params(**kwargs):
    config = ModelConfig(
        vocab_size=16,
        max_seq_len=8,
        d_model=8,
        d_ff=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=4,
        use_bias=True,
        norm="layernorm",
        tie_embeddings=False,
        mlp=("union", "dense"),
        **kwargs,
    )
    model = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    return nnx.split(model, nnx.Param, ...)[1]


def test_decay_spares_norms_biases_and_routers_of_a_real_model():
    flat, _ = jax.tree_util.tree_flatten_with_path(decay_mask(real_params()))
    decayed = {leaf_name(path): flag for path, flag in flat}
    assert {name.split(".")[-1] for name, flag in decayed.items() if flag} == {
        "embedding",
        "wq",
        "wk",
        "wv",
        "wo",
        "w_up",
        "w_down",
        "weight",
    }
    spared = [name for name, flag in decayed.items() if not flag]
    assert any("router" in name for name in spared)
    assert any("norm" in name for name in spared)
    assert any(name.endswith("bq") for name in spared)
    assert is_decayed("head.weight") and not is_decayed("head.bias")


def update_once(config, grads, params, step=0):
    optimizer = make_optimizer(config, STEPS)
    updates, _ = optimizer.update(
        grads, optimizer.init(params), params, step=jnp.int32(step)
    )
    return updates


def test_update_is_adamw_by_hand(rng):
    params = {"w": rng.normal(size=(3, 4)), "norm": {"scale": rng.normal(size=4)}}
    grads = {"w": rng.normal(size=(3, 4)), "norm": {"scale": rng.normal(size=4)}}
    config = OptimConfig(
        learning_rate=0.1, schedule="constant", warmup_steps=0, clip_norm=0.5
    )
    updates = update_once(config, grads, params)
    norm = np.sqrt((grads["w"] ** 2).sum() + (grads["norm"]["scale"] ** 2).sum())
    for name, decay in (("w", 0.1), ("norm", 0.0)):
        grad = grads["w"] if name == "w" else grads["norm"]["scale"]
        param = params["w"] if name == "w" else params["norm"]["scale"]
        clipped = grad * min(1, 0.5 / norm)
        # First step: both moments, bias-corrected, are the gradient and its square.
        expected = -0.1 * (clipped / (np.abs(clipped) + 1e-8) + decay * param)
        got = updates["w"] if name == "w" else updates["norm"]["scale"]
        assert_close(got, expected, 1e-4)


def test_rate_follows_the_given_step_not_a_count():
    params = {"w": jnp.ones(3)}
    config = OptimConfig(learning_rate=1.0, warmup_steps=10, weight_decay=0.0)
    first = update_once(config, params, params, step=0)["w"]
    tenth = update_once(config, params, params, step=9)["w"]
    assert_close(tenth, 10 * first, 1e-5)


def test_router_rate_is_scaled():
    params = {"router": {"weight": jnp.ones(3)}, "wq": jnp.ones(3)}
    config = OptimConfig(router_lr_scale=0.25, weight_decay=0.0, clip_norm=0.0)
    updates = update_once(config, params, params)
    assert_close(updates["router"]["weight"], updates["wq"] / 4, 1e-6)


def test_clipping_can_be_switched_off():
    names = lambda config: len(make_optimizer(config, 1).init({"w": jnp.ones(2)}))
    assert names(OptimConfig(clip_norm=0.0)) == names(OptimConfig()) - 1
    assert isinstance(make_optimizer(OptimConfig(), 1), optax.GradientTransformation)
