"""What the TPU kernels know of each generation, and how they choose their tiles."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from uoe_jax.files import parse_json
from uoe_jax.ops import measured

LANES = 128  # the last axis of a register, and the grain of every row count here
MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Generation:
    """One TensorCore of a TPU generation, and how many work as one device."""

    name: str
    vmem_bytes: int
    mxu_side: int  # rows and columns of one systolic array
    macs_per_cycle: int  # bfloat16 multiply-adds of all its arrays
    clock_hz: float  # peak rate / (2 * macs_per_cycle * cores)
    cores: int
    kinds: tuple[str, ...]  # jax's names of the device

    @property
    def vmem_budget(self) -> int:
        """Bytes that one kernel may plan with; the rest is left to the compiler."""
        return min(self.vmem_bytes * 3 // 4, 48 * MIB)

    @property
    def table(self) -> str:
        """Name of its tuning table, as `measured.device_name` gives it on the chip."""
        return self.kinds[0].lower().replace(" ", "_")


GENERATIONS: dict[str, Generation] = {
    generation.name: generation
    for generation in (
        Generation(
            name="v4",
            vmem_bytes=16 * MIB,
            mxu_side=128,
            macs_per_cycle=65_536,
            clock_hz=1.05e9,
            cores=2,
            kinds=("TPU v4",),
        ),
        Generation(
            name="v5e",
            vmem_bytes=128 * MIB,
            mxu_side=128,
            macs_per_cycle=65_536,
            clock_hz=1.5e9,
            cores=1,
            kinds=("TPU v5 lite", "TPU v5e"),
        ),
        Generation(
            name="v5p",
            vmem_bytes=64 * MIB,
            mxu_side=128,
            macs_per_cycle=65_536,
            clock_hz=1.75e9,
            cores=2,
            kinds=("TPU v5", "TPU v5p"),
        ),
        Generation(
            name="v6e",
            vmem_bytes=128 * MIB,
            mxu_side=256,
            macs_per_cycle=262_144,
            clock_hz=1.75e9,
            cores=1,
            kinds=("TPU v6 lite", "TPU v6e"),
        ),
    )
}


@dataclass(frozen=True)
class Target:
    """What kernels are traced for: a device, or the interpreter playing one."""

    kind: str
    interpret: pltpu.InterpretParams | None = None
    tiles: tuple[tuple[str, int], ...] = ()  # overrides, by name of the tile side

    @property
    def generation(self) -> Generation:
        """Its generation; an unknown (newer) TPU is planned as a v6e."""
        for generation in GENERATIONS.values():
            if self.kind in generation.kinds:
                return generation
        return GENERATIONS["v6e"]


# Part of jit's cache key, so a function traced for two targets is traced twice.
_TARGET = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def compiling_for(kind: str, **tiles: int) -> Iterator[None]:
    """Trace kernels for a device kind that this process needn't have."""
    with _TARGET(Target(kind, None, tuple(sorted(tiles.items())))):
        yield


@contextlib.contextmanager
def interpreted(
    kind: str = "TPU v5e", *, detect_races: bool = True, **tiles: int
) -> Iterator[None]:
    """Run kernels on this machine's CPU, uninitialised memory filled with NaN."""
    options: dict[str, Any] = {
        "detect_races": detect_races,
        "uninitialized_memory": "nan",
    }
    # At a race, jax 0.12 raises and leaves the interpreter's memory as it is then; 0.11
    # notes that there was one and runs to the end, as is wanted here.
    if "on_race" in {field.name for field in fields(pltpu.InterpretParams)}:
        options["on_race"] = "warn"
    params = pltpu.InterpretParams(**options)
    with _TARGET(Target(kind, params, tuple(sorted(tiles.items())))):
        yield


def current_target() -> Target:
    """Return the target set by the context, the mesh's TPU, or this process's.

    Raises:
      NotImplementedError: there is no TPU.
    """
    if _TARGET.value is not None:
        return _TARGET.value
    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is not None and device.platform == "tpu":
        return Target(device.device_kind)
    if jax.default_backend() != "tpu":
        raise NotImplementedError(
            f"it needs a TPU, this process runs on {jax.default_backend()}"
        )
    return Target(jax.devices()[0].device_kind)


@functools.cache
def _tiles(name: str, own: Path) -> dict[str, Any]:
    """Return the tiles of a tuning table: this machine's own, else the shipped one."""
    shipped = resources.files("uoe_jax.ops") / "tuning"
    for path in (own / f"{name}.json", shipped / f"{name}.json"):
        if path.is_file():
            return parse_json(path.read_bytes(), str(path)).get("tiles", {})
    return {}


def choose(
    op: str, shape: dict[str, Any], target: Target, modelled: dict[str, int]
) -> dict[str, int]:
    """Return tile sides: the context's, else the tuning table's, else the model's."""
    table = _tiles(target.generation.table, measured.user_folder())
    found = measured.nearest(table.get(op, ()), shape)
    sides = modelled if found is None else {**modelled, **found["tile"]}
    return {**sides, **{n: s for n, s in target.tiles if n in modelled}}


def round_up(size: int, grain: int) -> int:
    """Return the least multiple of `grain` that is at least `size`."""
    return -(-size // grain) * grain


def pad_rows(x: jax.Array, rows: int, axis: int = 0) -> jax.Array:
    """Return `x` with zero rows appended up to `rows`."""
    missing = rows - x.shape[axis]
    if not missing:
        return x
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths)


def matmul(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Return the float32 product over axis `contract[0]` of a and `[1]` of b."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        precision=exact,
        preferred_element_type=jnp.float32,
    )


def call(kernel: Any, target: Target, *, vmem: int, parallel: tuple, **kwargs: Any):
    """Return `pl.pallas_call` with this target's compiler or interpreter settings.

    Args:
      kernel: the body.
      target: what it is traced for.
      vmem: bytes the tiles need; the limit leaves room for spilled registers.
      parallel: for each grid axis, whether its steps may run in any order.
      **kwargs: passed on.
    """
    limit = min(target.generation.vmem_bytes - MIB, max(16 * MIB, 2 * vmem))
    params = pltpu.CompilerParams(
        dimension_semantics=tuple(
            "parallel" if free else "arbitrary" for free in parallel
        ),
        vmem_limit_bytes=limit,
    )
    return pl.pallas_call(
        kernel,
        compiler_params=params,
        interpret=target.interpret or False,
        **kwargs,
    )


def vmem_bytes(shape: tuple[int, ...], dtype: Any, copies: int = 1) -> int:
    """Return what an array takes in VMEM, its last two axes padded to registers."""
    size = jnp.dtype(dtype).itemsize
    *lead, rows, lanes = (1, *shape) if len(shape) == 1 else shape
    total = round_up(rows, 32 // size) * round_up(lanes, LANES) * size
    for side in lead:
        total *= side
    return total * copies
