"""What the processes of a run agree on; a single process agrees with itself at once."""

from __future__ import annotations

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float
from orbax.checkpoint import multihost

from uoe_jax.errors import ConfigError

# jax's own notice of a process that is gone, should `watch` have no connection to it:
# it ends all others after half to the whole of this, so `watch` must be earlier.
_HEARTBEAT_SECONDS = 100
_LONGEST_SECONDS = 24 * 3600  # that the others wait for the first one
_meetings = 0  # so that no two have the same name
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


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
        jax.distributed.initialize(
            address,
            number(count),
            number(index),
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--distributed found no processes to join "
            f"({' '.join(str(error).split())[:200]}); start under Slurm, MPI, "
            f"Kubernetes or on a TPU pod, or set {', '.join(_VARIABLES)}"
        ) from None


def primary_first[Found](what: str, act: Callable[[], Found]) -> Found:
    """Let the first process act, which may take hours, then the others at once.

    Of one that fails the others hear by `watch_peers`.
    """
    global _meetings
    if jax.process_count() == 1:
        return act()
    _meetings += 1
    # Not a device's barrier, which gives up after minutes.
    name, wait = f"{what} {_meetings}", multihost.get_barrier_sync_fn()
    meet = lambda: wait(key=name, timeout_ms=1000 * _LONGEST_SECONDS)
    if is_primary():
        found = act()
        meet()
        return found
    meet()
    return act()


def barrier(name: str) -> None:
    """Wait until every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(*values: int | float) -> Float[np.ndarray, "P V"]:
    """Return what each process has, by their numbers; all of them must call it.

    Whole numbers are exact up to 2**24.
    """
    own = np.array(values, np.float32)
    if jax.process_count() == 1:
        return own[None]
    return np.asarray(multihost_utils.process_allgather(own))


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
