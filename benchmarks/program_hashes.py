"""Whether the programs of training steps are those of another commit.

    python benchmarks/program_hashes.py --against 372ca94

Traces the step of every preset, scaled down, and prints a hash of its jaxpr's text
beside the other commit's; the first line that differs follows where they do, and the
exit status is 1. Without `--against` it prints the hashes alone. `--out` keeps the
texts. Nothing is compiled; jax is the same for both.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def step_text(name: str) -> str:
    """The jaxpr of a preset's training step, scaled down, without addresses."""
    import jax

    from uoe_jax.optim import make_optimizer
    from uoe_jax.partition.mesh import mesh_for
    from uoe_jax.presets import get_preset
    from uoe_jax.probes import scaled_down
    from uoe_jax.runs.state import abstract_state
    from uoe_jax.train.ahead import abstract_batch
    from uoe_jax.train.step import make_step

    config = get_preset(name)
    model = scaled_down(config.model)
    data = dataclasses.replace(config.data, batch_size=4, seq_len=None)
    config = dataclasses.replace(config, model=model, data=data)
    mesh = mesh_for(config, jax.devices()[:1])
    optimizer = make_optimizer(config.optim, config.train.steps)
    graphdef, state = abstract_state(config, optimizer, mesh)
    step = make_step(config, graphdef, optimizer, mesh)
    text = str(jax.make_jaxpr(step)(state, abstract_batch(config, mesh)))
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def write_texts(folder: Path) -> None:
    """Write the text of every preset's step."""
    from uoe_jax.presets import PRESETS

    for name in PRESETS:
        (folder / f"{name}.txt").write_text(step_text(name) + "\n")


def write_texts_of(commit: str, folder: Path) -> None:
    """Write the texts of another commit, by this script and that commit's package."""
    archive = ["git", "-C", str(ROOT), "archive", commit, "uoe_jax"]
    packed = subprocess.run(archive, check=True, stdout=subprocess.PIPE).stdout
    with tempfile.TemporaryDirectory() as there:
        with tarfile.open(fileobj=BytesIO(packed)) as files:
            files.extractall(there, filter="data")
        run = [sys.executable, __file__, "--out", str(folder)]
        env = os.environ | {"PYTHONPATH": there}
        done = subprocess.run(run, cwd=there, env=env, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        sys.exit(f"the package of {commit} can't be traced by this script: {why}")


def read_texts(folder: Path) -> dict[str, str]:
    """The texts in a folder by preset."""
    return {path.stem: path.read_text() for path in sorted(folder.glob("*.txt"))}


def show(text: str | None) -> str:
    return "absent" if text is None else hashlib.sha256(text.encode()).hexdigest()[:12]


def first_difference(before: str, after: str) -> str:
    pairs = itertools.zip_longest(before.splitlines(), after.splitlines())
    number, (old, new) = next((n, p) for n, p in enumerate(pairs, 1) if p[0] != p[1])
    short = lambda line: "nothing" if line is None else repr(line.strip()[:90])
    return f"    line {number}: {short(old)} became {short(new)}"


def main() -> int:
    """Print the hashes; return 1 where a program changed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--against", help="a commit to compare with")
    parser.add_argument("--out", type=Path, help="folder for the texts")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as kept:
        now, then = options.out or Path(kept) / "now", Path(kept) / "then"
        for folder in (now, then):
            folder.mkdir(parents=True, exist_ok=True)
        write_texts(now)
        found = read_texts(now)
        if options.against is None:
            for name, text in found.items():
                print(f"{name:28} {show(text)}")
            return 0
        write_texts_of(options.against, then)
        other = read_texts(then)
    changed = 0
    for name in sorted(found.keys() | other.keys()):
        before, after = other.get(name), found.get(name)
        same = before == after
        changed += not same
        verdict = "same" if same else "DIFFERENT"
        print(f"{name:28} {show(before):12} {show(after):12} {verdict}")
        if not same and before is not None and after is not None:
            print(first_difference(before, after))
    print(f"{len(found) - changed} of {len(found)} programs are {options.against}'s")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
