"""`uoe bench gemm` and what reads its model: a tiny sweep on this machine's CPU."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from tests.compare import assert_close
from uoe_jax.bench import gemm as sweep
from uoe_jax.bench import gemm_command
from uoe_jax.bench.gemm_cases import (
    Case,
    all_cases,
    candidates,
    draw_ids,
    random_cases,
    tuned_shape,
)
from uoe_jax.bench.traffic import traffic
from uoe_jax.cli import main
from uoe_jax.hardware import gemm, gemm_fit
from uoe_jax.hardware.devices import find_device
from uoe_jax.hardware.product import Product
from uoe_jax.ops import measured
from uoe_jax.ops.grouped_matmul.nvidia import tiles as triton_tiles
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles, choose_tiles

# A made-up chip with an H200's name, so slow that this machine's roofline is its own.
SLOW = dataclasses.replace(
    find_device("NVIDIA H200"), bf16_flops=1e9, memory_bandwidth=1e9
)


@pytest.fixture
def quick(monkeypatch, tmp_path):
    for name, value in (
        ("POOL_BYTES", 1 << 22), ("CACHE_BYTES", 1e5), ("REPEAT_SECONDS", 1e-5),
        ("WARM_SECONDS", 0.0), ("STEADY", 1e9),
    ):  # fmt: skip
        monkeypatch.setattr(sweep, name, value)
    monkeypatch.setattr(gemm_fit, "STEADY", 1e9)
    monkeypatch.setenv(gemm.FOLDER, str(tmp_path / "own"))


def test_a_sweep_is_written_fitted_kept_and_drawn(quick, tmp_path):
    cases = [Case(m=8 * i, n=16, k=8 * (i % 5 + 1)) for i in range(1, 19)]
    request = gemm_command.GemmRequest(
        out=tmp_path / "rows.json", plot=tmp_path / "plot.png"
    )
    lines = []
    found = gemm_command.run_gemm(request, lines.append, cases, SLOW)
    content = json.loads(request.out.read_text())
    assert len(content["rows"]) == len(cases)
    assert all(row["seconds"] > 0 for row in content["rows"])
    assert content["about"]["repeats"] >= 10 and content["about"]["warm_ups"] == 3
    assert request.plot.read_bytes().startswith(b"\x89PNG")
    kept = gemm.load(gemm.own_path("H200"))
    asked = [Product(m=40, n=16, k=24)]
    assert (kept.seconds(asked)[0] == found.seconds(asked)[0]).all()
    assert gemm.choose(None, find_device("NVIDIA H200")).trees.keys() == {"dot"}
    assert any("unseen shapes" in line for line in lines)
    assert "power: no meter was read" in lines


def test_a_product_is_that_of_its_operands(quick):
    for case in (
        Case(m=24, n=16, k=8, dtype="float32"),
        Case(m=24, n=16, k=8, dtype="float32", layout="nt"),
        Case(m=24, n=16, k=8, dtype="float32", layout="tn"),
        Case(op="ragged_dot", m=24, n=16, k=8, dtype="float32", groups=3, seed=1),
    ):
        (prepared,) = sweep.Sweep(1).prepare([case])
        args = sweep.Sweep(1)._operands(prepared)
        for (x, w), out in zip(args[0], prepared.programs[0](*args), strict=True):
            x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
            if case.op == "ragged_dot":
                ends = np.cumsum(case.group_sizes())[:-1]
                parts = zip(np.split(x, ends), w, strict=True)
                want = np.concatenate([rows @ weight for rows, weight in parts])
            else:
                x = x.T if case.layout == "tn" else x
                want = x @ (w.T if case.layout == "nt" else w)
            assert np.abs(np.asarray(out) - want).max() < 1e-3 * np.abs(want).max()


def test_operands_do_not_fit_the_cache():
    for case in (Case(m=512, n=512, k=512), Case(m=64, n=128, k=128)):
        sets = sweep._operands(case)
        size = 2 * (case.m * case.k + case.k * case.n + case.m * case.n)
        assert len(sets) == sweep.MOST_SETS or len(sets) * size > sweep.CACHE_BYTES


def test_the_sweep_is_wide_enough(monkeypatch):
    cases = all_cases(300, 0)
    shapes = {(c.op, c.m, c.n, c.k, c.groups, c.dtype) for c in cases}
    assert len(shapes) >= 150
    assert {c.op for c in cases} == {"dot", "ragged_dot", "products", "weight_grads"}
    assert {c.dtype for c in cases} == {"bfloat16", "float32"}
    for case in cases:
        assert case.group_sizes().sum() == case.rows
        if case.gather:
            offsets, ids = draw_ids(case)
            assert len(ids) == case.rows == offsets[-1]
            assert 0 <= ids.min() and ids.max() < case.tokens


def test_the_seed_typed_draws_the_products(quick, tmp_path, monkeypatch, capsys):
    def small(count, seed):
        return [
            Case(m=8 * (number + 1), n=16, k=8 * (case.k % 5 + 1))
            for number, case in enumerate(random_cases(count, seed))
        ]

    monkeypatch.setattr(gemm_command, "all_cases", small)
    monkeypatch.setattr(gemm_command, "find_device", lambda kind: SLOW)
    drawn = {}
    for seed in (3, 4):
        out = tmp_path / f"{seed}.json"
        asked = ["--products", "36", "--seed", str(seed), "--out", str(out)]
        assert main(["bench", "gemm", *asked]) == 0
        content = json.loads(out.read_text())
        command = f"uoe bench gemm --products 36 --seed {seed}"
        assert content["about"]["command"] == command
        drawn[seed] = [(row["m"], row["n"], row["k"]) for row in content["rows"]]
        assert drawn[seed] == [(c.m, c.n, c.k) for c in small(36, seed)]
    assert drawn[3] != drawn[4]


def test_refusals(capsys):
    assert main(["bench", "gemm"]) == 2
    assert "'cpu' has no data sheet here" in capsys.readouterr().err
    assert main(["bench", "gemm", "train"]) == 2
    assert "gemm is timed by itself; run train on its own" in capsys.readouterr().err
    assert main(["bench", "gemm", "--products", "0"]) == 2
    assert "--products is 0; it must be at least 1" in capsys.readouterr().err


def test_cost_lists_a_steps_products(capsys, tmp_path):
    assert main(["cost", "1b-union", "--gemm", "h200", "--batch", "8", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["products"]
    assert found["model"] == "products as timed on H200"
    total = sum(row["seconds"] * row["times"] for row in found["rows"])
    assert_close(found["seconds"], total, 1e-9)
    assert all(r["low"] <= r["seconds"] <= r["high"] for r in found["rows"])
    assert main(["cost", "1b", "--gemm", "h300"]) == 2
    assert "--gemm is 'h300'; give a file of uoe bench gemm" in capsys.readouterr().err
    assert main(["cost", "1b", "--gemm", "t4"]) == 2
    assert "of which no products were timed" in capsys.readouterr().err
    (tmp_path / "no.json").write_text("{}")
    assert main(["cost", "1b", "--gemm", str(tmp_path / "no.json")]) == 2
    assert "isn't a model of products" in capsys.readouterr().err


def test_plan_says_which_it_used(capsys):
    assert main(["plan", "1b-union", "--topology", "h200:2"]) == 0
    assert "products as timed on H200" in capsys.readouterr().out
    shipped = str(Path(gemm.__file__).with_name("models") / "h200.json")
    asked = ["plan", "1b-union", "--topology", "h200:2", "--gemm", shipped]
    assert main(asked) == 0
    assert "products as timed on H200" in capsys.readouterr().out
    assert main(["plan", "1b-union", "--topology", "a100:2"]) == 0
    assert "typical shares of the peak, not measured" in capsys.readouterr().out


@pytest.fixture
def on_h200(monkeypatch, tmp_path):
    """Choices as on an H200; nothing is launched."""
    monkeypatch.setenv(gemm.FOLDER, str(tmp_path))
    monkeypatch.setattr(measured, "device_kind", lambda: "NVIDIA H200")
    gemm.find.cache_clear()
    triton_tiles._predict.cache_clear()
    yield
    gemm.find.cache_clear()
    triton_tiles._predict.cache_clear()


def test_a_tile_is_measured_then_predicted_then_near(on_h200, monkeypatch):
    shape = {"rows": 98304, "inner": 1536, "outer": 768, "dtype": "bfloat16",
             "gather": True, "transpose": False}  # fmt: skip
    tile = Tiles(128, 64, 128, 4, 4, 2)
    entry = {"shape": dict(shape), "tile": tile._asdict(), "ms": 1.0}
    monkeypatch.setattr(measured, "load", lambda: {"tiles": {"products": [entry]}})
    grouped = shape | {"groups": 12}
    assert choose_tiles("products", grouped) == tile  # its own shape was measured
    far = grouped | {"rows": 4 * 98304}
    assert choose_tiles("products", far) in triton_tiles.CANDIDATES["products"]
    # A device without a model: the nearest that was measured.
    monkeypatch.setattr(measured, "device_kind", lambda: "NVIDIA A100")
    assert choose_tiles("products", far) == tile


def test_a_predicted_tile_is_no_wider_than_its_product(on_h200, monkeypatch):
    monkeypatch.setattr(measured, "load", lambda: {})
    shape = {"rows": 4096, "inner": 32, "outer": 100, "dtype": "bfloat16",
             "gather": "grad", "groups": 3}  # fmt: skip
    tile = choose_tiles("weight_grads", shape)
    assert tile.inner <= 32 and tile.outer <= 128


def test_candidates_begin_with_the_tables_tile(on_h200, monkeypatch):
    case = Case(op="products", m=4096, n=512, k=256, groups=4)
    tile = Tiles(32, 32, 32, 4, 4, 2)
    entry = {"shape": {"rows": 4096, "inner": 256, "outer": 512}, "tile":
             tile._asdict()}  # fmt: skip
    monkeypatch.setattr(measured, "load", lambda: {"tiles": {"products": [entry]}})
    assert candidates(case)[0] == tile
    assert tuned_shape(case)["groups"] == 4


HLO = """HloModule step

