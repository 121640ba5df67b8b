"""Every option of every verb is typed by a test that runs the command to its end."""

import dataclasses
import importlib.util
import json
import tempfile
import typing
from pathlib import Path

import pytest

from tests.cli.options import CLASSES, TESTED, UNTESTED, load
from uoe_jax.bench import command, sizes
from uoe_jax.cli import VERBS, main
from uoe_jax.cli.fields import option_names, typed_options
from uoe_jax.cli.parse import parse
from uoe_jax.cli.plan import PlanOptions
from uoe_jax.config import ExperimentConfig, from_json, to_json
from uoe_jax.errors import ConfigError
from uoe_jax.fields import field_hints
from uoe_jax.ops import measured
from uoe_jax.presets import get_preset
from uoe_jax.rules import Rules
from uoe_jax.validation import validate

TESTS = Path(__file__).parents[1]


def own_options(verb):
    """Return a verb's own options: not those of a config, flags without their no-."""
    names = option_names(load(verb))
    positional = {
        "--run",
        "--runs",
        "--target",
        "--names",
        "--file",
        "--folders",
        "--source",
    }
    return {n for n in names if "." not in n and "--no-" not in n} - positional


@pytest.mark.parametrize("verb", VERBS)
def test_every_option_has_a_test_that_types_it(verb):
    assert verb in CLASSES, f"name the options of {verb} in tests/cli/options.py"
    listed = set(TESTED.get(verb, {})) | UNTESTED.get(verb, set())
    missing = own_options(verb) - listed
    assert not missing, f"{verb}: add {sorted(missing)} to tests/cli/options.py"
    assert not listed - own_options(verb), "an option that is gone"
    both = set(TESTED.get(verb, {})) & UNTESTED.get(verb, set())
    assert not both, f"tested now: take {sorted(both)} out of UNTESTED"


@pytest.mark.parametrize("verb", TESTED)
def test_listed_tests_type_their_options(verb):
    for option, file in TESTED[verb].items():
        text = (TESTS / file).read_text()
        forms = (option, option.replace("--", "--no-", 1))
        assert any(f'"{f}"' in text or f'"{f}=' in text for f in forms), (option, file)
        assert f'"{verb}"' in text, (verb, file)


def config_fields(node=None, prefix="--"):
    """Yield (option, path, annotation) of every field of an experiment."""
    node = ExperimentConfig() if node is None else node
    for name, hint in field_hints(type(node)).items():
        value, option = getattr(node, name), prefix + name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            for found, path, inner in config_fields(value, f"{option}."):
                yield found, (name, *path), inner
        else:
            yield option, (name,), hint


FIELDS = list(config_fields())
RULE = "*.attention.wq fsdp=h"  # what the rules of `typed` become


def get(config, path):
    for name in path:
        config = getattr(config, name)
    return config


def with_value(config, path, value):
    raw = json.loads(to_json(config))
    target = raw
    for name in path[:-1]:
        target = target[name]
    target[path[-1]] = value
    return from_json(json.dumps(raw))


def plain(hint):
    """Return an annotation without its bounds."""
    return typing.get_args(hint)[0] if hasattr(hint, "__metadata__") else hint


def other_values(old, hint):
    """Yield values other than a field's, of its type."""
    if hint is Rules:
        yield [RULE]
    if typing.get_origin(hint) is tuple and plain(typing.get_args(hint)[0]) is int:
        yield from ([n] for n in (1, 2, 8) if (n,) != old)
        return
    for kind in map(plain, (hint, *typing.get_args(hint))):
        if typing.get_origin(kind) is typing.Literal:
            yield from (w for w in typing.get_args(kind) if w != old)
        if typing.get_origin(kind) is tuple:
            if plain(typing.get_args(kind)[0]) is int:  # a number a layer
                yield from ([n] * layers for layers in (2, 4) for n in (8, 2))
                return
            if plain(typing.get_args(kind)[0]) is str:
                yield ["stdlib=1", "other.txt=2.5"]  # data.mix
                return
            words = typing.get_args(plain(typing.get_args(kind)[0])) or (8,)
            yield from ([w] for w in words if (w,) != old)
            return
        if kind is bool:
            yield not old
        if kind is int:
            yield from (n for n in (2 * (old or 0), (old or 0) + 1, 1, 2) if n != old)
        if kind is float:
            yield from (x for x in (0.5 * (old or 0), 0.25, 0.5) if x != old)
        if kind is str:
            yield "other"


