"""Small experiments on files of a test's own."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from uoe_jax.config import DataConfig, ExperimentConfig, ModelConfig


@pytest.fixture
def make_config(tmp_path):
    """Build an experiment whose prepared data lies in the test's own folder."""

    def build(path: Path | str | None = None, kind="decoder", **options):
        model = {
            k: options.pop(k)
            for k in list(options)
            if k in {f.name for f in dataclasses.fields(ModelConfig)}
        }
        model.setdefault("max_seq_len", 8)
        options.setdefault("batch_size", 4)
        options.setdefault("cache_dir", str(tmp_path / "cache"))
        data = DataConfig(path=None if path is None else str(path), **options)
        return ExperimentConfig(model=ModelConfig(kind=kind, **model), data=data)

    return build


@pytest.fixture
def text_file(tmp_path):
    """Return a text of numbered lines with an article every ten."""
    lines = [f"line {i} of the tale\n" + "\n" * (i % 10 == 9) for i in range(400)]
    path = tmp_path / "tale.txt"
    path.write_text("".join(lines))
    return path
