"""Any decoder run as a model of EleutherAI's lm-evaluation-harness (`lm-eval`).

    lm = run_lm("runs/mine")
    lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])
    lm_eval.simple_evaluate(model=lm, tasks=["gsm8k"], apply_chat_template=True)

What is computed stands in `Scorer`, which needs no other package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from uoe_jax.data.chat import (
    ChatTemplate,
    Message,
    encode_written,
    end_of_turn,
    read_template,
    special_tokens,
    write_chat,
)
from uoe_jax.data.record import run_tokenizer
from uoe_jax.errors import ConfigError, extra_packages, nearest, shown
from uoe_jax.files import format_json
from uoe_jax.generate import Sampling, generate_all, need_decoder
from uoe_jax.model import Decoder
from uoe_jax.runs.find import find_run
from uoe_jax.runs.load import LoadedRun, load_run
from uoe_jax.train.loss import output_layer, token_scores

_CHUNK = 1024  # tokens whose logits are alive at once
_NEW_TOKENS = 256  # where a request doesn't say, at most half of what a model takes
# How a request says it: the harness' names, the first given one counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SETTINGS = ("until", "do_sample", "temperature", "top_k", "top_p", *_LENGTHS)
# What others take and this doesn't, at the value that changes nothing.
_NEUTRAL: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "min_p": 0,
    "early_stopping": False,
    "use_cache": True,
}


class Row(NamedTuple):
    """Tokens that a model reads, what follows each, and how many of the last count."""

    inputs: Int[np.ndarray, " T"]
    targets: Int[np.ndarray, " T"]
    scored: int


class Scorer:
    """Log-likelihoods and continuations of a run, as the harness defines them.

    `batch_size` rows of about the same length are computed at once. Raises ConfigError
    for a run that isn't a decoder's.
    """

    def __init__(self, run: LoadedRun, *, batch_size: int = 8):
        if batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}; use at least 1")
        self.model, self.folder = need_decoder(run), run.folder
        self.length = run.config.model.max_seq_len
        self.tokenizer = run_tokenizer(run.folder, run.config)
        # Once a conversation was written, contexts are such texts.
        self.chat: ChatTemplate | None = None
        self.batch_size = batch_size
        end = getattr(self.tokenizer, "end_of_document", None)
        started = self.encode("")
        # Before a text's first token: what a prompt begins with, or the end of another.
        self.prefix = int(started[0]) if len(started) else 10 if end is None else end
        self.end = end

    def template(self) -> ChatTemplate:
        """Return the run's chat template; raise ConfigError without one."""
        found = self.chat or read_template(self.folder)
        if found is None:
            raise ConfigError(
                f"{self.folder} has no chat template; leave apply_chat_template out"
            )
        return found

    def write_chat(self, messages: Sequence[Message], *, begin: bool = True) -> str:
        """Return a conversation as the context of a request.

        `begin` begins the model's turn; else it goes on with the last message.
        """
        self.chat = self.template()
        return write_chat(self.tokenizer, self.chat, messages, begin=begin)

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return the ids of a text as a prompt begins with them."""
        if self.chat is not None:
            return encode_written(self.tokenizer, text)
        encode = getattr(self.tokenizer, "encode_prompt", self.tokenizer.encode)
        return np.asarray(encode(text), np.int32)

    def loglikelihood(
        self, requests: Sequence[tuple[str, str]]
    ) -> list[tuple[float, bool]]:
        """Return of each (context, continuation) the log-probability in nats of the
        continuation, and whether greedy decoding would make it."""
        rows = [self.split(context, text) for context, text in requests]
        return [(-float(nll.sum()), bool(right.all())) for nll, right in self.run(rows)]

    def loglikelihood_rolling(self, texts: Sequence[str]) -> list[float]:
        """Return the log-probability of whole texts, in windows of the most context."""
        rows, owners = [], []
        for owner, text in enumerate(texts):
            tokens = np.asarray(self.tokenizer.encode(text), np.int32)
            for row in rolling_rows(tokens, self.prefix, self.length):
                rows.append(row)
                owners.append(owner)
        found = [0.0] * len(texts)
        for owner, (nll, _) in zip(owners, self.run(rows), strict=True):
            found[owner] -= float(nll.sum())
        return found

    def generate_until(
        self, requests: Sequence[tuple[str, Mapping[str, Any]]]
    ) -> list[str]:
        """Return of each (context, settings) what follows, up to a text of `until`.

        Greedy unless `do_sample`; long contexts lose their beginning. A conversation
        ends with the model's turn, too. Raises ConfigError for settings of another kind
        than are taken, before anything is computed.
        """
        for _, settings in requests:
            check_settings(settings)
        groups: dict[str, list[int]] = {}
        for number, (_, settings) in enumerate(requests):
            key = format_json(dict(settings), sort_keys=True)
            groups.setdefault(key, []).append(number)
        found = [""] * len(requests)
        for numbers in groups.values():
            texts = [requests[number][0] for number in numbers]
            made = self._generate(texts, requests[numbers[0]][1])
            for number, text in zip(numbers, made, strict=True):
                found[number] = text
        return found

    def _generate(
        self, contexts: Sequence[str], settings: Mapping[str, Any]
    ) -> list[str]:
        """Return what follows contexts that are gone on with in the same way."""
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else list(until)
        asked = [settings[n] for n in _LENGTHS if settings.get(n) is not None]
        new = int(asked[0]) if asked else min(_NEW_TOKENS, self.length // 2)
        room = self.length - new
        if room < 1:
            raise ConfigError(
                f"max_gen_toks is {new} and max_seq_len {self.length}; leave room for "
                "a prompt"
            )
        start = np.array([self.prefix], np.int32)
        end = self.end
        if self.chat is not None:
            end = end_of_turn(self.tokenizer, self.chat)
            if self.chat.eos not in special_tokens(self.tokenizer):
                until.append(self.chat.eos)  # which is text here
        prompts = [self.encode(context)[-room:] for context in contexts]
        prompts = [prompt if len(prompt) else start for prompt in prompts]
        made = generate_all(
            self.model,
            prompts,
            new,
            _sampling(settings),
            batch_size=self.batch_size,
            eos=end,
        )
        texts = [self.tokenizer.decode_bytes(ids).decode("utf-8", "replace")
                 for ids in made]  # fmt: skip
        return [cut_at(text, until) for text in texts]

    def split(self, context: str, continuation: str) -> Row:
        """Return the row that scores a continuation.

        Blanks at a context's end belong to the continuation: that is how tokens are cut
        in a text. A long context loses its beginning.
        """
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        if context:
            whole = self.encode(context + continuation)
            start = len(self.encode(context))
        else:
            tokens = np.asarray(self.tokenizer.encode(continuation), np.int32)
            whole, start = np.concatenate([[self.prefix], tokens]).astype(np.int32), 1
        scored = len(whole) - start
        if not 0 < scored <= self.length:
            raise ConfigError(
                f"the continuation has {scored} tokens; a model of max_seq_len "
                f"{self.length} scores 1 to {self.length}"
            )
        whole = whole[-(self.length + 1) :]
        return Row(whole[:-1], whole[1:], scored)

    def run(
        self, rows: Sequence[Row]
    ) -> list[tuple[Float[np.ndarray, " _"], Bool[np.ndarray, " _"]]]:
        """Return the loss of each row's scored tokens, and which are the argmax."""
        found: list[Any] = [None] * len(rows)
        order = sorted(range(len(rows)), key=lambda n: -len(rows[n].inputs))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            width = _padded(len(rows[chosen[0]].inputs), self.length)
            shape = (self.batch_size, width)
            tokens, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
            for place, number in enumerate(chosen):
                size = len(rows[number].inputs)
                tokens[place, :size] = rows[number].inputs
                targets[place, :size] = rows[number].targets
            nll, right = map(np.asarray, _score(self.model, tokens, targets))
            for place, number in enumerate(chosen):
                size, scored = len(rows[number].inputs), rows[number].scored
                part = slice(size - scored, size)
                found[number] = nll[place, part].astype(np.float64), right[place, part]
        return found


