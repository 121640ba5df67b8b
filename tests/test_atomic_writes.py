"""A killed process leaves no half of a file: hidden names first, then a rename."""

import ast
from pathlib import Path

import pytest

from uoe_jax.files import write_picture

PACKAGE = Path(__file__).parents[1] / "uoe_jax"

# Where a file is written in place, and why no reader takes a half for the whole.
IN_PLACE = {
    "files.py": {"open wb"},  # `write_atomically` itself
    "train/metrics.py": {"open ab"},  # lines are added, and a half line is dropped
    "runs/sweep.py": {"open ab"},  # what a run printed
    "data/store.py": {"open wb"},  # below `build_folder`, which renames the folder
    "data/write_arrays.py": {"save"},  # the same
    "runs/write.py": {"save"},  # below `_appearing`, which renames the folder
    "compress/files.py": {"save_file"},  # a hidden name of its own
    "interop/exporting.py": {"copyfile", "save_file"},  # in a folder that is renamed
}
PATHS = {
    "write_text",
    "write_bytes",
    "savefig",
    "save",
    "savez",
    "savez_compressed",
    "savetxt",
    "tofile",
    "save_file",
    "copyfile",
    "copy",
    "copy2",
}
BUFFERS = {"BytesIO", "StringIO"}


def buffers_of(tree: ast.AST) -> set[str]:
    """Names that hold a file in memory: `found = io.BytesIO()`."""
    return {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call)
        if getattr(node.value.func, "attr", "") in BUFFERS
        for target in node.targets
        if isinstance(target, ast.Name)
    }


def written_by(call: ast.Call, buffers: set[str]) -> str:
    """What a call writes at a path with: "open wb", "save_file", or "" for nothing."""
    named = call.func
    name = named.attr if isinstance(named, ast.Attribute) else getattr(named, "id", "")
    if name in ("open", "fdopen"):
        given = [*call.args, *(k.value for k in call.keywords if k.arg == "mode")]
        modes = [a.value for a in given if isinstance(a, ast.Constant)]
        wanted = [m for m in modes if isinstance(m, str) and set("wax+") & set(m)]
        short = [m for m in wanted if len(m) <= 3 and set(m) <= set("rwaxbt+")]
        return f"open {short[0]}" if short else ""
    if name not in PATHS or (name == "write_text" and isinstance(named, ast.Name)):
        return ""  # a function `write_text` of ours
    if name in ("save", "copy", "savez") and not _of_numpy_or_shutil(named):
        return ""
    first = call.args[0] if call.args else None
    at = call.args[1] if name in ("save_file", "copyfile", "copy", "copy2") else first
    in_memory = isinstance(at, ast.Name) and at.id in buffers
    return "" if in_memory else name


def _of_numpy_or_shutil(named: ast.expr) -> bool:
    owner = named.value if isinstance(named, ast.Attribute) else None
    return isinstance(owner, ast.Name) and owner.id in ("np", "numpy", "shutil")


def writes_in(text: str) -> set[str]:
    """What a module's text writes at paths with."""
    tree = ast.parse(text)
    buffers = buffers_of(tree)
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {written_by(call, buffers) for call in calls} - {""}


def test_files_are_written_whole_or_not_at_all():
    found = {
        str(path.relative_to(PACKAGE)): writes
        for path in sorted(PACKAGE.rglob("*.py"))
        if (writes := writes_in(path.read_text()))
    }
    assert found == IN_PLACE, (
        "write with uoe_jax.files: write_atomically, write_picture"
    )


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("path.write_text(text)", {"write_text"}),
        ("Path(name).open('w', encoding='utf-8')", {"open w"}),
        ("open(name, mode='r+b')", {"open r+b"}),
        ("figure.savefig(path, dpi=150)", {"savefig"}),
        ("np.save(folder / name, array)", {"save"}),
        ("np.savez(path, a=a)", {"savez"}),
        ("save_file(arrays, path)", {"save_file"}),
        ("drawn = io.BytesIO()\nfigure.savefig(drawn)", set()),
        ("file = io.BytesIO()\nnp.save(file, array)", set()),
        ("open(name, 'rb')\nopen('data')\ncheckpoints.save(step)", set()),
    ],
)
def test_the_check_sees_each_way_of_writing(line, found):
    assert writes_in(line) == found


@pytest.mark.parametrize("name", ["a.png", "a.PDF", "a.svg"])
def test_a_picture_that_fails_leaves_the_old_one(tmp_path, name):
    class Figure:
        def savefig(self, file, *, format, dpi):
            file.write(f"{format} {dpi} half".encode())
            if broken:
                raise OSError(28, "No space")

    path, broken = tmp_path / name, False
    write_picture(path, Figure())
    kind = name[2:].lower()
    assert path.read_bytes() == f"{kind} 150 half".encode()
    broken = True
    with pytest.raises(OSError, match="No space"):
        write_picture(path, Figure(), dpi=20)
    assert path.read_bytes() == f"{kind} 150 half".encode()
    assert [p.name for p in tmp_path.iterdir()] == [name]
