"""Calibration finds the factors that made the times, and says how far off it is."""

import dataclasses
import json
import random

import pytest

from uoe_jax.errors import DataError
from uoe_jax.hardware import fit, gemm
from uoe_jax.hardware.devices import find_device, parse_topology
from uoe_jax.hardware.roofline import DEFAULT_FACTORS, Calibration, predict
from uoe_jax.presets import get_preset

pytestmark = pytest.mark.both_jax

H200 = find_device("NVIDIA H200")
TRUTH = Calibration(
    device="H200",
    factors={kind: 1.2 * factor for kind, factor in DEFAULT_FACTORS.items()},
    step_seconds=0.002,
)


def timed(noise=0.0, seed=0):
    """Steps as TRUTH would have them, with relative noise."""
    rng = random.Random(seed)
    found = []
    for preset in ("small", "small-union", "small-moe", "1b", "1b-union"):
        for batch, length in ((8, 1024), (4, 2048), (16, 1024), (2, 4096)):
            base = get_preset(preset)
            config = dataclasses.replace(
                base,
                model=dataclasses.replace(base.model, max_seq_len=8192),
                data=dataclasses.replace(base.data, batch_size=batch, seq_len=length),
            )
            topology = parse_topology("h200:1")
            seconds = predict(config, fit.ONE, topology, TRUTH).step_seconds
            seconds *= 1 + noise * rng.uniform(-1, 1)
            name = f"{preset} {batch} x {length}"
            found.append(fit.Measurement(name=name, config=config, seconds=seconds))
    return found


def test_exact_times_are_fitted_exactly():
    measured = timed()
    calibration = fit.fit(H200, measured, "made up")
    errors = fit.check(H200, calibration, measured)
    assert errors.median < 0.01 and errors.worst < 0.05


def laid_out():
    """Steps of layouts of two cards, on links that are slower than the data sheet's and
    hide less than all."""
    truth = dataclasses.replace(TRUTH, links=1.4, beside=0.6)
    topology, found = parse_topology("h200:2"), []
    for preset in ("small", "small-union", "1b", "1b-union"):
        for axis in ("data", "fsdp", "tensor", "sequence"):
            config, sizes = get_preset(preset), fit.ONE | {axis: 2}
            seconds = predict(config, sizes, topology, truth).step_seconds
            item = fit.Measurement(
                name=f"{preset} {axis}", config=config, seconds=seconds, sizes=sizes
            )
            found.append(item)
    return found


def test_links_are_learned_from_layouts():
    measured = [*timed(), *laid_out()]
    calibration = fit.fit(H200, measured, "made up")
    assert calibration.links == pytest.approx(1.4, abs=0.1)
    assert 0.3 < calibration.beside < 0.7  # it weighs little, and is drawn to 0
    assert fit.check(H200, calibration, measured).median < 0.01
    assert fit.leave_one_out(H200, measured).median < 0.01
    # One card's steps say nothing of links, and are predicted as before.
    alone = fit.fit(H200, timed(), "made up")
    assert (alone.links, alone.beside) == (1.0, 0.0)


def test_other_shapes_are_predicted_from_noisy_ones():
    measured = timed(noise=0.05)
    calibration = fit.fit(H200, measured[::2], "made up")
    errors = fit.check(H200, calibration, measured[1::2])
    assert errors.median < 0.08


def test_each_step_is_predicted_from_the_others():
    measured = timed(noise=0.02)[::4]  # one shape of each preset
    left_out = fit.leave_one_out(H200, measured)
    assert left_out.errors.keys() == {item.name for item in measured}
    assert left_out.median < 0.1
    # What is left out isn't known: one wild step is missed by as much as it is wild.
    wild = dataclasses.replace(measured[0], seconds=10 * measured[0].seconds)
    found = fit.leave_one_out(H200, [wild, *measured[1:]])
    assert found.errors[wild.name] < -0.8
    with pytest.raises(DataError, match="at least two"):
        fit.leave_one_out(H200, measured[:1])


