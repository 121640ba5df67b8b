"""Tables of the study, from its results alone."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from experiments.e012_evidence.choose import (
    Row,
    by_validation,
    spent,
    undisturbed,
    validated,
    with_one_speed,
)
from experiments.e012_evidence.models import LEAN
from experiments.e012_evidence.study import SEARCH_SEED
from experiments.shared.compare import (
    Comparison,
    Difference,
    Plan,
    Spread,
    Verdict,
    differ,
    judge,
    pooled,
)
from experiments.shared.fronts import Equal, equal_spending
from experiments.shared.results import causality
from uoe_jax.report.table import si

BEST_MIXTURE = "best mixture"
# Models that validation chooses among, by the name that plans and tables give the best.
CHOICES: dict[str, Callable[[str], bool]] = {
    BEST_MIXTURE: lambda model: model.startswith("MoE"),
    "best lean": lambda model: model in LEAN,
    "best lean + conv": lambda model: (
        model.removesuffix(" + conv") in LEAN and model.endswith(" + conv")
    ),
}


@dataclass(frozen=True)
class Group:
    """Runs that are alike in size, T, task and lengths: by model, a run a seed."""

    setting: str
    steps: tuple[int, ...]
    models: dict[str, list[Row]]

    @property
    def corpora(self) -> list[str]:
        """Names of the texts that all are measured on; the first one decides."""
        return list(next(iter(self.models.values()))[0]["lengths"][-1]["test"])

    @property
    def title(self) -> str:
        """What stands above the group's tables."""
        row = next(iter(self.models.values()))[0]
        return f"{self.setting}, {si(row['tokens_per_step'] * self.steps[-1])} tokens"

    @property
    def trained(self) -> dict[str, list[Row]]:
        """The models that were trained: one at a smaller budget is no other run."""
        some = self.models.items()
        return {m: rows for m, rows in some if not any("at_budget" in r for r in rows)}

    def losses(self, model: str, corpus: str, length: int = -1) -> list[float]:
        """Return the test bits/byte of a model's seeds."""
        rows = self.models[model]
        return [row["lengths"][length]["test"][corpus] for row in rows]

    def spread(self, corpus: str, length: int = -1) -> Spread | None:
        """Return the seeds' spread pooled over the models; None: one seed each."""
        if all(len(rows) < 2 for rows in self.trained.values()):
            return None
        return pooled({m: self.losses(m, corpus, length) for m in self.trained})

    def fronts(self, model: str, axis: str, corpus: str) -> list[list[tuple]]:
        """Return (spent, loss) of each length, a list a seed."""
        return [
            [(spent(row, axis, line["steps"]), line["test"][corpus])
             for line in row["lengths"]]
            for row in self.models[model]
        ]  # fmt: skip

    def resolve(self, name: str, axis: str = "tokens") -> str | None:
        """Return a model's name, of `best ...` the one that validation prefers.

        Where all that are chosen among spent as much. None: it isn't here.
        """
        if name not in CHOICES:
            return name if name in self.models else None
        some = {m: rows for m, rows in self.models.items() if CHOICES[name](m)}
        return by_validation(some, axis)[0] if some else None


def find_groups(rows: Sequence[Row]) -> list[Group]:
    """Return the groups of runs that came to their end, the search left out."""
    found: dict[tuple, dict[str, dict[int, Row]]] = {}
    for row in itertools.chain(rows, *map(at_budgets, rows)):
        steps = tuple(row["planned_steps"])
        if row["seed"] == SEARCH_SEED or len(row["lengths"]) < len(steps):
            continue
        models = found.setdefault((row["setting"], steps), {})
        models.setdefault(row["case"], {})[row["seed"]] = row
    return [
        Group(
            setting,
            steps,
            {m: with_one_speed(list(r.values())) for m, r in models.items()},
        )
        for (setting, steps), models in found.items()
    ]


def at_budgets(row: Row) -> Iterator[Row]:
    """Yield a run's model at each budget, as a model `NAME at X`."""
    for top_k, loss in (row["lengths"][-1:] or [{}])[0].get("budgets", {}).items():
        last = row["lengths"][-1]
        last = {k: v for k, v in last.items() if k != "budgets"}
        corpus = next(iter(last["test"]))
        last |= {"test": last["test"] | {corpus: loss}}
        lengths = [*row["lengths"][:-1], last]
        told = {"at_budget": int(top_k), "lengths": lengths}
        yield row | {"case": f"{row['case']} at {top_k}"} | told


