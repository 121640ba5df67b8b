"""Calibration of the cost model from measured steps, and its error. Imports no jax.

A measured step is a sum of kinds of work at the data sheet's rate, each times a factor;
of several devices also the collectives that are waited for and those beside other work.
The factors are those that make the relative errors least, none below 1: nothing runs
faster than its peak.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from uoe_jax.config import ExperimentConfig, LayoutConfig
from uoe_jax.errors import DataError
from uoe_jax.files import format_json, read_json, write_atomically
from uoe_jax.hardware.devices import Device, Topology, find_device
from uoe_jax.hardware.gemm import GemmModel
from uoe_jax.hardware.roofline import (
    DEFAULT_FACTORS,
    LEARNED_FACTORS,
    UNCALIBRATED,
    Calibration,
    Prediction,
    predict,
)
from uoe_jax.presets import get_preset

ONE = {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
_LEAST_LEARNED = 0.8
_FIXED = "fixed"  # what a step costs whatever its size
# Seconds of collectives at the data sheet's bandwidth: those that nothing hides, and
# the others. How much of these is waited for is a factor like the rest.
_LINKS, _BESIDE = "links", "beside"
_KINDS = (*DEFAULT_FACTORS, _LINKS, _BESIDE, _FIXED)
# Weights of the default factors beside one measurement. What is measured decides which:
# a few steps, or ones that the model explains badly, need a strong one.
_PRIORS = (0.02, 0.06, 0.2, 0.6)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One timed configuration, on one chip or laid out on several."""

    name: str
    config: ExperimentConfig
    seconds: float
    sizes: Mapping[str, int] = field(default_factory=lambda: dict(ONE))


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Relative errors of predicted against measured steps, by measurement."""

    errors: dict[str, float]

    @property
    def median(self) -> float:
        """Median of the errors' sizes."""
        return statistics.median(abs(e) for e in self.errors.values())

    @property
    def worst(self) -> float:
        """The largest error's size."""
        return max(abs(e) for e in self.errors.values())


def read_measurements(path: Path) -> tuple[Device, list[Measurement]]:
    """Return the device and the steps timed in a file of `benchmarks/bench_train.py`,
    or of `benchmarks/bench_layouts.py`.

    Raises:
      DataError: not such a file, or of a device that isn't known.
    """
    try:
        content = read_json(path)
        results, kind = content["results"], content["device"]
        before, _, after = kind.partition(" x ")  # so many of a kind
        devices, kind = (int(before), after) if before.isdecimal() else (1, kind)
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}); make a file of timed steps with "
            "benchmarks/bench_train.py --out FILE"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} isn't a file of timed steps ({error}); make one with "
            "benchmarks/bench_train.py --out FILE"
        ) from None
    device = find_device(kind)
    if device is None:
        raise DataError(f"{path} is of {kind!r}, which has no data sheet here")
    timed = [result for result in results if "milliseconds" in result]
    for result in timed:
        if "_experts=" in result.get("run", ""):
            raise DataError(
                f"{path} has {result['run']!r}, whose union isn't its preset's; time "
                "the runs to fit without mlp_experts and attention_experts"
            )
    try:
        return device, [_measurement(result, devices) for result in timed]
    except KeyError as error:
        raise DataError(
            f"{path} has a step without {error}; time it anew with "
            "benchmarks/bench_train.py or bench_layouts.py"
        ) from None
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{path} has a step that can't be read ({error}); time it anew with "
            "benchmarks/bench_train.py or bench_layouts.py"
        ) from None


def _measurement(result: dict[str, Any], devices: int) -> Measurement:
    config = get_preset(result["preset"])
    batch, length = result["batch"], result["seq_len"]
    model = dataclasses.replace(
        config.model,
        max_seq_len=max(length, config.model.max_seq_len),
        remat=result.get("remat", config.model.remat),
        scan_layers=result.get("scan_layers", config.model.scan_layers),
    )
    data = dataclasses.replace(config.data, batch_size=batch, seq_len=length)
    train = dataclasses.replace(config.train, accumulate=result.get("accumulate", 1))
    layout = LayoutConfig(**result.get("choices", {}))
    config = dataclasses.replace(
        config, model=model, data=data, train=train, layout=layout
    )
    name = result.get("run", f"{result['preset']}:{batch} x {length}")
    sizes = ONE | result.get("mesh", {})
    whole = all(type(size) is int and size > 0 for size in sizes.values())
    if sizes.keys() != ONE.keys() or not whole:
        raise ValueError(f"mesh {sizes}: its axes are {', '.join(ONE)}")
    if math.prod(sizes.values()) not in (1, devices):
        raise ValueError(f"mesh {sizes} on {devices} devices")
    if "layout" in result:
        name += f", {result['layout']}"
    seconds = result["milliseconds"] / 1000
    return Measurement(name=name, config=config, seconds=seconds, sizes=sizes)


def fit(
    device: Device,
    measured: Sequence[Measurement],
    source: str,
    gemm: GemmModel | None = None,
) -> Calibration:
    """Return the calibration that predicts the measurements best.

    With `gemm` the factors of products are of what it predicts.

    Raises:
      DataError: nothing was measured.
    """
    if not measured:
        raise DataError(f"{source} holds no timed steps; nothing to calibrate from")
    rows, learned = _rows(device, measured, gemm), gemm is not None
    solved = _solve(rows, _best_prior(rows, learned), learned)
    factors = dict(zip(_KINDS, solved, strict=True))
    fixed, links, beside = (factors.pop(kind) for kind in (_FIXED, _LINKS, _BESIDE))
    return Calibration(
        device=device.name,
        factors={kind: round(value, 4) for kind, value in factors.items()},
        step_seconds=round(fixed * _UNIT, 6),
        source=source,
        learned=learned,
        links=round(links, 4),
        beside=round(beside, 4),
    )


