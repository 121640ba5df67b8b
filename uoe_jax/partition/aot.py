"""Compiling for TPUs that this machine doesn't have.

libtpu holds the whole compiler, so a plain CPU machine can find out whether a function
compiles for a pod, what memory it takes there, and what the compiler expects of it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uoe_jax.errors import ConfigError

# One small topology per generation that has Pallas kernels here.
TOPOLOGIES = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
}


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """What the compiler says of a function; bytes, FLOPs and seconds of one device.

    The compiler can't see into Pallas kernels: their FLOPs, bytes and share of
    `optimal_seconds` are what each kernel declares of itself. Below one second the
    estimate is a sum of rooflines; above, its whole seconds can't be trusted.
    """

    topology: str
    device_kind: str
    num_devices: int
    argument_bytes: int
    output_bytes: int
    temp_bytes: int
    code_bytes: int
    flops: float
    bytes_accessed: float
    optimal_seconds: float
    kernels: dict[str, int]  # Pallas kernels by name, and how often each is called
    collectives: dict[str, int]

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs and temporaries together, at most."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes

    def as_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return dataclasses.asdict(self)


def topology_devices(name: str) -> Sequence[Any]:
    """Return the devices of a TPU topology such as "v5e:2x2" or "v5p:4x4x4".

    Raises:
      ConfigError: libtpu isn't installed, or it doesn't know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f"topology is {name!r}, but compiling for TPUs needs libtpu; "
            "pip install 'uoe_jax[tpu]'"
        )
    # Without it, libtpu asks the cloud's metadata server about this machine.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        raise ConfigError(
            f"topology is {name!r}, which libtpu refuses ({str(error).splitlines()[0]})"
            f"; use a name such as {', '.join(TOPOLOGIES.values())}"
        ) from error


def topology_mesh(name: str, shape: dict[str, int] | None = None) -> Mesh:
    """Return a mesh of the topology's first devices; None: one device, axis "data".

    Raises:
      ConfigError: as `topology_devices`, or the topology has too few devices.
    """
    shape = shape or {"data": 1}
    devices = topology_devices(name)
    need = int(np.prod(list(shape.values())))
    if need > len(devices):
        raise ConfigError(
            f"mesh {shape} needs {need} devices and {name} has {len(devices)}; "
            "use a larger topology"
        )
    return Mesh(np.array(devices[:need]).reshape(tuple(shape.values())), tuple(shape))


def lower_for(
    function: Callable, *args: Any, mesh: Mesh, donate: tuple[int, ...] = ()
) -> Any:
    """Return the compiled executable of `function` for the mesh's devices.

    Args:
      function: what to compile; a jitted function is compiled as it is.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; those without a sharding
        are replicated.
      mesh: TPU devices, see `topology_mesh`.
      donate: positions of donated arguments.

    Raises:
      jax.errors.JaxRuntimeError: the compiler's own refusal, such as too little memory.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        if not (isinstance(sharding, NamedSharding) and sharding.mesh == mesh):
            sharding = everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    if not hasattr(function, "trace"):
        function = jax.jit(function, donate_argnums=donate)
    # Setting the mesh tells kernels which device they are traced for.
    with jax.set_mesh(mesh):
        traced = function.trace(*jax.tree.map(placed, args))
        return traced.lower(lowering_platforms=("tpu",)).compile()


def compile_for(
    function: Callable,
    *args: Any,
    topology: str = "v5e:2x2",
    mesh: Mesh | None = None,
    donate: tuple[int, ...] = (),
) -> Compiled:
    """Compile for a named topology and return what the compiler says; see `lower_for`.

    Raises:
      ConfigError: as `topology_devices`.
    """
    mesh = topology_mesh(topology) if mesh is None else mesh
    executable = lower_for(function, *args, mesh=mesh, donate=donate)
    return describe(executable, topology, mesh)


def describe(executable: Any, topology: str, mesh: Mesh) -> Compiled:
    """Return the compiler's figures of a compiled executable."""
    memory = executable.memory_analysis()
    cost = executable.cost_analysis() or {}
    text = executable.as_text()
    # A second is taken off for every instruction that the cost model doesn't know.
    seconds = cost.get("optimal_seconds", 0.0)
    return Compiled(
        topology=topology,
        device_kind=mesh.devices.flat[0].device_kind,
        num_devices=mesh.size,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        code_bytes=memory.generated_code_size_in_bytes,
        flops=cost.get("flops", 0.0),
        bytes_accessed=cost.get("bytes accessed", 0.0),
        optimal_seconds=seconds - min(0, math.floor(seconds)),
        kernels=_count(
            r'custom_call_target="tpu_custom_call"[^\n]*?op_name="[^"]*?'
            r"([A-Za-z_]\w*)\)*/pallas_call\"",
            text,
        ),
        collectives=_count(
            r"= \S+ (all-reduce|all-gather|reduce-scatter|all-to-all|"
            r"collective-permute)(?:-start)?\(",
            text,
        ),
    )


def _count(pattern: str, text: str) -> dict[str, int]:
    """Return how often each name is found, by name."""
    found: dict[str, int] = {}
    for match in re.finditer(pattern, text):
        name = next(group for group in match.groups() if group)
        found[name] = found.get(name, 0) + 1
    return dict(sorted(found.items()))
