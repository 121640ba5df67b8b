"""A small ConvNet from MNIST to CIFAR-10: 4-D Tucker against reshaped LoRA.

    python -m experiments.e006_adapters.conv --out OUT [--tiny]

The head is trained anew in every case; adapters are of the convolutions. LoRA takes a
kernel as a matrix [k k in, out], Tucker as the four-way tensor it is.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec

from experiments.e006_adapters.lm import Results, over_stack, solve, start_ranks
from experiments.shared.stack import first_state, train_at_once, with_rate
from uoe_jax.adapt import (
    AdapterConfig,
    apply_adapted,
    count_adapter_params,
    init_adapters,
)
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
WIDTHS = (3, 64, 128, 128, 256, 256)
STRIDES = (1, 2, 1, 2, 1)

# name -> (adapter, ranks); rank 0 is the head alone.
CURVES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "lora": ({"method": "lora"}, (1, 2, 4, 8, 16)),
    "tucker_k2": ({"method": "tucker", "kernel_rank": 2}, (2, 4, 8, 16, 32)),
    "tucker_k3": ({"method": "tucker", "kernel_rank": 3}, (2, 4, 8, 16, 32)),
}
RATES = (1e-3, 3e-3, 1e-2)
FULL_RATES = (3e-4, 1e-3, 3e-3)


def load(name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Images [N, 32, 32, 3] in [-1, 1] and labels, train then test."""
    folder = Path(os.environ["UOE_DATA_DIR"])
    if name == "mnist":
        saved = np.load(folder / "mnist_20k3k.npz")
        images = lambda key: np.repeat(
            np.pad(saved[key].reshape(-1, 28, 28), ((0, 0), (2, 2), (2, 2)))[..., None],
            3,
            axis=-1,
        )
    else:
        saved = np.load(folder / "cifar10_jpg_8k2k.npz")

        def images(key: str) -> np.ndarray:
            # Stored as differences along both axes and of the channels to the first.
            sums = np.cumsum(saved[key], axis=2, dtype=np.uint8)
            x = np.cumsum(sums, axis=3, dtype=np.uint8)
            return np.stack([x[:, 0] + x[:, 1], x[:, 0], x[:, 0] + x[:, 2]], axis=-1)

    scaled = [(images(k).astype(np.float32) / 127.5 - 1) for k in ("xtr", "xte")]
    labels = [saved[k].astype(np.int32).reshape(-1) for k in ("ytr", "yte")]
    return scaled[0], labels[0], scaled[1], labels[1]


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
    args: Any,
    call: Call = whole,
    trained: Tree = None,
    frozen: Tree = None,
) -> Tree:
    """The project's step: Adam with cosine decay and mirrored images, in one scan."""
    images, labels = data
    optim = OptimConfig(
        learning_rate=1.0, warmup_steps=0, final_lr_fraction=0.0, beta2=0.999,
        weight_decay=0.0, clip_norm=0.0,
    )  # fmt: skip
    model = ModelConfig(kind="vision", image_size=32, image_channels=3, num_classes=10)
    mesh = MeshConfig(data=1)
    train = TrainConfig(steps=args.steps)
    config = ExperimentConfig(model=model, optim=optim, mesh=mesh, train=train)
    optimizer = with_rate(make_optimizer(optim, args.steps))
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
        rows = jax.random.randint(key, (args.batch,), 0, images.shape[0])
        flip = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (args.batch,))
        x = images[rows]
        x = jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
        return {"images": x, "labels": labels[rows]}

    start = params if trained is None else trained
    state = first_state(start, buffers, optimizer, jnp.float32(rate))
    return train_at_once(step, state, batch, args.steps, frozen)


def error_rate(call: Any, data: Any) -> jax.Array:
    """Share of wrong answers over whole batches of 100."""
    images, labels = data
    x = images.reshape(-1, 100, *images.shape[1:])
    picked = jax.lax.map(lambda part: jnp.argmax(call(part), axis=-1), x).reshape(-1)
    return jnp.mean((picked != labels).astype(jnp.float32))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="try it on a CPU")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--curves", nargs="*", default=["full", "head", *CURVES])
    return parser.parse_args()


def main() -> None:
    args = parse()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "adapters_conv.json")
    widths = (3, 8, 8, 8, 8, 8) if args.tiny else WIDTHS
    limit = 300 if args.tiny else None
    mnist, cifar = (
        tuple(jnp.asarray(a[:limit]) for a in load(name)) for name in ("mnist", "cifar")
    )
    start = make_net(jax.random.key(0), widths)
    train = jax.jit(lambda p, data: fit(p, data, 1e-3, 0, args))
    base = train(start, mnist[:2])
    wrong = jax.jit(lambda p, data: error_rate(lambda x: forward(p, x), data))
    about = {
        **made_with(),
        "options": {k: str(v) for k, v in vars(args).items()},
        "mnist_error": float(wrong(base, mnist[2:])),
        "conv_params": sum(
            leaf["kernel"].size
            for name, leaf in base.items()
            if name.startswith("conv")
        ),
    }
    results.put("about", about)
    print(f"base: {about['mnist_error']:.2%} wrong on MNIST", flush=True)
    base = {**base, "head": start["head"]}
    for name in args.curves:
        began = time.time()
        try:
            run_curve(name, base, cifar, args, results)
        except Exception as error:  # the other curves still count
            print(f"{name} failed: {type(error).__name__}: {error}"[:2000], flush=True)
        print(f"{name}: {time.time() - began:.0f} s", flush=True)


def run_curve(name: str, base: Tree, data: Any, args: Any, results: Results) -> None:
    if name in CURVES:
        options, ranks = CURVES[name]
        config = lambda rank: AdapterConfig(
            rank=rank, alpha=2.0 * rank, targets=("conv*.kernel",), **options
        )
    else:
        ranks = (0,)
    sizes = {0: 0 if name == "head" else sum(a.size for a in jax.tree.leaves(base))}
    made = {}
    if name in CURVES:
        make = lambda rank, key: init_adapters(base, config(rank), key)
        described = {
            rank: jax.eval_shape(lambda rank=rank: make(rank, jax.random.key(0)))
            for rank in ranks
        }
        made = start_ranks(lambda key: make(max(ranks), key), described)
        sizes = {rank: count_adapter_params(one) for rank, one in described.items()}

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
        if name in CURVES:
            tree["adapters"] = start.weights
            frozen["scales"] = start.scales
        tree = fit(base, cifar[:2], rate, seed, args, call, tree, frozen)
        return error_rate(lambda x: call(forward, tree, frozen, x), cifar[2:])

    run = over_stack(one, 1, base, data)
    take = lambda rank, seed: (
        jax.tree.map(lambda a: a[seed], made[rank]) if made else np.zeros(())
    )
    rates = FULL_RATES if name == "full" else RATES
    solve(name, run, take, ranks, sizes, results, rates, metric="error")


if __name__ == "__main__":
    main()
