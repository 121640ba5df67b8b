"""Which products `uoe bench gemm` times: presets' own and a random grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from uoe_jax.hardware.count import DTYPE_BYTES
from uoe_jax.ops import measured
from uoe_jax.ops.grouped_matmul.nvidia.tiles import (
    CANDIDATES,
    Tiles,
    choose_tiles,
    cut_tiles,
)

# Float32 is three products of halves: its tiles hold half as much.
WIDE = {
    "products": (Tiles(128, 32, 128, 8, 8, 3), Tiles(64, 32, 128, 8, 4, 3)),
    "weight_grads": (Tiles(32, 128, 128, 8, 8, 3), Tiles(32, 64, 128, 8, 4, 3)),
}
WIDTHS = (64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048, 2560,
          3072, 4096, 5120, 6144, 8192, 11008, 14336)  # fmt: skip
TOKENS = (2048, 4096, 8192, 12288, 16384, 24576, 32768, 49152, 65536)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One product to time. Sizes as `hardware.product.Product`'s.

    op: dot and ragged_dot are XLA's; products and weight_grads our grouped kernels.
    gather: "" none, else the operand whose rows are picked: x or grad. tokens: rows of
    that operand. seed: of the groups' sizes; -1: all equal.
    """

    op: str = "dot"
    m: int = 1
    n: int = 1
    k: int = 1
    groups: int = 1
    dtype: str = "bfloat16"
    layout: str = "nn"
    gather: str = ""
    tokens: int = 0
    seed: int = -1
    meter: bool = False
    label: str = ""

    @property
    def rows(self) -> int:
        """Rows that are dealt over the groups."""
        return self.k if self.layout == "tn" else self.m

    def group_sizes(self) -> np.ndarray:
        """Return the rows of every group."""
        if self.groups == 1:
            return np.asarray([self.rows])
        share = np.full(self.groups, 1 / self.groups)
        if self.seed >= 0:
            rng = np.random.default_rng(self.seed)
            share = rng.dirichlet(np.full(self.groups, 8.0))
        ends = np.floor(np.cumsum(share) * self.rows).astype(int)
        ends[-1] = self.rows
        return np.diff(ends, prepend=0)

    def operand_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of x and w, or of x and the gradient of weight_grads."""
        m, n, k, groups = self.m, self.n, self.k, self.groups
        if self.op == "weight_grads":
            x = self.tokens if self.gather == "x" else k
            grad = self.tokens if self.gather == "grad" else k
            return (x, m), (grad, n)
        if self.op == "dot":
            left = (k, m) if self.layout == "tn" else (m, k)
            return left, ((n, k) if self.layout == "nt" else (k, n))
        rows = self.tokens if self.gather else m
        return (rows, k), (groups, *((n, k) if self.layout == "nt" else (k, n)))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, and the sizes of the groups."""
        found = dataclasses.asdict(self)
        del found["meter"]
        if self.groups > 1:
            found["sizes"] = self.group_sizes().tolist()
        return found


def draw_ids(case: Case) -> list[np.ndarray]:
    """Return offsets of the groups and the rows picked; nothing for a dense product.

    A group's picks are some of the tokens in order, as packing leaves them.
    """
    if case.op == "dot":
        return []
    sizes = case.group_sizes()
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)
    if not case.gather:
        return [offsets, np.arange(case.rows, dtype=np.int32)]
    rng = np.random.default_rng(case.rows)
    picks = [
        np.sort(rng.choice(case.tokens, size, replace=size > case.tokens))
        for size in sizes
    ]
    return [offsets, np.concatenate(picks).astype(np.int32)]


def tuned_shape(case: Case) -> dict[str, Any]:
    """Return a grouped case as the shape that the tile tables know."""
    shape = {"rows": case.rows, "dtype": case.dtype, "groups": case.groups}
    if case.op == "weight_grads":
        return shape | {
            "inner": case.m,
            "outer": case.n,
            "gather": case.gather or "none",
        }
    shape |= {"inner": case.k, "outer": case.n, "gather": bool(case.gather)}
    return shape | {"transpose": case.layout == "nt"}


