import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.compare import assert_close
from tests.train.tiny_runs import make_tiny, with_train
from uoe_jax.config import MeshConfig, ModelConfig
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh, replicated
from uoe_jax.runs.state import init_state, layout_of
from uoe_jax.train.diagnose import diagnose, hash_batch
from uoe_jax.train.step import make_step, put_batch
from uoe_jax.train.subject import Subject
from uoe_jax.tree import named_leaves

# Its update is minus the gradient, so that parameters show the gradient.
GRADIENTS = optax.with_extra_args_support(optax.sgd(1.0))

# Compiles faster than a model whose attention is routed too.
ROUTED_MLP = make_tiny("union", attention="dense", max_bad_steps=2)


def make_batch(seed=None, batch=8, length=16):
    """Random bytes; rows have very different numbers of scored tokens."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 256, (batch, length + 1)).astype(np.int32)
    keep = rng.random((batch, 1)) ** 2
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(length, dtype=np.int32), (batch, 1)),
        "segments": np.ones((batch, length), np.int32),
        "mask": (rng.random((batch, length)) < keep).astype(np.float32),
    }


@functools.cache
def compiled_once(config, optimizer, devices):
    """A model's static half, its first state on the host and where it lies, its step.

    Tests of one config share them.
    """
    mesh = make_mesh(MeshConfig(data=devices))
    graphdef, state = init_state(config, optimizer, mesh)
    places = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(config, graphdef, optimizer, mesh)
    return graphdef, mesh, jax.device_get(state), places, step


@functools.cache
def optimizer_of(config):
    return make_optimizer(config.optim, config.train.steps)


def first_step(config, optimizer=None, devices=2):
    """A model's static half, mesh, fresh state and step."""
    optimizer = optimizer or optimizer_of(config)
    graphdef, mesh, state, places, step = compiled_once(config, optimizer, devices)
    return graphdef, mesh, jax.device_put(state, places), step


def one_step(config, batch, devices=1, optimizer=GRADIENTS):
    _, mesh, state, step = first_step(config, optimizer, devices)
    before = jax.device_get(named_leaves(state))
    state, metrics = step(state, put_batch(batch, mesh, config.train.accumulate))
    return before, jax.device_get(named_leaves(state)), jax.device_get(metrics)


def gradients_of(config, batch, **kwargs):
    before, after, metrics = one_step(config, batch, **kwargs)
    names = [name for name in before if name.startswith("params")]
    return {name: before[name] - after[name] for name in names}, metrics


def assert_gradients_close(a, b):
    # The largest of a gradient's terms are of order 1, whatever they add up to.
    for name in a:
        assert_close(a[name], b[name], 1e-5, least=1.0, about=name)


@pytest.mark.both_jax
def test_eight_devices_give_the_step_of_one():
    # Routed attention on many devices: tests/partition and test_sharded.py.
    config = make_tiny("union", attention="dense", z_loss=1e-3)
    batch = make_batch()
    one, first = gradients_of(config, batch)
    eight, second = gradients_of(config, batch, devices=8)
    assert_gradients_close(one, eight)
    assert_close(first["loss"], second["loss"], 1e-5)
    assert first["tokens"] == second["tokens"] == 8 * 16


def test_accumulation_gives_the_step_of_the_whole_batch():
    batch = make_batch()
    whole, first = gradients_of(make_tiny(), batch)
    parts, second = gradients_of(make_tiny(accumulate=4), batch, devices=2)
    assert_gradients_close(whole, parts)
    assert_close(first["loss"], second["loss"], 1e-5)
    assert_close(first["grad_norm"], second["grad_norm"], 1e-5)


def test_loss_chunks_change_nothing():
    batch = make_batch()
    whole, _ = gradients_of(make_tiny(loss_chunk=4096), batch)
    parts, _ = gradients_of(make_tiny(loss_chunk=24), batch)
    assert_gradients_close(whole, parts)


def test_gradient_is_that_of_the_models_own_logits():
    config, batch = make_tiny(), make_batch()
    graphdef, _, state, _ = first_step(config, GRADIENTS, devices=1)
    state = jax.tree.map(jnp.asarray, jax.device_get(state))

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        model = nnx.merge(graphdef, params, state.buffers)
        logits, _ = model(jnp.asarray(batch["tokens"]))
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, batch["targets"][..., None], -1)[..., 0]
        return -jnp.sum(picked * batch["mask"]) / batch["mask"].sum()

    value, expected = loss(state.params)
    expected = {f"params.{name}": g for name, g in named_leaves(expected).items()}
    got, metrics = gradients_of(config, batch)
    assert_gradients_close(expected, got)
    assert_close(metrics["loss"], value, 1e-5)


def run_steps(config, batches, devices=2):
    """States as bytes after every step, and metrics."""
    graphdef, mesh, state, step = first_step(config, devices=devices)
    history, metrics = [jax.device_get(named_leaves(state))], []
    for batch in batches:
        state, line = step(state, put_batch(batch, mesh, config.train.accumulate))
        history.append(jax.device_get(named_leaves(state)))
        metrics.append(jax.device_get(line))
    return history, metrics, (graphdef, mesh, state)


