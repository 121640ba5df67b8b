"""Notebooks call what the package has; nightly they run, in their short form."""

import ast
import importlib
import importlib.util
import inspect
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.interop.tiny_folders import write_folder

NOTEBOOKS = sorted((Path(__file__).parents[1] / "colabs").glob("*.ipynb"))


def imported_from_package(tree: ast.Module) -> dict[str, object]:
    """What a notebook imports from uoe_jax, by its name there."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.startswith("uoe_jax"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                found[alias.asname or alias.name] = getattr(module, alias.name)
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_calls_what_the_package_has(path):
    cells = nbformat.read(path, as_version=4).cells
    tree = ast.parse("\n".join(c.source for c in cells if c.cell_type == "code"))
    imported, checked = imported_from_package(tree), 0
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
            continue
        words = [word.arg for word in node.keywords]
        starred = any(isinstance(a, ast.Starred) for a in node.args) or None in words
        if node.func.id not in imported or starred:
            continue
        # Raises where an argument is missing, unknown or one too many.
        signature = inspect.signature(imported[node.func.id])
        signature.bind(*node.args, **dict.fromkeys(words))
        checked += 1
    assert checked >= 5


def promised_pictures(source: str) -> int:
    """How many figures a cell shows."""
    lines = source.splitlines()
    shown = ("    display(", "display(", "plt.show()")
    return sum(line.startswith(shown) for line in lines)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_first_cell_installs_from_a_checkout_or_a_git_address(
    path, tmp_path, monkeypatch
):
    source = nbformat.read(path, as_version=4).cells[1].source
    commands = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(
        "subprocess.run", lambda command, check: commands.append(command)
    )
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.chdir(path.parent)
    exec(compile(source, path.name, "exec"), {})
    assert commands.pop()[-2:] == ["-e", f"{path.parents[1]}[all]"]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="set SOURCE to a git address"):
        exec(compile(source, path.name, "exec"), {})
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    given = source.replace('SOURCE = ""', 'SOURCE = "git+https://a.b/uoe_jax"')
    exec(compile(given, path.name, "exec"), {})
    assert commands.pop()[-1] == "uoe_jax[all,cuda] @ git+https://a.b/uoe_jax"


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("UOE_SHORT", "1")
    write_folder(tmp_path / "model")  # instead of one of the hub
    monkeypatch.setenv("UOE_MODEL", str(tmp_path / "model"))
    monkeypatch.delenv("MPLBACKEND", raising=False)  # a kernel has its own
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    printed = "".join(
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
    )
    assert printed, "the notebook printed nothing"
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        pictures = sum("image/png" in output.get("data", {}) for output in outputs)
        assert pictures >= promised_pictures(cell.source), cell.source
        assert not any("<Figure" in output.get("text", "") for output in outputs)


def test_committed_notebooks_hold_no_outputs():
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            assert not cell.get("outputs"), path.name
