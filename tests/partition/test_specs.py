"""Specs and collective counts are goldens; wrong rules are caught."""

import json
import os
from pathlib import Path

import pytest

from tests.partition.tiny_layouts import make_config, trace
from uoe_jax.errors import ConfigError
from uoe_jax.model import param_shapes
from uoe_jax.partition.layout import make_layout
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.partition.specs import Rule, default_rules, param_specs
from uoe_jax.plan.inspect import count_kinds, traffic_of
from uoe_jax.runs.state import layout_of

GOLDEN = Path(__file__).parents[1] / "goldens" / "layouts.json"
SCATTER = {"tensor_reduce": "reduce_scatter"}
SENT = {"dispatch": "all_to_all"}
FSDP_TENSOR = {"fsdp": 2, "tensor": 4}
THREE = {"data": 2, "sequence": 2, "tensor": 2}
CASES = {
    "dense, fsdp 8": ("dense", {"fsdp": 8}, {}),
    "dense, data 2, sequence 2, tensor 2": ("dense", THREE, {}),
    "dense, fsdp 2, tensor 4, scattered": ("dense", FSDP_TENSOR, SCATTER),
    "moe, fsdp 2, tensor 4": ("moe", FSDP_TENSOR, {}),
    "moe, tensor 4, sent": ("moe", {"data": 2, "tensor": 4}, SENT),
    "union, data 8": ("union", {"data": 8}, {}),
    "union, fsdp 2, tensor 4": ("union", FSDP_TENSOR, {}),
    "union, data 2, sequence 2, tensor 2": ("union", THREE, {}),
    "union, fsdp 2, tensor 4, scattered": ("union", FSDP_TENSOR, SCATTER),
}


def shapes_of(model):
    return {name: leaf.shape for name, leaf in param_shapes(model).items()}


def describe(name):
    config = make_config(*CASES[name])
    specs = layout_of(config, mesh_for(config)).specs
    traffic = traffic_of(trace(config))
    return {
        "specs": {
            path: [axis or "." for axis in spec] for path, spec in sorted(specs.items())
        },
        "each layer": count_kinds(traffic, in_layers=True),
        "each step": count_kinds(traffic, in_layers=False),
    }


@pytest.fixture(scope="module")
def golden():
    if os.environ.get("UOE_WRITE_GOLDENS"):
        content = {name: describe(name) for name in CASES}
        GOLDEN.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
    return json.loads(GOLDEN.read_text())


@pytest.mark.parametrize("name", CASES)
def test_specs_and_collective_counts_are_the_golden_ones(golden, name):
    """UOE_WRITE_GOLDENS=1 writes them anew: look at the difference."""
    assert describe(name) == golden[name]


def test_every_parameter_needs_one_rule():
    shapes = shapes_of(make_config("union").model)
    rules = default_rules(make_config("union").model)
    sizes = {"data": 1}
    with pytest.raises(ConfigError, match="embed.embedding .* has no layout rule"):
        param_specs(shapes, rules[2:], sizes)
    with pytest.raises(ConfigError, match="matches .* and .*; keep one"):
        param_specs(shapes, (*rules, Rule(r"embed\..*", "*")), sizes)


def test_a_rule_that_matches_nothing_is_an_error():
    model = make_config("dense").model
    rules = (*default_rules(model), Rule(r"trunk\.blocks\.0\.attention\.wz", "*"))
    with pytest.raises(ConfigError, match="wz matches no parameter"):
        param_specs(shapes_of(model), rules, {"data": 1})


def test_a_rule_of_the_wrong_rank_says_so():
    shapes, rules = {"w": (4, 4)}, (Rule("w", ". . fsdp"),)
    with pytest.raises(ConfigError, match=r"3 dimensions and w is \[4, 4\]"):
        param_specs(shapes, rules, {"fsdp": 2})


def planted(kind, replace):
    """A layout whose rules of the MLP's arrays are replaced."""
    config = make_config(kind, {"data": 2, "tensor": 4})
    rules = tuple(
        Rule(rule.pattern, replace(rule.axes)) if r"\.mlp\." in rule.pattern else rule
        for rule in default_rules(config.model)
    )
    shapes = shapes_of(config.model)
    return config, make_layout(config, mesh_for(config), shapes, rules)


def test_a_planted_spec_that_leaves_weights_whole_is_caught():
    """Shapes would fit, and every tensor device would add the whole output."""
    config, layout = planted("dense", lambda axes: axes.replace("tensor", "."))
    with pytest.raises(ConfigError, match="must split this part's weights"):
        trace(config, layout)


def test_a_planted_spec_on_the_wrong_dimension_is_caught():
    swap = {". . fsdp tensor": ". . tensor .", ". . tensor fsdp": ". . . tensor"}
    config, layout = planted("dense", lambda axes: swap.get(axes, axes))
    with pytest.raises((TypeError, ValueError)):
        trace(config, layout)
