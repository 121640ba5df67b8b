"""What vectors of nested JSON tell back: accuracy against depth, beside peers.

    python benchmarks/run_search_depth.py --figure docs/images/run_search_depth.png \\
        --out benchmarks/results/run_search_depth.json --peer torch-hd=PYTHON ...

An object of 8 leaves below `depth` keys, `{"a": {"b": {... 8 leaves}}}`: is the nearest
of 1,000 values the one that was put in? Peers bind keys and values as their manuals do,
by their own operations, and run in a process of their own: `--peer NAME=PYTHON` says
with which interpreter, one that has the peer installed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LEAVES, VALUES, OBJECTS = 8, 1000, 5
DEPTHS = (1, 2, 4, 8)
DIMS = (128, 256, 512, 1024, 2048, 4096)

# bind(key vector, x), unbind(key vector, x), draw n vectors: arrays [D] and [n, D].
Algebra = tuple[Callable, Callable, Callable[[int], Any]]


def accuracy(algebra: Algebra, depth: int, to_numpy: Callable = np.asarray) -> float:
    """Return the share of leaves read back, of a peer's own operations."""
    bind, unbind, draw = algebra
    values, keys = draw(VALUES), draw(LEAVES + depth - 1)
    codes, right, random = to_numpy(values), 0, np.random.default_rng(depth)
    codes = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    for _ in range(OBJECTS):
        chosen = random.integers(VALUES, size=LEAVES)
        total = None
        for j, c in enumerate(chosen):
            term = bind(keys[j], values[int(c)])
            total = term if total is None else total + term
        for outer in range(LEAVES, LEAVES + depth - 1):
            total = bind(keys[outer], total)
        for j, c in enumerate(chosen):
            x = total
            for outer in reversed(range(LEAVES, LEAVES + depth - 1)):
                x = unbind(keys[outer], x)
            x = to_numpy(unbind(keys[j], x))
            right += int(np.argmax((codes @ np.conj(x)).real)) == c
    return right / (OBJECTS * LEAVES)


def torch_hd(dim: int, model: str) -> Algebra:
    """torch-hd's own bind, and bind with the inverse."""
    import torch
    import torchhd

    torch.manual_seed(dim)
    torch.set_num_threads(1)

    def bind(key, x):  # VTB's order: the inverse is one from the right
        return torchhd.bind(x, key)

    def unbind(key, x):
        return torchhd.bind(x, torchhd.inverse(key))

    return bind, unbind, lambda n: torchhd.random(n, dim, model)


def vsax(dim: int, model: str) -> Algebra:
    """vsax's models FHRR and MAP, made by its own factory."""
    import jax
    from vsax import create_fhrr_model, create_map_model

    made = (create_fhrr_model if model == "FHRR" else create_map_model)(dim=dim)
    key, count = jax.random.key(dim), iter(range(10**6))

    def draw(n):
        return np.asarray(made.sampler(dim, n, jax.random.fold_in(key, next(count))))

    return (
        lambda k, x: np.asarray(made.opset.bind(x, k)),
        lambda k, x: np.asarray(made.opset.unbind(x, k)),
        draw,
    )


def pyhdc(dim: int, model: str) -> Algebra:
    """pyhdc's MBAT: (x + key) M with a matrix M of its own for each key."""
    from pyhdc.components.binding import (
        InverseMatrixMultiplication,
        MatrixMultiplication,
    )

    random, matrices = np.random.default_rng(dim), {}

    def bind(key, x):
        known = matrices.get(key.tobytes())
        bound, made = MatrixMultiplication(x, key, matrices=known)
        matrices[key.tobytes()] = made
        return bound / np.linalg.norm(bound)

    def unbind(key, x):
        return InverseMatrixMultiplication(x, key, matrices=matrices[key.tobytes()])

    return bind, unbind, lambda n: random.normal(size=(n, dim)) / dim**0.5


def peer_results(name: str) -> dict[str, Any]:
    """Return a peer's accuracy by dimension and depth, and its version."""
    from importlib.metadata import version

    makers: dict[str, Any] = {
        "torch-hd": (torch_hd, ("HRR", "VTB", "FHRR", "MAP")),
        "vsax": (vsax, ("FHRR", "MAP")),
        "pyhdc": (pyhdc, ("MBAT",)),
    }
    make, models = makers[name]
    found: dict[str, Any] = {"version": version(name), "accuracy": {}}
    for model in models:
        for dim in DIMS[:4]:
            if model == "VTB" and round(dim**0.5) ** 2 != dim:  # it takes squares
                continue
            if model == "MBAT" and dim > 512:  # a matrix of dim^2 for each key
                continue
            row = [accuracy(make(dim, model), depth) for depth in DEPTHS]
            found["accuracy"].setdefault(model, {})[dim] = row
    return found


