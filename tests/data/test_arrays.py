"""Images and token arrays: splits, standardisation and refusals."""

from __future__ import annotations

import numpy as np
import pytest

from uoe_jax.data import make_dataset, prepare
from uoe_jax.errors import DataError


def save(path, **arrays):
    np.savez(path, **arrays)
    return path


def refused(config):
    with pytest.raises(DataError) as caught:
        make_dataset(config, "train")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def make_images(count, size=6, channels=(), seed=0):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (count, size, size, *channels), dtype=np.uint8)


IMAGES = {"image_size": 6, "image_patch": 2, "num_classes": 10}


@pytest.fixture
def digits(make_config):
    return lambda split: make_dataset(make_config(kind="vision"), split)


def test_digits_are_all_there_and_in_one_split_each(digits):
    sets = [digits(s) for s in ("train", "valid", "test")]
    assert sum(d.num_examples for d in sets) == 1797
    images = [d.prepared.array(d.split, "images") for d in sets]
    keys = [{i.tobytes() for i in group} for group in images]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert 60 <= sets[1].num_examples <= 120
    assert set(sets[1].prepared.array("valid", "labels").tolist()) == set(range(10))


def test_digits_are_standardised_by_the_train_split(digits):
    train = digits("train")
    every = train.examples(np.arange(train.num_examples))["images"]
    assert every.shape[1:] == (8, 8, 1) and every.dtype == np.float32
    # 104,192 float32 pixels: rounding stays far below.
    assert abs(every.mean()) < 1e-4 and abs(every.std() - 1) < 1e-4
    pixels = digits("test").prepared.array("test", "images")
    shown = digits("test").examples(np.arange(len(pixels)))["images"]
    mean, deviation = train.info["mean"][0], train.info["deviation"][0]
    np.testing.assert_allclose(shown, (pixels - mean) / deviation, atol=1e-5)


def test_image_batches_are_pure_and_labelled(digits):
    one, two = digits("train"), digits("train")
    for step in (0, 500):
        for key, value in one.batch(step).items():
            assert np.array_equal(value, two.batch(step)[key])
    batch = one.batch(0)
    images, labels = (one.prepared.array("train", k) for k in ("images", "labels"))
    by_content = {i.tobytes(): int(n) for i, n in zip(images, labels, strict=True)}
    mean, deviation = one.info["mean"][0], one.info["deviation"][0]
    pixels = np.rint(batch["images"] * deviation + mean).astype(np.uint8)
    assert [by_content[p.tobytes()] for p in pixels] == batch["labels"].tolist()


def test_last_image_batch_is_padded_with_label_minus_one(digits):
    valid = digits("valid")
    batches = [valid.batch(i) for i in range(valid.num_batches)]
    labels = np.concatenate([b["labels"] for b in batches])
    assert (labels >= 0).sum() == valid.num_examples
    images = np.concatenate([b["images"] for b in batches])
    assert not images[labels < 0].any()


@pytest.mark.parametrize(
    "names",
    [("xtr", "ytr", "xte", "yte"), ("x_train", "y_train", "x_test", "y_test")],
)
def test_npz_images_keep_their_test_split(make_config, tmp_path, names):
    arrays = [make_images(40), np.arange(40) % 10, make_images(9, seed=1), np.arange(9)]
    path = save(tmp_path / "a.npz", **dict(zip(names, arrays, strict=True)))
    config = make_config(path, "vision", valid_fraction=0.2, **IMAGES)
    sizes = {
        s: make_dataset(config, s).num_examples for s in ("train", "valid", "test")
    }
    assert sizes["test"] == 9 and sizes["train"] + sizes["valid"] == 40
    assert sizes["valid"] > 0
    assert np.array_equal(prepare(config).array("test", "images")[..., 0], arrays[2])


