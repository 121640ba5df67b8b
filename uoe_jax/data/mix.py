"""A mixture of texts: each source has its share of the rows that are trained on.

All sources are prepared as one corpus, one after the other, so a run has one record of
its data and one tokenizer. Weights decide only which row comes when.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int

from uoe_jax.config import DataConfig
from uoe_jax.data.chat import ChatTemplate
from uoe_jax.data.order import permute, train_order
from uoe_jax.data.text import Document, TextSource
from uoe_jax.errors import DataError
from uoe_jax.mixture import BLOCK, read_mix


def member_configs(data: DataConfig) -> list[DataConfig]:
    """Return the options by which each source of a mixture is read alone."""
    named = lambda path: None if path == "stdlib" else path
    return [
        dataclasses.replace(data, mix=None, path=named(share.path))
        for share in read_mix(data.mix or ())
    ]


@dataclass(frozen=True)
class MixSource(TextSource):
    """Several texts, one after the other; a document says of which it is."""

    members: tuple[TextSource, ...] = ()

    @property
    def decodes(self) -> bool:  # type: ignore[override]
        """Whether some source's bytes were text in another encoding."""
        return any(member.decodes for member in self.members)

    def documents(self) -> Iterator[Document]:
        """Yield every document of every source."""
        for number, member in enumerate(self.members):
            for document in member.documents():
                yield document._replace(member=number)

    def chat_template(self) -> ChatTemplate | None:
        """Return how conversations are written, which is the same in all sources."""
        return next(filter(None, (m.chat_template() for m in self.members)), None)

    def num_skipped(self) -> int:
        """Return how many records without a text the last pass left out."""
        return sum(member.num_skipped() for member in self.members)


def mix_sources(members: Sequence[Any], data: DataConfig) -> MixSource:
    """Return the source of a mixture's sources; DataError if one isn't plain text."""
    for member, share in zip(members, read_mix(data.mix or ()), strict=True):
        if not isinstance(member, TextSource) or member.labelled:
            raise DataError(
                f"data.mix has {share.path}, which isn't plain text; a mixture is of "
                "texts for a decoder"
            )
    # Files of two folders may have one name: a manifest knows them by it.
    files = [
        file._replace(name=f"{number}/{file.name}")
        for number, member in enumerate(members)
        for file in member.files
    ]
    name = " + ".join(member.name for member in members)
    return MixSource(name, tuple(files), data, members=tuple(members))


def mixed_order(
    positions: Int[np.ndarray, " N"],
    sizes: Int[np.ndarray, " K"],
    counts: Int[np.ndarray, " K"],
    seed: int,
) -> Int[np.ndarray, " N"]:
    """Return the rows at positions of an endless mixture.

    Rows are numbered source by source, `sizes` of each. Every block of positions has
    `counts` of each, shuffled; each source runs through reshuffled epochs of its own,
    no row left out. A pure function of the position, so any batch is found at once.
    """
    blocks, ends = positions // BLOCK, np.cumsum(counts)
    slots = np.empty_like(positions)
    for block in np.unique(blocks):
        here = blocks == block
        key = (seed, int(block), len(counts))  # of three: no epoch's key has as many
        slots[here] = permute(positions[here] % BLOCK, BLOCK, key)
    part = np.searchsorted(ends, slots, side="right")
    first = np.concatenate([[0], np.cumsum(sizes)])
    result = np.empty_like(positions)
    for number in np.unique(part):
        mine = part == number
        rank = slots[mine] - (ends[number] - counts[number])
        place = blocks[mine] * counts[number] + rank
        rows = train_order(place, int(sizes[number]), seed)
        result[mine] = first[number] + rows
    return result
