"""Compress an imported model by every method; perplexity on two held-out texts.

    python -m experiments.e010_compression.run --model SmolLM2.gguf \
        --articles enwiki_articles.jsonl.xz --out runs/e010

The texts are those of experiment 009. Each row is written as soon as it is there.
Models are scored as dense ones with zeros where channels are gone, which is the same
function: one program scores all. `--tiny` is the same on seconds of CPU with a small
model.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from experiments.e009_real_model.run import Part, Study, set_flax
from uoe_jax.compress.methods import sort_layers
from uoe_jax.compress.options import Compress
from uoe_jax.compress.statistics import observe
from uoe_jax.compress.widths import (
    choose_widths,
    error_curves,
    layer_parts,
    with_widths,
)
from uoe_jax.config import ModelConfig
from uoe_jax.files import format_json, write_atomically
from uoe_jax.hardware.count import count_params, flops_per_token
from uoe_jax.interop.padding import pad_layers
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.model.stacks import to_layers
from uoe_jax.runs.batches import calibration_batch, probe_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32, logits

CUTS = (0.2, 0.3, 0.1, 0.4)
ROWS = (
    ("modegpt", "curve"),
    ("modegpt", "uniform"),
    ("sort", "uniform"),
    ("magnitude", "uniform"),
    ("sort", "curve"),
    ("modegpt", "bi"),
    ("drop", "uniform"),
    ("flap", "uniform"),
)


class Scorer:
    """Held-out batches, and the program that scores a dense model on them."""

    def __init__(self, held: Mapping[str, Any], rows: int):
        self.held, self.rows, self._graph = held, rows, None
        self._loss = jax.jit(self._sums)

    def _sums(self, state: Any, batch: Any) -> jax.Array:
        model = nnx.merge(self._graph, state)
        with jax.default_matmul_precision("highest"):
            scores = jax.nn.log_softmax(logits(model, batch).astype(jnp.float32))
        found = jnp.take_along_axis(scores, batch["targets"][..., None], -1)[..., 0]
        return jnp.stack([-(found * batch["mask"]).sum(), batch["mask"].sum()])

    def score(self, config: ModelConfig, params: Mapping[str, Any]) -> dict[str, float]:
        """Return the perplexity of each text, and how many tokens were scored."""
        graph, state = nnx.split(with_params(config, params, {}))
        self._graph = self._graph or graph
        found: dict[str, float] = {}
        for name, batch in self.held.items():
            total, count = np.zeros(2), len(batch["tokens"])
            for first in range(0, count // self.rows * self.rows, self.rows):
                part = {k: jnp.asarray(a[first : first + self.rows])
                        for k, a in batch.items()}  # fmt: skip
                total += np.asarray(self._loss(state, part))
            found[name] = math.exp(total[0] / total[1])
            found[f"{name}_tokens"] = int(total[1])
        return found


def sizes(model: ModelConfig, length: int) -> tuple[float, float]:
    """Return the parameters of the blocks, and forward FLOPs a token."""
    parts = count_params(model)
    blocks = sum(parts.get(name, 0) for name in ("attention", "mlp"))
    return blocks, flops_per_token(model, length).forward


def main() -> None:
    """Observe the model once, then cut and score it row by row."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="GGUF or a folder")
    parser.add_argument("--articles", type=Path, required=True, help="JSON lines")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="seconds on a CPU")
    options = parser.parse_args()
    set_flax()
    study = Study(
        argparse.Namespace(
            out=options.out,
            work=options.out / "work",
            tiny=options.tiny,
            minutes=math.inf,
            part=Part(1, 1),
        )
    )
    study.begin(options.model, options.articles)
    run = load_run(study.work / "imported")
    model, length = in_float32(run.config.model), run.config.seq_len
    params, buffers = flat_params(run.model), flat_buffers(run.model)
    held = {
        name: probe_batch(data, study.scale.held_out)
        for name, data in study.data.items()
    }
    scorer = Scorer(held, study.scale.rows if options.tiny else 8)
    tokens = study.scale.calibration
    results: dict[str, Any] = {
        "model": options.model.name,
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "calibration_tokens": tokens,
        "rows": [],
    }

    def put(row: dict[str, Any]) -> None:
        results["rows"].append(row)
        study.say(str(row))
        text = format_json(results, indent=1) + "\n"
        write_atomically(options.out / "results.json", text)

    options.out.mkdir(parents=True, exist_ok=True)
    put({"method": "dense", "cut": 0.0, **scorer.score(model, params)})
    start = time.perf_counter()
    batch = calibration_batch(run.config, tokens)
    seen = observe(with_params(model, params, buffers), batch)
    results["observe_seconds"] = time.perf_counter() - start
    rest, layers = to_layers(params, model)
    biases = to_layers(buffers, model)[1]
    influence = np.array([layer.influence for layer in seen])
    whole = sizes(model, length)
    ready: dict[str, Any] = {}
    for cut, (method, allocate) in itertools.product(CUTS, ROWS):
        wanted = Compress(cut=cut, method=method, allocate=allocate)  # type: ignore[arg-type]
        if method not in ready:
            found = sort_layers(method, layers, seen, model.rotates)
            curves = [error_curves(a, b) for a, b in zip(found, seen, strict=True)]
            ready[method] = found, curves
        found, curves = ready[method]
        start = time.perf_counter()
        parts = layer_parts(model, curves, wanted)
        widths = choose_widths(parts, influence, cut, wanted)
        made = with_widths(model, (rest, layers), found, parts, widths, biases)
        seconds = time.perf_counter() - start
        own = sizes(made.config, length)
        padded = pad_layers(made.config, made.params, made.buffers)
        put(
            {
                "method": method,
                "allocate": allocate,
                "cut": cut,
                "blocks": own[0] / whole[0],
                "flops": own[1] / whole[1],
                "cut_seconds": seconds,
                **scorer.score(*padded),
            }
        )


if __name__ == "__main__":
    main()
