"""Kinds of routers, attentions and MLPs: what they see, cost and remember.

Configs, validation, layouts, the cost model, the leak check and reports read these
tables. Imports no jax. The classes that do the work lie in `uoe_jax.model`, which also
has `register_router`, `register_attention` and `register_mlp` for kinds of one's own.

Functions here take the config they are about: a router's its `UnionConfig` or
`MoeConfig`, the others a `ModelConfig`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from uoe_jax.errors import ConfigError


def routed_experts(router: Any) -> int:
    """Return how many experts are scored: all but the always-on ones."""
    return router.num_experts - router.num_shared


def score_columns(router: Any) -> dict[str, int]:
    """Return the columns of a router's parameters: one weight that scores experts."""
    return {"weight": routed_experts(router)}


def causal_mean(length: float, causal: bool) -> float:
    """Return how many keys a token of a set of `length` sees on average."""
    return (length + 1) / 2 if causal else length


def seen_mean(model: Any, length: float, share: float = 1.0) -> float:
    """Return how many keys a token sees on average where it sees its window only.

    Of a sample of `length` tokens, of which those that meet are a share. The window is
    the first of the model's: facts are of one layer.
    """
    window, length = model.window[0] * share, length * share
    if not window or window >= length:
        return causal_mean(length, model.causal)
    # The first `window` tokens see what is before them, the others a whole window.
    return window - window * (window - 1) / (2 * length)


@dataclass(frozen=True, kw_only=True)
class RouterFacts:
    """What is known of a kind of router without building it."""

    sees: str  # what a token's routing depends on, in words
    causal: bool = True  # it never looks at later tokens: a decoder may use it
    capacity: bool = False  # takes `capacity_factor`
    patches: bool = False  # takes `patch_size`
    # Whether a token's routing depends on that token alone.
    sees_one_token: Callable[[Any], bool] = lambda router: False
    # Tokens between two decisions, which a check of leaks has to span.
    span: Callable[[Any], int] = lambda router: 1
    # How many experts a token takes follows its scores, up to the union's `most`.
    varies: bool = False
    # The first of a token's experts are those that it would have with a smaller top_k:
    # takes `least_top_k`.
    ordered: bool = False
    # Columns of each parameter; see `weights.ROUTER` for the names.
    columns: Callable[[Any], dict[str, int]] = score_columns
    # Routed experts over which the tokens of one sample are spread, for the cost.
    experts_in_use: Callable[[Any], int] = routed_experts
    # Broken rules of its own, as "value, rule, fix"; the second argument is the path of
    # the config's fields.
    problems: Callable[[Any, str], Iterator[str]] = lambda router, path: iter(())


@dataclass(frozen=True, kw_only=True)
class AttentionFacts:
    """What is known of a kind of attention without building it."""

    # The config of its router; None: every token uses every head.
    router: Callable[[Any], Any] = lambda model: None
    # Columns of its router's parameters beside those that the router's kind has.
    more_columns: Callable[[Any], dict[str, int]] = lambda router: {}
    # Shares of the projections that a token uses: of queries and outputs, and of keys
    # and values.
    shares: Callable[[Any], tuple[float, float]] = lambda model: (1.0, 1.0)
    # Keys that meet a token's queries in a sample of some length, mean over all heads.
    keys_seen: Callable[[Any, float], float] = seen_mean
    windows: bool = False  # sees no more than the model's `window` says
    # FLOPs a token spends on choosing what it attends to, beside a router's product.
    choosing: Callable[[Any, float], float] = lambda model, length: 0.0
    # Parameters of its own beside `weights.ATTENTION`: name -> `weights.Param`.
    params: Callable[[Any], dict[str, Any]] = lambda model: {}
    # Whether keys lie in lists that have a place for every token in every expert.
    listed: Callable[[Any], bool] = lambda model: False
    splits: bool = False  # over tensor and sequence devices
    gathers: bool = False  # works on gathered rows, which cost more than whole ones
    span: Callable[[Any], int] = lambda model: 1  # as a router's


