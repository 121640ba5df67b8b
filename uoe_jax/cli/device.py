"""Process-wide jax settings, made once before a verb that computes."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

from uoe_jax.errors import ConfigError, first_line
from uoe_jax.files import user_cache

_NO_X64 = (
    "note: JAX_ENABLE_X64 is ignored: with 64 bits the same seed would give other "
    "weights"
)


_KINDS = ("cpu", "gpu", "tpu", "cuda", "rocm")
_CACHED = "JAX_ENABLE_COMPILATION_CACHE"  # jax's own switch


@contextmanager
def settings(args: Sequence[str]) -> Iterator[list[str]]:
    """Take what suits every verb from a command line, and hold it; yields the rest.

    That is `--devices KIND[:N]` and `--no-compile-cache`. Raises ConfigError for
    devices that can't be.
    """
    rest, asked = [], {}
    words = iter(args)
    for word in words:
        name, equals, value = word.partition("=")
        if name == "--no-compile-cache" and not equals:
            asked[_CACHED] = "false"
        elif name == "--devices":
            asked |= _devices(value if equals else next(words, ""))
        else:
            rest.append(word)
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield rest
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _devices(text: str) -> dict[str, str]:
    """Return the environment in which jax has the devices of `cpu:8` or `gpu`."""
    kind, colon, count = text.partition(":")
    if kind not in _KINDS or (colon and not (count.isdecimal() and int(count) > 0)):
        raise ConfigError(
            f"--devices is {text!r}; write {', '.join(_KINDS[:3])}, or cpu:8 for eight "
            "of a CPU"
        )
    if colon and kind != "cpu":
        raise ConfigError(
            f"--devices is {text!r}; only a CPU is divided: write {kind}, and give the "
            "mesh's axes"
        )
    if "jax" in sys.modules and not _matches(kind, int(count or 1)):
        raise ConfigError(
            f"--devices is {text!r}, but this process computes on {describe()} "
            "already; begin another one"
        )
    found = {"JAX_PLATFORMS": kind}
    return found | ({"JAX_NUM_CPU_DEVICES": count} if colon else {})


def _matches(kind: str, count: int) -> bool:
    import jax

    devices = jax.devices()
    return devices[0].platform == kind and len(devices) == count


def prepare(*, joins: bool = False) -> None:
    """Restrict NNX to plain pytrees and jax to 32 bits, as this package's models are.

    With 64 bits the same seed gives other weights, so JAX_ENABLE_X64 is switched off,
    with a line.

    Raises ConfigError if there is no device to compute on; a process that `joins`
    others first must not ask yet, and calls `check_devices` later.
    """
    import jax
    from flax import nnx

    if jax.config.read("jax_enable_x64"):
        jax.config.update("jax_enable_x64", False)
        from uoe_jax.data.progress import note

        note(_NO_X64)
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    _keep_programs()
    if not joins:
        check_devices()


def _keep_programs() -> None:
    """Keep compiled programs in the user's cache, unless jax is told another place.

    Small ones too: a start has many of them.
    """
    import jax

    # pyrefly: ignore[missing-attribute]
    if jax.config.jax_compilation_cache_dir is None:
        if os.environ.get(_CACHED, "").lower() not in ("false", "0", "off", "no"):
            jax.config.update("jax_compilation_cache_dir", str(programs_folder()))
            if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
                jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def programs_folder() -> Path:
    """Return where compiled programs are kept: one folder a jaxlib and a processor.

    An executable for a CPU may use what only that kind of processor has.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = sorted({line for line in lines if line.startswith(("flags", "Feat"))})
    except OSError:
        found = [platform.processor()]
    about = " ".join([platform.machine(), *found])
    processor = hashlib.sha256(about.encode()).hexdigest()[:8]
    return user_cache() / "programs" / f"{metadata.version('jaxlib')}-{processor}"


def check_devices() -> None:
    """Raise ConfigError, saying why and what to do, if jax finds no device."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS")
        which = f" of JAX_PLATFORMS={asked}" if asked else ""
        reason = first_line(error) if str(error) else "its plugin isn't installed"
        fix = "install that plugin (extras cuda and tpu), or set JAX_PLATFORMS=cpu"
        if "in use" in str(error) or "busy" in str(error).lower():
            fix = "end the process that holds it, or set JAX_PLATFORMS=cpu"
        raise ConfigError(f"jax finds no device{which} ({reason}); {fix}") from None


def describe() -> str:
    """Return the devices in words: `2 x TPU v5e`, `cpu`."""
    import jax

    kinds = [device.device_kind for device in jax.devices()]
    return f"{len(kinds)} x {kinds[0]}" if len(kinds) > 1 else kinds[0]
