"""A mixture gives each source its share of the rows, at any step, and nothing more."""

from __future__ import annotations

import json

import numpy as np
import pytest

from uoe_jax.cli import main
from uoe_jax.data import describe, make_dataset, prepare
from uoe_jax.data.chat import CHATML
from uoe_jax.data.mix import mixed_order
from uoe_jax.data.order import permute
from uoe_jax.data.prepare import find_prepared
from uoe_jax.data.split import hold_out_together
from uoe_jax.errors import ConfigError, DataError
from uoe_jax.mixture import BLOCK, block_counts, read_mix
from uoe_jax.validation import validate


@pytest.fixture
def texts(tmp_path, rng):
    """Three texts, each of letters of its own: a file, a folder, JSON lines."""

    def lines(letters, count):
        words = ["".join(rng.choice(list(letters), 9)) for _ in range(count)]
        return [f"{word}\n" + "\n" * (i % 7 == 6) for i, word in enumerate(words)]

    (tmp_path / "a.txt").write_text("".join(lines("abc", 300)))
    folder = tmp_path / "code"
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text("".join(lines("ijk", 40)))
    records = [json.dumps({"text": line.strip()}) for line in lines("xyz", 200)]
    (tmp_path / "c.jsonl").write_text("\n".join(records))
    return tmp_path


def mix_of(folder, *weights):
    names = ("a.txt", "code", "c.jsonl")
    return tuple(f"{folder / n}={w}" for n, w in zip(names, weights, strict=True))


def sources_of(dataset, tokens):
    """The source of each row by its letters; a row of two would be -1."""
    sets = [np.isin(tokens, list(s.encode())) for s in ("abc", "ijk", "xyz")]
    found = np.array([s.any(axis=-1) for s in sets])
    assert (found.sum(axis=0) == 1).all(), "a row has letters of two sources"
    return found.argmax(axis=0)


@pytest.mark.parametrize("pack", ["stream", "documents"])
def test_ten_thousand_batches_have_the_weights_to_one_percent(make_config, texts, pack):
    weights = (5, 3, 2)
    config = make_config(mix=mix_of(texts, *weights), pack=pack, max_seq_len=16)
    data = make_dataset(config, "train")
    chosen = data.choose(0, 10_000 * config.data.batch_size)
    every = data.examples(np.arange(data.num_examples))["tokens"]
    source = sources_of(data, every)[chosen]
    shares = np.bincount(source, minlength=3) / len(source)
    assert np.abs(shares / np.array([0.5, 0.3, 0.2]) - 1).max() < 0.01
    few = np.bincount(source[:200], minlength=3)  # mixed all along, not in turns
    assert (few > 10).all()


def test_the_order_is_what_a_plain_loop_gives(rng):
    weights = rng.random(int(rng.integers(2, 6))) + 0.01
    sizes, counts = (
        rng.integers(1, 50, len(weights)),
        np.array(block_counts(weights.tolist())),
    )
    assert counts.sum() == BLOCK
    assert np.abs(counts / BLOCK - weights / weights.sum()).max() <= 1 / BLOCK
    seed, ends = int(rng.integers(100)), np.cumsum(counts)
    positions = np.sort(rng.choice(5 * BLOCK, 300, replace=False))
    found = mixed_order(positions, sizes, counts, seed)
    first = np.concatenate([[0], np.cumsum(sizes)])
    for position, row in zip(positions.tolist(), found.tolist(), strict=True):
        block, place = divmod(position, BLOCK)
        slot = int(permute(np.array([place]), BLOCK, (seed, block, len(counts)))[0])
        source = next(i for i, end in enumerate(ends.tolist()) if slot < end)
        taken = block * int(counts[source]) + slot - int(ends[source] - counts[source])
        epoch, inside = divmod(taken, int(sizes[source]))
        own = int(permute(np.array([inside]), int(sizes[source]), (seed, epoch))[0])
        assert row == first[source] + own
    again = [mixed_order(np.array([p]), sizes, counts, seed)[0] for p in positions[:20]]
    assert found[:20].tolist() == [int(a) for a in again]


