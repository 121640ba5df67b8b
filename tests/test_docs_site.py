"""The site: the browser holds every result, the navigation every page."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from docs import browser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def test_the_browser_holds_every_result_and_needs_no_network():
    page = browser.make_page()
    held = json.loads(re.search(r"const DATA = (.*);$", page, re.M)[1])
    files = [x["file"] for x in held["runs"] + held["files"]]
    assert sorted(files) == sorted(
        str(x.relative_to(ROOT)) for x in browser.result_files()
    )
    assert len(held["runs"]) > 150 and len(held["files"]) > 30
    assert all(run["curve"] and run["device"] for run in held["runs"])
    outside = re.sub(r"const DATA = .*;", "", page)
    loads = re.findall(r"""(?:src|href)=|url\(|import |fetch\(""", outside)
    assert not loads, loads


def test_the_browser_shows_the_numbers_of_the_files():
    held = browser.collect()
    found = {
        (run["study"], run["case"], run["seed"]): run["test"] for run in held["runs"]
    }
    assert found["e001_language", "dense", 0] == pytest.approx(1.4368, abs=0.02)
    assert found["e003_images", "dense", 0] == pytest.approx(52.4, abs=1e-6)
    (file,) = (x for x in held["files"] if x["file"].endswith("/layers_h200.json"))
    assert file["about"]["device"] == "NVIDIA H200" and file["about"]["commit"]
    table = next(t for t in file["tables"] if t["name"] == "layers")
    assert len(table["rows"]) == 8 and table["rows"][0]["op"] == "MLP layer"


def test_tables_of_any_form_lose_no_number():
    content = {
        "command": "x",
        "a": {"b": {"rows": [{"n": 1, "s": {"t": 2}}, {"n": 3}]}, "one": 4},
        "pairs": [[5, 6], [7, 8]],
        "empty": [],
        "earlier": [{"commit": "c", "rows": [{"n": 91}, {"n": 92}]}],
    }
    held = json.dumps(browser.merge(browser.tables(content)))
    for number in (*"12345678", "91", "92"):
        assert number in held, number


def pages_of(nav):
    for entry in nav if isinstance(nav, list) else nav.values():
        if isinstance(entry, str):
            yield entry
        else:
            yield from pages_of(entry)


def test_every_page_is_in_the_navigation():
    class Loader(yaml.SafeLoader):
        """Reads tags of Python as their text."""

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]  # noqa: S506
    named = list(pages_of(nav))
    assert len(set(named)) == len(named)
    made = {f"notebooks/{x.stem}.md" for x in (ROOT / "colabs").glob("*.ipynb")}
    made |= {f"experiments/{x.parent.name}.md" for x in ROOT.glob("experiments/*/*.md")}
    made |= {"experiments/index.md"}
    written = {str(x.relative_to(DOCS)) for x in DOCS.rglob("*.md")}
    assert set(named) == written | made


def test_no_page_is_written_over_another():
    text = (DOCS / "site_hooks.py").read_text()
    (browser_name,) = re.findall(r'^BROWSER = "(.*)"', text, re.M)
    pages = {f"{page.stem}.html" for page in DOCS.glob("*.md")}
    assert browser_name.endswith(".html") and browser_name not in pages
    assert f"]({browser_name})" in (DOCS / "browser.md").read_text()


@pytest.mark.nightly
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet"]
    done = subprocess.run(
        [*command, "--site-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    # What the page of the browser leads to is the browser.
    button = re.search(
        r'href="([^"]*)"[^>]*>Open the browser', (tmp_path / "browser.html").read_text()
    )
    assert "const DATA = " in (tmp_path / button[1]).read_text()
    assert (tmp_path / "howto" / "router.html").is_file()
