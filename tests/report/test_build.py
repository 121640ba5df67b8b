"""Run folders become pictures and one page that needs nothing else."""

import dataclasses
import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from tests.compare import assert_close
from tests.report.synthetic_runs import TEXT, make_overlay, make_run
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.hardware.count import count_params
from uoe_jax.presets import get_preset
from uoe_jax.report.build import write_report
from uoe_jax.report.curves import smooth
from uoe_jax.report.overlay import expert_colors, text_html
from uoe_jax.report.page import page, table
from uoe_jax.report.read import flatten, read_run, read_runs
from uoe_jax.report.routers import some_layers
from uoe_jax.report.style import DARK, LIGHT
from uoe_jax.report.table import format_table, si


class Page(HTMLParser):
    """Collects tags, their addresses and visible text; fails on unbalanced tags."""

    VOID = {"meta", "img", "source", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.words, self.count = [], [], [], {}
        self.feed(text)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.count[tag] = self.count.get(tag, 0) + 1
        self.addresses += [v for k, v in attrs if k in ("src", "srcset", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A page over three runs, with an overlay and a sample; (page text, folder)."""
    root = tmp_path_factory.mktemp("runs")
    presets = ("tiny", "tiny-moe", "tiny-union")
    runs = [make_run(root / p, p, seed=i) for i, p in enumerate(presets)]
    example = make_overlay(get_preset("tiny-union").model, text=TEXT[:80])
    out = write_report(
        runs, root / "all.html", overlays={runs[2]: example}, samples={"a": "x<y>&z"}
    )
    return out.read_text(), root


def test_page_is_self_contained_and_well_formed(three):
    text, _ = three
    page = Page(text)
    assert page.addresses and all(
        a.startswith("data:image/png") for a in page.addresses
    )
    assert "http" not in text
    assert text.count("<script>") == text.count("<script") == 1  # sorts its tables


def test_page_has_every_section_and_run(three):
    page = Page(three[0])
    for heading in (
        "Summary",
        "Learning",
        "Routers",
        "Samples",
        "Configuration",
        "Environment",
    ):
        assert heading in page.text
    for name in ("tiny", "tiny-moe", "tiny-union"):
        assert name in page.text
    assert "x<y>&z" in page.text  # escaped in the source, whole on the page
    total = sum(count_params(get_preset("tiny-moe").model).values())
    assert f"{total:,}" in page.text


def test_each_picture_has_a_light_and_a_dark_form(three):
    page = Page(three[0])
    assert page.count["source"] == page.count["img"] > 5


def test_plots_are_readable_pngs_of_notebook_width(three):
    _, root = three
    found = {str(p.relative_to(root)) for p in root.rglob("*.png")}
    assert {
        "plots/loss.png",
        "tiny/plots/loss.png",
        "tiny-union/plots/load.png",
        "tiny-union/plots/routing.png",
        "tiny-moe/plots/entropy.png",
    } <= found
    assert "tiny/plots/load.png" not in found  # a dense model has no experts
    for name in found:
        height, width, _ = imread(io.BytesIO((root / name).read_bytes())).shape
        assert 500 < width < 1500 and 200 < height < 2500, name


def test_only_fields_that_differ_are_listed(three):
    text = three[0].split("Where the runs differ")[1].split("every field")[0]
    fields = re.findall(r"<td>((?:model|data|optim|train)\.[a-z_.]+)</td>", text)
    assert fields == ["model.attention", "model.mlp"]


def test_equal_runs_give_equal_pages(tmp_path):
    pages = []
    for folder in ("a", "b"):
        run = make_run(tmp_path / folder, "digits-vit", steps=50)
        pages.append(write_report([run]).read_bytes())
    assert pages[0] == pages[1]


def test_image_models_show_patches_and_accuracy(tmp_path):
    run = make_run(tmp_path / "vit", "digits-vit-union", steps=200, layers=1)
    example = make_overlay(read_run(run).config.model)
    text = Page(write_report([run], overlays={run: example}).read_text()).text
    assert (run / "plots" / "routing.png").is_file()
    assert (run / "plots" / "accuracy.png").is_file()
    assert "bits/byte" not in text


def test_reader_survives_a_torn_last_line(tmp_path):
    run = make_run(tmp_path / "r", steps=50)
    whole = read_run(run)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "step": 60, "lo')
    assert read_run(run) == whole


@pytest.mark.parametrize("content", [None, "", "\n{}\n"])
def test_runs_without_metrics_are_refused_in_one_line(tmp_path, content):
    run = make_run(tmp_path / "r", steps=10)
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    with pytest.raises(DataError, match="train the run first") as caught:
        read_run(run)
    assert "\n" not in str(caught.value)


def test_runs_of_one_name_are_told_apart_by_folder(tmp_path):
    paths = [make_run(tmp_path / x, steps=10) for x in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [str(p) for p in paths]


def test_series_leave_out_what_was_not_recorded(tmp_path):
    run = read_run(make_run(tmp_path / "r", steps=100))
    assert run.series("mfu", "step").shape == (2, 0)
    steps, losses = run.series("loss", "step")
    assert len(steps) == len(losses) == 11
    records = [{**r, "loss": None} if r["step"] == 50 else r for r in run.train]
    assert run.series("loss", "step").shape[1] == 11
    run = dataclasses.replace(run, train=records)
    assert 50 not in run.series("loss", "step")[0]


def test_summary_counts_and_final_values(tmp_path):
    run = read_run(make_run(tmp_path / "r", "tiny-union", steps=200))
    line = run.summary()
    last = [json.loads(x) for x in (run.path / "metrics.jsonl").open()][-1]
    assert line["bits/byte"] == last["bits_per_byte"]
    assert line["seconds"] == last["seconds"]
    assert line["steps"] == 200


def test_router_rows_are_the_layers_that_route(tmp_path):
    path = make_run(tmp_path / "r", "tiny-union", steps=20)
    run = read_run(path)
    model = dataclasses.replace(run.config.model, attention=("dense", "union"))
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    assert run.routed_layers("attention") == [1, 3]
    assert run.routed_layers("mlp") == [0, 1, 2, 3]
    steps, load = run.router("mlp", "load")
    assert load.shape == (3, 4, 8) and len(steps) == 3
    assert_close(load.sum(-1), 1, 1e-6)


def test_smoothing_keeps_lines_and_length(rng):
    for n in (1, 2, 5, 40, 333):
        line = np.linspace(rng.normal(), rng.normal(), n)
        found, half = smooth(line), round(n * 0.03)
        assert len(found) == n
        # A mean over a whole window reproduces a straight line; 1e-12 is rounding.
        inside = slice(half, n - half)
        np.testing.assert_allclose(found[inside], line[inside], atol=1e-12)
        np.testing.assert_allclose(found[-1], line[-half - 1 :].mean(), atol=1e-12)
    noise = rng.standard_normal(1000)
    assert smooth(noise).std() < 0.5 * noise.std()


def test_overlay_marks_every_token_with_its_best_expert():
    example = make_overlay(get_preset("tiny-moe").model)
    text = text_html(example)
    spans = re.findall(r'background:(#\w{6})80" title="experts ([\d, ]+)"', text)
    assert len(spans) == 4 * len(TEXT)
    colors = expert_colors(8)
    picks = example.choices["mlp"].reshape(-1, 2)
    for (color, listed), chosen in zip(spans, picks, strict=True):
        assert colors.index(color) == chosen[0]
        assert listed == ", ".join(map(str, chosen))


def test_some_layers_keeps_both_ends():
    for count in range(1, 60):
        rows = some_layers(count)
        assert rows[0] == 0 and rows[-1] == count - 1 and len(rows) == min(count, 6)


def _luminance(color):
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [
        c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda t: t.name)
def test_series_and_ink_stand_out_from_the_paper(theme):
    def contrast(a, b):
        high, low = sorted((_luminance(a), _luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    assert contrast(theme.ink, theme.paper) > 7  # WCAG AAA text
    # The first four series meet at least 2:1; lines also differ by marker.
    assert all(contrast(c, theme.paper) > 2 for c in theme.colors[:4])


def test_tables_align_numbers_right_and_text_left():
    lines = format_table(("name", "n"), [("a", "5"), ("long", "1,234")]).splitlines()
    assert lines[0] == "name      n"
    assert lines[2] == "a         5"
    assert lines[3] == "long  1,234"
    assert "<td class=number>5</td>" in table(("name", "n"), [("a", "5")])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1234, "1.23 k"),
        (5.678e6, "5.68 M"),
        (3e12, "3 T"),
        (None, "-"),
        (0.5, "0.5"),
    ],
)
def test_si_prefixes(value, text):
    assert si(value) == text
    assert value is None or si(value, "B").startswith(text.split()[0])


def test_flatten_names_leaves():
    assert flatten({"a": {"b": 1, "c": [2]}, "d": math.pi}) == {
        "a.b": 1,
        "a.c": [2],
        "d": math.pi,
    }


def test_a_page_that_is_a_folder_is_refused_before_anything_is_written(
    tmp_path, monkeypatch
):
    run = make_run(tmp_path / "run")
    place = tmp_path / "place"
    place.mkdir()
    monkeypatch.chdir(place)
    for out in (Path("."), place):
        with pytest.raises(ConfigError, match=r"is a folder; name the page.*html"):
            write_report([run], out)
    assert list(place.iterdir()) == []


def test_tables_sort_by_a_click_on_a_column():
    runs = table(("run", "time"), [("a", "2 s"), ("b", "-")])
    text = page("t", "s", [("Runs", runs)])
    head = "<thead><tr><th>run</th><th class=number>time</th></tr></thead><tbody>"
    assert head in text  # where the script looks
    script = re.search(r"<script>(.*?)</script>", text, re.S)[1]
    for part in (".scroll > table", "tBodies[0]", "aria-sort", "onkeydown", "onclick"):
        assert part in script
    assert script.count("{") == script.count("}") and "src=" not in script
    assert r"[\d,]*\.?\d+" in script  # as JavaScript reads it
