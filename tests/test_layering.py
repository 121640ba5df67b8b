"""A module imports only lower layers or its own room; light modules import no jax."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "uoe_jax"

# From the ground up: a room imports what is below it, nothing beside it.
LAYERS = (
    ("escape", "terminal", "tree", "varying"),
    ("errors",),
    ("appearing", "checks", "files", "kinds"),
    ("stores",),
    ("rules", "options", "given"),
    ("fields",),
    ("config",),
    ("mixture", "widths"),
    ("weights", "presets", "validation", "probes"),
    ("splits",),
    ("hardware", "linalg", "cluster"),
    ("topology",),
    ("ops", "partition"),
    ("model", "data", "optim"),
    ("runs", "plan", "leakcheck", "complete"),
    ("train",),
    ("evaluate", "generate"),
    ("surgery", "harness"),
    ("interop",),
    ("decompose", "compress"),
    ("adapt",),  # which opens runs of any cut
    ("report",),
    ("bench", "demo"),
    ("api", "show"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
NO_JAX = (
    "config",
    "widths",
    "fields",
    "kinds",
    "mixture",
    "options",
    "given",
    "validation",
    "presets",
    "probes",
    "errors",
    "hardware",
    "topology",
    "rules",
    "splits",
    "stores",
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
    """What a file imports that is neither lower nor its own room."""
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
        if other != room and LEVEL[other] >= LEVEL[room]:
            found.append(f"imports {name}: {other} isn't a lower layer than {room}")
    return found


def test_imports_point_downwards():
    offenders = [
        f"{path.relative_to(PACKAGE)}: {what}"
        for path in FILES
        for what in upward_imports(path)
    ]
    assert len(FILES) > 200 and not offenders, "\n".join(offenders)


def test_nothing_but_the_command_imports_the_command_line():
    users = {
        room_of(path)
        for path in FILES
        if any(name.startswith("uoe_jax.cli") for name in imports_of(path))
    }
    assert users == {"cli", "__main__"}


def test_light_modules_import_no_jax():
    heavy = {"jax", "flax", "optax", "matplotlib"}
    # hardware/ evaluates trees over many products: numpy, but never jax.
    counts = ("hardware", "topology")
    banned = lambda path: heavy | ({"numpy"} if room_of(path) not in counts else set())
    light = [path for path in FILES if room_of(path) in NO_JAX]
    offenders = [
        f"{path.relative_to(PACKAGE)}: imports {', '.join(sorted(found))}"
        for path in light
        if (found := banned(path) & {name.split(".")[0] for name in imports_of(path)})
    ]
    assert {room_of(path) for path in light} == set(NO_JAX)
    assert not offenders, "\n".join(offenders)


def test_modules_are_found_without_changing_where_they_are_looked_for():
    root = PACKAGE.parent
    files = [
        path
        for folder in ("tests", "benchmarks", "experiments")
        for path in (root / folder).rglob("*.py")
    ]
    changing = [p for p in files if "sys" + ".path" in p.read_text()]
    folders = {path.parent for path in files if path.is_relative_to(root / "tests")}
    loose = [folder for folder in folders if not (folder / "__init__.py").is_file()]
    assert len(files) > 200 and not changing and not loose


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
