"""A narrow model goes out as a whole one with zeros, and comes back as that."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.config import DataConfig, ExperimentConfig, LayerWidths, ModelConfig
from uoe_jax.interop.padding import pad_layers
from uoe_jax.model import flat_buffers, flat_params, make_model, with_params
from uoe_jax.runs.load import load_run
from uoe_jax.runs.write import Origin, write_run

LLAMA = ModelConfig(
    vocab_size=320,
    max_seq_len=32,
    d_model=32,
    d_ff=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    activation="swiglu",
    norm_eps=1e-5,
    mlp_bias=True,
    widths=LayerWidths(
        d_ff=(48, 20, 7),
        key_dim=(6, 8, 2),
        value_dim=(8, 3, 5),
        up_rank=(9, 0, 0),
        gate_rank=(0, 5, 0),
        down_rank=(0, 0, 3),
    ),
)


def narrow_model(config, seed=0):
    """A model with random weights and random pairs."""
    rng = np.random.default_rng(seed)
    start = make_model(config, seed)
    params = flat_params(start)
    params = {n: a + 0.1 * rng.normal(size=a.shape) for n, a in params.items()}
    half = config.head_dim // 2
    pairs = {
        name: np.array(
            [[rng.permutation(half)[: a.shape[2]] for _ in layer] for layer in a]
        )
        for name, a in flat_buffers(start).items()
        if name.endswith("rotary_pairs")
    }
    return with_params(config, params, pairs)


@pytest.mark.parametrize("kind", ["llama", "union", "learned"])
def test_whole_layers_compute_the_same(kind):
    changes = {
        "llama": {},
        "union": {
            "mlp": ("union", "dense", "union"),
            "widths": LayerWidths(d_ff=(24, 20, 8), key_dim=(4, 2, 8)),
        },
        "learned": {"position": "learned", "use_bias": True, "qk_norm": False},
    }
    model = narrow_model(dataclasses.replace(LLAMA, **changes[kind]))
    whole, params = pad_layers(model.config, flat_params(model), flat_buffers(model))
    assert whole.widths == LayerWidths()
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 320)
    want, found = model(tokens)[0], with_params(whole, params)(tokens)[0]
    assert float(jnp.abs(want - found).max()) < 1e-4


def test_export_and_import_again_give_the_same_logits(tmp_path, capsys):
    model = narrow_model(LLAMA)
    config = ExperimentConfig(
        model=LLAMA, data=DataConfig(tokenizer="byte", seq_len=16)
    )
    origin = Origin(made_by="test", source="random", data=None)
    write_run(
        tmp_path / "run", config, flat_params(model), origin,
        buffers=flat_buffers(model),
    )  # fmt: skip
    tokens = jax.random.randint(jax.random.key(1), (2, 24), 0, 320)
    loaded = load_run(tmp_path / "run").model
    np.testing.assert_allclose(loaded(tokens)[0], model(tokens)[0], atol=1e-6)
    args = ["export", str(tmp_path / "run"), str(tmp_path / "hf"), "--json"]
    capsys.readouterr()
    assert main(args) == 0, capsys.readouterr().err
    said = json.loads(capsys.readouterr().out)
    assert said["architecture"] == "LlamaForCausalLM"
    own = sum(a.size for a in flat_params(model).values())
    assert said["own_parameters"] == own < said["parameters"]
    raw = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (raw["head_dim"], raw["intermediate_size"]) == (8, 48)
    args = ["import", str(tmp_path / "hf"), "--run-dir", str(tmp_path / "back")]
    assert main([*args, "--dtype", "float32"]) == 0, capsys.readouterr().err
    back = load_run(tmp_path / "back").model
    assert back.config.widths == LayerWidths()
    want = model(tokens)[0]
    assert float(jnp.abs(back(tokens)[0] - want).max()) < 1e-4
