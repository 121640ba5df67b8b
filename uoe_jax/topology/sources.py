"""Device graphs from coordinates, from what nvidia-smi prints, and from JSON files."""

from __future__ import annotations

import difflib
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.errors import ConfigError, DataError, nearest, shown
from uoe_jax.files import parse_json
from uoe_jax.hardware.comms import closes
from uoe_jax.hardware.devices import Topology, find_device
from uoe_jax.topology.graph import Graph, box_graph, check_whole, make_graph

# One way, in GB/s. A link of NVLink 2 to 4 carries 25; the others are what a PCI
# Express 4.0 x16 path is good for, less the farther it goes: only their order is meant.
_NVLINK = 25.0
_PATHS = {"PIX": 24.0, "PXB": 22.0, "PHB": 20.0, "NODE": 16.0, "SYS": 12.0}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ENDS = (("source", "target"), ("from", "to"), ("a", "b"))
_LENGTHS = ("weight", "dist", "distance", "length", "cost")


def from_topology(topology: Topology) -> Graph:
    """Return the graph of a named topology; devices in a switch are all neighbours.

    Devices are numbered as jax lists them, x fastest.

    Raises:
      ConfigError: a switch of more devices than it joins.
    """
    link = topology.device.link
    if link.kind == "switch":
        if topology.num_devices > link.domain:
            raise ConfigError(
                f"{topology.name} is several switches of {link.domain} devices; use at "
                "most one, or describe the whole as --graph FILE.json"
            )
        pairs = itertools.combinations(range(topology.num_devices), 2)
        return make_graph(topology.num_devices, ((u, v, 1.0) for u, v in pairs))
    chips = topology.shape[-link.dimensions :]
    cores = topology.shape[: -link.dimensions]
    rings = [n if closes(n, chips, link.dimensions) else 0 for n in chips]
    # Cores of a chip are numbered one after the other, then x, then y, then z.
    sides = (*reversed(chips), *cores)
    return box_graph(sides, (*reversed(rings), *(0 for _ in cores)))


def from_devices(devices: Sequence[Any]) -> tuple[Graph, np.ndarray] | None:
    """Return the graph of TPU chips of one slice, and each vertex's place in `devices`.

    Chips of a whole box make a graph that knows it is one. None where the devices have
    no coordinates or are of several slices.
    """
    places = device_places(devices)
    if places is None:
        return None
    kind = find_device(str(devices[0].device_kind))
    dimensions = kind.link.dimensions if kind is not None else 3
    places = places - places.min(axis=0)
    extent = (places.max(axis=0) + 1).tolist()
    if math.prod(extent) == len(devices):
        # The cores of a chip, its first coordinate, form no ring.
        rings = [n if closes(n, tuple(extent[1:]), dimensions) else 0 for n in extent]
        graph = box_graph(extent, [0, *rings[1:]])
        numbers = np.ravel_multi_index(tuple(places.T), extent)
        return graph, np.argsort(numbers)
    graph = from_coordinates(places.tolist())
    return graph, np.arange(len(devices))


def device_places(devices: Sequence[Any]) -> np.ndarray | None:
    """Return (core, x, y, z) of each chip of one TPU slice, or None for others."""
    kind = find_device(str(getattr(devices[0], "device_kind", "")))
    if kind is None or kind.link.kind != "torus":
        return None
    if any(getattr(device, "coords", None) is None for device in devices):
        return None
    if len({getattr(device, "slice_index", 0) for device in devices}) > 1:
        return None
    places = [
        (int(getattr(d, "core_on_chip", 0)), *map(int, d.coords)) for d in devices
    ]
    return np.array(places) if len(set(places)) == len(places) else None


