"""Low-rank matrix completion by robust alternating minimisation (arXiv 2302.11068)."""

from uoe_jax.linalg.completion.api import complete
from uoe_jax.linalg.completion.dense import complete_matrix, make_completer
from uoe_jax.linalg.completion.estimator import MatrixCompleter
from uoe_jax.linalg.completion.factors import (
    Factors,
    load_factors,
    predict,
    rmse,
    save_factors,
)
from uoe_jax.linalg.completion.solver import Solver
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
