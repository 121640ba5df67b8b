"""Adapters of other libraries are read right or refused by name, within limits."""

import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.compare import assert_close
from uoe_jax.adapt import AdapterConfig, adapted_params, init_adapters, leaf_delta
from uoe_jax.adapt.config import check_adapter
from uoe_jax.adapt.files import digest_params, load_adapters, save_adapters
from uoe_jax.adapt.merge import kept_share
from uoe_jax.adapt.place import llama_names, place_modules
from uoe_jax.errors import DataError
from uoe_jax.interop import patterns as patterns_module
from uoe_jax.interop.adapter_folder import CONFIG, WEIGHTS
from uoe_jax.interop.patterns import first_matches
from uoe_jax.interop.peft import read_lycoris, read_peft

RNG = np.random.default_rng(0)
QUERY = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def write_peft(folder, rank=4, width=8, extra=None, **config):
    """A PEFT LoRA of the queries of two layers, `width` wide."""
    folder.mkdir()
    about = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (folder / CONFIG).write_text(json.dumps(about | config))
    arrays = {}
    for layer in range(2):
        arrays[QUERY.format(layer, "A")] = draw(rank, width)
        arrays[QUERY.format(layer, "B")] = draw(width, rank)
    save_file(arrays | (extra or {}), folder / WEIGHTS)
    return folder


@pytest.fixture
def params():
    wq = jnp.asarray(draw(2, 1, 8, 2, 1, 4))
    blocks = {"0": {"attention": {"wq": wq}}}
    head = {"weight": jnp.asarray(draw(8, 9))}
    return {"trunk": {"blocks": blocks}, "head": head}


@pytest.mark.parametrize(
    "init",
    [
        True,
        False,
        None,
        "gaussian",
        "Gaussian",
        "GAUSSIAN",
        "orthogonal",
        "EVA",
        "mica",
    ],
)
def test_starts_that_leave_the_base_alone_are_read(init, tmp_path, params):
    folder = write_peft(tmp_path / "peft", init_lora_weights=init)
    adapters = place_modules(read_peft(folder), params, llama_names)
    stored = load_file(folder / WEIGHTS)
    want = 2 * (stored[QUERY.format(1, "B")] @ stored[QUERY.format(1, "A")]).T
    delta = leaf_delta(adapters, adapters["trunk.blocks.0.attention.wq"])
    assert_close(delta[1].reshape(8, 8), want, 1e-5)


@pytest.mark.parametrize(
    "init",
    [
        "pissa",
        "pissa_niter_16",
        "olora",
        "corda",
        "loftq",
        "lora_ga",
        "later",
        "PiSSA",
        "Pissa_niter_4",
        "OLoRA",
        "LoftQ",
    ],
)
def test_starts_that_change_the_base_are_refused_by_name(init, tmp_path):
    folder = write_peft(tmp_path / "peft", init_lora_weights=init)
    with pytest.raises(DataError, match=f"init_lora_weights is '{init}'") as caught:
        read_peft(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("init", [1, 0, 1.0, [], {"kind": "gaussian"}, "", "gauss"])
def test_starts_that_are_no_starts_are_refused(init, tmp_path):
    folder = write_peft(tmp_path / "peft", init_lora_weights=init)
    with pytest.raises(DataError, match="init_lora_weights is") as caught:
        read_peft(folder)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", False),
        ("lora_bias", True),
        ("lora_bias", 0),
        ("kasa_config", {"beta": 1e-4}),
        ("monteclora_config", {"n": 4}),
        ("arrow_config", {"top_k": 2}),
        ("use_bdlora", {"nblocks": 2}),
        ("use_qalora", True),
        ("layer_replication", [[0, 2]]),
        ("modules_to_save", ["lm_head"]),
        ("of_a_later_version", True),
        ("of_a_later_version", {"a": [1]}),
        ("use_dora", 1),
        ("use_rslora", 1),
    ],
)
def test_settings_that_may_change_the_arrays_meaning_are_refused(
    field, value, tmp_path
):
    folder = write_peft(tmp_path / "peft", **{field: value})
    with pytest.raises(DataError, match=field) as caught:
        read_peft(folder)
    assert len(str(caught.value).splitlines()) == 1


