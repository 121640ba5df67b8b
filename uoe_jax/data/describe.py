"""What a config's data holds, for people."""

from __future__ import annotations

from typing import Any

from uoe_jax.config import ExperimentConfig
from uoe_jax.data.batches import ImageDataset, open_dataset
from uoe_jax.data.prepare import prepare
from uoe_jax.data.split import SPLITS
from uoe_jax.errors import DataError
from uoe_jax.mixture import BLOCK, block_counts, read_mix

_SHADES = " .:-=+*#%@"
_SAMPLE_CHARACTERS = 400


def describe(config: ExperimentConfig) -> dict[str, Any]:
    """Return what an experiment's data holds, after checking every hash.

    Keys: source, kind, folder, manifest (hash), files, tokenizer, vocab_size, classes,
    bad_utf8, bad_records, splits {name: documents, bytes, tokens, examples, batches,
    bytes_per_token, lost_share, scored where not all is trained on}, mix (of each
    source: its weight, its share of the rows, its tokens; None without a mixture),
    sample (the first training example as text), sample_scored (what of it is trained
    on; None: all).
    """
    prepared = prepare(config, thorough=True)
    manifest = prepared.manifest
    tokenizer = manifest["tokenizer"] or {}
    train = open_dataset(config, "train", prepared)
    batch = train.batch(0)
    return {
        "source": manifest["source"],
        "kind": prepared.kind,
        "folder": str(prepared.folder),
        "manifest": manifest["hash"],
        "files": len(manifest["sources"]),
        "tokenizer": tokenizer.get("name"),
        "vocab_size": tokenizer.get("vocab_size"),
        "classes": manifest["classes"],
        "bad_utf8": manifest.get("bad_utf8"),
        "bad_records": manifest.get("bad_records", 0),
        "mix": _describe_mix(config, manifest),
        "splits": {split: _describe_split(config, split, prepared) for split in SPLITS},
        "sample": _draw_sample(batch, train),
        "sample_scored": _draw_scored(batch, train),
    }


def _describe_mix(
    config: ExperimentConfig, manifest: dict[str, Any]
) -> list[dict[str, Any]] | None:
    if not config.data.mix:
        return None
    shares = read_mix(config.data.mix)
    rows = block_counts([share.weight for share in shares])
    found = []
    for number, (share, count) in enumerate(zip(shares, rows, strict=True)):
        tokens = {s: manifest["splits"][s]["members"][number] for s in SPLITS}
        about = {"source": share.path, "weight": share.weight}
        found.append({**about, "rows": count / BLOCK, "tokens": tokens})
    return found


def _describe_split(config: ExperimentConfig, split: str, prepared: Any) -> dict:
    counts = prepared.manifest["splits"][split]
    result = {key: counts.get(key) for key in ("documents", "bytes", "tokens")}
    if "scored" in counts:
        result["scored"] = counts["scored"]
    try:
        dataset = open_dataset(config, split, prepared)
    except DataError as error:
        return {**result, "examples": 0, "batches": 0, "problem": str(error)}
    return {
        **result,
        "examples": dataset.num_examples,
        "batches": dataset.num_batches,
        "bytes_per_token": dataset.bytes_per_token,
        "lost_share": dataset.lost_share,
    }


def _draw_scored(batch: dict[str, Any], dataset: Any) -> str | None:
    """Return the text of the first example's targets that count; None if all do."""
    if "mask" not in batch or dataset.info["splits"]["train"].get("scored") is None:
        return None
    row = batch["targets"][0][batch["mask"][0] > 0]
    return dataset.decode(row)[:_SAMPLE_CHARACTERS]


def _draw_sample(batch: dict[str, Any], dataset: Any) -> str:
    """Return the first example as text, an image as shades of characters."""
    if not isinstance(dataset, ImageDataset):
        row = batch["tokens"][0][batch["segments"][0] > 0]
        return dataset.decode(row)[:_SAMPLE_CHARACTERS]
    image = batch["images"][0].mean(axis=-1)
    low, high = image.min(), image.max()
    levels = (image - low) / max(high - low, 1e-6) * (len(_SHADES) - 1)
    lines = ["".join(_SHADES[int(v)] * 2 for v in row) for row in levels]
    return "\n".join([*lines, f"label {batch['labels'][0]}"])
