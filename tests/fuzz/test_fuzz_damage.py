"""Files damaged at random: refused by name or read as they were, never as others.

Who reads a damaged file says so in one line, or returns what the undamaged one holds:
the same arrays, the same batches, the same adapter. Files that carry no checksum, such
as a table of ratings, may read as others; they are held to the one line.
"""

import functools
import os
import shutil

import numpy as np
import pytest
from flax import nnx

from tests.fuzz.fuzzing import Finding, damage_bytes, one_line, raw_error, run_cases
from uoe_jax.adapt.files import load_adapters
from uoe_jax.cli import main
from uoe_jax.complete.predictions import load_completion
from uoe_jax.config import config_hash
from uoe_jax.data import make_dataset
from uoe_jax.data.entries import read_entries
from uoe_jax.data.tokenize import load_tokenizer
from uoe_jax.errors import UoeError
from uoe_jax.plan.layouts import read_layout
from uoe_jax.presets import get_preset
from uoe_jax.report.read import read_run
from uoe_jax.runs.integrity import digest_array
from uoe_jax.runs.load import load_run
from uoe_jax.train.metrics import MetricsLog, read_metrics
from uoe_jax.tree import named_leaves
from uoe_jax.validation import read_config


def digest(tree):
    return {k: digest_array(np.asarray(v)) for k, v in named_leaves(tree).items()}


def read_model(folder):
    """A run's step, config and weights."""
    run = load_run(folder / "runs" / "union")
    _, *state = nnx.split(run.model, nnx.Param, ...)
    return run.step, config_hash(run.config.model), digest(state)


def read_batches(folder):
    """What a run trains and validates on, prepared again where it must be."""
    config = read_config(folder / "runs" / "union")
    return [
        {k: digest_array(v) for k, v in make_dataset(config, split).batch(0).items()}
        for split in ("train", "valid")
    ]


def read_adapter(folder):
    params = nnx.split(load_run(folder / "runs" / "union").model, nnx.Param, ...)[1]
    adapters, config = load_adapters(folder / "adapter", params)
    return digest(adapters.weights), config


def read_completed(folder):
    found = load_completion(folder / "completed")
    arrays = [found.factors.u, found.factors.v, found.factors.offset,
              found.factors.row_bias, found.factors.col_bias]  # fmt: skip
    ids = [found.row_ids.tolist(), found.col_ids.tolist()]
    return [digest_array(np.asarray(a)) for a in arrays], ids, found.names


def read_page(folder):
    """The lines of a run as the report reads them and as a resumed run keeps them."""
    run = folder / "runs" / "union"
    read_run(run)
    log = MetricsLog(run / "metrics.jsonl", 4)
    log.sync()
    log.close()
    steps = [line["step"] for line in read_metrics(run / "metrics.jsonl")]
    if steps != sorted(steps):
        raise Finding(f"steps {steps} after a resume")


def read_table(folder):
    for name in ("table.csv", "table.npz"):
        table = read_entries(folder / name)
        if len(table.rows) != len(table.values) or not len(table.values):
            raise Finding(f"{name} gives {len(table.values)} values")


def read_tokens(folder):
    """Data of the user's own: any bytes may be text, none may be a raw error."""
    config = get_preset("tiny")
    for name in ("tokens.npz", "lines.jsonl", "text.txt"):
        data = dict(path=str(folder / name), batch_size=2, cache_dir=str(folder / "c"))
        make_dataset(changed(config, data), "train").batch(0)


def changed(config, data):
    import dataclasses

    data = dataclasses.replace(config.data, **data)
    model = dataclasses.replace(config.model, max_seq_len=32)
    return dataclasses.replace(config, data=data, model=model)


def read_tokenizer(folder):
    load_tokenizer(str(folder / "tokenizer.json"))


def read_plan(folder):
    read_layout(folder / "layout.json", get_preset("tiny"))


