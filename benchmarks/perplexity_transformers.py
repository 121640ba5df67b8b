"""Losses of rows of tokens by transformers, for `perplexity_peers.py`.

Runs in an interpreter of its own that has torch and transformers, and nothing of ours.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers


def main(folder: str, rows: str, losses: str, count: str) -> None:
    """Append the loss of each of the first rows of each text that has none yet."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    model = model.to(device).eval()
    file = Path(losses)
    lines = file.read_text().splitlines() if file.exists() else []
    done = {(e["text"], e["row"]) for e in map(json.loads, lines)}
    with np.load(rows) as texts, file.open("a") as out, torch.inference_mode():
        for number in range(int(count)):
            for text in texts.files:
                if number >= len(texts[text]) or (text, number) in done:
                    continue
                row = torch.from_numpy(texts[text][number]).long()[None].to(device)
                logits = model(row[:, :-1], use_cache=False).logits[0]
                loss = torch.nn.functional.cross_entropy(
                    logits.double(), row[0, 1:], reduction="sum"
                )
                entry = {"text": text, "row": number, "nats": float(loss)}
                out.write(json.dumps(entry) + "\n")
                out.flush()
    versions = {m.__name__: m.__version__ for m in (torch, transformers)}
    print(json.dumps({"parameters": model.num_parameters(), **versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
