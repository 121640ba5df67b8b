"""The page of what came out: questions, answers, how sure, a picture. Two screens."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from experiments.e012_evidence.choose import Row
from experiments.e012_evidence.tables import Group, mean_alone, model_table
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
_WIDTH = 130  # columns of a line of text


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
        "How models are compared, what their names mean, and what was planned before "
        "the runs: [evidence](../evidence.md). Differences in bits/byte of Wikipedia's "
        "test with 95% intervals.\n"
    )
    answers = {
        headline: [line for v in judged if v.comparison.headline == headline
                   if (line := _answer(v, groups))]
        for headline in QUESTIONS
    }  # fmt: skip
    for headline, question in QUESTIONS.items():
        if answers[headline]:
            lines += [f"**{question}**\n", *answers[headline], ""]
    named = [v.comparison.name.partition(":")[0] for v in judged
             if not _answer(v, groups)]  # fmt: skip
    if named:
        lines.append(f"Not measured yet: {', '.join(named)} of the plan.\n")
    figure = next(name for name in (*_FIGURES, *drawn) if name in drawn)
    lines.append(f"![{figure[2:-4]} of the models]({figure})\n")
    shown = max(groups, key=lambda group: len(group.trained))
    lines += [f"## {shown.title}\n", model_table(shown)]
    lines += ["## How sure\n", _how_sure(judged, groups)]
    return "\n".join(map(_wrapped, "\n".join(lines).split("\n"))), figure


def _wrapped(line: str) -> str:
    """Return a line of text in several; a table's row, a picture and others as is."""
    if len(line) <= _WIDTH or line.startswith(("|", "!")):
        return line
    inside = "  " if line.startswith("- ") else ""
    return textwrap.fill(
        line,
        _WIDTH,
        subsequent_indent=inside,
        break_long_words=False,
        break_on_hyphens=False,
    )


def _answer(verdict: Verdict, groups: Sequence[Group]) -> str:
    """Return a comparison's line; "" where it has no runs."""
    planned, found = verdict.comparison, verdict.difference
    number = planned.name.partition(":")[0]
    sides = f"- {number}, {planned.first} less {planned.second} ({planned.size})"
    if found is not None:
        said = verdict.say("holds", "**doesn't hold.**")
        return f"{sides}: {found.mean:+.4f} ± {found.half:.4f}: {said}"
    mean = mean_alone(groups, planned)
    return "" if mean is None else f"{sides}: {mean:+.4f}, one seed: no interval"


def _how_sure(judged: Sequence[Verdict], groups: Sequence[Group]) -> str:
    rows: list[Row] = [
        row for group in groups for runs in group.trained.values() for row in runs
    ]
    told = lambda name: ", ".join(sorted({row[name] for row in rows}))
    commits = ", ".join(sorted({row["commit"][:9] for row in rows}))
    measured = sum(one.difference is not None for one in judged)
    searched = sum(row["rate_by"] == "search" for row in rows)
    seeds = {len(runs) for group in groups for runs in group.trained.values()}
    few = min(seeds) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
    return (
        f"- {measured} of {len(judged)} planned comparisons are measured; p is "
        "adjusted for all. With one seed a difference has no interval.\n"
        f"- {len(rows)} runs, {few} of each model (seeds), "
        f"{searched} of them at a rate that a search found.\n"
        f"- On {told('device')}, jax {told('jax')}, commits {commits}, "
        f"{told('date')}.\n"
    )
