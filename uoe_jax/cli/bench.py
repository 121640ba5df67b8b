"""`uoe bench`: this machine's speed beside the installed peers'."""

from __future__ import annotations

import os

from uoe_jax.bench.request import BenchRequest
from uoe_jax.cli.parse import parse


def bench(args: list[str]) -> int:
    """Run the benchmarks named in `args`; returns the exit status 0."""
    request = parse(BenchRequest, args, "bench")
    # Peers of other frameworks need device memory beside jax's.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

    from uoe_jax.bench.command import run_bench
    from uoe_jax.cli.device import prepare

    prepare()
    run_bench(request)
    return 0
