"""MLPs of low rank and models without some layers: what they compute and save."""

import dataclasses

import numpy as np
import pytest

from tests.compress.test_apply import WIDE, logits, near
from tests.compress.test_statistics import batch_of
from tests.decompose.test_exact import draw
from uoe_jax.compress.depth import kept_layers, with_layers
from uoe_jax.compress.low_rank import break_even
from uoe_jax.compress.methods import prepare
from uoe_jax.compress.observed import block_params, take_apart
from uoe_jax.compress.options import Compress
from uoe_jax.compress.ranks import uniform_rank
from uoe_jax.compress.statistics import observe
from uoe_jax.config import UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.interop.padding import pad_layers
from uoe_jax.model import with_params
from uoe_jax.model.stacks import from_layers, to_layers

GELU = dataclasses.replace(WIDE, activation="gelu")


def look(config, seed=1, batch=None):
    params, batch = draw(config, seed), batch or batch_of(config)
    return (
        params,
        batch,
        take_apart(config, params, {}, observe(with_params(config, params), batch)),
    )


@pytest.mark.parametrize("method", ["lord", "svd"])
@pytest.mark.parametrize("config", [WIDE, GELU])
def test_a_rank_is_two_products_of_it_and_saves_what_was_asked(method, config):
    params, batch, observed = look(config)
    made = prepare(observed, method)(Compress(cut=0.2, method=method))
    rank = made.config.widths.up_rank[0]
    assert rank == uniform_rank(config, 0.2)
    saved = block_params(config) - block_params(made.config)
    assert 0.2 * block_params(config) <= saved
    step = (16 + 24) * 2 * (3 if config.gated else 2)  # a rank of every matrix
    assert saved < 0.2 * block_params(config) + step
    whole = logits(*pad_layers(made.config, made.params, {})[:1],
                   pad_layers(made.config, made.params, {})[1], batch)  # fmt: skip
    near(logits(made.config, made.params, batch), whole)


def test_ranks_by_outputs_keep_more_of_them_than_ranks_by_weights():
    params, batch, observed = look(WIDE)
    outputs = {}
    for method in ("lord", "svd"):
        made = prepare(observed, method)(Compress(rank=6, method=method))
        found = logits(made.config, made.params, batch)
        outputs[method] = np.square(found - logits(WIDE, params, batch)).sum()
    assert outputs["lord"] < outputs["svd"]


@pytest.mark.parametrize("config", [WIDE, GELU])
def test_ranks_by_curves_take_from_matrices_that_are_of_low_rank(config):
    """One layer's matrices have rank 4: a cut that they can give costs nothing."""
    params, batch = draw(config, 2), batch_of(config)
    rest, layers = to_layers(params, config)
    names = [name for name in layers[1] if name in ("mlp.w_up", "mlp.w_gate")]
    names.append("mlp.w_down")
    for name in names:
        u, s, v = np.linalg.svd(layers[1][name][0].astype(np.float64))
        planted = (u[:, :4] * s[:4]) @ v[:4]
        layers[1][name] = planted[None].astype(np.float32)
    params = from_layers(rest, layers, config)
    observed = take_apart(
        config, params, {}, observe(with_params(config, params), batch)
    )
    ready = prepare(observed, "lord")
    way = {"method": "lord", "multiple": 2}
    made = ready(Compress(cut=0.09, allocate="curve", **way))
    widths = made.config.widths
    for ranks in (widths.up_rank, widths.down_rank):
        assert ranks[0] == 0 < ranks[1] < break_even(16, 24)
    saved = block_params(config) - block_params(made.config)
    assert 0.09 * block_params(config) <= saved
    wanted = logits(config, params, batch)
    near(logits(made.config, made.params, batch), wanted, 1e-3)
    alike = ready(Compress(cut=0.09, **way))
    lost = np.abs(logits(alike.config, alike.params, batch) - wanted).max()
    assert lost > 10 * np.abs(logits(made.config, made.params, batch) - wanted).max()


def test_a_cut_that_low_ranks_by_curves_have_not_got_is_refused():
    _, _, observed = look(WIDE)
    # Rank 8 of every matrix, the least multiple of 8.
    most = 2 * 3 * (16 * 24 - 8 * (16 + 24)) / block_params(WIDE)
    with pytest.raises(ConfigError, match=f"so at most {most - 5e-4:.3f} can go; cut"):
        prepare(observed, "lord")(Compress(cut=0.9, method="lord", allocate="curve"))


