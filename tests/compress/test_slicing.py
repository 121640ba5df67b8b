"""A turned residual stream is the same model; one that fills less of it is cut free."""

import dataclasses

import numpy as np
import pytest

from tests.compress.test_apply import WIDE, logits, near
from tests.compress.test_ranks import look
from tests.compress.test_statistics import batch_of
from tests.decompose.test_exact import draw
from uoe_jax.compress.methods import prepare
from uoe_jax.compress.observed import block_params, take_apart
from uoe_jax.compress.options import Compress
from uoe_jax.compress.slicing import turned
from uoe_jax.compress.statistics import observe
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model import with_params
from uoe_jax.model.observe import Stream

SLICE = Compress(method="slice", cut=0.25, multiple=1)


@pytest.mark.parametrize("change", [
    {}, {"tie_embeddings": False}, {"position": "learned", "use_bias": False},
    {"activation": "gelu", "qk_norm": True, "norm_eps": 0.1},
])  # fmt: skip
def test_turned_by_any_rotation_and_with_all_directions_a_model_is_the_same(
    change, seed
):
    config = dataclasses.replace(WIDE, **change)
    params, batch, observed = look(config, seed=3)
    rng = np.random.default_rng(seed)
    rotation = np.linalg.qr(rng.normal(size=(config.d_model, config.d_model)))[0]
    made = turned(observed, rotation)
    assert not made.config.tie_embeddings
    near(logits(made.config, made.params, batch), logits(config, params, batch), 1e-4)


SCALES = ("trunk.norm.scale", *(
    f"trunk.blocks.0.{part}_norm.scale" for part in ("attention", "mlp")
))  # fmt: skip
WRITERS = (".wo", ".bo", ".w_down", ".b_down")


@pytest.mark.parametrize("qk_norm", [False, True])
def test_directions_that_nothing_writes_to_are_deleted_without_loss(seed, qk_norm):
    """Three of the twelve that stay are written by the last MLP alone."""
    config = dataclasses.replace(
        WIDE, norm_eps=0.1, tie_embeddings=False, qk_norm=qk_norm
    )
    params, batch = draw(config, 5), batch_of(config)
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(16, 12)))[0]
    most, every = basis[:, :9] @ basis[:, :9].T, basis @ basis.T
    for name, array in params.items():
        if name.startswith("embed.") or name.endswith(WRITERS):
            params[name] = (array @ most).astype(array.dtype)
        if name.endswith((".w_down", ".b_down")):
            params[name][-1] = array[-1] @ every
    seen = observe(with_params(config, params), batch)
    ready = prepare(take_apart(config, params, {}, seen), "slice")
    made = ready(SLICE)
    assert made.config.d_model == 12
    # Of no rounding in any dtype.
    assert all((made.params[name] == 1).all() for name in params if name in SCALES)
    near(logits(made.config, made.params, batch), logits(config, params, batch), 1e-4)
    less = ready(dataclasses.replace(SLICE, cut=0.5))
    found = logits(less.config, less.params, batch)
    assert np.abs(found - logits(config, params, batch)).max() > 0.01
    # Biases aside, the blocks lose what the width does.
    share = block_params(less.config) / block_params(config)
    assert 0.5 <= share < 0.56


def test_of_one_layer_alone_what_stays_is_its_principal_components():
    """Beside numpy on the normalised residual stream before attention, MLP and head."""
    config = dataclasses.replace(WIDE, num_layers=1)
    params, batch, observed = look(config, seed=6)
    stream = Stream(with_params(config, params), batch)
    x = np.asarray(stream._residual, np.float64)[stream.valid]
    values = stream.run_layer()
    residual, output = (
        np.asarray(array, np.float64) for array in (values.residual, values.output)
    )
    rows = np.concatenate([x, residual, residual + output])
    rows /= np.sqrt(np.square(rows).mean(1, keepdims=True) + config.norm_eps)
    energies, basis = np.linalg.eigh(rows.T @ rows)
    assert energies[4] < 0.99 * energies[5]  # else the components are no one's own
    wanted = turned(observed, basis[:, :3:-1])
    made = prepare(observed, "slice")(SLICE)
    near(logits(made.config, made.params, batch),
         logits(wanted.config, wanted.params, batch), 1e-3)  # fmt: skip


@pytest.mark.parametrize("change, named", [
    ({"norm": "layernorm"}, "model.norm layernorm"),
    ({"norm_place": "post"}, "model.norm_place post"),
    ({"embed_norm": True}, "model.embed_norm"),
    ({"mlp": ("union",), "union": UnionConfig(num_experts=4, top_k=2)}, "mlp union"),
])  # fmt: skip
def test_models_that_a_rotation_changes_are_refused(change, named):
    config = dataclasses.replace(WIDE, **change)
    with pytest.raises(ConfigError, match=f"the model has {named}; method slice takes"):
        prepare(look(config)[2], "slice")


def test_cuts_of_nothing_or_everything_and_ways_to_spread_are_refused():
    ready = prepare(look(WIDE)[2], "slice")
    for cut, width in ((0.01, 16), (0.99, 0)):
        with pytest.raises(ConfigError, match=f"cut is {cut}, .* leaves {width} in"):
            ready(dataclasses.replace(SLICE, cut=cut))
    with pytest.raises(ConfigError, match="leaves 16 in steps of 8"):
        ready(Compress(method="slice", cut=0.2))
    with pytest.raises(ConfigError, match="which has none, it makes all layers narrow"):
        dataclasses.replace(SLICE, allocate="curve").check()
