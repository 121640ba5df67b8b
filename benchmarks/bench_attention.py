"""Attention kernels of a GPU beside cuDNN: `python benchmarks/bench_attention.py`.

Dense shapes are packed as one segment a head, so that both compute the same. Packed
selective shapes are what a balanced random router gives: each of B * N segments holds
the rows of one head. A time is the median of rounds; each round calls every set of
inputs, so that no call finds its inputs in the cache. Errors are against float64.
"""

from __future__ import annotations

import argparse
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uoe_jax.bench.record import header, write_record
from uoe_jax.files import format_json
from uoe_jax.ops.segment_attention.call import Call, Mask
from uoe_jax.ops.segment_attention.nvidia import mosaic as mosaic_gpu
from uoe_jax.ops.segment_attention.nvidia import triton

RESULTS = Path(__file__).parent / "results"
DENSE = [  # causal, B, T, N, H
    (True, 2, 8192, 16, 128),
    (True, 8, 2048, 16, 128),
    (True, 1, 16384, 16, 128),
    (False, 2, 8192, 16, 128),
    (True, 4, 4096, 32, 64),
]
PACKED = [  # B, T, N, X, H
    (2, 8192, 16, 8, 128),
    (8, 2048, 16, 8, 128),
    (1, 16384, 16, 8, 128),
    (2, 8192, 16, 4, 128),
]
SETS = 4  # of inputs
BACKWARD = {  # the ways to gradients
    "fused": {"deterministic": False},
    "deterministic": {"deterministic": True},
    "Triton": {"backend": triton},
}


def attend(q, k, v, offsets, causal, backend=mosaic_gpu, **options):
    """Segment attention by the kernels of Hopper, or by those in Triton."""
    call = Call(q, k, v, offsets, Mask(causal), q.shape[2] ** -0.5)
    return backend.segment_attention(call, **options)


def cudnn(q, k, v, causal):
    """Dense attention by cuDNN."""
    return jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation="cudnn"
    )


def both_passes(function, q, k, v, *rest):
    """Values and gradients; the last argument is the cotangent."""
    *rest, grad = rest
    out, vjp = jax.vjp(lambda *a: function(*a, *rest), q, k, v)
    return out, *vjp(grad)


def seconds(function, sets, rounds=9, repeats=3):
    """Median time of one call, over rounds that call each set of inputs."""
    program = jax.jit(lambda *sets: [function(*args) for args in sets])
    jax.block_until_ready(program(*sets))
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        results = [program(*sets) for _ in range(repeats)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / repeats / len(sets))
    return statistics.median(times)


def draw(seed, *shapes):
    """Normal bfloat16 arrays."""
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    pairs = zip(keys, shapes, strict=True)
    return [jax.random.normal(key, shape, jnp.bfloat16) for key, shape in pairs]


def packed_sets(lengths, width):
    """Inputs of segment attention and their offsets, several times."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    rows = int(offsets[-1])
    row, head = (rows, width), (rows, 1, width)
    return [(*draw(i, head, row, row, head), jnp.asarray(offsets)) for i in range(SETS)]


def segment_times(name, lengths, width, causal):
    """Rows of the table for segments of these lengths."""
    sets = packed_sets(lengths, width)
    square = (np.asarray(lengths, float) ** 2).sum()
    flops = 4 * width * square / (2 if causal else 1)
    forward = [(q, k, v, offsets) for q, k, v, _, offsets in sets]
    back = [(q, k, v, offsets, grad) for q, k, v, grad, offsets in sets]
    yield row(name, "forward", flops, partial(attend, causal=causal), forward)
    function = partial(attend, causal=causal, backend=triton)
    yield row(name, "Triton forward", flops, function, forward)
    for label, options in BACKWARD.items():
        both = partial(both_passes, partial(attend, causal=causal, **options))
        yield row(name, f"forward + backward, {label}", 3.5 * flops, both, back)


def dense_times(case):
    """Rows of the table for one dense shape, ours and cuDNN's."""
    causal, batch, length, heads, width = case
    kind = "causal" if causal else "full"
    name = f"{kind} B{batch} T{length} N{heads} H{width}"
    yield from segment_times(name, [length] * batch * heads, width, causal)
    shape = batch, length, heads, width
    sets = [draw(i, *(shape,) * 4) for i in range(SETS)]
    flops = 4 * batch * heads * width * length**2 / (2 if causal else 1)
    function = partial(cudnn, causal=causal)
    forward = [args[:3] for args in sets]
    yield row(name, "cuDNN forward", flops, function, forward)
    both = partial(both_passes, function)
    yield row(name, "cuDNN forward + backward", 3.5 * flops, both, sets)


