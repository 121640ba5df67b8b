"""The study of evidence: what it trains, measures, and says of its results."""

import argparse
import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from experiments.e012_evidence import figures as drawn
from experiments.e012_evidence import measure, tables
from experiments.e012_evidence.build import Builder
from experiments.e012_evidence.choose import (
    by_validation,
    chosen_lean,
    survivors,
    with_one_speed,
)
from experiments.e012_evidence.cut import go_on, save_model
from experiments.e012_evidence.figures import figures
from experiments.e012_evidence.models import LEAN, MODELS, SIZES, dense, make
from experiments.e012_evidence.pick import check_picked
from experiments.e012_evidence.rates import CONTINUED, best_rate, choose_rate
from experiments.e012_evidence.report import report
from experiments.e012_evidence.run import Session, main
from experiments.e012_evidence.study import (
    ATTENTION,
    BLOCKS,
    FULL,
    GRID,
    PLANNED,
    SEARCH_SEED,
    jobs,
    listed,
)
from experiments.shared.branches import plan_legs
from experiments.shared.case import change, program_key
from experiments.shared.compare import read_plan
from experiments.shared.part import Part
from tests.compare import assert_close
from uoe_jax.config import DataConfig
from uoe_jax.data import prepare
from uoe_jax.data.tasks.recall import generate_recall
from uoe_jax.errors import ConfigError
from uoe_jax.files import format_json
from uoe_jax.hardware.count import flops_per_token
from uoe_jax.model import flat_params, make_model
from uoe_jax.tree import named_leaves
from uoe_jax.validation import validate

TEXT = DataConfig(source="stdlib")


def row(case, seed, losses, setting="M, T 4096", **more):
    """Return a run's entry whose lengths end at some test bits/byte."""
    steps = [400 * 2**n for n in range(len(losses))]
    line = lambda n, loss: {
        "steps": n,
        "valid": {"wikipedia": loss, "python": loss - 0.5},
        "test": {"wikipedia": loss, "python": loss - 0.5},
        "positions": {
            name: [
                {"first": a, "last": b, "tokens": 9, "bits": loss + 1 / b, "right": 0.5}
                for a, b in ((0, 16), (16, 32), (32, 64))
            ]
            for name in ("wikipedia", "python")
        },
        "copy": {"bits": 4.7, "right": 0.04},
        "leak": {"before": 0.0, "after": 1.0, "noise": 0.0},
    }
    size, _, length = setting.partition(", T ")
    return {
        "block": "6",
        "case": case,
        "family": case,
        "kind": "attention",
        "size": size,
        "setting": setting,
        "seed": seed,
        "optimizer": "adamw",
        "rate": 0.002,
        "rate_by": "default",
        "device": "card",
        "jax": "1",
        "commit": "abc",
        "date": "2026-11-30",
        "steps": steps[-1],
        "planned_steps": steps,
        "parameters": 1000,
        "forward_flops_per_token": 100.0,
        "training_flops_per_step": 300.0,
        "tokens_per_step": 8,
        "step_seconds": 0.1,
        "cache_bytes": 4096,
        "lengths": [line(n, loss) for n, loss in zip(steps, losses, strict=True)],
    } | more


def falling(end, count=5):
    return [end * 1.1 ** (count - 1 - n) for n in range(count)]


def test_every_model_of_every_size_is_legal_and_costs_what_it_says():
    for kind, models in MODELS.items():
        for size in SIZES:
            start = dense(size, 64 if size == "tiny" else 4096, TEXT)
            whole = flops_per_token(start.model).forward
            for name in models(start):
                family, config = make(start, kind, name)
                validate(change(config, train={"steps": FULL[-1]}))
                share = flops_per_token(config.model).forward / whole
                if kind == "budgets":  # of which 8 experts are a dense MLP
                    assert (share > 1.1) == ("16" in name), (size, name, share)
                    continue
                # Routers and a convolution come on top.
                most = 0.95 if "lean" in name else 1.08 if size in "ML" else 1.3
                assert family and share < most, (kind, size, name, share)
    with pytest.raises(ConfigError, match="no model 'dence'"):
        make(dense("S", 64, TEXT), "mlp", "dence")


def test_what_is_planned_is_trained():
    plan = read_plan(PLANNED)
    rows = [row(n, 0, [2.0], block="3") for n in (*LEAN, "MoE 2 of 8", "UoME 8 of 32")]
    trained = {(j.setting, j.name) for b in BLOCKS for j in jobs(b, rows, False)}
    for one in plan.comparisons:
        assert one.failed
        for name in (one.first, one.second):
            if name in tables.CHOICES:
                some = [n for s, n in trained if s == one.size]
                assert any(map(tables.CHOICES[name], some)), one.name
            else:
                name, _, _ = name.partition(" at ")  # a budget of one model
                assert (one.size, name) in trained, one.name
    assert {c.headline for c in plan.comparisons} == {1, 2, 3, 4, 5, 6}


def test_lengths_of_every_block_can_branch_after_the_warm_up():
    for block in "46789":
        with pytest.raises(ConfigError, match="run block 3 first"):
            jobs(block, [], False)
    rows = [row(n, 0, [2.0], block="3") for n in (*LEAN, "MoE 2 of 8", "UoME 8 of 32")]
    for block in BLOCKS:
        for job in jobs(block, rows, False):
            config = job.config(TEXT)[1]
            assert plan_legs(job.steps)[0].last >= config.optim.warmup_steps
            assert config.data.batch_size * job.length == 32_768


