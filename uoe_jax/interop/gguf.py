"""GGUF files of Llama's shape, through the `gguf` package (MIT): tensors dequantised.

Their names are turned into Hugging Face's, so that one table of names serves both.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from uoe_jax.errors import DataError, extra_packages, first_line, shown
from uoe_jax.files import format_json
from uoe_jax.interop.families import FAMILIES
from uoe_jax.interop.names import Family
from uoe_jax.interop.safetensors import Tensor
from uoe_jax.interop.tokenizer import byte_level, sentence_piece

_OUTER = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_BLOCK = 4 << 20  # bytes of float32 that are dequantised at once
# Pre-tokenizers that cut every digit apart, and those that cut as GPT-2 does.
_PRE = {"smollm": True, "gpt-2": False, "default": False, None: False}


class GgufTensors:
    """The tensors of a file under Hugging Face's names, dequantised when read."""

    def __init__(self, tensors: dict[str, Any], path: Path, heads: dict[str, int]):
        self._raw, self._path, self._heads = tensors, path, heads
        # Written as rows of their last axis first.
        self.tensors = {
            name: Tensor(path, "F32", tuple(map(int, reversed(t.shape))), 0)
            for name, t in tensors.items()
        }
        self.bytes_read = 0

    def names(self) -> frozenset[str]:
        """Return the names of all tensors."""
        return frozenset(self.tensors)

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Return a tensor in float32, or some rows of it."""
        shape = self.tensors[name].shape
        heads = next((n for p, n in self._heads.items() if f".{p}." in name), None)
        # Rows of q and k lie in another order, whole heads at a time.
        low, high = rows if rows and heads is None else (0, shape[0])
        array = np.empty((high - low, *shape[1:]), np.float32)
        # What dequantising needs is several times what it gives.
        step = max(1, _BLOCK // (4 * math.prod(shape[1:])))
        for start in range(0, high - low, step):
            part = array[start : start + step]
            part[...] = self._read(name, low + start, len(part))
        if heads is None:
            return array
        array = pair_halves(array, heads)
        return array if rows is None else array[rows[0] : rows[1]]

    def _read(self, name: str, start: int, count: int) -> np.ndarray:
        """Return rows of a tensor as they lie in the file, dequantised.

        They are read, not mapped: pages of a map stay in memory.
        """
        from gguf import dequantize

        raw, shape = self._raw[name], self.tensors[name].shape
        row = raw.data.nbytes // shape[0]
        data = np.fromfile(
            self._path, np.uint8, count * row, offset=raw.data_offset + start * row
        )
        self.bytes_read += data.nbytes
        if data.nbytes < count * row:
            raise DataError(f"{self._path} ends inside {name}; copy it again")
        try:
            data = data.view(raw.data.dtype).reshape(count, *raw.data.shape[1:])
            return dequantize(data, raw.tensor_type).reshape(count, *shape[1:])
        except (NotImplementedError, ValueError) as error:
            raise DataError(
                f"{self._path}: {name} is {raw.tensor_type.name} and can't be "
                f"dequantised ({first_line(error)})"
            ) from None


def pair_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """Return rows of heads with (i, i + H/2) apart that lay side by side."""
    rest = weight.shape[1:]
    split = weight.reshape(heads, -1, 2, *rest)
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(-1, *rest)


def open_gguf(
    path: Path,
) -> tuple[str, dict[str, Any], Family, GgufTensors, str | None, dict[str, str]]:
    """Return source, config, family, tensors, tokenizer and kept files of a GGUF file.

    Raises MissingExtra without the package, DataError for other architectures, for
    damaged files and metadata that are absent.
    """
    with extra_packages():
        from gguf import GGUFReader
    try:
        reader = GGUFReader(path)
    except Exception as error:  # whatever its parser stumbles over
        raise DataError(f"{path} can't be read as GGUF: {first_line(error)}") from None
    about = _Metadata(reader, path)
    kind = about.get("general.architecture")
    if kind not in _ARCHITECTURES:
        known = ", ".join(_ARCHITECTURES)
        raise DataError(f"{path}: its architecture is {shown(kind)}; read are {known}")
    family = FAMILIES[_ARCHITECTURES[kind]]
    tensors, left = _rename(reader)
    if "rope_freqs.weight" in left:
        raise DataError(
            f"{path} scales its rotation by rope_freqs.weight (Llama 3.1), which isn't "
            "read; import the model's folder of safetensors"
        )
    if left:
        raise DataError(
            f"{path} has {len(left)} tensors of unknown name, {left[0]} first; import "
            "the model's folder of safetensors"
        )
    if "model.embed_tokens.weight" not in tensors:
        raise DataError(f"{path} has no token_embd.weight; convert the model again")
    raw = _config(about, kind, tensors)
    raw["architectures"], raw["model_type"] = [family.architecture], family.model_type
    heads = {}
    if kind == "llama":  # whose rows of q and k lie in pairs
        q, k = raw["num_attention_heads"], raw["num_key_value_heads"]
        heads = {"q_proj": q, "k_proj": k}
    files = GgufTensors(tensors, path, heads)
    tokenizer, kept = _tokenizer(about)
    # The config as it would lie in a folder, so that an export has its fields.
    kept["config.json"] = format_json(raw, indent=2)
    return str(path), raw, family, files, tokenizer, kept


class _Metadata:
    """The key-value pairs of a file."""

    def __init__(self, reader: Any, path: Path):
        self._fields, self._path = reader.fields, path

    def get(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(key)
        return default if field is None else field.contents()

    def need(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise DataError(f"{self._path} says no {key}; convert the model again")
        return value


def _rename(reader: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the tensors by Hugging Face's names, and names that aren't known."""
    found, left = {}, []
    for tensor in reader.tensors:
        name = _OUTER.get(tensor.name)
        parts = tensor.name.split(".")
        if name is None and parts[0] == "blk" and len(parts) == 4:
            inner = _LAYER.get(parts[2])
            name = inner and f"model.layers.{parts[1]}.{inner}.{parts[3]}"
        if name:
            found[name] = tensor
        else:
            left.append(tensor.name)
    return found, left


