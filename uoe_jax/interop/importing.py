"""A model of another library written as a run that every verb opens."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from uoe_jax.config import (
    DataConfig,
    DType,
    ExperimentConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from uoe_jax.data.chat import KEPT_FOLDER
from uoe_jax.data.record import record_of_tokenizer
from uoe_jax.files import local_path
from uoe_jax.interop.folder import Foreign, open_foreign
from uoe_jax.interop.read import read_params
from uoe_jax.interop.tokenizer import TOKENIZER, usable
from uoe_jax.runs.stored import run_folder
from uoe_jax.runs.write import Origin, check_free, write_run

_USUAL_LENGTH = 1024  # tokens of a row of data, where a model takes more


def import_run(
    path: Path, out: Path, *, dtype: DType | None = None, source: str | None = None
) -> dict[str, Any]:
    """Write the model of a folder or GGUF file as a run into `out`; return what it is.

    `source` is the name it goes by in the run's files. Raises DataError for what can't
    be read, ConfigError if `out` holds anything.
    """
    path, out = local_path(path, "path"), run_folder(out, "out", writes=True)
    check_free(out)
    found = open_foreign(path, dtype)
    params = read_params(found.files, found.sources, found.match, found.model)
    name = source or found.source
    text, report = found.tokenizer, describe(found, name)
    if text is None:
        report["tokenizer"] = None
    elif problem := usable(text, TOKENIZER, found.model.vocab_size):
        text, report["tokenizer"] = None, problem
    else:
        report["tokenizer"] = TOKENIZER
    config = run_config(found.model, run_name(name), out.absolute() / TOKENIZER)
    origin = Origin(
        made_by="import",
        source=name,
        data=None if text is None else record_of_tokenizer(text),
        report=report,
        texts={f"{KEPT_FOLDER}/{file}": kept for file, kept in found.kept.items()},
    )
    write_run(out, config, params, origin)
    return report


def describe(found: Foreign, source: str) -> dict[str, Any]:
    """Return what is said of an import: what it is, its size, what was ignored."""
    model = found.model
    sizes = [math.prod(s.shape) for s in {s.tensor: s for s in found.sources}.values()]
    return {
        "did": "import",
        "source": source,
        "architecture": found.family.architecture,
        "parameters": sum(sizes),
        "layers": model.num_layers,
        "tied": model.kind == "decoder" and model.tie_embeddings,
        "dtype": model.param_dtype,
        "ignored": list(found.match.ignored),
    }


def run_name(text: str) -> str:
    """Return a name that a run's folder can have, from that of a model."""
    last = re.split(r"[/\\:]", text.rstrip("/\\"))[-1].removesuffix(".gguf")
    return re.sub(r"[^\w.-]+", "-", last).strip(".-")[:80] or "imported"


def run_config(model: ModelConfig, name: str, tokenizer: Path) -> ExperimentConfig:
    """Return an experiment around an imported model: to evaluate it, or train it on."""
    length = min(model.max_seq_len, _USUAL_LENGTH)
    data = DataConfig(batch_size=8)
    if model.kind != "vision":
        data = DataConfig(tokenizer=str(tokenizer), batch_size=8, seq_len=length)
    return ExperimentConfig(
        name=name,
        model=model,
        data=data,
        optim=OptimConfig(learning_rate=1e-4),
        train=TrainConfig(eval_batches=8, loss_chunk=1024),
    )
