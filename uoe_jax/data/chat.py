"""Conversations as a model reads them: its chat template, and whose turn each part is.

Templates are Jinja programs that came with the model, so they run in a sandbox. What a
person wrote stays text: names of special tokens in it are no special tokens.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.data.tokenize import Tokenizer
from uoe_jax.errors import (
    ConfigError,
    DataError,
    extra_packages,
    first_line,
    shown,
)
from uoe_jax.files import format_json, read_json, write_atomically

Message = Mapping[str, str]  # role and content

KEPT_FOLDER = "imported"  # of a run: the small files that came with its model
CHAT = "chat.json"  # of prepared data and of a run: the template it was written with
_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_FIELDS = ("text", "bos", "eos")
# `chatml` as a program, for libraries that know templates alone.
_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{{ message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_MARK = "\ue000{}\ue001"  # stands for a special token's name in what a person wrote


class Part(NamedTuple):
    """A piece of a document, whether a model is to learn to say it, and what it is."""

    text: str
    trained: bool
    special: bool = False  # the name of a special token


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a model writes a conversation, and the token that ends its turn."""

    text: str  # a Jinja program; none: as `chatml` writes it
    bos: str = ""
    eos: str = ""

    def render(
        self, messages: Sequence[Message], *, begin: bool = True, dated: bool = True
    ) -> str:
        """Return a conversation as one text.

        Args:
          messages: the turns.
          begin: begin the model's turn after them.
          dated: tell a template that asks what day it is.

        Raises ConfigError for a conversation that the template refuses, DataError for a
        template that can't run.
        """
        if not self.text:
            return chatml(messages, begin)
        now = lambda form: datetime.now().strftime(form)
        with extra_packages():
            from jinja2 import TemplateError
        try:
            return _compile(self.text).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=begin,
                bos_token=self.bos,
                eos_token=self.eos,
                tools=None,
                raise_exception=_refuse,
                **({"strftime_now": now} if dated else {}),
            )
        except ConfigError:
            raise
        except (TemplateError, ArithmeticError, LookupError, TypeError) as error:
            raise DataError(
                f"the chat template can't be used ({first_line(error)}); give "
                "prompts without it"
            ) from None

    def write_for_others(self, folder: Path, tokenizer: Tokenizer) -> dict[str, Any]:
        """Write it into a folder of a model as transformers reads it; say how to stop.

        A name that is no token of the tokenizer isn't written as one: transformers
        would add it to the vocabulary, past the last row of the weights. Other settings
        of the tokenizer that are there already stay as they are.
        """
        config = _object(folder / _CONFIG)
        config.pop("chat_template", None)  # an older place of the same
        known, end = special_tokens(tokenizer), end_of_turn(tokenizer, self)
        named = {"bos_token": self.bos if self.bos in known else None}
        named["eos_token"] = next(
            (n for n, number in known.items() if number == end), None
        )
        config |= {name: token for name, token in named.items() if token}
        write_atomically(folder / _TEMPLATE, self.text or _CHATML)
        write_atomically(folder / _CONFIG, format_json(config, indent=2) + "\n")
        stop = {} if end is None else {"eos_token_id": end}
        text = text_end(tokenizer, self).decode()
        return stop | ({"stop_strings": [text]} if text else {})

    def to_json(self) -> str:
        """Return it as the text of a chat.json."""
        return format_json(asdict(self), indent=2) + "\n"


CHATML = ChatTemplate(text="", eos="<|im_end|>")


def chatml(messages: Sequence[Message], begin: bool) -> str:
    """Return a conversation in the plain form that most models know."""
    turns = [
        f"<|im_start|>{message['role']}\n{message['content']}<|im_end|>\n"
        for message in messages
    ]
    return "".join(turns) + "<|im_start|>assistant\n" * begin


@functools.lru_cache(8)
def _compile(text: str) -> Any:
    """Return a template as a program, in a sandbox."""
    with extra_packages():
        from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols"],
    )
    return environment.from_string(text)


def _refuse(text: str) -> None:
    raise ConfigError(f"the chat template refuses the messages: {text}")


