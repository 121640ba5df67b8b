"""JAX_ENABLE_X64 changes no number of a command: it is ignored, with a line."""

import jax
import numpy as np
import pytest

from tests.cli.test_init_from import saved, train
from uoe_jax.cli import main
from uoe_jax.errors import ConfigError
from uoe_jax.presets import get_preset
from uoe_jax.train import train as run_training

train = train  # the fixture, for this module too


@pytest.fixture
def x64():
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


def test_training_and_sampling_are_those_of_32_bits(train, tmp_path, x64, capsys):
    assert train(tmp_path / "wide", "--quiet", steps=1) == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("note: JAX_ENABLE_X64 is ignored")
    assert not jax.config.read("jax_enable_x64")
    assert train(tmp_path / "plain", "--quiet", steps=1) == 0
    first, second = (saved(tmp_path / name, 1) for name in ("wide", "plain"))
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype != np.float64
        assert first[name].tobytes() == second[name].tobytes(), name
    texts = []
    for wide in (True, False):
        jax.config.update("jax_enable_x64", wide)
        options = ("--prompt", "ab", "--max-new-tokens", "8", "--seed", "3")
        capsys.readouterr()
        assert main(["generate", str(tmp_path / "wide"), *options]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1]


def test_from_python_it_is_refused(tmp_path, x64):
    with pytest.raises(ConfigError, match="jax_enable_x64 is on"):
        run_training(get_preset("tiny"), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
