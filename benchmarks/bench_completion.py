"""Completion against installed peers on one CPU thread, or the accelerator suite.

python benchmarks/bench_completion.py --out cpu.json --movielens ml100k.npz
python benchmarks/bench_completion.py --gpu-suite --out gpu.json
python benchmarks/bench_completion.py --plot cpu.json gpu.json --out slopes.png
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu-suite", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny sizes, any device")
    parser.add_argument("--out", default="completion.json")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds")
    parser.add_argument("--only", nargs="*", default=[], help="sections")
    parser.add_argument("--movielens", help="npz with user, item, rating, fold")
    parser.add_argument("--jester", help="npz with x100, -32768 where unrated")
    parser.add_argument("--plot", nargs="*", default=[], help="reports with slopes")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot, args.out)
        return 0
    if args.gpu_suite:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from completion_gpu import run_suite

        run_suite(args.out, args.small, args.budget, args.only)
        return 0
    for name in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{name}_NUM_THREADS"] = "1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    from completion_cpu import run_cpu

    run_cpu(args.out, args.movielens, args.jester, args.only)
    return 0


def plot(files: list[str], out: str) -> None:
    """Plot the slopes of several reports into one PNG."""
    from completion_slopes import plot_slopes

    reports: dict[str, dict] = {}
    for file in files:
        report = json.loads(Path(file).read_text())
        reports.setdefault(report.get("device", "one CPU thread"), {}).update(report)
    plot_slopes(reports, Path(out))


if __name__ == "__main__":
    sys.exit(main())
