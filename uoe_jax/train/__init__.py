"""Training: state, loss, step, loop, metrics."""

from uoe_jax.train.loop import train
from uoe_jax.train.signals import StopRun

__all__ = ["StopRun", "train"]
