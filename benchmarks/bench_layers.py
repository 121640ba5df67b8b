"""Where a union layer's time goes: `python benchmarks/bench_layers.py --out FILE`.

Times the dense and union layers of `uoe bench union`, forward and backward with their
routers, and sums the time of every device kernel from a profile of a few calls.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from uoe_jax.bench.profile import kernel_times
from uoe_jax.bench.record import arguments, header, write_record
from uoe_jax.bench.sizes import SIZES
from uoe_jax.bench.timing import measure
from uoe_jax.bench.union import _mlp, _smha


def main():
    parser = arguments(__doc__)
    parser.add_argument("--size", choices=SIZES)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    nnx.set_graph_mode(False)
    nnx.set_graph_updates(False)
    size = args.size or ("small" if jax.default_backend() == "cpu" else "full")
    sizes = SIZES[size]
    record: dict[str, Any] = {**header(stated=args.commit), "size": size, "layers": []}
    programs = [p for case in sizes.mlp for p in _mlp(case, sizes.dtype)]
    programs += [p for case in sizes.smha for p in _smha(case, sizes.dtype)]
    for program in programs:
        (row,) = measure([program], args.rounds)
        print(f"{row.op} {row.case} {row.name}: {row.milliseconds} ms {row.note}")
        kernels = {}
        if row.milliseconds is not None:
            compiled = jax.jit(program.fun).lower(*program.args).compile()
            kernels = kernel_times(lambda run=compiled, p=program: run(*p.args))
        for name, time in list(kernels.items())[:14]:
            print(f"    {time:8.3f} ms  {name}", flush=True)
        record["layers"].append({**row.as_dict(), "kernels": kernels})
        write_record(args.out, record)


if __name__ == "__main__":
    main()
