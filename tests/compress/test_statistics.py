"""What is summed over a text beside numpy on whole activations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.decompose.test_exact import DENSE, draw
from uoe_jax.compress.devices import begin, data_mesh
from uoe_jax.compress.sorting import expert_neurons, few_tokens
from uoe_jax.compress.statistics import _observe, observe
from uoe_jax.config import MeshConfig, UnionConfig
from uoe_jax.decompose.split import split_params, union_config
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.model.observe import Stream, layer_values
from uoe_jax.model.stacks import to_layers
from uoe_jax.partition.mesh import make_mesh


def batch_of(model, rows=5, length=12, seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, model.vocab_size, (rows, length)).astype(np.int32)
    segments = np.ones_like(tokens)
    segments[0, 9:] = 0  # padding, which must not count
    return {"tokens": tokens, "segments": segments}


def near(found, wanted, tolerance=2e-5):
    wanted = np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    if not wanted.size:
        return
    assert np.abs(found - wanted).max() <= tolerance * max(np.abs(wanted).max(), 1e-3)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_sums_are_those_of_whole_activations(qk_norm):
    config = dataclasses.replace(DENSE, qk_norm=qk_norm)
    model, batch = with_params(config, draw(config, 1)), batch_of(config)
    seen = observe(model, batch)
    stream = Stream(model, batch)
    for number, values in enumerate(layer_values(model, batch)):
        found = seen[number]
        assert found.tokens == found.expert_tokens[0] == 57
        pairs = [
            (found.attention_input, found.attention_mean, values.attention_input),
            (found.heads, found.heads_mean, values.heads.reshape(57, -1)),
            (found.mlp_input, found.mlp_mean, values.mlp_input),
            (found.neurons[0], found.neurons_mean[0], values.neurons),
        ]
        for moment, mean, rows in pairs:
            rows = rows.astype(np.float64)
            near(moment, rows.T @ rows)
            near(mean, rows.sum(0))
        block = model.trunk.blocks[0]
        attention = block.attention
        q, k = _queries_and_keys(attention, number, values.attention_input)
        near(found.query_squares, np.square(q).sum(0))
        near(found.key_squares, np.square(k).sum(0))
        near(found.inverse_square, (1 / np.square(values.residual).sum(1)).sum())
        before = np.asarray(stream._residual + stream._output)[stream.valid]
        stream.run_layer()
        after = values.residual + values.output
        cosine = (before * after).sum(1) / (
            np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
        )
        assert found.influence == pytest.approx(1 - cosine.mean(), abs=1e-5)
    assert seen[0].head_input.shape == (0, 0)
    hidden = np.asarray(stream.hidden(), np.float64)[stream.valid]
    near(seen[1].head_input, hidden.T @ hidden)


def _queries_and_keys(attention, layer, x):
    """Unrotated, as rotation changes no pair's square."""
    found = []
    for name in ("q", "k"):
        weight = np.asarray(getattr(attention, f"w{name}")[...])[layer, 0]
        bias = np.asarray(getattr(attention, f"b{name}")[...])[layer, 0]
        y = np.tensordot(x, weight, 1) + bias[None]
        norm = getattr(attention, f"{name}_norm")
        if norm is not None:
            scale = np.asarray(norm.scale[...])[layer]
            root = np.sqrt(np.square(y).mean(-1, keepdims=True) + norm.eps)
            y = y / root * scale.reshape((1,) * (y.ndim - 1) + (-1,))
        found.append(y)
    return found


def test_sums_are_the_same_however_many_tokens_are_taken_at_once():
    model, batch = with_params(DENSE, draw(DENSE, 2)), batch_of(DENSE)
    whole, parts = observe(model, batch), observe(model, batch, tokens_at_once=1)
    for first, second in zip(whole, parts, strict=True):
        for name in first._fields:
            near(getattr(second, name), getattr(first, name), 1e-5)


