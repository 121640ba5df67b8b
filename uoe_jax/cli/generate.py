"""`uoe generate`: text after a prompt, after many, or as the answer to a message."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from uoe_jax.cli.fields import part_of
from uoe_jax.cli.notes import tell_loading
from uoe_jax.cli.parse import parse
from uoe_jax.config import ModelConfig, Share
from uoe_jax.errors import ConfigError, DataError, shown
from uoe_jax.escape import escape
from uoe_jax.fields import NotNegative, Seed
from uoe_jax.files import format_json, local_path, parse_json
from uoe_jax.generate.sampling import TEMPERATURE, Sampling
from uoe_jax.runs.find import find_run

if TYPE_CHECKING:  # which imports jax
    from uoe_jax.runs.load import LoadedRun


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Sampling):
    """Sample text from a run, after a prompt or after each of a file."""

    run: Positional[Annotated[str, arg(metavar="RUN")]]  # or runs/RUN
    prompt: str | None = None  # text to go on with
    # A line of text each, or JSON lines with prompt, or messages for --chat; prints
    # JSON lines, each the line with its completion.
    prompts: Path | None = None
    chat: bool = False  # what is given is said to an imported model that chats
    batch_size: int = 8  # rows of --prompts made at once
    max_new_tokens: int = 128  # made after the prompt
    temperature: NotNegative = TEMPERATURE  # 0: the likeliest; 1: as the model has it
    seed: Seed = 0  # the same one samples the same text
    # What new tokens are multiplied with: weights as the model computes, or of 8 bits.
    weights: Literal["compute", "int8"] = "compute"
    cut: Share | None = None  # open a run of compress --anytime without this share
    raw: bool = False  # control characters and broken UTF-8 as they are, not escaped


def generate(args: list[str]) -> int:
    """Print the prompt and its continuation, or each line of a file with its own."""
    options = parse(GenerateOptions, args, "generate")
    records = _read_request(options)
    folder = find_run(options.run)
    tell_loading(folder)

    from uoe_jax.cli.device import prepare

    prepare()
    if options.prompts is None:
        show(stream(folder, records[0]["prompt"], options), raw=options.raw)
        return 0
    for record, text in complete(folder, records, options):
        completion = {"completion": text.decode("utf-8", "replace")}
        print(format_json({**record, **completion}), flush=True)
    return 0


def show(pieces: Iterator[bytes], *, raw: bool) -> None:
    """Write a text as it comes: escaped, or as the bytes that the model makes."""
    sys.stdout.flush()
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for piece in pieces:
        if raw:
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
        else:
            print(escape(decoder.decode(piece)), end="", flush=True)
    if raw:
        sys.stdout.buffer.write(b"\n")
        sys.stdout.buffer.flush()
    else:
        print(escape(decoder.decode(b"", final=True)), flush=True)


def _read_request(options: GenerateOptions) -> list[dict[str, Any]]:
    """Return what is to be gone on with; raise ConfigError or DataError for nothing."""
    if (options.prompt is None) == (options.prompts is None):
        both = "both are given" if options.prompts is not None else "neither is given"
        raise ConfigError(f"give --prompt TEXT or --prompts FILE; {both}")
    if options.prompts is None:
        if not options.prompt:
            raise ConfigError("--prompt is empty; give at least one character")
        return [{"prompt": options.prompt}]
    if options.raw:
        raise ConfigError("--raw is for --prompt; --prompts prints JSON lines")
    if options.batch_size < 1:
        raise ConfigError(f"--batch-size is {options.batch_size}; use at least 1")
    return read_prompts(local_path(options.prompts, "--prompts"))


def read_prompts(file: Path) -> list[dict[str, Any]]:
    """Return a record for each line of a file that isn't blank.

    Lines of .jsonl and .json files are objects with `prompt` or `messages`, those of
    other files are prompts. Raises DataError, the line named, for what can't be one.
    """
    try:
        # Not splitlines: JSON may hold U+2028 and others within a text.
        lines = file.read_text("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"--prompts {file} can't be read ({reason})") from None
    is_json = file.suffix.lower() in (".jsonl", ".json")
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        record = parse_json(line, place) if is_json else {"prompt": line}
        if not isinstance(record, dict) or not ({"prompt", "messages"} & set(record)):
            raise DataError(
                f"{place} is {shown(record)}; give an object with prompt or messages"
            )
        prompt = record.get("prompt", "-")
        if not isinstance(prompt, str) or not prompt:
            raise DataError(
                f"{place} has the prompt {shown(prompt)}; give a text of at least one "
                "character"
            )
        records.append(record)
    if not records:
        raise DataError(f"--prompts {file} has no line with a prompt; give one a line")
    return records


def stream(folder: Path, prompt: str, options: GenerateOptions) -> Iterator[bytes]:
    """Return pieces of a prompt and its continuation, or of the answer to it."""
    from uoe_jax.generate import stream_reply, stream_text

    run, sampling = _open(folder, options), part_of(options, Sampling)
    count, seed = options.max_new_tokens, options.seed
    if not options.chat:
        return stream_text(run, prompt, count, sampling, seed=seed)
    from uoe_jax.data.chat import find_template

    messages = _messages({"prompt": prompt}, 1)
    template = find_template(folder)
    return stream_reply(run, template, messages, count, sampling, seed=seed)


def complete(
    folder: Path, records: list[dict[str, Any]], options: GenerateOptions
) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Return an iterator of records and what a run makes of each one's prompt.

    In their order, each as soon as it is there. What can't be raises here.
    """
    from uoe_jax.data.record import run_tokenizer
    from uoe_jax.generate import generate_each, need_decoder

    run = _open(folder, options)
    model = need_decoder(run)
    tokenizer = run_tokenizer(folder, run.config)
    encoded = _encode_chats if options.chat else _encode_prompts
    prompts, finish, eos = encoded(folder, tokenizer, records, run.config.model)
    made = generate_each(
        model,
        prompts,
        options.max_new_tokens,
        part_of(options, Sampling),
        batch_size=options.batch_size,
        seed=options.seed,
        eos=eos,
    )
    return ((records[n], finish(n, ids)) for n, ids in in_order(made))


