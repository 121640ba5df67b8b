"""No path is empty: pathlib makes the working folder of "", which nobody asks for."""

import typing
from pathlib import Path

import pytest

from tests.cli.options import CLASSES, load
from uoe_jax.adapt.request import AdaptRequest
from uoe_jax.adapt.run import adapt_run
from uoe_jax.cli import main
from uoe_jax.cli.fields import option_names
from uoe_jax.cli.parse import _PATHS
from uoe_jax.decompose.runs import merging
from uoe_jax.errors import ConfigError
from uoe_jax.fields import field_hints
from uoe_jax.files import check_path
from uoe_jax.linalg.completion.factors import load_factors
from uoe_jax.presets import get_preset
from uoe_jax.report.build import write_report
from uoe_jax.runs.load import load_run
from uoe_jax.surgery import operate
from uoe_jax.train import train
from uoe_jax.train.initial import start_from

# What stands before a verb's options, so that it gets as far as reading them.
FIRST = {
    "train": ["tiny"], "data": ["tiny"], "plan": ["tiny"], "cost": ["tiny"],
    "eval": ["nowhere"], "generate": ["nowhere", "--prompt", "x"],
    "report": ["nowhere"], "leakcheck": ["tiny"], "complete": ["nowhere.csv"],
    "decompose": ["nowhere", "--experts", "2"], "adapt": ["nowhere"],
    "import": ["nowhere"], "export": ["nowhere"], "config": ["tiny"],
    "cluster": ["nowhere.npz"],
    "sweep": ["tiny", "--grid", "train.seed=0"],
    "compress": ["nowhere", "--cut", "0.3"],
}  # fmt: skip
# A method, and arguments that carry no name.
NOT_PATHS = {
    ("adapt", "--path"),
    ("complete", "--file"),
    ("cluster", "--file"),
    ("export", "--out"),
}
CONFIGS = ("--data.path", "--data.data-dir", "--data.cache-dir", "--data.tokenizer")


def path_options(verb):
    """Yield a verb's options that name files or folders, whatever their type."""
    options = load(verb)
    known = set(option_names(options))
    for name, hint in field_hints(options).items():
        option = f"--{name.replace('_', '-')}"
        kinds = {hint, *typing.get_args(hint)}
        if option in known and (Path in kinds or name in _PATHS):
            yield option
    yield from sorted(known.intersection(CONFIGS))


CASES = [
    (verb, option)
    for verb in CLASSES
    for option in path_options(verb)
    if (verb, option) not in NOT_PATHS
]


def test_there_are_options_to_try():
    assert ("train", "--run-dir") in CASES and ("plan", "--fit") in CASES
    assert ("eval", "--data.path") in CASES and ("decompose", "--calibrate") in CASES
    assert len(CASES) > 35


@pytest.mark.parametrize("empty", ["", "  "])
@pytest.mark.parametrize(("verb", "option"), CASES)
def test_an_empty_path_is_refused_by_its_option(
    verb, option, empty, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    for typed in ([option, empty], [f"{option}={empty}"]):
        assert main([verb, *FIRST.get(verb, []), *typed]) == 2
        said = capsys.readouterr()
        assert said.out == "" and said.err.startswith(f"uoe: {option} is empty")
        assert len(said.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("verb", "word"),
    [("complete", "FILE is empty"), ("eval", "no run"), ("report", "no run"),
     ("leakcheck", "no preset"), ("train", "no preset"), ("adapt", "no run")],
)  # fmt: skip
def test_an_empty_name_is_no_run_even_inside_one(
    verb, word, union_run, monkeypatch, capsys
):
    monkeypatch.chdir(union_run)
    assert main([verb, ""]) == 2
    assert word in capsys.readouterr().err


def test_python_refuses_them_too(tmp_path, monkeypatch, union_run):
    monkeypatch.chdir(tmp_path)
    tiny = get_preset("tiny")
    calls = {
        "run_dir": lambda: unwrapped(train)(tiny, ""),
        "the run": lambda: unwrapped(load_run)(""),
        "source": lambda: unwrapped(start_from)("", tiny, tmp_path),
        "path": lambda: load_factors(""),
        "AdaptRequest.load": lambda: AdaptRequest(load=""),
        "out": lambda: unwrapped(write_report)([union_run], ""),
    }
    again = [
        lambda: unwrapped(operate)(union_run, "", merging, verb="decompose"),
        lambda: unwrapped(adapt_run)(union_run, "", AdaptRequest(load=union_run)),
    ]
    for what, call in [*calls.items(), *(("out", call) for call in again)]:
        with pytest.raises(ConfigError, match=f"^{what} is empty"):
            call()
    assert not list(tmp_path.iterdir())


def unwrapped(function):
    """Return a function without the tests' checks of annotations, as users call it."""
    return getattr(function, "__wrapped__", function)


@pytest.mark.parametrize(
    ("path", "word"),
    [("", "is empty"), ("a\0b", "a NUL character"), (b"a", "not bytes"),
     (3, "give a path"), ("gs://b/r", "mount the store")],
)  # fmt: skip
def test_what_names_no_file_is_said_in_one_line(path, word):
    with pytest.raises(ConfigError, match=word) as error:
        unwrapped(check_path)(path, "out")
    assert str(error.value).startswith("out is ") and str(error.value).isprintable()
