"""Any wrong value of any field is one line, from Python and from JSON alike."""

import dataclasses
import json
import math
import types
import typing
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Literal

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from uoe_jax.adapt.config import AdapterConfig, adapter_from_dict, check_adapter
from uoe_jax.bench.request import BenchRequest
from uoe_jax.config import (
    DataConfig,
    ExperimentConfig,
    HeadGroups,
    LayoutConfig,
    MeshConfig,
    MobaConfig,
    ModConfig,
    ModelConfig,
    MoeConfig,
    OptimConfig,
    TrainConfig,
    UnionConfig,
    UnionOverrides,
    from_json,
    to_json,
)
from uoe_jax.decompose.runs import Cut
from uoe_jax.errors import ConfigError
from uoe_jax.fields import Bounds, Checked, check_ranges, field_hints
from uoe_jax.model.baselines.moe import moe_gates
from uoe_jax.model.routing.token import gate_values
from uoe_jax.optim import make_schedule
from uoe_jax.presets import get_preset
from uoe_jax.validation import read_config, validate

# Parts of an experiment, by where they stand in its JSON.
PLACES = {
    ExperimentConfig: (),
    ModelConfig: ("model",),
    UnionConfig: ("model", "union"),
    UnionOverrides: ("model", "union_attention"),
    MoeConfig: ("model", "moe"),
    MobaConfig: ("model", "moba"),
    ModConfig: ("model", "mod"),
    HeadGroups: ("model", "head_groups"),
    DataConfig: ("data",),
    OptimConfig: ("optim",),
    MeshConfig: ("mesh",),
    LayoutConfig: ("layout",),
    TrainConfig: ("train",),
}
NEEDED = {Cut: {"num_experts": 4}, BenchRequest: {"names": ("union",)}}
CLASSES = [*PLACES, AdapterConfig, Cut, BenchRequest]
FIELDS = [(cls, f.name) for cls in CLASSES for f in dataclasses.fields(cls)]


class Odd:
    """A value whose repr takes several lines."""

    def __repr__(self):
        return "an\nodd\nthing"


JSON_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.sampled_from([math.nan, math.inf, -math.inf, 1e39, 5e-324, 10**400]),
    st.text(max_size=6),
    st.sampled_from(["union", "dense", "sofmax", "../up", "a/b", ".", "\x1b[31m"]),
    st.lists(st.sampled_from(["dense", "unoin", 1, None]), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)
PYTHON_VALUES = JSON_VALUES | st.sampled_from(
    [b"x", 1j, object, Odd(), {1}, np.arange(3), np.float32(math.nan), np.str_("nope")]
)


def complaint(make):
    """Return what `make` raises as one line, or None; nothing but ConfigError is."""
    try:
        make()
    except ConfigError as error:
        text = str(error)
        assert text and len(text.splitlines()) == 1, repr(text)
        assert text.isprintable(), repr(text)
        return text
    return None


args = typing.get_args


def bare(hint):
    """Return an annotation's alternatives, without bounds and None."""
    if typing.get_origin(hint) is Annotated:
        return bare(typing.get_args(hint)[0])
    if type(None) in (args := typing.get_args(hint)):
        return [b for a in args if a is not type(None) for b in bare(a)]
    return [hint]


def plain(hint):
    """Return a hint without what is said of it beside."""
    return hint.__origin__ if hasattr(hint, "__metadata__") else hint


def kinds_of(hint):
    """Return the types a field may hold, those of unions without None too."""
    if typing.get_origin(plain(hint)) in (types.UnionType, typing.Union):
        hint = plain(hint)
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return [kind for a in typing.get_args(hint) for kind in kinds_of(a)]
    return bare(hint)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), PYTHON_VALUES)
@example((Cut, "calibrate"), 3)  # of several kinds, none of them None
@example((Cut, "router"), None)  # or a word, with how it is typed said beside
@example((Cut, "router"), "zero")
@example((Cut, "num_experts"), 0)  # a number, or a word
def test_wrong_values_are_refused_when_a_config_is_made(place, value):
    cls, name = place
    found = {}

    def make():
        found["made"] = cls(**{**NEEDED.get(cls, {}), name: value})

    said = complaint(make)
    if said is not None:
        assert f"{cls.__name__}.{name}" in said
        return
    kept = getattr(found["made"], name)
    kinds = kinds_of(field_hints(cls)[name])
    # What is kept is of the annotated type, exactly.
    if kept is None:
        assert type(None) in typing.get_args(plain(field_hints(cls)[name]))
    elif isinstance(kept, (bool, int, float, str)):
        words = [
            w for k in kinds if typing.get_origin(k) is Literal for w in k.__args__
        ]
        assert kept in words or type(kept) in kinds
        assert not isinstance(kept, float) or math.isfinite(kept)
    check = check_adapter if cls is AdapterConfig else check_ranges
    complaint(lambda: check(found["made"]))


