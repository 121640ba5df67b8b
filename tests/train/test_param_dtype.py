"""Parameters in bfloat16 train, resume and are evaluated; moments stay float32."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.config import OptimConfig
from uoe_jax.hardware.count import state_bytes
from uoe_jax.optim import make_optimizer
from uoe_jax.presets import get_preset


def test_moments_are_float32_beside_bfloat16():
    params = {"w": jnp.ones((4, 4), jnp.bfloat16)}
    optimizer = make_optimizer(OptimConfig(warmup_steps=0), 10)
    state = optimizer.init(params)
    grads = {"w": jnp.full((4, 4), 0.5)}
    update = jax.jit(lambda s: optimizer.update(grads, s, params, step=jnp.int32(1)))
    for _ in range(3):
        updates, new = update(state)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new)
        state = new
    wide = [a for a in jax.tree.leaves(state) if a.ndim == 2]
    assert len(wide) == 2 and all(a.dtype == jnp.float32 for a in wide)
    # As with parameters in float32: the gradient is, and decay is of equal weights.
    whole = {"w": jnp.ones((4, 4))}
    want, _ = optimizer.update(grads, optimizer.init(whole), whole, step=jnp.int32(1))
    first, _ = optimizer.update(
        grads, optimizer.init(params), params, step=jnp.int32(1)
    )
    np.testing.assert_allclose(first["w"], want["w"], atol=1e-7)


@pytest.mark.parametrize("preset", ["tiny", "tiny-moe"])
def test_a_run_with_bfloat16_parameters_goes_on(preset, tmp_path, capsys):
    text = tmp_path / "code.txt"
    text.write_text(
        "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(300))
    )
    run = tmp_path / "run"
    args = ["train", preset, "--run-dir", str(run), "--quiet", "--no-report",
            "--model.param-dtype", "bfloat16", "--data.path", str(text),
            "--data.cache-dir", str(tmp_path), "--data.batch-size", "16",
            "--train.accumulate", "2", "--model.d-model", "16", "--model.d-ff", "32",
            "--model.num-layers", "1", "--model.head-dim", "4",
            "--model.max-seq-len", "32"]  # fmt: skip
    assert main([*args, "--train.steps", "2"]) == 0
    assert main([*args, "--train.steps", "4"]) == 0
    assert main(["eval", str(run), "--max-batches", "1"]) == 0
    assert "loss" in capsys.readouterr().out
    adapted = ["--method", "lora", "--rank", "2", "--steps", "2", "--quiet"]
    assert main(["adapt", str(run), *adapted, "--out", str(tmp_path / "lora")]) == 0


def test_what_is_counted_is_what_is_held():
    import dataclasses

    model = get_preset("tiny").model
    half = dataclasses.replace(model, param_dtype="bfloat16")
    whole, narrow = state_bytes(model), state_bytes(half)
    assert narrow["parameters"] * 2 == whole["parameters"]
    assert narrow["optimizer"] == whole["optimizer"] == 2 * narrow["gradients"]
