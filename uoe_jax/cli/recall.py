"""The line before a training starts: a run like it, and how that one ended."""

from __future__ import annotations

from pathlib import Path

from uoe_jax.config import ExperimentConfig
from uoe_jax.runs.find import RUNS

_SECONDS = 0.01  # for runs that the index lacks
_MOST = 24 << 20  # bytes of an index that is read in time; some 2,000 runs
_WRITTEN = 3  # differences


def recall_line(config: ExperimentConfig, run_dir: Path) -> str | None:
    """Return a line on the run below runs/ that is most like a new one, or None.

    Only runs/ of the working folder is searched, wherever the new run goes: other
    folders can hold anything. Nothing that goes wrong here may stop a training.
    """
    if not RUNS.is_dir() or (run_dir / "metrics.jsonl").exists():
        return None
    try:
        return _line(config, run_dir)
    except Exception:  # a note isn't worth a run
        return None


def _line(config: ExperimentConfig, run_dir: Path) -> str | None:
    from uoe_jax.runs.index import INDEX
    from uoe_jax.runs.read import config_record
    from uoe_jax.runs.search import recall

    file = RUNS / INDEX
    if file.is_file() and file.stat().st_size > _MOST:
        return None
    record = config_record(config, str(run_dir))
    found = recall(RUNS, file, record, _SECONDS)
    if found is None:
        return None
    texts = [str(d) for d in found.differences[:_WRITTEN]]
    more = len(found.differences) - len(texts)
    said = "; ".join(texts) + (f"; and {more} more" if more else "")
    line = f"most like {found.record.path} (similarity {found.cosine:.2f}): "
    line += f"this one differs in {said}" if texts else "the same settings"
    if found.record.seed != record.seed:
        line += f", seed {found.record.seed} -> {record.seed}"
    loss = found.record["loss"]
    return line if loss is None else f"{line}; that one's loss was {loss:.4f}"


def remember(run_dir: Path) -> None:
    """Take a run that ended into the index of runs/, if that is where it lies."""
    from uoe_jax.runs.index import INDEX, open_index

    try:
        if run_dir.absolute().is_relative_to(RUNS.absolute()):
            open_index([RUNS], RUNS / INDEX)
    except Exception:  # as above
        return
