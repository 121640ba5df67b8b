"""Every path of every kind of weight gives what the merged weight gives."""

import contextlib
import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.compare import assert_close
from uoe_jax.adapt import (
    AdapterConfig,
    WeightAxes,
    adapted_params,
    apply_adapted,
    init_adapters,
    leaf_delta,
)
from uoe_jax.adapt.evaluate.cost import Site, path_costs
from uoe_jax.adapt.evaluate.network import Lazy, Term, delta, fuse
from uoe_jax.adapt.plan import make_plans, warn_of
from uoe_jax.errors import ConfigError

PATHS = ("delta", "fused", "factored", "auto")
METHODS = (
    {"method": "lora"},
    {"method": "tucker"},
    {"method": "tucker", "split_heads": True},
)
AXES = {
    "wq": WeightAxes(axes="edjgh", ins="d", outs="jgh", heads="jgh"),
    "wo": WeightAxes(axes="ejghd", ins="jgh", outs="d", heads="jgh"),
    "kernel": WeightAxes(axes="xyio", ins="i", outs="o", kernel="xy"),
    "embedding": WeightAxes(axes="vd", ins="v", outs="d"),
    "w": WeightAxes(axes="io", ins="i", outs="o"),
}


def config(**options):
    names = options.pop("targets", ("*",))
    return AdapterConfig(rank=2, targets=names, **options)


def draw(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def close(got, want):
    assert_close(got, want, 2e-5, least=1.0)


# What a model may do to a weight before it meets an input.
USES = {
    "w": (
        (8, 6),
        lambda p, x: x @ p["w"],
        (3, 5, 8),
    ),
    "w transposed, cast and sliced": (
        (8, 6),
        lambda p, x: jnp.einsum("oi,bi->bo", p["w"].T[1:3].astype(x.dtype), x),
        (3, 8),
    ),
    "w first": ((8, 6), lambda p, x: jnp.einsum("io,bi->ob", p["w"], x), (3, 8)),
    "w joined": (
        (8, 6),
        lambda p, x: x @ jnp.concatenate([p["w"], jnp.ones((8, 3)), p["w"]], axis=1),
        (3, 8),
    ),
    "w joined at its inputs": (
        (8, 6),
        lambda p, x: x @ jnp.concatenate([jnp.ones((2, 6)), p["w"]], axis=0),
        (3, 10),
    ),
    "w through a function nobody knows": (
        (8, 6),
        lambda p, x: x @ jnp.sin(p["w"]),
        (3, 8),
    ),
    "wq": (
        (2, 6, 3, 2, 4),
        lambda p, x: jnp.einsum("btd,edjgh->bejtgh", x, p["wq"]),
        (2, 3, 6),
    ),
    "wq flattened": (
        (1, 6, 3, 2, 4),
        lambda p, x: x @ p["wq"][0].reshape(6, -1),
        (2, 3, 6),
    ),
    "wo": (
        (2, 3, 2, 4, 6),
        lambda p, x: jnp.einsum("tejgh,ejghd->td", x, p["wo"]),
        (5, 2, 3, 2, 4),
    ),
}


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("use", USES)
def test_f3_paths_agree_for_products(use, method, make):
    shape, fn, x_shape = USES[use]
    name = use.split()[0]
    params, x = {name: draw(*shape)}, draw(*x_shape, seed=1)
    adapters = make(params, config(**method), axes=AXES)
    want = fn(adapted_params(params, adapters), x)
    assert float(jnp.abs(want - fn(params, x)).max()) > 0.1
    for path in PATHS:
        close(apply_adapted(fn, params, adapters, x, path=path), want)


CONVOLUTIONS = {
    "plain": {},
    "stride 2": {"window_strides": (2, 2)},
    "dilation 2": {"rhs_dilation": (2, 2)},
    "groups 4": {"feature_group_count": 4},
    "depthwise": {"feature_group_count": 8},
}


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_f3_paths_agree_for_convolutions(case, method, make):
    options = {"window_strides": (1, 1), "padding": "SAME"} | CONVOLUTIONS[case]
    inner = 8 // options.get("feature_group_count", 1)
    params = {"kernel": draw(3, 3, inner, 16)}
    x = draw(2, 7, 6, 8, seed=1)
    numbers = ("NHWC", "HWIO", "NHWC")

    def fn(p, x):
        return jax.lax.conv_general_dilated(
            x, p["kernel"], **options, dimension_numbers=numbers
        )

    # Tucker's input factor can't have rank 2 where a group has one channel.
    cut = case == "depthwise" and method["method"] == "tucker"
    told = pytest.warns(match="rank 2 is more") if cut else contextlib.nullcontext()
    with told:
        adapters = make(params, config(**method), axes=AXES)
    want = fn(adapted_params(params, adapters), x)
    for path in PATHS:
        close(apply_adapted(fn, params, adapters, x, path=path), want)


def test_convolution_of_three_dimensions_and_torch_order(make):
    axes = {"kernel": WeightAxes(axes="oixyz", ins="i", outs="o", kernel="xyz")}
    params, x = {"kernel": draw(4, 3, 2, 2, 2)}, draw(1, 3, 4, 4, 4, seed=1)
    fn = lambda p, x: jax.lax.conv(x, p["kernel"], (1, 1, 1), "VALID")
    for method in METHODS[:2]:
        adapters = make(params, config(**method), axes=axes)
        want = fn(adapted_params(params, adapters), x)
        for path in ("factored", "delta"):
            close(apply_adapted(fn, params, adapters, x, path=path), want)


@pytest.mark.parametrize("method", METHODS[:2], ids=str)
def test_embedding_rows_are_adapted_without_the_table(method, make):
    params = {"embedding": draw(50, 8)}
    tokens = jnp.asarray([[1, 7, 49], [0, 7, 7]])
    fn = lambda p, t: p["embedding"][t]
    adapters = make(params, config(**method), axes=AXES)
    want = fn(adapted_params(params, adapters), tokens)
    for path in PATHS:
        close(apply_adapted(fn, params, adapters, tokens, path=path), want)
    made = jax.make_jaxpr(lambda a, t: apply_adapted(fn, params, a, t))
    shapes = {
        v.aval.shape for e in made(adapters, tokens).jaxpr.eqns for v in e.outvars
    }
    assert (50, 8) not in shapes


def test_vectors_and_stacks_of_layers_are_adapted(make):
    params = {"blocks": {"0": {"w": draw(3, 6, 6), "scale": draw(3, 6, seed=2)}}}

    def fn(p, x):
        body = lambda x, layer: (jnp.tanh(x @ layer["w"]) * layer["scale"][None], None)
        return jax.lax.scan(body, x, p["blocks"]["0"])[0]

    x = draw(2, 6, seed=1)
    for method in METHODS[:2]:
        adapters = make(params, config(**method))
        want = fn(adapted_params(params, adapters), x)
        for remat in (lambda f: f, jax.checkpoint):
            for path in ("factored", "fused"):
                run = lambda p, x, remat=remat: remat(fn)(p, x)
                close(apply_adapted(run, params, adapters, x, path=path), want)


def test_gradients_of_all_paths_agree(make):
    params, x = {"w": draw(8, 6)}, draw(3, 8, seed=1)
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]))
    adapters = make(params, config())

    def grads(path):
        loss = lambda w: apply_adapted(
            fn, params, adapters.with_weights(w), x, path=path
        )
        return jax.grad(loss)(adapters.weights)

    want = jax.grad(lambda w: fn(adapted_params(params, adapters.with_weights(w)), x))(
        adapters.weights
    )
    for path in PATHS:
        jax.tree.map(close, grads(path), want)


