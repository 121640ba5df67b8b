"""Device time of a compiled program by kernel, from jax's profiler."""

from __future__ import annotations

import collections
import gzip
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax


def kernel_times(run: Callable[[], Any], calls: int = 3) -> dict[str, float]:
    """Return milliseconds a call by device kernel (its HLO name), longest first."""
    jax.block_until_ready(run())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            for _ in range(calls - 1):
                run()
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    streams = {
        (event["pid"], event["tid"])
        for event in events
        if event.get("name") == "thread_name"
        and event["args"]["name"].startswith("Stream")
    }
    total: collections.Counter[str] = collections.Counter()
    for event in events:
        # A GPU's streams hold its kernels; its other lines only sum them up.
        if event.get("ph") == "X" and (event["pid"], event["tid"]) in streams:
            name = event.get("args", {}).get("hlo_op") or event["name"]
            total[name] += event["dur"] / 1e3
    return {name: time / calls for name, time in total.most_common()}
