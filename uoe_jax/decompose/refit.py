"""Down-projections fitted anew to the experts that are left on.

A dense layer's `w_down` was learnt with every neuron on. A union switches experts off,
token by token. With the routing fixed, the best `w_down` for what is left is a least
squares problem: one normal equation a layer.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from uoe_jax.config import UnionConfig
from uoe_jax.decompose.route import RouterFit
from uoe_jax.model.routing.token import gate_values

# How much the old weights are worth, in units of the neurons' mean second moment.
RIDGE = 0.1


class Refit(NamedTuple):
    """A layer's new down-projection, and its relative output error before and after.

    Errors are on the tokens it was fitted on: |found - wanted| / |wanted|.
    """

    w_down: Float[np.ndarray, "F D"]  # neurons in the experts' order
    outputs: Float[np.ndarray, "N D"]  # what the chosen experts write now
    before: float
    after: float

    def without_outputs(self) -> Refit:
        """Return the fit without what was written: N tokens of every layer are much."""
        return self._replace(outputs=self.outputs[:0])


def chosen_gates(
    x: Float[np.ndarray, "N D"], router: RouterFit | None, union: UnionConfig
) -> Float[np.ndarray, "N E"]:
    """Return each expert's gate for each token, 0 where it isn't chosen.

    As the router of kind "token" decides: always-on experts first, with gate 1; then
    those whose score and bias are highest. Without a fit scores are zero.
    """
    shared, routed = union.num_shared, union.num_experts - union.num_shared
    gates = np.zeros((len(x), union.num_experts), np.float32)
    gates[:, :shared] = 1.0
    picks = union.top_k - shared
    if not picks:
        return gates
    scores = np.zeros((len(x), routed), np.float32)
    decision = scores
    if router is not None:
        scores = (x @ router.weight).astype(np.float32)
        decision = scores + router.bias[None].astype(np.float32)
    chosen = np.argsort(-decision, axis=1, kind="stable")[:, :picks]
    rows = np.arange(len(x))[:, None]
    values = gate_values(jnp.asarray(scores[rows, chosen]), union.gate)
    gates[rows, shared + chosen] = np.asarray(values, np.float32)
    return gates


def fit_down(
    neurons: Float[np.ndarray, "N F"] | Float[Array, "N F"],
    gates: Float[np.ndarray, "N E"],
    w_down: Float[np.ndarray, "F D"],
    wanted: Float[np.ndarray, "N D"],
    ridge: float = RIDGE,
) -> Refit:
    """Return the down-projection that brings what is on closest to what is wanted.

    `argmin_W |Z W - Y|^2 + rho |W - W_down|^2`, where Z are the neurons times their
    expert's gate, Y the wanted outputs and rho the ridge times the mean of the diagonal
    of Z^T Z. Neurons are in the experts' order. A neuron that is never on keeps its
    weights.
    """
    on, *sums, before = _normal_equations(neurons, gates, w_down, wanted)
    moment, cross = (np.asarray(a, np.float64) for a in sums)
    rho = ridge * float(np.trace(moment)) / len(moment)
    if rho <= 0:  # nothing is ever on
        return Refit(w_down, np.zeros_like(wanted), 1.0, 1.0)
    change = np.linalg.solve(moment + rho * np.eye(len(moment)), cross)
    new = (w_down + change).astype(np.float32)
    outputs, after = map(np.asarray, _apply(on, new, wanted))
    length = max(float(np.linalg.norm(wanted)), 1e-30)
    return Refit(new, outputs, float(before) / length, float(after) / length)


# The products over all tokens are the work, so they are made where jax computes: on a
# GPU's host numpy took minutes for them. The solution has double precision.
@jax.jit
@jax.default_matmul_precision("highest")
def _normal_equations(
    neurons: Float[Array, "N F"],
    gates: Float[Array, "N E"],
    w_down: Float[Array, "F D"],
    wanted: Float[Array, "N D"],
) -> tuple[Array, ...]:
    """Return Z, Z^T Z, Z^T R and |R|, where R is what `w_down` leaves of `wanted`."""
    width = neurons.shape[1] // gates.shape[1]
    on = neurons * jnp.repeat(gates, width, axis=1)
    left = wanted - on @ w_down
    return on, on.T @ on, on.T @ left, jnp.linalg.norm(left)


@jax.jit
@jax.default_matmul_precision("highest")
def _apply(
    on: Float[Array, "N F"], w_down: Float[Array, "F D"], wanted: Float[Array, "N D"]
) -> tuple[Array, Array]:
    """Return what neurons write, and how far that is from what is wanted."""
    outputs = on @ w_down
    return outputs, jnp.linalg.norm(wanted - outputs)


def core_first(
    contributions: Float[np.ndarray, "N F"], size: int
) -> Bool[np.ndarray, " F"]:
    """Return which `size` neurons write most: the always-on core.

    By the root mean square over tokens of |activation| |w_down row|; ties go to the
    first.
    """
    score = np.square(contributions).mean(axis=0)
    core = np.zeros(contributions.shape[1], bool)
    core[np.argsort(-score, kind="stable")[:size]] = True
    return core
