"""Datasets built and read by TFDS itself, with no TensorFlow installed."""

from __future__ import annotations

import io
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from uoe_jax.data import describe, make_dataset, prepare
from uoe_jax.errors import DataError

TEXTS = [f"review {i}: {'good' if i % 2 else 'bad'} é\n" for i in range(60)]


def make_png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    file.seek(0)
    return file


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a folder with a text and an image dataset in array_record files."""
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():
        builders = define_builders(tfds)
    folder = tmp_path_factory.mktemp("tfds")
    for builder in builders:
        made = builder(data_dir=str(folder), file_format="array_record")
        made.download_and_prepare()
    return folder


def define_builders(tfds):
    """Return builders that TFDS doesn't know by name, as with anybody's own data."""

    class TinyReviews(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "review": tfds.features.Text(),
                "label": tfds.features.ClassLabel(names=["bad", "good"]),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {
                "train": self._generate_examples(TEXTS[:50]),
                "test": self._generate_examples(TEXTS[50:]),
            }

        def _generate_examples(self, texts):
            for text in texts:
                yield text, {"review": text, "label": int("good" in text)}

    class TinyPictures(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = {
                "image": tfds.features.Image(shape=(4, 4, 1)),
                "label": tfds.features.ClassLabel(num_classes=3),
            }
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(60):
                pixels = np.full((4, 4), i, np.uint8)
                yield i, {"image": make_png(pixels), "label": i % 3}

    return TinyReviews, TinyPictures


def test_text_becomes_a_decoders_documents(make_config, built):
    config = make_config("tfds:tiny_reviews", data_dir=str(built), valid_fraction=0.2)
    prepared = prepare(config)
    parts = [
        set(bytes(np.array(prepared.array(s, "tokens"))).decode().split("\0")) - {""}
        for s in ("train", "valid", "test")
    ]
    assert parts[2] == set(TEXTS[50:])
    assert parts[0] | parts[1] == set(TEXTS[:50]) and not parts[0] & parts[1]
    assert parts[1]
    assert "tensorflow" not in sys.modules
    assert len(prepared.manifest["sources"]) == 2


def test_labelled_text_becomes_an_encoders_rows(make_config, built):
    config = make_config(
        "tiny_reviews",
        "encoder",
        source="tfds",
        data_dir=str(built),
        max_seq_len=32,
        num_classes=2,
    )
    dataset = make_dataset(config, "test")
    batches = [dataset.batch(i) for i in range(dataset.num_batches)]
    seen = []
    for batch in batches:
        for row, label in zip(batch["tokens"], batch["labels"], strict=True):
            if label >= 0:
                seen.append(dataset.decode(row))
                assert ("good" in seen[-1]) == label
    assert sorted(seen) == sorted(TEXTS[50:])


def test_images_become_a_vision_batch(make_config, built):
    config = make_config(
        "tfds:tiny_pictures",
        "vision",
        data_dir=str(built),
        image_size=4,
        num_classes=3,
    )
    told = describe(config)
    assert sum(s["documents"] for s in told["splits"].values()) == 60
    prepared = prepare(config)
    images, labels = (prepared.array("train", k) for k in ("images", "labels"))
    assert images.shape[1:] == (4, 4, 1)
    assert (images[:, 0, 0, 0] % 3 == labels).all()


@pytest.mark.parametrize(
    ("path", "kind", "message"),
    [
        ("tfds:tiny_review", "decoder", "no TFDS dataset 'tiny_review' in"),
        ("tfds:tiny_pictures", "decoder", "has features image (Image), label (Cl"),
        ("tfds:tiny_reviews", "vision", "it needs one Image named 'image'"),
    ],
)
def test_unusable_datasets_are_refused_in_one_line(
    make_config, built, path, kind, message
):
    with pytest.raises(DataError) as caught:
        make_dataset(make_config(path, kind, data_dir=str(built)), "train")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_nearest_built_dataset_is_named(make_config, built):
    with pytest.raises(DataError, match="did you mean .*tiny_reviews"):
        prepare(make_config("tfds:tiny_revews", data_dir=str(built)))


def test_a_truncated_record_file_is_named(make_config, built, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(built, copied)
    (record,) = copied.glob("tiny_reviews/*/*train*record*")
    record.write_bytes(record.read_bytes()[: record.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        prepare(make_config("tfds:tiny_reviews", data_dir=str(copied)))
    assert "tfds:tiny_reviews/1.0.0" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rebuilt_dataset_is_refused(make_config, built, tmp_path):
    copied = tmp_path / "copied"
    shutil.copytree(built, copied)
    config = make_config("tfds:tiny_reviews", data_dir=str(copied))
    prepare(config)
    train, test = sorted(copied.glob("tiny_reviews/*/*record-*"), reverse=True)
    train.write_bytes(test.read_bytes())
    with pytest.raises(DataError, match="changed since it was prepared"):
        prepare(config)
