"""A model's layout on a mesh: the spec of every array, and the step's collectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from uoe_jax.config import ExperimentConfig
from uoe_jax.partition.collectives import Parallel, stored_order
from uoe_jax.partition.legal import check_axes
from uoe_jax.partition.specs import (
    Rule,
    axis_place,
    default_rules,
    pair_specs,
    param_specs,
    spec_axes,
    state_owner,
)
from uoe_jax.tree import leaf_name
from uoe_jax.weights import BLOCKS

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Specs of parameters by name, and what follows from them."""

    mesh: Mesh
    specs: Mapping[str, PartitionSpec]
    shapes: Shapes
    parallel: Parallel
    experts: Mapping[str, int]  # the axis of experts that tensor devices share

    def spec_tree(self, tree: PyTree) -> PyTree:
        """Return the spec of every leaf of parameters, or of a whole train state."""
        return jax.tree_util.tree_map_with_path(self._spec, tree)

    def sharding_tree(self, tree: PyTree) -> PyTree:
        """Return the sharding of every leaf; see `spec_tree`."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(self.mesh, self._spec(path, leaf)), tree
        )

    def batch_specs(self, batch: Mapping[str, Any]) -> dict[str, PartitionSpec]:
        """Return the spec of every array of a batch."""
        return {name: batch_spec(self.mesh, np.ndim(a)) for name, a in batch.items()}

    def sum_gradients(self, grads: PyTree) -> PyTree:
        """Return gradients summed over the devices that hold the same weights.

        Over fsdp the gather's transpose has summed those of split weights already.
        """

        def add(path: Any, grad: Array) -> Array:
            split = spec_axes(self._spec(path, grad))
            axes = tuple(a for a in self.parallel.token_axes if a not in split)
            return jax.lax.psum(grad, axes)

        return jax.tree_util.tree_map_with_path(add, grads)

    def vary(self, params: PyTree) -> PyTree:
        """Return parameters typed as each device's own, so that gradients stay local
        until `sum_gradients`."""

        def cast(path: Any, leaf: Array) -> Array:
            split = spec_axes(self._spec(path, leaf))
            axes = tuple(a for a in self.parallel.token_axes if a not in split)
            return jax.lax.pcast(leaf, axes, to="varying")

        return jax.tree_util.tree_map_with_path(cast, params)

    def place(self, tree: PyTree) -> PyTree:
        """Return host arrays, whole in every process, laid out on the mesh."""

        def put(leaf: Any, sharding: NamedSharding) -> Array:
            array = np.asarray(leaf)
            return jax.make_array_from_callback(
                array.shape, sharding, lambda index: array[index]
            )

        return jax.tree.map(put, tree, self.sharding_tree(tree))

    def to_memory(self, tree: PyTree) -> PyTree:
        """Return arrays with experts in the order in which devices hold them."""
        return self._reorder(tree, False)

    def to_file(self, tree: PyTree) -> PyTree:
        """Return arrays with experts in their own order."""
        return self._reorder(tree, True)

    def _reorder(self, tree: PyTree, inverse: bool) -> PyTree:
        if not self.parallel.layout.deals:
            return tree

        def move(path: Any, leaf: Any) -> Any:
            axis = self.experts.get(self._owner(path, leaf) or "")
            if axis is None:
                return leaf
            order = stored_order(
                leaf.shape[axis], self.parallel.size("tensor"), self.parallel.layout
            )
            index = np.argsort(order) if inverse else np.array(order)
            return leaf[(slice(None),) * axis + (index,)]

        return jax.tree_util.tree_map_with_path(move, tree)

    def _spec(self, path: tuple[Any, ...], leaf: Any) -> PartitionSpec:
        owner = self._owner(path, leaf)
        return PartitionSpec() if owner is None else self.specs[owner]

    def _owner(self, path: tuple[Any, ...], leaf: Any) -> str | None:
        """Return the parameter that an array is, or is about."""
        name = leaf_name(path)
        if name in self.specs:
            return name
        # Inside shard_map shapes are local; there only parameters are asked for.
        return state_owner(name, tuple(leaf.shape), self.shapes)


def batch_spec(mesh: Mesh, rank: int) -> PartitionSpec:
    """Return the spec of batches [A, B, ...]: tokens are [A, B, T]."""
    rows = tuple(a for a in ("data", "fsdp") if a in mesh.shape)
    if rank == 3 and "sequence" in mesh.shape:
        return PartitionSpec(None, rows, "sequence")
    return PartitionSpec(None, rows)


def make_layout(
    config: ExperimentConfig,
    mesh: Mesh,
    shapes: Shapes,
    rules: Sequence[Rule] | None = None,
) -> Layout:
    """Return the layout of a model whose parameters have these shapes.

    Raises:
      ConfigError: an axis of the mesh that means nothing here, a parameter without a
        rule, a rule without a parameter, or a dimension that doesn't divide.
    """
    sizes = dict(mesh.shape)
    check_axes(sizes)
    if rules is None:
        rules = default_rules(config.model, config.layout.rules)
    specs = param_specs(shapes, rules, sizes)
    inner: dict[str, int] = {}
    outer: dict[str, int] = {}
    for name, spec in specs.items():
        place = axis_place(spec, "fsdp")
        if place is None:
            continue
        if name.startswith(BLOCKS):
            inner[name.removeprefix(BLOCKS).partition(".")[2]] = place
        else:
            outer[name] = place
    parallel = Parallel(
        sizes=sizes,
        layout=config.layout,
        gather=inner,
        gather_outer=outer,
        compute_dtype=config.model.compute_dtype,
    )
    experts = {  # [layers, experts, ...]
        name: 1 for name, spec in specs.items() if len(spec) > 1 and spec[1] == "tensor"
    }
    specs |= pair_specs(config.model, sizes)
    return Layout(
        mesh=mesh, specs=specs, shapes=shapes, parallel=parallel, experts=experts
    )