def rolling_rows(
    tokens: Int[np.ndarray, " T"], prefix: int, length: int
) -> Iterator[Row]:
    """Yield rows that score every token once, the last with as much context as fits."""
    first = min(length, len(tokens))
    if not first:
        return
    inputs = np.concatenate([[prefix], tokens[: first - 1]]).astype(np.int32)
    yield Row(inputs, tokens[:first], first)
    for done in range(first, len(tokens), length):
        end = min(done + length, len(tokens))
        start = end - length
        yield Row(tokens[start - 1 : end - 1], tokens[start:end], end - done)


def cut_at(text: str, until: Sequence[str]) -> str:
    """Return a text up to the first of several others."""
    ends = [text.find(stop) for stop in until if stop]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise ConfigError for a setting that isn't known or can't be.

    Those of other models may stand there with the value that changes nothing.
    """
    for name, value in settings.items():
        if name in _SETTINGS or value is None:
            continue
        if name in _NEUTRAL and value == _NEUTRAL[name]:
            continue
        fix = nearest(name, _SETTINGS)
        if name in _NEUTRAL:
            fix = f"here it is {_NEUTRAL[name]}, or left out"
        raise ConfigError(
            f"the generation setting {name} is {shown(value)}, which isn't taken; {fix}"
        )
    until = settings.get("until") or []
    listed = isinstance(until, (str, list, tuple))
    if not listed or not all(isinstance(text, str) for text in until):
        raise ConfigError(f"until is {shown(until)}; give a text or a list of texts")
    for name in _LENGTHS:
        value = settings.get(name)
        if value is not None and (type(value) is not int or value < 1):
            raise ConfigError(f"{name} is {shown(value)}; give a whole number above 0")
    _sampling(settings)


def _sampling(settings: Mapping[str, Any]) -> Sampling:
    """Return how a request's tokens are drawn; ConfigError for what can't be."""
    drawn, temperature = settings.get("do_sample"), settings.get("temperature")
    if drawn not in (None, True, False):
        raise ConfigError(f"do_sample is {shown(drawn)}; give true or false")
    if temperature is None:  # as it is where requests are drawn without one
        temperature = 1.0 if drawn else 0.0
    if type(temperature) not in (int, float):
        raise ConfigError(f"temperature is {shown(temperature)}; give a number")
    if drawn is False or temperature == 0:
        return Sampling(greedy=True)
    return Sampling(
        temperature=temperature,
        top_k=settings.get("top_k"),
        top_p=settings.get("top_p"),
    )


def _padded(length: int, most: int) -> int:
    """Return the width of a batch: a power of two from 32 on, so few compile."""
    return min(max(32, 1 << (length - 1).bit_length()), most)


@jax.jit
def _score(
    model: Decoder, tokens: Int[Array, "B T"], targets: Int[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Return every target's negative log-likelihood, and whether it is the argmax."""
    x, _ = model.hidden(tokens)
    flat = x.reshape(-1, x.shape[-1])
    scores = token_scores(flat, *output_layer(model), targets.reshape(-1), _CHUNK)
    return scores.nll.reshape(tokens.shape), scores.correct.reshape(tokens.shape)


