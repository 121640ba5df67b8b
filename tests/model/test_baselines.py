"""Routed queries, mixture of heads, block-sparse attention, mixture of depths: each is
its written-out form."""

import dataclasses
import functools
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.compare import assert_close
from tests.model.tiny_models import build, tiny, tokens_like
from uoe_jax.config import MobaConfig, ModConfig, UnionConfig
from uoe_jax.model import init_cache, update_router_bias
from uoe_jax.model.attention import SharedKvAttention
from uoe_jax.model.baselines.moba import attend_blocks, pick_blocks
from uoe_jax.model.baselines.mod import enter, exceeded_by
from uoe_jax.model.baselines.moh import MohAttention
from uoe_jax.model.context import make_context
from uoe_jax.model.transformer import Block
from uoe_jax.ops.rotary import rotate

LENGTH = 10
SEGMENTS = jnp.array([[1] * 4 + [2] * 6, [1] * 7 + [0] * 3])
X = jax.random.normal(jax.random.key(0), (2, LENGTH, 32))
POSITIONS = jnp.broadcast_to(jnp.arange(LENGTH)[None], (2, LENGTH))


def visibility(segments, causal):
    """Which keys each token may see, [B, T, S]."""
    same = segments[:, :, None] == segments[:, None]
    return same & np.tri(LENGTH, dtype=bool)[None] if causal else same


def all_heads(layer, x, visible):
    """Each expert's output with every token in it, [B, T, E, D]."""
    turn = lambda a: rotate(
        a.reshape(*a.shape[:2], -1, a.shape[-1]), POSITIONS, 10_000.0
    ).reshape(a.shape)
    q = turn(jnp.einsum("btd,edjgh->btejgh", x, layer.wq[...]))
    k = turn(jnp.einsum("btd,edjh->btejh", x, layer.wk[...]))
    v = jnp.einsum("btd,edjh->btejh", x, layer.wv[...])
    s = jnp.einsum("btejgh,bsejh->bejgts", q, k) * q.shape[-1] ** -0.5
    s = jnp.where(visible[:, None, None, None], s, -jnp.inf)
    out = jnp.einsum("bejgts,bsejh->btejgh", jax.nn.softmax(s, axis=-1), v)
    return jnp.einsum("btejgh,ejghd->bted", out, layer.wo[...])


CLEAR = {"router_init_std": 1.0}  # the router chooses clearly


@pytest.mark.parametrize(
    ("kind", "union", "causal"),
    [
        (SharedKvAttention, UnionConfig(num_experts=2, top_k=1, **CLEAR), True),
        (
            MohAttention,
            UnionConfig(num_experts=4, top_k=3, num_shared=1, **CLEAR),
            False,
        ),
    ],
)
def test_routed_queries_are_masked_heads_of_dense_attention(kind, union, causal):
    config = tiny(kind="decoder" if causal else "encoder", union=union)
    layer = kind(config, rngs=nnx.Rngs(0))
    context = make_context(config, X.shape[:2], segments=SEGMENTS)
    visible = visibility(SEGMENTS, causal)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)
    probe = jax.random.normal(jax.random.key(1), X.shape)

    def routed(params):
        return nnx.merge(graphdef, params, rest)(X, context)[0]

    def written_out(params):
        layer = nnx.merge(graphdef, params, rest)
        routing = layer.router(X, context)
        picks = jax.nn.one_hot(routing.choices, union.num_experts)
        gates = jnp.einsum("btxe,btx->bte", picks, routing.gates)
        return jnp.einsum("bte,bted->btd", gates, all_heads(layer, X, visible))

    @jax.jit
    def both(params):
        losses = [lambda p, f=f: jnp.sum(f(p) * probe) for f in (routed, written_out)]
        return (
            routed(params),
            written_out(params),
            *(jax.grad(f)(params) for f in losses),
        )

    y, wanted, grads, grads_wanted = both(params)
    np.testing.assert_allclose(y, wanted, atol=1e-5)
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(grads), nnx.to_flat_state(grads_wanted), strict=True
    ):
        np.testing.assert_allclose(a[...], b[...], atol=1e-4, err_msg=str(path))
        assert np.abs(b[...]).max() > 1e-3, path


def test_moh_gates_are_three_softmaxes():
    union = UnionConfig(num_experts=4, top_k=3, num_shared=2, **CLEAR)
    config = tiny(attention=("moh",), union=union)
    router = MohAttention(config, rngs=nnx.Rngs(3)).router
    routing = router(X, make_context(config, X.shape[:2]))
    x = np.asarray(X, np.float64)
    softmax = lambda a: np.exp(a) / np.exp(a).sum(-1, keepdims=True)
    split = 2 * softmax(x @ np.asarray(router.split_weight[...]))
    shared = 2 * softmax(x @ np.asarray(router.shared_weight[...]))
    assert_close(routing.gates[..., :2], split[..., :1] * shared, 1e-4)
    # One routed head of two: its softmax over the chosen is 1.
    assert_close(routing.gates[..., 2:], split[..., 1:], 1e-4)
    best = 2 + np.argmax(x @ np.asarray(router.weight[...]), axis=-1)
    np.testing.assert_array_equal(routing.choices[..., 2], best)


