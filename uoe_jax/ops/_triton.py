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

from uoe_jax.ops._dispatch import vary_like

# jax-triton series -> the triton releases it works beside, [from, to).
PAIRS = {(0, 3): ((3, 6), (3, 7)), (0, 4): ((3, 7), (4, 0))}
AMPERE = 8.0
# Bytes of shared memory that a program may take, by compute capability.
SHARED_MEMORY = {8.0: 163 << 10, 9.0: 227 << 10, 10.0: 227 << 10}
LEAST_SHARED_MEMORY = 99 << 10  # 8.6, 8.9, 12.0
INTERPRETED_CORES = 4  # multiprocessors that kernels are planned for without a GPU
INSTALL = "pip install 'uoe_jax[kernels]'"

# Part of jit's cache key, so a function traced for both is traced twice.
_INTERPRETER = jax.make_user_context(default_value=None)


@contextlib.contextmanager
def interpreted(run: Callable) -> Iterator[None]:
    """Run kernels on the CPU: `run(kernel, grid, constants, out, *arrays)`."""
    with _INTERPRETER(run):
        yield


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
    *args: jax.Array,
    out_shape: tuple[tuple[int, ...], Any] | list[tuple[tuple[int, ...], Any]],
    grid: int,
    num_warps: int,
    num_stages: int,
    **constants: Any,
) -> Any:
    """Return the array that `grid` programs of a kernel write, of any content before.

    The kernel takes the arrays, then the output, then the constants. A list of shapes
    makes it a list of outputs.
    """
    if isinstance(out_shape, list):
        shape = [jax.ShapeDtypeStruct(*each) for each in out_shape]
    else:
        shape = jax.ShapeDtypeStruct(*out_shape)
    run = _INTERPRETER.value
    if run is not None:
        call = functools.partial(run, kernel, grid, constants, shape)
        out = jax.pure_callback(call, shape, *args)
        return jax.tree.map(lambda x: vary_like(x, args[0]), out)
    out = importlib.import_module("jax_triton").triton_call(
        *args,
        kernel=kernel,
        out_shape=shape,
        grid=grid,
        num_warps=num_warps,
        num_stages=num_stages,
        **constants,
    )
    return jax.tree.map(lambda x: vary_like(x, args[0]), out)