def leave_one_out(
    device: Device, measured: Sequence[Measurement], gemm: GemmModel | None = None
) -> Errors:
    """Return the relative error of each measurement as the others predict it.

    Raises:
      DataError: fewer than two were measured.
    """
    if len(measured) < 2:
        raise DataError(
            f"{len(measured)} timed steps; leaving one out needs at least two"
        )
    rows, learned = _rows(device, measured, gemm), gemm is not None
    errors = {}
    for place, item in enumerate(measured):
        others = [*rows[:place], *rows[place + 1 :]]
        solved = _solve(others, _best_prior(others, learned), learned)
        errors[item.name] = _error(rows[place], solved)
    return Errors(errors=errors)


_UNIT = 1e-3  # seconds that one unit of the fixed factor stands for


def _rows(
    device: Device, measured: Sequence[Measurement], gemm: GemmModel | None
) -> list[list[float]]:
    """Return each kind's ideal time over the measured one: their sum, weighted with
    the factors, is the predicted time over the measured one."""
    rows = []
    for item in measured:
        ideal = _ideal(device, item, gemm)
        rows.append([ideal[kind] / item.seconds for kind in _KINDS])
    return rows


def _error(row: Sequence[float], factors: Sequence[float]) -> float:
    return sum(a * x for a, x in zip(row, factors, strict=True)) - 1


def _best_prior(rows: Sequence[Sequence[float]], learned: bool) -> float:
    """Return the weight with which measurements predict each other best."""
    if len(rows) < 2:
        return _PRIORS[-1]

    def left_out(prior: float) -> float:
        return sum(
            abs(
                _error(row, _solve([*rows[:place], *rows[place + 1 :]], prior, learned))
            )
            for place, row in enumerate(rows)
        )

    return min(_PRIORS, key=left_out)


def _solve(rows: Sequence[Sequence[float]], prior: float, learned: bool) -> list[float]:
    factors = LEARNED_FACTORS if learned else DEFAULT_FACTORS
    defaults = [*factors.values(), 1.0, 0.0, 0.0]
    # Only a data sheet's rate can't be beaten: a model may be slow by its own error.
    same = [factors[kind] == DEFAULT_FACTORS[kind] for kind in factors]
    least = [1.0 if known else _LEAST_LEARNED for known in same] + [1.0, 0.0, 0.0]
    return _least_squares(rows, defaults, least, prior)


def _ideal(
    device: Device, item: Measurement, gemm: GemmModel | None
) -> dict[str, float]:
    """Return the seconds of each kind of work at the full rate, or by `gemm`, and of
    the collectives."""
    factors = dict.fromkeys(DEFAULT_FACTORS, 1.0)
    learned = gemm is not None
    calibration = dataclasses.replace(UNCALIBRATED, factors=factors, learned=learned)
    found = _predict(device, calibration, item, gemm)
    hidden = sum(time for c, time in found.collectives if c.hidden)
    waits = sum(time for c, time in found.collectives if not c.hidden)
    return {**found.work_seconds, _LINKS: waits, _BESIDE: hidden, _FIXED: _UNIT}


def _predict(
    device: Device, calibration: Calibration, item: Measurement, gemm: GemmModel | None
) -> Prediction:
    count = math.prod(item.sizes.values())
    shape = (count,) + (1,) * (_dimensions(device) - 1)
    topology = Topology(name="measured", device=device, shape=shape)
    return predict(item.config, item.sizes, topology, calibration, gemm)


def _dimensions(device: Device) -> int:
    return device.link.dimensions if device.link.kind == "torus" else 1


def _least_squares(
    rows: Sequence[Sequence[float]],
    defaults: Sequence[float],
    least: Sequence[float],
    prior: float,
) -> list[float]:
    """Return x >= least that makes |rows x - 1|^2 + |prior (x / defaults - 1)|^2 least.

    The objective is convex, so descent along one coordinate at a time ends at its
    minimum.
    """
    size = range(len(defaults))
    squares = [[sum(row[i] * row[j] for row in rows) for j in size] for i in size]
    sides = [sum(row[i] for row in rows) for i in size]
    for i in size:
        weight = (prior / max(defaults[i], 1.0)) ** 2
        squares[i][i] += weight
        sides[i] += weight * defaults[i]
    x = list(defaults)
    for _ in range(500):
        moved = 0.0
        for i in size:
            rest = sides[i] - sum(squares[i][j] * x[j] for j in size if j != i)
            new = max(least[i], rest / squares[i][i])
            moved = max(moved, abs(new - x[i]))
            x[i] = new
        if moved < 1e-6:
            break
    return x


def check(
    device: Device,
    calibration: Calibration,
    measured: Sequence[Measurement],
    gemm: GemmModel | None = None,
) -> Errors:
    """Return the relative errors of a calibration on measured steps."""
    errors = {}
    for item in measured:
        found = _predict(device, calibration, item, gemm)
        errors[item.name] = found.step_seconds / item.seconds - 1
    return Errors(errors=errors)


def save(calibration: Calibration, path: Path) -> None:
    """Write a calibration as JSON."""
    text = format_json(dataclasses.asdict(calibration), indent=1) + "\n"
    write_atomically(path, text)


def load(path: Path) -> Calibration:
    """Return a calibration written by `save`; raise DataError on anything else."""
    try:
        return Calibration(**read_json(path))
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}); make a calibration with "
            "uoe plan --fit FILE"
        ) from None
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path} isn't a calibration ({error}); make one with uoe plan --fit FILE"
        ) from None