def test_what_peft_writes_by_default_is_read(tmp_path):
    about = {
        "alora_invocation_tokens": None, "alpha_pattern": {}, "arrow_config": None,
        "auto_mapping": None, "base_model_name_or_path": "x", "bias": "none",
        "corda_config": None, "ensure_weight_tying": False, "eva_config": None,
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
        "init_lora_weights": True, "kasa_config": None, "layer_replication": None,
        "layers_pattern": None, "layers_to_transform": None, "loftq_config": {},
        "lora_alpha": 8, "lora_bias": False, "lora_dropout": 0.1,
        "lora_ga_config": None, "megatron_config": None, "megatron_core": "m.core",
        "modules_to_save": None, "monteclora_config": None, "peft_type": "LORA",
        "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {},
        "revision": None, "target_modules": ["q_proj"], "target_parameters": None,
        "task_type": "CAUSAL_LM", "trainable_token_indices": None,
        "unsloth_fixed": True, "use_bdlora": None, "use_dora": False,
        "use_qalora": False, "use_rslora": False, "velora_config": None,
        "later_and_unused": None,
    }  # fmt: skip
    assert len(read_peft(write_peft(tmp_path / "peft", **about))) == 2
    assert len(read_peft(write_peft(tmp_path / "low", peft_type="lora"))) == 2


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_rslora", "false"),  # counted as true: another scale
        ("use_dora", "false"),
        ("lora_alpha", True),
        ("lora_alpha", 1e300),  # no number of float32
        ("lora_alpha", "16"),
        ("use_bdlora", {"nblocks": 2}),
    ],
)
def test_settings_of_a_wrong_type_are_refused_by_name(field, value, tmp_path):
    folder = write_peft(tmp_path / "peft", **{field: value})
    with pytest.raises(DataError, match=field.removeprefix("lora_")) as caught:
        read_peft(folder)
    assert "\n" not in str(caught.value)


MAGNITUDES = {
    f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_magnitude_vector": (
        np.abs(draw(8))
    )
    for layer in range(2)
}


@pytest.mark.parametrize(
    ("extra", "use_dora"),
    [({}, True), (dict(list(MAGNITUDES.items())[:1]), True), (MAGNITUDES, False)],
    ids=["none", "one of two", "too many"],
)
def test_magnitudes_are_there_if_the_config_says_so(extra, use_dora, tmp_path):
    folder = write_peft(tmp_path / "peft", extra=extra, use_dora=use_dora)
    with pytest.raises(DataError, match="use_dora is"):
        read_peft(folder)


def test_magnitudes_of_another_width_are_refused(tmp_path, params):
    narrow = {name: values[:5] for name, values in MAGNITUDES.items()}
    folder = write_peft(tmp_path / "peft", extra=narrow, use_dora=True)
    with pytest.raises(DataError, match="5 magnitudes"):
        place_modules(read_peft(folder), params, llama_names)


def test_ranks_above_what_a_weight_has_are_saved_and_read_again(tmp_path, params):
    folder = write_peft(tmp_path / "peft", rank=11)
    adapters = place_modules(read_peft(folder), params, llama_names)
    config = AdapterConfig(
        method="lora", rank=11, targets=("trunk.blocks.0.attention.wq",)
    )
    check_adapter(config)
    save_adapters(tmp_path / "own", adapters, config)
    again, _ = load_adapters(tmp_path / "own", params)
    assert again.plans == adapters.plans
    jax.tree.map(np.testing.assert_array_equal, again.weights, adapters.weights)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_arent_finite_are_refused_with_their_key(value, tmp_path, params):
    folder = write_peft(tmp_path / "peft")
    arrays = load_file(folder / WEIGHTS)
    arrays[QUERY.format(1, "B")][0, 1] = value
    save_file(arrays, folder / WEIGHTS)
    with pytest.raises(DataError, match=r"layers.1.self_attn.q_proj.*1 of 32 numbers"):
        read_peft(folder)
    loose = {"net.lora_up.weight": draw(5, 2), "net.lora_down.weight": draw(2, 4)}
    path = tmp_path / "loose.safetensors"
    save_file(loose | {"net.alpha": np.array(value, np.float32)}, path)
    with pytest.raises(DataError, match=r"net\.alpha"):
        read_lycoris(path)
    config = AdapterConfig(method="lora", rank=2, targets=("head.weight",))
    adapters = init_adapters(params, config, jax.random.key(0))
    save_adapters(tmp_path / "own", adapters, config)
    arrays = load_file(tmp_path / "own" / WEIGHTS)
    next(iter(arrays.values()))[0, 0] = value
    save_file(arrays, tmp_path / "own" / WEIGHTS)
    with pytest.raises(DataError, match=r"head.*1 of"):
        load_adapters(tmp_path / "own", params)


