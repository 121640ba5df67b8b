"""Who is said to hold the other processes up: only one that they have waited for."""

import socket
import threading
import time

import pytest

from tests.train.tiny_runs import make_tiny
from uoe_jax.train import loop, train, watch
from uoe_jax.train.watch import BEAT_SECONDS, BEHIND_SECONDS, Watch

LONG = 2 * BEHIND_SECONDS  # seconds of one step


class First:
    """The first of some processes, with words of the others and a clock by hand."""

    def __init__(self, monkeypatch, count):
        self.said = []
        monkeypatch.setattr(watch, "_say", self.said.append)
        self.watch = Watch(0, count, lambda text: text)
        self.watch._name = "process 0"
        self.watch._trains = threading.get_ident()
        self.others = [Other() for _ in range(1, count)]
        for number, other in enumerate(self.others, 1):
            self.watch._peers[other] = f"process {number}"
        self.now = 1000.0

    def hear(self, *steps):
        """Of the other processes; None: not a word."""
        for other, step in zip(self.others, steps, strict=True):
            if step is not None:
                self.watch._note_step(other, step)

    def wait(self, seconds):
        """Look for who is behind at each beat, as the watch's thread does."""
        end = self.now + seconds
        while self.now < end:
            self.now += BEAT_SECONDS
            self.watch._find_behind(self.now)


class Other:
    """The connection to another process."""

    def __init__(self):
        self.told = []

    def send(self, text):
        self.told.append(text)


def test_a_step_that_takes_all_long_is_nobodys_fault(monkeypatch):
    first = First(monkeypatch, 3)
    for step in range(4):
        first.watch.at(step)
        first.wait(2 * BEAT_SECONDS)  # the others' words come later
        first.hear(step, None)
        first.wait(BEAT_SECONDS)
        first.hear(step, step)
        first.wait(LONG)
    for step in range(4, 8):  # and now this one is the last to say so
        first.hear(step, step)
        first.wait(2 * BEAT_SECONDS)
        first.watch.at(step)
        first.wait(LONG)
    assert first.said == []
    assert all(other.told == [] for other in first.others)


def test_who_is_always_a_little_behind_is_not_blamed(monkeypatch):
    """Steps are quicker than beats, so what the others say is always old."""
    first = First(monkeypatch, 2)
    for step in range(0, 1000, 10):
        first.watch.at(step + 10)
        first.hear(step)
        first.wait(BEAT_SECONDS)
    assert first.said == []


@pytest.mark.parametrize("victim", [0, 1])
def test_who_stays_behind_is_said_once_with_the_time_that_others_wait(
    victim, monkeypatch
):
    first = First(monkeypatch, 2)

    def begin(index, step):
        first.hear(step) if index else first.watch.at(step)

    begin(0, 7), begin(1, 7)
    first.wait(LONG)
    begin(1 - victim, 8)
    first.wait(BEHIND_SECONDS)
    assert first.said == []
    first.wait(3 * LONG)
    (said, *where) = first.said
    seconds = f"{BEHIND_SECONDS + BEAT_SECONDS:.0f}"
    assert said == (
        f"process {victim} has been behind at step 7 for {seconds} s; others have "
        "begun step 8 and wait for it"
    )
    if victim:
        assert where == [] and first.others[0].told == ["where"]
    else:
        assert len(where) == 1 and where[0].startswith("process 0 holds the others up")
    # It catches up, and hangs again.
    first.said.clear()
    begin(victim, 8)
    first.wait(LONG)
    assert first.said == []
    begin(1 - victim, 9)
    first.wait(LONG)
    assert first.said[0].startswith(f"process {victim} has been behind at step 8 for ")


def test_a_resumed_run_says_the_step_that_it_resumes_from(tmp_path, monkeypatch):
    config = make_tiny(cache_dir=tmp_path / "data", steps=2)
    train(config, tmp_path / "run", quiet=True)
    steps = []

    class Noted(Watch):
        def at(self, step):
            steps.append(step)

    monkeypatch.setattr(loop, "watch_peers", lambda: Noted(0, 1, lambda text: text))
    train(config, tmp_path / "run", quiet=True)  # nothing is left to do
    assert steps == [2]


def test_where_the_training_is_though_it_is_not_the_main_thread(monkeypatch):
    said, done = [], threading.Event()
    monkeypatch.setattr(watch, "_say", said.append)
    member = Watch(0, 2, lambda text: text)

    def train_in_a_thread():
        with member:
            done.wait(60)

    thread = threading.Thread(target=train_in_a_thread)
    thread.start()
    end = time.monotonic() + 30
    while not any("train_in_a_thread" in text for text in said):
        assert time.monotonic() < end, said[-1:]
        member._say_where()
        time.sleep(0.05)
    done.set()
    thread.join(30)
    assert not thread.is_alive() and "holds the others up at" in said[-1]


def test_what_is_said_last_arrives_though_something_lies_unread():
    """A short word waits for the last one's receipt, and a reset would drop it."""
    with socket.create_server(("localhost", 0)) as server:
        ours = watch._Line(socket.create_connection(server.getsockname()))
        theirs = watch._Line(server.accept()[0])
    heard = []

    def listen():
        while (lines := theirs.receive()) is not None:
            heard.extend(lines)
        theirs.connection.close()

    theirs.send("beat 1")
    ours.send("beat 1")
    ours.send("lost why")
    thread = threading.Thread(target=listen)
    thread.start()
    ours.say_no_more()
    ours.wait_for_end(time.monotonic() + 20)
    ours.connection.close()
    thread.join(20)
    assert heard == ["beat 1", "lost why"]
