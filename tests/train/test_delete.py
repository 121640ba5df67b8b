"""Killed between the commit of a checkpoint and the deletion of the one before."""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from uoe_jax.runs.checkpoint import Checkpoints

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, shutil, signal, sys
from pathlib import Path
import numpy as np
from uoe_jax.runs.checkpoint import Checkpoints

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

class Killed(Checkpoints):
    def _write(self, step, *content):
        if step == 2:  # only now, since a first save has nothing to delete
            where = sys.argv[2]
            if where == "before": Killed._remove = die
            if where == "within": shutil.rmtree = die
        super()._write(step, *content)

store = Killed(Path(sys.argv[1]), keep=1)
for step in (1, 2):
    arrays = {name: np.full((4, 5), step, np.float32) for name in "ab"}
    store.save(step, arrays, {"step": step}, {"elapsed": float(step)})
    store.wait()
print("not killed")
"""


def files(folder: Path) -> set[str]:
    return {p.relative_to(folder).parts[0] for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("where", ["before", "within"])
def test_a_kill_before_the_old_step_is_deleted_loses_and_leaks_nothing(where, tmp_path):
    folder = tmp_path / "checkpoints"
    command = [sys.executable, "-c", PROGRAM, str(folder), where]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == -signal.SIGKILL, process.stderr
    store = Checkpoints(folder, keep=1)
    # Half deleted, the old step has lost its manifest and doesn't count.
    assert store.steps() == ([1, 2] if where == "before" else [2])
    assert files(folder) == {"1", "2"}
    assert store.discard_unfinished() == ([] if where == "before" else [1])
    template = {name: np.zeros((4, 5), np.float32) for name in "ab"}
    for step in store.steps():
        found, arrays, progress = store.restore(template, step=step)
        assert found == step and progress == {"elapsed": float(step)}
        assert all((array == step).all() for array in arrays.values())
    assert store.restore(template)[0] == 2
    store.save(3, template, {"step": 3}, {"elapsed": 3.0})
    store.close()
    assert store.steps() == [3] and files(folder) == {"3"}
