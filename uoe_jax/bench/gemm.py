"""Timed matrix products: the sweep that `hardware.gemm` is fitted to.

A program makes the same product over several sets of operands that don't fit the L2
cache together, one after another, so neither the start of a program nor a warm cache is
measured. A time is the median of at least ten repeats.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.bench.gemm_cases import Case, candidates, draw_ids
from uoe_jax.bench.record import made_with
from uoe_jax.errors import first_line
from uoe_jax.hardware.count import DTYPE_BYTES
from uoe_jax.ops import nvidia
from uoe_jax.ops.grouped_matmul.nvidia.launch import products, weight_grads
from uoe_jax.ops.grouped_matmul.nvidia.tiles import Tiles

WARM_UPS, REPEATS = 3, 12
REPEAT_SECONDS = 4e-3
WARM_SECONDS = 0.06  # so long a product runs before it is timed: clocks have settled
STEADY = 0.10  # the most that the interquartile range may be of the median
CACHE_BYTES = 150e6  # of all operand sets: more than twice the L2 of any GPU here
MOST_SETS = 8
POOL_BYTES = 1 << 30  # of random numbers that operands are cut from
METER_SECONDS = 1.1  # a loop of this length for the power meter
METER_MILLISECONDS = 50


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One case with one tile: median seconds of a product, spread, mean watts."""

    case: Case
    tile: Tiles | None
    seconds: float | None = None
    spread: float | None = None  # interquartile range over the median
    watts: float | None = None
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return what was measured as plain values."""
        found = self.case.as_dict() | {
            "tile": None if self.tile is None else [int(n) for n in self.tile]
        }
        for name in ("seconds", "spread", "watts", "note"):
            if getattr(self, name) not in (None, ""):
                found[name] = getattr(self, name)
        return found


@dataclass(frozen=True)
class Prepared:
    """A case whose programs are compiled: what fills its operands, one for each tile.

    A program that didn't compile is the exception that said so.
    """

    case: Case
    fill: Any
    programs: tuple[Any, ...]


class Sweep:
    """Compiles and times cases."""

    def __init__(self, threads: int | None = None):
        self.threads = ThreadPoolExecutor(threads or os.cpu_count())
        self._numbers: dict[str, jax.Array] = {}

    def run(self, cases: Sequence[Case], chunk: int) -> Iterator[Timing]:
        """Yield the timings of cases, compiled some at a time."""
        for first in range(0, len(cases), chunk):
            for prepared in self.prepare(cases[first : first + chunk]):
                self.start(prepared)
                yield from self.measure(prepared)

    def prepare(self, cases: Sequence[Case]) -> list[Prepared]:
        """Return the cases with their programs, compiled by threads."""

        def begin(case: Case) -> list[Future]:
            calls = [functools.partial(_compile_fill, case)]
            calls += [
                functools.partial(_compile, case, tile) for tile in candidates(case)
            ]
            return [self.threads.submit(_try, call) for call in calls]

        waiting = [(case, begin(case)) for case in cases]
        found = []
        for case, futures in waiting:
            fill, *programs = (future.result() for future in futures)
            found.append(Prepared(case, fill, tuple(programs)))
        return found

    def start(self, prepared: Prepared) -> None:
        """Run every program once: kernels are assembled when first launched."""
        if isinstance(prepared.fill, Exception):
            return
        args = self._operands(prepared)
        for program in prepared.programs:
            if not isinstance(program, Exception):
                _try(lambda program=program: jax.block_until_ready(program(*args)))

    def measure(self, prepared: Prepared) -> Iterator[Timing]:
        """Yield the timings of a case's tiles, their repeats in turn.

        So all tiles meet the same clock, which falls where the power limit is reached.
        """
        case, fill = prepared.case, prepared.fill
        if isinstance(fill, Exception):
            yield Timing(case=case, tile=None, note=_named(fill))
            return
        args = self._operands(prepared)
        runs: dict[Any, functools.partial] = {}
        for tile, program in zip(candidates(case), prepared.programs, strict=True):
            run = functools.partial(run_once, program, args)
            fault = _try(run)
            if isinstance(fault, Exception):  # one refusal must not end the sweep
                yield Timing(case=case, tile=tile, note=_named(fault))
            else:
                runs[tile] = run
        times = time_in_turn(runs, len(args[0]))
        unsteady = {t: runs[t] for t, (_, spread) in times.items() if spread > STEADY}
        times |= time_in_turn(unsteady, len(args[0]))
        for number, (tile, (seconds, spread)) in enumerate(times.items()):
            watts = None
            if case.meter and not number:
                watts = _watts(runs[tile], seconds * len(args[0]))
            yield Timing(
                case=case, tile=tile, seconds=seconds, spread=spread, watts=watts,
                note="" if spread <= STEADY else "unsteady",
            )  # fmt: skip

    def _operands(self, prepared: Prepared) -> tuple[Any, ...]:
        case = prepared.case
        sets = prepared.fill(self._pool_of(case.dtype))
        return sets, *(jnp.asarray(a) for a in draw_ids(case))

    def _pool_of(self, dtype: str) -> jax.Array:
        if dtype not in self._numbers:
            size = POOL_BYTES // DTYPE_BYTES[dtype]
            key = jax.random.key(os.getpid())
            normal = lambda: jax.random.normal(key, (size,), dtype)
            self._numbers[dtype] = jax.jit(normal)()
        return self._numbers[dtype]


def run_once(program: Any, args: tuple) -> Any:
    """Run a compiled program to its end; raise what kept it from compiling."""
    if isinstance(program, Exception):
        raise program
    return jax.block_until_ready(program(*args))


def time_in_turn(
    runs: Mapping[Any, functools.partial], products: int
) -> dict[Any, tuple[float, float]]:
    """Return the median seconds of a product and the spread of its repeats, by tile."""
    calls, times = {}, {tile: [] for tile in runs}
    for tile, run in runs.items():
        once = min(_seconds(run, 1) for _ in range(WARM_UPS))
        calls[tile] = max(1, min(200, round(REPEAT_SECONDS / max(once, 1e-6))))
    begin = time.perf_counter()
    while runs and time.perf_counter() - begin < WARM_SECONDS:
        for tile, run in runs.items():
            _seconds(run, calls[tile])
    for _ in range(REPEATS):
        for tile, run in runs.items():
            times[tile].append(_seconds(run, calls[tile]) / products)
    found = {}
    for tile, measured in times.items():
        low, middle, high = statistics.quantiles(measured, n=4)
        found[tile] = (middle, (high - low) / middle)
    return found


def _seconds(run: functools.partial, calls: int) -> float:
    """Return the seconds of a call, `calls` of them back to back."""
    program, args = run.args
    out = None
    start = time.perf_counter()
    for _ in range(calls):
        out = program(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / calls


def _operands(case: Case) -> list[tuple[jax.ShapeDtypeStruct, ...]]:
    """Return the shapes of a case's sets of operands."""
    one = tuple(
        jax.ShapeDtypeStruct(shape, case.dtype) for shape in case.operand_shapes()
    )
    size = sum(math.prod(spec.shape) for spec in one)
    size += case.m * case.n * (case.groups if case.layout == "tn" else 1)
    count = math.ceil(CACHE_BYTES / (size * DTYPE_BYTES[case.dtype]))
    return [one] * min(MOST_SETS, max(2, count))


