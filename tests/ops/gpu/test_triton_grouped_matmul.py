from __future__ import annotations

from tests.ops.gpu import triton_on_cpu  # before anything that imports triton

# isort: split
import contextlib
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from tests.ops import ops_oracle
from tests.ops.cases import AHEAD, TILE
from uoe_jax.ops import measured, nvidia, pack_choices
from uoe_jax.ops.grouped_matmul.nvidia import launch, triton
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles
from uoe_jax.ops.packing import Packing

ROWS, GROUPS, INS, OUTS = 40, 3, 20, 24
# Three tf32 products in the interpreter are one of float32.
TOLERANCE = 5e-6
CHOOSE = launch.choose_tiles


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """The kernels on numpy arrays, in tiles that no side fills."""
    monkeypatch.setattr(launch, "choose_tiles", lambda op, shape: TILE)
    for traced in (launch.products, launch.weight_grads):
        traced.clear_cache()  # of another test's tiles
    with nvidia.interpreted(triton_on_cpu.run):
        yield


def draw(rng, *shapes, dtype=np.float32):
    return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


@contextlib.contextmanager
def launches():
    """The kernels run inside, by name and constants."""
    seen = []

    def run(kernel, grid, constants, *rest):
        seen.append((kernel.fn.__name__, constants))
        return triton_on_cpu.run(kernel, grid, constants, *rest)

    with nvidia.interpreted(run):
        yield seen


def value_and_grads(fun, *args):
    *args, grad = args
    out, vjp = jax.vjp(fun, *args)
    return out, *vjp(grad)


# Wider than most sides below, so cut to the power of two that holds them.
WIDE = Tiles(16, 128, 256, 2, 4, 2)


@pytest.mark.parametrize(
    ("inner", "outer", "cores", "splits"),
    # A side that a tile divides, or of runs of 64, 8, 4 and 2 neighbours.
    [(64, 192, 6, 2), (192, 40, 99, 8), (40, 72, 9, 3), (72, 64, 5, 1), (20, 26, 9, 3)],
)
def test_sides_past_tiles_and_shared_rows_match_float64(
    monkeypatch, inner, outer, cores, splits
):
    """Groups of 17, 0 and 19 rows: more, as many and fewer steps than programs."""
    monkeypatch.setattr(launch, "choose_tiles", CHOOSE)
    monkeypatch.setattr(measured, "tiles", lambda op, shape, **_: WIDE._asdict())
    monkeypatch.setattr(nvidia, "cores", lambda: cores)
    rng = np.random.default_rng(inner)
    x, w, grad = draw(rng, (ROWS, inner), (GROUPS, inner, outer), (ROWS, outer))
    offsets = [0, 17, 17, 36]
    x, grad = (a.at[offsets[-1] :].set(jnp.nan) for a in (x, grad))
    product = lambda x, w: triton.grouped_matmul(x, w, jnp.asarray(offsets))

    with launches() as seen:
        got = value_and_grads(product, x, w, grad)
    ops_oracle.assert_near(got, ops_oracle.grouped(x, w, offsets, grad), TOLERANCE)
    again = value_and_grads(product, x, w, grad)
    assert all(np.array_equal(a, b) for a, b in zip(got, again, strict=True))
    assert len(seen) == 3
    for kernel, constants in seen:
        assert constants["INNER"] < 2 * constants["I"]
        assert constants["OUTER"] < 2 * constants["O"]
        assert kernel != "weight_grads" or constants["SPLITS"] == splits


def test_a_long_group_is_shared_in_whole_steps(monkeypatch):
    """Of 39 rows in steps of 16, the first of two programs has 32."""
    monkeypatch.setattr(nvidia, "cores", lambda: 8)
    x, grad = draw(np.random.default_rng(0), (ROWS, 16), (ROWS, 32))
    ids = jnp.arange(ROWS, dtype=jnp.int32)[::-1]
    got = launch.weight_grads(x, grad, jnp.asarray([0, 39, ROWS]), None, ids)
    x, grad = np.asarray(x, np.float64), np.asarray(grad, np.float64)[::-1]
    want = np.stack([x[:39].T @ grad[:39], x[39:].T @ grad[39:]])
    ops_oracle.assert_near([got], [want], TOLERANCE)


