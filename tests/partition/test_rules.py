"""Layout rules: which axis fsdp splits, from a file to the step and to the plan."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from tests.compare import assert_close
from tests.partition.tiny_layouts import compute, make_config, one_device
from uoe_jax.cli import main
from uoe_jax.config import LayoutConfig, from_json, to_json
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.hardware.work import collectives, held_params
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.plan.layouts import make_plan
from uoe_jax.rules import Rules, read_rules
from uoe_jax.runs.state import layout_of

MESH = {"data": 2, "fsdp": 2, "tensor": 2}
MOVED = {
    "*.attention.wq": {"fsdp": "h"},
    "*.attention.w[kv]": {"fsdp": "h", "tensor": "e"},
    "*.attention.wo": {"fsdp": None},
    "*.mlp.w_*": {"fsdp": "f"},
    "embed.embedding": {"fsdp": "v"},
}


def ruled(rules, kind="union", mesh=MESH):
    config = make_config(kind, mesh)
    layout = dataclasses.replace(config.layout, rules=rules)
    return dataclasses.replace(config, layout=layout)


def test_rules_move_what_fsdp_splits_and_nothing_else():
    usual = layout_of(make_config("union", MESH), mesh_for(make_config("union", MESH)))
    config = ruled(MOVED)
    found = layout_of(config, mesh_for(config)).specs
    block = "trunk.blocks.0."
    wanted = {
        "attention.wq": PartitionSpec(None, "tensor", None, None, None, "fsdp"),
        "attention.wk": PartitionSpec(None, "tensor", None, None, "fsdp"),
        "attention.wo": PartitionSpec(None, "tensor", None, None, None, None),
        "mlp.w_up": PartitionSpec(None, "tensor", None, "fsdp"),
        "mlp.w_down": PartitionSpec(None, "tensor", "fsdp", None),
    }
    for name, spec in wanted.items():
        assert found[block + name] == spec, name
    assert found["embed.embedding"] == PartitionSpec("fsdp", None)
    rest = set(found) - {block + name for name in wanted}
    rest -= {name for name in found if name.endswith((".wv", ".w_gate", "embedding"))}
    assert all(found[name] == usual.specs[name] for name in rest)


def test_losses_and_gradients_are_those_of_one_device():
    grads, sums, _ = compute(ruled(MOVED))
    wanted, whole, _ = one_device("union")
    assert_close(sums["loss"], whole["loss"], 1e-5)
    for name, grad in wanted.items():
        assert_close(grads[name], grad, 1e-5)


def test_a_config_carries_its_rules(tmp_path):
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(MOVED))
    config = ruled(read_rules(file))
    assert config == ruled(MOVED) == from_json(to_json(config))
    assert config.layout.rules[0] == "*.attention.wq fsdp=h"
    assert hash(config.layout) == hash(ruled(MOVED).layout)
    assert LayoutConfig().rules == Rules() == ()


BAD = {
    "unknown axis": ({"*.wq": {"model": "h"}}, "no mesh axis; .*fsdp"),
    "axis of the batch": ({"*.wq": {"data": "h"}}, "data, which splits no weights"),
    "unknown letter": ({"*.wq": {"fsdp": "q"}}, "axes l e d j g h, none is 'q'"),
    "no letter": ({"*.wq": {"fsdp": "dh"}}, "'dh'; give one letter"),
    "number": ({"*.wq": {"fsdp": 2}}, "fsdp 2; give one letter"),
    "layers": ({"*.wq": {"fsdp": "l"}}, "along l: layers are read one by one"),
    "tensor's": ({"*.wq": {"fsdp": "e"}}, "along e: tensor splits that; use d, j"),
    "moved tensor": ({"*.wq": {"tensor": "j"}}, "tensor splits .* along e"),
    "read whole": ({"*_norm.scale": {"fsdp": "d"}}, "read whole everywhere"),
    "no parameter": ({"*.wz": {"fsdp": "d"}}, "matches no parameter"),
    "twice": (
        {"*.wq": {"fsdp": "h"}, "*.attention.w*": {"fsdp": "h"}},
        "'\\*.wq fsdp=h'|keep one",
    ),
    "empty rule": ({"*.wq": {}}, "is {}"),
    "no mapping": ({"*.wq": "h"}, "is 'h'"),
    "bad pattern": ({"a b": {"fsdp": "h"}}, "no pattern"),
}


@pytest.mark.parametrize("case", BAD)
def test_rules_that_cannot_be_are_one_line(case, tmp_path, capsys):
    rules, words = BAD[case]
    file = tmp_path / "rules.json"
    file.write_text(json.dumps(rules))
    with pytest.raises(ConfigError, match=words):
        config = ruled(rules)
        layout_of(config, mesh_for(config))
    for verb, more in (("plan", ["--topology", "cpu:8"]),
                       ("train", ["--run-dir", str(tmp_path / "run")])):  # fmt: skip
        args = [verb, "tiny-union", *more, "--layout.rules", str(file)]
        assert main(args) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and said.startswith("uoe: "), said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", "7", '{"a": 1', None])
def test_files_that_hold_no_rules_are_one_line(content, tmp_path, capsys):
    file = tmp_path / "rules.json"
    if content is not None:
        file.write_text(content)
    args = ["plan", "tiny", "--topology", "cpu:8", "--layout.rules", str(file)]
    assert main(args) == 2
    said = capsys.readouterr().err
    assert str(file) in said and said.count("\n") == 1


def test_stacks_of_blocks_are_split_alike():
    config = ruled({"trunk.blocks.0.attention.wq": {"fsdp": "h"}})
    kinds = dataclasses.replace(
        config.model, attention=("union", "dense"), num_layers=2
    )
    config = dataclasses.replace(config, model=kinds)
    with pytest.raises(ConfigError, match="differently; name both by one pattern"):
        layout_of(config, mesh_for(config))


def test_a_plan_knows_the_rules(tmp_path, capsys):
    rules = {"*.attention.w*": {"fsdp": None}, "embed.embedding": {"fsdp": None}}
    config, whole = make_config("union"), ruled(rules, mesh={})
    sizes = {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    usual = held_params(config.model, sizes)
    held = held_params(config.model, sizes, whole.layout.rules)
    heads = config.model.num_heads + config.model.num_kv_heads
    matrices = 2 * config.model.d_model * heads
    matrices *= config.model.head_dim * config.model.num_layers
    more = held["attention"] - usual["attention"]
    assert abs(more - matrices * (1 / 2 - 1 / 8)) < 1e-6 * matrices
    assert held["embedding"] == 4 * usual["embedding"]
    assert held["mlp"] == usual["mlp"]
    summed = [
        c for c in collectives(whole, sizes, chosen=True) if "whole weights" in c.what
    ]
    embedding = config.model.vocab_size * config.model.d_model
    assert [c.num_bytes for c in summed] == [4.0 * (matrices / 2 + embedding)]
    assert not any(
        "whole weights" in c.what for c in collectives(config, sizes, chosen=True)
    )
    # What doesn't divide is illegal with its reason.
    odd = ruled({"*.attention.wq": {"fsdp": "g"}}, mesh={})
    illegal = make_plan(odd, parse_topology("cpu:8")).illegal
    reasons = [r for v in illegal if v.sizes["fsdp"] > 1 for r in v.problems]
    assert any("doesn't divide axis g of trunk.blocks.0.attention.wq" in r
               for r in reasons)  # fmt: skip


@pytest.mark.parametrize("axes", [("model",), ("data", "model"), ("x",)])
def test_a_mesh_with_axes_of_others_is_refused(axes):
    shape = (2,) * len(axes)
    mesh = jax.make_mesh(
        shape, axes, axis_types=(jax.sharding.AxisType.Auto,) * len(axes)
    )
    with pytest.raises(ConfigError, match=f"an axis '{axes[-1]}'; .*data, fsdp"):
        layout_of(make_config("union"), mesh)


# Held in short by the losses and gradients above, and test_resume.py.
@pytest.mark.nightly
def test_a_run_trained_by_rules_goes_on_without_them(tmp_path, capsys):
    from uoe_jax.model import flat_params
    from uoe_jax.runs.load import load_run

    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"*.attention.wq": {"fsdp": "h"}}))
    small = ["--model.d-model", "16", "--model.d-ff", "32", "--model.num-layers", "1",
             "--model.max-seq-len", "32", "--data.batch-size", "8", "--quiet",
             "--data.cache-dir", str(tmp_path), "--data.max-bytes", "40000",
             "--train.eval-every", "9", "--train.eval-batches", "1", "--no-report",
             "--train.save-every", "2", "--mesh.fsdp", "2",
             "--mesh.data", "1"]  # fmt: skip
    found = {}
    for name, options in {
        "with": ["--layout.rules", str(file), "--train.steps", "4"],
        "without": ["--train.steps", "4"],
    }.items():
        args = ["train", "tiny-union", *small, "--run-dir", str(tmp_path / name)]
        assert main([*args, *options]) == 0, capsys.readouterr().err
        run = load_run(tmp_path / name)
        found[name] = flat_params(run.model)
    assert run.config.layout.rules == Rules()
    assert load_run(tmp_path / "with").config.layout.rules == ("*.attention.wq fsdp=h",)
    for name, array in found["with"].items():
        assert_close(array, found["without"][name], 1e-4)
    args = ["train", "tiny-union", *small, "--run-dir", str(tmp_path / "with")]
    assert main([*args, "--train.steps", "5"]) == 0, capsys.readouterr().err
    assert load_run(tmp_path / "with").step == 5
    assert np.isfinite(found["with"]["embed.embedding"]).all()
