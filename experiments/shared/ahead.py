"""The next model is compiled into the cache on disk while a run trains.

A process of its own does it: `experiments.shared.compile_model`. Who trains then loads
the programs from the cache between two runs, in its one thread. A second thread may not
compile or load: on an H200 with jax 0.11.2 cuDNN's graphs that were loaded beside a run
broke both, and every later program of the process.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

import jax

from experiments.shared.arrays import Arrays
from uoe_jax.config import ExperimentConfig
from uoe_jax.files import format_json

_PATIENCE = 300.0  # seconds that a model is waited for once its turn has come
# It takes what memory it needs, and no more than a share.
_MEMORY = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.2",
}


class Ahead:
    """Compiles one model at a time, each once; a process that fails ends nothing."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self.process: subprocess.Popen[str] | None = None
        self.current, self.started = "", 0.0
        self.begun: set[str] = set()  # keys of models, done or not
        self.seconds: dict[str, float] = {}  # of compiling, of what is in the cache

    @property
    def busy(self) -> bool:
        """Whether a model is being compiled now."""
        self._look()
        return self.process is not None

    def done(self, key: str) -> bool:
        """Whether a model is compiled and in the cache."""
        self._look()
        return key in self.seconds

    def begin(
        self,
        key: str,
        config: ExperimentConfig,
        data: Mapping[str, Arrays],
        chunk: int | None = None,
        tokens: bool = False,
    ) -> None:
        """Begin to compile `Programs(config, data, chunk)`, of which `key` is the name.

        Not while another is compiled, not twice, and not without a cache on disk.
        """
        cache = jax.config.values["jax_compilation_cache_dir"]
        # A TPU belongs to one process.
        able = cache and jax.default_backend() in ("cpu", "gpu")
        if not able or self.busy or key in self.begun:
            return
        request = {
            "cache": str(cache),
            "config": dataclasses.asdict(config),
            "shapes": {
                split: {name: [a.shape, str(a.dtype)] for name, a in arrays.items()}
                for split, arrays in data.items()
            },
            "chunk": chunk,
            "tokens": tokens,
        }
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-m", "experiments.shared.compile_model"],
            stdin=subprocess.PIPE,
            stdout=self.said,
            env=os.environ | _MEMORY,
            text=True,
        )
        self.begun.add(key)
        self.current, self.started = key, time.perf_counter()
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended already, which is seen below
            self.process.stdin.write(format_json(request))
            self.process.stdin.close()

    def wait(self, key: str) -> float:
        """Return the seconds of compiling a model; 0.0 if that is still to be done.

        Waits for it if it is being compiled.
        """
        if self.busy and self.current == key:
            assert self.process is not None
            try:
                self.process.wait(_PATIENCE)
            except subprocess.TimeoutExpired:
                self.stop()
        self._look()
        return self.seconds.get(key, 0.0)

    def stop(self) -> None:
        """End what is being compiled."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self._look()

    def _look(self) -> None:
        """Note what the process came to if it has ended."""
        if self.process is None or (code := self.process.poll()) is None:
            return
        self.process = None
        self.said.seek(0)
        lines = self.said.read().splitlines()
        self.said.close()
        if code == 0 and lines:
            self.seconds[self.current] = float(lines[-1])
        else:
            self.say(
                f"compiling ahead ended with {code}; the model is compiled when its "
                "turn comes"
            )
