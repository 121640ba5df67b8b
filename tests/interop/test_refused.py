"""What can't be read is refused in one line, before memory is taken."""

import json
import os
import re
import resource
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.interop.tiny_folders import GOLDENS, LLAMA, random_tensors, write_folder
from uoe_jax.cli import main
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.interop import hub
from uoe_jax.interop.folder import open_foreign
from uoe_jax.interop.importing import import_run
from uoe_jax.interop.read import read_params

MEMORY = 100 << 20  # bytes that a refusal may take


def header(content, data=b"", length=None):
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


DATA = bytes(16)
FILES = {
    "no header": (b"abc", "has 3 bytes; it is no safetensors file"),
    "longer than the file": (
        header({"a": entry(0, 8)}, DATA, 1 << 40),
        "says that its header has 1,099,511,627,776 bytes",
    ),
    "of 2^64 - 1 bytes": (header({}, b"", (1 << 64) - 1), "says that its header has"),
    "of 10 GB": (header({}, b"", 10**10), "its header has 10,000,000,000 bytes"),
    "no JSON": (header(b"{{"), "is not JSON"),
    "a list": (header([]), "is no object"),
    "equal keys": (header(b'{"a": 1, "a": 2}'), "the key 'a' is there twice"),
    "a number for an entry": (header({"a": 3}, DATA), "a is 3; it needs dtype, shape"),
    "negative sizes": (
        header({"a": entry(0, 16, (-2, -2))}, DATA),
        "it needs dtype, shape and two data_offsets",
    ),
    "overlapping": (
        header({"a": entry(0, 12, (3,)), "b": entry(8, 16)}, DATA),
        "b overlaps what is before it (byte 8, not 12)",
    ),
    "a gap": (
        header({"a": entry(0, 4, (1,)), "b": entry(8, 16)}, DATA),
        "leaves a gap",
    ),
    "beyond the file": (header({"a": entry(0, 32, (8,))}, DATA), "bytes 0 to 32 of 16"),
    "bytes left over": (header({"a": entry(0, 8)}, DATA), "its header says 8"),
    "a shape that lies": (
        header({"a": entry(0, 16, (2**62, 2**62))}, DATA),
        "bytes and has 16",
    ),
    "an unknown dtype": (
        header({"a": entry(0, 16, (4,), "F33")}, DATA),
        "has the dtype 'F33'; did you mean F32",
    ),
}