def typed(option, value, hint):
    if isinstance(value, bool) and hint is bool:
        head, _, leaf = option.removeprefix("--").rpartition(".")
        dot = f"{head}." if head else ""
        return [option if value else f"--{dot}no-{leaf}"]
    if hint is Rules:
        file = Path(tempfile.mkdtemp()) / "rules.json"
        file.write_text(json.dumps({"*.attention.wq": {"fsdp": "h"}}))
        return [option, str(file)]
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [option, str(value)]


PRESETS = ("tiny", "tiny-union", "digits-vit", "tiny-moe")
GROUPS = sorted({option.rpartition(".")[0] for option, _, _ in FIELDS})


def changes(group):
    """Yield (preset, words, config): legal commands that type all of a group."""
    left = [f for f in FIELDS if f[0].rpartition(".")[0] == group]
    # Which no preset is.
    others = [("kind", "vision"), ("activation", "swiglu")]
    begun = [*((name, ()) for name in PRESETS), *(("tiny", other) for other in others)]
    for preset, other in begun:
        config, first = get_preset(preset), []
        if other:
            config = with_value(config, ("model", other[0]), other[1])
            first = [f"--model.{other[0]}", other[1]]
        words, later = list(first), []
        for option, path, hint in left:
            for value in other_values(get(config, path), hint):
                try:
                    found = with_value(config, path, value)
                    validate(found)
                except ConfigError:
                    continue
                config, words = found, words + typed(option, value, hint)
                break
            else:
                later.append((option, path, hint))
        if words != first:
            yield preset, words, config
        left = later
    assert not left, f"no other legal value in any preset: {left}"


@pytest.mark.parametrize("group", GROUPS, ids=lambda g: g or "own")
def test_every_field_is_typed_to_cost_and_plan(group, capsys):
    for preset, words, want in changes(group):
        start = PlanOptions(config=get_preset(preset))
        assert parse(PlanOptions, words, "plan", default=start).config == want
        assert main(["cost", preset, *words, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["name"] == want.name
        mesh = want.mesh
        devices = max(mesh.data, 1) * mesh.fsdp * mesh.tensor * mesh.sequence
        args = ["plan", preset, "--topology", f"cpu:{devices}", *words]
        assert main(args) in (0, 1)
        assert want.name in capsys.readouterr().out


def test_cost(capsys):
    args = ["--batch", "3", "--seq-len", "64", "--json", "--name", "mine"]
    assert main(["cost", "tiny", *args]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["batch"], found["seq_len"], found["name"]) == (3, 64, "mine")


def test_cost_of_very_deep_models_ends(capsys):
    assert main(["cost", "tiny", "--model.num-layers", "2000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["params"]["total"] > 10**8
    assert main(["cost", "tiny", "--model.num-layers", "1000000000"]) == 2
    assert "1 to 10000" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["cost", "plan", "train", "data"])
def test_a_vocabulary_below_the_tokenizers_stands(verb, capsys):
    assert main([verb, "7b", "--model.vocab-size", "32000"]) == 2
    said = capsys.readouterr().err
    assert "set data.bpe_vocab_size 32000" in said
    fixed = ["--model.vocab-size", "32000", "--data.bpe-vocab-size", "32000"]
    assert main(["cost", "7b", *fixed]) == 0


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["cost", "tiny", "--optim.eps", "nan"], ["--optim.eps is nan", "finite"]),
        (["cost", "tiny", "--optim.eps", "-inf"], ["--optim.eps", "finite"]),
        (["cost", "tiny", "--optim.eps", "1e999"], ["--optim.eps", "finite"]),
        (["cost", "tiny-moe", "--model.moe.capacity-factor", "2e8"], ["1e-06 to"]),
        (["cost", "tiny", "--name", "../up"], ["--name is '../up'", "not a path"]),
        (["train", "tiny", "--name", "/abs"], ["--name is '/abs'"]),
        (["cost", "tiny", "--train.seed", "4294967296"], ["4294967295"]),
        (["cost", "tiny", "--model.max-seq-len", "999999999"], ["16777216"]),
        (["cost", "tiny", "--batch", "99999999999"], ["--batch", "at most"]),
        (["leakcheck", "tiny", "--seed", "-1"], ["--seed is -1"]),
        (["leakcheck", "tiny", "--length", "999999999"], ["--length", "256"]),
        (["leakcheck", "digits-vit", "--length", "8"], ["--length", "leave it out"]),
        (["plan", "tiny", "--budget", "nan"], ["--budget is nan"]),
        (["plan", "tiny", "--show", "0"], ["--show is 0", "at least 1"]),
        (["plan", "tiny", "--compile", "2"], ["--compile", "TPU", "cpu:8"]),
        (["plan", "tiny", "--mesh.tensor", "3"], ["mesh.tensor 3", "cpu:8"]),
        (["plan", "tiny", "--topology", "v5e:32x32"], ["v5e:16x16"]),
        (["bench", "union", "--rounds", "1e3"], ["--rounds", "whole number"]),
    ],
)
def test_numbers_and_names_that_cannot_be_are_one_line(args, parts, capsys):
    assert main(args) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    for part in parts:
        assert part in said, said


