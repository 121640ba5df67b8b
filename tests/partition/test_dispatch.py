"""Tokens sent to their experts and back, where only those that are chosen can be sent.

No CPU has that collective, so it is played here as its documentation defines it.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.partition.tiny_layouts import compute, make_config, one_device, trace
from uoe_jax.model import dispatch
from uoe_jax.plan.inspect import traffic_of

SCATTER = {"tensor_reduce": "reduce_scatter"}
LAYOUTS = {
    "whole tokens": {},
    "scattered, dealt": SCATTER | {"experts": "round_robin"},
}


def played(rows, room, begin, leave, there, arrive, *, axis_name):
    """What `jax.lax.ragged_all_to_all` gives; NaN where a count isn't the sender's."""
    everyone = lambda a: jax.lax.all_gather(a, axis_name)
    sent, begin, leave, there = map(everyone, (rows, begin, leave, there))
    me, row = jax.lax.axis_index(axis_name), jnp.arange(room.shape[0])
    for device in range(arrive.shape[0]):
        first, count = there[device, me], leave[device, me]
        here = (row >= first) & (row < first + count)
        source = jnp.clip(begin[device, me] + row - first, 0, rows.shape[0] - 1)
        room = jnp.where(here[:, None], sent[device][source], room)
        room = jnp.where(arrive[device] == count, room, jnp.nan)
    return room


@pytest.fixture
def able(monkeypatch):
    monkeypatch.setattr(dispatch, "sends_what_is_chosen", lambda: True)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize(("kind", "tensor"), [("moe", 4), ("union", 2)])
def test_what_is_chosen_alone_is_enough(able, monkeypatch, name, kind, tensor):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", played)
    layout = {"dispatch": "all_to_all"} | LAYOUTS[name]
    got = compute(make_config(kind, {"data": 2, "tensor": tensor}, layout))
    expected = one_device(kind)
    for name, grad in expected[0].items():
        np.testing.assert_allclose(got[0][name], grad, atol=1e-5, err_msg=name)
    for a, b in zip(*map(jax.tree.leaves, (expected[1:], got[1:])), strict=True):
        np.testing.assert_allclose(b, a, atol=1e-5)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_no_array_of_all_the_room_travels(able, remat):
    layout = {"dispatch": "all_to_all"}
    config = make_config("moe", {"tensor": 4}, layout, remat=remat)
    traced = trace(config)
    primitives = str(traced).count("ragged_all_to_all[")
    sent = [t for t in traffic_of(traced) if t.kind == "all_to_all"]
    # There and back, forward and backward; there once more where it is made again.
    assert sum(t.count for t in sent) == (5 if remat == "full" else 4) <= primitives