def read_template(place: Path) -> ChatTemplate | None:
    """Return the chat template of a run, a model's folder or a Jinja file, if any.

    Of a run the one it was trained with, or the one that came with its model. Raises
    DataError for files that can't be read.
    """
    try:
        if place.is_file():
            return _of_file(place)
        if (place / CHAT).is_file():
            return _from_json(read_json(place / CHAT), place / CHAT)
        for folder in (place / KEPT_FOLDER, place):
            if found := _of_model(folder):
                return found
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: the chat template can't be read ({error})") from None
    return None


def configured_template(name: str | None) -> ChatTemplate | None:
    """Return the template that `data.chat_template` names.

    Raises DataError where there is none.
    """
    if name is None:
        return None
    found = read_template(place := Path(name).expanduser())
    if found is None:
        raise DataError(
            f"data.chat_template {place} has no chat template; give a run or a model's "
            "folder that has one, or a Jinja file"
        )
    return found


def _from_json(found: Any, file: Path) -> ChatTemplate:
    if not (
        isinstance(found, dict)
        and set(found) == set(_FIELDS)
        and all(isinstance(value, str) for value in found.values())
    ):
        raise DataError(f"{file} is damaged; restore the file")
    return ChatTemplate(**found)


def _of_file(file: Path) -> ChatTemplate | None:
    """Return a Jinja file as a template, or the one that a JSON file of a model has.

    Raises DataError for a program that writes an end of turn which nothing names.
    """
    if file.name == CHAT:
        return _from_json(read_json(file), file)
    if file.suffix == ".json":
        config = _object(file)
        text = _choose(config.get("chat_template"))
    else:
        config, text = _object(file.parent / _CONFIG), file.read_text("utf-8")
    if not text:
        return None
    found = _made(text, config)
    if "eos_token" in text and not found.eos:
        raise DataError(
            f"{file} writes eos_token, which nothing names here; put the model's "
            f"{_CONFIG} beside it, or write the token itself"
        )
    return found


def _object(file: Path) -> dict[str, Any]:
    """Return the object of a JSON file; an empty one where there is none."""
    found = read_json(file) if file.is_file() else {}
    return found if isinstance(found, dict) else {}


def _of_model(folder: Path) -> ChatTemplate | None:
    """Return the template among the files that came with a model."""
    config = _object(folder / _CONFIG)
    file = folder / _TEMPLATE
    text = file.read_text("utf-8") if file.is_file() else None
    text = text or _choose(config.get("chat_template"))
    if not text:
        return None
    return _made(text, config)


def find_template(run_dir: Path) -> ChatTemplate:
    """Return the chat template of a run.

    Raises ConfigError where there is none, DataError for files that can't be read.
    """
    found = read_template(Path(run_dir))
    if found is None:
        raise ConfigError(
            f"{run_dir} has no chat template: no model that chats was imported, and it "
            "wasn't trained on messages; give --prompt without --chat"
        )
    return found


def _choose(given: Any) -> str | None:
    """Return the template, the one named default of several."""
    if isinstance(given, list):
        named = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


def _made(text: str, config: Mapping[str, Any]) -> ChatTemplate:
    """Return a template with the tokens that a tokenizer's config names."""
    return ChatTemplate(text=text, bos=_token(config, "bos"), eos=_token(config, "eos"))


def _token(config: Mapping[str, Any], name: str) -> str:
    token = config.get(f"{name}_token")
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else ""


def check_messages(messages: Any) -> list[Message]:
    """Return a conversation; raise ConfigError for what is none."""
    whole = isinstance(messages, list) and len(messages) > 0
    if not whole:
        raise ConfigError(
            f"messages is {shown(messages)}; give a list of objects with role and "
            "content"
        )
    for message in messages:
        texts = isinstance(message, dict) and {
            type(message.get(key)) for key in ("role", "content")
        }
        if texts != {str}:
            raise ConfigError(
                f"a message is {shown(message)}; give an object with role (system, "
                "user or assistant) and content, both texts"
            )
    return messages