def _compile_fill(case: Case) -> Any:
    """Compile a function that cuts sets of operands out of a pool of numbers."""
    total = POOL_BYTES // DTYPE_BYTES[case.dtype]
    sets = _operands(case)

    def cut(numbers: jax.Array, spec: jax.ShapeDtypeStruct, place: float) -> jax.Array:
        size = math.prod(spec.shape)
        if size > total:
            return jnp.resize(numbers, spec.shape)
        first = int((total - size) * place)
        return numbers[first : first + size].reshape(spec.shape)

    def fill(numbers: jax.Array) -> list[tuple[jax.Array, ...]]:
        places = iter(np.linspace(0, 1, sum(map(len, sets))).tolist())
        return [tuple(cut(numbers, spec, next(places)) for spec in one) for one in sets]

    numbers = jax.ShapeDtypeStruct((total,), case.dtype)
    return jax.jit(fill).lower(numbers).compile()


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _try(fun: Callable[[], Any]) -> Any:
    try:
        return fun()
    except Exception as error:
        return error


def _compile(case: Case, tile: Tiles | None) -> Any:
    """Compile a program that makes the product of every set of operands."""
    sets, one = _operands(case), _product_of(case, tile)
    if tile is not None:
        nvidia.require(jnp.dtype(case.dtype))
    extra = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in draw_ids(case)]

    def run(sets: Any, *extra: Any) -> Any:
        return [one(left, right, *extra) for left, right in sets]

    return jax.jit(run).lower(sets, *extra).compile()


def _product_of(case: Case, tile: Tiles | None) -> Callable:
    """Return the function of one set of operands, and of offsets and ids if grouped."""
    if case.op == "dot":
        left, right = {"nn": (1, 0), "nt": (1, 1), "tn": (0, 0)}[case.layout]
        dims = (((left,), (right,)), ((), ()))
        return lambda x, w: jax.lax.dot_general(x, w, dims)
    if case.op == "ragged_dot":
        return lambda x, w, offsets, ids: jax.lax.ragged_dot(x, w, jnp.diff(offsets))
    if case.op == "products":
        return lambda x, w, offsets, ids: products(
            x, w, offsets, ids if case.gather else None,
            transpose=case.layout == "nt", tiles=tile,
        )  # fmt: skip
    return lambda x, g, offsets, ids: weight_grads(
        x, g, offsets,
        ids if case.gather == "x" else None,
        ids if case.gather == "grad" else None,
        tile,
    )  # fmt: skip


def _watts(run: functools.partial, once: float) -> float | None:
    """Return the mean power during a loop, its first fifth dropped; None: no meter."""
    with meter() as samples:
        if samples is None:
            return None
        start = time.monotonic()
        while time.monotonic() - start < METER_SECONDS:
            _seconds(run, max(1, round(0.05 / max(once, 1e-6))))
        stop = time.monotonic()
        begin = start + 0.2 * (stop - start)
        kept = [watts for when, watts in samples if begin <= when <= stop]
    return statistics.fmean(kept) if len(kept) >= 5 else None


@contextlib.contextmanager
def meter() -> Iterator[list[tuple[float, float]] | None]:
    """Collect (time, watts) of the first GPU while the body runs; None: no meter."""
    command = ["nvidia-smi", "--query-gpu=power.draw.instant", "-i", "0"]
    command += ["--format=csv,noheader,nounits", f"-lms={METER_MILLISECONDS}"]
    try:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        yield None
        return
    samples: list[tuple[float, float]] = []

    def read() -> None:
        for line in process.stdout or ():
            if re.fullmatch(r"\s*[\d.]+\s*", line):
                samples.append((time.monotonic(), float(line)))

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        process.terminate()
        process.wait()
        thread.join()


def about() -> dict[str, Any]:
    """Return what a sweep was made with."""
    device = jax.devices()[0]
    return {
        **made_with(),
        "units": getattr(device, "core_count", 1),
        "repeats": REPEATS,
        "warm_ups": WARM_UPS,
    }
