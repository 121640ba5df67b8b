"""Noticing that another process of a run is gone, however busy this one is.

Every process holds a connection to the first one. The kernel closes the connections of
a process that dies, and probes those of a machine that falls silent: neither load nor
a training that hangs in a collective delays the news.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from uoe_jax.errors import UoeError
from uoe_jax.files import format_json, parse_json
from uoe_jax.train.signals import StopRun

BEAT_SECONDS = 2.0  # between two signs of life
# Without one a process is stopped. Signs are given by a thread of their own, so that a
# compilation, a validation or a save of any length gives them, too; what can hold them
# back is a call into C that keeps Python's lock, and none here takes half as long. The
# whole is under a minute, and before jax's own abort (see `peers`).
SILENT_SECONDS = 40.0
LAST_SECONDS = 1.0  # that others have to read why this one leaves
BEHIND_SECONDS = 40.0  # that others have been past a step: said, and no more
LOST_SECONDS = 30  # a machine that answers no probe for so long is gone
GRACE_SECONDS = 5.0  # for a process to report an error of its own, and to end
_ADDRESS_BYTES = 1024
# How Linux and macOS name the wait before the first probe, and the rest of it.
_PROBES = (
    ("TCP_KEEPIDLE", LOST_SECONDS // 3),
    ("TCP_KEEPALIVE", LOST_SECONDS // 3),
    ("TCP_KEEPINTVL", LOST_SECONDS // 6),
    ("TCP_KEEPCNT", 4),
    ("TCP_USER_TIMEOUT", LOST_SECONDS * 1000),
)


class PeerLost(UoeError):
    """Another process of the run is gone; what was saved last is intact."""


class Watch:
    """Context in which a process that vanishes or fails ends the others, named by them.

    Whoever leaves without an error, or for a signal that all heed, is not missed.
    One thread owns the connections; the one that enters, and trains, only sends it
    words.

    Args:
      index, count: this process, and how many there are; of one nothing is watched.
      share: see `first_says`.
      end: called with what to say and the exit code instead of exiting, in the thread.
    """

    def __init__(
        self,
        index: int,
        count: int,
        share: Callable[[str], str],
        end: Callable[[str, int], None] | None = None,
    ):
        self._index, self._count, self._share = index, count, share
        self._end = end or _exit
        here = f"process {os.getpid()} on {socket.gethostname()}"
        self._name = f"process {index} of {count} ({here})"
        self._token = secrets.token_hex(8)  # the first one's tells friend from stranger
        self._peers: dict[_Line, str] = {}  # with their names
        self._heard: dict[_Line, float] = {}  # when each gave its last sign of life
        self._beaten = 0.0  # when this one gave its last
        self._step = 0  # the last that this process began
        self._begun: dict[_Line | None, int] = {}  # the step of each; None: this one
        # Since when others have been past the step of each, and whether that was said.
        self._behind: dict[_Line | None, tuple[float, bool]] = {}
        self._plan: tuple[float, str, int] | None = None  # when to end, with what
        self._failed: int | None = None  # the exit code of this process's own error
        self._thread: threading.Thread | None = None
        self._trains = 0  # the thread that trains, as Python numbers it

    def __enter__(self) -> Watch:
        if self._count == 1:
            return self
        self._trains = threading.get_ident()  # the main thread or another
        self._selector = selectors.DefaultSelector()
        main, thread = socket.socketpair()
        self._main = _Line(main)
        self._listen(_Line(thread), self._obey)
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        if self._index == 0:
            server = socket.create_server(("", 0), backlog=self._count)
            self._listen(_Line(server), self._accept)
            self._thread.start()
            self._share(self._address(server.getsockname()[1]))
        else:
            self._connect(parse_json(self._share(""), "the first process's address"))
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._thread is None:
            return
        if isinstance(error, jax.errors.JaxRuntimeError):
            # A broken collective: who broke it is known within the same moment.
            self._thread.join(GRACE_SECONDS)
        if error is None or isinstance(error, StopRun):
            self._main.send("done")
            self._thread.join(GRACE_SECONDS)
            self._main.connection.close()
        else:
            # The thread goes on: jax's way out waits for processes that may be gone.
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            code = getattr(error, "exit_code", 1)
            self._main.send(f"failed {code} {self._name} failed: {reason}")

    def at(self, step: int) -> None:
        """Note the step that this process has begun."""
        self._step = step

    def _address(self, port: int) -> str:
        given = os.environ.get("JAX_COORDINATOR_ADDRESS", "").rpartition(":")[0]
        hosts = [given, _own_address(), socket.gethostname()]
        about = {"hosts": hosts, "port": port, "token": self._token}
        return format_json(about | {"name": self._name})

    def _connect(self, address: dict[str, Any]) -> None:
        """Connect to the first process; where that fails, jax's heartbeats remain."""
        for host in filter(None, address["hosts"]):
            try:
                line = _Line(socket.create_connection((host, address["port"]), 5.0))
                line.send(f"hello {address['token']} {self._name}")
                if (line.receive() or [""])[0] == "welcome":  # a beat may follow it
                    self._watch(line, address["name"])
                    return
                line.connection.close()
            except OSError:  # the next name may reach it
                continue
        _say(
            f"{self._name} can't reach {address['name']} on port {address['port']}, so "
            "it notices late who is gone; open ports between the machines"
        )

    def _watch(self, line: _Line, name: str) -> None:
        line.connection.settimeout(None)
        line.connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        # What is said last mustn't wait for the receipt of the beat before it.
        line.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option, value in _PROBES:
            if number := getattr(socket, option, None):
                line.connection.setsockopt(socket.IPPROTO_TCP, number, value)
        self._peers[line] = name
        self._heard[line] = time.monotonic()
        self._listen(line, self._hear)

    def _listen(self, line: _Line, act: Callable[[_Line], None]) -> None:
        self._selector.register(line, selectors.EVENT_READ, (line, act))

    def _drop(self, line: _Line) -> None:
        self._selector.unregister(line)
        self._peers.pop(line, None)
        self._heard.pop(line, None)
        self._begun.pop(line, None)
        self._behind.pop(line, None)
        line.connection.close()

    def _tell(self, message: str, but: _Line | None = None) -> None:
        for line in self._peers:
            if line is not but:
                line.send(message)

    def _run(self) -> None:
        """Act on what arrives, and on silence, until nothing is left to listen to."""
        try:
            self._serve()
        except Exception as error:  # a thread that dies isn't missed by anybody
            _say(
                f"{self._name} no longer watches the others: "
                f"{type(error).__name__}: {error}"
            )

    def _serve(self) -> None:
        woken = time.monotonic()
        while self._selector.get_map():
            before, woken = woken, time.monotonic()
            wait: float | None = None
            if self._peers:
                wait = BEAT_SECONDS
                if woken - before > SILENT_SECONDS / 2:  # it was this one that stood
                    self._heard = dict.fromkeys(self._peers, woken)
                    told = self._behind.items()
                    self._behind = {line: (woken, said) for line, (_, said) in told}
                if self._beat(woken):
                    return
            if self._plan is not None:
                when, text, code = self._plan
                wait = min(when - time.monotonic(), BEAT_SECONDS)
                if when <= time.monotonic():
                    self._finish(text, code)
                    return
            for key, _ in self._selector.select(wait):
                line, act = key.data
                if line.fileno() >= 0:  # not dropped meanwhile
                    act(line)

    def _beat(self, now: float) -> bool:
        """Give a sign of life; end where another process has given none for long."""
        if now - self._beaten >= BEAT_SECONDS:
            self._beaten = now
            self._tell(f"beat {self._step}")
            if self._index == 0:  # it alone hears all the others
                self._find_behind(now)
        for line, name in self._peers.items():
            if now - self._heard[line] > SILENT_SECONDS and self._failed is None:
                self._finish(
                    f"{name} has given no sign of life for {SILENT_SECONDS:.0f} s: it "
                    "is stopped or its machine hangs; the last checkpoint is intact: "
                    "end it and start all processes again",
                    PeerLost.exit_code,
                )
                return True
        return False

    def _note_step(self, line: _Line | None, step: int) -> None:
        if self._begun.get(line) != step:
            self._begun[line] = step
            self._behind.pop(line, None)

    def _find_behind(self, now: float) -> None:
        """Say who hangs before a step that others have begun: they wait for it.

        What counts is how long they have waited, not how long its step takes: all may
        compile or validate together, and their words come a beat apart.
        It may only be slow, so nothing is ended; it says itself where it is.
        """
        self._note_step(None, self._step)
        furthest = max(self._begun.values())
        for line, step in self._begun.items():
            if step == furthest:
                self._behind.pop(line, None)
                continue
            since, said = self._behind.setdefault(line, (now, False))
            if said or now - since <= BEHIND_SECONDS:
                continue
            self._behind[line] = since, True
            name = self._name if line is None else self._peers[line]
            _say(
                f"{name} has been behind at step {step} for {now - since:.0f} s; "
                f"others have begun step {furthest} and wait for it"
            )
            if line is None:
                self._say_where()
            else:
                line.send("where")

    def _say_where(self) -> None:
        """Say where the training of this process is."""
        frame = sys._current_frames().get(self._trains)
        if frame is not None:
            places = traceback.extract_stack(frame)[-3:]
            told = " > ".join(f"{p.filename}:{p.lineno} {p.name}" for p in places)
            _say(f"{self._name} holds the others up at {told}")

    def _finish(self, text: str, code: int) -> None:
        """Leave, telling the others first, and end this process."""
        if text:
            self._tell(f"lost {text}")
        self._leave()
        self._end(text, code)

    def _leave(self) -> None:
        """Close all connections, others' once they have read what was said to them."""
        lines = [key.data[0] for key in self._selector.get_map().values()]
        others = [line for line in lines if line in self._peers]
        until = time.monotonic() + LAST_SECONDS
        for line in others:
            line.say_no_more()
        for line in others:
            line.wait_for_end(until)
        for line in lines:
            self._drop(line)

    def _obey(self, line: _Line) -> None:
        """Do what the thread that trains says."""
        for message in line.receive() or []:
            if message == "done":
                self._tell("done")
                self._leave()
                return
            _, code, text = message.split(" ", 2)
            self._failed, self._plan = int(code), None
            self._tell(f"failing {text}")

    def _accept(self, server: _Line) -> None:
        try:
            connection, _ = server.connection.accept()
        except OSError:  # gone before it was greeted
            return
        self._listen(_Line(connection), self._greet)

    def _greet(self, line: _Line) -> None:
        """Watch who knows the token; others came by chance."""
        word, token, name = ((line.receive() or [""])[0] + "  ").split(" ", 2)
        if (word, token) != ("hello", self._token):
            self._drop(line)
            return
        self._selector.unregister(line)
        self._watch(line, name.strip())
        line.send("welcome")

    def _hear(self, line: _Line) -> None:
        """Act on what another process says, or on its silence."""
        messages = line.receive()
        if messages is None:
            self._lose(line)
            return
        for message in messages:
            word, _, text = message.partition(" ")
            self._heard[line] = time.monotonic()
            if word == "beat":
                self._note_step(line, int(text or 0))
                continue
            if word == "where":
                self._say_where()
                continue
            if word == "done":
                self._drop(line)
                return
            if word == "failing":
                self._tell(message, but=line)
            if self._failed is not None:
                continue  # this process ends with an error of its own
            if word == "lost":
                self._finish(text, PeerLost.exit_code)
                return
            # This process may be about to fail in the same way.
            self._plan = _in_a_moment(text, PeerLost.exit_code)

    def _lose(self, line: _Line) -> None:
        name = self._peers[line]
        self._drop(line)
        if self._failed is not None:  # and the others ended because of that
            self._plan = _in_a_moment("", self._failed)
        elif self._plan is None:
            text = (
                f"{name} is gone; the last checkpoint is intact: start all processes "
                "again"
            )
            self._finish(text, PeerLost.exit_code)


