"""Generation: sampling rules, agreement with the full forward pass, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.config import ModelConfig, UnionConfig
from uoe_jax.errors import ConfigError
from uoe_jax.generate import (
    Sampling,
    generate,
    generate_all,
    keep_top_k,
    keep_top_p,
    sample,
    stream,
)
from uoe_jax.generate.pieces import settled_bytes
from uoe_jax.model import make_model

KEY = jax.random.key(0)
CONFIG = ModelConfig(
    vocab_size=31,
    max_seq_len=24,
    d_model=16,
    d_ff=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    attention=("union", "dense"),
    mlp=("union",),
    union=UnionConfig(num_experts=2, top_k=1, patch_size=2),
)
PROMPTS = jnp.array([[3, 1, 4, 1, 5, 9], [2, 7, 1, 0, 0, 0]])
LENGTHS = jnp.array([6, 3])


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG, KEY)


@jax.jit
def logits_of(model, tokens):
    return model(tokens)[0]


def greedy_by_forward(model, prompt, count):
    row = list(prompt)
    for _ in range(count):
        tokens = np.array([row + [0] * (16 - len(row))])
        row.append(int(np.argmax(logits_of(model, tokens)[0, len(row) - 1])))
    return row[len(prompt) :]


@pytest.mark.both_jax
def test_greedy_is_the_argmax_of_the_full_forward_for_ragged_prompts(model):
    out = generate(model, PROMPTS, LENGTHS, 7, greedy=True)
    assert out.shape == (2, 7)
    for row in range(2):
        prompt = np.asarray(PROMPTS)[row, : LENGTHS[row]].tolist()
        assert np.asarray(out)[row].tolist() == greedy_by_forward(model, prompt, 7)
    again = generate(model, PROMPTS, LENGTHS, 7, temperature=0.0)
    np.testing.assert_array_equal(out, again)


def test_one_new_token_is_the_prefix_of_more(model):
    one = generate(model, PROMPTS, LENGTHS, 1, greedy=True)
    more = generate(model, PROMPTS, LENGTHS, 7, greedy=True)
    np.testing.assert_array_equal(one, more[:, :1])


def test_the_same_key_gives_the_same_text_and_another_key_another(model):
    draw = lambda seed: generate(
        model, PROMPTS, LENGTHS, 7, key=jax.random.key(seed), top_p=0.99, top_k=20
    )
    np.testing.assert_array_equal(draw(1), draw(1))
    assert np.any(np.asarray(draw(1)) != np.asarray(draw(2)))


def test_a_row_that_ended_is_filled_with_eos(model):
    plain = np.asarray(generate(model, PROMPTS, LENGTHS, 7, greedy=True))
    eos = int(plain[0, 2])
    out = np.asarray(generate(model, PROMPTS, LENGTHS, 7, greedy=True, eos=eos))
    for row in range(2):
        end = plain[row].tolist().index(eos) if eos in plain[row] else 7
        np.testing.assert_array_equal(out[row, :end], plain[row, :end])
        assert np.all(out[row, end:] == eos)


def test_a_stream_has_the_tokens_of_generate_one_by_one(model):
    drawn = {"key": jax.random.key(3), "temperature": 0.8, "top_k": 9}
    for options in ({"greedy": True}, drawn):
        whole = np.asarray(generate(model, PROMPTS, LENGTHS, 5, **options))
        found = list(stream(model, PROMPTS, LENGTHS, 5, **options))
        np.testing.assert_array_equal(np.stack(found, axis=1), whole)
        seen = []
        again = generate(model, PROMPTS, LENGTHS, 5, on_token=seen.append, **options)
        np.testing.assert_array_equal(again, whole)
        np.testing.assert_array_equal(np.stack(seen, axis=1), whole)


def test_a_stream_ends_when_every_row_has_ended(model):
    plain = np.asarray(generate(model, PROMPTS[:1], LENGTHS[:1], 7, greedy=True))[0]
    eos = int(plain[2])
    count = plain.tolist().index(eos) + 1
    options = {"greedy": True, "eos": eos}
    found = list(stream(model, PROMPTS[:1], LENGTHS[:1], 7, **options))
    assert [int(token[0]) for token in found] == plain[:count].tolist()
    seen = []
    out = generate(model, PROMPTS[:1], LENGTHS[:1], 7, on_token=seen.append, **options)
    np.testing.assert_array_equal(
        out, generate(model, PROMPTS[:1], LENGTHS[:1], 7, **options)
    )
    assert len(seen) == count


def test_sampling_is_given_as_itself_or_as_its_fields(model):
    fields = {"temperature": 0.7, "top_k": 5, "top_p": 0.9}
    whole = Sampling(**fields)
    made = generate(model, PROMPTS, LENGTHS, 4, whole, key=KEY)
    apart = generate(model, PROMPTS, LENGTHS, 4, **fields, key=KEY)
    np.testing.assert_array_equal(made, apart)
    streamed = list(stream(model, PROMPTS, LENGTHS, 4, whole, key=KEY))
    np.testing.assert_array_equal(made, np.stack(streamed, axis=1))
    prompts = [np.asarray(PROMPTS[0])]
    (made,) = generate_all(model, prompts, 4, whole, seed=2)
    (apart,) = generate_all(model, prompts, 4, **fields, seed=2)
    np.testing.assert_array_equal(made, apart)
    with pytest.raises(ConfigError, match="top_p is 0.0; it must be positive"):
        Sampling(top_p=0)


def test_a_wrong_stream_is_refused_before_its_first_token(model):
    with pytest.raises(ConfigError, match="max_new_tokens is 0"):
        stream(model, PROMPTS, LENGTHS, 0, greedy=True)


def test_characters_are_held_back_until_their_bytes_are_there():
    for text in ("plain", "größe", "日本", "😀!"):
        whole = text.encode()
        for count in range(len(whole) + 1):
            settled = settled_bytes(whole[:count])
            assert settled == settled.decode().encode()  # whole characters
            assert len(whole[:count]) - len(settled) <= 3
        assert settled_bytes(whole) == whole
    assert settled_bytes(b"a\xff") == b"a\xff"  # no character's beginning


@pytest.mark.both_jax
def test_top_k_keeps_exactly_the_highest():
    logits = jnp.array([[1.0, 3.0, 2.0, -1.0], [0.0, 5.0, 4.0, 6.0]])
    kept = np.isfinite(keep_top_k(logits, 2))
    np.testing.assert_array_equal(kept, [[0, 1, 1, 0], [0, 1, 0, 1]])


@pytest.mark.both_jax
def test_top_p_keeps_the_fewest_that_reach_the_mass():
    logits = jnp.log(jnp.array([[0.5, 0.1, 0.3, 0.1], [0.05, 0.9, 0.03, 0.02]]))
    kept = lambda p: np.isfinite(keep_top_p(logits, p)).tolist()
    assert kept(0.7) == [[True, False, True, False], [False, True, False, False]]
    assert kept(0.4) == [[True, False, False, False], [False, True, False, False]]
    assert kept(1e-9) == kept(0.4)
    assert kept(1.0) == [[True] * 4] * 2


@pytest.mark.both_jax
def test_sampling_follows_the_filtered_distribution():
    logits = jnp.log(jnp.array([[0.4, 0.3, 0.2, 0.1]]))
    many = jnp.broadcast_to(logits, (20000, 4))
    draws = np.asarray(sample(many, KEY, temperature=0.5, top_k=3))
    weights = np.array([0.4, 0.3, 0.2, 0]) ** 2
    expected = weights / weights.sum()
    counts = np.bincount(draws, minlength=4) / draws.size
    # 20000 draws: a frequency's standard deviation is at most 0.0036.
    np.testing.assert_allclose(counts, expected, atol=0.015)
    assert counts[3] == 0


@pytest.mark.both_jax
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 40}, "6 prompt tokens . 40 new .* max_seq_len 24"),
        ({"lengths": jnp.array([0, 2])}, "prompt lengths are 0 to 2"),
        ({"lengths": jnp.array([1, 9])}, "each needs 1 to 6"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"key": None}, "without a key"),
        ({"top_k": 32}, "top_k is 32; use 1 to 31"),
        ({"topk": 3}, "no option 'topk'; did you mean top_k"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"sampling": Sampling(), "top_k": 3}, "top_k with sampling"),
    ],
)
def test_bad_requests_are_refused_in_one_line(model, change, message):
    arguments = {"lengths": LENGTHS, "max_new_tokens": 3, "key": KEY} | change
    lengths, count = arguments.pop("lengths"), arguments.pop("max_new_tokens")
    with pytest.raises(ConfigError, match=message) as error:
        generate(model, PROMPTS, lengths, count, **arguments)
    assert "\n" not in str(error.value)
