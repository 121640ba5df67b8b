"""Alarms for dead, overloaded and dropping routers, and where they are shown."""

import dataclasses
import json

import numpy as np

from tests.report.synthetic_runs import make_overlay
from uoe_jax.config import MoeConfig, to_json
from uoe_jax.presets import get_preset
from uoe_jax.report.alarms import find_alarms, latest
from uoe_jax.report.build import _alarms as alarms_html
from uoe_jax.report.build import write_report
from uoe_jax.report.overlay import Overlay, text_html
from uoe_jax.report.read import num_experts, num_shared, read_run, routed_layers


def with_loads(folder, model, block, loads, steps=20, **more):
    """Write a run whose router records are `loads` [L, E] at every step."""
    config = dataclasses.replace(get_preset("tiny"), model=model)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(to_json(config))
    lines = [
        {
            "kind": "train",
            "step": step,
            "loss": 1.0,
            "router": {block: {"load": loads(step), "entropy": [1.0] * 4, **more}},
        }
        for step in range(1, steps + 1)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return read_run(folder)


UNION = get_preset("tiny-union").model  # 4 layers, 8 experts
DENSE = get_preset("tiny").model
EVEN = [0.125] * 8
TILTED = [0.0, 0.125, 0.125, 0.125, 0.125, 0.0, 0.0, 0.5]


def test_dead_and_overloaded_experts_are_named_by_layer(tmp_path):
    loads = [EVEN, TILTED, EVEN, EVEN]
    run = with_loads(tmp_path / "a", UNION, "mlp", lambda step: loads)
    dead, heavy = find_alarms(run)
    assert (dead.block, dead.layer, dead.kind, dead.experts) == (
        "mlp", 1, "dead", (0, 5, 6))  # fmt: skip
    assert (heavy.kind, heavy.experts, heavy.worst) == ("heavy", (7,), 4.0)
    assert "MLP layer 1: experts 0, 5, 6" in dead.text
    assert "expert 7 got up to 4.0 balanced shares" in heavy.text


def test_with_a_key_router_experts_are_named_as_asked_and_as_stored_in(tmp_path):
    own = dataclasses.replace(
        UNION.union_attention, gated_values=True, key_router=True, num_shared=1
    )
    model = dataclasses.replace(UNION, union_attention=own)
    even = [1 / 14] * 14  # of 7 routed experts asked, of 7 stored in
    tilted = [0.0, 2 / 14, *even[2:10], 0.0, 2 / 14, *even[12:]]
    loads = [even, tilted, even, even]
    run = with_loads(tmp_path / "a", model, "attention", lambda step: loads)
    (dead,) = find_alarms(run)
    assert (dead.layer, dead.kind, dead.experts) == (1, "dead", (1, 11))
    assert "attention layer 1: experts 1, 4 (of keys) got" in dead.text


def test_only_the_last_tenth_of_a_run_counts(tmp_path):
    early = lambda step: [TILTED] * 4 if step <= 18 else [EVEN] * 4
    run = with_loads(tmp_path / "a", UNION, "attention", early)
    assert find_alarms(run) == []
    late = lambda step: [TILTED] * 4 if step > 18 else [EVEN] * 4
    assert len(find_alarms(with_loads(tmp_path / "b", UNION, "attention", late))) == 8
    assert latest(np.arange(10.0).reshape(5, 2)).tolist() == [8.0, 9.0]


def test_dropped_picks_raise_an_alarm(tmp_path):
    drops = {"dropped": [0.0, 0.2, 0.04, 0.0]}
    run = with_loads(tmp_path / "a", UNION, "mlp", lambda step: [EVEN] * 4, **drops)
    (alarm,) = find_alarms(run)
    assert alarm.text == "MLP layer 1: 20.0% of the picks found no room"


def test_always_on_experts_come_first_in_the_numbers(tmp_path):
    union = dataclasses.replace(UNION.union, num_shared=2)
    model = dataclasses.replace(UNION, union=union)
    assert (num_experts(model, "mlp", 0), num_shared(model, "mlp", 0)) == (6, 2)
    load = [[0.0, *[0.2] * 5]] * 4
    run = with_loads(tmp_path / "a", model, "mlp", lambda step: load)
    assert {alarm.experts for alarm in find_alarms(run)} == {(2,)}


def test_layers_of_other_widths_are_held_to_their_own_share(tmp_path):
    model = dataclasses.replace(
        UNION, mlp=("union", "moe"), moe=MoeConfig(num_experts=4, top_k=2)
    )
    # The narrower layers' loads are filled up with zeros, which are no experts.
    loads = [EVEN, [0.25] * 4 + [0.0] * 4] * 2
    run = with_loads(tmp_path / "a", model, "mlp", lambda step: loads)
    assert find_alarms(run) == []
    assert routed_layers(model, "mlp") == [0, 1, 2, 3]


def test_attention_that_picks_blocks_has_no_router():
    moba = dataclasses.replace(UNION, attention=("moba", "moh"), mlp=("dense",))
    assert routed_layers(moba, "attention") == [1, 3]
    mod = dataclasses.replace(moba, blocks=("all", "mod"))
    assert routed_layers(mod, "depth") == [1, 3]
    assert num_experts(mod, "depth", 1) == 2


def test_the_page_shows_alarms(tmp_path):
    loads = [EVEN, TILTED, EVEN, EVEN]
    bad = with_loads(tmp_path / "bad", UNION, "mlp", lambda step: loads)
    example = {bad.path: make_overlay(UNION, text="def f(x):\n    return x")}
    text = write_report([bad.path], overlays=example).read_text()
    assert text.count('class="alarms"') == 1
    assert "experts 0, 5, 6 got under 5%" in text
    assert (tmp_path / "bad" / "plots" / "load.png").is_file()


def test_where_nothing_is_wrong_the_page_says_so(tmp_path):
    good = with_loads(tmp_path / "good", UNION, "mlp", lambda step: [EVEN] * 4)
    assert "No alarms" in alarms_html(good)
    silent = with_loads(tmp_path / "dense", DENSE, "none", lambda step: [])
    assert alarms_html(silent) == ""


def test_a_decomposed_run_needs_no_metrics(tmp_path):
    run = tmp_path / "cut"
    run.mkdir()
    config = get_preset("tiny-union")
    (run / "config.json").write_text(to_json(config))
    found = {"did": "split", "max_logit_difference": 1.5e-6, "exact": True}
    (run / "surgery.json").write_text(json.dumps(found))
    text = write_report([run]).read_text()
    assert "Made from another model" in text and "1.5e-06" in text


def test_depth_has_its_picture(tmp_path):
    kinds = {"attention": ("union", "dense"), "mlp": ("union", "dense")}
    model = dataclasses.replace(UNION, blocks=("all", "mod"), **kinds)
    run = with_loads(
        tmp_path / "a", model, "depth", lambda step: [[0.5, 0.5], [0.4, 0.6]]
    )
    assert find_alarms(run) == []
    write_report([run.path])
    assert (run.path / "plots" / "depth.png").is_file()


def test_tokens_without_room_and_depth_have_their_words():
    overlay = Overlay(
        choices={
            "mlp": np.array([[[1, 0], [-1, 0], [-1, -1]]]),
            "depth": np.array([[[0], [1], [0]]]),
        },
        layers={"mlp": [0], "depth": [0]},
        num_experts={"mlp": 2, "depth": 2},
        tokens=["a", "b", "c"],
    )
    text = text_html(overlay)
    assert 'title="experts 1, 0">a' in text
    assert 'title="experts 0">b' in text
    assert 'title="experts none: no room">c' in text
    assert "through the block" in text and "around it" in text