def packed_times(case):
    """Rows of the table for the segments that a balanced router makes."""
    batch, length, heads, chosen, width = case
    rng = np.random.default_rng(0)
    lengths = []
    for _ in range(batch):
        order = np.argsort(rng.random((length, heads)), axis=1)[:, :chosen]
        lengths.extend(np.bincount(order.ravel(), minlength=heads))
    name = f"packed B{batch} T{length} N{heads} X{chosen} H{width}"
    yield from segment_times(name, lengths, width, True)


def row(name, label, flops, function, sets):
    """One measurement, or why there is none."""
    try:
        time = seconds(function, sets)
    except (NotImplementedError, ValueError, jax.errors.JaxRuntimeError) as error:
        return {"case": name, "what": label, "error": str(error)[:200]}
    rate = flops / time / 1e12
    return {"case": name, "what": label, "ms": time * 1e3, "tflops": rate}


def errors(width=128, length=1024, heads=4):
    """Relative errors of values and gradients against float64, ours and cuDNN's."""
    shape = 1, length, heads, width
    q, k, v, grad = draw(time.time_ns() % 2**31, *(shape,) * 4)
    wide = [np.asarray(x, np.float64)[0] for x in (q, k, v, grad)]
    each = [exact(*head) for head in zip(*map(by_head, wide), strict=True)]
    want = [np.stack(x, axis=1) for x in zip(*each, strict=True)]
    pack = lambda x: jnp.moveaxis(x[0], 1, 0).reshape(-1, width)
    offsets = jnp.arange(heads + 1, dtype=jnp.int32) * length
    rows = pack(q)[:, None], pack(k), pack(v), offsets, pack(grad)[:, None]
    theirs = jax.jit(partial(both_passes, partial(cudnn, causal=True)))
    table = {"cudnn": [x[0] for x in theirs(q, k, v, grad)]}
    back = lambda x: jnp.moveaxis(x.reshape(heads, length, width), 0, 1)
    for label, options in BACKWARD.items():
        function = partial(attend, causal=True, **options)
        try:
            got = jax.jit(partial(both_passes, function))(*rows)
        except NotImplementedError as error:
            print(f"{label}: {error}")
            continue
        table[label] = [back(x) for x in got]
    norm = np.linalg.norm
    return {
        label: [
            float(norm(np.asarray(g, np.float64) - w) / norm(w))
            for g, w in zip(got, want, strict=True)
        ]
        for label, got in table.items()
    }


def by_head(x):
    """[T, N, H] -> N arrays [T, H]."""
    return list(np.moveaxis(x, 1, 0))


def exact(q, k, v, grad):
    """[out, dq, dk, dv] of one causal head in float64."""
    scale = q.shape[1] ** -0.5
    s = np.where(np.tri(len(q), dtype=bool), q @ k.T * scale, -np.inf)
    p = np.exp(s - s.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    out = p @ v
    ds = p * (grad @ v.T - (grad * out).sum(axis=1, keepdims=True)) * scale
    return out, ds @ k, ds.T @ q, p.T @ grad


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", help="name of a file to write in benchmarks/results")
    parser.add_argument("--commit", help="stated where git isn't there to ask")
    parser.add_argument("--only", default="", help="run cases whose name holds this")
    args = parser.parse_args()
    lines: list[dict[str, Any]] = []
    record = {
        **header("python benchmarks/bench_attention.py", args.commit),
        "errors": errors(),
        "rows": lines,
    }
    print(format_json(record["errors"]))
    for cases, times in ((DENSE, dense_times), (PACKED, packed_times)):
        for case in cases:
            for line in times(case):
                if args.only not in line["case"]:
                    break
                lines.append(line)
                value = line.get("error") or f"{line['ms']:9.3f}{line['tflops']:8.1f}"
                print(f"{line['case']:<34}{line['what']:<36}{value}", flush=True)
                write_record(args.out and RESULTS / args.out, record)


if __name__ == "__main__":
    main()
