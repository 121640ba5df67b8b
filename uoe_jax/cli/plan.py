"""`uoe plan`: which layouts a topology has, what they cost, and which is fastest."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from uoe_jax.cli.fields import typed_options
from uoe_jax.cli.parse import Experiment, parse
from uoe_jax.cli.paths import take_experiment
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.escape import escape_line
from uoe_jax.fields import Count, Positive, Whole
from uoe_jax.files import check_target, format_json, write_atomically
from uoe_jax.hardware import fit, gemm
from uoe_jax.hardware.devices import Topology, parse_topology
from uoe_jax.hardware.roofline import LEARNED, UNCALIBRATED, Calibration
from uoe_jax.hardware.step_products import step_products
from uoe_jax.partition.legal import AXES
from uoe_jax.plan.layouts import (
    Plan,
    as_json,
    describe_sizes,
    make_plan,
    write_layout,
)
from uoe_jax.report.plan_text import describe
from uoe_jax.report.table import si
from uoe_jax.validation import validate


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """Compare the layouts of a preset or a run on a topology; none is needed here."""

    config: Experiment
    topology: str = "cpu:8"  # v5p:4x4x4, v5e:4x4, h100:8, cpu:8
    budget: Positive | None = None  # GB of memory a chip may use; its own if not given
    compile: Whole = 3  # the fastest layouts compiled ahead of time, on TPU topologies
    kernels: bool = False  # compile what kernels do as well: same memory, many minutes
    max_seconds: Positive = 540.0  # after which nothing more is compiled
    calibration: Path | None = None  # a file of --fit; measured factors
    fit: tuple[Path, ...] = ()  # files of timed steps to calibrate from
    gemm: Path | None = None  # a model of uoe bench gemm; the device's own if not given
    out: Path | None = None  # the fastest layout that fits, for uoe train --layout
    show: Count = 12  # rows of the table
    json: bool = False  # one JSON object instead of tables
    html: Path | None = None  # a page with the table and a picture of each layout


def plan(args: list[str]) -> int:
    """Print the plan of `PRESET|RUN --topology NAME [options]`; 1 if nothing fits."""
    _, preset, rest = take_experiment(args, "plan")
    options = parse(
        PlanOptions,
        rest,
        "plan",
        default=PlanOptions(config=preset),
        first="PRESET|RUN|--config FILE",
    )
    validate(options.config)
    check_target(options.out, "--out")
    check_target(options.html, "--html")
    if options.fit:
        check_target(options.calibration, "--calibration")
    topology = parse_topology(options.topology)
    _check_compile(rest, options, topology)
    model = gemm.choose(options.gemm, topology.device)
    calibration = _calibration(options, topology, model)
    budget = options.budget
    limit = None if budget is None else budget * 1e9
    fixed = _fixed(rest, options.config)
    found = make_plan(options.config, topology, calibration, limit, fixed, model)
    compiled = _compile(options, found) if topology.is_tpu else {}
    content = as_json(found, compiled)
    if options.json:
        print(format_json(content, indent=1))
    else:
        print(describe(found, compiled, options.show))
    if options.html is not None:
        from uoe_jax.report.plan import plan_page

        write_atomically(options.html, plan_page(found, compiled))
        print(escape_line(f"page: {options.html}"), file=sys.stderr)
    if options.out is not None and found.fitting:
        write_layout(options.out, options.config, found.fitting[0].sizes)
        print(escape_line(f"layout: {options.out}"), file=sys.stderr)
    elif options.out is not None:
        print(
            escape_line(f"no layout fits, so {options.out} isn't written"),
            file=sys.stderr,
        )
    return 0 if found.fitting else 1


def _check_compile(args: list[str], options: PlanOptions, topology: Topology) -> None:
    """Raise ConfigError for typed options of a compiler that this topology hasn't."""
    typed = typed_options(args, PlanOptions)
    asked = [o for o in ("--compile", "--kernels", "--max-seconds") if o in typed]
    if asked and not topology.is_tpu and options.compile > 0:
        raise ConfigError(
            f"{asked[0]} is for TPU topologies and this is {topology.name}; leave it "
            "out, its layouts are predicted only"
        )