@settings(max_examples=150, deadline=None)
@given(st.sampled_from([p for p in FIELDS if p[0] in PLACES]), JSON_VALUES)
def test_python_and_json_refuse_the_same(place, value):
    cls, name = place
    raw = json.loads(to_json(ExperimentConfig()))
    target = raw
    for key in PLACES[cls]:
        target = target[key]
    part = dataclasses.is_dataclass(field_hints(cls)[name])
    target[name] = value
    by_json, by_python = {}, {}
    said = complaint(lambda: by_json.update(found=from_json(json.dumps(raw))))
    there = complaint(lambda: by_python.update(found=cls(**{name: value})))
    if part and isinstance(value, dict):
        return  # an object of JSON stands for a part; in Python a part is made
    assert (said is None) == (there is None), (said, there)
    if said is None:
        config = by_json["found"]
        complaint(lambda: validate(config))
        assert from_json(to_json(config)) == config
        part = config
        for key in PLACES[cls]:
            part = getattr(part, key)
        assert getattr(part, name) == getattr(by_python["found"], name)


def numbers():
    """Yield (class, field, bounds) of every bounded number."""
    for cls in CLASSES:
        for name, hint in field_hints(cls).items():
            inner = args(hint) if type(None) in args(hint) else ()
            for part in (hint, *inner):
                if typing.get_origin(part) is Annotated:
                    kind, *rules = typing.get_args(part)
                    for rule in rules:
                        if isinstance(rule, Bounds):
                            yield cls, name, kind, rule


@pytest.mark.parametrize(
    ("cls", "name", "kind", "bounds"),
    list(numbers()),
    ids=lambda v: getattr(v, "__name__", v if isinstance(v, str) else ""),
)
def test_every_bound_is_held_to(cls, name, kind, bounds):
    step = (lambda v, d: v + d) if kind is int else (lambda v, d: v + d * 1e-3)
    outside = [
        step(bounds.least, -1) if bounds.least > -math.inf else None,
        bounds.above if bounds.above > -math.inf else None,
        bounds.below if bounds.below < math.inf else None,
        bounds.most * 2 if bounds.most < math.inf else None,
    ]
    inside = [v for v in (bounds.least, bounds.most) if math.isfinite(v)]
    check = check_adapter if cls is AdapterConfig else check_ranges
    make = lambda v: cls(**{**NEEDED.get(cls, {}), name: kind(v)})
    for value in outside:
        if value is not None:
            said = complaint(lambda v=value: check(make(v)))
            assert said is not None and name in said and "it must" in said
    for value in inside:
        if bounds.above < value < bounds.below:
            assert complaint(lambda v=value: check(make(v))) is None


def test_every_number_of_a_config_is_bounded():
    bounded = {(cls, name) for cls, name, _, _ in numbers()}
    for cls, name in FIELDS:
        if int in (kinds := bare(field_hints(cls)[name])) or float in kinds:
            assert (cls, name) in bounded, (cls, name)


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: ModelConfig(norm="rms"), ["'rms'", "'rmsnorm'"]),
        (lambda: ModelConfig(activation="geglu"), ["'geglu'", "'swiglu'"]),
        (lambda: ModelConfig(position="alibi"), ["'alibi'", "'learned'"]),
        (lambda: MoeConfig(gate="softmx"), ["'softmx'", "'softmax'"]),
        (lambda: UnionConfig(gate="sofmax"), ["'sofmax'", "'softmax'"]),
        (lambda: ModelConfig(compute_dtype="float16"), ["'float16'", "'bfloat16'"]),
        (lambda: ModelConfig(remat=True), ["True", "'full'"]),
        (lambda: ModelConfig(num_layers=4.0), ["4.0", "int"]),
        (lambda: ModelConfig(kind="lm"), ["'lm'", "'decoder'"]),
        (lambda: ModelConfig(attention="union"), ["'union'", "('union',)"]),
        (lambda: ModelConfig(attention=("unoin",)), ["'unoin'", "'union'"]),
        (lambda: ModelConfig(attention=()), ["()", "not empty"]),
        (lambda: ModelConfig(union={"top_k": 2}), ["UnionConfig"]),
        (lambda: LayoutConfig(dispatch="alltoall"), ["'alltoall'", "'all_to_all'"]),
        (lambda: DataConfig(pack="document"), ["'document'", "'documents'"]),
        (lambda: OptimConfig(schedule="cosin"), ["'cosin'", "'cosine'"]),
        (lambda: OptimConfig(learning_rate="1e-3"), ["'1e-3'", "float"]),
        (lambda: OptimConfig(learning_rate=10**400), ["finite"]),
        (lambda: MoeConfig(capacity_factor=math.inf), ["inf", "finite"]),
        (lambda: AdapterConfig(method="dora"), ["'dora'", "'lora'"]),
        (lambda: AdapterConfig(targets="*.wq"), ["('*.wq',)"]),
        (lambda: AdapterConfig(rank_pattern={"*.wq": 2.5}), ["2.5", "int"]),
        (lambda: Cut(num_experts=4, grouping="coactivated"), ["'coactivated'"]),
        (lambda: Cut(num_experts=4, parts="mlp"), ["('mlp',)"]),
        (lambda: BenchRequest(names="union"), ["('union',)"]),
        (lambda: ExperimentConfig(name="../../etc"), ["'../../etc'", "not a path"]),
        (lambda: ExperimentConfig(name=""), ["empty"]),
        (lambda: ExperimentConfig(name="a\nb"), ["printable"]),
        (lambda: ExperimentConfig(name="x" * 200), ["120 bytes"]),
        (lambda: ExperimentConfig(model=get_preset("tiny")), ["expected ModelConfig"]),
        (lambda: unwrap(validate)("tiny"), ["'tiny'", "get_preset"]),
        (lambda: unwrap(validate)(ModelConfig()), ["expected an ExperimentConfig"]),
        (lambda: adapter_from_dict({"rank": "8"}), ["'8'", "int"]),
        (lambda: gate_values(jnp.zeros((2, 2)), "sofmax"), ["'sofmax'", "softmax"]),
        (lambda: moe_gates(jnp.ones((2, 4)), jnp.ones((2, 1), int), "x"), ["'x'"]),
    ],
)
def test_what_was_once_taken_is_refused_by_name(make, parts):
    said = complaint(make)
    assert said is not None
    for part in parts:
        assert part in said


