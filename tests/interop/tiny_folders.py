"""Folders as Hugging Face's library writes them, tiny, with a tokenizer."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from uoe_jax.data.tokenize import train_bpe
from uoe_jax.interop.families import FAMILIES
from uoe_jax.interop.names import by_tensor, find_sources

GOLDENS = Path(__file__).parents[1] / "goldens" / "hf"
FAMILY_NAMES = sorted(path.name for path in GOLDENS.iterdir())
TEXT = "\n".join(f"the {n} words of a text, number {n * n}" for n in range(400))
LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def random_tensors(raw, seed=0, dtype=np.float32):
    """Random tensors of a config.json, by name."""
    family = FAMILIES[raw["architectures"][0]]
    sources = find_sources(family.read(raw, frozenset()), family)
    draw = np.random.default_rng(seed)
    tensors = {}
    for name, group in by_tensor(sources).items():
        shape = group[0].shape
        spread = 0.2 * draw.normal(size=shape)
        value = 1 + spread if name.endswith("norm.weight") else spread
        tensors[name] = value.astype(dtype)
    return tensors


def write_folder(folder, raw=LLAMA, tensors=None, tokenizer=True, shards=1):
    """Write a folder; with several shards and their index."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(raw) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(raw))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
    else:
        names, places = sorted(tensors), {}
        for n in range(shards):
            file = f"model-{n + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: tensors[name] for name in names[n::shards]}
            save_file(part, folder / file)
            places |= dict.fromkeys(part, file)
        index = {"metadata": {}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if tokenizer:
        text = train_bpe([TEXT.encode()], 320)
        (folder / "tokenizer.json").write_text(text)
    return tensors