def equal_points(group: Group, first: str, second: str, axis: str) -> list[Equal]:
    """Return both models' test losses where they spent as much, by the first corpus."""
    corpus = group.corpora[0]
    fronts = [group.fronts(model, axis, corpus) for model in (first, second)]
    return equal_spending(*fronts)


def planned_points(group: Group, comparison: Comparison) -> list[Equal]:
    """Return where a comparison's models are compared: by tokens at the longest length,
    else at each that both reach; none where one of them isn't here."""
    sides = (comparison.first, comparison.second)
    names = [group.resolve(name, comparison.at) for name in sides]
    if None in names:
        return []
    first, second = (str(name) for name in names)
    points = equal_points(group, first, second, comparison.at)
    return points[-1:] if comparison.at == "tokens" else points


def measured(group: Group, comparison: Comparison) -> Difference | None:
    """Return a planned difference, at the worst of its lengths; None: no interval."""
    found = []
    for point in planned_points(group, comparison):
        spread = group.spread(group.corpora[0], point.length)
        if spread is not None:
            found.append(differ(point.first, point.second, spread))
    return max(found, key=lambda difference: difference.mean, default=None)


def mean_alone(groups: Sequence[Group], comparison: Comparison) -> float | None:
    """Return a planned difference of the longest runs that have it, of however few
    seeds: what a table may show where there is no interval."""
    mine = [g for g in groups if g.setting == comparison.size]
    for group in sorted(mine, key=lambda g: g.steps[-1], reverse=True):
        points = planned_points(group, comparison)
        means = [statistics.fmean(p.first) - statistics.fmean(p.second) for p in points]
        if means:
            return max(means)
    return None


def verdicts(plan: Plan, groups: Sequence[Group]) -> list[Verdict]:
    """Return what became of each planned comparison, of the longest runs that have it.

    Raises ConfigError for a comparison that isn't in the plan.
    """
    found = {}
    for one in plan.comparisons:
        mine = [g for g in groups if g.setting == one.size]
        for group in sorted(mine, key=lambda g: g.steps[-1], reverse=True):
            if (difference := measured(group, one)) is not None:
                found[one.name] = difference
                break
    return judge(plan, found)


def plan_table(judged: Sequence[Verdict]) -> str:
    """Return the planned comparisons as Markdown; what failed says its sentence."""
    lines = [
        "| planned | claim | difference, bits/byte (95%) | p, adjusted | holds |",
        "|---|---|---|---|---|",
    ]
    for one in judged:
        c, claim = one.comparison, f"{one.comparison.claim} {one.comparison.margin:g}"
        if one.difference is None or one.adjusted is None:
            lines.append(f"| {c.name} | {claim} | not measured | | |")
            continue
        d = one.difference
        word = one.say("yes", "no:")
        lines.append(
            f"| {c.name} | {claim} | {d.mean:+.4f} ± {d.half:.4f} | "
            f"{one.adjusted:.2g} | {word} |"
        )
    return "\n".join(lines) + "\n"


