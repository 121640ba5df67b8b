"""005: `small` trained dense, cut into a union, trained on with half of its experts."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax

from experiments.shared.case import HERE, change, load_config
from uoe_jax.config import ExperimentConfig
from uoe_jax.decompose.runs import Cut, decompose_run
from uoe_jax.evaluate import evaluate, load_run
from uoe_jax.integrity import write_atomically
from uoe_jax.presets import get_preset
from uoe_jax.train import train

FURTHER = 200  # steps


def dense_config(tiny: bool) -> ExperimentConfig:
    """Return `small` on bytes of Wikipedia: 85M parameters, 52M bytes."""
    language = load_config(HERE / "001_language")
    small = get_preset("tiny" if tiny else "small")
    config = change(
        small,
        model={"vocab_size": 256, "max_seq_len": 64 if tiny else 1024},
        data=dataclasses.asdict(language.base(tiny).data) | {"batch_size": 64},
        optim={"warmup_steps": 100},
        train={"steps": 800, "eval_every": 10_000, "save_every": 10_000}
        | {"eval_batches": 16, "loss_chunk": 65_536, "keep_checkpoints": 1},
    )
    if not tiny:
        return config
    return change(
        config,
        model={"d_model": 32, "d_ff": 64, "num_layers": 2, "head_dim": 4},
        data={"batch_size": 8},
        train={"steps": 20, "eval_batches": 2},
        optim={"warmup_steps": 5},
    )


def cuts(tiny: bool) -> dict[str, Cut]:
    """Return how the dense run is cut; half of the experts are used by each token."""
    heads = dense_config(tiny).model.num_heads
    both: dict[str, Any] = {"num_experts": 16, "top_k": 8, "attention_experts": heads}
    mlp: dict[str, Any] = {"num_experts": 16, "top_k": 8, "parts": ("mlp",)}
    return {
        "MLP, co-activation": Cut(**mlp, grouping="coactivation"),
        "MLP and heads, co-activation": Cut(**both, grouping="coactivation"),
        "MLP, contiguous": Cut(**mlp),
        "MLP, random": Cut(**mlp, grouping="random"),
        "MLP and heads, zero routers": Cut(**both, router="zero"),
    }


def program(out: Path, tiny: bool) -> str:
    """Train, cut, go on; write results.json and table.md, return the table."""
    runs = out / "runs"
    # Cuts that differ in their numbers only share the compiled step.
    jax.config.update("jax_compilation_cache_dir", str((out / "compiled").absolute()))
    config = dense_config(tiny)
    further = 5 if tiny else FURTHER
    longer = change(config, train={"steps": config.train.steps + further})
    train(config, runs / "dense", quiet=True)
    before = _losses(runs / "dense")
    results: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "steps": config.train.steps,
        "further": further,
        "dense": before,
        "cuts": {},
    }
    for name, cut in cuts(tiny).items():
        folder = runs / name.replace(" ", "-").replace(",", "")
        found = decompose_run(runs / "dense", folder, cut)
        print(f"{name}: largest difference {found['max_logit_difference']:.3g}")
        start = _losses(folder)
        written = load_run(folder).config
        more = dataclasses.replace(written, train=longer.train)
        spent = train(more, folder, quiet=True)
        results["cuts"][name] = {
            "decompose": {k: v for k, v in found.items() if not isinstance(v, dict)},
            "before": start,
            "after": _losses(folder),
            "seconds": spent["seconds"],
        }
        _write(out, results)
        print(f"{name}: before {start}, after {results['cuts'][name]['after']}")
    train(longer, runs / "dense", quiet=True)
    results["dense_further"] = _losses(runs / "dense")
    _write(out, results)
    return table(results)


def _losses(folder: Path) -> dict[str, float]:
    """Return bits per byte on valid and test."""
    run = load_run(folder)
    batches = run.config.train.eval_batches
    return {
        split: evaluate(run.model, run.config, split=split, max_batches=batches)[
            "bits_per_byte"
        ]
        for split in ("valid", "test")
    }


def _write(out: Path, results: dict[str, Any]) -> None:
    write_atomically(out / "results.json", json.dumps(results, indent=1) + "\n")
    write_atomically(out / "table.md", table(results))


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    further = results["further"]
    lines = [
        "| cut | largest logit difference, all experts | test bits/byte dense "
        f"| half of the experts, at once | after {further} steps |",
        "|---|---|---|---|---|",
    ]
    dense = results["dense"]["test"]
    for name, found in results["cuts"].items():
        cut = found["decompose"]
        lines.append(
            f"| {name} | {cut['max_logit_difference']:.2g} (largest logit "
            f"{cut['max_logit']:.3g}) | {dense:.4f} | {found['before']['test']:.4f} | "
            f"{found['after']['test']:.4f} |"
        )
    if "dense_further" in results:
        after = results["dense_further"]["test"]
        lines.append(f"| none: dense, trained on | 0 | {dense:.4f} | | {after:.4f} |")
    return "\n".join(lines) + "\n"


def summary(out: Path) -> str:
    """Return the table of results that are there."""
    return table(json.loads((out / "results.json").read_text()))
