"""Memory that really runs out: a process may not have more, and the run wants more."""

import os
import resource
import subprocess
import sys

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n\n" for i in range(400))
MOST = 40 * 10**9  # bytes of addresses; a run at rest has a few of them


def test_a_run_that_gets_no_more_memory_says_what_would_fit(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = [
        sys.executable, "-m", "uoe_jax", "train", "tiny", "--no-report",
        "--data.path", str(text), "--data.cache-dir", str(tmp_path),
        "--run-dir", str(tmp_path / "run"), "--data.batch-size", "8192",
        "--train.steps", "2",
    ]  # fmt: skip
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (MOST, MOST))
    done = subprocess.run(
        command, preexec_fn=limit, capture_output=True, text=True, timeout=900,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 4, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("uoe: out of memory (about ")
    assert "--data.batch-size" in line and "--train.accumulate" in line
    assert "--model.remat" in line
