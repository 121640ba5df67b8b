"""Adapters of other libraries: PEFT's LoRA, LyCORIS' LoCon with and without Tucker.

A file gives one module after another, in torch's orientation [out, in, *kernel]. What
is read can be looked at by itself (`module_delta`), or placed on this library's weights
by a table of names (`place_modules`).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from uoe_jax.errors import DataError, shown
from uoe_jax.interop.adapter_folder import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    read_config,
    read_tensors,
)
from uoe_jax.interop.patterns import first_matches

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
    "use_bdlora": (None, False),
    "kasa_config": (None,),  # which truncates the base
    "monteclora_config": (None,),
    "arrow_config": (None,),
}
# Settings that say nothing about what the arrays mean, or that are read below.
_HARMLESS = frozenset(
    "peft_type peft_version task_type base_model_name_or_path revision auto_mapping "
    "inference_mode unsloth_fixed r lora_alpha lora_dropout use_rslora use_dora "
    "init_lora_weights rank_pattern alpha_pattern target_modules exclude_modules "
    "layers_to_transform layers_pattern fan_in_fan_out megatron_config megatron_core "
    "loftq_config eva_config corda_config lora_ga_config velora_config "
    "qalora_group_size runtime_config ensure_weight_tying uoe_jax".split()
)
_EMPTY = (None, False, "", [], {})
# Starts that leave the base as it is: the files alone say what was trained.
_PLAIN_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
# Starts after which PEFT trains a changed base, which lies in no file.
_RESIDUAL_INITS = {
    "pissa": "subtracts the leading part from the base (PiSSA)",
    "olora": "subtracts a QR factor from the base (OLoRA)",
    "corda": "subtracts a part from the base (CorDA)",
    "loftq": "quantises the base (LoftQ)",
    "lora_ga": "subtracts a part from the base (LoRA-GA)",
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
    Raises DataError for other tuners, for settings that aren't LoRA's plain form, for
    starts that changed the base, and for anything but safetensors.
    """
    config = read_config(folder)
    kind = config.get("peft_type")
    if str(kind).upper() != "LORA":
        raise DataError(f"{folder} is a {kind} adapter; of PEFT's, LORA is read")
    for name, plain in _PLAIN.items():
        value = config.get(name, plain[0])
        if not any(type(value) is type(p) and value == p for p in plain):
            raise DataError(
                f"{folder}: {name} is {shown(value)}; only {plain[0]!r} is read"
            )
    for name, value in config.items():
        if name not in _PLAIN and name not in _HARMLESS and value not in _EMPTY:
            raise DataError(
                f"{folder}: {name} is {shown(value)}, a setting that isn't known here "
                "and may change what the arrays mean; only plain LoRA is read"
            )
    _check_init(config.get("init_lora_weights", True), folder)
    for name in ("use_rslora", "use_dora"):  # the text "false" would count as true
        value = config.get(name)
        if not isinstance(value, bool | None):
            raise DataError(
                f"{folder}: {name} is {shown(value)}; it must be true or false"
            )
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
    if not groups:
        raise DataError(
            f"{folder / WEIGHTS} holds no arrays; there is nothing to adapt"
        )
    alphas = _pattern_values(config, "alpha_pattern", list(groups), folder)
    ranks = _pattern_values(config, "rank_pattern", list(groups), folder)
    return {
        name: _peft_module(
            name,
            group,
            config,
            folder,
            alpha=alphas.get(name, config.get("lora_alpha", 8)),
            stated=ranks.get(name, config.get("r")),
        )
        for name, group in groups.items()
    }


def _check_init(init: Any, folder: Path) -> None:
    """Raise DataError for a start after which PEFT trains another base than ours."""
    # PEFT compares some of them without case.
    plain = init.lower() if isinstance(init, str) else init
    if isinstance(plain, str | bool | None) and plain in _PLAIN_INITS:
        return
    kind = plain.partition("_niter_")[0] if isinstance(plain, str) else ""
    if kind in _RESIDUAL_INITS:
        raise DataError(
            f"{folder}: init_lora_weights is {init!r}, which {_RESIDUAL_INITS[kind]}: "
            "its files alone don't say what was trained; save it as plain LoRA with "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)"
        )
    known = ", ".join(str(value) for value in _PLAIN_INITS[:2] + _PLAIN_INITS[3:])
    raise DataError(f"{folder}: init_lora_weights is {init!r}; {known} are read")


