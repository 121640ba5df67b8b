"""005: `small` trained dense, cut into a union, trained on with half of its experts."""

from __future__ import annotations

import dataclasses
import shutil
import time
from pathlib import Path
from typing import Any

import jax
from matplotlib.figure import Figure

from experiments.e001_language import config as language
from experiments.shared.case import change
from uoe_jax.bench.record import read_record, write_record
from uoe_jax.config import ExperimentConfig
from uoe_jax.data import make_dataset
from uoe_jax.decompose.runs import Cut, decompose_run
from uoe_jax.evaluate import evaluate_all
from uoe_jax.files import write_atomically
from uoe_jax.presets import get_preset
from uoe_jax.report.style import LIGHT, Theme, render
from uoe_jax.runs.load import load_run
from uoe_jax.train import train

FURTHER = 200  # steps


def dense_config(tiny: bool) -> ExperimentConfig:
    """Return `small` on bytes of Wikipedia: 85M parameters, 52M bytes."""
    small = get_preset("tiny" if tiny else "small")
    config = change(
        small,
        model={"vocab_size": 256, "max_seq_len": 64 if tiny else 1024},
        data=dataclasses.asdict(language.base(tiny).data) | {"batch_size": 64},
        optim={"warmup_steps": 100},
        train={"steps": 800, "eval_every": 10_000, "save_every": 200}
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


def finished(out: Path, tiny: bool) -> bool:
    """Return whether there is nothing left to do."""
    results = _read(out)
    cut = all("after" in results["cuts"].get(name, {}) for name in cuts(tiny))
    return cut and "dense_further" in results


def program(out: Path, tiny: bool) -> str:
    """Train, cut, go on; write results.json and table.md, return the table.

    What was interrupted goes on: a run from its last checkpoint, the rest from where
    results.json ends.
    """
    runs, results = out / "runs", _read(out)
    if not (runs / "dense").is_dir():
        results = {"cuts": {}}  # without the dense run nothing can be cut or go on
    config = dense_config(tiny)
    further = 5 if tiny else FURTHER
    longer = change(config, train={"steps": config.train.steps + further})
    results |= {
        "device": jax.devices()[0].device_kind,
        "steps": config.train.steps,
        "further": further,
    }
    if "dense" not in results:
        spent = train(config, runs / "dense", quiet=True)
        results |= {"dense": _losses(runs / "dense"), "seconds": spent["seconds"]}
        _write(out, results)
    if "dense_further" not in results:
        copy = runs / "dense-further"  # the cuts want the dense run as it is
        if not copy.is_dir():
            part = runs / "dense-copying"
            shutil.rmtree(part, ignore_errors=True)
            shutil.copytree(runs / "dense", part).rename(copy)
        train(longer, copy, quiet=True)
        results["dense_further"] = _losses(copy)
        _write(out, results)
        print(f"dense: {results['dense']} -> {results['dense_further']}", flush=True)
    for name, cut in cuts(tiny).items():
        found = results["cuts"].setdefault(name, {})
        folder = runs / name.replace(" ", "-").replace(",", "")
        if "before" not in found:
            shutil.rmtree(folder, ignore_errors=True)
            start = time.perf_counter()
            made = decompose_run(runs / "dense", folder, cut)
            found["decompose"] = {
                k: v for k, v in made.items() if not isinstance(v, dict)
            }
            # Results may be read elsewhere, where `out` lies in another folder.
            found["decompose"]["run"] = (runs / "dense").relative_to(out).as_posix()
            cut_seconds = time.perf_counter() - start
            found["before"] = _losses(folder)
            _write(out, results)
            both = time.perf_counter() - start
            print(
                f"{name}: {found['before']}, cut in {cut_seconds:.0f} s, evaluated in "
                f"{both - cut_seconds:.0f} s",
                flush=True,
            )
        if "after" not in found:
            written = load_run(folder).config
            more = dataclasses.replace(written, train=longer.train)
            spent = train(more, folder, quiet=True)
            found |= {"after": _losses(folder), "seconds": spent["seconds"]}
            _write(out, results)
            print(f"{name}: {found['before']} -> {found['after']}", flush=True)
    return table(results)


def _losses(folder: Path) -> dict[str, float]:
    """Return bits per byte on valid and test."""
    run, splits = load_run(folder), ("valid", "test")
    data = [make_dataset(run.config, split) for split in splits]
    found = evaluate_all(run.model, run.config, data, run.config.train.eval_batches)
    return {
        split: scores["bits_per_byte"]
        for split, scores in zip(splits, found, strict=True)
    }


def _read(out: Path) -> dict[str, Any]:
    return read_record(out / "results.json") or {"cuts": {}}


def _write(out: Path, results: dict[str, Any]) -> None:
    write_record(out / "results.json", results)
    write_atomically(out / "table.md", table(results))


def table(results: dict[str, Any]) -> str:
    """Return the results as Markdown."""
    if "dense" not in results:
        return "no results\n"
    further, dense = results["further"], results["dense"]["test"]
    lines = [
        "| cut | largest logit difference, all experts | test bits/byte dense "
        f"| half of the experts, at once | after {further} steps |",
        "|---|---|---|---|---|",
    ]
    number = lambda scores: f"{scores['test']:.4f}" if scores else ""
    for name, found in results["cuts"].items():
        if cut := found.get("decompose"):
            lines.append(
                f"| {name} | {cut['max_logit_difference']:.2g} (largest logit "
                f"{cut['max_logit']:.3g}) | {dense:.4f} | "
                f"{number(found.get('before'))} | {number(found.get('after'))} |"
            )
    after = number(results.get("dense_further"))
    lines.append(f"| none: dense, trained on | 0 | {dense:.4f} | | {after} |")
    return "\n".join(lines) + "\n"


def plot(results: dict[str, Any]) -> bytes:
    """Return a PNG: every cut's loss at once and after training on, beside dense's."""
    done = {n: f for n, f in results["cuts"].items() if "after" in f}
    panels = (("before", "at once"), ("after", f"after {results['further']} steps"))
    lines = (("dense", "dense", "-"), ("dense_further", "dense, trained on", ":"))

    def draw(theme: Theme) -> Figure:
        figure = Figure(figsize=(10, 1.4 + 0.4 * len(done)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for side, (name, label), color in zip(axes, panels, theme.colors, strict=False):
            values = [found[name]["test"] for found in done.values()]
            dense = [results[key]["test"] for key, *_ in lines if key in results]
            for key, text, line in lines:
                if key in results:
                    at = results[key]["test"]
                    side.axvline(at, color=theme.ink, linestyle=line, label=text)
            side.hlines(range(len(done)), dense[0], values, color=color, lw=2)
            side.plot(values, range(len(done)), "o", color=color)
            for row, value in enumerate(values):
                side.annotate(
                    f"{value:.3f}",
                    (max(value, *dense), row),
                    xytext=(8, 0),
                    textcoords="offset points",
                    va="center",
                    fontsize=9,
                )
            low, high = min(values + dense), max(values + dense)
            side.set_xlim(low - 0.05 * (high - low), high + 0.2 * (high - low))
            side.set_xlabel(f"test bits/byte, {label}")
        axes[0].set_yticks(range(len(done)), list(done))
        axes[0].set_ylim(len(done) - 0.5, -0.5)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=9)
        return figure

    return render(draw, [LIGHT])["light"]


def summary(out: Path) -> str:
    """Write plot.png of the results that are there; return their table."""
    results = _read(out)
    if any("after" in found for found in results["cuts"].values()):
        (out / "plot.png").write_bytes(plot(results))
    return table(results)
