"""Adapters on disk: exact round trips, foreign formats, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.compare import assert_close
from uoe_jax.adapt import AdapterConfig, WeightAxes, adapted_params, leaf_delta
from uoe_jax.adapt.files import CONFIG, WEIGHTS, load_adapters, save_adapters
from uoe_jax.adapt.place import Place, llama_names, place_modules
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.interop.peft import Module, module_delta, read_lycoris, read_peft

RNG = np.random.default_rng(0)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


@pytest.fixture
def params():
    """Stacked layers, experts, an embedding, a vector and a convolution."""
    shapes = {"attention": {"wq": (2, 1, 6, 3, 2, 4)}, "mlp": {"w_up": (2, 3, 6, 4)}}
    blocks = jax.tree.map(
        lambda s: draw(*s), shapes, is_leaf=lambda s: type(s) is tuple
    )
    tree = {
        "trunk": {"blocks": {"0": blocks | {"norm": {"scale": draw(2, 6)}}}},
        "embed": {"embedding": draw(9, 6)},
        "conv": {"weight": draw(3, 3, 2, 4)},
    }
    return jax.tree.map(jnp.asarray, tree)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "lora"},
        {"method": "lora", "use_dora": True, "share_experts": True},
        {"method": "lora", "use_rslora": True, "alpha": 3.0},
        {"split_heads": True, "share_experts": True},
        {"init": "hosvd", "rank_pattern": {"*.wq": 1, "*scale": 0}},
        {"init": "hosvd", "use_dora": True},
    ],
    ids=str,
)
def test_f12_round_trips_are_exact(options, params, make, tmp_path):
    targets = ("*.w*", "*embedding", "conv.*", "*scale")
    config = AdapterConfig(rank=2, targets=targets, **options)
    adapters = make(params, config)
    save_adapters(tmp_path, adapters, config, base="runs/x")
    back, same = load_adapters(tmp_path, params)
    assert same == config
    assert jax.tree.structure(back.weights) == jax.tree.structure(adapters.weights)
    jax.tree.map(np.testing.assert_array_equal, back.weights, adapters.weights)
    jax.tree.map(np.testing.assert_array_equal, back.anchor, adapters.anchor)
    # With these every delta is the same computation on the same numbers.
    assert back.scales == adapters.scales and back.plans == adapters.plans
    dtypes = lambda one: jax.tree.map(lambda a: a.dtype, one.weights)
    assert dtypes(back) == dtypes(adapters)


def test_lora_files_have_pefts_keys_and_read_back_as_peft(params, make, tmp_path):
    config = AdapterConfig(method="lora", rank=2, targets=("*.wq", "conv.*", "embed.*"))
    adapters = make(params, config)
    save_adapters(tmp_path, adapters, config)
    stored = load_file(tmp_path / WEIGHTS)
    name = "base_model.model.trunk.blocks.0.1.attention.wq"
    assert stored[f"{name}.lora_A.weight"].shape == (2, 6)
    assert stored[f"{name}.lora_B.weight"].shape == (24, 2)
    assert stored["base_model.model.conv.lora_A.weight"].shape == (2, 2, 3, 3)
    assert stored["base_model.model.conv.lora_B.weight"].shape == (4, 2, 1, 1)
    raw = json.loads((tmp_path / CONFIG).read_text())
    assert raw["peft_type"] == "LORA" and raw["r"] == 2 and raw["lora_alpha"] == 4
    modules = read_peft(tmp_path)
    assert set(modules) == set(raw["target_modules"])
    delta = leaf_delta(adapters, adapters["trunk.blocks.0.attention.wq"])
    got = module_delta(modules["trunk.blocks.0.1.attention.wq"])
    want = delta[1, 0].reshape(6, 24).T
    assert_close(got, want, 1e-5)
    kernel = leaf_delta(adapters, adapters["conv.weight"])
    got = module_delta(modules["conv"])
    assert_close(got, kernel.transpose(3, 2, 0, 1), 1e-5)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_every_module_keeps_its_scale_in_pefts_terms(
    use_rslora, params, make, tmp_path
):
    """Ranks set apart by a pattern, or cut to what a weight has, and their alphas."""
    config = AdapterConfig(
        method="lora",
        rank=3,
        targets=("*.wq", "*.w_up", "conv.*", "embed.*"),
        rank_pattern={"*.wq": 2, "conv.*": 9},
        alpha=5.0,
        use_rslora=use_rslora,
    )
    with pytest.warns(UserWarning, match="rank 9 is more than conv.weight can have"):
        adapters = make(params, config)
    save_adapters(tmp_path, adapters, config)
    modules = read_peft(tmp_path)
    deltas = {p.name: np.asarray(leaf_delta(adapters, p)) for p in adapters.plans}
    blocks = "trunk.blocks.0"
    wanted = {"conv": deltas["conv.weight"].transpose(3, 2, 0, 1)}
    wanted["embed.embedding"] = deltas["embed.embedding"].T
    for layer in range(2):
        wq = deltas[f"{blocks}.attention.wq"][layer, 0]
        wanted[f"{blocks}.{layer}.attention.wq"] = wq.reshape(6, 24).T
        for expert in range(3):
            up = deltas[f"{blocks}.mlp.w_up"][layer, expert]
            wanted[f"{blocks}.{layer}.mlp.w_up.experts.{expert}"] = up.T
    assert set(modules) == set(wanted)
    for name, delta in wanted.items():
        got = module_delta(modules[name])
        assert_close(got, delta, 1e-4, about=name)


def peft_folder(path, tensors, **config):
    path.mkdir(exist_ok=True)
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none"}
    (path / CONFIG).write_text(json.dumps(base | config))
    save_file(
        {f"base_model.model.{k}": np.asarray(v) for k, v in tensors.items()},
        path / WEIGHTS,
    )
    return path


def llama_params(layers=2, d=6, heads=2, width=4):
    return {
        "trunk": {
            "blocks": {
                "0": {
                    "attention": {
                        "wq": draw(layers, 1, d, heads, 1, width),
                        "wo": draw(layers, 1, heads, 1, width, d),
                    }
                }
            }
        }
    }


def test_peft_lora_lands_on_stacked_layers(tmp_path):
    a, b = draw(2, 6), draw(8, 2)
    c, d = draw(3, 8), draw(6, 3)
    folder = peft_folder(
        tmp_path / "peft",
        {
            "model.layers.1.self_attn.q_proj.lora_A.weight": a,
            "model.layers.1.self_attn.q_proj.lora_B.weight": b,
            "model.layers.0.self_attn.o_proj.lora_A.weight": c,
            "model.layers.0.self_attn.o_proj.lora_B.weight": d,
        },
        rank_pattern={"o_proj": 3},
        alpha_pattern={"o_proj": 12},
    )
    params = jax.tree.map(jnp.asarray, llama_params())
    adapters = place_modules(read_peft(folder), params, llama_names)
    wq = leaf_delta(adapters, adapters["trunk.blocks.0.attention.wq"])
    assert not np.asarray(wq[0]).any()
    assert_close(wq[1].reshape(6, 8), 3 * (b @ a).T, 1e-5, least=1.0)
    wo = leaf_delta(adapters, adapters["trunk.blocks.0.attention.wo"])
    assert_close(wo[0].reshape(8, 6), 4 * (d @ c).T, 1e-5, least=1.0)
    assert not np.asarray(wo[1]).any()


def test_peft_rslora_and_dora_keep_their_meaning(tmp_path):
    a, b, magnitude = draw(2, 6), draw(5, 2), np.abs(draw(5)) + 1
    tensors = {
        "lin.lora_A.weight": a,
        "lin.lora_B.weight": b,
        "lin.lora_magnitude_vector": magnitude,
    }
    folder = peft_folder(tmp_path / "dora", tensors, use_dora=True, use_rslora=True)
    params = {"lin": {"weight": jnp.asarray(draw(6, 5))}}
    modules = read_peft(folder)
    adapters = place_modules(modules, params, {"lin": "lin.weight"})
    whole = params["lin"]["weight"].T + 6 / 2**0.5 * b @ a
    whole *= (magnitude / np.linalg.norm(whole, axis=1))[:, None]
    got = adapted_params(params, adapters)["lin"]["weight"]
    assert_close(got, whole.T, 1e-5, least=1.0)


def test_f11_lycoris_tucker_reproduces_its_delta(tmp_path):
    up, mid, down = draw(5, 3, 1, 1), draw(3, 3, 3, 3), draw(3, 4, 1, 1)
    plain_up, plain_down = draw(5, 2, 1, 1), draw(2, 4, 3, 3)
    path = tmp_path / "lycoris.safetensors"
    save_file(
        {
            "net_conv1.lora_up.weight": up,
            "net_conv1.lora_mid.weight": mid,
            "net_conv1.lora_down.weight": down,
            "net_conv1.alpha": np.array(6, np.float32),
            "net_conv2.lora_up.weight": plain_up,
            "net_conv2.lora_down.weight": plain_down,
        },
        path,
    )
    modules = read_lycoris(path)
    want = 2 * np.einsum("mnhw,om,ni->oihw", mid, up[..., 0, 0], down[..., 0, 0])
    np.testing.assert_allclose(module_delta(modules["net_conv1"]), want, atol=1e-4)
    second = np.einsum("or,rihw->oihw", plain_up[..., 0, 0], plain_down)
    params = {
        "conv1": {"kernel": draw(3, 3, 4, 5)},
        "conv2": {"kernel": draw(3, 3, 4, 5)},
    }
    names = {"net_conv1": "conv1.kernel", "net_conv2": Place("conv2.kernel")}
    adapters = place_modules(modules, params, names)
    assert {p.method for p in adapters.plans} == {"tucker", "lora"}
    for name, torch_delta in (("conv1", want), ("conv2", second)):
        got = leaf_delta(adapters, adapters[f"{name}.kernel"])
        np.testing.assert_allclose(got, torch_delta.transpose(2, 3, 1, 0), atol=1e-4)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (["x.hada_w1_a"], "LoHa"),
        (["x.lokr_w1"], "LoKr"),
        (["x.lora_up.weight", "x.dora_scale"], "weight decomposition"),
        (["x.something"], "something"),
        (["x.lora_up.weight"], "without lora_down"),
    ],
    ids=str,
)
def test_other_lycoris_algorithms_are_named(keys, words, tmp_path):
    path = tmp_path / "other.safetensors"
    save_file({key: draw(2, 2) for key in keys}, path)
    with pytest.raises(DataError, match=words) as caught:
        read_lycoris(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"lora_up": (5, 2), "lora_down": (3, 4)}, "ranks must meet"),
        ({"lora_up": (5, 2), "lora_down": (2,)}, "two axes"),
        ({"lora_up": (5, 2, 3, 3), "lora_down": (2, 4)}, "kernel of size 1"),
        (
            {"lora_up": (5, 3), "lora_mid": (2, 2, 3, 3), "lora_down": (2, 4)},
            "ranks must meet",
        ),
        ({"lora_up": (5, 2), "lora_down": (2, 4), "alpha": (2,)}, "give a number"),
    ],
    ids=str,
)
def test_lycoris_arrays_that_dont_fit_are_named(shapes, words, tmp_path):
    path = tmp_path / "odd.safetensors"
    key = lambda part: f"net.{part}" + ("" if part == "alpha" else ".weight")
    save_file({key(part): draw(*shape) for part, shape in shapes.items()}, path)
    with pytest.raises(DataError, match=words) as caught:
        read_lycoris(path)
    assert "net" in str(caught.value) and "\n" not in str(caught.value)


PAIR = {"l.lora_A.weight": draw(2, 6), "l.lora_B.weight": draw(5, 2)}


@pytest.mark.parametrize(
    ("tensors", "config", "words"),
    [
        (PAIR, {"peft_type": "LOHA"}, "LOHA"),
        (PAIR, {"modules_to_save": ["head"]}, "modules_to_save"),
        (PAIR, {"bias": "all"}, "bias"),
        (PAIR, {"r": 4}, "its config says 4"),
        ({"l.lora_A.weight": PAIR["l.lora_A.weight"]}, {}, "without lora_B"),
        (PAIR | {"l.ia3": draw(2)}, {}, "ia3"),
        ({}, {}, "no arrays"),
        (PAIR | {"l.lora_B.weight": draw(5)}, {}, "two axes"),
        (PAIR | {"l.lora_B.weight": draw(5, 3)}, {}, "ranks 2 and 3"),
        (PAIR, {"lora_alpha": "big"}, "alpha of l is 'big'"),
        (PAIR, {"rank_pattern": {"(": 3}}, "pattern '\\('"),
    ],
    ids=str,
)
def test_other_peft_adapters_are_named(tensors, config, words, tmp_path):
    folder = peft_folder(tmp_path / "bad", tensors, **config)
    with pytest.raises(DataError, match=words):
        read_peft(folder)


def test_pickles_and_damage_are_refused(tmp_path, params, make):
    with pytest.raises(DataError, match="pickled formats aren't read"):
        read_lycoris(tmp_path / "model.pt")
    folder = tmp_path / "pickled"
    folder.mkdir()
    with pytest.raises(DataError, match=CONFIG):
        read_peft(folder)
    (folder / CONFIG).write_text('{"peft_type": "LORA"}')
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(DataError, match="adapter_model.bin is pickled"):
        read_peft(folder)
    (folder / WEIGHTS).write_bytes(b"not safetensors")
    with pytest.raises(DataError, match="can't be read"):
        read_peft(folder)
    (folder / CONFIG).write_text("{")
    with pytest.raises(DataError, match="not JSON"):
        read_peft(folder)
    config = AdapterConfig(method="lora", rank=2, targets=("conv.*",))
    own = tmp_path / "own"
    save_adapters(own, make(params, config), config)
    with pytest.raises(ConfigError, match="hasn't"):
        load_adapters(own, {"other": draw(2, 2)})
    raw = json.loads((own / CONFIG).read_text())
    for spoil in (
        lambda part: part.pop("config"),
        lambda part: part["config"].update(rank="2"),
        lambda part: part["scales"].clear(),
        lambda part: part["weights"]["conv.weight"].update(axes=3),
    ):
        spoiled = json.loads(json.dumps(raw))
        spoil(spoiled["uoe_jax"])
        (own / CONFIG).write_text(json.dumps(spoiled))
        with pytest.raises(DataError, match="damaged 'uoe_jax' part"):
            load_adapters(own, params)
    (own / CONFIG).write_text(json.dumps(raw))
    stored = load_file(own / WEIGHTS)
    save_file({k: v for k, v in stored.items() if "lora_B" not in k}, own / WEIGHTS)
    with pytest.raises(DataError, match="incomplete"):
        load_adapters(own, params)
    save_file(stored | {"extra": draw(1)}, own / WEIGHTS)
    with pytest.raises(DataError, match="too many, extra"):
        load_adapters(own, params)


def test_modules_without_a_place_are_named():
    module = Module(draw(2, 6), draw(5, 2), None, 1.0, None)
    params = {"lin": {"weight": jnp.asarray(draw(6, 5))}}
    with pytest.raises(DataError, match="no place"):
        place_modules({"linn": module}, params, {})
    with pytest.raises(DataError, match="numbers a rank"):
        place_modules(
            {"x": module}, {"lin": {"weight": draw(7, 5)}}, {"x": "lin.weight"}
        )
    stacked = {"blocks": {"w": jnp.asarray(draw(2, 6, 5))}}
    axes = {"blocks.w": WeightAxes(axes="lio", ins="i", outs="o")}
    for place in (
        Place("blocks.w"),
        Place("blocks.w", (2,)),
        Place("blocks.w", (0, 0)),
    ):
        with pytest.raises(DataError, match="say which"):
            place_modules({"x": module}, stacked, {"x": place}, axes=axes)
    assert llama_names("model.layers.3.mlp.up_proj") == (
        "trunk.blocks.0.mlp.w_up",
        (3,),
    )
    assert llama_names("visual.blocks.0") is None


def test_axes_of_another_model_are_saved_with_the_adapter(tmp_path, make):
    axes = {"odd": WeightAxes(axes="oi", ins="i", outs="o")}
    params = {"odd": jnp.asarray(draw(8, 9))}
    config = AdapterConfig(rank=2, targets=("odd",))
    adapters = make(params, config, axes=axes)
    save_adapters(tmp_path, adapters, config)
    back, _ = load_adapters(tmp_path, params)
    assert back.plans == adapters.plans
