"""Triton kernels inside JAX programs: what they need, and how they are launched.

jax-triton puts a compiled kernel into the program. Which release goes with which
triton is checked at the first call, because a wrong pair fails far from its cause.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from uoe_jax.varying import vary_like

# jax-triton series -> the triton releases it works beside, [from, to).
PAIRS = {(0, 3): ((3, 6), (3, 7)), (0, 4): ((3, 7), (4, 0))}
AMPERE = 8.0
# Bytes of shared memory that a program may take, by compute capability.
SHARED_MEMORY = {8.0: 163 << 10, 9.0: 227 << 10, 10.0: 227 << 10}
LEAST_SHARED_MEMORY = 99 << 10  # 8.6, 8.9, 12.0
INTERPRETED_CORES = 4  # multiprocessors that kernels are planned for without a GPU
INSTALL = "pip install 'uoe_jax[kernels]'"
# jaxlib's call of a Triton kernel that XLA may put into a CUDA graph.
IN_GRAPH = "triton_kernel_call_ffi"

# Part of jit's cache key, so a function traced for both is traced twice.
_INTERPRETER = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def interpreted(run: Callable) -> Iterator[None]:
    """Run kernels on the CPU: `run(kernel, grid, constants, out, *arrays)`."""
    with _INTERPRETER(run):
        yield


def is_interpreted() -> bool:
    """Return whether kernels run on the CPU, which has no instructions of a GPU."""
    return _INTERPRETER.value is not None


def require(dtype: Any) -> None:
    """Return if Triton kernels can serve arrays of `dtype` here.

    Raises:
      NotImplementedError: no fit device, package, pair of releases, or dtype.
    """
    if _INTERPRETER.value is None:
        if jax.default_backend() not in ("gpu", "cuda"):
            raise NotImplementedError(
                f"it needs an NVIDIA GPU, not {jax.default_backend()}"
            )
        capability = float(jax.devices()[0].compute_capability)
        if capability < AMPERE:
            raise NotImplementedError(
                f"compute capability {capability}; it needs {AMPERE} (Ampere) or later"
            )
        fault = installed_fault()
        if fault:
            warn_slow(fault)
            raise NotImplementedError(fault)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"it takes bfloat16, float16 or float32, not {jnp.dtype(dtype)}"
        )


@functools.cache
def warn_slow(fault: str) -> None:
    """Warn, once, that a GPU computes without the kernels made for it."""
    warnings.warn(
        f"plain JAX computes this model's routed parts on the GPU, more slowly than "
        f"kernels would: {fault}",
        stacklevel=2,
    )


@functools.cache
def installed_fault() -> str | None:
    """Return why the installed packages can't run kernels, or None."""
    found = {}
    for name in ("jax-triton", "triton"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return f"it needs {name}; {INSTALL}"
    return pair_fault(found["jax-triton"], found["triton"])


def pair_fault(bridge: str, compiler: str) -> str | None:
    """Return what is wrong with a jax-triton and a triton release, or None."""
    number = lambda text: tuple(int(part) for part in text.split(".")[:2])
    series, have = number(bridge), number(compiler)
    fits = [s for s, (low, high) in PAIRS.items() if low <= have < high]
    if series in fits:
        return None
    dotted = lambda pair: ".".join(map(str, pair))
    fix = f"jax-triton {dotted(fits[0])}" if fits else "jax-triton 0.3 and triton 3.6"
    return f"jax-triton {bridge} beside triton {compiler} doesn't work; install {fix}"


def shared_memory() -> int:
    """Return the bytes of shared memory that a program may take here."""
    if _INTERPRETER.value is not None:
        return LEAST_SHARED_MEMORY
    capability = float(jax.devices()[0].compute_capability)
    return SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)


def cores() -> int:
    """Return how many multiprocessors run programs here."""
    if _INTERPRETER.value is not None:
        return INTERPRETED_CORES
    return jax.devices()[0].core_count


def launch(
    kernel: Any,
    *args: jax.Array | int,
    out_shape: tuple[tuple[int, ...], Any] | list[tuple[tuple[int, ...], Any]],
    grid: int,
    num_warps: int,
    num_stages: int,
    aliases: dict[int, int] | None = None,
    small: bool = False,
    **constants: Any,
) -> Any:
    """Return the array that `grid` programs of a kernel write, of any content before.

    The kernel takes the arrays and numbers, then the output, then the constants. A list
    of shapes makes it a list of outputs. `aliases` are arguments, by number, that
    outputs have the memory and content of. `small` kernels become nodes of a CUDA graph
    with those around them: starting one by one would take longer than they run.
    """
    if isinstance(out_shape, list):
        shape = [jax.ShapeDtypeStruct(*each) for each in out_shape]
    else:
        shape = jax.ShapeDtypeStruct(*out_shape)
    aliases = aliases or {}
    arrays = [a for a in args if not isinstance(a, int)]
    run = _INTERPRETER.value
    if run is not None:
        numbers = {i: a for i, a in enumerate(args) if isinstance(a, int)}
        if aliases:
            run = functools.partial(run, aliases=aliases)
        call = functools.partial(_interpret, run, numbers, kernel, grid, constants)
        out = jax.pure_callback(functools.partial(call, shape), shape, *arrays)
        return jax.tree.map(lambda x: vary_like(x, arrays[0]), out)
    bridge = importlib.import_module("jax_triton")
    more = {"custom_call_target_name": IN_GRAPH} if small and typed_calls() else {}
    out = bridge.triton_call(
        *args,
        kernel=kernel,
        out_shape=shape,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        input_output_aliases=aliases,
        **more,
        **constants,
    )
    return jax.tree.map(lambda x: vary_like(x, arrays[0]), out)


@functools.cache
def typed_calls() -> bool:
    """Whether jax-triton has to be told to make calls that fit into a CUDA graph.

    From 0.4 on it makes no others. 0.3 makes calls of the old kind, which XLA starts
    one by one; jaxlib has had the new kind for longer.
    """
    from jax.interpreters import mlir

    library = importlib.import_module("jax_triton.triton_lib")
    if hasattr(library, "CUSTOM_CALL_TARGET_NAME"):
        return False
    lower = functools.partial(
        library.triton_kernel_call_lowering, library.get_cuda_backend
    )

    def lower_typed(ctx: Any, *args: Any, **params: Any) -> Any:
        found = lower(ctx, *args, **params)
        if params["custom_call_target_name"] != IN_GRAPH:
            return found
        call = found[0].owner
        kernel = mlir.ir.StringAttr(call.attributes["backend_config"]).value_bytes
        call.erase()
        typed = jax.ffi.ffi_lowering(
            IN_GRAPH,
            api_version=4,
            operand_output_aliases=dict(params["input_output_aliases"]),
        )
        return typed(ctx, *args, opaque=kernel)

    mlir.register_lowering(library.triton_kernel_call_p, lower_typed, platform="cuda")
    return True


def _interpret(run, numbers, kernel, grid, constants, shape, *arrays):
    """Run a kernel on the CPU, with numbers in their places among the arrays."""
    left = iter(arrays)
    count = len(arrays) + len(numbers)
    args = [numbers[i] if i in numbers else next(left) for i in range(count)]
    return run(kernel, grid, constants, shape, *args)