def searched(job, loss):
    return row(job.name, SEARCH_SEED, [loss], block="2", setting=job.setting,
               rate=job.rate, kind=job.kind, family="dense", size=job.size,
               optimizer=job.optimizer)  # fmt: skip


def test_rates_are_searched_further_where_the_best_is_at_the_edge():
    mine = lambda rows: [
        j for j in jobs("2", rows, False)
        if (j.name, j.size, j.optimizer) == ("dense", "S", "adamw")
    ]  # fmt: skip
    first = mine([])
    rates = sorted(j.rate for j in first)
    assert len(rates) == 5 and {j.seed for j in first} == {SEARCH_SEED}
    assert_close(np.diff(np.log(rates)), math.log(GRID), 1e-3)
    inside = [searched(j, abs(j.rate - rates[2]) + 2.0) for j in first]
    assert sorted(j.rate for j in mine(inside)) == rates
    rising = [searched(j, 2.0 - j.rate) for j in first]
    more = mine(rising)
    assert len(more) == 6 and max(j.rate for j in more) > rates[-1]
    rising.append(searched(max(more, key=lambda j: j.rate), 1.9))
    assert len(mine(rising)) == 7
    rising.append(searched(max(mine(rising), key=lambda j: j.rate), 1.8))
    assert len(mine(rising)) == 7  # that far and no further
    found = best_rate(inside, first[0], "dense")
    assert found == rates[2] and best_rate(inside, first[0], "mixture") is None
    large = jobs("7", [row(n, 0, [2.0], block="3") for n in LEAN], False)[0]
    assert_close(best_rate(inside, large, "dense"), rates[2] / 2, 1e-6)


def test_a_run_stays_the_same_parts_while_its_block_grows():
    whose = lambda rows: {
        job: [n for n in (1, 2, 3) if Part(n, 3).has(job.shared_by, job.seed)]
        for job in jobs("2", rows, False)
    }  # fmt: skip
    first = whose([])
    # Lower rates are better: each list begins with another rate now, then two.
    rows = [searched(job, 2.0 + job.rate) for job in first]
    grown = whose(rows)
    rows += [searched(job, 1.0 + job.rate) for job in grown if job not in first]
    most = whose(rows)
    assert len(first) == 100 and len(grown) == 120 and len(most) == 140
    assert all(most[job] == grown.get(job, most[job]) for job in most)
    assert all(grown[job] == part for job, part in first.items())
    assert all(len(part) == 1 for part in most.values())  # one has it
    counts = [sum(part == [n] for part in most.values()) for n in (1, 2, 3)]
    assert min(counts) > 30, counts


def test_parts_have_about_as_many_runs_and_a_dense_starts_are_ones_own():
    rows = [row(n, 0, [2.0], block="3") for n in (*LEAN, "MoE 2 of 8", "UoME 8 of 32")]
    made = [job for block in BLOCKS for job in jobs(block, rows, False)]
    for count in (2, 4):
        parts = [Part(n + 1, count) for n in range(count)]
        mine = [[j for j in made if p.has(j.shared_by, j.seed)] for p in parts]
        assert sum(map(len, mine)) == len(made)
        assert min(map(len, mine)) > 0.8 * len(made) / count
        starts = [{j.start for j in some if j.start is not None} for some in mine]
        assert len(set().union(*starts)) == sum(map(len, starts)) == 3
        assert max(map(len, starts)) - min(map(len, starts)) <= 1


def test_block_four_has_what_block_three_left():
    losses = {"dense": 2.0, "MoE a": 1.9, "MoE b": 1.8, "UoME a": 1.7, "UoME b": 2.5}
    losses |= {name: 1.9 + n / 10 for n, name in enumerate(LEAN)}
    rows = [row(name, s, [x + s / 50], block="3") for name, x in losses.items()
            for s in (0, 1)]  # fmt: skip
    assert survivors(rows) == ("dense", "MoE b", *LEAN[:2], "UoME a")
    rows.append(row("UoME a", 2, [9.0], block="3") | {"lengths": []})  # diverged
    assert survivors(rows)[-1] == "UoME b"


def test_the_lean_union_is_chosen_at_equal_seconds_by_the_first_seed():
    """Losses of every length are read where the fastest one's longest run ends."""
    law = lambda a: [a * (400 * 2**n) ** -0.1 for n in range(5)]
    made = lambda name, a, step: row(name, 0, law(a), block="3", step_seconds=step)
    fast, slow = made(LEAN[0], 3.0, 0.05), made(LEAN[1], 2.9, 0.1)
    # As many steps: the slow one is better. In half of the steps it is at 3.108.
    assert by_validation({"fast": [fast], "slow": [slow]}, "tokens")[0] == "slow"
    assert by_validation({"fast": [fast], "slow": [slow]}, "seconds")[0] == "fast"
    rows = [fast, slow, made(LEAN[2], 3.1, 0.05)]
    with pytest.raises(ConfigError, match=f"lacks '{LEAN[3]}'; run block 3 first"):
        chosen_lean(rows)
    rows.append(made(LEAN[3], 3.1, 0.05))
    assert chosen_lean(rows) == LEAN[0]
    later = [row(name, 1, law(2.0), block="3") for name in LEAN[1:]]
    assert chosen_lean(rows + later) == LEAN[0]
    names = {job.name for job in jobs("8", rows, False)}
    assert f"{LEAN[0]} + conv" in names and f"{LEAN[1]} + conv" not in names