def _config(about: _Metadata, kind: str, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata as a config.json would have it."""
    need = lambda key: about.need(f"{kind}.{key}")
    get = lambda key, default=None: about.get(f"{kind}.{key}", default)
    scaling = get("rope.scaling.type", "none")
    if scaling not in ("none", "linear"):
        raise DataError(f"rope.scaling.type is {shown(scaling)}; read are none, linear")
    heads, width = int(need("attention.head_count")), int(need("embedding_length"))
    vocab = tensors["model.embed_tokens.weight"].shape[-1]
    head = int(get("attention.key_length", width // max(heads, 1)))
    raw: dict[str, Any] = {
        "vocab_size": int(vocab),
        "hidden_size": width,
        "intermediate_size": int(need("feed_forward_length")),
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(get("attention.head_count_kv", heads)),
        "head_dim": head,
        "max_position_embeddings": int(need("context_length")),
        "rms_norm_eps": _short(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _short(get("rope.freq_base", 10_000.0)),
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
    }
    if scaling == "linear":
        factor = _short(need("rope.scaling.factor"))
        raw["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if kind == "llama":
        raw["attention_bias"] = any(".q_proj.bias" in name for name in tensors)
    for name in ("bos", "eos"):
        token = about.get(f"tokenizer.ggml.{name}_token_id")
        if token is not None:
            raw[f"{name}_token_id"] = int(token)
    return raw


def _short(value: Any) -> float:
    """Return a float32 of the file as the decimal number that it was."""
    return float(f"{float(value):.7g}")


def _tokenizer(about: _Metadata) -> tuple[str | None, dict[str, str]]:
    """Return the text of a tokenizer.json, and the files that go with it."""
    model, cut = (about.get(f"tokenizer.ggml.{name}") for name in ("model", "pre"))
    if model not in ("gpt2", "llama") or (model == "gpt2" and cut not in _PRE):
        return None, {}
    tokens = about.need("tokenizer.ggml.tokens")
    if model == "llama":
        text = sentence_piece(tokens, list(about.need("tokenizer.ggml.scores")))
    else:
        kinds = about.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        text = byte_level(
            {token: number for number, token in enumerate(tokens)},
            list(about.need("tokenizer.ggml.merges")),
            _PRE[cut],
            [t for t, kind in zip(tokens, kinds, strict=False) if kind in (3, 4)],
        )
    config: dict[str, Any] = {}
    for name in ("bos", "eos"):
        number = about.get(f"tokenizer.ggml.{name}_token_id")
        if number is not None:
            config[f"{name}_token"] = tokens[int(number)]
    config["add_bos_token"] = bool(about.get("tokenizer.ggml.add_bos_token", False))
    if template := about.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return text, {"tokenizer_config.json": format_json(config, indent=2)}
