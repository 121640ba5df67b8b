"""A damaged compile cache costs time and one line, never a number."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import random, sys
from pathlib import Path
import jax
from uoe_jax.cli import main

run, cache = sys.argv[1], Path(sys.argv[2])
command = ["eval", run, "--max-batches", "1", "--json"]
assert main(command) == 0
(entry,) = [path for path in cache.rglob("*") if path.name.endswith("-cache")]
whole = entry.read_bytes()
flipped = bytearray(whole)
flipped[random.Random(0).randrange(len(whole))] ^= 4
for damaged in (whole[: len(whole) // 2], bytes(flipped)):
    entry.write_bytes(damaged)
    jax.clear_caches()  # of this process, so that the folder is read
    for stream in (sys.stdout, sys.stderr):
        print("-----", file=stream, flush=True)
    assert main(command) == 0
"""


def test_a_damaged_compile_cache_is_compiled_anew_with_one_warning(union_run, tmp_path):
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(union_run), str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    before, *after = map(json.loads, done.stdout.split("-----\n"))
    assert after == [before, before]
    quiet, *said = done.stderr.split("-----\n")
    assert "cache" not in quiet
    assert said == 2 * [
        f"uoe: warning: the compile cache {tmp_path} is damaged, so programs are "
        "compiled again; delete that folder to have them kept\n"
    ]
