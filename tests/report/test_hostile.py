"""Names and damaged records in a report: shown as they are, never as markup."""

import warnings

import pytest
from matplotlib.figure import Figure

from tests.report.synthetic_runs import make_run
from uoe_jax.cli import main
from uoe_jax.config import from_json, to_json
from uoe_jax.partition.legal import mesh_sizes
from uoe_jax.plan.picture import draw_layout
from uoe_jax.presets import get_preset
from uoe_jax.report.build import write_report
from uoe_jax.report.curves import health_figure, loss_figure
from uoe_jax.report.read import read_run, read_runs
from uoe_jax.report.style import LIGHT, as_label, render

NAMES = ["cost $a_$ b", r"$^{1}$", "$", "_hidden", "<script>alert(1)", "a & b",
         "[bold]x[.y]", "\N{GRINNING FACE}", "x" * 90, "^_{", "{name}%s"]  # fmt: skip


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run", "tiny-union", seed=0)


def rename(run, name):
    import dataclasses

    config = from_json((run / "config.json").read_text())
    (run / "config.json").write_text(to_json(dataclasses.replace(config, name=name)))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_text_in_every_picture(run, name):
    rename(run, name)
    (read,) = read_runs([run])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for draw in (loss_figure, health_figure):
            seen = []
            keep = lambda theme, draw=draw, seen=seen: seen.append(draw([read], theme))
            assert render(lambda t, k=keep, s=seen: (k(t), s[-1])[1], [LIGHT])
            (legend,) = seen[0].legends
            texts = [text.get_text() for text in legend.get_texts()]
            assert any(as_label(name) in text for text in texts)


def test_names_are_escaped_in_the_page(run):
    rename(run, NAMES[4])
    text = write_report([run]).read_text()
    assert text.count("<script") == 1  # the page's own
    assert "<script>alert" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_name_is_text_in_a_layout(name, tmp_path):
    import dataclasses

    config = dataclasses.replace(get_preset("tiny"), name=name)
    figure = draw_layout(config, mesh_sizes(config.mesh, 1), chosen=True)
    assert isinstance(figure, Figure)
    figure.savefig(tmp_path / "x.png")


DAMAGED = [
    "5", "", "null", "[1]", '{"kind": "train"}', '{"kind": 7, "step": 3}', "{" * 9999,
    '{"kind": "train", "step": "x", "loss": 1}', '{"kind": "train", "step": 1e400}',
    '{"kind": "train", "step": 3, "seconds": {}, "loss": "low", "router": 5}',
    '{"kind": "train", "step": 3, "loss": [1], "router": {"mlp": {"load": "x"}}}',
    '{"kind": "train", "step": 3, "router": {"mlp": {"load": [[1], [1, 2]]}}}',
    '{"kind": "eval", "step": 3, "split": 5, "loss": null, "router": null}',
    # Too large for a float.
    '{"kind": "train", "step": 1' + 400 * "0" + ', "loss": 1.0, "seconds": 1.0}',
]  # fmt: skip


def test_damaged_lines_change_nothing_of_a_report(run):
    file = run / "metrics.jsonl"
    whole = read_run(run)
    lines = file.read_text().splitlines()
    damaged = [*DAMAGED, *lines, *DAMAGED]
    file.write_text("\n".join(damaged) + "\n")
    found = read_run(run)
    write_report([run])
    for key in ("loss", "lr", "grad_norm"):
        assert (found.series(key, "step") == whole.series(key, "step")).all()
    for before, after in zip(
        whole.router("mlp", "load"), found.router("mlp", "load"), strict=True
    ):
        assert (before == after).all()


@pytest.mark.parametrize("name", ["env.json", "decompose.json", "surgery.json"])
def test_a_damaged_file_is_refused_by_name(run, name, capsys):
    (run / name).write_text("{broken")
    assert main(["report", str(run), "--no-overlay"]) == 2
    assert f"{name} is damaged" in capsys.readouterr().err


# Held in short by cli/test_printable.py, whose report goes elsewhere.
@pytest.mark.nightly
def test_a_page_elsewhere_writes_nothing_into_its_runs(run, tmp_path, capsys):
    other = make_run(tmp_path / "b" / "run", "tiny", seed=1)
    files = lambda: sorted(p for r in (run, other) for p in r.rglob("*"))
    before = files()
    assert main(["report", str(run), "--out", str(tmp_path / "o/p.html"),
                 "--no-overlay"]) == 0  # fmt: skip
    assert (tmp_path / "o/p.html").is_file() and (
        tmp_path / "o/plots/load.png"
    ).exists()
    assert main(["report", str(run), str(other), "--out", str(tmp_path / "two/p.html"),
                 "--no-overlay"]) == 0  # fmt: skip
    assert files() == before
    pictures = {p.parent.parent.name for p in (tmp_path / "two").rglob("loss.png")}
    assert pictures == {"two", "run", "run-2"}


def test_a_run_that_cannot_be_written_is_one_line(run, capsys, monkeypatch):
    (run / "plots").write_text("a file where the folder goes")
    assert main(["report", str(run), "--no-overlay"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "can't be written" in line and "--out" in line