def _open(folder: Path, options: GenerateOptions) -> LoadedRun:
    """Return a run whose model decodes as the options say."""
    from uoe_jax.compress.anytime import open_run
    from uoe_jax.compress.products import with_fast_products
    from uoe_jax.generate import need_decoder
    from uoe_jax.model.decoding.step import with_decode_weights

    rows = 1 if options.prompts is None else options.batch_size
    run = with_fast_products(open_run(folder, cut=options.cut), rows)
    model = with_decode_weights(need_decoder(run), options.weights)
    return run._replace(model=model)


def in_order(found: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """Yield numbered things by their numbers from 0, each as soon as it is there."""
    waiting: dict[int, Any] = {}
    following = 0
    for number, thing in found:
        waiting[number] = thing
        while following in waiting:
            yield following, waiting.pop(following)
            following += 1


# The ids of prompts; the text that number n's new ids are; the id that ends a row.
_Encoded = tuple[list[Any], Callable[[int, Any], bytes], int | None]


def _encode_chats(
    folder: Path, tokenizer: Any, records: list[dict[str, Any]], _: ModelConfig
) -> _Encoded:
    from uoe_jax.data.chat import cut_turn, encode_chat, end_of_turn, find_template

    template = find_template(folder)
    prompts = [
        encode_chat(tokenizer, template, _messages(record, number))
        for number, record in enumerate(records, 1)
    ]
    finish = lambda _, ids: cut_turn(tokenizer, template, tokenizer.decode_bytes(ids))
    return prompts, finish, end_of_turn(tokenizer, template)


def _encode_prompts(
    _: Path, tokenizer: Any, records: list[dict[str, Any]], config: ModelConfig
) -> _Encoded:
    from uoe_jax.generate import continuation, encode_prompt

    for number, record in enumerate(records, 1):
        if "prompt" not in record:
            raise ConfigError(f"prompt {number} has messages; give --chat too")
    texts = [record["prompt"] for record in records]
    prompts = [encode_prompt(tokenizer, text, config) for text in texts]

    def finish(number: int, ids: Any) -> bytes:
        whole = continuation(tokenizer, texts[number], prompts[number], ids)
        start = texts[number].encode("utf-8", "replace")
        return whole[len(start) :] if whole.startswith(start) else whole

    return prompts, finish, None


def _messages(record: Mapping[str, Any], number: int) -> Any:
    """Return a record's conversation; a prompt is what the user says."""
    from uoe_jax.data.chat import check_messages

    if "messages" not in record:
        return [{"role": "user", "content": record["prompt"]}]
    try:
        return check_messages(record["messages"])
    except ConfigError as error:
        raise DataError(f"prompt {number}: {error}") from None
