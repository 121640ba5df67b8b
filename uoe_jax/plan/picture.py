"""Who holds what: the experts, batch rows and tokens of every device of a mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import extra_packages
from uoe_jax.hardware.work import collectives
from uoe_jax.kinds import ATTENTIONS, MLPS
from uoe_jax.partition.legal import AXES, Sizes
from uoe_jax.plan.layouts import describe_sizes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colour-blind-safe set: one colour a tensor device.
_COLORS = "#0072B2 #D55E00 #009E73 #CC79A7 #E69F00 #56B4E9 #6E7781 #8C8500".split()
_SHOWN = 64  # devices drawn; more would be dots
_WIDE = 4  # devices side by side, or one group's if it has more


@dataclass(frozen=True, kw_only=True)
class Holding:
    """One device: its place on each axis and its share of everything."""

    place: dict[str, int]
    attention: str
    mlp: str
    rows: str
    tokens: str
    weights: str


def holdings(config: ExperimentConfig, sizes: Sizes) -> list[Holding]:
    """Return what each device holds, in the order of the mesh."""
    batch = config.data.batch_size // config.train.accumulate
    length, count = config.seq_len, math.prod(sizes[axis] for axis in AXES)
    found = []
    for index in range(count):
        place, rest = {}, index
        for axis in reversed(AXES):
            place[axis], rest = rest % sizes[axis], rest // sizes[axis]
        shards = sizes["data"] * sizes["fsdp"]
        shard = place["data"] * sizes["fsdp"] + place["fsdp"]
        attention, mlp = _experts(config, sizes, place)
        found.append(
            Holding(
                place=place,
                attention=attention,
                mlp=mlp,
                rows=_range(shard, batch // shards),
                tokens=_range(place["sequence"], length // sizes["sequence"]),
                weights=f"{place['fsdp'] + 1} of {sizes['fsdp']}",
            )
        )
    return found


def _experts(
    config: ExperimentConfig, sizes: Sizes, place: dict[str, int]
) -> tuple[str, str]:
    model, rank = config.model, place["tensor"]
    attention, mlp = model.layer_kinds[-1]
    heads = _range(rank, model.num_kv_heads // sizes["tensor"])
    own = model.of_layer(model.num_layers - 1)
    columns = _range(rank, own.d_ff // sizes["tensor"])
    first = f"heads {heads}"
    if router := ATTENTIONS[attention].router(model):
        owned = owned_experts(config, router.num_experts, sizes["tensor"], rank)
        share = len(owned) // sizes["sequence"]
        owned = owned[place["sequence"] * share : (place["sequence"] + 1) * share]
        first = f"experts {_list(owned)}"
    second = f"columns {columns}"
    if router := MLPS[mlp].router(model):
        owned = owned_experts(config, router.num_experts, sizes["tensor"], rank)
        second = f"experts {_list(owned)}"
    return first, second


def owned_experts(
    config: ExperimentConfig, num_experts: int, tensor: int, rank: int
) -> list[int]:
    """Return the experts whose weights one tensor device holds."""
    if config.layout.deals:
        return list(range(rank, num_experts, tensor))
    share = num_experts // tensor
    return list(range(rank * share, (rank + 1) * share))


def _range(index: int, share: int) -> str:
    first, last = index * share, (index + 1) * share - 1
    return str(first) if share == 1 else f"{first}-{last}"


def _list(numbers: Sequence[int]) -> str:
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    return " ".join(map(str, numbers))


def movements(config: ExperimentConfig, sizes: Sizes, *, chosen: bool) -> list[str]:
    """Return what moves in a step, a line a collective, the most bytes first.

    `chosen` as `collectives` takes it.
    """
    found = sorted(
        collectives(config, sizes, chosen=chosen),
        key=lambda c: -c.num_bytes * c.count,
    )
    return [
        f"{c.kind.replace('_', '-')} over {c.axis}: {c.what}, {c.count} x "
        f"{_bytes(c.num_bytes)}" + (" (beside the arithmetic)" if c.hidden else "")
        for c in found
    ]


def _bytes(number: float) -> str:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:.0f} B"


def draw_layout(
    config: ExperimentConfig, sizes: Sizes, *, chosen: bool = True
) -> Figure:
    """Return a picture of the mesh: a box a device, coloured by tensor place.

    Boxes of one batch share, its sequence and tensor devices, lie side by side.
    `chosen` as `collectives` takes it.
    """
    with extra_packages():
        from matplotlib.figure import Figure

    group = sizes["sequence"] * sizes["tensor"]
    held = holdings(config, sizes)
    columns = min(len(held), group * max(1, _WIDE // group))
    shown = held[: max(columns, _SHOWN // columns * columns)]
    rows = -(-len(shown) // columns)
    lines = movements(config, sizes, chosen=chosen) or ["nothing moves: one device"]
    heights = [0.95 * rows + 0.5, 0.2 * len(lines) + 0.4]
    figure = Figure(
        figsize=(max(7.5, 1.9 * columns), sum(heights)), layout="constrained"
    )
    grid, text = figure.subplots(2, 1, height_ratios=heights)
    for index, device in enumerate(shown):
        _draw_device(grid, index, index % columns, index // columns, device)
    grid.set(xlim=(0, columns), ylim=(rows, 0), xticks=[], yticks=[])
    grid.set_frame_on(False)
    more = "" if shown == held else f" (the first {len(shown)} of {len(held)} devices)"
    title = f"{config.name}: {describe_sizes(sizes)}{more}"
    grid.set_title(title, fontsize=10, parse_math=False)  # a name may hold a $
    text.set_axis_off()
    text.set_title("What moves in one training step", fontsize=9, loc="left")
    text.text(0, 1, "\n".join(lines), va="top", fontsize=8, transform=text.transAxes)
    return figure


def _draw_device(grid: Any, index: int, column: int, row: int, held: Holding) -> None:
    with extra_packages():
        from matplotlib.patches import FancyBboxPatch

    color = _COLORS[held.place["tensor"] % len(_COLORS)]
    grid.add_patch(
        FancyBboxPatch(
            (column + 0.04, row + 0.05),
            0.92,
            0.9,
            boxstyle="round,pad=0,rounding_size=0.05",
            facecolor=color + "26",
            edgecolor=color,
        )
    )
    label = (
        f"device {index}\nattention: {held.attention}\nMLP: {held.mlp}\n"
        f"rows {held.rows}, tokens {held.tokens}\nweight shard {held.weights}"
    )
    grid.text(column + 0.5, row + 0.5, label, ha="center", va="center", fontsize=7)
