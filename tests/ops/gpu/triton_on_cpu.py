"""Triton kernels on numpy arrays, in triton's interpreter."""

from __future__ import annotations

import os
import threading
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import jax
import ml_dtypes
import numpy as np
import triton.language as tl
from triton.runtime import interpreter


class Pointer:
    """A numpy array as the interpreter takes one."""

    def __init__(self, array):
        self.array, self.dtype = array, str(array.dtype)

    def data_ptr(self):
        return self.array.ctypes.data


class Executor(interpreter.GridExecutor):
    """Arrays are in this process's memory already: nothing to copy."""

    def _init_args_hst(self, args_dev, kwargs):
        return args_dev, kwargs

    def _restore_args_dev(self, *args):
        pass


def patch_tensor(tensor, scope, patch=interpreter._patch_lang_tensor):
    patch(tensor, scope)
    # numpy 2.5 makes no integer of a one-element array.
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = patch_tensor


class Builder(interpreter.InterpreterBuilder):
    """Its product of bfloat16 matrices would multiply their bits as integers."""

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        a, b = (widen(x) for x in (a, b))
        return super().create_dot(a, b, d, input_precision, max_num_imprecise_acc)


def widen(x):
    if x.dtype.scalar != tl.bfloat16:
        return x
    data = x.data.view(ml_dtypes.bfloat16).astype(np.float32)
    return interpreter.TensorHandle(data, tl.float32)


interpreter.interpreter_builder.__class__ = Builder


def convert(data, source, target, rounding, convert=interpreter._convert_float):
    """The interpreter's conversion, but rounded to bfloat16 as GPUs do, not cut off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(data, source, target, rounding)
    return data.astype(ml_dtypes.bfloat16).view(np.uint16)


interpreter._convert_float = convert


def patch_once(patch=interpreter._patch_lang):
    """The interpreter's patch of the language, but once a kernel and module.

    It would be made anew, to the same effect, by every function that a kernel calls.
    """
    known = []

    def wrapped(fun):
        if any(fun.__globals__ is each for each in known):
            return interpreter._LangPatchScope()  # nothing to restore
        known.append(fun.__globals__)
        return patch(fun)

    return wrapped


_alone = threading.Lock()  # the interpreter serves one device at a time


def run(kernel, grid, constants, shape, *arrays, aliases=None):
    """What a kernel writes, an array or a list; NaN where it writes nothing.

    Outputs with an alias, {argument: output}, begin as that argument.
    """
    out = jax.tree.map(lambda s: np.full(s.shape, fill(s.dtype), s.dtype), shape)
    arrays = [a if isinstance(a, int) else np.array(a) for a in arrays]
    for argument, output in (aliases or {}).items():
        out[output] = arrays[argument]
    pointers = [
        a if isinstance(a, int) else Pointer(a)
        for a in (*arrays, *jax.tree.leaves(out))
    ]
    constants = {k: tl.constexpr(v) for k, v in constants.items()}
    with _alone, mock.patch.object(interpreter, "_patch_lang", patch_once()):
        Executor(kernel.rewrite(), kernel.arg_names, (grid,))(*pointers, **constants)
    return out


def fill(dtype):
    """What says that nothing was written."""
    return np.nan if np.issubdtype(dtype, np.inexact) or dtype.kind == "V" else -(10**6)
