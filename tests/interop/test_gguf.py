"""GGUF files of Llama's shape: the model of the same tensors in a folder."""

import json

import numpy as np
import pytest

from tests.interop.tiny_folders import LLAMA, random_tensors, write_folder
from uoe_jax.errors import DataError
from uoe_jax.interop.folder import open_foreign
from uoe_jax.interop.read import read_params
from uoe_jax.interop.tokenizer import byte_level, sentence_piece, usable

gguf = pytest.importorskip("gguf")
NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}


def side_by_side(weight, heads):
    """Rows of heads as llama.cpp has them: (i, i + H/2) beside each other."""
    split = weight.reshape(heads, 2, -1, weight.shape[1])
    return split.swapaxes(1, 2).reshape(weight.shape)


def write(
    path, tensors, architecture="llama", more=(), pack=None, kind=None, **changes
):
    """Write a file; `pack` quantises an array, to `kind` where it isn't a vector's."""
    pack = pack or (lambda array: array)
    writer = gguf.GGUFWriter(str(path), architecture)
    sizes = {
        "context_length": 64,
        "embedding_length": 32,
        "block_count": 2,
        "feed_forward_length": 64,
        "head_count": 4,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_freq_base": 10000.0,
    }
    for name, value in (sizes | changes).items():
        if value is not None:
            getattr(writer, f"add_{name}")(value)
    counts = {
        "self_attn.q_proj": (sizes | changes)["head_count"],
        "self_attn.k_proj": (sizes | changes)["head_count_kv"],
    }
    for name, array in tensors.items():
        name = name.removesuffix(".weight")
        if name in OUTER:
            said = OUTER[name]
        else:
            layer, _, inner = name.removeprefix("model.layers.").partition(".")
            said = f"blk.{layer}.{NAMES[inner]}"
            heads = counts.get(inner)
            array = array if heads is None else side_by_side(array, heads)
        raw_dtype = kind if array.ndim > 1 else None
        writer.add_tensor(f"{said}.weight", pack(array), raw_dtype=raw_dtype)
    for name, array in more:
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_is_the_model_of_its_tensors(tmp_path):
    tensors = random_tensors(LLAMA)
    write_folder(tmp_path / "a", tensors=tensors, tokenizer=False)
    parts = []
    for path in (tmp_path / "a", write(tmp_path / "a.gguf", tensors)):
        found = open_foreign(path)
        model = found.model
        parts.append(read_params(found.files, found.sources, found.match, model))
    assert model == open_foreign(tmp_path / "a").model
    for name, array in parts[0].items():
        np.testing.assert_array_equal(parts[1][name], array, err_msg=name)


def test_rows_of_a_quantised_tensor_are_those_of_all_of_it(tmp_path, monkeypatch):
    kind = gguf.GGMLQuantizationType.Q8_0
    pack = lambda a: gguf.quantize(a, kind) if a.ndim > 1 else a
    tensors = random_tensors(LLAMA)
    path = write(tmp_path / "a.gguf", tensors, pack=pack, kind=kind)
    for block in (4 << 20, 5 * 4 * 32):  # bytes: all at once, five rows
        monkeypatch.setattr("uoe_jax.interop.gguf._BLOCK", block)
        files = open_foreign(path).files
        for name, array in tensors.items():
            whole = files.read(name)
            # A block's scale is its largest entry / 127, in float16.
            assert np.abs(whole - array).max() < np.abs(array).max() / 200
            if array.ndim > 1:
                dense = gguf.dequantize(gguf.quantize(array, kind), kind)
                np.testing.assert_array_equal(whole, dense, err_msg=name)
            before = files.bytes_read
            rows = files.read(name, (3, 14))
            np.testing.assert_array_equal(rows, whole[3:14], err_msg=name)
            read = files.bytes_read - before
            if not name.endswith(("q_proj.weight", "k_proj.weight")):
                assert read == 11 * (34 * array.shape[1] // 32 if array.ndim > 1 else 4)


def test_a_file_that_is_cut_short_while_it_is_read_says_so(tmp_path):
    path = write(tmp_path / "a.gguf", random_tensors(LLAMA))
    files = open_foreign(path).files
    path.write_bytes(path.read_bytes()[:-40_000])
    with pytest.raises(DataError, match="ends inside model.*; copy it again"):
        for name in sorted(files.names()):
            files.read(name)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"architecture": "mamba"}, "architecture is 'mamba'; read are llama"),
        ({"more": [("rope_freqs.weight", np.ones(4, np.float32))]}, "Llama 3.1"),
        ({"more": [("x.weight", np.ones(4, np.float32))]}, "unknown name, x.weight"),
        ({"head_count": None}, "says no llama.attention.head_count"),
        ({"block_count": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ],
)
def test_files_that_are_not_read_say_why(options, said, tmp_path):
    path = write(tmp_path / "a.gguf", random_tensors(LLAMA), **options)
    with pytest.raises(DataError, match=said) as caught:
        open_foreign(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF" + b"\xff" * 60])
def test_damaged_files_are_refused_in_one_line(content, tmp_path):
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(DataError, match="can't be read as GGUF") as caught:
        open_foreign(tmp_path / "a.gguf")
    assert "\n" not in str(caught.value)


def test_tokenizers_of_pieces_and_of_merges_encode_what_they_decode():
    letters = [chr(c) for c in range(97, 123)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    pieces += ["\u2581", *letters, "he", "ll", "hell", "\u2581hell"]
    scores = [0.0] * 259 + [-9.0] * 27 + [-3.0, -2.0, -1.0, -0.5]
    text = sentence_piece(pieces, scores)
    assert usable(text, "t", len(pieces)) is None
    from uoe_jax.data.subword import SubwordTokenizer

    tokenizer = SubwordTokenizer(text, "t")
    ids = tokenizer.encode("hello \u00e9")
    assert pieces[ids[0]] == "\u2581hell" and tokenizer.decode(ids) == "hello \u00e9"
    assert tokenizer.encode_prompt("he")[0] == 1
    vocab = {c: n for n, c in enumerate([*letters, "ab", "<|endoftext|>", *"0123"])}
    text = byte_level(vocab, ["a b"], digits=True)
    tokenizer = SubwordTokenizer(text, "t")
    assert tokenizer.encode("ab12").tolist() == [26, vocab["1"], vocab["2"]]
    assert json.loads(text)["model"]["type"] == "BPE"
