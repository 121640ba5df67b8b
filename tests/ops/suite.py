"""One suite for every operation over all of its backends: what is held, and how.

A case is one backend's calls of an operation: values and gradients must be the float64
answers of tests/ops/problems.py, in the arrays' own dtypes. Backends of devices that
aren't here run in their interpreters; those that can't say why in `ELSEWHERE`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.ops import decode_oracle, problems
from uoe_jax import ops
from uoe_jax.ops.as_segments import LIST_BACKENDS, Lists, list_attention
from uoe_jax.ops.cache_attention import api as cache_attention
from uoe_jax.ops.dense_attention import api as dense_attention
from uoe_jax.ops.expert_mlp import api as expert_mlp
from uoe_jax.ops.grouped_matmul import api as grouped_matmul
from uoe_jax.ops.segment_attention import api as segment_attention
from uoe_jax.ops.split_heads import BACKENDS as SPLIT_HEADS
from uoe_jax.ops.swiglu import BACKENDS as SWIGLU
from uoe_jax.ops.token_products import api as token_products
from uoe_jax.ops.token_router import BACKENDS as TOKEN_ROUTER

# The backends that each operation's own table names.
TABLES = {
    "segment_attention": segment_attention.BACKENDS,
    "dense_attention": dense_attention.BACKENDS,
    "list_attention": LIST_BACKENDS,
    "grouped_matmul": grouped_matmul.GROUPED_MATMUL,
    "gather_project": grouped_matmul.GATHER_PROJECT,
    "project_scatter": grouped_matmul.PROJECT_SCATTER,
    "expert_mlp": expert_mlp.BACKENDS,
    "swiglu": SWIGLU,
    "split_heads": SPLIT_HEADS,
    "token_project": token_products.BACKENDS,
    "token_add": token_products.ADD_BACKENDS,
    "token_router": TOKEN_ROUTER,
    "cache_attention": cache_attention.BACKENDS,
}
# Those that only their device runs, and what they say here.
ELSEWHERE = {
    ("dense_attention", "cudnn"): "needs an NVIDIA GPU",
    ("dense_attention", "tokamax"): "needs an NVIDIA GPU",
    ("dense_attention", "linear_attention"): "needs an NVIDIA GPU",
}


@dataclass(frozen=True)
class Case:
    """A backend's calls of one kind: `examples` random ones and the hard one of seed 0.

    A decoded call is hard enough by its sizes: all of its examples are random.
    """

    operation: str
    backend: str
    about: str
    sizes: Any
    dtype: str = "float32"
    tolerance: float = 5e-6  # of the largest entry; sums of up to 100 float32 products
    relative: float = 0.0  # and of each entry, beside it
    examples: int = 1
    running: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    spoilt: bool = True  # NaN where nothing may be read
    marks: tuple = ()

    def __str__(self) -> str:
        return f"{self.operation} {self.backend} {self.about}".replace(" ", "-")

    def problem(self, seed: int) -> problems.Problem:
        return PROBLEMS[self.operation](seed, self.dtype, self.spoilt, **self.sizes)

    def call(self, *args: Any) -> Any:
        return CALLS[self.operation](self.backend, self.sizes, *args)

    def value_and_gradients(self) -> Callable:
        """A function of a problem's arrays, whole numbers and gradient."""

        def run(arrays, rest, grad):
            out, vjp = jax.vjp(lambda *arrays: self.call(*arrays, *rest), *arrays)
            return jax.tree.leaves(out), vjp(grad)

        return run

    def check(self) -> None:
        """Hold the backend to the exact answers."""
        decoded = DECODED.get(self.operation)
        run = jax.jit(self.value_and_gradients())

        def hold(seed):
            if decoded is not None:
                how = self.backend, jnp.dtype(self.dtype), self.tolerance
                return decoded(seed, self.sizes, *how)
            problem = self.problem(seed)
            call = jax.block_until_ready(jax.tree.map(jnp.asarray, problem[:3]))
            got = jax.block_until_ready(run(*call))
            return self.compare(problem, *got)

        with jax.enable_x64(self.dtype == "float64"), self.running():
            if decoded is None:
                hold(0)
            if self.examples:
                drawn = given(st.integers(1, 2**32 - 1))(hold)
                settings(deadline=None, max_examples=self.examples)(drawn)()

    def compare(self, problem: problems.Problem, outs: list, grads: tuple) -> None:
        """Hold results to the dtypes and values that a problem wants."""
        like = [problem.arrays[0]] * len(outs) + list(problem.arrays)
        sizes = problem.sizes or problem.want
        every = zip((*outs, *grads), like, problem.want, sizes, strict=True)
        for got, source, want, size in every:
            assert got.dtype == source.dtype and got.shape == want.shape
            got = np.asarray(got, np.float64)
            bound = self.tolerance * max(1.0, float(np.abs(size).max(initial=0)))
            np.testing.assert_allclose(got, want, rtol=self.relative, atol=bound)
            if problem.counted is not None:
                assert not got[problem.counted :].any()


def _segments(implementation, sizes, q, k, v, *rest):
    causal, window = sizes["mask"]
    *sink, offsets, bounds = rest
    return ops.segment_attention(
        q, k, v, offsets, causal=causal, window=window, bounds=bounds,
        sink=sink[0] if sink else None,
        scale=sizes.get("scale"), implementation=implementation,
    )  # fmt: skip


def _dense(implementation, sizes, q, k, v, *rest):
    causal, window = sizes["mask"]
    *sink, segments = rest
    return ops.dense_attention(
        q, k, v, causal=causal, window=window, segments=segments,
        sink=sink[0] if sink else None, implementation=implementation,
    )  # fmt: skip


def _lists(implementation, sizes, *arrays):
    lists = Lists(*arrays, max_rows=sizes["rows"])
    return list_attention(lists, implementation=implementation)


def _heads(implementation, sizes, *arrays):
    options = {name: sizes[name] for name in ("kv_heads", "groups", "theta")}
    return ops.split_heads(*arrays, **options, implementation=implementation)


def _plainly(operation):
    return lambda name, sizes, *args: operation(*args, implementation=name)


CALLS = {
    "segment_attention": _segments,
    "dense_attention": _dense,
    "list_attention": _lists,
    "grouped_matmul": _plainly(ops.grouped_matmul),
    "gather_project": _plainly(ops.gather_project),
    "project_scatter": _plainly(ops.project_scatter),
    "expert_mlp": _plainly(ops.expert_mlp),
    "swiglu": _plainly(ops.swiglu),
    "split_heads": _heads,
}
PROBLEMS = {
    "segment_attention": problems.segments,
    "dense_attention": problems.dense,
    "list_attention": problems.lists,
    "grouped_matmul": problems.groups,
    "gather_project": problems.packed,
    "project_scatter": problems.packed,
    "expert_mlp": problems.experts,
    "swiglu": problems.swiglu,
    "split_heads": problems.heads,
}
# Operations of decoding have no gradients, and checks of their own.
DECODED = {
    "token_project": decode_oracle.check_project,
    "token_add": decode_oracle.check_add,
    "token_router": decode_oracle.check_route,
    "cache_attention": decode_oracle.check_attend,
}


@contextlib.contextmanager
def changed(*changes: tuple[Any, str, Any]) -> Iterator[None]:
    """Attributes that have other values inside."""
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(mock.patch.object(*change))
        yield