def test_whether_routed_heads_add_to_local_ones_is_answered_first():
    names = [job.name for job in jobs("1", [], False)[:4]]
    assert names[:2] == ["local + conv", "local + few routed + conv"]
    assert names == list(ATTENTION[:4]) and "dense + conv" in names


def results(tmp_path, rows):
    file = tmp_path / "results.json"
    noted = {"planned": read_plan(PLANNED).digests(), "runs": rows}
    file.write_text(format_json(noted))
    return file


def full_rows():
    """Return runs of every figure: attentions at M, sizes of the law, recall."""
    rows = []
    ends = {"dense + conv": 1.500, "local + conv": 1.56, "local + 2 full + conv": 1.52}
    ends |= {"local + few routed + conv": 1.501, "SMHA + conv": 1.6, "SMHA": 1.7}
    for seed, off in ((0, -0.0003), (1, 0.0003)):
        for name, end in ends.items():
            rows.append(row(name, seed, [x + off for x in falling(end)]))
        longer = [x + 20 * off for x in falling(1.45, 4)]
        rows.append(row("dense + conv", seed, longer, "M, T 8192"))
        fast = {"step_seconds": 0.08, "training_flops_per_step": 240.0}
        for name, end in (("dense + conv", 1.5), ("MoE 2 of 8 + conv", 1.46)):
            for size, less in (("S", 0.3), ("L", -0.2), ("XL", -0.3)):
                ten = {"S": 30.0, "L": 3000.0, "XL": 9000.0}[size]
                losses = falling(end + less + off)
                rows.append(row(name, seed, losses, f"{size}, T 4096",
                                training_flops_per_step=ten))  # fmt: skip
        for size, less in (("S", 0.3), ("M", 0.0), ("L", -0.2)):
            ten = {"S": 24.0, "M": 240.0, "L": 2400.0}[size]
            losses = falling(1.45 + less + off)
            rows.append(row("UoME 1 of 16 lean + conv", seed, losses,
                            f"{size}, T 4096",
                            **fast | {"training_flops_per_step": ten}))  # fmt: skip
        for name, right in (("local + conv", 0.1), ("local + few routed + conv", 0.8)):
            asked = row(name, seed, [4 * (1 - right) + off], "R, T 1024, recall")
            for line in asked["lengths"]:
                del line["copy"]
                line |= {"valid": {"recall": 1}, "positions": {"recall": [{"bits": 1}]}}
                line["test"] = {"recall": 4 * (1 - right) + off}
                line["recall"] = [
                    {"first": 2, "last": 4, "tokens": 5, "bits": 1, "right": right},
                    {
                        "first": 4,
                        "last": 8,
                        "tokens": 15,
                        "bits": 1,
                        "right": right / 2,
                    },
                ]
            rows.append(asked)
        for top_k in (2, 4, 8, 16):
            made = {"block": "budgets", "kind": "budgets"}
            one = row(f"UoME {top_k} of 32", seed, [1.9 + 1 / top_k + off], "S, T 1024",
                      **made)  # fmt: skip
            one["lengths"][-1]["budgets"] = {str(x): 2.5 + off for x in (2, 4, 8, 16)}
            rows.append(one)
        one = row("UoME 2 to 16 of 32", seed, [2.0], "S, T 1024", **made)
        budgets = {str(x): 1.901 + 1 / x + 2 * off for x in (2, 4, 8)} | {"16": 2.1}
        one["lengths"][-1]["budgets"] = budgets
        rows.append(one)
    return rows


def test_tables_and_figures_come_from_the_results_alone(tmp_path):
    text = report([results(tmp_path, full_rows())], tmp_path / "out")
    lines = {line.split(" | ")[0][2:]: line for line in text.splitlines()}
    # 0.001 above with an error of some 4e-4: below the margin of 0.005.
    assert lines["3a: routed heads beside local ones within 0.005 of dense"].endswith(
        "| yes |"
    )
    assert (
        "+0.0010 ± "
        in lines["3a: routed heads beside local ones within 0.005 of dense"]
    )
    assert lines["3c: routed heads add to local ones"].endswith("| yes |")
    assert lines["3d: routed heads add recall to local ones"].endswith("| yes |")
    assert "| not measured |" in lines["1a: lean union below dense at equal seconds, S"]
    assert "1c: lean union below dense at equal seconds, L" in lines
    assert lines["1c: lean union below dense at equal seconds, L"].endswith("| yes |")
    assert lines["6b: one model for every budget, at 4 of 32"].endswith("| yes |")
    assert lines["6d: one model for every budget, at 16 of 32"].endswith("it. |")
    assert "nothing leaks" in text and "| 5.0% |" not in text
    assert "45.0%" not in text and "50.0%" in text  # recall: (5 * .8 + 15 * .4) / 20
    names = sorted(path.name for path in (tmp_path / "out" / "figures").iterdir())
    assert names == [
        "a_flops.png", "b_seconds.png", "c_law.png", "d_positions.png", "e_recall.png",
        "f_cache.png", "g_ladder.png", "h_budgets.png",
    ]  # fmt: skip
    assert set(figures(full_rows()[:1])) == {"a_flops.png", "b_seconds.png"}


