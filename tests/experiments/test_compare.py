"""Planned comparisons: none besides is made, and intervals are the textbook's."""

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.shared.compare import (
    Comparison,
    Difference,
    Plan,
    differ,
    holm,
    judge,
    p_value,
    pooled,
    read_plan,
)
from experiments.shared.fronts import equal_spending, fit_law, law_intervals, loss_at
from tests.compare import assert_close
from uoe_jax.errors import ConfigError
from uoe_jax.files import format_json

ONE = Comparison(name="one", headline=1, first="union", second="dense", size="M")
TWO = dataclasses.replace(ONE, name="two", at="seconds", margin=0.02)
PLAN = Plan((ONE, TWO))


def test_a_comparison_that_is_not_planned_is_refused():
    assert PLAN.find("union", "dense", "M", "seconds") is TWO
    with pytest.raises(ConfigError, match="union less moe at M by equal tokens isn't"):
        PLAN.find("union", "moe", "M", "tokens")
    with pytest.raises(ConfigError, match="'three' isn't planned"):
        judge(PLAN, {"three": Difference(-0.1, 0.01, 10)})


def test_what_is_planned_after_the_first_run_is_refused():
    noted = PLAN.digests()
    PLAN.check(noted)
    later = Plan((ONE, dataclasses.replace(TWO, margin=0.01)))
    with pytest.raises(ConfigError, match="'two' isn't planned: it was written or ch"):
        later.check(noted)
    Plan((TWO,)).check(noted)  # fewer are no gain: see below


def test_plans_are_read_and_checked(tmp_path):
    file = tmp_path / "planned.json"
    row = dataclasses.asdict(ONE)
    file.write_text(format_json([row, dataclasses.asdict(TWO)]))
    assert read_plan(file) == PLAN
    file.write_text(format_json([row, row]))
    with pytest.raises(ConfigError, match="'one' twice"):
        read_plan(file)
    file.write_text(format_json([row | {"claim": "above"}]))
    with pytest.raises(ConfigError, match="claim"):
        read_plan(file)
    file.write_text(format_json([row | {"winner": "union"}]))
    with pytest.raises(ConfigError, match="no field 'winner'"):
        read_plan(file)


RUNS = st.lists(st.floats(1, 2), min_size=2, max_size=6)


@given(first=RUNS, second=RUNS)
@settings(max_examples=60, deadline=None)
def test_of_two_models_alone_it_is_students_test(first, second):
    spread = pooled({"a": first, "b": second})
    found = differ(first, second, spread)
    if spread.deviation < 1e-4:  # scipy's own sums cancel there
        return
    told = stats.ttest_ind(first, second)
    interval = told.confidence_interval(0.95)
    assert abs(p_value(found, ONE) - told.pvalue) < 1e-6
    assert abs(found.mean + found.half - interval.high) < 1e-9
    assert abs(found.mean - found.half - interval.low) < 1e-9


def test_every_model_tells_how_runs_spread():
    spread = pooled({"a": [1.0, 1.2], "b": [2.0, 2.2, 2.4], "alone": [5.0]})
    assert spread.freedom == 3
    assert_close(spread.deviation, math.sqrt((0.02 + 0.08) / 3), 1e-12)
    with pytest.raises(ConfigError, match="no model has two seeds"):
        pooled({"a": [1.0], "b": [2.0]})


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
@settings(max_examples=100, deadline=None)
def test_holm_by_its_definition(values):
    """A hypothesis falls at a level if all with smaller p fall, each at its own."""
    adjusted = holm(values)
    order = sorted(range(len(values)), key=lambda i: values[i])
    for place, number in enumerate(order):
        steps = [
            (len(values) - k) * values[i] for k, i in enumerate(order[: place + 1])
        ]
        assert adjusted[number] == min(max(steps), 1.0)


def test_claims_need_their_margin_and_their_certainty():
    verdict = lambda **found: {
        v.comparison.name: v.holds
        for v in judge(PLAN, {n: Difference(*d) for n, d in found.items()})
    }
    sure, vague = (-0.03, 0.002, 30), (-0.03, 0.02, 30)
    assert verdict(one=sure, two=sure) == {"one": True, "two": True}
    assert verdict(one=sure) == {"one": True, "two": None}
    assert verdict(one=vague, two=(-0.01, 0.001, 30)) == {"one": False, "two": False}
    assert verdict(one=(0.03, 0.002, 30))["one"] is False
    # p of 0.03 alone is enough; as one of two it isn't, measured or not.
    half = float(stats.t.isf(0.015, 30))
    assert verdict(one=(-half * 0.01, 0.01, 30))["one"] is False
    alone = judge(Plan((ONE,)), {"one": Difference(-half * 0.01, 0.01, 30)})
    assert alone[0].holds


