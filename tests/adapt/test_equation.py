"""Equations rewritten for factors: tables, and random ones against one big einsum."""

import string

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.adapt.evaluate.equation import (
    factorize_equation,
    lora_network,
    plan_contraction,
    split_equation,
    tucker_network,
    unused_letters,
    weight_roles,
)
from uoe_jax.errors import ConfigError

SIZES = dict(b=2, t=50, d=32, j=4, g=2, h=8, e=3, f=40, x=7, v=90, R=4, A=3, B=5, C=2)


@pytest.mark.parametrize(
    ("equation", "roles"),
    [
        ("btd,df->btf", ("", "d", "f")),
        ("btd,edf->btef", ("", "d", "ef")),
        ("ecd,edf->ecf", ("e", "d", "f")),
        ("btd,djgh->btjgh", ("", "d", "jgh")),
        ("btjgh,jghd->btd", ("", "jgh", "d")),
        ("BTNH,NHD->BTD", ("", "NH", "D")),
    ],
)
def test_roles_follow_from_the_equation(equation, roles):
    assert tuple(weight_roles(equation)) == roles


@pytest.mark.parametrize(
    ("equation", "steps"),
    [
        ("btd,df->btf", ["btd,dR->btR", "btR,Rf->btf"]),
        ("btd,edf->btef", ["btd,dR->btR", "btR,Ref->btef"]),
        ("btd,djgh->btjgh", ["btd,dR->btR", "btR,Rjgh->btjgh"]),
        ("btjgh,jghd->btd", ["btjgh,jghR->btR", "btR,Rd->btd"]),
    ],
)
def test_lora_equations_from_a_table(equation, steps):
    network = lora_network(weight_roles(equation), "R")
    found = factorize_equation(equation, network, SIZES)
    assert [same_letters(a) for a in found] == [same_letters(a) for a in steps]


def same_letters(equation):
    """An equation with the letters of each word in order: their order is free."""
    inputs, output = split_equation(equation)
    return sorted("".join(sorted(word)) for word in inputs), "".join(sorted(output))


def test_tucker_equations_from_a_table():
    network = tucker_network("", ["d", "f"], "AB")
    assert network == ("AB", "dA", "fB")
    found = factorize_equation("btd,df->btf", network, SIZES)
    # The core joins a factor: before the 100 rows, not at each of them.
    steps = ("btd,dA->btA", "AB,fB->Af", "btA,Af->btf")
    assert [same_letters(a) for a in found] == [same_letters(a) for a in steps]
    experts = tucker_network("e", ["d", "f"], "AB", shared="e")
    assert experts == ("eAB", "dA", "fB")
    own = tucker_network("e", ["d", "f"], "AB")
    assert own == ("eAB", "edA", "efB")


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_plans_equal_one_einsum_and_count_their_flops(data):
    letters = "abcdeR"
    words = data.draw(
        st.lists(
            st.lists(st.sampled_from(letters), min_size=1, max_size=3, unique=True),
            min_size=1,
            max_size=5,
        )
    )
    words = ["".join(word) for word in words]
    seen = sorted(set("".join(words)))
    output = "".join(data.draw(st.permutations(seen))[: data.draw(st.integers(0, 3))])
    sizes = {a: data.draw(st.integers(1, 4)) for a in seen}
    draw = np.random.default_rng(0)
    arrays = [draw.normal(size=[sizes[a] for a in word]) for word in words]
    plan = plan_contraction(words, output, sizes)
    stack, flops = list(arrays), 0
    for step in plan.steps:
        (a, b), _ = split_equation(step.equation)
        flops += 2 * np.prod([sizes[c] for c in set(a + b)], dtype=int)
        stack.append(np.einsum(step.equation, *(stack[i] for i in step.pair)))
    got = np.einsum(f"{plan.last}->{output}", stack[-1])
    want = np.einsum(f"{','.join(words)}->{output}", *arrays)
    assert_close(got, want, 1e-10)
    assert plan.flops == flops == sum(step.flops for step in plan.steps)


def test_plan_is_the_cheapest_order():
    # Left to right costs 2 (2 64 4 + 2 4 64); the other order forms the 64 x 64 delta.
    sizes = dict(t=2, d=64, R=4, f=64)
    plan = plan_contraction(("td", "dR", "Rf"), "tf", sizes)
    assert plan.flops == 2 * (2 * 64 * 4 + 2 * 4 * 64)
    many = plan_contraction(("td", "dR", "Rf"), "tf", sizes | {"t": 4096})
    assert many.flops == 2 * 2 * 4096 * 64 * 4


@pytest.mark.parametrize(
    ("equation", "words"),
    [
        ("btd,df", "write it as"),
        ("bt.d,df->btf", "letters only"),
        ("bdd,df->bf", "repeats"),
        ("btd,df->btz", "'z'"),
        ("btd,df,fg->btg", "3 operands"),
        ("btd,dfk->btf", "'k'"),
    ],
)
def test_bad_equations_are_named(equation, words):
    with pytest.raises(ConfigError, match=words):
        weight_roles(equation)


def test_letters_run_out_with_a_message():
    assert unused_letters("ab", 2) == "cd"
    with pytest.raises(ConfigError, match="letters"):
        unused_letters(string.ascii_letters, 1)