def test_over_a_block_every_row_comes_as_often_as_its_source_has_room(
    make_config, texts
):
    config = make_config(mix=mix_of(texts, 5, 3, 2), max_seq_len=16)
    data = make_dataset(config, "train")
    times = np.bincount(data.choose(0, BLOCK), minlength=data.num_examples)
    first = np.cumsum([0, *data._sizes])
    counts = block_counts([5.0, 3.0, 2.0])
    for number, size in enumerate(data._sizes.tolist()):
        mine = times[first[number] : first[number + 1]]
        assert mine.sum() == counts[number]
        assert set(mine.tolist()) <= {
            counts[number] // size,
            -(-counts[number] // size),
        }


def test_any_batch_is_the_same_in_a_fresh_dataset_and_for_two_processes(
    make_config, texts
):
    config = make_config(mix=mix_of(texts, 1, 1, 1))
    one, two = (make_dataset(config, "train") for _ in range(2))
    for step in (2600, 0, 7):
        whole = one.batch(step)["tokens"]
        parts = [two.batch(step, process_index=i, process_count=2) for i in (0, 1)]
        assert np.array_equal(whole, np.concatenate([p["tokens"] for p in parts]))


def test_weights_prepare_nothing_anew_and_change_the_order_alone(make_config, texts):
    configs = [make_config(mix=mix_of(texts, *w)) for w in ((1, 1, 1), (8, 1, 1))]
    one, two = (prepare(config) for config in configs)
    assert one.folder == two.folder and one.manifest["hash"] == two.manifest["hash"]
    first, second = (make_dataset(config, "train") for config in configs)
    assert not np.array_equal(first.batch(0)["tokens"], second.batch(0)["tokens"])
    valid = [make_dataset(config, "valid").batch(0)["tokens"] for config in configs]
    assert np.array_equal(*valid)


def test_valid_holds_out_some_of_each_source(make_config, texts):
    config = make_config(mix=mix_of(texts, 1, 1, 1), valid_fraction=0.2)
    data = make_dataset(config, "valid")
    tokens = data.examples(np.arange(data.num_examples))["tokens"]
    letters = [list(s.encode()) for s in ("abc", "ijk", "xyz")]
    assert all(np.isin(tokens, group).any() for group in letters)
    held = describe(config)
    assert held["source"] == "a.txt + " + str(texts / "code") + " + c.jsonl"


def test_a_source_that_changes_is_noticed(make_config, texts):
    config = make_config(mix=mix_of(texts, 1, 1, 1))
    prepare(config)
    with (texts / "c.jsonl").open("a") as file:
        file.write('\n{"text": "zz"}')
    with pytest.raises(DataError, match=r"changed since .*2/c\.jsonl"):
        prepare(config)


def test_the_built_in_text_can_be_a_source(make_config, texts):
    config = make_config(
        mix=("stdlib=1", f"{texts / 'a.txt'}=3"), max_bytes=20_000, tokenizer="byte"
    )
    data = make_dataset(config, "train")
    tokens = data.batch(0)["tokens"]
    assert tokens.shape == (4, 8) and data.num_examples > 100


@pytest.mark.parametrize(
    ("mix", "said"),
    [
        (("a.txt",), "data.mix has 'a.txt'; write PATH=WEIGHT"),
        (("a.txt=", "b=1"), "data.mix has 'a.txt='"),
        (("=1", "b=1"), "data.mix has '=1'"),
        (("a=0", "b=1"), "data.mix has 'a=0'; write PATH=WEIGHT with a positive"),
        (("a=-1", "b=1"), "data.mix has 'a=-1'"),
        (("a=nan", "b=1"), "data.mix has 'a=nan'"),
        (("a=inf", "b=1"), "data.mix has 'a=inf'"),
        (("a=1",), "data.mix has one source; set data.path a instead"),
        (("a=1", "a=2"), "data.mix names a twice; add up its weights"),
        (("a=1e-9", "b=1"), "data.mix gives a less than one row in 10,000"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(make_config, mix, said):
    with pytest.raises(ConfigError) as error:
        validate(make_config(mix=mix))
    assert said in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ConfigError):
        read_mix(mix)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"path": "b.txt"}, "data.path is 'b.txt' beside data.mix; add it"),
        ({"source": "jsonl"}, "data.source is 'jsonl', but data.mix takes each"),
        ({"kind": "vision"}, "data.mix is a mixture of plain texts but model.kind"),
        ({"kind": "encoder"}, "data.mix is a mixture of plain texts but model.kind"),
    ],
)
def test_a_mixture_beside_what_it_does_not_go_with(make_config, options, said):
    with pytest.raises(ConfigError, match=said.replace(".", r"\.")):
        validate(make_config(mix=("a=1", "b=1"), **options))


