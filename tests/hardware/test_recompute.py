"""`remat auto`: the choice at the borders of a memory, for presets, on resume."""

import dataclasses

import pytest

from uoe_jax.config import ExperimentConfig
from uoe_jax.hardware.devices import DEVICES
from uoe_jax.hardware.recompute import (
    LEAST_TOKENS,
    SHARE,
    adopt_recompute,
    peak_bytes,
    settle_recompute,
)
from uoe_jax.presets import PRESETS, get_preset

ONE = {"data": 1, "fsdp": 1, "tensor": 1, "sequence": 1}
H200 = next(d for d in DEVICES if d.name == "H200").memory_bytes
ALLOCATED = 0.75 * H200  # what jax says of a GPU, as it takes three quarters


def changed(config, part, **values):
    return dataclasses.replace(
        config, **{part: dataclasses.replace(getattr(config, part), **values)}
    )


def as_run(config, parts):
    """A config that recomputes nothing, its batch in parts."""
    config = changed(config, "model", remat="none", scan_layers=False)
    return changed(config, "train", accumulate=parts)


@pytest.mark.parametrize("name", ["1b", "1b-union"])
@pytest.mark.parametrize("memory", [H200, ALLOCATED])
def test_an_h200_trains_1b_as_its_benchmark_does(name, memory):
    config, line = settle_recompute(get_preset(name), ONE, memory)
    assert (config.model.remat, config.model.scan_layers) == ("none", False)
    assert config.data.batch_size == 16  # the same steps, in parts
    rows = 16 // config.train.accumulate
    assert 3 <= rows <= 8  # the benchmark's batches are 3 and 5
    assert peak_bytes(config, ONE) <= SHARE * memory
    assert "remat auto: none" in line and f"{config.train.accumulate} parts" in line


@pytest.mark.parametrize("name", ["1b", "1b-union", "7b"])
def test_at_a_border_one_byte_decides(name):
    asked = get_preset(name)
    for parts, fewer in ((1, None), (2, 1), (4, 2), (8, 4)):
        need = peak_bytes(as_run(asked, parts), ONE)
        enough = need / SHARE + 1
        found, line = settle_recompute(asked, ONE, enough)
        assert found == as_run(asked, parts)
        assert ("parts" in line) == (parts > 1)
        found, line = settle_recompute(asked, ONE, need / SHARE - 1)
        assert found != as_run(asked, parts)
        if fewer is not None:  # as few parts as fit
            other = peak_bytes(as_run(asked, fewer), ONE)
            assert other > SHARE * enough
    # Below the smallest part that kernels are fast with all is computed again.
    assert LEAST_TOKENS == 16 // 8 * asked.seq_len
    assert found == changed(asked, "model", remat="full")
    assert line.startswith("remat auto: full") and "more than 90%" in line


def test_unknown_memory_keeps_what_was_before_auto():
    for name in ("1b", "7b-union"):
        found, line = settle_recompute(get_preset(name), ONE, None)
        assert found == changed(get_preset(name), "model", remat="full")
        assert found.model.scan_layers and found.train.accumulate == 1
        assert "isn't known" in line


def test_what_is_given_stays():
    for remat in ("none", "dots", "full"):
        config = changed(get_preset("1b"), "model", remat=remat)
        for memory in (None, 1.0, 1e15):
            assert settle_recompute(config, ONE, memory) == (config, None)
    parts = changed(get_preset("1b"), "train", accumulate=4)
    found, _ = settle_recompute(parts, ONE, 1e15)
    assert found.train.accumulate == 4
    several = {"data": 4, "fsdp": 2, "tensor": 1, "sequence": 1}
    for memory in (20e9, 60e9, 1e15):
        found, _ = settle_recompute(get_preset("1b"), several, memory)
        assert 16 % (found.train.accumulate * 8) == 0
    default = [name for name in PRESETS if get_preset(name).model.remat == "auto"]
    assert {n.partition("-")[0] for n in default} == {"1b", "7b"}
    assert ExperimentConfig().model.remat == "none"


def test_auto_counts_as_full_until_it_is_settled():
    auto = get_preset("1b")
    assert auto.model.recompute == "full"
    full = changed(auto, "model", remat="full")
    assert peak_bytes(auto, ONE) == peak_bytes(full, ONE)


def test_a_run_is_gone_on_with_as_it_began():
    asked = get_preset("1b-union")
    begun, _ = settle_recompute(asked, ONE, ALLOCATED)
    assert adopt_recompute(asked, begun) == begun
    smaller, _ = settle_recompute(adopt_recompute(asked, begun), ONE, 24e9)
    assert smaller == begun
    # What is asked for otherwise isn't lost: it is refused as another config.
    other = changed(asked, "train", accumulate=3)
    assert adopt_recompute(other, begun) == other
    given = changed(asked, "model", remat="dots")
    assert adopt_recompute(given, begun) == given
