"""What the README and docs say runs: their commands, their Python, their links.

Experiments are shortened here and nowhere else: `SHORT` says how.
"""

import dataclasses
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import numpy as np
import pytest

import uoe_jax as uoe
from uoe_jax import kinds
from uoe_jax.cli import VERBS, main
from uoe_jax.cli.parse import parse, take_preset
from uoe_jax.cli.train import TrainOptions
from uoe_jax.config import ExperimentConfig
from uoe_jax.presets import PRESETS
from uoe_jax.validation import validate

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
STUDIES = sorted((ROOT / "experiments").glob("*/README.md"))
DOCUMENTS = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]
DOCUMENTS += [ROOT / "experiments" / "README.md", *STUDIES]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def short(config: ExperimentConfig) -> ExperimentConfig:
    """Return a preset with narrow layers and four steps."""
    model = dict(d_model=16, d_ff=32, num_layers=2, head_dim=4, max_seq_len=256)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **model),
        data=dataclasses.replace(
            config.data, path="my_text.txt", batch_size=8, seq_len=32, cache_dir="cache"
        ),
        train=dataclasses.replace(
            config.train, steps=4, log_every=1, eval_every=4, eval_batches=1
        ),
    )


# What a Python block of a page is shortened by.
SHORT = (
    (r"uoe\.get_preset\((.*?)\)", r"short(uoe.get_preset(\1))"),
    (r"uoe\.train\(config, (.*?)([,)])", r"uoe.train(config, \1, quiet=True\2"),
    (r"seq_len=32\)", 'seq_len=32, cache_dir="cache")'),
)
# What its commands are shortened by: options that follow them.
SMALL = (
    "--model.d-model 16 --model.d-ff 32 --model.num-layers 2 --model.head-dim 4 "
    "--model.max-seq-len 64 --data.batch-size 8 --data.seq-len 32 "
    "--data.cache-dir cache --train.steps 4 --train.eval-batches 1 --quiet"
)
SHORT_COMMANDS = {
    "train": SMALL,
    "demo": "--steps 2 --quiet",
    "generate": "--max-new-tokens 4",
    "adapt": "--steps 2 --batch-size 8 --quiet",
    "bench": "--size small --rounds 1",
    "complete": "--rank 2 --iters 2",
    "decompose": "--calibrate 256",
    "compress": "--calibrate 256",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where commands run: a text, ratings, and the runs that the pages speak of."""
    place = tmp_path_factory.mktemp("docs")
    (place / "my_text.txt").write_text("def f(x):\n    return x + 1\n\n\n" * 800)
    entries = [f"{i},{j},{(i * j) % 5 + 1}" for i in range(12) for j in range(9)]
    (place / "ratings.csv").write_text("user,item,rating\n" + "\n".join(entries))
    points = np.random.default_rng(0).normal(size=(40, 3)) + np.eye(3)[[0, 1] * 20] * 9
    np.savez(place / "points.npz", points=points)
    (place / "pairs.csv").write_text("user,item\n1,2\n3,4\n")
    (place / "rules.json").write_text('{"*.attention.wq": {"fsdp": "h"}}')
    shutil.copytree(ROOT / "tests" / "goldens" / "hf" / "llama", place / "hf_model")
    return place


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def registered():
    """Forget what a page registers."""
    tables = (kinds.ROUTERS, kinds.ATTENTIONS, kinds.MLPS)
    before = [dict(table) for table in tables]
    yield
    for table, old in zip(tables, before, strict=True):
        table.clear()
        table.update(old)


PYTHON = [page for page in PAGES if blocks(page, "python")]


def test_python_blocks_are_where_a_reader_expects_them():
    names = {name_of(page) for page in PYTHON}
    howto = {
        f"docs/howto/{n}.md" for n in "router attention layout data optimizer".split()
    }
    assert {"README.md", "docs/adapters.md", "docs/completion.md"} | howto <= names


@pytest.mark.parametrize("page", PYTHON, ids=name_of)
def test_python_blocks_run(page, here, registered):
    names = {"short": short}
    for block in blocks(page, "python"):
        for pattern, put in SHORT:
            block = re.sub(pattern, put, block)
        exec(compile(block, str(page), "exec"), names)


def readme_commands() -> list[str]:
    """Every `uoe` command of the README: of its blocks and of its table."""
    text = README.read_text()
    lines = [line for block in blocks(README, "sh") for line in block.splitlines()]
    found = [line.partition("#")[0].strip() for line in lines]
    found += re.findall(r"\| `(uoe [^`]*)` \|", text)
    found += re.findall(r"`(uoe (?:presets|bench)[^`]*)`", text)  # of the text below
    return [line for line in found if line.startswith("uoe ")]


def made_first(command: str) -> list[list[str]]:
    """The commands that make the runs a command reads."""
    train = lambda preset, run: ["train", preset, "--run-dir", run]
    text = ["--data.path", "my_text.txt"]
    made = []
    for run, preset in (("runs/first", "tiny-union"), ("runs/demo/dense", "tiny")):
        if (run in command or command == "uoe runs") and not Path(
            run, "config.json"
        ).is_file():
            made.append(train(preset, run) + text)
    return made


def by_time(command: str) -> object:
    """Timings take minutes: nightly."""
    slow = [pytest.mark.nightly] if " bench " in command else []
    return pytest.param(command, marks=slow)


@pytest.mark.parametrize("command", [by_time(x) for x in readme_commands()])
def test_commands_of_the_readme_run(command, here, capfd):
    for words in [*made_first(command), shlex.split(command)[1:]]:
        more = shlex.split(SHORT_COMMANDS.get(words[0], ""))
        assert main([*words, *more]) == 0, capfd.readouterr().err


@pytest.mark.nightly
def test_the_demo_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # other commands have a run of its name
    assert main(["demo", *shlex.split(SHORT_COMMANDS["demo"])]) == 0
    rows = json.loads(Path("runs/demo/summary.json").read_text())
    assert [row["name"] for row in rows] == ["dense", "moe", "union"]


def training_commands() -> list[str]:
    """Every command of the pages that trains a preset."""
    found = []
    for page in PAGES:
        lines = [line for block in blocks(page, "sh") for line in block.splitlines()]
        found += [line.partition("#")[0].strip() for line in lines]
        found += re.findall(r"`(uoe train [^`]*)`", page.read_text())
    found = [line[line.index("uoe train") :] for line in found if "uoe train" in line]
    named = [line for line in dict.fromkeys(found) if line.split()[2:3]]
    return [line for line in named if line.split()[2] in PRESETS]


@pytest.mark.parametrize("command", training_commands())
def test_every_training_that_a_page_names_can_begin(command, here):
    preset, rest = take_preset(shlex.split(command)[2:], "train")
    default = TrainOptions(config=preset)
    validate(parse(TrainOptions, rest, "train", default=default).config)


def test_make_and_pip_of_the_readme_are_there():
    lines = "\n".join(blocks(README, "sh"))
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M)
    for target in re.findall(r"^make (\w+)", lines, re.M):
        assert target in targets, target
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"\.\[([\w,]+)\]", README.read_text())
    assert named
    for extra in {e for group in named for e in group.split(",")}:
        assert extra in project["optional-dependencies"], extra
    demo = re.search(r"^demo:.*\n\t@(.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert demo.endswith("/bin/uoe demo")


def test_the_readme_is_short():
    text = README.read_text()
    assert len(text.splitlines()) <= 120
    assert len(re.findall(r"\d+(?:[.,]\d+)*", text)) <= 60


def test_the_readmes_results_are_few_and_linked():
    part = README.read_text().partition("## Results")[2].partition("\n## ")[0]
    rows = [x for x in part.splitlines() if x.startswith("|")][2:]
    assert 1 <= len(rows) <= 8
    sections = re.findall(r"^## (.*)$", (ROOT / "docs/results.md").read_text(), re.M)
    for row in rows:
        verdict, anchor = re.search(
            r"\[(\w+)\]\(docs/results\.md#([\w-]+)\)", row
        ).groups()
        assert anchor in {s.lower().replace(" ", "-") for s in sections}, row
        assert verdict in {"win", "loss", "tie", "fair"}
    assert "loss" in part and "win" in part


@pytest.mark.parametrize("page", DOCUMENTS, ids=name_of)
def test_lines_are_short_and_links_lead_somewhere(page):
    text = page.read_text()
    long = [x for x in text.splitlines() if len(x) > 160 and not x.startswith("|")]
    assert not long, long[0]
    bare = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", bare):
        if not re.match(r"https?:|#|mailto:", target):
            path = (page.parent / target.partition("#")[0]).resolve()
            made = [ROOT / "docs" / "browser_page.html"] * (
                path.name == "results_browser.html"
            )
            if path.parent.name == "notebooks":  # pages that the site makes of them
                made = [ROOT / "colabs" / f"{path.stem}.ipynb"]
            assert path.exists() or any(file.exists() for file in made), target


@pytest.mark.parametrize("page", STUDIES, ids=name_of)
def test_studies_begin_with_question_answer_and_how_sure(page):
    head = page.read_text().split("\n\n")[1]
    found = re.findall(r"^- \*\*([\w ]+)\*\*: \S", head, re.M)
    assert found == ["Question", "Answer", "How sure"]


def test_short_names_are_spelled_out_where_they_first_appear():
    text = README.read_text()
    for short_name, words in (
        ("SMHA", "selective multi-head attention"),
        ("UoME", "union of MLP experts"),
        ("FLOPs", "floating-point operations"),
        ("MoE", "mixture of experts"),
    ):
        assert words in text, words
        if short_name != "FLOPs":  # the demo's own table says it first
            assert text.index(words) < text.index(short_name), short_name


def test_every_verb_that_the_documents_use_is_one():
    for page in PAGES:
        for verb in re.findall(r"`uoe ([a-z]+)", page.read_text()):
            assert verb in VERBS or verb in {"help", "presets"}, (name_of(page), verb)


def test_the_version_is_the_same_everywhere():
    cited = re.search(r"^version: (\S+)", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    changed = re.search(r"^## \[(\d\S*)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)[
        1
    ]
    assert uoe.__version__ == cited == changed


def test_make_clean_leaves_trained_runs_and_make_help_lists_it():
    lines = (ROOT / "Makefile").read_text()
    removed = re.search(r"^clean:\n\t(rm .*)$", lines, re.M)[1].split()
    assert not {"runs", "/runs", "runs/"} & set(removed) and "$(VENV)" in removed
    listed = set(re.findall(r'@echo "make (\w+) ', lines))
    phony = set(re.search(r"^\.PHONY: (.*)$", lines, re.M)[1].split())
    assert listed == phony - {"help"}
