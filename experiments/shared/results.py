"""Results of runs as JSON files, and the table made from them."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from experiments.shared.case import Case, Study
from experiments.shared.plot import plot
from experiments.shared.stats import (
    Result,
    difference,
    median_seconds,
    spread,
    values,
)
from uoe_jax.bench.record import write_record
from uoe_jax.files import write_atomically
from uoe_jax.report.table import si

_TIMES_NOISE = 4.0  # of what rounding was seen to move in the same model
_MOST = 2e-3  # nats; rows in another order move more only if rows see each other
_LEAK = 1e-4  # nats; what rounding may move the mean loss of tokens before a change


def result_file(folder: Path, case: str, seed: int) -> Path:
    """Return where a run's result is."""
    return folder / "results" / f"{case}-{seed}.json"


def write_result(folder: Path, result: Result) -> None:
    """Write a run's result."""
    file = result_file(folder, result["case"], result["seed"])
    write_record(file, result)


def read_results(folder: Path, cases: Sequence[Case]) -> dict[str, list[Result]]:
    """Return the results of cases in their order, by case."""
    found: dict[str, list[Result]] = {}
    for case in cases:
        files = [result_file(folder, case.name, seed) for seed in case.seeds]
        results = [json.loads(f.read_text()) for f in files if f.is_file()]
        if results:
            found[case.name] = results
    return found


def best(study: Study, found: dict[str, list[Result]], names: Sequence[str]) -> str:
    """Return which of some cases validation prefers; "" if none has a result."""
    scored = {
        name: statistics.fmean(values(found[name], "valid", study.metric))
        for name in names
        if name in found
    }
    pick = max if study.metric == "accuracy" else min
    return pick(scored, key=scored.__getitem__) if scored else ""


def table(study: Study, found: dict[str, list[Result]]) -> str:
    """Return a Markdown table: quality, FLOPs, time and speed of every case.

    Differences are paired by seed, with their standard error: from the baseline, from
    the best of `study.rivals` on validation, from the origin.
    """
    base = found.get(study.baseline)
    unit = base[0]["forward_flops_per_token"] if base else None
    rival = best(study, found, study.rivals)
    percent = study.metric == "accuracy"
    name = "accuracy, %" if percent else "bits/byte"
    others = dict.fromkeys((study.baseline, rival, study.origin))
    against = [name for name in others if name in found]
    head = ["model", "parameters", "FLOPs", "rate", "seeds", f"valid {name}"]
    head += [f"test {name}", *(f"test, less {n}" for n in against)]
    head += ["seconds", "tokens/s"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for case, results in found.items():
        first = results[0]
        flops, seconds = first["forward_flops_per_token"], median_seconds(results)
        tokens = first["tokens_per_step"] * first["steps"]
        cells = [
            case,
            si(first["parameters"]),
            f"{flops / unit:.0%}" if unit else si(flops),
            f"{first['rate']:g}",
            str(len(results)),
            *(_cell(values(results, s, study.metric), percent)
              for s in ("valid", "test")),
            *("" if case == n else _delta(results, found[n], study.metric)
              for n in against),
            f"{seconds:.0f}",
            si(tokens / seconds),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" + causality(found)


def _cell(numbers: list[float], percent: bool) -> str:
    scale, digits = (100.0, 2) if percent else (1.0, 4)
    scaled = [v * scale for v in numbers]
    if not all(map(math.isfinite, scaled)):
        return "diverged"
    text = f"{statistics.fmean(scaled):.{digits}f}"
    return text + (f" ± {spread(scaled):.{digits}f}" if len(numbers) > 1 else "")


def _delta(first: list[Result], second: list[Result], metric: str) -> str:
    found = difference(first, second, metric)
    if found is None:
        return ""
    scale, digits = (100.0, 2) if metric == "accuracy" else (1.0, 4)
    mean, error = found
    text = f"{scale * mean:+.{digits}f}"
    return text if error is None else f"{text} ± {scale * error:.{digits}f}"


def causality(found: dict[str, list[Result]]) -> str:
    """Return a line on the trained models' leak probes, "" where there are none."""
    probes = {
        f"{case}, seed {r['seed']}": r["leak"]
        for case, results in found.items()
        for r in results
        if r.get("leak")
    }
    if not probes:
        return ""
    noise = {name: moved.get("noise", 0.0) for name, moved in probes.items()}
    leaks = [
        name
        for name, moved in probes.items()
        if not moved["before"] <= max(_LEAK, min(_TIMES_NOISE * noise[name], _MOST))
    ]
    largest = max(moved["before"] for moved in probes.values())
    least = min(moved["after"] for moved in probes.values())
    alone = max(noise.values())
    rounding = f" (rounding alone: {alone:.1e})" if alone else ""
    verdict = f"LEAKS: {'; '.join(leaks)}" if leaks else "nothing leaks"
    return (
        f"\nLater tokens changed in {len(probes)} trained models: the mean loss before "
        f"the change moved by at most {largest:.1e} nats{rounding}, behind it by at "
        f"least {least:.2f}: {verdict}.\n"
    )


def search_table(study: Study, found: dict[str, list[Result]]) -> str:
    """Return what the search for learning rates found, as Markdown."""
    percent = study.metric == "accuracy"
    name = "accuracy, %" if percent else "bits/byte"
    lines = ["", f"| family | rate | steps | valid {name} |", "|---|---|---|---|"]
    for case in study.search:
        for result in found.get(case.name, ()):
            shown = _cell(values([result], "valid", study.metric), percent)
            lines.append(
                f"| {case.family} | {result['rate']:g} | {result['steps']} | {shown} |"
            )
    return "\n".join(lines) + "\n" if len(lines) > 3 else ""


def write_summary(folder: Path, study: Study) -> str:
    """Write table.md and plot.png from a folder's results; return the tables."""
    folder.mkdir(parents=True, exist_ok=True)
    found = read_results(folder, study.cases)
    text = table(study, found)
    text += search_table(study, read_results(folder, study.search))
    write_atomically(folder / "table.md", f"# {study.title}\n\n{text}")
    if found:
        (folder / "plot.png").write_bytes(plot(study, found))
    return text
