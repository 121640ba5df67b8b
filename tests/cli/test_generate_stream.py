"""Texts as they come: pieces that are whole, ends, and `uoe generate` on the way."""

import io
import json
import sys

import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.cli.generate import in_order, show
from uoe_jax.errors import ConfigError
from uoe_jax.generate import Sampling, generate_each, generate_texts, stream_text
from uoe_jax.generate.pieces import pieces
from uoe_jax.runs.load import load_run


def as_steps(ids):
    return iter([np.array([i]) for i in ids])


def decode_bytes(ids):
    return bytes(np.asarray(ids, np.uint8))


def test_pieces_are_whole_characters_and_all_of_the_text():
    text = "größe 日本 😀 \x1b[31m".encode() + b"\xff\xfe\xe2"
    found = list(pieces(decode_bytes, as_steps(text)))
    assert b"".join(found) == text
    for piece in found[:-4]:
        piece.decode()  # no broken character


def decode_fallback(ids):
    """Tokens of bytes as Llama's tokenizers decode them: to text, whole or replaced."""
    from tokenizers import decoders

    tokens = [f"<0x{i:02X}>" if i > 127 else chr(i) for i in ids]
    decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return decoder.decode(tokens).encode()


def test_a_decoder_that_makes_text_of_single_bytes_is_waited_for():
    text = "größe 日本語 😀".encode()
    found = list(pieces(decode_fallback, as_steps(text)))
    assert b"".join(found) == text
    # What never becomes a character is shown at the end, or once others follow.
    for ids in (b"a \xe6\x97", b"\xe6 b", b"\xf0\x9f\xff c \xc3\xa9 d"):
        said = b"".join(pieces(decode_fallback, as_steps(ids)))
        assert said == decode_fallback(ids)
    # A whole character that a broken one behind it takes back is said already.
    said = b"".join(pieces(decode_fallback, as_steps("日".encode() + b"\xe6 and on")))
    assert said == "日���� and on".encode()


def test_a_text_said_otherwise_goes_on_from_where_it_differs():
    texts = [text.encode() for text in ("", "a b", "a é", "a è c", "a")]
    said = list(pieces(lambda ids: texts[len(ids)], as_steps(range(4))))
    assert said == [text.encode() for text in ("a b", "é", "è c")]


@pytest.mark.parametrize("tail", [b"", b" and more<|", b"<|end|>", b"<|e<|end|>x"])
def test_an_end_is_neither_shown_nor_gone_beyond(tail):
    asked = []

    def steps(text):
        for number in text:
            asked.append(number)
            yield np.array([number])

    said = b"a < b <|en "
    found = list(pieces(decode_bytes, steps(said + tail), end=b"<|end|>"))
    assert b"".join(found) == (said + tail).partition(b"<|end|>")[0]
    assert bytes(asked) == (said + tail).partition(b"x")[0]


def test_an_end_token_ends_a_text_and_is_no_part_of_it():
    assert b"".join(pieces(decode_bytes, as_steps(b"abc.def"), eos=ord("."))) == b"abc"
    assert not list(pieces(decode_bytes, as_steps(b"."), eos=ord(".")))


@pytest.mark.parametrize("raw", [False, True])
def test_a_piece_is_written_before_the_next_is_asked_for(raw, monkeypatch):
    buffer = io.BytesIO()
    out = io.TextIOWrapper(buffer, encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", out)
    seen = []

    def made():
        for piece in (b"one \xc3", b"\xa9 \x1b", b"two"):
            yield piece
            seen.append(buffer.getvalue())

    show(made(), raw=raw)
    whole = b"one \xc3\xa9 \x1btwo\n"
    if raw:
        assert seen == [whole[:5], whole[:8], whole[:11]]
        assert buffer.getvalue() == whole
    else:
        shown = "one é \\x1btwo\n".encode()
        assert seen == [b"one ", shown[:11], shown[:14]]
        assert buffer.getvalue() == shown
    out.detach()


def test_things_come_in_order_as_soon_as_they_can():
    taken = []

    def found():
        for number in (2, 0, 1, 3):
            taken.append(number)
            yield number, str(number)

    ordered = in_order(found())
    assert next(ordered) == (0, "0") and taken == [2, 0]
    assert list(ordered) == [(1, "1"), (2, "2"), (3, "3")]


def test_streamed_texts_are_those_made_at_once(union_run):
    run = load_run(union_run)
    for options in ({"greedy": True}, {"temperature": 1.5, "top_k": 40}):
        for prompt in ("d", "def größe(x):"):
            (whole,) = generate_texts(run, [prompt], 9, seed=5, **options)
            streamed = list(stream_text(run, prompt, 9, seed=5, **options))
            assert b"".join(streamed) == whole
            assert len(streamed) > 1


def test_prompts_of_one_bucket_share_their_programs(union_run):
    from uoe_jax.generate.tokens import _generate

    run = load_run(union_run)
    generate_texts(run, ["x" * 2], 5, greedy=True)
    compiled = _generate._cache_size()
    generate_texts(run, ["y" * 16], 5, greedy=True)
    assert _generate._cache_size() == compiled
    longest = run.config.model.max_seq_len
    with pytest.raises(ConfigError, match=f"more than max_seq_len {longest}"):
        generate_texts(run, ["z" * (longest - 4)], 5, greedy=True)


def test_what_cannot_be_is_refused_before_the_first_text(union_run):
    model = load_run(union_run).model
    longest = model.config.max_seq_len
    prompts = [np.zeros(3, np.int32), np.zeros(longest - 3, np.int32)]
    how = Sampling(greedy=True)
    with pytest.raises(ConfigError, match="prompt 2 has"):
        generate_each(model, prompts, 4, how)


def test_lines_of_a_file_come_in_its_order(union_run, tmp_path, capsys):
    prompts = ["a long line of words", "x", "def f():", "another long line"]
    file = tmp_path / "lines.txt"
    file.write_text("\n".join(prompts))
    args = ["generate", str(union_run), "--prompts", str(file), "--batch-size", "1",
            "--greedy", "--max-new-tokens", "4"]  # fmt: skip
    assert main(args) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [record["prompt"] for record in found] == prompts
    run = load_run(union_run)
    for record in found:
        (whole,) = generate_texts(run, [record["prompt"]], 4, greedy=True)
        assert record["prompt"] + record["completion"] == whole.decode(errors="replace")
