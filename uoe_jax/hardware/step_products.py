"""The matrix products of one device in one training step. Imports no jax.

Each stands with how often it is made. A weight [I, O] takes a product forward, one for
the gradient of its input and one for its own; forward ones again where
rematerialisation makes them twice.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.hardware.count import DTYPE_BYTES, num_tokens
from uoe_jax.hardware.gemm import GemmModel, choose_tile
from uoe_jax.hardware.product import Product
from uoe_jax.hardware.work import layer_groups, loss_bytes, tokens_per_device

# FLOPs in the time of a byte, measured on an H100: Triton's products, cuBLAS's.
TRITON_RATE, DENSE_RATE = 230, 300
# The dense sum is taken where it is this much cheaper: it needs more memory.
DENSE_GAIN = 0.85
# Kinds of layers whose products are listed here; others keep their share of the peak.
KNOWN = {"attention": ("dense", "union", "moba"), "mlp": ("dense", "union", "moe")}
Counted = tuple[str, Product, float]  # kind of work, product, times in a step


@dataclass(frozen=True)
class _Part:
    """What the products of one part of a layer share."""

    kind: str  # of work
    tokens: int  # of one microbatch on one device
    dtype: str
    forward: float  # times in a step
    backward: float

    def dense(self, inner: int, outer: int, again: bool = True) -> Iterator[Counted]:
        """Yield the products of a dense weight; `again`: remade on the way back."""
        common: dict[str, Any] = {"dtype": self.dtype}
        forward = self.forward if again else self.backward
        rows = self.tokens
        yield self.kind, Product(m=rows, n=outer, k=inner, **common), forward
        turned = Product(m=rows, n=inner, k=outer, layout="nt", **common)
        yield self.kind, turned, self.backward
        weights = Product(m=inner, n=outer, k=rows, layout="tn", **common)
        yield self.kind, weights, self.backward

    def routed(
        self, width: int, columns: int, inner: int, experts: int, rows: int,
        last: bool,
    ) -> Iterator[Counted]:  # fmt: skip
        """Yield the products of experts: [width, columns] in, [inner, width] out.

        `last`: the way out isn't remade in the backward pass.
        """
        make = functools.partial(
            _grouped, groups=experts, dtype=self.dtype, tokens=self.tokens
        )
        kind, forward, back = self.kind, self.forward, self.backward
        yield kind, make("products", rows, columns, width, "nn", "x"), forward
        yield kind, make("weight_grads", width, columns, rows, "tn", "x"), back
        yield kind, self._sum(rows, width, columns, experts, "nt"), back
        out = back if last else forward
        yield kind, self._sum(rows, width, inner, experts, "nn"), out
        yield kind, make("products", rows, inner, width, "nt", "x"), back
        yield kind, make("weight_grads", inner, width, rows, "tn", "grad"), back

    def _sum(self, rows: int, width: int, inner: int, experts: int, layout: str):
        """Return the product whose rows are summed into tokens."""
        size = 2 if self.dtype == "bfloat16" else 4
        if dense_pays(rows, self.tokens, experts, inner, width, size):
            depth = experts * inner
            return Product(m=self.tokens, n=width, k=depth, dtype=self.dtype)
        return _grouped(
            "products", rows, width, inner, layout, "", experts, self.dtype, 0
        )


def _grouped(
    kernel: str, m: int, n: int, k: int, layout: str, gather: str, groups: int,
    dtype: str, tokens: int,
) -> Product:  # fmt: skip
    tile = (128, 64, 256, 8, 8, 4, 0, 0)  # until the fastest is chosen
    return Product(
        m=m, n=n, k=k, groups=groups, dtype=dtype, layout=layout, kernel=kernel,
        tile=tile, gather=gather, tokens=tokens if gather else 0,
    )  # fmt: skip


def dense_pays(
    num_rows: int, num_tokens: int, groups: int, inner: int, outer: int, size: int
) -> bool:
    """Return whether a sum of rows is clearly faster as one dense product.

    In bytes a token, a product counted as what is moved in its time: X products of its
    rows, written and read, beside one of depth EI, its E rows written and X of them
    read. `size` is bytes of a number; float32 keeps its products of three.
    """
    if size != 2:
        return False
    picks = num_rows / num_tokens
    steps = picks * outer * (2 * inner / TRITON_RATE + 4)
    dense = inner * (2 * groups * outer / DENSE_RATE + 2 * (groups + picks))
    return dense < DENSE_GAIN * steps


def step_products(
    config: ExperimentConfig, sizes: Mapping[str, int]
) -> list[Counted] | None:
    """Return a step's products at balanced load; None for layers not listed here."""
    model = config.model
    kinds = layer_groups(model)
    for _, attention, mlp in kinds:
        if attention not in KNOWN["attention"] or mlp not in KNOWN["mlp"]:
            return None
    if (
        model.output_gate
        or model.kind != "decoder"
        or any(block == "mod" for block in model.block_kinds)
    ):
        return None
    steps = config.train.accumulate
    tokens = max(1, round(tokens_per_device(config, sizes) / steps))
    again = 2.0 if model.recompute == "full" else 1.0
    found: list[Counted] = []
    for (own, attention, mlp), layers in kinds.items():
        count = float(layers * steps)
        for name, kind in (("attention", attention), ("mlp", mlp)):
            routed = "routed products" if kind in ("union", "moe") else "products"
            part = _Part(routed, tokens, model.compute_dtype, again * count, count)
            make = _attention if name == "attention" else _mlp
            found += make(own, kind, part, sizes["tensor"])
        part = _Part("products", tokens, model.compute_dtype, again * count, count)
        for group in own.beside.values():
            found += _attention(group, "dense", part, sizes["tensor"])
    found += _output(config, tokens, sizes["tensor"])
    return found