def _fixed(args: list[str], config: ExperimentConfig) -> dict[str, int]:
    """Return the mesh axes that were typed; `--mesh.data 0` leaves that one open."""
    typed = typed_options(args, PlanOptions)
    sizes = {axis: getattr(config.mesh, axis) for axis in AXES}
    return {a: n for a, n in sizes.items() if f"--mesh.{a}" in typed and n > 0}


def _calibration(
    options: PlanOptions, topology: Topology, model: gemm.GemmModel | None
) -> Calibration:
    """Return the factors asked for, typical ones if none; print the error of a fit."""
    listed = step_products(options.config, fit.ONE) is not None
    if not options.fit:
        if options.calibration is not None:
            return fit.load(options.calibration)
        return LEARNED if model is not None and listed else UNCALIBRATED
    device, measured = fit.read_measurements(options.fit[0])
    for path in options.fit[1:]:
        other, found = fit.read_measurements(path)
        if other != device:
            raise DataError(
                f"{path} was timed on {other.name}, {options.fit[0]} on "
                f"{device.name}; fit one device at a time"
            )
        measured.extend(found)
    names = ", ".join(path.name for path in options.fit)
    own = gemm.choose(options.gemm, device) if listed else None
    calibration = fit.fit(device, measured, names, own)
    errors = fit.check(device, calibration, measured, own)
    text = (
        f"{device.name}: {len(measured)} timed steps fitted with a median error of "
        f"{errors.median:.1%}, at most {errors.worst:.1%}"
    )
    if len(measured) > 1:
        errors = fit.leave_one_out(device, measured, own)
        text += (
            f"; each predicted from the others with {errors.median:.1%}, at most "
            f"{errors.worst:.1%}"
        )
    if device != topology.device:
        text += f"; its factors are used for {topology.device.name}"
    print(text, file=sys.stderr)
    if options.calibration is not None:
        fit.save(calibration, options.calibration)
    return calibration


def _compile(options: PlanOptions, found: Plan) -> dict[str, Any]:
    """Compile the fastest layouts for their TPU; return what the compiler said."""
    count = min(options.compile, len(found.fitting))
    if count == 0:
        return {}
    if importlib.util.find_spec("libtpu") is None:
        print(
            "libtpu isn't installed, so nothing is compiled; "
            "pip install 'uoe_jax[tpu]'",
            file=sys.stderr,
        )
        return {}
    from uoe_jax.cli.device import prepare

    prepare()
    start, results = time.perf_counter(), {}
    for number, layout in enumerate(found.fitting[:count]):
        name = describe_sizes(layout.sizes)
        passed = time.perf_counter() - start
        # The next one takes about as long as those before it.
        if number and passed * (number + 1) / number > options.max_seconds:
            print(
                f"{passed:.0f} s spent: {count - number} not compiled", file=sys.stderr
            )
            break
        print(
            f"[{number + 1}/{count}] compiling {name} for {found.topology.name} ...",
            file=sys.stderr,
            flush=True,
        )
        said = results[name] = _compile_one(options, layout.sizes, found.topology.name)
        text = said.get("error") or f"{si(said['peak_bytes'], 'B')} a chip"
        spent = time.perf_counter() - start - passed
        print(f"{spent:.0f} s: {text}", file=sys.stderr, flush=True)
    return results


def _compile_one(
    options: PlanOptions, sizes: Mapping[str, int], topology: str
) -> dict[str, Any]:
    """Return what the compiler says of one layout, or its refusal.

    Layers are scanned, so that one of each kind is compiled.
    """
    import jax

    from uoe_jax.train.ahead import compile_step, with_mesh

    model = dataclasses.replace(options.config.model, scan_layers=True)
    config = with_mesh(dataclasses.replace(options.config, model=model), sizes)
    try:
        said = compile_step(config, topology, outline=not options.kernels)
    except jax.errors.JaxRuntimeError as error:
        return {"error": " ".join(str(error).split())[:300]}
    about = {"peak_bytes": said.peak_bytes, "with_kernels": options.kernels}
    return {**said.as_dict(), **about}
