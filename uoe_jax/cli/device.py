"""Process-wide jax settings, made once before a verb that computes."""

from __future__ import annotations


def prepare() -> None:
    """Restrict NNX to plain pytrees, as all of this package's models are."""
    from flax import nnx

    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)


def describe() -> str:
    """Return the devices in words: `2 x TPU v5e`, `cpu`."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    return f"{len(kinds)} x {kinds[0]}" if len(kinds) > 1 else kinds[0]
