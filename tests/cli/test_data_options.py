"""Every option of `uoe data`, `uoe generate` and `uoe eval` once, as a command."""

import dataclasses
import json
import typing

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from uoe_jax.cli import main
from uoe_jax.cli.generate import GenerateOptions
from uoe_jax.cli.runs import EvalOptions
from uoe_jax.config import DataConfig


def run(capsys, *args):
    """Return what a command printed."""
    capsys.readouterr()
    assert main([str(a) for a in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refusal(capsys, *args):
    capsys.readouterr()
    assert main([str(a) for a in args]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("uoe: "), lines
    return lines[0]


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    """Small files of every kind."""
    folder = tmp_path_factory.mktemp("files")
    rows = [{"text": f"tale number {i}", "meta": {"body": f"body {i}"}, "label": i % 3}
            for i in range(60)]  # fmt: skip
    lines = [json.dumps(row) for row in rows]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "holes.jsonl").write_text("\n".join([*lines, '{"text": null}']))
    (folder / "half.jsonl").write_text("\n".join([*lines, r'{"text": "\ud800 x"}']))
    said = [
        {"messages": [{"role": r, "content": f"{r} {i}"} for r in roles]}
        for i in range(60)
        for roles in [("user", "assistant")]
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, said)))
    (folder / "chat.jinja").write_text(
        "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "a.txt").write_text("größer\n\n" * 200, encoding="utf-8")
    (folder / "latin.txt").write_text("größer\n\n" * 200, encoding="latin-1")
    vocab = {"<|endoftext|>": 0, "[UNK]": 1} | {c: i for i, c in enumerate("taleb", 2)}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="[UNK]"))
    (folder / "tokenizer.json").write_text(backend.to_str())
    np.savez(folder / "a.npz", tokens=np.arange(900) % 200)
    return folder


# Option, value, file it is for, and what of the description shows that it was used.
DATA = {
    "source": ("jsonl", "a.jsonl", lambda f: f["splits"]["train"]["documents"] < 60),
    "path": (None, "a.txt", lambda f: f["source"] == "a.txt"),
    "encoding": ("latin-1", "latin.txt", lambda f: "größer" in f["sample"]),
    "tokenizer": ("tokenizer.json", "a.jsonl", lambda f: f["vocab_size"] == 7),
    "bpe_vocab_size": (260, "a.txt", lambda f: f["tokenizer"] == "bpe"),
    "text_key": ("meta.body", "a.jsonl", lambda f: "body" in f["sample"]),
    "bad_records": ("skip", "holes.jsonl", lambda f: f["bad_records"] == 1),
    "chat_template": ("chat.jinja", "chats.jsonl", lambda f: "[user]" in f["sample"]),
    "seq_len": (16, "a.txt", lambda f: f["splits"]["train"]["examples"] > 50),
    "batch_size": (2, "a.txt", lambda f: f["splits"]["train"]["batches"] > 3),
    "pack": ("documents", "a.jsonl", lambda f: f["splits"]["train"]["examples"] == 4),
    "bad_utf8": ("skip", "half.jsonl", lambda f: f["bad_utf8"]["skipped"] == 1),
    "valid_fraction": (0.3, "a.txt", lambda f: f["splits"]["valid"]["bytes"] > 400),
    "test_fraction": (0.3, "a.txt", lambda f: f["splits"]["test"]["bytes"] > 400),
    "max_bytes": (900, "a.txt", lambda f: f["splits"]["train"]["bytes"] < 900),
    "cache_dir": ("own", "a.txt", lambda f: f["folder"].startswith("own/")),
    "allow_changed": (None, "a.txt", lambda f: f["source"] == "a.txt"),
    "seed": (5, "a.txt", lambda f: f["splits"]["train"]["examples"] > 0),
}
# Below, and of mixtures data/test_mix.py.
ELSEWHERE = {"data_dir", "num_examples", "min_length", "max_length", "pairs", "mix"}


def test_no_option_of_the_data_is_forgotten():
    assert set(DATA) | ELSEWHERE == {f.name for f in dataclasses.fields(DataConfig)}


