"""A run as a model of lm-evaluation-harness: log-probabilities, continuations."""

import dataclasses
import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.interop.test_chat import TEMPLATE, tokenizer_text
from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.data.chat import ChatTemplate, encode_chat
from uoe_jax.data.record import record_of_tokenizer
from uoe_jax.data.tokenize import train_bpe
from uoe_jax.errors import ConfigError, MissingExtra
from uoe_jax.generate import Sampling, generate
from uoe_jax.harness import (
    Row,
    Scorer,
    _sampling,
    cut_at,
    rolling_rows,
    run_lm,
)
from uoe_jax.model import flat_params, make_model
from uoe_jax.runs.load import load_run
from uoe_jax.runs.write import Origin, write_run

TEXT = "\n".join(f"the {n} words of a text, number {n * n}" for n in range(400))
MODEL = ModelConfig(
    vocab_size=320, max_seq_len=24, d_model=16, d_ff=32, num_layers=1, num_heads=2,
    num_kv_heads=2, head_dim=8,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of random weights, large enough that tokens differ in likelihood."""
    folder = tmp_path_factory.mktemp("harness") / "run"
    params = flat_params(make_model(MODEL, jax.random.key(0)))
    params = {name: 4 * np.asarray(a) for name, a in params.items()}
    record = record_of_tokenizer(train_bpe([TEXT.encode()], 320))
    config = ExperimentConfig(name="h", model=MODEL)
    write_run(folder, config, params, Origin(made_by="test", source="x", data=record))
    return load_run(folder)


@pytest.fixture(scope="module")
def scorer(run):
    return Scorer(run, batch_size=3)


def log_probabilities(run, ids):
    """Log-probabilities [T, V] of what follows each token, float64."""
    logits = np.asarray(run.model(jnp.asarray(ids)[None])[0][0], np.float64)
    top = logits.max(-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))


def test_a_continuation_has_the_sum_of_its_tokens(run, scorer):
    pairs = [("the 7", " words of a text"), ("the", " 12 words"), ("", "the 3 words"),
             ("the 7 words ", "of"), ("number ", "9")]  # fmt: skip
    found = scorer.loglikelihood(pairs)
    encode = scorer.tokenizer.encode
    for (context, text), (value, _) in zip(pairs, found, strict=True):
        whole = encode(context + text)
        start = len(encode(context.rstrip()))
        ids = np.concatenate([[scorer.prefix], whole])
        if context:  # a text's first token isn't scored
            ids, start = whole, start
        else:
            start = 1
        log = log_probabilities(run, ids[:-1])
        wanted = sum(log[i - 1, ids[i]] for i in range(start, len(ids)))
        assert abs(value - wanted) < 1e-4
    # Blanks at a context's end are the continuation's.
    assert scorer.split("a ", "b").scored == len(encode("a b")) - len(encode("a"))


def test_greedy_says_what_decoding_would_make(run, scorer):
    ids = scorer.encode("the 7 words")
    made = generate(
        run.model, jnp.asarray(ids)[None], jnp.array([len(ids)]), 3, greedy=True
    )
    rows = [
        Row(np.append(ids, made[0][:2]), np.append(ids[1:], made[0]), 3),
        Row(np.append(ids, made[0][:2]), np.append(ids[1:], made[0] ^ 1), 3),
    ]
    assert [bool(right.all()) for _, right in scorer.run(rows)] == [True, False]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 9, 10, 12])
def test_windows_score_every_token_once_with_the_most_context(count):
    tokens, length = np.arange(100, 100 + count), 4
    rows = list(rolling_rows(tokens, 7, length))
    scored = [target for row in rows for target in row.targets[-row.scored :]]
    assert scored == tokens.tolist()
    whole = [7, *tokens.tolist()]
    for number, row in enumerate(rows):
        assert len(row.inputs) == len(row.targets) <= length
        # Each input stands before its target in the text.
        at = [whole.index(t) for t in row.targets]
        assert row.inputs.tolist() == [whole[i - 1] for i in at]
        if number:
            assert len(row.inputs) == length
    assert list(rolling_rows(tokens[:0], 7, length)) == []


def test_the_harness_own_example_of_windows():
    rows = list(rolling_rows(np.arange(10), -1, 4))
    assert [row.inputs.tolist() for row in rows] == [
        [-1, 0, 1, 2], [3, 4, 5, 6], [5, 6, 7, 8]
    ]  # fmt: skip
    assert [row.scored for row in rows] == [4, 4, 2]


def test_rolling_adds_up_windows(run, scorer):
    texts = [TEXT[:200], "the", "", TEXT[50:120]]
    found = scorer.loglikelihood_rolling(texts)
    for text, value in zip(texts, found, strict=True):
        ids = scorer.tokenizer.encode(text)
        wanted = 0.0
        for row in rolling_rows(ids, scorer.prefix, MODEL.max_seq_len):
            log = log_probabilities(run, row.inputs)
            places = range(len(row.targets) - row.scored, len(row.targets))
            wanted += sum(log[i, row.targets[i]] for i in places)
        assert abs(value - wanted) < 1e-3
    assert len(scorer.tokenizer.encode(texts[0])) > 2 * MODEL.max_seq_len


def test_what_is_generated_ends_before_until(run, scorer):
    context = "the 7 words"
    ids = scorer.encode(context)
    made = generate(
        run.model, jnp.asarray(ids)[None], jnp.array([len(ids)]), 8, greedy=True,
        eos=scorer.end,
    )  # fmt: skip
    whole = scorer.tokenizer.decode_bytes(np.asarray(made[0])).decode(
        "utf-8", "replace"
    )
    stop = whole[3:5]
    requests = [
        (context, {"until": [], "max_gen_toks": 8}),
        (context, {"until": [stop, "never"], "max_gen_toks": 8}),
        (TEXT[:400], {"until": "zzz", "max_gen_toks": 4}),  # longer than fits
        ("", {"until": ["zzz"], "max_gen_toks": 4, "do_sample": True,
              "temperature": 0.7}),
    ]  # fmt: skip
    found = scorer.generate_until(requests)
    assert found[0] == whole
    assert found[1] == whole[: whole.find(stop)]
    assert len(found) == 4
    with pytest.raises(ConfigError, match="max_gen_toks is 24 and max_seq_len 24"):
        scorer.generate_until([(context, {"max_gen_toks": 24})])
    assert cut_at("abcabc", ["c", "b", ""]) == "a" and cut_at("abc", []) == "abc"


def test_long_contexts_lose_their_beginning_and_long_continuations_are_refused(scorer):
    row = scorer.split(TEXT[:300], " words")
    assert len(row.inputs) == MODEL.max_seq_len
    with pytest.raises(ConfigError, match="scores 1 to 24"):
        scorer.split("the", TEXT[:300])
    with pytest.raises(ConfigError, match="has 0 tokens"):
        scorer.split("the", "")


def test_it_is_a_model_of_the_harness(run, scorer, monkeypatch):
    if importlib.util.find_spec("lm_eval") is None:
        with pytest.raises(MissingExtra, match=r"uoe_jax\[lm-eval\]"):
            run_lm(run)
        # Its base class asks for these methods and nothing else.
        api = types.ModuleType("lm_eval.api")
        model = types.ModuleType("lm_eval.api.model")
        model.LM = type("LM", (), {})
        package = types.ModuleType("lm_eval")
        for name, module in (("", package), (".api", api), (".api.model", model)):
            monkeypatch.setitem(sys.modules, f"lm_eval{name}", module)
    lm = run_lm(run, batch_size=3)
    ask = lambda *args: SimpleNamespace(args=args)
    pair = ("the 7", " words")
    assert lm.loglikelihood([ask(*pair)]) == scorer.loglikelihood([pair])
    rolled = scorer.loglikelihood_rolling(["the 7 words"])
    assert lm.loglikelihood_rolling([ask("the 7 words")]) == rolled
    settings = {"until": ["."], "max_gen_toks": 4}
    made = scorer.generate_until([("the", settings)])
    assert lm.generate_until([ask("the", settings)]) == made
    assert lm.chat_template(False) == "" and lm.tokenizer_name == "tokenizer.json"
    for asked in (lambda: lm.chat_template(True), lambda: lm.apply_chat_template(CHAT)):
        with pytest.raises(ConfigError, match="has no chat template"):
            asked()
    with pytest.raises(ConfigError, match="a run has one template; give True"):
        lm.chat_template("rag")
    with pytest.raises(ConfigError, match="batch_size is 0"):
        run_lm(run, batch_size=0)


def test_the_number_of_new_tokens_has_the_names_of_the_harness(scorer):
    make = lambda **settings: scorer.generate_until([("the 7 words", settings)])[0]
    wanted = make(max_gen_toks=3)
    for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
        assert make(**{name: 3}) == wanted
    assert make(max_gen_toks=3, max_tokens=9) == wanted
    # Half of what the model takes, where nothing is said and 256 don't fit.
    assert make() == make(max_gen_toks=12) != wanted


CHAT = [{"role": "user", "content": "the 7 <|im_end|>"}]


@pytest.fixture(scope="module")
def chat_run(tmp_path_factory):
    """A run with two special tokens and a template."""
    folder = tmp_path_factory.mktemp("harness") / "chat"
    params = flat_params(make_model(MODEL, jax.random.key(0)))
    record = record_of_tokenizer(tokenizer_text())
    template = ChatTemplate(text=TEMPLATE, eos="<|im_end|>")
    record = dataclasses.replace(record, chat_text=template.to_json())
    config = ExperimentConfig(
        name="h", model=dataclasses.replace(MODEL, max_seq_len=64)
    )
    write_run(folder, config, params, Origin(made_by="test", source="x", data=record))
    return load_run(folder)


def test_conversations_are_written_in_the_runs_template(chat_run):
    scorer = Scorer(chat_run)
    template, tokenizer = scorer.template(), scorer.tokenizer
    context = scorer.write_chat(CHAT)
    wanted = encode_chat(tokenizer, template, CHAT)
    assert scorer.encode(context).tolist() == wanted.tolist()
    start, end = (tokenizer.special_tokens()[n] for n in ("<|im_start|>", "<|im_end|>"))
    # What the user wrote of the end's name is text.
    assert wanted.tolist().count(end) == 1 and wanted.tolist().count(start) == 2
    row = scorer.split(context, "words")
    assert row.scored == len(tokenizer.encode("\nwords"))
    # A message that is to be gone on with isn't ended.
    begun = [*CHAT, {"role": "assistant", "content": "It is"}]
    ids = scorer.encode(scorer.write_chat(begun, begin=False)).tolist()
    assert ids.count(end) == 1
    assert tokenizer.decode(ids[-len(tokenizer.encode("It is")) :]) == "It is"
    # A reply ends with its turn: as if a token that this model makes ended it.
    made = generate(
        chat_run.model, jnp.asarray(wanted)[None], jnp.array([len(wanted)]), 6,
        greedy=True,
    )  # fmt: skip
    said = scorer.generate_until([(context, {"max_gen_toks": 6})])[0]
    ids = np.asarray(made[0])
    ids = ids[: ids.tolist().index(end)] if end in ids.tolist() else ids
    assert said == tokenizer.decode_bytes(ids).decode("utf-8", "replace")


def test_a_run_without_a_template_refuses_conversations(scorer, run):
    with pytest.raises(ConfigError, match="no chat template; leave apply_chat_templat"):
        Scorer(run).write_chat(CHAT)
    assert Scorer(run).chat is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_beams": 4}, "num_beams is 4, which isn't taken; here it is 1, or left"),
        ({"temprature": 0.5}, "temprature is 0.5, .*did you mean temperature"),
        ({"until": 5}, "until is 5; give a text or a list of texts"),
        ({"until": {"stop": "."}}, "until is .*; give a text or a list of texts"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'; give a whole number"),
        ({"max_tokens": -3}, "max_tokens is -3; give a whole number above 0"),
        ({"temperature": "hot"}, "temperature is 'hot'; give a number"),
        ({"do_sample": "yes"}, "do_sample is 'yes'; give true or false"),
        ({"do_sample": True, "top_k": "x"}, "top_k is 'x'; expected int"),
        ({"stop": ["x"]}, "setting stop is"),
        ({"until": ["x", 3]}, "until is .*; give a text or a list"),
    ],
)
def test_generation_settings_that_arent_taken_are_refused(scorer, settings, says):
    with pytest.raises(ConfigError, match=says) as told:
        scorer.generate_until([("the", {"max_gen_toks": 2}), ("the", settings)])
    assert "\n" not in str(told.value)


def test_settings_that_change_nothing_are_taken(scorer):
    plain = scorer.generate_until([("the", {"max_gen_toks": 2})])
    more = {"num_beams": 1, "repetition_penalty": 1.0, "min_p": None, "max_gen_toks": 2}
    assert scorer.generate_until([("the", more)]) == plain


TASK = """task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
doc_to_text: "{{{{q}}}}"
output_type: {kind}
{more}
"""
ASKED = {
    "multiple_choice": (
        'doc_to_choice: "{{choices}}"\ndoc_to_target: gold\n'
        "metric_list: [{metric: acc}]"
    ),
    "generate_until": (
        'doc_to_target: "{{made}}"\nmetric_list: [{metric: exact_match}]\n'
        'generation_kwargs: {until: ["zzz"], max_gen_toks: 4}'
    ),
}


@pytest.mark.parametrize("kind", ASKED)
def test_a_whole_evaluation(run, scorer, tmp_path, monkeypatch, kind):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    asked, choices = ["the 7", "number 9"], ["words", "text", "of a"]
    rows = []
    for wrong, q in enumerate(asked):
        found = [value for value, _ in scorer.loglikelihood(
            [(q, f" {choice}") for choice in choices]
        )]  # fmt: skip
        gold = (int(np.argmax(found)) + wrong) % 3  # right for the first only
        made = scorer.generate_until([(q, {"until": ["zzz"], "max_gen_toks": 4})])[0]
        rows.append({"q": q, "choices": choices, "gold": gold, "made": made})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TASK.format(rows=file, kind=kind, more=ASKED[kind])
    (tmp_path / "local.yaml").write_text(task)
    found = lm_eval.simple_evaluate(
        model=run_lm(run, batch_size=3),
        tasks=["local"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        bootstrap_iters=0,
    )["results"]["local"]
    if kind == "multiple_choice":
        assert found["acc,none"] == 0.5
    else:
        assert found["exact_match,none"] == 1


def test_a_request_to_draw_without_a_temperature_is_drawn_as_the_model_has_it():
    assert _sampling({"do_sample": True, "top_k": 3}) == Sampling(top_k=3)
    assert _sampling({"do_sample": False, "temperature": 0.7}).takes_likeliest
    assert _sampling({"do_sample": True, "temperature": 0}).takes_likeliest
    assert _sampling({"temperature": 0.7}) == Sampling(temperature=0.7)
    assert _sampling({}).takes_likeliest
