"""What is wrong with a run's routers: dead experts, imbalance, dropped tokens."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from uoe_jax.report.read import BLOCKS, Run

DEAD = 0.05  # of a balanced share
HEAVY = 3.0  # balanced shares
DROPPED = 0.05  # of all picks
_LATEST = 0.1  # of the records are averaged
NAMES = {"attention": "attention", "mlp": "MLP", "depth": "depth"}


class Alarm(NamedTuple):
    """One thing wrong with one layer's router."""

    block: str
    layer: int
    kind: str  # "dead", "heavy" or "dropped"
    experts: tuple[int, ...]
    worst: float  # balanced shares; of "dropped" the fraction
    named: tuple[str, ...] = ()  # the experts in words; none: by their numbers

    @property
    def text(self) -> str:
        """The alarm as a sentence."""
        where = f"{NAMES[self.block]} layer {self.layer}"
        if self.kind == "dropped":
            return f"{where}: {self.worst:.1%} of the picks found no room"
        who = "expert" if len(self.experts) == 1 else "experts"
        names = ", ".join(self.named or map(str, self.experts))
        if self.kind == "dead":
            return (
                f"{where}: {who} {names} got under {DEAD:.0%} of a balanced share "
                f"(least {self.worst:.1%}): dead"
            )
        return f"{where}: {who} {names} got up to {self.worst:.1f} balanced shares"


def find_alarms(run: Run) -> list[Alarm]:
    """Return what is wrong, by part and layer; means over the run's last tenth.

    A mixture of depths only has "dropped": its two ways aren't meant to be balanced.
    """
    return [alarm for block in BLOCKS for alarm in _of_block(run, block)]


def _named(number: int, first: int, asked: int) -> str:
    """Return an expert's name; behind those that are asked, as it stores keys."""
    return str(number) if number < first + asked else f"{number - asked} (of keys)"


def latest(values: np.ndarray) -> np.ndarray:
    """Return the mean over the last tenth of the records [n, ...], at least one."""
    return values[-max(round(len(values) * _LATEST), 1) :].mean(axis=0)


def _of_block(run: Run, block: str) -> list[Alarm]:
    found, layers = [], run.routed_layers(block)
    loads, dropped = run.router(block, "load"), run.router(block, "dropped")
    if loads is not None and block != "depth":
        sizes = [run.num_loads(block, layer) for layer in layers]
        for layer, count, load in zip(layers, sizes, latest(loads[1]), strict=True):
            share = load[:count] * count
            for kind, wrong in (("dead", share < DEAD), ("heavy", share > HEAVY)):
                if wrong.any():
                    worst = share.min() if kind == "dead" else share.max()
                    first = run.num_shared(block, layer)
                    experts = tuple((np.flatnonzero(wrong) + first).tolist())
                    asked = run.num_experts(block, layer)
                    named = tuple(_named(n, first, asked) for n in experts)
                    alarm = Alarm(block, layer, kind, experts, float(worst), named)
                    found.append(alarm)
    if dropped is not None:
        for layer, share in zip(layers, latest(dropped[1]), strict=True):
            if share > DROPPED:
                found.append(Alarm(block, layer, "dropped", (), float(share)))
    return found
