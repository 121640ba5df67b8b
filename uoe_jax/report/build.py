"""One run or several into pictures and a page."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from uoe_jax.errors import ConfigError
from uoe_jax.files import local_path, write_atomically
from uoe_jax.report import curves, overlay, page, routers, svg
from uoe_jax.report.alarms import HEAVY, find_alarms
from uoe_jax.report.overlay import Overlay
from uoe_jax.report.read import BLOCKS, Run, experts_choose, flatten, read_runs
from uoe_jax.report.style import LIGHT, render
from uoe_jax.report.table import si
from uoe_jax.runs.stored import publish, run_folder
from uoe_jax.stores.mirror import mirror_of

_ABOUT_LOAD = (
    "Load is the fraction of all picks that went to an expert, times the number of "
    "experts: 1 is a balanced share, 0 an unused expert. Entropy is that of the "
    "router's probabilities over the experts; the dotted line is a router "
    "that can't decide."
)


def write_report(
    run_dirs: Sequence[Path],
    out: Path | None = None,
    *,
    overlays: Mapping[Path, Overlay] | None = None,
    samples: Mapping[str, str] | None = None,
    title: str | None = None,
) -> Path:
    """Write plots/*.png of every run and the page `out`; return the page's path.

    Without `out` the pictures lie in the runs; with it beside the page, and the runs
    may be read-only.

    Args:
        run_dirs: folders of the runs, side by side in the order given.
        out: the page; by default the run's report.html, and compare-NAMES.html beside
            the first of several.
        overlays: routing of a real example by run folder.
        samples: sampled text by run name.
        title: heading of the page.

    Raises:
        DataError: a folder holds no metrics.
        ConfigError: `out` is a folder, or can't be written.
    """
    out = None if out is None else local_path(out, "out")
    if out is not None and out.is_dir():
        raise ConfigError(
            f"{out} is a folder; name the page, such as {out / 'report.html'}"
        )
    runs = read_runs([run_folder(d, "a run") for d in run_dirs])
    folders = _folders(runs, out)
    page_file = out or _default_page(runs)
    shared_folder = page_file.parent if out else page_file.with_suffix("")
    overlays = overlays or {}
    shared = _comparison(runs)
    for run in runs:
        own = shared if len(runs) == 1 else _comparison([run])
        for name, pngs in own.items():
            _save(folders[run.path] / "plots", name, pngs)
    if len(runs) > 1:
        for name, pngs in shared.items():
            _save(shared_folder / "plots", name, pngs)
    sections = [
        ("Summary", _summary(runs)),
        ("Learning", _learning(runs)),
        ("Made from another model", "".join(_made_from(run) for run in runs)),
        (
            "Routers",
            "".join(
                _routers(run, overlays.get(run.path), folders[run.path]) for run in runs
            ),
        ),
        ("Samples", _samples(samples or {})),
        ("Configuration", _configs(runs)),
        ("Environment", _environments(runs)),
    ]
    names = ", ".join(run.name for run in runs)
    text = page.page(title or names, _subtitle(runs), sections)
    _write(page_file, text.encode("utf-8"))
    for run in runs:
        publish(Path(run.path))
    return page_file


def _comparison(runs: list[Run]) -> dict[str, dict[str, bytes]]:
    """Return the pictures that have all runs in them, by file name.

    They are files only, the page has its own, so one theme of them is drawn.
    """
    draw = {
        "loss": functools.partial(curves.loss_figure, runs),
        **{
            key: functools.partial(curves.metric_figure, runs, key)
            for key in ("bits_per_byte", "accuracy")
        },
        "optimizer": functools.partial(curves.health_figure, runs),
    }
    pictures = {name: render(make, [LIGHT]) for name, make in draw.items()}
    return {name: pngs for name, pngs in pictures.items() if pngs}


def _routers(run: Run, example: Overlay | None, folder: Path) -> str:
    """Return one run's router section, its pictures saved below a folder."""
    draw: dict[str, Any] = {
        "load": functools.partial(routers.load_figure, run),
        "load_history": functools.partial(routers.load_history_figure, run),
        "entropy": functools.partial(routers.entropy_figure, run),
        "depth": functools.partial(routers.depth_figure, run),
    }
    if example is not None and example.image is not None:
        draw["routing"] = functools.partial(overlay.image_figure, example)
    pictures = {name: render(make) for name, make in draw.items()}
    if not any(pictures.values()) and example is None:
        return ""
    parts = [f"<h3>{html.escape(run.name)}</h3>", _alarms(run)]
    parts.append(page.paragraph(_ABOUT_LOAD))
    for name, pngs in pictures.items():
        if pngs:
            _save(folder / "plots", name, pngs)
            if name == "routing":
                parts.append(page.paragraph(_about_routing(run, "image")))
            parts.append(page.picture(pngs, f"{run.name}: {name}"))
    if example is not None and example.tokens:
        draw_text = functools.partial(overlay.text_figure, example)
        _save(folder / "plots", "routing", render(draw_text, [LIGHT]))
        parts.append(page.paragraph(_about_routing(run, "text")))
        parts.append(overlay.text_html(example))
    return "".join(parts)


def _about_routing(run: Run, what: str) -> str:
    """Return what the colours of a text or an image mean."""
    token = "token" if what == "text" else "patch"
    means = f"Validation {what}, each {token} in the colour of the expert it scored "
    means += "highest" if what == "text" else "highest, with its number"
    if experts_choose(run.config.model):
        # Nothing says which of them wanted it most: numbers are in order.
        means += (
            f"; where experts choose, of the first that took it, and a {token} that "
            "none took is bare"
        )
    return means + ("; hover over one for all it chose." if what == "text" else ".")


def _alarms(run: Run) -> str:
    """Return what is wrong with the routers, or that nothing is."""
    if not any(run.router(block, "load") for block in BLOCKS):
        return ""
    found = [alarm.text for alarm in find_alarms(run)]
    if not found:
        return page.paragraph(
            "No alarms: no dead expert, none with more than "
            f"{HEAVY:g} balanced shares, in the last tenth of the run."
        )
    return page.alarms(found)


def _made_from(run: Run) -> str:
    """Return how a run that was made of another model differs from it."""
    if not run.made:
        return ""
    shown = {k: v for k, v in run.made.items() if not isinstance(v, (dict, list))}
    rows = [[k.replace("_", " "), _plain(v)] for k, v in shown.items()]
    return f"<h3>{html.escape(run.name)}</h3>" + page.table(["", "found"], rows)


_FORMATS = {
    "parameters": lambda v: f"{v:,}",
    "active parameters": lambda v: f"{v:,}",
    "steps": lambda v: f"{v:,}",
    "seconds": lambda v: f"{v:,.1f}",
    "MFU": lambda v: f"{100 * v:.1f}%",
    "validation loss": lambda v: f"{v:.4f}",
    "bits/byte": lambda v: f"{v:.4f}",
    "accuracy": lambda v: f"{100 * v:.2f}%",
}


def _summary(runs: list[Run]) -> str:
    lines = [run.summary() for run in runs]
    keys = [k for k in lines[0] if any(line[k] is not None for line in lines)]
    show = lambda k, v: "-" if v is None else _FORMATS.get(k, si)(v)
    rows = [
        [line["name"], *(show(k, line[k]) for k in keys if k != "name")]
        for line in lines
    ]
    return page.table(keys, rows)


def _samples(samples: Mapping[str, str]) -> str:
    return "".join(
        f'<h3>{html.escape(name)}</h3><pre class="tokens">{html.escape(text)}</pre>'
        for name, text in samples.items()
    )


def _configs(runs: list[Run]) -> str:
    """Return the fields in which runs differ, and every field folded away."""
    flats = [flatten(dataclasses.asdict(run.config)) for run in runs]
    differing = [
        key
        for key in flats[0]
        if key != "name" and any(flat[key] != flats[0][key] for flat in flats)
    ]
    header = ["field", *(run.name for run in runs)]
    rows = lambda keys: [[k, *(_plain(flat[k]) for flat in flats)] for k in keys]
    parts = []
    if len(runs) > 1:
        parts.append("<h3>Where the runs differ</h3>")
        parts.append(
            page.table(header, rows(differing))
            if differing
            else page.paragraph("Nowhere: same configuration.")
        )
    parts.append(page.fold("every field", page.table(header, rows(flats[0]))))
    return "".join(parts)


def _environments(runs: list[Run]) -> str:
    flats = [flatten(run.env) for run in runs]
    keys = list(dict.fromkeys(key for flat in flats for key in flat))
    if not keys:
        return ""
    if all(flat == flats[0] for flat in flats):
        return page.table(["", "all runs"], [[k, _plain(flats[0][k])] for k in keys])
    header = ["", *(run.name for run in runs)]
    return page.table(header, [[k, *(_plain(f.get(k)) for f in flats)] for k in keys])


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "-" if value is None else str(value)


def _subtitle(runs: list[Run]) -> str:
    model = runs[0].config.model
    kind = {"decoder": "language model", "encoder": "encoder", "vision": "vision model"}
    if len(runs) > 1:
        return f"{len(runs)} runs side by side"
    return f"{kind[model.kind]}, {model.num_layers} layers, width {model.d_model}"


def _save(folder: Path, name: str, pngs: Mapping[str, bytes]) -> None:
    if pngs:
        _write(folder / f"{name}.png", pngs["light"])


def _write(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all; raise ConfigError where that can't be."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written ({error.strerror}); give the page another place "
            "with --out"
        ) from None


def _learning(runs: list[Run]) -> str:
    curves_of = ("loss", "bits_per_byte", "accuracy")
    return "".join(svg.learning(runs, key) for key in curves_of) + svg.health(runs)


def _default_page(runs: Sequence[Run]) -> Path:
    """Return where a page goes that isn't named: never over a page of other runs."""
    if len(runs) == 1:
        return runs[0].path / "report.html"
    names = "-".join(run.path.name for run in runs)
    if len(names) > 80:
        digest = hashlib.sha256(names.encode()).hexdigest()[:8]
        names = f"{names[:70]}-{digest}"
    stored = mirror_of(runs[0].path) is not None
    place = Path() if stored else runs[0].path.parent
    return place / f"compare-{names}.html"


def _folders(runs: Sequence[Run], out: Path | None) -> dict[Path, Path]:
    """Return below which folder each run's pictures go: its own, or beside the page.

    Several runs have one each, named as theirs.
    """
    if out is None:
        return {run.path: run.path for run in runs}
    if len(runs) == 1:
        return {runs[0].path: out.parent}
    folders: dict[Path, Path] = {}
    for run in runs:
        names = [run.path.name, *(f"{run.path.name}-{n}" for n in range(2, 100))]
        free = (out.parent / name for name in names)
        folders[run.path] = next(f for f in free if f not in folders.values())
    return folders
