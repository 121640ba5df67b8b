"""A module imports only lower layers or its own room; light modules import no jax."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "uoe_jax"

LAYERS = {
    0: {
        "config",
        "fields",
        "kinds",
        "validation",
        "presets",
        "errors",
        "escape",
        "files",
        "terminal",
        "weights",
    },
    1: {"hardware", "ops", "partition", "topology", "linalg", "cluster", "tree"},
    2: {"model", "data", "optim"},
    3: {
        "decompose",
        "compress",
        "adapt",
        "interop",
        "train",
        "checkpoint",
        "integrity",
        "evaluate",
        "generate",
        "report",
        "leakcheck",
        "complete",
        "runs",
    },
    4: {"bench", "cli", "demo", "__main__"},
}
LEVEL = {room: level for level, rooms in LAYERS.items() for room in rooms}
# Why: the trainer saves verified checkpoints; evaluation restores and reuses them.
SAME_LEVEL = {
    # A layout names its leaves.
    ("partition", "tree"),
    # A plan predicts what its layouts cost.
    ("partition", "hardware"),
    # Tiles that nobody timed are chosen by the device's model of products.
    ("ops", "hardware"),
    ("train", "checkpoint"),
    ("train", "integrity"),
    ("checkpoint", "integrity"),
    ("evaluate", "checkpoint"),
    ("evaluate", "train"),
    # A decomposed run is read and written as the trainer's runs are.
    ("decompose", "checkpoint"),
    ("decompose", "evaluate"),
    ("decompose", "integrity"),
    ("decompose", "train"),
    # So is a run that is adapted.
    ("adapt", "checkpoint"),
    ("adapt", "evaluate"),
    ("adapt", "integrity"),
    ("adapt", "train"),
}
NO_JAX = (
    "config",
    "fields",
    "kinds",
    "validation",
    "presets",
    "errors",
    "hardware",
    "weights",
)


def room_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports_of(path: Path) -> set[str]:
    """Dotted names of everything a file imports, at any depth."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


FILES = sorted(PACKAGE.rglob("*.py"))


def upward_imports(path: Path) -> list[str]:
    """What a file imports that is neither lower nor its own room nor allowed above."""
    room = room_of(path)
    if room == "__init__":
        return []
    if room not in LEVEL:
        return [f"{room} has no layer: add it to LAYERS"]
    found = []
    for name in sorted(imports_of(path)):
        parts = name.split(".")
        if parts[0] != "uoe_jax" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        other = parts[1]
        lower = LEVEL[other] < LEVEL[room]
        allowed = lower or other == room or (room, other) in SAME_LEVEL
        peers = LEVEL[other] == LEVEL[room] and LEVEL[room] in (0, 4)
        if not (allowed or peers):
            found.append(f"imports {name}: {other} isn't a lower layer than {room}")
    return found


def test_imports_point_downwards():
    offenders = [
        f"{path.relative_to(PACKAGE)}: {what}"
        for path in FILES
        for what in upward_imports(path)
    ]
    assert len(FILES) > 200 and not offenders, "\n".join(offenders)


def test_light_modules_import_no_jax():
    heavy = {"jax", "flax", "optax", "matplotlib"}
    # hardware/ evaluates trees over many products: numpy, but never jax.
    banned = lambda path: heavy | ({"numpy"} if room_of(path) != "hardware" else set())
    light = [path for path in FILES if room_of(path) in NO_JAX]
    offenders = [
        f"{path.relative_to(PACKAGE)}: imports {', '.join(sorted(found))}"
        for path in light
        if (found := banned(path) & {name.split(".")[0] for name in imports_of(path)})
    ]
    assert {room_of(path) for path in light} == set(NO_JAX)
    assert not offenders, "\n".join(offenders)


def test_import_touches_no_device_and_no_jax():
    code = (
        "import sys, time; start = time.process_time(); import uoe_jax;"
        "import uoe_jax.presets, uoe_jax.hardware.count, uoe_jax.validation;"
        "assert 'jax' not in sys.modules, 'jax was imported';"
        "assert time.process_time() - start < 1"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_module_imports_without_starting_a_backend():
    code = (
        "import importlib, pkgutil, uoe_jax\n"
        "for m in pkgutil.walk_packages(uoe_jax.__path__, 'uoe_jax.'):\n"
        "    if not m.name.endswith('__main__'): importlib.import_module(m.name)\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
