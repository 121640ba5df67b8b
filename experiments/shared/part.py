"""Which of a study's models or runs a process takes, where several share the work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """Every `count`-th of all, from `number` on."""

    number: int
    count: int

    @property
    def file(self) -> str:
        """The name of the file that holds its results."""
        return "results.json" if self.count == 1 else f"results-{self.number}.json"

    def take[T](self, wanted: Sequence[T]) -> list[T]:
        """Return what is this part's."""
        return list(wanted[self.number - 1 :: self.count])

    @classmethod
    def parse(cls, text: str) -> Part:
        """Return what `I/N` means; ValueError unless 1 <= I <= N."""
        part = cls(*map(int, text.split("/")))
        if not 1 <= part.number <= part.count:
            raise ValueError(text)
        return part
