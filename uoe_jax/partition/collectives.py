"""What devices say to each other inside a step, called from within `jax.shard_map`.

Types tell jax over which axes a value differs between devices, and it derives the
transposes: the sum over `tensor` of a replicated input's gradient, the reduce-scatter
of a gathered weight's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PyTree

from uoe_jax.config import LayoutConfig
from uoe_jax.errors import ConfigError
from uoe_jax.tree import leaf_name
from uoe_jax.varying import vary_over, varying_axes

# The name of gathered weights for rematerialisation.
GATHERED = "gathered"

# Added once to a sum over devices, so the first device of the sum brings them.
OUTPUT_BIASES = ("attention.bo", "mlp.b_down")


@dataclass(frozen=True, kw_only=True)
class Parallel:
    """The axes of a step's mesh, and the collectives of each of them.

    `gather` and `gather_outer` say which dimension, from the end, of which weight is
    split over fsdp: those of a block by their name inside it.
    """

    sizes: Mapping[str, int]
    layout: LayoutConfig
    gather: Mapping[str, int]
    gather_outer: Mapping[str, int]
    compute_dtype: str
    shares_experts: bool = False  # sequence devices hold one sample's experts apart

    def size(self, axis: str) -> int:
        """Return the devices along an axis, 1 where the mesh doesn't have it."""
        return self.sizes.get(axis, 1)

    def has(self, axis: str) -> bool:
        """Whether an axis has more than one device."""
        return self.size(axis) > 1

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Axes over which devices hold other tokens."""
        return tuple(a for a in ("data", "fsdp", "sequence") if a in self.sizes)

    @property
    def scatters(self) -> bool:
        """Whether tokens are spread over tensor between the parts of a layer."""
        return self.has("tensor") and self.layout.scatters

    @property
    def dispatches(self) -> bool:
        """Whether rows of routed MLPs travel to their experts."""
        return self.has("tensor") and self.layout.dispatches

    def gather_block(self, block: PyTree) -> PyTree:
        """Return a block with whole weights, in the compute dtype where gathered.

        Called inside rematerialisation, so that only shards live between the passes.
        """
        return jax.tree_util.tree_map_with_path(self._whole_weight, block)

    def gather_params(self, params: PyTree) -> PyTree:
        """Return parameters with those outside of the blocks whole."""

        def whole(path: Any, leaf: Array) -> Array:
            place = self.gather_outer.get(leaf_name(path))
            return leaf if place is None else _all_gather(leaf, "fsdp", place)

        return jax.tree_util.tree_map_with_path(whole, params)

    def _whole_weight(self, path: Any, leaf: Array) -> Array:
        name = leaf_name(path)
        if name in OUTPUT_BIASES:
            return self.only_first("tensor", leaf)
        place = self.gather.get(name)
        if place is None:
            return leaf
        # The products cast their weights anyway: gathered narrow, half the bytes.
        whole = _all_gather(leaf.astype(self.compute_dtype), "fsdp", place)
        return checkpoint_name(whole, GATHERED)

    def only_first(self, axis: str, x: Array) -> Array:
        """Return x on the first device of an axis and zeros on its others."""
        if not self.has(axis):
            return x
        return jnp.where(jax.lax.axis_index(axis) == 0, x, jnp.zeros_like(x))

    def own_tokens(self, x: Array, axis: str = "tensor") -> Array:
        """Return this device's share of the tokens x [B, T, ...] has of its group."""
        if not self.has(axis):
            return x
        length = x.shape[1] // self.size(axis)
        start = jax.lax.axis_index(axis) * length
        return jax.lax.dynamic_slice_in_dim(x, start, length, axis=1)

    def all_tokens(self, x: Array, axis: str) -> Array:
        """Return the tokens [B, T, ...] of all devices of an axis, in their order."""
        return _all_gather(x, axis, 1 - x.ndim) if self.has(axis) else x

    def first_position(self, length: int) -> Int[Array, ""] | int:
        """Return the position of this device's first token in its samples."""
        if not self.has("sequence"):
            return 0
        return jax.lax.axis_index("sequence") * length

    def enter(self, x: Float[Array, "B T D"]) -> Array:
        """Return embeddings as the layers hold them between their parts."""
        return self.own_tokens(x) if self.scatters else x

    def spread(self, x: Array) -> Float[Array, "B T D"]:
        """Return all tokens of a tensor group, before a part with split weights."""
        return self.all_tokens(x, "tensor") if self.scatters else x

    def check_split(self, part: PyTree) -> None:
        """Raise ConfigError if every tensor device holds all matrices of a part: the
        sum of their outputs would be too large."""
        matrices = [leaf for leaf in jax.tree.leaves(part) if leaf.ndim > 2]
        if not any("tensor" in varying_axes(matrix) for matrix in matrices):
            raise ConfigError(
                "tensor devices compute the same output, so their sum is too large; "
                "a layout rule must split this part's weights over tensor"
            )

    def combine(self, y: Float[Array, "B T D"]) -> Array:
        """Return the sum of the tensor devices' outputs, as held between parts."""
        if not self.has("tensor"):
            return y
        if self.scatters:
            return self.sum_tokens(y, "tensor")
        return jax.lax.psum(y, "tensor")

    def sum_tokens(self, y: Float[Array, "B T D"], axis: str) -> Array:
        """Return this device's tokens of a sum over the devices of an axis."""
        if not self.has(axis):
            return y
        return jax.lax.psum_scatter(y, axis, scatter_dimension=1, tiled=True)

    def local_expert(
        self, experts: Int[Array, "*N"], num_experts: int, num_local: int
    ) -> Int[Array, "*N"]:
        """Return each expert's place among this device's; others are out of range."""
        tensor = self.size("tensor")
        rank = jax.lax.axis_index("tensor") if tensor > 1 else 0
        if self.layout.deals:
            place = jnp.where(experts % tensor == rank, experts // tensor, num_experts)
        else:
            place = experts - rank * (num_experts // tensor)
        if self.shares_experts and self.has("sequence"):
            place = place - jax.lax.axis_index("sequence") * num_local
        return place


def stored_order(num_experts: int, tensor: int, layout: LayoutConfig) -> list[int]:
    """Return the expert at each place of a weight's expert axis in device memory.

    The axis is cut into neighbours, so round-robin placement stores it permuted.
    Checkpoints hold experts in their own order.
    """
    if not layout.deals:
        return list(range(num_experts))
    return [e for rank in range(tensor) for e in range(rank, num_experts, tensor)]


def total(x: Array, axes: tuple[str, ...]) -> Array:
    """Return the sum over `axes` and over whatever else the value differs over."""
    x = vary_over(x, axes)
    return jax.lax.psum(x, varying_axes(x))


def agreed(x: Array) -> Array:
    """Return a value that devices hold equal copies of, typed as one value."""
    axes = varying_axes(x)
    return jax.lax.pmean(x, axes) if axes else x


def count_copies(x: Array, sizes: Mapping[str, int]) -> int:
    """Return how many devices hold values that differ by x's type."""
    return math.prod(sizes[axis] for axis in varying_axes(x))


def _all_gather(x: Array, axis: str, place: int) -> Array:
    return jax.lax.all_gather(x, axis, axis=x.ndim + place, tiled=True)
