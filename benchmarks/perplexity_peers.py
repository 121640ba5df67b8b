"""Perplexity of an imported model on held-out text, here and in transformers.

    python benchmarks/perplexity_peers.py --run runs/smollm2 --peer-python PYTHON \
        --articles enwiki_articles.jsonl.xz --work FOLDER --out results.json

The texts are those of experiment 009: Wikipedia articles and files of Python's
standard library. Transformers, in the interpreter `--peer-python`, opens what `uoe
export` writes of the run and reads the same rows of tokens, in float32. On a GPU, set
JAX_DEFAULT_MATMUL_PRECISION=highest, or products are of shorter numbers. The same line
goes on where the last one ended; more `--tokens` go on too.

The other interpreter runs this script with `--peer`: it has torch and transformers, and
nothing of ours.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from uoe_jax.harness import Scorer

TEXTS = ("wikipedia", "python")
Losses = dict[tuple[str, int], float]


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


def read_losses(file: Path) -> Losses:
    """Return nats by text and row, of a file of JSON lines that may not be there."""
    lines = file.read_text("utf-8").splitlines() if file.exists() else []
    return {(e["text"], e["row"]): e["nats"] for e in map(json.loads, lines)}


def score_rows(
    score: Callable[[np.ndarray], float], rows: Mapping[str, np.ndarray], file: Path
) -> None:
    """Append the loss of each row that has none yet."""
    done = read_losses(file)
    with file.open("a", encoding="utf-8") as out:
        for number in range(max(map(len, rows.values()))):
            for text in TEXTS:
                if number < len(rows[text]) and (text, number) not in done:
                    nats = score(rows[text][number])
                    entry = {"text": text, "row": number, "nats": nats}
                    out.write(json.dumps(entry, allow_nan=False) + "\n")
                    out.flush()


def score_peer(folder: str, rows: str, file: str) -> None:
    """Score rows by transformers; print what did it."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    model = model.to(device).eval()

    def score(row: np.ndarray) -> float:
        tokens = torch.from_numpy(row).long()[None].to(device)
        logits = model(tokens[:, :-1], use_cache=False).logits[0].double()
        cross_entropy = torch.nn.functional.cross_entropy
        return float(cross_entropy(logits, tokens[0, 1:], reduction="sum"))

    with np.load(rows) as texts, torch.inference_mode():
        score_rows(score, dict(texts), Path(file))
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    print(json.dumps({"parameters": model.num_parameters(), **versions}))


def compare(
    ours: Losses, theirs: Losses, sizes: dict[str, list[int]], length: int
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


def main() -> None:
    import jax

    from experiments.e009_real_model.study import write_texts
    from uoe_jax.bench.record import arguments, header, processor, write_record
    from uoe_jax.files import format_json
    from uoe_jax.harness import Row, Scorer
    from uoe_jax.interop.exporting import export_run
    from uoe_jax.runs.load import load_run

    parser = arguments(__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--articles", type=Path, required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=200_000, help="of each text")
    parser.add_argument("--length", type=int, default=1024)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    texts, exported = args.work / "texts", args.work / "exported"
    if not texts.exists():
        write_texts(args.articles, texts)
    if not exported.exists():
        export_run(args.run, exported)
    run = load_run(args.run)
    scorer = Scorer(run, batch_size=1)

    def score(row: np.ndarray) -> float:
        ((nll, _),) = scorer.run([Row(row[:-1], row[1:], len(row) - 1)])
        return float(nll.sum())

    rows, sizes = make_rows(scorer, texts, args.tokens, args.length)
    np.savez(args.work / "rows.npz", **rows)
    files = [args.work / f"{side}-{args.length}.jsonl" for side in ("ours", "theirs")]
    score_rows(score, rows, files[0])
    said = subprocess.run(
        [args.peer_python, __file__, "--peer"]
        + [str(path) for path in (exported, args.work / "rows.npz", files[1])],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    device = processor() if jax.default_backend() == "cpu" else None
    report = {
        **header(stated=args.commit, device=device),
        "model": run.config.name,
        "compute_dtype": run.config.model.compute_dtype,
        "length": args.length,
        "peer": json.loads(said.stdout.splitlines()[-1]),
        "texts": compare(*map(read_losses, files), sizes, args.length),
    }
    print(format_json(report, indent=1))
    write_record(args.out, report)


if __name__ == "__main__":
    score_peer(*sys.argv[2:]) if sys.argv[1:2] == ["--peer"] else main()
