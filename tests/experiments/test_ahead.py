"""A model that another process compiles while this one trains."""

import os
import signal
import sys
import time
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from experiments.shared.ahead import Ahead
from experiments.shared.arrays import load_split
from experiments.shared.case import change
from experiments.shared.programs import Programs
from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig
from uoe_jax.data.split import SPLITS

SMALL = ModelConfig(
    num_layers=1, d_model=32, num_heads=2, num_kv_heads=2, d_ff=48, vocab_size=256
)
CONFIG = change(
    ExperimentConfig(
        model=SMALL,
        data=DataConfig(source="stdlib", max_bytes=60_000, seq_len=32, batch_size=4),
    ),
    train={"steps": 20},
)


@pytest.fixture
def cache(tmp_path):
    """A cache on disk of its own, which keeps every program as the tests' does."""
    name = "jax_compilation_cache_dir"
    before = jax.config.values[name]
    jax.config.update(name, str(tmp_path / "compiled"))
    compilation_cache.reset_cache()
    yield tmp_path / "compiled"
    jax.config.update(name, before)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("data"))
    config = change(CONFIG, data={"cache_dir": folder})
    return {split: load_split(config, split) for split in SPLITS}


def test_a_runs_programs_are_found_where_the_other_process_put_them(
    cache, data, monkeypatch
):
    monkeypatch.setenv("JAX_NUM_CPU_DEVICES", str(jax.device_count()))
    said = []
    ahead = Ahead(said.append)
    ahead.begin("small", CONFIG, data, tokens=True)
    assert ahead.busy and not ahead.done("small")
    ahead.begin("second", CONFIG, data)  # one at a time
    assert ahead.begun == {"small"}
    assert ahead.wait("other") == 0.0 and ahead.busy
    assert ahead.wait("small") > 0 and ahead.done("small") and not ahead.busy
    made = {file.name for file in cache.iterdir() if file.name.endswith("-cache")}
    names = {name.split("-")[0] for name in made}
    assert {"jit_many", "jit_run", "jit_init", "jit__each_token"} <= names
    Programs(CONFIG, data).compile(tokens=True)
    after = {file.name for file in cache.iterdir() if file.name.endswith("-cache")}
    big = lambda files: {f for f in files if f.split("-")[0] in names}
    assert big(after) == big(made)  # nothing that it made is made again
    ahead.begin("small", CONFIG, data)  # not twice
    assert not ahead.busy and not said


def test_a_process_that_is_killed_or_fails_ends_nothing(cache, data, capfd):
    said = []
    ahead = Ahead(said.append)
    ahead.begin("killed", CONFIG, data)
    os.kill(ahead.process.pid, signal.SIGKILL)
    assert ahead.wait("killed") == 0.0 and not ahead.busy and not ahead.done("killed")
    ahead.begin("killed", CONFIG, data)  # it may be the model's fault
    assert not ahead.busy
    ahead.begin("wrong", change(CONFIG, train={"steps": 21}), data)
    assert ahead.wait("wrong") == 0.0 and not ahead.done("wrong")
    assert [line.partition(";")[0] for line in said] == [
        "compiling ahead ended with -9", "compiling ahead ended with 1"
    ]  # fmt: skip
    assert "an experiment has 20 chunks" in capfd.readouterr().err
    ahead.begin("left", CONFIG, data)
    ahead.stop()
    ahead.stop()
    assert not ahead.busy and ahead.begun == {"killed", "wrong", "left"}


def test_one_that_hangs_is_waited_for_so_long(cache, data, monkeypatch):
    monkeypatch.setattr("experiments.shared.ahead._PATIENCE", 0.2)
    said = []
    ahead = Ahead(said.append)
    ahead.begin("slow", CONFIG, data)
    start = time.monotonic()
    assert ahead.wait("slow") == 0.0 and time.monotonic() - start < 60
    assert not ahead.busy and said[0].startswith("compiling ahead ended with -9")


def test_without_a_cache_on_disk_nothing_begins(cache, data):
    jax.config.update("jax_compilation_cache_dir", None)
    ahead = Ahead(pytest.fail)
    ahead.begin("small", CONFIG, data)
    assert not ahead.busy and not ahead.begun


def test_no_experiment_compiles_in_a_second_thread():
    """Loading what cuDNN made beside a run broke both."""
    shared = Path(sys.modules[Ahead.__module__].__file__).parent
    files = [*shared.glob("*.py"), *(shared.parent / "e012_evidence").glob("*.py")]
    threads = ("ThreadPoolExecutor", "import threading")
    found = [f.name for f in files if any(t in f.read_text() for t in threads)]
    assert found == ["devices.py"]  # passes on the lines of other processes