def _attention(
    model: ModelConfig, kind: str, part: _Part, tensor: int
) -> Iterator[Counted]:
    width, heads = model.d_model, model.num_heads
    queries, keys = heads * model.key_dim, model.num_kv_heads * model.key_dim
    if kind == "union":
        union = model.union_for("attention")
        local = max(1, union.num_experts // tensor)
        rows = max(1, part.tokens * union.top_k // tensor)
        own = queries // union.num_experts
        columns = own + 2 * keys // union.num_experts
        yield from part.routed(width, columns, own, local, rows, last=False)
        return
    values = model.num_kv_heads * model.value_dim
    for outer in (queries, keys, values):
        yield from part.dense(width, max(1, outer // tensor))
    yield from part.dense(heads * model.value_dim // tensor, width)


def _mlp(model: ModelConfig, kind: str, part: _Part, tensor: int) -> Iterator[Counted]:
    width, into = model.d_model, 2 if model.activation == "swiglu" else 1
    if kind == "dense":
        wide = model.d_ff // tensor
        for name in ("w_up", "w_gate")[:into]:
            for inner, outer in _pair(width, wide, model.rank(name)):
                yield from part.dense(inner, outer)
        pair = _pair(wide, width, model.rank("w_down"))
        for number, (inner, outer) in enumerate(pair, 1):
            yield from part.dense(inner, outer, again=number < len(pair))
        return
    routed: Any = model.moe if kind == "moe" else model.union
    wide = model.d_expert if kind == "moe" else model.d_ff // routed.num_experts
    local = max(1, routed.num_experts // tensor)
    rows = max(1, part.tokens * routed.top_k // tensor)
    yield from part.routed(width, into * wide, wide, local, rows, last=True)


def _pair(inner: int, outer: int, rank: int) -> list[tuple[int, int]]:
    """Return the sizes of a product's one matrix, or of its two of low rank."""
    return [(inner, rank), (rank, outer)] if rank else [(inner, outer)]


def _output(config: ExperimentConfig, tokens: int, tensor: int) -> Iterator[Counted]:
    """Yield the output layer's products, a chunk of tokens at a time."""
    model = config.model
    own = max(1, tokens // tensor)
    chunk = min(config.train.loss_chunk, own)
    times = config.train.accumulate * own / chunk
    part = _Part("output", chunk, model.compute_dtype, times, times)
    yield from part.dense(model.d_model, model.vocab_size)


def chosen_products(
    config: ExperimentConfig, sizes: Mapping[str, int], model: GemmModel
) -> list[Counted] | None:
    """Return a step's products, grouped ones with the tile predicted fastest.

    None where they aren't listed, or of kernels that the model wasn't fitted to.
    """
    counted = step_products(config, sizes)
    if counted is None or any(p.kernel not in model.trees for _, p, _ in counted):
        return None
    return [(kind, _best(model, product), times) for kind, product, times in counted]


def product_seconds(
    config: ExperimentConfig, sizes: Mapping[str, int], model: GemmModel
) -> dict[str, float] | None:
    """Return the seconds of a step's products by kind of work; None as above."""
    counted = chosen_products(config, sizes, model)
    if counted is None:
        return None
    median, _, _ = model.seconds([product for _, product, _ in counted])
    found: dict[str, float] = {}
    for (kind, _, times), seconds in zip(counted, median.tolist(), strict=True):
        found[kind] = found.get(kind, 0.0) + times * seconds
    return found


# Attention's time over its FLOPs at the peak, by the length of what attends together:
# an H200, head width 128, both passes, 2048 and 8192 tokens, whole and packed.
_SCORES, _SCORES_SHORT = 2.1, 2500.0
# Bytes a token and routed part in routers, top-k and packing, both passes, of profiled
# steps: a width of 512 with 2 of 8 and 8 of 32 experts, 2048 with 8 of 16.
_ROUTER_WIDTH, _ROUTER_PICK = 16.0, 1500.0


def score_factors(config: ExperimentConfig) -> dict[str, float]:
    """Return how much longer scores take than at the peak, by kind of work."""
    model = config.model
    length = float(num_tokens(model, config.seq_len))
    union = model.union_for("attention")
    part = length * union.top_k / union.num_experts
    factor = lambda tokens: _SCORES + _SCORES_SHORT / max(tokens, 64.0)
    return {"scores": factor(length), "routed scores": factor(part)}


def moved_bytes(config: ExperimentConfig, sizes: Mapping[str, int]) -> float:
    """Return the bytes of a step's passes over memory on one device.

    Norms and residuals, activation, rotation of heads; of routed parts the rows added
    up, the routers and their packing; the output layer's logits.
    """
    model, total = config.model, 0.0
    tokens = tokens_per_device(config, sizes)
    size = DTYPE_BYTES[model.compute_dtype]
    tensor = sizes["tensor"]
    for (own, attention, mlp), layers in layer_groups(model).items():
        again = 1 if model.recompute == "full" else 0  # the forward pass once more
        numbers = (24 + 8 * again) * model.d_model
        union, heads = model.union_for("attention"), model.num_heads
        kept = union.top_k / union.num_experts if attention == "union" else 1.0
        heads = (heads + model.num_kv_heads) * (own.key_dim + own.value_dim)
        heads *= kept / tensor
        numbers += (2.5 + again) * heads
        both, forward = (8, 3) if model.activation == "swiglu" else (5, 2)
        numbers += (both + forward * again) * _hidden(own, mlp) / tensor
        if model.scan_layers and not again:
            # A scan copies what the backward pass needs into a stack of all layers.
            numbers += 3 * (2 * model.d_model + heads + 3 * _hidden(own, mlp) / tensor)
        if config.layout.dispatches and tensor > 1 and mlp in ("union", "moe"):
            # Tokens laid out to be sent, and in their places: there and back.
            numbers += (16 + 4 * again) * model.d_model
        moved = numbers * size
        for kind, picks in ((attention, union.top_k), (mlp, _picks(model, mlp))):
            if kind in ("union", "moe"):
                sums = 2 if kind == attention else 2 + again
                moved += sums * (picks / tensor + 1) * model.d_model * size
                moved += _ROUTER_WIDTH * model.d_model + _ROUTER_PICK * picks
        total += layers * moved * tokens
    return total + loss_bytes(config, tokens / tensor)


def _picks(model: ModelConfig, mlp: str) -> int:
    return model.moe.top_k if mlp == "moe" else model.union.top_k


def _hidden(model: ModelConfig, mlp: str) -> float:
    """Return the hidden neurons that a token uses."""
    if mlp == "moe":
        return float(model.d_expert * model.moe.top_k)
    return model.d_ff * (model.union.keep if mlp == "union" else 1.0)


def _best(model: GemmModel, product: Product) -> Product:
    """Return a grouped product with the tile that is predicted fastest."""
    if product.tile is None:
        return product
    key = (id(model), product)
    if key not in _CHOSEN:
        tiles = model.tiles[product.kernel]
        _CHOSEN[key] = replace(product, tile=choose_tile(model, product, tiles))
    return _CHOSEN[key]


_CHOSEN: dict[Any, Product] = {}
