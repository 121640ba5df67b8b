"""Compiling for TPUs that aren't here; benchmarks/aot_tpu.py does every shape."""

from __future__ import annotations

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from uoe_jax.errors import ConfigError
from uoe_jax.ops import Packing, pack_choices, tpu
from uoe_jax.ops.grouped_matmul.tpu import mosaic as grouped
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.tpu import mosaic as attention
from uoe_jax.plan import aot

BF16 = jnp.bfloat16
SMALL = dict.fromkeys(("rows", "chunk", "key_rows", "key_chunk"), 128)
TOKENS, EXPERTS, TOP_K, D, H = 1024, 4, 2, 256, 128


def shape(*sides, dtype=BF16, sharding=None):
    return jax.ShapeDtypeStruct(sides, dtype, sharding=sharding)


WEIGHTS = shape(EXPERTS, D, 3 * H), shape(EXPERTS, H, D)


def layer(x, w_in, w_out, packing):
    """Selective attention: gathered rows of x in, summed rows out."""
    rows = grouped.gather_project(x, w_in, packing)
    q, k, v = jnp.split(rows, 3, axis=1)
    offsets, mask = packing.segment_offsets, Mask(causal=True)
    out = attention.segment_attention(Call(q[:, None], k, v, offsets, mask, 0.1))
    return grouped.project_scatter(out[:, 0], w_out, packing)


def assert_x_is_held_once(executable, tokens):
    """No buffer has room for a copy of x for each expert."""
    largest = max(math.prod(sides) for sides in aot.buffer_shapes(executable))
    assert TOP_K * tokens * D <= largest < EXPERTS * tokens * D


def test_without_libtpu_the_fix_is_said(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install"):
        aot.topology_devices("v5e:2x2")


# libtpu exists for Linux on x86 only; elsewhere there is nothing to compile with.
if importlib.util.find_spec("libtpu") is not None:

    def test_unknown_topology_names_some_that_exist():
        with pytest.raises(ConfigError, match="v5e:2x2"):
            aot.topology_devices("v99:2x2")

    def test_a_mesh_larger_than_the_topology_is_refused():
        with pytest.raises(ConfigError, match="needs 8 devices"):
            aot.topology_mesh("v5e:2x2", {"data": 8})

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=() if name == "v5e" else pytest.mark.nightly)
            for name in aot.TOPOLOGIES
        ],
    )
    def test_a_union_layer_compiles_for_every_generation(name):
        mesh = aot.topology_mesh(aot.TOPOLOGIES[name])
        kind = mesh.devices.flat[0].device_kind
        ints = functools.partial(shape, dtype=jnp.int32)
        packing = Packing(
            token_ids=ints(TOKENS * TOP_K),
            row_ids=ints(TOKENS, TOP_K),
            segment_offsets=ints(EXPERTS + 1),
            group_offsets=ints(EXPERTS + 1),
        )
        args = shape(TOKENS, D), *WEIGHTS, packing
        with tpu.compiling_for(kind, **SMALL):
            executable = aot.lower_for(layer, *args, mesh=mesh).compile()
        figures = aot.describe(executable, aot.TOPOLOGIES[name], mesh)
        assert figures.device_kind == kind
        assert figures.kernels == {
            "grouped_matmul": 2,
            "segment_attention_forward": 1,
            "sum_rows": 1,
        }
        assert figures.output_bytes >= TOKENS * D * 2
        assert 0 < figures.optimal_seconds < 1e-3
        assert_x_is_held_once(executable, TOKENS)

    def test_gradients_compile_inside_a_checked_shard_map():
        mesh = aot.topology_mesh("v5e:2x2", {"data": 4})

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(PartitionSpec("data"), PartitionSpec()),
            out_specs=PartitionSpec(),
        )
        def gradient(x, weights):
            def loss(weights):
                choices = jnp.broadcast_to(jnp.arange(TOP_K), (1, TOKENS, TOP_K))
                packing = pack_choices(choices, EXPERTS)
                out = layer(x, *weights, packing).astype(jnp.float32)
                return jax.lax.psum(jnp.sum(out**2), "data")

            return jax.grad(loss)(weights)

        split = NamedSharding(mesh, PartitionSpec("data"))
        with tpu.compiling_for("TPU v5 lite", **SMALL):
            lowered = aot.lower_for(
                gradient, shape(4 * TOKENS, D, sharding=split), WEIGHTS, mesh=mesh
            )
        executable = lowered.compile()
        figures = aot.describe(executable, "v5e:2x2", mesh)
        attention = {f"segment_attention_{part}" for part in ("forward", "dq", "dkv")}
        products = {f"grouped_matmul{part}" for part in ("", "_dx", "_dw")}
        assert set(figures.kernels) == attention | products | {"sum_rows"}
        assert figures.num_devices == 4
        assert list(figures.collectives) == ["all-reduce"]
        assert_x_is_held_once(executable, TOKENS)
