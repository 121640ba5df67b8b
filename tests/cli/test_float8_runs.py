"""A run with operands of eight bits: looked at without them, and made smaller."""

import dataclasses

import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.model import flat_buffers, flat_params, with_params
from uoe_jax.runs.load import load_run
from uoe_jax.runs.probe import in_float32


@pytest.fixture(scope="module")
def run(tmp_path_factory, text_file):
    out = tmp_path_factory.mktemp("runs") / "float8"
    args = ["train", "tiny", "--run-dir", str(out), "--quiet", "--no-report",
            "--data.path", str(text_file), "--data.cache-dir", str(text_file.parent),
            "--data.batch-size", "4", "--model.d-model", "32", "--model.d-ff", "64",
            "--model.num-layers", "1", "--model.num-heads", "2",
            "--model.num-kv-heads", "2", "--model.head-dim", "8",
            "--model.max-seq-len", "32", "--mesh.data", "1", "--train.steps", "2",
            "--train.eval-batches", "1", "--model.compute-dtype", "bfloat16",
            "--model.float8", "rows"]  # fmt: skip
    assert main(args) == 0
    return out


def test_it_is_looked_at_in_float32_whole(run, capsys):
    model = load_run(run).model
    assert in_float32(model.config).float8 == "none"
    tokens = np.arange(32)[None] % 256
    arrays = flat_params(model), flat_buffers(model)
    whole = dataclasses.replace(model.config, float8="none", compute_dtype="float32")
    seen, wanted = (
        with_params(config, *arrays)(tokens)[0]
        for config in (in_float32(model.config), whole)
    )
    np.testing.assert_array_equal(seen, wanted)
    assert main(["leakcheck", str(run)]) == 0
    assert "float8" not in capsys.readouterr().err


@pytest.mark.parametrize(("words", "scales"), [
    (["compress", "--cut", "0.3", "--calibrate", "256", "--multiple", "2"], "none"),
    (["decompose", "--experts", "8", "--parts", "mlp"], "none"),
    (["decompose", "--experts", "2", "--parts", "mlp"], "rows"),
])  # fmt: skip
def test_a_change_keeps_it_where_the_weights_take_it(
    run, tmp_path, capsys, words, scales
):
    out = tmp_path / "out"
    assert main([words[0], str(run), *words[1:], "--out", str(out)]) == 0
    told = "model.float8 is none in the new run" in capsys.readouterr().err
    assert told == (scales == "none")
    assert load_run(out).config.model.float8 == scales
    assert main(["eval", str(out)]) == 0
