"""Every rule of a config is checked before anything compiles, with its fix."""

import dataclasses

import pytest

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.presets import get_preset
from uoe_jax.validation import validate

pytestmark = pytest.mark.both_jax


def changed(config: ExperimentConfig, **values) -> ExperimentConfig:
    """Replace fields named room__field or room__sub__field."""
    for name, value in values.items():
        config = replace_at(config, name.split("__"), value)
    return config


def replace_at(node, path, value):
    if len(path) > 1:
        value = replace_at(getattr(node, path[0]), path[1:], value)
    return dataclasses.replace(node, **{path[0]: value})


@pytest.mark.parametrize(
    ("preset", "change", "parts"),
    [
        (
            "tiny-union",
            {"model__union__num_experts": 3},
            ["3", "num_kv_heads 8", "1, 2, 4, 8", "d_ff 512", "510 or 513"],
        ),
        ("tiny-union", {"model__union__top_k": 9}, ["top_k 9", "at most 8"]),
        ("tiny-union", {"model__union__patch_size": 129}, ["129", "1", "128"]),
        ("tiny-union", {"model__union__patch_size": 0}, ["0", "1", "128"]),
        (
            "tiny-union",
            {"model__union__top_k": 1, "model__union__gate": "softmax"},
            ["softmax", "top_k of 1 routed", "sigmoid"],
        ),
        ("tiny-moe", {"model__moe__top_k": 1}, ["one routed", "softmax_all"]),
        ("tiny-moe", {"model__moe__top_k": 9}, ["top_k 9", "at most 8"]),
        ("tiny-moe", {"model__moe__top_k": 3}, ["d_ff 512", "moe.d_expert"]),
        ("tiny", {"model__num_kv_heads": 3}, ["3", "1, 2, 4, 8"]),
        ("tiny", {"model__head_dim": 15}, ["15", "16"]),
        ("tiny", {"model__d_model": 0}, ["model.d_model is 0", "at least 1"]),
        ("tiny", {"model__dropout": 1.0}, ["dropout is 1.0", "[0, 1)"]),
        ("tiny", {"model__vocab_size": 100}, ["100", "256"]),
        ("tiny", {"data__seq_len": 512}, ["512", "256", "max_seq_len"]),
        ("tiny", {"data__source": "text"}, ["data.path"]),
        ("tiny", {"data__source": "digits"}, ["digits", "vision"]),
        ("digits-vit", {"data__source": "stdlib"}, ["stdlib", "vision"]),
        ("digits-vit", {"model__image_patch": 3}, ["3", "8", "1, 2, 4, 8"]),
        ("digits-vit", {"model__max_seq_len": 4}, ["16"]),
        ("tiny", {"train__accumulate": 3}, ["3", "16", "1, 2, 4, 8, 16"]),
        ("tiny", {"mesh__data": 5}, ["5", "16"]),
        ("tiny", {"optim__learning_rate": -1.0}, ["-1.0", "negative"]),
        ("tiny", {"optim__learning_rate": float("nan")}, ["nan", "finite"]),
        ("tiny", {"train__max_seconds": 0.0}, ["max_seconds is 0.0", "positive"]),
        ("tiny", {"model__attention": ("dense",) * 5}, ["5 kinds", "4 layers"]),
        ("small", {"data__bpe_vocab_size": 60_000}, ["60000", "50304"]),
        ("small", {"data__bpe_vocab_size": 100}, ["100", "257"]),
        (
            "tiny",
            {"data__valid_fraction": 0.5, "data__test_fraction": 0.5},
            ["1.0", "train on"],
        ),
    ],
)
def test_a_broken_rule_is_one_line_with_value_and_fix(preset, change, parts):
    with pytest.raises(ConfigError) as error:
        validate(changed(get_preset(preset), **change))
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    assert error.value.exit_code == 2


def test_all_problems_are_listed_together():
    config = changed(get_preset("tiny"), model__d_model=0, data__batch_size=0)
    with pytest.raises(ConfigError, match="d_model.*batch_size"):
        validate(config)


def test_unused_blocks_are_not_held_to_their_rules():
    validate(changed(get_preset("tiny"), model__union__top_k=99))
    validate(changed(get_preset("tiny-union"), model__moe__top_k=99))
