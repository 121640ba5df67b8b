"""How many programs a short run compiles, and that another start reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from uoe_jax.train.progress import Display

ROOT = Path(__file__).parents[2]
# Two starts in one process, the second without what the first has in memory.
PROGRAM = """
import json, sys
from collections import Counter
import jax
from uoe_jax.cli import main

programs, cache = [], Counter()
def duration(name, _, **about):
    if name.endswith("/backend_compile_duration"):
        programs.append(about["fun_name"])
jax.monitoring.register_event_duration_secs_listener(duration)
jax.monitoring.register_event_listener(lambda name, **_: cache.update([name]))
for run in sys.argv[1:3]:
    jax.clear_caches()
    programs.clear(), cache.clear()
    assert main(["train", *sys.argv[3:], "--run-dir", run]) == 0
    found = Counter(name.removeprefix("jit(").removesuffix(")") for name in programs)
    kinds = ("cache_hits", "cache_misses")
    found = {"programs": found} | {
        kind: cache[f"/jax/compilation_cache/{kind}"] for kind in kinds}
    print("found", json.dumps(found), flush=True)
"""


def test_a_run_compiles_each_program_once_and_the_next_start_none(text_file, tmp_path):
    options = [
        "tiny-union", "--data.path", text_file, "--data.cache-dir", text_file.parent,
        "--data.batch-size", "2", "--model.d-model", "16", "--model.d-ff", "32",
        "--model.num-layers", "2", "--model.head-dim", "4", "--model.max-seq-len", "32",
        "--train.steps", "4", "--train.eval-every", "2", "--train.eval-batches", "2",
        "--train.log-every", "1", "--no-recall",
    ]  # fmt: skip
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("JAX_COMPILATION", "JAX_PERSISTENT"))
    }
    environment |= {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(tmp_path)}
    runs = [tmp_path / "one", tmp_path / "two"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, [*runs, *options])],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "loading jax, looking for devices ..."
    # Both validations come after the one line that says what was compiled.
    assert sum("compiled in" in line for line in lines) == 2
    cold, warm = (
        json.loads(line.removeprefix("found "))
        for line in lines
        if line.startswith("found ")
    )
    # The first state, the training step, the validation, the report's example, and
    # the copy of a state that is saved.
    expected = {"init": 1, "step": 1, "run": 1, "choose": 1, "stage": 1}
    assert cold["programs"] == expected
    assert cold["cache_hits"] == 0 and cold["cache_misses"] == len(expected)
    assert warm["programs"] == expected  # each of them read
    assert warm["cache_hits"] == len(expected) and warm["cache_misses"] == 0


@pytest.mark.parametrize(("rate", "shown"), [(None, ""), (50.0, "  80 s left")])
def test_the_time_left_is_at_the_rate_of_the_last_steps(rate, shown, capsys):
    # 100 s for 10 steps, nearly all of them the first: the rest goes on at the rate.
    line = {"step": 10, "seconds": 100.0, "tokens": 1000, "loss": 1.0, "mfu": None,
            "skipped": 0, "tokens_per_second": rate}  # fmt: skip
    display = Display(log_every=10)
    display.start(0, 50)
    display.step(line)
    told = capsys.readouterr().out.rstrip("\n")
    assert told.endswith(shown) and ("left" in told) == bool(shown)
