"""Adapters of other libraries: PEFT's LoRA, LyCORIS' LoCon with and without Tucker.

A file gives one module after another, in torch's orientation [out, in, *kernel]. What
is read can be looked at by itself (`module_delta`), or placed on this library's weights
by a table of names.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from uoe_jax.adapt.adapters import Adapters, named_params
from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.files import PREFIX, WEIGHTS, read_config, read_tensors
from uoe_jax.adapt.init import init_leaf
from uoe_jax.adapt.plan import LeafPlan, WeightAxes, make_plans
from uoe_jax.errors import DataError, nearest

# Settings of PEFT's LoRA that change what the arrays mean, and their plain values.
_PLAIN = {
    "bias": ("none",),
    "modules_to_save": (None, []),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "lora_bias": (False,),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False,),
}
_OTHER_LYCORIS = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "oft_": "OFT",
    "oft_blocks": "OFT",
    "dora_scale": "weight decomposition",
    "diff": "a full or norm difference",
    "on_input": "IA3",
    "a1.": "GLoRA",
}


class Module(NamedTuple):
    """One module's factors: delta = scale * up x mid x down, [out, in, *kernel]."""

    down: np.ndarray  # [r, in, *kernel], or [r_in, in] with a mid
    up: np.ndarray  # [out, r]
    mid: np.ndarray | None  # [r_out, r_in, *kernel]
    scale: float
    magnitude: np.ndarray | None  # [out], DoRA


class Place(NamedTuple):
    """Where a module's delta goes: a parameter, and the index of its batch axes."""

    name: str
    index: tuple[int, ...] = ()


Names = Callable[[str], Place | None] | Mapping[str, Place | str]


def module_delta(module: Module) -> Float[np.ndarray, "*shape"]:
    """Return the float32 delta [out, in, *kernel]; without DoRA's rescaling."""
    down, up = module.down.astype(np.float32), module.up.astype(np.float32)
    if module.mid is None:
        delta = np.einsum("or,r...->o...", up, down)
    else:
        mid = module.mid.astype(np.float32)
        delta = np.einsum("om,mn...->on...", up, mid)
        delta = np.einsum("on...,ni->oi...", delta, down)
    return module.scale * delta


def read_peft(folder: Path) -> dict[str, Module]:
    """Return a PEFT LoRA adapter's modules by name.

    rank_pattern, alpha_pattern, rsLoRA, DoRA, embeddings and convolutions are read.
    Raises DataError for other tuners, for settings that aren't LoRA's plain form, and
    for anything but safetensors.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise DataError(f"{folder} is a {kind} adapter; of PEFT's, LORA is read")
    for name, plain in _PLAIN.items():
        value = config.get(name, plain[0])
        if value not in plain:
            raise DataError(f"{folder}: {name} is {value!r}; only {plain[0]!r} is read")
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in read_tensors(folder / WEIGHTS).items():
        found = re.fullmatch(
            r"(.*)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
            r"lora_magnitude_vector)(\.weight)?",
            key.removeprefix(PREFIX),
        )
        if not found:
            raise DataError(f"{folder / WEIGHTS} has {key}, which isn't LoRA's")
        groups.setdefault(found[1], {})[found[2]] = array
    return {name: _peft_module(name, g, config, folder) for name, g in groups.items()}


def _peft_module(
    name: str, group: dict[str, np.ndarray], config: dict[str, Any], folder: Path
) -> Module:
    embedding = "lora_embedding_A" in group
    pair = (
        ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    )
    if missing := [part for part in pair if part not in group]:
        raise DataError(f"{folder / WEIGHTS} has {name} without {missing[0]}")
    down, up = (group[part] for part in pair)
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise DataError(
            f"{folder / WEIGHTS}: {name} has ranks {rank} and {up.shape[1]}; "
            "they must be equal"
        )
    alpha = _pattern_value(
        config.get("alpha_pattern"), name, config.get("lora_alpha", 8)
    )
    stated = _pattern_value(config.get("rank_pattern"), name, config.get("r", rank))
    if stated != rank:
        raise DataError(
            f"{folder}: {name} has rank {rank}, its config says {stated}; "
            "the files don't belong together"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    magnitude = group.get("lora_magnitude_vector")
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    return Module(down, up.reshape(up.shape[:2]), None, scale, magnitude)


def _pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of PEFT's first pattern that ends a module's name."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", name):
            return value
    return default


def read_lycoris(path: Path) -> dict[str, Module]:
    """Return the modules of a LyCORIS LoCon file, Tucker form (`lora_mid`) included.

    Raises DataError for LyCORIS' other algorithms, naming them.
    """
    groups: dict[str, dict[str, np.ndarray]] = {}
    for key, array in read_tensors(path).items():
        found = re.fullmatch(
            r"(.*)\.(lora_up|lora_down|lora_mid)\.weight|(.*)\.alpha", key
        )
        if not found:
            rest = key.rpartition(".")[2] if ".lora_" not in key else key
            names = [n for mark, n in _OTHER_LYCORIS.items() if mark in key]
            what = names[0] if names else f"an unknown part {rest!r}"
            raise DataError(
                f"{path} has {key}: {what}; LoCon is read (lora_up, lora_mid, "
                "lora_down, alpha)"
            )
        part = found[2] or "alpha"
        groups.setdefault(found[1] or found[3], {})[part] = array
    modules = {}
    for name, group in groups.items():
        if missing := [p for p in ("lora_down", "lora_up") if p not in group]:
            raise DataError(f"{path} has {name} without {missing[0]}")
        down, up = group["lora_down"], group["lora_up"]
        mid = group.get("lora_mid")
        if mid is not None:
            down = down.reshape(down.shape[:2])
        rank = down.shape[0]
        alpha = float(group["alpha"].reshape(())) if "alpha" in group else rank
        modules[name] = Module(down, up.reshape(up.shape[:2]), mid, alpha / rank, None)
    return modules


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
    leaves = named_params(params)
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
        if any(i >= n for i, n in zip(full, batch, strict=True)):
            raise DataError(f"{plan.name} has {batch} of that module, not {list(full)}")
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
