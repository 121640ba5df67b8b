"""The generated parts of docs/models.md are what the package says today."""

import importlib.util
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_models_is_made_from_the_code():
    models = load("make_models")
    text = models.PAGE.read_text()
    assert models.fill(text) == text, "run python docs/make_models.py"
    for name in models.PRESETS:
        assert f"| `{name}` |" in text


def test_a_page_without_a_place_is_refused():
    with pytest.raises(ValueError, match="no place for presets"):
        load("make_models").fill("# Models\n")
