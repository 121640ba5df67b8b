"""Operations and models called a little wrong say value, rule and fix in one line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.errors import ConfigError
from uoe_jax.model import make_model
from uoe_jax.ops.dense_attention.api import dense_attention
from uoe_jax.ops.grouped_matmul.api import (
    gather_project,
    grouped_matmul,
    project_scatter,
)
from uoe_jax.ops.packing import pack_choices
from uoe_jax.ops.segment_attention.api import segment_attention
from uoe_jax.ops.split_heads import split_heads
from uoe_jax.ops.swiglu import swiglu
from uoe_jax.presets import get_preset

NAN = float("nan")
CHOICES = jnp.array([[[0, 1], [1, 2], [0, 2]]])  # B 1, T 3, X 2
PACKING = pack_choices(CHOICES, 3)
ones = jnp.ones
# A right call of each operation, as keywords.
RIGHT = {
    segment_attention: lambda: dict(
        q=ones((6, 2, 8)),
        k=ones((6, 8)),
        v=ones((6, 8)),
        offsets=jnp.array([0, 2, 6]),
        causal=True,
    ),
    dense_attention: lambda: dict(
        q=ones((2, 4, 4, 8)), k=ones((2, 4, 2, 8)), v=ones((2, 4, 2, 8)), causal=True
    ),
    grouped_matmul: lambda: dict(
        x=ones((6, 8)), w=ones((2, 8, 4)), offsets=jnp.array([0, 2, 6])
    ),
    gather_project: lambda: dict(x=ones((3, 8)), w=ones((3, 8, 4)), packing=PACKING),
    project_scatter: lambda: dict(
        rows=ones((6, 8)), w=ones((3, 8, 4)), packing=PACKING
    ),
    split_heads: lambda: dict(
        rows=ones((6, 32)),
        positions=jnp.arange(3),
        token_ids=jnp.array([0, 1, 2, 0, 1, 2]),
        kv_heads=2,
        groups=2,
        theta=10_000.0,
    ),
    swiglu: lambda: dict(rows=ones((6, 8)), factors=ones(6)),
    pack_choices: lambda: dict(choices=CHOICES, num_experts=3),
}
HALF = lambda *shape: ones(shape, jnp.bfloat16)
WRONG = {
    segment_attention: [
        ({"q": ones((6, 8))}, ["q is [6, 8]", "[M, G, H]"]),
        ({"q": ones((6, 2, 8), int)}, ["q is int32", "astype"]),
        ({"q": [1.0, 2.0]}, ["q is a list", "jax array"]),
        ({"k": ones((6, 2, 8))}, ["k is [6, 2, 8]", "[M, H]"]),
        ({"v": ones((5, 8))}, ["[5, 8]", "[6, 8]"]),
        ({"k": HALF(6, 8)}, ["bfloat16", "one dtype"]),
        ({"offsets": [0, 5, 12]}, ["0 to 12", "6 rows", "0 to 6"]),
        ({"offsets": [0, 5, 2]}, ["offsets[2] is 2 after 5", "not descend"]),
        ({"offsets": jnp.array([-1, 6])}, ["-1", "0 to 6"]),
        ({"offsets": jnp.array([0.0, 6.0])}, ["float32", "whole numbers"]),
        ({"offsets": [0.5, 6]}, ["0.5", "whole numbers"]),
        ({"offsets": "06"}, ["'06'", "jax array"]),
        ({"offsets": jnp.arange(4).reshape(2, 2)}, ["[2, 2]", "[S+1]"]),
        ({"offsets": [[0], [1, 2]]}, ["[[0], [1, 2]]"]),
        ({"causal": "yes"}, ["'yes'", "True or False"]),
        ({"window": 2.5}, ["2.5", "whole number"]),
        ({"window": 0}, ["window is 0", ">= 1"]),
        ({"scale": NAN}, ["nan", "finite"]),
        ({"implementation": "xlaa"}, ["'xlaa'", "xla"]),
        ({"implementation": 3}, ["3", "name"]),
        ({"bounds": jnp.arange(6)}, ["(first, last)"]),
        ({"bounds": (jnp.arange(6), jnp.arange(5))}, ["5 for 6 rows"]),
        ({"casual": True}, ["'casual'", "causal"]),
    ],
    dense_attention: [
        ({"q": ones((4, 4, 8))}, ["q is [4, 4, 8]", "[B, T, N, H]"]),
        ({"k": ones((4, 2, 8))}, ["k is [4, 2, 8]", "[B, T, K, H]"]),
        ({"v": ones((2, 5, 2, 8))}, ["[2, 5, 2, 8]", "[2, 4, K, 8]"]),
        ({"q": ones((2, 4, 4, 8), int)}, ["int32", "astype"]),
        ({"q": HALF(2, 4, 4, 8)}, ["bfloat16", "one dtype"]),
        ({"k": ones((2, 4, 3, 8)), "v": ones((2, 4, 3, 8))}, ["K dividing 4"]),
        ({"segments": jnp.ones((2, 3), int)}, ["[2, 3]", "[2, 4]"]),
        ({"segments": jnp.ones((2, 4))}, ["float32", "whole numbers"]),
        ({"window": "3"}, ["'3'", "whole number"]),
        ({"window": -1}, ["-1", ">= 1"]),
        ({"causal": 2}, ["2", "True or False"]),
        ({"scale": "a"}, ["'a'", "finite"]),
        ({"segment": None}, ["'segment'", "segments"]),
    ],
    grouped_matmul: [
        ({"x": ones(6)}, ["x is [6]", "[M, I]"]),
        ({"w": ones((8, 4))}, ["w is [8, 4]", "[E, I, O]"]),
        ({"w": ones((2, 9, 4))}, ["[2, 9, 4]", "I must be 8"]),
        ({"x": HALF(6, 8)}, ["bfloat16", "one dtype"]),
        ({"x": ones((6, 8), int)}, ["int32", "astype"]),
        ({"offsets": [0, 2]}, ["2 entries", "needs 3"]),
        ({"offsets": [0, 7, 6]}, ["offsets[2] is 6 after 7"]),
        ({"offsets": [0, 2, 7]}, ["0 to 7", "6 rows"]),
        ({"offsets": jnp.array([0.0, 2, 6])}, ["float32"]),
        ({"offsets": None}, ["None", "array"]),
        ({"implementation": "cuda"}, ["'cuda'"]),
        ({"offset": 3}, ["'offset'", "offsets"]),
    ],
    gather_project: [
        ({"x": ones((3, 2, 8))}, ["[3, 2, 8]", "[N, I]"]),
        ({"x": ones((4, 8))}, ["4 tokens", "the packing 3"]),
        ({"x": ones((3, 9))}, ["9 wide", "I must be 9"]),
        ({"x": HALF(3, 8)}, ["one dtype"]),
        ({"x": ones((3, 8), int)}, ["int32"]),
        ({"x": "x"}, ["'x'", "array"]),
        ({"w": ones((2, 8, 4))}, ["2 weights", "it needs 3"]),
        ({"w": ones((8, 4))}, ["[8, 4]", "[E, I, O]"]),
        ({"packing": tuple(PACKING)}, ["tuple", "pack_choices"]),
        ({"packing": None}, ["NoneType", "pack_choices"]),
        ({"pack": PACKING}, ["'pack'", "packing"]),
    ],
    project_scatter: [
        ({"rows": ones((5, 8))}, ["5 rows", "6"]),
        ({"rows": ones(8)}, ["[8]", "[M, I]"]),
        ({"rows": ones((6, 7))}, ["7 wide"]),
        ({"rows": HALF(6, 8)}, ["one dtype"]),
        ({"rows": None}, ["None", "array"]),
        ({"rows": ones((6, 8), bool)}, ["bool", "astype"]),
        ({"w": ones((4, 8, 4))}, ["4 weights"]),
        ({"w": [1.0]}, ["list"]),
        ({"packing": CHOICES}, ["pack_choices"]),
        ({"x": 1}, ["'x'"]),
    ],
    split_heads: [
        ({"rows": ones((6, 4, 8))}, ["[6, 4, 8]", "[M, O]"]),
        ({"rows": ones((6, 33))}, ["33 wide", "multiple of 16"]),
        ({"rows": ones((6, 32), int)}, ["int32"]),
        ({"positions": jnp.ones(3)}, ["float32", "whole numbers"]),
        ({"positions": jnp.arange(6).reshape(2, 3)}, ["[2, 3]", "[N]"]),
        ({"token_ids": [0, 1, 2]}, ["3 token ids for 6 rows"]),
        ({"token_ids": [0, 1, 2, 3, 4, 5]}, ["holds 5", "use 0 to 2"]),
        ({"token_ids": [-1, 1, 2, 0, 1, 2]}, ["holds -1"]),
        ({"kv_heads": 0}, ["kv_heads is 0", "at least 1"]),
        ({"kv_heads": 2.0}, ["2.0", "whole number"]),
        ({"groups": None}, ["None", "whole number"]),
        ({"theta": 0.0}, ["0.0", "positive"]),
        ({"theta": "rope"}, ["'rope'", "positive"]),
        ({"heads": 3}, ["'heads'", "kv_heads"]),
    ],
    swiglu: [
        ({"rows": ones(8)}, ["[8]", "[M, O]"]),
        ({"rows": ones((6, 7))}, ["7 wide", "even"]),
        ({"rows": ones((6, 8), int)}, ["int32"]),
        ({"rows": None}, ["None"]),
        ({"rows": 3.0}, ["3.0", "array"]),
        ({"factors": ones(5)}, ["5 factors for 6 rows"]),
        ({"factors": ones((6, 1))}, ["[6, 1]", "[M]"]),
        ({"factors": ones(6, int)}, ["int32"]),
        ({"factors": [1.0] * 6}, ["list"]),
        ({"implementation": "cudnn"}, ["'cudnn'"]),
        ({"factor": None}, ["'factor'", "factors"]),
    ],
    pack_choices: [
        ({"choices": CHOICES[0]}, ["[3, 2]", "[B, T, X]"]),
        ({"choices": CHOICES.astype(float)}, ["float32", "whole numbers"]),
        ({"choices": CHOICES + 1}, ["holds 3", "use 0 to 2"]),
        ({"choices": CHOICES - 1}, ["holds -1"]),
        ({"choices": "a"}, ["'a'"]),
        ({"num_experts": 1}, ["num_experts is 1", "at least 2"]),
        ({"num_experts": 3.0}, ["3.0", "whole number"]),
        ({"num_experts": True}, ["True", "whole number"]),
        ({"kept": jnp.ones((1, 3), bool)}, ["[1, 3]", "[1, 3, 2]"]),
        ({"kept": jnp.ones((1, 3, 2))}, ["float32", "bool"]),
        ({"kept": True}, ["bool"]),
        ({"num_rows": 2.5}, ["2.5", "None"]),
        ({"experts": 3}, ["'experts'", "num_experts"]),
    ],
}
CASES = [(op, change, parts) for op, rows in WRONG.items() for change, parts in rows]


def complaint(call):
    with pytest.raises(ConfigError) as caught:
        call()
    said = str(caught.value)
    assert len(said.splitlines()) == 1
    return said


@pytest.mark.parametrize(
    ("op", "change", "parts"), CASES, ids=lambda v: getattr(v, "__name__", "")
)
def test_a_wrong_call_is_one_line(op, change, parts):
    said = complaint(lambda: op(**{**RIGHT[op](), **change}))
    for part in parts:
        assert part in said, said


@pytest.mark.parametrize("op", RIGHT)
def test_right_calls_pass_and_a_missing_argument_is_named(op):
    given = RIGHT[op]()
    op(**given)
    name = next(iter(given))
    rest = {k: v for k, v in given.items() if k != name}
    assert name in complaint(lambda: op(**rest))


def test_lists_and_numpy_become_arrays():
    given = RIGHT[segment_attention]()
    want = segment_attention(**given)
    for offsets in ([0, 2, 6], (0, 2, 6), np.array([0, 2, 6])):
        got = segment_attention(**{**given, "offsets": offsets})
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("op", RIGHT)
def test_checks_leave_no_trace(op):
    given = RIGHT[op]()
    names = [n for n, v in given.items() if isinstance(v, jax.Array)]
    rest = {n: v for n, v in given.items() if n not in names}

    def program(call):
        run = lambda *values: call(**dict(zip(names, values, strict=True)), **rest)
        return str(jax.make_jaxpr(run)(*(given[n] for n in names)))

    assert program(op) == program(inspect.unwrap(op))
    assert "callback" not in program(op)


@pytest.fixture(scope="module")
def decoder():
    return make_model(get_preset("tiny").model, jax.random.key(0))


@pytest.mark.parametrize(
    ("tokens", "options", "parts"),
    [
        (jnp.arange(6), {}, ["[6]", "[B, T]"]),
        (jnp.ones((1, 6)), {}, ["float32", "whole numbers"]),
        (jnp.full((1, 6), 256), {}, ["holds 256", "model.vocab_size", "0 to 255"]),
        (jnp.full((1, 6), -1), {}, ["holds -1"]),
        ("text", {}, ["'text'", "array"]),
        ([["a"]], {}, ["'a'"]),
        (jnp.ones((1, 300), int), {}, ["300 tokens", "max_seq_len 256"]),
        (jnp.ones((1, 6), int), {"segment_ids": 3}, ["'segment_ids'", "segments"]),
        (jnp.ones((1, 6), int), {"segments": jnp.ones((1, 5), int)}, ["[1, 5]"]),
        (jnp.ones((1, 6), int), {"segments": jnp.ones((1, 6))}, ["float32"]),
        (jnp.ones((1, 6), int), {"positions": jnp.arange(6)}, ["[6]", "[B, T]"]),
        (jnp.ones((1, 6), int), {"mask": None}, ["'mask'", "known"]),
    ],
)
def test_a_model_called_wrong_says_so(decoder, tokens, options, parts):
    said = complaint(lambda: decoder(tokens, **options))
    for part in parts:
        assert part in said, said


def test_a_model_takes_lists_of_tokens(decoder):
    logits, _ = decoder([[1, 2, 3]])
    np.testing.assert_array_equal(logits, decoder(jnp.array([[1, 2, 3]]))[0])


def test_images_of_another_size_are_refused():
    model = make_model(get_preset("digits-vit").model, jax.random.key(0))
    assert "[B, 8, 8, 1]" in complaint(lambda: model(jnp.zeros((2, 9, 8, 1))))
    assert "[B, H, W, C]" in complaint(lambda: model(jnp.zeros((8, 8, 1))))
    assert "'tokens'" in complaint(lambda: model(tokens=jnp.zeros((8, 8, 1))))
