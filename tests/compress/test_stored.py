"""Statistics kept in a file: read if they are of this very model and text."""

import numpy as np
import pytest

from tests.compress.test_apply import WIDE
from tests.compress.test_statistics import batch_of
from tests.decompose.test_exact import draw
from uoe_jax.compress import stored
from uoe_jax.compress.files import from_triangle, to_triangle
from uoe_jax.compress.stored import stored_statistics
from uoe_jax.errors import ConfigError, DataError, NonFiniteError


def see(file, seed=1, batch=None, tokenizer="a", given=False):
    params, batch = draw(WIDE, seed), batch or batch_of(WIDE)
    return stored_statistics(file, WIDE, (params, {}), batch, tokenizer, given=given)


@pytest.fixture
def counted(monkeypatch):
    """How often a model was observed."""
    calls, observe = [], stored.observe
    count = lambda *a, **more: calls.append(1) or observe(*a, **more)
    monkeypatch.setattr(stored, "observe", count)
    return calls


def test_what_is_seen_once_is_read_the_next_time(tmp_path, counted):
    file = tmp_path / "statistics.safetensors"
    first, second = see(file), see(file)
    assert len(counted) == 1 and [p.name for p in tmp_path.iterdir()] == [file.name]
    for one, other in zip(first, second, strict=True):
        for name, array in one._asdict().items():
            assert np.array_equal(getattr(other, name), array), name


@pytest.mark.parametrize("change, words", [
    ({"seed": 2}, "of another checkpoint"),
    ({"tokenizer": "b"}, "of another tokenizer"),
    ({"batch": batch_of(WIDE, seed=3)}, "of another calibration text"),
])  # fmt: skip
def test_statistics_of_something_else_are_refused_or_seen_anew(
    tmp_path, counted, capsys, change, words
):
    file = tmp_path / "statistics.safetensors"
    see(file)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=f"holds statistics {words}; give another"):
        see(file, **change, given=True)
    assert file.read_bytes() == before and len(counted) == 1
    capsys.readouterr()
    found = see(file, **change)
    lines = capsys.readouterr().err.splitlines()
    assert f"{file} holds statistics {words}: observing again" in lines[0]
    assert len(counted) == 2 and file.read_bytes() != before
    again = see(file, **change)
    assert len(counted) == 2
    assert np.array_equal(again[0].neurons, found[0].neurons)


def test_a_damaged_file_is_refused_or_seen_anew(tmp_path, counted, capsys):
    file = tmp_path / "statistics.safetensors"
    see(file)
    whole = bytearray(file.read_bytes())
    whole[-3] ^= 1
    for broken in (bytes(whole), whole[: len(whole) // 2], b"nothing of the sort"):
        file.write_bytes(broken)
        with pytest.raises(DataError, match=r"changed bytes|damaged"):
            see(file, given=True)
        see(file)
        assert "observing again" in capsys.readouterr().err
    assert len(counted) == 4


def test_a_folder_that_cannot_be_written_is_said_and_no_matter(tmp_path, capsys):
    file = tmp_path / "nowhere" / "statistics.safetensors"
    assert len(see(file)) == WIDE.num_layers
    assert "the next cut observes again" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="can't be written"):
        see(file, given=True)


def test_triangles_are_their_matrices():
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(2, 5, 5))
    symmetric = whole + whole.swapaxes(1, 2)
    assert (from_triangle(to_triangle(symmetric), True) == symmetric).all()
    assert (from_triangle(to_triangle(whole), False) == np.tril(whole)).all()


def test_a_given_file_without_a_folder_is_refused_before_the_model_runs(
    tmp_path, counted
):
    with pytest.raises(ConfigError, match="no folder .*nowhere.; give another"):
        see(tmp_path / "nowhere" / "s.safetensors", given=True)
    assert not counted


def test_a_model_that_computes_no_numbers_leaves_no_file(tmp_path):
    params = dict(draw(WIDE, 1))
    name = next(n for n in params if n.endswith("mlp.w_up"))
    params[name] = params[name] * np.float32(np.nan)
    file = tmp_path / "statistics.safetensors"
    with pytest.raises(NonFiniteError, match="layer 0 has values that aren't finite"):
        stored_statistics(file, WIDE, (params, {}), batch_of(WIDE), "a", given=False)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_the_place_of_a_file_is_said_to_be_one(tmp_path, counted):
    with pytest.raises(ConfigError, match="is a folder; give a file, such as"):
        see(tmp_path, given=True)
    assert not counted


def test_statistics_of_an_earlier_version_are_seen_anew(
    tmp_path, counted, capsys, monkeypatch
):
    file = tmp_path / "statistics.safetensors"
    with monkeypatch.context() as earlier:
        earlier.setattr(stored, "_FORMAT", 1)
        see(file)
    with pytest.raises(ConfigError, match="of another version; give another"):
        see(file, given=True)
    see(file)
    said = capsys.readouterr().err
    assert f"{file} holds statistics of another version: observing again" in said
    assert see(file)[-1].head_input.shape == (16, 16) and len(counted) == 2
