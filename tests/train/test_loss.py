import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from uoe_jax.train.loss import (
    LossTerms,
    Taught,
    class_losses,
    linear_cross_entropy,
    token_scores,
)

N, D, V = 23, 8, 50


def make_inputs(rng, dtype=jnp.float32, use_bias=True):
    x = jnp.asarray(rng.normal(size=(N, D)), dtype)
    weight = jnp.asarray(rng.normal(size=(D, V)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if use_bias else None
    targets = jnp.asarray(rng.integers(0, V, N), jnp.int32)
    return x, weight, bias, targets, jnp.asarray(rng.random(N) < 0.7, jnp.float32)


def oracle(x, weight, bias, targets, weights, z_loss, smoothing):
    """(objective, nll) in NumPy float64, all logits at once."""
    x, weight, weights = (np.asarray(a, np.float64) for a in (x, weight, weights))
    logits = x @ weight + (0 if bias is None else np.asarray(bias, np.float64))
    lse = np.log(np.exp(logits).sum(-1))
    nll = lse - logits[np.arange(N), np.asarray(targets)]
    soft = np.eye(V)[np.asarray(targets)] * (1 - smoothing) + smoothing / V
    smooth = -(soft * (logits - lse[:, None])).sum(-1)
    return (weights * (smooth + z_loss * lse**2)).sum(), (weights * nll).sum()


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize(("z_loss", "smoothing"), [(0.0, 0.0), (1e-2, 0.2)])
def test_sums_equal_whole_logits_in_float64(chunk, z_loss, smoothing, rng):
    inputs = make_inputs(rng)
    sums = linear_cross_entropy(*inputs, LossTerms(chunk, z_loss, smoothing))
    objective, nll = oracle(*inputs, z_loss, smoothing)
    assert_close(sums.objective, objective, 1e-5)
    assert_close(sums.nll, nll, 1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize("use_bias", [True, False])
def test_gradients_equal_autodiff_of_whole_logits(chunk, use_bias, rng):
    x, weight, bias, targets, weights = make_inputs(rng, use_bias=use_bias)

    def whole(x, weight, bias):
        logits = jnp.dot(x, weight, precision="highest")
        logits = logits if bias is None else logits + bias[None]
        lse = jax.nn.logsumexp(logits, axis=-1)
        soft = jax.nn.one_hot(targets, V) * 0.8 + 0.2 / V
        smooth = lse - jnp.sum(soft * logits, axis=-1)
        return 3.0 * jnp.sum(weights * (smooth + 1e-2 * lse**2))

    def chunked(x, weight, bias):
        terms = LossTerms(chunk, 1e-2, 0.2)
        args = (x, weight, bias, targets, weights, terms)
        return 3.0 * linear_cross_entropy(*args).objective

    which = (0, 1, 2) if use_bias else (0, 1)
    expected = jax.grad(whole, which)(x, weight, bias)
    got = jax.grad(chunked, which)(x, weight, bias)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-4)


def soft_oracle(x, weight, bias, targets, weights, taught, share, temperature):
    """Objective in NumPy float64: data's loss, and T^2 cross-entropy to the teacher."""
    double = lambda a: None if a is None else np.asarray(a, np.float64)
    x, weight, bias, weights, *said = map(double, (x, weight, bias, weights, *taught))
    logits = x @ weight + (0 if bias is None else bias)
    teacher = said[0] @ said[1] + (0 if said[2] is None else said[2])
    log_softmax = lambda z: z - np.log(np.exp(z).sum(-1, keepdims=True))
    nll = -log_softmax(logits)[np.arange(N), np.asarray(targets)]
    wanted = np.exp(log_softmax(teacher / temperature))
    soft = -(wanted * log_softmax(logits / temperature)).sum(-1)
    return (weights * ((1 - share) * nll + share * temperature**2 * soft)).sum()


def make_taught(rng, use_bias=True, width=5):
    x, weight = rng.normal(size=(N, width)), rng.normal(size=(width, V))
    bias = jnp.asarray(rng.normal(size=V), jnp.float32) if use_bias else None
    return Taught(jnp.asarray(x, jnp.float32), jnp.asarray(weight, jnp.float32), bias)


@pytest.mark.parametrize("chunk", [1, 7, 100])
@pytest.mark.parametrize(("share", "temperature"), [(0.3, 2.0), (1.0, 0.7), (0.9, 1.0)])
@pytest.mark.parametrize("use_bias", [True, False])
def test_a_teacher_adds_its_softened_cross_entropy(
    chunk, share, temperature, use_bias, rng
):
    inputs, taught = make_inputs(rng, use_bias=use_bias), make_taught(rng, use_bias)
    terms = LossTerms(chunk, share=share, temperature=temperature)
    sums = linear_cross_entropy(*inputs, terms, taught)
    expected = soft_oracle(*inputs, taught, share, temperature)
    assert_close(sums.objective, expected, 1e-5)
    # What is reported is the data's, whoever teaches.
    assert_close(sums.nll, oracle(*inputs, 0.0, 0.0)[1], 1e-5)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_gradients_to_a_teacher_are_the_oracles_differences(chunk, rng):
    (x, weight, bias, *rest), taught = make_inputs(rng), make_taught(rng)
    share, temperature, step = 0.6, 3.0, 1e-5

    def ours(x, weight, bias):
        terms = LossTerms(chunk, share=share, temperature=temperature)
        return 2.0 * linear_cross_entropy(x, weight, bias, *rest, terms, taught)[0]

    given = [np.asarray(a, np.float64) for a in (x, weight, bias)]
    whole = lambda *a: 2.0 * soft_oracle(*a, *rest, taught, share, temperature)
    for number, got in enumerate(jax.grad(ours, (0, 1, 2))(x, weight, bias)):
        way = rng.normal(size=got.shape)
        ends = []
        for sign in (1, -1):
            moved = list(given)
            moved[number] = moved[number] + sign * step * way
            ends.append(whole(*moved))
        slope = (ends[0] - ends[1]) / (2 * step)
        scale = np.linalg.norm(way) * np.linalg.norm(np.asarray(got))
        assert abs(np.sum(way * np.asarray(got, np.float64)) - slope) < 1e-5 * scale


def test_a_teacher_that_says_the_same_leaves_the_datas_gradient_alone(rng):
    x, weight, bias, *rest = make_inputs(rng)
    taught, terms = Taught(x, weight, bias), LossTerms(7, share=1.0, temperature=2.0)
    loss = lambda x: linear_cross_entropy(x, weight, bias, *rest, terms, taught)[0]
    assert np.abs(np.asarray(jax.grad(loss)(x))).max() < 1e-4


def arrays_of(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from arrays_of(inner)


def gradient_jaxpr(chunk, dtype=jnp.float32):
    rng = np.random.default_rng(0)  # shapes alone count
    x, weight, bias, targets, weights = make_inputs(rng, dtype)
    rest = bias, targets, weights, LossTerms(chunk)
    loss = lambda x, w: linear_cross_entropy(x, w, *rest)
    return jax.make_jaxpr(jax.grad(lambda x, w: loss(x, w).objective, (0, 1)))(
        x, weight
    ).jaxpr


def test_whole_logits_never_exist():
    sizes = [a.size for a in arrays_of(gradient_jaxpr(5))]
    assert max(sizes) == max(D * V, 25 * D)  # the weight's gradient; N V would be 1150
    assert N * V in [a.size for a in arrays_of(gradient_jaxpr(N))]


def test_bfloat16_products_sum_the_weights_gradient_in_float32():
    text = str(gradient_jaxpr(5, jnp.bfloat16))
    products = [line for line in text.splitlines() if "= dot_general[" in line]
    assert len(products) == 3
    dtypes = [line.split("=")[0].split(":")[-1].split("[")[0] for line in products]
    assert sorted(dtypes) == ["bf16", "bf16", "f32"]  # logits and dx are what x is


def test_bfloat16_loss_is_near_float32s(rng):
    x, *rest = make_inputs(rng, jnp.bfloat16)
    low = linear_cross_entropy(x, *rest, LossTerms(8)).nll
    high = linear_cross_entropy(x.astype(jnp.float32), *rest, LossTerms(8)).nll
    assert_close(low, high, 1e-2)  # bf16 weights: 2^-9 each


def test_token_scores_are_per_token(rng):
    x, weight, bias, targets, weights = make_inputs(rng)
    scores = token_scores(x, weight, bias, targets, 5)
    logits = np.asarray(x @ weight + bias[None])
    np.testing.assert_array_equal(scores.correct, logits.argmax(-1) == targets)
    total = linear_cross_entropy(x, weight, bias, targets, weights, LossTerms(5)).nll
    assert_close(jnp.sum(scores.nll * weights), total, 1e-5)


def test_padding_rows_of_a_classifier_weigh_nothing(rng):
    logits = jnp.asarray(rng.normal(size=(6, 4)), jnp.float32)
    labels = jnp.array([0, 1, 2, 3, -1, -1])
    weights = (labels >= 0).astype(jnp.float32)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = -sum(log_probs[i, i] for i in range(4))
    got = class_losses(logits, labels, weights)
    assert_close(got.nll, expected, 1e-5)
    gradient = jax.grad(lambda a: class_losses(a, labels, weights).objective)(logits)
    assert not np.asarray(gradient)[4:].any()
