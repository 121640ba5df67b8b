"""Which folder a run is, by its path or its name under runs/. Imports no jax."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.presets import PRESETS, get_preset
from uoe_jax.runs.stored import run_folder
from uoe_jax.stores.objects import address_of
from uoe_jax.validation import check_own, read_config

RUNS = Path("runs")  # where runs go when no folder is named


def find_run(name: str) -> Path:
    """Return the folder of a run given as a path or as a name under runs/.

    Raises ConfigError where there is none, and for another library's model.
    """
    if not name:
        raise ConfigError(f"no run is named; {_known_runs(name)}")
    if (address := address_of(name)) is not None:
        folder = run_folder(name, "the run")
        if not (folder / "config.json").is_file():
            raise ConfigError(f"no run at {address} (no config.json there)")
        check_own(folder)
        return folder
    for folder in (Path(name), RUNS / name):
        if (folder / "config.json").is_file():
            check_own(folder)
            return folder
    raise ConfigError(f"no run at {name!r} (no config.json there); {_known_runs(name)}")


def with_teacher_found(config: ExperimentConfig) -> ExperimentConfig:
    """Return a config whose `train.distill_from` is a folder, if it names any run."""
    if config.train.distill_from is None:
        return config
    teacher = config.train.distill_from
    folder = str(find_run(teacher))
    folder = address_of(teacher) or folder  # from elsewhere the copy isn't seen
    train = dataclasses.replace(config.train, distill_from=folder)
    return dataclasses.replace(config, train=train)


def is_run(name: str) -> bool:
    """Return whether `find_run` would find it."""
    if address_of(name) is not None:  # `find_run` says what isn't there
        return True
    places = (Path(name), RUNS / name) if name else ()  # Path("") is where we stand
    return any((folder / "config.json").is_file() for folder in places)


def run_or_preset(name: str) -> tuple[Path | None, ExperimentConfig]:
    """Return (folder, config) of a run, or (None, config) of a preset."""
    if is_run(name):
        folder = find_run(name)
        return folder, read_config(folder)
    if name in PRESETS or name.startswith("sized-"):
        return None, get_preset(name)
    known = [*PRESETS, *_run_names()]
    raise ConfigError(f"no preset and no run {name!r}; {nearest(name, known)}")


def _run_names() -> list[str]:
    return sorted(str(path.parent) for path in RUNS.glob("*/config.json"))


def _known_runs(name: str) -> str:
    known = _run_names()
    if not known:
        return "train one first: uoe train tiny"
    return nearest(str(RUNS / name), known)
