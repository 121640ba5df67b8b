"""Time of collectives on tori and switches. Imports no jax.

Bytes are those of the whole array, of all devices of the group together: the result of
an all-gather, the input of a reduce-scatter, an all-reduce's operand. Bandwidth bounds
as in Austin et al. 2025 (How to Scale Your Model, chapters 3 and 5), plus a latency for
each hop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from uoe_jax.hardware.devices import Link, Topology

KINDS = (
    "all_gather",
    "reduce_scatter",
    "all_reduce",
    "all_to_all",
    "collective_permute",
)
_CUBE = 4  # a torus closes its rings only over whole cubes of 4 x 4 x 4 (v4, v5p)
_RING_2D = 16  # and in two dimensions (v5e, v6e) only at the full 16


@dataclass(frozen=True, kw_only=True)
class Ring:
    """Devices in a row along one dimension of a torus; `closed`: the ends are joined.

    `hop` is how far apart neighbours are, in links that they share with others.
    """

    size: int
    closed: bool
    hop: int = 1


@dataclass(frozen=True, kw_only=True)
class RingStep:
    """What it takes when all devices of an axis send to the next of their ring."""

    hops: float = 1.0  # the farthest next one, in links
    load: float = 1.0  # messages on the most loaded link


@dataclass(frozen=True, kw_only=True)
class Group:
    """The devices of one mesh axis, and what joins them."""

    link: Link
    size: int
    rings: tuple[Ring, ...] = ()  # of a torus
    spans_network: bool = False  # of a switch: more devices than it joins
    step: RingStep = RingStep()  # of a torus, where the devices' order is known


def place_axes(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Group]:
    """Return each mesh axis's group, the last axis placed on the nearest chips.

    On a torus axes take whole dimensions while they can, and parts of one otherwise.
    """
    link = topology.device.link
    if link.kind == "torus":
        return _place_on_torus(topology, sizes)
    groups, inside = {}, 1
    for axis, size in reversed(list(sizes.items())):
        inside *= size
        spans = size > 1 and inside > link.domain
        groups[axis] = Group(link=link, size=size, spans_network=spans)
    return groups


def _place_on_torus(topology: Topology, sizes: Mapping[str, int]) -> dict[str, Group]:
    link = topology.device.link
    free = list(topology.shape)
    taken = [1] * len(free)
    groups = {}
    for axis, size in reversed(list(sizes.items())):
        rings, left = [], size
        # Whole dimensions first: only they are closed rings.
        order = sorted(range(len(free)), key=lambda d: (left % free[d] != 0, d))
        for place in order:
            part = _common(left, free[place])
            if part == 1:
                continue
            whole = part == topology.shape[place]
            closed = whole and closes(part, topology.shape, link.dimensions)
            rings.append(Ring(size=part, closed=closed, hop=taken[place]))
            free[place] //= part
            taken[place] *= part
            left //= part
        groups[axis] = Group(link=link, size=size, rings=tuple(rings))
    return groups


def closes(size: int, shape: tuple[int, ...], dimensions: int) -> bool:
    """Whether the ends of a whole dimension of a slice of this shape are joined."""
    if dimensions == 2:
        return size % _RING_2D == 0
    # A slice within one cube has no links to its other side.
    return all(side % _CUBE == 0 for side in shape[-dimensions:])


def _common(a: int, b: int) -> int:
    while b:
        a, b = b, a % b
    return a


def seconds(kind: str, num_bytes: int | float, group: Group) -> float:
    """Return the time of one collective over `num_bytes` in all of the group."""
    if group.size == 1:
        return 0.0
    if kind == "all_reduce":
        return seconds("reduce_scatter", num_bytes, group) + seconds(
            "all_gather", num_bytes, group
        )
    if group.rings:
        return _torus_seconds(kind, num_bytes, group)
    return _switch_seconds(kind, num_bytes, group)


def _torus_seconds(kind: str, num_bytes: int | float, group: Group) -> float:
    n, link = group.size, group.link
    # All dimensions carry their share at once, a closed ring in both directions.
    rate = sum(
        link.bandwidth * (2 if ring.closed else 1) / ring.hop for ring in group.rings
    )
    hops = sum(
        (ring.size // 2 if ring.closed else ring.size - 1) * ring.hop
        for ring in group.rings
    )
    latency = link.latency * hops
    if kind == "collective_permute":
        step = group.step
        return num_bytes / n / link.bandwidth * step.load + link.latency * step.hops
    if kind == "all_to_all":
        # A share travels a quarter of a closed ring, a third of an open one.
        longest = max(group.rings, key=lambda ring: ring.size)
        part = longest.size / n
        lanes = 8 if longest.closed else 4
        return num_bytes * part * longest.hop / (lanes * link.bandwidth) + latency
    return num_bytes * (n - 1) / n / rate + latency


def _switch_seconds(kind: str, num_bytes: int | float, group: Group) -> float:
    n, link = group.size, group.link
    rate = link.network if group.spans_network else link.bandwidth
    if kind == "collective_permute":
        return num_bytes / n / rate + link.latency
    if kind == "all_to_all":
        return num_bytes / n * (n - 1) / n / rate + link.latency
    return num_bytes * (n - 1) / n / rate + link.latency * (n - 1)
