"""Run folders with made-up numbers, for layout and reading."""

import dataclasses
import json

import numpy as np

from uoe_jax.config import to_json
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.presets import get_preset
from uoe_jax.report.overlay import Overlay

TEXT = '''def write_report(run_dirs, out=None):
    """Write the pictures of every run and one page."""
    runs = [read_run(path) for path in run_dirs]
    for run in runs:
        save(run.path / "plots", draw(run))
    if len(runs) > 1:
        compare(runs, out)
    return out


class Reader(Base):
    def __init__(self, stream, encoding="utf-8"):
        self.stream = stream
'''


def make_run(
    folder, preset="tiny", *, name=None, steps=300, seed=0, floor=1.2, layers=None
):
    """Write a run folder whose loss falls to `floor` nats and return its path."""
    rng = np.random.default_rng(seed)
    config = get_preset(preset)
    model = config.model
    model = dataclasses.replace(model, num_layers=layers or model.num_layers)
    config = dataclasses.replace(config, name=name or config.name, model=model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    env = {"python": "3.12.3", "jax": "0.11.2", "device": {"kind": "cpu", "count": 2}}
    (folder / "env.json").write_text(json.dumps(env))
    tokens = config.data.batch_size * config.seq_len
    flops = flops_per_token(config.model, config.seq_len).training * tokens
    pace = 0.2 + 0.1 * rng.random()
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(0, steps + 1, 10):
            loss = floor + 4.3 * np.exp(-step / 40) + 0.05 * rng.standard_normal()
            at = {"step": step, "seconds": step * pace, "flops": step * flops}
            line = {
                "kind": "train",
                **at,
                "loss": loss,
                "lr": 3e-3 * (1 - step / steps),
                "grad_norm": 0.5 + rng.random(),
                "tokens": step * tokens,
                "tokens_per_second": tokens / pace,
                "mfu": None,
                "router": routers(config.model, step / steps, rng),
            }
            file.write(json.dumps(line) + "\n")
            if step % 100 == 0:
                nats = floor + 0.05 + 4.3 * np.exp(-step / 40)
                line = {"kind": "eval", "split": "valid", **at, "loss": nats}
                if config.model.kind == "decoder":
                    line["bits_per_byte"] = nats / np.log(2)
                else:
                    line["accuracy"] = 1 - nats / 8
                file.write(json.dumps(line) + "\n")
    return folder


def routers(model, progress, rng):
    """Return a record of loads and entropies for the layers that route."""
    found = {}
    for column, block in enumerate(("attention", "mlp")):
        layers = [k for k in model.layer_kinds if k[column] != "dense"]
        if not layers:
            continue
        moe = layers[0][column] == "moe"
        experts = model.moe.num_experts if moe else model.union.num_experts
        load = rng.dirichlet(np.full(experts, 20 - 15 * progress), size=len(layers))
        entropy = np.log(experts) * (1 - 0.4 * progress * rng.random(len(layers)))
        found[block] = {"load": load.tolist(), "entropy": entropy.tolist()}
    return found


def make_overlay(model, seed=0, text=TEXT):
    """Return an overlay with choices at random, equal characters alike."""
    rng = np.random.default_rng(seed)
    image = None
    length, tokens = len(text), list(text)
    if model.kind == "vision":
        side = model.image_size // model.image_patch
        length, tokens = side * side, []
        image = rng.random((model.image_size, model.image_size, model.image_channels))
    choices, layers, number = {}, {}, {}
    for column, block in enumerate(("attention", "mlp")):
        rows = [i for i, k in enumerate(model.layer_kinds) if k[column] != "dense"]
        if not rows:
            continue
        moe = model.layer_kinds[rows[0]][column] == "moe"
        experts = model.moe if moe else model.union
        ids = np.array([ord(c) for c in text]) if tokens else np.arange(length)
        picks = np.stack(
            [
                np.stack([rng.permutation(experts.num_experts) for _ in range(256)])
                for _ in rows
            ]
        )
        choices[block] = picks[:, ids % 256, : experts.top_k]
        layers[block], number[block] = rows, experts.num_experts
    return Overlay(choices, layers, number, tokens, image, model.image_patch)
