"""Packed queries against lists of keys are the written-out softmax."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError
from uoe_jax.ops.as_segments import MASKED, Lists, tiled_attention

pytestmark = pytest.mark.both_jax

ROWS, GROUPS, WIDTH, LISTS, KEYS = 40, 2, 4, 5, 7


def written_out(q, k, v, offsets, first, last):
    """Every query against every list, masked; plain JAX."""
    row = jnp.arange(q.shape[0])
    segment = jnp.searchsorted(offsets, row, side="right") - 1
    place = jnp.arange(k.shape[1])[None]
    visible = (place >= first[:, None]) & (place <= last[:, None])
    visible &= (row < offsets[-1])[:, None]
    segment = jnp.clip(segment, 0, k.shape[0] - 1)
    s = jnp.einsum("mgh,mlh->mgl", q, k[segment]) * q.shape[2] ** -0.5
    s = jnp.where(visible[:, None], s, -jnp.inf)
    any_seen = jnp.any(visible, axis=1)[:, None]
    s = jnp.where(any_seen[..., None], s, 0)
    p = jax.nn.softmax(s, axis=-1) * any_seen[..., None]
    lse = jnp.where(any_seen, jax.nn.logsumexp(s, axis=-1), MASKED)
    return jnp.einsum("mgl,mlh->mgh", p, v[segment]), lse


@jax.jit
def both(q, k, v, offsets, first, last, probe):
    """Outputs and gradients of the operation and of the written-out form."""

    def loss(q, k, v, run):
        out, lse = run(q, k, v, offsets, first, last)
        value = jnp.sum(out * probe) + jnp.sum(jnp.where(lse > MASKED, lse, 0))
        return value, (out, lse)

    tiled = lambda *args: tiled_attention(Lists(*args, max_rows=ROWS))
    results = []
    for run in (tiled, written_out):
        grads, outs = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v, run)
        results.append((outs, grads))
    return results


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_values_and_gradients_are_the_written_out_softmax(seed):
    draw = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(draw.normal(size=shape), jnp.float32)
    q, probe = normal(ROWS, GROUPS, WIDTH), normal(ROWS, GROUPS, WIDTH)
    k, v = normal(LISTS, KEYS, WIDTH), normal(LISTS, KEYS, WIDTH)
    # Empty segments, long ones, and sometimes rows past the last.
    offsets = np.sort(draw.integers(0, ROWS + 1, LISTS + 1))
    offsets[0] = 0
    first, last = draw.integers(0, KEYS, ROWS), draw.integers(-1, KEYS, ROWS)
    arrays = [jnp.asarray(a, jnp.int32) for a in (offsets, first, last)]
    (outs, grads), (outs_wanted, grads_wanted) = both(q, k, v, *arrays, probe)
    for got, wanted in zip((*outs, *grads), (*outs_wanted, *grads_wanted), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)


def test_only_the_segments_that_hold_queries_are_worked_on():
    rows, length = 4096, 256

    def scores(program):
        sizes = [
            np.prod(v.aval.shape)
            for eqn in program.eqns
            for v in eqn.outvars
            if eqn.primitive.name == "dot_general"
        ]
        inner = [
            scores(p.jaxpr if hasattr(p, "jaxpr") else p)
            for eqn in program.eqns
            for p in eqn.params.values()
            if hasattr(p, "eqns") or hasattr(p, "jaxpr")
        ]
        return max([0, *sizes, *inner])

    run = lambda q, k: tiled_attention(
        Lists(
            q,
            k,
            k,
            jnp.linspace(0, rows, 9).astype(jnp.int32),
            jnp.zeros(rows, jnp.int32),
            jnp.full(rows, length - 1, jnp.int32),
            max_rows=rows,
        )
    )[0]
    program = jax.make_jaxpr(run)(
        jnp.zeros((rows, 1, 8)), jnp.zeros((8, length, 8))
    ).jaxpr
    # Every query meets its own list once; padding is at most a tile a segment.
    assert rows * length <= scores(program) <= 1.25 * rows * length


ones = jnp.ones


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"q": ones((4, 2))}, ["q is [4, 2]", "[M, G, H]"]),
        ({"q": ones((4, 1, 2), int)}, ["int32", "astype"]),
        ({"k": ones((2, 3, 2))}, ["3 segments", "one list"]),
        ({"v": ones((3, 4, 2))}, ["[3, 4, 2]", "one list"]),
        ({"k": ones((3, 2))}, ["k is [3, 2]", "[S, L, H]"]),
        ({"k": ones((3, 3, 4)), "v": ones((3, 3, 4))}, ["one dtype and head width"]),
        ({"q": ones((4, 1, 2), jnp.bfloat16)}, ["bfloat16", "one dtype"]),
        ({"offsets": [0, 2, 1, 4]}, ["offsets[2] is 1 after 2"]),
        ({"offsets": [0, 1, 2, 5]}, ["0 to 5", "4 queries"]),
        ({"offsets": [0]}, ["0 segments"]),
        ({"first": jnp.zeros(3, int)}, ["[3]", "4 queries"]),
        ({"last": ones(4)}, ["float32", "whole numbers"]),
        ({"max_rows": None}, ["None", "whole number"]),
        ({"scale": "1"}, ["'1'", "finite"]),
    ],
)
def test_a_wrong_call_is_one_line(change, parts):
    given = dict(
        q=ones((4, 1, 2)),
        k=ones((3, 3, 2)),
        v=ones((3, 3, 2)),
        offsets=jnp.array([0, 1, 2, 4]),
        first=jnp.zeros(4, int),
        last=jnp.zeros(4, int),
        max_rows=4,
    )
    tiled_attention(Lists(**given))
    with pytest.raises(ConfigError) as caught:
        Lists(**{**given, **change})
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    for part in parts:
        assert part in said
