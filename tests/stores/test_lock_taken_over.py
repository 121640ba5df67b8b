"""Two processes find the lock of a store's run silent at once: one of them has it."""

import json
import time

import pytest

from uoe_jax.runs import lock, store_lock
from uoe_jax.runs.lock import Locked
from uoe_jax.runs.store_lock import StoreLock
from uoe_jax.runs.stored import LOCK
from uoe_jax.stores.mirror import Mirror
from uoe_jax.stores.objects import ANSWER_SECONDS, Objects, StoreError

SETTLE_SECONDS = store_lock.SETTLE_SECONDS  # before tests shorten it


@pytest.fixture
def silent(store, tmp_path, monkeypatch):
    """The lock of a holder on another machine that gives no more sign of life."""
    monkeypatch.setattr(lock, "GONE_SECONDS", 0.05)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    held = store / "b/run/.lock"
    held.parent.mkdir(parents=True)
    held.write_text(json.dumps({"pid": 1, "host": "gone", "token": "gone"}))
    return held


def lock_of(folder):
    kept = lambda name: name == LOCK
    return StoreLock(Mirror("bucket://b/run", folder, kept=kept, own=True), print)


@pytest.mark.parametrize("share", [0.1, 0.9, 1.0])
def test_a_slow_write_of_another_is_waited_for(silent, tmp_path, monkeypatch, share):
    """It lands at the end of what a request may take."""
    mine, others = lock_of(tmp_path / "a"), {"pid": 2, "host": "b", "token": "other"}
    monkeypatch.setattr(store_lock, "SETTLE_SECONDS", SETTLE_SECONDS)
    sleep = time.sleep

    def settle(seconds):
        if seconds < 1:  # between two looks at the silent one
            sleep(seconds)
        elif seconds >= share * ANSWER_SECONDS:
            silent.write_text(json.dumps(others))

    monkeypatch.setattr(store_lock.time, "sleep", settle)
    with pytest.raises(Locked, match="another process is training in bucket://b/run"):
        mine.acquire()
    assert json.loads(silent.read_text()) == others


def test_who_is_slower_than_others_wait_does_not_hold_it(silent, tmp_path, monkeypatch):
    mine, write, clock = lock_of(tmp_path / "a"), Objects.write, time.monotonic
    late = []

    def slowly(self, name, content):
        write(self, name, content)
        late.append(ANSWER_SECONDS + 1)

    monkeypatch.setattr(Objects, "write", slowly)
    monkeypatch.setattr(store_lock.time, "monotonic", lambda: clock() + sum(late))
    with pytest.raises(StoreError, match="took over 15 s to take the lock of process"):
        mine.acquire()


def test_of_two_that_take_it_over_the_last_to_write_holds_it(
    silent, tmp_path, monkeypatch
):
    first, second = lock_of(tmp_path / "a"), lock_of(tmp_path / "b")
    before, owner = iter([json.loads(silent.read_text())]), second._owner
    sleep, slept = time.sleep, []

    def settle(seconds):
        if seconds == store_lock.SETTLE_SECONDS and not slept:
            slept.append(seconds)
            # As if it had found the old holder silent before the first one wrote.
            monkeypatch.setattr(second, "_owner", lambda: next(before, None) or owner())
            monkeypatch.setattr(second, "_stays_silent", lambda owner: time.monotonic())
            second.acquire()
        else:
            sleep(seconds)

    monkeypatch.setattr(store_lock.time, "sleep", settle)
    with pytest.raises(Locked, match="another process is training"):
        first.acquire()
    second.look()
    second.check()
    second.release()
    assert not silent.exists()
