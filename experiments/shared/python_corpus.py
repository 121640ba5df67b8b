"""A corpus of the Python source that is installed here, tested by whole packages.

    python -m experiments.shared.python_corpus --out FOLDER
    python -m experiments.shared.python_corpus --out FOLDER --packages corpus.json

Writes FOLDER/texts/train.jsonl, valid.jsonl and test.jsonl, a file of source a record,
and FOLDER/corpus.json, which says of what packages. Nothing is downloaded, and nothing
of it is part of this project: every file keeps the licence of its package. The same
packages make the same bytes. Files that differ in comment lines, blank ones and
indentation only are taken once, for training if it has one of them. `--packages` makes
the corpus of an earlier corpus.json again, of its packages and splits alone; what would
have other texts is refused.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from uoe_jax.data.split import SPLITS, hash_fraction
from uoe_jax.data.text import stdlib_files
from uoe_jax.errors import DataError, UoeError
from uoe_jax.files import format_json, read_json, write_atomically

SHORTEST = 200  # bytes of a file
LONGEST = 200_000  # beyond: tables that a program wrote
_NEAR = 0.9  # of what a split should have, at which it has enough
_MOST = 1 / 3  # of what a split should have, that one package may be


@dataclass
class Package:
    """An installed package: its files by name, what they hold, their split."""

    name: str
    version: str
    texts: dict[str, str] = field(default_factory=dict)
    split: str = "train"

    @property
    def num_bytes(self) -> int:
        """Bytes of all texts."""
        return sum(len(text.encode()) for text in self.texts.values())


def installed() -> Iterator[tuple[str, str, dict[str, Path]]]:
    """Yield name, version and .py files of the packages here, Python's own first."""
    own = {file.name: file.path for file in stdlib_files()}
    yield "python", platform.python_version(), own
    for found in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", found.metadata["Name"]).lower()
        files = [
            f for f in found.files or () if f.suffix == ".py" and ".." not in f.parts
        ]
        yield name, found.version, {f.as_posix(): Path(str(f.locate())) for f in files}


def read_packages(found: Iterable[tuple[str, str, dict[str, Path]]]) -> list[Package]:
    """Return the packages by name, with the texts that a corpus can have."""
    packages: dict[str, Package] = {}
    for name, version, files in found:
        package = packages.setdefault(name, Package(name, version))
        for place, path in sorted(files.items()):
            if (text := _read(path)) is not None:
                package.texts[place] = text
    return [packages[name] for name in sorted(packages)]


def _read(path: Path) -> str | None:
    """Return a file's text; None: it isn't there, isn't UTF-8, or too short or long."""
    try:
        if not SHORTEST <= path.stat().st_size <= LONGEST:
            return None
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return None


def assign_packages(packages: list[Package], valid: float, test: float) -> None:
    """Give shares of the bytes to valid and test, in whole packages by their hash.

    Packages that are over a third of a share, or too large for what is left of it, stay
    in train. Raises DataError where a split that is asked for gets none.
    """
    total = sum(package.num_bytes for package in packages)
    order = sorted(packages, key=lambda package: hash_fraction(package.name.encode()))
    for split, share in (("test", test), ("valid", valid)):
        wanted, taken = share * total, 0
        for package in order:
            size = package.num_bytes
            fits = 0 < size <= min(wanted - taken, _MOST * wanted)
            if fits and package.split == "train" and taken < _NEAR * wanted:
                package.split, taken = split, taken + size
        if share and not taken:
            raise DataError(
                f"no package is as small as a third of {share:g} of {total:,} bytes, "
                f"the share of {split}; install more packages or raise --{split}"
            )


def choose_packages(packages: list[Package], file: Path) -> list[Package]:
    """Return the packages that a corpus.json names, each in the split that it had.

    Raises DataError where some aren't installed here in the same versions.
    """
    here, chosen, wrong = {p.name: p for p in packages}, [], []
    for name, (version, split) in sorted(_told(file)["packages"].items()):
        package = here.get(name)
        if package is None:
            wrong.append(f"{name}=={version} (missing)")
        elif package.version != version:
            wrong.append(f"{name}=={version} (here {package.version})")
        else:
            chosen.append(replace(package, split=split))
    if wrong:
        raise DataError(
            f"{file} is of other packages than are installed here: {', '.join(wrong)}; "
            "install these"
        )
    return chosen


