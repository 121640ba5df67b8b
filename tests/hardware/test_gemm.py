"""Products of matrices: what they move, and what a model says of them."""

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.errors import ConfigError, DataError
from uoe_jax.hardware import gemm, gemm_fit
from uoe_jax.hardware.devices import find_device, parse_topology
from uoe_jax.hardware.gemm import choose_tile
from uoe_jax.hardware.product import Product, roofline
from uoe_jax.hardware.roofline import LEARNED, UNCALIBRATED, predict
from uoe_jax.hardware.step_products import step_products
from uoe_jax.plan.layouts import make_plan
from uoe_jax.presets import get_preset

H200 = find_device("NVIDIA H200")
TILE = (128, 64, 256, 8, 8, 4, 0, 0)
MODEL = gemm.shipped("H200")
SIDES = st.integers(1, 20_000)


def products(draw):
    kernel = draw(st.sampled_from(["dot", "products", "weight_grads"]))
    tiled = kernel != "dot"
    layout = "tn" if kernel == "weight_grads" else draw(st.sampled_from(["nn", "nt"]))
    groups = draw(st.integers(1, 64)) if tiled else 1
    m, n, k = (draw(SIDES) for _ in range(3))
    sizes = ()
    if tiled and draw(st.booleans()):  # uneven groups, some without rows
        rows = k if layout == "tn" else m
        cuts = np.sort(np.asarray([draw(st.integers(0, rows)) for _ in range(groups)]))
        cuts[-1] = rows
        sizes = tuple(np.diff(cuts, prepend=0).tolist())
    tile = tuple(draw(st.sampled_from(MODEL.tiles[kernel]))) if tiled else None
    return Product(
        m=m, n=n, k=k, groups=groups, layout=layout, kernel=kernel, tile=tile,
        sizes=sizes, dtype=draw(st.sampled_from(["bfloat16", "float32"])),
    )  # fmt: skip


def test_counts_of_a_cube():
    cube = Product(m=512, n=512, k=512, dtype="float32")
    assert cube.flops == 268_435_456
    assert cube.num_bytes == 3_145_728
    assert cube.flops / cube.num_bytes == pytest.approx(85.33, abs=0.01)


def test_bytes_of_groups():
    common = {"groups": 4, "tile": TILE}
    forward = Product(m=100, n=30, k=20, kernel="products", **common)
    assert forward.num_bytes == 2 * (100 * 20 + 4 * 20 * 30 + 100 * 30)
    picked = dataclasses.replace(forward, gather="x", tokens=50)
    assert picked.num_bytes == 2 * (50 * 20 + 4 * 20 * 30 + 100 * 30)
    grads = Product(m=20, n=30, k=100, kernel="weight_grads", layout="tn", **common)
    assert grads.num_bytes == 2 * (100 * 20 + 100 * 30 + 4 * 20 * 30)


@settings(max_examples=150, deadline=None)
@given(st.composite(products)())
def test_no_product_beats_the_roofline(product):
    median, low, high = MODEL.seconds([product])
    assert np.isfinite([median, low, high]).all()
    assert low[0] >= 0.9 * roofline(product, H200) * (1 - 1e-12)
    assert low[0] <= median[0] <= high[0]


def test_twice_the_depth_takes_longer():
    rng = np.random.default_rng(0)
    tiles = MODEL.tiles["products"]
    once = [
        Product(
            m=int(2 ** rng.uniform(9, 17)), n=int(2 ** rng.uniform(6, 13)),
            k=int(2 ** rng.uniform(6, 12)), groups=int(rng.integers(1, 33)),
            kernel="products", tile=tiles[i % len(tiles)],
        )
        for i in range(200)
    ]  # fmt: skip
    once += [
        Product(m=int(2 ** rng.uniform(8, 16)), n=int(2 ** rng.uniform(6, 14)),
                k=int(2 ** rng.uniform(6, 13)))
        for _ in range(200)
    ]  # fmt: skip
    twice = [dataclasses.replace(p, k=2 * p.k) for p in once]
    longer = MODEL.seconds(twice)[0] > MODEL.seconds(once)[0]
    assert longer.mean() >= 0.95