def moba_mask(q, k, segments, size, top_k, causal):
    """Loops over queries and blocks; the visible keys [B, N, T, S]."""
    batch, length, heads, _ = q.shape
    groups = heads // k.shape[2]
    seen = np.asarray(visibility(segments, causal))
    mask = np.zeros((batch, heads, length, length), bool)
    for b, n, t in np.ndindex(batch, heads, length):
        own, scores = t // size, {}
        for block in range(-(-length // size)):
            keys = [s for s in range(block * size, length) if s < (block + 1) * size]
            mine = [s for s in keys if seen[b, t, s]]
            if block == own:
                mask[b, n, t, mine] = True
            elif mine:
                mean = np.mean([k[b, s, n // groups] for s in mine], axis=0)
                scores[block] = (q[b, t, n] @ mean, mine)
        best = sorted(scores, key=lambda block: -scores[block][0])[: top_k - 1]
        for block in best:
            mask[b, n, t, scores[block][1]] = True
    return mask


@pytest.mark.parametrize("causal", [True, False])
def test_block_sparse_attention_is_the_masked_softmax(causal):
    size, top_k = 3, 2
    keys = jax.random.split(jax.random.key(2), 4)
    q, probe = (jax.random.normal(key, (2, LENGTH, 4, 8)) for key in keys[:2])
    k, v = (jax.random.normal(key, (2, LENGTH, 2, 8)) for key in keys[2:])
    first = jnp.array([[0] * 4 + [4] * 6, [0] * 7 + [7] * 3])
    ends = jnp.array([[3] * 4 + [9] * 6, [6] * 7 + [9] * 3])
    last = POSITIONS if causal else ends
    host = lambda a: np.asarray(a, np.float64)
    mask = moba_mask(host(q), host(k), SEGMENTS, size, top_k, causal)

    def sparse(q, k, v):
        picks, kept = pick_blocks(q, k, first, last, size, top_k, causal)
        return attend_blocks(q, k, v, picks, kept, first, last, size, causal)

    def masked(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, mask=jnp.asarray(mask))

    @jax.jit
    def both(q, k, v):
        grads = [
            jax.grad(lambda *a, f=f: jnp.sum(f(*a) * probe), (0, 1, 2))(q, k, v)
            for f in (sparse, masked)
        ]
        return (sparse(q, k, v), *grads[0]), (masked(q, k, v), *grads[1])

    for got, wanted in zip(*both(q, k, v), strict=True):
        np.testing.assert_allclose(got, wanted, atol=2e-5)
    # Whole blocks were left out.
    assert mask.sum() + 4 * size <= np.asarray(visibility(SEGMENTS, causal)).sum() * 4


def test_entering_keeps_order_and_room():
    asked = jnp.array([[True, False, True, True], [False, False, False, True]])
    inside = enter(asked, 2)
    np.testing.assert_array_equal(inside.entered, [[1, 0, 1, 0], [0, 0, 0, 1]])
    np.testing.assert_array_equal(inside.filled, [[1, 1], [1, 0]])
    slots = inside.packing.token_ids.reshape(2, 2)
    np.testing.assert_array_equal(slots[0], [0, 2])
    assert slots[1, 0] == 7
    rows = inside.packing.row_ids[:, 0]
    np.testing.assert_array_equal(rows, [0, 4, 1, 4, 4, 4, 4, 2])


@pytest.mark.parametrize("train", [True, False])
def test_a_depth_block_is_the_block_of_the_tokens_that_enter(train):
    mod = ModConfig(keep=0.5, capacity_factor=0.6, router_init_std=1.0)
    config = tiny(mod=mod, blocks=("mod",))
    block = Block(config, 0, rngs=nnx.Rngs(0))
    context = make_context(config, X.shape[:2], train=train, collect_choices=True)
    y, stats, _ = jax.jit(lambda x: block(x, context))(X)
    scores, asked = block.router(block.attention_norm(X))
    gates = 2 / (1 + np.exp(-np.asarray(scores)))
    lost = 0
    for sample in range(2):
        inside = np.flatnonzero(asked[sample])
        assert len(inside) > 3
        if train:
            lost += len(inside[3:])
            inside = inside[:3]
        rows, places = X[sample][inside][None], jnp.asarray(inside)[None]
        own = make_context(config, rows.shape[:2], positions=places)
        z = block.run(rows, own)[0][0]
        expected = np.array(X[sample])
        expected[inside] += gates[sample][inside, None] * np.asarray(
            z - X[sample][inside]
        )
        np.testing.assert_allclose(y[sample], expected, atol=1e-5)
        around = np.setdiff1d(np.arange(LENGTH), inside)
        assert np.all(np.asarray(stats["depth"]["choices"])[sample, around] == 1)
    total = int(asked.sum())
    assert_close(stats["depth"]["dropped"], lost / total, 1e-6)
    share = total / asked.size
    assert_close(stats["depth"]["load"], [share, 1 - share], 1e-6)


def test_a_depth_router_learns_and_its_bias_aims_at_keep():
    config = tiny(blocks=("all", "mod"), mod=ModConfig(keep=0.3, bias_update_rate=0.1))
    model = build(config)
    tokens = tokens_like(config, 2, LENGTH, seed=1)
    graphdef, params, buffers = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params):
        def loss(params):
            model = nnx.merge(graphdef, params, buffers)
            logits, aux = model(tokens, train=True)
            return jnp.mean(logits[..., 0] ** 2), aux

        return jax.grad(loss, has_aux=True)(params)

    grads, aux = run(params)
    path = ("trunk", "blocks", 1, "router")
    assert np.abs(dict(nnx.to_flat_state(grads))[(*path, "weight")][...]).max() > 1e-6
    assert aux["depth"]["load"].shape == (1, 2)
    threshold = np.asarray(aux["depth"]["threshold"])
    assert threshold.shape == (1,)
    new = dict(nnx.to_flat_state(update_router_bias(buffers, aux, config)))
    assert_close(new[(*path, "bias")][...], -0.1 * threshold[:, None], 1e-6)


@settings(deadline=None, max_examples=30)
@given(
    # Far apart: XLA takes subnormal numbers for 0, and then they are ties.
    scores=arrays(np.int32, (3, 7), elements=st.integers(-72, 72), unique=True),
    keep=st.floats(0.05, 0.95),
    padding=st.integers(0, 6),
)
def test_so_many_tokens_exceed_the_threshold(scores, keep, padding):
    scores = scores.astype(np.float32) / 8
    segments = np.ones((3, 7), np.int32)
    segments[:, 7 - padding :] = 0
    context = make_context(tiny(), (3, 7), segments=jnp.asarray(segments))
    threshold = exceeded_by(jnp.asarray(scores), keep, context)
    valid = scores[segments != 0]
    above = int(np.sum(valid > np.asarray(threshold)))
    wanted = valid.size - math.floor((1 - keep) * valid.size)
    assert above == pytest.approx(min(max(wanted, 1), valid.size - 1), abs=1)


def test_the_threshold_is_that_of_all_devices_tokens():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    draw = np.random.default_rng(0)
    scores = jnp.asarray(draw.normal(size=(8, 6)), jnp.float32)
    segments = jnp.asarray(draw.integers(0, 3, (8, 6)), jnp.int32)  # 0: padding

    def threshold(scores, segments, axes=None):
        context = make_context(tiny(), scores.shape, segments=segments)
        return exceeded_by(scores, 0.3, context._replace(axis_name=axes))

    for axes in (("data", "fsdp"), ("data",)):
        local = functools.partial(threshold, axes=axes)
        whole = jax.shard_map(local, mesh=mesh, in_specs=P(axes), out_specs=P())
        assert jax.jit(whole)(scores, segments) == threshold(scores, segments)


def test_a_depth_block_that_all_gates_leave_is_entered_again():
    config = tiny(blocks=("all", "mod"), mod=ModConfig(keep=0.3))
    graphdef, params, buffers = nnx.split(build(config), nnx.Param, ...)
    flat = dict(nnx.to_flat_state(buffers))
    path = ("trunk", "blocks", 1, "router", "bias")
    flat[path] = flat[path].replace(flat[path][...] - 50)
    buffers = nnx.from_flat_state(list(flat.items()))
    tokens = tokens_like(config, 2, LENGTH, seed=1)

    @jax.jit
    def step(buffers):
        _, aux = nnx.merge(graphdef, params, buffers)(tokens, train=True)
        return update_router_bias(buffers, aux, config), aux["depth"]["load"][0, 0]

    loads = []
    for _ in range(60):
        buffers, load = step(buffers)
        loads.append(float(load))
    assert loads[0] == 0
    assert loads[-1] == pytest.approx(0.3, abs=1 / LENGTH)


def test_caches_hold_what_the_kind_needs():
    sizes = {}
    union = UnionConfig(num_experts=4, top_k=2)
    kinds = {
        "dense": {},
        "union": {"attention": ("union",)},
        "shared": {
            "attention": ("union",),
            "union": dataclasses.replace(union, shared_kv=True),
        },
        "moh": {"attention": ("moh",)},
        "moba": {"attention": ("moba",), "moba": MobaConfig(block_size=4)},
        "mod": {"blocks": ("mod",)},
    }
    for name, options in kinds.items():
        config = tiny(**{"union": union, **options})
        cache = jax.eval_shape(lambda config=config: init_cache(config, 2, 16))
        sizes[name] = sum(
            entry[part].size for entry in cache.layers for part in ("k", "v")
        )
    assert sizes.pop("union") * 2 == sizes["dense"]
    assert set(sizes.values()) == {sizes["dense"]}
