"""Files made to harm: refused in one line, by name, before memory is taken."""

import json
import os
import re
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from uoe_jax.adapt.files import read_config, read_tensors
from uoe_jax.data.tokenize import SubwordTokenizer
from uoe_jax.errors import DataError, UoeError
from uoe_jax.interop.peft import read_lycoris, read_peft
from uoe_jax.linalg.completion import load_factors
from uoe_jax.validation import read_config as read_run_config

MEMORY = 200 << 20  # bytes that a refusal may take
NUMBERS = np.arange(8, dtype=np.float32)


def entry(begin, end, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def safetensors(header, data=b"", length=None):
    """The bytes of a file whose header says what one likes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


DATA = NUMBERS.tobytes()
HOSTILE = {
    "header of 2^40 bytes": safetensors({}, length=1 << 40),
    "header of 2^63 bytes": safetensors({}, length=1 << 63),
    "header of 2^64-1 bytes": safetensors({}, length=(1 << 64) - 1),
    "header beyond the file": safetensors({"a": entry(0, 8)}, length=10_000),
    "no header": b"\x00\x01",
    "empty": b"",
    "header of nothing": safetensors(b""),
    "header is no JSON": safetensors(b"{]" + b" " * 30),
    "header is no UTF-8": safetensors(b'{"\xff\xfe": 1}'),
    "header is a list": safetensors([1, 2]),
    "header of 100,000 levels": safetensors(b'{"a":' * 100_000 + b"}" * 100_000),
    "overlap": safetensors({"a": entry(0, 8), "b": entry(4, 12)}, DATA[:12]),
    "gap": safetensors({"a": entry(0, 8), "b": entry(16, 24)}, DATA[:24]),
    "first at 8": safetensors({"a": entry(8, 16)}, DATA[:16]),
    "data left over": safetensors({"a": entry(0, 8)}, DATA[:20]),
    "data cut": safetensors({"a": entry(0, 8)}, DATA[:5]),
    "end before begin": safetensors({"a": entry(8, 0)}, DATA[:8]),
    "negative place": safetensors({"a": entry(-8, 0)}, DATA[:8]),
    "negative side": safetensors({"a": entry(0, 8, (-1, -2))}, DATA[:8]),
    "2^62 by 2^62": safetensors({"a": entry(0, 8, (1 << 62, 1 << 62))}, DATA[:8]),
    "2^40 numbers": safetensors({"a": entry(0, 8, (1 << 40,))}, DATA[:8]),
    "ends at 2^63": safetensors({"a": entry(0, 1 << 63, (1 << 61,))}, DATA[:8]),
    "bytes of another type": safetensors({"a": entry(0, 8, (2,), "F64")}, DATA[:8]),
    "unknown type": safetensors({"a": entry(0, 8, (2,), "X99")}, DATA[:8]),
    "no type": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}, DATA[:8]),
    "a name twice": safetensors(
        b'{"a":%s,"a":%s}'
        % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(8, 16)).encode()),
        DATA[:16],
    ),
    "a pickle": b"\x80\x04cos\nsystem\n(S'touch /tmp/ran'\ntR.",
}


def read_adapter(path: Path):
    return read_tensors(path)


@pytest.fixture
def little_memory():
    """A limit on address space a little above what is in use."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf(
        "SC_PAGE_SIZE"
    )
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.mark.parametrize("read", [read_adapter, read_lycoris, load_factors])
@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_safetensors_are_refused_by_name(kind, read, tmp_path, little_memory):
    path = tmp_path / "weights.safetensors"
    path.write_bytes(HOSTILE[kind])
    with pytest.raises(DataError) as caught:
        read(path)
    said = str(caught.value)
    assert str(path) in said and said.isprintable() and len(said) < 500


def test_names_in_a_safetensors_file_are_never_paths(tmp_path):
    names = ["../../etc/passwd", "/etc/passwd", "a\x00b", "..", "x" * 10_000]
    path = tmp_path / "weights.safetensors"
    save_file({name: NUMBERS for name in names}, path)
    assert sorted(read_tensors(path)) == sorted(names)
    with pytest.raises(DataError) as caught:
        read_lycoris(path)
    assert str(caught.value).isprintable()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "text",
    [
        '{"peft_type": ' + "[" * 100_000 + "]" * 100_000 + "}",
        '{"r": NaN}',
        '{"r": 1e999}',
        '{"r": 1, "r": 2}',
        '{"__class__": "os.system", "r": 8',
        "!!python/object/apply:os.system ['touch ran']",
        "[]",
        "\ufeff\ufeff{}",
        "9" * 5000,
    ],
    ids=range(9),
)
def test_hostile_configs_are_refused_in_one_line(text, tmp_path):
    (tmp_path / "adapter_config.json").write_text(text)
    (tmp_path / "config.json").write_text(text)
    for read in (read_config, read_peft, read_run_config):
        with pytest.raises(UoeError) as caught:
            read(tmp_path)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 500
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"model": ' * 100_000 + "1" + "}" * 100_000,
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": -1},'
        ' "merges": []}}',
        '{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}',
        '{"version": "1.0", "model": {"type": "WordLevel", "unk_token": "<unk>",'
        ' "vocab": {"<|endoftext|>": 4294967295, "a": 0}}}',
        '{"version": "1.0", "model": {"type": "WordLevel", "unk_token": "<unk>",'
        ' "vocab": {"<|endoftext|>": 99999999999999, "a": 0}}}',
        '{"__class__": "os.system"}',
    ],
    ids=["deep", "negative", "no words", "id of 2^32", "id of 10^14", "class"],
)
def test_hostile_tokenizers_are_refused_in_one_line(text, little_memory):
    with pytest.raises(UoeError) as caught:
        SubwordTokenizer(text, "tokenizer.json")
    said = str(caught.value)
    assert "tokenizer.json" in said and said.isprintable() and len(said) < 500


def test_links_and_pipes_in_place_of_files_are_no_way_out(tmp_path):
    """A link is followed as the user's own, a pipe isn't waited for."""
    os.mkfifo(tmp_path / "adapter_config.json")
    with pytest.raises(DataError, match="no adapter_config.json"):
        read_config(tmp_path)
    os.mkfifo(tmp_path / "weights.safetensors")
    for read in (read_adapter, load_factors):
        with pytest.raises(DataError):
            read(tmp_path / "weights.safetensors")
    loop = tmp_path / "loop.safetensors"
    loop.symlink_to(loop)
    for read in (read_adapter, load_factors):
        with pytest.raises(DataError):
            read(loop)


def test_no_module_can_load_a_pickle():
    """Nothing here unpickles: numpy is told not to, and nobody else is asked."""
    package = Path(__file__).parents[1] / "uoe_jax"
    for path in package.rglob("*.py"):
        text = path.read_text()
        modules = r"(pickle|cPickle|dill|cloudpickle|joblib|shelve|marshal)"
        assert not re.search(rf"^\s*(import|from) {modules}\b", text, re.M), path
        for call in re.findall(r"np\.load\(.*?False\)|np\.load\(.*", text):
            assert "allow_pickle=False" in call, f"{path}: {call}"
