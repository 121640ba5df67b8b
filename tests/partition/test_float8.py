"""Operands of eight bits under a layout: scales are of what a device has."""

import math

import numpy as np

from tests.partition.test_equal import EVERYTHING
from tests.partition.tiny_layouts import compute, make_config, one_device


def distance(grads, others):
    """How far gradients are from others, over these' norm, all weights together."""
    square = lambda a: float(np.square(np.asarray(a, np.float64)).sum())
    apart = sum(square(np.asarray(grads[name]) - others[name]) for name in others)
    return math.sqrt(apart / sum(map(square, others.values())))


def test_gradients_are_about_those_of_one_device():
    mesh = {"data": 2, "sequence": 2, "tensor": 2}
    wanted, _, _ = one_device("float8")
    grads, _, _ = compute(make_config("float8", mesh, EVERYTHING))
    plain, _, _ = one_device("union")
    assert distance(grads, wanted) < 0.02 < 0.05 < distance(plain, wanted)
