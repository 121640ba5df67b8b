"""A run with `remat auto`: what it says, stores, and goes on with."""

import dataclasses

import jax
import pytest

from tests.train.test_multihost import start
from uoe_jax.config import MeshConfig
from uoe_jax.errors import ConfigError, OutOfMemory
from uoe_jax.hardware.recompute import with_settings
from uoe_jax.runs.folder import as_recorded, check_settings
from uoe_jax.train import loop, memory, train
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


def test_a_choice_that_did_not_fit_is_none(tiny, tmp_path, monkeypatch, capsys):
    run, asked = tmp_path / "run", auto(tiny(), steps=1)

    def too_much(*args, **options):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(memory, "device_bytes", lambda mesh: 1e12)
        patch.setattr(loop._Run, "compile", too_much)
        with pytest.raises(OutOfMemory, match="--model.remat full, slower"):
            train(asked, run, quiet=True)
    assert read_config(run).model.remat == "none" and (run / "checkpoints/0").exists()
    # What the refusal says is possible; auto looks at the device again.
    model = dataclasses.replace(asked.model, remat="full")
    check_settings(run, dataclasses.replace(asked, model=model))
    train(asked, run)
    assert "remat auto: full" in capsys.readouterr().out
    assert read_config(run).model.remat == "full"
    other = dataclasses.replace(asked.model, remat="dots")
    with pytest.raises(ConfigError, match="model.remat is 'dots', was 'full'"):
        check_settings(run, dataclasses.replace(asked, model=other))


SETTLES = """
import sys
from pathlib import Path
import jax
from uoe_jax.config import from_json
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.train import memory
from uoe_jax.train.peers import join

jax.config.update("jax_num_cpu_devices", 1)
join()
config = from_json(Path(sys.argv[1]).read_text())
mesh = mesh_for(config)
assert memory.device_bytes(mesh) is None  # its own device is asked
for known in ([1e12, 1e12], [1e12, 1e3], [1e12, None]):
    memory.device_bytes = lambda mesh: known[jax.process_index()]
    model = memory.settle_memory(config, mesh)[0].model
    print("settled", model.remat, model.scan_layers, flush=True)
"""


def test_processes_whose_devices_say_otherwise_settle_alike(tiny, tmp_path):
    workers = start(auto(tiny()), tmp_path, tmp_path / "run", code=SETTLES)
    try:
        codes = [worker.wait(timeout=300) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    logs = [(tmp_path / f"worker-{index}.log").read_text() for index in range(2)]
    assert codes == [0, 0], logs
    for log in logs:
        said = [line for line in log.splitlines() if line.startswith("settled")]
        assert said == ["settled none False", "settled full True", "settled full True"]


def test_what_a_run_began_with_is_checked_against_these_devices(
    tiny, tmp_path, monkeypatch
):
    asked = dataclasses.replace(auto(tiny(), steps=0), mesh=MeshConfig(data=1))
    begun = with_settings(asked, 0, 0, asked.data.batch_size)  # one row a part
    train(begun, tmp_path / "run", quiet=True)
    wide = dataclasses.replace(asked, mesh=MeshConfig(data=2))
    with pytest.raises(ConfigError, match="doesn't divide"):
        train(wide, tmp_path / "run", quiet=True)
