"""The prefetch thread is one step ahead, in order, and passes errors on."""

from __future__ import annotations

import threading

import pytest

from uoe_jax.data import prefetch


def test_batches_come_in_order_from_any_step():
    with prefetch(lambda step: step * step, 5) as batches:
        assert [next(batches) for _ in range(4)] == [25, 36, 49, 64]


def test_it_ends_before_the_end_step():
    assert list(prefetch(lambda step: step, 2, 5)) == [2, 3, 4]
    assert list(prefetch(lambda step: step, 2, 2)) == []


def test_the_next_batch_is_made_while_this_one_is_used():
    made = {step: threading.Event() for step in range(3)}

    def make(step):
        made[step].set()
        return step

    with prefetch(make, 0, 3) as batches:
        assert next(batches) == 0
        # Nobody asked for batch 1 yet.
        assert made[1].wait(timeout=10)
        assert not made[2].is_set()


def test_an_error_is_raised_where_its_batch_is_asked_for():
    def make(step):
        if step == 1:
            raise ValueError("broken batch")
        return step

    batches = prefetch(make, 0)
    assert next(batches) == 0
    with pytest.raises(ValueError, match="broken batch"):
        next(batches)
    with pytest.raises(StopIteration):
        next(batches)


def test_close_ends_the_thread():
    with prefetch(lambda step: step, 0) as batches:
        next(batches)
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    assert list(batches) == []
