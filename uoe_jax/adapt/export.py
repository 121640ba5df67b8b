"""An adapter that was trained here as PEFT's: its names, orientation and scales."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Literal

import numpy as np
from flax import nnx
from safetensors.numpy import save

from uoe_jax.adapt.adapters import Adapters
from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.files import load_adapters, part_suffix, to_file
from uoe_jax.adapt.plan import LeafPlan
from uoe_jax.adapt.store import read_cut, read_trained
from uoe_jax.config import LayerWidths
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.files import format_json, local_path, write_atomically
from uoe_jax.interop.adapter_folder import CONFIG, PREFIX, WEIGHTS, read_config
from uoe_jax.interop.families import FAMILIES
from uoe_jax.interop.modules import Place, module_places
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import BEST
from uoe_jax.runs.load import load_run
from uoe_jax.runs.result import read_result
from uoe_jax.runs.stored import run_folder

_TASKS = {"decoder": "CAUSAL_LM", "encoder": None, "vision": None}


def export_adapter(
    folder: Path, out: Path, which: Literal["last", "best"] = "last"
) -> dict[str, Any]:
    """Write an adapter's folder as PEFT reads it, for the model it was trained on.

    `which` checkpoint of its training: the factors in its file are the last one's. The
    base must have been imported: its architecture gives the names. Raises
    ConfigError for Tucker's factors, which PEFT hasn't, for weights that lie in a
    tensor with others, for the best of an adapter that keeps no checkpoints, and if
    `out` holds anything.
    """
    folder, out = run_folder(folder, "the run"), local_path(out, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} isn't empty; choose another folder")
    base = _find_base(folder)
    run = load_run(base)
    _, params, _ = nnx.split(run.model, nnx.Param, ...)
    adapters, config = load_adapters(folder, params)
    if which == "best":
        if not Checkpoints(folder / BEST).steps():
            raise ConfigError(
                f"{folder} keeps no best checkpoint; leave --checkpoint out to write "
                "the factors in its file"
            )
        adapters = read_trained(folder, adapters, which)
    if config.method != "lora":
        raise ConfigError(
            f"{folder} has the factors of {config.method}; PEFT reads LoRA: merge it "
            "with uoe adapt --merge and export the merged run"
        )
    about = read_result(base)
    architecture = about.get("architecture")
    if architecture not in FAMILIES:
        raise ConfigError(
            f"{base} wasn't imported, so its weights have no names of another library"
        )
    if run.config.model.widths != LayerWidths():
        raise ConfigError(
            f"the layers of {base} are narrower than its model (model.widths), and an "
            "adapter of another library is of whole layers; merge it into the weights "
            "with uoe adapt --merge and export the merged run"
        )
    places = module_places(run.config.model, architecture)
    names = {place: module for module, place in places.items()}
    tensors, modules = _tensors(adapters, names, architecture)
    described = _describe(adapters, config, modules)
    described["base_model_name_or_path"] = str(about.get("source", ""))
    described["task_type"] = _TASKS[run.config.model.kind]
    described["fan_in_fan_out"] = FAMILIES[architecture].model_type == "gpt2"
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / CONFIG, format_json(described, indent=2) + "\n")
    write_atomically(out / WEIGHTS, save(tensors, {"format": "pt"}))
    return {
        "did": "export an adapter",
        "adapter": str(folder),
        "architecture": architecture,
        "modules": sum(map(len, modules.values())),
        "parameters": sum(array.size for array in tensors.values()),
    }


def _find_base(folder: Path) -> Path:
    """Return the run that an adapter is of; raise ConfigError for one that was cut."""
    base = Path(str(read_config(folder).get("base_model_name_or_path")))
    if not (base / "config.json").is_file():
        raise DataError(
            f"{folder} is of the run {base}, which isn't there; put it back"
        )
    if (cut := read_cut(folder)) is not None:
        raise ConfigError(
            f"{folder} is of {base} opened at cut {cut:g}, and an adapter of another "
            "library is of whole layers; merge it into the weights with uoe adapt "
            f"{base} --cut {cut:g} --load {folder} --steps 0 --merge and export the "
            "merged run"
        )
    return base


def _tensors(
    adapters: Adapters, names: dict[Place, str], architecture: str
) -> tuple[dict[str, np.ndarray], dict[str, list[str]]]:
    """Return PEFT's tensors by key, and the modules of each of our weights."""
    tensors: dict[str, np.ndarray] = {}
    modules: dict[str, list[str]] = {}
    for plan in adapters.plans:
        for part, word in plan.labels:
            array = np.asarray(adapters.weights[plan.name][part])
            batch = [a for a in word if a in plan.axes.batch]
            for index in itertools.product(*(range(plan.sizes[a]) for a in batch)):
                module = _module(plan, index, names, architecture)
                if module not in modules.setdefault(plan.name, []):
                    modules[plan.name].append(module)
                key = f"{PREFIX}{module}.{part_suffix(plan, part)}"
                tensors[key] = np.ascontiguousarray(to_file(plan, part, array[index]))
    return tensors, modules


def _module(
    plan: LeafPlan, index: tuple[int, ...], names: dict[Place, str], architecture: str
) -> str:
    """Return the module that a slice of a weight's factors is about."""
    for end in range(len(index), -1, -1):
        # A dense layer is a union of one expert, which theirs don't count.
        if not any(index[end:]) and Place(plan.name, index[:end]) in names:
            return names[Place(plan.name, index[:end])]
    raise ConfigError(
        f"{plan.name} is no module of its own in {architecture}; adapt other weights "
        "(--targets), or merge with uoe adapt --merge and export the merged run"
    )


def _describe(
    adapters: Adapters, config: AdapterConfig, modules: dict[str, list[str]]
) -> dict[str, Any]:
    """Return the fields of PEFT's config. It divides alpha by a module's own rank."""
    ranks = {plan.name: plan.ranks[0] for plan in adapters.plans}
    root = 0.5 if config.use_rslora else 1.0
    alphas = {
        name: float(f"{float(adapters.scales[name]) * rank**root:.7g}")
        for name, rank in ranks.items()
    }
    first = next(iter(ranks))
    apart = lambda values: {
        re.escape(module): value
        for name, value in values.items()
        if value != values[first]
        for module in modules[name]
    }
    return {
        "peft_type": "LORA",
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "lora_dropout": config.dropout,
        "target_modules": sorted(m for group in modules.values() for m in group),
        "rank_pattern": apart(ranks),
        "alpha_pattern": apart(alphas),
        "bias": "none",
        "use_dora": config.use_dora,
        "use_rslora": config.use_rslora,
        "inference_mode": True,
    }