def routed(dtype, seed=0):
    """A packing of 18 tokens' two experts in 36 rows.

    The last two tokens' picks are in no group: their four rows, the last, are garbage.
    """
    rng = np.random.default_rng(seed)
    score = rng.random((2, 9, GROUPS)) + np.arange(GROUPS) / 3
    choices = jnp.asarray(np.argsort(score, axis=-1)[..., :2], jnp.int32)
    kept = (jnp.arange(18) < 16).reshape(2, 9, 1) & jnp.ones((2, 9, 2), bool)
    packing = pack_choices(choices, GROUPS, kept)
    matrix = np.zeros((36, 18))
    matrix[np.arange(32), np.asarray(packing.token_ids)[:32]] = 1  # row <- token
    x, w, grad, rows, token_grad = draw(
        rng, (18, INS), (GROUPS, INS, OUTS), (36, OUTS), (36, INS), (18, OUTS),
        dtype=dtype,
    )  # fmt: skip
    garbage = jnp.asarray([jnp.nan, jnp.inf, -jnp.inf, jnp.nan], dtype)[:, None]
    grad, rows = (a.at[32:].set(garbage) for a in (grad, rows))
    return packing, matrix, (x, w, grad, rows, token_grad)


@pytest.mark.parametrize(("tile", "share"), [(TILE, 0.6), (AHEAD, 0.6), (AHEAD, 1.0)])
def test_one_row_a_token_is_stored_at_its_token(tile, share, rng):
    """No sum is launched; tokens whose pick was dropped get zeros, not garbage."""
    kept = rng.random((2, 9, 1)) < share
    choices = jnp.asarray(rng.integers(0, GROUPS, (2, 9, 1)), jnp.int32)
    packing = pack_choices(choices, GROUPS, jnp.asarray(kept))
    token = np.asarray(packing.token_ids)
    assert sorted(token) == list(range(18))
    offsets = np.asarray(packing.group_offsets)
    x, w, grad, rows, token_grad = draw(
        rng, (18, INS), (GROUPS, INS, OUTS), (18, OUTS), (18, INS), (18, OUTS)
    )
    grad, rows = (a.at[offsets[-1] :].set(jnp.nan) for a in (grad, rows))
    place = np.argsort(token)  # of each token's row

    choose = mock.patch.object(launch, "choose_tiles", lambda op, shape: tile)
    with choose, launches() as seen:
        project = lambda x, w: triton.gather_project(x, w, packing)
        gathered = value_and_grads(project, x, w, grad)
        scatter = lambda x, w: triton.project_scatter(x, w, packing)
        scattered = value_and_grads(scatter, rows, w, token_grad)
    out, dx, dw = ops_oracle.grouped(np.asarray(x)[token], w, offsets, grad)
    ops_oracle.assert_near(gathered, (out, dx[place], dw), TOLERANCE)
    row_grad = np.asarray(token_grad)[token]
    out, dx, dw = ops_oracle.grouped(rows, w, offsets, row_grad)
    ops_oracle.assert_near(scattered, (out[place], dx, dw), TOLERANCE)
    assert "sum_rows" not in [name for name, _ in seen]
    assert sum(constants.get("SCATTER", False) for _, constants in seen) == 2


def test_rows_cut_to_those_that_count_are_summed(rng):
    """One row a token, but not of every token: none may be left unwritten."""
    choices = jnp.asarray(rng.integers(0, GROUPS, (2, 9, 1)), jnp.int32)
    kept = jnp.asarray(rng.permutation(18) < 11).reshape(2, 9, 1)
    packing = pack_choices(choices, GROUPS, kept, num_rows=12)
    rows, w = draw(rng, (12, INS), (GROUPS, INS, OUTS))
    rows = rows.at[11:].set(jnp.nan)
    offsets, zeros = np.asarray(packing.group_offsets), np.zeros((12, OUTS))
    want = np.zeros((18, OUTS))
    out = ops_oracle.grouped(rows, w, offsets, zeros)[0]
    want[np.asarray(packing.token_ids)[:11]] = out[:11]
    got = triton.project_scatter(rows, w, packing)
    ops_oracle.assert_near([got], [want], TOLERANCE)


