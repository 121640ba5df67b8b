"""The memory device of `pim.py`, simulated event by event, and its ASIC's arithmetic.

The closed form adds up times. Here every command has its moment: a row is opened,
columns follow at the memory's pace, a refresh waits until it is due and closes the row.
Both must agree; that is what this file is for. Imports no jax.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from uoe_jax.errors import ConfigError, shown
from uoe_jax.hardware.pim import PimSpec, chunks


@dataclass(frozen=True)
class Place:
    """Where a number lies in the memory; `row` counts from the start of its matrix."""

    channel: int
    bank: int
    row: int
    column: int
    lane: int


def weight_place(
    spec: PimSpec, output: int, column: int, outputs: int, inputs: int
) -> Place:
    """Return where weight [output, column] of an [outputs, inputs] matrix lies.

    Raises:
      ConfigError: an index outside the matrix.
    """
    if not (0 <= output < outputs and 0 <= column < inputs):
        raise ConfigError(
            f"weight [{output}, {column}] is outside of [{outputs}, {inputs}]"
        )
    round_, bank = divmod(output, spec.total_banks)
    chunk, inside = divmod(column, spec.buffer_numbers)
    held = -(-outputs // spec.total_banks)
    # Outputs begin on columns of their own, chunks on rows of their own.
    widths = [-(-w // spec.lanes) * spec.lanes for w in chunks(spec, inputs)]
    first = sum(-(-held * width // spec.row_numbers) for width in widths[:chunk])
    row, offset = divmod(round_ * widths[chunk] + inside, spec.row_numbers)
    return Place(*divmod(bank, spec.banks), first + row, *divmod(offset, spec.lanes))


def value_place(spec: PimSpec, element: int, token: int, tokens: int) -> Place:
    """Return where element i of a token's value lies: bank i, the tokens in a row.

    `tokens` is the room reserved ahead, as [elements, tokens] of `weight_place`.
    """
    round_, bank = divmod(element, spec.total_banks)
    rows = -(-tokens // spec.row_numbers)
    row, offset = divmod(token, spec.row_numbers)
    place = divmod(bank, spec.banks), divmod(offset, spec.lanes)
    return Place(*place[0], round_ * rows + row, *place[1])


@dataclass
class Simulation:
    """What happened: nanoseconds, and how often a bank did what."""

    ns: float = 0.0
    commands: Counter[str] = field(default_factory=Counter)


@dataclass
class _Channel:
    """One channel's banks, which act as one, and its wires; times in nanoseconds."""

    spec: PimSpec
    work: list[tuple[str, int]]  # commands to come: ("send", bits), ("row", columns)...
    refresh_due: float
    now: float = 0.0
    is_open: bool = False
    at: int = 0
    done: Counter[str] = field(default_factory=Counter)

    def step(self) -> bool:
        """Do the next command and move the clock; return whether one was left."""
        if self.now >= self.refresh_due:
            self._refresh()
            return True
        if self.at == len(self.work):
            return False
        kind, amount = self.work[self.at]
        spec = self.spec
        if kind == "row":
            # The old row is closed, the next one opened.
            self.now += spec.t_rp + spec.t_rcd
            self.is_open = True
            self.done["ACT"] += 1
        elif kind == "columns":
            if not self.is_open:  # a refresh closed it
                self.now += spec.t_rcd
                self.is_open = True
                self.done["ACT"] += 1
            # As many as begin before the next refresh is due.
            room = (self.refresh_due - self.now) / spec.t_ccd
            number = amount if room >= amount else max(1, math.ceil(room))
            self.now += number * spec.t_ccd
            self.done["MAC_COL"] += number
            if number < amount:
                self.work[self.at] = (kind, amount - number)
                return True
        else:  # "send" and "read" use the wires
            self.now += amount / spec.channel_gbits
            self.done["BCAST" if kind == "send" else "READ_PS"] += 1
        self.at += 1
        return True

    def _refresh(self) -> None:
        if self.is_open:
            self.now += self.spec.t_rp
            self.is_open = False
        self.now += self.spec.t_rfc
        self.refresh_due += self.spec.t_refi + self.spec.t_rfc
        self.done["REF"] += 1


