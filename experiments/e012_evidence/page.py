"""The page of what came out: questions, answers, how sure, a picture. Two screens."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.e012_evidence.choose import Row
from experiments.e012_evidence.tables import Group, model_table
from experiments.shared.compare import Verdict
from uoe_jax.errors import ConfigError

QUESTIONS = {
    1: "Given as many seconds, is a lean union better than a dense model?",
    2: "Is a union better than the best mixture of experts?",
    3: "Do routed heads earn their place beside local ones?",
    4: "Does a union need less compute than a dense model?",
    5: "Can a trained dense model be cut to 70% of its FLOPs?",
    6: "Is one union as good at every budget as those trained for it?",
}
_FIGURES = ("g_ladder.png", "b_seconds.png", "e_recall.png", "a_flops.png")


def results_page(
    judged: Sequence[Verdict], groups: Sequence[Group], drawn: Sequence[str]
) -> tuple[str, str]:
    """Return the page as Markdown, and the figure that it shows, one of `drawn`.

    Raises ConfigError where no run has come to its end: nothing is said without runs.
    """
    if not groups:
        raise ConfigError("no run has come to its end; there is nothing to publish yet")
    lines = ["# Evidence: what came out\n"]
    lines.append(
        "How models are compared, and what was planned before the runs: "
        "[evidence](../evidence.md). Differences in bits/byte of Wikipedia's test with "
        "95% intervals.\n"
    )
    for headline, question in QUESTIONS.items():
        lines += _answer(question, [v for v in judged if headline == _headline(v)])
    figure = next(name for name in (*_FIGURES, *drawn) if name in drawn)
    lines.append(f"![{figure[2:-4]} of the models]({figure})\n")
    shown = max(groups, key=lambda group: len(group.models))
    lines += [f"## {shown.title}\n", model_table(shown)]
    lines += ["## How sure\n", _how_sure(judged, groups)]
    return "\n".join(lines), figure


def _headline(verdict: Verdict) -> int:
    return verdict.comparison.headline


def _answer(question: str, verdicts: Sequence[Verdict]) -> list[str]:
    """Return a question's lines: what was measured, and the names of what wasn't."""
    lines, open_names = [], []
    for one in verdicts:
        planned, number = one.comparison, one.comparison.name.partition(":")[0]
        if one.difference is None:
            open_names.append(number)
            continue
        found = f"{one.difference.mean:+.4f} ± {one.difference.half:.4f}"
        said = "holds" if one.holds else f"**doesn't hold.** {planned.failed}"
        sides = f"{planned.first} less {planned.second} ({planned.size})"
        lines.append(f"- {number}, {sides}: {found}: {said}")
    if open_names:
        lines.append(f"- Not measured yet: {', '.join(open_names)}.")
    return [f"**{question}**\n", *lines, ""]


def _how_sure(judged: Sequence[Verdict], groups: Sequence[Group]) -> str:
    rows: list[Row] = [
        row for group in groups for runs in group.models.values() for row in runs
    ]
    told = lambda name: ", ".join(sorted({str(row[name]) for row in rows}))
    measured = sum(one.difference is not None for one in judged)
    searched = sum(row["rate_by"] == "search" for row in rows)
    seeds = {len(runs) for group in groups for runs in group.models.values()}
    return (
        f"- {measured} of {len(judged)} planned comparisons are measured; p is "
        "adjusted for all. With one seed a difference has no interval.\n"
        f"- {len(rows)} runs of {min(seeds)} to {max(seeds)} seeds a model, "
        f"{searched} of them at a rate that a search found.\n"
        f"- On {told('device')}, jax {told('jax')}, commits {told('commit')}, "
        f"{told('date')}.\n"
    )
