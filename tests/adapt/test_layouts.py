"""An adapter's loss and gradients are the same on every layout of the devices."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from tests.adapt.moved_adapters import draw_model, move_adapters
from tests.compare import assert_close
from uoe_jax.adapt import AdapterConfig
from uoe_jax.adapt.subject import adapter_subject
from uoe_jax.config import (
    ExperimentConfig,
    LayoutConfig,
    MeshConfig,
    ModelConfig,
    UnionConfig,
)
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.train.step import make_gradients, put_batch
from uoe_jax.tree import named_leaves

MODEL = ModelConfig(
    vocab_size=32,
    max_seq_len=16,
    d_model=16,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    head_dim=4,
    attention=("union", "dense"),
    mlp=("union", "dense"),
    activation="swiglu",
    use_bias=True,
    tie_embeddings=False,
    union=UnionConfig(num_experts=4, top_k=2),
)
EVERYWHERE = (
    "*.w?",
    "*.w_*",
    "*scale",
    "*.b?",
    "*.b_*",
    "*embedding",
    "head.*",
    "*.router.*",
)
ADAPTERS = {
    "lora": {"method": "lora"},
    "tucker, heads, shared": {"split_heads": True, "share_experts": True},
    "dora": {"method": "lora", "use_dora": True, "targets": ("*.w?", "*.w_*")},
    "hosvd": {"method": "lora", "init": "hosvd", "targets": ("*.wo", "*.w_up")},
}
DATA_FSDP_TENSOR = MeshConfig(data=2, fsdp=2, tensor=2)
IN_TURNS = {
    "experts": "round_robin",
    "tensor_reduce": "reduce_scatter",
    "dispatch": "all_to_all",
}
LAYOUTS = {
    "lora": (DATA_FSDP_TENSOR, {}),
    "tucker, heads, shared": (DATA_FSDP_TENSOR, IN_TURNS),
    "dora": (DATA_FSDP_TENSOR, {}),
    "hosvd": (MeshConfig(data=1, fsdp=2, tensor=2, sequence=2), IN_TURNS),
}


def experiment(mesh, **layout):
    data = dataclasses.replace(ExperimentConfig().data, batch_size=8)
    return ExperimentConfig(
        model=MODEL, data=data, mesh=mesh, layout=LayoutConfig(**layout)
    )


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 32, (8, 17)).astype(np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": np.tile(np.arange(16, dtype=np.int32), (8, 1)),
        "segments": np.ones((8, 16), np.int32),
        "mask": (rng.random((8, 16)) < 0.8).astype(np.float32),
    }


@pytest.fixture(scope="module")
def compute():
    base = draw_model(MODEL)

    def compute(options, mesh, **layout):
        """Loss, gradients by name with experts in their own order, and the norm."""
        config = experiment(mesh, **layout)
        adapter = AdapterConfig(rank=2, **{"targets": EVERYWHERE, **options})
        adapters = move_adapters(base[1], adapter)
        mesh = mesh_for(config)
        optimizer = make_optimizer(config.optim, 10)
        subject = adapter_subject(adapters, base, config, optimizer, mesh)
        about = (subject.graphdef, subject.layout, subject.objective)
        run = jax.jit(make_gradients(config, *about))
        batch, state = put_batch(make_batch(), mesh), subject.state
        grads, sums, _ = run(state, batch, state.step, subject.frozen)
        grads = subject.layout.to_file(jax.device_get(grads))
        return float(sums["loss"]), named_leaves(grads)

    return compute


@pytest.fixture(scope="module")
def alone(compute):
    """Each adapter's loss and gradients on one device."""
    return functools.cache(lambda name: compute(ADAPTERS[name], MeshConfig(data=1)))


@pytest.mark.filterwarnings("ignore")
def test_rules_move_the_factors_with_their_weights(compute, alone):
    """The factors are split as their weights are, along other axes too."""
    rules = {"*.attention.w[qv]": {"fsdp": "h"}, "*.mlp.w_*": {"fsdp": None}}
    want_loss, want = alone("lora")
    loss, grads = compute(ADAPTERS["lora"], DATA_FSDP_TENSOR, rules=rules)
    assert abs(loss - want_loss) < 1e-5
    largest = max(np.abs(grad).max() for grad in want.values())
    for key, grad in want.items():
        assert_close(grads[key], grad, 1e-4, least=largest, about=key)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ADAPTERS)
def test_loss_and_gradients_are_those_of_one_device(name, compute, alone):
    mesh, choices = LAYOUTS[name]
    want_loss, want = alone(name)
    loss, grads = compute(ADAPTERS[name], mesh, **choices)
    assert abs(loss - want_loss) < 1e-5
    assert grads.keys() == want.keys()
    largest = max(np.abs(grad).max() for grad in want.values())
    for key, grad in want.items():
        assert_close(grads[key], grad, 1e-4, least=largest, about=key)
        assert np.abs(grad).max() > 0, key
