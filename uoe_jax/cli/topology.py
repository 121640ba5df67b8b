"""`uoe topology`: how devices are joined, and orders of a mesh with shorter rings."""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.cli.parse import parse
from uoe_jax.errors import ConfigError, DataError, divisors, shown
from uoe_jax.escape import escape_line
from uoe_jax.fields import Positive, Seed
from uoe_jax.files import check_picture, format_json, local_path, read_json
from uoe_jax.hardware.devices import Topology, parse_topology
from uoe_jax.report.table import format_table
from uoe_jax.report.topology import save_picture
from uoe_jax.topology import (
    Graph,
    RingOrder,
    from_topology,
    order_mesh,
    partition,
    read_graph,
)
from uoe_jax.topology.graph import check_connected
from uoe_jax.topology.rings import describe_order

_LARGE = 1024  # devices; an order of more takes a while, so the command says it began


@dataclass(frozen=True, kw_only=True)
class TopologyOptions:
    """Show how devices are joined, and the order of a mesh with the shortest rings."""

    graph: Path | None = None  # links as JSON, or what nvidia-smi topo -m prints
    mesh: str | None = None  # data=8,tensor=8; one ring of all devices if not given
    bytes: str | None = None  # data=1,tensor=8, or a file of uoe plan --json
    dead: str | None = None  # numbers of devices to leave out: 3,17
    # Given: clusters of devices too, of at most this share of the graph's diameter.
    eps: Positive | None = None
    seconds: Positive = 20.0  # after which the search ends; building isn't cut
    seed: Seed = 0  # of the search
    json: bool = False  # one JSON object instead of a table
    picture: Path | None = None  # PNG, SVG or PDF of both orders


def topology(args: list[str]) -> int:
    """Print a device graph and its ring orders: `NAME [options]` or `--graph FILE`."""
    name, rest = (args[0], args[1:]) if args and args[0][:1] != "-" else (None, args)
    options = parse(TopologyOptions, rest, "topology")
    check_picture(options.picture, "--picture")
    known = _known(name, options.graph)
    if isinstance(known, Path):
        whole, title, known = read_graph(known), str(known), None
    else:
        whole, title = from_topology(known), known.name
    graph, kept = whole.without(_numbers(options.dead))
    check_connected(graph)
    sizes, traffic = _mesh(options, graph)
    if graph.size > _LARGE:
        print(
            f"looking for an order of {graph.size} devices; --seconds ends the search, "
            "what comes before it isn't cut ...",
            file=sys.stderr,
            flush=True,
        )
    start = _start(known, graph, kept, tuple(sizes.values()))
    first = describe_order(graph, start)
    best = order_mesh(
        graph,
        tuple(sizes.values()),
        list(traffic.values()),
        start=start,
        seconds=options.seconds,
        seed=options.seed,
    )
    content = _content(title, graph, kept, sizes, traffic, first, best, options.eps)
    content["start"] = "jax" if known and known.is_tpu and not options.dead else "given"
    if options.json:
        print(format_json(content, indent=1))
    else:
        print(_describe(content, graph, best))
    if options.picture is not None:
        save_picture(options.picture, title, graph, list(sizes), first, best)
        print(escape_line(f"picture: {options.picture}"), file=sys.stderr)
    return 0


def _known(name: str | None, graph: Path | None) -> Topology | Path:
    """Return what was named: a topology, or a graph's file."""
    if name is not None and graph is None:
        return parse_topology(name)
    if graph is not None and name is None:
        return graph
    raise ConfigError(
        "uoe topology takes a name such as v5p:4x4x4 or --graph FILE, and got "
        f"{'both' if name else 'neither'}; give one"
    )


def _numbers(text: str | None) -> list[int]:
    if text is None:
        return []
    words = text.split(",")
    for word in words:
        if not re.fullmatch(r"\s*\d{1,9}\s*", word, re.ASCII):
            raise ConfigError(
                f"--dead is {shown(text)}; write numbers of devices with commas "
                "between, such as 3,17"
            )
    return [int(word) for word in words]


