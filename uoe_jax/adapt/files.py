"""Adapters on disk: a PEFT-style adapter_config.json beside adapter_model.safetensors.

Stacked layers and experts are taken apart, so that every key is one module's: LoRA has
PEFT's own keys and orientations ([r, in] and [out, r]), Tucker adds `tucker_core` and
`tucker_factor_*`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree
from safetensors.numpy import save

from uoe_jax.adapt.adapters import Adapters, Weights
from uoe_jax.adapt.apply import check_leaf
from uoe_jax.adapt.config import AdapterConfig, adapter_from_dict, rank_for
from uoe_jax.adapt.plan import (
    PACKAGE,
    LeafPlan,
    make_plans,
)
from uoe_jax.errors import DataError
from uoe_jax.files import format_json, write_atomically
from uoe_jax.interop.adapter_folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    read_config,
    read_tensors,
)
from uoe_jax.tree import named_leaves
from uoe_jax.weights import EXPERT, LAYER, WeightAxes

ANCHOR = "anchor_"
_SUFFIX = {
    "a": "lora_A.weight",
    "b": "lora_B.weight",
    "magnitude": "lora_magnitude_vector",
    "core": "tucker_core",
    "delta": "delta",
}


def save_adapters(
    folder: Path,
    adapters: Adapters,
    config: AdapterConfig,
    *,
    base: str = "",
    digest: str = "",
) -> None:
    """Write one adapter; `base` names the model it belongs to.

    `digest` is the `digest_params` of that model: loading on another one then warns.
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
                    value = to_file(plan, part, np.asarray(array)[index])
                    tensors[key] = np.ascontiguousarray(value)
    about = _describe(adapters, config, base)
    if digest:
        about["uoe_jax"]["base_digest"] = digest
    weights = save(tensors, metadata={"format": "pt"})
    about["uoe_jax"]["weights_blake2b"] = _digest(weights)
    about["uoe_jax"]["blake2b"] = _digest_own(about["uoe_jax"])
    described = format_json(about, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    # The arrays last: a folder that has them is whole.
    write_atomically(folder / CONFIG, described)
    write_atomically(folder / WEIGHTS, weights)


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _digest_own(own: Mapping[str, Any]) -> str:
    """Return the checksum of what rebuilds an adapter, its weights' included."""
    content = {key: value for key, value in own.items() if key != "blake2b"}
    return _digest(format_json(content, sort_keys=True).encode())


def _check_digests(folder: Path, own: Mapping[str, Any]) -> None:
    """Refuse files whose bytes have changed; adapters of older versions don't say."""
    if "blake2b" not in own:
        return
    if own["blake2b"] != _digest_own(own):
        raise DataError(
            f"{folder / CONFIG} has a damaged 'uoe_jax' part (its checksum is "
            "another); restore it"
        )
    if own["weights_blake2b"] != _digest((folder / WEIGHTS).read_bytes()):
        raise DataError(f"{folder / WEIGHTS} has changed bytes; restore it")


def _modules(plan: LeafPlan) -> list[str]:
    """Return the names of a weight's modules in a file."""
    keys = {
        key.removeprefix(PREFIX).rpartition("." + part_suffix(plan, part))[0]
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
                p.name: {
                    "shape": list(p.shape),
                    "ranks": list(p.ranks),
                    "dora": p.dora,
                    "dropout": p.dropout,
                    **dataclasses.asdict(p.axes),
                }
                for p in adapters.plans
            },
        },
    }


def digest_params(params: PyTree) -> str:
    """Return 16 hex digits that identify a model's parameters, names included."""
    state = hashlib.blake2b(digest_size=8)
    for name, leaf in sorted(named_leaves(params).items()):
        array = np.asarray(leaf)
        state.update(f"{name} {array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def load_adapters(folder: Path, params: PyTree) -> tuple[Adapters, AdapterConfig]:
    """Return an adapter that `save_adapters` wrote, for the model of `params`.

    Warns if it was trained on other parameters of the same shapes.
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
        plans = tuple(_read_plan(n, o, config) for n, o in own["weights"].items())
        scales = {plan.name: _read_scale(own["scales"][plan.name]) for plan in plans}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"{folder / CONFIG} has a damaged 'uoe_jax' part ({error}); restore it"
        ) from None
    leaves = named_leaves(params)
    for plan in plans:
        check_leaf(plan, leaves)
    _warn_of_base(folder, own.get("base_digest"), params)
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
    _check_digests(folder, own)
    adapters = Adapters(weights=weights, scales=scales, anchor=anchor, plans=plans)
    return adapters, config


def _read_plan(name: str, raw: Mapping[str, Any], config: AdapterConfig) -> LeafPlan:
    """Return the plan of one saved weight, with the ranks that its arrays have.

    A foreign adapter's ranks may exceed what the weight could use, and some of its
    weights may have magnitudes where others have none.
    """
    apart = ("shape", "ranks", "dora", "dropout")
    axes = WeightAxes(**{k: v for k, v in raw.items() if k not in apart})
    dora = bool(raw.get("dora", config.use_dora and axes.ins))
    one = dataclasses.replace(
        config,
        targets=(name,),
        rank_pattern={name: max(rank_for(config, name), 1)},
        use_dora=dora,
        dropout=0.0 if dora else config.dropout,
    )
    plan = make_plans({name: raw["shape"]}, one, {name: axes})[0]
    ranks = tuple(raw.get("ranks", plan.ranks))
    if len(ranks) != len(plan.ranks) or not all(
        isinstance(rank, int) and rank > 0 for rank in ranks
    ):
        raise ValueError(f"ranks of {name} are {list(ranks)}")
    dropout = float(raw.get("dropout", plan.dropout))
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout of {name} is {dropout}")
    return dataclasses.replace(plan, ranks=ranks, dropout=dropout)


def _read_scale(value: Any) -> Array:
    if not math.isfinite(value):
        raise ValueError(f"a scale is {value}")
    return jnp.float32(value)


def _warn_of_base(folder: Path, digest: str | None, params: PyTree) -> None:
    """Warn if an adapter was trained on other parameters of the same shapes."""
    if digest and digest != (have := digest_params(params)):
        warnings.warn(
            f"{folder} was trained on other weights than these (digest {digest}, here "
            f"{have}); use the run it was trained on, or train it on",
            skip_file_prefixes=(PACKAGE,),
        )


def part_suffix(plan: LeafPlan, part: str, mark: str = "") -> str:
    """Return what a part is called behind its module's name."""
    name = _SUFFIX.get(part, f"tucker_{part}")
    if plan.axes.ins in ("v", "t") and part in ("a", "b"):
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
        yield f"{PREFIX}{name}.{part_suffix(plan, part, mark)}", index


def _split_word(plan: LeafPlan, part: str) -> str:
    return "".join(a for a in dict(plan.labels)[part] if a not in plan.axes.batch)


def to_file(plan: LeafPlan, part: str, array: np.ndarray) -> np.ndarray:
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
    """Return what `to_file` was given."""
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
