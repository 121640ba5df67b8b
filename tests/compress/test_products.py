"""Products of low rank: two, or one where a device makes it sooner."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from tests.compress.test_apply import WIDE, logits, near
from tests.compress.test_statistics import batch_of
from tests.decompose.test_exact import draw
from uoe_jax.compress.products import fast_ranks, with_fast_products, with_ranks
from uoe_jax.config import ExperimentConfig, LayerWidths, ModelConfig
from uoe_jax.hardware.gemm import find
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.load import LoadedRun
from uoe_jax.runs.state import Progress

LOW = dataclasses.replace(
    WIDE,
    widths=LayerWidths(
        up_rank=(6, 4), gate_rank=(0, 5), down_rank=(3, 3), value_dim=(4, 8)
    ),
)
H200 = "NVIDIA H200"


def wide(rank, layers=3):
    return ModelConfig(
        d_model=768, d_ff=3072, num_layers=layers, activation="gelu",
        compute_dtype="bfloat16",
        widths=LayerWidths(up_rank=(rank,) * layers, down_rank=(rank,) * layers),
    )  # fmt: skip


def test_a_product_multiplied_out_is_the_same_function():
    params, batch = draw(LOW, 3), batch_of(LOW)
    wanted = {"w_up": (6, 0), "w_gate": (0, 5), "w_down": (0, 0)}
    made = with_ranks(LOW, params, {}, wanted)
    widths = made.config.widths
    assert (widths.up_rank, widths.gate_rank, widths.down_rank) == (
        (6, 0),
        (0, 5),
        None,
    )
    assert widths.value_dim == LOW.widths.value_dim
    near(logits(*made[:2], batch, made.buffers), logits(LOW, params, batch), 1e-5)


# Of 768 to 3,072 (up) and back (down), by the H200's model: two up to the first rank.
@pytest.mark.parametrize("weight, tokens, two, one", [
    ("w_up", 4096, 200, 264), ("w_down", 4096, 128, 136),
    ("w_up", 512, 496, 520), ("w_down", 512, 512, 528),
    ("w_up", 1, 544, 584), ("w_up", 65_536, 512, 528),
])  # fmt: skip
def test_a_known_device_makes_two_products_up_to_a_rank(weight, tokens, two, one):
    known = find(H200)
    kept = lambda rank: fast_ranks(wide(rank), tokens, known)[weight]
    for rank in (8, two // 2, two):
        assert kept(rank) == (rank,) * 3
    for rank in (one, 614):
        assert kept(rank) == (0, 0, 0)


def test_one_row_down_is_always_two_products():
    for rank in (8, 304, 608):
        assert fast_ranks(wide(rank), 1, find(H200))["w_down"] == (rank,) * 3


def test_without_a_known_device_multiplications_are_counted():
    assert find("cpu") is None
    for rank in (1, 300, 614):
        assert fast_ranks(wide(rank), 4096, None)["w_down"] == (rank,) * 3


def test_a_run_says_what_was_multiplied_out_and_computes_the_same(capsys):
    narrow = LayerWidths(up_rank=(21, 21), gate_rank=(3, 3))
    config = dataclasses.replace(
        WIDE, d_model=32, d_ff=64, widths=narrow, compute_dtype="bfloat16"
    )
    params, batch = draw(config, 5), batch_of(config)
    run = LoadedRun(
        ExperimentConfig(name="low", model=config), with_params(config, params, {}),
        0, Path("low"), Progress(),
    )  # fmt: skip
    assert with_fast_products(run, 4096, "abacus") is run
    assert not capsys.readouterr().err
    found = with_fast_products(run, 4096, H200)
    model = found.config.model
    wanted = fast_ranks(config, 4096, find(H200))
    gone = sum(r == 0 for own in wanted.values() for r in own)
    assert gone and f"{gone} of 4 products of low rank" in capsys.readouterr().err
    exact = lambda c: dataclasses.replace(c, compute_dtype="float32")
    arrays = flat_params(found.model), batch, flat_buffers(found.model)
    near(logits(exact(model), *arrays), logits(exact(config), params, batch), 1e-5)
    assert {name: np.shape(a) for name, a in arrays[0].items()} != {
        name: np.shape(a) for name, a in params.items()
    }
    jax.block_until_ready(found.model(batch["tokens"]))


def test_a_model_without_low_ranks_is_left_alone():
    run = LoadedRun(
        ExperimentConfig(name="whole", model=WIDE),
        with_params(WIDE, draw(WIDE, 1), {}), 0, Path("whole"), Progress(),
    )  # fmt: skip
    assert with_fast_products(run, 1, H200) is run
