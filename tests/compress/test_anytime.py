"""One run that opens at any cut: the same models as cuts made one by one."""

import dataclasses

import numpy as np
import pytest

from tests.compress.test_apply import WIDE, logits, near
from tests.compress.test_statistics import batch_of
from tests.decompose.test_exact import draw
from uoe_jax.compress import anytime
from uoe_jax.compress.anytime import (
    open_run,
    read_anytime,
    sort_run,
    write_anytime,
)
from uoe_jax.compress.methods import sort_model
from uoe_jax.compress.observed import take_apart
from uoe_jax.compress.options import ANYTIME, Compress
from uoe_jax.compress.statistics import observe
from uoe_jax.config import ExperimentConfig, UnionConfig
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.write import Origin, write_run

UNION = dataclasses.replace(
    WIDE, mlp=("union",), union=UnionConfig(num_experts=4, top_k=2)
)
CUTS = (0.1, 0.2, 0.3, 0.4, 0.5)


def sort(config, method="modegpt", seed=1):
    params, batch = draw(config, seed), batch_of(config, rows=30)
    seen = observe(with_params(config, params), batch)
    return params, batch, sort_model(take_apart(config, params, {}, seen), method)


def write(folder, model, options):
    made, beside = sort_run(model)
    write_anytime(folder / ANYTIME, made, beside, options)
    return made


@pytest.mark.parametrize("config, method", [
    (WIDE, "modegpt"), (WIDE, "sort"), (WIDE, "magnitude"), (UNION, "modegpt"),
    (dataclasses.replace(WIDE, qk_norm=True), "drop"),
    (dataclasses.replace(WIDE, position="learned", activation="gelu"), "modegpt"),
])  # fmt: skip
def test_five_cuts_of_one_file_are_five_cuts_made_one_by_one(tmp_path, config, method):
    params, batch, model = sort(config, method)
    options = Compress(anytime=True, method=method, multiple=2)
    made = write(tmp_path, model, options)
    # Whole, it is the model that it was made of.
    near(logits(*made[:2], batch, made.buffers), logits(config, params, batch))
    args = (tmp_path, config, made.params, made.buffers)
    for cut in CUTS:
        ready, how = read_anytime(*args, Compress(cut=cut))
        opened = ready.cut(how)
        apart = model.cut(Compress(cut=cut, multiple=2))
        assert opened.config == apart.config
        wanted = logits(*apart[:2], batch, apart.buffers)
        near(logits(*opened[:2], batch, opened.buffers), wanted, 1e-4)


