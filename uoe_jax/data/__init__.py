"""Data: sources, tokenizers, prepared arrays and batches. Imports no jax."""

from uoe_jax.data.batches import Dataset, make_dataset
from uoe_jax.data.describe import describe
from uoe_jax.data.prefetch import Prefetch, prefetch
from uoe_jax.data.prepare import Prepared, prepare
from uoe_jax.data.tokenize import Tokenizer

__all__ = [
    "Dataset",
    "Prefetch",
    "Prepared",
    "Tokenizer",
    "describe",
    "make_dataset",
    "prefetch",
    "prepare",
]