def show_data(folder):
    code = main(["data", "tiny", "--data.path", str(folder / "text.txt"),
                 "--data.cache-dir", str(folder / "c"), "--json"])  # fmt: skip
    if code not in (0, 2):
        raise Finding(f"exit code {code}")


# What is damaged, who reads it, and whether it must read as before.
READERS = [
    ("runs/union/checkpoints", read_model, True),
    ("runs/union/config.json", read_model, True),
    ("prepared", read_batches, True),
    ("adapter", read_adapter, True),
    ("completed/factors.safetensors", read_completed, True),
    ("runs/union/metrics.jsonl", read_page, False),
    ("runs/union/env.json", read_page, False),
    ("runs/union/config.json", read_page, False),
    ("table.csv", read_table, False),
    ("table.npz", read_table, False),
    ("tokens.npz", read_tokens, False),
    ("lines.jsonl", read_tokens, False),
    ("text.txt", show_data, False),
    ("tokenizer.json", read_tokenizer, False),
    ("layout.json", read_plan, False),
]


@pytest.fixture(scope="module")
def damageable(workshop, tmp_path_factory):
    """The workshop with prepared data and a tokenizer, and what its files hold."""
    folder = tmp_path_factory.mktemp("damageable") / "work"
    shutil.copytree(workshop, folder, ignore=shutil.ignore_patterns("cache"))
    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<|endoftext|>"])
    backend.train_from_iterator(["some text to learn words of"] * 3, trainer)
    backend.save(str(folder / "tokenizer.json"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("XDG_CACHE_HOME", str(folder / "prepared"))
        right = {read: read(folder) for _, read, same in READERS if same}
        for _, read, _ in READERS:
            read(folder)
    return folder, right


def damage_file(rng, path, others):
    """Damage one file in place; return what was done."""
    kind = rng.random()
    if kind < 0.03:
        path.unlink()
        return "gone"
    if kind < 0.05:
        path.unlink()
        path.mkdir()
        return "a folder"
    if kind < 0.07:
        path.unlink()
        path.symlink_to(rng.choice(["nowhere", path.name, "/dev/null"]))
        return f"a link to {os.readlink(path)}"
    # One's own data may well come through a pipe, which is waited for.
    if kind < 0.08 and path.suffix not in (".csv", ".npz", ".jsonl", ".txt"):
        path.unlink()
        os.mkfifo(path)
        return "a pipe"
    other = [o.read_bytes() for o in others]
    done, data = damage_bytes(rng, path.read_bytes(), other or [b""])
    path.write_bytes(data)
    return done


def check_damage(rng, damageable, place, monkeypatch, capsys):
    whole, right = damageable
    name, read, same = rng.choice(READERS)
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(whole, place, symlinks=True)
    monkeypatch.chdir(place)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "prepared"))
    target = place / name
    files = (
        [target]
        if target.is_file()
        else sorted(p for p in target.rglob("*") if p.is_file())
    )
    path = rng.choice(files)
    done = damage_file(rng, path, files[:20])
    about = f"{path.relative_to(place)} ({done}), {read.__name__}"
    try:
        found = read(place)
    except UoeError as error:
        one_line(str(error), about)
        return
    except OSError as error:
        # The command line answers these with the file's name.
        if error.filename is None:
            raise raw_error(error, about) from None
        return
    except Finding as error:
        raise Finding(f"{error} <- {about}") from None
    except Exception as error:
        raise raw_error(error, about) from None
    finally:
        capsys.readouterr()
    if same and found != right[read]:
        raise Finding(f"other numbers, without a word <- {about}")


@pytest.mark.parametrize("cases", [40, pytest.param(500, marks=pytest.mark.nightly)])
def test_damaged_files_are_refused_or_read_as_they_were(
    cases, damageable, tmp_path, monkeypatch, capsys
):
    check = functools.partial(
        check_damage,
        damageable=damageable,
        place=tmp_path / "work",
        monkeypatch=monkeypatch,
        capsys=capsys,
    )
    run_cases("damage", cases, check)