def test_nothing_but_factors_and_small_numbers_lies_beside_the_weights():
    wide = dataclasses.replace(WIDE, d_model=32, d_ff=96, head_dim=8)
    _, _, model = sort(wide)
    _, beside = sort_run(model)
    factors = [a for name, a in beside.items() if name.endswith("factors")]
    assert [a.shape for a in factors] == [(1, 96 * 97 // 2)] * 2
    others = sum(a.nbytes for a in beside.values()) - sum(a.nbytes for a in factors)
    assert others < 3000
    plain = sort_run(sort(wide, "sort")[2])[1]
    assert not [name for name in plain if name.endswith("factors")]


def test_a_cut_is_spread_as_the_run_was_made_to_be_unless_it_is_told(tmp_path):
    _, _, model = sort(WIDE)
    made = write(
        tmp_path, model, Compress(anytime=True, allocate="uniform", multiple=4)
    )
    args = (tmp_path, WIDE, made.params, made.buffers)
    how = read_anytime(*args, Compress(cut=0.3))[1]
    assert (how.method, how.allocate, how.multiple) == ("modegpt", "uniform", 4)
    how = read_anytime(*args, Compress(cut=0.3, allocate="bi", multiple=2))[1]
    assert (how.allocate, how.multiple, how.cut) == ("bi", 2, 0.3)


def test_what_cannot_be_opened_is_refused(tmp_path):
    params, _, model = sort(WIDE)
    with pytest.raises(ConfigError, match="doesn't open at a cut: it has no anytime"):
        read_anytime(tmp_path, WIDE, params, {}, Compress(cut=0.3))
    made = write(tmp_path, model, Compress(anytime=True))
    with pytest.raises(ConfigError, match="other weights than the run's, which has tr"):
        read_anytime(tmp_path, WIDE, params, {}, Compress(cut=0.3))
    args = (tmp_path, WIDE, made.params, made.buffers)
    with pytest.raises(ConfigError, match="method is 'drop', but .* sorted by modegpt"):
        read_anytime(*args, Compress(cut=0.3, method="drop"))
    file = tmp_path / ANYTIME
    whole = bytearray(file.read_bytes())
    whole[-5] ^= 4
    file.write_bytes(whole)
    with pytest.raises(DataError, match="has changed bytes"):
        read_anytime(*args, Compress(cut=0.3))


def as_run(folder, made, options, beside):
    config = ExperimentConfig(name="any", model=made.config)
    origin = Origin(
        made_by="compress",
        source="test",
        files={ANYTIME: lambda path: write_anytime(path, *beside, options)},
    )
    write_run(folder, config, made.params, origin, buffers=made.buffers)


def test_a_run_is_opened_as_its_file_says_and_refused_if_it_has_trained(tmp_path):
    options = Compress(anytime=True, multiple=2)
    _, batch, model = sort(dataclasses.replace(WIDE, vocab_size=256))
    made, beside = sort_run(model)
    as_run(tmp_path / "any", made, options, (made, beside))
    opened = open_run(tmp_path / "any", cut=0.7)
    wanted = model.cut(Compress(cut=0.7, multiple=2))
    assert opened.config.model == wanted.config and opened.folder == tmp_path / "any"
    assert wanted.buffers  # of which pairs are kept
    arrays = flat_params(opened.model), batch, flat_buffers(opened.model)
    apart = logits(*wanted[:2], batch, wanted.buffers)
    near(logits(opened.config.model, *arrays), apart, 1e-4)
    later = {name: array + np.float32(1e-3) for name, array in made.params.items()}
    as_run(tmp_path / "later", made._replace(params=later), options, (made, beside))
    with pytest.raises(ConfigError, match="other weights than the run's, which has tr"):
        open_run(tmp_path / "later", cut=0.7)
    assert open_run(tmp_path / "later").config.model == made.config


def test_factors_of_bfloat16_weights_are_bfloat16_and_near(tmp_path):
    """Whole the model is the one before up to its weights' own rounding."""
    half = dataclasses.replace(WIDE, param_dtype="bfloat16")
    _, batch, model = sort(half)
    made = write(tmp_path, model, Compress(anytime=True, multiple=2))
    assert str(sort_run(model)[1]["0.factors"].dtype) == "bfloat16"
    args = (tmp_path, half, made.params, made.buffers)
    ready, how = read_anytime(*args, Compress(cut=0.3))
    apart = model.cut(Compress(cut=0.3, multiple=2))
    opened = ready.cut(how)
    wanted = logits(*apart[:2], batch, apart.buffers)
    found = logits(*opened[:2], batch, opened.buffers)
    whole = logits(*made[:2], batch)
    # What opening adds is little beside what cutting does.
    added, lost = np.linalg.norm(found - wanted), np.linalg.norm(wanted - whole)
    assert added < 0.1 * lost + 1e-6


def test_what_is_given_is_taken_also_where_it_is_the_usual(tmp_path):
    _, _, model = sort(WIDE)
    way = {"allocate": "bi", "temperature": 3.0, "multiple": 4, "device": "B200"}
    made = write(tmp_path, model, Compress(anytime=True, **way))
    args = (tmp_path, WIDE, made.params, made.buffers)
    how = read_anytime(*args, Compress(cut=0.3))[1]
    assert how.way() == ("modegpt", *way.values())
    usual = Compress().way()._asdict()
    how = read_anytime(*args, Compress(cut=0.3, **usual))[1]
    assert how.way() == Compress().way() == ("modegpt", "curve", 1.0, 8, "H200")


def test_a_file_of_another_version_is_refused(tmp_path, monkeypatch):
    _, _, model = sort(WIDE)
    monkeypatch.setattr(anytime, "_FORMAT", 2)
    made = write(tmp_path, model, Compress(anytime=True))
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="is of another version.* --anytime"):
        read_anytime(tmp_path, WIDE, made.params, made.buffers, Compress(cut=0.3))
