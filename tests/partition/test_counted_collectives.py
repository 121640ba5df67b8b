"""What a plan counts is what a traced step does: kinds, axes, bytes and how often."""

import itertools
from collections import Counter

import pytest

from tests.partition.tiny_layouts import make_config, trace
from uoe_jax.hardware.work import collectives, visits
from uoe_jax.partition.legal import AXES
from uoe_jax.plan.inspect import traffic_of

SCATTER = {"tensor_reduce": "reduce_scatter"}
SENT = {"dispatch": "all_to_all"}
CASES = {
    "tensor": ("dense", {"tensor": 4}, {}),
    "tensor, scattered": ("dense", {"tensor": 4}, SCATTER),
    "union, tensor": ("union", {"tensor": 4}, {}),
    "ring": ("dense", {"sequence": 4}, {}),
    "gather": ("dense", {"sequence": 4}, {"sequence_attention": "gather"}),
    "heads": ("dense", {"sequence": 4}, {"sequence_attention": "heads"}),
    "union, sequence": ("union", {"sequence": 4}, {}),
    "sent": ("moe", {"tensor": 4}, SENT),
    "sent, scattered": ("moe", {"tensor": 4}, SCATTER | SENT),
}
TOKENS, WIDTH, SIZE = 8 * 16, 16, 4  # of the tiny batch; numbers of a token, bytes


def counted(config, mesh, chosen=False):
    """Bytes of whole arrays by kind and axis, as the plan has them for the layers."""
    sizes, found = dict.fromkeys(AXES, 1) | mesh, Counter()
    for c in collectives(config, sizes, chosen=chosen):
        if "gradients" not in c.what:
            found[c.kind, c.axis] += c.num_bytes * c.count
    return found


def traced(config, mesh):
    """The same of the traced step; less than a tensor of tokens isn't looked at."""
    found = Counter()
    (size,) = mesh.values()
    for t in traffic_of(trace(config)):
        whole = t.num_bytes * (1 if t.kind == "all_reduce" else size)
        if t.in_layers and whole >= TOKENS * WIDTH * SIZE:
            (axis,) = t.axes
            found[t.kind, axis] += whole * t.count
    return found


@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("case", CASES)
def test_plans_count_what_a_traced_step_does(case, remat):
    kind, mesh, layout = CASES[case]
    config = make_config(kind, mesh, layout, remat=remat)
    want = traced(config, mesh)  # all the room of an all-to-all, as it is sent here
    assert counted(config, mesh) == pytest.approx(want, rel=0, abs=1)
    if config.layout.dispatches:
        experts = config.model.moe
        share = visits(experts.top_k, experts.num_experts, 4) / 4
        want["all_to_all", "tensor"] *= share
        assert counted(config, mesh, chosen=True) == pytest.approx(want, rel=0, abs=1)


@pytest.mark.parametrize(
    ("experts", "picks", "devices"), [(4, 2, 4), (8, 3, 2), (6, 1, 3), (6, 5, 2)]
)
def test_visited_devices_are_the_mean_over_all_sets_of_experts(experts, picks, devices):
    local = experts // devices
    sets = list(itertools.combinations(range(experts), picks))
    mean = sum(len({e // local for e in chosen}) for chosen in sets) / len(sets)
    assert visits(picks, experts, devices) == pytest.approx(mean, rel=0, abs=1e-9)
