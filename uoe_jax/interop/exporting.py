"""A run written as another library's model: config.json, safetensors, tokenizer."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.data.chat import CHAT, KEPT_FOLDER, read_template
from uoe_jax.data.record import TOKENIZER, read_record, run_tokenizer
from uoe_jax.errors import ConfigError, DataError, shown
from uoe_jax.files import format_json, local_path, write_atomically
from uoe_jax.hardware.count import count_params
from uoe_jax.interop.families import FAMILIES
from uoe_jax.interop.folder import CONFIG, GENERATION, KEPT, read_object
from uoe_jax.interop.function import dense_form, differences
from uoe_jax.interop.names import Family, Source, by_tensor, find_sources
from uoe_jax.interop.padding import pad_layers
from uoe_jax.interop.safetensors import INDEX, WEIGHTS
from uoe_jax.kinds import ROUTERS
from uoe_jax.runs.load import read_weights
from uoe_jax.runs.result import read_result
from uoe_jax.runs.stored import run_folder
from uoe_jax.validation import read_config

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16", "float16")


def export_run(
    folder: Path,
    out: Path,
    *,
    which: Literal["last", "best"] = "last",
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write a run's checkpoint as a folder that transformers opens; say what it is.

    Unions whose experts are all on, with gates of 1, are written dense, which is the
    same function; layers narrower than the model with zeros up to its widths. Weights
    keep their dtype, or are rounded to `dtype`.

    Raises ConfigError for a union that isn't dense, for a model that no family has, for
    weights too large for `dtype`, and if `out` holds anything.
    """
    if dtype not in (None, *DTYPES):
        known = ", ".join(DTYPES)
        raise ConfigError(f"dtype is {shown(dtype)}; written are {known}")
    folder, out = run_folder(folder, "the run"), local_path(out, "out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} isn't empty; choose another folder")
    config = read_config(folder)
    saved = read_weights(folder, config, which=which)
    params, buffers = _part(saved.arrays, "params."), _part(saved.arrays, "buffers.")
    check_gates(config.model, params, buffers)
    whole, params = pad_layers(config.model, params, buffers)
    model = dense_form(whole)
    before = _kept_config(folder)
    family = choose_family(model, before, read_result(folder).get("architecture"))
    sources = find_sources(whole, family)
    unfinished = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        files = write_tensors(unfinished, sources, params, shard_bytes, dtype)
        raw = family_config(family, model, before)
        raw["dtype"] = dtype or raw["dtype"]
        write_atomically(unfinished / CONFIG, format_json(raw, indent=2) + "\n")
        _copy_others(folder, config, unfinished)
        if out.is_dir():
            out.rmdir()
        unfinished.rename(out)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    padded = whole != config.model
    own = {"own_parameters": sum(count_params(config.model).values())} if padded else {}
    return {
        "did": "export",
        "run": str(folder),
        "step": saved.step,
        "architecture": family.architecture,
        "parameters": sum(math.prod(s[0].shape) for s in by_tensor(sources).values()),
        **own,
        "dtype": dtype or model.param_dtype,
        "files": files,
    }


def _part(arrays: Mapping[str, np.ndarray], start: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(start): array
        for name, array in arrays.items()
        if name.startswith(start)
    }


def check_gates(
    model: ModelConfig,
    params: Mapping[str, np.ndarray],
    buffers: Mapping[str, np.ndarray],
) -> None:
    """Raise ConfigError for routing that a file of another library can't hold.

    A dense file has no routers: unions must use every expert, with gates of 1, which
    routers of zeros give. A mixture's router is there, but no bias of its balance.
    """
    for part, kinds in (("attention", model.attention), ("mlp", model.mlp)):
        if "union" not in kinds:
            continue
        union = model.union_for(part)  # pyrefly: ignore[bad-argument-type]
        fix = "uoe decompose RUN --merge drops the routing, if that is what you want"
        if union.top_k < union.num_experts:
            raise ConfigError(
                f"{part} uses {union.top_k} of {union.num_experts} experts a token and "
                f"a dense file would use all of them: another function; {fix}"
            )
        biases = [n for n in buffers if f".{part}.router." in n and buffers[n].any()]
        if ROUTERS[union.router].varies and (
            (biases and union.gate != "straight_through") or union.gate == "relu"
        ):
            why = f"{biases[0]} isn't zero" if biases else "gate relu is 0 at score 0"
            raise ConfigError(
                f"{part} has router {union.router!r}, whose gates are of scores over "
                f"thresholds, and {why}: they aren't 1, and a dense file has none; "
                f"{fix}"
            )
        routers = [n for n in params if f".{part}.router." in n and params[n].any()]
        if routers:
            raise ConfigError(
                f"{routers[0]} isn't zero, so the gates of {part} aren't 1, and a "
                f"dense file has none; {fix}"
            )
    biased = [n for n, a in buffers.items() if ".router." in n and a.any()]
    if biased and "moe" in model.mlp:
        raise ConfigError(
            f"{biased[0]} isn't zero: balance chooses experts with a bias that a "
            "Mixtral file can't hold; train with model.moe.bias_update_rate 0"
        )