def _peft_module(
    name: str,
    group: dict[str, np.ndarray],
    config: dict[str, Any],
    folder: Path,
    *,
    alpha: Any,
    stated: Any,
) -> Module:
    embedding = "lora_embedding_A" in group
    pair = (
        ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A", "lora_B")
    )
    if missing := [part for part in pair if part not in group]:
        raise DataError(f"{folder / WEIGHTS} has {name} without {missing[0]}")
    down, up = (group[part] for part in pair)
    _check_matrices(f"{folder / WEIGHTS}: {name}", *zip(pair, (down, up), strict=True))
    rank = down.shape[0]
    if up.shape[1] != rank:
        raise DataError(
            f"{folder / WEIGHTS}: {name} has ranks {rank} and {up.shape[1]}; "
            "they must be equal"
        )
    if stated not in (rank, None):
        raise DataError(
            f"{folder}: {name} has rank {rank}, its config says {stated!r}; "
            "the files don't belong together"
        )
    if (
        isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
        or not abs(alpha) <= float(np.finfo(np.float32).max)
    ):
        raise DataError(
            f"{folder}: alpha of {name} is {alpha!r}; it must be a number of float32"
        )
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    magnitude = group.get("lora_magnitude_vector")
    if (magnitude is not None) != bool(config.get("use_dora")):
        fault = "without a lora_magnitude_vector" if magnitude is None else "with one"
        raise DataError(
            f"{folder}: use_dora is {config.get('use_dora')!r} and {name} is {fault}; "
            "the files are incomplete or don't belong together: save the adapter again"
        )
    if magnitude is not None:
        magnitude = magnitude.reshape(-1)
    return Module(down, up.reshape(up.shape[:2]), None, scale, magnitude)


def _check_matrices(where: str, *parts: tuple[str, np.ndarray]) -> None:
    """Raise DataError for an array that can't be a factor; kernels lie at the end."""
    for part, array in parts:
        if array.ndim < 2 or not array.size:
            raise DataError(
                f"{where} has {part} of shape {list(array.shape)}; a factor has two "
                "axes or more, none empty"
            )


def _pattern_values(
    config: dict[str, Any], field: str, names: list[str], folder: Path
) -> dict[str, Any]:
    """Return the value of PEFT's first pattern that ends a module's name, by name."""
    patterns = config.get(field) or {}
    if not isinstance(patterns, dict):
        raise DataError(f"{folder / CONFIG}: {field} is {patterns!r}; give an object")
    try:
        found = first_matches(list(patterns), names)
    except ValueError as error:
        raise DataError(f"{folder / CONFIG}: {field} has {error}") from None
    return {name: patterns[pattern] for name, pattern in found.items()}


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
        modules[name] = _lycoris_module(f"{path}: {name}", group)
    return modules


def _lycoris_module(where: str, group: dict[str, np.ndarray]) -> Module:
    down, up, mid = (group.get(f"lora_{part}") for part in ("down", "up", "mid"))
    assert down is not None and up is not None
    _check_matrices(where, ("lora_down", down), ("lora_up", up))
    pointwise = [("lora_up", up)] + [("lora_down", down)] * (mid is not None)
    for part, array in pointwise:
        if array.size != math.prod(array.shape[:2]):
            raise DataError(
                f"{where} has {part} of shape {list(array.shape)}; only a kernel of "
                "size 1 is read there"
            )
    inner = (up.shape[1], down.shape[0])
    if mid is not None and mid.shape[:2] != inner or mid is None and len({*inner}) > 1:
        have = "" if mid is None else f", lora_mid {list(mid.shape)}"
        raise DataError(
            f"{where} has lora_up {list(up.shape)}{have} and lora_down "
            f"{list(down.shape)}; their ranks must meet"
        )
    rank = down.shape[0]
    alpha = group.get("alpha", np.array(rank))
    if alpha.size != 1:
        raise DataError(
            f"{where} has alpha of shape {list(alpha.shape)}; give a number"
        )
    up = up.reshape(up.shape[:2])
    down = down if mid is None else down.reshape(down.shape[:2])
    return Module(down, up, mid, float(alpha.reshape(())) / rank, None)
