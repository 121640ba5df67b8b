"""The dense run that is made smaller, and the texts that its cuts are scored on."""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import lzma
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from experiments.e009_real_model.run import Study
from experiments.e009_real_model.study import TINY, Scale
from experiments.shared.case import change
from experiments.shared.part import Part
from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.data import make_dataset
from uoe_jax.data.record import with_run_tokenizer
from uoe_jax.errors import ConfigError
from uoe_jax.files import format_json, write_atomically
from uoe_jax.presets import get_preset
from uoe_jax.runs.batches import Batch, probe_batch
from uoe_jax.runs.checkpoint import Checkpoints
from uoe_jax.runs.folder import CHECKPOINTS
from uoe_jax.runs.load import load_run
from uoe_jax.train import train

HELD_OUT = 204_800  # tokens of each text
CALIBRATION = 65_536  # tokens of our model's training data: 21 for each neuron
_RESERVE = 60.0  # seconds that our training leaves for what comes after it
_TEXTS = ("wikipedia", "python")


class Subject(NamedTuple):
    """A dense run, held-out texts by name, and tokens to calibrate on."""

    folder: Path
    held: dict[str, Batch]
    calibration: int
    length: int  # of a row, tokens


class Unfinished(Exception):
    """The time is over before the model has all its steps."""


def planned(options: argparse.Namespace) -> dict[str, Any]:
    """Return what is known of a study's rows before anything is made."""
    if options.ours:
        return {"model": "ours", "calibration_tokens": _calibration(options.tiny)}
    scale = TINY if options.tiny else Scale()
    return {"model": options.model.name, "calibration_tokens": scale.calibration}


def imported(options: argparse.Namespace) -> Subject:
    """Import a model, and prepare the texts of experiment 009; once."""
    work = options.out / "work"
    given = {"out": work, "work": work, "tiny": options.tiny, "part": Part(1, 1)}
    study = Study(argparse.Namespace(**given, minutes=math.inf))
    study.begin(options.model, options.articles)
    scale = study.scale
    held = {name: probe_batch(d, scale.held_out) for name, d in study.data.items()}
    return Subject(study.work / "imported", held, scale.calibration, scale.length)


def trained(options: argparse.Namespace, seconds: float) -> Subject:
    """Train a model of ours on articles and Python source, or go on with it.

    Raises Unfinished where so many seconds aren't enough: the same call goes on.
    """
    texts, folder = options.out / "work" / "texts", options.out / "work" / "ours"
    write_texts(options.articles, options.python, texts)
    config, spent = our_config(texts, options.tiny), 0.0
    if Checkpoints(folder / CHECKPOINTS).steps():
        spent = load_run(folder).progress.elapsed
    limit = spent + max(seconds - _RESERVE, 0.1) if math.isfinite(seconds) else None
    summary = train(change(config, train={"max_seconds": limit}), folder)
    if summary["step"] < config.train.steps:
        raise Unfinished(f"{summary['step']} of {config.train.steps} steps are done")
    tokens = 512 if options.tiny else HELD_OUT
    held = {n: held_out(config, folder, texts / f"held_{n}", tokens) for n in _TEXTS}
    return Subject(folder, held, _calibration(options.tiny), config.seq_len)


def _calibration(tiny: bool) -> int:
    return 1024 if tiny else CALIBRATION


def our_config(texts: Path, tiny: bool) -> ExperimentConfig:
    """Return what our model is: 12 layers of 768, 97M parameters, 105M tokens.

    Half of the training is each text's. The rate is for so short a training.
    """
    data: dict[str, Any] = {
        "mix": tuple(f"{texts / name}=0.5" for name in _TEXTS),
        "test_fraction": 0.0,
        "cache_dir": str(texts / "prepared"),
    }
    if tiny:
        base, steps, length = get_preset("tiny"), 8, 128
    else:
        base, steps, length = get_preset("small"), 1600, 1024
        data["bpe_vocab_size"] = 16_384
    config = change(
        dataclasses.replace(base, name="ours"),
        model={"max_seq_len": length},
        data=data,
        optim={"learning_rate": 1e-3, "warmup_steps": steps // 10},
        train={
            "steps": steps,
            "save_every": steps // 4,
            "eval_every": steps // 2,
            "eval_batches": 4,
        },
    )
    return config if tiny else change(config, model={"vocab_size": 16_384})


def write_texts(articles: Path, python: Path, texts: Path) -> None:
    """Write both texts as JSON lines in two splits, and the held-out ones apart.

    Of every 20 articles 18 are trained on and one is held out; Python has its own
    splits. What is only scored is read without its training text.
    """
    if (texts / "held_python" / "valid.jsonl").is_file():
        return
    for path in (articles, python):
        if not path.exists():
            raise ConfigError(f"{path} isn't there; --ours takes --articles, --python")
    lines: dict[str, dict[str, list[str]]] = {
        n: {"train": [], "valid": []} for n in _TEXTS
    }
    for number, text in enumerate(_records(articles)):
        if (place := number % 20) < 19:
            lines["wikipedia"]["train" if place < 18 else "valid"].append(text)
    for split in lines["python"]:
        lines["python"][split] = list(_records(python / f"{split}.jsonl"))
    for name, splits in lines.items():
        for folder, most in ((name, None), (f"held_{name}", 1)):
            (texts / folder).mkdir(parents=True, exist_ok=True)
            for split, found in splits.items():
                kept = itertools.islice(found, most if split == "train" else None)
                content = "".join(format_json({"text": text}) + "\n" for text in kept)
                write_atomically(texts / folder / f"{split}.jsonl", content)


def _records(path: Path) -> Iterator[str]:
    opened = lzma.open if path.suffix == ".xz" else open
    with opened(path, "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def held_out(config: ExperimentConfig, run: Path, text: Path, tokens: int) -> Batch:
    """Return held-out rows of one text, in the tokens of a run's model."""
    data = DataConfig(**vars(config.data) | {"mix": None, "path": str(text)})
    data = with_run_tokenizer(config, data, run)
    own = dataclasses.replace(config, data=data)
    return probe_batch(make_dataset(own, "valid"), tokens)
