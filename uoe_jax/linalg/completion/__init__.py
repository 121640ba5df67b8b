"""Low-rank matrix completion by robust alternating minimisation (arXiv 2302.11068)."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from uoe_jax.linalg.completion.dense import complete_matrix, make_completer
    from uoe_jax.linalg.completion.estimator import MatrixCompleter
    from uoe_jax.linalg.completion.factors import (
        Factors,
        load_factors,
        predict,
        rmse,
        save_factors,
    )
    from uoe_jax.linalg.completion.fit import complete
    from uoe_jax.linalg.completion.method import Solver
    from uoe_jax.linalg.completion.update import partial_fit

__all__ = [
    "Factors",
    "MatrixCompleter",
    "Solver",
    "complete",
    "complete_matrix",
    "load_factors",
    "make_completer",
    "partial_fit",
    "predict",
    "rmse",
    "save_factors",
]
_FILES = {
    "fit": ("complete",),
    "dense": ("complete_matrix", "make_completer"),
    "estimator": ("MatrixCompleter",),
    "factors": ("Factors", "load_factors", "predict", "rmse", "save_factors"),
    "method": ("Solver",),
    "update": ("partial_fit",),
}
_FILE = {name: file for file, names in _FILES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: options are read without jax."""
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_FILE[name]}"), name)
