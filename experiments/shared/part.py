"""Which of a study's models or runs a process takes, where several share the work."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Part `number` of `count`: of a fixed list by place, of one that grows by name."""

    number: int
    count: int

    @property
    def file(self) -> str:
        """The name of the file that holds its results."""
        return "results.json" if self.count == 1 else f"results-{self.number}.json"

    def take[T](self, wanted: Sequence[T]) -> list[T]:
        """Return every `count`-th of a list that stays as it is while parts run."""
        return list(wanted[self.number - 1 :: self.count])

    def has(self, name: str, seed: int) -> bool:
        """Whether a run is this part's, whatever others there are or will be.

        Seeds of one name take turns; a digest of the name says which part begins.
        """
        digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
        return (digest + seed) % self.count == self.number - 1

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return what `I/N` means; ValueError unless 1 <= I <= N."""
        part = cls(*map(int, text.split("/")))
        if not 1 <= part.number <= part.count:
            raise ValueError(text)
        return part