def _commands(spec: PimSpec, outputs: int, inputs: int) -> list[tuple[str, int]]:
    """Return what one bank does for W x, W being [outputs, inputs], in order."""
    held = -(-outputs // spec.total_banks)
    found: list[tuple[str, int]] = []
    room = spec.row_numbers // spec.lanes  # columns of a row
    for width in chunks(spec, inputs):
        found.append(("send", 16 * width))
        filled = room  # of the open row: none is open yet
        for _ in range(held):
            left = -(-width // spec.lanes)
            while left:
                if filled == room:
                    found.append(("row", 1))
                    filled = 0
                part = min(left, room - filled)
                found.append(("columns", part))
                left, filled = left - part, filled + part
            found.append(("read", 16 * spec.banks))
    return found


def simulate(
    spec: PimSpec,
    products: Sequence[tuple[int, int]],
    refresh: bool = True,
    channels: int | None = None,
) -> Simulation:
    """Return the time of products, one after the other, each [outputs, inputs].

    All banks of a channel get the same command, so one bank stands for them. All
    channels do too; `channels` simulates so many, which must give the same.

    Raises:
      ConfigError: a matrix without outputs or inputs.
    """
    for outputs, inputs in products:
        if outputs < 1 or inputs < 1:
            raise ConfigError(
                f"product is {shown((outputs, inputs))}; both sizes must be at least 1"
            )
    work = [c for product in products for c in _commands(spec, *product)]
    due = spec.t_refi if refresh else math.inf
    number = 1 if channels is None else channels
    states = [_Channel(spec, list(work), due) for _ in range(number)]
    order = itertools.count()
    events = [(0.0, next(order), channel) for channel in states]
    heapq.heapify(events)
    while events:
        _, _, channel = heapq.heappop(events)
        if channel.step():
            heapq.heappush(events, (channel.now, next(order), channel))
    last = max(states, key=lambda channel: channel.now)
    return Simulation(ns=last.now, commands=last.done)


# ---- the ASIC's arithmetic: adders and multipliers only


def reciprocal(x: np.ndarray) -> np.ndarray:
    """Return 1/x of positive numbers by two Newton-Raphson steps; error 1.2e-5.

    The start 48/17 - 32/17 m is the best line on the mantissa m in [1/2, 1).
    """
    mantissa, exponent = np.frexp(np.asarray(x, np.float32))
    y = np.float32(48 / 17) - np.float32(32 / 17) * mantissa
    for _ in range(2):
        y = y * (2 - mantissa * y)
    return np.ldexp(y, -exponent)


def reciprocal_sqrt(x: np.ndarray) -> np.ndarray:
    """Return 1/sqrt(x) of positive numbers: a start from the bits, two Newton steps."""
    x = np.asarray(x, np.float32)
    bits = np.int32(0x5F3759DF) - (x.view(np.int32) >> 1)
    y = bits.view(np.float32)
    for _ in range(2):
        y = y * (np.float32(1.5) - np.float32(0.5) * x * y * y)
    return y


def exponential(x: np.ndarray) -> np.ndarray:
    """Return exp(x) by a Taylor series of degree 5 on [-ln(2)/2, ln(2)/2]."""
    x = np.clip(np.asarray(x, np.float32), -87.0, 88.0)
    power = np.rint(x / np.float32(math.log(2)))
    r = x - power * np.float32(math.log(2))
    y = np.full_like(r, 1 / 120)
    for degree in (4, 3, 2, 1, 0):
        y = y * r + np.float32(1 / math.factorial(degree))
    return np.ldexp(y, power.astype(np.int32))


def softmax(x: np.ndarray) -> np.ndarray:
    """Return the softmax of the last axis as the ASIC computes it."""
    x = np.asarray(x, np.float32)
    weights = exponential(x - x.max(-1, keepdims=True))
    return weights * reciprocal(weights.sum(-1, keepdims=True))
