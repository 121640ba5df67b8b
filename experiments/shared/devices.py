"""One process for each GPU, all working through the same queue of runs."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import IO

from experiments.shared.queue import Task
from uoe_jax.data.prepare import prepare
from uoe_jax.errors import UoeError


def spread(argv: Sequence[str], devices: Sequence[str], tasks: Sequence[Task]) -> int:
    """Run the same command as a worker on each device; return how many ended badly.

    Their lines come out with the device's number in front. Data that comes later is
    prepared meanwhile.
    """
    command = [sys.executable, "-m", "experiments.run", *argv, "--worker"]
    running = []
    for device in devices:
        env = os.environ | {
            "CUDA_VISIBLE_DEVICES": device,
            "PYTHONUNBUFFERED": "1",
        }
        process = subprocess.Popen(
            command,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_pass_on, args=(device, process.stdout))
        reader.start()
        running.append((process, reader))
    with suppress(UoeError):  # whoever needs the data will say so
        for task in tasks:
            if task.study is not None:
                prepare(task.study.cases[0].config)
    try:
        codes = [process.wait() for process, _ in running]
    except KeyboardInterrupt:
        for process, _ in running:
            process.terminate()
        raise
    for _, reader in running:
        reader.join()
    return sum(code != 0 for code in codes)


def _pass_on(device: str, lines: IO[str]) -> None:
    for line in lines:
        print(f"[{device}] {line}", end="", flush=True)
