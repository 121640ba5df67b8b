"""The room that a capacity leaves: the same with and without marks of what is real."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.model.tiny_models import tiny
from uoe_jax.config import UnionConfig
from uoe_jax.model.context import make_context
from uoe_jax.model.routing import make_router
from uoe_jax.model.routing.token import room_of, rooms


@settings(deadline=None, max_examples=40)
@given(
    percent=st.integers(50, 250),
    picks=st.integers(1, 32),
    experts=st.sampled_from([2, 4, 6, 32, 128]),
    length=st.integers(1, 9000),
)
@example(percent=110, picks=3, experts=4, length=1000)  # 825.0000000000001
@example(percent=110, picks=25, experts=32, length=65536)
def test_room_is_the_share_rounded_up(percent, picks, experts, length):
    share = percent / 100 * picks / experts
    exact = Fraction(percent * picks, 100 * experts)
    wanted = [-(-exact * n // 1) for n in (length, length // 2)]
    assert [rooms(share, length)[n] for n in (length, length // 2)] == wanted
    assert room_of(share, length, None) == wanted[0]


@pytest.mark.parametrize("share", [1.1 * 3 / 4, 1.3 * 6 / 8, 0.625])
def test_padding_marks_change_no_room(share):
    segments = np.ones((3, 1000), np.int32)
    segments[1, 500:] = 0
    segments[2] = 0
    found = room_of(share, 1000, jnp.asarray(segments))
    np.testing.assert_array_equal(
        found, [room_of(share, 1000, None), room_of(share, 500, None), 0]
    )


def test_experts_that_choose_take_as_many_of_a_padded_sample():
    """3/5 of 85 tokens are 51; a float32 product is a little more."""
    union = UnionConfig(num_experts=5, top_k=3, router="expert_choice")
    router = make_router(8, union, False, rngs=nnx.Rngs(0))
    values = jax.random.normal(jax.random.key(0), (1, 170, 5))
    real = (jnp.arange(170) < 85).astype(jnp.int32)[None]
    config = tiny(kind="encoder", max_seq_len=170)
    context = make_context(config, (1, 170), segments=real)
    alone = make_context(config, (1, 85))
    taken = router.take(values, context)
    np.testing.assert_array_equal(jnp.sum(taken, axis=1), 51)
    np.testing.assert_array_equal(taken[:, :85], router.take(values[:, :85], alone))