@pytest.mark.parametrize("alpha", ["NaN", "Infinity"])
def test_an_alpha_that_isnt_a_number_is_refused(alpha, tmp_path):
    folder = write_peft(tmp_path / "peft")
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(
        text.replace('"lora_alpha": 8', f'"lora_alpha": {alpha}')
    )
    with pytest.raises(DataError, match=f"JSON.*{alpha}"):
        read_peft(folder)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["([a-z._0-9]+)+!", "(.*a?){30}!"])
def test_patterns_that_backtrack_are_given_up(field, pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(patterns_module, "SECONDS", 2.0)
    folder = write_peft(tmp_path / "peft", **{field: {pattern: 4}})
    began = time.monotonic()
    with pytest.raises(DataError, match=f"{field} has patterns that take more than"):
        read_peft(folder)
    assert time.monotonic() - began < 30


def test_patterns_match_as_pefts_do():
    names = [
        "model.layers.0.q_proj",
        "model.layers.12.q_proj",
        "other.v_proj",
        "q_projx",
    ]
    found = first_matches([r"layers\.1\d\.q_proj", "q_proj", "(u|v)_proj"], names)
    assert found == {
        names[0]: "q_proj",
        names[1]: r"layers\.1\d\.q_proj",
        names[2]: "(u|v)_proj",
    }
    for pattern, words in (("(", "pattern"), ("a" * 5000, "5000 characters")):
        with pytest.raises(ValueError, match=words):
            first_matches([pattern], names)


def test_a_saved_adapter_knows_its_base(tmp_path, params, recwarn):
    config = AdapterConfig(method="lora", rank=2, targets=("head.weight",))
    adapters = init_adapters(params, config, jax.random.key(0))
    save_adapters(tmp_path, adapters, config, digest=digest_params(params))
    load_adapters(tmp_path, params)
    assert not recwarn.list
    other = jax.tree.map(lambda a: a.at[(0,) * a.ndim].add(1e-6), params)
    with pytest.warns(UserWarning, match="trained on other weights"):
        load_adapters(tmp_path, other)


def test_a_tied_embedding_is_warned_of(params):
    tree = {"embed": {"embedding": jnp.asarray(draw(9, 8))}}
    config = AdapterConfig(method="lora", rank=2, targets=("embed.embedding",))
    with pytest.warns(UserWarning, match="output layer too"):
        init_adapters(tree, config, jax.random.key(0))


@pytest.mark.parametrize(("size", "low", "high"), [(1e-5, 0, 0), (0.1, 0.9, 0.999)])
def test_the_share_of_a_delta_that_bfloat16_keeps(size, low, high):
    params = {"w": jnp.asarray(1 + np.abs(draw(32, 16)), jnp.bfloat16)}
    config = AdapterConfig(method="lora", rank=2, targets=("w",), alpha=2.0)
    fresh = init_adapters(params, config, jax.random.key(0))
    assert float(kept_share(params, fresh)) == 1.0
    parts = {"a": jnp.asarray(draw(32, 2)), "b": size * jnp.asarray(draw(2, 16))}
    moved = fresh.with_weights({"w": parts})
    merged = np.asarray(adapted_params(params, moved)["w"], np.float32)
    delta = np.asarray(leaf_delta(moved, moved["w"]))
    lost = merged - np.asarray(params["w"], np.float32) - delta
    want = max(0.0, 1 - np.linalg.norm(lost) / np.linalg.norm(delta))
    share = float(kept_share(params, moved))
    assert abs(share - want) < 1e-4 and low <= share <= high
    wide = {"w": params["w"].astype(jnp.float32)}
    assert digest_params(wide) != digest_params(params)
    assert float(kept_share(wide, moved)) > 0.999
    assert abs(float(kept_share(wide, moved, "bfloat16")) - want) < 1e-4


def test_arrays_are_read_not_mapped(tmp_path):
    """A map of a file that is cut short after it was opened ends the process."""
    folder = write_peft(tmp_path / "peft")
    tensors = read_peft(folder)
    want = {name: module.down.copy() for name, module in tensors.items()}
    with (folder / WEIGHTS).open("r+b") as file:
        file.truncate(10)
    for name, module in tensors.items():
        np.testing.assert_array_equal(module.down, want[name])
    with pytest.raises(DataError, match="can't be read"):
        read_peft(folder)
    maps = Path("/proc/self/maps").read_text() if Path("/proc").is_dir() else ""
    assert str(folder) not in maps
