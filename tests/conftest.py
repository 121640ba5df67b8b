"""Eight simulated CPU devices, checked annotations, pytree-mode NNX for every test."""

import functools
import gc
import hashlib
import itertools
import os
import platform
import signal
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Nearly all test time is compilation; code that runs once needn't be optimised. A
# training step compiles in 2.5 s with these and in 14 s without, half of which goes to
# the newer emitters alone. Flags of one's own come after them and win: another
# instruction set, say, by XLA_FLAGS=--xla_cpu_max_isa=AVX2.
QUICK_TO_COMPILE = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if QUICK_TO_COMPILE not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{QUICK_TO_COMPILE} {os.environ.get('XLA_FLAGS', '')}"
# Writing down where in the code an operation comes from takes time; nobody reads it.
os.environ.setdefault("JAX_TRACEBACK_IN_LOCATIONS_LIMIT", "0")
# Tests start hundreds of processes. Without .pyc files each would compile the 1,300
# modules that it imports: 4 s of a processor's time.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
# Traced programs are millions of objects that live on; looking through all of them for
# garbage as often as Python does took a twentieth of the time.
gc.set_threshold(20_000, 20, 100)


def _programs() -> Path:
    """Where compiled programs are kept, from one run of the tests to the next.

    One folder a version of jaxlib and a processor: an executable is of one of each.
    """
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = sorted({l for l in lines if l.startswith(("flags", "Features"))})
    except OSError:
        flags = []
    about = " ".join([platform.machine(), *flags])
    processor = hashlib.sha256(about.encode()).hexdigest()[:8]
    return Path(base) / "uoe_jax" / "test-programs" / f"{version('jaxlib')}-{processor}"


# A shell in the background or `nohup` starts us with signals ignored, and so would be
# the commands that tests start, of which some are about these signals.
for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    if signal.getsignal(number) is signal.SIG_IGN:
        default = number == signal.SIGINT
        signal.signal(number, signal.default_int_handler if default else signal.SIG_DFL)

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # Workers and the processes that tests start inherit the variable.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_programs())
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import pytest
from jaxtyping import install_import_hook

# Shapes and dtypes of every annotated function are checked while tests run.
install_import_hook("uoe_jax", "beartype.beartype")

import jax
import numpy as np

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

from flax import nnx

nnx.set_graph_mode(False)
nnx.set_graph_updates(False)


@pytest.fixture
def rng():
    """Random numbers of a fresh seed, which pytest prints with a failure of its test.

    TEST_SEED=N gives that seed's again.
    """
    seed = int(os.environ.get("TEST_SEED") or np.random.SeedSequence().entropy % 2**32)
    print(f"TEST_SEED={seed}")
    return np.random.default_rng(seed)


@functools.cache
def _computes_in_float16() -> bool:
    """Whether XLA compiles float16 here: not for x86 processors without F16C."""
    try:
        return bool(jax.jit(lambda x: x.astype("float16"))(jax.numpy.ones(())))
    except jax.errors.JaxRuntimeError as error:
        if "Failed to materialize symbols" not in str(error):
            raise
        return False


# A compiled program takes three mappings of memory for each of its parts. Linux gives a
# process 65,530 (vm.max_map_count), and ends it where the next program finds none.
MOST_MAPPINGS = 45_000
_tests_run = itertools.count(1)


def pytest_runtest_teardown():
    """Drop compiled programs before there are too many; they are read again if needed.

    A look takes 20 ms where there are many, so only every 20th test takes one.
    """
    maps = Path("/proc/self/maps")
    if next(_tests_run) % 20 or not maps.is_file():
        return
    if maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()
        gc.collect()


def pytest_runtest_setup(item):
    """Skip what this processor can't; let configs check themselves.

    Configs also convert, and say in one line what they refuse.
    """
    if item.get_closest_marker("float16") and not _computes_in_float16():
        pytest.skip("XLA can't compile float16 for this processor's instructions")
    from uoe_jax.fields import Checked

    classes = Checked.__subclasses__()
    for cls in classes:
        classes.extend(cls.__subclasses__())
        cls.__init__.__no_type_check__ = True
