"""What XLA is told before the first program."""

from __future__ import annotations

import os


def switch_off_command_buffers() -> None:
    """Set XLA's flag, before jax has asked for a device.

    On an H200 with jax 0.11.2 a command buffer that captured a cuDNN graph failed, and
    every later program of the process with it.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_gpu_enable_command_buffer" not in flags:
        flags = f"{flags} --xla_gpu_enable_command_buffer=".strip()
        os.environ["XLA_FLAGS"] = flags
