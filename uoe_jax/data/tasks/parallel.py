"""Chunks of Pathfinder images made by processes of their own, in order.

`python -m uoe_jax.data.tasks.parallel JSON` is one of them: it writes every so many
chunks to its output, until nobody reads.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Int, UInt8

from uoe_jax.data.tasks import pathfinder
from uoe_jax.data.tasks.pathfinder import PathfinderRules
from uoe_jax.errors import DataError
from uoe_jax.files import format_json, parse_json

Chunk = tuple[UInt8[np.ndarray, "N Hi Wi"], Int[np.ndarray, " N"]]


@contextmanager
def chunks(
    seed: int, rules: PathfinderRules, workers: int
) -> Iterator[Iterator[Chunk]]:
    """Give the chunks of a seed one after another, without end.

    Process w of W makes chunks w, w + W, ...; its pipe holds it back until they are
    wanted. Raises DataError if a process ends.
    """
    # Not multiprocessing: that would import the caller's script again.
    root = str(Path(__file__).parents[3])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    running: list[tuple[subprocess.Popen, IO[bytes]]] = []
    try:
        for first in range(workers):
            order = {"seed": seed, "first": first, "step": workers}
            text = format_json(order | {"rules": rules._asdict()})
            command = [sys.executable, "-m", "uoe_jax.data.tasks.parallel", text]
            process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE)
            assert process.stdout is not None
            running.append((process, process.stdout))
        yield _in_order([stream for _, stream in running])
    finally:
        for process, stream in running:
            process.kill()
            process.wait()
            stream.close()


def _in_order(streams: list[IO[bytes]]) -> Iterator[Chunk]:
    while True:
        for stream in streams:
            yield _read(stream), _read(stream)


def _read(stream: IO[bytes]) -> np.ndarray:
    """Return the next array of a process: its length in bytes, then a .npy file."""
    size = int.from_bytes(stream.read(8), "little")
    data = stream.read(size)
    if not size or len(data) != size:
        raise DataError(
            "a process that makes Pathfinder images ended; its message is above, run "
            "the same command again"
        )
    return np.load(io.BytesIO(data), allow_pickle=False)


def main(text: str) -> None:
    """Write chunks to the standard output, each as images and labels."""
    order = parse_json(text, "the order")
    rules, number = PathfinderRules(**order["rules"]), order["first"]
    try:
        while True:
            for array in pathfinder.make_chunk([order["seed"], number], rules):
                buffer = io.BytesIO()
                np.save(buffer, array, allow_pickle=False)
                data = buffer.getvalue()
                sys.stdout.buffer.write(len(data).to_bytes(8, "little") + data)
            sys.stdout.buffer.flush()
            number += order["step"]
    except (BrokenPipeError, KeyboardInterrupt):
        os._exit(0)  # nobody reads: closing the output would fail again


if __name__ == "__main__":
    main(sys.argv[1])