@pytest.mark.parametrize(
    "sides",
    [
        {"m": 1, "n": 1, "k": 1},
        {"m": 3, "n": 128_256, "k": 2048},
        {"m": 16384, "n": 100, "k": 77},
        {"m": 16384, "n": 2048, "k": 1},
    ],
)
def test_odd_shapes_have_a_time(sides):
    grouped = Product(**sides, groups=3, kernel="products", tile=TILE)
    empty = dataclasses.replace(grouped, sizes=(0, sides["m"], 0))
    median, _, _ = MODEL.seconds([Product(**sides), grouped, empty])
    assert (median > 0).all() and np.isfinite(median).all()


def test_a_rows_product_of_another_kernel_or_size_is_refused():
    with pytest.raises(ConfigError, match="m is 0; it must be 1 or more"):
        Product(m=0, n=1, k=1)
    with pytest.raises(ConfigError, match="dtype is 'int4'; choose from bfloat16"):
        Product(m=1, n=1, k=1, dtype="int4")
    with pytest.raises(ConfigError, match="needs its tile"):
        Product(m=1, n=1, k=1, kernel="products")
    thin = dataclasses.replace(MODEL, trees={"dot": MODEL.trees["dot"]})
    with pytest.raises(DataError, match="no 'products', only dot; measure it with uoe"):
        thin.seconds([Product(m=1, n=1, k=1, kernel="products", tile=TILE)])


def test_saved_and_loaded_predict_the_same(tmp_path):
    path = tmp_path / "model.json"
    gemm.save(MODEL, path)
    again = gemm.load(path)
    rng = np.random.default_rng(1)
    asked = [
        Product(m=int(a), n=int(b), k=int(c), kernel="weight_grads", layout="tn",
                groups=7, tile=TILE)
        for a, b, c in rng.integers(1, 9000, (40, 3))
    ]  # fmt: skip
    for ours, theirs in zip(MODEL.seconds(asked), again.seconds(asked), strict=True):
        assert (ours == theirs).all()
    path.write_text(path.read_text().replace('"H200"', '"H2000"', 1))
    with pytest.raises(DataError, match="no device 'H2000'; known: H200, H100"):
        gemm.load(path)
    path.write_text("[1]")
    with pytest.raises(DataError, match="isn't a model of products"):
        gemm.load(path)


def test_equal_tiles_go_to_the_one_that_stages_least():
    product = Product(m=8192, n=512, k=512, groups=8, kernel="products", tile=TILE)
    leaf = lambda: gemm.Trees(
        0.5, np.asarray([0]), np.asarray([-1]), np.asarray([0.0]), np.asarray([0])
    )
    flat = dataclasses.replace(MODEL, trees={"products": leaf()})
    few, many = (128, 64, 128, 8, 4, 3, 0, 0), (128, 64, 256, 8, 8, 4, 0, 0)
    assert choose_tile(flat, product, [many, few]) == few


def test_another_chip_of_the_same_units_takes_its_own_rates():
    wide = Product(m=16, n=16384, k=16384)  # a matrix that is read once
    deep = Product(m=8192, n=8192, k=8192)
    ours, theirs = (
        gemm.shipped(name).seconds([wide, deep])[0] for name in ("H200", "H100")
    )
    assert 1.15 < theirs[0] / ours[0] < 4800 / 3350 * 1.1
    assert theirs[1] / ours[1] == pytest.approx(1, abs=0.1)
    assert gemm.shipped("A100") is None
    assert gemm.describe(gemm.shipped("H100")).endswith("at H100's rates")


def test_a_files_own_model_wins(tmp_path, monkeypatch):
    monkeypatch.setenv(gemm.FOLDER, str(tmp_path))
    mine = dataclasses.replace(MODEL, spread=dict.fromkeys(MODEL.trees, (0.5, 2.0)))
    gemm.save(mine, gemm.own_path("H200"))
    assert gemm.choose(None, H200).spread["dot"] == (0.5, 2.0)
    assert gemm.choose(None, find_device("NVIDIA H100")).spread != mine.spread


