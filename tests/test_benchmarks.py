"""What the files of results have in common is written once."""

import re
from pathlib import Path

import jax

from uoe_jax.bench.record import commit, header, write_record
from uoe_jax.files import read_json

ROOT = Path(__file__).parents[1]


def test_no_script_writes_a_header_of_its_own():
    files = [
        path
        for folder in ("benchmarks", "experiments", "uoe_jax")
        for path in (ROOT / folder).rglob("*.py")
        if path != ROOT / "uoe_jax" / "bench" / "record.py"
    ]
    written = re.compile(r'"jax"(:|\] =) jax\.__version__')
    own = [p for p in files if written.search(p.read_text("utf-8"))]
    scripts = [p for p in files if p.relative_to(ROOT).parts[0] != "uoe_jax"]
    asking = [p for p in scripts if '"rev-parse"' in p.read_text("utf-8")]
    assert len(files) > 400 and not own and not asking


def test_a_header_says_command_commit_device_and_jax(tmp_path):
    found = header("uoe bench", "abc", "2 x H200")
    assert found["command"] == "uoe bench" and found["commit"] == "abc"
    assert found["device"] == "2 x H200" and found["jax"] == jax.__version__
    assert header("uoe bench")["device"] == jax.devices()[0].device_kind
    assert commit() == "unknown" or len(commit()) == 40
    write_record(tmp_path / "a.json", found)
    write_record(None, found)
    assert read_json(tmp_path / "a.json") == found
