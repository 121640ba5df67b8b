"""What is known of a study so far, in a file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from uoe_jax.bench.record import read_record, write_record


class Record:
    """A study's results, written after every row."""

    def __init__(self, path: Path, facts: dict[str, Any]):
        self.path, self._began = path, time.perf_counter()
        found = read_record(path)
        for name in ("data", "pictures", "scale"):
            if found and found[name] != facts[name]:
                raise SystemExit(
                    f"{path} has results of {name} {found[name]}, and this is "
                    f"{facts[name]}; take another --out"
                )
        self.found = found | facts | {"seeds": found.get("seeds", [])}
        write_record(path, self.found)  # before any weights are there

    def seed(self, seed: int) -> dict[str, Any]:
        """Return what is known of a seed, to be added to."""
        known = {each["seed"]: each for each in self.found["seeds"]}
        if seed not in known:
            empty = {"seed": seed, "seconds": {}, "steps": {}, "ranks": {}, "rows": []}
            self.found["seeds"].append(empty)
        return self.found["seeds"][-1] if seed not in known else known[seed]

    def write(self, what: str) -> None:
        """Write everything, and say what is new and when."""
        print(f"[{time.perf_counter() - self._began:5.0f} s] {what}", flush=True)
        write_record(self.path, self.found)

    def seconds(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began

    def steps(self, name: str) -> int | None:
        """Return the steps that the first seed took, as all others do; None: none."""
        taken = [each["steps"].get(name) for each in self.found["seeds"]]
        return next((steps for steps in taken if steps), None)

    def needs(self, names: Sequence[str]) -> float:
        """Return the seconds that trainings took of the seed where they took most."""
        spent = [
            sum(each["seconds"].get(name, 0.0) for name in names)
            for each in self.found["seeds"]
        ]
        return max(spent, default=0.0)
