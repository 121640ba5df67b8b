"""Which grouping of neurons loses least, layer by layer and as a whole model.

    python benchmarks/cluster_groupings.py --model SmolLM2-135M-Instruct.Q4_1.gguf \
        --articles enwiki_articles.jsonl.xz --work FOLDER \
        --out benchmarks/results/cluster_groupings.json
    python benchmarks/cluster_groupings.py --run runs/mine --out FILE

Only MLPs are cut. Calibration and held-out tokens are Wikipedia and Python's standard
library, or a run's own data; every seed has tokens of its own. Each grouping at a share
kept and a number of experts is one pass through the model, the most telling first; its
rows are written when it ends, and the same line goes on where the last one ended. Cuts
of a pass:

    plain   no expert always on, routers by least squares
    core    half of the chosen experts always on, those whose neurons write most
    alone   core, and each layer's down-projection fitted to the dense model's inputs
    refit   core, and fitted to what the cut layers before it write
    most    alone, and all but an eighth of the chosen experts always on
    whole   most, and fitted to what the cut layers before it write
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments.e009_real_model.study import Scale, base_config, write_texts
from uoe_jax.bench.record import arguments, header, read_record, write_record
from uoe_jax.data import make_dataset
from uoe_jax.decompose.compare import measure_losses
from uoe_jax.decompose.cut import Cut, Grouping
from uoe_jax.decompose.plan import Decided, decide
from uoe_jax.decompose.split import union_config
from uoe_jax.interop.importing import import_run
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import probe_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32, mean_loss

ARTICLES = 200  # and as many of Python's files
KEY = ("seed", "keep", "experts", "grouping", "variant")  # of a row
ORDER = ["coactivation", "weights", "spectral", "random", "contiguous", "mlc"]
VARIANTS = ("plain", "core", "alone", "refit", "most", "whole")
FOLLOWS = ("refit", "whole")


def open_model(options: argparse.Namespace) -> tuple[Any, Any]:
    """Return a dense model that computes in float32, and its experiment."""
    folder, texts = options.run, options.work / "texts"
    if options.model is not None:
        folder = options.work / "imported"
        if not folder.is_dir():
            import_run(options.model, folder, dtype="float32")
    run = load_run(folder)
    config = run.config
    if options.articles is not None:
        if not (texts / "mix" / "valid.jsonl").is_file():
            write_texts(options.articles, texts, most=ARTICLES)
        scale = Scale(rows=1, length=512, compute_dtype="float32")
        config = base_config(config, texts, scale)
    model = in_float32(config.model)
    return with_params(model, flat_params(run.model), flat_buffers(run.model)), config


class Pass(NamedTuple):
    """One grouping at one share kept, number of experts and seed."""

    seed: int
    keep: float
    experts: int
    grouping: Grouping


def passes(options: argparse.Namespace) -> list[Pass]:
    """Return all passes, the most telling first.

    First the first seed, share and number of experts; then what differs from these in
    one, in two, in all three. The same neurons stand side by side for every seed.
    """
    axes = options.seeds, options.keep, options.experts, options.groupings
    found = [Pass(*each) for each in itertools.product(*axes)]
    first = options.seeds[0], options.keep[0], options.experts[0]
    changes = lambda p: sum(a != b for a, b in zip(p[:3], first, strict=True))
    slow = lambda p: p.grouping == "mlc"  # a network a layer
    return sorted(found, key=lambda p: (changes(p), slow(p)))


def make_cut(wanted: Pass, variant: str) -> Cut:
    """Return the cut of a pass that a variant names."""
    chosen = max(round(wanted.experts * wanted.keep), 1)
    shared = {"plain": 0, "most": chosen - max(chosen // 8, 1)}
    shared["whole"] = shared["most"]
    return Cut(
        num_experts=wanted.experts,
        top_k=chosen,
        parts=("mlp",),
        shared=shared.get(variant, chosen // 2),
        refit=variant not in ("plain", "core"),
        grouping=wanted.grouping,
        seed=wanted.seed,
    )


def measure(
    model: Any, batches: tuple[Any, Any], wanted: Pass, variants: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the row of each variant of a pass."""
    calibrate, held = batches
    found = []
    for variant in variants:
        cut = make_cut(wanted, variant)
        union = union_config(
            model.config, cut.experts, cut.chosen, cut.parts, None, cut.shared
        )
        found.append(Decided(union, cut, follows=variant in FOLLOWS))
    decide(model, found, calibrate, held)
    rows = []
    for variant, row in zip(
        variants, measure_losses(model, found, held)[0], strict=True
    ):
        squares = float(np.mean(np.square(row.errors)))  # shares of the outputs' energy
        facts = row.as_row() | {"errors": [round(e, 5) for e in row.errors]}
        facts["squared_error"] = squares
        rows.append({**wanted._asdict(), "variant": variant, **facts})
    return rows


