"""A run's state: one pytree of arrays, its model's static half, and its totals."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import PyTree

from uoe_jax.config import ExperimentConfig, ModelConfig, OptimConfig, TrainConfig
from uoe_jax.errors import CheckpointError, ConfigError
from uoe_jax.model import check_pairs, param_shapes, split_model
from uoe_jax.partition.layout import Layout, make_layout

# Initialisation runs once: on a CPU compiling it well takes longer than running it.
_COMPILE_FAST = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
}


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class LossLevel:
    """Exponential mean and variance of the losses accepted so far."""

    mean: Any  # float32
    variance: Any  # float32
    accepted: Any  # int32, losses since the level began
    jumps: Any  # int32, in a row


def first_level(config: TrainConfig) -> LossLevel | None:
    """Return the level of a run that begins; None where no jump is looked for."""
    if config.max_loss_jump is None:
        return None
    zero, none = jnp.zeros((), jnp.float32), jnp.zeros((), jnp.int32)
    return LossLevel(mean=zero, variance=zero, accepted=none, jumps=none)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything a step changes, as arrays (or what jax traces in their place)."""

    step: Any  # int32, steps taken, skipped ones included
    params: PyTree
    opt_state: PyTree
    buffers: PyTree  # the routers' balance biases
    bad_steps: Any  # int32, non-finite steps in a row
    loss_level: Any = None  # LossLevel with train.max_loss_jump, None without
    ema: PyTree = None  # mean of the params with optim.ema_decay, None without

    @property
    def used(self) -> PyTree:
        """The weights that are validated and used: their mean, where there is one."""
        return self.params if self.ema is None else self.ema


# A checkpoint's `params` are those that are used, so that whoever reads a run need not
# know of the mean; training goes on from the others.
_USED, _TRAINED, _MEAN = "params.", "trained.", "ema."


def to_saved(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state's arrays by the names that a checkpoint gives them."""
    if not any(name.startswith(_MEAN) for name in arrays):
        return dict(arrays)
    return _renamed(_renamed(arrays, _USED, _TRAINED), _MEAN, _USED)


def from_saved(
    arrays: Mapping[str, Any], template: Mapping[str, Any]
) -> dict[str, Any]:
    """Return a checkpoint's arrays by the names of a state, which `template` has.

    Where the mean begins only now it is that of the weights there are.
    """
    if not any(name.startswith(_MEAN) for name in template):
        return dict(arrays)
    # Copies: a step donates both.
    used = {n: a.copy() for n, a in arrays.items() if n.startswith(_USED)}
    arrays = _renamed(used, _USED, _TRAINED) | dict(arrays)
    return _renamed(_renamed(arrays, _USED, _MEAN), _TRAINED, _USED)


def _renamed(arrays: Mapping[str, Any], old: str, new: str) -> dict[str, Any]:
    return {
        new + name.removeprefix(old) if name.startswith(old) else name: array
        for name, array in arrays.items()
    }


def check_buffers(run_dir: Path, model: ModelConfig, arrays: Mapping[str, Any]) -> None:
    """Raise CheckpointError for rotated pairs of a state that a model can't have."""
    start = "buffers."
    buffers = {n.removeprefix(start): a for n, a in arrays.items()}
    try:
        check_pairs(model, buffers)
    except ConfigError as error:
        raise CheckpointError(f"{run_dir}: {error}; write the run anew") from None


def first_mean(config: OptimConfig, params: PyTree) -> PyTree:
    """Return the mean of a run's weights before its first step; None where none is."""
    return jax.tree.map(jnp.copy, params) if config.ema_decay > 0 else None


@dataclass
class Progress:
    """Totals that a resumed run continues; saved with every checkpoint."""

    seconds: float = 0.0  # of training steps; compiling, validation, saving left out
    elapsed: float = 0.0  # wall clock of everything, what max_seconds bounds
    tokens: int = 0
    flops: float = 0.0
    skipped: int = 0  # steps whose update was dropped
    first_step: int = 0  # at which the run began, of one made from another's model
    train_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None
    valid: dict[str, Any] = field(default_factory=dict)  # the last validation's line

    def spent(self) -> Progress:
        """Return what went into a model: seconds, tokens, FLOPs; no scores."""
        return Progress(seconds=self.seconds, tokens=self.tokens, flops=self.flops)

    def as_json(self) -> dict[str, Any]:
        """Return the fields as a plain dict."""
        return asdict(self)


def check_32_bits() -> None:
    """Raise ConfigError where jax computes in 64 bits: a seed gives other weights."""
    if jax.config.read("jax_enable_x64"):
        raise ConfigError(
            "jax_enable_x64 is on, and with it the same seed gives other weights; "
            "call jax.config.update('jax_enable_x64', False) before training"
        )


def layout_of(config: ExperimentConfig, mesh: Mesh) -> Layout:
    """Return the layout of an experiment's model on a mesh."""
    shapes = {name: leaf.shape for name, leaf in param_shapes(config.model).items()}
    return make_layout(config, mesh, shapes)


def init_state(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Return the model's static half and the first state, laid out on the mesh."""
    graphdef, init, shardings = _initialiser(config, optimizer, mesh)
    run = jax.jit(init, out_shardings=shardings, compiler_options=_COMPILE_FAST)
    return graphdef, run()


def abstract_state(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, TrainState]:
    """Return what `init_state` does, with shapes and shardings in place of arrays."""
    graphdef, init, shardings = _initialiser(config, optimizer, mesh)
    described = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding
        ),
        jax.eval_shape(init),
        shardings,
    )
    return graphdef, described


def _initialiser(
    config: ExperimentConfig, optimizer: optax.GradientTransformation, mesh: Mesh
) -> tuple[nnx.GraphDef, Callable[[], TrainState], PyTree]:
    """Return a model's static half, what makes its state, and the state's shardings."""
    graphdef, make = split_model(config.model, config.train.seed)
    layout = layout_of(config, mesh)

    def init() -> TrainState:
        params, buffers = make()
        params = layout.to_memory(params)
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            opt_state=optimizer.init(params),
            buffers=buffers,
            bad_steps=jnp.zeros((), jnp.int32),
            loss_level=first_level(config.train),
            ema=first_mean(config.optim, params),
        )

    return graphdef, init, layout.sharding_tree(jax.eval_shape(init))