def _told(file: Path) -> dict[str, Any]:
    """Return what a corpus.json says; DataError if it is none."""
    if not file.is_file():
        raise DataError(f"{file} doesn't exist; give an earlier corpus.json")
    found = read_json(file)
    try:
        splits = {split for _, split in found["packages"].values()}
        digests = [found["splits"][split]["sha256"] for split in SPLITS]
        if splits <= set(SPLITS) and all(isinstance(d, str) for d in digests):
            return found
    except (AttributeError, KeyError, TypeError, ValueError):
        pass
    raise DataError(
        f"{file} isn't a corpus.json, of packages with their versions and splits; give "
        "one that this program wrote"
    )


def drop_repeats(packages: list[Package]) -> int:
    """Take each content out of all places but its first; return how many there were.

    Train comes first, so that nothing held out is seen in training.
    """
    seen: set[bytes] = set()
    dropped = 0
    for package in sorted(packages, key=lambda p: (SPLITS.index(p.split), p.name)):
        for place in list(package.texts):
            digest = _content(package.texts[place])
            if digest in seen:
                del package.texts[place]
                dropped += 1
            seen.add(digest)
    return dropped


def _content(text: str) -> bytes:
    """Return what identifies source but for comment lines, blank ones, indentation."""
    lines = (line.strip() for line in text.split("\n"))
    kept = "\n".join(line for line in lines if line and not line.startswith("#"))
    return hashlib.sha256(kept.encode()).digest()


def make_texts(packages: list[Package]) -> dict[str, bytes]:
    """Return each split's file."""
    texts = {}
    for split in SPLITS:
        lines = [
            format_json({"package": p.name, "path": place, "text": text}) + "\n"
            for p in packages
            if p.split == split
            for place, text in p.texts.items()
        ]
        texts[split] = "".join(lines).encode()
    return texts


def check_texts(texts: dict[str, bytes], file: Path) -> None:
    """Raise DataError unless splits have the digests that a corpus.json says."""
    told = _told(file)["splits"]
    other = [s for s in SPLITS if _digest(texts[s]) != told[s]["sha256"]]
    if other:
        raise DataError(
            f"the packages of {file} have other files here: {', '.join(other)} would "
            "differ; use the Python and the packages' builds that it was made with"
        )


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def write_corpus(
    packages: list[Package], texts: dict[str, bytes], folder: Path, dropped: int
) -> dict[str, Any]:
    """Write the corpus; return what corpus.json says."""
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"repeats_dropped": dropped, "splits": {}, "packages": {}}
    for split, content in texts.items():
        mine = [p for p in packages if p.split == split and p.texts]
        write_atomically(folder / "texts" / f"{split}.jsonl", content)
        about["splits"][split] = {
            "packages": len(mine),
            "files": sum(len(p.texts) for p in mine),
            "bytes": sum(p.num_bytes for p in mine),
            "sha256": _digest(content),
        }
        about["packages"] |= {p.name: [p.version, split] for p in mine}
    write_atomically(folder / "corpus.json", format_json(about, indent=1) + "\n")
    return about


def build(
    folder: Path, valid: float = 0.04, test: float = 0.04, listed: Path | None = None
) -> dict[str, Any]:
    """Build the corpus of what is installed here; return what corpus.json says.

    With `listed`, an earlier corpus.json, it is that corpus again or a DataError.
    """
    packages = read_packages(installed())
    if listed is None:
        assign_packages(packages, valid, test)
    else:
        packages = choose_packages(packages, listed)
    dropped = drop_repeats(packages)
    texts = make_texts(packages)
    if listed is not None:
        check_texts(texts, listed)
    return write_corpus(packages, texts, folder, dropped)


def main(argv: list[str] | None = None) -> int:
    """Build a corpus; 0, or 2 for a bad request."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--valid", type=float, default=0.04, help="share of the bytes")
    parser.add_argument("--test", type=float, default=0.04, help="share of the bytes")
    parser.add_argument(
        "--packages",
        type=Path,
        metavar="FILE",
        help="an earlier corpus.json: make that corpus again, or nothing",
    )
    options = parser.parse_args(argv)
    try:
        about = build(options.out, options.valid, options.test, options.packages)
    except UoeError as error:
        print(f"corpus: {error}", file=sys.stderr)
        return error.exit_code
    for split, counts in about["splits"].items():
        print(
            f"{split}: {counts['bytes']:,} bytes, {counts['files']:,} files of "
            f"{counts['packages']} packages"
        )
    print(f"{about['repeats_dropped']:,} repeats left out")
    return 0


if __name__ == "__main__":
    sys.exit(main())
