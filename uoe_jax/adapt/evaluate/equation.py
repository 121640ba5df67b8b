"""Einsum strings: a weight's equation rewritten for its factors. Pure, imports no jax.

`btd,edf->btef` with a rank-r factor pair becomes `btd,dR->btR` and `btR,eRf->btef`.
A network is the label strings of the factors that together stand for the weight.
"""

from __future__ import annotations

import math
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from uoe_jax.errors import ConfigError

Network = tuple[str, ...]


class Roles(NamedTuple):
    """What each axis of a weight does in `x,weight->out`, in the weight's order."""

    batch: str  # in x, weight and out: experts, layers
    ins: str  # summed over
    outs: str  # new in out


class Step(NamedTuple):
    """One product of two operands, numbered as they stand; the result goes last."""

    pair: tuple[int, int]
    equation: str
    flops: int


class Contraction(NamedTuple):
    """Products that evaluate an equation of several operands, in order."""

    steps: tuple[Step, ...]
    last: str  # labels of what the last step leaves
    flops: int


def split_equation(equation: str) -> tuple[list[str], str]:
    """Return the operands' labels and the output's; ConfigError if malformed."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    operands = inputs.split(",")
    words = [*operands, output]
    if not arrow or not all(w.isalpha() or not w for w in words):
        raise ConfigError(
            f"equation is {equation!r}; write it as 'btd,df->btf', letters only"
        )
    for word in words:
        if len(set(word)) != len(word):
            raise ConfigError(
                f"equation {equation!r} repeats a letter in {word!r}; "
                "diagonals can't be factored"
            )
    if missing := sorted(set(output) - set("".join(operands))):
        raise ConfigError(
            f"equation {equation!r} has {missing[0]!r} in its output only; "
            "every output letter must be in an operand"
        )
    return operands, output


def weight_roles(equation: str) -> Roles:
    """Return the roles of the second operand's axes.

    Raises ConfigError if there aren't two operands, or an axis of the weight is in
    neither x nor the output.
    """
    operands, output = split_equation(equation)
    if len(operands) != 2:
        raise ConfigError(
            f"equation {equation!r} has {len(operands)} operands; it needs x and weight"
        )
    x, weight = operands
    for label in weight:
        if label not in x and label not in output:
            raise ConfigError(
                f"equation {equation!r} sums the weight over {label!r} alone; "
                "sum the weight first"
            )
    pick = lambda keep: "".join(label for label in weight if keep(label))
    return Roles(
        batch=pick(lambda a: a in x and a in output),
        ins=pick(lambda a: a not in output),
        outs=pick(lambda a: a not in x),
    )


def unused_letters(taken: Iterable[str], count: int, *, upper: bool = False) -> str:
    """Return `count` letters that aren't taken; ConfigError when the alphabet ends."""
    first, second = string.ascii_lowercase, string.ascii_uppercase
    order = second + first if upper else first + second
    used = set(taken)
    free = [letter for letter in order if letter not in used]
    if len(free) < count:
        raise ConfigError(f"an equation needs more than {len(order)} letters")
    return "".join(free[:count])


def lora_network(roles: Roles, rank: str, shared: str = "") -> Network:
    """Return A [ins, R] and B [R, outs]; A lacks the batch axes in `shared`."""
    own = "".join(a for a in roles.batch if a not in shared)
    return own + roles.ins + rank, roles.batch + rank + roles.outs


def tucker_network(
    batch: str, modes: Sequence[str], ranks: str, shared: str = ""
) -> Network:
    """Return the core and one factor a mode; factors lack the axes in `shared`."""
    own = "".join(a for a in batch if a not in shared)
    return batch + ranks, *(
        own + mode + rank for mode, rank in zip(modes, ranks, strict=True)
    )


def factorize_equation(
    equation: str, network: Network, sizes: Mapping[str, int]
) -> list[str]:
    """Return the equations that replace `x,weight->out`, cheapest order first to last.

    Each takes two of the operands at hand; `plan_contraction` says which.
    """
    operands, output = split_equation(equation)
    plan = plan_contraction((operands[0], *network), output, sizes)
    return [step.equation for step in plan.steps]


def plan_contraction(
    inputs: Sequence[str], output: str, sizes: Mapping[str, int]
) -> Contraction:
    """Return the pairwise products with the fewest FLOPs that give `output`.

    Exact: every order is tried, over subsets of the operands. What the last step
    leaves may have the output's letters in another order.
    """
    full = (1 << len(inputs)) - 1
    best: dict[int, tuple[int, tuple[int, int] | None]] = {
        1 << i: (0, None) for i in range(len(inputs))
    }
    subsets = sorted(range(1, full + 1), key=int.bit_count)
    for subset in subsets:
        if subset.bit_count() < 2:
            continue
        options = []
        left = (subset - 1) & subset
        while left:
            right = subset ^ left
            if left < right:
                flops = _product_flops(inputs, output, left, right, sizes)
                options.append((best[left][0] + best[right][0] + flops, (left, right)))
            left = (left - 1) & subset
        best[subset] = min(options)
    steps = _emit(inputs, output, sizes, best)
    return Contraction(steps, _labels(inputs, output, full), best[full][0])


def _kept(inputs: Sequence[str], output: str, subset: int) -> str:
    """Return the letters a subset's product must keep: those used outside of it."""
    outside = set(output)
    inside: dict[str, None] = {}
    for i, labels in enumerate(inputs):
        if subset >> i & 1:
            inside.update(dict.fromkeys(labels))
        else:
            outside.update(labels)
    return "".join(a for a in inside if a in outside)


def _labels(inputs: Sequence[str], output: str, subset: int) -> str:
    if subset.bit_count() == 1:
        return inputs[subset.bit_length() - 1]
    return _kept(inputs, output, subset)


def _product_flops(
    inputs: Sequence[str], output: str, left: int, right: int, sizes: Mapping[str, int]
) -> int:
    letters = set(_labels(inputs, output, left)) | set(_labels(inputs, output, right))
    return 2 * math.prod(sizes[a] for a in letters)


def _emit(
    inputs: Sequence[str],
    output: str,
    sizes: Mapping[str, int],
    best: Mapping[int, tuple[int, tuple[int, int] | None]],
) -> tuple[Step, ...]:
    """Return the steps, depth first; operands keep their numbers, results go on."""
    steps: list[Step] = []

    def visit(subset: int) -> int:
        split = best[subset][1]
        if split is None:
            return subset.bit_length() - 1
        pair = visit(split[0]), visit(split[1])
        a, b = (_labels(inputs, output, part) for part in split)
        kept = _kept(inputs, output, subset)
        flops = _product_flops(inputs, output, *split, sizes)
        steps.append(Step(pair, f"{a},{b}->{kept}", flops))
        return len(inputs) + len(steps) - 1

    visit((1 << len(inputs)) - 1)
    return tuple(steps)
