"""Runs are read on as many devices as divide their rows."""

import dataclasses

import jax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import DataConfig, MeshConfig, TrainConfig
from uoe_jax.partition.legal import layout_problems, mesh_sizes
from uoe_jax.partition.mesh import evaluation_mesh
from uoe_jax.presets import get_preset


def experiment(batch, accumulate, **mesh):
    return dataclasses.replace(
        get_preset("tiny"),
        data=DataConfig(batch_size=batch),
        train=TrainConfig(accumulate=accumulate),
        mesh=MeshConfig(**mesh),
    )


@pytest.mark.parametrize(
    ("batch", "accumulate", "mesh", "want"),
    [
        (8, 4, {}, {"data": 2}),
        (16, 1, {}, {"data": 8}),
        (12, 2, {}, {"data": 6}),
        (7, 1, {}, {"data": 7}),
        (9, 1, {}, {"data": 3}),
        (1, 1, {}, {"data": 1}),
        (8, 2, {"fsdp": 2}, {"data": 2, "fsdp": 2}),
        (8, 1, {"tensor": 4}, {"data": 2, "tensor": 4}),
        (8, 1, {"data": 4}, {"data": 4}),
        (5, 1, {"data": 4}, {"data": 1}),  # other rows than it was trained with
        (6, 1, {"data": 4}, {"data": 3}),
        (5, 1, {"fsdp": 2}, {"data": 1}),
        (16, 1, {"tensor": 16}, {"data": 1}),  # trained on more devices
    ],
)
def test_the_largest_number_that_divides(batch, accumulate, mesh, want):
    assert jax.device_count() == 8
    found = evaluation_mesh(experiment(batch, accumulate, **mesh))
    assert dict(found.shape) == want


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(0, 9),
    st.sampled_from([1, 2, 3, 4, 8]),
    st.sampled_from([1, 2, 4]),
)
def test_any_run_can_be_read(rows, accumulate, data, fsdp, tensor):
    config = experiment(
        rows * accumulate, accumulate, data=data, fsdp=fsdp, tensor=tensor
    )
    shape = dict(evaluation_mesh(config).shape)
    assert rows % (shape["data"] * shape.get("fsdp", 1)) == 0
    sizes = mesh_sizes(MeshConfig(**shape), 8)
    assert not list(layout_problems(config, sizes))