def from_coordinates(
    places: Sequence[Sequence[int]], sides: Sequence[int] = ()
) -> Graph:
    """Return the graph of chips at whole coordinates, joined where one step apart.

    `sides` are of dimensions whose ends are joined, 0 where they aren't.

    Raises:
      ConfigError: two chips at one place, places of different dimensions, numbers that
        aren't whole, or a place outside of a joined side.
    """
    found: dict[tuple[int, ...], int] = {}
    for number, place in enumerate(places):
        for x in place:
            check_whole(x, f"a coordinate of device {number}")
        here = tuple(int(x) for x in place)
        if len(here) != len(places[0]):
            raise ConfigError(
                f"device {number} has {len(here)} coordinates and device 0 has "
                f"{len(places[0])}; give all the same number"
            )
        for x, side in zip(here, sides, strict=False):
            if side and not 0 <= x < side:
                raise ConfigError(
                    f"device {number} is at {here}, outside of a side of {side} whose "
                    f"ends are joined; use 0 to {side - 1}"
                )
        if here in found:
            raise ConfigError(
                f"devices {found[here]} and {number} are both at {here}; give each a "
                "place of its own"
            )
        found[here] = number
    wraps = [*sides, *[0] * (len(places[0]) - len(sides))] if places else []
    edges = []
    for here, number in found.items():
        for axis, side in enumerate(wraps):
            there = list(here)
            there[axis] = (here[axis] + 1) % side if side else here[axis] + 1
            other = found.get(tuple(there))
            if other is not None:
                edges.append((number, other, 1.0))
    return make_graph(len(found), edges, places=np.array(list(found), int))


def from_nvidia_smi(text: str) -> Graph:
    """Return the graph of GPUs from the table that `nvidia-smi topo -m` prints.

    An edge's weight is 1 for the fastest pair and more for slower ones, as bandwidth
    falls. Network cards and the columns of affinities are left out.

    Raises:
      DataError: no table, or a word in it that isn't a kind of link.
    """
    lines = [_COLOURS.sub("", line).split() for line in text.splitlines()]
    heads = [i for i, words in enumerate(lines) if words[:1] == ["GPU0"]]
    if not heads:
        raise DataError(
            "the text has no line that begins with GPU0; save what nvidia-smi topo -m "
            "prints"
        )
    columns = [word for word in lines[heads[0]] if re.fullmatch(r"GPU\d+", word)]
    # The line of columns is the first; on one GPU its own row begins the same way.
    rows = {words[0]: words[1:] for words in lines[heads[0] + 1 :] if words}
    edges = []
    for u, v in itertools.combinations(range(len(columns)), 2):
        row = rows.get(columns[u])
        if row is None or len(row) <= v:
            raise DataError(
                f"the table has no link from {columns[u]} to {columns[v]}; save all "
                "that nvidia-smi topo -m prints"
            )
        edges.append((u, v, _bandwidth(row[v], columns[u], columns[v])))
    best = max((rate for _, _, rate in edges), default=1.0)
    weighed = [(u, v, best / rate) for u, v, rate in edges]
    return make_graph(len(columns), weighed, names=columns)


def _bandwidth(word: str, first: str, second: str) -> float:
    if found := re.fullmatch(r"NV([1-9]\d?)", word):
        return _NVLINK * int(found[1])
    if word not in _PATHS:
        known = ["NV1 to NV99", *_PATHS]
        raise DataError(
            f"the link from {first} to {second} is {shown(word)}; expected one of "
            + ", ".join(known)
        )
    return _PATHS[word]


