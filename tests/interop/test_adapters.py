"""Adapters under the names that a model was imported with: out to PEFT, and in."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from tests.interop.tiny_folders import GOLDENS, TEXT, write_folder
from uoe_jax.adapt.adapters import init_adapters
from uoe_jax.adapt.config import AdapterConfig
from uoe_jax.adapt.export import export_adapter
from uoe_jax.adapt.files import load_adapters, save_adapters
from uoe_jax.adapt.merge import merge
from uoe_jax.adapt.place import place_modules
from uoe_jax.adapt.store import read_trained
from uoe_jax.cli import main
from uoe_jax.errors import ConfigError
from uoe_jax.interop.adapter_folder import read_config
from uoe_jax.interop.importing import import_run
from uoe_jax.interop.modules import module_places
from uoe_jax.interop.peft import module_delta, read_peft
from uoe_jax.runs.load import load_run
from uoe_jax.tree import named_leaves


def drawn(params, config):
    """An adapter none of whose factors is zero."""
    adapters = init_adapters(params, config, jax.random.key(1))
    draw = np.random.default_rng(0)
    random = lambda a: jax.numpy.asarray(draw.normal(size=a.shape), a.dtype)
    return dataclasses.replace(adapters, weights=jax.tree.map(random, adapters.weights))


def params_of(folder):
    run = load_run(folder)
    return run, nnx.split(run.model, nnx.Param, ...)[1]


def test_an_adapter_goes_out_and_comes_back_under_their_names(tmp_path, capsys):
    write_folder(tmp_path / "model")
    import_run(tmp_path / "model", tmp_path / "run")
    run, params = params_of(tmp_path / "run")
    config = AdapterConfig(
        method="lora",
        rank=3,
        targets=("*.attention.w?", "*.mlp.w_*"),
        rank_pattern={"*.mlp.w_up": 2},
    )
    adapters = drawn(params, config)
    save_adapters(tmp_path / "ad", adapters, config, base=str(tmp_path / "run"))
    assert main(["export", str(tmp_path / "ad"), str(tmp_path / "peft"), "--json"]) == 0
    modules = read_peft(tmp_path / "peft")
    assert len(modules) == 2 * 7
    assert "model.layers.1.self_attn.q_proj" in modules
    raw = read_config(tmp_path / "peft")
    assert raw["task_type"] == "CAUSAL_LM" and not raw["fan_in_fan_out"]
    merged = named_leaves(merge(params, adapters).params)
    before = named_leaves(params)
    # Their delta is [out, in], whose outputs are the heads side by side.
    delta = module_delta(modules["model.layers.1.self_attn.q_proj"])
    name = "trunk.blocks.0.attention.wq"
    ours = np.asarray(merged[name] - before[name])[1, 0].reshape(32, -1)
    np.testing.assert_allclose(delta.T, ours, atol=1e-5)
    places = module_places(run.config.model, "LlamaForCausalLM")
    back = named_leaves(merge(params, place_modules(modules, params, places)).params)
    for name, leaf in merged.items():
        np.testing.assert_allclose(back[name], leaf, atol=1e-5, err_msg=name)
    capsys.readouterr()


def test_what_peft_has_no_place_for_is_refused(tmp_path):
    import_run(GOLDENS / "gpt2", tmp_path / "run")
    run, params = params_of(tmp_path / "run")
    cases = {
        "wq is no module of its own in GPT2": ("lora", ("*.attention.wq",)),
        "has the factors of tucker; PEFT reads LoRA": ("tucker", ("*.mlp.w_up",)),
    }
    for said, (method, targets) in cases.items():
        config = AdapterConfig(method=method, rank=2, targets=targets)
        save_adapters(
            tmp_path / method,
            drawn(params, config),
            config,
            base=str(tmp_path / "run"),
        )
        with pytest.raises(ConfigError, match=said):
            export_adapter(tmp_path / method, tmp_path / "out")
        assert not (tmp_path / "out").exists()
    places = module_places(run.config.model, "GPT2LMHeadModel")
    assert "transformer.h.1.mlp.c_fc" in places
    assert "transformer.h.1.attn.c_attn" not in places


def test_the_best_of_an_adapters_checkpoints_goes_out(tmp_path, capsys):
    write_folder(tmp_path / "model")
    import_run(tmp_path / "model", tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT)
    adapter = tmp_path / "ad"
    args = ["adapt", tmp_path / "run", "--method", "lora", "--quiet", "--steps", "2"]
    args += ["--data", tmp_path / "text.txt", "--out", adapter, "--batch-size", "4"]
    assert main([str(a) for a in args]) == 0
    params = params_of(tmp_path / "run")[1]
    trained, config = load_adapters(adapter, params)
    best = read_trained(adapter, trained, "best")
    # As if the last factors were others than the best ones.
    save_adapters(adapter, drawn(params, config), config, base=str(tmp_path / "run"))
    last, _ = load_adapters(adapter, params)
    export = lambda *more: main(["export", str(adapter), *map(str, more)])
    for which, adapters in (("last", last), ("best", best)):
        assert export(tmp_path / which, "--checkpoint", which) == 0
        delta = module_delta(
            read_peft(tmp_path / which)["model.layers.1.self_attn.q_proj"]
        )
        ours = merge(params, adapters).params
        name = "trunk.blocks.0.attention.wq"
        change = np.asarray(named_leaves(ours)[name] - named_leaves(params)[name])
        np.testing.assert_allclose(delta.T, change[1, 0].reshape(32, -1), atol=1e-4)
    shutil.rmtree(adapter / "best")
    capsys.readouterr()
    assert export(tmp_path / "none", "--checkpoint", "best") == 2
    assert "keeps no best checkpoint; leave --checkpoint out" in capsys.readouterr().err
