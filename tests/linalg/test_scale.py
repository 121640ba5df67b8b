"""Cost and devices: counted FLOPs, kernels that agree, eight devices like one."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.linalg.planted_matrices import make_planted
from uoe_jax.linalg.completion import Solver, complete
from uoe_jax.linalg.completion.als import run_sweep
from uoe_jax.linalg.completion.entries import clean_entries
from uoe_jax.linalg.completion.flops import count_half_step, count_sweep
from uoe_jax.linalg.completion.least_squares import Equations, solve_batch
from uoe_jax.linalg.completion.method import Method, Penalties
from uoe_jax.linalg.completion.problem import State, lay_out


def run_once(draw, m, n, degree, rank, solver):
    """Sweep once over random entries, `degree` a column; return counted FLOPs."""
    rows = np.concatenate([draw.choice(m, degree, replace=False) for _ in range(n)])
    cols = np.repeat(np.arange(n), degree)
    entries = clean_entries(rows, cols, draw.normal(size=rows.size), (m, n))
    layout = lay_out(entries, rank, kernel="segment")
    problem = layout.problem(entries.values, None, jnp.float32(0))
    u, v = draw.normal(size=(m, rank)), draw.normal(size=(n, rank))
    parts = (u, v, np.zeros(m), np.zeros(n))
    state = State(*(jnp.asarray(x, jnp.float32) for x in parts))
    penalties = Penalties(*(jnp.float32(x) for x in (0, 0, 0, 1e-30)))
    method = Method(solver, False, False)
    _, stats = run_sweep(problem, state, penalties, jax.random.key(0), method)
    assert int(stats[0].max_steps) == solver.max_steps
    return count_sweep(layout, method, rank, stats)[0].regression


def test_counted_flops_grow_as_entries_times_rank(rng):
    solver = Solver("cg", max_steps=6)
    points = [
        (20 * degree * rank, run_once(rng, 3000, 20, degree, rank, solver))
        for degree, rank in ((200, 4), (400, 16), (1600, 16))
    ]
    size, flops = np.log(np.array(points)).T
    assert abs(np.polyfit(size, flops, 1)[0] - 1) <= 0.02


def test_exact_solver_counts_the_square_of_the_rank():
    few, many = (count_half_step("exact", 10**6, 100, k) for k in (32, 64))
    assert many.gram == 4 * few.gram
    assert count_half_step("cg", 10**6, 100, 64).gram == 0


@pytest.mark.parametrize("kind", ["cg", "exact"])
def test_count_matches_the_compiler(kind):
    """XLA's own count of one solve: its loop body counts once, so one step is asked."""
    chunk, width, rank = 16, 256, 8
    shapes = Equations(
        (chunk, width, rank), (chunk, width), (chunk, rank), (chunk, rank)
    )
    equations = Equations(*(jnp.ones(shape) for shape in shapes))
    run = partial(
        solve_batch,
        solver=Solver(kind, max_steps=1),
        tol=jnp.float32(1e-6),
        key=jax.random.key(0),
    )
    compiled = jax.jit(run).lower(equations, jnp.ones((chunk, rank))).compile()
    counted = count_half_step(
        kind,
        chunk * width,
        chunk,
        rank,
        entry_steps=float(chunk * width),
        unknown_steps=float(chunk),
    ).total
    if kind == "exact":
        counted -= 4.0 * chunk * width * rank
    reported = compiled.cost_analysis()["flops"]
    # The compiler also counts squares, masks and the factorisation differently.
    assert 0.7 < reported / counted < 1.3


@pytest.fixture(scope="module")
def models(seed):
    """The same completion by each kernel, on one device and on eight."""
    planted = make_planted(seed, 90, 70, 3, 0.4)
    weights = np.random.default_rng(seed).uniform(0.5, 2, planted.rows.size)
    options = {"solver": "cg", "iters": 4, "tol": 1e-6, "weights": weights}
    options |= {"biases": True, "ridge": 0.1}
    meshes = {1: None, 8: jax.make_mesh((8,), ("data",))}
    return {
        (kernel, count): complete(
            *planted.entries, (90, 70), 3, kernel=kernel, mesh=mesh, **options
        )
        for kernel in ("bucket", "segment")
        for count, mesh in meshes.items()
    }


@pytest.mark.parametrize("kernel", ["bucket", "segment"])
def test_eight_devices_equal_one(kernel, models):
    one, eight = models[kernel, 1], models[kernel, 8]
    model = np.asarray(one.dense())
    gap = np.abs(np.asarray(eight.dense()) - model).max()
    assert gap <= 1e-5 * np.abs(model).max()
    assert_close(eight.info["loss"], one.info["loss"], 1e-4)
    assert len(eight.u.sharding.device_set) == 8


def test_segments_and_buckets_agree(models):
    bucket, segment = (np.asarray(models[k, 1].dense()) for k in ("bucket", "segment"))
    # CG to 1e-6, four times.
    np.testing.assert_allclose(bucket, segment, atol=1e-5 * np.abs(bucket).max())
