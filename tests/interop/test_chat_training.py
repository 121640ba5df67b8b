"""Runs on messages: they answer with --chat; an imported model keeps its template."""

import json

import numpy as np
import pytest

from tests.interop.test_chat import TEMPLATE, place, said  # noqa: F401  a fixture
from uoe_jax.cli import main
from uoe_jax.data.chat import CHATML, encode_chat, find_template, read_template
from uoe_jax.data.record import run_tokenizer
from uoe_jax.interop.exporting import export_run
from uoe_jax.runs.load import run_dataset
from uoe_jax.validation import read_config

WORDS = ["one", "two", "three", "four"]
TURNS = [
    {"role": "system", "content": " short\n"},
    {"role": "user", "content": "one {{ two }}"},
    {"role": "assistant", "content": "ONE"},
]
SMALL = (
    "--model.d-model 32 --model.d-ff 64 --model.num-layers 2 --model.num-heads 2 "
    "--model.num-kv-heads 2 --model.head-dim 16 --model.activation swiglu "
    "--data.seq-len 96 "
    "--data.batch-size 16 --data.pack documents "
    "--train.eval-batches 1 --optim.learning-rate 0.01 --no-report --quiet"
).split()


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    """Questions with one right answer each."""
    file = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    records = [
        {"messages": [{"role": "user", "content": word},
                      {"role": "assistant", "content": word.upper()}], "id": i}
        for i, word in enumerate(WORDS * 40)
    ]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, records)))
    return file


def test_a_run_trained_on_messages_answers(chats, tmp_path, capsysbinary):
    run = tmp_path / "run"
    args = ["train", "tiny", "--data.path", str(chats), "--run-dir", str(run)]
    # Four texts, some held out by their hash: the run is of those in train.
    more = ["--data.cache-dir", str(tmp_path / "cache"), "--train.steps", "60"]
    assert main([*args, *more, *SMALL]) == 0
    assert find_template(run) == CHATML
    data = run_dataset(run, read_config(run), "train")
    whole = data.decode(data.examples(np.arange(data.num_examples))["tokens"])
    known = [word for word in WORDS if f"user\n{word}<" in whole]
    assert len(known) >= 2
    file = tmp_path / "ask.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": word}) for word in known))
    answers = said(capsysbinary, run, "--chat", "--prompts", file, "--greedy",
                   "--max-new-tokens", 24)  # fmt: skip
    found = [json.loads(line)["completion"] for line in answers.splitlines()]
    assert found == [word.upper() for word in known]
    # Other libraries get the plain form as a program.
    export_run(run, tmp_path / "exported")
    template = read_template(tmp_path / "exported")
    # Bytes have no token for the end of a turn: generation stops at its text.
    assert template.text and not template.eos
    stop = json.loads((tmp_path / "exported" / "generation_config.json").read_text())
    assert stop["stop_strings"] == [CHATML.eos]
    for begin in (False, True):
        written = template.render(TURNS, begin=begin)
        assert written == CHATML.render(TURNS, begin=begin)


def test_an_adapted_model_reads_messages_as_it_was_taught(place, chats, tmp_path):  # noqa: F811
    base, out = place / "model-run", tmp_path / "adapted"
    args = ["adapt", str(base), "--data", str(chats), "--out", str(out)]
    more = ["--steps", "2", "--batch-size", "4", "--quiet", "--merge"]
    assert main([*args, *more]) == 0
    config = read_config(out)
    assert config.data.chat_template == str(base)
    assert find_template(out).text == TEMPLATE
    data = run_dataset(out, config, "train")
    rows = data.examples(np.arange(data.num_examples))
    tokenizer = run_tokenizer(base, read_config(base))
    # Its rows begin as a prompt to it is encoded, and it learns to end its turn.
    prompts = [
        encode_chat(
            tokenizer, find_template(base), [{"role": "user", "content": word}]
        ).tolist()
        for word in WORDS
    ]
    heads = [rows["tokens"][0, : len(prompt)].tolist() for prompt in prompts]
    assert any(head == prompt for head, prompt in zip(heads, prompts, strict=True))
    end = tokenizer.special_tokens()["<|im_end|>"]
    assert (rows["targets"][rows["mask"] > 0] == end).any()
    export_run(out / "merged", tmp_path / "exported")
    exported = tmp_path / "exported"
    assert read_template(exported) == find_template(out)
    about = json.loads((exported / "generation_config.json").read_text())
    assert about["eos_token_id"] == tokenizer.special_tokens()["<|im_end|>"]