def test_the_law_is_of_sizes_at_the_length_of_the_one_held_out():
    rows = full_rows()
    alike = [one for one in rows if one["setting"] != "M, T 8192"]
    assert len(alike) == len(rows) - 2
    # An MLP's runs at T 1024 spread as widely and are of no law either.
    others = [row("dense", s, falling(1.6 + s / 10), "M, T 1024") for s in (0, 1)]
    law, points, text = drawn._law(tables.find_groups(rows + others))
    assert {name: len(pairs) for name, pairs in points.items()} == {
        "dense + conv": 3, "MoE 2 of 8 + conv": 2, "best lean + conv": 3,
    }  # fmt: skip
    assert (law, points, text) == drawn._law(tables.find_groups(alike))
    assert (
        drawn._law(tables.find_groups([r for r in rows if "8192" in r["setting"]]))
        is None
    )


def test_a_training_counts_once_at_however_many_budgets(tmp_path):
    names = ("UoME 2 to 16 of 32", *(f"UoME {x} of 32" for x in (2, 4, 8, 16)))
    rows = [row(name, seed, [2.0 + seed / 100], "S, T 1024", rate_by="search")
            for name in names for seed in range(3)]  # fmt: skip
    for one in rows:  # of which each seed's four budgets tell nothing new
        one["lengths"][-1]["budgets"] = {str(x): 3.0 for x in (2, 4, 8, 16)}
    (group,) = tables.find_groups(rows)
    assert len(group.models) == 25 and len(group.trained) == 5
    spread = group.spread("wikipedia")
    assert spread.freedom == 10
    assert_close(spread.deviation, 0.01, 1e-6)
    report([results(tmp_path, rows)], tmp_path / "out", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text()
    assert "\n- 15 runs, 3 of each model (seeds), 15 of them at a rate that" in page
    assert "changed in 15 trained models" in " ".join(page.split())


def test_the_page_says_what_came_out_and_nothing_without_runs(tmp_path):
    page = tmp_path / "docs" / "evidence.md"
    with pytest.raises(ConfigError, match="no run has come to its end"):
        report([results(tmp_path, [])], tmp_path / "out", page)
    assert not page.exists()
    rows = full_rows()
    report([results(tmp_path, rows)], tmp_path / "out", page)
    text = page.read_text()
    assert len(text.splitlines()) < 80  # two screens
    assert all(len(x) <= 130 for x in text.splitlines() if not x.startswith(("|", "!")))
    flat = " ".join(text.split())
    assert (page.parent / "g_ladder.png").is_file() and "(g_ladder.png)" in text
    assert (
        "- 3a, local + few routed + conv less dense + conv (M, T 4096): +0.0010 ±"
        in flat
    )
    assert (
        "- 6d, UoME 2 to 16 of 32 at 16 less UoME 16 of 32 (S, T 1024): +0.1375" in flat
    )
    assert "**doesn't hold.** At 16 of 32 the model for every budget" in flat
    assert "Not measured yet: 1a, 1b, 1d, 2a" in flat and "nothing leaks" in flat
    assert f"\n- {len(rows)} runs, 2 of each model (seeds), 0 of them" in text
    # One seed: means alone.
    report([results(tmp_path, [r for r in rows if not r["seed"]])], tmp_path, page)
    text = page.read_text()
    flat = " ".join(text.split())
    assert "(M, T 4096): +0.0010, one seed: no interval" in flat
    assert " 0 of 20 planned comparisons are measured" in flat and "holds" not in flat


def test_claims_that_fail_say_their_sentence(tmp_path):
    rows = full_rows()
    for one in rows:
        if one["case"] == "local + few routed + conv":
            for line in one["lengths"]:
                line["test"] = {name: x + 0.1 for name, x in line["test"].items()}
    text = report([results(tmp_path, rows)], tmp_path / "out")
    assert "no: Local heads with two routed ones of sixteen are 0.005 bits" in text
    assert "no: Routed heads add nothing to local ones." in text


def test_a_plan_that_was_changed_after_the_runs_is_refused(tmp_path, capsys):
    from experiments.e012_evidence import report as module

    file = results(tmp_path, full_rows())
    noted = json.loads(file.read_text())
    noted["planned"] = noted["planned"][1:]
    file.write_text(json.dumps(noted))
    args = ["--results", str(file), "--out", str(tmp_path)]
    assert module.main(args) == 2
    assert "isn't planned: it was written or changed" in capsys.readouterr().err
    assert module.main(["--results", "no.json", "--out", str(tmp_path)]) == 2


def test_results_of_different_texts_are_not_reported_together(tmp_path, capsys):
    from experiments.e012_evidence import report as module

    noted = json.loads(results(tmp_path, full_rows()).read_text())
    text = {"wikipedia": "a1", "python": "b2"}
    seen = {
        "first": {"text 4096": text},
        "same": {"text 4096": text, "recall 1024": {"recall": "c3"}},
        "other": {"text 4096": text | {"python": "b3"}},
        "fewer": {"text 4096": {"wikipedia": "a1"}},
    }
    for name, texts in seen.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(noted | {"texts": texts}))
    file = lambda name: str(tmp_path / f"{name}.json")
    args = ["--out", str(tmp_path / "out"), "--results", file("first"), file("same")]
    assert module.main(args) == 0
    for name in ("other", "fewer"):
        capsys.readouterr()
        assert module.main([*args, file(name)]) == 2
        said = capsys.readouterr().err
        assert f"{name}.json was made with another text of python than" in said
        assert said.count("\n") == 1


