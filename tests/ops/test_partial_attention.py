"""Attention to a part of the keys, by each backend, is the exact one in float64."""

import contextlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tests.ops import cases
from tests.ops.suite import changed
from uoe_jax.errors import ConfigError
from uoe_jax.model import sequence
from uoe_jax.ops import partial_attention as module
from uoe_jax.ops.dense_attention import reference
from uoe_jax.ops.dense_attention.call import Call as Whole
from uoe_jax.ops.partial_attention import Call, partial_attention
from uoe_jax.ops.segment_attention.call import Mask
from uoe_jax.ops.segment_attention.plan import MASKED

BATCH, QUERIES, KEYS, HEADS, KV_HEADS, SCALE = 2, 12, 10, 4, 2, 0.4


def exact(q, k, v, first, last, dout, dlse):
    """Results and gradients in float64: of a score s, p (dp - delta + dlse)."""
    q, k, v, dout, dlse = (np.asarray(a, np.float64) for a in (q, k, v, dout, dlse))
    groups = q.shape[2] // k.shape[2]
    keys, values = (np.repeat(a, groups, axis=2) for a in (k, v))
    place = np.arange(k.shape[1])
    seen = (place >= first[..., None]) & (place <= last[..., None])
    s = np.einsum("btnh,blnh->bntl", q, keys) * SCALE
    s = np.where(seen[:, None], s, -np.inf)
    top = np.max(s, axis=-1, keepdims=True)
    p = np.exp(s - np.where(np.isfinite(top), top, 0))
    total = p.sum(-1, keepdims=True)
    some = total > 0
    lse = np.where(some, top + np.log(np.where(some, total, 1)), MASKED)[..., 0]
    p = p / np.where(some, total, 1)
    out = np.einsum("bntl,blnh->btnh", p, values)
    dp = np.einsum("btnh,blnh->bntl", dout, values)
    delta = (dout * out).sum(-1).transpose(0, 2, 1)[..., None]
    ds = p * (dp - delta + dlse.transpose(0, 2, 1)[..., None]) * SCALE
    dq = np.einsum("bntl,blnh->btnh", ds, keys)
    fold = lambda a: a.reshape(*k.shape[:3], groups, -1).sum(3)
    dk = fold(np.einsum("bntl,btnh->blnh", ds, q))
    dv = fold(np.einsum("bntl,btnh->blnh", p, dout))
    return out, lse.transpose(0, 2, 1), dq, dk, dv