@pytest.mark.parametrize(
    ("claim", "margin", "mean", "error", "said"),
    [
        ("below", 0.0, -0.01, 0.01, "open"),  # nothing and 0.03 below
        ("below", 0.0, 0.03, 0.01, "no"),
        ("below", 0.0, -0.03, 0.002, "yes"),
        ("below", 0.02, -0.01, 0.002, "no"),  # below, but surely not by 0.02
        ("below", 0.02, -0.01, 0.01, "open"),
        ("within", 0.005, 0.08, 0.01, "no"),
        ("within", 0.005, 0.01, 0.005, "open"),
        ("within", 0.005, -0.03, 0.005, "yes"),
    ],
)
def test_what_is_neither_shown_nor_refused_is_open(claim, margin, mean, error, said):
    planned = dataclasses.replace(ONE, claim=claim, margin=margin)
    found = {"one": Difference(mean, error, 30)}
    (verdict,) = judge(Plan((planned,)), found)
    assert (verdict.holds, verdict.open) == (said == "yes", said == "open")
    told = verdict.say("yes", "no:")
    wanted = {"yes": "yes", "no": f"no: {ONE.failed}"}
    assert told == wanted.get(said) or (said == "open" and told.startswith("open: "))
    (none,) = judge(Plan((planned,)), {})
    assert none.holds is None and not none.open


def test_within_a_margin_refuses_what_is_as_bad_as_it():
    near = dataclasses.replace(ONE, claim="within", margin=0.005)
    holds = lambda *d: judge(Plan((near,)), {"one": Difference(*d)})[0].holds
    assert holds(0.001, 0.001, 30) and holds(-0.1, 0.001, 30)
    assert not holds(0.004, 0.002, 30) and not holds(0.02, 0.001, 30)
    # One-sided: 1.697 standard errors of 30 degrees of freedom are 5%.
    assert holds(0.005 - 1.70e-3, 1e-3, 30) and not holds(0.005 - 1.69e-3, 1e-3, 30)
    assert p_value(Difference(0.0, 0.0, 1), near) == 0.0


@given(
    scale=st.floats(0.5, 3),
    exponent=st.floats(0.01, 0.5),
    spent=st.floats(1.0, 8.0),
)
@settings(max_examples=60, deadline=None)
def test_interpolation_is_exact_on_power_laws(scale, exponent, spent):
    law = lambda x: scale * x**-exponent
    front = [(x, law(x)) for x in (4.0, 1.0, 2.0, 8.0)]
    assert abs(loss_at(front, spent) - law(spent)) < 1e-9


def test_nothing_is_extrapolated():
    front = [(1.0, 2.0), (8.0, 1.0)]
    assert loss_at(front, 0.99) is None and loss_at(front, 8.01) is None
    assert loss_at(front, 1.0) == 2.0 and loss_at([], 1.0) is None
    assert loss_at([(1.0, 2.0)], 1.0) == 2.0


def test_models_are_compared_where_both_have_spent_as_much():
    law = lambda a: lambda x: a * x**-0.1
    fast = [[(x, law(1.5)(x) + s) for x in (1.0, 2.0, 4.0)] for s in (0.0, 0.1)]
    slow = [[(1.5 * x, law(1.4)(1.5 * x)) for x in (1.0, 2.0, 4.0)]]
    found = equal_spending(slow, fast)
    # At the fast one's lengths, but its shortest: there the slow one has no length yet.
    assert [(one.length, one.spent) for one in found] == [(1, 2.0), (2, 4.0)]
    for one in found:
        assert_close(one.first, [law(1.4)(one.spent)], 1e-9)
        assert_close(one.second, [law(1.5)(one.spent) + s for s in (0.0, 0.1)], 1e-9)


def test_a_seed_that_diverged_is_left_out_where_it_has_no_length():
    whole, short = [(1.0, 3.0), (2.0, 2.0)], [(1.0, 3.1)]
    slow = [[(0.9, 3.5), (4.0, 1.9)], []]
    for fast in ([whole, short, []], [short, [], whole]):
        found = equal_spending(slow, fast)
        assert [(one.spent, len(one.second)) for one in found] == [(1.0, 2), (2.0, 1)]
    assert equal_spending([[]], [whole]) == []


def test_what_is_no_number_holds_nothing():
    near = dataclasses.replace(ONE, claim="within", margin=0.005)
    for found in (Difference(math.nan, 0.1, 5), Difference(0.0, math.nan, 5)):
        with pytest.raises(ConfigError, match="'one' has a difference that isn't"):
            judge(Plan((near,)), {"one": found})


def test_a_law_is_found_again_with_its_multiplier():
    scales = {"dense": 1.2, "union": 1.0}
    points = {
        name: [(c, 0.9 + scale * c**-0.2) for c in (1.0, 4.0, 16.0, 64.0)]
        for name, scale in scales.items()
    }
    law = fit_law(points)
    assert_close([law.floor, law.exponent], [0.9, 0.2], 1e-4)
    assert_close(law.loss("dense", 256.0), 0.9 + 1.2 * 256**-0.2, 1e-6)
    assert_close(law.multiplier("union", "dense"), 1.2**5, 1e-3)
    bounds = law_intervals(points, 0.001, "union", "dense")
    assert bounds["exponent"][0] < 0.2 < bounds["exponent"][1]
    assert bounds["multiplier"][0] < 1.2**5 < bounds["multiplier"][1]
    with pytest.raises(ConfigError, match="2 points of 1 families"):
        fit_law({"dense": points["dense"][:2]})
