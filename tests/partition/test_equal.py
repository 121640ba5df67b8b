"""A layout changes where things are computed, not what comes out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.partition.tiny_layouts import compute, first_state, make_config, one_device
from uoe_jax.model.sequence import (
    exchanged_attention,
    gathered_attention,
    ring_attention,
)
from uoe_jax.ops.dense_attention.call import Call
from uoe_jax.ops.dense_attention.reference import dense_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.state import init_state, layout_of
from uoe_jax.tree import named_leaves

EVERYTHING = {
    "tensor_reduce": "reduce_scatter",
    "dispatch": "all_to_all",
    "experts": "round_robin",
}
# Every axis and every choice of a layout at least once; all legal layouts of eight
# devices are compared by benchmarks/layout_matrix.py.
CASES = {
    "dense": ("dense", {"fsdp": 2, "sequence": 2, "tensor": 2}, {}),
    "heads for tokens": (
        "family dense",
        {"data": 2, "sequence": 2, "tensor": 2},
        {"sequence_attention": "heads", "tensor_reduce": "reduce_scatter"},
    ),
    "groups' heads for tokens": (
        "groups union",
        {"fsdp": 4, "sequence": 2},
        {"sequence_attention": "heads"},
    ),
    "moe": ("moe", {"fsdp": 2, "tensor": 4}, {"experts": "round_robin"}),
    "union": ("union", {"data": 2, "sequence": 2, "tensor": 2}, EVERYTHING),
    "narrow": ("narrow", {"data": 2, "sequence": 2, "tensor": 2}, {}),
    "narrow fsdp": (
        "narrow",
        {"fsdp": 2, "tensor": 4},
        {"tensor_reduce": "reduce_scatter"},
    ),
    "family": ("family dense", {"fsdp": 2, "sequence": 2, "tensor": 2}, {}),
    "family union": (
        "family union",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "convolution": (
        "convolution",
        {"sequence": 4, "tensor": 2},
        {"tensor_reduce": "reduce_scatter"},
    ),
    "convolution union": (
        "convolution union",
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "threshold": (
        "threshold",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "output gate": (
        "output gate",
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"tensor_reduce": "reduce_scatter"},
    ),
    "output gate union": (
        "output gate union",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "sink": (
        "sink",
        {"fsdp": 2, "sequence": 2, "tensor": 2},
        {"tensor_reduce": "reduce_scatter"},
    ),
    "sink gathered": (
        "sink",
        {"sequence": 4, "tensor": 2},
        {"sequence_attention": "gather"},
    ),
    "sink exchanged": (
        "sink",
        {"fsdp": 4, "sequence": 2},
        {"sequence_attention": "heads"},
    ),
    "sink union": (
        "sink union",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "drawn": ("drawn", {"data": 2, "sequence": 2, "tensor": 2}, EVERYTHING),
    "gated values": (
        "gated values",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "key router": (
        "key router",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
    "groups": ("groups dense", {"fsdp": 2, "sequence": 2, "tensor": 2}, {}),
    "groups union": (
        "groups union",
        {"data": 2, "sequence": 2, "tensor": 2},
        EVERYTHING,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_are_those_of_one_device(case):
    kind, mesh, layout = CASES[case]
    expected, got = one_device(kind), compute(make_config(kind, mesh, layout))
    assert expected[0].keys() == got[0].keys()
    for name, grad in expected[0].items():
        np.testing.assert_allclose(got[0][name], grad, atol=1e-5, err_msg=name)
        assert np.abs(grad).max() > 0, f"{name} has no gradient to compare"
    for a, b in zip(*map(jax.tree.leaves, (expected[1:], got[1:])), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


def test_a_model_starts_the_same_on_every_mesh():
    config = make_config(*CASES["union"])
    mesh = mesh_for(config)
    _, state = init_state(config, make_optimizer(config.optim, 10), mesh)
    state = layout_of(config, mesh).to_file(jax.device_get(state))
    expected = named_leaves(first_state("union")[1])
    for name, value in named_leaves(state).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)


@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 5), (False, None)])
def test_rings_and_gathers_attend_as_one_device_does(causal, window, with_sink):
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, 16, heads, 4)), jnp.float32)
    q, k, v = draw(4), draw(2), draw(2)
    segments = jnp.asarray(np.sort(rng.integers(1, 4, (2, 16)), axis=1), jnp.int32)
    sink = jnp.asarray(rng.normal(size=4), jnp.float32) if with_sink else None
    call = Call(q, k, v, Mask(causal, window), segments, 0.5, sink)
    expected = dense_attention(call)
    split = PartitionSpec(None, "sequence")
    sees = Mask(causal, window)
    for attend, size in (
        (ring_attention, 4),
        (gathered_attention, 4),
        (exchanged_attention, 2),
    ):
        mesh = jax.make_mesh((size,), ("sequence",))
        run = jax.shard_map(
            partial(attend, sees=sees, sink=sink, axis="sequence", size=size),
            mesh=mesh,
            in_specs=split,
            out_specs=split,
        )
        place = jax.sharding.NamedSharding(mesh, split)
        got = jax.jit(run)(*jax.device_put((q, k, v, segments), place))
        np.testing.assert_allclose(got, expected, atol=1e-5)
