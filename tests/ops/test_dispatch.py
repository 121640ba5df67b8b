from __future__ import annotations

import jax.numpy as jnp
import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.ops import (
    dense_attention,
    grouped_matmul,
    measured,
    segment_attention,
)
from uoe_jax.ops.dispatch import dispatch

pytestmark = pytest.mark.both_jax


def refuse(x):
    raise NotImplementedError("it is Tuesday")


BACKENDS = {"fast": refuse, "slow": lambda x: x + 1}


def test_first_backend_that_can_serve_is_used():
    assert dispatch("op", BACKENDS, None, 1) == 2


def test_forced_backend_gives_its_reason_and_the_others():
    with pytest.raises(ConfigError) as caught:
        dispatch("op", BACKENDS, "fast", 1)
    text = str(caught.value)
    assert "it is Tuesday" in text and "use slow or None" in text


def test_no_backend_left_lists_every_reason():
    with pytest.raises(ConfigError, match="fast can't.*; slow can't"):
        dispatch("op", {"fast": refuse, "slow": refuse}, None, 1)


def test_unknown_backend_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean slow"):
        dispatch("op", BACKENDS, "slov", 1)


def test_measured_order_comes_first(monkeypatch):
    """Near a measured shape the fastest serves; elsewhere the built-in order does."""
    found = {"shape": {"rows": 512, "dtype": "float32"}, "fastest": ["b", "gone"]}
    monkeypatch.setattr(measured, "load", lambda: {"order": {"op": [found]}})
    backends = {"a": lambda: "a", "b": lambda: "b"}
    for rows, dtype, want in (
        (512, "float32", "b"),
        (512 * measured.REACH, "float32", "b"),
        (513 * measured.REACH, "float32", "a"),
        (512, "bfloat16", "a"),
    ):
        shape = {"rows": rows, "dtype": dtype}
        assert dispatch("op", backends, None, shape=shape) == want
    assert dispatch("op", backends, "a", shape=found["shape"]) == "a"


def test_nearest_measurement_answers():
    entries = [{"shape": {"rows": n, "causal": True}} for n in (64, 1024)]
    near = lambda rows, causal=True: measured.nearest(
        entries, {"rows": rows, "causal": causal}
    )
    assert near(100) is entries[0] and near(900) is entries[1]
    assert near(100, causal=False) is None and near(10**6) is None
    assert measured.nearest(entries, {"causal": True}) is None


def test_cudnn_says_why_it_cannot_serve():
    x = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ConfigError, match="needs an NVIDIA GPU, not cpu"):
        dense_attention(x, x, x, causal=True, implementation="cudnn")


q, k, offsets = jnp.zeros((6, 2, 8)), jnp.zeros((6, 8)), jnp.arange(3)
x, w = jnp.zeros((6, 8)), jnp.zeros((2, 8, 4))
sequence = jnp.zeros((2, 6, 4, 8))


@pytest.mark.parametrize(
    ("call", "part"),
    [
        (lambda: segment_attention(q, k[:, :4], k, offsets, causal=True), "[6, 8]"),
        (lambda: segment_attention(q, k, k[:3], offsets, causal=True), "[6, 8]"),
        (
            lambda: segment_attention(
                q.astype(jnp.bfloat16), k, k, offsets, causal=True
            ),
            "one dtype",
        ),
        (lambda: segment_attention(q, k, k, offsets[:1], causal=True), "S + 1"),
        (
            lambda: segment_attention(q, k, k, offsets, causal=True, window=0),
            "must be >= 1",
        ),
        (lambda: grouped_matmul(x[:, :4], w, offsets), "I must be 4"),
        (lambda: grouped_matmul(x, w, offsets[:2]), "it needs 3"),
        (lambda: grouped_matmul(x.astype(jnp.bfloat16), w, offsets), "one dtype"),
        (
            lambda: dense_attention(
                sequence, sequence[:, :, :3], sequence[:, :, :3], causal=True
            ),
            "K dividing 4",
        ),
        (
            lambda: dense_attention(
                sequence, sequence, sequence, causal=True, window=-1
            ),
            "must be >= 1",
        ),
    ],
)
def test_bad_arguments_give_one_clear_line(call, part):
    with pytest.raises(ConfigError) as caught:
        call()
    assert part in str(caught.value) and "\n" not in str(caught.value)
