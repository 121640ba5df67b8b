"""A device that isn't there is one line, with its cause and what to do."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("platform", ["cuda", "tpu", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(platform, union_run):
    done = subprocess.run(
        [sys.executable, "-m", "uoe_jax", "eval", str(union_run)],
        # Without the test for a TPU's address, which waits for a network.
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": platform,
            "TPU_SKIP_MDS_QUERY": "1",
        },
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = [x for x in done.stderr.splitlines() if x.startswith("uoe: ")]
    assert done.returncode == 2 and not done.stdout, done.stderr
    assert lines == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr and "--debug shows" not in lines[0]
    assert platform in lines[0] and "JAX_PLATFORMS" in lines[0]
