"""Every router in attention and MLP: what may not reach a token doesn't."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.compare import assert_close
from tests.model.router_kinds import CAUSAL, LENGTH, OTHERS, config_of
from tests.model.tiny_models import build, tokens_like
from uoe_jax.config import ExperimentConfig
from uoe_jax.errors import ConfigError
from uoe_jax.model import init_cache, make_model
from uoe_jax.model.context import make_context
from uoe_jax.validation import find_problems

# The room of a sample is shared by its documents.
ROOM = ("capacity", "mod", "expert choice")


@functools.partial(jax.jit, static_argnames="train")
def run(model, tokens, segments, train):
    """The last hidden state of every token, and what every router chose."""
    context = make_context(
        model.config, tokens.shape, segments=segments, train=train, collect_choices=True
    )
    x, aux = model.trunk(model.embed(tokens, context.positions), context)
    return x, {part: stats["choices"] for part, stats in aux.items()}


def inputs(config, batch=3):
    return [tokens_like(config, batch, LENGTH, seed) for seed in (5, 6)]


def assert_same(a, b, span):
    assert_close(a[0][span], b[0][span], 1e-5)
    for part, choices in a[1].items():
        other = b[1][part]
        np.testing.assert_array_equal(choices[0][span], other[0][span], err_msg=part)


ONE = jnp.ones((3, LENGTH), jnp.int32)


# Training differs from evaluation by the capacity alone, which decoding (below) lacks.
@pytest.mark.parametrize("name", [*CAUSAL, *OTHERS])
def test_no_token_sees_a_later_one(name):
    model = build(config_of("decoder", name))
    tokens, other = inputs(model.config)
    base = run(model, tokens, ONE, True)
    moved = 0.0
    for cut in (1, 4, 6, 11):
        keep = (jnp.arange(LENGTH) < cut)[None]
        changed = run(model, jnp.where(keep, tokens, other), ONE, True)
        assert_same(base, changed, np.s_[:, :cut])
        moved += float(jnp.abs(changed[0][:, cut:] - base[0][:, cut:]).max())
    assert moved > 0.1  # the perturbation was seen where it may be


# Other kinds route alike in an encoder and in a decoder.
WAYS = [("decoder", name) for name in (*CAUSAL, *OTHERS)]
WAYS += [
    ("encoder", name)
    for name in ("patch", "selection", "hierarchical", "expert choice", "moba", "mod")
]


@pytest.mark.parametrize(("kind", "name"), WAYS)
def test_no_token_sees_its_batch_padding_or_another_document(kind, name):
    model = build(config_of(kind, name))
    tokens, other = inputs(model.config)
    index = jnp.broadcast_to(jnp.arange(LENGTH)[None], ONE.shape)
    base = run(model, tokens, ONE, True)
    for row in range(3):
        mine = (jnp.arange(3) == row)[:, None]
        changed = run(model, jnp.where(mine, tokens, other), ONE, True)
        assert_same(base, changed, np.s_[row])
    for begin, end in ((0, 7), (4, LENGTH)):
        real = (index >= begin) & (index < end)
        pad = real.astype(jnp.int32)
        base = run(model, tokens, pad, True)
        changed = run(model, jnp.where(real, tokens, other), pad, True)
        assert_same(base, changed, np.s_[:, begin:end])
    if name in ROOM:
        return
    documents = 1 + (index >= 5).astype(jnp.int32)
    base = run(model, tokens, documents, True)
    for number, span in ((1, np.s_[:, :5]), (2, np.s_[:, 5:])):
        mixed = jnp.where(documents == number, tokens, other)
        assert_same(base, run(model, mixed, documents, True), span)


def test_expert_choice_in_a_causal_model_is_refused_in_one_line():
    config = config_of("decoder", "expert choice")
    with pytest.raises(ConfigError, match="every token of the sample.*causal"):
        make_model(config, jax.random.key(0))
    config = dataclasses.replace(config, vocab_size=256)
    problems = list(find_problems(ExperimentConfig(model=config)))
    assert len(problems) == 1 and "\n" not in problems[0]
    assert re.search("every token of the sample.*use token", problems[0])


@jax.jit
def decoded(model, tokens, prompt, lengths):
    """Logits after each prompt and after each of the five tokens that follow it."""
    rows = jnp.arange(tokens.shape[0])
    cache = init_cache(model.config, *tokens.shape)
    logits, cache = model.prefill(prompt, lengths, cache)

    def step(cache, _):
        logits, cache = model.decode(tokens[rows, cache.lengths], cache)
        return cache, logits

    _, more = jax.lax.scan(step, cache, length=5)
    return jnp.concatenate([logits[None], more])


# Token and patch routing decode in test_cache.py.
@pytest.mark.parametrize("name", [*[n for n in CAUSAL if n != "patch"], *OTHERS])
def test_decoding_equals_the_full_forward_of_a_row_alone(name):
    model = build(config_of("decoder", name))
    tokens, other = inputs(model.config)
    lengths = jnp.array([7, 1, 4])
    # Whatever has no capacity is compiled already, for the tests above.
    hidden = run(model, tokens, ONE, name not in ("capacity", "mod"))[0]
    wanted = model.logits(hidden)
    ends = jnp.arange(7)[None] < lengths[:, None]
    prompt = jnp.where(ends, tokens[:, :7], other[:, :7])  # padded with anything
    mine = jnp.array([[True], [False], [True]])
    for mix in (tokens, jnp.where(mine, tokens, other)):
        found = decoded(model, mix, jnp.where(ends, mix[:, :7], prompt), lengths)
        for row, length in enumerate(np.asarray(lengths)):
            if row == 1 and mix is not tokens:
                continue
            expected = wanted[row, length - 1 : length + 5]
            np.testing.assert_allclose(found[:, row], expected, atol=1e-4)
