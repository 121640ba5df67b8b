"""Greedy continuations of real models are those of transformers 5.24, torch 2.13.

Recipe of the golden, in a Python 3.11 environment with `torch==2.13.0 transformers`:
`AutoModelForCausalLM.from_pretrained` of what `uoe export` wrote, no end token, then
`generate(max_new_tokens=64, do_sample=False)` in float32. The weights aren't ours to
ship: the tests run where `UOE_DATA_DIR` has them.
"""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from uoe_jax.data.record import run_tokenizer
from uoe_jax.generate import encode_prompt, generate
from uoe_jax.interop.importing import import_run
from uoe_jax.runs.load import load_run

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "greedy.json").read_text())
DATA = Path(os.environ.get("UOE_DATA_DIR", "/nowhere"))
SOURCES = {
    "stories260K": "stories260K",
    "SmolLM2-135M-Instruct": "SmolLM2-135M-Instruct.Q4_1.gguf",
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", SOURCES)
def test_64_greedy_tokens_are_those_of_transformers(name, tmp_path):
    source, golden = DATA / SOURCES[name], GOLDEN[name]
    if not source.exists():
        pytest.skip(f"UOE_DATA_DIR has no {source.name}")
    if source.suffix == ".gguf":
        pytest.importorskip("gguf")
    import_run(source, tmp_path / "run")
    run = load_run(tmp_path / "run")
    tokenizer = run_tokenizer(run.folder, run.config)
    ids = encode_prompt(tokenizer, golden["prompt"], run.config.model)
    assert ids.tolist() == golden["ids"]
    length = jnp.array([len(ids)])
    new = generate(run.model, jnp.asarray(ids)[None], length, 64, greedy=True)
    assert np.asarray(new)[0].tolist() == golden["new"]
