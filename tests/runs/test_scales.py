"""Every setting has a kind; scales and their inverses; light imports."""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uoe_jax.config import ExperimentConfig
from uoe_jax.runs.leaves import LENGTH, find_setting, parse_path, settings_of
from uoe_jax.runs.scales import KINDS, from_scale, kind_of, to_scale


def test_every_field_of_a_config_has_a_kind_and_no_other():
    """An exception whose field was renamed would be one more."""
    fields = set(settings_of(dataclasses.asdict(ExperimentConfig())))
    assert set(KINDS) == fields


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        # By type and bounds: whole numbers and rates, fractions, words, flags, seeds.
        ("model.window", "log"),
        ("model.union.capacity_factor", "log"),
        ("model.union_attention.num_experts", "log"),
        ("optim.weight_decay", "log"),
        ("train.max_seconds", "log"),
        ("model.mod.keep", "share"),
        ("model.mod.bias_update_rate", "share"),
        ("data.valid_fraction", "share"),
        ("model.attention", "category"),
        ("model.use_bias", "category"),
        ("model.mlp_bias", "category"),
        ("data.path", "category"),
        ("layout.rules", "category"),
        ("data.seed", "category"),
        # By name.
        ("optim.final_lr_fraction", "share"),
        ("train.seed", "label"),
        ("train.log_every", "label"),
        ("data.cache_dir", "label"),
        ("name", "label"),
    ],
)
def test_kinds_follow_from_types_but_for_those_by_name(name, kind):
    assert KINDS[tuple(name.split("."))] == kind


def test_numbers_have_a_scale_and_words_have_none():
    for path, value in settings_of(dataclasses.asdict(ExperimentConfig())).items():
        if isinstance(value, float):
            assert KINDS[path] in ("log", "share"), path
        items = value if isinstance(value, tuple) else (value,)
        if not items or isinstance(items[0], (str, bool)):
            assert KINDS[path] in ("category", "label"), path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        (("optim", "beta2"), "share"),
        (("train", "seed"), "label"),
        (("data", "seed"), "category"),
        (("a", "user_id"), "category"),
        (("a", "seed", 2), "category"),
        (("width",), "log"),
        (("ids", LENGTH), "log"),
        ((), "log"),
    ],
)
def test_kinds_of_foreign_numbers(path, kind):
    assert kind_of(path) == kind


@settings(max_examples=50, deadline=None)
@given(x=st.floats(-1e30, 1e30))
def test_scales_have_inverses(x):
    back = float(from_scale("log", to_scale("log", np.array([x])))[0])
    # Zero is a doubling wide: 2^-100.
    assert abs(back - x) <= 1e-9 * abs(x) + 2.0**-100
    share = float(from_scale("share", to_scale("share", np.array([abs(x) / 2e30])))[0])
    assert abs(share - abs(x) / 2e30) < 2e-6


@given(x=st.floats(1e-20, 1e20), y=st.floats(1e-20, 1e20))
def test_what_is_larger_lies_higher(x, y):
    u, v = to_scale("log", np.array([x, y]))
    assert (u <= v) == (x <= y) or abs(u - v) < 1e-9
    assert to_scale("log", np.array([-x]))[0] == -u


def test_settings_are_named_as_a_person_writes_them():
    known = settings_of({"optim": {"rate": 1, "beta": 2}, "a": {"beta": [1, 2]}})
    assert known["a", "beta"] == (1, 2)
    assert find_setting("rate", known) == ("optim", "rate")
    assert find_setting("a.beta", known) == ("a", "beta")
    for name, part in [("beta", "write which"), ("rates", "did you mean optim.rate")]:
        with pytest.raises(ValueError, match=part):
            find_setting(name, known)
    with pytest.raises(ValueError, match="can't be read"):
        parse_path("a[x]")


def test_searching_imports_no_jax():
    names = "leaves binding scales vector decode diversity read index search table"
    code = (
        "import importlib, sys\n"
        f"for name in '{names} foreign'.split():\n"
        "    importlib.import_module(f'uoe_jax.runs.{name}')\n"
        "heavy = {'jax', 'flax', 'optax', 'matplotlib', 'sklearn', 'scipy'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