def test_equal_seconds_are_read_off_the_slower_fronts(tmp_path):
    law = lambda a: [a * (400 * 2**n) ** -0.1 for n in range(5)]
    rows = [row("dense", 0, law(3.0), step_seconds=0.1)]
    rows += [row("slow", 0, law(2.9), step_seconds=0.15)]
    (group,) = tables.find_groups(rows)
    points = tables.equal_points(group, "slow", "dense", "seconds")
    assert [p.length for p in points] == [1, 2, 3, 4]
    for point in points:
        steps = point.spent / 0.15
        assert_close(point.first, [2.9 * steps**-0.1], 1e-6)
        assert_close(point.second, [3.0 * (point.spent / 0.1) ** -0.1], 1e-6)


def test_recall_is_counted_by_its_distance():
    made = generate_recall(30, 0, 64, 4)
    arrays = {"tokens": made.tokens[:, :-1], "targets": made.tokens[:, 1:]}
    weight = made.scored[:, 1:].astype(np.float32)
    # Right where the value is less than 16 tokens back.
    rows = made.tokens.tolist()
    correct = np.zeros_like(weight, bool)
    for r, t in zip(*np.nonzero(weight), strict=True):
        correct[r, t] = t - rows[r].index(rows[r][t]) < 16
    tokens = {"nll": np.where(correct, 0.0, 1.0), "correct": correct, "weight": weight}
    found = measure.by_distance(tokens, arrays)
    assert sum(part["tokens"] for part in found) == 120
    for part in found:
        assert part["right"] == (1.0 if part["last"] <= 16 else 0.0)
        assert_close(part["bits"], 0.0 if part["last"] <= 16 else 1 / math.log(2), 1e-6)


def test_positions_are_binned_by_doublings():
    nll = np.broadcast_to(np.arange(64.0), (3, 64)) * math.log(2)
    tokens = {"nll": nll, "correct": nll > 0, "weight": np.ones((3, 64), np.float32)}
    found = measure.by_position(tokens)
    assert [(p["first"], p["last"]) for p in found] == [(0, 16), (16, 32), (32, 64)]
    assert_close([p["bits"] for p in found], [7.5, 23.5, 47.5], 1e-6)


@pytest.mark.parametrize("length", [33, 64])
def test_the_copy_test_asks_for_the_second_string(length):
    rows = {n: np.asarray(a) for n, a in measure.copy_rows(length, 5).items()}
    half = (length + 1) // 2
    for tokens, targets, mask in zip(*rows.values(), strict=True):
        (asked,) = np.nonzero(mask)
        assert len(asked) >= half - measure._FIRST - 1
        assert all(targets[t] == tokens[t + 1 - half] for t in asked)
        assert asked[0] == half - 1 + measure._FIRST


def test_blocks_run_tiny_to_their_end_and_go_on(tmp_path, capsys):
    options = argparse.Namespace(
        out=tmp_path, minutes=60.0, articles=None, python=None, tiny=True,
        only=["dense + conv"], seeds=[0], part=Part(1, 1),
    )  # fmt: skip
    session = Session(options)
    session.run_block("1")
    (made,) = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [line["steps"] for line in made["lengths"]] == [20, 40, 80]
    last = made["lengths"][-1]
    assert last["leak"]["before"] < 1e-5 < last["leak"]["after"]
    assert 1 < last["test"]["stdlib"] < 6 and 0 <= last["copy"]["right"] <= 1
    assert made["training_flops_per_step"] > 0 and made["device"] and made["commit"]
    assert made["config"]["model"]["convolution"] == 4
    chunks = len(made["curve"])
    assert made["chunks"] == {"all": chunks, "compiled_meanwhile": 0}
    again = Session(options)
    again._train = lambda job, rows: pytest.fail(f"{job.name} is trained twice")
    again.run_block("1")
    again.run_block("5")  # has the same model with the same lengths
    assert len(again.rows) == 1
    # An option that came after the run changes nothing; another width does.
    again.mine[0]["key"] = "of another version"
    del again.mine[0]["config"]["model"]["sink"]
    again.run_block("1")
    del again._train
    again.mine[0]["config"]["model"]["d_ff"] = 64
    with pytest.raises(ConfigError, match="of another configuration"):
        again.run_block("1")
    again.mine.clear()
    # Of another machine, whose results were put beside.
    other = {"runs": [], "texts": {"text 64": {"stdlib": "another"}}}
    (tmp_path / "results-2.json").write_text(json.dumps(other))
    with pytest.raises(ConfigError, match=r"results-2\.json was made with"):
        again.run_block("1")
    (tmp_path / "results-2.json").unlink()
    again.results["texts"]["text 64"]["stdlib"] = "another"
    with pytest.raises(ConfigError, match="made with another text of stdlib"):
        again.run_block("1")
    assert "1 runs to go" in capsys.readouterr().out


