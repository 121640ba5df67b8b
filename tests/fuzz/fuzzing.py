"""Random cases that can be repeated: seeds, limits of time, and what must hold of each.

A case is drawn from its kind, the seed and its number, and from nothing else:
`UOE_FUZZ_SEED=7 UOE_FUZZ_CASE=123` runs one case of another run again.
"""

import contextlib
import faulthandler
import json
import os
import random
import re
import signal
import sys
import time

SEED = int(os.environ.get("UOE_FUZZ_SEED", "0"))
CPU_SECONDS = 30  # that one case may take
WALL_SECONDS = 90  # the same where other work takes the processor away
SHOWN = 30
CODES = (0, 1, 2)


class Finding(Exception):
    """A case that broke what must hold."""


class TookTooLong(BaseException):
    """Not an error that the code under test could catch."""


@contextlib.contextmanager
def limited():
    """Raise TookTooLong in the middle of a case that hangs; end the process if it must.

    A loop inside compiled code doesn't see signals: then the traceback is printed, and
    the process ends.
    """

    def stop(*_):
        raise TookTooLong

    before = [signal.signal(s, stop) for s in (signal.SIGPROF, signal.SIGALRM)]
    faulthandler.dump_traceback_later(2 * WALL_SECONDS, exit=True, file=sys.__stderr__)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        yield
    except TookTooLong:
        raise Finding(f"it took over {CPU_SECONDS} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        faulthandler.cancel_dump_traceback_later()
        # By default these end the process: one that comes late must not.
        for number, handler in zip(
            (signal.SIGPROF, signal.SIGALRM), before, strict=True
        ):
            late = signal.SIG_IGN if handler == signal.SIG_DFL else handler
            signal.signal(number, late)


def run_cases(kind, count, check):
    """Call `check(rng)` for every case; fail with all findings and their numbers."""
    only = os.environ.get("UOE_FUZZ_CASE")
    numbers = [int(only)] if only else range(count)
    findings, began = [], time.process_time()
    for number in numbers:
        rng = random.Random(f"{kind} {SEED} {number}")
        try:
            with limited():
                check(rng)
        except Finding as found:
            findings.append(f"UOE_FUZZ_SEED={SEED} UOE_FUZZ_CASE={number}: {found}")
    spent = time.process_time() - began
    print(
        f"\n{kind}: seed {SEED}, {len(numbers)} cases, {len(findings)} findings, "
        f"{spent:.0f} s of CPU",
        flush=True,
    )
    more = f"\nand {len(findings) - SHOWN} more" if len(findings) > SHOWN else ""
    assert not findings, "\n".join(findings[:SHOWN]) + more


def one_line(text, about):
    """Check what a user sees of an error."""
    if not text or not text.isprintable():
        raise Finding(f"{about} is answered by {text!r}, which isn't one line")
    if len(text) > 4000:
        raise Finding(f"{about} is answered by {len(text)} characters")


def refuse_constant(text):
    raise Finding(f"{text} was written as JSON")


def strict_json(text):
    """Return what JSON says; NaN, Infinity and other lines beside it are findings."""
    try:
        return json.loads(text, parse_constant=refuse_constant)
    except json.JSONDecodeError as error:
        raise Finding(f"what is printed isn't JSON: {error}: {text[-300:]!r}") from None


def raw_error(error, about):
    """A Finding of an error that should have been one of ours."""
    where, trace = "?", error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "uoe_jax/" in name:
            where = f"{name.rpartition('uoe_jax/')[2]}:{trace.tb_lineno}"
        trace = trace.tb_next
    text = " ".join(str(error).split())[:200]
    return Finding(f"{type(error).__name__} at {where}: {text} <- {about[:1500]}")


# Values that found faults in other programs, and some that are plain.
NUMBERS = (
    "0 1 2 3 4 8 16 -1 -0 0.5 1.0 -1.5 1e-3 1e-45 5e-324 1e308 1e400 nan NaN inf "
    "-inf Infinity 2147483647 2147483648 4294967296 9223372036854775808 "
    "100000000000000000000000 1_000 0x10 1e3 1,5 ٣ ½ 0b1 1e 1.0.0 +2 00"
).split()
WORDS = (
    "",
    " ",
    "None",
    "True",
    "false",
    "null",
    "-",
    "--",
    "-h",
    "=",
    "a=b",
    "a" * 5000,
    "../../etc/passwd",
    "/dev/null",
    "/",
    ".",
    "..",
    "~",
    "*",
    "[",
    "(" * 50,
    "(a+)+$",
    "%s%n{0}",
    "$HOME",
    "`id`",
    "a\x00b",
    "two\nlines",
    "tab\there",
    "\x1b[31mred\x1b[0m",
    "\u202egnp.exe",
    "[red]x[/red]",
    "😀",
    "名前",
    "\udcff",
    "é",
    "e\u0301",
    "\ufeff",
    "a b",
    "'",
    '"',
    "\\",
    "tfds:mnist",
    "http://localhost:1/x",
)


KINDS = (
    "flip flip flip flips cut insert delete zero swap double empty digit other"
).split()


def damage_bytes(rng, data, others=(b"",)):
    """Return (what was done, the bytes after it)."""
    size = len(data)
    place = rng.randrange(size + 1)
    length = min(rng.choice([1, 2, 8, 64, 1000]), size - place)
    kind = rng.choice(KINDS)
    if kind in ("flip", "flips") and size:
        changed = bytearray(data)
        for _ in range(1 if kind == "flip" else rng.randrange(2, 20)):
            changed[rng.randrange(size)] ^= 1 << rng.randrange(8)
        return kind, bytes(changed)
    if kind == "cut":
        return kind, data[:place]
    if kind == "insert":
        return kind, data[:place] + rng.randbytes(rng.randrange(1, 40)) + data[place:]
    if kind == "delete":
        return kind, data[:place] + data[place + length :]
    if kind == "zero":
        return kind, data[:place] + bytes(length) + data[place + length :]
    if kind == "swap":
        return kind, data[place:] + data[:place]
    if kind == "double":
        return kind, data + data
    if kind == "other":
        return kind, rng.choice(others)
    if kind == "digit":  # of a number in text: still well-formed, and wrong
        found = [m.start() for m in re.finditer(rb"\d", data)]
        if found:
            place = rng.choice(found)
            digit = rng.choice(b"0123456789")
            return kind, data[:place] + bytes([digit]) + data[place + 1 :]
    return "empty", b""