def candidates(case: Case) -> list[Tiles | None]:
    """Return the tiles to time; the first is the nearest in the tables of tiles."""
    if case.op in ("dot", "ragged_dot"):
        return [None]
    shape = tuned_shape(case)
    known = measured.tiles(case.op, shape)
    first = choose_tiles(case.op, shape) if known is None else Tiles(**known)
    tried = (WIDE if case.dtype == "float32" else CANDIDATES)[case.op]
    cut = [cut_tiles(tile, shape) for tile in (first, *tried)]
    return list(dict.fromkeys(cut))


def random_cases(count: int, seed: int = 0) -> Iterator[Case]:
    """Yield products drawn from a log grid: seven in ten sides are presets' widths."""
    rng = np.random.default_rng(seed)
    while count:
        case = _grouped(rng) if rng.random() < 0.55 else _dense(rng)
        if case is not None and worth_timing(case):
            count -= 1
            yield case


# Products of fewer microseconds at the card's rates are mostly their own start.
LEAST_SECONDS, MOST_SECONDS = 10e-6, 4e-3
MOST_BYTES = 2.2e9  # of one set of operands and its result


def worth_timing(case: Case) -> bool:
    """Return whether a product is neither too short nor too long or large to time."""
    size = DTYPE_BYTES[case.dtype]
    held = sum(math.prod(shape) for shape in case.operand_shapes())
    held += case.m * case.n * (case.groups if case.layout == "tn" else 1)
    ideal = 2.0 * case.m * case.n * case.k / (7e14 if size == 2 else 3e14)
    if case.op == "ragged_dot":
        ideal *= 10
    if case.op in ("products", "weight_grads") and size == 4:
        ideal *= 4
    ideal = max(ideal, held * size / 4.2e12)
    return held * size < MOST_BYTES and LEAST_SECONDS < ideal < MOST_SECONDS


def _side(rng: np.random.Generator, low: int, high: int) -> int:
    if rng.random() < 0.7:
        return int(rng.choice([w for w in WIDTHS if low <= w <= high]))
    drawn = float(np.exp(rng.uniform(np.log(low), np.log(high))))
    step = int(rng.choice([8, 64, 128]))
    return max(step, round(drawn / step) * step)


def _dense(rng: np.random.Generator) -> Case | None:
    layout = str(rng.choice(["nn", "nt", "tn"]))
    tokens = int(rng.choice(TOKENS))
    if rng.random() < 0.2:
        tokens = int(2 ** rng.integers(0, 11))
    if rng.random() < 0.1:
        tokens -= tokens // 9
    a, b = _side(rng, 64, 14336), _side(rng, 64, 14336)
    m, n, k = (a, b, tokens) if layout == "tn" else (tokens, a, b)
    if layout == "tn" and tokens < 512:
        return None
    dtype = "float32" if rng.random() < 0.18 else "bfloat16"
    meter = bool(rng.random() < 0.08)
    return Case(op="dot", m=m, n=n, k=k, dtype=dtype, layout=layout, meter=meter)


def _grouped(rng: np.random.Generator) -> Case | None:
    groups = int(2 ** rng.integers(1, 8))
    rows = int(2 ** rng.integers(10, 18)) * int(rng.choice([2, 3])) // 2
    inner, outer = _side(rng, 64, 4096), _side(rng, 64, 4096)
    if rows // groups < 32 or groups * inner * outer > 5e8:
        return None
    common: dict[str, Any] = {"groups": groups, "seed": int(rng.integers(0, 1000))}
    if rng.random() < 0.25:
        common["seed"] = -1
    tokens = rows // int(rng.choice([1, 2, 4, 8]))
    dtype = "float32" if rng.random() < 0.05 else "bfloat16"
    meter = bool(rng.random() < 0.06)
    common |= {"dtype": dtype, "meter": meter}
    if dtype == "bfloat16" and rng.random() < 0.06:
        return Case(op="ragged_dot", m=rows, n=outer, k=inner, **common)
    if rng.random() < 0.35:
        gather = str(rng.choice(["", "x", "grad"]))
        tokens = tokens if gather else 0
        return Case(
            op="weight_grads", m=inner, n=outer, k=rows, layout="tn", gather=gather,
            tokens=tokens, **common,
        )  # fmt: skip
    gather = str(rng.choice(["", "x"]))
    layout = str(rng.choice(["nn", "nt"]))
    tokens = tokens if gather else 0
    return Case(
        op="products", m=rows, n=outer, k=inner, layout=layout, gather=gather,
        tokens=tokens, **common,
    )  # fmt: skip


