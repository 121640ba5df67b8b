"""Perplexity of an imported model on held-out text, here and in transformers.

    python benchmarks/perplexity_peers.py --run runs/smollm2 --peer-python PYTHON \
        --articles enwiki_articles.jsonl.xz --work FOLDER --out results.json

The texts are those of experiment 009: Wikipedia articles and files of Python's
standard library. Transformers, in the interpreter `--peer-python`, opens what `uoe
export` writes of the run and reads the same rows of tokens, in float32. On a GPU, set
JAX_DEFAULT_MATMUL_PRECISION=highest, or products are of shorter numbers. The same line
goes on where the last one ended; more `--tokens` go on too.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments.e009_real_model.study import write_texts
from uoe_jax.files import format_json, parse_json, write_atomically
from uoe_jax.harness import Row, Scorer
from uoe_jax.interop.exporting import export_run
from uoe_jax.runs.load import load_run

TEXTS = ("wikipedia", "python")
PEER = Path(__file__).with_name("perplexity_transformers.py")


def make_rows(scorer: Scorer, folder: Path, tokens: int, length: int) -> Any:
    """Return of each text its rows [R, length + 1] and the bytes of each row's targets.

    A row begins with the last token of the one before it: every token but the first is
    scored once. Documents end in the tokenizer's token for that, if it has one.
    """
    found, sizes = {}, {}
    end = [] if scorer.end is None else [scorer.end]
    for text in TEXTS:
        ids: list[int] = []
        with (folder / text / "valid.jsonl").open(encoding="utf-8") as file:
            for line in file:
                document = json.loads(line)["text"]
                ids += [*map(int, scorer.tokenizer.encode(document)), *end]
                if len(ids) > tokens:
                    break
        count = min(len(ids) - 1, tokens) // length
        starts = np.arange(count)[:, None] * length
        rows = np.asarray(ids, np.int32)[starts + np.arange(length + 1)]
        found[text] = rows
        decode = scorer.tokenizer.decode_bytes
        sizes[text] = [len(decode(row[1:])) for row in rows]
    return found, sizes


def read_losses(file: Path) -> dict[tuple[str, int], float]:
    """Return nats by text and row, of a file of JSON lines that may not be there."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    entries = [parse_json(line, str(file)) for line in lines]
    return {(e["text"], e["row"]): e["nats"] for e in entries}


def score_ours(scorer: Scorer, rows: dict[str, np.ndarray], file: Path) -> None:
    """Append the loss of each row that has none yet."""
    done = read_losses(file)
    with file.open("a", encoding="utf-8") as out:
        for number in range(max(map(len, rows.values()))):
            for text in TEXTS:
                if number >= len(rows[text]) or (text, number) in done:
                    continue
                row = rows[text][number]
                ((nll, _),) = scorer.run([Row(row[:-1], row[1:], len(row) - 1)])
                entry = {"text": text, "row": number, "nats": float(nll.sum())}
                out.write(format_json(entry) + "\n")
                out.flush()


def compare(
    ours: dict[tuple[str, int], float],
    theirs: dict[tuple[str, int], float],
    sizes: dict[str, list[int]],
    length: int,
) -> dict[str, Any]:
    """Return both perplexities of each text over the rows that both have read."""
    found = {}
    for text, counts in sizes.items():
        common = ours.keys() & theirs.keys()
        both = [n for n in range(len(counts)) if (text, n) in common]
        if not both:
            continue
        sums = [sum(side[text, n] for n in both) for side in (ours, theirs)]
        tokens, bytes_ = len(both) * length, sum(counts[n] for n in both)
        here, there = (math.exp(nats / tokens) for nats in sums)
        apart = [abs(ours[text, n] - theirs[text, n]) / length for n in both]
        found[text] = {
            "tokens": tokens,
            "perplexity": here,
            "transformers": there,
            "apart_percent": 100 * abs(here / there - 1),
            "largest_of_a_row_nats_a_token": max(apart),
            "bits_per_byte": sums[0] / math.log(2) / bytes_,
        }
    return found


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--articles", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="of each text")
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    texts, exported = args.work / "texts", args.work / "exported"
    if not texts.exists():
        write_texts(args.articles, texts)
    if not exported.exists():
        export_run(args.run, exported)
    run = load_run(args.run)
    scorer = Scorer(run, batch_size=1)
    rows, sizes = make_rows(scorer, texts, args.tokens, args.length)
    np.savez(args.work / "rows.npz", **rows)
    files = [args.work / f"{side}-{args.length}.jsonl" for side in ("ours", "theirs")]
    score_ours(scorer, rows, files[0])
    command = [args.peer_python, str(PEER), str(exported), str(args.work / "rows.npz")]
    count = max(map(len, rows.values()))
    said = subprocess.run(
        [*command, str(files[1]), str(count)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    ours, theirs = map(read_losses, files)
    report = {
        "command": "python benchmarks/perplexity_peers.py",
        "model": run.config.name,
        "compute_dtype": run.config.model.compute_dtype,
        "length": args.length,
        "device": device
        if (device := jax.devices()[0].device_kind) != "cpu"
        else f"CPU, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": version("jax"),
        "peer": json.loads(said.stdout.splitlines()[-1]),
        "texts": compare(ours, theirs, sizes, args.length),
    }
    print(format_json(report, indent=1))
    if args.out:
        write_atomically(args.out, format_json(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
