"""What an experiment trains: named cases, each a config and its seeds."""

from __future__ import annotations

import dataclasses
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from uoe_jax.config import ExperimentConfig, content_hash
from uoe_jax.errors import ConfigError, nearest
from uoe_jax.mixture import read_mix

HERE = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, trained once for every seed."""

    name: str
    config: ExperimentConfig
    seeds: tuple[int, ...] = (0, 1, 2)
    # Cases of a family share the learning rate that the family's search settled on.
    family: str = ""


@dataclass(frozen=True, kw_only=True)
class Study:
    """An experiment: its cases in the order in which they are trained."""

    title: str
    metric: Literal["bits_per_byte", "accuracy"]
    cases: tuple[Case, ...]
    baseline: str = "dense"  # the case whose FLOPs are 100%
    rivals: tuple[str, ...] = ()  # of these, the best on valid is compared with too
    origin: str = ""  # the case that others change in one way: all are compared with it
    search: tuple[Case, ...] = ()  # trained first; a family's best rate is taken


def search_rates(
    cases: tuple[Case, ...], rates: tuple[float, ...], steps: int
) -> tuple[Case, ...]:
    """Return short runs of the first case of each family, one for each rate.

    Their seed is none of the reported ones.
    """
    first: dict[str, Case] = {}
    for case in cases:
        first.setdefault(case.family, case)
    return tuple(
        Case(
            name=f"rate {rate:g} {family}",
            family=family,
            seeds=(100,),
            config=change(
                case.config, optim={"learning_rate": rate}, train={"steps": steps}
            ),
        )
        for family, case in first.items()
        for rate in rates
    )


def with_rates(study: Study, rates: dict[str, float]) -> Study:
    """Return the study with each case at its family's learning rate."""
    settled = (
        dataclasses.replace(
            case,
            config=change(case.config, optim={"learning_rate": rates[case.family]}),
        )
        if case.family in rates
        else case
        for case in study.cases
    )
    return dataclasses.replace(study, cases=tuple(settled))


def find_experiment(name: str) -> Path:
    """Return the folder of an experiment named by its number or in full."""
    folders = sorted(p.parent for p in HERE.glob("e[0-9]*/__init__.py"))
    found = [
        f
        for f in folders
        if name.removeprefix("e") in (f.name[1:], f.name[1:].split("_")[0])
    ]
    if len(found) != 1:
        known = [f.name for f in folders]
        raise ConfigError(f"no experiment {name!r}; {nearest(name, known)}")
    return found[0]


def load_config(folder: Path) -> ModuleType:
    """Return an experiment's config.py as a module; without one, its package."""
    has_config = (folder / "config.py").is_file()
    name = f"experiments.{folder.name}" + (".config" if has_config else "")
    return importlib.import_module(name)


def data_file(name: str) -> str:
    """Return a file of UOE_DATA_DIR; raise ConfigError where there is none."""
    folder = os.environ.get("UOE_DATA_DIR")
    if not folder:
        raise ConfigError(
            f"UOE_DATA_DIR isn't set; set it to the folder that holds {name}, or "
            "use --tiny, which needs no file"
        )
    path = Path(folder) / name
    if not path.is_file():
        raise ConfigError(f"{path} doesn't exist; set UOE_DATA_DIR to its folder")
    return str(path)


# Parts of a model's config, and the kinds of layers that read them.
_READERS = {
    "union": {"union", "moh"},
    "union_attention": {"union", "moh"},
    "moe": {"moe"},
    "moba": {"moba"},
    "mod": {"mod"},
}


def program_key(config: ExperimentConfig) -> str:
    """Return what identifies a model's programs: all but names, folders and rate.

    And but what no layer reads: results stay valid when another kind's defaults change.
    """
    plain = change(without_folders(config), optim={"learning_rate": 1.0})
    content = dataclasses.asdict(plain) | {"name": ""}
    model = config.model
    kinds = {*model.attention, *model.mlp, *model.blocks}
    for part, readers in _READERS.items():
        if not readers & kinds:
            del content["model"][part]
    return content_hash(content)


def without_folders(config: ExperimentConfig) -> ExperimentConfig:
    """Return the config with its data files' names alone: results travel."""
    path, mix = config.data.path and Path(config.data.path).name, config.data.mix
    if mix is not None:
        shares = read_mix(mix)
        mix = tuple(f"{Path(share.path).name}={share.weight!r}" for share in shares)
    return change(config, data={"path": path, "mix": mix, "cache_dir": None})


def change(config: ExperimentConfig, **parts: dict[str, Any]) -> ExperimentConfig:
    """Return a config with fields of its parts replaced: `model={"d_ff": 64}`.

    A dict inside a part replaces fields of the dataclass that stands there.
    """
    return _change(config, parts)


def _change(config: Any, fields: dict[str, Any]) -> Any:
    replaced: dict[str, Any] = {}
    for name, value in fields.items():
        old = getattr(config, name)
        nested = isinstance(value, dict) and dataclasses.is_dataclass(old)
        replaced[name] = _change(old, value) if nested else value
    return dataclasses.replace(config, **replaced)
