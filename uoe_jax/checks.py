"""Checks of what a function is called with: one line of value, rule and fix.

They cost nothing in a compiled program: shapes and dtypes are read while it is traced,
and numbers only where they are at hand.
"""

from __future__ import annotations

import functools
import inspect
import math
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.errors import ConfigError, nearest, shown

Given = dict[str, Any]  # arguments of a call by name, defaults included


def checked[**P, R](
    settle: Callable[[Given], None],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that gives a call's arguments to `settle` first.

    It raises ConfigError for what can't be, and may replace lists by arrays.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ConfigError(
                    _wrong_call(function.__name__, signature, kwargs, error)
                ) from None
            bound.apply_defaults()
            settle(bound.arguments)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


def _wrong_call(
    name: str, signature: inspect.Signature, kwargs: Given, error: TypeError
) -> str:
    known = [n for n in signature.parameters if n != "self"]
    for word in kwargs:
        if word not in known:
            return f"{name} has no argument {word!r}; {nearest(word, known)}"
    return f"{name}: {error}; it takes {', '.join(known)}"


def is_concrete(value: Any) -> bool:
    """Whether an array's numbers can be read here and now."""
    if isinstance(value, jax.core.Tracer):
        return False
    return isinstance(value, np.ndarray) or (
        isinstance(value, jax.Array) and value.is_fully_addressable
    )


def floats(given: Given, name: str, form: str) -> None:
    """Check that an argument is an array of real numbers with the dimensions of `form`.

    `form` is as in a jaxtyping annotation: "M G H".
    """
    value = _ranked(given, name, form)
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ConfigError(
            f"{name} is {value.dtype}; it must hold real numbers, cast it: "
            f"{name}.astype(jnp.float32)"
        )


def ints(given: Given, name: str, form: str) -> None:
    """Check that an argument is an array of whole numbers; lists become one."""
    value = given[name]
    if isinstance(value, (list, tuple)):
        try:
            value = np.asarray(value)
        except ValueError:
            value = np.asarray(None)
        if value.dtype.kind in "iu" and value.size and abs(value).max() < 2**31:
            given[name] = value = jnp.asarray(value, jnp.int32)
        else:
            raise ConfigError(
                f"{name} is {shown(given[name])}; it must hold whole numbers of 32 "
                f"bits, as an array {_brackets(form)}"
            )
    value = _ranked(given, name, form)
    if not jnp.issubdtype(value.dtype, jnp.integer):
        raise ConfigError(
            f"{name} is {value.dtype}; it must hold whole numbers, cast it: "
            f"{name}.astype(jnp.int32)"
        )


def _ranked(given: Given, name: str, form: str) -> Any:
    value = given[name]
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        given[name] = value = jnp.asarray(value)
    if not isinstance(value, jax.Array):
        raise ConfigError(
            f"{name} is {_about(value)}; pass a jax array {_brackets(form)}"
        )
    if value.ndim != len(form.split()):
        raise ConfigError(
            f"{name} is {list(value.shape)}; it must have {len(form.split())} "
            f"dimensions, {_brackets(form)}"
        )
    return value


def _brackets(form: str) -> str:
    return f"[{', '.join(form.split())}]"


def _about(value: Any) -> str:
    if value is None or isinstance(value, (str, bool, numbers.Number)):
        return shown(value)
    if isinstance(value, (jax.Array, np.ndarray)):
        return f"{value.dtype} {list(value.shape)}"
    return f"a {type(value).__name__}"


def ascending(given: Given, name: str, rows: int, what: str = "rows") -> None:
    """Check that offsets don't descend and stay within `rows`, where they are known."""
    if not is_concrete(given[name]):
        return
    values = np.asarray(given[name])
    down = np.flatnonzero(np.diff(values) < 0)
    if len(down):
        i = int(down[0]) + 1
        raise ConfigError(
            f"{name}[{i}] is {values[i]} after {values[i - 1]}; they must not descend"
        )
    if len(values) and not 0 <= values[0] <= values[-1] <= rows:
        raise ConfigError(
            f"{name} go from {values[0]} to {values[-1]} beside {rows} {what}; they "
            f"must stay within 0 to {rows}"
        )


def within(given: Given, name: str, count: int, what: str) -> None:
    """Check that ids are 0 to `count` - 1, where they are known."""
    if not is_concrete(given[name]) or not given[name].size:
        return
    values = np.asarray(given[name])
    for value in (values.min(), values.max()):
        if not 0 <= value < count:
            raise ConfigError(
                f"{name} holds {value} beside {count} {what}; use 0 to {count - 1}"
            )


def flag(given: Given, name: str) -> None:
    """Check that an argument is True or False."""
    if not isinstance(given[name], (bool, np.bool_)):
        raise ConfigError(f"{name} is {_about(given[name])}; it must be True or False")
    given[name] = bool(given[name])


def whole(given: Given, name: str, *, optional: bool = False) -> None:
    """Check that an argument is a whole number, or None where that is a choice."""
    value = given[name]
    if value is None and optional:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        rest = ", or None" if optional else ""
        raise ConfigError(f"{name} is {_about(value)}; it must be a whole number{rest}")
    given[name] = int(value)


def number(given: Given, name: str, *, positive: bool = False) -> None:
    """Check that an argument is None or a finite number; a traced one is taken."""
    value = given[name]
    if value is None or (isinstance(value, jax.Array) and value.ndim == 0):
        return
    real = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or (positive and value <= 0):
        rule = "a positive number" if positive else "a finite number"
        raise ConfigError(f"{name} is {_about(value)}; it must be {rule}, or None")


def key(given: Given, name: str) -> None:
    """Check that an argument is one random key, or None; raw numbers become one."""
    value = given[name]
    if value is None:
        return
    typed = isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    )
    plain = isinstance(value, (jax.Array, np.ndarray)) and value.dtype == jnp.uint32
    if not (typed and value.ndim == 0) and not (plain and value.ndim == 1):
        raise ConfigError(
            f"{name} is {_about(value)}; it must be one random key, as "
            "jax.random.key(0), or None"
        )
    given[name] = value if typed else jax.random.wrap_key_data(jnp.asarray(value))


def backend(given: Given) -> None:
    """Check that `implementation` is a name or None; `dispatch` knows the names."""
    value = given["implementation"]
    if value is not None and not isinstance(value, str):
        raise ConfigError(
            f"implementation is {_about(value)}; it must be a backend's name, or None"
        )
