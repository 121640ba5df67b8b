"""What the processes of a run agree on, and noticing that one of them is gone.

A single process agrees with itself at once and watches nobody.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from uoe_jax.errors import ConfigError, UoeError

ALIVE = ".alive"  # folder of a run: one file a process, rewritten at every beat
BEAT_SECONDS = 2.0
LOST_SECONDS = 30.0  # without a beat
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class PeerLost(UoeError):
    """Another process of the run is gone; what was saved last is intact."""


def is_primary() -> bool:
    """Whether this process writes what is written once."""
    return jax.process_index() == 0


def join() -> None:
    """Join the processes of a run; must come before anything touches a device.

    jax finds its cluster: a TPU pod, Slurm, Open MPI, Kubernetes. Elsewhere the
    environment says who is who, see `_VARIABLES`.

    Raises:
      ConfigError: no cluster and no such variables.
    """
    address, count, index = (os.environ.get(name) for name in _VARIABLES)
    number = lambda text: None if text is None else int(text)
    try:
        jax.distributed.initialize(address, number(count), number(index))
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed found no processes to join "
            f"({' '.join(str(error).split())[:200]}); start under Slurm, MPI, "
            f"Kubernetes or on a TPU pod, or set {', '.join(_VARIABLES)}"
        ) from None


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


class Votes:
    """The largest of the processes' votes, cast at every step.

    The sum travels behind the step's own work and is read one step later, so nobody
    waits; all read the same, so all act at the same step.
    """

    def __init__(self, mesh: Mesh):
        self._mesh = mesh
        self._pending: jax.Array | None = None
        self._largest = jax.jit(
            jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec())
        )

    def cast(self, vote: int) -> int:
        """Return what was agreed on; with several processes, of the votes before."""
        if jax.process_count() == 1:
            return vote
        pending, self._pending = self._pending, self._send(vote)
        return 0 if pending is None else int(pending)

    def settle(self, vote: int) -> int:
        """Return what the processes agree on now; waits for all of them."""
        if jax.process_count() == 1:
            return vote
        return int(self._send(vote))

    def _send(self, vote: int) -> jax.Array:
        axes = PartitionSpec(tuple(self._mesh.axis_names))
        votes = jax.make_array_from_callback(
            (self._mesh.size,),
            NamedSharding(self._mesh, axes),
            lambda index: np.full((1,), vote, np.int32),
        )
        return self._largest(votes)


class Watch:
    """Context in which each process shows that it lives and looks for the others.

    Beats are files of the run's folder, which all processes share. Whoever misses one
    for `LOST_SECONDS` names it and ends this process, even from within a collective
    that waits for the missing one for ever.
    """

    def __init__(
        self,
        run_dir: Path,
        end: Callable[[str], None] | None = None,
        lost_seconds: float = LOST_SECONDS,
    ):
        self._folder = run_dir / ALIVE
        self._end = end or _exit
        self._lost_seconds = lost_seconds
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self.lost: str | None = None

    def __enter__(self) -> Watch:
        if jax.process_count() > 1:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._beat(0)
            barrier("watch")  # no file of an earlier run is left from here on
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        # A broken connection is noticed before the beats are missed: find out whose.
        if kind is not None and issubclass(kind, jax.errors.JaxRuntimeError):
            self._thread.join(self._lost_seconds + 2 * BEAT_SECONDS)
        self._stop.set()
        if kind is None:
            self._path(jax.process_index()).write_bytes(b"done")

    def _path(self, process: int) -> Path:
        return self._folder / str(process)

    def _beat(self, number: int) -> None:
        text = f"{number} process {os.getpid()} on {socket.gethostname()}"
        temporary = self._folder / f".{jax.process_index()}"
        temporary.write_text(text)
        temporary.replace(self._path(jax.process_index()))

    def _run(self) -> None:
        number = 0
        while not self._stop.wait(BEAT_SECONDS):
            number += 1
            self._beat(number)
            if missing := self.missing(time.monotonic()):
                self.lost = missing
                self._end(missing)
                return

    def missing(self, now: float) -> str | None:
        """Return who hasn't been heard of for too long, or None."""
        for process in range(jax.process_count()):
            if process == jax.process_index():
                continue
            try:
                beat = self._path(process).read_bytes()
            except OSError:
                beat = b""
            before, since = self._seen.get(process, (None, now))
            if beat != before:
                self._seen[process] = (beat, now)
            elif beat != b"done" and now - since > self._lost_seconds:
                who = beat.decode().partition(" ")[2] or "never started"
                return (
                    f"process {process} of {jax.process_count()} ({who}) is gone; the "
                    "last checkpoint is intact: start all processes again"
                )
        return None


def _exit(text: str) -> None:
    # The main thread may hang in a collective: nothing else ends it.
    print(f"uoe: {text}", file=sys.stderr, flush=True)
    os._exit(PeerLost.exit_code)
