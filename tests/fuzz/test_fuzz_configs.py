"""Random experiments, from JSON and from Python: refused in one line, or they count.

What is accepted must survive its own JSON, cost finite numbers in little time, and have
as many parameters as the model that is made of it.
"""

import dataclasses
import functools
import json
import math
import typing

import jax
import pytest
from flax import nnx

from tests.fuzz.fuzzing import (
    NUMBERS,
    WORDS,
    Finding,
    damage_bytes,
    one_line,
    raw_error,
    run_cases,
)
from uoe_jax.cli.cost import count_all
from uoe_jax.config import ExperimentConfig, config_hash, from_json, to_json
from uoe_jax.errors import ConfigError
from uoe_jax.hardware import count
from uoe_jax.model import make_model
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.validation import validate

OTHERS = (None, True, 0, 1.5, "x", [], {}, [1], {"a": 1}, float("nan"), 10**30)
BUILT = 300_000_000  # parameters of a model whose shapes are traced


@functools.cache
def leaves(cls=ExperimentConfig, path=()):
    """Every (path, annotation) of a config's fields."""
    found = []
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            found += leaves(hint, (*path, field.name))
        else:
            found.append(((*path, field.name), hint))
    return found


def number(rng):
    """A number, often a small one, now and then an impossible one."""
    if rng.random() < 0.6:
        return rng.choice([1, 2, 3, 4, 6, 8, 16, 32, 64, 128, 0.1, 0.5, 1.0])
    text = rng.choice([n for n in NUMBERS if n.isascii()])
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def value_for(rng, hint):
    """A value for a field: of its kind, most times."""
    if rng.random() < 0.12:
        return rng.choice(OTHERS)
    text = str(hint)
    choices = [c for c in literals(hint) if isinstance(c, str)]
    if text.startswith("tuple"):
        item = lambda: rng.choice(choices) if choices else number(rng)
        return [item() for _ in range(rng.randrange(4))]
    if choices:
        return rng.choice(choices) if rng.random() < 0.9 else rng.choice(WORDS)
    if hint is bool or "bool" in text:
        return rng.choice([True, False])
    if "str" in text:
        return rng.choice(WORDS)
    return number(rng)


def literals(hint):
    if typing.get_origin(hint) is typing.Literal:
        return typing.get_args(hint)
    return [c for part in typing.get_args(hint) for c in literals(part)]


def replaced(config, path, value):
    """The config with one nested field changed, from Python."""
    name, *rest = path
    if rest:
        value = replaced(getattr(config, name), rest, value)
    elif isinstance(value, list):
        value = tuple(value)
    return dataclasses.replace(config, **{name: value})


def from_python(rng, config):
    for path, hint in rng.sample(leaves(), rng.randrange(1, 5)):
        config = replaced(config, path, value_for(rng, hint))
    return config


def random_text(rng, config):
    """JSON of a config with some fields changed, taken out, added or doubled."""
    tree = json.loads(to_json(config))
    for path, hint in rng.sample(leaves(), rng.randrange(1, 5)):
        *parents, name = path
        part = tree
        for parent in parents:
            part = part[parent] if isinstance(part.get(parent), dict) else {}
        kind = rng.random()
        if kind < 0.8:
            part[name] = value_for(rng, hint)
        elif kind < 0.9:
            part.pop(name, None)
        elif parents and kind < 0.95:
            tree[parents[0]] = rng.choice(OTHERS)
            return json.dumps(tree)
        else:
            part[name + rng.choice(["s", "_", "\u200d", ""])] = 1
    text = json.dumps(tree)
    if rng.random() < 0.15:
        _, damaged = damage_bytes(rng, text.encode())
        text = damaged.decode("utf-8", "replace")
    return text


def check_counts(config, about):
    """Check that what an experiment costs is finite, and its own JSON the same."""
    if from_json(to_json(config)) != config:
        raise Finding(f"{about} isn't what its own JSON says")
    config_hash(config)

    def finite(value, place):
        if isinstance(value, dict):
            for key, item in value.items():
                finite(item, f"{place}.{key}")
        elif isinstance(value, (int, float)):
            if not math.isfinite(value) or value < 0:
                raise Finding(f"{place} is {value} for {about}")

    found = count_all(config)
    finite(found, "cost")
    return found["params"]["total"]


def check_model(config, about):
    """Check the number of parameters against the model that is made."""
    built = jax.eval_shape(lambda: make_model(config.model, jax.random.key(0)))
    real = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(built, nnx.Param)))
    counted = sum(count.count_params(config.model).values())
    if real != counted:
        raise Finding(f"{counted} parameters are counted, {real} made: {about}")


def changes(config, preset):
    """What differs from the preset it began as."""
    told = [preset.name]
    for path, _ in leaves():
        old, new = preset, config
        for name in path:
            old, new = getattr(old, name), getattr(new, name, None)
        if old != new:
            told.append(f"{'.'.join(path)}={new!r}"[:200])
    return " ".join(told)


def check_config(rng, traced):
    preset = config = get_preset(rng.choice(list(PRESETS)))
    text = None
    try:
        if rng.random() < 0.5:
            text = random_text(rng, preset)
            config = from_json(text)
        else:
            config = from_python(rng, preset)
        validate(config)
    except ConfigError as error:
        one_line(str(error), "a config")
        return
    except Exception as error:
        about = changes(config, preset) if config is not preset else f"JSON {text}"
        raise raw_error(error, about) from None
    about = changes(config, preset)
    try:
        parameters = check_counts(config, about)
        small = parameters < BUILT and config.model.num_layers < 50
        if small and rng.random() < traced:
            check_model(config, about)
    except Finding:
        raise
    except Exception as error:
        raise raw_error(error, f"valid {about}") from None


@pytest.mark.parametrize(
    ("cases", "traced"),
    [(150, 0.1), pytest.param(2000, 0.3, marks=pytest.mark.nightly)],
)
def test_any_config_is_refused_in_one_line_or_counts(cases, traced):
    run_cases("configs", cases, functools.partial(check_config, traced=traced))
