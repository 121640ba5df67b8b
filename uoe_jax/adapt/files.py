"""Adapters on disk: a PEFT-style adapter_config.json beside adapter_model.safetensors.

Stacked layers and experts are taken apart, so that every key is one module's: LoRA has
PEFT's own keys and orientations ([r, in] and [out, r]), Tucker adds `tucker_core` and
`tucker_factor_*`.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save

from uoe_jax.adapt.adapters import Adapters, Weights, named_params
from uoe_jax.adapt.apply import check_leaf
from uoe_jax.adapt.config import AdapterConfig, adapter_from_dict
from uoe_jax.adapt.plan import EXPERT, LAYER, LeafPlan, WeightAxes, make_plans
from uoe_jax.errors import DataError
from uoe_jax.files import write_atomically

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
ANCHOR = "anchor_"
_SUFFIX = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "core": "tucker_core",
    "delta": "delta",
}


def save_adapters(
    folder: Path, adapters: Adapters, config: AdapterConfig, *, base: str = ""
) -> None:
    """Write one adapter; `base` names the model it belongs to.

    Raises DataError for a bank: save its adapters one by one.
    """
    if any(plan.bank for plan in adapters.plans):
        raise DataError("a bank of adapters has no file form; save each of them")
    tensors: dict[str, np.ndarray] = {}
    for plan in adapters.plans:
        trees = {"": adapters.weights, ANCHOR: adapters.anchor}
        for mark, tree in trees.items():
            for part, array in jax.device_get(tree.get(plan.name, {})).items():
                for key, index in _keys(plan, part, mark):
                    value = _to_file(plan, part, np.asarray(array)[index])
                    tensors[key] = np.ascontiguousarray(value)
    described = json.dumps(_describe(adapters, config, base), indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    # The arrays last: a folder that has them is whole.
    write_atomically(folder / CONFIG, described)
    write_atomically(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))


def _modules(plan: LeafPlan) -> list[str]:
    """Return the names of a weight's modules in a file."""
    keys = {
        key.removeprefix(PREFIX).rpartition("." + _suffix(plan, part))[0]
        for part, _ in plan.labels
        for key, _ in _keys(plan, part)
    }
    return sorted(keys)


def _describe(adapters: Adapters, config: AdapterConfig, base: str) -> dict[str, Any]:
    """Return the fields of PEFT's config, and what rebuilds the adapter here.

    PEFT divides alpha by a module's own rank, so its patterns name every module whose
    rank was cut or set apart.
    """
    scales = {p.name: float(adapters.scales[p.name]) for p in adapters.plans}
    ranks = {p.name: p.ranks[0] if p.ranks else p.rank for p in adapters.plans}
    root = 0.5 if config.use_rslora else 1.0
    # Seven digits, all that a float32 scale has.
    alpha = {n: float(f"{scales[n] * r**root:.7g}") for n, r in ranks.items()}
    first = alpha[adapters.plans[0].name]
    named = {p.name: [re.escape(m) for m in _modules(p)] for p in adapters.plans}

    def pattern(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
        """Return what differs from the usual value, by module."""
        apart = {
            n: v for n, v in values.items() if v != usual and config.method == "lora"
        }
        return {module: v for n, v in apart.items() for module in named[n]}

    return {
        "peft_type": "LORA" if config.method == "lora" else "TUCKER",
        "base_model_name_or_path": base,
        "task_type": None,
        "r": config.rank,
        "lora_alpha": first,
        "lora_dropout": config.dropout,
        "target_modules": sorted(m for p in adapters.plans for m in _modules(p)),
        "rank_pattern": pattern(ranks, config.rank),
        "alpha_pattern": pattern(alpha, first),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "uoe_jax": {
            "config": dataclasses.asdict(config),
            "scales": scales,
            "weights": {
                p.name: {"shape": list(p.shape), **dataclasses.asdict(p.axes)}
                for p in adapters.plans
            },
        },
    }


def load_adapters(folder: Path, params: PyTree) -> tuple[Adapters, AdapterConfig]:
    """Return an adapter that `save_adapters` wrote, for the model of `params`.

    Raises DataError for files that are missing, foreign or damaged, ConfigError for an
    adapter of another model.
    """
    raw = read_config(folder)
    own = raw.get("uoe_jax")
    if not isinstance(own, dict):
        raise DataError(
            f"{folder / CONFIG} wasn't written here ({raw.get('peft_type')}); "
            "import_peft reads PEFT's LoRA"
        )
    try:
        config = adapter_from_dict(own["config"])
        axes = {
            name: WeightAxes(**{k: v for k, v in one.items() if k != "shape"})
            for name, one in own["weights"].items()
        }
        shapes = {name: one["shape"] for name, one in own["weights"].items()}
        scales = {name: jnp.float32(own["scales"][name]) for name in axes}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / CONFIG} has a damaged 'uoe_jax' part ({error}); restore it"
        ) from None
    exact = dataclasses.replace(
        config, targets=tuple(axes), rank_pattern=_patterns(config, axes)
    )
    plans = make_plans(shapes, exact, axes)
    leaves = named_params(params)
    for plan in plans:
        check_leaf(plan, leaves)
    tensors = read_tensors(folder / WEIGHTS)
    weights = {plan.name: _read_parts(plan, tensors, "", folder) for plan in plans}
    anchor: Weights = {}
    if config.init == "hosvd":
        anchor = {p.name: _read_parts(p, tensors, ANCHOR, folder) for p in plans}
    if tensors:
        raise DataError(
            f"{folder / WEIGHTS} has {len(tensors)} arrays too many, {min(tensors)} "
            f"first; it isn't the file of {folder / CONFIG}"
        )
    adapters = Adapters(weights=weights, scales=scales, anchor=anchor, plans=plans)
    return adapters, config


