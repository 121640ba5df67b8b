"""Other libraries' attention and grouped matmul, where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import jax

from uoe_jax.bench.timing import Row, median_seconds


def load(module: str) -> Any:
    """Return a peer's module, or why there is none as a string."""
    try:
        return importlib.import_module(module)
    except Exception as error:  # whatever a peer's import runs into is its answer
        return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def attention_peers(causal: bool) -> dict[str, Callable | str]:
    """Return functions of (q, k, v) [B, T, N, H] in jax, or a reason, by peer."""
    tokamax = load("tokamax")
    jla = load("jla.ops.mosaic_gpu.attention")

    def of_tokamax(implementation: str) -> Callable | str:
        if isinstance(tokamax, str):
            return tokamax
        return lambda q, k, v: tokamax.dot_product_attention(
            q, k, v, is_causal=causal, implementation=implementation
        )

    linear = jla if isinstance(jla, str) else None
    if linear is None and not causal:
        linear = "it is causal only"
    return {
        "tokamax mosaic": of_tokamax("mosaic"),
        "tokamax triton": of_tokamax("triton"),
        "jax-linear-attention": linear
        or (lambda q, k, v: jla.flash_attention(q, k, v, backward="fused")),
    }


def matmul_peers() -> dict[str, Callable | str]:
    """Return functions of (x [M, I], w [E, I, O], sizes [E]), or a reason, by peer."""
    tokamax = load("tokamax")
    jla = load("jla.ops.mosaic_gpu.ragged_dot")
    peers: dict[str, Callable | str] = {"jax.lax.ragged_dot": jax.lax.ragged_dot}
    peers["tokamax mosaic"] = (
        tokamax
        if isinstance(tokamax, str)
        else lambda x, w, sizes: tokamax.ragged_dot(
            x, w, sizes, implementation="mosaic"
        )
    )
    peers["jax-linear-attention"] = (
        jla
        if isinstance(jla, str)
        else lambda x, w, sizes: jla.ragged_dot(x, w, sizes, full_groups=True)
    )
    return peers


def torch_attention(
    shape: tuple[int, int, int, int],
    causal: bool,
    dtype: str,
    flops: float,
    rounds: int,
    labels: dict[str, Any],
) -> list[Row]:
    """Return torch's scaled_dot_product_attention at q, k, v [B, T, N, H]."""
    torch = load("torch")
    labels = {**labels, "name": "torch SDPA"}
    if isinstance(torch, str):
        return [Row(**labels, note=torch)]
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return [Row(**labels, note="torch was built without CUDA")]
    batch, length, heads, width = shape
    make = lambda grad: torch.randn(
        batch, heads, length, width, device=device, dtype=getattr(torch, dtype)
    ).requires_grad_(grad)
    q, k, v, cotangent = make(True), make(True), make(True), make(False)
    attend = torch.nn.functional.scaled_dot_product_attention
    wait = lambda _: torch.cuda.synchronize() if device == "cuda" else None

    def forward() -> Any:
        with torch.no_grad():
            return attend(q, k, v, is_causal=causal)

    def both() -> Any:
        out = attend(q, k, v, is_causal=causal)
        return torch.autograd.grad(out, (q, k, v), cotangent)

    rows = []
    for what, run, factor in (("forward", forward, 1), ("both", both, 3.5)):
        seconds = median_seconds(run, wait, rounds)
        rate = factor * flops / seconds / 1e12
        rows.append(Row(**labels, what=what, milliseconds=seconds * 1e3, tflops=rate))
    return rows