def test_no_factor_beats_the_data_sheet():
    fast = [dataclasses.replace(m, seconds=m.seconds / 100) for m in timed()]
    calibration = fit.fit(H200, fast, "too fast")
    assert all(factor >= 1 for factor in calibration.factors.values())
    assert fit.check(H200, calibration, fast).median > 1


def test_a_file_of_timed_steps_is_read(tmp_path):
    path = tmp_path / "steps.json"
    result = {"preset": "small", "batch": 8, "seq_len": 512, "milliseconds": 30.0}
    path.write_text(json.dumps({"device": "NVIDIA H200", "results": [result]}))
    device, measured = fit.read_measurements(path)
    assert device.name == "H200"
    assert measured[0].seconds == 0.03
    assert measured[0].config.seq_len == 512


def test_a_file_of_timed_layouts_is_read(tmp_path):
    path = tmp_path / "layouts.json"
    row = {"run": "1b:8", "layout": "tensor 2, reduce_scatter", "milliseconds": 900.0}
    row |= {"preset": "1b", "batch": 8, "seq_len": 8192, "remat": "full"}
    row |= {"choices": {"tensor_reduce": "reduce_scatter"}, "mesh": {"tensor": 2}}
    failed = {"run": "1b:8", "layout": "data 2", "failed": "no room"}
    about = {"device": "2 x NVIDIA H200", "results": [row, failed]}
    path.write_text(json.dumps(about))
    device, (item,) = fit.read_measurements(path)
    assert device == H200 and item.name == "1b:8, tensor 2, reduce_scatter"
    assert item.sizes == {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 2}
    assert item.config.layout.scatters and item.config.model.recompute == "full"
    for wrong, said in (
        ({"choices": {"tensor_reduction": "x"}}, "can't be read"),
        ({"mesh": {"model": 2}}, "its axes are data, fsdp, sequence, tensor"),
        ({"mesh": {"tensor": "2"}}, "its axes are"),
        ({"mesh": {"tensor": 4}}, "on 2 devices"),
    ):
        path.write_text(json.dumps(about | {"results": [row | wrong]}))
        with pytest.raises(DataError, match=said):
            fit.read_measurements(path)
    del row["batch"]
    path.write_text(json.dumps(about))
    with pytest.raises(DataError, match="has a step without 'batch'; time it anew"):
        fit.read_measurements(path)


@pytest.mark.parametrize(
    "text,message",
    [
        ("{}", "isn't a file of timed steps"),
        ("[1]", "isn't a file of timed steps"),
        ('{"device": "abacus", "results": []}', "no data sheet"),
        (
            '{"device": "NVIDIA H200", "results": [{"milliseconds": 1, '
            '"run": "1b-union:2,mlp_experts=4"}]}',
            "time the runs to fit without mlp_experts and attention_experts",
        ),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "steps.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        fit.read_measurements(path)


@pytest.mark.parametrize("read", [fit.read_measurements, fit.load, gemm.load])
def test_a_file_that_isnt_there_is_named_with_what_makes_one(tmp_path, read):
    path = tmp_path / "none.json"
    with pytest.raises(DataError) as error:
        read(path)
    said = str(error.value)
    assert f"{path} can't be read (No such file or directory); " in said
    assert "Errno" not in said


def test_a_calibration_survives_its_file(tmp_path):
    fit.save(TRUTH, tmp_path / "h200.json")
    assert fit.load(tmp_path / "h200.json") == TRUTH
    (tmp_path / "bad.json").write_text('{"speed": 1}')
    with pytest.raises(DataError, match="isn't a calibration"):
        fit.load(tmp_path / "bad.json")


def test_nothing_measured_is_refused():
    with pytest.raises(DataError, match="no timed steps"):
        fit.fit(H200, [], "empty.json")
