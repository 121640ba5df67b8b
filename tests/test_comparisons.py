"""No test holds computed floats to their own size alone; what is used instead."""

import ast
from pathlib import Path

import numpy as np
import pytest

from tests.compare import assert_close

TESTS = Path(__file__).parent
# The argument that says what is allowed whatever the size; of what has none, None.
ABSOLUTE = {
    "assert_allclose": "atol",
    "allclose": "atol",
    "assert_trees_all_close": "atol",
    "assert_allclose_with_treedef": "atol",
    "isclose": "atol",
    "math.isclose": "abs_tol",
    "approx": "abs",
    "assert_array_max_ulp": None,
    "assert_array_almost_equal_nulp": None,
    "assert_approx_equal": None,
}
# Where a share of each number is meant, by file or folder, with the function if one:
EXEMPT = {
    "hardware": "Python's floats, by closed formulas: no array is added up",
    "ops/suite.py::compare": "bfloat16 rounds each entry by a share of it",
    "ops/test_swiglu.py::test_factors_of_another_dtype_get_their_gradient_in_it": (
        "bfloat16 rounds each entry by a share of it"
    ),
}


def is_zero(node: ast.expr | None) -> bool:
    return node is None or (isinstance(node, ast.Constant) and not node.value)


def relative_calls(text: str) -> list[tuple[str, int]]:
    """Function and line of every comparison that a relative tolerance decides.

    It is one with no absolute tolerance, or with a relative one beside it: next to a
    tiny absolute one, that is the one which counts.
    """
    found = []

    def walk(node, function):
        if isinstance(node, ast.FunctionDef) and not function:
            function = node.name
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            short = name.rsplit(".", 1)[-1]
            key = name if name in ABSOLUTE else short
            given = {word.arg: word.value for word in node.keywords}
            if key in ABSOLUTE and (
                is_zero(given.get(ABSOLUTE[key]))
                or not is_zero(given.get("rtol", given.get("rel")))
            ):
                found.append((function, node.lineno))
        for child in ast.iter_child_nodes(node):
            walk(child, function)

    walk(ast.parse(text), "")
    return found


def is_exempt(path: str, function: str) -> bool:
    names = {path.split("/")[0], path, f"{path}::{function}"}
    return bool(names & EXEMPT.keys())


def test_no_comparison_of_computed_floats_is_relative_alone():
    offenders, used = [], set()
    for file in sorted(TESTS.rglob("*.py")):
        path = file.relative_to(TESTS).as_posix()
        for function, line in relative_calls(file.read_text()):
            if is_exempt(path, function):
                used |= {path.split("/")[0], path, f"{path}::{function}"}
            else:
                offenders.append(f"tests/{path}:{line} in {function}")
    assert not offenders, (
        "use compare.assert_close, which holds entries to the largest:\n"
        + "\n".join(offenders)
    )
    assert EXEMPT.keys() <= used, f"exempt, but not there: {EXEMPT.keys() - used}"


@pytest.mark.parametrize(
    ("call", "relative"),
    [
        ("np.testing.assert_allclose(a, b)", True),
        ("np.testing.assert_allclose(a, b, rtol=1e-5)", True),
        ("np.testing.assert_allclose(a, b, rtol=1e-5, atol=0)", True),
        ("np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-30)", True),
        ("np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)", False),
        ("np.testing.assert_allclose(a, b, atol=1e-5)", False),
        ("assert a == pytest.approx(b)", True),
        ("assert a == pytest.approx(b, rel=1e-6)", True),
        ("assert a == pytest.approx(b, abs=1e-6)", False),
        ("assert math.isclose(a, b, rel_tol=1e-6)", True),
        ("assert_close(a, b, 1e-5)", False),
    ],
)
def test_relative_comparisons_are_found(call, relative):
    found = relative_calls(f"def test():\n    {call}\n")
    assert found == ([("test", 2)] if relative else [])


def test_errors_are_measured_against_the_largest_entry():
    assert_close([1.0, 4e-4 + 9e-6], [1.0, 4e-4], 1e-5)
    assert_close(np.ones((2, 3)), 1, 0)
    assert_close([np.inf, 1.0], [np.inf, 1.0], 0)
    assert_close([1e-6], [0.0], 1e-5, least=1.0)
    with pytest.raises(AssertionError, match=r"w: 1 of 2 entries .* at \(1,\): 0.0004"):
        assert_close([1.0, 4e-4 + 2e-5], [1.0, 4e-4], 1e-5, about="w")


@pytest.mark.parametrize(
    ("actual", "desired"),
    [
        ([1.0, np.nan], [1.0, 0.0]),
        ([1.0, 0.0], [1.0, np.nan]),
        ([np.nan], [np.nan]),
        ([np.inf], [1.0]),
        ([1.0], [[1.0]]),
        ([1.0, 1.0], [1.0]),
        ([1e-9], [0.0]),
    ],
)
def test_what_isnt_close_is_refused(actual, desired):
    with pytest.raises(AssertionError):
        assert_close(actual, desired, 1e-3)
