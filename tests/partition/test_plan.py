"""Meshes that are legal, plans, layout files and pictures; nothing is compiled."""

import dataclasses
import importlib.util
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.partition.tiny_layouts import make_config
from uoe_jax.cli.plan import plan as run_plan
from uoe_jax.config import LayoutConfig, MeshConfig, UnionConfig
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.hardware.devices import parse_topology
from uoe_jax.partition.collectives import stored_order
from uoe_jax.partition.legal import AXES, layout_problems, mesh_sizes
from uoe_jax.partition.mesh import make_mesh
from uoe_jax.plan.aot import topology_devices
from uoe_jax.plan.layouts import (
    factorisations,
    make_plan,
    read_layout,
    reasons,
    verdicts,
    write_layout,
)
from uoe_jax.plan.picture import holdings, movements, owned_experts
from uoe_jax.presets import get_preset
from uoe_jax.report.plan_text import describe


@settings(deadline=None, max_examples=30)
@given(count=st.integers(1, 96))
def test_factorisations_are_all_products_once(count):
    found = [tuple(sizes[axis] for axis in AXES) for sizes in factorisations(count)]
    assert len(found) == len(set(found))
    assert all(math.prod(sizes) == count for sizes in found)
    divisors = [d for d in range(1, count + 1) if count % d == 0]
    pairs = sum(
        1
        for a in divisors
        for b in divisors
        if count % (a * b) == 0
        for c in divisors
        if count % (a * b * c) == 0
    )
    assert len(found) == pairs


@pytest.mark.parametrize(
    "kind,sizes,message",
    [
        ("dense", {"tensor": 8}, "mesh.tensor 8 doesn't divide model.num_kv_heads 4"),
        ("union", {"tensor": 3}, "3 doesn't divide model.union.num_experts 4"),
        ("moe", {"tensor": 8}, "8 doesn't divide model.moe.num_experts 4; use 1, 2, 4"),
        ("union", {"tensor": 2, "sequence": 4}, "the 4 experts of union attention"),
        ("dense", {"fsdp": 3}, "mesh.fsdp 3 doesn't divide model.d_model 16"),
        ("dense", {"sequence": 3}, "doesn't divide the 16 tokens of a sequence"),
        ("dense", {"data": 4, "fsdp": 4}, "batch of 8 doesn't divide over 16 devices"),
    ],
)
def test_what_does_not_divide_says_which_number_and_what_would(kind, sizes, message):
    sizes = dict.fromkeys(AXES, 1) | sizes
    problems = list(layout_problems(make_config(kind), sizes))
    assert any(message in problem for problem in problems), problems


def test_choices_that_need_other_tokens_are_refused():
    config = make_config("union", layout={"dispatch": "all_to_all"})
    patched = UnionConfig(num_experts=4, top_k=2, patch_size=2)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, union=patched)
    )
    sizes = dict.fromkeys(AXES, 1) | {"tensor": 2}
    assert any("patch_size 1" in p for p in layout_problems(config, sizes))
    vision = get_preset("digits-vit")
    sizes = dict.fromkeys(AXES, 1) | {"sequence": 2}
    assert any("aren't split by tokens" in p for p in layout_problems(vision, sizes))


def test_key_heads_that_sequence_and_tensor_devices_cannot_share_are_refused():
    one = dict.fromkeys(AXES, 1)
    problems = lambda kind, sizes: list(
        layout_problems(
            make_config(kind, layout={"sequence_attention": "heads"}), one | sizes
        )
    )
    (found,) = problems("dense", {"sequence": 4, "tensor": 2})
    assert found == (
        "layout.sequence_attention is 'heads' and mesh.sequence 4 x mesh.tensor 2 "
        "doesn't divide model.num_kv_heads 4; use a product of 1, 2, 4, or ring"
    )
    assert problems("dense", {"sequence": 2, "tensor": 2}) == []
    assert problems("union", {"sequence": 4}) == []  # its experts are shared out
    found = problems("groups union", {"sequence": 4})  # which has 2 full key heads
    assert any("doesn't divide the key heads of" in line for line in found), found


def test_data_takes_what_is_left():
    assert mesh_sizes(MeshConfig(tensor=2), 8)["data"] == 4
    with pytest.raises(ConfigError, match="mesh.tensor is 0; it must be at least 1"):
        mesh_sizes(MeshConfig(tensor=0), 8)
    with pytest.raises(ConfigError, match="needs 16 devices but 8 are visible"):
        mesh_sizes(MeshConfig(data=2, fsdp=8), 8)


def test_every_factorisation_is_in_the_plan_once():
    config, topology = get_preset("1b-union"), parse_topology("v5p:4x4x4")
    plan = make_plan(config, topology)
    rows = [p.sizes for p in (*plan.fitting, *plan.too_large)]
    rows += [v.sizes for v in plan.illegal]
    assert sorted(map(str, rows)) == sorted(map(str, factorisations(64)))
    times = [p.step_seconds for p in plan.fitting]
    assert times == sorted(times)
    assert sum(count for _, count, _ in reasons(plan.illegal)) >= len(plan.illegal)
    text = describe(plan, {}, 100)
    said = text[text.index("illegal layouts by reason") :].split("\n")
    assert len(said) == 1 + len(reasons(plan.illegal)) and all(said)


