"""One run of several lengths: a constant rate, and from it a cooldown for each length.

Hägele et al. 2024 (arXiv 2405.18392), section 4.2: runs of all lengths are alike until
their rate falls, so the longest run's constant part serves the shorter ones too. A
branch has the bits of a run that was trained with its schedule from the start.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.shared.arrays import train_rows
from experiments.shared.fit import Limits, OutOfTime, routing_summary
from experiments.shared.paused import load_trees, save_trees
from experiments.shared.programs import Programs, step_rates
from uoe_jax.errors import ConfigError
from uoe_jax.optim import cooldown_steps
from uoe_jax.runs.state import TrainState
from uoe_jax.tree import fill_leaves

_DISPATCH = 200  # steps of a chunk at most: what a run does beyond the budget
_FALLING = "wsd_sqrt"  # the schedule that is constant, to the bit, before it falls

# (parameters, buffers) -> what is known of the trained model
Measure = Callable[[PyTree, PyTree], dict[str, Any]]


class Leg(NamedTuple):
    """Steps from `first` to before `last`: constant, or the cooldown to `steps`."""

    steps: int  # of the run that the cooldown ends; 0: the constant part
    first: int
    last: int


def plan_legs(lengths: Sequence[int]) -> tuple[Leg, ...]:
    """Return the legs of a run of several lengths (steps), in the order of training.

    Raises ConfigError for lengths that don't rise.
    """
    if not lengths or any(b <= a for a, b in zip((0, *lengths), lengths, strict=False)):
        raise ConfigError(f"the lengths are {list(lengths)} steps; let them rise")
    legs, at = [], 0
    for steps in lengths:
        start = steps - cooldown_steps(steps)
        if start < at:
            raise ConfigError(
                f"a run of {steps} steps cools down from step {start} on, before the "
                f"shorter one does; leave more between the lengths {list(lengths)}"
            )
        if start > at:
            legs.append(Leg(0, at, start))
        legs.append(Leg(steps, start, steps))
        at = start
    return tuple(legs)


def chunk_steps(lengths: Sequence[int]) -> int:
    """Return how many steps one dispatch trains: the most that fit every leg."""
    whole = math.gcd(*(leg.last - leg.first for leg in plan_legs(lengths)))
    return max(n for n in range(1, min(whole, _DISPATCH) + 1) if whole % n == 0)


class Run(NamedTuple):
    """What is trained: its start and order, its highest rate, its lengths in steps."""

    seed: int
    rate: float
    lengths: tuple[int, ...]
    # Parameters and buffers of another run's end; None: drawn by the seed.
    weights: Callable[[], tuple[PyTree, PyTree]] | None = None
    # Whether something else is being compiled now: what such a chunk takes is no speed.
    disturbed: Callable[[], bool] = lambda: False


@dataclass
class Progress:
    """What a run has so far."""

    trunk: TrainState  # at a constant rate
    branch: TrainState | None = None  # of a cooldown that has begun
    leg: int = 0
    done: int = 0  # steps of the leg
    told: dict[str, list[Any]] | None = None  # what goes into the result

    def __post_init__(self) -> None:
        names = ("curve", "chunks", "disturbed", "lengths")
        self.told = self.told or {name: [] for name in names}

    def note(self, name: str, value: Any) -> None:
        """Add to what goes into the result."""
        assert self.told is not None
        self.told[name].append(value)


def run_lengths(
    programs: Programs,
    run: Run,
    measure: Measure,
    limits: Limits,
    say: Callable[[str], None],
    paused: Path,
) -> dict[str, Any]:
    """Return what is known of one seed's models, one for each length.

    Goes on where `paused` has the state of an earlier try. Seconds are those of
    training steps, the median over chunks, so that a length's are what a run of that
    length alone takes; over those that nothing disturbed, if there are some. A run that
    diverges has the lengths that ended before.

    Raises OutOfTime past the deadline, its state saved.
    """
    optim = programs.config.optim
    if optim.schedule != _FALLING:
        raise ConfigError(
            f"optim.schedule is {optim.schedule!r}; several lengths share a constant "
            f"rate, use {_FALLING}"
        )
    legs = plan_legs(run.lengths)
    if legs[0].last < optim.warmup_steps:
        raise ConfigError(
            f"optim.warmup_steps is {optim.warmup_steps}, but the shortest run cools "
            f"down from step {legs[0].last} on; warm up in fewer"
        )
    if chunk_steps(run.lengths) % programs.chunk:
        raise ConfigError(
            f"a dispatch trains {programs.chunk} steps, which don't divide every part "
            f"of a run of {list(run.lengths)}; make programs with chunk_steps of these"
        )
    rows = train_rows(programs.config, run.seed, run.lengths[-1])
    progress = _begin(programs, run, paused, say)
    while progress.leg < len(legs):
        leg = legs[progress.leg]
        rates = step_rates(optim, leg.steps or run.lengths[-1], run.rate)
        order = (rows, rates)
        finite = _train_leg(
            programs, progress, leg, order, limits, paused, run.disturbed
        )
        if not finite:
            say(f"step {leg.first + progress.done}: diverged")
            break
        if leg.steps:
            assert progress.branch is not None
            state, progress.branch = progress.branch, None
            found = measure(state.params, state.buffers)
            progress.note("lengths", {"steps": leg.steps, **found})
            say(f"{leg.steps} steps: {found.get('valid', found)}")
        progress.leg, progress.done = progress.leg + 1, 0
    paused.unlink(missing_ok=True)
    assert progress.told is not None
    chunks, disturbed = (progress.told.pop(name) for name in ("chunks", "disturbed"))
    alone = [s for s, other in zip(chunks, disturbed, strict=True) if not other]
    return {
        "seed": run.seed,
        "rate": run.rate,
        "steps": run.lengths[-1],
        "seconds": sum(chunks),
        "step_seconds": statistics.median(alone or chunks) / programs.chunk,
        "chunks": {"all": len(chunks), "compiled_meanwhile": sum(disturbed)},
        **progress.told,
    }


def _train_leg(
    programs: Programs,
    progress: Progress,
    leg: Leg,
    order: tuple[np.ndarray, np.ndarray],
    limits: Limits,
    paused: Path,
    disturbed: Callable[[], bool],
) -> bool:
    """Train what is left of a leg; return whether its losses were finite."""
    if leg.steps and progress.branch is None:  # the trunk's memory is used again
        progress.branch = jax.tree.map(jnp.copy, progress.trunk)
    while (at := leg.first + progress.done) < leg.last:
        if time.perf_counter() > limits.deadline:
            _pause(progress, paused)
            raise OutOfTime(f"stopped at step {at}")
        part = slice(at, at + programs.chunk)
        state = progress.branch if leg.steps else progress.trunk
        jax.block_until_ready(state)
        progress.note("disturbed", disturbed())
        start = time.perf_counter()
        state, metrics = programs.train(state, *(array[part] for array in order))
        metrics = jax.device_get(metrics)
        progress.note("chunks", time.perf_counter() - start)
        if leg.steps:
            progress.branch = state
        else:
            progress.trunk = state
        progress.done += programs.chunk
        line = {"cooldown_to": leg.steps, "step": part.stop}
        line |= {"train": float(metrics["loss"]), "skipped": int(metrics["skipped"])}
        progress.note("curve", line | {"routing": routing_summary(metrics["router"])})
        if not math.isfinite(line["train"]):
            return False
    return True


def _pause(progress: Progress, paused: Path) -> None:
    told = {"leg": progress.leg, "done": progress.done, "told": progress.told}
    save_trees(paused, {"trunk": progress.trunk, "branch": progress.branch}, told)


def _begin(
    programs: Programs, run: Run, paused: Path, say: Callable[[str], None]
) -> Progress:
    """Return a new run, or the one that was interrupted."""
    if not paused.is_file():
        if run.weights is None:
            return Progress(programs.start(run.seed))
        return Progress(programs.start_from(*run.weights()))
    state = programs.start(run.seed)
    trees, told = load_trees(paused)
    place = lambda name: programs.place(fill_leaves(state, trees[name]))
    branch = place("branch") if "branch" in trees else None
    say(f"goes on in leg {told['leg'] + 1}, {told['done']} steps into it")
    return Progress(place("trunk"), branch, told["leg"], told["done"], told["told"])