def preset_cases() -> Iterator[Case]:
    """Yield the dense products of training steps of presets under plain layouts."""
    for tokens in (8192, 16384, 32768):
        for model, mlp, wide in ((2048, 6144, 32768), (768, 3072, 50304),
                                 (4096, 14336, 32768)):  # fmt: skip
            for tensor in (1, 2):
                for a, b in ((model, model // tensor), (model, 2 * mlp // tensor),
                             (mlp // tensor, model)):  # fmt: skip
                    if 2.0 * tokens * a * b > 4e12:
                        continue
                    yield Case(op="dot", m=tokens, n=b, k=a, label="preset")
                    if tensor == 1 and tokens == 16384:
                        yield Case(op="dot", m=tokens, n=a, k=b, layout="nt",
                                   label="preset")  # fmt: skip
                        yield Case(op="dot", m=a, n=b, k=tokens, layout="tn",
                                   label="preset")  # fmt: skip
            if tokens == 16384 and model < 4096:
                yield Case(op="dot", m=tokens, n=wide, k=model, label="preset")


def union_cases(
    d_model: int, d_ff: int, experts: int, picks: int, tokens: int, label: str
) -> Iterator[Case]:
    """Yield the grouped products of a SwiGLU union's MLP, forward and backward."""
    rows, width = tokens * picks, d_ff // experts
    common: dict[str, Any] = {"groups": experts, "seed": 1, "label": label}
    picked: dict[str, Any] = {"gather": "x", "tokens": tokens}
    make = lambda op, m, n, k, layout, **more: Case(
        op=op, m=m, n=n, k=k, layout=layout, **common, **more
    )
    yield make("products", rows, 2 * width, d_model, "nn", **picked)
    yield make("products", rows, d_model, width, "nn")
    yield make("products", rows, width, d_model, "nt", **picked)
    yield make("products", rows, d_model, 2 * width, "nt")
    yield make("weight_grads", d_model, 2 * width, rows, "tn", **picked)
    yield make("weight_grads", width, d_model, rows, "tn", gather="grad", tokens=tokens)


# Unions that no table was measured for: width, MLP, experts, picks, tokens.
UNTUNED = (
    (1536, 4608, 12, 6, 16384, "untuned a"),
    (1024, 8192, 32, 8, 16384, "untuned b"),
    (2560, 10240, 20, 5, 8192, "untuned c"),
)


# The presets' own: 1b-union, 7b-union, and finer ones.
UNIONS = (
    (2048, 6144, 16, 8, 16384, "preset"),
    (4096, 14336, 8, 4, 8192, "preset"),
    (768, 3072, 6, 3, 32768, "preset"),
)
# Width, an expert's columns of queries, keys and values, its heads', experts, picks.
HEADS = ((2048, 384, 128, 16, 8), (4096, 768, 512, 8, 4))


def head_cases(
    d_model: int, columns: int, width: int, experts: int, picks: int, tokens: int
) -> Iterator[Case]:
    """Yield the grouped projections of a union's attention, forward and backward."""
    rows = tokens * picks
    common: dict[str, Any] = {"groups": experts, "seed": 1, "label": "preset"}
    picked: dict[str, Any] = {"gather": "x", "tokens": tokens}
    calls: tuple[tuple[Any, ...], ...] = (
        ("products", rows, columns, d_model, "nn", picked),
        ("products", rows, d_model, width, "nn", {}),
        ("products", rows, width, d_model, "nt", picked),
        ("products", rows, d_model, columns, "nt", {}),
        ("weight_grads", d_model, columns, rows, "tn", picked),
        ("weight_grads", width, d_model, rows, "tn", {**picked, "gather": "grad"}),
    )
    for op, m, n, k, layout, more in calls:
        yield Case(op=op, m=m, n=n, k=k, layout=layout, **common, **more)


def all_cases(count: int, seed: int = 0) -> list[Case]:
    """Return the sweep: untuned unions, presets, then `count` random products, mixed.

    The order is random, so that a sweep cut short still covers everything.
    """
    first = [case for union in UNTUNED for case in union_cases(*union)]
    first += [case for union in UNIONS for case in union_cases(*union)]
    first += [case for heads in HEADS for case in head_cases(*heads, 16384)]
    rest = [*preset_cases(), *random_cases(count, seed)]
    np.random.default_rng(seed).shuffle(rest)  # type: ignore[arg-type]
    return list(dict.fromkeys([*first, *rest]))