def refusal(folder):
    """What `open_foreign` says, in one line and with little memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError) as caught:
        open_foreign(folder)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert (after - before) * 1024 < MEMORY
    text = str(caught.value)
    assert "\n" not in text and len(text) < 900
    return text


@pytest.mark.parametrize("name", FILES)
def test_hostile_headers(name, tmp_path):
    content, said = FILES[name]
    write_folder(tmp_path, tokenizer=False)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert said in refusal(tmp_path)


def test_tensors_that_are_missing_too_many_or_of_another_shape_are_listed(tmp_path):
    tensors = random_tensors(LLAMA)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.extra.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((3, 3), np.float32)
    write_folder(tmp_path, tensors=tensors, tokenizer=False)
    text = refusal(tmp_path)
    assert "model.norm.weight is missing" in text
    assert "model.layers.0.extra.weight has no place" in text
    assert "up_proj.weight is [3, 3], expected [64, 32]" in text


def test_integers_are_no_weights_and_ties_that_differ_are_told(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.norm.weight"] = np.ones(32, np.int32)
    write_folder(tmp_path / "a", tensors=tensors, tokenizer=False)
    assert "model.norm.weight is I32; weights are read in" in refusal(tmp_path / "a")
    tensors = random_tensors(LLAMA)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    write_folder(tmp_path / "b", tensors=tensors, tokenizer=False)
    assert "lm_head.weight differs from model.embed_tokens" in refusal(tmp_path / "b")


def test_numbers_that_are_not_finite_are_told_by_name(tmp_path):
    tensors = random_tensors(LLAMA)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = np.nan
    write_folder(tmp_path, tensors=tensors, tokenizer=False)
    found = open_foreign(tmp_path)
    with pytest.warns(UserWarning, match=r"1 tensors .*layers.1.mlp.up_proj.* \(1\)"):
        read_params(found.files, found.sources, found.match, found.model)


def break_index(folder, change):
    file = folder / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    change(index)
    file.write_text(json.dumps(index))


def test_shards_that_are_missing_elsewhere_or_not_as_the_index_says(tmp_path):
    write_folder(tmp_path / "a", tokenizer=False, shards=2)
    shard = tmp_path / "a" / "model-00002-of-00002.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    assert "00002-of-00002.safetensors is missing, with" in refusal(tmp_path / "a")
    outside = tmp_path / "elsewhere.safetensors"
    outside.write_bytes(data)
    shard.symlink_to(outside)
    assert "links to" in (text := refusal(tmp_path / "a")) and "outside of" in text
    shard.unlink()
    shard.write_bytes(data)
    index = {"../x.safetensors": "shards are .safetensors files beside it"}
    for name, said in index.items():
        break_index(tmp_path / "a", lambda i, n=name: i["weight_map"].update({"lm": n}))
        assert said in refusal(tmp_path / "a")
    break_index(tmp_path / "a", lambda i: i["weight_map"].update({"lm": shard.name}))
    assert "has no lm, which model.safetensors.index" in refusal(tmp_path / "a")
    break_index(tmp_path / "a", lambda i: i["weight_map"].pop("lm"))
    break_index(
        tmp_path / "a", lambda i: i["weight_map"].pop("model.embed_tokens.weight")
    )
    assert "that model.safetensors.index.json doesn't" in refusal(tmp_path / "a")
    break_index(tmp_path / "a", lambda i: i.update(weight_map=3))
    assert "has no weight_map of file names" in refusal(tmp_path / "a")


def test_a_hubs_cache_links_inside_its_own_folder(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    write_folder(snapshot, tokenizer=False)
    (snapshot / "model.safetensors").rename(blobs / "f00")
    (snapshot / "model.safetensors").symlink_to(blobs / "f00")
    assert open_foreign(snapshot).family.model_type == "llama"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickles_are_refused_with_the_line_that_converts_them(name, tmp_path):
    write_folder(tmp_path, tokenizer=False)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_bytes(b"\x80\x04")
    for path in (tmp_path, tmp_path / name):
        text = refusal(path)
        assert "is pickled, which can run code" in text
        assert "weights_only=True" in text and "save_file" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["T5ForConditionalGeneration"]}, "architectures is ['T5"),
        ({"architectures": None, "model_type": "mamba"}, "model_type is 'mamba'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; read are 'silu', 'swish'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope'"),
        ({"rope_parameters": 3}, "rope_parameters is 3; it must be an object"),
        ({"hidden_size": "32"}, "hidden_size is '32'; it must be a int"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be at least 1"),
        ({"num_hidden_layers": 10**9}, "num_layers is 1000000000; it must be 1 to"),
        ({"vocab_size": None}, "config.json has no vocab_size"),
        ({"num_key_value_heads": 3}, "doesn't divide model.num_heads 4"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps is 'x'"),
        ({"pretraining_tp": 2}, "pretraining_tp is 2; read are 1"),
    ],
)
def test_configs_that_are_not_supported(changes, said, tmp_path):
    write_folder(tmp_path, tokenizer=False)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | changes))
    assert said in refusal(tmp_path)


def test_paths_that_hold_no_model(tmp_path):
    assert "doesn't exist; give a folder" in refusal(tmp_path / "nothing")
    (tmp_path / "a.txt").write_text("x")
    assert "is no folder and no .gguf file" in refusal(tmp_path / "a.txt")
    (tmp_path / "empty").mkdir()
    assert "config.json doesn't exist" in refusal(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(json.dumps(LLAMA))
    assert "has no model.safetensors; give a folder" in refusal(tmp_path / "empty")
    os.mkfifo(tmp_path / "empty" / "model.safetensors")
    assert "model.safetensors" in refusal(tmp_path / "empty")


def test_a_run_folder_is_never_written_over_and_nothing_is_left_behind(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "x").write_text("mine")
    with pytest.raises(ConfigError, match="isn't empty"):
        import_run(GOLDENS / "llama", tmp_path / "run")
    write_folder(tmp_path / "a", tokenizer=False)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, tmp_path / "a" / "model.safetensors")
    with pytest.raises(DataError, match="missing"):
        import_run(tmp_path / "a", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "command",
    [
        ["eval"],
        ["generate", "--prompt", "a"],
        ["report"],
        ["decompose", "--experts", "2"],
        ["leakcheck"],
        ["adapt"],
        ["plan"],
        ["cost"],
        ["export", "OUT"],
        ["train"],
    ],
)
def test_every_verb_says_how_a_foreign_folder_is_read(command, capsys):
    verb, *rest = command
    rest = [word.replace("OUT", "/nowhere/out") for word in rest]
    assert main([verb, str(GOLDENS / "llama"), *rest]) == 2
    said = capsys.readouterr().err.strip()
    assert said.count("\n") == 0
    assert re.search(r"another library; read it first: uoe import .*llama", said)


@pytest.mark.parametrize("name", ["hf:", "hf:a", "hf:a/b/c", "hf:../x"])
def test_names_of_the_hub(name):
    with pytest.raises(ConfigError, match="is no model of the hub; write hf:ORG/NAME"):
        hub.fetch(name)


def test_what_the_hub_says_is_one_line(monkeypatch, tmp_path):
    import huggingface_hub

    def fail(*args, **options):
        raise OSError("offline\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DataError, match="^hf:a/b can't be fetched .offline.; check"):
        hub.fetch("hf:a/b")
    asked = []

    def give(name, **options):
        asked.append((name, options["revision"], options["allow_patterns"]))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert hub.fetch("hf:a/b@main") == tmp_path
    assert asked[0][:2] == ("a/b", "main") and "*.bin" not in asked[0][2]


@pytest.mark.parametrize(
    "name", ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model"]
)
def test_a_sentence_piece_file_alone_is_refused_and_beside_a_json_ignored(
    name, tmp_path, capsys
):
    folder, out = tmp_path / "model", tmp_path / "run"
    write_folder(folder, tokenizer=False)
    (folder / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    asked = ["import", str(folder), "--run-dir", str(out)]
    assert main(asked) != 0
    error = capsys.readouterr().err
    assert f"{name} alone" in error and "save_pretrained" in error
    assert error.count("\n") == 1 and not out.exists()
    write_folder(folder)  # with a tokenizer.json
    assert main(asked) == 0