def test_a_cut_that_smaller_steps_of_ranks_have_is_refused_with_them():
    """A matrix of 64 x 128 saves at most 42 ranks' worth, and 64 is above."""
    _, _, observed = look(dataclasses.replace(WIDE, d_model=64, d_ff=128))
    ready = prepare(observed, "lord")
    way = {"method": "lord", "allocate": "curve"}
    for cut in (0.02, 0.3):
        with pytest.raises(ConfigError, match=r"cut less or give a smaller --multiple"):
            ready(Compress(cut=cut, multiple=64, **way))
        assert ready(Compress(cut=cut, multiple=8, **way)).config.widths
    for multiple in (64, 8, 1):
        with pytest.raises(ConfigError, match=r"can go; cut less$"):
            ready(Compress(cut=0.9, multiple=multiple, **way))


def test_a_cut_that_smaller_steps_of_neurons_have_is_refused_with_them():
    _, _, observed = look(WIDE)
    ready = prepare(observed, "sort")
    with pytest.raises(ConfigError, match=r"cut less or give a smaller --multiple"):
        ready(Compress(cut=0.6, multiple=24, method="sort"))
    assert ready(Compress(cut=0.6, multiple=2, method="sort")).config.widths.d_ff


def test_ranks_that_save_nothing_and_cuts_that_are_not_there_are_refused():
    _, _, observed = look(WIDE)
    ready = prepare(observed, "lord")
    assert break_even(16, 24) == pytest.approx(9.6, abs=1e-12)
    with pytest.raises(ConfigError, match=r"rank 10 of mlp.w_up \(16 x 24\) saves no"):
        ready(Compress(rank=10, method="lord"))
    with pytest.raises(ConfigError, match="loses less than 0.407 of its blocks"):
        ready(Compress(cut=0.6, method="lord"))
    union = dataclasses.replace(
        WIDE, mlp=("union",), union=UnionConfig(num_experts=4, top_k=2)
    )
    with pytest.raises(ConfigError, match="layer 0 has mlp union; method svd takes"):
        prepare(look(union)[2], "svd")


def test_layers_that_change_least_go_and_the_model_is_the_dense_one_without_them():
    deep = dataclasses.replace(
        WIDE, num_layers=4, window=(0, 4), use_bias=False, d_ff=8
    )
    params, batch, observed = look(deep)
    made = prepare(observed, "depth")(Compress(cut=0.3, method="depth"))
    gone = int(np.argmin(observed.influences))
    assert made.config.num_layers == 3
    kept = [n for n in range(4) if n != gone]
    assert made.config.windows == tuple(deep.windows[n] for n in kept)
    rest, layers = to_layers(params, deep)
    for name in ("attention.wo", "mlp.w_down"):
        layers[gone][name] = np.zeros_like(layers[gone][name])
    wanted = logits(deep, from_layers(rest, layers, deep), batch)
    near(logits(made.config, made.params, batch), wanted)


def test_patterns_of_kinds_are_as_short_as_they_can_be():
    mixed = dataclasses.replace(WIDE, num_layers=6, window=(0, 4))
    assert with_layers(mixed, [0, 1, 2, 3]).window == (0, 4)
    assert with_layers(mixed, [0, 2, 4]).window == (0,)
    assert with_layers(mixed, [0, 1, 4, 5]).window == (0, 4)
    assert with_layers(mixed, [0, 2, 3]).window == (0, 0, 4)


def test_a_cut_of_no_layer_is_refused():
    influences = np.array([0.3, 0.1, 0.2])
    assert list(kept_layers(influences, 0.3)) == [0, 2]
    for cut, words in ((0.1, "is none"), (0.9, "is 3")):
        with pytest.raises(ConfigError, match=f"{words}; method depth drops whole"):
            kept_layers(influences, cut)


@pytest.mark.parametrize("given, message", [
    ({"rank": 4}, "rank is 4 with method modegpt; only lord and svd have ranks"),
    ({"rank": 4, "cut": 0.3, "method": "svd"}, "cut is 0.3 and rank 4; one settles"),
    ({"cut": 0.3, "method": "depth", "allocate": "bi"}, "none, it drops whole layers"),
    ({"cut": 0.3, "method": "lord", "allocate": "bi"}, "which has uniform and curve"),
    ({"cut": 0.3, "method": "svd", "allocate": "curve"}, "which has uniform alone"),
    ({"rank": 3, "method": "lord", "allocate": "curve"}, "rank 3, which is every"),
    ({"cut": 0.3, "anytime": True}, "cut is 0.3 with anytime"),
    ({"method": "flap", "anytime": True}, "method is flap with anytime; modegpt, sort"),
])  # fmt: skip
def test_options_that_contradict_each_other_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        Compress(**given).check()
