"""Packed experts are every token's choices written out, with gates and without."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.model.tiny_models import tiny
from uoe_jax.model.mlp import RoutedMlp
from uoe_jax.ops.packing import pack_choices

BATCH, LENGTH, EXPERTS, PICKS, WIDTH, NEURONS = 2, 7, 4, 2, 8, 6


def written_out(params, x, choices, gates):
    """Every expert of every token, summed with its gate if it was chosen."""
    side = lambda kind: (
        jnp.einsum("nd,edf->enf", x, params[f"w_{kind}"])
        + params[f"b_{kind}"][:, None, :]
    )
    up = side("up")
    if "w_gate" in params:
        hidden = jax.nn.silu(side("gate")) * up
    else:
        hidden = jax.nn.gelu(up, approximate=True)
    each = jnp.einsum("enf,efd->end", hidden, params["w_down"])
    picked = jax.nn.one_hot(choices, EXPERTS)
    weight = picked.sum(1) if gates is None else jnp.sum(picked * gates[..., None], 1)
    return jnp.einsum("end,ne->nd", each, weight)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("gated", [False, True])
def test_packed_experts_are_the_choices_written_out(activation, gated, rng):
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    config = tiny(d_model=WIDTH, activation=activation, use_bias=True)
    mlp = jax.eval_shape(
        lambda: RoutedMlp(config, EXPERTS, NEURONS, NEURONS, rngs=nnx.Rngs(0))
    )
    graphdef, shapes = nnx.split(mlp)
    shapes = nnx.to_pure_dict(shapes)
    params = {name: normal(*leaf.shape) for name, leaf in shapes.items()}
    choices = np.argsort(rng.random((BATCH, LENGTH, EXPERTS)), -1)[..., :PICKS]
    packing = pack_choices(jnp.asarray(choices), EXPERTS)
    x, grad = normal(BATCH * LENGTH, WIDTH), normal(BATCH * LENGTH, WIDTH)
    gates = normal(BATCH, LENGTH, PICKS) if gated else None

    def packed(params, x, gates):
        state = nnx.state(mlp)
        nnx.replace_by_pure_dict(state, params)
        return nnx.merge(graphdef, state).experts(x, packing, gates)

    def plain(params, x, gates):
        gates = None if gates is None else gates.reshape(-1, PICKS)
        return written_out(params, x, choices.reshape(-1, PICKS), gates)

    def both_passes(call, *args):
        out, vjp = jax.vjp(call, *args)
        return out, vjp(grad)

    got, want = (
        jax.jit(both_passes, static_argnums=0)(call, params, x, gates)
        for call in (packed, plain)
    )
    jax.tree.map(
        lambda mine, exact: np.testing.assert_allclose(
            mine, exact, atol=1e-5 * max(1.0, float(jnp.abs(exact).max()))
        ),
        got,
        want,
    )


def test_gated_experts_keep_no_unscaled_activations(rng):
    """Only the second product's rows are kept of the hidden width."""
    config = tiny(d_model=WIDTH, activation="swiglu")
    mlp = RoutedMlp(config, EXPERTS, NEURONS, NEURONS, rngs=nnx.Rngs(0))
    choices = np.argsort(rng.random((BATCH, LENGTH, EXPERTS)), -1)[..., :PICKS]
    packing = pack_choices(jnp.asarray(choices), EXPERTS)
    x, gates = jnp.ones((BATCH * LENGTH, WIDTH)), jnp.ones((BATCH, LENGTH, PICKS))
    _, vjp = jax.vjp(lambda x, gates: mlp.experts(x, packing, gates), x, gates)
    shapes = [leaf.shape for leaf in jax.tree.leaves(vjp)]
    assert shapes.count((BATCH * LENGTH * PICKS, NEURONS)) == 1
