"""Layers narrower than their model: the same function as a whole one with zeros."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.model.tiny_models import VOCAB, tiny
from uoe_jax.config import LayerWidths, ModelConfig, RopeScaling, from_json, to_json
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import count_params
from uoe_jax.model import (
    flat_buffers,
    flat_params,
    init_cache,
    make_model,
    param_shapes,
    whole_buffers,
    with_params,
)
from uoe_jax.model.decoding.attention import TokenAttention
from uoe_jax.model.decoding.step import prepare
from uoe_jax.validation import validate_model
from uoe_jax.weights import BLOCKS, layer_period, model_params

HEADS, D_FF = 8, 64  # of the tiny model


def widths_of(rng, layers, experts=1):
    """Return random widths of every layer."""
    draw = lambda low, high, step=1: tuple(
        int(n) * step for n in rng.integers(low, high + 1, layers)
    )
    return LayerWidths(
        d_ff=draw(1, D_FF // experts, experts),
        key_dim=draw(1, HEADS // 2, 2),
        value_dim=draw(1, HEADS),
    )


def layers_of(params, config):
    """Yield each layer's parameters by their name inside it, without its axis."""
    period = layer_period(config)
    for layer in range(config.num_layers):
        start = f"{BLOCKS}{layer % period}."
        yield {
            name.removeprefix(start): array[layer // period]
            for name, array in params.items()
            if name.startswith(start)
        }


def stacked(config, layers):
    """Return the parameters of layers under the names of a config's stacks."""
    period = layer_period(config)
    return {
        f"{BLOCKS}{stack}.{name}": np.stack(
            [one[name] for one in layers[stack::period]]
        )
        for stack in range(period)
        for name in layers[stack]
    }


def narrowed(layer, own: ModelConfig, rng):
    """Return a layer cut to its widths, its pairs, and the whole layer with zeros."""
    narrow, whole = dict(layer), {n: a.copy() for n, a in layer.items()}
    half, heads = own.head_dim // 2, own.num_kv_heads
    some = lambda size, count: np.stack(
        [rng.permutation(size)[:count] for _ in range(heads)]
    )
    values, pairs = some(own.head_dim, own.value_dim), some(half, own.key_dim // 2)
    if own.key_dim == own.head_dim:  # an ordinary layer keeps its pairs in order
        pairs = np.sort(pairs, axis=1)
    dims = np.concatenate([pairs, pairs + half], axis=1)
    plan = {"wq": (2, dims), "wk": (2, dims), "bq": (1, dims), "bk": (1, dims)}
    plan |= {"wv": (2, values), "bv": (1, values), "wo": (1, values)}
    for name, (axis, kept) in plan.items():
        array = layer.get(f"attention.{name}")
        if array is None:
            continue
        place = -2 if name == "wo" else -1
        cut = [
            np.take(np.take(array, head, axis), kept[head], place)
            for head in range(heads)
        ]
        narrow[f"attention.{name}"] = np.stack(cut, axis)
        zeros = whole[f"attention.{name}"]
        for head in range(heads):
            mask = np.isin(np.arange(own.head_dim), kept[head])
            mask = mask[:, None] if name == "wo" else mask
            index = (slice(None),) * axis + (head,)
            zeros[index] = zeros[index] * mask
    experts, _, width = layer["mlp.w_up"].shape
    kept = rng.permutation(width)[: own.d_ff // experts]
    for name in ("w_up", "w_gate", "b_up", "b_gate"):
        if f"mlp.{name}" in layer:
            narrow[f"mlp.{name}"] = layer[f"mlp.{name}"][..., kept]
    narrow["mlp.w_down"] = layer["mlp.w_down"][:, kept]
    mask = np.isin(np.arange(width), kept)
    whole["mlp.w_down"] = layer["mlp.w_down"] * mask[:, None]
    return narrow, pairs.astype(np.int32), whole


def narrow_model(config, widths, seed=0):
    """Return a narrow model cut from a random one, and that one with zeros."""
    rng = np.random.default_rng(seed)
    params = flat_params(make_model(config, seed))
    params = {n: a + 0.1 * rng.normal(size=a.shape) for n, a in params.items()}
    params = {n: a.astype(np.float32) for n, a in params.items()}
    own = dataclasses.replace(config, widths=widths)
    parts = [
        narrowed(layer, own.of_layer(number), rng)
        for number, layer in enumerate(layers_of(params, config))
    ]
    rest = {n: a for n, a in params.items() if not n.startswith(BLOCKS)}
    small = rest | stacked(own, [part[0] for part in parts])
    pairs = {}
    for name in whole_buffers(own, {}):
        if name.endswith("rotary_pairs"):
            stack, period = (
                int(name.removeprefix(BLOCKS).split(".")[0]),
                layer_period(own),
            )
            pairs[name] = np.stack([part[1] for part in parts[stack::period]])
    zeroed = with_params(config, rest | stacked(config, [part[2] for part in parts]))
    return with_params(own, small, pairs), zeroed


CASES = {
    "bias": dict(use_bias=True, num_layers=3),
    "swiglu": dict(
        activation="swiglu",
        num_layers=3,
        rope_scaling=RopeScaling(kind="llama3", factor=4.0, original_max_seq_len=16),
    ),  # fmt: skip
    "union": dict(mlp=("union",), activation="swiglu", num_layers=2),
    "learned": dict(position="learned", norm="layernorm", use_bias=True),
    "windows": dict(window=(0, 7), num_layers=4, attention_bias="all"),
}


def batch(seed, shape=(2, 24)):
    return jax.random.randint(jax.random.key(seed), shape, 0, VOCAB)


@pytest.mark.parametrize("case", CASES)
def test_a_narrow_model_is_the_whole_one_with_zeros(case):
    config = tiny(**CASES[case])
    rng = np.random.default_rng(len(case))
    experts = config.union.num_experts if "union" in config.mlp else 1
    widths = widths_of(rng, config.num_layers, experts)
    narrow, zeroed = narrow_model(config, widths, seed=3)
    tokens = batch(1)
    want, found = zeroed(tokens)[0], narrow(tokens)[0]
    assert float(jnp.abs(want - found).max()) < 1e-5 * float(jnp.abs(want).max() + 1)
    # Not by chance: the whole model's zeros matter.
    whole = make_model(config, 3)(tokens)[0]
    assert float(jnp.abs(want - whole).max()) > 1e-2


@pytest.mark.parametrize("case", ["bias", "union", "windows", "learned", "swiglu"])
def test_decoding_is_the_forward_pass(case):
    config = tiny(**CASES[case])
    experts = config.union.num_experts if "union" in config.mlp else 1
    rng = np.random.default_rng(7)
    model, _ = narrow_model(config, widths_of(rng, config.num_layers, experts), 5)
    config = model.config
    forms = [type(layer.attention) for layer in prepare(model, 2, False).layers]
    assert forms == [TokenAttention] * config.num_layers
    tokens = batch(2, (2, 16))
    want = model(tokens)[0]
    lengths = jnp.array([5, 3])
    logits, cache = model.prefill(tokens[:, :5], lengths, init_cache(config, 2, 16))
    rows = jnp.arange(2)
    worst = jnp.abs(logits - want[rows, lengths - 1]).max()
    for step in range(11):
        place = lengths + step
        logits, cache = model.decode(tokens[rows, place], cache)
        worst = jnp.maximum(worst, jnp.abs(logits - want[rows, place]).max())
    assert float(worst) < 1e-5 * float(jnp.abs(want).max() + 1)


def test_a_low_rank_product_is_its_whole_matrix():
    config = tiny(activation="swiglu", use_bias=True)
    ranks = LayerWidths(up_rank=(3, 0), gate_rank=(0, 5), down_rank=(7, 2))
    low = make_model(dataclasses.replace(config, widths=ranks), 4)
    layers = []
    for layer in layers_of(flat_params(low), low.config):
        for name in ("w_up", "w_gate", "w_down"):
            if f"mlp.{name}_a" in layer:
                first, second = (layer.pop(f"mlp.{name}_{half}") for half in "ab")
                layer[f"mlp.{name}"] = first @ second
        layers.append(layer)
    rest = {n: a for n, a in flat_params(low).items() if not n.startswith(BLOCKS)}
    whole = with_params(config, rest | stacked(config, layers))
    tokens = batch(3)
    assert float(jnp.abs(low(tokens)[0] - whole(tokens)[0]).max()) < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_the_table_of_weights_has_every_shape(seed):
    rng = np.random.default_rng(seed)
    config = tiny(num_layers=4, activation="swiglu", use_bias=True)
    widths = dataclasses.replace(
        widths_of(rng, 4),
        d_ff=(64, 32, 64, 32),
        up_rank=(9, 0, 0, 3),
        down_rank=(0,) * 4,
    )
    config = dataclasses.replace(config, widths=widths)
    shapes = {name: leaf.shape for name, leaf in param_shapes(config).items()}
    assert shapes == {name: param.shape for name, param in model_params(config).items()}
    count = sum(array.size for array in flat_params(make_model(config)).values())
    assert sum(count_params(config).values()) == count


def test_stacks_are_as_long_as_widths_repeat():
    period = lambda **widths: layer_period(
        tiny(num_layers=4, widths=LayerWidths(**widths))
    )
    assert period(d_ff=(32, 64, 32, 64)) == 2
    assert period(key_dim=(4, 4, 4, 4), up_rank=(0, 0, 0, 0)) == 1
    assert period(value_dim=(8, 8, 8, 4)) == 4
    # As wide as the model: nothing is narrow.
    same = tiny(num_layers=4, widths=LayerWidths(key_dim=(8,) * 4, d_ff=(64,) * 4))
    assert flat_buffers(make_model(same)) == {}
    assert same.of_layer(2) == tiny(num_layers=4)


def test_a_config_with_widths_is_read_as_it_was_written():
    config = tiny(widths=LayerWidths(d_ff=(3, 4), up_rank=(0, 2)))
    assert from_json(to_json(config), ModelConfig) == config


@pytest.mark.parametrize(
    ("changes", "widths", "said"),
    [
        ({}, {"d_ff": (64,)}, "d_ff has 1 numbers for 2 layers; give one a layer"),
        ({}, {"d_ff": (65, 1)}, "d_ff has 65 and model.d_ff is 64"),
        ({}, {"d_ff": (0, 1)}, "model.widths.d_ff is 0; it must be at least 1"),
        ({}, {"key_dim": (10, 2)}, "key_dim has 10 and model.head_dim is 8"),
        ({}, {"key_dim": (3, 2)}, "key_dim has 3; pairs are rotated, use an even"),
        ({"qk_norm": True}, {"key_dim": (2, 2)}, "set with model.qk_norm"),
        ({"attention": ("union",)}, {"value_dim": (2, 2)}, "with 'union' attention"),
        ({"blocks": ("mod",)}, {"value_dim": (2, 2)}, "with 'mod' blocks"),
        ({"mlp": ("moe",)}, {"d_ff": (32, 32)}, "d_ff is set with 'moe' MLPs"),
        ({"mlp": ("union",)}, {"d_ff": (63, 64)}, "doesn't divide 63 of"),
        ({"mlp": ("union",)}, {"up_rank": (3, 0)}, "whose MLP is 'union'"),
        ({}, {"gate_rank": (3, 0)}, "'gelu' has no gate"),
        ({}, {"up_rank": (0, 22)}, "layer 1, a matrix of 32 and 64: a rank above 21"),
        ({}, {"d_ff": (64, 8), "down_rank": (21, 7)}, "32 and 8: a rank above 6 saves"),
    ],
)
def test_widths_that_cannot_be_are_one_line(changes, widths, said):
    with pytest.raises(ConfigError) as caught:
        validate_model(tiny(**changes, widths=LayerWidths(**widths)))
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (np.zeros((2, 4, 2), int), "names a pair of a head twice"),
        (np.broadcast_to(np.array([0, 4]), (2, 4, 2)), "0 to 4; a head of"),
        (np.zeros((2, 4, 2)), "float64; it must be [2, 4, 2] integers"),
    ],
)
def test_pairs_that_cannot_be_are_refused(pairs, said):
    config = tiny(widths=LayerWidths(key_dim=(4, 4)))
    params = flat_params(make_model(config))
    name = f"{BLOCKS}0.attention.rotary_pairs"
    with pytest.raises(ConfigError) as caught:
        with_params(config, params, {name: pairs})
    assert said in str(caught.value)
