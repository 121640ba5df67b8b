"""What mkdocs adds to the pages of docs/ when it builds the site.

The results browser; the experiments' pages and the JSON files that pages link to; the
notebooks, with their outputs if they were executed (UOE_NOTEBOOKS=run, minutes; the one
of a real model fetches it from the hub, or reads the folder UOE_MODEL). Links that lead
out of docs/ are led to those.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

DOCS = Path(__file__).parent
ROOT = DOCS.parent
BROWSER = "results_browser.html"  # browser.md is the page that leads to it
EXECUTED = ROOT / "build" / "notebooks"
sys.path.insert(0, str(DOCS))

import browser  # noqa: E402  beside this file

LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add what isn't in docs/."""
    add = lambda uri, content: files.append(
        File.generated(config, uri, content=content)
    )
    add(BROWSER, browser.make_page(ROOT))
    for path in browser.result_files(ROOT):
        add(str(path.relative_to(ROOT)), path.read_bytes())
    for path in sorted(ROOT.glob("experiments/*/README.md")):
        text = lead_inside(
            path.read_text(), f"experiments/{path.parent.name}/README.md"
        )
        add(page_of(path), text)
    text = (ROOT / "experiments" / "README.md").read_text()
    add("experiments/index.md", lead_inside(text, "experiments/README.md"))
    for path in sorted((ROOT / "colabs").glob("*.ipynb")):
        body, pictures = convert(path)
        add(f"notebooks/{path.stem}.md", body)
        for name, content in pictures.items():
            add(f"notebooks/{name}", content)
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Lead links out of docs/ to what was added; keep deviations in one line."""
    del kwargs
    markdown = markdown.replace(" ± ", "\u00a0±\u00a0")
    if page.file.generated_by:
        return markdown
    return lead_inside(markdown, f"docs/{page.file.src_uri}")


def page_of(path: Path) -> str:
    """Return the page of an experiment."""
    return f"experiments/{path.parent.name}.md"


def lead_inside(text: str, source: str) -> str:
    """Return the text of the file `source` with links that suit the site."""
    here = posixpath.dirname(source.removeprefix("docs/"))
    if source.startswith("experiments/"):
        here = "experiments"

    def lead(match: re.Match[str]) -> str:
        mark, words, target = match.groups()
        if re.match(r"https?:|#|mailto:", target):
            return match[0]
        target, _, anchor = target.partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        place = place_of(path)
        if place is None:
            return words
        link = posixpath.relpath(place, here or ".")
        return f"{mark}[{words}]({link}{'#' * bool(anchor)}{anchor})"

    return LINK.sub(lead, text)


def place_of(path: str) -> str | None:
    """Return where a file of the repository is on the site; None: it isn't."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path == "experiments/README.md":
        return "experiments/index.md"
    if path.endswith("/README.md") and path.startswith("experiments/"):
        return page_of(Path(path))
    if path.endswith(".json"):
        return path
    if path.endswith("results"):
        return BROWSER
    return None


def convert(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and its pictures by name."""
    import nbformat
    from nbconvert import MarkdownExporter

    key = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
    done = EXECUTED / f"{path.stem}-{key}.ipynb"
    if os.environ.get("UOE_NOTEBOOKS") == "run" and not done.is_file():
        from nbclient import NotebookClient

        notebook = nbformat.read(path, as_version=4)
        done.parent.mkdir(parents=True, exist_ok=True)
        resources = {"metadata": {"path": str(done.parent)}}
        NotebookClient(notebook, timeout=3600, resources=resources).execute()
        nbformat.write(notebook, done)
    notebook = nbformat.read(done if done.is_file() else path, as_version=4)
    names = {"unique_key": path.stem, "output_files_dir": ""}
    body, resources = MarkdownExporter().from_notebook_node(notebook, names)
    note = (
        "" if done.is_file() else "*Without outputs: this build ran no notebooks.*\n\n"
    )
    pictures = {name.lstrip("./"): data for name, data in resources["outputs"].items()}
    head = f"Open it: `colabs/{path.name}`. {note}\n\n"
    title, _, rest = body.lstrip().partition("\n")
    if not title.startswith("# "):
        title, rest = f"# {path.stem}", body
    # Colours of terminals mean nothing on a page.
    rest = re.sub(r"\x1b\[[0-9;]*m", "", rest)
    return f"{title}\n\n{head}{rest}", pictures
