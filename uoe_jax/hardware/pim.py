"""What decoding costs where weights don't move: DRAM banks that multiply, closed form.

A process-in-memory (PIM) device has multipliers in every bank of its memory. A vector
is sent to all banks, each bank multiplies it with its rows of the matrix, and a small
chip beside the memory (here: the ASIC) does what isn't a product: softmax, norms,
activations. Decoding one sequence is a chain of such products.

A bank reads one DRAM row at a time: `activate` opens it, the columns of an open row
follow each other quickly, `precharge` closes it. Rows are what time is lost on, so a
matrix is laid out row after row, dealt over all banks.

Device and mapping: Wu, Wang, Lu 2024, PIM-GPT (npj Unconventional Computing 1, 4).
`pim_events.py` simulates the same device event by event and must agree. Imports no jax.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated

from uoe_jax.config import ModelConfig
from uoe_jax.errors import ConfigError, choose, shown
from uoe_jax.fields import Bounds, Checked, Count, NotNegative, Positive
from uoe_jax.hardware.count import count_params, model_layers
from uoe_jax.hardware.decoding import DecodeCost, check_context, held_bytes
from uoe_jax.kinds import ATTENTIONS, MLPS, router_columns

_BF16 = 2  # bytes of a weight, key or value
Share = Annotated[float, Bounds(least=0, most=1)]


@dataclass(frozen=True, kw_only=True)
class PimSpec(Checked):
    """One device: `channels` of `banks`, their timing, currents and the ASIC.

    Times in nanoseconds, currents in milliampere, power in milliwatt.
    """

    name: str
    channels: Count = 8
    banks: Count = 16  # of a channel; all of them get the same command
    row_bytes: Count = 2048
    column_bytes: Count = 32  # read from an open row at a time
    lanes: Count = 16  # numbers that a bank multiplies and adds in one column
    buffer_bytes: Count = 2048  # of a channel: the part of a vector that its banks see
    capacity_bits: Positive = 4e9  # of a channel
    pins: Count = 16  # of a channel
    pin_gbits: Positive = 16.0  # Gbit/s of a pin
    t_rcd: NotNegative = 12.0  # activate to the first column
    t_rp: NotNegative = 12.0  # precharge to activate
    t_wr: NotNegative = 12.0  # last column written to precharge
    t_ccd: Positive = 1.0  # column to column
    t_ras: NotNegative = 27.0  # activate to precharge, at least; for energy only
    t_rfc: NotNegative = 455.0  # one refresh
    t_refi: Positive = 6825.0  # between refreshes
    volts: Positive = 1.25
    idd0: NotNegative = 122.0  # a bank activated and closed again and again
    idd3n: NotNegative = 92.0  # idle, rows open
    idd4r: NotNegative = 530.0  # columns read one after another, without the pins
    idd4w: NotNegative = 470.0
    idd5b: NotNegative = 277.0  # refresh
    mac_milliwatts: NotNegative = 149.29  # multipliers of one channel at work
    asic_ghz: Positive = 1.0
    asic_adders: Count = 256
    asic_multipliers: Count = 128
    asic_milliwatts: NotNegative = 304.59
    # Share of the ASIC's work that no product hides. Calibrated on one published
    # figure: at 1 GHz 1.16% of GPT3-XL's time isn't matrix products.
    asic_exposed: Share = 0.44

    @property
    def total_banks(self) -> int:
        """Banks over which a matrix is dealt."""
        return self.channels * self.banks

    @property
    def row_numbers(self) -> int:
        """Weights in one DRAM row."""
        return self.row_bytes // _BF16

    @property
    def buffer_numbers(self) -> int:
        """Elements of a vector that the banks see at a time: one chunk."""
        return self.buffer_bytes // _BF16

    @property
    def channel_gbits(self) -> float:
        """Gbit/s into or out of one channel, so bits a nanosecond."""
        return self.pins * self.pin_gbits

    @property
    def refresh_factor(self) -> float:
        """How much longer everything takes, as refreshes stop a channel.

        A refresh closes the open row, which is opened once more after it.
        """
        return 1 + (self.t_rfc + self.t_rp + self.t_rcd) / self.t_refi

    @property
    def peak_bandwidth(self) -> float:
        """Bytes/s that all banks read from open rows."""
        return self.total_banks * self.column_bytes / self.t_ccd * 1e9

    @property
    def peak_flops(self) -> float:
        """FLOP/s of all banks' multipliers."""
        return self.total_banks * self.lanes * 2 / self.t_ccd * 1e9

    @property
    def capacity(self) -> float:
        """Bytes of all channels."""
        return self.channels * self.capacity_bits / 8


