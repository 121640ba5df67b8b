"""`uoe runs index`: a folder of anybody's JSON, to be asked as runs are."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.parse import parse
from uoe_jax.cli.search_targets import tell_broken
from uoe_jax.errors import ConfigError
from uoe_jax.escape import escape_line
from uoe_jax.files import check_target, format_json
from uoe_jax.runs.foreign import read_foreign
from uoe_jax.runs.index import INDEX, RunIndex


@dataclass(frozen=True, kw_only=True)
class IndexOptions:
    """Index a folder of JSON files: one object a .json file, or a line of .jsonl."""

    folder: Positional[Annotated[str, arg(metavar="FOLDER")]] = ""
    dim: int = 2048  # of the vectors: a power of two
    # How a number becomes part of a vector.
    number: Literal["fourier", "thermometer"] = "fourier"
    half: bool = False  # 2 bytes a number, not 4
    out: Path | None = None  # FOLDER/.index.npz if not given
    json: bool = False  # one JSON object instead of a table


def index_folder(args: list[str]) -> int:
    """Index a folder of JSON and write the index into it."""
    options = parse(IndexOptions, args, "runs index")
    if not options.folder:
        raise ConfigError("uoe runs index takes a folder: uoe runs index FOLDER")
    folder = Path(options.folder)
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give one with JSON files")
    out = options.out or folder / INDEX
    check_target(out, "--out")
    start = time.perf_counter()
    records = read_foreign(folder)
    index = RunIndex(records, dim=options.dim, number=options.number, half=options.half)
    try:
        size = index.save(out)
    except OSError as error:
        raise ConfigError(
            f"{out} can't be written ({error.strerror}); give --out FILE"
        ) from None
    about = {
        "objects": len(index),
        "broken": len(index.broken),
        "bytes": size,
        "seconds": time.perf_counter() - start,
        "index": str(out),
    }
    if options.json:
        print(format_json(about, indent=2))
    else:
        print(escape_line(
            f"{len(index):,} objects in {out}: {size:,} bytes, "
            f"{about['seconds']:.1f} s"
        ))  # fmt: skip
    tell_broken(index.broken)
    return 0
