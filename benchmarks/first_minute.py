"""What a newcomer waits for: `uoe train PRESET` from nothing, again, and `generate`.

    python benchmarks/first_minute.py small-union small --data articles.jsonl.xz --out F

Each preset has a cache folder of its own, empty at first, so that the text is prepared
and all programs are compiled. Then the same training is begun again in another folder,
which finds both in the cache, and the run is sampled twice. Of each command: seconds
until its first line, seconds in all, and what it said of compiling.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from uoe_jax.bench.record import ROOT, arguments, header, write_record

_COMPILED = re.compile(r"compiled in ([\d.]+) s")


def watch(command: list[str], cache: Path) -> dict[str, Any]:
    """Run a `uoe` command; return its seconds, and how it failed if it did."""
    place = {"XDG_CACHE_HOME": str(cache), "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    found: dict[str, Any] = {"command": f"uoe {command[0]}"}
    lines = []
    with subprocess.Popen(
        [sys.executable, "-m", "uoe_jax", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | place,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                found.setdefault("first_line", time.perf_counter() - start)
                lines.append(line.rstrip())
    found["seconds"] = time.perf_counter() - start
    compiled = _COMPILED.findall("\n".join(lines))
    if compiled:
        found["compiled_in"] = [float(seconds) for seconds in compiled]
    if process.returncode:
        found["failed"] = lines[-1][:300] if lines else f"code {process.returncode}"
    return found


def try_preset(name: str, args: Any, folder: Path) -> dict[str, dict[str, Any]]:
    """Return the rows of one preset, by what was waited for."""
    steps = f"--train.steps={args.steps}"
    train = ["train", name, f"--data.path={args.data.absolute()}", steps]
    sample = ["generate", str(folder / "first"), f"--max-new-tokens={args.new}"]
    sample += ["--prompt=The "]
    at = lambda run: [*train, f"--run-dir={folder / run}"]
    commands = {
        "from nothing": at("first"),
        "again": at("second"),
        "sampled": sample,
        "sampled again": sample,
    }
    rows = {}
    for what, command in commands.items():
        rows[what] = watch(command, folder / "cache")
        print(f"{name:14s} {what:14s} {show(rows[what])}", flush=True)
    return rows


def show(row: dict[str, Any]) -> str:
    """Return a row as a line."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    parts = [f"first line {row['first_line']:.1f} s", f"all {row['seconds']:.1f} s"]
    if "compiled_in" in row:
        parts += [f"compiled in {', '.join(map(str, row['compiled_in']))} s"]
    return ", ".join(parts)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("presets", nargs="+", metavar="PRESET")
    parser.add_argument("--data", type=Path, required=True, help="text to train on")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--new", type=int, default=128, help="tokens sampled")
    args = parser.parse_args()
    # This process must hold no device while others use it.
    device = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.devices()[0].device_kind)"],
        capture_output=True,
        text=True,
    ).stdout.strip()
    record: dict[str, Any] = header(stated=args.commit, device=device or "none")
    record |= {"steps": args.steps, "new": args.new, "presets": {}}
    for name in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            record["presets"][name] = try_preset(name, args, Path(folder))
        write_record(args.out, record)


if __name__ == "__main__":
    main()
