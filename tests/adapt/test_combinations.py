"""Every method, start, path and kind of weight trains on a mesh, and merges right."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.compare import assert_close
from uoe_jax.adapt import (
    AdapterConfig,
    WeightAxes,
    adapted_params,
    apply_adapted,
    init_adapters,
)
from uoe_jax.adapt.config import INITS, Init, Method, Path
from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError
from uoe_jax.ops.grouped_matmul.api import grouped_matmul
from uoe_jax.partition.mesh import make_mesh

RNG = np.random.default_rng(0)
MESH = make_mesh(MeshConfig(data=2))
AXES = {"kernel": WeightAxes(axes="xyio", ins="i", outs="o", kernel="xy")}
# One weight of each kind: a lookup, heads, a matrix, experts, a convolution, a vector.
SHAPES = {
    "embed.embedding": (11, 8),
    "attention.wq": (1, 8, 2, 2, 4),
    "w": (16, 8),
    "mlp.w_up": (2, 8, 6),
    "kernel": (2, 2, 6, 4),
    "scale": (4,),
    "head.weight": (4, 11),
}


def draw(*shape):
    return jnp.asarray(0.5 * RNG.normal(size=shape), jnp.float32)


PARAMS = {name: draw(*shape) for name, shape in SHAPES.items()}
TOKENS = jnp.asarray(RNG.integers(0, 11, (4, 8)), jnp.int32)


def loss(params, tokens):
    """A mean over a device's tokens that goes through every weight."""
    x = params["embed.embedding"][tokens]
    x = jnp.tanh(x @ params["attention.wq"][0].reshape(8, 16)) @ params["w"]
    rows = x.reshape(-1, 8)
    half = rows.shape[0] // 2
    offsets = jnp.array([0, half, rows.shape[0]], jnp.int32)
    x = grouped_matmul(rows, params["mlp.w_up"], offsets)
    x = jax.lax.conv_general_dilated(
        x.reshape(tokens.shape[0], 2, 4, 6),
        params["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    x = x * params["scale"].reshape(1, 1, 1, 4)
    logits = x.reshape(*tokens.shape, 4) @ params["head.weight"]
    right = jnp.take_along_axis(logits, tokens[..., None], 2)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=2) - right)


def combinations():
    for method in typing.get_args(Method):
        for init in typing.get_args(Init):
            for dora in (False, True):
                for structured in (False, True):
                    yield method, init, dora, structured


def options(method, init, dora, structured):
    """Targets and options; `structured`: heads apart, experts with common factors."""
    return AdapterConfig(
        method=method,
        init=init,
        rank=2,
        targets=tuple(SHAPES),
        use_dora=dora,
        share_experts=structured,
        split_heads=structured and method == "tucker",
    )


def is_refused(method, init, _, structured):
    return init not in INITS[method] or (init == "hosvd" and structured)


def over_devices(fn, *whole):
    """A mean over devices, each with its tokens and all else, in a shard_map."""
    spec = PartitionSpec()
    run = jax.shard_map(
        lambda tokens, *whole: jax.lax.pmean(fn(tokens, *whole), "data"),
        mesh=MESH,
        in_specs=(PartitionSpec("data"), *[spec] * len(whole)),
        out_specs=spec,
    )
    return run(TOKENS, *whole)


@jax.jit
def train_a_step(fresh):
    """The base's loss; by path the loss and gradients, and the loss after a step; the
    loss of the merged weights. Starts of one shape share the program."""

    def adapted(path, training):
        return lambda tokens, params, adapters: apply_adapted(
            loss, params, adapters, tokens, path=path, training=training
        )

    def gradients(path):
        def both(tokens, params, adapters):
            local = jax.tree.map(
                lambda a: jax.lax.pcast(a, ("data",), to="varying"), adapters.weights
            )
            call = adapted(path, True)
            value = lambda w: call(tokens, params, adapters.with_weights(w))
            return jax.value_and_grad(value)(local)

        return over_devices(both, PARAMS, fresh)

    found = {path: gradients(path) for path in typing.get_args(Path)}
    step = lambda w, g: w - 0.05 * g
    moved = fresh.with_weights(jax.tree.map(step, fresh.weights, found["auto"][1]))
    merged = adapted_params(PARAMS, moved)
    plain = lambda tokens, params: loss(params, tokens)
    return {
        "base": over_devices(plain, PARAMS),
        "merged": over_devices(plain, merged),
        "paths": {
            path: (value, over_devices(adapted(path, False), PARAMS, moved), grads)
            for path, (value, grads) in found.items()
        },
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("combination", combinations(), ids=str)
def test_each_combination_trains_and_merges_or_is_refused(combination):
    config = options(*combination)
    if is_refused(*combination):
        with pytest.raises(ConfigError, match="init is|only Tucker"):
            init_adapters(PARAMS, config, jax.random.key(0), axes=AXES)
        return
    fresh = init_adapters(PARAMS, config, jax.random.key(0), axes=AXES)
    found = jax.device_get(train_a_step(fresh))
    for path, (before, after, grads) in found["paths"].items():
        # An untrained adapter is the base; a trained one is the merged model.
        assert_close(before, found["base"], 1e-5)
        assert_close(after, found["merged"], 1e-5)
        assert after < before - 1e-4, path
        for name, parts in grads.items():
            largest = max(np.abs(grad).max() for grad in parts.values())
            assert largest > 0, (path, name)
            for part, grad in parts.items():
                want = found["paths"]["delta"][2][name][part]
                assert_close(grad, want, 1e-4, least=largest, about=part)
