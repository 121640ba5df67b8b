"""Completion against installed peers on one CPU thread, or the accelerator suite.

    python benchmarks/bench_completion.py --out cpu.json --movielens ml100k.npz \
        --jester jester.npz
    python benchmarks/bench_completion.py --gpu-suite --out gpu.json
    python benchmarks/bench_completion.py --plot cpu.json gpu.json --out slopes.png

Sections on a CPU: planted, movielens, sweep, ratings, ranks, entries; in the suite:
sweep, planted, ranks, entries.
"""

from __future__ import annotations

import os
from pathlib import Path

from uoe_jax.bench.record import arguments, read_record


def main() -> None:
    """Run what the command line asks for."""
    parser = arguments(__doc__)
    parser.set_defaults(out=Path("completion.json"))
    parser.add_argument("--gpu-suite", action="store_true")
    parser.add_argument("--small", action="store_true", help="tiny sizes, any device")
    parser.add_argument("--budget", type=float, default=280.0, help="seconds")
    parser.add_argument("--only", nargs="*", default=[], help="sections")
    parser.add_argument("--movielens", type=Path, help="npz: user, item, rating, fold")
    parser.add_argument("--jester", type=Path, help="npz: x100, -32768 where unrated")
    parser.add_argument("--plot", type=Path, nargs="*", help="reports with slopes")
    args = parser.parse_args()
    if args.plot:
        from completion_slopes import plot_slopes

        plot_slopes([read_record(path) for path in args.plot], args.out)
    elif args.gpu_suite:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from completion_gpu import run_suite

        run_suite(args)
    else:
        for name in ("OMP", "OPENBLAS", "MKL"):
            os.environ[f"{name}_NUM_THREADS"] = "1"
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from completion_cpu import run_cpu

        run_cpu(args)


if __name__ == "__main__":
    main()
