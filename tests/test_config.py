"""Configs survive JSON, name what is wrong, and identify themselves."""

import dataclasses
import json

import pytest

from uoe_jax.config import ExperimentConfig, config_hash, from_json, to_json
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.presets import PRESETS, as_moe, as_union, get_preset, sized
from uoe_jax.validation import validate

pytestmark = pytest.mark.both_jax


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_json(name):
    config = get_preset(name)
    validate(config)
    assert config.name == name
    assert from_json(to_json(config)) == config
    assert hash(config) == hash(from_json(to_json(config)))


def test_hash_changes_with_any_field():
    config = get_preset("tiny")
    changed = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, eps=1e-9)
    )
    assert config_hash(config) != config_hash(changed)
    assert config_hash(config) == config_hash(get_preset("tiny"))


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        (("model", "d_modle"), 3, "did you mean d_model"),
        (("model", "d_model"), "wide", "expected int"),
        (("model", "d_model"), True, "expected int"),
        (("model", "norm"), "batchnorm", "expected one of 'rmsnorm', 'layernorm'"),
        (("model", "attention"), [], "expected"),
        (("model", "attention"), ["sparse"], "expected one of 'dense', 'union'"),
        (("optim", "learning_rate"), None, "expected float"),
        (("model",), 7, "expected an object"),
    ],
)
def test_json_with_a_wrong_field_is_refused_in_one_line(path, value, expected):
    raw = json.loads(to_json(ExperimentConfig()))
    target = raw
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ConfigError) as error:
        from_json(json.dumps(raw))
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_text_that_is_not_json_is_refused():
    with pytest.raises(ConfigError, match="not JSON"):
        from_json("model: tiny")


def test_integers_in_json_become_floats_where_floats_are_due():
    raw = json.loads(to_json(ExperimentConfig()))
    raw["optim"]["weight_decay"] = 0
    value = from_json(json.dumps(raw)).optim.weight_decay
    assert value == 0.0 and isinstance(value, float)


def test_union_and_moe_change_only_the_blocks():
    base = get_preset("small")
    union, moe = as_union(base), as_moe(base)
    assert union.model.layer_kinds == (("union", "union"),) * 12
    assert moe.model.layer_kinds == (("dense", "moe"),) * 12
    assert dataclasses.replace(union.model, attention=("dense",), mlp=("dense",)) == (
        base.model
    )


@pytest.mark.parametrize("depth", [2, 6, 12, 24, 32])
def test_one_dial_derives_a_valid_experiment(depth):
    config = sized(depth)
    validate(config)
    validate(as_union(config))
    assert config.model.num_heads * config.model.head_dim == config.model.d_model
    assert get_preset(f"sized-{depth}") == config


def test_unknown_preset_names_its_neighbours():
    with pytest.raises(ConfigError, match="did you mean small"):
        get_preset("smal")
    with pytest.raises(ConfigError, match="at least 2|start at 2"):
        sized(1)


def test_nearest_lists_everything_when_nothing_is_close():
    assert nearest("zzz", ["alpha", "beta"]) == "known: alpha, beta"
