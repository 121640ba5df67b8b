"""What is trained: factors only, from where, and how far they reach."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.adapt.moved_adapters import draw_model
from tests.compare import assert_close
from uoe_jax.adapt import (
    AdapterConfig,
    Adapters,
    adapted_params,
    apply_adapted,
    count_adapter_params,
    init_adapters,
    leaf_delta,
    pad_ranks,
    select_adapter,
    stack_adapters,
)
from uoe_jax.adapt.plan import make_plans
from uoe_jax.adapt.subject import adapter_subject
from uoe_jax.config import ExperimentConfig, MeshConfig, ModelConfig, TrainConfig
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.train.step import make_step, put_batch
from uoe_jax.train.subject import freeze_params


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def fit(params, adapters, target, steps, rate=0.05):
    """Adam on |W + delta - target|^2; returns the adapters of every step."""
    adam = optax.adam(rate)

    def loss(weights):
        got = adapted_params(params, adapters.with_weights(weights))["w"]
        return jnp.mean((got - target) ** 2)

    @jax.jit
    def step(weights, state):
        grads = jax.grad(loss)(weights)
        updates, state = adam.update(grads, state)
        return optax.apply_updates(weights, updates), state, grads

    weights, state = adapters.weights, adam.init(adapters.weights)
    history = []
    for _ in range(steps):
        weights, state, grads = step(weights, state)
        history.append(grads)
    return adapters.with_weights(weights), history


def test_f7_only_the_core_moves_at_first():
    params = {"w": draw(6, 5)}
    for method, zero in (("tucker", "core"), ("lora", "b")):
        config = AdapterConfig(method=method, rank=2, targets=("w",))
        fresh = init_adapters(params, config, jax.random.key(0))
        _, history = fit(params, fresh, draw(6, 5, seed=1), steps=2)
        for part, grad in history[0]["w"].items():
            assert (float(jnp.abs(grad).max()) == 0.0) == (part != zero), part
        for grad in history[1]["w"].values():
            assert float(jnp.abs(grad).max()) > 0.0


def test_f5_the_trained_delta_has_the_mode_ranks():
    params = {"w": draw(3, 3, 6, 8)}
    config = AdapterConfig(rank=2, kernel_rank=1, targets=("w",))
    fresh = init_adapters(params, config, jax.random.key(0))
    trained, _ = fit(params, fresh, draw(3, 3, 6, 8, seed=1), steps=20)
    change = np.asarray(leaf_delta(trained, trained["w"]))
    assert np.abs(change).max() > 1e-3
    for mode, rank in enumerate((1, 1, 2, 2)):
        rows = np.moveaxis(change, mode, 0).reshape(change.shape[mode], -1)
        singular = np.linalg.svd(rows, compute_uv=False)
        assert (singular[rank:] < 1e-6 * singular[0]).all()


def test_f8_full_ranks_reach_any_delta_in_closed_form():
    params = {"w": draw(6, 5)}
    config = AdapterConfig(rank=6, targets=("w",), init="orthonormal")
    with pytest.warns(UserWarning) as told:
        fresh = init_adapters(params, config, jax.random.key(0))
    assert [str(one.message)[:15] for one in told] == [
        "rank 6 is more ",
        "adapters have 8",
    ]
    target = draw(6, 5, seed=1)
    parts = dict(fresh.weights["w"])
    # One rank of the wide mode is cut: 5 columns can't fill 6.
    assert parts["core"].shape == (5, 5)
    inside = parts["factor_i"] @ parts["factor_i"].T @ target
    parts["core"] = parts["factor_i"].T @ target @ parts["factor_o"]
    reached = leaf_delta(fresh.with_weights({"w": parts}), fresh["w"])
    np.testing.assert_allclose(reached, inside, atol=1e-5)
    square = {"w": draw(5, 5)}
    config = AdapterConfig(rank=5, targets=("w",), init="orthonormal")
    with pytest.warns(UserWarning, match="lower the rank"):
        fresh = init_adapters(square, config, jax.random.key(0))
    parts = dict(fresh.weights["w"])
    parts["core"] = parts["factor_i"].T @ target[:5] @ parts["factor_o"]
    reached = leaf_delta(fresh.with_weights({"w": parts}), fresh["w"])
    np.testing.assert_allclose(reached, target[:5], atol=1e-5)


def test_inits_have_the_published_spreads():
    params = {"w": draw(400, 300)}
    spread = {}
    for init in ("flora", "loralib", "peft", "orthonormal"):
        config = AdapterConfig(rank=20, targets=("w",), init=init)
        parts = init_adapters(params, config, jax.random.key(0)).weights["w"]
        assert not parts["core"].any()
        spread[init] = [float(jnp.std(parts[f"factor_{a}"])) for a in "io"]
    want = {
        "flora": [(0.5 / 20) ** 0.5] * 2,
        "loralib": [0.02] * 2,
        "peft": [(3 * 400) ** -0.5, (3 * 20) ** -0.5],
        "orthonormal": [400**-0.5, 300**-0.5],
    }
    for init, values in want.items():
        for found, value in zip(spread[init], values, strict=True):
            assert_close(found, value, 0.05, about=init)
    gram = parts["factor_i"].T @ parts["factor_i"]
    np.testing.assert_allclose(gram, np.eye(20), atol=1e-5)


def test_hosvd_starts_from_the_weights_leading_part():
    params = {"w": draw(6, 5)}
    u, s, vt = np.linalg.svd(np.asarray(params["w"]))
    leading = (u[:, :2] * s[:2]) @ vt[:2]
    for method in ("tucker", "lora"):
        config = AdapterConfig(method=method, rank=2, targets=("w",), init="hosvd")
        fresh = init_adapters(params, config, jax.random.key(0))
        plain = Adapters(
            weights=fresh.weights, scales=fresh.scales, anchor={}, plans=fresh.plans
        )
        np.testing.assert_allclose(leaf_delta(plain, fresh["w"]), leading, atol=1e-5)
        assert not np.asarray(leaf_delta(fresh, fresh["w"])).any()


def tiny_language_model(**model):
    config = ExperimentConfig(
        model=ModelConfig(
            vocab_size=31,
            max_seq_len=8,
            d_model=8,
            d_ff=16,
            num_layers=1,
            num_heads=2,
            num_kv_heads=2,
            head_dim=4,
            **model,
        ),
        train=TrainConfig(steps=4, loss_chunk=64),
    )
    return config, *draw_model(config.model)


def test_f10_the_base_has_no_gradient_and_no_optimizer_state():
    config, graphdef, params, buffers = tiny_language_model()
    adapter = AdapterConfig(rank=2, targets=("*.w?", "*.mlp.w_*"))
    fresh = init_adapters(params, adapter, jax.random.key(0))
    optimizer = make_optimizer(config.optim, 4)
    mesh = make_mesh(MeshConfig(data=2), batch_size=8)
    base = (graphdef, params, buffers)
    subject = adapter_subject(fresh, base, config, optimizer, mesh)
    state = subject.state
    trained = count_adapter_params(fresh)
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    # Adam's two moments of the factors, nothing else.
    assert sum(leaf.size for leaf in moments) == 2 * trained
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(0, 31, (1, 8, 8)), jnp.int32)
    batch = {"tokens": tokens, "targets": jnp.roll(tokens, -1, 2)}
    batch |= {"mask": jnp.ones((1, 8, 8)), "segments": jnp.ones((1, 8, 8), jnp.int32)}
    batch["positions"] = jnp.tile(jnp.arange(8, dtype=jnp.int32), (1, 8, 1))
    before = jax.tree.map(np.asarray, params)
    about = (mesh, subject.layout, subject.objective)
    step = make_step(config, graphdef, optimizer, *about)
    batch = put_batch({k: np.asarray(v)[0] for k, v in batch.items()}, mesh)
    losses, norms = [], []
    for _ in range(3):
        state, metrics = step(state, batch, subject.frozen)
        losses.append(float(metrics["loss"]))
        norms.append(float(metrics["grad_norm"]))
    assert losses[2] < losses[0]

    @jax.jit
    @jax.value_and_grad
    def whole_batch(weights):
        merged = adapted_params(params, fresh.with_weights(weights))
        logits = nnx.merge(graphdef, merged, buffers)(tokens[0])[0]
        targets = jnp.roll(tokens, -1, 2)[0]
        chosen = jnp.take_along_axis(logits, targets[..., None], 2)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=2) - chosen)

    # Two devices with half the batch each, by factors: one model with merged weights.
    loss, grads = whole_batch(fresh.weights)
    assert_close(losses[0], loss, 1e-5)
    assert_close(norms[0], optax.tree.norm(grads), 1e-4)
    jax.tree.map(np.testing.assert_array_equal, before, params)
    assert int(state.step) == 3 and set(state.params) == set(fresh.weights)


def test_frozen_base_in_half_precision_gives_the_same_forward():
    config, graphdef, params, buffers = tiny_language_model(compute_dtype="bfloat16")
    frozen = freeze_params(params, config)
    tokens = jnp.arange(8)[None] % 31
    run = jax.jit(lambda p: nnx.merge(graphdef, p, buffers)(tokens)[0])
    np.testing.assert_array_equal(run(params), run(frozen))
    sizes = [sum(a.nbytes for a in jax.tree.leaves(t)) for t in (frozen, params)]
    assert sizes[0] < 0.6 * sizes[1]


def test_padded_ranks_train_as_if_they_were_alone():
    params, target = {"w": draw(9, 8)}, draw(9, 8, seed=1)
    for method in ("lora", "tucker"):
        config = lambda r, m=method: AdapterConfig(method=m, rank=r, targets=("w",))
        small = init_adapters(params, config(1), jax.random.key(0))
        large = init_adapters(params, config(3), jax.random.key(1))
        alone, _ = fit(params, small, target, 8)
        padded, _ = fit(params, pad_ranks(small, large), target, 8)
        want = leaf_delta(alone, alone["w"])
        assert_close(leaf_delta(padded, padded["w"]), want, 1e-5)
        assert padded.weights["w"].keys() == large.weights["w"].keys()


def test_adapters_of_many_ranks_train_side_by_side_under_vmap():
    params, x = {"w": draw(9, 8)}, draw(4, 9, seed=2)
    make = lambda r: init_adapters(
        params, AdapterConfig(rank=r, targets=("w",)), jax.random.key(r)
    )
    bank = stack_adapters([make(1), make(3)])
    loss = lambda p, x: jnp.sum((x @ p["w"]) ** 2)

    def one(index):
        single = select_adapter(bank, index)
        value = lambda w: apply_adapted(loss, params, single.with_weights(w), x)
        return jax.grad(value)(single.weights)

    both = jax.vmap(one)(jnp.arange(2))
    for index in range(2):
        part = jax.tree.map(lambda a, i=index: a[i], both)
        close = lambda a, b: assert_close(a, b, 1e-4, least=1.0)
        jax.tree.map(close, part, one(index))


def test_ranks_follow_the_path_patterns():
    shapes = {"a.wq": (8, 8), "a.wo": (8, 8), "b.w": (8, 8)}
    config = AdapterConfig(
        rank=2, targets=("a.*", "b.*"), rank_pattern={"*.wo": 3, "b.*": 0}
    )
    plans = make_plans(shapes, config)
    assert {p.name: p.ranks for p in plans} == {"a.wq": (2, 2), "a.wo": (3, 3)}