@pytest.mark.parametrize("name", DATA)
def test_each_option_of_data_is_used(files, capsys, name, monkeypatch):
    monkeypatch.chdir(files)
    value, file, used = DATA[name]
    args = ["data", "tiny", "--data.path", file, "--model.max-seq-len", "192", "--json"]
    if name != "cache_dir":
        args += ["--data.cache-dir", "cache"]
    if name == "bpe_vocab_size":
        args += ["--data.tokenizer", "bpe", "--model.vocab-size", "300"]
    if name not in ("path",):
        args += [f"--data.{name.replace('_', '-')}", *([value] if value else [])]
    assert used(json.loads(run(capsys, *args)))


def test_the_options_of_generated_tasks_are_used(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    args = ["data", "tiny", "--model.kind", "encoder", "--data.source", "listops",
            "--model.max-seq-len", "64", "--data.num-examples", "64",
            "--data.min-length", "5", "--data.max-length", "40", "--json",
            "--data.cache-dir", "cache"]  # fmt: skip
    found = json.loads(run(capsys, *args))
    assert found["splits"]["train"]["documents"] == 64
    args = ["data", "tiny", "--data.source", "recall", "--data.seq-len", "48",
            "--data.num-examples", "32", "--data.pairs", "5", "--json",
            "--data.cache-dir", "cache"]  # fmt: skip
    found = json.loads(run(capsys, *args))
    assert found["splits"]["train"]["scored"] == 32 * 5
    said = refusal(capsys, "data", "tiny", "--data.num-examples", "64")
    assert "data.num_examples is 64, but data.source stdlib" in said
    said = refusal(
        capsys, "data", "tiny", "--data.path", "a.txt", "--data.data-dir", "."
    )
    assert "data.data_dir is '.', but data.source text" in said


def test_what_a_source_ignores_is_refused_even_at_its_default(files, capsys):
    said = refusal(capsys, "data", "digits-vit", "--data.path", "/nonexistent.npz")
    assert said == (
        "uoe: data.path is '/nonexistent.npz', but data.source digits for a vision "
        "model doesn't read it; set --data.source auto to read it, or leave it out"
    )
    said = refusal(capsys, "data", "digits-vit", "--data.tokenizer", "byte")
    assert "data.tokenizer is 'byte', but data.source digits" in said
    run_dir = ["--run-dir", files / "never"]
    said = refusal(capsys, "train", "digits-vit", "--data.pack", "stream", *run_dir)
    assert "data.pack is 'stream'" in said and not (files / "never").exists()


def test_a_table_shows_problems_and_what_a_tokenizer_loses(files, capsys, monkeypatch):
    monkeypatch.chdir(files)
    args = ["data", "tiny", "--data.path", "a.jsonl", "--data.cache-dir", "cache",
            "--data.tokenizer", "tokenizer.json", "--data.seq-len", "16"]  # fmt: skip
    out = run(capsys, *args)
    assert "note: the tokenizer doesn't know" in out and "% of train" in out


ESC = "\x1b[31mred\x07 \x9b2J \u202eevil \r\x00"


@pytest.mark.parametrize("raw", [False, True])
def test_control_characters_are_shown_unless_asked_for(
    tmp_path, capfdbinary, raw, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(ESC[:-1] * 200, encoding="utf-8")
    args = ["data", "tiny", "--data.path", "a.txt", "--data.cache-dir", "cache"]
    assert main([*args, *(["--raw"] if raw else [])]) == 0
    out = capfdbinary.readouterr().out
    assert (b"\x1b[31mred\x07" in out) == raw
    assert (rb"\x1b[31mred\x07 \x9b2J \u202eevil \x0d" in out) != raw


def test_names_with_control_characters_are_shown(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "a\x1b[31m.txt"
    (tmp_path / name).write_text("words and more\n\n" * 200)
    args = ["data", "tiny", "--data.path", name, "--data.cache-dir", "cache"]
    assert main(args) == 0
    captured = capsys.readouterr()
    assert "\x1b" not in captured.out + captured.err
    assert r"a\x1b[31m.txt" in captured.out
    said = refusal(capsys, *args[:3], "b\x1b[31m.txt")
    assert "\x1b" not in said


def test_generate_shows_or_sends_what_the_model_makes(union_run, capfdbinary):
    args = ["generate", str(union_run), "--prompt", "def \x1b[31m", "--temperature",
            "3", "--max-new-tokens", "16"]  # fmt: skip
    assert main(args) == 0
    shown = capfdbinary.readouterr().out
    assert main([*args, "--raw"]) == 0
    sent = capfdbinary.readouterr().out
    assert shown.startswith(rb"def \x1b[31m") and sent.startswith(b"def \x1b[31m")
    steering = {*range(9), *range(11, 32), 127}
    assert not steering & set(shown) and shown.decode()
    assert steering & set(sent)


def test_each_option_of_generate(union_run, capfdbinary):
    tried = {
        "prompt": [],
        "max_new_tokens": [],
        "temperature": ["--temperature", "0.5"],
        "top_k": ["--top-k", "3"],
        "top_p": ["--top-p", "0.5"],
        "greedy": ["--greedy"],
        "seed": ["--seed", "7"],
        "raw": ["--raw"],
        "weights": ["--weights", "int8"],
        "run": [],
    }
    # interop/test_chat.py, compress/test_anytime.py
    elsewhere = {"prompts", "chat", "batch_size", "cut"}
    options = {f.name for f in dataclasses.fields(GenerateOptions)}
    assert set(tried) == options - elsewhere
    base = ["generate", union_run, "--prompt", "def", "--max-new-tokens", "4"]
    for more in tried.values():
        assert main([str(a) for a in [*base, *more]]) == 0
        assert capfdbinary.readouterr().out.startswith(b"def")


def test_each_option_of_eval(union_run, text_file, tmp_path, capsys):
    run_line = ["eval", union_run, "--json", "--max-batches", "1"]
    plain = json.loads(run(capsys, *run_line))
    assert plain["data"] == "code.txt" and plain["split"] == "valid"
    assert json.loads(run(capsys, *run_line, "--split", "test"))["split"] == "test"
    assert "step" in json.loads(run(capsys, *run_line, "--checkpoint", "best"))
    other = tmp_path / "other.jsonl"
    other.write_text(
        "\n".join(json.dumps({"body": f"words {i} and more words"}) for i in range(99))
    )
    tried = {
        "source": ["jsonl"],
        "path": [other],
        "text_key": ["body"],
        "bad_records": ["skip"],
        "bad_utf8": ["replace"],
        "encoding": ["utf-8"],
        "valid_fraction": ["0.4"],
        "test_fraction": ["0.1"],
        "max_bytes": ["2000"],
        "seq_len": ["16"],
        "batch_size": ["16"],
        "pack": ["documents"],
        "seed": ["3"],
        "tokenizer": ["byte"],
        "cache_dir": [tmp_path / "cache"],
        "allow_changed": [],
    }
    named = [f.name for f in dataclasses.fields(DataConfig)]
    elsewhere = ELSEWHERE | {"bpe_vocab_size", "chat_template"}  # of messages, above
    assert set(tried) | elsewhere == set(named)
    options = [
        word for name, values in tried.items()
        for word in (f"--data.{name.replace('_', '-')}", *values)
    ]  # fmt: skip
    found = json.loads(run(capsys, *run_line, *options))
    assert found["data"] == "other.jsonl" and found["loss"] != plain["loss"]
    # What the run was trained with can't be changed, what isn't read can't be given.
    said = refusal(capsys, "eval", union_run, "--data.bpe-vocab-size", "300")
    assert "data.bpe_vocab_size is 300" in said
    said = refusal(capsys, "eval", union_run, "--data.tokenizer", "bpe",
                   "--data.bpe-vocab-size", "256")  # fmt: skip
    assert "at least 257" in said
    said = refusal(capsys, "eval", "--max-batches", "1")
    assert "no run is named" in said
    hints = typing.get_type_hints(EvalOptions, include_extras=True)
    known = {"run", "data", "split", "checkpoint", "max_batches", "json"}
    assert set(hints) == known | {"cut"}  # cut: test_compress.py
