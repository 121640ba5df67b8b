"""A small ConvNet from MNIST to CIFAR-10: 4-D Tucker against reshaped LoRA.

The head is trained anew in every case; adapters are of the convolutions. LoRA takes a
kernel as a matrix [k k in, out], Tucker as the four-way tensor it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec

from experiments.e006_adapters.config import (
    CONV_ADAPTERS,
    CONV_RATES,
    FILE,
    Settings,
    conv_adapter,
)
from experiments.e006_adapters.curves import (
    Curve,
    Results,
    over_stack,
    solve,
    start_ranks,
)
from experiments.e006_adapters.data import images as load_images
from experiments.shared.stack import first_state, train_at_once, with_rate
from uoe_jax.adapt import apply_adapted, init_adapters
from uoe_jax.bench.record import made_with
from uoe_jax.config import (
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from uoe_jax.optim import make_optimizer
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.runs.state import layout_of
from uoe_jax.train.step import make_step
from uoe_jax.train.subject import Objective

Tree = Any
WIDTHS, TINY_WIDTHS = (3, 64, 128, 128, 256, 256), (3, 8, 8, 8, 8, 8)
STRIDES = (1, 2, 1, 2, 1)
BASE_RATE, BASE_SEED = 1e-3, 0


def make_net(key: jax.Array, widths: tuple[int, ...]) -> Tree:
    """Kernels HWIO, per-channel scales of the norms, and a head."""
    params: dict[str, Any] = {}
    for number, (i, o) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
        draw = jax.random.normal(jax.random.fold_in(key, number), (3, 3, i, o))
        params[f"conv{number}"] = {"kernel": draw * (2 / (9 * i)) ** 0.5}
        params[f"norm{number}"] = {"scale": jnp.ones(o)}
    params["head"] = {"weight": jnp.zeros((widths[-1], 10)), "bias": jnp.zeros(10)}
    return params


def forward(params: Tree, images: jax.Array) -> jax.Array:
    """Logits; knows nothing of adapters."""
    x = images
    for number, stride in enumerate(STRIDES):
        kernel = params[f"conv{number}"]["kernel"]
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (stride, stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
        x = jax.nn.gelu(x * params[f"norm{number}"]["scale"])
    x = jnp.mean(x, axis=(1, 2))
    return x @ params["head"]["weight"] + params["head"]["bias"]


class Part(nnx.Module):
    """The arrays of one layer."""

    def __init__(self, arrays: dict[str, jax.Array]):
        for name, array in arrays.items():
            setattr(self, name, nnx.Param(array))


class Net(nnx.Module):
    """The network as the training step calls its models: logits, no routers."""

    def __init__(self, params: Tree):
        self.names = {name: tuple(arrays) for name, arrays in params.items()}
        for name, arrays in params.items():
            setattr(self, name, Part(arrays))

    def __call__(self, images: jax.Array, **_: Any) -> tuple[jax.Array, dict]:
        params = {
            name: {one: getattr(getattr(self, name), one)[...] for one in arrays}
            for name, arrays in self.names.items()
        }
        return forward(params, images), {}


def split(params: Tree) -> Any:
    """The network's static half, parameters and (no) buffers."""
    return nnx.split(Net(params), nnx.Param, ...)


# (function of parameters and more, what is trained, what isn't, more) -> its value
Call = Callable[..., Any]


def whole(fn: Any, trained: Tree, frozen: Tree, *args: Any) -> Any:
    """All parameters are trained."""
    return fn(trained, *args)