class _Line:
    """A connection that carries lines; one that can't be sent is dropped."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._rest = b""

    def fileno(self) -> int:
        return self.connection.fileno()

    def send(self, line: str) -> None:
        try:
            self.connection.sendall(line.encode() + b"\n")
        except OSError:
            pass  # reading will find it closed

    def say_no_more(self) -> None:
        """End what is sent; what comes is still read."""
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_WR)

    def wait_for_end(self, until: float) -> None:
        """Read until the other side closes, at most until then.

        A connection that is closed with something unread is reset, and the other side
        loses what it hasn't read yet: why this process left.
        """
        with suppress(OSError):
            while (left := until - time.monotonic()) > 0:
                self.connection.settimeout(left)
                if not self.connection.recv(4096):
                    return

    def receive(self) -> list[str] | None:
        """Return the lines that have come, None once the connection is closed."""
        try:
            data = self.connection.recv(4096)
        except OSError:  # reset, or no answer to the probes
            return None
        if not data:
            return None
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.decode(errors="replace") for line in lines]


def watch_peers() -> Watch:
    """Return a watch over the processes that this one has joined."""
    return Watch(jax.process_index(), jax.process_count(), first_says)


def first_says(text: str) -> str:
    """Return what the first process passes here; waits for all of them."""
    sent = np.frombuffer(text.encode().ljust(_ADDRESS_BYTES), np.uint8)
    got = multihost_utils.broadcast_one_to_all(sent)
    return np.asarray(got).astype(np.uint8).tobytes().decode().strip()


def _own_address() -> str:
    """Return the address of the interface that leads out; no packet is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # reserved for documentation
        except OSError:
            return "localhost"
        return probe.getsockname()[0]


def _in_a_moment(text: str, code: int) -> tuple[float, str, int]:
    return time.monotonic() + GRACE_SECONDS, text, code


def _say(text: str) -> None:
    print(f"uoe: {text}", file=sys.stderr, flush=True)


def _exit(text: str, code: int) -> None:
    # The training may hang in a collective: nothing else ends it.
    if text:
        _say(text)
    os._exit(code)