class Clock:
    """Prints how long each stage took, so that a wasted minute is seen."""

    def __init__(self) -> None:
        self.began = self._last = time.perf_counter()
        self._compiled = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, seconds: float, **_: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            self._compiled += seconds

    def stage(self, name: str) -> None:
        now = time.perf_counter()
        spent = f"{now - self._last:.1f} s, {self._compiled:.1f} s of it compiling"
        print(f"[{now - self.began:5.0f} s] {name}: {spent}", flush=True)
        self._last, self._compiled = now, 0.0

    def minutes(self) -> float:
        return (time.perf_counter() - self.began) / 60


def seeded_batches(config: Any, tokens: tuple[int, int], seed: int) -> tuple[Any, Any]:
    """Return tokens to calibrate on and others, a seed's own."""
    found = []
    for split, size in zip(("train", "valid"), tokens, strict=True):
        batch = probe_batch(make_dataset(config, split), size * (seed + 1))
        rows = len(batch["tokens"]) // (seed + 1)
        found.append({name: a[rows * seed :] for name, a in batch.items()})
    return found[0], found[1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", type=Path, help="GGUF or a folder to import")
    parser.add_argument("--run", type=Path, help="a run, instead of --model")
    parser.add_argument("--articles", type=Path, help="JSON lines; None: run's data")
    parser.add_argument("--work", type=Path, default=Path("runs/groupings"))
    parser.add_argument("--tokens", type=int, nargs=2, default=(8192, 4096))
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 8, 32, 64])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.75])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--groupings", nargs="+", choices=ORDER, default=ORDER)
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS)
    )
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), help="of how many")
    parser.add_argument("--minutes", type=float, default=1e9, help="to start passes in")
    options = parser.parse_args()
    clock = Clock()
    model, config = open_model(options)
    clock.stage("model")
    about = {
        **header(stated=options.commit),
        "model": config.name,
        "layers": config.model.num_layers,
        "neurons": config.model.d_ff,
        "tokens": dict(zip(("calibration", "held_out"), options.tokens, strict=True)),
    }
    before = read_record(options.out)
    for name in ("model", "tokens"):
        if before.get(name, about[name]) != about[name]:
            parser.error(
                f"{options.out} is of {name} {before[name]}, this is {about[name]}; "
                "choose another --out"
            )
    results = {"rows": []} | before | about
    done = {tuple(row[name] for name in KEY) for row in results["rows"]}
    left = {
        each: [v for v in options.variants if (*each, v) not in done]
        for each in passes(options)[options.part[0] - 1 :: options.part[1]]
    }
    left = {each: variants for each, variants in left.items() if variants}
    batches, losses = {}, {}
    for number, (each, variants) in enumerate(left.items(), 1):
        if clock.minutes() > options.minutes:
            print(f"{len(left) - number + 1} of {len(left)} passes are left")
            break
        if each.seed not in batches:
            found = seeded_batches(config, tuple(options.tokens), each.seed)
            batches[each.seed] = found
            losses[each.seed] = mean_loss(model, found[1])
            clock.stage(f"tokens of seed {each.seed}")
        for row in measure(model, batches[each.seed], each, variants):
            more = {"dense_loss": losses[each.seed], "commit": about["commit"]}
            results["rows"].append(row | more)
            show(results["rows"][-1])
        write_record(options.out, results)
        clock.stage(f"pass {number} of {len(left)}: {' '.join(map(str, each))}")


def show(row: Mapping[str, Any]) -> None:
    named = " ".join(f"{row[name]!s:13s}" for name in KEY)
    dense = row["dense_loss"]
    print(
        f"{named} error {row['error']:.3f} squared {row['squared_error']:.3f} worst "
        f"{row['worst_error']:.3f} oracle {row['oracle_error']:.3f} "
        f"loss {row['loss']:.3f} (dense {dense:.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
