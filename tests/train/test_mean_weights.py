"""`optim.ema_decay`: a mean of the weights that is validated, saved and used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train.test_loop import arrays_of, assert_same_bits
from tests.train.tiny_runs import with_train
from uoe_jax.errors import ConfigError
from uoe_jax.evaluate import evaluate
from uoe_jax.optim import follow_weights
from uoe_jax.runs.load import load_run
from uoe_jax.runs.state import from_saved, to_saved
from uoe_jax.train import train
from uoe_jax.train.initial import start_from
from uoe_jax.train.metrics import read_metrics
from uoe_jax.validation import validate

DECAY = 0.8


def test_the_mean_is_the_formulas(rng):
    weights = rng.normal(size=(30, 5))
    mean = expected = rng.normal(size=5)
    for step, w in enumerate(weights):
        mean = follow_weights({"w": mean}, {"w": w}, jnp.int32(step), DECAY)["w"]
        kept = min(DECAY, (step + 1) / (step + 10))
        expected = kept * expected + (1 - kept) * w
        assert abs(mean - expected).max() < 1e-5


@pytest.fixture(scope="module")
def averaged(tiny, tmp_path_factory):
    run = tmp_path_factory.mktemp("mean") / "run"
    config = tiny("union", optim={"ema_decay": DECAY}, keep_checkpoints=20)
    config = with_train(config, save_every=1)
    train(config, run, quiet=True)
    return run, config


def test_a_checkpoint_has_the_mean_as_its_params_and_what_trains_on(averaged):
    run, config = averaged
    before, name = arrays_of(run, step=1), "trunk.blocks.0.mlp.w_up"
    for step in range(2, config.train.steps + 1):
        after = arrays_of(run, step=step)
        kept = min(DECAY, step / (step + 9))
        mean = kept * before[f"params.{name}"] + (1 - kept) * after[f"trained.{name}"]
        assert abs(after[f"params.{name}"] - mean).max() < 1e-6
        before = after
    assert abs(after[f"params.{name}"] - after[f"trained.{name}"]).max() > 1e-3


def test_readers_and_validation_have_the_mean(averaged):
    run, config = averaged
    loaded = load_run(run)
    saved = arrays_of(run)["params.embed.embedding"]
    np.testing.assert_array_equal(loaded.model.embed.embedding, saved)
    last = [l for l in read_metrics(run / "metrics.jsonl") if l["kind"] == "eval"][-1]
    assert last["step"] == config.train.steps
    again = evaluate(loaded.model, config, max_batches=config.train.eval_batches)
    assert abs(again["loss"] - last["loss"]) < 1e-5


def test_a_run_without_it_has_other_bits_only_in_its_mean(averaged, tiny, tmp_path):
    run, config = averaged
    plain = dataclasses.replace(
        config, optim=dataclasses.replace(config.optim, ema_decay=0.0)
    )
    train(plain, tmp_path / "plain", quiet=True)
    first, second = arrays_of(tmp_path / "plain"), arrays_of(run)
    for name in (n for n in first if n.startswith("params.")):
        trained = second["trained." + name.removeprefix("params.")]
        assert first[name].tobytes() == trained.tobytes(), name
    assert not any(n.startswith("trained.") for n in first)


def test_a_resumed_run_has_the_same_bits(averaged, tmp_path):
    run, config = averaged
    train(with_train(config, steps=12, max_seconds=1e-9), tmp_path / "r", quiet=True)
    assert load_run(tmp_path / "r").step < 12
    train(config, tmp_path / "r", quiet=True)
    assert_same_bits(run, tmp_path / "r")


def test_a_mean_begins_with_the_weights_a_run_starts_from(averaged, tmp_path):
    run, config = averaged
    out = tmp_path / "next"
    once = with_train(config, steps=0)
    train(once, out, make_subject=start_from(run, once, out), quiet=True)
    first, source = arrays_of(out), arrays_of(run)
    for part in ("params", "trained"):
        np.testing.assert_array_equal(
            first[f"{part}.embed.embedding"], source["params.embed.embedding"]
        )


def test_names_go_there_and_back():
    state = {"params.w": 1, "ema.w": 2, "opt_state.mu.w": 3, "step": 4}
    saved = to_saved(state)
    assert saved == {"trained.w": 1, "params.w": 2, "opt_state.mu.w": 3, "step": 4}
    arrays = {name: np.array(value) for name, value in saved.items()}
    assert from_saved(arrays, state) == state
    # A checkpoint without a mean: it begins with the weights.
    found = from_saved({"params.w": np.array(5)}, state)
    assert found == {"params.w": 5, "ema.w": 5}
    plain = {"params.w": 1}
    assert to_saved(plain) == plain == from_saved(plain, plain)


def test_a_mean_in_bfloat16_is_refused(tiny):
    config = tiny(optim={"ema_decay": 0.99})
    model = dataclasses.replace(config.model, param_dtype="bfloat16")
    with pytest.raises(ConfigError, match="ema_decay 0.99 .* use float32"):
        validate(dataclasses.replace(config, model=model))


def test_the_state_of_a_run_without_it_has_nothing_more(averaged):
    names = set(arrays_of(averaged[0]))
    assert {n.split(".")[0] for n in names} == {
        "params", "trained", "opt_state", "buffers", "step", "bad_steps"
    }  # fmt: skip
    assert jax.tree.leaves(None) == []
