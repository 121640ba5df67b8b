"""Runs as their files tell them: settings and how they ended, without their arrays.

Two forms: a run's folder (config.json, metrics.jsonl) and an experiment's result (one
JSON file with `config`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from uoe_jax.config import (
    ExperimentConfig,
    ModelConfig,
    content_hash,
    from_json,
    to_json,
)
from uoe_jax.errors import DataError, first_line
from uoe_jax.files import check_path, format_json, parse_json, read_json
from uoe_jax.hardware.count import count_params
from uoe_jax.runs.leaves import leaves_of
from uoe_jax.runs.scales import LABELS

CONFIG, METRICS = "config.json", "metrics.jsonl"
_DEPTH = 5  # folders below a root in which runs are looked for
# Folders of a run, and others that hold no runs.
_SKIPPED = {"checkpoints", "best", "plots", "profile", "__pycache__", "node_modules"}
_TAIL = 1 << 18  # bytes at the end of a run's metrics that usually tell how it ended
_METRICS = ("loss", "bits_per_byte", "accuracy")

OK, NEW, BROKEN = "ok", "no metrics", "broken"


@dataclass(frozen=True)
class RunRecord:
    """One run: its settings, and what is known of how it ended.

    `outcome` has loss, bits_per_byte, accuracy (of validation), seconds, steps, tokens,
    parameters, as far as the files say. Nothing of it is encoded.
    """

    path: str  # as a person names it: a folder, a file, or file:line
    name: str
    # A number where an index left the settings as text.
    settings: Any = field(default_factory=dict)
    outcome: dict[str, float] = field(default_factory=dict)
    seed: int | None = None
    stamp: str = ""  # changes when the files do
    status: str = OK
    problem: str = ""  # why it is broken, one line

    def __getitem__(self, metric: str) -> float | None:
        """Return an outcome, or None."""
        return self.outcome.get(metric)

    @property
    def date(self) -> str:
        """The day its file or its metrics were last written; "" where nobody knows."""
        place = Path(re.sub(r":\d+$", "", self.path))
        for file in (place / "metrics.jsonl", place):
            with suppress(OSError):
                return f"{datetime.fromtimestamp(file.stat().st_mtime):%Y-%m-%d}"
        return ""

    @property
    def model(self) -> str:
        """Its kinds of attention and MLP: `dense`, or `union+moe`."""
        model = self.settings.get("model") if isinstance(self.settings, dict) else None
        if not isinstance(model, dict):
            return ""
        parts = [model.get(part) for part in ("attention", "mlp")]
        words = ["/".join(part) if isinstance(part, (list, tuple)) else str(part)
                 for part in parts if part]  # fmt: skip
        return "+".join(dict.fromkeys(words))

    @property
    def task(self) -> str:
        """What losses must have in common to be compared: the data and its tokens."""
        data, model = self.settings.get("data"), self.settings.get("model")
        if not isinstance(data, dict) or not isinstance(model, dict):
            return ""
        names = ("source", "path", "tokenizer", "bpe_vocab_size", "text_key", "seq_len")
        parts = [data.get(name) for name in names]
        if data.get("tokenizer") != "bpe":
            parts[3] = None
        if data.get("seq_len") is None and model.get("kind") == "decoder":
            parts[5] = model.get("max_seq_len")
        return format_json([model.get("kind"), *parts])


def find_files(roots: list[Path]) -> Iterator[Path]:
    """Yield folders of runs and files of experiments' results below some roots.

    Raises DataError for a root that doesn't exist, ConfigError for one in a store.
    """
    for root in roots:
        check_path(root, "the folder with runs")
        if root.is_file():
            yield root
        elif root.is_dir():
            yield from _walk(root, 0)
        else:
            raise DataError(f"{root} doesn't exist; give a folder with runs")


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:  # not ours to read
        return
    names = {entry.name for entry in entries}
    if CONFIG in names or METRICS in names:
        yield folder
        return
    if folder.name == "results":
        yield from (Path(e.path) for e in entries if e.name.endswith(".json"))
        return
    for entry in entries:
        hidden = entry.name.startswith(".") or entry.name in _SKIPPED
        if depth < _DEPTH and not hidden and entry.is_dir(follow_symlinks=False):
            yield from _walk(Path(entry.path), depth + 1)


def stamp_of(path: Path) -> str:
    """Return a text that changes when a run's files do: their sizes and times."""
    files = (path / CONFIG, path / METRICS) if path.is_dir() else (path,)
    parts = []
    for file in files:
        try:
            about = file.stat()
            parts.append(f"{about.st_size}.{about.st_mtime_ns}")
        except OSError:
            parts.append("-")
    return "/".join(parts)


def read_run(path: Path) -> RunRecord | None:
    """Return the run of a folder or of a result's file; None for JSON without a config.

    Never raises for what the files hold: a broken run says what is wrong with it.
    """
    stamp, name = stamp_of(path), path.name if path.is_dir() else path.stem
    try:
        made = _read_folder(path) if path.is_dir() else _read_result(path)
        if made is None:
            return None
        config, outcome = made
        settings, seed = as_settings(config), _seed(config)
        leaves_of(settings)  # what couldn't be encoded is broken too
    except (OSError, ValueError, TypeError, RecursionError) as error:
        text = f"{path / CONFIG} is missing" if _absent(error) else first_line(error)
        return RunRecord(str(path), name, stamp=stamp, status=BROKEN, problem=text)
    status = OK if any(metric in outcome for metric in _METRICS) else NEW
    return RunRecord(str(path), name, settings, outcome, seed, stamp, status)