def changed(before, after):
    return {n for n in before if before[n].tobytes() != after[n].tobytes()}


def test_a_nonfinite_step_changes_no_bit_and_too_many_freeze_the_state():
    good, bad = make_batch(), make_batch()
    bad["mask"][0, 0] = np.nan
    batches = [good, bad, good, bad, bad, good]
    history, metrics, _ = run_steps(ROUTED_MLP, batches)
    moved = [changed(a, b) for a, b in itertools.pairwise(history)]
    assert [int(h["step"]) for h in history] == [0, 1, 2, 3, 4, 5, 6]
    assert [int(m["bad_steps"]) for m in metrics] == [0, 1, 0, 1, 2, 3]
    assert {n.split(".")[0] for n in moved[2]} >= {"params", "opt_state", "buffers"}
    # The last batch is good, but by then a person has to look.
    for index in (1, 3, 4, 5):
        assert moved[index] == {"step", "bad_steps"}


def test_the_diagnosis_names_the_router_and_its_layer():
    config, batch = ROUTED_MLP, make_batch()
    _, _, (graphdef, mesh, state) = run_steps(config, [batch])
    router = state.params["trunk"]["blocks"][0]["mlp"]["router"]
    weight = np.array(router["weight"][...])
    weight[1, 0, 0] = np.inf
    router["weight"] = router["weight"].replace(
        jax.device_put(weight, replicated(mesh))
    )
    subject = Subject(
        graphdef=graphdef,
        state=state,
        layout=layout_of(config, mesh),
        optimizer=optimizer_of(config),
        flops_per_token=1.0,
    )
    dump = diagnose(config, subject, batch, 2)
    name = "trunk.blocks.0.mlp.router.weight[1]"
    assert dump["nonfinite_parameters"] == [name]
    assert "mlp.router.z_loss[1]" in dump["nonfinite_router"]
    assert "mlp.router.z_loss[0]" not in dump["nonfinite_router"]
    assert set(dump["grad_norms"]) == set(named_leaves(state.params))
    assert dump["batch_hash"] == hash_batch(batch) != hash_batch(make_batch())


@pytest.mark.both_jax
def test_steps_compile_once(caplog):
    config = make_tiny()
    _, mesh, state, step = first_step(config)
    state, _ = step(state, put_batch(make_batch(), mesh))
    with jax.log_compiles():
        for _ in range(3):
            state, metrics = step(state, put_batch(make_batch(), mesh))
    assert not [r for r in caplog.records if "Compiling" in r.getMessage()]
    with jax.log_compiles():
        jax.jit(lambda a: a * 3.25)(metrics["loss"])
    assert [r for r in caplog.records if "Compiling" in r.getMessage()]


@pytest.mark.both_jax
def test_state_is_donated():
    config = make_tiny()
    _, mesh, state, step = first_step(config)
    step(state, put_batch(make_batch(), mesh))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_dropout_depends_on_the_step_alone():
    config = make_tiny()
    model = dataclasses.replace(config.model, dropout=0.5)
    config = dataclasses.replace(config, model=model)
    batch = make_batch()
    frozen = dataclasses.replace(config.optim, learning_rate=0.0)
    config = dataclasses.replace(config, optim=frozen)
    _, first, _ = run_steps(config, [batch, batch])
    _, second, _ = run_steps(config, [batch, batch])
    losses = [[float(m["loss"]) for m in run] for run in (first, second)]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]


def test_learning_rate_metric_is_the_schedules():
    config = make_tiny(optim={"learning_rate": 1.0, "warmup_steps": 4})
    _, metrics, _ = run_steps(config, [make_batch()] * 3)
    assert_close([m["lr"] for m in metrics], [0.25, 0.5, 0.75], 1e-6)


@pytest.mark.parametrize("kind", ["encoder", "vision"])
def test_classifiers_learn_and_padding_weighs_nothing(kind, rng):
    model = ModelConfig(
        kind=kind, vocab_size=16, max_seq_len=16, d_model=16, d_ff=32, num_layers=1,
        num_heads=2, num_kv_heads=2, head_dim=8, num_classes=3,
    )  # fmt: skip
    config = dataclasses.replace(make_tiny(), model=model)
    labels = np.array([0, 1, 2, 0, 1, 2, -1, -1], np.int32)
    if kind == "vision":
        inputs = {"images": rng.normal(size=(8, 8, 8, 1)).astype(np.float32)}
    else:
        inputs = {
            "tokens": rng.integers(0, 16, (8, 16)).astype(np.int32),
            "segments": np.ones((8, 16), np.int32),
        }
    batch = {**inputs, "labels": labels}
    garbled = {k: v.copy() for k, v in batch.items()}
    next(iter(garbled.values()))[6:] = 1
    config = with_train(config, steps=8)
    history, metrics, _ = run_steps(config, [batch] * 8)
    other, _, _ = run_steps(config, [garbled])
    # The filling rows can reach the order of a sum, nothing else.
    for name, value in history[1].items():
        assert_close(value, other[1][name], 1e-5, least=1.0, about=name)
    assert metrics[-1]["loss"] < metrics[0]["loss"] - 0.1