def test_a_model_that_fails_ends_no_other(tmp_path, capsys):
    options = argparse.Namespace(
        out=tmp_path, minutes=60.0, articles=None, python=None, tiny=True,
        only=["local + conv", "dense + conv"], seeds=[0], part=Part(1, 1),
    )  # fmt: skip
    session, tried = Session(options), []

    def train(job, rows):
        tried.append(job.name)
        if job.name == "local + conv":
            raise RuntimeError("a kernel failed")
        session.mine.append({"case": job.name})

    built = argparse.Namespace(measures=argparse.Namespace(contents={}))
    session.builder.build = lambda job: built
    session._train = train
    session._done = lambda job, rows: job.name in [row["case"] for row in rows]
    assert session.run(["1"]) == 1
    assert tried == ["local + conv", "dense + conv"]
    assert {job.name for job in session.failed} == {"local + conv"}
    said = capsys.readouterr()
    assert "local + conv, seed 0, FAILED" in said.out and "a kernel failed" in said.err
    assert said.out.endswith("block 1: no run is left\n")


def queue_of(tmp_path, only):
    options = argparse.Namespace(
        out=tmp_path, minutes=60.0, articles=None, python=None, tiny=True,
        only=only, seeds=[], part=Part(1, 1),
    )  # fmt: skip
    return Session(options)


def test_every_run_has_steps_beside_which_nothing_compiles(tmp_path):
    session, asked = queue_of(tmp_path, []), []
    session.later = "the next model"
    session.builder = argparse.Namespace(busy=True, begin=asked.append)
    disturbed = session._disturbed()
    assert [disturbed() for _ in range(9)] == [True] * 9  # the one asked for before
    session.builder.busy = False
    assert [disturbed() for _ in range(3)] == [False] * 3 and not asked
    disturbed()
    assert asked == ["the next model"]
    asked.clear()
    assert [session._disturbed()() for _ in range(9)] == [False] * 9 and not asked


def test_a_further_seed_trains_while_the_next_model_is_compiled(tmp_path):
    session, seen = queue_of(tmp_path, ["dense", LEAN[0]]), []
    built = argparse.Namespace(measures=argparse.Namespace(contents={}))
    ready = {"dense"}
    session.builder.build = lambda job: built
    session.builder.ready = lambda job: job.name in ready
    told = lambda job: (job.name, job.seed)
    session._done = lambda job, rows: told(job) in [row["job"] for row in rows]

    def train(job, rows):
        seen.append((*told(job), session.later and told(session.later)))
        session.mine.append({"job": told(job)})
        if len(seen) == 2:
            ready.add(LEAN[0])

    session._train = train
    session.run_block("3")
    lean = LEAN[0]
    assert seen == [
        ("dense", 0, (lean, 0)), ("dense", 1, (lean, 0)),
        (lean, 0, None), (lean, 1, None), ("dense", 2, None), (lean, 2, None),
    ]  # fmt: skip


def test_a_builder_says_what_is_ready(monkeypatch):
    options = argparse.Namespace(articles=None, python=None, tiny=True)
    made, (first, second) = Builder(options), jobs("3", [], True)[:2]
    monkeypatch.setattr(made, "_build", lambda job, key, config: 1 / (job == first))
    assert not made.ready(first)
    assert made.build(first) and made.ready(first)
    assert made.ready(dataclasses.replace(first, seed=7))  # it is the same program
    with pytest.raises(ZeroDivisionError):
        made.build(second)
    assert not made.ready(second)
    made.ahead.seconds[made._key(second)[0]] = 3.0  # in the cache on disk
    assert made.ready(second)


def test_seeds_of_a_model_and_models_that_are_compared_have_one_kind_of_rate():
    job = next(j for j in jobs("3", [], False) if j.name == "dense" and j.seed == 1)
    other = dataclasses.replace(job, name="MoE 2 of 8", seed=0)
    losses = (5.0, 4.0, 1.0, 2.0, 3.0)  # of dense's rates at S
    rates = jobs("2", [], False)[:5]
    search = [searched(j, loss) for j, loss in zip(rates, losses, strict=True)]
    ask = lambda rows: choose_rate(rows, job, "dense", 0.5)
    assert ask([]) == (0.5, "default")
    assert ask(search) == (rates[2].rate, "search")
    said = {"setting": job.setting, "planned_steps": list(job.steps)}
    before = row(other.name, 0, falling(1.6)) | said
    assert ask([*search, before]) == (0.5, "default")
    assert ask([*search, before | {"rate_by": "search"}])[1] == "search"
    # Runs of other lengths, and a search's, are none that it is compared with.
    assert ask([*search, before | {"planned_steps": [1]}])[1] == "search"
    assert ask([*search, before | {"seed": SEARCH_SEED}])[1] == "search"
    mine = before | {"case": "dense", "rate": 0.25}
    assert ask([*search, mine]) == (0.25, "default")
    given = dataclasses.replace(job, rate=0.125)
    assert choose_rate([mine], given, "dense", 0.5) == (0.125, "given")


