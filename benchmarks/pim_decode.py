"""One decoded token inside the memory: published models, and our own trained ones.

    python benchmarks/pim_decode.py --out benchmarks/results/pim_decode.json \
        --plot docs/pim_decode.png

The published study sets its device beside a T4 that it measured, whose decoding waits
for launches; its ratios can't be compared with a roofline's. Both are printed: the
latency of a T4 that the published ratio needs, and the ratio to its memory bandwidth.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from uoe_jax.bench.record import arguments, command_line, read_record, write_record
from uoe_jax.config import ModelConfig, from_json
from uoe_jax.files import format_json, write_atomically
from uoe_jax.hardware import pim
from uoe_jax.hardware.decoding import DecodeCost, roofline_decode
from uoe_jax.report.style import LIGHT, Theme, render
from uoe_jax.report.table import format_table

# Layers, width, heads and width of a head of the study's models.
GPT = {
    "GPT2-S": (12, 768, 12, 64),
    "GPT2-M": (24, 1024, 16, 64),
    "GPT2-L": (36, 1280, 20, 64),
    "GPT2-XL": (48, 1600, 25, 64),
    "GPT3-S": (12, 768, 12, 64),
    "GPT3-M": (24, 1024, 16, 64),
    "GPT3-L": (24, 1536, 16, 96),
    "GPT3-XL": (24, 2048, 24, 128),
}
PUBLISHED = (41, 137)  # times a measured T4, over the study's models
LATENCIES = (0.010, 0.040)  # seconds a token that T4s take in such loops
CONTEXT = 512
RESULTS = Path("experiments/e001_language/results")
PHASES = {
    "attention": ("q, k, v", "write k, v", "scores", "values", "attention out"),
    "MLP": ("MLP in", "MLP out"),
    "routers": ("routers",),
    "head": ("head",),
    "not products": ("softmax", "activation", "norms and sums"),
}
Row = dict[str, Any]


def gpt(layers: int, width: int, heads: int, head_dim: int) -> ModelConfig:
    sizes = {"num_heads": heads, "num_kv_heads": heads, "head_dim": head_dim}
    sizes |= {"num_layers": layers, "d_model": width, "d_ff": 4 * width}
    return ModelConfig(vocab_size=50257, max_seq_len=1024, **sizes)


def published() -> list[Row]:
    rows = []
    for name, sizes in GPT.items():
        model = gpt(*sizes)
        costs = [pim.decode_cost(model, CONTEXT, spec) for spec in pim.SPECS.values()]
        t4 = roofline_decode(model, CONTEXT, "t4").seconds
        rows.append(
            {
                "model": name,
                "ms": costs[0].seconds * 1e3,
                "ms_slower_timing": costs[1].seconds * 1e3,
                "mj": (costs[0].joules or 0) * 1e3,
                "row_hits": costs[0].row_hits,
                "t4_roofline_ratio": t4 / costs[0].seconds,
                "ratio_at_t4_latency": [s / costs[0].seconds for s in LATENCIES],
            }
        )
    return rows


def trained() -> list[Row]:
    """Return the models of the language experiment that the device maps."""
    losses, models = defaultdict(list), {}
    for path in sorted(RESULTS.glob("*-[012].json")):
        found = read_record(path)
        losses[found["case"]].append(found["test"]["bits_per_byte"])
        models[found["case"]] = from_json(format_json(found["config"])).model
    rows = []
    for case, model in models.items():
        try:
            costs = [pim.decode_cost(model, CONTEXT, pim.SPECS["aim-gddr6"])]
        except ValueError:
            continue  # a kind whose cache has no place there
        costs += [roofline_decode(model, CONTEXT, name) for name in ("h200", "t4")]
        rows.append({"case": case, "bits_per_byte": mean(losses[case]), **sides(costs)})
    return sorted(rows, key=lambda row: row["bits_per_byte"])


def sides(costs: list[DecodeCost]) -> Row:
    return {
        "us": {cost.device: cost.seconds * 1e6 for cost in costs},
        "mj": {cost.device: (cost.joules or 0) * 1e3 for cost in costs},
        "phases_us": {name: s * 1e6 for name, s in costs[0].phases.items()},
    }


def show(found: Row) -> str:
    ratio = lambda pair: f"{pair[0]:.0f}-{pair[1]:.0f}"
    first = [
        (
            *(row["model"], f"{row['ms']:.3f}", f"{row['ms_slower_timing']:.3f}"),
            *(f"{row['mj']:.1f}", f"{100 * row['row_hits']:.1f}"),
            f"{row['t4_roofline_ratio']:.1f}",
            ratio(row["ratio_at_t4_latency"]),
        )
        for row in found["published"]
    ]
    second = [
        (
            *(row["case"], f"{row['bits_per_byte']:.4f}"),
            *(f"{row['us'][name]:.1f}" for name in ("aim-gddr6", "h200", "t4")),
            *(f"{row['mj'][name]:.2f}" for name in ("aim-gddr6", "h200", "t4")),
        )
        for row in found["trained"]
    ]
    ends = f"{LATENCIES[0] * 1e3:.0f}-{LATENCIES[1] * 1e3:.0f} ms"
    head = ("model", "ms a token", "slower timing", "mJ", "row hits %")
    ratios = ("times T4's bandwidth", f"times a T4 of {ends}")
    columns = ("model", "bits/byte", "us in memory", "H200", "T4")
    energy = ("mJ in memory", "H200 board", "T4 board")
    tables = format_table(head + ratios, first), format_table(columns + energy, second)
    return "\n\n".join(tables)


def draw(rows: list[Row], theme: Theme) -> Figure:
    """Draw a token's time by phase, the trained models under each other."""
    figure = Figure(figsize=(8.6, 0.42 * len(rows) + 1.4), layout="constrained")
    axes = figure.add_subplot()
    names = [f"{row['case']}  ({row['bits_per_byte']:.3f})" for row in rows]
    left = [0.0] * len(rows)
    for color, (phase, parts) in zip(theme.colors, PHASES.items(), strict=False):
        widths = [
            sum(row["phases_us"].get(part, 0.0) for part in parts) for row in rows
        ]
        axes.barh(names, widths, left=left, label=phase, color=color, height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlabel("microseconds a token (8 channels of GDDR6, 512 tokens before it)")
    axes.set_title("Decoding inside the memory (test bits/byte in brackets)")
    axes.legend(ncols=len(PHASES), loc="upper center", bbox_to_anchor=(0.3, -0.12))
    return figure


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    found = {
        "command": command_line(),
        "context": CONTEXT,
        "device": "closed form; nothing is run",
        "published": published(),
        "trained": trained(),
    }
    print(show(found))
    write_record(args.out, found)
    if args.plot:
        picture = render(lambda theme: draw(found["trained"], theme), (LIGHT,))
        write_atomically(args.plot, picture["light"])


if __name__ == "__main__":
    main()