def _absent(error: BaseException) -> bool:
    return isinstance(error, FileNotFoundError)


def _read_folder(path: Path) -> tuple[dict[str, Any], dict[str, float]]:
    raw = read_json(path / CONFIG)
    if not isinstance(raw, dict) or not isinstance(raw.get("model"), dict):
        raise DataError(f"{path / CONFIG} is not the config of a run; restore it")
    return raw, _count(raw["model"]) | _ending(path / METRICS)


def _count(model: dict[str, Any]) -> dict[str, float]:
    """Return a model's parameters, or nothing where this version can't make it."""
    try:
        config = from_json(format_json(model), ModelConfig)
        return {"parameters": float(sum(count_params(config).values()))}
    except (ValueError, TypeError, ArithmeticError, LookupError):
        return {}


def _read_result(path: Path) -> tuple[dict[str, Any], dict[str, float]] | None:
    raw = read_json(path)
    if not isinstance(raw, dict) or not isinstance(raw.get("config"), dict):
        return None
    valid: Any = raw.get("valid") if isinstance(raw.get("valid"), dict) else {}
    found: dict[str, Any] = {name: valid.get(name) for name in _METRICS}
    found |= {name: raw.get(name) for name in ("parameters", "seconds", "steps")}
    per_step, steps = raw.get("tokens_per_step", 0), raw.get("steps", 0)
    if _is_number(per_step) and _is_number(steps):
        found["tokens"] = per_step * steps
    config = raw["config"]
    if isinstance(config.get("train"), dict) and "seed" in raw:
        config["train"]["seed"] = raw["seed"]
    return config, {k: float(v) for k, v in found.items() if _is_number(v)}


def _seed(config: Mapping[str, Any]) -> int | None:
    train = config.get("train")
    seed = train.get("seed") if isinstance(train, dict) else None
    return seed if isinstance(seed, int) else None


def _ending(file: Path) -> dict[str, float]:
    """Return the last validation's numbers, and the last step's."""
    found: dict[str, float] = {}
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            for amount in (_TAIL, size):
                stream.seek(max(0, size - amount))
                found = _last_lines(stream.read().split(b"\n"), cut=amount < size)
                if "loss" in found or amount >= size:
                    break
    except FileNotFoundError:
        pass
    return found


def _last_lines(lines: list[bytes], *, cut: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    seen: set[str] = set()
    for text in reversed(lines[1:] if cut else lines):
        if not text.strip():
            continue
        try:
            record = parse_json(text, METRICS)
        except DataError:  # the last line of a run that was killed
            continue
        kind = record.get("kind") if isinstance(record, dict) else None
        if kind in seen or kind not in ("train", "eval"):
            continue
        if kind == "eval" and record.get("split", "valid") != "valid":
            continue
        seen.add(kind)
        names = _METRICS if kind == "eval" else ("tokens",)
        for name, key in [(n, n) for n in names] + [("steps", "step")]:
            if _is_number(record.get(key)):
                found.setdefault(name, float(record[key]))
        if _is_number(record.get("seconds")):
            found["seconds"] = max(float(record["seconds"]), found.get("seconds", 0.0))
        if len(seen) == 2:
            break
    return found


def _is_number(value: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) < 1e300


def as_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a run's config as it is compared.

    Fields that it lacks are at today's defaults, as whoever resumes it has them; names,
    folders and what decides nothing are left out, and of its data's path all but the
    file's name: results travel.
    """
    settings = _with_defaults(config, _DEFAULTS)
    for path in LABELS:
        part: Any = settings
        for step in path[:-1]:
            part = part.get(step) if isinstance(part, dict) else None
        if isinstance(part, dict):
            part.pop(path[-1], None)
    data = settings.get("data")
    for name in ("path", "tokenizer"):
        if isinstance(data, dict) and isinstance(data.get(name), str):
            data[name] = data[name].rstrip("/").rsplit("/", 1)[-1]
    return settings


def _with_defaults(given: Mapping[str, Any], known: Mapping[str, Any]) -> dict:
    found = {**known, **given}
    for name, default in known.items():
        if isinstance(default, dict) and isinstance(given.get(name), dict):
            found[name] = _with_defaults(given[name], default)
        elif isinstance(default, dict) and name not in given:
            found[name] = _with_defaults({}, default)
    return found


def _as_json(config: ExperimentConfig) -> dict[str, Any]:
    """Return a config as its file has it: lists, not tuples."""
    return parse_json(to_json(config), "the config")


_DEFAULTS = _as_json(ExperimentConfig())
# Of the defaults that records were completed with: another version has others.
DEFAULTS = content_hash(_DEFAULTS)


def config_record(config: ExperimentConfig, name: str) -> RunRecord:
    """Return a plan as a run that hasn't begun."""
    raw = _as_json(config)
    return RunRecord(name, name, as_settings(raw), seed=_seed(raw), status=NEW)
