"""Run folders as training leaves them, and as it doesn't."""

import dataclasses
import json

from uoe_jax.config import to_json
from uoe_jax.presets import get_preset


def change(config, **fields):
    """Return a config with `part__field` replaced."""
    for name, value in fields.items():
        part, _, leaf = name.partition("__")
        inner = dataclasses.replace(getattr(config, part), **{leaf: value})
        config = dataclasses.replace(config, **{part: inner})
    return config


def make_run(folder, preset="tiny", *, loss=1.5, steps=300, **fields):
    """Write a run's folder and return its path."""
    folder.mkdir(parents=True)
    config = dataclasses.replace(change(get_preset(preset), **fields), name=folder.name)
    (folder / "config.json").write_text(to_json(config))
    lines = [
        {"kind": "train", "step": steps, "seconds": 9.0, "tokens": steps * 4096,
         "loss": loss},
        {"kind": "eval", "split": "valid", "step": steps, "seconds": 10.0,
         "loss": loss, "bits_per_byte": loss / 0.6931, "accuracy": 0.5},
        {"kind": "eval", "split": "test", "step": steps, "seconds": 11.0, "loss": 99.0},
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    return folder


def make_result(file, preset="tiny", *, loss=1.2, seed=0, **fields):
    """Write an experiment's result and return its path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    config = json.loads(to_json(change(get_preset(preset), **fields)))
    content = {"config": config, "seed": seed, "parameters": 5, "steps": 10,
               "tokens_per_step": 100, "seconds": 2.0,
               "valid": {"loss": loss, "accuracy": 0.7}}  # fmt: skip
    file.write_text(json.dumps(content))
    return file