def test_what_was_typed_counts_whatever_its_value():
    args = ["--mesh.tensor", "1", "--no-json", "--model.no-use-bias", "--show=12", "x"]
    want = {"--mesh.tensor", "--json", "--model.use-bias", "--show"}
    assert typed_options(args, PlanOptions) == want


def test_plan_keeps_to_the_mesh_that_was_typed(capsys):
    args = ["plan", "small", "--topology", "h100:8", "--json"]
    meshes = lambda found: [
        row["mesh"] for key in ("layouts", "too_large", "illegal") for row in found[key]
    ]
    assert main(args) == 0
    everything = meshes(json.loads(capsys.readouterr().out))
    for typed_mesh in (
        {"tensor": 2},
        {"tensor": 1},
        {"fsdp": 4, "data": 1},
        {"data": 0, "sequence": 2},
    ):
        words = [w for a, n in typed_mesh.items() for w in (f"--mesh.{a}", str(n))]
        assert main([*args, *words]) in (0, 1)
        found = meshes(json.loads(capsys.readouterr().out))
        fixed = {a: n for a, n in typed_mesh.items() if n}
        want = [m for m in everything if all(m[a] == n for a, n in fixed.items())]
        key = lambda mesh: sorted(mesh.items())
        assert sorted(found, key=key) == sorted(want, key=key) and want


def test_plan(tmp_path, capsys):
    result = {"preset": "small", "batch": 8, "seq_len": 512, "milliseconds": 30.0}
    timed, factors = tmp_path / "timed.json", tmp_path / "factors.json"
    timed.write_text(json.dumps({"device": "NVIDIA H100", "results": [result]}))
    args = ["plan", "small", "--topology", "h100:8", "--name", "mine", "--show", "2"]
    calibrated = ["--fit", str(timed), "--calibration", str(factors)]
    assert main([*args, *calibrated]) == 0
    said = capsys.readouterr()
    assert "mine on h100:8" in said.out and "1 timed steps" in said.err
    assert main([*args, "--calibration", str(factors), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["calibration"]["device"] == "H100"
    out, page = tmp_path / "layout.json", tmp_path / "plan.html"
    assert main([*args, "--out", str(out), "--html", str(page)]) == 0
    assert json.loads(out.read_text())["mesh"] and "<svg" in page.read_text()
    capsys.readouterr()
    small = tmp_path / "none.json"
    assert main([*args, "--budget", "0.001", "--out", str(small)]) == 1
    said = capsys.readouterr()
    assert "too large" in said.out and "isn't written" in said.err
    assert not small.exists()


def test_plan_compiles_for_a_tpu_or_says_what_is_missing(capsys):
    tiny = ["--model.d-model", "16", "--model.d-ff", "32", "--model.num-layers", "1"]
    args = ["plan", "tiny", "--topology", "v5litepod-4", *tiny, "--kernels"]
    assert main([*args, "--compile", "1", "--max-seconds", "60"]) == 0
    said = capsys.readouterr()
    assert "on v5e:2x2" in said.out
    there = importlib.util.find_spec("libtpu") is not None
    assert ("compiling" if there else "libtpu isn't installed") in said.err
    assert main([*args, "--compile", "0"]) == 0
    assert "compil" not in capsys.readouterr().err


def test_leakcheck(capsys):
    assert main(["leakcheck", "tiny-union", "--length", "12", "--seed", "3"]) == 0
    said = capsys.readouterr().out
    assert "12 tokens" in said and "nothing moved" in said


def test_bench(tmp_path, monkeypatch, capsys):
    tiny = dataclasses.replace(
        sizes.SMALL,
        attention=((1, 16, 2, 8, True),),
        selective=(),
        matmul=((64, 8, 16, 4),),
        mlp=(),
        smha=(),
    )
    monkeypatch.setitem(command.SIZES, "small", tiny)
    monkeypatch.setenv(measured.FOLDER, str(tmp_path / "tuning"))
    measured.load.cache_clear()
    args = ["bench", "attention", "--size", "small", "--rounds", "1", "--tune"]
    assert main(args) == 0
    measured.load.cache_clear()
    assert "tiles and backends measured" in capsys.readouterr().out
    assert list((tmp_path / "tuning").iterdir())