def test_a_source_too_short_for_one_row_is_named(make_config, texts):
    (texts / "short.txt").write_text("abc")
    mix = (f"{texts / 'a.txt'}=1", f"{texts / 'short.txt'}=1")
    with pytest.raises(DataError, match=r"short\.txt has no row of 8 tokens"):
        make_dataset(make_config(mix=mix), "train")


def test_images_and_labelled_rows_are_no_part_of_a_mixture(make_config, texts):
    np.savez(texts / "rows.npz", tokens=np.zeros((4, 8), np.int32))
    mix = (f"{texts / 'a.txt'}=1", f"{texts / 'rows.npz'}=1")
    with pytest.raises(DataError, match=r"rows\.npz"):
        prepare(make_config(mix=mix))


def write_records(file, key="text", chat=False):
    turns = [{"role": "user", "content": "u?"}, {"role": "assistant", "content": "v"}]
    record = {"messages": turns} if chat else {key: "some xyz words"}
    file.write_text("\n".join(json.dumps({**record, "id": i}) for i in range(60)))
    return f"{file}=1"


def test_an_option_of_records_is_of_the_sources_that_are_records(make_config, texts):
    mix = (f"{texts / 'a.txt'}=1", write_records(texts / "b.jsonl", key="body"))
    config = make_config(mix=mix, text_key="body", bad_records="skip")
    assert make_dataset(config, "train").num_examples > 100
    mix = (*mix, write_records(texts / "d.jsonl"))
    with pytest.raises(DataError, match=r"d\.jsonl line 1 has no field 'body'"):
        prepare(make_config(mix=mix, text_key="body"))
    for name, value in (("text_key", "body"), ("data_dir", "x")):
        config = make_config(mix=("stdlib=1", f"{texts / 'a.txt'}=1"), **{name: value})
        with pytest.raises(ConfigError, match=f"data.{name} is '{value}', but no sour"):
            prepare(config)


def test_conversations_of_a_mixture_keep_their_template_and_their_masks(
    make_config, texts
):
    mix = (f"{texts / 'a.txt'}=1", write_records(texts / "talk.jsonl", chat=True))
    config = make_config(mix=mix, max_seq_len=64, pack="documents")
    prepared = prepare(config)
    assert prepared.chat_text() == CHATML.to_json()
    data = make_dataset(config, "train")
    batch = data.examples(np.arange(data.num_examples))
    talks = np.isin(batch["tokens"], [ord("?")]).any(axis=1)
    counted = batch["mask"] > 0
    assert talks.any() and not talks.all()
    assert (counted[~talks] == (batch["segments"][~talks] > 0)).all()
    said = bytes(batch["targets"][talks][counted[talks]].tolist())
    assert set(said.split(b"\0")) == {b"v<|im_end|>\n", b""}


def test_what_is_prepared_is_found_without_its_sources(make_config, texts):
    mixes = [mix_of(texts, 1, 1, 1), ("stdlib=2", f"{texts / 'c.jsonl'}=1")]
    configs = [make_config(mix=mix, max_bytes=20_000) for mix in mixes]
    folders = [prepare(config).folder for config in configs]
    assert folders[0].name.startswith("a.txt-code-c.jsonl-")
    (texts / "c.jsonl").unlink()
    found = [find_prepared(config) for config in configs]
    assert [prepared and prepared.folder for prepared in found] == folders