@dataclass(frozen=True, kw_only=True)
class MlpFacts:
    """What is known of a kind of MLP without building it."""

    router: Callable[[Any], Any] = lambda model: None
    # Experts and the neurons of each; a dense MLP is one expert.
    sizes: Callable[[Any], tuple[int, int]] = lambda model: (1, model.d_ff)
    params: Callable[[Any], dict[str, Any]] = lambda model: {}
    splits: bool = False
    field: str = ""  # where its experts are counted, for messages

    def active_width(self, model: Any) -> float:
        """Return the neurons that a token uses."""
        experts, width = self.sizes(model)
        router = self.router(model)
        return float(width * (experts if router is None else router.top_k))


# ---- routers


def _token_span(router: Any) -> int:
    return getattr(router, "patch_size", 1)


def _selection_columns(router: Any) -> dict[str, int]:
    # `default` are the scores of a document's first segment, which has none before it.
    return {"weight": routed_experts(router), "default": routed_experts(router)}


def _hierarchical_columns(router: Any) -> dict[str, int]:
    return {**_selection_columns(router), "token_weight": routed_experts(router)}


def _hierarchical_problems(router: Any, path: str) -> Iterator[str]:
    if not router.top_k <= router.selected <= router.num_experts:
        yield (
            f"{path}.selected is {router.selected}; the hierarchical router keeps that "
            f"many experts for its tokens, use {router.top_k} (top_k) to "
            f"{router.num_experts}"
        )
    if router.least_top_k and router.gate == "softmax":
        yield (
            f"{path}.least_top_k is {router.least_top_k} with gate 'softmax', which "
            "the hierarchical router multiplies with the selection's; use sigmoid"
        )


def _threshold_problems(router: Any, path: str) -> Iterator[str]:
    if router.gate == "softmax":
        yield (
            f"{path}.gate is 'softmax' and with router 'threshold' tokens have unlike "
            "numbers of experts; use sigmoid, relu or straight_through"
        )
    if not router.top_k <= router.most <= router.num_experts:
        yield (
            f"{path}.most_picks is {router.most_picks}; a token takes {path}.top_k "
            f"{router.top_k} experts in the mean, use {router.top_k} to "
            f"{router.num_experts}"
        )


ROUTERS: dict[str, RouterFacts] = {
    "token": RouterFacts(
        sees="the token itself (causal: the first token of its patch)",
        capacity=True,
        patches=True,
        ordered=True,
        sees_one_token=lambda router: _token_span(router) == 1,
        span=_token_span,
    ),
    "expert_choice": RouterFacts(sees="every token of the sample", causal=False),
    "selection": RouterFacts(
        sees="in a causal model earlier segments only, otherwise the whole sample",
        ordered=True,
        span=lambda router: router.segment_size,
        columns=_selection_columns,
        experts_in_use=lambda router: router.top_k - router.num_shared,
    ),
    "hierarchical": RouterFacts(
        sees="as selection, then the token itself",
        ordered=True,
        span=lambda router: router.segment_size,
        columns=_hierarchical_columns,
        experts_in_use=lambda router: router.selected - router.num_shared,
        problems=_hierarchical_problems,
    ),
    "threshold": RouterFacts(
        sees="the token itself, and thresholds that training has set",
        sees_one_token=lambda router: True,
        varies=True,
        problems=_threshold_problems,
    ),
}


# ---- attentions


def _attention_union(model: Any) -> Any:
    return model.union_for("attention")


def _union_shares(model: Any) -> tuple[float, float]:
    union = _attention_union(model)
    return union.keep, 1.0 if union.shared_kv else union.keep


def _union_keys(model: Any, length: float) -> float:
    union = _attention_union(model)
    if union.shared_kv:
        return _shared_keys(model, length)
    # Every token is in an always-on expert's set, and a balanced share in another's.
    picks = union.top_k - union.num_shared
    share = picks / ROUTERS[union.router].experts_in_use(union)
    keys = union.num_shared * seen_mean(model, length)
    keys += picks * seen_mean(model, length, share)
    return keys / union.num_experts


