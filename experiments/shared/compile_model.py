"""Compile a model's programs into a cache on disk, and print the seconds it took.

    python -m experiments.shared.compile_model < REQUEST

It is the process that `experiments.shared.ahead` starts, with its request as JSON. It
makes what a run makes, on zeros of the data's shapes, so that the run's own programs
have the same keys in the cache.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax.numpy as jnp

from experiments.shared.programs import Programs
from experiments.shared.work import set_process
from uoe_jax.config import ExperimentConfig, from_json
from uoe_jax.files import format_json


def main() -> None:
    """Compile what standard input asks for."""
    request = json.load(sys.stdin)
    set_process(Path(request["cache"]))
    config = from_json(format_json(request["config"]), ExperimentConfig)
    data = {
        split: {name: jnp.zeros(shape, kind) for name, (shape, kind) in arrays.items()}
        for split, arrays in request["shapes"].items()
    }
    programs = Programs(config, data, request["chunk"])
    print(programs.compile(request["tokens"]))


if __name__ == "__main__":
    main()
