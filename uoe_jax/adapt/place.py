"""Foreign modules placed on this library's weights: stacked, turned, ranks padded."""

from __future__ import annotations

import dataclasses
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.init import init_leaf
from uoe_jax.adapt.plan import LeafPlan, make_plans, warn_of_tied
from uoe_jax.errors import DataError, nearest
from uoe_jax.interop.modules import Place
from uoe_jax.interop.peft import Module
from uoe_jax.tree import named_leaves
from uoe_jax.weights import WeightAxes

Names = Callable[[str], Place | None] | Mapping[str, Place | str]


def llama_names(name: str) -> Place | None:
    """Return where a Hugging Face Llama module lies in this library's decoder."""
    whole = {"lm_head": "head.weight", "model.embed_tokens": "embed.embedding"}
    if name in whole:
        return Place(whole[name])
    inner = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "mlp.w_gate",
        "mlp.up_proj": "mlp.w_up",
        "mlp.down_proj": "mlp.w_down",
    }
    found = re.fullmatch(r"model\.layers\.(\d+)\.(.*)", name)
    if not found or found[2] not in inner:
        return None
    return Place(f"trunk.blocks.0.{inner[found[2]]}", (int(found[1]),))


def place_modules(
    modules: Mapping[str, Module],
    params: PyTree,
    names: Names,
    *,
    axes: Mapping[str, WeightAxes] | None = None,
) -> Adapters:
    """Return foreign modules as one adapter of this library's weights.

    `names` maps a module's name to its parameter, with the index along the layers (and
    experts) for stacked ones. Layers without a module get zeros; scales go into B.

    Raises DataError for a module that has no place or doesn't fit, or for modules of
    several forms on one parameter.
    """
    leaves = named_leaves(params)
    placed: dict[str, dict[tuple[int, ...], Module]] = {}
    for name, module in modules.items():
        place = names(name) if callable(names) else names.get(name)
        place = Place(place) if isinstance(place, str) else place
        if place is None or place.name not in leaves:
            target = name if place is None else place.name
            raise DataError(
                f"adapter module {name} has no place in this model; "
                + nearest(target, leaves)
            )
        placed.setdefault(place.name, {})[place.index] = module
    plans, weights = [], {}
    for name, group in placed.items():
        plan = _foreign_plan(name, leaves[name], group, axes)
        plans.append(plan)
        weights[name] = _foreign_parts(plan, leaves[name], group)
    warn_of_tied(plans, leaves)
    scales = {plan.name: jnp.float32(1.0) for plan in plans}
    return Adapters(weights=weights, scales=scales, anchor={}, plans=tuple(plans))


def _foreign_plan(
    name: str, leaf: Any, group: Mapping[Any, Module], axes: Any
) -> LeafPlan:
    forms = {(m.mid is not None, m.magnitude is not None) for m in group.values()}
    if len(forms) > 1:
        raise DataError(f"modules of {name} mix LoRA, Tucker or DoRA; they must agree")
    tucker, dora = forms.pop()
    module = next(iter(group.values()))
    rank = max(max(m.down.shape[0], m.up.shape[1]) for m in group.values())
    config = AdapterConfig(
        method="tucker" if tucker else "lora",
        rank=rank,
        kernel_rank=max(module.mid.shape[2:]) if module.mid is not None else 1,
        targets=(name,),
        use_dora=dora,
    )
    plan = make_plans({name: leaf.shape}, config, axes)[0]
    if not tucker:
        # Foreign ranks may exceed what the weight could use; they stay as they are.
        return dataclasses.replace(plan, ranks=(rank,))
    assert module.mid is not None
    ranks = (
        max(m.down.shape[0] for m in group.values()),
        max(m.up.shape[1] for m in group.values()),
        *module.mid.shape[2:],
    )
    return dataclasses.replace(plan, ranks=ranks)