def test_one_file_under_two_names_is_one_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for other in ("./a", str(tmp_path / "a")):
        with pytest.raises(ConfigError, match="names .* twice; add up its weights"):
            read_mix(("a=1", f"{other}=2"))
    assert len(read_mix(("stdlib=1", "./stdlib=2"))) == 2


def test_an_address_is_refused_before_anything_is_read(make_config):
    with pytest.raises(ConfigError, match="a source of data.mix is s3://bucket/a"):
        validate(make_config(mix=("a=1", "s3://bucket/a=1")))


def held_out_where(make_config, *options, **more):
    """The texts of each split of a prepared mixture, by their first words."""
    prepared = prepare(make_config(mix=options, **more))
    found = {}
    for split in ("train", "valid", "test"):
        tokens, starts = (prepared.array(split, name) for name in ("tokens", "starts"))
        pieces = zip(starts[:-1], starts[1:], strict=True)
        found[split] = [bytes(tokens[a:b].astype(np.uint8)) for a, b in pieces]
    return found


def test_a_text_of_two_sources_is_never_trained_on_and_held_out(
    make_config, tmp_path, capsys
):
    lines = [json.dumps({"text": f"text {n} " * 8}) for n in range(300)]
    (tmp_path / "all.jsonl").write_text("\n".join(lines) + "\n")
    # A file alone is cut by place: other texts of it are held out.
    some = [f"text {n} " * 8 for n in range(0, 300, 3)]
    (tmp_path / "some.txt").write_text("\n\n".join(some))
    mix = (f"{tmp_path / 'all.jsonl'}=1", f"{tmp_path / 'some.txt'}=1")
    found = held_out_where(make_config, *mix, valid_fraction=0.2, test_fraction=0.1)
    words = {
        split: {text.split(b"\0")[0].strip() for text in texts}
        for split, texts in found.items()
    }
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        # The text at a cut of the file may be in two pieces.
        assert not words[one] & words[other], (one, other)
    assert "texts of the mixture are in several sources" in capsys.readouterr().err
    assert all(words.values())


def test_contents_of_one_source_stay_where_they_are(rng):
    for _ in range(50):
        count = int(rng.integers(1, 60))
        splits = rng.integers(0, 3, count)
        contents = rng.integers(0, 20, count).astype(np.uint64)
        members = rng.integers(0, 3, count)
        found = hold_out_together(splits, contents, members)
        for content in np.unique(contents):
            mine = contents == content
            if len(set(members[mine])) == 1:
                assert (found[mine] == splits[mine]).all()
            else:
                assert (found[mine] == splits[mine].max()).all()


def test_a_source_that_is_wholly_held_out_in_another_is_refused(make_config, tmp_path):
    texts = [f"text {n} " * 8 for n in range(60)]
    (tmp_path / "a.txt").write_text("\n\n".join(texts))
    held = texts[-3:]  # the end of a file is its test split
    records = [json.dumps({"text": text}) for text in held]
    (tmp_path / "b.jsonl").write_text("\n".join(records))
    mix = (f"{tmp_path / 'a.txt'}=1", f"{tmp_path / 'b.jsonl'}=1")
    with pytest.raises(DataError, match="every text of b.jsonl that is trained on"):
        held_out_where(make_config, *mix, valid_fraction=0.0, test_fraction=0.2)


def test_a_description_has_the_weights_and_their_shares(make_config, texts, capsys):
    mix = (f"{texts / 'a.txt'}=3", f"{texts / 'code'}=1")
    told = describe(make_config(mix=mix))
    first, second = told["mix"]
    assert (first["weight"], first["rows"]) == (3.0, 0.75)
    assert (second["weight"], second["rows"]) == (1.0, 0.25)
    tokens = first["tokens"]["train"] + second["tokens"]["train"]
    assert tokens == told["splits"]["train"]["tokens"]
    assert describe(make_config(texts / "a.txt"))["mix"] is None
    typed = ["data", "tiny", "--data.mix", *mix, "--data.seq-len", "32"]
    assert main(typed) == 0
    out = capsys.readouterr().out
    assert "75.00%" in out and "25.00%" in out and "train tokens" in out
