"""TPU slices that exist, and the names Google gives them. Imports no jax.

Google Cloud's system architecture pages: accelerator types of v4, v5p and TPU7x count
TensorCores, two a chip; those of v5e and v6e count chips.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass

from uoe_jax.errors import ConfigError

Shape = tuple[int, ...]

_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_PARTS = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of one cube of 4 x 4 x 4
_CUBE = 4


@dataclass(frozen=True, kw_only=True)
class Family:
    """A generation's slices: cores a chip in its names, and the most chips of one."""

    cores: int
    dimensions: int
    most: int


FAMILIES = {
    "v4": Family(cores=2, dimensions=3, most=4096),
    "v5p": Family(cores=2, dimensions=3, most=6144),
    "tpu7x": Family(cores=2, dimensions=3, most=9216),
    "v5e": Family(cores=1, dimensions=2, most=256),
    "v6e": Family(cores=1, dimensions=2, most=256),
}
# Other names of the same: Google's, those of jax's device kinds, and spoken ones.
ALIASES = {
    "v5litepod": "v5e",
    "v5lite": "v5e",
    "v5-lite": "v5e",
    "v6-lite": "v6e",
    "v6lite": "v6e",
    "trillium": "v6e",
    "v5": "v5p",
    "v7": "tpu7x",
    "v7x": "tpu7x",
    "tpu7": "tpu7x",
    "7x": "tpu7x",
    "ironwood": "tpu7x",
}


def family_name(kind: str) -> str:
    """Return a TPU kind's plain name: "tpu-v5-lite-podslice" is "v5e"."""
    plain = kind.replace(" ", "-").replace("_", "-")
    plain = re.sub(r"-(pod)?slice$", "", re.sub(r"^tpu-", "", plain))
    return ALIASES.get(plain, plain)


def shape_of_type(text: str) -> tuple[str, Shape] | None:
    """Return family and shape of an accelerator type such as "v5p-128"; None: no type.

    Raises:
      ConfigError: a number of chips or cores that no slice has.
    """
    found = re.fullmatch(r"(.+)-(\d{1,9})", text)
    name = family_name(found[1]) if found else ""
    if found is None or name not in FAMILIES:
        return None
    family, number = FAMILIES[name], int(found[2])
    chips, rest = divmod(number, family.cores)
    shapes = slices(name)
    fitting = [s for s in shapes if math.prod(s) == chips and not rest]
    if fitting:
        return name, min(fitting, key=sum)
    sizes = sorted({math.prod(s) for s in shapes})
    wanted = max(number / family.cores, 0.5)
    near = sorted(sizes, key=lambda n: (abs(math.log(n / wanted)), n))[:2]
    unit = "TensorCores" if family.cores > 1 else "chips"
    names = " or ".join(f"{found[1]}-{n * family.cores}" for n in sorted(near))
    raise ConfigError(
        f"topology is {text!r}; no {name} slice has {number} {unit}, the nearest are "
        f"{names}"
    )


def slices(name: str) -> list[Shape]:
    """Return every shape a family's slices have, in chips."""
    family = FAMILIES[name]
    if family.dimensions == 2:
        return list(_FLAT)
    sides = range(_CUBE, family.most // _CUBE**2 + 1, _CUBE)
    whole = [
        (a, b, c)
        for a, b in itertools.combinations_with_replacement(sides, 2)
        if a * b * b <= family.most
        for c in range(b, family.most // (a * b) + 1, _CUBE)
    ]
    return [*_PARTS, *whole]


def check_slice(name: str, shape: Shape) -> None:
    """Raise ConfigError with the nearest slices if a family has none of this shape."""
    shapes = slices(name)
    if shape in shapes:
        return

    def distance(other: Shape) -> tuple[float, float]:
        pairs = zip(sorted(shape), sorted(other), strict=True)
        ratio = math.log(math.prod(other) / math.prod(shape))
        return abs(ratio), sum(abs(math.log(b / a)) for a, b in pairs)

    near = sorted(shapes, key=distance)[:2]
    if sorted(near[0]) == sorted(shape):
        near = near[:1]
    names = " or ".join(f"{name}:{spell(s)}" for s in near)
    raise ConfigError(
        f"topology is {name}:{spell(shape)}; no {name} slice has that shape, use "
        f"{names}"
    )


def spell(shape: Shape) -> str:
    """Return a shape as "4x4x8"."""
    return "x".join(map(str, shape))
