"""Experts that are chosen together are near each other, and as many on each device."""

import itertools

import numpy as np
import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.topology import box_graph, place_experts
from uoe_jax.topology.place import co_selection, hop_rows


def grouped(tokens=400, experts=16, groups=4, seed=0):
    """Choices of two experts of one group, groups dealt over the experts."""
    rng = np.random.default_rng(seed)
    names = rng.permutation(experts).reshape(groups, -1)
    group = rng.integers(0, groups, tokens)
    two = [rng.choice(names[g], 2, replace=False) for g in group]
    return np.array(two)


def test_co_selection_counts_pairs():
    traffic, load = co_selection(np.array([[0, 1], [1, 2], [0, 1]]), 4)
    assert load.tolist() == [2, 3, 1, 0]
    assert traffic[0, 1] == traffic[1, 0] == 2 and traffic[1, 2] == 1
    assert np.trace(traffic) == 0


@pytest.mark.parametrize("devices", [4, 8, 16])
def test_placement_beats_the_plain_ones(devices):
    graph = box_graph((2, devices // 2), (0, 0))
    chosen = grouped()
    found = place_experts(*co_selection(chosen, 16), graph, moves=600)
    counts = np.bincount(found.device, minlength=devices)
    assert (counts == 16 // devices).all()
    assert found.cost < min(found.contiguous, found.round_robin)
    home = np.arange(len(chosen)) % devices
    contiguous = np.arange(16) // (16 // devices)
    ours, plain = (hop_rows(chosen, d, graph, home) for d in (found.device, contiguous))
    assert ours["tree"] < plain["tree"]


def test_the_best_of_all_placements_is_found():
    graph = box_graph((6,), (0,))
    rng = np.random.default_rng(1)
    traffic, load = rng.integers(0, 9, (6, 6)), rng.integers(0, 9, 6)
    found = place_experts(traffic, load, graph, moves=400)
    both = (traffic + traffic.T) / 2
    np.fill_diagonal(both, 0)
    table = graph.distances

    def cost(device):
        pairs = sum(both[i, j] * table[device[i], device[j]]
                    for i in range(6) for j in range(i))  # fmt: skip
        return pairs + sum(load[i] * table[device[i]].mean() for i in range(6))

    best = min(map(cost, itertools.permutations(range(6))))
    np.testing.assert_allclose(found.cost, best, atol=1e-9)
    np.testing.assert_allclose(cost(found.device), best, atol=1e-9)


def test_the_plain_placements_are_those_of_layouts():
    graph = box_graph((2, 2), (0, 0))
    load = np.zeros(8)
    traffic = np.zeros((8, 8))
    traffic[0, 1] = traffic[1, 0] = 1  # on one device if contiguous
    found = place_experts(traffic, load, graph, moves=0)
    assert found.contiguous == 0 and found.round_robin == 1
    traffic[:] = 0
    traffic[0, 4] = traffic[4, 0] = 1  # on one device if every fourth
    found = place_experts(traffic, load, graph, moves=0)
    assert found.round_robin == 0 and found.contiguous == 1


def test_rows_are_counted_three_ways():
    graph = box_graph((4,), (0,))
    device = np.array([0, 0, 2, 3])
    found = hop_rows(np.array([[0, 1, 2, 3]]), device, graph, np.array([1]))
    assert found == {"each": 1 + 1 + 1 + 2, "once": 1 + 1 + 2, "tree": 3}


BAD = {
    "shape": ((np.zeros((3, 4)), np.zeros(4)), "experts x experts"),
    "divide": ((np.zeros((6, 6)), np.zeros(6)), "6 experts don't divide"),
    "nan": ((np.full((4, 4), np.nan), np.zeros(4)), "traffic holds nan"),
    "minus": ((np.zeros((4, 4)), -np.ones(4)), "load holds -1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_requests_are_one_line(case):
    args, said = BAD[case]
    with pytest.raises(ConfigError, match=said):
        place_experts(*args, box_graph((2, 2), (0, 0)))
    with pytest.raises(ConfigError, match="0 to 3"):
        co_selection(np.array([[0, 4]]), 4)
