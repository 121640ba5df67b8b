"""What is loaded already isn't loaded again: a choice among checkpoints is refused."""

from pathlib import Path

import pytest

import uoe_jax as uoe
from uoe_jax.errors import ConfigError
from uoe_jax.runs.load import LoadedRun


@pytest.mark.parametrize("choice", [{"which": "best"}, {"step": 3}, {"cut": 0.3}])
def test_a_loaded_run_has_no_other_checkpoint(choice):
    fields = dict.fromkeys(LoadedRun._fields) | {"folder": Path("runs/a"), "step": 7}
    run = LoadedRun(**fields)
    assert uoe.load_run(run) is run
    with pytest.raises(ConfigError, match="runs/a is loaded already, at step 7"):
        uoe.load_run(run, **choice)
