"""Eleven models that transformers made: its logits here, and every tensor back."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.interop.tiny_folders import (
    FAMILY_NAMES,
    GOLDENS,
    LLAMA,
    random_tensors,
    write_folder,
)
from uoe_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from uoe_jax.errors import ConfigError
from uoe_jax.interop.exporting import export_run
from uoe_jax.interop.folder import open_foreign
from uoe_jax.interop.importing import import_run
from uoe_jax.interop.read import read_onto_mesh, read_params
from uoe_jax.leakcheck import leakcheck
from uoe_jax.model import with_params
from uoe_jax.partition.mesh import mesh_for
from uoe_jax.runs.load import load_run
from uoe_jax.runs.state import layout_of
from uoe_jax.tree import named_leaves


def load(folder):
    found = open_foreign(folder)
    params = read_params(found.files, found.sources, found.match, found.model)
    return found, with_params(found.model, params)


def golden_input(model):
    if model.kind == "vision":
        image = np.linspace(-1, 1, 768, dtype=np.float32).reshape(3, 16, 16)
        return jnp.asarray(image.transpose(1, 2, 0))[None]
    return jnp.arange(12)[None]


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_logits_are_those_of_transformers(name):
    found, model = load(GOLDENS / name)
    with jax.default_matmul_precision("highest"):
        logits = jax.jit(lambda m, x: m(x)[0])(model, golden_input(found.model))[0]
    expected = np.load(GOLDENS / name / "logits.npy")
    assert np.abs(expected).max() > 0.01
    np.testing.assert_allclose(np.asarray(logits), expected, atol=1e-5)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_what_is_exported_is_what_was_imported_bit_for_bit(name, tmp_path):
    report = import_run(GOLDENS / name, tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    before = load_file(GOLDENS / name / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for tensor, array in before.items():
        np.testing.assert_array_equal(after[tensor], array, err_msg=tensor)
    assert report["parameters"] == sum(array.size for array in before.values())
    raw = json.loads((GOLDENS / name / "config.json").read_text())
    new = json.loads((tmp_path / "out" / "config.json").read_text())
    assert new["architectures"] == raw["architectures"]
    for field in raw.keys() & new.keys():
        if field not in ("n_inner", "head_dim", "rope_scaling"):  # spelled out
            assert new[field] == raw[field], field
    again, _ = load(tmp_path / "out")
    assert again.model == load(GOLDENS / name)[0].model


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gpt2", "mixtral"])
def test_imported_decoders_leak_nothing(name):
    _, model = load(GOLDENS / name)
    assert all(f.passed for f in leakcheck(model, jax.random.key(0), length=12))


def test_bfloat16_stays_and_mixed_files_widen(tmp_path):
    tensors = random_tensors(LLAMA, dtype=jnp.bfloat16)
    write_folder(tmp_path / "a", tensors=tensors, tokenizer=False)
    found, _ = load(tmp_path / "a")
    assert (found.model.param_dtype, found.model.compute_dtype) == ("bfloat16",) * 2
    import_run(tmp_path / "a", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert {a.dtype for a in after.values()} == {jnp.dtype("bfloat16")}
    for name, array in tensors.items():
        np.testing.assert_array_equal(after[name], array)
    assert open_foreign(tmp_path / "a", "float32").model.param_dtype == "float32"
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float32)
    write_folder(tmp_path / "b", tensors=tensors, tokenizer=False)
    assert open_foreign(tmp_path / "b").model.param_dtype == "float32"


def test_shards_are_read_and_written_by_their_index(tmp_path):
    tensors = write_folder(tmp_path / "a", tokenizer=False, shards=3)
    import_run(tmp_path / "a", tmp_path / "run")
    report = export_run(tmp_path / "run", tmp_path / "out", shard_bytes=20_000)
    assert len(report["files"]) > 2
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in tensors.values())
    for name, file in index["weight_map"].items():
        shard = load_file(tmp_path / "out" / file)
        np.testing.assert_array_equal(shard[name], tensors[name])
    assert load(tmp_path / "out")[0].model == load(tmp_path / "a")[0].model


@pytest.mark.parametrize(
    "mesh", [{"fsdp": 4, "tensor": 2}, {"tensor": 2, "data": 4}, {"fsdp": 8}]
)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_mesh_gets_its_slices_and_each_byte_is_read_once(family, mesh, tmp_path):
    folder = tmp_path / "a"
    if family == "llama":
        write_folder(folder, tokenizer=False, shards=2)
    else:
        shutil.copytree(GOLDENS / "mixtral", folder)
    found, model = load(folder)
    expected = named_leaves(model)
    size = found.files.bytes_read
    found = open_foreign(folder)
    config = ExperimentConfig(model=found.model, mesh=MeshConfig(**{"data": 1, **mesh}))
    layout = layout_of(config, mesh_for(config))
    arrays = read_onto_mesh(found.files, found.sources, found.match, config, layout)
    assert found.files.bytes_read == size
    for name, array in arrays.items():
        assert array.sharding.spec == layout.specs[name]
        np.testing.assert_array_equal(np.asarray(array), expected[name])
    assert any(len(a.sharding.device_set) == 8 for a in arrays.values())


def test_a_union_is_merged_exactly_or_refused_with_the_reason(tmp_path):
    import dataclasses

    from uoe_jax.decompose.split import split_params, union_config
    from uoe_jax.model import flat_params
    from uoe_jax.runs.write import Origin, write_run

    write_folder(tmp_path / "a")
    import_run(tmp_path / "a", tmp_path / "run")
    run = load_run(tmp_path / "run")
    for top_k in (2, 1):
        union = union_config(run.config.model, 2, top_k)
        params = split_params(flat_params(run.model), run.config.model, union)
        config = dataclasses.replace(run.config, model=union)
        origin = Origin(made_by="test", source="a")
        write_run(tmp_path / f"union{top_k}", config, params, origin)
    export_run(tmp_path / "union2", tmp_path / "out")
    before = load_file(tmp_path / "a" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array, err_msg=name)
    with pytest.raises(ConfigError, match="uses 1 of 2 experts a token and a dense"):
        export_run(tmp_path / "union1", tmp_path / "no")
    params["trunk.blocks.0.mlp.router.weight"][0, 0, 0] = 0.5
    union = dataclasses.replace(union, union=dataclasses.replace(union.union, top_k=2))
    config = dataclasses.replace(run.config, model=union)
    write_run(tmp_path / "routed", config, params, origin)
    with pytest.raises(ConfigError, match="isn't zero, so the gates of mlp aren't 1"):
        export_run(tmp_path / "routed", tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_a_model_that_no_family_has_is_refused_with_what_differs(tmp_path):
    from uoe_jax.model import flat_params, make_model
    from uoe_jax.runs.write import Origin, write_run

    model = ModelConfig(d_model=16, d_ff=32, num_layers=1, num_heads=2, num_kv_heads=2)
    params = flat_params(make_model(model, jax.random.key(0)))
    config = ExperimentConfig(model=model)
    write_run(tmp_path / "run", config, params, Origin(made_by="test", source="-"))
    with pytest.raises(
        ConfigError, match="the nearest is Llama.* activation is 'gelu'"
    ):
        export_run(tmp_path / "run", tmp_path / "out")


def test_older_spellings_copies_and_masks_are_read(tmp_path):
    tensors = load_file(GOLDENS / "bert" / "model.safetensors")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): array
        for name, array in tensors.items()
    }
    words = tensors["bert.embeddings.word_embeddings.weight"]
    old["cls.predictions.decoder.weight"] = words
    old["bert.embeddings.position_ids"] = np.arange(64)[None]
    shutil.copytree(GOLDENS / "bert", tmp_path / "bert")
    save_file(old, tmp_path / "bert" / "model.safetensors")
    found, model = load(tmp_path / "bert")
    expected = named_leaves(load(GOLDENS / "bert")[1])
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, expected[name])
    assert set(found.match.ignored) == {
        "bert.embeddings.position_ids",
        "cls.predictions.decoder.weight",
    }
    shutil.copytree(GOLDENS / "gpt2", tmp_path / "gpt2")
    tensors = load_file(GOLDENS / "gpt2" / "model.safetensors")
    bare = {n.removeprefix("transformer."): a for n, a in tensors.items()}
    bare["h.0.attn.bias"] = np.ones((1, 1, 64, 64), np.float32)
    save_file(bare, tmp_path / "gpt2" / "model.safetensors")
    _, model = load(tmp_path / "gpt2")
    expected = named_leaves(load(GOLDENS / "gpt2")[1])
    for name, leaf in named_leaves(model).items():
        np.testing.assert_array_equal(leaf, expected[name])