def answer_parts(
    messages: Sequence[Message], template: ChatTemplate, special: Sequence[str]
) -> tuple[Part, ...]:
    """Return a conversation's pieces; the assistant's turns are to be learned.

    A turn is what the template adds for it after the turn was begun, so what ends it is
    learned too. Raises DataError where no turn is the assistant's, and for a template
    that writes a turn in another way once more turns follow.
    """
    names = _longest_first(special)
    hidden = [_hide(message, names) for message in messages]
    render = functools.partial(template.render, dated=False)
    whole = render(hidden, begin=False)
    cuts, learned = [0], [False]
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        begun = render(hidden[:number], begin=True)
        ended = render(hidden[: number + 1], begin=False)
        if not (whole.startswith(ended) and ended.startswith(begun)):
            raise DataError(
                f"the chat template writes turn {number + 1} in another way than it "
                "begins one, so its tokens can't be told from the prompt's; give "
                "prompt and completion instead"
            )
        if ended == begun:
            raise DataError(
                f"the chat template writes nothing for turn {number + 1}, so there is "
                "nothing to learn of it; give another template"
            )
        cuts += [len(begun), len(ended)]
        learned += [True, False]
    if len(cuts) == 1:
        raise DataError("no message is the assistant's, so there is nothing to learn")
    pieces = (whole[a:b] for a, b in zip(cuts, [*cuts[1:], len(whole)], strict=True))
    return tuple(
        Part(_reveal(text, names), trained, text in names)
        for piece, trained in zip(pieces, learned, strict=True)
        for text in _split(piece, names)
    )


def encode_chat(
    tokenizer: Tokenizer, template: ChatTemplate, messages: Sequence[Message]
) -> Int[np.ndarray, " T"]:
    """Return the ids of a conversation, the template's special tokens as such."""
    return encode_written(tokenizer, write_chat(tokenizer, template, messages))


def write_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Sequence[Message],
    *,
    begin: bool = True,
) -> str:
    """Return a conversation as one text for `encode_written`.

    Marks stand for names of special tokens that a person wrote. Without `begin` the
    last message isn't ended, so that a model goes on with it.
    """
    names = _longest_first(list(special_tokens(tokenizer)))
    hidden = [_hide(message, names) for message in messages]
    text = template.render(hidden, begin=begin)
    if begin:
        return text
    last = hidden[-1]["content"].strip()
    place = text.rfind(last)
    if place < 0:
        raise DataError(
            "the chat template rewrites its last message, which can't be gone on with"
        )
    return text[: place + len(last)]


def encode_written(tokenizer: Tokenizer, text: str) -> Int[np.ndarray, " T"]:
    """Return the ids of a text in which special tokens stand by their names."""
    special = special_tokens(tokenizer)
    names = _longest_first(list(special))
    ids = [
        np.array([special[part]], np.int32)
        if part in special
        else tokenizer.encode(_reveal(part, names))
        for part in _split(text, names)
    ]
    return np.concatenate([np.zeros(0, np.int32), *ids])


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids of a tokenizer's tokens that stand for no text, by name."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return {}
    return tokenizer.special_tokens()


def end_of_turn(tokenizer: Tokenizer, template: ChatTemplate) -> int | None:
    """Return the token after which the model's turn is over; None for an unknown."""
    return special_tokens(tokenizer).get(template.eos, tokenizer.end_of_document)


def cut_turn(tokenizer: Tokenizer, template: ChatTemplate, reply: bytes) -> bytes:
    """Return a reply up to its end, where that is text and no token of its own."""
    end = text_end(tokenizer, template)
    return reply.partition(end)[0] if end else reply


def text_end(tokenizer: Tokenizer, template: ChatTemplate) -> bytes:
    """Return the text that ends a turn; empty where a token of its own does."""
    has_token = template.eos in special_tokens(tokenizer)
    return b"" if has_token or not template.eos else template.eos.encode()


def _longest_first(names: Sequence[str]) -> list[str]:
    return sorted(names, key=lambda name: -len(name))


def _split(text: str, names: Sequence[str]) -> Iterator[str]:
    """Yield a text's pieces between special tokens, and these."""
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]
    yield from (part for part in parts if part)


def _hide(value: Any, names: Sequence[str]) -> Any:
    """Return what a person wrote with marks for names, in all that a message holds."""
    if isinstance(value, Mapping):
        return {key: _hide(inner, names) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_hide(inner, names) for inner in value]
    if isinstance(value, str):
        for number, name in enumerate(names):
            value = value.replace(name, _MARK.format(number))
    return value


def _reveal(text: str, names: Sequence[str]) -> str:
    for number, name in enumerate(names):
        text = text.replace(_MARK.format(number), name)
    return text
