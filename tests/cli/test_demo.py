"""The demo: one FLOP budget, three models, a table, a page, and a quick second run."""

import dataclasses
import json

import pytest

from uoe_jax import demo
from uoe_jax.cli import main
from uoe_jax.errors import ConfigError
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.report.read import flatten
from uoe_jax.validation import validate


def test_models_cost_the_same_within_three_percent():
    configs = demo.demo_configs()
    flops = demo.check_budget(configs)
    assert list(flops) == ["dense", "moe", "union"]
    assert max(flops.values()) <= 1.03 * min(flops.values())
    for config in configs:
        validate(config)
        counted = flops_per_token(config.model, config.seq_len).forward
        assert flops[config.name] == counted


def test_union_uses_half_of_its_experts_and_moe_two_of_eight():
    _, moe, union = (config.model for config in demo.demo_configs())
    assert union.union.top_k * 2 == union.union.num_experts
    assert {mlp for _, mlp in union.layer_kinds} == {"union"}
    assert "union" in union.attention
    assert (moe.moe.num_experts, moe.moe.top_k) == (8, 2)


def test_only_the_model_differs():
    flats = [flatten(dataclasses.asdict(c)) for c in demo.demo_configs()]
    differing = {k for k in flats[0] if len({str(f[k]) for f in flats}) > 1}
    assert all(k == "name" or k.startswith("model.") for k in differing)


def test_unequal_budgets_are_refused():
    configs = demo.demo_configs()
    wide = dataclasses.replace(configs[0].model, d_ff=2 * configs[0].model.d_ff)
    configs[0] = dataclasses.replace(configs[0], model=wide)
    with pytest.raises(ConfigError, match="agree within 3%"):
        demo.check_budget(configs)


@pytest.fixture
def small_demo(tiny_config, monkeypatch):
    """Two of the demo's models, shrunk; budgets are tested above."""
    models = {
        "moe": tiny_config("tiny-moe"),
        # Without routed attention, which compiles longest; test_runs.py has it.
        "union": tiny_config("tiny-union", attention=("dense",)),
    }
    configs = [
        dataclasses.replace(config, name=name) for name, config in models.items()
    ]
    monkeypatch.setattr(demo, "TOLERANCE", 10.0)
    monkeypatch.setattr(demo, "demo_configs", lambda steps=None: configs)
    monkeypatch.setattr(demo, "SAMPLE_TOKENS", 8)
    return configs


def test_demo_writes_table_summary_page_and_sample(small_demo, tmp_path, capsys):
    folder = tmp_path / "demo"
    asked = ["demo", "--run-dir", str(folder), "--quiet", "--steps", "4"]
    assert main(asked) == 0
    out = capsys.readouterr().out
    rows = json.loads((folder / "summary.json").read_text())
    assert [set(row) for row in rows] == [set(demo.SUMMARY_KEYS)] * 2
    assert [row["name"] for row in rows] == ["moe", "union"]
    for row in rows:
        line = next(x for x in out.splitlines() if x.startswith(f"{row['name']}  "))
        assert f"{row['val_bits_per_byte']:.3f}" in line
        assert row["tokens_per_second"] > 0 and row["train_seconds"] > 0
    page = (folder / "report.html").read_text()
    assert "2 runs side by side" in page and "Samples" in page
    sample = out.split("Sampled by union:\n")[1]
    assert sample.startswith(demo.PROMPT)

    before = (folder / "moe" / "metrics.jsonl").read_bytes()
    assert main(["demo", "--run-dir", str(folder), "--quiet"]) == 0
    again = capsys.readouterr().out
    assert again.startswith("Nothing to train: moe, union are finished")
    assert again.split("\n\n")[1] == out.split("\n\n")[1]  # the same table
    assert again.split("Sampled by")[1] == out.split("Sampled by")[1]
    assert (folder / "moe" / "metrics.jsonl").read_bytes() == before
    assert json.loads((folder / "summary.json").read_text()) == rows

    changed = dataclasses.replace(
        small_demo[0], optim=dataclasses.replace(small_demo[0].optim, beta1=0.5)
    )
    with pytest.raises(ConfigError, match="other settings"):
        demo.is_finished(folder / "moe", changed)
    (folder / "samples.json").unlink()
    assert demo.saved_results(folder, small_demo) is None
    said = []
    assert demo.run_demo(folder, small_demo, say=said.append) == rows
    assert len(said) == 2 and all("finished run reused" in line for line in said)
    (folder / "moe" / "metrics.jsonl").write_text("")
    assert not demo.is_finished(folder / "moe", small_demo[0])
