"""What fuzzing found, as fixed examples: one each kind of fault."""

import json
import shutil

import pytest

from uoe_jax.adapt.files import load_adapters
from uoe_jax.cli import main
from uoe_jax.data.entries import read_entries
from uoe_jax.errors import CheckpointError, DataError
from uoe_jax.linalg.completion import load_factors
from uoe_jax.report.read import read_run
from uoe_jax.runs.load import load_run
from uoe_jax.train.metrics import MetricsLog


@pytest.fixture
def shop(workshop, tmp_path):
    """A workshop of this test's own."""
    folder = tmp_path / "shop"
    shutil.copytree(workshop, folder, ignore=shutil.ignore_patterns("cache"))
    return folder


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("old", "new"),
    [('"rope_theta": 10000.0', '"rope_theta": 10010.0'),
     ('"norm_eps": 1e-06', '"norm_eps": 1e-05'),
     ('"top_k": 4', '"top_k": 2')],
)  # fmt: skip
def test_a_digit_of_a_config_never_gives_another_loss(shop, old, new):
    file = shop / "runs" / "union" / "config.json"
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    field = old.split('"')[1]
    with pytest.raises(CheckpointError, match=f"{field} is .*, was .*restore"):
        load_run(file.parent)


def test_a_flipped_bit_of_completed_factors_is_refused(shop):
    file = shop / "completed" / "factors.safetensors"
    load_factors(file)
    flip(file, -5)
    with pytest.raises(DataError, match="factors.safetensors has changed bytes"):
        load_factors(file)


def test_a_flipped_bit_of_an_adapter_is_refused(shop):
    from flax import nnx

    params = nnx.split(load_run(shop / "runs/union").model, nnx.Param, ...)[1]
    load_adapters(shop / "adapter", params)
    flip(shop / "adapter" / "adapter_model.safetensors", -5)
    with pytest.raises(DataError, match="adapter_model.safetensors has changed bytes"):
        load_adapters(shop / "adapter", params)


def test_a_changed_scale_of_an_adapter_is_refused(shop):
    from flax import nnx

    params = nnx.split(load_run(shop / "runs/union").model, nnx.Param, ...)[1]
    file = shop / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    name = next(iter(content["uoe_jax"]["scales"]))
    content["uoe_jax"]["scales"][name] *= 10
    file.write_text(json.dumps(content))
    with pytest.raises(DataError, match="damaged 'uoe_jax' part .its checksum"):
        load_adapters(shop / "adapter", params)


def test_a_column_that_is_damaged_inside_an_archive_is_one_line(shop):
    file = shop / "table.npz"
    data = file.read_bytes()
    flip(file, data.index(b"rows.npy") + len("rows.npy") + 60)
    with pytest.raises(DataError, match="table.npz can't be read as .npz"):
        read_entries(file)


def test_metrics_that_are_no_text_are_left_out(shop):
    run = shop / "runs" / "union"
    whole = read_run(run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'{"kind": "train", "step": \xf0\xff\n')
    assert read_run(run).train == whole.train


def test_metrics_that_are_there_twice_are_kept_once(shop):
    file = shop / "runs" / "union" / "metrics.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole + whole)
    log = MetricsLog(file, 4)
    log.sync()
    log.close()
    assert file.read_bytes() == whole


def test_a_negative_length_is_one_line(capsys):
    assert main(["leakcheck", "tiny", "--length", "-1"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "-1" in line and "length" in line


@pytest.mark.parametrize("columns", ["two\nlines", "user,item\r,rating", "a\n,b,c"])
def test_columns_of_two_lines_are_one_line(shop, columns, capsys):
    file = str(shop / "table.csv")
    assert main(["complete", file, "--columns", columns, "--out", "x"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "columns is" in line and line.isprintable()