def test_a_run_that_goes_on_has_a_part_of_its_starts_rate():
    job = next(j for j in jobs("cut", [], False) if j.seed == 1)
    start = job.start
    assert start is not None and start.steps != job.steps
    rates = jobs("2", [], False)[:5]
    search = [searched(j, abs(n - 2) + 1.0) for n, j in enumerate(rates)]
    # The start was trained before the search; another seed's, shorter ones and later
    # runs of other models don't count.
    found = {"planned_steps": list(start.steps), "setting": start.setting, "seed": 1}
    trained = row("dense", 1, falling(1.6)) | found | {"rate": 0.25}
    others = [
        trained | {"seed": 0, "rate": 0.5},
        trained | {"planned_steps": [400], "rate": 0.5},
        trained | {"setting": "S, T 1024, cut", "rate": 0.5},
        trained | {"optimizer": "muon", "rate": 0.5},
        trained | {"case": "MoE 2 of 8", "rate": 0.5},
    ]
    ask = lambda rows: choose_rate(rows, job, "dense", 0.5)
    assert ask([*search, *others, trained]) == (CONTINUED * 0.25, "default")
    # No start yet: what it would be trained at.
    rate = choose_rate(search, start, "dense", 0.5)[0]
    assert ask(search) == (CONTINUED * rate, "search")


def test_seconds_are_a_models_where_nothing_was_compiled_beside_it(tmp_path):
    chunks = lambda beside: {"all": 11, "compiled_meanwhile": beside}
    alone = row("dense + conv", 0, falling(1.5), step_seconds=0.2, chunks=chunks(10))
    beside = row("dense + conv", 1, falling(1.5), step_seconds=0.3, chunks=chunks(11))
    assert [r["step_seconds"] for r in with_one_speed([alone, beside])] == [0.2, 0.2]
    (kept,) = with_one_speed([beside])
    assert kept["step_seconds"] == 0.3
    mixed = with_one_speed([alone, beside | {"device": "another"}])
    assert [r["step_seconds"] for r in mixed] == [0.2, 0.3]
    local = row("local + conv", 0, falling(1.6), chunks=chunks(11))
    text = report([results(tmp_path, [alone, beside, local])], tmp_path, None)
    assert "Seconds of local + conv: another model was compiled" in text
    assert "| 1280 |" in text and "| 1920 |" not in text  # 6,400 steps of 0.2 s


def test_what_is_made_or_has_no_texts_yet_is_not_begun_ahead():
    options = argparse.Namespace(articles=None, python=None, tiny=True)
    made, job, begun = Builder(options), jobs("3", [], True)[0], []
    made.ahead.begin = lambda *given, **more: begun.append(given)
    made.begin(job)
    assert not begun and not made.busy  # a run doesn't wait for texts
    made.measures[job.place] = argparse.Namespace(arrays={"train": {}})
    made.begin(job)
    ((key, config, arrays, _),) = begun
    assert (key, config) == made._key(job) and arrays == {"train": {}}
    made.built[key] = "programs"
    made.begin(job)
    assert len(begun) == 1


def test_a_cut_model_goes_on_from_a_dense_ones_end(tmp_path):
    """The start is trained where its file isn't there; parts share a folder."""
    options = argparse.Namespace(
        out=tmp_path, minutes=60.0, articles=None, python=None, tiny=True,
        only=["dense, trained on"], seeds=[0], part=Part(1, 2),
    )  # fmt: skip
    # All of a seed is one part's.
    whose = [n for n in (1, 2) if Part(n, 2).has("cut", 0)]
    options.part = Part(whose[0], 2)
    assert Session(options)._jobs("cut", [])
    Session(options).run_block("cut")
    made = {run["case"]: run for run in Session(options).mine}
    assert set(made) == {"dense", "dense, trained on"}
    first, later = made["dense"], made["dense, trained on"]
    assert first["setting"] == later["setting"] and later["seed"] == 0
    assert_close(later["rate"], CONTINUED * first["rate"], 1e-9)
    # It goes on from what was learned, on other batches.
    assert later["curve"][0]["train"] < first["curve"][0]["train"] - 0.5
    (tmp_path / "models").rename(tmp_path / "kept")
    options.only = ["dense, 8 of 16 on"]
    Session(options).run_block("cut")
    again = {run["case"]: run for run in Session(options).mine}
    assert set(again) == {"dense", "dense, trained on", "dense, 8 of 16 on"}
    options.part, options.only = Part(3 - whose[0], 2), []
    assert not Session(options)._jobs("cut", [])
    cut = again["dense, 8 of 16 on"]
    assert cut["forward_flops_per_token"] < 0.9 * later["forward_flops_per_token"]
    assert cut["lengths"][-1]["leak"]["before"] < 1e-5
    assert first["curve"][0]["train"] - 0.5 > cut["curve"][0]["train"]
    options.part = Part(1, 1)
    whole = Session(options)
    whole._train = lambda job, rows: pytest.fail(f"{job.name} is trained twice")
    whole.run_block("cut")
    assert len(whole.rows) == 4 and not whole.mine
    files = sorted(tmp_path.glob("results-*.json"))
    text = report(files, tmp_path)
    assert "| dense, 8 of 16 on |" in text


