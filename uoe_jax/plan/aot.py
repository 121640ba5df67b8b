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
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.extend import core
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
    if jax.default_backend() != "tpu":
        # Its lock guards the chips of a machine; compilers may run side by side.
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Without it a v4 device is one of a chip's two cores; later chips have no choice.
    config = {"chip_config_name": "megacore"} if name.startswith("v4") else {}
    try:
        return topologies.get_topology_desc(
            platform="tpu", topology_name=name, **config
        ).devices
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
    function: Callable,
    *args: Any,
    mesh: Mesh,
    donate: tuple[int, ...] = (),
    outline: bool = False,
) -> Any:
    """Return `function` lowered for the mesh's devices; `.compile()` is the next step.

    Args:
      function: what to compile; a jitted function is compiled as it is.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`; those without a sharding
        are replicated.
      mesh: TPU devices, see `topology_mesh`.
      donate: positions of donated arguments.
      outline: leave out what Pallas kernels do, see `outlined`.
    """
    everywhere = NamedSharding(mesh, PartitionSpec())

    def placed(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        if not (isinstance(sharding, NamedSharding) and sharding.mesh == mesh):
            sharding = everywhere
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    jitted: Any = function
    if not hasattr(function, "trace"):
        jitted = jax.jit(function, donate_argnums=donate)
    # Setting the mesh tells kernels which device they are traced for.
    with jax.set_mesh(mesh):
        placed_args = jax.tree.map(placed, args)
        traced = jitted.trace(*placed_args)
        if outline:
            traced = _trace_outline(traced, jax.tree.leaves(placed_args))
        return traced.lower(lowering_platforms=("tpu",))


def outlined(jaxpr: core.Jaxpr) -> core.Jaxpr:
    """Return a program whose Pallas kernels have no body and whose sorts only reverse.

    A kernel's operands, results, grid and declared cost stay, so the program holds the
    same arrays, but for the workspace of sorts, and sends the same messages. What it
    computes is nothing, and most of the time that compiling takes is gone.
    """
    return jaxpr.replace(eqns=[new for eqn in jaxpr.eqns for new in _outline(eqn)])


def _outline(eqn: core.JaxprEqn) -> Iterable[core.JaxprEqn]:
    if eqn.primitive.name == "pallas_call":
        body = eqn.params["jaxpr"].replace(eqns=[])
        yield eqn.replace(params={**eqn.params, "jaxpr": body})
    elif eqn.primitive is jax.lax.sort_p:
        about = {"dimensions": (eqn.params["dimension"],)}
        for source, result in zip(eqn.invars, eqn.outvars, strict=True):
            yield eqn.replace(
                primitive=jax.lax.rev_p,
                invars=[source],
                outvars=[result],
                params=about,
            )
    else:
        inner = {name: _outline_value(value) for name, value in eqn.params.items()}
        yield eqn.replace(params=inner)


def _outline_value(value: Any) -> Any:
    """Return an equation's parameter with the programs in it outlined."""
    if isinstance(value, core.Jaxpr):
        return outlined(value)
    if type(value) is tuple:  # branches
        return tuple(_outline_value(item) for item in value)
    return value


def _trace_outline(traced: Any, leaves: Sequence[Any]) -> Any:
    """Return a traced function with its kernels outlined, its donations kept."""
    about = jax.tree.leaves(traced.args_info, is_leaf=lambda a: hasattr(a, "donated"))
    donate = tuple(place for place, arg in enumerate(about) if arg.donated)
    run = core.jaxpr_as_fun(outlined(traced.jaxpr))
    return jax.jit(run, donate_argnums=donate).trace(*leaves)


def compile_for(
    function: Callable,
    *args: Any,
    topology: str = "v5e:2x2",
    mesh: Mesh | None = None,
    donate: tuple[int, ...] = (),
    outline: bool = False,
) -> Compiled:
    """Compile for a named topology and return what the compiler says; see `lower_for`.

    Raises:
      ConfigError: as `topology_devices`.
      jax.errors.JaxRuntimeError: the compiler's own refusal, such as too little memory.
    """
    mesh = topology_mesh(topology) if mesh is None else mesh
    lowered = lower_for(function, *args, mesh=mesh, donate=donate, outline=outline)
    return describe(lowered.compile(), topology, mesh)


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
        kernels=_count(map(_kernel_name, _kernel_calls(text))),
        collectives=_count(
            re.findall(
                r"[\])}] (all-reduce|all-gather|reduce-scatter|all-to-all|"
                r"collective-permute)(?:-start)?\(",
                text,
            )
        ),
    )


def buffer_shapes(executable: Any) -> set[tuple[int, ...]]:
    """Return the shapes of everything that a compiled program holds in memory.

    What only exists inside a fusion, element by element, isn't held.
    """
    shapes, fused = set(), False
    for line in executable.as_text().splitlines():
        if line.endswith("{") and not line.startswith(" "):
            fused = line.startswith("%fused_computation")
        elif not fused and " = " in line:
            result = line.split(" = ", 1)[1].split("(%", 1)[0]
            for sides in re.findall(r"\w+\[([\d,]+)\]", result):
                shapes.add(tuple(int(side) for side in sides.split(",")))
    return shapes


def _kernel_calls(text: str) -> list[str]:
    """Return the lines of a program that call a Pallas kernel."""
    target = 'custom_call_target="tpu_custom_call"'
    return [line for line in text.splitlines() if target in line]


def _kernel_name(call: str) -> str:
    """Return a kernel's name: of its operation, else of the instruction itself."""
    found = re.search(r'([A-Za-z_]\w*)\)*/pallas_call"', call)
    return (found or re.search(r"%([A-Za-z_]\w*)", call) or ("", call))[1]


def _count(names: Iterable[str]) -> dict[str, int]:
    """Return how often each name occurs, by name."""
    return dict(sorted(Counter(names).items()))