def test_float_images_with_channels(make_config, tmp_path):
    images = make_images(40, channels=(3,)) / 255.0
    images[..., 1] = 0.5  # a constant channel is left alone, not divided by 0
    path = save(tmp_path / "a.npz", images=images, labels=np.arange(40) % 4)
    config = make_config(path, "vision", image_channels=3, **IMAGES)
    train = make_dataset(config, "train")
    every = train.examples(np.arange(train.num_examples))["images"]
    np.testing.assert_allclose(every.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(every.std((0, 1, 2)), [1, 0, 1], atol=1e-5)


def test_token_stream_is_cut_into_ranges(make_config, tmp_path):
    tokens = np.arange(1000) % 300
    config = make_config(save(tmp_path / "a.npz", tokens=tokens), vocab_size=300)
    prepared = prepare(config)
    parts = [np.array(prepared.array(s, "tokens")) for s in ("train", "valid", "test")]
    assert [len(p) for p in parts] == [900, 50, 50]
    assert np.array_equal(np.concatenate(parts), tokens)
    dataset = make_dataset(config, "train")
    assert (
        dataset.bytes_per_token is None
        and dataset.count_bytes(dataset.batch(0)) is None
    )
    assert dataset.decode([3, 4]) == "3 4"


def test_named_token_splits_and_npy(make_config, tmp_path):
    parts = {"train": np.full(99, 1), "valid": np.full(50, 2), "test": np.full(40, 3)}
    prepared = prepare(make_config(save(tmp_path / "a.npz", **parts)))
    for split, part in parts.items():
        assert np.array_equal(prepared.array(split, "tokens"), part)
    np.save(tmp_path / "b.npy", np.arange(200, dtype=np.uint16))
    assert len(prepare(make_config(tmp_path / "b.npy")).array("train", "tokens")) == 180


def test_token_rows_are_documents(make_config, tmp_path):
    rows = np.arange(80 * 5).reshape(80, 5) % 250
    config = make_config(save(tmp_path / "a.npz", tokens=rows), pack="documents")
    dataset = make_dataset(config, "train")
    batch = dataset.examples(np.arange(dataset.num_examples))
    # Rows of 5 tokens predict 4 each; two of them fill 8.
    assert (batch["segments"][0] == [1, 1, 1, 1, 2, 2, 2, 2]).all()
    assert (batch["positions"][0] == [0, 1, 2, 3, 0, 1, 2, 3]).all()


def test_labelled_token_rows_for_an_encoder(make_config, tmp_path):
    rows, labels = np.arange(60).reshape(20, 3), np.arange(20) % 2
    path = save(tmp_path / "a.npz", xtr=rows, ytr=labels)
    batch = make_dataset(make_config(path, "encoder"), "train").batch(0)
    assert batch["segments"].sum(axis=1).tolist() == [3] * 4
    assert (batch["labels"] == batch["tokens"][:, 0] // 3 % 2).all()


@pytest.mark.parametrize(
    ("kind", "arrays", "message"),
    [
        ("decoder", {"xtr": make_images(9)}, "holds images but model.kind is 'decode"),
        ("vision", {"tokens": np.arange(9)}, "holds tokens but model.kind is 'vision'"),
        ("vision", {"xtr": make_images(9)}, "a.npz has no labels but model.kind"),
        (
            "vision",
            {"xtr": make_images(9), "ytr": np.arange(8)},
            "a.npz train has 9 inputs and 8 labels; they must be as many",
        ),
        (
            "vision",
            {"xtr": make_images(9, size=4), "ytr": np.arange(9)},
            "has images of 4x4x1 but the model takes 6x6x1; set model.image_size 4",
        ),
        (
            "vision",
            {"xtr": make_images(9), "ytr": np.arange(9) * 2},
            "classes but model.num_classes is 10; set it to 1",
        ),
        ("vision", {"foo": np.ones(3)}, "holds foo [3]; name the arrays xtr, ytr"),
        (
            "vision",
            {"xtr": make_images(9), "ytr": np.arange(9) / 2},
            "has labels float64 [9]; they must be class numbers [N] from 0",
        ),
        ("decoder", {"tokens": np.array([1, -2])}, "has token id -2; ids start at 0"),
        ("decoder", {"tokens": np.arange(300)}, "ids has 300 entries but model.vocab"),
        ("decoder", {"tokens": np.ones(9)}, "images are [N, height, width(, channels)"),
        ("decoder", {"tokens": np.ones(0, int)}, "a.npz train is empty; give it"),
        ("decoder", {"tokens": np.array(["a"], object)}, "can't be read as arrays"),
    ],
)
def test_unusable_arrays_are_refused_in_one_line(
    make_config, tmp_path, kind, arrays, message
):
    path = save(tmp_path / "a.npz", **arrays)
    options = IMAGES if kind == "vision" else {}
    assert message in refused(make_config(path, kind, **options))


@pytest.mark.parametrize("keep", [0, 30, 300])
def test_a_truncated_archive_is_refused(make_config, tmp_path, keep):
    path = save(tmp_path / "a.npz", tokens=np.arange(200))
    path.write_bytes(path.read_bytes()[:keep])
    message = refused(make_config(path))
    assert "can't be read as arrays" in message or "is damaged" in message
