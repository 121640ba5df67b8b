"""The whole model: exact decomposition, layer loops, precision, documents, padding."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.model.tiny_models import (
    VARIANTS,
    build,
    forward,
    split_model,
    split_weights,
    tiny,
    tokens_like,
    union,
)
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model import make_model, router_losses, routing_choices
from uoe_jax.presets import PRESETS, get_preset

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def gradients(graphdef, params, buffers, tokens):
    def compute(params):
        logits, _ = nnx.merge(graphdef, params, buffers)(tokens)
        return jnp.mean(jax.nn.logsumexp(logits, -1) - logits[..., 3]), logits

    (_, logits), grads = jax.value_and_grad(compute, has_aux=True)(params)
    return logits, grads


def loss_and_grads(model, tokens):
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)
    logits, grads = gradients(graphdef, params, buffers, tokens)
    return logits, nnx.merge(graphdef, grads, buffers)


@pytest.mark.parametrize(
    ("kv_heads", "experts", "activation", "use_bias"),
    [
        (8, 8, "gelu", False),  # a head for each expert
        # Two key heads, two query heads each, and all weights.
        pytest.param(4, 2, "swiglu", True, marks=pytest.mark.both_jax),
    ],
)
def test_all_experts_with_unit_gates_are_the_dense_model(
    kv_heads, experts, activation, use_bias
):
    options = {
        "num_kv_heads": kv_heads,
        "activation": activation,
        "use_bias": use_bias,
        "union": UnionConfig(num_experts=experts, top_k=experts),
    }
    dense = build(tiny(**options))
    parts = split_model(dense, union(**options))
    tokens = tokens_like(tiny(), 2, 12, seed=1)
    logits, grads = loss_and_grads(dense, tokens)
    logits_union, grads_union = loss_and_grads(parts, tokens)
    np.testing.assert_allclose(logits_union, logits, atol=1e-5)
    expected = split_weights(grads, experts)
    got = dict(nnx.to_flat_state(nnx.state(grads_union, nnx.Param)))
    for path, value in expected.items():
        np.testing.assert_allclose(got[path][...], value, atol=1e-5, err_msg=str(path))
        assert np.abs(value).max() > 1e-6, path


@pytest.mark.both_jax
def test_all_experts_are_the_dense_model_in_bfloat16():
    options = {
        "compute_dtype": "bfloat16",
        "union": UnionConfig(num_experts=4, top_k=4),
    }
    dense = build(tiny(**options))
    parts = split_model(dense, union(**options))
    tokens = tokens_like(tiny(), 2, 12, seed=1)
    logits, union_logits = forward(dense, tokens)[0], forward(parts, tokens)[0]
    # Logits are of order 1; one bfloat16 rounding is 2**-8 of a value.
    difference = np.abs(logits - union_logits)
    assert np.mean(difference) < 2e-2 and np.max(difference) < 1e-1
    assert logits.dtype == jnp.float32


@pytest.mark.parametrize("name", ["union", "moe"])
def test_bfloat16_is_close_to_float32(name):
    config = VARIANTS[name]
    # Of tokens whose routing survives rounding, which are most with this seed.
    tokens = tokens_like(config, 2, 12, seed=7)
    exact, aux = forward(build(config), tokens)
    low = dataclasses.replace(config, compute_dtype="bfloat16")
    rounded, aux_low = forward(build(low), tokens)
    same = np.ones(tokens.shape, bool)
    for part, stats in aux.items():
        # Near ties may choose otherwise; compare tokens up to the first that did.
        equal = stats["choices"] == aux_low[part]["choices"]
        same &= np.all(equal, axis=(0, 3))
    same = np.logical_and.accumulate(same, axis=1)
    assert same.mean() > 0.5
    difference = np.abs(exact - rounded)[same]
    assert difference.mean() < 2e-2


def test_scanned_layers_equal_looped_layers():
    config = VARIANTS["mixed"]
    tokens = tokens_like(config, 2, 12, seed=3)
    logits, aux = forward(build(config), tokens)
    looped = dataclasses.replace(config, scan_layers=False)
    logits_loop, aux_loop = forward(build(looped), tokens)
    assert_close(logits_loop, logits, 1e-5)
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), aux, aux_loop)


@pytest.mark.parametrize(
    ("config", "remat"),
    [
        pytest.param(union(), "dots", id="union-dots"),
        # A dense model compiles in a third of the time.
        pytest.param(tiny(), "full", id="dense-full"),
        pytest.param(union(), "full", id="union-full", marks=pytest.mark.nightly),
    ],
)
def test_remat_changes_no_gradient(config, remat):
    tokens = tokens_like(config, 2, 8, seed=4)
    logits, grads = loss_and_grads(build(config), tokens)
    again = build(dataclasses.replace(config, remat=remat))
    logits_remat, grads_remat = loss_and_grads(again, tokens)
    assert_close(logits_remat, logits, 1e-5)
    pairs = zip(jax.tree.leaves(grads), jax.tree.leaves(grads_remat), strict=True)
    for a, b in pairs:
        assert_close(a, b, 1e-5)


@pytest.mark.both_jax
@pytest.mark.parametrize(("remat", "recomputed"), [("full", True), ("dots", False)])
def test_remat_dots_keeps_the_projections(remat, recomputed):
    count = {}
    for kind in ("none", remat):
        model = build(tiny(remat=kind, num_layers=1))
        tokens = tokens_like(tiny(), 1, 4, seed=4)
        backward = jax.make_jaxpr(jax.grad(lambda m, t: m(t)[0].sum(), allow_int=True))
        count[kind] = str(backward(model, tokens)).count("dot_general")
    # Recomputing repeats the seven products of a block; attention's two always are.
    assert (count[remat] - count["none"] >= 6) == recomputed


@pytest.mark.parametrize("name", ["union-patch", "moe"])
def test_a_sample_alone_is_the_sample_in_a_batch(name):
    model = build(VARIANTS[name])
    tokens = tokens_like(model.config, 2, 12, seed=5)
    together, _ = forward(model, tokens)
    for row in range(2):
        alone, _ = forward(model, tokens[row : row + 1])
        np.testing.assert_allclose(alone[0], together[row], atol=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.both_jax if name == "union" else ())
        for name in VARIANTS
    ],
)
def test_a_packed_document_is_the_document_alone(name):
    model = build(VARIANTS[name])
    tokens = tokens_like(model.config, 2, 12, seed=6)
    segments = jnp.array([[1] * 5 + [2] * 5 + [0] * 2, [1] * 3 + [2] * 9])
    positions = jnp.array([[*range(5), *range(5), 0, 1], [*range(3), *range(9)]])
    packed, _ = forward(model, tokens, segments=segments, positions=positions)
    for row, begin, end in ((0, 0, 5), (0, 5, 10), (1, 0, 3), (1, 3, 12)):
        # The model is causal: what follows a document leaves it alone.
        alone, _ = forward(model, jnp.roll(tokens, -begin, axis=1))
        expected = alone[row, : end - begin]
        np.testing.assert_allclose(expected, packed[row, begin:end], atol=2e-5)


@pytest.mark.parametrize("name", ["union", "mixed"])
def test_padding_changes_neither_logits_nor_statistics(name):
    model = build(VARIANTS[name])
    tokens = tokens_like(model.config, 2, 12, seed=7)
    segments = jnp.where(jnp.arange(12)[None] < 8, jnp.ones((2, 1), int), 0)
    short, aux_short = forward(model, tokens[:, :8])
    positions = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    long, aux_long = forward(model, tokens, segments=segments, positions=positions)
    assert_close(long[:, :8], short, 1e-5)
    for part, stats in aux_short.items():
        for statistic in set(stats) - {"choices"}:
            expected = aux_long[part][statistic]
            assert_close(stats[statistic], expected, 1e-5, least=1.0)


def test_encoder_ignores_padding_at_any_length():
    config = union(kind="encoder", num_classes=5)
    model = build(config)
    tokens = tokens_like(config, 2, 12, seed=8)
    segments = jnp.where(jnp.arange(12)[None] < 8, jnp.ones((2, 1), int), 0)
    short, _ = forward(model, tokens[:, :8])
    long, _ = forward(model, tokens, segments=segments)
    assert short.shape == (2, 5) and short.dtype == jnp.float32
    np.testing.assert_allclose(long, short, atol=1e-5)


@pytest.mark.both_jax
def test_vision_gives_class_logits_that_depend_on_every_patch():
    config = tiny(
        kind="vision",
        mlp=("union",),
        num_classes=5,
        image_channels=3,
        position="learned",
    )
    model = build(config)
    images = jax.random.normal(KEY, (2, 8, 8, 3))
    logits, aux = forward(model, images)
    assert logits.shape == (2, 5) and logits.dtype == jnp.float32
    assert aux["mlp"]["load"].shape == (2, 4)
    moved = jax.jit(jax.grad(lambda x: model(x)[0].sum()))(images)
    assert np.all(np.abs(moved).sum((1, 2, 3)) > 0)
    assert np.all(np.abs(moved).reshape(2, 4, 2, 4, 2, 3).sum((2, 4, 5)) > 0)


def test_rotary_logits_depend_only_on_relative_positions():
    model = build(union())
    tokens = tokens_like(model.config, 2, 12, seed=9)
    base = jnp.broadcast_to(jnp.arange(12)[None], (2, 12))
    a, _ = forward(model, tokens, positions=base)
    b, _ = forward(model, tokens, positions=base + 7)
    c, _ = forward(model, tokens, positions=base * 3)
    np.testing.assert_allclose(a, b, atol=1e-4)
    assert np.abs(a - c).max() > 1e-3


def test_dropout_needs_both_a_key_and_training():
    model = build(tiny(dropout=0.5))
    tokens = tokens_like(model.config, 2, 8, seed=10)
    run = jax.jit(
        lambda key, train: model(tokens, key=key, train=train)[0], static_argnums=1
    )
    off, _ = forward(model, tokens)
    np.testing.assert_array_equal(run(KEY, False), off)
    np.testing.assert_array_equal(run(None, True), off)
    on = run(KEY, True)
    assert np.abs(on - off).max() > 1e-2
    np.testing.assert_array_equal(on, run(KEY, True))
    assert np.abs(on - run(jax.random.key(1), True)).max() > 1e-2


def test_dropout_differs_between_layers_and_keeps_the_mean():
    from uoe_jax.model.layers import dropout

    x = jnp.ones((100, 200))
    y = dropout(x, 0.25, KEY)
    assert_close(np.unique(y), [0, 1 / 0.75], 1e-6)
    # 20000 draws: the mean's standard deviation is 0.004.
    assert abs(float(y.mean()) - 1) < 0.02


def test_new_values_of_the_same_shape_do_not_recompile():
    model = build(VARIANTS["union"])
    chex.clear_trace_counter()
    once = jax.jit(chex.assert_max_traces(forward.__wrapped__, n=1))
    for seed in range(3):
        once(model, tokens_like(model.config, 2, 12, seed=seed))
        model = jax.tree.map(lambda a: 0.5 * a, model)


@pytest.mark.both_jax
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_without_allocating(name):
    config = get_preset(name).model
    model = jax.eval_shape(lambda: make_model(config, jax.random.key(0)))
    for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)):
        assert isinstance(leaf, jax.ShapeDtypeStruct)
        assert leaf.dtype == config.param_dtype


@pytest.mark.both_jax
def test_parameter_shapes():
    config = union(num_layers=3, use_bias=True, activation="swiglu")
    flat = nnx.to_flat_state(nnx.state(build(config), nnx.Param))
    shapes = {path: value.shape for path, value in flat}
    block = {path[-2:]: shape for path, shape in shapes.items() if "blocks" in path}
    assert block[("attention", "wq")] == (3, 4, 32, 1, 2, 8)  # L E D J G H
    assert block[("attention", "wk")] == (3, 4, 32, 1, 8)
    assert block[("attention", "wo")] == (3, 4, 1, 2, 8, 32)
    assert block[("attention", "bo")] == (3, 32)
    assert block[("mlp", "w_gate")] == block[("mlp", "w_up")] == (3, 4, 32, 16)
    assert block[("mlp", "w_down")] == (3, 4, 16, 32)
    assert block[("mlp", "b_down")] == (3, 32)
    assert block[("router", "weight")] == (3, 32, 4)
    assert shapes[("embed", "embedding")] == (61, 32)
    dense = build(tiny(mlp=("dense", "moe"), num_layers=5))
    flat = dict(nnx.to_flat_state(nnx.state(dense, nnx.Param)))
    assert flat[("trunk", "blocks", 0, "mlp", "w_up")].shape == (3, 1, 32, 64)
    assert flat[("trunk", "blocks", 1, "mlp", "w_up")].shape == (2, 4, 32, 32)


def test_initial_weights_of_a_union_have_the_dense_models_spread():
    dense = make_model(tiny(d_model=64, d_ff=256), KEY)
    parts = make_model(union(d_model=64, d_ff=256), KEY)
    a = dict(nnx.to_flat_state(nnx.state(dense, nnx.Param)))
    b = dict(nnx.to_flat_state(nnx.state(parts, nnx.Param)))
    block = ("trunk", "blocks", 0)
    fan_in = {"wq": 64, "wk": 64, "wo": 64 * 4, "w_up": 64, "w_down": 256 * 4}
    for name, fan in fan_in.items():
        path = (*block, "attention" if name in ("wq", "wk", "wo") else "mlp", name)
        # Output projections carry another 1/sqrt(2L), L = 2. At least 4096 draws.
        for flat in (a, b):
            assert_close(np.std(flat[path][...]), fan**-0.5, 0.05)


def test_router_losses_are_the_weighted_sum_over_routed_layers():
    config = VARIANTS["mixed"]
    model = build(config)
    _, aux = forward(model, tokens_like(config, 2, 12, seed=11))
    attention, mlp = aux["attention"], aux["mlp"]
    assert attention["load"].shape == (1, 4) and mlp["load"].shape == (3, 5)
    expected = 0.01 * (attention["balance_loss"].sum() + mlp["balance_loss"].sum())
    expected += 0.001 * (attention["z_loss"].sum() + mlp["z_loss"].sum())
    assert_close(router_losses(aux, config), expected, 1e-6)
    assert_close(mlp["load"].sum(-1), 1, 1e-6)
    # Layer 1 is the union of 4 experts between two mixtures of 5.
    assert mlp["load"][1, 4] == 0


@pytest.mark.both_jax
def test_routing_choices_are_distinct_experts_of_every_layer():
    config = VARIANTS["mixed"]
    tokens = tokens_like(config, 2, 12, seed=12)
    shapes = jax.eval_shape(routing_choices, build(config), tokens)
    assert shapes["attention"].shape == (1, 2, 12, 2)
    assert shapes["mlp"].shape == (3, 2, 12, 3)
    choices = np.asarray(forward(build(config), tokens)[1]["mlp"]["choices"])
    assert np.all(choices[1, ..., 2] == -1)  # the union picks two
    for row in choices.reshape(-1, 3):
        assert len(set(row)) == 3


@pytest.mark.both_jax
def test_too_many_tokens_are_refused_in_one_line():
    model = build(tiny())
    with pytest.raises(ConfigError, match=r"33 tokens .* max_seq_len 32.*raise"):
        model(jnp.zeros((1, 33), int))
