"""Down-projections fitted anew to the experts that are left on.

A dense layer's `w_down` was learnt with every neuron on. A union switches experts off,
token by token. With the routing fixed, the best `w_down` for what is left is a least
squares problem: one normal equation a layer.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Bool, Float

from uoe_jax.config import UnionConfig
from uoe_jax.decompose.route import RouterFit
from uoe_jax.model.routing.token import gate_values

# How much the old weights are worth, in units of the neurons' mean second moment. Which
# is best differs tenfold between layers, so the last quarter of the tokens decides.
RIDGES = (1.0, 0.3, 0.1, 0.03, 0.01)


class Refit(NamedTuple):
    """A layer's new down-projection, and its relative output error before and after.

    Errors are on the tokens it was fitted on: |found - wanted| / |wanted|.
    """

    w_down: Float[Array, "F D"]  # neurons in the experts' order
    outputs: Float[Array, "N D"]  # what the chosen experts write now
    before: float
    after: float
    ridge: float  # how much the old weights were worth

    def without_outputs(self) -> Refit:
        """Return the fit without what was written: N tokens of every layer are much."""
        return self._replace(outputs=self.outputs[:0])


def chosen_gates(
    x: Float[np.ndarray, "N D"] | Float[Array, "N D"],
    router: RouterFit | None,
    union: UnionConfig,
) -> Float[Array, "N E"]:
    """Return each expert's gate for each token, 0 where it isn't chosen.

    As the router of kind "token" decides: always-on experts first, with gate 1; then
    those whose score and bias are highest. Without a fit scores are zero.
    """
    if router is None:
        routed = union.num_experts - union.num_shared
        router = RouterFit(np.zeros((x.shape[1], routed)), np.zeros(routed), 0.0)
    weight, bias = (a.astype(np.float32) for a in (router.weight, router.bias))
    return _gates(x, weight, bias, union.num_shared, union.top_k, union.gate)


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
@jax.default_matmul_precision("highest")
def _gates(
    x: Float[Array, "N D"],
    weight: Float[Array, "D E"],
    bias: Float[Array, " E"],
    shared: int,
    top_k: int,
    gate: str,
) -> Float[Array, "N E2"]:
    scores = x.astype(jnp.float32) @ weight
    _, chosen = jax.lax.top_k(scores + bias[None], top_k - shared)  # first of equals
    values = gate_values(jnp.take_along_axis(scores, chosen, axis=1), gate)
    rows = jnp.arange(len(x))[:, None]
    routed = jnp.zeros(scores.shape, jnp.float32).at[rows, chosen].set(values)
    return jnp.concatenate([jnp.ones((len(x), shared), jnp.float32), routed], axis=1)


def fit_down(
    neurons: Float[np.ndarray, "N F"] | Float[Array, "N F"],
    gates: Float[np.ndarray, "N E"] | Float[Array, "N E"],
    w_down: Float[np.ndarray, "F D"] | Float[Array, "F D"],
    wanted: Float[np.ndarray, "N D"] | Float[Array, "N D"],
    ridge: float | None = None,
) -> Refit:
    """Return the down-projection that brings what is on closest to what is wanted.

    `argmin_W |Z W - Y|^2 + rho |W - W_down|^2`, where Z are the neurons times their
    expert's gate, Y the wanted outputs and rho the ridge times the mean of the diagonal
    of Z^T Z. Neurons are in the experts' order. A neuron that is never on keeps its
    weights. Without a ridge, that of `RIDGES` is taken whose fit to the first three
    quarters of the tokens leaves least of the others.
    """
    on, moments, crosses, before, length = _normal_equations(
        neurons, gates, w_down, wanted
    )
    with jax.enable_x64(True):
        if ridge is None:
            left = np.asarray(_left_over(moments, crosses, np.asarray(RIDGES)))
            ridge = RIDGES[int(np.argmin(left))]
        moment, cross = moments.sum(axis=0), crosses.sum(axis=0)
        change, rho = _solution(moment, cross, ridge)
    w_down = jnp.asarray(w_down, jnp.float32)
    if float(rho) <= 0:  # nothing is ever on
        return Refit(w_down, jnp.zeros_like(wanted), 1.0, 1.0, ridge)
    new = w_down + change
    outputs, after = _apply(on, new, wanted)
    length = max(float(length), 1e-30)
    return Refit(new, outputs, float(before) / length, float(after) / length, ridge)


@jax.jit
def _left_over(
    moments: Float[Array, "2 F F"],
    crosses: Float[Array, "2 F D"],
    ridges: Float[Array, " R"],
) -> Float[Array, " R"]:
    """Return what fits to the first part leave of the second, but for a constant."""
    moment, cross = moments[1].astype(float), crosses[1].astype(float)

    def left(ridge: Array) -> Array:
        change = _solution(moments[0], crosses[0], ridge)[0].astype(float)
        return ((moment @ change - 2 * cross) * change).sum()

    return jax.lax.map(left, ridges)


@jax.jit
def _solution(
    moment: Float[Array, "F F"], cross: Float[Array, "F D"], ridge: Float[Array, ""]
) -> tuple[Float[Array, "F D"], Float[Array, ""]]:
    """Return the change of the weights and rho, in double precision."""
    moment, cross = moment.astype(float), cross.astype(float)
    rho = ridge * jnp.trace(moment) / len(moment)
    factor = cho_factor(moment + rho * jnp.eye(len(moment)))
    return cho_solve(factor, cross).astype(jnp.float32), rho


# The work is made where jax computes: on a GPU's host numpy took minutes for it.
@jax.jit
@jax.default_matmul_precision("highest")
def _normal_equations(
    neurons: Float[Array, "N F"],
    gates: Float[Array, "N E"],
    w_down: Float[Array, "F D"],
    wanted: Float[Array, "N D"],
) -> tuple[Array, ...]:
    """Return Z, Z^T Z, Z^T R, |R| and |Y|, where R is what `w_down` leaves of Y.

    Products are of the first three quarters of the tokens, and of the others.
    """
    width = neurons.shape[1] // gates.shape[1]
    on = neurons * jnp.repeat(gates, width, axis=1)
    left = wanted - on @ w_down
    end, norm = len(on) - len(on) // 4, jnp.linalg.norm
    parts = (on[:end], left[:end]), (on[end:], left[end:])
    moments = jnp.stack([part.T @ part for part, _ in parts])
    crosses = jnp.stack([part.T @ rest for part, rest in parts])
    return on, moments, crosses, norm(left), norm(wanted)


@jax.jit
@jax.default_matmul_precision("highest")
def written(
    neurons: Float[Array, "N F"],
    gates: Float[Array, "N E"],
    w_down: Float[Array, "F D"],
) -> Float[Array, "N D"]:
    """Return what the experts that are on write, without the bias."""
    width = neurons.shape[1] // gates.shape[1]
    return (neurons * jnp.repeat(gates, width, axis=1)) @ w_down


@jax.jit
@jax.default_matmul_precision("highest")
def _apply(
    on: Float[Array, "N F"], w_down: Float[Array, "F D"], wanted: Float[Array, "N D"]
) -> tuple[Array, Array]:
    """Return what neurons write, and how far that is from what is wanted."""
    outputs = on @ w_down
    return outputs, jnp.linalg.norm(wanted - outputs)


def core_first(
    contributions: Float[np.ndarray, "N F"] | Float[Array, "N F"], size: int
) -> Bool[np.ndarray, " F"]:
    """Return which `size` neurons write most: the always-on core.

    By the root mean square over tokens of |activation| |w_down row|; ties go to the
    first.
    """
    score = np.asarray(jnp.square(contributions).mean(axis=0))
    core = np.zeros(contributions.shape[1], bool)
    core[np.argsort(-score, kind="stable")[:size]] = True
    return core
