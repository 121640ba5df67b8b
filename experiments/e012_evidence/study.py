"""The study's blocks: which models are trained where, in which order, at what rate."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from experiments.e012_evidence.choose import Row, chosen_lean, survivors, validated
from experiments.e012_evidence.models import BUDGETS, LEAN, SIZES, dense, make
from experiments.shared.case import change
from uoe_jax.config import DataConfig, ExperimentConfig
from uoe_jax.errors import ConfigError

PLANNED = Path(__file__).parent / "planned.json"

FULL = (400, 800, 1600, 3200, 6400)  # steps: 13, 26, 52, 105, 210 MB
PROBE = (920, 1840)  # 30, 60 MB
QUARTER = (1600,)
FURTHER = (320, 640)  # after FULL[-1]: 5%, 10%
TINY = (20, 40, 80)
GRID = 1.4  # between two rates of a search
_REACH = 2  # rates on each side of the middle one
_FURTHER = 2  # more of them where the best is at an edge
SEARCH_SEED = 100  # none that is reported


@dataclass(frozen=True)
class Job:
    """One training: a named model of a size on rows of `length` tokens."""

    block: str
    kind: Literal["mlp", "attention", "whole", "budgets", "cut"]
    name: str
    size: str
    length: int  # T
    seed: int
    steps: tuple[int, ...]
    optimizer: Literal["adamw", "muon"] = "adamw"
    rate: float | None = None  # None: the family's, by its search
    task: Literal["text", "recall", "cut"] = "text"

    @property
    def start(self) -> Job | None:
        """The run from whose end this one goes on; None: it begins at random."""
        if self.kind != "cut" or self.name == "dense":
            return None
        # A run of the most steps alone: of several lengths all end as it does.
        steps = TINY[-1:] if self.size == "tiny" else FULL[-1:]
        return dataclasses.replace(self, name="dense", steps=steps)

    @property
    def setting(self) -> str:
        """Size, T and task: what is compared is alike in these."""
        plain = f"{self.size}, T {self.length}"
        return plain if self.task == "text" else f"{plain}, {self.task}"

    @property
    def shared_by(self) -> str:
        """What says, with the seed, which of several devices trains it.

        Neither the block, as blocks share runs, nor its place in a list that may grow.
        A dense start and all that goes on from it are one device's: by the seed alone.
        """
        if self.kind == "cut":
            return "cut"
        return f"{self.size} {self.name} {self.optimizer} {self.rate}"

    @property
    def place(self) -> str:
        """What data it reads in rows of which length."""
        return f"{'recall' if self.task == 'recall' else 'text'} {self.length}"

    def config(self, data: DataConfig) -> tuple[str, ExperimentConfig]:
        """Return the model's family and what is trained, but for the rate."""
        start = dense(self.size, self.length, data)
        family, config = make(start, self.kind, self.name)
        changed = {"kind": self.optimizer}
        return family, change(config, optim=changed, train={"steps": self.steps[-1]})


# The question of whether routed heads add anything to local ones comes first.
ATTENTION = (
    "local + conv",
    "local + few routed + conv",
    "dense + conv",
    "local + 2 full + conv",  # has the cache of a few routed ones
    "local + few routed, thresholds + conv",
    "local + full + conv",
    "local + routed + conv",
    "SMHA + conv",
)
# Figure g, beside those.
LADDER = (
    "local + few routed, gated values + conv",
    "SMHA, gated values + conv",
    "SMHA",
    "dense",
    "local + routed",
    "local + few routed, sink + conv",
    "local + few routed, key router + conv",
)
MLP = (
    "dense",
    "MoE 2 of 8",
    "MoE 8 of 32 + shared",
    "MoE 8 of 64 + shared",
    *LEAN,
    "UoME 8 of 32",
    "UoME 8 of 32, thresholds",
    "UoME 8 of 32, thresholds, relu",
)
# A family's rate is searched with its first model here.
FAMILIES = (
    ("mlp", "dense"),
    ("mlp", "MoE 2 of 8"),
    ("mlp", "MoE 8 of 32 + shared"),
    ("mlp", "UoME 8 of 32"),
    ("mlp", "UoME 1 of 16 lean"),
    ("attention", "local + full + conv"),
    ("attention", "local + routed + conv"),
)
MUON = (("mlp", "dense"), ("mlp", "MoE 2 of 8"), ("mlp", "UoME 1 of 16 lean"))
# What isn't a lean union: of those only the chosen one is trained.
WHOLE = (
    "dense + conv",
    "MoE 2 of 8 + conv",
    "MoE 2 of 8, local + full",
    "UoME 8 of 32, local + few routed",
)
WHOLE_SIZES = {"6": ("M", 3), "7": ("L", 2), "8": ("S", 3), "9": ("XL", 1)}
BLOCKS = (*"123456789", "long", "recall", "budgets", "cut")


