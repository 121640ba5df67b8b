"""Run experiments: every case and seed, resumable, within a budget, on some devices.

    python -m experiments.run 001 --budget-seconds 900
    python -m experiments.run 001 005 002 003 --devices 0 1

Writes FOLDER/results/CASE-SEED.json (FOLDER: runs/experiments/NAME or OUT/NAME), and
from them table.md and plot.png. What has a result is skipped and what was interrupted
goes on, so the same line continues. `--tiny` is the same program on minutes of CPU and
on data that every machine has.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from experiments.shared.case import find_experiment, load_config
from experiments.shared.devices import spread
from experiments.shared.queue import Task, begin, outlook, restricted
from experiments.shared.results import write_summary
from uoe_jax.errors import ConfigError, UoeError, nearest


def main(argv: list[str] | None = None) -> int:
    """Run the program; 0, 1 if a run failed, 2 for a bad request."""
    argv = sys.argv[1:] if argv is None else argv
    options = _parse(argv)
    try:
        tasks = make_tasks(options)
        failed = 0
        if options.worker:
            failed = _work(tasks, options)
        elif not options.summary:
            begin(tasks)
            if options.devices:
                failed = spread(argv, options.devices, tasks)
            else:
                failed = _work(tasks, options)
        if not options.worker:
            for task in tasks:
                print(f"{task.name}\n\n{summarise(task)}", flush=True)
            done, all_runs, seconds = outlook(tasks)
            print(f"{done} of {all_runs} runs; {seconds:.0f} s of work left")
    except UoeError as error:
        print(f"experiment: {error}", file=sys.stderr)
        return error.exit_code
    return 1 if failed else 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="+", help="numbers or folders, as 001")
    parser.add_argument("--out", type=Path, default=Path("runs") / "experiments")
    parser.add_argument("--budget-seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--case-seconds",
        type=float,
        default=float("inf"),
        help="give up runs whose training would take longer",
    )
    parser.add_argument(
        "--devices", nargs="+", default=[], help="GPUs, one process on each, as 0 1"
    )
    parser.add_argument("--only", nargs="+", default=[], help="names of cases")
    parser.add_argument("--seeds", nargs="+", type=int, default=[])
    parser.add_argument("--tiny", action="store_true", help="minutes on a CPU")
    parser.add_argument("--summary", action="store_true", help="table and plot only")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _work(tasks: list[Task], options: argparse.Namespace) -> int:
    # These start jax, which only who trains needs.
    from experiments.shared.fit import Limits
    from experiments.shared.work import Worker, prepare, work

    prepare(options.out / "compiled")
    deadline = time.perf_counter() + options.budget_seconds
    worker = Worker(Limits(deadline, options.case_seconds))
    return work(tasks, worker, max(len(options.devices), 1))


def make_tasks(options: argparse.Namespace) -> list[Task]:
    """Return the experiments asked for; ConfigError for unknown ones or cases."""
    tasks, known = [], set()
    for name in options.experiments:
        folder = find_experiment(name)
        module = load_config(folder)
        # A folder of commands of its own may have modules of these names.
        own = {n for n in ("study", "program") if callable(getattr(module, n, None))}
        if not own:
            raise ConfigError(f"{folder.name} has commands of its own; see its README")
        study = None
        if "study" in own:
            study = restricted(module.study(options.tiny), options.seeds)
            known |= {case.name for case in study.cases}
        name = folder.name + ("-tiny" if options.tiny else "")
        tasks.append(
            Task(
                name,
                module,
                study,
                options.out / name,
                options.tiny,
                tuple(options.only),
            )
        )
    for case in options.only:
        if case not in known:
            raise ConfigError(f"no case {case!r}; {nearest(case, known)}")
    return tasks


def summarise(task: Task) -> str:
    """Write an experiment's table and plot from its results; return the table."""
    task.out.mkdir(parents=True, exist_ok=True)
    if task.study is None:
        return task.module.summary(task.out)
    return write_summary(task.out, task.study)


if __name__ == "__main__":
    sys.exit(main())
