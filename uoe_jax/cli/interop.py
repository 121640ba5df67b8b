"""`uoe import` and `uoe export`: other libraries' models in, runs out as theirs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import parse
from uoe_jax.config import DType
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape
from uoe_jax.files import format_json
from uoe_jax.runs.find import RUNS, find_run
from uoe_jax.runs.stored import run_folder
from uoe_jax.stores.mirror import named


@dataclass(frozen=True, kw_only=True)
class ImportOptions:
    """Read a Hugging Face model or a GGUF file into a run that every verb opens."""

    # A folder of safetensors, a .gguf file, or hf:ORG/NAME[@REVISION] of the hub.
    source: Positional[Annotated[str, arg(metavar="FOLDER|FILE.gguf|hf:ORG/NAME")]]
    run_dir: Path | None = None  # folder of the run; runs/<name of the model> if not
    dtype: DType | None = None  # of the weights here; as they are in the file if not
    json: bool = False  # one JSON object instead of a table


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a run as a folder that transformers opens, an adapter as PEFT reads it."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # or runs/RUN
    out: Positional[Annotated[Path, arg(metavar="FOLDER")]]  # new or empty
    checkpoint: Literal["last", "best"] = "last"  # of the run
    # Of the tensors there, which are rounded to it; as they are in the run if not.
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    json: bool = False  # one JSON object instead of a table


def import_model(args: list[str]) -> int:
    """Write another library's model as a run and print what it is."""
    options = parse(ImportOptions, args, "import")

    from uoe_jax.cli.device import prepare

    prepare()
    from uoe_jax.interop import hub
    from uoe_jax.interop.importing import import_run, run_name

    source = options.source
    out = options.run_dir or RUNS / run_name(source)
    out = run_folder(out, "--run-dir", writes=True)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} isn't empty; choose another --run-dir")
    path = hub.fetch(source) if source.startswith(hub.MARK) else Path(source)
    found = import_run(path, out, dtype=options.dtype, source=source)
    _show(found, options.json)
    if not options.json:
        print(f"run: {escape(named(out))}")
    return 0


def export_model(args: list[str]) -> int:
    """Write a run as another library's model and print what it is."""
    options = parse(ExportOptions, args, "export")
    adapter = _adapter(options.run)
    folder = adapter or find_run(options.run)
    if adapter is not None and options.dtype is not None:
        raise ConfigError(
            f"{adapter} is an adapter, which is written in the dtype it has; leave "
            "--dtype out"
        )

    from uoe_jax.cli.device import prepare

    prepare()
    if adapter is not None:
        from uoe_jax.adapt.export import export_adapter

        found = export_adapter(adapter, options.out, options.checkpoint)
        _show(found, options.json)
        return 0
    from uoe_jax.interop.exporting import export_run

    found = export_run(
        folder, options.out, which=options.checkpoint, dtype=options.dtype
    )
    _show(found, options.json)
    return 0


def _adapter(name: str) -> Path | None:
    """Return the folder of an adapter, given as runs are; None for another name."""
    for folder in (Path(name), RUNS / name):
        if name and (folder / "adapter_config.json").is_file():
            return folder
    return None


def _show(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(format_json(found, indent=2))
        return
    words = {name: value for name, value in found.items() if name != "did"}
    width = max(map(len, words))
    for name, value in words.items():
        if isinstance(value, list):
            value = ", ".join(map(str, value)) or "nothing"
        if isinstance(value, bool):
            value = "yes" if value else "no"
        shown = f"{value:,}" if isinstance(value, int) else str(value or "none")
        print(f"{name:<{width}}  {escape(shown)}")
