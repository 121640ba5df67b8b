"""A conversation in the form that an imported model was trained on: its chat template.

Templates are Jinja programs that came with the model, so they run in a sandbox. What a
person wrote stays text: names of special tokens in it are no special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from uoe_jax.data.subword import SubwordTokenizer
from uoe_jax.errors import ConfigError, DataError, extra_packages, first_line, shown
from uoe_jax.files import read_json
from uoe_jax.interop.importing import KEPT_FOLDER

Message = Mapping[str, str]  # role and content

_CONFIG, _TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
_MARK = "\ue000{}\ue001"  # stands for a special token's name in what a person wrote


@dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """How a model writes a conversation, and the token that ends its turn."""

    text: str
    bos: str = ""
    eos: str = ""

    def render(self, messages: Sequence[Message]) -> str:
        """Return a conversation as one text, the model's turn begun.

        Raises ConfigError for a conversation that the template refuses, DataError for a
        template that can't run.
        """
        with extra_packages():
            from jinja2 import TemplateError
            from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(text: str) -> None:
            raise ConfigError(f"the chat template refuses the messages: {text}")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
        )
        now = lambda form: datetime.now().strftime(form)
        helpers: dict[str, Any] = {"raise_exception": refuse, "strftime_now": now}
        try:
            return environment.from_string(self.text).render(
                messages=[dict(message) for message in messages],
                add_generation_prompt=True,
                bos_token=self.bos,
                eos_token=self.eos,
                tools=None,
                **helpers,
            )
        except ConfigError:
            raise
        except (TemplateError, ArithmeticError, LookupError, TypeError) as error:
            raise DataError(
                f"the chat template can't be used ({first_line(error)}); give "
                "--prompt without --chat"
            ) from None


def find_template(run_dir: Path) -> ChatTemplate:
    """Return the chat template that came with a run's model.

    Raises ConfigError where none came, DataError for files that can't be read.
    """
    kept = Path(run_dir) / KEPT_FOLDER
    config: Any = {}
    try:
        if (kept / _CONFIG).is_file():
            config = read_json(kept / _CONFIG)
        file = kept / _TEMPLATE
        text = file.read_text("utf-8") if file.is_file() else None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{kept}: the chat template can't be read ({error})") from None
    config = config if isinstance(config, dict) else {}
    text = text or _choose(config.get("chat_template"))
    if not text:
        raise ConfigError(
            f"{run_dir} has no chat template: no model that chats was imported; give "
            "--prompt without --chat"
        )
    return ChatTemplate(text=text, bos=_token(config, "bos"), eos=_token(config, "eos"))


def _choose(given: Any) -> str | None:
    """Return the template, the one named default of several."""
    if isinstance(given, list):
        named = {t.get("name"): t.get("template") for t in given if isinstance(t, dict)}
        given = named.get("default")
    return given if isinstance(given, str) else None


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


def encode_chat(
    tokenizer: Any, template: ChatTemplate, messages: Sequence[Message]
) -> Int[np.ndarray, " T"]:
    """Return the ids of a conversation, the template's special tokens as such."""
    special: dict[str, int] = {}
    if isinstance(tokenizer, SubwordTokenizer):
        special = tokenizer.special_tokens()
    names = sorted(special, key=lambda name: -len(name))
    hidden = [{k: _hide(v, names) for k, v in m.items()} for m in messages]
    text = template.render(hidden)
    if not names:
        return tokenizer.encode(text)
    parts = re.split(f"({'|'.join(map(re.escape, names))})", text)
    ids = [
        np.array([special[part]], np.int32)
        if part in special
        else tokenizer.encode(_reveal(part, names))
        for part in parts
        if part
    ]
    return np.concatenate([np.zeros(0, np.int32), *ids])


def end_of_turn(tokenizer: Any, template: ChatTemplate) -> int | None:
    """Return the token after which the model's turn is over; None for an unknown."""
    if not isinstance(tokenizer, SubwordTokenizer):
        return None
    return tokenizer.special_tokens().get(template.eos, tokenizer.end_of_document)


def _hide(text: str, names: Sequence[str]) -> str:
    for number, name in enumerate(names):
        text = text.replace(name, _MARK.format(number))
    return text


def _reveal(text: str, names: Sequence[str]) -> str:
    for number, name in enumerate(names):
        text = text.replace(_MARK.format(number), name)
    return text
