"""Every layout of a topology with what it is predicted to cost. Imports no jax."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from uoe_jax.config import ExperimentConfig, LayoutConfig, MeshConfig, from_json
from uoe_jax.errors import ConfigError, all_divisors, divisors
from uoe_jax.files import format_json, read_json, write_atomically
from uoe_jax.hardware.devices import Topology
from uoe_jax.hardware.gemm import GemmModel
from uoe_jax.hardware.gemm import describe as describe_gemm
from uoe_jax.hardware.roofline import UNCALIBRATED, Calibration, Prediction, predict
from uoe_jax.partition.legal import AXES, Sizes, layout_problems
from uoe_jax.plan.rings import ring_steps
from uoe_jax.splits import split_axes


class Verdict(NamedTuple):
    """One factorisation of the devices; legal where nothing speaks against it."""

    sizes: dict[str, int]
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Layouts that fit, fastest first; those that don't, least short first."""

    config: ExperimentConfig
    topology: Topology
    calibration: Calibration
    fitting: tuple[Prediction, ...]
    too_large: tuple[Prediction, ...]
    illegal: tuple[Verdict, ...]
    gemm: GemmModel | None = None  # that the products' seconds come from


def factorisations(num_devices: int) -> Iterator[dict[str, int]]:
    """Yield every way to write a number of devices as a product of the axes."""

    def split(count: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if len(axes) == 1:
            yield {axes[0]: count}
            return
        for size in all_divisors(count):
            for rest in split(count // size, axes[1:]):
                yield {axes[0]: size, **rest}

    yield from split(num_devices, AXES)


def verdicts(config: ExperimentConfig, num_devices: int) -> list[Verdict]:
    """Return every factorisation of the devices with what speaks against it."""
    return [
        Verdict(sizes, tuple(layout_problems(config, sizes)))
        for sizes in factorisations(num_devices)
    ]


def make_plan(
    config: ExperimentConfig,
    topology: Topology,
    calibration: Calibration = UNCALIBRATED,
    budget: float | None = None,
    fixed: Mapping[str, int] | None = None,
    gemm: GemmModel | None = None,
) -> Plan:
    """Return the predicted plan.

    Args:
      budget: bytes a chip may use; None: all of its memory.
      fixed: devices of some mesh axes; only layouts that have them are compared.
      gemm: what a `learned` calibration takes products from.

    Raises:
      ConfigError: no factorisation of the topology has the fixed axes, or a layout
        rule can't be.
    """
    fixed = fixed or {}
    _check_fixed(fixed, topology)
    split_axes(config.model, config.layout.rules)  # a rule that can't be: no layout is
    limit = topology.device.memory_bytes
    if budget is not None:
        limit = min(limit, budget)
    found, illegal = [], []
    for verdict in verdicts(config, topology.num_devices):
        if any(verdict.sizes[axis] != size for axis, size in fixed.items()):
            continue
        if verdict.problems:
            illegal.append(verdict)
            continue
        rings = ring_steps(config, verdict.sizes, topology)
        prediction = predict(config, verdict.sizes, topology, calibration, gemm, rings)
        found.append(dataclasses.replace(prediction, memory_limit=limit))
    fitting = [p for p in found if p.fits]
    too_large = [p for p in found if not p.fits]
    return Plan(
        config=config,
        topology=topology,
        calibration=calibration,
        fitting=tuple(sorted(fitting, key=lambda p: p.step_seconds)),
        too_large=tuple(sorted(too_large, key=lambda p: p.shortfall)),
        illegal=tuple(illegal),
        gemm=gemm if calibration.learned else None,
    )


def _check_fixed(fixed: Mapping[str, int], topology: Topology) -> None:
    count, product = topology.num_devices, math.prod(fixed.values())
    whole = len(fixed) == len(AXES)
    if product == count or (count % product == 0 and not whole):
        return
    text = " x ".join(f"mesh.{axis} {size}" for axis, size in fixed.items())
    rule = "make up" if whole else "divide"
    raise ConfigError(
        f"{text} must {rule} the {count} devices of {topology.name}; use a product of "
        f"{count if whole else divisors(count)}"
    )


def describe_sizes(sizes: Sizes) -> str:
    """Return a mesh as "fsdp 16, sequence 4"; "one device" where nothing is split."""
    named = [f"{axis} {sizes[axis]}" for axis in AXES if sizes[axis] > 1]
    return ", ".join(named) or "one device"


def as_json(plan: Plan, compiled: Mapping[str, Any]) -> dict[str, Any]:
    """Return a plan as plain numbers; `compiled` is what a compiler said, by mesh."""
    return {
        "experiment": plan.config.name,
        "topology": plan.topology.name,
        "device": plan.topology.device.name,
        "calibration": dataclasses.asdict(plan.calibration),
        "products": describe_gemm(plan.gemm) if plan.gemm else "share of the peak",
        "layouts": [
            _row(p, compiled.get(describe_sizes(p.sizes))) for p in plan.fitting
        ],
        "too_large": [_row(p, None) for p in plan.too_large],
        "illegal": [
            {"mesh": v.sizes, "problems": list(v.problems)} for v in plan.illegal
        ],
    }


def _row(found: Prediction, compiled: Any) -> dict[str, Any]:
    return {
        "mesh": found.sizes,
        "step_seconds": found.step_seconds,
        "tokens_per_second": found.tokens_per_second,
        "mfu": found.mfu,
        "bound": found.bound,
        "memory_bytes": found.memory_bytes,
        "memory": found.memory,
        "shortfall_bytes": found.shortfall,
        "work_seconds": found.work_seconds,
        "collectives": [
            {
                "kind": c.kind,
                "axis": c.axis,
                "what": c.what,
                "bytes": c.num_bytes,
                "count": c.count,
                "seconds": time,
                "hidden": c.hidden,
            }
            for c, time in found.collectives
        ],
        "compiled": compiled,
    }


def write_layout(path: Path, config: ExperimentConfig, sizes: Sizes) -> None:
    """Write a mesh and the layout's choices as a file for `read_layout`."""
    content = {
        "experiment": config.name,
        "mesh": dict(sizes),
        "layout": dataclasses.asdict(config.layout),
    }
    write_atomically(path, format_json(content, indent=1) + "\n")


def read_layout(path: Path, config: ExperimentConfig) -> ExperimentConfig:
    """Return the experiment on the mesh and with the choices of a layout file.

    Raises:
      ConfigError: not a layout file.
    """
    try:
        content = read_json(path)
        mesh, layout = content["mesh"], content["layout"]
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}); write a layout file with uoe "
            "plan PRESET --topology NAME --out FILE"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} isn't a layout file ({type(error).__name__}: {error}); write one "
            "with uoe plan PRESET --topology NAME --out FILE"
        ) from None
    return dataclasses.replace(
        config,
        mesh=from_json(format_json(mesh), MeshConfig),
        layout=from_json(format_json(layout), LayoutConfig),
    )


def reasons(illegal: Sequence[Verdict]) -> list[tuple[str, int, str]]:
    """Return (reason, how many meshes it rules out, the first of them)."""
    seen: dict[str, list[Verdict]] = {}
    for verdict in illegal:
        for problem in verdict.problems:
            seen.setdefault(problem, []).append(verdict)
    rows = [
        (problem, len(found), describe_sizes(found[0].sizes))
        for problem, found in seen.items()
    ]
    return sorted(rows, key=lambda row: -row[1])