def draw(seed, dtype, width):
    """Arrays, ends (some outside, some tokens that see nothing) and gradients."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(jnp.dtype(dtype))
    q = normal(BATCH, QUERIES, HEADS, width)
    k, v = (normal(BATCH, KEYS, KV_HEADS, width) for _ in range(2))
    first = rng.integers(-3, KEYS + 2, (BATCH, QUERIES)).astype(np.int32)
    last = first + rng.integers(-1, KEYS, first.shape).astype(np.int32)
    dout, dlse = normal(*q.shape), rng.normal(size=q.shape[:3])
    return q, k, v, first, last, dout, dlse


def hold(backend, dtype, width, tolerance, seed):
    q, k, v, first, last, dout, dlse = draw(seed, dtype, width)
    got = run(*map(jnp.asarray, (q, k, v, first, last, dout, dlse)), backend=backend)
    want = exact(q, k, v, first, last, dout, dlse)
    for mine, theirs, like in zip(got, want, (q, None, q, k, v), strict=True):
        assert like is None or mine.dtype == like.dtype
        mine = np.asarray(mine, np.float64)
        some = theirs > MASKED  # all but the logsumexp of nothing
        bound = tolerance * max(1.0, np.abs(theirs[some]).max())
        np.testing.assert_allclose(mine[some], theirs[some], rtol=0, atol=bound)
        assert (mine[~some] < MASKED * 0.999).all()


@partial(jax.jit, static_argnames="backend")
def run(q, k, v, first, last, dout, dlse, backend):
    def attend(q, k, v):
        return partial_attention(
            Call(q, k, v, first, last, SCALE), implementation=backend
        )

    found, vjp = jax.vjp(attend, q, k, v)
    grads = vjp(type(found)(dout, dlse.astype(found.lse.dtype)))
    return *found, *grads


@pytest.mark.parametrize("chunk", [QUERIES, 4, 5])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_plain_jax_is_exact(chunk, seed):
    with changed((module, "_CHUNK", chunk)):
        run.clear_cache()
        hold("xla", "float32", 8, 1e-5, seed)


@pytest.mark.parametrize("queries", [64, 70, 128])
def test_plain_jax_keeps_no_scores_for_the_way_back(queries):
    q = jnp.ones((1, queries, 2, 8))
    k = jnp.ones((1, 512, 2, 8))
    ends = jnp.zeros((1, queries), jnp.int32), jnp.full((1, queries), 511)
    attend = lambda q, k, v: partial_attention(
        Call(q, k, v, *ends, SCALE), implementation="xla"
    )
    with changed((module, "_CHUNK", 64)):
        kept = jax.tree.leaves(jax.vjp(attend, q, k, k)[1])
    scores = 2 * queries * 512
    assert sum(a.size for a in kept) < scores / 2


def test_plain_jax_is_exact_in_float64():
    with jax.enable_x64(True):
        hold("xla", "float64", 8, 2.0**-40, 0)


@pytest.mark.float16
@pytest.mark.parametrize("seed", [0, None])
def test_tritons_kernels_give_the_logsumexp_and_take_its_gradient(seed):
    with cases.attention_tiles(cases.ATTENTION_TILES):
        run.clear_cache()
        hold("triton", "float16", 16, 4 * cases.STEP["float16"], seed)


@pytest.mark.parametrize("seed", [0, None])
def test_hoppers_kernels_give_the_logsumexp_and_take_its_gradient(seed):
    with cases.on_hopper():
        run.clear_cache()
        hold("mosaic_gpu", "bfloat16", 64, 4 * cases.STEP["bfloat16"], seed)


@jax.jit
def added(q, k, v, first, dout):
    """Results and gradients of attention to the keys in two parts, and to all."""
    last, cut = jnp.full_like(first, KEYS - 1), KEYS // 3

    def whole(q, k, v):
        return partial_attention(Call(q, k, v, first, last, SCALE)).out

    def parts(q, k, v):
        near = Call(q, k[:, cut:], v[:, cut:], first - cut, last - cut, SCALE)
        far = Call(q, k[:, :cut], v[:, :cut], first, last, SCALE)
        return partial_attention(near).plus(partial_attention(far)).out

    found = []
    for attend in (parts, whole):
        out, vjp = jax.vjp(attend, q, k, v)
        found.append((out, *vjp(dout)))
    return found


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_parts_of_the_keys_add_up(seed):
    q, k, v, first, _, dout, _ = draw(seed, "float32", 8)
    got, want = added(q, k, v, np.clip(first, 0, KEYS - 1), dout)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=1e-5)


def test_a_backend_that_does_not_exist_is_told():
    q, k, v, first, last, *_ = map(jnp.asarray, draw(0, "float32", 8))
    with pytest.raises(ConfigError, match="partial_attention implementation is 'cud'"):
        partial_attention(Call(q, k, v, first, last, SCALE), implementation="cud")


@contextlib.contextmanager
def only(backend):
    """One backend alone, so that no other serves in its place."""
    table = {backend: module.BACKENDS[backend]}
    with changed((module, "BACKENDS", table)):
        yield


@pytest.mark.float16
@pytest.mark.parametrize("name", ["ring_attention", "gathered_attention"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 9), (False, None)])
def test_kernels_serve_sequences_on_two_devices(name, causal, window, rng):
    """Inside shard_map, with types checked; documents go on at the next device."""
    sees = Mask(causal, window)
    normal = lambda n: jnp.asarray(rng.normal(size=(2, 24, n, 16)), jnp.float16)
    q, k, v, grad = (normal(n) for n in (4, 2, 2, 4))
    segments = jnp.asarray(np.sort(rng.integers(0, 3, (2, 24)), axis=1), jnp.int32)
    attend = partial(getattr(sequence, name), sees=sees, axis="sequence", size=2)
    mesh = jax.make_mesh((2,), ("sequence",))
    spec = P(None, "sequence")
    place = lambda a: jax.device_put(a, jax.sharding.NamedSharding(mesh, spec))

    def local(q, k, v, segments, grad):
        out, vjp = jax.vjp(lambda *a: attend(*a, segments), q, k, v)
        return out, *vjp(grad)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=spec))
    with cases.attention_tiles(cases.ATTENTION_TILES), only("triton"):
        got = jax.block_until_ready(run(*map(place, (q, k, v, segments, grad))))
    wide = [a.astype(jnp.float32) for a in (q, k, v)]
    plain = lambda q, k, v: reference.dense_attention(
        Whole(q, k, v, sees, segments, scale=16**-0.5)
    )
    out, vjp = jax.vjp(plain, *wide)
    want = out, *vjp(grad.astype(jnp.float32))
    for mine, theirs in zip(got, want, strict=True):
        bound = 4 * cases.STEP["float16"] * max(1.0, float(jnp.abs(theirs).max()))
        np.testing.assert_allclose(mine.astype(jnp.float32), theirs, atol=bound)