def model_table(group: Group) -> str:
    """Return a group's models as Markdown: losses at the longest length, costs."""
    base = group.models.get("dense") or group.models.get("dense + conv")
    first = (base or next(iter(group.models.values())))[0]
    head = ["model", "parameters", "FLOPs", "cache", "rate", "seeds"]
    head += [f"test {name}" for name in group.corpora]
    head += ["later half" if "recall" not in group.setting else "right", "copied"]
    head += ["seconds"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for model, rows in group.models.items():
        row = rows[0]
        flops, cache = (
            row[name] / first[name]
            for name in ("forward_flops_per_token", "cache_bytes")
        )
        cells = [model, si(row["parameters"]), f"{flops:.0%}", f"{cache:.0%}"]
        cells += [f"{row['rate']:g}", str(len(rows))]
        for corpus in group.corpora:
            cells.append(_mean(group, model, corpus))
        cells += [_late(rows, group.corpora[0]), _copied(rows)]
        seconds = spent(row, "seconds", group.steps[-1])
        lines.append("| " + " | ".join([*cells, f"{seconds:.0f}"]) + " |")
    return "\n".join(lines) + "\n" + _leaks(group) + _disturbed(group)


def _mean(group: Group, model: str, corpus: str) -> str:
    losses, spread = group.losses(model, corpus), group.spread(corpus)
    text = f"{statistics.fmean(losses):.4f}"
    if spread is None:
        return text
    error = spread.deviation / math.sqrt(len(losses))
    return f"{text} ± {Difference(0.0, error, spread.freedom).half:.4f}"


def _late(rows: Sequence[Row], corpus: str) -> str:
    """Return the later half's loss, or of recall the share of right answers."""
    if "recall" in rows[0]["lengths"][-1]:
        right = [_answered(row) for row in rows]
        return f"{statistics.fmean(right):.1%}"
    late = [row["lengths"][-1]["positions"][corpus][-1]["bits"] for row in rows]
    return f"{statistics.fmean(late):.4f}"


def _answered(row: Row) -> float:
    bins = row["lengths"][-1]["recall"]
    asked = sum(b["tokens"] for b in bins)
    return sum(b["tokens"] * b["right"] for b in bins) / asked


def _copied(rows: Sequence[Row]) -> str:
    copies = [row["lengths"][-1].get("copy") for row in rows]
    if None in copies:
        return ""
    return f"{statistics.fmean(copy['right'] for copy in copies):.1%}"


def _leaks(group: Group) -> str:
    probed = {
        model: [{"seed": r["seed"], "leak": r["lengths"][-1]["leak"]} for r in rows]
        for model, rows in group.trained.items()
    }
    return causality(probed)


def _disturbed(group: Group) -> str:
    """Return which models' seconds are of steps beside which another was compiled."""
    some = group.trained.items()
    names = [model for model, rows in some if not any(map(undisturbed, rows))]
    if not names:
        return ""
    return (
        f"\nSeconds of {', '.join(names)}: another model was compiled beside all "
        "steps so far, which may have slowed them.\n"
    )


def equal_table(group: Group, axis: str, against: str) -> str:
    """Return every model less another where both spent as much, by length."""
    other = group.resolve(against, axis)
    if other is None or axis == "tokens":
        return ""
    unit = {"seconds": "s", "flops": "FLOPs"}[axis]
    rows: dict[str, list[str]] = {}
    for model in group.models:
        if model == other:
            continue
        cells = [""] * len(group.steps)
        for point in equal_points(group, model, other, axis):
            spread = group.spread(group.corpora[0], point.length)
            mean = statistics.fmean(point.first) - statistics.fmean(point.second)
            text = f"{mean:+.4f}"
            if spread is not None:
                text += f" ± {differ(point.first, point.second, spread).half:.4f}"
            cells[point.length] = f"{text} at {si(point.spent)}{unit}"
        rows[model] = cells
    if not any(any(cells) for cells in rows.values()):
        return ""
    head = " | ".join(f"length {n + 1}" for n in range(len(group.steps)))
    lines = [f"| at equal {axis}, less {other} | {head} |"]
    lines.append("|---" * (len(group.steps) + 1) + "|")
    lines += [f"| {model} | {' | '.join(cells)} |" for model, cells in rows.items()]
    return "\n".join(lines) + "\n"


def rate_table(rows: Sequence[Row]) -> str:
    """Return what the searches found: valid bits/byte by rate, the best one marked."""
    found: dict[tuple[str, str, str], dict[float, float]] = {}
    for row in rows:
        if row["seed"] == SEARCH_SEED:
            key = (row["setting"], row["case"], row["optimizer"])
            found.setdefault(key, {})[row["rate"]] = validated(row)
    if not found:
        return ""
    lines = [
        "| setting | model | optimizer | rate: valid bits/byte |",
        "|---|---|---|---|",
    ]
    for (setting, case, optimizer), losses in found.items():
        best = min(losses, key=losses.__getitem__)
        ends = best in (min(losses), max(losses))
        cells = [
            f"**{rate:g}: {losses[rate]:.4f}**" if rate == best
            else f"{rate:g}: {losses[rate]:.4f}"
            for rate in sorted(losses)
        ]  # fmt: skip
        text = ", ".join(cells) + (" (at the edge)" if ends else "")
        lines.append(f"| {setting} | {case} | {optimizer} | {text} |")
    return "\n".join(lines) + "\n"


def all_tables(rows: Sequence[Row], plan: Plan) -> str:
    """Return the whole page of tables."""
    groups = find_groups(rows)
    parts = ["# 012: tables\n", "## Planned comparisons\n"]
    parts.append(plan_table(verdicts(plan, groups)))
    for group in groups:
        parts += [f"## {group.title}\n", model_table(group)]
        for axis in ("seconds", "flops"):
            names = ("dense", "dense + conv", BEST_MIXTURE)
            bases = [group.resolve(name, axis) for name in names]
            for base in dict.fromkeys(filter(None, bases)):
                parts.append(equal_table(group, axis, base))
    if rates := rate_table(rows):
        parts += ["## Rates\n", rates]
    return "\n".join(part for part in parts if part)