def choose_family(
    model: ModelConfig, before: Mapping[str, Any] | None, architecture: Any
) -> Family:
    """Return the family that computes what a model does, the one it came from first.

    Raises ConfigError, with what differs from the nearest one, where none does.
    """
    families = sorted(
        FAMILIES.values(), key=lambda f: (f.architecture != architecture,)
    )
    found: list[tuple[list[str], Family]] = []
    for family in families:
        try:
            names = frozenset(s.tensor for s in find_sources(model, family))
            back = family.read(family_config(family, model, before), names)
            apart = differences(model, back)
        except (ConfigError, DataError) as error:
            apart = [str(error)] * 9
        if not apart:
            return family
        found.append((apart, family))
    apart, nearest = min(found, key=lambda item: len(item[0]))
    raise ConfigError(
        f"no architecture of theirs computes what this model does; the nearest is "
        f"{nearest.architecture}, but {'; '.join(dict.fromkeys(apart))}"
    )


def family_config(
    family: Family, model: ModelConfig, before: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Return the config.json of a model; other fields as they were when it came."""
    kept = dict(before or {})
    if kept.get("model_type", family.model_type) != family.model_type:
        kept = {}
    raw = family.write(model)
    if len(kept.get("id2label") or ()) == model.num_classes:
        raw.pop("id2label", None), raw.pop("label2id", None)
    kept.pop("torch_dtype", None)
    named = {"architectures": [family.architecture], "model_type": family.model_type}
    return {**kept, **raw, **named, "dtype": model.param_dtype}


def _kept_config(folder: Path) -> dict[str, Any] | None:
    file = folder / KEPT_FOLDER / CONFIG
    return read_object(file) if file.is_file() else None


def _copy_others(folder: Path, config: ExperimentConfig, out: Path) -> None:
    """Write the tokenizer, the small files that came with the model, and its chats.

    A run that was trained on messages gives the template that it was trained with, and
    what ends its turn as that which generation stops at.
    """
    for name in KEPT:
        file = folder / KEPT_FOLDER / name
        if name != CONFIG and file.is_file():
            shutil.copyfile(file, out / name)
    record = read_record(folder)
    if record is not None and record.tokenizer_text is not None:
        write_atomically(out / TOKENIZER, record.tokenizer_text)
    if (folder / CHAT).is_file() and (template := read_template(folder)):
        stop = template.write_for_others(out, run_tokenizer(folder, config))
        about = read_object(file) if (file := out / GENERATION).is_file() else {}
        about |= stop
        write_atomically(file, format_json(about, indent=2) + "\n")


def write_tensors(
    out: Path,
    sources: list[Source],
    params: Mapping[str, np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    dtype: str | None = None,
) -> list[str]:
    """Write weights under the names of `sources`; return the files' names.

    One file, or shards of at most `shard_bytes` with an index; one is in memory at a
    time. Raises ConfigError for numbers that `dtype` can't hold.
    """
    groups = by_tensor(sources)
    to = {n: a.dtype if dtype is None else jnp.dtype(dtype) for n, a in params.items()}
    shards = list(_shards(groups, to, shard_bytes))
    places, total = {}, 0
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [
            f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors"
            for n in range(len(shards))
        ]
    for name, tensors in zip(names, shards, strict=True):
        content = {
            tensor: rounded(
                make_tensor(groups[tensor], params), to[groups[tensor][0].name], tensor
            )
            for tensor in tensors
        }
        save_file(content, out / name, metadata={"format": "pt"})
        (out / name).chmod(0o644)  # the package leaves it to its owner alone
        places |= dict.fromkeys(tensors, name)
        total += sum(array.nbytes for array in content.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_atomically(out / INDEX, format_json(index, indent=2) + "\n")
    return names


def rounded(array: np.ndarray, dtype: np.dtype, tensor: str) -> np.ndarray:
    """Return a tensor in another dtype; ConfigError for finite numbers that become
    infinite there."""
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        found = array.astype(dtype)
    lost = np.isfinite(array) & ~np.isfinite(found)
    if lost.any():
        largest = float(np.abs(array[lost]).max())
        raise ConfigError(
            f"{tensor} holds {largest:.6g}, more than {dtype} can "
            f"({float(jnp.finfo(dtype).max):.6g}); export in bfloat16 or float32"
        )
    return found


def _shards(
    groups: Mapping[str, list[Source]], dtypes: Mapping[str, np.dtype], most: int
) -> Iterator[list[str]]:
    held, size = [], 0
    for tensor in sorted(groups):
        source = groups[tensor][0]
        bytes_ = math.prod(source.shape) * dtypes[source.name].itemsize
        if held and size + bytes_ > most:
            yield held
            held, size = [], 0
        held.append(tensor)
        size += bytes_
    yield held


def make_tensor(sources: list[Source], params: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return one tensor of theirs, put together of the weights of ours it holds."""
    array = np.empty(sources[0].shape, params[sources[0].name].dtype)
    for source in sources:
        weight = params[source.name][source.index]
        source.view.fill(array, weight, source.sizes)
    return array