@given(st.integers(2, 4), st.data())
@settings(max_examples=6, deadline=None)
def test_f2_the_network_is_the_chained_tensordot(modes, data):
    sizes = data.draw(st.lists(st.integers(1, 5), min_size=modes, max_size=modes))
    ranks = data.draw(st.lists(st.integers(1, 4), min_size=modes, max_size=modes))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    core = rng.normal(size=ranks)
    factors = [rng.normal(size=(d, r)) for d, r in zip(sizes, ranks, strict=True)]
    want = core
    for factor in factors:  # the next mode is always in front
        want = np.tensordot(want, factor, axes=(0, 1))
    letters = "abcd"[:modes]
    labels = ("ABCD"[:modes], *(a + a.upper() for a in letters))
    with jax.enable_x64(True):
        arrays = tuple(jnp.asarray(a) for a in (core, *factors))
        term = Term(arrays=arrays, labels=labels, axes=tuple(letters))
        got = delta(term, jnp.float64)
    assert np.abs(np.asarray(got) - want).max() <= 1e-12 * max(np.abs(want).max(), 1)


@pytest.mark.parametrize(
    ("init", "dtype"),
    [
        ("flora", jnp.float32),
        ("peft", jnp.bfloat16),
        ("orthonormal", jnp.float32),
        ("hosvd", jnp.float32),
        ("hosvd", jnp.bfloat16),
    ],
)
def test_f1_a_fresh_adapter_changes_no_bit(init, dtype):
    params = {"w": draw(8, 6).astype(dtype), "kernel": draw(3, 3, 2, 4).astype(dtype)}
    x, image = draw(3, 8, seed=1).astype(dtype), draw(1, 5, 5, 2, seed=2).astype(dtype)

    def fn(p, x, image):
        kernel = jax.lax.conv_general_dilated(
            image,
            p["kernel"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return x @ p["w"], kernel

    fresh = init_adapters(params, config(init=init), jax.random.key(3), axes=AXES)
    base = fn(params, x, image)
    for path in PATHS:
        got = apply_adapted(fn, params, fresh, x, image, path=path)
        for a, b in zip(got, base, strict=True):
            assert a.dtype == dtype
            np.testing.assert_array_equal(a, b)


def test_f9_a_core_of_ones_is_lora(make):
    params = {"w": draw(8, 6)}
    tucker = make(params, config(alpha=3.0))
    tucker.weights["w"]["core"] = jnp.eye(2)
    lora = make(params, config(method="lora", alpha=3.0))
    parts = tucker.weights["w"]
    lora.weights["w"].update(a=parts["factor_i"], b=parts["factor_o"].T)
    want = leaf_delta(lora, lora["w"])
    assert_close(leaf_delta(tucker, tucker["w"]), want, 1e-6)


def test_several_adapters_add_up(make):
    params, x = {"w": draw(8, 6)}, draw(3, 8, seed=1)
    fn = lambda p, x: x @ p["w"]
    sets = [make(params, config(**m), seed=s) for s, m in enumerate(METHODS[:2])]
    total = params["w"] + sum(leaf_delta(one, one["w"]) for one in sets)
    for path in PATHS:
        close(apply_adapted(fn, params, sets, x, path=path), x @ total)


def test_dropout_drops_the_adapters_input_only(make):
    params, x = {"w": draw(6, 4)}, jnp.ones((400, 6))
    fn = lambda p, x: x @ p["w"]
    adapters = make(params, config(method="lora", dropout=0.5))
    still = apply_adapted(fn, params, adapters, x)
    dropped = apply_adapted(fn, params, adapters, x, key=jax.random.key(0))
    change = leaf_delta(adapters, adapters["w"])
    assert_close(still, fn(adapted_params(params, adapters), x), 1e-5)
    # A row is base + a subset of the delta's rows, doubled: the mean is the sum, the
    # variance of one output the sum of its squares. Five deviations of the mean of 400.
    spread = jnp.sqrt(jnp.sum(change**2, axis=0))
    assert (jnp.abs(jnp.mean(dropped, 0) - still[0]) < 5 * spread / 400**0.5).all()
    assert_close(jnp.std(dropped, 0), spread, 0.25)
    again = apply_adapted(fn, params, adapters, x, key=jax.random.key(0))
    np.testing.assert_array_equal(dropped, again)
    by_delta = apply_adapted(
        fn, params, adapters, x, key=jax.random.key(0), path="delta"
    )
    close(by_delta, dropped)
    with pytest.raises(ConfigError, match="dropout"):
        unknown = lambda p, x: x @ jnp.sin(p["w"])
        apply_adapted(unknown, params, adapters, x, key=jax.random.key(0))


def test_dora_sets_the_norms_of_the_outputs(make):
    params, x = {"w": draw(8, 6)}, draw(3, 8, seed=1)
    fn = lambda p, x: x @ p["w"]
    options = config(method="lora", use_dora=True)
    fresh = init_adapters(params, options, jax.random.key(0))
    close(apply_adapted(fn, params, fresh, x), fn(params, x))
    adapters = make(params, options)
    parts = adapters.weights["w"]
    plain = params["w"] + adapters.scales["w"] * parts["a"] @ parts["b"]
    want = plain / jnp.linalg.norm(plain, axis=0)[None] * parts["magnitude"][None]
    close(apply_adapted(fn, params, adapters, x), x @ want)


def test_cost_picks_small_products_for_few_rows_and_the_sum_for_a_small_weight():
    def site(rows, width, rank):
        sizes = dict(t=rows, i=width, o=width, R=rank)
        return Site("ti", "io", "to", ("iR", "Ro"), sizes)

    assert path_costs(site(16, 4096, 8), training=False).cheapest() == "factored"
    assert path_costs(site(16_384, 4096, 8), training=True).cheapest() == "factored"
    assert path_costs(site(100_000, 64, 32), training=False).cheapest() == "fused"
    # Dropout rules out the sum: then a high rank takes the whole delta, a low one not.
    dropped = path_costs(site(100_000, 64, 32), training=False)
    assert dropped.cheapest(allow_fused=False) == "delta"
    dropped = path_costs(site(16, 4096, 8), training=True)
    assert dropped.cheapest(allow_fused=False) == "factored"


@pytest.mark.parametrize(
    ("letters", "words"),
    [
        ({"axes": "iI"}, "lower-case"),
        ({"axes": "ii"}, "of its own"),
        ({"axes": "io", "outs": "z"}, "name axes only"),
        ({"axes": "io", "outs": "i"}, "none of them in two"),
        ({"axes": "io", "heads": "h"}, "heads 'h'"),
    ],
)
def test_axes_that_cant_be_are_named(letters, words):
    with pytest.raises(ConfigError, match=words):
        WeightAxes(**{"ins": "i", "outs": "o"} | letters)


def test_axes_that_are_given_win_over_this_librarys_own():
    shapes = {"head.weight": (5, 6)}
    turned = {"head.weight": WeightAxes(axes="oi", ins="i", outs="o")}
    plan = make_plans(shapes, config(method="lora"), turned)[0]
    assert plan.shapes == {"a": (6, 2), "b": (2, 5)}


def test_mistakes_are_named(make):
    params = {"w": draw(8, 6), "v": draw(4)}
    adapters = make(params, config(targets=("w",)))
    with pytest.raises(ConfigError, match=r"no weight matches '\*.wx'.*mean \*w"):
        make(params, config(targets=("*.wx",)))
    with pytest.raises(ConfigError, match="no weight among the targets"):
        make(params, config(targets=("w",), rank_pattern={"v": 1}))
    with pytest.raises(ConfigError, match=r"shape \[8, 6\], the model has \[6, 5\]"):
        apply_adapted(lambda p: p, {"w": draw(6, 5)}, adapters)
    with pytest.raises(ConfigError, match="hasn't"):
        apply_adapted(lambda p: p, {"u": draw(8, 6)}, adapters)
    for options, words in (
        ({"init": "gaussian"}, "tucker takes"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"kernel_rank": 0}, "kernel_rank is 0"),
        ({"dropout": 1.0}, r"\[0, 1\)"),
        ({"dropout": 0.1, "use_dora": True}, "DoRA"),
        ({"method": "lora", "split_heads": True}, "split_heads"),
        ({"rank_pattern": {"w": -1}}, "-1"),
    ):
        with pytest.raises(ConfigError, match=words):
            make(params, config(targets=("w",), **options))
    with pytest.warns(UserWarning) as told:
        init_adapters(params, AdapterConfig(rank=64, targets=("w",)), jax.random.key(0))
    cut, large = (str(one.message) for one in told)
    assert cut.startswith("rank 64 is more than w can have; [6, 6] used")
    assert large.startswith("adapters have 120 parameters, the weights they adapt 48")


def test_dora_of_vectors_alone_is_told_to_change_nothing():
    params = {"norm.scale": jnp.ones(4), "w": jnp.ones((6, 6))}
    config = AdapterConfig(method="lora", rank=1, targets=("*scale",), use_dora=True)
    with pytest.warns(UserWarning) as told:
        found = init_adapters(params, config, jax.random.key(0))
    # A vector's delta is as large as the vector: that is no rank to lower.
    (said,) = (str(one.message) for one in told)
    assert said.startswith("use_dora changes nothing: norm.scale and")
    assert set(found.weights["norm.scale"]) == {"delta"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        both = dataclasses.replace(config, targets=("*scale", "w"))
        init_adapters(params, both, jax.random.key(0))


def test_f6_parameters_are_counted_by_the_formula():
    shapes = {"w": (40, 30), "kernel": (3, 3, 256, 256)}
    lora = make_plans(shapes, AdapterConfig(method="lora", rank=16, targets=("*",)))
    tucker = make_plans(shapes, AdapterConfig(rank=16, targets=("*",)))
    with warnings.catch_warnings():  # none of these is worth a word
        warnings.simplefilter("error")
        warn_of(lora)
        warn_of(tucker)
    counts = {plan.name: plan.num_params for plan in lora}
    assert counts == {"w": 16 * 70, "kernel": 16 * (9 * 256 + 256)}  # 40,960
    counts = {plan.name: plan.num_params for plan in tucker}
    assert counts == {"w": 16 * 70 + 256, "kernel": 9228}


def test_a_lazy_weight_without_terms_is_itself():
    value = draw(2, 3)
    assert fuse(Lazy(value, ())) is value
