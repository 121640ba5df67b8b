"""A run with `remat auto`: what it says, stores, and goes on with."""

import dataclasses

import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.runs.folder import as_recorded
from uoe_jax.train import memory, train
from uoe_jax.validation import read_config


def auto(config, **train_fields):
    model = dataclasses.replace(config.model, remat="auto", scan_layers=True)
    changes = dataclasses.replace(config.train, **train_fields)
    return dataclasses.replace(config, model=model, train=changes)


def test_the_choice_is_said_stored_and_kept(tiny, tmp_path, monkeypatch, capsys):
    run, asked = tmp_path / "run", auto(tiny())
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: 1e12)
    half = dataclasses.replace(asked.train, steps=asked.train.steps // 2)
    train(dataclasses.replace(asked, train=half), run)
    assert "remat auto: none, layers compiled one by one" in capsys.readouterr().out
    stored = read_config(run)
    assert (stored.model.remat, stored.model.scan_layers) == ("none", False)
    # Another device's memory, the same command: as the run began.
    monkeypatch.setattr(memory, "device_bytes", lambda mesh: None)
    train(asked, run)
    said = capsys.readouterr().out
    assert "resuming from step" in said and "remat auto" not in said
    assert read_config(run).model == stored.model
    # A folder whose run hasn't begun settles nothing.
    assert as_recorded(tmp_path / "none", asked) == asked
    wrong = dataclasses.replace(asked.model, remat="full")
    with pytest.raises(ConfigError, match="model.remat is 'full', was 'none'"):
        train(dataclasses.replace(asked, model=wrong), run)


def test_on_a_cpu_all_is_computed_again(tiny, tmp_path, capsys):
    train(auto(tiny(), steps=0), tmp_path / "run")
    assert "memory of this device isn't known" in capsys.readouterr().out
    assert read_config(tmp_path / "run").model.remat == "full"
