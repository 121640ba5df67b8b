"""Too little memory: the cause, what was predicted and what would fit."""

import dataclasses
import re

import jax
import pytest

from uoe_jax.errors import OutOfMemory
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.train import loop, train
from uoe_jax.train.memory import explain_memory

ERROR = jax.errors.JaxRuntimeError(
    "RESOURCE_EXHAUSTED: Out of memory allocating 12345 bytes.\nmany\nlines"
)


def raising(error):
    class Step:
        def lower(self, *args):
            raise error

    return lambda *args: Step()


@pytest.mark.parametrize("error", [ERROR, MemoryError("Unable to allocate 3 TiB")])
def test_a_run_that_does_not_fit_says_what_would(tiny, tmp_path, monkeypatch, error):
    monkeypatch.setattr(loop, "make_step", raising(error))
    with pytest.raises(OutOfMemory) as found:
        train(tiny(data={"batch_size": 32}), tmp_path, quiet=True)
    text = str(found.value)
    assert found.value.exit_code == 4 and "\n" not in text
    assert text.startswith("out of memory (about ") and "a device predicted" in text
    assert str(error).splitlines()[0] in text and "what would take less: --" in text


def test_other_errors_stay_what_they_are(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "make_step", raising(ValueError("something else")))
    with pytest.raises(ValueError, match="something else"):
        train(tiny(), tmp_path, quiet=True)


def test_each_way_out_takes_less_than_was_predicted(tiny):
    config = tiny(data={"batch_size": 64})
    model = dataclasses.replace(config.model, max_seq_len=512, d_model=64)
    config = dataclasses.replace(config, model=model)
    text = str(explain_memory(config, mesh_for(config), ERROR))
    sizes = [
        float(number.replace(",", "")) * {"GB": 1e9, "MB": 1e6}[unit]
        for number, unit in re.findall(r"([\d.,]+) (GB|MB)", text)
    ]
    need, *others = sizes
    assert len(others) == 3 and max(others) < need and others == sorted(others)


def test_a_device_that_says_what_it_has_is_believed(tiny, monkeypatch):
    from uoe_jax.train import memory

    monkeypatch.setattr(memory, "device_bytes", lambda mesh: 8e9)
    config = tiny()
    assert "8 GB there" in str(explain_memory(config, mesh_for(config), ERROR))