def fit(
    params: Tree,
    data: Any,
    rate: Any,
    seed: Any,
    sizes: tuple[int, int],
    call: Call = whole,
    trained: Tree = None,
    frozen: Tree = None,
) -> Tree:
    """The project's step: Adam with cosine decay and mirrored images, in one scan.

    `sizes` are the steps and the batch.
    """
    (images, labels), (steps, rows_a_batch) = data, sizes
    optim = OptimConfig(
        learning_rate=1.0, warmup_steps=0, final_lr_fraction=0.0, beta2=0.999,
        weight_decay=0.0, clip_norm=0.0,
    )  # fmt: skip
    model = ModelConfig(kind="vision", image_size=32, image_channels=3, num_classes=10)
    mesh = MeshConfig(data=1)
    train = TrainConfig(steps=steps)
    config = ExperimentConfig(model=model, optim=optim, mesh=mesh, train=train)
    optimizer = with_rate(make_optimizer(optim, steps))
    devices = make_mesh(mesh)
    # Of other weights than a vision transformer's, each whole.
    none: Any = {"specs": {}, "shapes": {}, "experts": {}}
    layout = dataclasses.replace(layout_of(config, devices), **none)
    graphdef, _, buffers = split(params)

    def with_model(
        fn: Any, state: Any, frozen: Tree, *args: Any, make_key: Any = None
    ) -> Any:
        weights, buffers = state
        given = lambda params, *args: fn(split(params)[1], buffers, *args)
        return call(given, weights, frozen, *args)

    objective = Objective(
        call=with_model,
        update_buffers=lambda buffers, aux, config: buffers,
        frozen_specs=PartitionSpec(),
    )
    step = make_step(config, graphdef, optimizer, devices, layout, objective)

    def batch(number: jax.Array) -> dict[str, jax.Array]:
        key = jax.random.fold_in(jax.random.key(seed), number)
        rows = jax.random.randint(key, (rows_a_batch,), 0, images.shape[0])
        flip = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (rows_a_batch,))
        x = images[rows]
        x = jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
        return {"images": x, "labels": labels[rows]}

    start = params if trained is None else trained
    state = first_state(start, buffers, optimizer, jnp.float32(rate))
    return train_at_once(step, state, batch, steps, frozen)


def error_rate(call: Any, data: Any) -> jax.Array:
    """Share of wrong answers over whole batches of 100."""
    images, labels = data
    x = images.reshape(-1, 100, *images.shape[1:])
    picked = jax.lax.map(lambda part: jnp.argmax(call(part), axis=-1), x).reshape(-1)
    return jnp.mean((picked != labels).astype(jnp.float32))


def make_curve(name: str, base: Tree, data: Any, given: Settings) -> Curve:
    """A curve: of adapters, of all parameters, or of the head alone."""
    adapted = name in CONV_ADAPTERS
    starts = None
    sizes = {0: 0 if name == "head" else sum(a.size for a in jax.tree.leaves(base))}
    if adapted:
        make = lambda rank, key: init_adapters(base, conv_adapter(name, rank), key)
        starts, sizes = start_ranks(make, CONV_ADAPTERS[name][1])

    def one(item: Any, base: Tree, cifar: Any) -> jax.Array:
        start, rate, seed = item

        def call(fn: Any, tree: Tree, frozen: Tree, *args: Any) -> Any:
            if name == "full":
                return fn(tree, *args)
            params = {**frozen["base"], "head": tree["head"]}
            if name == "head":
                return fn(params, *args)
            adapters = dataclasses.replace(
                start, weights=tree["adapters"], scales=frozen["scales"]
            )
            return apply_adapted(fn, params, adapters, *args, training=True)

        tree = base if name == "full" else {"head": base["head"]}
        frozen = {"base": base}
        if adapted:
            tree["adapters"] = start.weights
            frozen["scales"] = start.scales
        sizes = (given.steps, given.batch)
        tree = fit(base, cifar[:2], rate, seed, sizes, call, tree, frozen)
        return error_rate(lambda x: call(forward, tree, frozen, x), cifar[2:])

    rates = CONV_RATES["full" if name == "full" else "adapter"]
    run = over_stack(one, given.together, base, data)
    return Curve(
        name=name, metric="error", rates=rates, sizes=sizes, run=run, starts=starts
    )


def run(out: Path, given: Settings) -> None:
    """Train the network on MNIST, then every curve that has no result yet."""
    results = Results(out / FILE, "conv")
    mnist, cifar = (
        tuple(map(jnp.asarray, load_images(name, given.tiny)))
        for name in ("mnist", "cifar")
    )
    start = make_net(jax.random.key(0), TINY_WIDTHS if given.tiny else WIDTHS)
    sizes = (given.base_steps, given.base_batch)
    train = jax.jit(lambda p, data: fit(p, data, BASE_RATE, BASE_SEED, sizes))
    base = train(start, mnist[:2])
    wrong = jax.jit(lambda p, data: error_rate(lambda x: forward(p, x), data))
    kernels = [a["kernel"].size for name, a in base.items() if "conv" in name]
    about = {
        **made_with(),
        "settings": dataclasses.asdict(given),
        "mnist_error": float(wrong(base, mnist[2:])),
        "conv_params": sum(kernels),
    }
    results.put("about", about)
    print(f"base: {about['mnist_error']:.2%} wrong on MNIST", flush=True)
    base = {**base, "head": start["head"]}
    for name in given.curves:
        if name not in results.done:
            solve(make_curve(name, base, cifar, given), results)
