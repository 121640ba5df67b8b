"""Errors of grouped products on this device: `python benchmarks/bench_ops.py`.

Values and gradients of every backend that can serve, against float64, on fresh inputs:
uneven and empty groups, rows of no group, sides that fill no tile. Also whether a
second run gives the same bits. Times are `uoe bench union`'s.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from tests.ops import ops_oracle
from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.timing import both_passes
from uoe_jax.errors import ConfigError
from uoe_jax.ops import gather_project, grouped_matmul, pack_choices, project_scatter
from uoe_jax.ops.grouped_matmul.api import GROUPED_MATMUL

# rows, I, O, groups, rows inside groups
GROUPED = [(1000, 192, 320, 5, 970), (333, 100, 77, 3, 333), (4096, 128, 128, 64, 4000)]
# B, T, I, O, E, X
ROUTED = [(4, 256, 256, 512, 8, 4), (3, 71, 72, 40, 5, 2), (2, 64, 64, 128, 1, 1)]
DTYPES = ("bfloat16", "float16", "float32")


def compiled(operation, **options):
    """Return its value and gradients; the last argument is the cotangent."""
    return jax.jit(both_passes(functools.partial(operation, **options)))


def relative(got, want):
    """Return Frobenius errors over the norms of what is wanted."""
    pairs = zip(jax.tree.leaves(got), want, strict=True)
    return [
        float(np.linalg.norm(np.asarray(g, np.float64) - w) / np.linalg.norm(w))
        for g, w in pairs
    ]


def check_grouped(case, dtype, backend, rng):
    """Return {operation: errors, repeatable} of one grouped product."""
    rows, inner, outer, groups, inside = case
    cuts = np.sort(rng.integers(0, inside + 1, groups))
    cuts[-1] = inside
    cuts[: groups > 3] = 0  # an empty group
    offsets = [0, *map(int, cuts)]
    x, w, grad = draw(rng, dtype, (rows, inner), (groups, inner, outer), (rows, outer))
    how = {"offsets": jnp.asarray(offsets), "implementation": backend}
    run = compiled(grouped_matmul, **how)
    got, again = (jax.tree.leaves(run(x, w, grad)) for _ in range(2))
    same = all(bool((a == b).all()) for a, b in zip(got, again, strict=True))
    want = ops_oracle.grouped(x, w, offsets, grad)
    return {"grouped_matmul": relative(got, want), "repeatable": same}


def check_routed(case, dtype, backend, rng):
    """Return {operation: errors} of the gather and the sum around a product."""
    batch, length, inner, outer, experts, picks = case
    score = rng.random((batch, length, experts)) + np.arange(experts) / experts
    choices = np.argsort(score, axis=-1)[..., :picks].astype(np.int32)
    packing = pack_choices(jnp.asarray(choices), experts)
    ids, offsets = np.asarray(packing.token_ids), np.asarray(packing.group_offsets)
    tokens, rows = batch * length, batch * length * picks
    wide = lambda a: np.asarray(a, np.float64)

    def summed(values):
        total = np.zeros((tokens, values.shape[1]))
        np.add.at(total, ids, values)
        return total

    shapes = (tokens, inner), (experts, inner, outer), (rows, outer)
    x, w, grad = draw(rng, dtype, *shapes)
    call = functools.partial(compiled, packing=packing, implementation=backend)
    out, dx, dw = ops_oracle.grouped(wide(x)[ids], w, offsets, grad)
    gathered = relative(call(gather_project)(x, w, grad), (out, summed(dx), dw))
    r, token_grad = draw(rng, dtype, (rows, inner), (tokens, outer))
    out, dr, dw = ops_oracle.grouped(r, w, offsets, wide(token_grad)[ids])
    scattered = relative(call(project_scatter)(r, w, token_grad), (summed(out), dr, dw))
    return {"gather_project": gathered, "project_scatter": scattered}


def draw(rng, dtype, *shapes):
    """Return normal arrays."""
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def check_backend(backend, rng):
    """Yield a row of errors for every dtype and case, none where it can't serve."""
    for dtype in DTYPES:
        for check, cases in ((check_grouped, GROUPED), (check_routed, ROUTED)):
            for case in cases:
                try:
                    found = check(case, dtype, backend, rng)
                except ConfigError as error:
                    print(f"{backend}: {error}", flush=True)
                    return
                yield {"backend": backend, "dtype": dtype, "case": case, **found}


def main():
    parser = arguments(__doc__)
    parser.add_argument("--seed", type=int, help="fresh every time without one")
    args = parser.parse_args()
    rng = np.random.default_rng(args.seed)
    record = {**header(stated=args.commit), "results": []}
    for backend in GROUPED_MATMUL:
        for row in check_backend(backend, rng):
            print(*row.values(), flush=True)
            record["results"].append(row)
    write_record(args.out, record)


if __name__ == "__main__":
    main()
