"""Files of any dtype come in exactly, and go out in the dtype that is asked for."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.interop.tiny_folders import LLAMA, random_tensors, write_folder
from uoe_jax.cli import main
from uoe_jax.errors import ConfigError
from uoe_jax.interop.exporting import export_run
from uoe_jax.interop.importing import import_run
from uoe_jax.runs.load import load_run
from uoe_jax.tree import named_leaves


def test_float16_comes_in_exactly_and_goes_out_bit_for_bit(tmp_path, capsys):
    tensors = random_tensors(LLAMA, dtype=np.float16)
    smallest = np.float16(6e-8)  # 2^-24, below what is normal
    tensors["model.norm.weight"][:3] = [65504, smallest, 1.0009766]
    write_folder(tmp_path / "a", tensors=tensors, tokenizer=False)
    report = import_run(tmp_path / "a", tmp_path / "run")
    assert report["dtype"] == "float32"
    held = named_leaves(load_run(tmp_path / "run").model)["trunk.norm.scale"]
    assert held.dtype == jnp.float32
    np.testing.assert_array_equal(held, tensors["model.norm.weight"])
    args = ["export", tmp_path / "run", tmp_path / "out", "--dtype", "float16"]
    assert main([*map(str, args), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["dtype"] == "float16"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == tensors.keys()
    for name, array in tensors.items():
        assert after[name].dtype == np.float16
        np.testing.assert_array_equal(after[name], array, err_msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_rounded_to_what_is_asked_for(dtype, tmp_path):
    tensors = write_folder(tmp_path / "a", tokenizer=False)
    import_run(tmp_path / "a", tmp_path / "run")
    width = jnp.dtype(dtype).itemsize
    report = export_run(
        tmp_path / "run", tmp_path / "out", dtype=dtype, shard_bytes=10_000 * width
    )
    assert report["dtype"] == dtype
    assert len(report["files"]) > 2
    after = {}
    for file in report["files"]:
        part = load_file(tmp_path / "out" / file)
        assert sum(a.nbytes for a in part.values()) <= max(
            10_000 * width, max(a.nbytes for a in part.values())
        )
        after |= part
    for name, array in tensors.items():
        assert after[name].dtype == jnp.dtype(dtype)
        np.testing.assert_array_equal(after[name], array.astype(jnp.dtype(dtype)))


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path, capsys):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"][3] = -70_000
    write_folder(tmp_path / "a", tensors=tensors, tokenizer=False)
    import_run(tmp_path / "a", tmp_path / "run")
    args = ["export", tmp_path / "run", tmp_path / "out", "--dtype", "float16"]
    assert main([*map(str, args)]) == 2
    said = capsys.readouterr().err
    assert "model.norm.weight holds 70000, more than float16 can (65504)" in said
    assert said.strip().count("\n") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "run"]
    export_run(tmp_path / "run", tmp_path / "out", dtype="bfloat16")
    with pytest.raises(ConfigError, match="dtype is 'float8'; written are float32"):
        export_run(tmp_path / "run", tmp_path / "no", dtype="float8")


def test_numbers_that_were_not_finite_before_stay(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"][:2] = [np.inf, np.nan]
    write_folder(tmp_path / "a", tensors=tensors, tokenizer=False)
    with pytest.warns(UserWarning, match="aren't finite"):
        import_run(tmp_path / "a", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out", dtype="float16")
    after = load_file(tmp_path / "out" / "model.safetensors")["model.norm.weight"]
    assert np.isposinf(after[0]) and np.isnan(after[1]) and np.isfinite(after[2:]).all()


def test_an_adapter_keeps_the_dtype_it_has(tmp_path, capsys):
    (tmp_path / "adapter_config.json").write_text("{}")
    args = ["export", str(tmp_path), str(tmp_path / "out"), "--dtype", "float16"]
    assert main(args) == 2
    assert "is an adapter" in capsys.readouterr().err
