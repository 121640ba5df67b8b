"""Time decoding: `python benchmarks/bench_decode.py --peers --out FILE`.

Greedy continuations of random prompts by fresh models of `1b`'s size: dense, the union,
and the control, a dense model of the union's FLOPs (half of the heads, half of the
MLP). A token's time is that of all new tokens but the first, which the prompt's pass
gives, over their number; medians. Beside it is the floor that `uoe cost` predicts: the
bytes a token must read at the device's bandwidth. `--peers` adds transformers with a
static cache, in bfloat16; `--weights compute int8` adds weights of eight bits.
"""

from __future__ import annotations

import argparse
import itertools
import os
from typing import Any

import jax
import jax.numpy as jnp

from uoe_jax.bench.profile import kernel_times
from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.timing import first_and_median
from uoe_jax.config import ModelConfig
from uoe_jax.generate import generate
from uoe_jax.hardware.count import cache_bytes, count_active_params, count_params
from uoe_jax.hardware.decoding import short_names
from uoe_jax.model import init_cache, make_model
from uoe_jax.model.decoding.step import prepare, with_decode_weights
from uoe_jax.ops.dispatch import served
from uoe_jax.presets import dense_control, get_preset

BYTES = 2  # of a weight or a number of the cache in bfloat16


def models() -> dict[str, ModelConfig]:
    union = get_preset("1b-union").model
    return {
        "dense": get_preset("1b").model,
        "union": union,
        "half": dense_control(union),
    }


def floor_ms(
    model: ModelConfig, batch: int, context: int, device: str, size: int = BYTES
) -> float | None:
    """Milliseconds of the bytes that a step reads; of many rows all experts'."""
    known = short_names()
    if device not in known:
        return None
    whole = sum(count_params(model).values())
    params = count_active_params(model) if batch == 1 else whole
    weights = params * size
    if not model.tie_embeddings:
        weights -= model.vocab_size * model.d_model * size
    rows = cache_bytes(model, batch, context, "bfloat16")
    return (weights + rows) / known[device].memory_bandwidth * 1e3


def time_ours(model: Any, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    shape = (batch, args.prompt)
    vocab = model.config.vocab_size
    tokens = jax.random.randint(jax.random.key(batch), shape, 0, vocab)
    lengths = jnp.full(batch, args.prompt, jnp.int32)
    run = lambda count: jax.block_until_ready(
        generate(model, tokens, lengths, count, greedy=True)
    )
    first, one = first_and_median(lambda: run(1), args.rounds)
    second, whole = first_and_median(lambda: run(args.new), args.rounds)
    row = summary(batch, one, whole, args) | {"compile_s": [first, second]}
    if args.profile:
        row["kernels"] = profile(model, tokens, lengths, args)
    return row


def summary(
    batch: int, one: float, whole: float, args: argparse.Namespace
) -> dict[str, Any]:
    step = (whole - one) / (args.new - 1)
    return {
        "batch": batch,
        "ms_a_token": step * 1e3,
        "tokens_a_second": batch / step,
        "prompt_s": one,
    }


def profile(
    model: Any, tokens: Any, lengths: Any, args: argparse.Namespace
) -> dict[str, float]:
    """Milliseconds by kernel of one step outside the loop."""
    batch = tokens.shape[0]
    cache = init_cache(model.config, batch, args.prompt + args.new)
    cache = cache._replace(lengths=lengths)
    decoder = prepare(model, batch)
    step = jax.jit(lambda decoder, token, cache: decoder.decode(token, cache)[0])
    return kernel_times(lambda: step(decoder, tokens[:, 0], cache))


def time_peer(batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """transformers' Llama of `1b`'s sizes with a static cache, as its docs use it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    ours = models()["dense"]
    config = LlamaConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.d_model,
        intermediate_size=ours.d_ff,
        num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_heads,
        num_key_value_heads=ours.num_kv_heads,
        max_position_embeddings=ours.max_seq_len,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (batch, args.prompt)
    tokens = torch.randint(
        0, config.vocab_size, shape, device="cuda", generator=generator
    )

    def run(count: int) -> None:
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=False,
            pad_token_id=0,
            cache_implementation="static",
        )
        torch.cuda.synchronize()

    first, whole = first_and_median(lambda: run(args.new), args.rounds)
    _, one = first_and_median(lambda: run(1), args.rounds)
    return summary(batch, one, whole, args) | {"compile_s": [first]}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--models", nargs="*", choices=[*models()], default=[*models()])
    parser.add_argument(
        "--weights", nargs="*", choices=["compute", "int8"], default=["compute"]
    )
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 32])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--device", default="h200", help="whose bandwidth the floor has"
    )
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    # Or a peer finds no memory left.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    record: dict[str, Any] = {
        **header(stated=args.commit),
        "prompt": args.prompt,
        "new": args.new,
        "rows": [],
    }

    def keep(name: str, row: dict[str, Any], floor: float | None) -> None:
        row = {"model": name, **row, "floor_ms": floor}
        record["rows"].append(row)
        record["served"] = {op: list(names) for op, names in served.items()}
        share = "" if floor is None else f", {100 * floor / row['ms_a_token']:.0f}%"
        print(
            f"{name:12} batch {row['batch']:3}: {row['ms_a_token']:7.3f} ms a token, "
            f"{row['tokens_a_second']:8,.0f} tokens/s, floor "
            f"{'-' if floor is None else f'{floor:.3f} ms'}{share}",
            flush=True,
        )
        write_record(args.out, record)

    context = args.prompt + args.new // 2
    for name in args.models:
        config = models()[name]
        model = jax.jit(make_model, static_argnums=0)(config, jax.random.key(0))
        for weights, batch in itertools.product(args.weights, args.batches):
            row = time_ours(with_decode_weights(model, weights), batch, args)
            size = 1 if weights == "int8" else BYTES
            floor = floor_ms(config, batch, context, args.device, size)
            keep(name if weights == "compute" else f"{name} int8", row, floor)
        del model
    for batch in args.batches if args.peers else []:
        row = time_peer(batch, args)
        dense = models()["dense"]
        keep("transformers", row, floor_ms(dense, batch, context, args.device))


if __name__ == "__main__":
    main()
