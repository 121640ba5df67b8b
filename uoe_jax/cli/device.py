"""Process-wide jax settings, made once before a verb that computes."""

from __future__ import annotations

import os

from uoe_jax.data.progress import note
from uoe_jax.errors import ConfigError, first_line

_NO_X64 = (
    "note: JAX_ENABLE_X64 is ignored: with 64 bits the same seed would give other "
    "weights"
)


def prepare(*, joins: bool = False) -> None:
    """Restrict NNX to plain pytrees and jax to 32 bits, as this package's models are.

    With 64 bits the same seed gives other weights, so JAX_ENABLE_X64 is switched off,
    with a line.

    Raises ConfigError if there is no device to compute on; a process that `joins`
    others first must not ask yet, and calls `check_devices` later.
    """
    import jax
    from flax import nnx

    if jax.config.read("jax_enable_x64"):
        jax.config.update("jax_enable_x64", False)
        note(_NO_X64)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    if not joins:
        check_devices()


def check_devices() -> None:
    """Raise ConfigError, saying why and what to do, if jax finds no device."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        which = f" of JAX_PLATFORMS={asked}" if asked else ""
        reason = first_line(error) if str(error) else "its plugin isn't installed"
        fix = "install that plugin (extras cuda and tpu), or set JAX_PLATFORMS=cpu"
        if "in use" in str(error) or "busy" in str(error).lower():
            fix = "end the process that holds it, or set JAX_PLATFORMS=cpu"
        raise ConfigError(f"jax finds no device{which} ({reason}); {fix}") from None


def describe() -> str:
    """Return the devices in words: `2 x TPU v5e`, `cpu`."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    return f"{len(kinds)} x {kinds[0]}" if len(kinds) > 1 else kinds[0]