def _patterns(config: AdapterConfig, names: Mapping[str, Any]) -> dict[str, int]:
    """Return the rank patterns that match a saved weight; others have no use there."""
    return {
        pattern: rank
        for pattern, rank in config.rank_pattern.items()
        if fnmatch.filter(names, pattern)
    }


def read_config(folder: Path) -> dict[str, Any]:
    """Return adapter_config.json; DataError if there is none or it is malformed."""
    path = folder / CONFIG
    if not path.is_file():
        raise DataError(
            f"{folder} has no {CONFIG}; give a folder that holds an adapter"
        )
    try:
        raw = json.loads(path.read_text())
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); restore it") from None
    if not isinstance(raw, dict):
        raise DataError(f"{path} is {type(raw).__name__}; expected an object")
    return raw


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return a safetensors file's arrays by key.

    Raises DataError for a missing or damaged file, and for any other format: pickles
    run code when they are loaded, so they never are.
    """
    if path.suffix != ".safetensors":
        raise DataError(
            f"{path} is not a .safetensors file; pickled formats aren't read: convert "
            "it with the tool that wrote it"
        )
    if not path.is_file():
        pickled = [p.name for p in path.parent.glob("adapter_model.*") if p != path]
        hint = f" ({pickled[0]} is pickled: convert it)" if pickled else ""
        raise DataError(f"{path} doesn't exist{hint}")
    try:
        # The flax reader knows bfloat16; host arrays, so that nothing is compiled.
        return {k: np.asarray(v) for k, v in load_file(path).items()}
    except (SafetensorError, ValueError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} can't be read: {reason}") from None


def _suffix(plan: LeafPlan, part: str, mark: str = "") -> str:
    name = _SUFFIX.get(part, f"tucker_{part}")
    if plan.axes.ins == "v" and part in ("a", "b"):
        name = {"a": "lora_embedding_A", "b": "lora_embedding_B"}[part]
    return mark + name


def _keys(
    plan: LeafPlan, part: str, mark: str = ""
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the file key of each module's slice of a part, and its index."""
    word, sizes = dict(plan.labels)[part], plan.sizes
    batch = [a for a in word if a in plan.axes.batch]
    for index in itertools.product(*(range(sizes[a]) for a in batch)):
        at = dict(zip(batch, index, strict=True))
        name = plan.name
        if LAYER in at:
            head, _, tail = name.partition("blocks.")
            stack, _, rest = tail.partition(".")
            name = f"{head}blocks.{stack}.{at[LAYER]}.{rest}"
        name = name.removesuffix(".weight")
        if sizes.get(EXPERT, 1) > 1 and EXPERT in plan.axes.batch:
            name += f".experts.{at[EXPERT]}" if EXPERT in at else ".shared"
        yield f"{PREFIX}{name}.{_suffix(plan, part, mark)}", index


def _split_word(plan: LeafPlan, part: str) -> str:
    return "".join(a for a in dict(plan.labels)[part] if a not in plan.axes.batch)


def _to_file(plan: LeafPlan, part: str, array: np.ndarray) -> np.ndarray:
    """Return one module's part in the file's orientation."""
    sizes, axes = plan.sizes, plan.axes
    if part == "a":  # [kernel, ins, r] -> [r, in, *kernel]
        space = len(axes.kernel)
        kernel = array.shape[:space]
        array = array.reshape(*kernel, -1, array.shape[-1])
        return array.transpose(space + 1, space, *range(space))
    if part == "b":  # [r, outs] -> [out, r, 1...]
        matrix = array.reshape(array.shape[0], -1).T
        return matrix.reshape(*matrix.shape, *(1,) * len(axes.kernel))
    if part == "magnitude":
        return array.reshape(-1)
    if part.startswith("factor"):
        rank = sizes[dict(plan.labels)[part][-1]]
        return array.reshape(-1, rank)
    return array


def _from_file(plan: LeafPlan, part: str, array: np.ndarray) -> np.ndarray:
    """Return what `_to_file` was given."""
    word, sizes = _split_word(plan, part), plan.sizes
    shape = [sizes[a] for a in word]
    if part == "a":
        space = len(plan.axes.kernel)
        array = array.transpose(*range(2, 2 + space), 1, 0)
    elif part == "b":
        array = array.reshape(array.shape[:2]).T
    return array.reshape(shape)


def _read_parts(
    plan: LeafPlan, tensors: dict[str, np.ndarray], mark: str, folder: Path
) -> dict[str, Array]:
    """Take a weight's arrays out of `tensors`, put together again."""
    parts = {}
    for part, word in plan.labels:
        if mark and part == "magnitude":
            continue
        slices = []
        for key, _ in _keys(plan, part, mark):
            if key not in tensors:
                raise DataError(f"{folder / WEIGHTS} has no {key}; it is incomplete")
            array = tensors.pop(key)
            wanted = math.prod(plan.sizes[a] for a in _split_word(plan, part))
            if array.size != wanted:
                raise DataError(
                    f"{key} has shape {list(array.shape)}, {array.size} numbers; "
                    f"{plan.name} needs {wanted}"
                )
            slices.append(_from_file(plan, part, array))
        batch = [plan.sizes[a] for a in word if a in plan.axes.batch]
        stacked = np.stack(slices)
        parts[part] = jnp.asarray(stacked.reshape(*batch, *stacked.shape[1:]))
    return parts
