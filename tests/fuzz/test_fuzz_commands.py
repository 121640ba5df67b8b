"""Random command lines, run in this process: each ends as promised.

A command runs for real until it would compile a program, which is where it is stopped:
by then every option has been read, every file opened and every request judged.
"""

import contextlib
import functools
import io
import os
import re
import shutil

import jax
import pytest
from jax._src import compiler

from tests.fuzz.fuzzing import CODES, NUMBERS, WORDS, Finding, run_cases, strict_json
from uoe_jax.cli import VERBS, main
from uoe_jax.presets import PRESETS

LARGEST = 300  # lines of a program that is let through: a few operations
FILES = """text.txt lines.jsonl table.csv table.npz tokens.npz points.npz adapter
completed completed/factors.safetensors layout.json runs/union runs/no-checkpoints
union empty runs runs/union/config.json runs/union/metrics.jsonl hf hf/config.json
hf/model.safetensors missing missing.txt .""".split()
TOPOLOGIES = ["cpu:8", "h100:8", "v5p:4x4x4", "v5e:4x4", "v4:2x2x1", "cpu:0", "v9:1"]


class Stopped(BaseException):
    """The command reached the compiler."""


@pytest.fixture
def no_compiler(monkeypatch):
    """Stop at programs that take seconds to compile; tiny ones pass."""
    compile_program = compiler.compile_or_get_cached

    def stop(backend, computation, *args, **options):
        if str(computation).count("\n") > LARGEST:
            raise Stopped
        return compile_program(backend, computation, *args, **options)

    monkeypatch.setattr(compiler, "compile_or_get_cached", stop)
    jax.clear_caches()


@functools.cache
def options_of(verb):
    """Every option of a verb with what its help says that it takes."""
    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setenv("COLUMNS", "2000")
        main([verb, "--help-all"])
    # Beside what it takes, two blanks and what it means.
    line = r"^  (--[a-z\[][\w.\[\]-]*)((?: \S+)*)(?:  .*)?$"
    found = [
        (name.replace("[no-]", ""), takes.strip())
        for name, takes in re.findall(line, said.getvalue(), re.MULTILINE)
        if name != "--debug"  # which is there to show tracebacks
    ]
    assert found or verb == "demo", said.getvalue()
    return found


def value_for(rng, takes):
    """A value for an option: of the kind its help names, most times."""
    if rng.random() < 0.25:
        return rng.choice([*NUMBERS, *WORDS, *FILES])
    choices = [
        c for part in re.findall(r"\{([^{}]*)\}", takes) for c in part.split(",")
    ]
    choices = [c.strip() for c in choices if c.strip() not in ("", "None")]
    if choices and "INT" not in takes and "FLOAT" not in takes and "TEXT" not in takes:
        return rng.choice(choices)
    if "PATH" in takes or "TEXT" in takes:
        return rng.choice([*FILES, *TOPOLOGIES, *PRESETS, "byte", "bpe", "auto", "x"])
    if "INT" in takes or "FLOAT" in takes:
        plain = ["0", "1", "2", "3", "4", "8", "16", "64", "0.5", "1e-3", "-1"]
        return rng.choice(plain) if rng.random() < 0.8 else rng.choice(NUMBERS)
    return rng.choice([*WORDS, *FILES])


