"""Muon: each expert's matrix by itself, whatever the layout; AdamW for all else."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.tiny_runs import make_tiny
from uoe_jax.config import LayoutConfig, MeshConfig, OptimConfig
from uoe_jax.optim import MUON_RMS, make_optimizer, muon_matrices
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.load import load_run
from uoe_jax.runs.state import init_state, layout_of
from uoe_jax.train import train
from uoe_jax.tree import named_leaves, replace_leaves

PLAIN = {"schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0}
PLAIN |= {"clip_norm": 0.0, "learning_rate": 0.5}


def orthogonal(matrix):
    """Five Newton-Schulz steps of Jordan et al. 2024 on one matrix, in float64."""
    x = np.asarray(matrix, np.float64)
    turned = x.shape[0] > x.shape[1]
    x = x.T if turned else x
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if turned else x


def state_of(config):
    mesh = mesh_for(config)
    optimizer = make_optimizer(config.optim, 10)
    _, state = init_state(config, optimizer, mesh)
    return optimizer, state, layout_of(config, mesh)


def random_like(params, seed):
    rng = np.random.default_rng(seed)
    draw = lambda p: jnp.asarray(rng.normal(size=p.shape), jnp.float32)
    return jax.tree.map(draw, params)


def update(optimizer, state, grads):
    run = jax.jit(lambda g, s, p: optimizer.update(g, s, p, step=jnp.int32(0))[0])
    return named_leaves(run(grads, state.opt_state, state.params))


@pytest.fixture(scope="module")
def union():
    config = make_tiny("union", optim={"kind": "muon", **PLAIN})
    return config, *state_of(config)


def test_experts_are_matrices_of_their_own(union):
    _, optimizer, state, _ = union
    grads = random_like(state.params, 1)
    got, by_name = update(optimizer, state, grads), named_leaves(grads)
    for name, rows in (("mlp.w_up", 16), ("mlp.w_down", 8), ("attention.wq", 16)):
        whole = f"trunk.blocks.0.{name}"
        grad = np.asarray(by_name[whole])
        assert grad.shape[:2] == (2, 4), "layers, then experts"
        for layer, expert in np.ndindex(2, 4):
            matrix = grad[layer, expert].reshape(rows, -1)
            size = MUON_RMS * max(matrix.shape) ** 0.5
            expected = -0.5 * size * orthogonal(matrix)
            found = np.asarray(got[whole][layer, expert]).reshape(matrix.shape)
            assert abs(found - expected).max() < 1e-4 * abs(expected).max(), name


def test_an_experts_update_depends_on_no_other(union):
    _, optimizer, state, _ = union
    grads = random_like(state.params, 2)
    name = "trunk.blocks.0.mlp.w_up"
    changed = named_leaves(grads)[name].at[:, 1].multiply(7.0)
    first = update(optimizer, state, grads)[name]
    second = update(optimizer, state, replace_leaves(grads, {name: changed}))[name]
    others = np.array([0, 2, 3])
    np.testing.assert_array_equal(first[:, others], second[:, others])


def test_all_else_goes_by_adamw(union):
    config, optimizer, state, _ = union
    grads = random_like(state.params, 3)
    got = update(optimizer, state, grads)
    adamw = make_optimizer(dataclasses.replace(config.optim, kind="adamw"), 10)
    plain = dataclasses.replace(state, opt_state=adamw.init(state.params))
    expected = update(adamw, plain, grads)
    is_none = lambda leaf: leaf is None
    axes = jax.tree_util.tree_flatten_with_path(
        muon_matrices(state.params), is_leaf=is_none
    )[0]
    others = [jax.tree_util.keystr(path) for path, found in axes if found is None]
    assert len(others) == 6, others  # embedding, norms, routers
    same = [n for n in got if abs(got[n] - expected[n]).max() < 1e-7]
    assert len(same) == 6
    assert {n.split(".")[-1] for n in same} == {"embedding", "scale", "weight"}
    assert all(n.endswith("scale") or "router" in n or "embed" in n for n in same)


def test_a_layout_changes_no_update(union):
    config, optimizer, state, _ = union
    grads = random_like(state.params, 4)
    expected = update(optimizer, state, grads)
    split = dataclasses.replace(
        config,
        mesh=MeshConfig(data=2, fsdp=2, tensor=2),
        layout=LayoutConfig(experts="round_robin"),
    )
    optimizer, state, layout = state_of(split)
    placed = layout.place(layout.to_memory(jax.device_get(grads)))
    run = jax.jit(lambda g, s, p: optimizer.update(g, s, p, step=jnp.int32(0))[0])
    got = run(placed, state.opt_state, state.params)
    got = named_leaves(layout.to_file(jax.device_get(got)))
    for name, value in expected.items():
        assert abs(got[name] - np.asarray(value)).max() < 1e-5, name


def test_moments_are_float32_and_one_a_matrix(union):
    _, _, state, _ = union
    names = named_leaves(state.opt_state)
    about = lambda part: [n for n in names if n.endswith(part)]
    assert len(about("trunk.blocks.0.mlp.w_up")) == 1
    assert len(about("embed.embedding")) == 2
    assert all(names[n].dtype == jnp.float32 for n in about("mlp.w_up"))


def test_a_run_with_muon_learns_and_resumes_to_the_same_bits(tiny, tmp_path):
    optim = {"kind": "muon", "learning_rate": 1e-2}
    train(tiny("union", steps=12, optim=optim), tmp_path / "whole", quiet=True)
    first = dataclasses.replace(tiny("union", steps=12, optim=optim), name="tiny")
    train(first, tmp_path / "parts", quiet=True)
    newest = tmp_path / "parts" / "checkpoints" / "12"
    for path in sorted(newest.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    newest.rmdir()
    train(first, tmp_path / "parts", quiet=True)
    loaded = [load_run(tmp_path / name) for name in ("whole", "parts")]
    assert [run.step for run in loaded] == [12, 12]
    assert loaded[0].progress.train_loss < 5.0
    params = [named_leaves(jax.tree.leaves(run.model)) for run in loaded]
    for name, value in params[0].items():
        assert np.asarray(value).tobytes() == np.asarray(params[1][name]).tobytes()


def test_an_optimizer_of_another_name_is_refused():
    with pytest.raises(Exception, match="optim.*'lion'|kind is 'lion'"):
        OptimConfig(kind="lion")
