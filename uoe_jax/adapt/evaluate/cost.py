"""Which path is cheapest where a weight meets an input: delta, fused or factored."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from uoe_jax.adapt.evaluate.equation import (
    Contraction,
    plan_contraction,
    split_equation,
)

# FLOPs that take as long as one byte of memory traffic on a current accelerator: an
# H100's 989e12 / 3.35e12 by its data sheet, and matrix units reach a smaller share of
# theirs. Checked there: fused training is 9% faster at width 768, where this says so.
FLOPS_PER_BYTE = 200


class Site(NamedTuple):
    """A product `x,weight->out` as letters, with the sizes of all letters."""

    x: str
    weight: str
    out: str
    labels: tuple[str, ...]  # the network that stands for the delta
    sizes: dict[str, int]
    itemsize: int = 2


class Costs(NamedTuple):
    """FLOPs beyond the frozen product, memory traffic counted as FLOPs."""

    delta: int
    fused: int
    factored: int

    def cheapest(self, *, allow_fused: bool = True) -> str:
        """Return the path with the lowest cost; fused can't have input dropout."""
        names = ("factored", "fused", "delta") if allow_fused else ("factored", "delta")
        return min(names, key=lambda name: getattr(self, name))


def path_costs(site: Site, *, training: bool) -> Costs:
    """Return the cost of the three paths of one product.

    Training counts the backward pass with the base frozen: factored products have two
    gradients each, while both other paths need the whole weight's gradient, a product
    as large as the frozen one.
    """
    size = lambda word: math.prod(site.sizes[a] for a in word)
    build = plan_contraction(site.labels, site.weight, site.sizes).flops
    chain = plan_contraction((site.x, *site.labels), site.out, site.sizes)
    product = 2 * size("".join(sorted(set(site.x + site.weight + site.out))))
    # Every step reads two arrays and writes one; the sum reads and writes the output.
    moved = sum(map(size, _words(chain))) + 2 * size(site.out)
    factored = chain.flops + moved * site.itemsize * FLOPS_PER_BYTE
    weight_bytes = size(site.weight) * site.itemsize
    return weigh_paths(build, product, weight_bytes, factored, training=training)


def _words(chain: Contraction) -> Iterator[str]:
    for step in chain.steps:
        inputs, output = split_equation(step.equation)
        yield from (*inputs, output)


def weigh_paths(
    build: int,
    product: int,
    weight_bytes: int,
    factored: int,
    *,
    training: bool,
) -> Costs:
    """Return the costs from FLOPs of building the delta and of the frozen product."""
    traffic = weight_bytes * FLOPS_PER_BYTE
    if not training:
        return Costs(build + product + traffic, build + 3 * traffic, factored)
    return Costs(
        delta=3 * (build + product + traffic),
        fused=3 * build + product + 6 * traffic,
        factored=3 * factored,
    )


def cut_network(
    labels: Sequence[str], ins: str, outs: str, sizes: dict[str, int]
) -> tuple[list[int], list[int], str]:
    """Return operand numbers left and right of the narrowest cut, and its letters.

    Left are those that hold input letters; an operand with neither (a Tucker core) goes
    to the side that leaves less to carry over.
    """
    left = [i for i, word in enumerate(labels) if set(word) & set(ins)]
    right = [i for i, word in enumerate(labels) if set(word) & set(outs)]
    free = [i for i in range(len(labels)) if i not in left and i not in right]
    options = []
    for a, b in ((left, right + free), (left + free, right)):
        inside = set("".join(labels[i] for i in a))
        cut = "".join(sorted(inside & set("".join(labels[i] for i in b))))
        options.append((math.prod(sizes[c] for c in cut), len(options), a, b, cut))
    _, _, a, b, cut = min(options)
    return a, b, cut
