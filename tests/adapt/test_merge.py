"""Merged weights in float32, exact originals, and layouts taken from the weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from tests.adapt.moved_adapters import move_adapters
from tests.compare import assert_close
from uoe_jax.adapt import (
    AdapterConfig,
    WeightAxes,
    adapted_params,
    apply_adapted,
    init_adapters,
    leaf_delta,
)
from uoe_jax.adapt.layout import adapter_specs, place_adapters
from uoe_jax.adapt.merge import merge, unmerge
from uoe_jax.errors import ConfigError

AXES = {
    "wq": WeightAxes(axes="edjgh", ins="d", outs="jgh", heads="jgh"),
    "wo": WeightAxes(axes="ejghd", ins="jgh", outs="d", heads="jgh"),
}


@given(st.integers(0, 2**31), st.sampled_from(["float32", "bfloat16"]))
@settings(max_examples=15, deadline=None)
def test_f4_unmerge_gives_every_bit_back(seed, dtype):
    drawn = np.random.default_rng(seed).normal(size=(6, 5))
    params = {"w": jnp.asarray(drawn, dtype), "b": jnp.ones(3)}
    adapters = move_adapters(params, AdapterConfig(rank=2, targets=("w",)), seed)
    merged = merge(params, adapters)
    assert merged.params["w"].dtype == params["w"].dtype
    assert np.any(np.asarray(merged.params["w"]) != np.asarray(params["w"]))
    back = unmerge(merged)
    for name, value in params.items():
        assert np.asarray(back[name]).tobytes() == np.asarray(value).tobytes()


def test_merging_adds_in_float32_and_rounds_once(make):
    params = {"w": jax.random.normal(jax.random.key(0), (64, 48)).astype(jnp.bfloat16)}
    sets = [make(params, AdapterConfig(rank=2, targets=("w",)), seed=s) for s in (1, 2)]
    total = params["w"].astype(jnp.float32)
    total = total + sum(leaf_delta(one, one["w"]) for one in sets)
    got = merge(params, sets).params["w"]
    same = np.asarray(got == total.astype(jnp.bfloat16))
    assert same.mean() > 0.999  # a sum in another order may round a tie apart


SPECS = {
    "wq": PartitionSpec(None, "fsdp", "tensor"),
    "wo": PartitionSpec(None, "tensor", None, None, "fsdp"),
}


def test_layouts_come_from_the_weights_axes():
    params = {"wq": jnp.zeros((1, 8, 4, 2, 3)), "wo": jnp.zeros((1, 4, 2, 3, 8))}
    config = lambda **o: AdapterConfig(rank=2, targets=("*",), **o)
    lora = init_adapters(params, config(method="lora"), jax.random.key(0), axes=AXES)
    specs = adapter_specs(lora, SPECS)
    p = PartitionSpec
    assert specs["wq"] == {
        "a": p(None, "fsdp", None),
        "b": p(None, None, "tensor", None, None),
    }
    assert specs["wo"]["a"] == p(None, "tensor", None, None, None)
    split = init_adapters(
        params, config(split_heads=True), jax.random.key(0), axes=AXES
    )
    specs = adapter_specs(split, SPECS)["wq"]
    assert specs["core"] == p(None, None, None, None, None)
    assert specs["factor_j"] == p(None, "tensor", None)
    assert specs["factor_d"] == p(None, "fsdp", None)
    with pytest.raises(ConfigError, match="no layout for wo"):
        adapter_specs(lora, {"wq": SPECS["wq"]})


def test_f12_sharded_equals_single(make):
    rng = np.random.default_rng(0)
    params = {
        "wq": jnp.asarray(rng.normal(size=(1, 8, 4, 2, 3)), jnp.float32),
        "wo": jnp.asarray(rng.normal(size=(1, 4, 2, 3, 8)), jnp.float32),
    }
    x = jnp.asarray(rng.normal(size=(4, 8)), jnp.float32)

    def fn(p, x):
        heads = jnp.tanh(x @ p["wq"][0].reshape(8, -1))
        return heads @ p["wo"][0].reshape(-1, 8)

    mesh = jax.make_mesh((2, 4), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    placed = {
        name: jax.device_put(value, NamedSharding(mesh, SPECS[name]))
        for name, value in params.items()
    }
    for method in ("lora", "tucker"):
        adapters = make(
            params, AdapterConfig(method=method, rank=2, targets=("*",)), axes=AXES
        )
        spread = place_adapters(adapters, placed)
        part = spread.weights["wq"]["a" if method == "lora" else "factor_d"]
        assert part.sharding.spec == PartitionSpec(None, "fsdp", None)
        assert len(part.sharding.device_set) == 8
        want = apply_adapted(fn, params, adapters, x)
        run = jax.jit(lambda p, a, x: apply_adapted(fn, p, a, x, path="factored"))
        assert_close(run(placed, spread, x), want, 1e-5, least=1.0)
        whole = adapted_params(params, adapters)
        merged = jax.jit(adapted_params)(placed, spread)
        for name, value in merged.items():
            assert_close(value, whole[name], 1e-5, least=1.0)
            assert value.sharding.is_equivalent_to(placed[name].sharding, value.ndim)
