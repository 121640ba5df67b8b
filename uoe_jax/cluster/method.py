"""The names of the methods, one table for the library and the command. No jax."""

from __future__ import annotations

from typing import Literal, get_args

# PPP; MLC with its network; spectral: MLC's affinity alone; scikit-learn's k-means.
Method = Literal["ppp", "mlc", "spectral", "kmeans"]
METHODS: tuple[Method, ...] = get_args(Method)
