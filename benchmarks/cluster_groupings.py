"""Which grouping of neurons loses least, layer by layer and as a whole model.

    python benchmarks/cluster_groupings.py --model SmolLM2-135M-Instruct.Q4_1.gguf \
        --articles enwiki_articles.jsonl.xz --work FOLDER \
        --out benchmarks/results/cluster_groupings.json
    python benchmarks/cluster_groupings.py --run runs/mine --out FILE

Only MLPs are cut. Calibration and held-out tokens are Wikipedia and Python's standard
library, or a run's own data. Each share kept and seed is one pass through the model;
rows are written as soon as they are there, and the same line goes on where the last one
ended. Cuts of a pass:

    plain   no expert always on, routers by least squares
    core    half of the chosen experts always on, those whose neurons write most
    alone   core, and each layer's down-projection fitted to the dense model's inputs
    refit   core, and fitted to what the cut layers before it write
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.e009_real_model.study import Scale, base_config, write_texts
from uoe_jax.bench.record import arguments, header, read_record, write_record
from uoe_jax.data import make_dataset
from uoe_jax.decompose.compare import measure_losses
from uoe_jax.decompose.cut import Cut
from uoe_jax.decompose.group import GROUPINGS
from uoe_jax.decompose.plan import Decided, decide
from uoe_jax.decompose.split import union_config
from uoe_jax.interop.importing import import_run
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import probe_batch
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32, mean_loss

ARTICLES = 600  # and as many of Python's files
KEY = ("seed", "keep", "experts", "grouping", "variant")  # of a row
VARIANTS = ("plain", "core", "alone", "refit")


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


def make_cuts(
    options: argparse.Namespace, keep: float, seed: int
) -> Iterator[tuple[str, Cut]]:
    """Yield the cuts of a pass: the name of each, and what is decided for it."""
    named = options.groupings, options.variants, options.experts
    for grouping, variant, number in itertools.product(*named):
        chosen = max(round(number * keep), 1)
        cut = Cut(
            num_experts=number,
            top_k=chosen,
            parts=("mlp",),
            shared=0 if variant == "plain" else chosen // 2,
            refit=variant in ("alone", "refit"),
            seed=seed,
        )
        object.__setattr__(
            cut, "grouping", grouping
        )  # "greedy" is none of the library's
        yield variant, cut


def measure(
    model: Any, batches: Any, wanted: Sequence[tuple[str, Cut]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each cut of a pass."""
    calibrate, held = batches
    found = []
    for variant, cut in wanted:
        union = union_config(
            model.config, cut.experts, cut.chosen, cut.parts, None, cut.shared
        )
        found.append(Decided(union, cut, follows=variant == "refit"))
    started = time.perf_counter()
    decide(model, found, calibrate, held)
    print(f"decided in {time.perf_counter() - started:.0f} s", flush=True)
    for (variant, cut), each in zip(wanted, found, strict=True):
        row = measure_losses(model, [each], held)[0][0]
        facts = {k: v for k, v in row.as_row().items() if k != "errors"}
        errors = [round(error, 5) for error in row.errors]
        named = {"experts": cut.experts, "variant": variant}
        yield {**named, **facts, "errors": errors}
        each.refits.clear()  # the next ones want the memory


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
    parser.add_argument("--groupings", nargs="+", default=[*GROUPINGS])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--part", type=int, nargs=2, default=(1, 1), help="of how many")
    parser.add_argument("--minutes", type=float, default=1e9, help="to start passes in")
    options = parser.parse_args()
    began = time.perf_counter()
    model, config = open_model(options)
    batches = tuple(
        probe_batch(make_dataset(config, split), tokens)
        for split, tokens in zip(("train", "valid"), options.tokens, strict=True)
    )
    results = {"rows": []} | read_record(options.out)
    results |= {
        **header(stated=options.commit),
        "model": config.name,
        "layers": config.model.num_layers,
        "neurons": config.model.d_ff,
        "tokens": dict(zip(("calibration", "held_out"), options.tokens, strict=True)),
    }
    if "dense_loss" not in results:
        results["dense_loss"] = mean_loss(model, batches[1])
    named = lambda row: tuple(row[name] for name in KEY)
    done = {named(row) for row in results["rows"]}
    passes = itertools.product(options.seeds, options.keep)
    for number, (seed, keep) in enumerate(passes):
        if number % options.part[1] != options.part[0] - 1:
            continue
        if time.perf_counter() - began > 60 * options.minutes:
            break
        cuts = [
            (variant, cut)
            for variant, cut in make_cuts(options, keep, seed)
            if (seed, keep, cut.experts, cut.grouping, variant) not in done
        ]
        for row in measure(model, batches, cuts):
            results["rows"].append({"seed": seed, "keep": keep, **row})
            write_record(options.out, results)
            show(results["rows"][-1], results["dense_loss"])


def show(row: Mapping[str, Any], dense: float) -> None:
    named = " ".join(f"{row[name]!s:13s}" for name in KEY)
    print(
        f"{named} error {row['error']:.3f} worst {row['worst_error']:.3f} oracle "
        f"{row['oracle_error']:.3f} loss {row['loss']:.3f} (dense {dense:.3f})",
        flush=True,
    )


if __name__ == "__main__":
    main()
