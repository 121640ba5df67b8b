"""One layer made smaller here and by another implementation of MoDeGPT.

    python benchmarks/compress_peers.py --peer CLONE --peer-python PYTHON --out FILE

CLONE is https://github.com/cbacary/MoDeGPT, PYTHON an interpreter with torch and numpy,
which runs this script with `--theirs`. Both get the same weights and the same moments
of drawn tokens, in float64, and the same ridge for the neurons' scores. Reported are
squared errors of what the layer writes, as shares, on the tokens that the moments are
of: of an MLP that keeps what the other's ratio leaves, of values of one query head and
of three that share them, and of attention's scores with half of a head's pairs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import numpy as np

D, F, H, GROUPS, TOKENS = 48, 96, 16, 3, 2000
KEPT, RANK = 0.7, 10  # of the neurons; of a head's values
Arrays = dict[str, np.ndarray]


def draw(seed: int) -> Arrays:
    """Return drawn tokens and a layer's weights, some inputs larger than others."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(TOKENS, D)) @ rng.normal(size=(D, D)) / 7
    uneven = lambda *shape: rng.uniform(0.2, 2, shape)
    found = {"x": x * rng.uniform(0.3, 2, (1, D))}
    found |= {"up": rng.normal(size=(D, F)) / 7, "gate": rng.normal(size=(D, F)) / 7}
    found |= {"down": rng.normal(size=(F, D)) / 10, "wv": rng.normal(size=(D, H))}
    found |= {"wo": rng.normal(size=(GROUPS, H, D))}
    found |= {"wq": rng.normal(size=(GROUPS, D, H)) * uneven(GROUPS, 1, H)}
    return found | {"wk": rng.normal(size=(D, H)) * uneven(1, H)}


def turned(y: np.ndarray) -> np.ndarray:
    """Return a head's queries or keys, rotated to positions 0 to 127, and again."""
    half = H // 2
    angle = (np.arange(len(y)) % 128)[:, None] * 1e4 ** (-np.arange(half) / half)[None]
    a, b, cos, sin = y[:, :half], y[:, half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=1)


def shown(layer: Arrays, ridge: float) -> Arrays:
    """Return the weights and moments that both implementations read."""
    x, gated = layer["x"], layer["x"] @ layer["gate"]
    neurons = gated / (1 + np.exp(-gated)) * (x @ layer["up"])
    queries = [turned(x @ w) for w in layer["wq"]]
    keys, moment = turned(x @ layer["wk"]), lambda a: a.T @ a
    found = {"neurons": neurons, "cz": moment(neurons), "cx": moment(x)}
    found |= {"cq": np.stack([moment(q) for q in queries]), "ck": moment(keys)}
    scale = ridge * np.trace(found["cz"]) / F
    return layer | found | {"ridge": np.asarray(scale)}