@pytest.mark.parametrize("mlp, devices, at_once", [
    ("dense", 3, 12), ("union", 8, 4096),
])  # fmt: skip
def test_several_devices_find_the_sums_of_one(mlp, devices, at_once):
    """Eleven rows, which divide over neither: three at a time, and all at once."""
    union = UnionConfig(num_experts=4, top_k=2)
    config = dataclasses.replace(DENSE, mlp=(mlp,), union=union)
    model = with_params(config, draw(config, 5))
    batch = batch_of(config, rows=11)
    mesh = make_mesh(MeshConfig(data=devices), devices=jax.devices()[:devices])
    one = observe(model, batch)
    found = observe(model, batch, tokens_at_once=at_once, mesh=mesh)
    for first, second in zip(one, found, strict=True):
        for name in first._fields:
            near(getattr(second, name), getattr(first, name), 1e-5)


def test_each_device_has_rows_of_its_own():
    model, batch = with_params(DENSE, draw(DENSE, 5)), batch_of(DENSE, rows=6)
    mesh = make_mesh(MeshConfig(data=4), devices=jax.devices()[:4])
    stream, run = begin(model, batch, mesh, _observe)
    stream.step(run)
    shards = stream._residual.addressable_shards
    assert [shard.data.shape for shard in shards] == [(2, 12, 16)] * 4


def test_a_mesh_has_as_many_devices_as_there_are_rows():
    assert data_mesh(1) is None
    assert data_mesh(5).shape == {"data": 5}
    assert data_mesh(11).shape == {"data": 8}


def test_experts_see_the_tokens_that_chose_them():
    union = UnionConfig(num_experts=4, top_k=2)
    config = dataclasses.replace(DENSE, mlp=("union",), union=union)
    model, batch = with_params(config, draw(config, 3)), batch_of(config)
    seen = observe(model, batch)
    params = to_layers(draw(config, 3), config)[1]
    for layer in seen:
        assert layer.expert_tokens.sum() == 2 * 57
        assert layer.neurons.shape == (4, 6, 6)
        # 57 tokens are few: an expert's channels are those of all, with its energy.
        assert few_tokens(layer).all()
        for e, shared in enumerate(expert_neurons(params[0], layer)):
            own, every = layer.neurons[e], layer.all_neurons[e].astype(np.float64)
            near(shared.moment / np.trace(shared.moment), every / np.trace(every))
            # Of one that nobody chose: the energy of one token of all.
            energy = max(np.trace(own), np.trace(every) / 57)
            near(np.trace(shared.moment), energy)
        plenty = layer._replace(expert_tokens=np.full(4, 60.0))
        for e, alone in enumerate(expert_neurons(params[0], plenty)):
            near(alone.moment, layer.neurons[e])
    # The residual goes on as the model's own: its last hidden state is found again.
    stream = Stream(model, batch)
    for _ in range(2):
        stream.step(lambda *a: _observe(*a, valid=jnp.asarray(stream.valid)))
    after = stream._last.add(stream._last.mlp_norm, stream._residual, stream._output)
    hidden, _ = model.hidden(
        jnp.asarray(batch["tokens"]), segments=jnp.asarray(batch["segments"])
    )
    found = np.asarray(model.trunk.finish(after))[stream.valid]
    near(found, np.asarray(hidden)[stream.valid], 1e-4)


def test_experts_all_on_and_alike_are_the_dense_layer():
    params = draw(DENSE, 4)
    config = union_config(DENSE, 4, 4, ("mlp",))
    routed = split_params(params, DENSE, config)
    batch = batch_of(DENSE)
    dense = observe(with_params(DENSE, params), batch)
    for first, second in zip(
        dense, observe(with_params(config, routed), batch), strict=True
    ):
        for e in range(4):
            place = slice(6 * e, 6 * e + 6)
            near(second.neurons[e], first.neurons[0, place, place], 1e-4)
        near(second.heads, first.heads, 1e-4)
        near(second.all_neurons, second.neurons, 1e-4)
        near(second.all_neurons_mean, second.neurons_mean, 1e-4)


def test_kinds_that_are_not_known_are_refused():
    config = dataclasses.replace(DENSE, mlp=("moe",))
    with pytest.raises(ConfigError, match="layer 0 has mlp moe; compressed are dense"):
        observe(with_params(config, draw(config, 1)), batch_of(config))