def _key_columns(router: Any) -> dict[str, int]:
    return {"key_weight": routed_experts(router)} if router.key_router else {}


def _shared_keys(model: Any, length: float) -> float:
    return _attention_union(model).keep * seen_mean(model, length)


def _moh_columns(router: Any) -> dict[str, int]:
    shared = router.num_shared
    if not shared:
        return {}
    # Always-on heads against each other, where there are several, and the routed.
    return {"split_weight": 2} | ({"shared_weight": shared} if shared > 1 else {})


def _block_keys(model: Any, length: float) -> float:
    """Return the keys a token of block-sparse attention sees on average."""
    length, size = round(length), model.moba.block_size
    others, total = model.moba.top_k - 1, 0
    for start in range(0, length, size):
        own = min(size, length - start)
        if model.causal:
            earlier = min(start // size, others) * size
            total += own * earlier + own * (own + 1) // 2
        else:
            total += own * min(length, own + others * size)
    return total / length


def _block_choice(model: Any, length: float) -> float:
    # Each query meets the mean key of every block it may pick.
    blocks = -(-length // model.moba.block_size) - 1
    pairs = blocks / 2 if model.causal else blocks
    return 2 * model.num_heads * model.key_dim * pairs


ATTENTIONS: dict[str, AttentionFacts] = {
    "dense": AttentionFacts(splits=True, windows=True),
    "union": AttentionFacts(
        router=_attention_union,
        more_columns=_key_columns,
        listed=lambda model: _attention_union(model).key_router,
        shares=_union_shares,
        keys_seen=_union_keys,
        windows=True,
        splits=True,
        gathers=True,
    ),
    "moba": AttentionFacts(
        keys_seen=_block_keys,
        choosing=_block_choice,
        gathers=True,
        span=lambda model: model.moba.block_size,
    ),
    "moh": AttentionFacts(
        router=_attention_union,
        more_columns=_moh_columns,
        shares=lambda model: (_attention_union(model).keep, 1.0),
        keys_seen=_shared_keys,
        windows=True,
        gathers=True,
    ),
}


# ---- MLPs


def _union_sizes(model: Any) -> tuple[int, int]:
    experts = model.union.num_experts
    return experts, model.d_ff // experts


MLPS: dict[str, MlpFacts] = {
    "dense": MlpFacts(splits=True, field="model.d_ff"),
    "union": MlpFacts(
        router=lambda model: model.union,
        sizes=_union_sizes,
        splits=True,
        field="model.union",
    ),
    "moe": MlpFacts(
        router=lambda model: model.moe,
        sizes=lambda model: (model.moe.num_experts, model.d_expert),
        splits=True,
        field="model.moe",
    ),
}

CAUSAL_ROUTERS = tuple(name for name, facts in ROUTERS.items() if facts.causal)


def router_of(model: Any, part: str, kind: str) -> Any:
    """Return the router config of a kind of a part, "attention" or "mlp", or None."""
    table: Any = ATTENTIONS if part == "attention" else MLPS
    return table[kind].router(model)


def router_columns(model: Any, part: str, kind: str) -> dict[str, int]:
    """Return the columns of each parameter of the router that a kind of a part has."""
    router = router_of(model, part, kind)
    if router is None:
        return {}
    columns = ROUTERS[router.router].columns(router)
    more = ATTENTIONS[kind].more_columns(router) if part == "attention" else {}
    return columns | more


def add_kind(table: dict[str, Any], name: str, facts: Any, kind: type) -> None:
    """Add a kind to a table; ConfigError for a name or facts that can't be."""
    if not isinstance(name, str) or not name.isidentifier():
        raise ConfigError(f"kind {name!r} can't be named so; use letters, digits and _")
    if name in table:
        raise ConfigError(f"kind {name!r} is there already; choose another name")
    if not isinstance(facts, kind):
        raise ConfigError(
            f"the facts of {name!r} are {facts!r}; give a {kind.__name__}(...)"
        )
    table[name] = facts