def test_an_unknown_schedule_of_a_config_that_was_forced_is_named():
    config = OptimConfig()
    object.__setattr__(config, "schedule", "cosin")
    assert "'cosin'" in complaint(lambda: make_schedule(config, 10))


def test_numpy_scalars_lists_and_paths_become_plain():
    config = ModelConfig(
        d_model=np.int64(64),
        dropout=np.float32(0.5),
        use_bias=np.bool_(True),
        norm=np.str_("layernorm"),
        attention=["union", "dense"],
        norm_eps=1,
    )
    kept = (config.d_model, config.dropout, config.use_bias, config.norm_eps)
    assert [type(v) for v in kept] == [int, float, bool, float]
    assert config.attention == ("union", "dense") and type(config.norm) is str
    assert DataConfig(path=Path("a") / "b").path == "a/b"
    assert BenchRequest(names=["union"], out="x.json").out == Path("x.json")
    whole = ExperimentConfig(model=config)
    assert from_json(to_json(whole)) == whole and isinstance(hash(whole), int)


def test_json_that_says_a_thing_twice_or_too_deep_is_refused():
    assert "twice" in complaint(lambda: from_json('{"name": "a", "name": "b"}'))
    assert "not JSON" in complaint(lambda: from_json("[" * 100_000))
    assert "NaN" in complaint(lambda: from_json('{"optim": {"eps": NaN}}'))
    assert "1e999" in complaint(lambda: from_json('{"optim": {"eps": 1e999}}'))


@pytest.mark.parametrize("value", [2**32, -1, 2**64])
def test_seeds_that_repeat_another_are_refused(value):
    config = dataclasses.replace(get_preset("tiny"), train=TrainConfig(seed=value))
    assert "train.seed" in complaint(lambda: validate(config))


def test_a_run_whose_config_was_edited_is_refused_by_every_reader(tmp_path):
    from uoe_jax.report.read import read_run
    from uoe_jax.runs.load import load_run

    config = dataclasses.replace(
        get_preset("tiny-union"),
        model=ModelConfig(
            attention=("union",), union=UnionConfig(num_experts=2, top_k=9)
        ),
    )
    (tmp_path / "config.json").write_text(to_json(config))
    (tmp_path / "metrics.jsonl").write_text("")
    for read in (read_config, load_run, read_run):
        said = complaint(lambda read=read: read(tmp_path))
        assert "top_k 9" in said and "config.json" in said


@dataclasses.dataclass(frozen=True)
class Own(Checked):
    """A config of a user's own."""

    pair: tuple[int, str]
    where: Path | int = 3


def test_a_config_of_ones_own_is_checked_the_same_way():
    assert Own((1, "a"), "x").where == Path("x")
    assert "2; expected str" in complaint(lambda: Own((1, 2)))
    for pair in ((1, "a", "b"), (1,)):
        assert "a tuple" in complaint(lambda pair=pair: Own(pair))
