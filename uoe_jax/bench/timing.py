"""Times of compiled programs: medians over rounds of back-to-back calls."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import jax

from uoe_jax.errors import UoeError

# A round repeats a program for about this long, so that starting it costs nothing.
ROUND_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class Row:
    """One program of one case: its time and rate, or why it has none."""

    op: str
    case: str
    name: str
    what: str = "forward"  # or "both": forward and backward
    milliseconds: float | None = None
    tflops: float | None = None
    gigabytes: float | None = None  # temporary device memory
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields that hold something."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "")}


def both_passes(fun: Callable) -> Callable:
    """Return fun's value and gradients, given its arguments and a cotangent."""

    def run(*args: Any) -> Any:
        *inputs, grad = args
        out, vjp = jax.vjp(fun, *inputs)
        return out, vjp(grad)

    return run


def round_seconds(
    run: Callable[[], Any],
    rounds: int,
    calls: int = 1,
    wait: Callable = jax.block_until_ready,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """Return a call's seconds in each round of `calls`, started back to back.

    `wait(result)` returns when a result is there; `run` has to be warm.
    """
    seconds = []
    for _ in range(rounds):
        start = clock()
        for _ in range(calls - 1):
            run()
        wait(run())
        seconds.append((clock() - start) / calls)
    return seconds


def median_seconds(run: Callable[[], Any], wait: Callable, rounds: int) -> float:
    """Return the median seconds of a call; `wait(result)` returns when it is done."""
    wait(run())
    (once,) = round_seconds(run, 1, wait=wait)
    calls = max(1, min(100, int(ROUND_SECONDS / max(once, 1e-6))))
    return statistics.median(round_seconds(run, rounds, calls, wait))


def first_and_median(run: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """Return the seconds of the first call, and the median of those that follow."""
    (first,) = round_seconds(run, 1)
    return first, statistics.median(round_seconds(run, rounds))


def timed(act: Callable[[], Any], times: int = 1) -> tuple[Any, dict[str, float]]:
    """Return what an act returns, and its median seconds: the clock's, the processor's.

    The processor's are of this process: other work may run on the machine.
    """
    clock, spent, found = [], [], None
    for _ in range(times):
        start = time.perf_counter(), time.process_time()
        found = act()
        clock.append(time.perf_counter() - start[0])
        spent.append(time.process_time() - start[1])
    median = statistics.median
    return found, {"seconds": median(clock), "processor_seconds": median(spent)}


def summarise(seconds: Sequence[float]) -> dict[str, float]:
    """Return the median of rounds in milliseconds, and their range over it."""
    middle = statistics.median(seconds)
    return {"ms": middle * 1e3, "spread": (max(seconds) - min(seconds)) / middle}


@dataclass(frozen=True, kw_only=True)
class Program:
    """A jax function to time: its arguments, forward FLOPs (0: no rate) and labels."""

    fun: Callable
    args: tuple
    flops: float = 0.0
    labels: dict[str, Any]


def measure(programs: Sequence[Program | Row], rounds: int) -> Iterator[Row]:
    """Yield the row of every program; rows already there pass through.

    All are compiled first, by threads: compilers work outside Python.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = list(pool.map(_build, programs))
    for program, compiled in zip(programs, built, strict=True):
        if isinstance(program, Row):
            yield program
        else:
            yield _time(program, compiled, rounds)


def _build(program: Program | Row) -> Any:
    if isinstance(program, Row):
        return None
    try:
        return jax.jit(program.fun).lower(*program.args).compile()
    except Exception as error:  # a peer's own fault must not end the table
        return error


def _time(program: Program, compiled: Any, rounds: int) -> Row:
    """Return a program's row; a refusal or fault becomes its note."""
    try:
        if isinstance(compiled, Exception):
            raise compiled
        run = lambda: compiled(*program.args)
        seconds = median_seconds(run, jax.block_until_ready, rounds)
    except UoeError as error:  # a backend that can't serve says why
        return Row(**program.labels, note=str(error))
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        return Row(**program.labels, note=f"{type(error).__name__}: {first[:200]}")
    memory = compiled.memory_analysis()
    return Row(
        **program.labels,
        milliseconds=seconds * 1e3,
        tflops=program.flops / seconds / 1e12 if program.flops else None,
        gigabytes=memory.temp_size_in_bytes / 1e9 if memory else None,
    )


def both(
    fun: Callable, args: Sequence[Any], flops: float, factor: float, **labels: Any
) -> list[Program]:
    """Return a function's forward pass and both passes; `args` end in a cotangent.

    Both passes count `factor` times the forward FLOPs.
    """
    *inputs, grad = args
    once = {**labels, "what": "forward"}
    twice = {**labels, "what": "both"}
    return [
        Program(fun=fun, args=tuple(inputs), flops=flops, labels=once),
        Program(
            fun=both_passes(fun),
            args=(*inputs, grad),
            flops=factor * flops,
            labels=twice,
        ),
    ]