def _pairs(text: str, option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in text.split(","):
        axis, equals, value = (part.strip() for part in word.partition("="))
        if not (axis.isidentifier() and equals and value):
            raise ConfigError(
                f"{option} is {shown(text)}; write AXIS=NUMBER with commas between, "
                "such as data=8,tensor=8"
            )
        if axis in found:
            raise ConfigError(f"{option} is {shown(text)}; it names {axis} twice")
        found[axis] = value
    return found


def _mesh(
    options: TopologyOptions, graph: Graph
) -> tuple[dict[str, int], dict[str, float]]:
    """Return devices and traffic of each axis; all devices as one ring if not given."""
    planned = None
    if options.bytes is not None and "=" not in options.bytes:
        planned = _planned(local_path(options.bytes, "--bytes"), options.mesh)
    if options.mesh is not None:
        pairs, sizes = _pairs(options.mesh, "--mesh"), {}
        for axis, value in pairs.items():
            if not re.fullmatch(r"0*[1-9]\d{0,8}", value, re.ASCII):
                raise ConfigError(
                    f"--mesh has {axis}={value}; a number of devices is a whole number "
                    "from 1"
                )
            sizes[axis] = int(value)
    else:
        sizes = planned[0] if planned else {"ring": graph.size}
    if math.prod(sizes.values()) != graph.size:
        text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise ConfigError(
            f"mesh {text} is {math.prod(sizes.values())} devices and the graph has "
            f"{graph.size}; use axes of {divisors(graph.size)}"
        )
    if planned:
        traffic = {axis: planned[1].get(axis, 0.0) for axis in sizes}
    elif options.bytes is not None:
        traffic = _typed_bytes(options.bytes, sizes)
    else:
        traffic = dict.fromkeys(sizes, 1.0)
    return sizes, traffic


def _typed_bytes(text: str, sizes: Mapping[str, int]) -> dict[str, float]:
    found = dict.fromkeys(sizes, 0.0)
    for axis, value in _pairs(text, "--bytes").items():
        if axis not in sizes:
            raise ConfigError(
                f"--bytes names {axis}, which isn't an axis of the mesh; use "
                + ", ".join(sizes)
            )
        try:
            found[axis] = float(value)
        except ValueError:
            found[axis] = math.nan
        if not (math.isfinite(found[axis]) and found[axis] >= 0):
            raise ConfigError(f"--bytes has {axis}={value}; bytes are a number from 0")
    return found


def _planned(path: Path, mesh: str | None) -> tuple[dict[str, int], dict[str, float]]:
    """Return sizes and bytes of a plan's layout of this mesh, or of its fastest."""
    try:
        content = read_json(path)
        layouts = [*content["layouts"], *content["too_large"]]
        found = [(dict(row["mesh"]), row["collectives"]) for row in layouts]
        wanted = None
        if mesh is not None:
            wanted = {a: n for a, n in _pairs(mesh, "--mesh").items() if n != "1"}
        for sizes, moved in found:
            large = {axis: str(n) for axis, n in sizes.items() if n > 1}
            if wanted is None or large == wanted:
                total: dict[str, float] = dict.fromkeys(sizes, 0.0)
                for row in moved:
                    total[row["axis"]] += float(row["bytes"] * row["count"])
                return {a: n for a, n in sizes.items() if n > 1} or {"data": 1}, total
    except OSError as error:
        raise DataError(
            f"--bytes {path} can't be read ({error.strerror}); name a file of uoe plan "
            "--json, or write AXIS=BYTES"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise DataError(
            f"--bytes {path} isn't a plan ({type(error).__name__}: {error}); write one "
            "with uoe plan PRESET --topology NAME --json"
        ) from None
    what = f"mesh {mesh}" if mesh else "layout at all"
    raise DataError(f"--bytes {path} has no {what}; plan that topology")


def _start(
    known: Topology | None, graph: Graph, kept: np.ndarray, shape: tuple[int, ...]
) -> np.ndarray:
    """Return jax's order where all of a TPU slice is there, else the devices' own."""
    if known is not None and len(kept) == known.num_devices:
        from uoe_jax.partition.stand_in import jax_order

        return jax_order(known, shape)
    return np.arange(graph.size).reshape(shape)


def _content(
    title: str,
    graph: Graph,
    kept: np.ndarray,
    sizes: dict[str, int],
    traffic: dict[str, float],
    first: RingOrder,
    best: RingOrder,
    eps: float | None,
) -> dict[str, Any]:
    weights = list(traffic.values())
    table = graph.distances
    rows = {
        name: {**_numbers_of(order), "cost": order.cost(weights)}
        for name, order in (("before", first), ("ours", best))
    }
    content = {
        "topology": title,
        "devices": graph.size,
        "links": len(graph.edges()),
        "switch": graph.switched and graph.size > 2,
        "diameter": float(table.max()),
        "mean_distance": float(table.sum() / max(1, graph.size * (graph.size - 1))),
        "mesh": sizes,
        "traffic": traffic,
        **rows,
        "order": kept[best.vertices].tolist(),
    }
    if eps is not None:
        box = graph.box
        flat = box is not None and sum(side > 1 for side in box.sides) < 3
        r = 5 if flat and box is not None and not any(box.rings) else 8
        found = partition(graph, eps=eps, r=r, diameter=float(table.max()))
        content["partition"] = {
            "eps": eps,
            "clusters": found.size,
            "supernodes": len(found.cops.parents),
            "largest_bag": found.cops.width,
            "note": found.note,
        }
    return content


def _numbers_of(order: RingOrder) -> dict[str, Any]:
    return {"hops": order.hops, "worst": order.worst, "loads": order.loads}


def _describe(content: dict[str, Any], graph: Graph, best: RingOrder) -> str:
    """Return the table and a plan of the devices."""
    before, ours = content["before"], content["ours"]
    name = "jax" if content["start"] == "jax" else "as numbered"
    lines = [
        f"{content['topology']}: {content['devices']} devices, {content['links']} "
        f"links; distances {content['mean_distance']:.3g} in the mean, "
        f"{content['diameter']:.3g} at most"
    ]
    if content["switch"]:
        lines.append("a switch joins them: every order is equal, so none is changed")
    rows = [
        (
            axis,
            str(size),
            f"{content['traffic'][axis]:.3g}",
            *(
                f"{which['hops'][i]:.2f}, {which['worst'][i]:.3g}, {which['loads'][i]}"
                for which in (before, ours)
            ),
        )
        for i, (axis, size) in enumerate(content["mesh"].items())
    ]
    header = ("axis", "devices", "bytes", f"{name}: mean, worst, load", "ours")
    lines += ["", format_table(header, rows)]
    saved = 1 - ours["cost"] / before["cost"] if before["cost"] else 0.0
    lines += [
        f"hops, weighted by bytes: {name} {before['cost']:.3f}, ours "
        f"{ours['cost']:.3f} ({saved:.0%} fewer)",
    ]
    if drawn := plan_of(graph, best, ".".join(content["mesh"])):
        lines += ["", drawn]
    if found := content.get("partition"):
        text = (
            f"shortcut partition, eps {found['eps']:g}: {found['clusters']} clusters, "
            f"{found['supernodes']} supernodes, bags of {found['largest_bag']} at most"
        )
        lines += ["", text]
        if found["note"]:
            lines.append(found["note"])
    return "\n".join(lines)


def plan_of(graph: Graph, order: RingOrder, axes: str) -> str:
    """Return devices where they stand, each with its place in the mesh; "": no places.

    A layer of a three-dimensional box after the other.
    """
    if graph.places is None or graph.size > 256:
        return ""
    # Boxes hold their dimensions slowest first, and an axis of one place says nothing.
    places = graph.places[:, np.ptp(graph.places, axis=0) > 0]
    if graph.box is None:
        places = places[:, ::-1]
    if places.shape[1] not in (1, 2, 3):
        return ""
    places = places - places.min(axis=0)
    places = np.pad(places, ((0, 0), (3 - places.shape[1], 0)))
    words = {}
    for index, vertex in np.ndenumerate(order.vertices):
        place = tuple(places[vertex].tolist())
        words[place] = ".".join(str(i) for i in index)
    sides = (places.max(axis=0) + 1).tolist()
    width = max(map(len, words.values()))
    lines = []
    for layer in range(sides[0]):
        if sides[0] > 1:
            lines.append(f"layer {layer}")
        for row in range(sides[1]):
            cells = [words.get((layer, row, c), "x") for c in range(sides[2])]
            lines.append("  ".join(cell.rjust(width) for cell in cells))
    title = f"our order: where each device stands in {axes} (x: no device)"
    return "\n".join([title, *lines])