def test_what_a_cut_starts_from_is_the_dense_models_function(tmp_path):
    """Every neuron is in one expert; what isn't fitted again has its bits."""
    config = dense("tiny", 64, TEXT)
    model = make_model(config.model, jax.random.key(0))
    _, params, buffers = nnx.split(model, nnx.Param, ...)
    save_model(tmp_path / "m.npz", config, params, buffers)
    same = go_on(tmp_path / "m.npz", config, config)[0]
    for name, array in flat_params(model).items():
        assert np.array_equal(array, named_leaves(same)[name]), name
    half = make(config, "cut", "dense, 8 of 16 on")[1]
    start, _ = go_on(tmp_path / "m.npz", config, half)
    name = "trunk.blocks.0.mlp.w_up"  # [L, E, D, F/E]
    cut, whole = (named_leaves(tree)[name] for tree in (start, params))
    neurons = lambda w: sorted(map(tuple, np.moveaxis(w[0], 1, 2).reshape(-1, 64)))
    assert cut.shape == (2, 16, 64, 12) and neurons(cut) == neurons(whole)


def test_the_page_of_the_protocol_names_what_is_planned():
    page = (PLANNED.parents[2] / "docs" / "evidence.md").read_text()
    assert len(page.splitlines()) < 90  # two screens
    for one in read_plan(PLANNED).comparisons:
        sides = f"| {one.first} | {one.second} | {one.size} | {one.at} |"
        assert sides in page, one.name


def test_what_a_text_holds_out_is_in_no_mixtures_training(tmp_path):
    """Each text's test is read alone, while training is on both."""
    made = np.random.default_rng(0).integers(97, 123, (60, 80), dtype=np.uint8)
    articles = [text.tobytes().decode() for text in made]
    (tmp_path / "texts").mkdir()
    files = {"wiki.jsonl": articles[:40], "texts/train.jsonl": articles[40:52]}
    files |= {"texts/valid.jsonl": articles[52:56], "texts/test.jsonl": articles[56:]}
    for name, texts in files.items():
        lines = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / name).write_text("".join(lines))
    options = argparse.Namespace(
        articles=tmp_path / "wiki.jsonl", python=tmp_path / "texts", tiny=True
    )
    job = jobs("3", [], True)[0]
    both = measure.train_data(job, options)
    assert len(both.mix) == 2
    # A folder of another machine makes no other configuration.
    moved = tuple(path.replace(str(tmp_path), "/elsewhere") for path in both.mix)
    keys = {program_key(job.config(dataclasses.replace(both, mix=mix))[1])
            for mix in (both.mix, moved)}  # fmt: skip
    assert len(keys) == 1 and moved != both.mix
    splits = {"valid_fraction": 0.1, "test_fraction": 0.1, "cache_dir": str(tmp_path)}

    def text(data, split):
        config = change(job.config(data)[1], data=splits)
        return np.asarray(prepare(config).array(split, "tokens")).tobytes()

    trained = text(both, "train")
    assert sum(article.encode() in trained for article in articles) > 40
    for name, data in measure.corpora(job, options).items():
        for split in ("valid", "test"):
            held = [a for a in articles if a.encode() in text(data, split)]
            assert len(held) > 1, (name, split)
            assert not any(article.encode() in trained for article in held)
        own = [a for a in articles if a.encode() in text(data, "train")]
        assert own and all(article.encode() in trained for article in own)


@pytest.mark.parametrize(
    ("picked", "said"),
    [
        (["1", "--only", "dense + conv", "dense + cnv"],
         "--only 'dense + cnv' is no model of block 1; did you mean dense + conv"),
        # Which lean union it has block 3 will say: any may be asked for, no other one.
        (["9", "--only", "UoME 1 of 16 laen + conv"],
         "is no model of block 9; did you mean UoME 1 of 16 lean + conv"),
        (["4", "--only", "MoE 2 of 9"], "did you mean MoE 2 of 8"),
        (["3", "--seeds", "0", "3"],
         "--seeds 3: block 3 has no such run; use some of [0, 1, 2]"),
        (["2", "--seeds", "0"], "use some of [100]"),
        # dense + conv has the seed in block 1 alone, MoE nowhere.
        (["1", "9", "--only", "dense + conv", "MoE 2 of 8 + conv", "--seeds", "1"],
         "--seeds 1: 'MoE 2 of 8 + conv' of block 1, 9 has none of these; use some of "
         "[0]"),
    ],
)  # fmt: skip
def test_a_name_or_seed_that_no_run_has_is_refused(picked, said, tmp_path, capsys):
    assert main(["--block", *picked, "--tiny", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr()
    assert said in told.err and "no run is left" not in told.out
    assert not (tmp_path / "out" / "results.json").exists()


def test_every_name_that_a_block_may_have_is_taken():
    """Before block 3 has run too; a name of any block asked for will do."""
    rows = [row(n, 0, [2.0], block="3") for n in (*LEAN, "MoE 2 of 8", "UoME 8 of 32")]
    for block in BLOCKS:
        made = {(job.name, job.seed) for job in jobs(block, rows, True)}
        assert made == listed(block, rows) and made <= listed(block, [])
        for name, seed in made:
            check_picked([name], [seed], [block], [])
    check_picked(["dense", "SMHA"], [0, 100], ["1", "2"], [])


def test_without_text_or_with_a_wrong_path_nothing_begins(tmp_path, capsys):
    assert main(["--block", "1", "--out", str(tmp_path)]) == 2
    assert "no text is given; give --articles" in capsys.readouterr().err
    args = ["--block", "1", "--out", str(tmp_path), "--articles", "gone.jsonl"]
    assert main(args) == 2
    assert "wikipedia: gone.jsonl doesn't exist" in capsys.readouterr().err