def theirs(given: Path, out: Path) -> None:
    """Write what the other implementation makes of a layer. Runs in its interpreter."""
    import torch

    torch.bfloat16 = torch.float64  # to which it would round what it returns
    utils, adapter = types.ModuleType("src.model_utils"), types.ModuleType("adapter")
    for name in ("dtype_p", "dtype_f"):
        setattr(utils, name, torch.float64)
    for name, value in {"d1": "cpu", "d2": "cpu", "parallel": False,
                        "conservative": True}.items():  # fmt: skip
        setattr(utils, name, value)
    for name in ("ModelAdapter", "MLPComponents"):
        setattr(adapter, name, object)
    sys.modules["src.model_utils"] = utils
    sys.modules["src.adapters.model_adapter"] = adapter
    from src.compression import compress_mlp, compress_qk, compress_vo
    from src.compression_utils import sqrt_M

    z = np.load(given)
    tensor = lambda name: torch.tensor(z[name])
    weight = lambda name: types.SimpleNamespace(weight=tensor(name).T)
    mlp = types.SimpleNamespace(
        up_proj=weight("up"), gate_proj=weight("gate"), down_proj=weight("down")
    )
    up, down, _, rank = compress_mlp.compress_weights(
        mlp, tensor("cz"), KEPT, 0, float(z["ridge"])
    )
    found = {"up": up.numpy(), "down": down.numpy(), "rank": rank}
    root = sqrt_M(tensor("cx"), ridge_lambda=1e-10)
    same = {"head_dim": H, "W_v": tensor("wv").T, "sqrt_C": root, "arch": "llama"}
    same |= {"inv_sqrt_C": torch.linalg.inv(root), "slice_dims": True}
    outputs = torch.tensor(z["wo"]).reshape(GROUPS * H, D)
    values, outs = [], []
    compress_vo.compress_head(
        head_idx=0, rank_i=RANK, W_o=outputs[:H].T,
        new_heads_V=values, new_heads_O=outs, **same,
    )  # fmt: skip
    found |= {"v1": values[0].numpy().T, "o1": outs[0].numpy().T[None]}
    values, outs = [], []
    compress_vo.compress_head_grouped(
        kv_head_idx=0, kv_head_ratio=GROUPS, rank=RANK, W_o=outputs.T,
        new_heads_V=values, new_heads_O=outs, **same,
    )  # fmt: skip
    found |= {"v3": values[0].numpy().T, "o3": np.stack([o.numpy().T for o in outs])}
    masks: list[Any] = []
    compress_qk.compress_head_llama_grouped(
        kv_head_idx=0, kv_head_ratio=GROUPS,
        cov_q_layer=list(tensor("cq")), cov_k_layer=[tensor("ck")],
        Wq_heads=tensor("wq").transpose(1, 2), Wk_heads=tensor("wk").T[None],
        Q_heads_out=[], K_heads_out=[], layer_rotary_mask=masks, rank=RANK,
        ridge_lambda=1e-10,
    )  # fmt: skip
    np.savez(out, pairs=np.sort(masks[0].numpy()[: RANK // 2]), **found)


def error(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return a squared error as a share of what is wanted."""
    return float(np.square(found - wanted).sum() / np.square(wanted).sum())


def compare(z: Arrays, peer: Arrays) -> dict[str, Any]:
    """Return the errors of both, and how far the fitted MLPs are apart."""
    from uoe_jax.compress.order import best_first, leverage_scores, make_lift
    from uoe_jax.compress.query_key import kept_pairs, pair_scores
    from uoe_jax.compress.value_output import value_basis

    rank, order = int(peer["rank"]), best_first(leverage_scores(z["cz"]))
    kept = np.sort(order[:rank])
    down = make_lift(z["cz"], z["down"], order).weights(rank)[np.argsort(order[:rank])]
    wanted, neurons = z["neurons"] @ z["down"], z["neurons"][:, kept]
    row: dict[str, Any] = {
        "same_neurons": bool(np.allclose(peer["up"], z["up"][:, kept])),
        "down_apart": float(np.abs(down - peer["down"]).max() / np.abs(down).max()),
        "mlp": [error(neurons @ w, wanted) for w in (down, peer["down"])],
    }
    values = z["x"] @ z["wv"]
    for heads in (1, GROUPS):
        outs = z["wo"][:heads]
        write = lambda v, o: np.concatenate([v @ part for part in o], axis=1)
        basis = value_basis(values.T @ values, outs)
        ours = write(values @ basis.into[:, :RANK], basis.out[:, :RANK])
        other = write(z["x"] @ peer[f"v{heads}"], peer[f"o{heads}"])
        wanted = write(values, outs)
        row[f"values_{heads}"] = [error(y, wanted) for y in (ours, other)]
    queries, keys = [z["x"] @ w for w in z["wq"]], z["x"] @ z["wk"]
    squares = np.stack([np.square(q).sum(0) for q in queries])[None]
    scores = pair_scores(squares, np.square(keys).sum(0)[None], True)
    row["pairs"] = []
    for pairs in (kept_pairs(scores, RANK // 2)[0], peer["pairs"]):
        dims = np.concatenate([pairs, pairs + H // 2])
        rest = np.setdiff1d(np.arange(H), dims)
        lost = [np.square(turned(q)[:, rest] @ turned(keys)[:, rest].T).sum()
                for q in queries]  # fmt: skip
        total = [np.square(turned(q) @ turned(keys).T).sum() for q in queries]
        row["pairs"].append(float(sum(lost) / sum(total)))
    return row


def main() -> None:
    """Compare on each drawn layer; write and print errors, ours and the other's."""
    from uoe_jax.bench.record import arguments, header, write_record
    from uoe_jax.compress.order import LEVERAGE_RIDGE

    parser = arguments(__doc__)
    parser.add_argument("--peer", type=Path, required=True, help="its clone")
    parser.add_argument("--peer-python", required=True, help="has torch and numpy")
    parser.add_argument("--seeds", type=int, default=10)
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        given, out = Path(folder) / "in.npz", Path(folder) / "out.npz"
        for seed in range(args.seeds):
            layer = shown(draw(seed), LEVERAGE_RIDGE)
            np.savez(given, **layer)
            words = [args.peer_python, __file__, "--theirs", given, out]
            found = os.environ | {"PYTHONPATH": str(args.peer)}
            subprocess.run(words, check=True, env=found, stdout=subprocess.DEVNULL)
            rows.append({"seed": seed, **compare(layer, dict(np.load(out)))})
            print(rows[-1], flush=True)
    if args.out is not None:
        told = "python benchmarks/compress_peers.py --peer CLONE --peer-python PYTHON"
        write_record(args.out, header(told, args.commit) | {"rows": rows})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--theirs"]:
        theirs(*map(Path, sys.argv[2:]))
    else:
        main()