def _foreign_parts(
    plan: LeafPlan, leaf: Any, group: Mapping[tuple[int, ...], Module]
) -> dict[str, Array]:
    """Return the stacked parts, module by module."""
    shapes = plan.shapes
    parts = {part: np.zeros(shape, np.float32) for part, shape in shapes.items()}
    if plan.dora:
        fresh = init_leaf(plan, "peft", jax.random.key(0), leaf, 1.0)
        parts["magnitude"] = np.array(fresh["magnitude"])
    batch = [plan.sizes[a] for a in plan.axes.batch]
    for index, module in group.items():
        full = (*index, *[0] * (len(batch) - len(index)))
        inside = len(full) == len(batch) and all(map(operator.lt, full, batch))
        if not inside or math.prod(batch[len(index) :]) > 1:
            raise DataError(
                f"{plan.name} has {batch} of a module, {list(index)} is none of them; "
                f"say which: Place({plan.name!r}, (...))"
            )
        for part, value in _torch_parts(plan, module).items():
            place = parts[part][full]
            if place.shape != value.shape:
                raise DataError(
                    f"{part} of a module for {plan.name} has shape "
                    f"{list(value.shape)}; it needs {list(place.shape)}"
                )
            place[...] = value
    return {part: jnp.asarray(value) for part, value in parts.items()}


def _torch_parts(plan: LeafPlan, module: Module) -> dict[str, np.ndarray]:
    """Return one module's parts in this library's orientation, ranks padded."""
    shapes = {
        part: [plan.sizes[a] for a in word if a not in plan.axes.batch]
        for part, word in plan.labels
    }
    space = len(plan.axes.kernel)
    found: dict[str, np.ndarray] = {}
    up = module.up.astype(np.float32) * np.float32(module.scale)
    down = module.down.astype(np.float32)
    if module.mid is None:
        turned = down.transpose(*range(2, down.ndim), 1, 0)
        found["a"] = _fit(turned, shapes["a"], plan, "lora_A")
        found["b"] = _fit(up.T, shapes["b"], plan, "lora_B")
    else:
        mid = module.mid.astype(np.float32)
        order = (1, 0, *range(2, mid.ndim))
        found["core"] = _fit(mid.transpose(order), shapes["core"], plan, "lora_mid")
        factors = [part for part, _ in plan.labels if part.startswith("factor")]
        found[factors[0]] = _fit(down.T, shapes[factors[0]], plan, "lora_down")
        found[factors[1]] = _fit(up, shapes[factors[1]], plan, "lora_up")
        for part in factors[2 : 2 + space]:
            found[part] = np.eye(*shapes[part], dtype=np.float32)
    if module.magnitude is not None:
        wanted = math.prod(shapes["magnitude"])
        if module.magnitude.size != wanted:
            raise DataError(
                f"a module for {plan.name} has {module.magnitude.size} magnitudes; the "
                f"weight has {wanted} outputs"
            )
        found["magnitude"] = module.magnitude.reshape(shapes["magnitude"])
    return found


def _fit(array: np.ndarray, shape: list[int], plan: LeafPlan, what: str) -> np.ndarray:
    """Return an array with its axes as the plan splits them and ranks padded with 0."""
    ranked = what in ("lora_A", "lora_down", "lora_up")
    rank_axis = -1 if ranked else 0
    if what != "lora_mid":
        rest = array.shape[:-1] if ranked else array.shape[1:]
        wanted = shape[:-1] if ranked else shape[1:]
        if math.prod(rest) != math.prod(wanted):
            raise DataError(
                f"{what} of a module for {plan.name} has shape {list(array.shape)}; "
                f"the weight needs {math.prod(wanted)} numbers a rank"
            )
        rank = array.shape[rank_axis]
        array = array.reshape((*wanted, rank) if ranked else (rank, *wanted))
    widths = [(0, n - m) for n, m in zip(shape, array.shape, strict=True)]
    if min(after for _, after in widths) < 0:
        raise DataError(
            f"{what} of a module for {plan.name} has shape {list(array.shape)}, more "
            f"than {shape}"
        )
    return np.pad(array, widths)
