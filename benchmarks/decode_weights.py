"""What weights of eight bits cost a run: bytes read a token, and loss as it decodes.

    python benchmarks/decode_weights.py RUN TEXT --out FILE

Every token of rows of TEXT is decoded by itself, with the model's weights and with
weights of eight bits; the losses of all but each row's first are averaged (nats).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.data.record import run_tokenizer
from uoe_jax.generate import need_decoder
from uoe_jax.model import init_cache
from uoe_jax.model.decoding.step import prepare, product_bytes, with_decode_weights
from uoe_jax.runs.load import load_run


@jax.jit
def losses(decoder: Any, tokens: jax.Array, cache: Any) -> jax.Array:
    """The loss of each token [B, T] but the first ones, [T - 1, B]."""

    def step(cache: Any, pair: Any) -> tuple[Any, jax.Array]:
        logits, cache = decoder.decode(pair[0], cache)
        return cache, optax.softmax_cross_entropy_with_integer_labels(logits, pair[1])

    return jax.lax.scan(step, cache, (tokens[:, :-1].T, tokens[:, 1:].T))[1]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    args = parser.parse_args()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    run = load_run(args.run)
    model, tokenizer = need_decoder(run), run_tokenizer(args.run, run.config)
    count = args.rows * args.length
    ids = tokenizer.encode(args.text.read_text("utf-8")[: 16 * count])[:count]
    if len(ids) < count:
        parser.error(f"{args.text} has {len(ids)} tokens; give {count}, or fewer rows")
    tokens = jnp.asarray(np.reshape(ids, (args.rows, args.length)))
    record: dict[str, Any] = {
        **header(stated=args.commit),
        "rows": args.rows,
        "length": args.length,
        "weights": {},
    }
    first = None
    for weights in ("compute", "int8"):
        decoder = prepare(with_decode_weights(model, weights), args.rows)
        cache = init_cache(model.config, args.rows, args.length)
        loss = float(jnp.mean(losses(decoder, tokens, cache)))
        held = product_bytes(decoder)
        first = loss if first is None else first
        record["weights"][weights] = {
            "bytes": held, "loss": loss, "perplexity": math.exp(loss),
        }  # fmt: skip
        print(
            f"{weights:8} {held / 1e6:10.1f} MB of weights, loss {loss:.4f} "
            f"({loss - first:+.4f}), perplexity {math.exp(loss):.3f}",
            flush=True,
        )
        write_record(args.out, record)


if __name__ == "__main__":
    main()
