"""Experts of a trained union on a mesh of 4 x 4 chips: links that rows cross.

    uoe train tiny-union --run-dir RUN --model.union.num-experts 32 \
        --model.union.top-k 4 --model.attention dense --train.steps 56
    python benchmarks/expert_placement.py RUN --out FILE.json

Choices of the run's routers are counted on batches of its training data, experts placed
by them, and the links counted on batches of its validation data that it hasn't seen: a
row sent once for each expert, once for each device, or passed on along a tree. Two
grids of 4 x 4 are tried, with and without joined ends.
"""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
import numpy as np

from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.files import format_json
from uoe_jax.model.transformer import routing_choices
from uoe_jax.runs.load import load_run, run_dataset
from uoe_jax.topology import box_graph, place_experts
from uoe_jax.topology.place import co_selection, hop_rows

SIDES = (4, 4)


def choices_of(run, split, batches):
    """Each layer's choices of the MLP's experts, (tokens, top_k)."""
    data = run_dataset(run.folder, run.config, split)
    taken = [
        routing_choices(run.model, jnp.asarray(data.batch(step)["tokens"]))["mlp"]
        for step in range(batches)
    ]
    layers = np.concatenate([np.asarray(one) for one in taken], axis=1)
    return {f"layer {i}": rows.reshape(-1, rows.shape[-1])
            for i, rows in enumerate(layers)}  # fmt: skip


def main():
    """Print and write the links of each layer and placement."""
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--batches", type=int, default=4)
    options = parser.parse_args()
    run = load_run(options.run)
    experts = run.config.model.union.num_experts
    seen, unseen = (choices_of(run, split, options.batches)
                    for split in ("train", "valid"))  # fmt: skip
    record = {**header(stated=options.commit), "experts": experts}
    record |= {"step": run.step, "rows": []}
    for wrapped in (False, True):
        graph = box_graph(SIDES, SIDES if wrapped else (0, 0))
        for name, chosen in seen.items():
            test = unseen[name][:4096]
            home = np.arange(len(test)) % graph.size
            traffic, load = co_selection(chosen, experts)
            found = place_experts(traffic, load, graph)
            orders = {
                "contiguous": np.arange(experts) // (experts // graph.size),
                "round_robin": np.arange(experts) % graph.size,
                "ours": found.device,
            }
            row = {"layer": name, "torus": wrapped, "top_k": chosen.shape[1]} | {
                how: hop_rows(test, device, graph, home)
                for how, device in orders.items()
            }
            record["rows"].append(row)
            print(format_json(row), flush=True)
    write_record(options.out, record)


if __name__ == "__main__":
    main()