@given(
    placement=st.sampled_from(["contiguous", "round_robin"]),
    tensor=st.sampled_from([1, 2, 4, 8]),
)
def test_every_expert_is_held_once_where_the_weights_are(placement, tensor):
    config = make_config("union", layout={"experts": placement})
    owned = [owned_experts(config, 8, tensor, rank) for rank in range(tensor)]
    order = stored_order(8, tensor, LayoutConfig(experts=placement))
    assert sum(owned, []) == order and sorted(order) == list(range(8))


def test_pictures_say_who_holds_what_and_what_moves():
    config = make_config("union")
    sizes = {"data": 1, "fsdp": 2, "sequence": 2, "tensor": 2}
    held = holdings(config, sizes)
    assert [h.place["tensor"] for h in held] == [0, 1] * 4
    assert held[0].mlp == "experts 0 1" and held[1].mlp == "experts 2 3"
    assert held[0].attention == "experts 0" and held[2].attention == "experts 1"
    assert held[0].rows == "0-3" and held[4].rows == "4-7"
    assert held[2].tokens == "8-15"
    assert any(
        "tokens to experts and back" in line
        for line in movements(config, sizes, chosen=True)
    )
    assert movements(config, dict.fromkeys(AXES, 1), chosen=True) == []


def test_a_picture_has_what_devices_send_not_what_others_would():
    config = make_config("moe", layout={"dispatch": "all_to_all"})
    sizes = dict.fromkeys(AXES, 1) | {"tensor": 4}
    sent = {
        chosen: [
            m for m in movements(config, sizes, chosen=chosen) if "all-to-all" in m
        ]
        for chosen in (True, False)
    }
    assert sent[True] and sent[False] and sent[True] != sent[False]


def test_a_layout_file_brings_mesh_and_choices(tmp_path):
    config = make_config("union", layout={"experts": "round_robin"})
    sizes = {"data": 1, "fsdp": 4, "sequence": 1, "tensor": 2}
    write_layout(tmp_path / "layout.json", config, sizes)
    found = read_layout(tmp_path / "layout.json", get_preset("tiny"))
    assert found.mesh == MeshConfig(**sizes)
    assert found.layout.experts == "round_robin"
    assert found.model == get_preset("tiny").model
    with pytest.raises(ConfigError, match=r"none\.json can't be read \(No such file"):
        read_layout(tmp_path / "none.json", config)
    (tmp_path / "other.json").write_text('{"mesh": 3}')
    with pytest.raises(ConfigError, match="isn't a layout file"):
        read_layout(tmp_path / "other.json", config)


def test_the_command_prints_tables_json_and_files(tmp_path, capsys):
    out, page = tmp_path / "layout.json", tmp_path / "plan.html"
    args = ["tiny-union", "--topology", "cpu:8"]
    assert run_plan([*args, "--out", str(out), "--html", str(page)]) == 0
    said = capsys.readouterr().out
    assert "20 layouts fit" in said and "fastest layout moves" in said
    html = page.read_text()
    assert "<svg" in html and "Who holds what" in html
    assert run_plan([*args, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["layouts"][0]["mesh"] == json.loads(out.read_text())["mesh"]
    assert run_plan(["7b", "--topology", "v5e:2x2"]) == 1
    assert "too large" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="--budget is -1.0"):
        run_plan([*args, "--budget", "-1"])


def test_a_model_of_few_experts_has_fewer_meshes():
    found = verdicts(make_config("union"), 8)
    legal = [v for v in found if not v.problems]
    assert len(found) == 20
    assert 0 < len(legal) < 20
    for verdict in found:
        if verdict.sizes["tensor"] * verdict.sizes["sequence"] <= 4:
            assert not verdict.problems


# libtpu exists for Linux on x86 only; elsewhere no pod can be described.
if importlib.util.find_spec("libtpu") is not None:

    @pytest.mark.parametrize("topology", ["v5p:4x4x4", "v5e:4x4"])
    def test_every_factorisation_is_a_mesh_of_the_pods_chips(topology):
        """Also those whose axes take one dimension of the pod and half of the next."""
        devices = topology_devices(topology)
        for sizes in factorisations(len(devices)):
            mesh = make_mesh(MeshConfig(**sizes), devices=devices)
            assert len({device.id for device in mesh.devices.flat}) == len(devices)


def test_a_fit_is_of_one_device_and_says_whose_factors_are_used(tmp_path, capsys):
    files = []
    for kind in ("H100", "H200"):
        result = {"preset": "small", "batch": 8, "seq_len": 512, "milliseconds": 30.0}
        path = tmp_path / f"{kind}.json"
        path.write_text(json.dumps({"device": f"NVIDIA {kind}", "results": [result]}))
        files.append(str(path))
    args = ["small", "--topology", "h200:1", "--fit"]
    assert run_plan([*args, files[0]]) == 0
    assert "its factors are used for H200" in capsys.readouterr().err
    assert run_plan([*args, files[1]]) == 0
    assert "its factors are used" not in capsys.readouterr().err
    with pytest.raises(DataError, match=r"H200.*, .*H100.*; fit one device at a time"):
        run_plan([*args, *files])