def test_a_step_s_products_hold_its_flops():
    """The listed products are the counted FLOPs, but for routers and dense sums."""
    from uoe_jax.hardware.work import device_work

    one = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    for name in ("1b", "small", "7b"):
        config = get_preset(name)
        work = device_work(config, one)
        listed = {"products": 0.0, "output": 0.0}
        for kind, product, times in step_products(config, one):
            listed[kind] += product.flops * times
        for kind, flops in listed.items():
            assert flops == pytest.approx(work[kind], rel=0.01), (name, kind)
    config = get_preset("1b-moe")
    routed = sum(
        p.flops * times for kind, p, times in step_products(config, one)
        if kind == "routed products"
    )  # fmt: skip
    assert routed == pytest.approx(device_work(config, one)["routed products"], rel=0.2)


def test_splits_share_the_products():
    config = get_preset("1b-union")
    one = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    total = lambda sizes: sum(
        p.flops * t for _, p, t in step_products(config, one | sizes)
    )
    whole = total({})
    for sizes in ({"data": 2}, {"fsdp": 4}, {"tensor": 2}, {"sequence": 2}):
        parts = math.prod(sizes.values())
        assert total(sizes) * parts == pytest.approx(whole, rel=0.02)


def test_a_plan_says_where_its_products_come_from():
    config, topology = get_preset("1b-union"), parse_topology("h200:8")
    found = make_plan(config, topology, LEARNED, gemm=MODEL)
    plain = make_plan(config, topology, UNCALIBRATED, gemm=MODEL)
    assert found.gemm is MODEL and plain.gemm is None
    best, old = found.fitting[0], plain.fitting[0]
    # The old factors took a union for slower than a dense model.
    assert best.step_seconds < 0.6 * old.step_seconds


def test_a_plan_takes_less_than_two_seconds():
    """In a process of its own: the suite checks the types of every call."""
    code = (
        "import time; from uoe_jax.hardware import gemm;"
        "from uoe_jax.hardware.devices import parse_topology;"
        "from uoe_jax.hardware.roofline import LEARNED;"
        "from uoe_jax.plan.layouts import make_plan;"
        "from uoe_jax.presets import get_preset;"
        "start = time.process_time(); model = gemm.shipped('H200');"
        "config, chips = get_preset('1b-union'), parse_topology('h200:8');"
        "make_plan(config, chips, LEARNED, gemm=model);"
        "assert time.process_time() - start < 2"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# One card, step times of benchmarks/results (H200), in milliseconds.
@pytest.mark.parametrize(
    ("preset", "batch", "changes", "measured"),
    [
        ("1b", 8, {}, 1595.0),
        ("1b-union", 8, {}, 1011.1),
        ("1b-union", 3, {"remat": "none", "scan_layers": False}, 325.4),
        ("1b", 5, {"remat": "none", "scan_layers": False}, 813.4),
        ("small-moe", 32, {}, 148.8),
    ],
)
def test_steps_that_were_timed(preset, batch, changes, measured):
    config = get_preset(preset)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, batch_size=batch),
        model=dataclasses.replace(config.model, **changes),
    )
    one = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
    found = predict(config, one, parse_topology("h200:1"), LEARNED, MODEL)
    assert found.step_seconds * 1e3 == pytest.approx(measured, rel=0.10)


def test_a_shape_is_on_one_side_of_a_split():
    rng = np.random.default_rng(0)
    tiles = MODEL.tiles["products"][:3]
    rows = []
    for m, n, k in rng.integers(64, 4096, (40, 3)).tolist():
        for tile in tiles:
            product = Product(m=m, n=n, k=k, groups=2, kernel="products", tile=tile)
            seconds = roofline(product, H200) * float(rng.uniform(1.2, 3))
            rows.append(gemm_fit.Timed(product, seconds))
    seen = []

    class Spy:
        def predict(self, x):
            return np.zeros(len(x))

    def boost(x, y):
        seen.append({tuple(row[:4]) for row in x})
        return Spy()

    x, _, y = gemm_fit._table(rows, H200, 132)
    shapes = list(dict.fromkeys(gemm_fit.shape_of(r.product) for r in rows))
    numbers = [shapes.index(gemm_fit.shape_of(r.product)) for r in rows]
    original, gemm_fit._boost = gemm_fit._boost, boost
    try:
        gemm_fit._held_out(x, y, numbers)
    finally:
        gemm_fit._boost = original
    everything = {tuple(row[:4]) for row in x}
    assert len(seen) == gemm_fit.FOLDS
    # Each fold leaves whole shapes out, and together every one of them once.
    assert sum(len(everything - train) for train in seen) == len(everything)