def jobs(block: str, rows: Sequence[Row], tiny: bool) -> list[Job]:
    """Return a block's trainings in order: every model's first seed first.

    `rows` are the runs so far: block 2 looks further where a best rate is at an edge,
    block 4 has what block 3 left, 6 to 9 the lean union that it prefers.
    """
    made = list(_jobs(block, rows))
    if tiny:
        made = [_shrink(job) for job in made]
    return sorted(dict.fromkeys(made), key=lambda job: job.seed)


def listed(block: str, rows: Sequence[Row]) -> set[tuple[str, int]]:
    """Return names and seeds of a block's trainings.

    Where block 3 hasn't decided yet what they are: of all that it chooses among.
    """
    try:
        return {(job.name, job.seed) for job in _jobs(block, rows)}
    except ConfigError:
        if block == "4":
            return listed("3", rows)
        seeds = range(WHOLE_SIZES[block][1])
        names = [name for lean in LEAN for name in _whole(block, lean)]
        return {(name, seed) for name in names for seed in seeds}


def _jobs(block: str, rows: Sequence[Row]) -> Iterator[Job]:
    if block == "1":
        yield from _each(block, "attention", ATTENTION + LADDER, "M", 4096, 3, PROBE)
    elif block == "2":
        yield from _search(rows)
    elif block == "3":
        yield from _each(block, "mlp", MLP, "S", 1024, 3, FULL)
    elif block == "4":
        yield from _each(block, "mlp", survivors(rows), "M", 1024, 3, FULL)
    elif block == "5":
        names = (*ATTENTION[:-1], "GQA + conv")
        yield from _each(block, "attention", names, "M", 4096, 2, FULL)
    elif block in WHOLE_SIZES:
        names, (size, seeds) = _whole(block, chosen_lean(rows)), WHOLE_SIZES[block]
        yield from _each(block, "whole", names, size, 4096, seeds, FULL)
    elif block == "long":
        names = ATTENTION[:4]
        yield from _each(block, "attention", names, "M", 8192, 3, FULL[:4])
    elif block == "budgets":
        low, high = BUDGETS[0], BUDGETS[-1]
        names = (f"UoME {low} to {high} of 32", *(f"UoME {x} of 32" for x in BUDGETS))
        yield from _each(block, "budgets", names, "S", 1024, 3, FULL[3:4])
    elif block == "recall":
        for job in _each(block, "attention", ATTENTION, "R", 1024, 3, QUARTER):
            yield dataclasses.replace(job, task="recall")
    elif block == "cut":
        names = ("dense, trained on", "dense, 8 of 16 on")
        for job in _each(block, "cut", names, "M", 1024, 3, FURTHER):
            yield dataclasses.replace(job, task="cut")


def _whole(block: str, lean: str) -> tuple[str, ...]:
    names = (*WHOLE[:2], f"{lean} + conv")  # a law predicts XL of these
    if block in "67":
        names = (*names, *WHOLE[2:], f"{lean}, local + full")
    return names


def _each(
    block: str,
    kind: Any,
    names: Sequence[str],
    size: str,
    length: int,
    seeds: int,
    steps: tuple[int, ...],
) -> Iterator[Job]:
    for seed in range(seeds):
        for name in names:
            yield Job(block, kind, name, size, length, seed, steps)


def _search(rows: Sequence[Row]) -> Iterator[Job]:
    """Yield the rates of each family and size, and further ones beyond an edge."""
    for size in ("S", "M"):
        for kind, name in FAMILIES:
            yield from _rates(rows, kind, name, size, "adamw")
        for kind, name in MUON:
            yield from _rates(rows, kind, name, size, "muon")


def _rates(
    rows: Sequence[Row], kind: Any, name: str, size: str, optimizer: Any
) -> Iterator[Job]:
    length = 1024 if kind == "mlp" else 4096
    made = lambda place: Job(
        "2", kind, name, size, length, SEARCH_SEED, QUARTER, optimizer,
        round(SIZES[size].rate * GRID**place, 7),
    )  # fmt: skip
    places = list(range(-_REACH, _REACH + 1))
    for _ in range(_FURTHER):
        losses = [rated(rows, made(place)) for place in places]
        if None in losses:
            break  # first what is there already
        best = min(range(len(places)), key=lambda i: losses[i] or 0.0)
        if 0 < best < len(places) - 1:
            break
        places = [places[0] - 1, *places] if best == 0 else [*places, places[-1] + 1]
    for place in places:
        yield made(place)


def rated(rows: Sequence[Row], job: Job) -> float | None:
    """Return what a search's run reached on valid; inf: it diverged; None: no run."""
    for row in rows:
        same = row["case"] == job.name and row["optimizer"] == job.optimizer
        if same and row["block"] == "2" and row["rate"] == job.rate:
            if row["size"] in (job.size, "tiny") and row["kind"] == job.kind:
                return validated(row)
    return None


def _shrink(job: Job) -> Job:
    steps = TINY if len(job.steps) > 1 else TINY[-1:]
    seeds = {"size": "tiny", "length": 64, "steps": steps}
    if job.rate is not None:
        scale = SIZES["tiny"].rate / SIZES[job.size].rate
        seeds["rate"] = round(job.rate * scale, 7)
    return dataclasses.replace(job, **seeds)