def random_command(rng):
    """A verb, what it is about, and some options in any order."""
    verb = rng.choice(list(VERBS)) if rng.random() < 0.96 else rng.choice(WORDS)
    known = options_of(verb) if verb in VERBS else []
    args = []
    if rng.random() < 0.9:
        subject = {
            "train": ["tiny", "tiny-union", "union", "digits-vit", "runs/union"],
            "data": ["tiny", "digits-vit", "tiny-union"],
            "plan": ["tiny", "small", "7b-union"],
            "cost": [*PRESETS],
            "leakcheck": ["tiny", "union", "digits-vit-union"],
            "complete": ["table.csv", "table.npz"],
            "cluster": ["points.npz", "table.npz", "tokens.npz", "text.txt"],
            "bench": ["attention", "union", "train", "sweep"],
            "demo": [],
            "import": ["hf", "hf/model.safetensors", "runs/union", "hf:no/such"],
            "export": ["runs/union", "adapter"],
            "topology": [*TOPOLOGIES, "v5e:8x8", "v6e:2x4"],
            "runs": ["runs", "like", "explain", "expect", "index"],
        }.get(verb, ["union", "runs/union"])
        if subject and rng.random() < 0.9:
            args.append(rng.choice(subject))
        elif rng.random() < 0.5:
            args.append(rng.choice([*FILES, *WORDS]))
    if args[:1] in (["like"], ["explain"], ["expect"], ["index"]):
        args += rng.choices(["runs/union", "tiny", "union", "runs", "missing"], k=2)
    if verb == "export" and rng.random() < 0.8:
        args.append(rng.choice(["out", "empty", "runs", "missing/deep/out"]))
    if verb == "generate" and rng.random() < 0.8:
        args += ["--prompt", "def"]
    if verb in ("train", "data", "adapt", "eval") and rng.random() < 0.5:
        name = "--data" if verb == "adapt" else "--data.path"
        args += [name, rng.choice(["text.txt", "lines.jsonl", "tokens.npz"])]
    for _ in range(rng.randrange(4)):
        if not known or rng.random() < 0.04:
            args.append(rng.choice(["--" + rng.choice(WORDS), rng.choice(WORDS)]))
            continue
        name, takes = rng.choice(known)
        takes_none = not takes.strip()
        if takes_none:
            args.append(name if rng.random() < 0.9 else name + "=true")
        elif rng.random() < 0.2:
            args.append(f"{name}={value_for(rng, takes)}")
        else:
            args += [name, value_for(rng, takes)]
    if rng.random() < 0.15:
        rng.shuffle(args)
    return [verb, *args]


def check_outcome(args, code, out, err):
    """Check the exit code, and that what is said is a line a user can read."""
    if code not in CODES:
        raise Finding(f"exit code {code} of {args}")
    lines = err.splitlines()
    if any("--debug shows" in line or "Traceback" in line for line in lines):
        raise Finding(f"{args}: {lines[-1][:600]}")
    told = [line for line in lines if line.startswith("uoe: ")]
    if code == 2 and (not told or told[-1] != lines[-1]):
        raise Finding(f"exit code 2, and the last line isn't the reason: {args}: {err}")
    if bad := [line for line in lines if not line.isprintable()]:
        raise Finding(f"{bad[0]!r} of {args}")
    helped = {"-h", "--help", "--help-all"} & {*args}
    if code == 0 and "--json" in args and not helped and out.strip():
        strict_json(out)


def fresh_copy(workshop, place):
    """Return a copy of the workshop that no other case has changed."""
    folder, note = place / "work", place.with_name("note")
    if not note.exists() or note.read_text() != stamps(place):
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(workshop, folder, ignore=shutil.ignore_patterns("cache"))
        note.write_text(stamps(place))
    return folder


def stamps(place):
    """What lies in a folder, and when it was written."""
    found = []
    for folder, _, names in os.walk(place):
        for name in sorted(names):
            about = os.lstat(os.path.join(folder, name))
            found.append((folder, name, about.st_size, about.st_mtime_ns))
    return repr(sorted(found))


def check_command(rng, workshop, tmp_path, capsys, monkeypatch):
    args = random_command(rng)
    folder = fresh_copy(workshop, tmp_path / "case")
    monkeypatch.chdir(folder)
    capsys.readouterr()
    try:
        code = main(args)
    except Stopped:
        code = None
    except BaseException as error:
        if type(error).__name__ == "TookTooLong":
            raise Finding(f"{args} takes too long") from None
        raise Finding(f"{type(error).__name__}: {error} came out of {args}") from None
    finally:
        out, err = capsys.readouterr()
    if os.environ.get("UOE_FUZZ_CASE") or os.environ.get("UOE_FUZZ_SHOW"):
        with capsys.disabled():
            print(code, args, *err.splitlines()[-1:], sep="\n  ")
    if code is not None:
        check_outcome(args, code, out, err)
    if os.listdir(tmp_path / "case") != ["work"]:
        raise Finding(f"{args} wrote outside its folder: {os.listdir(folder.parent)}")


@pytest.mark.parametrize("cases", [60, pytest.param(1000, marks=pytest.mark.nightly)])
def test_any_command_ends_as_promised(
    cases, workshop, tmp_path, capsys, monkeypatch, no_compiler
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(workshop / "cache"))
    check = functools.partial(
        check_command,
        workshop=workshop,
        tmp_path=tmp_path,
        capsys=capsys,
        monkeypatch=monkeypatch,
    )
    run_cases("commands", cases, check)
