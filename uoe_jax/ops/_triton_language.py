"""Triton's language, for the modules that hold kernels; importable without triton."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # `nvidia.require` says so before a kernel is wanted
    triton = tl = None

__all__ = ["jit", "tl"]


def jit(kernel: Callable) -> Any:
    """Return the kernel for `nvidia.launch`; as it is where triton isn't installed.

    Kernels also carry `typing.no_type_check`: their arguments are pointers.
    """
    return kernel if triton is None else triton.jit(kernel)