def run_lm(run: str | Path | LoadedRun, *, batch_size: int = 8) -> Any:
    """Return a run as an `lm_eval.api.model.LM`; needs the extra `lm-eval`.

    Raises MissingExtra without the package, and what `Scorer` and `load_run` raise.
    """
    with extra_packages():
        from lm_eval.api.model import LM  # pyrefly: ignore[missing-import]

    found = run if isinstance(run, LoadedRun) else load_run(find_run(str(run)))
    scorer = Scorer(found, batch_size=batch_size)
    args = lambda requests: [request.args for request in requests]

    class RunLM(LM):
        """A run of uoe_jax."""

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return scorer.loglikelihood(args(requests))

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return scorer.loglikelihood_rolling([text for (text,) in args(requests)])

        def generate_until(self, requests: Any) -> list[str]:
            return scorer.generate_until(args(requests))

        @property
        def tokenizer_name(self) -> str:
            return scorer.tokenizer.name

        def apply_chat_template(
            self, chat_history: Any, add_generation_prompt: bool = True
        ) -> str:
            return scorer.write_chat(chat_history, begin=add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str:
            if isinstance(chat_template, str):
                raise ConfigError(
                    f"apply_chat_template is {chat_template!r}, but a run has one "
                    "template; give True"
                )
            return (scorer.template().text or "ChatML") if chat_template else ""

    return RunLM()
