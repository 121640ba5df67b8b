"""Models with adapters: `apply_adapted` calls a function of parameters with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, PyTree

from uoe_jax import checks
from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.config import Path
from uoe_jax.adapt.evaluate import network
from uoe_jax.adapt.evaluate.interpret import call_adapted
from uoe_jax.adapt.evaluate.network import Lazy, Term, vary_alike
from uoe_jax.adapt.evaluate.products import Mode
from uoe_jax.adapt.init import column_norms
from uoe_jax.adapt.plan import LeafPlan
from uoe_jax.errors import ConfigError, nearest, shown
from uoe_jax.tree import named_leaves

BANK = "K"  # letter of several adapters summed; no axis has it


def _settle(given: checks.Given) -> None:
    if not callable(given["fn"]):
        raise ConfigError(
            f"fn is {shown(given['fn'])}; it must be a function of the parameters"
        )
    found = given["adapters"]
    several = [found] if isinstance(found, Adapters) else found
    if not isinstance(several, Sequence) or isinstance(several, str):
        raise ConfigError(
            f"adapters is a {type(found).__name__}; pass what init_adapters or "
            "load_adapters returns, or a list of them"
        )
    for i, adapter in enumerate(several):
        if not isinstance(adapter, Adapters):
            raise ConfigError(
                f"adapters[{i}] is a {type(adapter).__name__}; pass what init_adapters "
                "or load_adapters returns"
            )
    if given["path"] not in get_args(Path):
        raise ConfigError(
            f"path is {shown(given['path'])}; "
            + nearest(str(given["path"]), get_args(Path))
        )
    checks.flag(given, "training")
    checks.key(given, "key")
    specs = given["specs"]
    if specs is None:
        return
    if not isinstance(specs, Mapping):
        raise ConfigError(
            f"specs is a {type(specs).__name__}; it must map names of weights to "
            "PartitionSpecs"
        )
    for plan in (plan for adapter in several for plan in adapter.plans):
        if plan.name not in specs:
            raise ConfigError(
                f"specs has no {plan.name}; say how each adapted weight is split"
            )


@checks.checked(_settle)
def apply_adapted(
    fn: Callable[..., Any],
    params: PyTree,
    adapters: Adapters | Sequence[Adapters],
    *args: Any,
    path: Path = "auto",
    training: bool = False,
    key: jax.Array | None = None,
    specs: Mapping[str, PartitionSpec] | None = None,
) -> Any:
    """Return `fn(params, *args)` as if every adapted weight were weight + deltas.

    Several adapters add up. `path`: delta (a second product with the whole delta),
    fused (one product with the sum), factored (small products), or auto: the cheapest
    at each product. `key` switches on input dropout. Traceable: jit, grad and vmap work
    over adapters and args, and arrays of the same shapes never recompile. Inside
    `jax.shard_map` all arrays are a device's own shards, factors split as their weights
    are; `specs` says how by weight.

    Raises:
      ConfigError: an adapter of a weight that isn't there or has another shape; what
        is no adapter, path, key or flag; adapted weights without specs beside others.
    """
    if isinstance(adapters, Adapters):
        adapters = (adapters,)
    leaves = named_leaves(params)
    numbers = {name: number for number, name in enumerate(leaves)}
    lazies: dict[int, Lazy] = {}
    for adapter in adapters:
        for plan in adapter.plans:
            check_leaf(plan, leaves, sharded=specs is not None)
            number = numbers[plan.name]
            weight = lazies.get(number, Lazy(leaves[plan.name], ()))
            split = () if specs is None else split_axes(plan, specs[plan.name])
            lazies[number] = attach(weight, adapter, plan, split)
    lazies = {number: vary_alike(weight) for number, weight in lazies.items()}
    return call_adapted(fn, params, lazies, args, Mode(path, training, key))


def adapted_params(params: PyTree, adapters: Adapters | Sequence[Adapters]) -> PyTree:
    """Return the parameters with all deltas added, in the weights' dtypes.

    Differentiable in the adapters; `merge` does the same from float32 weights.
    """
    identity = lambda tree: tree
    return apply_adapted(identity, params, adapters, path="fused")


def check_leaf(
    plan: LeafPlan, leaves: dict[str, Any], *, sharded: bool = False
) -> None:
    """Raise ConfigError unless the planned weight is there with the planned shape.

    Shards are smaller than what was planned: of those the shape isn't asked.
    """
    if plan.name not in leaves:
        raise ConfigError(
            f"adapter of {plan.name!r}, which the model hasn't; "
            + nearest(plan.name, leaves)
        )
    shape = tuple(leaves[plan.name].shape)
    if not sharded and shape != plan.shape:
        raise ConfigError(
            f"adapter of {plan.name} is for shape {list(plan.shape)}, the model has "
            f"{list(shape)}; use the model it was trained on"
        )


def split_axes(plan: LeafPlan, spec: PartitionSpec) -> tuple[str, ...]:
    """Return the mesh axes that share the numbers of which a magnitude is the norm."""
    kept = plan.axes.batch + plan.axes.outs
    pairs = zip(plan.axes.axes, spec, strict=False)
    return tuple(axis for letter, axis in pairs if axis and letter not in kept)


def attach(
    weight: Lazy, adapter: Adapters, plan: LeafPlan, split: tuple[str, ...] = ()
) -> Lazy:
    """Return an adapted weight with one more adapter.

    A vector's delta is added at once; so is a DoRA delta, whose norms need the whole
    weight, also where mesh axes `split` it.
    """
    parts, scale = adapter.weights[plan.name], adapter.scales[plan.name]
    terms = [make_term(plan, parts, scale)]
    if plan.name in adapter.anchor:
        terms.append(make_term(plan, adapter.anchor[plan.name], -scale))
    if plan.dora:
        if plan.bank:
            raise ConfigError(
                f"{plan.name} has DoRA adapters side by side; select one of them"
            )
        dtype = jnp.promote_types(weight.value.dtype, jnp.float32)
        wide = Lazy(weight.value.astype(dtype), (*weight.terms, *terms))
        value = rescale(plan, network.fuse(wide), parts["magnitude"], split)
        return Lazy(value.astype(weight.value.dtype), ())
    if plan.method == "vector":
        value = network.fuse(Lazy(weight.value, tuple(terms)))
        return Lazy(value, weight.terms)
    return Lazy(weight.value, (*weight.terms, *terms))


def make_term(plan: LeafPlan, parts: dict[str, Array], scale: Array) -> Term:
    """Return an adapter's delta of one weight as a network; the scale in its core.

    The arrays of a bank have a leading letter that is summed over.
    """
    lead = BANK if plan.bank else ""
    labels = [(part, lead + word) for part, word in plan.labels if part != "magnitude"]
    arrays = [parts[part] for part, _ in labels]
    smallest = min(range(len(arrays)), key=lambda n: math.prod(arrays[n].shape))
    array = arrays[smallest]
    scale = scale.reshape(scale.shape + (1,) * (array.ndim - scale.ndim))
    arrays[smallest] = array * scale.astype(array.dtype)
    return Term(
        arrays=tuple(arrays),
        labels=tuple(word for _, word in labels),
        axes=tuple(plan.axes.axes),
        dropout=plan.dropout,
        name=plan.name,
    )


def leaf_delta(adapter: Adapters, plan: LeafPlan) -> Array:
    """Return the float32 delta of one weight, an anchor subtracted; without DoRA."""
    parts, scale = adapter.weights[plan.name], adapter.scales[plan.name]
    change = network.delta(make_term(plan, parts, scale))
    if plan.name in adapter.anchor:
        start = make_term(plan, adapter.anchor[plan.name], scale)
        change = change - network.delta(start)
    return change


def rescale(
    plan: LeafPlan, value: Array, magnitude: Array, split: tuple[str, ...] = ()
) -> Array:
    """Return a weight with each output's norm set (DoRA, equation 5).

    The norm is a constant of the backward pass, as in its section 4.3.
    """
    norms = jax.lax.stop_gradient(column_norms(plan, value, split))
    ratio = magnitude / jnp.maximum(norms, jnp.finfo(value.dtype).tiny)
    kept, axes = plan.axes.batch + plan.axes.outs, plan.axes.axes
    ratio = ratio.transpose([kept.index(a) for a in axes if a in kept])
    sizes = zip(axes, value.shape, strict=True)
    return value * ratio.reshape([n if a in kept else 1 for a, n in sizes])
