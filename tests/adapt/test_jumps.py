"""An adapter's steps are judged and repeated as a whole model's are."""

import dataclasses
import itertools

import jax
import numpy as np
from flax import nnx

from tests.adapt.test_training import tiny_language_model
from uoe_jax.adapt import AdapterConfig, init_adapters
from uoe_jax.adapt.subject import adapter_subject
from uoe_jax.config import MeshConfig
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.train import level
from uoe_jax.train.replay import make_replay
from uoe_jax.train.step import make_step, put_batch
from uoe_jax.tree import named_leaves


def test_a_loss_that_jumps_leaves_the_factors_alone(monkeypatch):
    monkeypatch.setattr(level, "WARMUP", 3)
    config, graphdef, params, buffers = tiny_language_model()
    train = dataclasses.replace(config.train, max_loss_jump=6.0, replay_every=1)
    config = dataclasses.replace(config, train=train)
    adapter = AdapterConfig(rank=2, targets=("*.w?", "*.mlp.w_*"))
    fresh = init_adapters(params, adapter, jax.random.key(0))
    optimizer = make_optimizer(config.optim, 4)
    mesh = make_mesh(MeshConfig(data=2), batch_size=8)
    base = (graphdef, params, buffers)
    subject = adapter_subject(fresh, base, config, optimizer, mesh)
    step = make_step(
        config, graphdef, optimizer, mesh, subject.layout, subject.objective
    )
    tokens = np.random.default_rng(0).integers(0, 31, (8, 8)).astype(np.int32)
    ones = np.ones((8, 8), np.int32)
    batch = {"tokens": tokens, "segments": ones, "mask": ones.astype(np.float32)}
    batch["positions"] = np.tile(np.arange(8, dtype=np.int32), (8, 1))
    # The targets that the base finds likeliest, and those it finds least likely.
    model = jax.jit(lambda p: nnx.merge(graphdef, p, buffers)(tokens)[0])
    logits = np.asarray(model(params))
    good = put_batch({**batch, "targets": logits.argmax(2).astype(np.int32)}, mesh)
    bad = put_batch({**batch, "targets": logits.argmin(2).astype(np.int32)}, mesh)
    state, jumps = subject.state, []
    history = [jax.device_get(named_leaves(state))]
    replay = make_replay(config, subject)
    replay(state, good, subject.frozen, 1)
    for given in (good, good, good, good, bad, good):
        state, metrics = step(state, given, subject.frozen)
        history.append(jax.device_get(named_leaves(state)))
        jumps.append(int(metrics["jumps"]))
    assert jumps == [0, 0, 0, 0, 1, 0]
    moved = [
        {name for name in a if a[name].tobytes() != b[name].tobytes()}
        for a, b in itertools.pairwise(history)
    ]
    assert moved[4] == {"step", "loss_level.jumps"}
    assert any(name.startswith("params.") for name in moved[3] & moved[5])
