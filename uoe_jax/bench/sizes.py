"""The cases of `uoe bench`: full for accelerators, small for a CPU. Imports no jax."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Cases of every benchmark."""

    dtype: str
    # B, T, N, H, causal
    attention: tuple[tuple[int, int, int, int, bool], ...]
    # B, T, N, X, H: each token picks X of N heads
    selective: tuple[tuple[int, int, int, int, int], ...]
    # M, I, O, E
    matmul: tuple[tuple[int, int, int, int], ...]
    # D, F, experts, chosen, B, T
    mlp: tuple[tuple[int, int, int, int, int, int], ...]
    # D, F of an expert, experts, chosen, tokens
    narrow: tuple[tuple[int, int, int, int, int], ...]
    # D, heads, chosen, head width, B, T
    smha: tuple[tuple[int, int, int, int, int, int], ...]
    # D, F, experts, head width, tokens; T of the sweep
    sweep: tuple[int, int, int, int, int]
    sweep_lengths: tuple[int, ...]
    sweep_picks: tuple[int, ...]
    # preset, B, T
    train: tuple[tuple[str, int, int], ...]


FULL = Sizes(
    dtype="bfloat16",
    attention=(
        (8, 2048, 16, 128, True),
        (2, 8192, 16, 128, True),
        (1, 16384, 16, 128, True),
        (2, 8192, 16, 128, False),
        (4, 4096, 32, 64, True),
        (1, 16384, 32, 64, True),
        (4, 4096, 32, 64, False),
    ),
    selective=(
        (8, 2048, 16, 8, 128),
        (2, 8192, 16, 8, 128),
        (1, 16384, 16, 8, 128),
        (2, 8192, 16, 4, 128),
    ),
    matmul=(
        (32768, 2048, 2048, 16),
        (131072, 2048, 512, 16),
        (131072, 512, 2048, 16),
        (131072, 2048, 384, 16),
        (131072, 128, 2048, 16),
    ),
    mlp=((2048, 8192, 4, 2, 2, 8192), (2048, 8192, 16, 8, 2, 8192)),
    narrow=((512, 256, 32, 8, 65536), (768, 192, 16, 8, 65536)),
    smha=((2048, 16, 8, 128, 2, 8192), (2048, 16, 8, 128, 8, 2048)),
    sweep=(2048, 8192, 16, 128, 65536),
    sweep_lengths=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    sweep_picks=(2, 4, 8, 12, 16),  # X/E in 1/8, 1/4, 1/2, 3/4, 1
    train=(("small", 32, 2048), ("small-union", 32, 2048)),
)

SMALL = Sizes(
    dtype="float32",
    attention=((2, 256, 4, 32, True), (2, 256, 4, 32, False)),
    selective=((2, 256, 8, 4, 32),),
    matmul=((1024, 64, 128, 8),),
    mlp=((64, 256, 4, 2, 2, 256),),
    narrow=((64, 16, 8, 4, 256),),
    smha=((64, 8, 4, 16, 2, 256),),
    sweep=(64, 256, 8, 16, 512),
    sweep_lengths=(256,),
    sweep_picks=(4, 8),
    train=(("tiny", 4, 64),),
)

SIZES = {"full": FULL, "small": SMALL}