%body (p: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %g = bf16[8,16]{1,0} all-gather(%x), replica_groups={{0,1}}, dimensions={0}
  %r = f32[4,16]{1,0} reduce-scatter(%y), replica_groups=[1,2]<=[2], to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %w = (s32[], bf16[8,16]) while(%t), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"24"}}
  %s = (bf16[4,16]{1,0}, bf16[8,16]{1,0}) all-gather-start(%x), replica_groups={{0,1}}
  %b = ((f32[3]{0}, bf16[4]{0:T(8)(128)}), (f32[3]{0}, bf16[4]{0})) all-reduce-start(%a, %c), replica_groups={{0,1}}
  %v = ((bf16[6,2]{1,0}, bf16[6,2]{1,0:S(1)}, s64[2]{0}), bf16[6,2]{1,0:S(1)}) ragged-all-to-all-start(%a), replica_groups={{0,1}}
  %u = bf16[6,2]{1,0} ragged-all-to-all(%a), replica_groups={{0,1}}
  %p = ((bf16[4,6]{1,0}), bf16[4,6]{1,0}) collective-permute-start(%a), source_target_pairs={{0,2},{2,4},{4,0},{1,3},{3,5},{5,1}}
  %q = f32[7]{0} collective-permute(%a), source_target_pairs={{0,1},{1,2}}
  %e = ((bf16[2,5]{1,0}), bf16[2,5]{1,0}) all-to-all-start(%a), replica_groups={{0,1,2,3}}, dimensions={0}
  %m = f32[10]{0} all-reduce(%a), replica_groups=mesh['data'=1,'tensor'=2] {'tensor'}
  %one = f32[10]{0} all-reduce(%a), replica_groups=mesh['data'=1,'tensor'=2] {'data'}
}
"""  # noqa: E501


def test_collectives_are_counted_with_their_turns():
    found = {(r["kind"], r["bytes"]): r["count"] for r in traffic(HLO)}
    assert found == {
        ("all_gather", 8 * 16 * 2): 24 + 1,
        ("reduce_scatter", 2 * 4 * 16 * 4): 24,
        ("all_reduce", 40): 1,
        ("all_reduce", 3 * 4 + 4 * 2): 1,  # what it takes, not what it gives as well
        # Of all devices that share them:
        ("ragged_all_to_all", 2 * 6 * 2 * 2): 2,
        ("collective_permute", 3 * 4 * 6 * 2): 1,
        ("collective_permute", 3 * 7 * 4): 1,
        ("all_to_all", 4 * 2 * 5 * 2): 1,
    }
    with pytest.raises(ValueError, match="unknown length"):
        traffic(HLO.replace("known_trip_count", "unknown"))