@settings(deadline=None, max_examples=8)
@given(st.integers(0, 2**32 - 1))
def test_dense_sums_match_float64(seed):
    """Of picks kept or not, some experts perhaps unchosen, and garbage past them."""
    rng = np.random.default_rng(seed)
    choices = np.argsort(rng.random((2, 9, GROUPS)), axis=-1)[..., :2].astype(np.int32)
    kept = jnp.asarray(rng.random((2, 9, 2)) < rng.random())
    packing = pack_choices(jnp.asarray(choices), GROUPS, kept)
    rows, w, wt = draw(rng, (36, INS), (GROUPS, INS, OUTS), (GROUPS, OUTS, INS))
    offsets, token = np.asarray(packing.group_offsets), np.asarray(packing.token_ids)
    rows = rows.at[offsets[-1] :].set(jnp.nan)
    zeros = np.zeros((36, OUTS))
    for weights, transpose in ((w, False), (wt, True)):
        got = triton.dense_sums(rows, weights, packing, transpose=transpose)
        plain = np.swapaxes(weights, 1, 2) if transpose else weights
        want = np.zeros((18, OUTS))
        np.add.at(want, token, ops_oracle.grouped(rows, plain, offsets, zeros)[0])
        ops_oracle.assert_near([got], [want], TOLERANCE)


@pytest.mark.parametrize(
    ("inner", "outer", "dtype", "dense"),
    # Of 16 groups and 8 picks, what the two steps cost over the dense sum, by hand:
    # 83772 / 34106, 120244 / 102318 (0.851 of it), 23931 / 20992, 26168 / 9621.
    [
        (128, 2048, "bfloat16", True),
        (384, 2048, "bfloat16", False),
        (256, 384, "bfloat16", False),
        (64, 768, "float16", True),
        (128, 2048, "float32", False),
    ],
)
def test_sums_are_dense_where_that_moves_less(inner, outer, dtype, dense):
    """Forward of a scatter and dx of a gather, by what they launch."""
    shape = jax.ShapeDtypeStruct
    ids, picks = shape((4096,), jnp.int32), shape((512, 8), jnp.int32)
    packing = Packing(ids, picks, shape((17,), jnp.int32), shape((17,), jnp.int32))
    rows, w = shape((4096, inner), dtype), shape((16, inner, outer), dtype)
    x, wt = shape((512, outer), dtype), shape((16, outer, inner), dtype)

    def input_grad(x, w, packing, grad):
        product = lambda x: triton.gather_project(x, w, packing)
        return jax.vjp(product, x)[1](grad)

    forward = jax.make_jaxpr(triton.project_scatter)(rows, w, packing)
    backward = jax.make_jaxpr(input_grad)(x, wt, packing, rows)
    for traced, others in ((forward, 0), (backward, 2)):  # the product, and dw's
        names = [e.primitive.name for e in ops_oracle.equations(traced.jaxpr)]
        # Behind it XLA can't copy a residual to add it inside the product.
        assert ("optimization_barrier" in names) == (traced is forward)
        assert names.count("dot_general") == (1 if dense else 0)
        assert names.count("pure_callback") == others + (0 if dense else 2)


@pytest.mark.parametrize("dense", [False, True], ids=["two steps", "dense"])
def test_sums_in_shard_map_match_one_device(monkeypatch, dense):
    """With tokens split and weights whole, whose gradient is then a sum."""
    monkeypatch.setattr(triton, "dense_pays", lambda *sizes: dense)
    packing, _, (_, w, _, rows, grad) = routed("float32")
    rows = jnp.nan_to_num(rows)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split = P("data")

    def step(rows, w, grad):
        call = lambda rows, w: triton.project_scatter(rows[0], w, packing)[None]
        return value_and_grads(call, rows, w, grad)

    over = jax.shard_map(
        step, mesh=mesh, in_specs=(split, P(), split), out_specs=(split, split, P())
    )
    stack = lambda a: jnp.stack([a, 2 * a])
    with launches():
        got = jax.block_until_ready(jax.jit(over)(stack(rows), w, stack(grad)))
    one = lambda rows, w: triton.project_scatter(rows, w, packing)
    out, drows, dw = value_and_grads(one, rows, w, grad)
    want = (stack(out), stack(drows), 5 * dw)  # 1 of the first, 2 * 2 of the second
    ops_oracle.assert_near(got, want, TOLERANCE)
