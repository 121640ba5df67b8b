"""An import holds the weights and little more: measured in a process of its own."""

import json
import math
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.tiny_folders import LLAMA, random_tensors, write_folder
from uoe_jax.interop.folder import open_foreign
from uoe_jax.runs.checkpoint import Checkpoints

# Peak before and after, of a process that has everything loaded.
CHILD = """
import re, sys
from pathlib import Path
import gguf, jax.numpy, uoe_jax.cli.interop
from uoe_jax.interop.importing import import_run
jax.numpy.zeros(1).block_until_ready()
# Unlike getrusage's, this peak doesn't begin with that of the process that forked it.
status = lambda: Path("/proc/self/status").read_text()
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status())[1])
before = peak()
import_run(Path(sys.argv[1]), Path(sys.argv[2]))
print((peak() - before) * 1024)
"""
SIZES = {
    "vocab_size": 4096,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("large") / "model"
    write_folder(path, LLAMA | SIZES, random_tensors(LLAMA | SIZES), tokenizer=False)
    return path


def share(path, out):
    """How many times the weights' memory an import takes above an idle process."""
    found = open_foreign(path)
    weights = 4 * sum(math.prod(t.shape) for t in found.files.tensors.values())
    assert weights > 250e6
    command = [sys.executable, "-c", CHILD, str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout) / weights


@pytest.mark.nightly
def test_a_folder_takes_less_than_one_and_a_half_times_its_weights(folder, tmp_path):
    assert 0.9 < share(folder, tmp_path / "run") < 1.5


@pytest.mark.nightly
def test_a_quantised_file_does_too(folder, tmp_path):
    gguf = pytest.importorskip("gguf")
    from tests.interop.test_gguf import write

    found = open_foreign(folder)
    kind = gguf.GGMLQuantizationType.Q8_0
    path = tmp_path / "a.gguf"
    sizes = {
        "embedding_length": 768,
        "block_count": 8,
        "feed_forward_length": 3072,
        "head_count": 12,
        "head_count_kv": 4,
    }
    tensors = {name: found.files.read(name) for name in found.files.names()}
    pack = lambda a: gguf.quantize(a, kind) if a.ndim > 1 else a
    write(path, tensors, pack=pack, kind=kind, **sizes)
    assert path.stat().st_size < 90e6
    assert 0.9 < share(path, tmp_path / "run") < 1.5


@pytest.mark.parametrize("compress", [False, True])
def test_arrays_that_are_saved_in_turn_come_back(compress, tmp_path, monkeypatch):
    monkeypatch.setattr("uoe_jax.runs.checkpoint._AT_ONCE", 100)
    draw = np.random.default_rng(0)
    arrays = {
        f"a{n}": draw.normal(size=size).astype(dtype)
        for n, (size, dtype) in enumerate(
            [((3, 5), "float32"), ((), "float32"), ((200,), jnp.bfloat16),
             ((2,), "int32"), ((7, 2, 2), "float64")]
        )
    }  # fmt: skip
    store = Checkpoints(tmp_path / "c", compress=compress)
    store.save(3, arrays, {"a": 1}, {"b": 2})
    store.close()
    step, back, progress = Checkpoints(tmp_path / "c").restore(arrays)
    assert (step, progress) == (3, {"b": 2})
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        np.testing.assert_array_equal(back[name], array)
    manifest = json.loads((tmp_path / "c" / "3" / "integrity.json").read_text())
    assert manifest["arrays"].keys() == arrays.keys()
