"""The fuzz tests, in processes of their own.

They run commands whose signals, outputs and limits of time are the process's, and
without the checks of annotations: neither is for the tests beside them.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parent / "fuzz").glob("test_*.py"))
# Two processes: what they begin with takes as long as what they do.
TOGETHER = (FILES[::2], FILES[1::2])


def run_apart(files, marks):
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-q", "-s", "-m", marks, *files]
    found = subprocess.run(
        [*map(str, command), "-p", "no:cacheprovider"],
        cwd=Path(__file__).parents[1],
        env=env | {"UOE_FUZZ": "1"},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    said = f"{found.stdout[-8000:]}\n{found.stderr[-2000:]}"
    assert found.returncode == 0, said
    return found.stdout


@pytest.mark.parametrize("files", TOGETHER, ids=lambda files: files[0].stem)
def test_a_few_random_cases_end_as_promised(files):
    assert " passed" in run_apart(files, "not nightly")


@pytest.mark.nightly
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_many_random_cases_end_as_promised(file):
    print(run_apart([file], ""))
