"""A small ConvNet from MNIST to CIFAR-10: 4-D Tucker against reshaped LoRA.

    python experiments/006_adapters/conv.py --out OUT [--tiny]

The head is trained anew in every case; adapters are of the convolutions. LoRA takes a
kernel as a matrix [k k in, out], Tucker as the four-way tensor it is.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from lm import Results, over_stack, solve, start_ranks

from uoe_jax.adapt import (
    AdapterConfig,
    apply_adapted,
    count_adapter_params,
    init_adapters,
)

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


def loss(params: Tree, images: jax.Array, labels: jax.Array) -> jax.Array:
    picked = jax.nn.log_softmax(forward(params, images))
    return -jnp.mean(jnp.take_along_axis(picked, labels[:, None], axis=1))


def fit(
    objective: Any, start: Tree, data: Any, rate: Any, seed: Any, args: Any
) -> Tree:
    """Adam with cosine decay and mirrored images, one scan."""
    adam = optax.scale_by_adam()
    images, labels = data

    def step(carry: Tree, number: jax.Array) -> tuple[Tree, None]:
        tree, state = carry
        key = jax.random.fold_in(jax.random.key(seed), number)
        rows = jax.random.randint(key, (args.batch,), 0, images.shape[0])
        flip = jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, (args.batch,))
        x = images[rows]
        x = jnp.where(flip[:, None, None, None], x[:, :, ::-1], x)
        grads = jax.grad(objective)(tree, x, labels[rows])
        updates, state = adam.update(grads, state)
        share = 0.5 + 0.5 * jnp.cos(jnp.pi * number / args.steps)
        return (
            jax.tree.map(lambda p, u: p - rate * share * u, tree, updates),
            state,
        ), None

    (tree, _), _ = jax.lax.scan(step, (start, adam.init(start)), jnp.arange(args.steps))
    return tree


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
    args.out.mkdir(parents=True, exist_ok=True)
    results = Results(args.out / "adapters_conv.json")
    widths = (3, 8, 8, 8, 8, 8) if args.tiny else WIDTHS
    limit = 300 if args.tiny else None
    mnist, cifar = (
        tuple(jnp.asarray(a[:limit]) for a in load(name)) for name in ("mnist", "cifar")
    )
    start = make_net(jax.random.key(0), widths)
    train = jax.jit(lambda p, data: fit(loss, p, data, 1e-3, 0, args))
    base = train(start, mnist[:2])
    wrong = jax.jit(lambda p, data: error_rate(lambda x: forward(p, x), data))
    about = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
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

        def call(fn: Any, tree: Tree, *args: Any) -> Any:
            if name == "full":
                return fn(tree, *args)
            params = {**base, "head": tree["head"]}
            if name == "head":
                return fn(params, *args)
            adapters = start.with_weights(tree["adapters"])
            return apply_adapted(fn, params, adapters, *args, training=True)

        tree = base if name == "full" else {"head": base["head"]}
        if name in CURVES:
            tree["adapters"] = start.weights
        objective = lambda tree, x, y: call(loss, tree, x, y)
        tree = fit(objective, tree, cifar[:2], rate, seed, args)
        return error_rate(lambda x: call(forward, tree, x), cifar[2:])

    run = over_stack(one, 1, base, data)
    take = lambda rank, seed: (
        jax.tree.map(lambda a: a[seed], made[rank]) if made else np.zeros(())
    )
    rates = FULL_RATES if name == "full" else RATES
    solve(name, run, take, ranks, sizes, results, rates, metric="error")


if __name__ == "__main__":
    main()