# Timing of the published study (its own values where given, GDDR6 data sheets' where
# not), and the slower one that the simulator UniNDP (HPCA 2025) uses for the same part.
SPECS = {
    "aim-gddr6": PimSpec(name="aim-gddr6"),
    "aim-gddr6-unindp": PimSpec(
        name="aim-gddr6-unindp", t_rcd=26.0, t_rp=26.0, t_wr=26.0, t_ccd=2.0
    ),
}


def find_spec(text: str) -> PimSpec:
    """Return the device that "aim-gddr6" or, with 8 channels, "aim-gddr6:8" names.

    Raises:
      ConfigError: an unknown device, or channels that aren't a number from 1 to 4096.
    """
    name, colon, channels = text.strip().lower().partition(":")
    spec = choose("device", name, SPECS)
    if not colon:
        return spec
    if not channels.isascii() or not channels.isdigit() or len(channels) > 4:
        channels = "0"
    if not 1 <= int(channels) <= 4096:
        raise ConfigError(
            f"device is {shown(text)}; write channels as {name}:8, 1 to 4096 of them"
        )
    return dataclasses.replace(spec, name=f"{name}:{channels}", channels=int(channels))


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one step of a token does: nanoseconds and how often banks do what.

    `rows` and `columns` are those of one bank; all banks do the same.
    """

    ns: float = 0.0
    rows: float = 0.0  # opened
    columns: float = 0.0  # multiplied
    written: float = 0.0  # columns
    asic_ns: float = 0.0  # the ASIC at work, hidden or not

    def __add__(self, other: Work) -> Work:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in _WORK)
        return Work(**{f.name: a + b for f, (a, b) in zip(_WORK, pairs, strict=True)})

    def __mul__(self, times: int | float) -> Work:
        return Work(**{f.name: getattr(self, f.name) * times for f in _WORK})


_WORK = dataclasses.fields(Work)


def chunks(spec: PimSpec, width: int) -> list[int]:
    """Return the widths of the parts in which a vector of `width` meets the banks."""
    whole, rest = divmod(width, spec.buffer_numbers)
    return [spec.buffer_numbers] * whole + ([rest] if rest else [])


def product(spec: PimSpec, outputs: int, inputs: int, vectors: int = 1) -> Work:
    """Return the work of W x, W being [outputs, inputs], refreshes included.

    Output i lies in bank i mod (channels x banks). The vector comes in chunks of the
    buffer's size; a chunk's part of a bank's outputs lies in one piece. With `vectors`
    every column that is read meets so many of them in turn.

    Raises:
      ConfigError: a matrix without outputs or inputs.
    """
    for name, size in (("outputs", outputs), ("inputs", inputs), ("vectors", vectors)):
        if size < 1:
            raise ConfigError(f"{name} is {shown(size)}; a product needs at least 1")
    held = -(-outputs // spec.total_banks)  # of one bank
    ns = rows = columns = 0.0
    for width in chunks(spec, inputs):
        line = -(-width // spec.lanes)  # columns of one output; the last may have room
        opened = -(-held * line * spec.lanes // spec.row_numbers)
        read = held * line * vectors
        ns += vectors * 8 * _BF16 * width / spec.channel_gbits  # the vector comes
        ns += opened * (spec.t_rcd + spec.t_rp) + read * spec.t_ccd
        # The partial sums leave the channel, one a bank for every output.
        ns += vectors * held * spec.banks * 8 * _BF16 / spec.channel_gbits
        rows, columns = rows + opened, columns + read
    return Work(ns=ns * spec.refresh_factor, rows=float(rows), columns=float(columns))


def write_keys(spec: PimSpec, width: int, values: int) -> Work:
    """Return the work of storing one token's keys and values, `width` and `values`
    numbers.

    Keys lie row after row, so the token's are one or a few rows of one bank. Values
    lie column after column: each bank opens a row for each value that it stores.
    """
    rows = -(-width // spec.row_numbers)
    key_columns = -(-width // spec.lanes)
    held = -(-values // spec.total_banks)
    opened = rows + held
    ns = opened * (spec.t_rcd + spec.t_rp + spec.t_wr)
    ns += (key_columns + held) * spec.t_ccd
    # The keys go into one channel, the values into all of them.
    ns += (width + values / spec.channels) * 8 * _BF16 / spec.channel_gbits
    # A bank's mean: the keys lie in one of all banks.
    share = 1 / spec.total_banks
    return Work(
        ns=ns * spec.refresh_factor,
        rows=rows * share + held,
        written=key_columns * share + held,
    )


# Additions and multiplications of one element: Taylor series of degree 5 for exp, two
# Newton steps for a division and for 1/sqrt, which belong to a whole vector.
ASIC_STEPS = {
    "softmax": (6 + 2, 6 + 1),
    "norm": (6, 4),
    "gelu": (8, 9),
    "swiglu": (8, 10),
    "add": (1, 0),
}


def asic(spec: PimSpec, step: str, elements: int | float) -> Work:
    """Return the work of a vector step of the ASIC; see `ASIC_STEPS`."""
    adds, multiplications = choose("step", step, ASIC_STEPS)
    cycles = elements * max(
        adds / spec.asic_adders, multiplications / spec.asic_multipliers
    )
    ns = cycles / spec.asic_ghz
    return Work(ns=ns * spec.asic_exposed, asic_ns=ns)


def joules(spec: PimSpec, work: Work) -> float:
    """Return the energy of memory and ASIC; no host, no pins."""
    per_bank = spec.volts * 1e-12  # mA x V x ns
    banks, channels = spec.total_banks, spec.channels
    t_rc = spec.t_ras + spec.t_rp
    found = banks * work.rows * (spec.idd0 - spec.idd3n) * t_rc * per_bank
    found += banks * work.columns * (spec.idd4r - spec.idd3n) * spec.t_ccd * per_bank
    found += banks * work.written * (spec.idd4w - spec.idd3n) * spec.t_ccd * per_bank
    found += channels * work.ns * spec.idd3n * per_bank
    refreshes = work.ns / (spec.t_refi + spec.t_rfc)
    found += channels * refreshes * (spec.idd5b - spec.idd3n) * spec.t_rfc * per_bank
    busy = work.columns * spec.t_ccd * channels * spec.mac_milliwatts
    return found + (busy + work.asic_ns * spec.asic_milliwatts) * 1e-12


def decode_cost(
    model: ModelConfig,
    context: int,
    spec: PimSpec,
    experts: str = "all_banks",
) -> DecodeCost:
    """Return what decoding one token costs when `context` tokens are in the cache.

    `experts`: "all_banks" deals every expert over all banks, so a token opens only the
    rows of the experts it uses. "own_banks" gives every expert banks of its own, so a
    token waits for the few banks that work as long as for the whole layer.

    Raises:
      ConfigError: a model that isn't a decoder, a kind whose cache this device has no
        mapping for, a context that is too long, or a model that doesn't fit.
    """
    whole = choose("experts", experts, {"all_banks": False, "own_banks": True})
    _check(model, context, spec)
    phases: dict[str, Work] = {}
    for own, attention, mlp, _ in model_layers(model):
        for name, work in _attention(own, attention, context, spec, whole):
            phases[name] = phases.get(name, Work()) + work
        for name, work in _mlp(own, mlp, spec, whole):
            phases[name] = phases.get(name, Work()) + work
    phases["norms and sums"] = phases["norms and sums"] + asic(
        spec, "norm", model.d_model
    )
    phases["head"] = product(spec, model.vocab_size, model.d_model)
    total = sum(phases.values(), Work())
    return DecodeCost(
        device=spec.name,
        source="closed form of the memory's timing",
        context=context,
        seconds=total.ns * 1e-9,
        joules=joules(spec, total),
        row_hits=1 - total.rows / (total.columns + total.written),
        phases={name: work.ns * 1e-9 for name, work in phases.items()},
        bytes_held=held_bytes(model),
        capacity=spec.capacity,
    )


Steps = Iterable[tuple[str, Work]]


def _attention(
    model: ModelConfig, kind: str, context: int, spec: PimSpec, whole: bool
) -> Steps:
    """Yield the steps of one attention layer."""
    facts = ATTENTIONS[kind]
    side, keys = (1.0, 1.0) if whole else facts.shares(model)
    d, key, value = model.d_model, model.key_dim, model.value_dim
    heads, kv_heads = model.num_heads * side, model.num_kv_heads * keys
    # The last token of a sample sees about twice the mean.
    seen = facts.keys_seen(model, float(2 * context - 1))
    if whole:
        seen = float(context)
    yield from _router(model, "attention", kind, spec)
    outer = (heads + kv_heads) * key + kv_heads * value
    yield "q, k, v", product(spec, round(outer), d)
    keys_values = (round(kv_heads * key), round(kv_heads * value))
    yield "write k, v", write_keys(spec, *keys_values)
    # `keys_seen` is a mean over all heads, those that a token doesn't use included.
    lines = max(1, round(seen / (heads / model.num_heads)))
    used = max(1, round(heads / model.num_query_groups))
    groups = model.num_query_groups
    yield "scores", _scores(spec, lines, used * key, used, groups)
    yield "softmax", asic(spec, "softmax", heads * lines)
    # As many heads at a time as fill the banks: each channel sees its head's weights.
    rounds = -(-used * value // spec.total_banks)
    yield "values", product(spec, spec.total_banks, lines, groups) * rounds
    yield "attention out", product(spec, d, round(heads * value))
    yield "norms and sums", asic(spec, "norm", d) + asic(spec, "add", d)


def _scores(spec: PimSpec, tokens: int, width: int, heads: int, groups: int) -> Work:
    """Return the work of queries with `tokens` keys of `width` numbers, all heads'.

    A token's keys of all heads fill rows of one bank; a score leaves for each head.
    """
    held = -(-tokens // spec.total_banks)
    rows = held * -(-width // spec.row_numbers)
    columns = held * -(-width // spec.lanes) * groups
    ns = groups * 8 * _BF16 * width / spec.channel_gbits
    ns += rows * (spec.t_rcd + spec.t_rp) + columns * spec.t_ccd
    ns += groups * heads * held * spec.banks * 8 * _BF16 / spec.channel_gbits
    return Work(ns=ns * spec.refresh_factor, rows=float(rows), columns=float(columns))


def _mlp(model: ModelConfig, kind: str, spec: PimSpec, whole: bool) -> Steps:
    """Yield the steps of one MLP layer."""
    facts = MLPS[kind]
    experts, width = facts.sizes(model)
    router = facts.router(model)
    used = experts if whole or router is None else router.top_k
    yield from _router(model, "mlp", kind, spec)
    names = ("w_up", "w_gate") if model.gated else ("w_up",)
    d, whole_ones = model.d_model, [n for n in names if not model.rank(n)]
    if whole_ones:
        yield "MLP in", product(spec, len(whole_ones) * width, d) * used
    for rank in filter(None, map(model.rank, names)):
        yield "MLP in", product(spec, rank, d) + product(spec, width, rank)
    activation = "swiglu" if model.gated else "gelu"
    yield "activation", asic(spec, activation, used * width)
    # An expert's part of the output weights lies in one piece, so the others' rows
    # stay closed.
    if rank := model.rank("w_down"):
        yield "MLP out", product(spec, rank, width) + product(spec, d, rank)
    else:
        yield "MLP out", product(spec, d, width) * used
    yield (
        "norms and sums",
        asic(spec, "norm", model.d_model) + asic(spec, "add", model.d_model),
    )


def _router(model: ModelConfig, part: str, kind: str, spec: PimSpec) -> Steps:
    columns = router_columns(model, part, kind)
    scored = sum(n for name, n in columns.items() if name != "default")
    if scored:
        yield "routers", product(spec, scored, model.d_model)


def _check(model: ModelConfig, context: int, spec: PimSpec) -> None:
    """Refuse what the device can't hold or has no mapping for."""
    check_context(model, context)
    unknown = {a for a, _ in model.layer_kinds} - {"dense", "union", "moh"}
    unknown |= {m for _, m in model.layer_kinds} - {"dense", "union", "moe"}
    unknown |= {block for block in model.block_kinds if block != "all"}
    if unknown:
        raise ConfigError(
            f"the model has {', '.join(sorted(unknown))}; the memory device maps "
            "dense, union, moh and moe layers only"
        )
    need = held_bytes(model)
    if need > spec.capacity:
        weights = sum(count_params(model).values()) * _BF16
        token = (need - weights) / model.max_seq_len
        longest = math.floor((spec.capacity - weights) / token)
        fits = (
            f"its weights alone take {weights / 1e9:.2f} GB"
            if longest < 1
            else f"set model.max_seq_len to at most {longest}"
        )
        raise ConfigError(
            f"{spec.name} holds {spec.capacity / 1e9:.2f} GB and the model needs "
            f"{need / 1e9:.2f} GB at {model.max_seq_len} tokens; {fits} or take more "
            "channels"
        )