def read_graph(path: Path) -> Graph:
    """Return the graph in a file: JSON, or the text of `nvidia-smi topo -m`.

    Raises:
      DataError: a file that can't be read, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise DataError(
            f"{path} isn't text; use a JSON file, or what nvidia-smi topo -m prints"
        ) from None
    except OSError as error:
        raise DataError(
            f"{path} can't be read ({error.strerror}); name a JSON file, or what "
            "nvidia-smi topo -m prints"
        ) from None
    try:
        if re.search(r"^\s*(\x1b\[[0-9;]*m)?\s*GPU0\b", text, re.MULTILINE):
            return from_nvidia_smi(text)
        return from_json(parse_json(text, "the graph"))
    except (ConfigError, DataError) as error:
        raise DataError(f"{path}: {error}") from None


def from_json(content: Any) -> Graph:
    """Return a graph from parsed JSON: a list of links, and of nodes where they differ.

    The form of networkx's `node_link_data`: "nodes" with an "id", "links" or "edges"
    with "source", "target" and a "weight" (or "dist", or "bandwidth", whose inverse is
    the weight; 1 if none). A node may be a bare name, a link a bare [source, target] or
    [source, target, weight]. A node's "coords" is its place.

    Raises:
      DataError: anything else; ConfigError: a bad weight.
    """
    if not isinstance(content, dict):
        raise DataError(f"a graph is {shown(content)}; expected an object with links")
    links = content.get("links", content.get("edges"))
    if not isinstance(links, list):
        known = "links" if "links" not in content else "edges"
        keys = nearest(known, content) if content else "it is empty"
        raise DataError(f"a graph has no list of links; {keys}")
    triples = [_link(link) for link in links]
    nodes = content.get("nodes")
    if nodes is None:
        nodes = sorted({end for u, v, _ in triples for end in (u, v)}, key=_by_number)
    if not isinstance(nodes, list):
        raise DataError(f"nodes is {shown(nodes)}; expected a list")
    ids = [n.get("id", n.get("name")) if isinstance(n, dict) else n for n in nodes]
    number: dict[Any, int] = {}
    for place, name in enumerate(ids):
        if isinstance(name, (list, dict)) or name is None:
            raise DataError(f"node {place} is {shown(nodes[place])}; it needs an id")
        if name in number:
            raise DataError(f"two nodes have the id {shown(name)}; make ids unique")
        number[name] = place
    for u, v, _ in triples:
        for end in (u, v):
            if end not in number:
                raise DataError(
                    f"a link ends at {shown(end)}, which isn't among the nodes; add it"
                )
    edges = [(number[u], number[v], w) for u, v, w in triples]
    return make_graph(len(ids), edges, [str(name) for name in ids], _coords(nodes))


def _by_number(name: Any) -> tuple:
    return (isinstance(name, str), name)


def _link(link: Any) -> tuple[Any, Any, float]:
    if isinstance(link, list) and len(link) in (2, 3):
        u, v, weight = (*link, 1.0)[:3]
    elif isinstance(link, dict):
        ends = next((e for e in _ENDS if e[0] in link and e[1] in link), None)
        if ends is None:
            raise DataError(f"a link is {shown(link)}; it needs a source and a target")
        u, v = link[ends[0]], link[ends[1]]
        named = [name for name in (*_LENGTHS, "bandwidth") if name in link]
        _check_keys(link, [*ends, *named])
        weight = link[named[0]] if named else 1.0
        if named == ["bandwidth"]:
            rate = link["bandwidth"]
            bad = isinstance(rate, bool) or not isinstance(rate, (int, float))
            if bad or not rate > 0:
                raise DataError(
                    f"the link {shown(u)}-{shown(v)} has bandwidth {shown(rate)}; it "
                    "must be a positive number"
                )
            weight = 1 / rate
    else:
        raise DataError(f"a link is {shown(link)}; expected [source, target, weight]")
    for end in (u, v):
        if isinstance(end, (list, dict)) or end is None:
            raise DataError(f"a link ends at {shown(end)}; expected a node's id")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)):
        raise DataError(
            f"the link {shown(u)}-{shown(v)} has weight {shown(weight)}; it must be a "
            "number"
        )
    # Whole numbers beyond those of floats are as bad as infinity.
    return u, v, float(weight) if abs(weight) < 1e300 else math.inf


def _check_keys(link: dict[str, Any], taken: Sequence[str]) -> None:
    """Raise DataError for a key that is nearly one that a link's cost may have."""
    known = (*_LENGTHS, "bandwidth")
    for key in sorted(set(link) - {*taken, *known}):
        near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.75)
        if near:
            raise DataError(
                f"a link has the key {shown(key)}, which isn't read; did you mean "
                f"{near[0]}?"
            )


def _coords(nodes: list[Any]) -> np.ndarray | None:
    found = [n.get("coords") if isinstance(n, dict) else None for n in nodes]
    good = all(
        isinstance(c, list)
        and len(c) == len(found[0] or ())
        and all(isinstance(x, int) and not isinstance(x, bool) for x in c)
        for c in found
    )
    return np.array(found, int) if found and good else None
