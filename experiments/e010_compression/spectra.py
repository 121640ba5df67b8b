"""How evenly a model's MLPs use their inputs and neurons, layer by layer.

    python -m experiments.e010_compression.spectra RUN/statistics.safetensors

Of a file that `uoe compress` writes: the largest neuron's share of its layer's energy,
and the directions that hold 99% of what the MLP reads, of its width.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from jaxtyping import Float

from uoe_jax.compress.files import from_triangle, read_arrays


def largest_share(moment: Float[np.ndarray, "F F"]) -> float:
    """Return the largest channel's share of the energy of a second moment."""
    energies = np.diagonal(moment).astype(np.float64)
    return float(energies.max() / energies.sum())


def directions(moment: Float[np.ndarray, "D D"], share: float = 0.99) -> int:
    """Return how many principal components hold a share of a second moment."""
    energies = np.linalg.eigvalsh(moment.astype(np.float64))[::-1]
    held = np.cumsum(energies) / energies.sum()
    return int(np.searchsorted(held, share)) + 1


def main(file: Path) -> None:
    """Print a line a layer."""
    arrays = read_arrays(file)
    layers = {int(name.split(".")[0]) for name in arrays}
    for layer in sorted(layers):
        read = lambda name, n=layer: from_triangle(arrays[f"{n}.{name}"], True)
        neurons, inputs = read("neurons")[0], read("mlp_input")
        print(
            f"layer {layer}: largest neuron {largest_share(neurons):.1%}, 99% of the "
            f"inputs in {directions(inputs)} of {len(inputs)} directions"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
