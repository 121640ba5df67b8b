"""What each method loses at each cut: one look at a text, a table, a picture, JSON."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.appearing import appearing_together
from uoe_jax.compress.apply import look
from uoe_jax.compress.methods import prepare
from uoe_jax.compress.observed import Observed, Smaller, block_params
from uoe_jax.compress.options import Curve
from uoe_jax.data.progress import note
from uoe_jax.errors import ConfigError, MissingExtra
from uoe_jax.fields import check_ranges
from uoe_jax.files import format_json, write_atomically
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.interop.padding import pad_layers
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.batches import count_scored, probe_batch
from uoe_jax.runs.load import load_run, run_dataset
from uoe_jax.runs.probe import in_float32, mean_loss
from uoe_jax.runs.stored import publish, run_folder
from uoe_jax.runs.write import check_free
from uoe_jax.stores.mirror import named
from uoe_jax.surgery import Source, Which

DATA, TABLE, PICTURE = "curve.json", "curve.txt", "curve.png"


def compare_run(
    folder: Path, out: Path, options: Curve, *, which: Which = "last"
) -> dict[str, Any]:
    """Write what a run loses at each cut by each method into `out`, and return it.

    The loss is over held-out data of the run. Raises what `compress_run` does.
    """
    check_ranges(options, "compress.")
    options.check()
    folder, out = run_folder(folder, "the run"), run_folder(out, "out", writes=True)
    run = load_run(folder, which=which)
    check_free(out)
    params, buffers = flat_params(run.model), flat_buffers(run.model)
    source = Source(folder=folder, config=run.config, buffers=buffers)
    observed, about = look(run.config, params, source, options)
    batch = probe_batch(run_dataset(folder, run.config, "valid"))
    dense = Smaller(run.config.model, params, buffers)
    found: dict[str, Any] = {
        "did": "curve",
        "run": named(folder),
        "step": run.step,
        "allocate": options.allocate,
        "probe_tokens": count_scored(batch),
        **about,
        "rows": [{"method": "dense", "cut": 0.0, **score(dense, {"held_out": batch})}],
    }
    rows = compare(observed, options, {"held_out": batch}, run.config.seq_len)
    for row in rows:
        said = row.get("refused") or f"perplexity {row['held_out']:.2f}"
        note(f"compress: {row['method']}, cut {row['cut']:g}: {said}")
        found["rows"].append(row)
    _write(out, found)
    publish(out)
    return found


def compare(
    observed: Observed,
    options: Curve,
    held: Mapping[str, Mapping[str, np.ndarray]],
    length: int,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each method and cut: sizes, and the perplexity of each text.

    A cut that a method hasn't got is a row that says why it was refused. Sizes are
    shares of the dense model's; FLOPs are those of texts of `length`.
    """
    for method in options.compared:
        ready = None
        for cut in options.curve or ():
            row: dict[str, Any] = {"method": method, "cut": cut}
            wanted = options.one(method, cut)
            start = time.perf_counter()
            try:
                wanted.check()
                ready = ready or prepare(observed, method)
                made = ready(wanted)
            except ConfigError as error:
                yield row | {"refused": str(error)}
                continue
            row["allocate"] = wanted.spread
            row["seconds"] = time.perf_counter() - start
            yield row | sizes(observed, made, length) | score(made, held)


def sizes(observed: Observed, made: Smaller, length: int) -> dict[str, float]:
    """Return a smaller model's parameters of blocks and FLOPs as shares of a whole."""
    flops = lambda model: flops_per_token(model, length).forward
    before, after = observed.model, made.config
    return {
        "blocks": block_params(after) / block_params(before),
        "flops": flops(after) / flops(before),
    }


def score(
    made: Smaller, held: Mapping[str, Mapping[str, np.ndarray]]
) -> dict[str, float]:
    """Return the perplexity of each text.

    Narrow layers are scored as whole ones with zeros, which is the same function: one
    program scores all.
    """
    config, params = pad_layers(*made)
    buffers = made.buffers if config == made.config else _routers(made.buffers)
    model = with_params(in_float32(config), params, buffers)
    losses = {name: mean_loss(model, batch) for name, batch in held.items()}
    return {name: math.exp(min(loss, 700.0)) for name, loss in losses.items()}


def _routers(buffers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the buffers that whole layers have too."""
    return {n: a for n, a in buffers.items() if not n.endswith("rotary_pairs")}


def table(found: Mapping[str, Any]) -> str:
    """Return a comparison as text: a row a method, a column a cut."""
    rows = found["rows"]
    cuts = sorted({row["cut"] for row in rows if row["cut"]})
    methods = list(dict.fromkeys(row["method"] for row in rows[1:]))
    at = {(row["method"], row["cut"]): row for row in rows}
    lines = [("perplexity", *(f"{cut:.0%}" for cut in cuts))]
    for method in methods:
        lines.append((method, *(_cell(at[method, cut]) for cut in cuts)))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [
        "  ".join([row[0].ljust(widths[0])]
                  + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)])
        for row in lines
    ]  # fmt: skip
    dense = rows[0]["held_out"]
    text.append(f"dense {dense:.2f}, of {found['probe_tokens']:,} held-out targets")
    refused = [row["refused"] for row in rows if "refused" in row]
    return "\n".join([*text, *dict.fromkeys(f"-: {reason}" for reason in refused)])


def _cell(row: Mapping[str, Any]) -> str:
    if "refused" in row:
        return "-"
    value = row["held_out"]
    return f"{value:.2f}" if value < 1e5 else f"{value:.1e}"


def _write(out: Path, found: dict[str, Any]) -> None:
    with appearing_together(out) as folder:
        write_atomically(folder / DATA, format_json(found, indent=1) + "\n")
        write_atomically(folder / TABLE, table(found) + "\n")
        try:
            from uoe_jax.compress.plot import plot_curves
        except MissingExtra as error:
            note(f"no {PICTURE}: {error}")
            return
        plot_curves(_points(found["rows"]), found["rows"][0]["held_out"],
                    folder / PICTURE)  # fmt: skip


def _points(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return each method's (share of the blocks that went, perplexity)."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows[1:]:
        if "refused" not in row:
            point = (1 - row["blocks"], row["held_out"])
            found.setdefault(row["method"], []).append(point)
    return found
