"""What is compared: each model, how it is made of the imported one and trains on."""

from __future__ import annotations

import dataclasses
import json
import lzma
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.e009_real_model.prune import Prune
from experiments.shared.case import change
from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig
from uoe_jax.data.split import hash_fraction
from uoe_jax.data.text import FileSource, stdlib_files
from uoe_jax.decompose.plan import Cut
from uoe_jax.files import format_json, write_atomically

MARKS = 4  # evaluations while training on, the last at its end
HELD_OUT = 0.08  # of Python's files, by the hash of their content


@dataclass(frozen=True, kw_only=True)
class Scale:
    """How much of everything: tokens are those of one evaluation or of all training."""

    experts: int = 16
    tokens: int = 20_000_000
    rows: int = 32
    length: int = 1024
    held_out: int = 200_000  # of each text
    learning_rate: float = 2e-4
    calibration: int = 16_384
    new_tokens: int = 128  # of a decoded row
    decode_rows: tuple[int, ...] = (1, 64)
    compute_dtype: str = "bfloat16"

    @property
    def steps(self) -> int:
        """Steps of training on: a whole number between two marks."""
        each = max(round(self.tokens / (self.rows * self.length) / MARKS), 1)
        return each * MARKS


TINY = Scale(
    experts=4,
    tokens=4 * 4 * 64,
    rows=4,
    length=64,
    held_out=512,
    calibration=512,
    new_tokens=8,
    decode_rows=(1, 2),
    compute_dtype="float32",
)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One model: how it is made (None: as imported), and who teaches it."""

    name: str
    made: Cut | Prune | None = None
    plain: Cut | Prune | None = None  # as `made`, without anything fitted
    taught: bool = False  # by the imported model
    trains: bool = True  # False: only what it loses at once
    warmup: float = 0.0  # share of the steps in which experts are switched off


def entries(model: ModelConfig, scale: Scale) -> tuple[Entry, ...]:
    """Return all models, the most telling first: three quarters on, then half."""
    families = [
        (*union(model, scale, share, heads), pruned(model, scale, share, heads))
        for heads in (False, True)
        for share in (0.75, 0.5)
    ]
    half = families[1][0]
    slow = dataclasses.replace(half, name=f"{half.name}, warm-up", warmup=0.25)
    slow = dataclasses.replace(slow, plain=None)
    return (Entry(name="dense"), *(e for family in families for e in family), slow)


def union(
    model: ModelConfig, scale: Scale, share: float, heads: bool
) -> tuple[Entry, Entry]:
    """Return a union with a share of its experts on, without and with a teacher."""
    where: dict[str, Any] = {"parts": ("mlp",)}
    if heads:
        where = {"attention_experts": model.num_kv_heads}
    experts = scale.experts
    on = int(experts * share)
    cut = {"num_experts": experts, "top_k": on, "calibrate": scale.calibration}
    plain = Cut(**cut, grouping="coactivation", **where)
    made = dataclasses.replace(plain, shared=experts // 4, refit=True)
    name = f"union {on} of {experts}" + (", heads too" if heads else "")
    alone = Entry(name=name, made=made, plain=plain)
    taught = dataclasses.replace(alone, name=f"{name}, taught", plain=None, taught=True)
    return alone, taught


def pruned(model: ModelConfig, scale: Scale, share: float, heads: bool) -> Entry:
    """Return the smaller dense model of the same FLOPs, routers left out."""
    kept = max(round(model.num_kv_heads * share), 1) if heads else None
    width = int(model.d_ff * share)
    made = Prune(d_ff=width, num_kv_heads=kept, calibrate=scale.calibration)
    name = f"pruned to {share:.0%}" + (", heads too" if heads else "")
    return Entry(name=name, made=made, plain=dataclasses.replace(made, refit=False))


def write_texts(articles: Path, folder: Path, most: int | None = None) -> None:
    """Write the texts as JSON lines: a mix to train on, and two held out.

    Wikipedia is split by article (of every 20, one is held out and one left alone),
    Python's standard library by file, the same content together.
    """
    wikipedia: dict[str, list[str]] = {"train": [], "valid": []}
    opened = lzma.open if articles.suffix == ".xz" else open
    with opened(articles, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file):
            if most is not None and number >= most:
                break
            place = number % 20
            if place < 19:
                split = "train" if place < 18 else "valid"
                wikipedia[split].append(json.loads(line)["text"])
    python: dict[str, list[str]] = {"train": [], "valid": []}
    source = FileSource("stdlib", stdlib_files()[:most], DataConfig())
    for document in source.documents():
        content = bytes(document.data)
        held_out = hash_fraction(content) < HELD_OUT  # some files are the same
        text = content.decode("utf-8", "replace")
        python["valid" if held_out else "train"].append(text)
    mixed = {split: wikipedia[split] + python[split] for split in wikipedia}
    for name, splits in (("mix", mixed), ("wikipedia", wikipedia), ("python", python)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for split, texts in splits.items():
            if name != "mix" and split == "train":
                texts = texts[:1]  # only evaluated: the reader wants a training file
            lines = [format_json({"text": text}) for text in texts]
            write_atomically(folder / name / f"{split}.jsonl", "\n".join(lines) + "\n")


def base_config(
    imported: ExperimentConfig, texts: Path, scale: Scale
) -> ExperimentConfig:
    """Return how every model of the study trains on."""
    steps = scale.steps
    return change(
        imported,
        model={"compute_dtype": scale.compute_dtype},
        data={
            "path": str(texts / "mix"),
            "test_fraction": 0.0,
            "batch_size": scale.rows,
            "seq_len": scale.length,
            "cache_dir": str(texts / "prepared"),
        },
        optim={
            "learning_rate": scale.learning_rate,
            "warmup_steps": max(steps // 20, 1),
            "weight_decay": 0.01,
        },
        train={
            "steps": steps,
            "save_every": steps // MARKS,
            "keep_checkpoints": MARKS + 1,
            "eval_every": steps,
            "eval_batches": 1,
            "log_every": max(steps // 20, 1),
            "loss_chunk": 8192,
        },
    )


def held_out(config: ExperimentConfig, texts: Path, name: str) -> ExperimentConfig:
    """Return the config that reads a held-out text in a model's rows."""
    return change(config, data={"path": str(texts / name)})


def training_config(
    entry: Entry, written: ExperimentConfig, teacher: Path
) -> ExperimentConfig:
    """Return how an entry's run trains on."""
    changes: dict[str, Any] = {}
    if entry.taught:
        changes |= {"distill_from": str(teacher), "distill_weight": 0.5}
    if entry.warmup:
        changes["top_k_warmup_steps"] = int(entry.warmup * written.train.steps)
    return change(written, train=changes)
