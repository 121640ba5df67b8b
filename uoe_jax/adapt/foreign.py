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

from uoe_jax.adapt.files import CONFIG, PREFIX, WEIGHTS, read_config, read_tensors
from uoe_jax.errors import DataError

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
    if not groups:
        raise DataError(
            f"{folder / WEIGHTS} holds no arrays; there is nothing to adapt"
        )
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
    _check_matrices(f"{folder / WEIGHTS}: {name}", *zip(pair, (down, up), strict=True))
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
    if not isinstance(alpha, int | float):
        raise DataError(f"{folder}: alpha of {name} is {alpha!r}; it must be a number")
    scale = alpha / (rank**0.5 if config.get("use_rslora") else rank)
    magnitude = group.get("lora_magnitude_vector")
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


def _pattern_value(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """Return the value of PEFT's first pattern that ends a module's name."""
    for pattern, value in (patterns or {}).items():
        try:
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                return value
        except re.error as error:
            raise DataError(f"pattern {pattern!r} of {CONFIG}: {error}") from None
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