def our_results(kind: str, dim: int) -> list[float]:
    """Return our accuracy by depth: fast or Haar orthogonal, or Gaussian matrices."""
    from uoe_jax.runs.binding import HadamardOperators, MatrixOperators
    from uoe_jax.runs.vector import JsonVector

    operators = {
        "orthogonal": lambda: HadamardOperators(dim),
        "Haar orthogonal": lambda: MatrixOperators(dim),
        "random (Gaussian)": lambda: MatrixOperators(dim, orthogonal=False),
    }[kind]()
    encoder = JsonVector(dim, operators=operators)
    values = [f"value {i}" for i in range(VALUES)]
    codes = np.stack([encoder.value("text", v) for v in values])
    found = []
    for depth in DEPTHS:
        outer = [f"outer {d}" for d in range(depth - 1)]
        random, right = np.random.default_rng(depth), 0
        for _ in range(OBJECTS):
            chosen = random.integers(VALUES, size=LEAVES)
            tree: Any = {f"key {j}": values[c] for j, c in enumerate(chosen)}
            for key in reversed(outer):
                tree = {key: tree}
            x = encoder.encode(tree)[None]
            for key in outer:
                x = encoder.operators.unbind(key, x)
            for j, c in enumerate(chosen):
                held = encoder.operators.unbind(f"key {j}", x)[0]
                right += int(np.argmax(codes @ held)) == c
        found.append(right / (OBJECTS * LEAVES))
    return found


def swapped() -> dict[str, float]:
    """Return the cosine of {"a": {"b": 1}} and {"b": {"a": 1}}: 1 says they are one."""
    from uoe_jax.runs.vector import JsonVector

    a, b = JsonVector(1024).encode_many([{"a": {"b": 1}}, {"b": {"a": 1}}])
    return {"orthogonal": float(a @ b)}


def capacity() -> dict[str, float]:
    """Return the share of n leaves of one flat object that are read back."""
    from uoe_jax.runs.vector import JsonVector

    found = {}
    for dim, leaves in ((1024, 16), (1024, 32), (1024, 64), (2048, 64), (4096, 128)):
        encoder, random = JsonVector(dim), np.random.default_rng(0)
        values = [f"value {i}" for i in range(VALUES)]
        codes = np.stack([encoder.value("text", v) for v in values])
        right = 0
        for _ in range(5):
            chosen = random.integers(VALUES, size=leaves)
            vector = encoder.encode({f"k{j}": values[c] for j, c in enumerate(chosen)})
            for j, c in enumerate(chosen):
                held = encoder.unbind(vector, (f"k{j}",))[0]
                right += int(np.argmax(codes @ held)) == c
        found[f"dim {dim}, {leaves} leaves"] = right / (5 * leaves)
    return found


def draw(found: dict[str, Any], path: Path) -> None:
    """Draw accuracy against depth, a panel for each dimension."""
    from uoe_jax.report.style import LIGHT, MARKERS, styled

    with styled(LIGHT):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10.5, 3.6), layout="constrained")
        panels = figure.subplots(1, 3, sharey=True)
        for panel, dim in zip(panels, (128, 256, 512), strict=True):
            lines = {
                f"ours, {kind}": rows[str(dim)]
                for kind, rows in found["ours"].items()
                if str(dim) in rows
            }
            for name, peer in found["peers"].items():
                for model, rows in peer["accuracy"].items():
                    if str(dim) in rows:
                        lines[f"{name} {model}"] = rows[str(dim)]
            order = list(_LINES)
            for label, row in sorted(lines.items(), key=lambda i: order.index(i[0])):
                color = LIGHT.colors[order.index(label) % 8]
                panel.plot(DEPTHS, row, label=label, color=color,
                           marker=MARKERS[order.index(label) % 8], markersize=4,
                           linewidth=2.4 if "ours, orth" in label else 1.2,
                           linestyle="-" if "ours" in label else "--")  # fmt: skip
            panel.set_title(f"{dim} dimensions")
            panel.set_xlabel("depth (keys above a value)")
            panel.set_ylim(-0.03, 1.03)
        panels[0].set_ylabel("values read back")
        handles = {}
        for panel in panels:
            handles |= dict(zip(*panel.get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles.keys(), loc="outside right", fontsize=8)
        figure.savefig(path, dpi=110, metadata={"Software": None})


_LINES = (
    "ours, orthogonal", "ours, random (Gaussian)", "ours, Haar orthogonal",
    "torch-hd HRR", "torch-hd VTB", "torch-hd FHRR", "torch-hd MAP", "vsax FHRR",
    "vsax MAP", "pyhdc MBAT",
)  # fmt: skip


def main() -> None:
    """Measure, print, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--peer", action="append", default=[])
    parser.add_argument("--only")  # a peer, in its own process
    parser.add_argument("--draw", action="store_true")  # --out again, measured before
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(options.out.read_text()), options.figure)
        return
    if options.only:
        print(json.dumps(peer_results(options.only)))
        return
    from run_search import about

    start = time.process_time()
    kinds = ("orthogonal", "Haar orthogonal", "random (Gaussian)")
    ours = {
        kind: {
            str(dim): our_results(kind, dim)
            for dim in DIMS
            if kind == "orthogonal" or dim <= (512 if "random" in kind else 256)
        }
        for kind in kinds
    }
    peers = {}
    for peer in options.peer:
        name, _, python = peer.partition("=")
        done = subprocess.run(
            [python, __file__, "--only", name], capture_output=True, text=True
        )
        if done.returncode:
            print(f"{name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        peers[name] = json.loads(done.stdout.splitlines()[-1])
    found = {
        "about": about(("numpy",)),
        "leaves": LEAVES, "values": VALUES, "objects": OBJECTS, "depths": DEPTHS,
        "ours": ours, "peers": peers, "capacity": capacity(), "swapped": swapped(),
        "processor_seconds": time.process_time() - start,
    }  # fmt: skip
    text = json.dumps(found, indent=1) + "\n"
    print(text)
    if options.out:
        options.out.write_text(text)
    if options.figure:
        draw(json.loads(text), options.figure)


if __name__ == "__main__":
    main()
