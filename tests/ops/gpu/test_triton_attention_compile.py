"""The Triton attention kernels compiled for GPUs that aren't here."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from uoe_jax.ops import nvidia
from uoe_jax.ops.segment_attention.nvidia import triton

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
RECORD = BENCHMARKS / "results" / "triton_attention_compile.json"
CASES = json.loads(RECORD.read_text())["cases"]


def limit(device):
    """Bytes of shared memory that a program may take, of "sm_89"."""
    capability = int(device.removeprefix("sm_")) / 10
    return nvidia.SHARED_MEMORY.get(capability, nvidia.LEAST_SHARED_MEMORY)


@pytest.mark.parametrize("case", CASES)
def test_default_tiles_are_the_compiled_ones_which_fit_and_spill_nothing(
    monkeypatch, case
):
    width = int(re.findall(r"H(\d+)", case)[0])
    dtype = "float16" if "float16" in case else "bfloat16"
    assert set(CASES[case]) >= {"sm_80", "sm_86", "sm_89"}
    for device, kernels in CASES[case].items():
        monkeypatch.setattr(nvidia, "shared_memory", lambda d=device: limit(d))
        assert set(kernels) == set(triton.DEFAULTS)
        for kernel, found in kernels.items():
            tiles = triton.choose_tiles(kernel, {"width": width, "dtype": dtype})
            assert tiles == tuple(found[name] for name in triton.Tiles._fields)
            if device == "sm_90":
                tiles = tiles._replace(num_stages=tiles.num_stages + 1)
            most = triton.shared_bytes(kernel, width, 2, tiles)
            assert found["shared_bytes"] <= most <= limit(device)
            assert found["spilled_bytes"] == 0


# Held in short by the record of compiled kernels above.
@pytest.mark.nightly
def test_kernels_compile_for_ada(tmp_path):
    """Without triton's interpreter, which other tests of this process use."""
    out = tmp_path / "record.json"
    command = [sys.executable, BENCHMARKS / "triton_attention.py", "compile"]
    command += ["--only", "full H32, documents", "--capability", "89", "--out", out]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    subprocess.run(command, env=environment, check=True)
    (kernels,) = json.loads(out.read_text())["cases"]["full H32, documents"].values()
    for kernel, known in CASES["full H32, documents"]["sm_89"].items():
        assert kernels[kernel]["shared_bytes"] == known["shared_bytes"]
        assert kernels[kernel]["spilled_bytes"] == 0
