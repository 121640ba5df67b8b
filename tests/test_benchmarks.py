"""What the files of results have in common is written once."""

import importlib
import re
import sys
from pathlib import Path

import jax
import pytest

from uoe_jax.bench.record import (
    arguments,
    command_line,
    commit,
    header,
    read_record,
    write_record,
)
from uoe_jax.bench.timing import first_and_median, round_seconds, summarise, timed
from uoe_jax.files import read_json

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
# Their options and figures are their own still; program_hashes writes no record.
APART = ("bench_layouts", "device_orders", "program_hashes", "topology_orders",
         "topology_properties")  # fmt: skip


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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_finds_what_it_imports(path, monkeypatch):
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # as aot_tpu sets it
    try:
        importlib.import_module(path.stem)
    except ModuleNotFoundError as error:
        if (ROOT / error.name.split(".")[0]).is_dir() or error.name in {
            script.stem for script in SCRIPTS
        }:
            raise
        pytest.skip(f"{error.name} isn't installed")


def test_options_and_figures_are_made_in_one_place():
    own = [
        path.stem
        for path in SCRIPTS
        if path.stem not in APART
        and re.search(r"ArgumentParser\(|FigureCanvas|pyplot", path.read_text("utf-8"))
    ]
    assert len(SCRIPTS) > 20 and not own


def test_a_record_is_read_back_and_goes_on(tmp_path):
    file = tmp_path / "new" / "a.json"
    assert read_record(None) == read_record(file) == {}
    write_record(file, {"results": [1]})
    assert read_record(file) == {"results": [1]}
    assert arguments("Text.").parse_args(["--out", "a.json"]).out == Path("a.json")


def test_a_command_is_as_one_types_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(SCRIPTS[0]), "--only", "a b"])
    assert command_line() == f"python benchmarks/{SCRIPTS[0].name} --only 'a b'"
    assert header(device="none")["command"] == command_line()


def test_a_round_is_the_seconds_of_a_call():
    ticks, calls, waited = iter([0.0, 6.0, 10.0, 13.0]), [], []

    def run():
        calls.append(len(calls))
        return calls[-1]

    found = round_seconds(run, 2, 3, waited.append, lambda: next(ticks))
    assert found == [2.0, 1.0]
    # All calls of a round are started before its last one is waited for.
    assert calls == list(range(6)) and waited == [2, 5]
    first, median = first_and_median(run, 4)
    assert len(calls) == 11 and first >= 0 and median >= 0
    assert summarise([1.0, 4.0, 2.0]) == {"ms": 2000.0, "spread": 1.5}
    result, spent = timed(run, 3)
    assert result == 13 and set(spent) == {"seconds", "processor_seconds"}
