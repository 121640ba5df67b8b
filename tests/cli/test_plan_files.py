"""Files of `uoe plan` and `uoe topology`: refused before any work, written whole."""

import pytest

from uoe_jax.cli import main
from uoe_jax.plan import layouts
from uoe_jax.plan.layouts import write_layout
from uoe_jax.presets import get_preset

PLAN = ("plan", "tiny", "--topology", "cpu:2")


@pytest.mark.parametrize(
    ("command", "option", "name"),
    [
        (PLAN, "--out", "layout.json"),
        (PLAN, "--html", "page.html"),
        (("topology", "v4-8"), "--picture", "rings.png"),
    ],
)
def test_a_file_that_cant_be_written_is_refused_first(
    capsys, tmp_path, command, option, name
):
    path = tmp_path / "absent" / name
    assert main([*command, option, str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "there is no folder" in err and option in err
    assert err.count("\n") == 1
    (tmp_path / name).mkdir()
    assert main([*command, option, str(tmp_path / name)]) == 2
    assert "is a folder; name a file to write" in capsys.readouterr().err


def test_a_layout_that_cant_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    config, path = get_preset("tiny"), tmp_path / "pod.json"
    write_layout(path, config, {"data": 2})
    before = path.read_text()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("uoe_jax.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        layouts.write_layout(path, config, {"data": 4})
    assert path.read_text() == before
    assert [file.name for file in tmp_path.iterdir()] == ["pod.json"]


def test_bytes_in_a_store_are_refused_by_their_address(capsys):
    assert main(["topology", "v4-8", "--bytes", "gs://bucket/plan.json"]) == 2
    assert "gs://bucket/plan.json" in capsys.readouterr().err
