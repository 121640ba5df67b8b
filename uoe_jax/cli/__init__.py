"""The `uoe` command: verbs, and errors as one line. Imports no jax by itself."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import NamedTuple

from uoe_jax.cli.device import settings
from uoe_jax.cli.notes import plain_warnings
from uoe_jax.errors import (
    ConfigError,
    OutOfMemory,
    UoeError,
    first_line,
    nearest,
    out_of_memory,
)
from uoe_jax.escape import escape_line
from uoe_jax.terminal import (
    Stopped,
    nobody_reads,
    stop_on_signals,
    sturdy_output,
    what_failed,
)

_LEAVES_FILES = (
    "train",
    "sweep",
    "demo",
    "report",
    "decompose",
    "compress",
    "adapt",
    "complete",
    "cluster",
    "import",
    "export",
)


class Verb(NamedTuple):
    """Where a verb lives ("module:function" of args -> exit code) and what it does."""

    target: str
    summary: str


# A new verb is one line here and a function that takes its arguments.
VERBS: dict[str, Verb] = {
    "demo": Verb("cli.demo:demo", "train dense, MoE and union side by side, here, now"),
    "train": Verb("cli.train:train", "train a preset, options changing any field"),
    "sweep": Verb("cli.sweep:sweep", "train a grid of settings, one or several GPUs"),
    "presets": Verb("cli.presets:presets", "what can be trained: sizes and kinds"),
    "config": Verb("cli.presets:config", "a preset as JSON, for train --config FILE"),
    "eval": Verb("cli.runs:evaluate", "loss, perplexity, bits per byte of a run"),
    "generate": Verb("cli.generate:generate", "sample text from a run"),
    "runs": Verb("cli.search:runs", "all runs: a table, what is like one, and why"),
    "report": Verb("cli.runs:report", "plots and a page for one run or several"),
    "decompose": Verb(
        "cli.decompose:decompose", "a dense run into a union run, exactly, and back"
    ),
    "compress": Verb("cli.compress:compress", "a run made smaller, without training"),
    "import": Verb("cli.interop:import_model", "a Hugging Face or GGUF model as a run"),
    "export": Verb("cli.interop:export_model", "a run as a Hugging Face model"),
    "leakcheck": Verb(
        "cli.checks:leakcheck", "perturb what must not matter; what moved?"
    ),
    "data": Verb("cli.checks:data", "what a preset trains on"),
    "bench": Verb("cli.bench:bench", "this machine's speed beside installed peers"),
    "plan": Verb("cli.plan:plan", "the layouts of a pod: what fits, how fast, and why"),
    "topology": Verb(
        "cli.topology:topology", "how devices are joined; orders with shorter rings"
    ),
    "adapt": Verb("cli.adapt:adapt", "a run fitted to other data by small factors"),
    "complete": Verb("cli.complete:complete", "a low-rank matrix from its entries"),
    "cluster": Verb(
        "cli.cluster:cluster", "which points belong together, and how many kinds"
    ),
    "cost": Verb("cli.cost:cost", "parameters, FLOPs and bytes of a preset"),
}


# What the verbs are called elsewhere.
_USUAL = {
    "list": "presets",
    "ls": "presets",
    "models": "presets",
    "fit": "train",
    "pretrain": "train",
    "run": "train",
    "resume": "train",
    "evaluate": "eval",
    "test": "eval",
    "validate": "eval",
    "sample": "generate",
    "chat": "generate",
    "infer": "generate",
    "inference": "generate",
    "plot": "report",
    "compare": "report",
    "split": "decompose",
    "prune": "compress",
    "shrink": "compress",
    "merge": "decompose",
    "finetune": "adapt",
    "fine-tune": "adapt",
    "lora": "adapt",
    "benchmark": "bench",
    "tune": "bench",
    "grid": "sweep",
    "hyperparameters": "sweep",
    "flops": "cost",
    "params": "cost",
    "init": "config",
    "convert": "import or export",
    "load": "import",
    "save": "export",
    "sft": "train or adapt",
}


def usage() -> str:
    """Return the text of `uoe --help`."""
    width = max(map(len, VERBS))
    lines = [f"  {name:<{width}}  {verb.summary}" for name, verb in VERBS.items()]
    return (
        "usage: uoe VERB [ARGUMENTS] [OPTIONS]\n\n"
        "Union of Experts transformers in JAX.\n\n"
        + "\n".join(lines)
        + "\n\n`uoe help VERB` lists a verb's usual options, `uoe VERB --help-all` "
        "all.\n--devices cpu:8, --no-compile-cache and --debug (tracebacks) suit every "
        "verb.\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 1 a failure found; 2 a bad request; 3 numbers that aren't finite; 4 too little
    memory; 128 + n ended by signal n.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    with sturdy_output() as out:
        code = _run(args, debug)
        out.flush()
        failed = what_failed(out)
        if failed and out.error and not nobody_reads(out.error):
            # What such a verb leaves in a folder is there; of others nothing is.
            code = _fail(failed, code or int(args[0] not in _LEAVES_FILES), False)
    return code


def _run(args: list[str], debug: bool) -> int:
    try:
        with stop_on_signals(), plain_warnings(), settings(args) as rest:
            return _dispatch(rest)
    except SystemExit as stop:  # a parser printed its help
        if isinstance(stop.code, str):
            return _fail(stop.code, 1, debug)
        return int(stop.code or 0)
    except Stopped as stop:
        return _fail(f"stopped by {stop.number.name}", 128 + stop.number, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug)
    except UoeError as error:
        return _fail(str(error) + _notes(error), error.exit_code, debug)
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _fail(f"{error.strerror or error}{place}", 2, debug)
    except Exception as error:
        if out_of_memory(error):
            text = f"{first_line(error)}; ask for less at once: a smaller batch, "
            text += "shorter sequences or fewer new tokens"
            return _fail(f"out of memory: {text}", OutOfMemory.exit_code, debug)
        said = f"{type(error).__name__}: {error}".removesuffix(": ") + _notes(error)
        text = f"{said}; --debug shows the traceback"
        return _fail(text, 1, debug)


def _dispatch(args: list[str]) -> int:
    if args[:1] == ["help"] and len(args) > 1 and not args[1].startswith("-"):
        args = [args[1], "--help", *args[2:]]
    if not args or args[0] in ("-h", "--help", "--help-all", "help"):
        print(usage(), end="")
        return 0
    if args[0] == "--version":
        print(importlib.import_module("uoe_jax").__version__)
        return 0
    name, *rest = args
    if name not in VERBS:
        usual = _USUAL.get(name.lower())
        fix = f"did you mean {usual}?" if usual else nearest(name, VERBS)
        raise ConfigError(f"no verb {name!r}; {fix}")
    module, function = VERBS[name].target.split(":")
    return getattr(importlib.import_module(f"uoe_jax.{module}"), function)(rest)


def _notes(error: BaseException) -> str:
    """Return what was said beside an error, behind it."""
    return "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


def _fail(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    print("uoe: " + escape_line(" ".join(text.split())), file=sys.stderr)
    return code
