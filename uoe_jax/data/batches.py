"""Datasets: batch number n as a pure function of the seed and n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from uoe_jax.config import ExperimentConfig, ModelConfig
from uoe_jax.data.mix import mixed_order
from uoe_jax.data.order import eval_order, train_order
from uoe_jax.data.pack import fill_rows, join_rows, stretch_rows
from uoe_jax.data.prepare import Prepared, prepare
from uoe_jax.data.split import SPLITS
from uoe_jax.data.tokenize import Tokenizer
from uoe_jax.errors import ConfigError, DataError, nearest
from uoe_jax.mixture import block_counts, read_mix

Batch = dict[str, np.ndarray]


class Dataset:
    """One split of prepared data, as batches that anyone can ask for in any order.

    Train batches run on without end through reshuffled epochs, no example left out at
    their borders. Valid and test batches are one pass in a fixed order; the last is
    filled up with rows whose mask (or label weight) is 0.
    """

    def __init__(self, config: ExperimentConfig, split: str, prepared: Prepared):
        self.config, self.split, self.prepared = config, split, prepared
        self.info: dict[str, Any] = prepared.manifest
        self.manifest: str = prepared.manifest["hash"]
        self.tokenizer: Tokenizer | None = None
        if prepared.manifest["tokenizer"] is not None:
            self.tokenizer = prepared.tokenizer()
            _check_vocab(self.tokenizer, config)
        self.num_examples = 0

    @property
    def num_batches(self) -> int:
        """Return batches in one pass; the last may be partly padding (train: full)."""
        size = self.config.data.batch_size
        if self.split == "train":
            return max(self.num_examples // size, 1)
        return -(-self.num_examples // size)

    def batch(
        self, step: int, *, process_index: int = 0, process_count: int = 1
    ) -> Batch:
        """Return one process's rows of batch number `step`, rows in order of process.

        Raises DataError past the end of valid or test, ConfigError if the batch size
        isn't a multiple of `process_count`.
        """
        size = self.config.data.batch_size
        if size % process_count:
            raise ConfigError(
                f"data.batch_size {size} isn't a multiple of {process_count} "
                f"processes; use {-(-size // process_count) * process_count}"
            )
        if step < 0 or (self.split != "train" and step >= self.num_batches):
            raise DataError(
                f"batch {step} of {self.split} doesn't exist; it has batches 0 to "
                f"{self.num_batches - 1}"
            )
        rows = size // process_count
        return self.examples(self.choose(step * size + process_index * rows, rows))

    def choose(self, first: int, count: int) -> Int[np.ndarray, " B"]:
        """Return the examples at some positions of the split's endless or one pass."""
        positions = np.arange(first, first + count, dtype=np.int64)
        if self.split == "train":
            return train_order(positions, self.num_examples, self.config.data.seed)
        return eval_order(positions, self.num_examples)

    def lengths(self, step: int) -> Int[np.ndarray, " S"] | None:
        """Return the tokens of every sequence in batch `step`; None if rows are full.

        Sequences don't see each other: documents packed in a row, texts with padding.
        """
        size = self.config.data.batch_size
        chosen = self.choose(step * size, size)
        return self._lengths_of(chosen[chosen >= 0])

    def _lengths_of(
        self, chosen: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, " S"] | None:
        del chosen
        return None

    def examples(self, chosen: Int[np.ndarray, " B"]) -> Batch:
        """Return the batch of the examples with these numbers; -1 is padding."""
        raise NotImplementedError

    @property
    def bytes_per_token(self) -> float | None:
        """Return the split's bytes of text a token, its ends of document included."""
        counts = self.info["splits"][self.split]
        if counts.get("bytes") is None or not counts.get("tokens"):
            return None
        return counts["bytes"] / counts["tokens"]

    @property
    def token_bytes(self) -> Float[np.ndarray, " V"] | None:
        """Return the bytes of every token id; None for data that isn't text.

        Exact for bytes and byte-level BPE. Tokenizers that change the text (other
        normalisations) have no such table: every token gets the split's average. What
        a tokenizer doesn't know is left out: the unknown token stands for no bytes.
        """
        counts = self.info["splits"][self.split]
        if self.tokenizer is None or self.bytes_per_token is None:
            return None
        if counts["exact_bytes"]:
            return self.tokenizer.token_bytes
        kept = counts["bytes"] - counts.get("lost_bytes", 0)
        known = counts["tokens"] - counts.get("unknown_tokens", 0)
        table = np.full(self.tokenizer.vocab_size, kept / max(known, 1))
        unknown = getattr(self.tokenizer, "unknown", None)
        if unknown is not None:
            table[unknown] = 0.0
        return table

    @property
    def lost_share(self) -> float:
        """Return the share of the split's bytes that the tokenizer doesn't know."""
        counts = self.info["splits"][self.split]
        return counts.get("lost_bytes", 0) / max(counts.get("bytes") or 0, 1)

    def count_bytes(self, batch: Batch) -> float | None:
        """Return the bytes of text that a batch's targets stand for, by its mask.

        Summed over batches, bits per byte = nats / ln 2 / bytes.
        """
        table = self.token_bytes
        if table is None or "targets" not in batch:
            return None
        return float((table[batch["targets"]] * batch["mask"]).sum())

    def encode(self, text: str) -> Int[np.ndarray, " T"]:
        """Return a text's token ids; raise DataError if the data isn't text."""
        return self._need_tokenizer().encode(text)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Return the text of token ids; raise DataError if the data isn't text."""
        return self._need_tokenizer().decode(ids)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise DataError(f"{self.info['source']} holds images; they have no text")
        return self.tokenizer


class TokenDataset(Dataset):
    """Rows of tokens for a decoder; see `fill_rows` for what a batch holds."""

    def __init__(self, config: ExperimentConfig, split: str, prepared: Prepared):
        super().__init__(config, split, prepared)
        self._tokens = prepared.array(split, "tokens")
        self._scored = prepared.optional_array(split, "scored")
        seq_len, starts = config.seq_len, None
        if config.data.pack == "documents":
            starts = prepared.array(split, "starts")
        # The tokens of each source of a mixture lie together, one after the other.
        counts = self.info["splits"][split].get("members", [len(self._tokens)])
        partial = split != "train"
        rows = stretch_rows(counts, starts, seq_len, self._scored, partial=partial)
        self._rows, self._sizes = join_rows(rows), np.array([len(r) for r in rows])
        self.num_examples = len(self._rows)
        if self.num_examples == 0:
            raise DataError(_too_short(self, len(self._tokens)))
        self._shares: Int[np.ndarray, " K"] | None = None
        if config.data.mix and split == "train":
            self._shares = self._member_shares()

    def _member_shares(self) -> Int[np.ndarray, " K"]:
        """Return each source's rows of a block; DataError if one has none at all."""
        shares = read_mix(self.config.data.mix or ())
        for share, size in zip(shares, self._sizes.tolist(), strict=True):
            if not size:
                raise DataError(
                    f"data.mix: {share.path} has no row of {self.config.seq_len} "
                    "tokens to train on; give more of it or leave it out"
                )
        return np.array(block_counts([share.weight for share in shares]))

    def choose(self, first: int, count: int) -> Int[np.ndarray, " B"]:
        """Return examples as `Dataset.choose`, each source's by its share."""
        if self._shares is None:
            return super().choose(first, count)
        positions = np.arange(first, first + count, dtype=np.int64)
        seed = self.config.data.seed
        return mixed_order(positions, self._sizes, self._shares, seed)

    def examples(self, chosen: Int[np.ndarray, " B"]) -> Batch:
        """Return tokens, targets, positions, segments and mask, [B, T] each."""
        seq_len = self.config.seq_len
        return fill_rows(self._tokens, self._rows, chosen, seq_len, self._scored)

    def _lengths_of(
        self, chosen: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, " S"] | None:
        return self._rows.lengths_of(chosen)


class RowDataset(Dataset):
    """Labelled texts for an encoder, cut at T tokens or padded to T.

    A batch holds tokens and segments (1, 0 is padding) int32 [B, T] and labels int32
    [B]; a row that only fills up the batch has label -1.
    """

    def __init__(self, config: ExperimentConfig, split: str, prepared: Prepared):
        super().__init__(config, split, prepared)
        self._tokens = prepared.array(split, "tokens")
        self._starts = prepared.array(split, "starts")
        self._labels = prepared.array(split, "labels")
        self.num_examples = len(self._labels)
        _check_labels(self)

    def examples(self, chosen: Int[np.ndarray, " B"]) -> Batch:
        """Return tokens, segments [B, T] and labels [B]."""
        seq_len = self.config.seq_len
        tokens = np.zeros((len(chosen), seq_len), np.int32)
        segments = np.zeros_like(tokens)
        for row, index in enumerate(chosen.tolist()):
            if index >= 0:
                start, end = self._starts[index : index + 2]
                length = min(int(end - start), seq_len)
                tokens[row, :length] = self._tokens[start : start + length]
                segments[row, :length] = 1
        labels = _choose_labels(self._labels, chosen)
        return {"tokens": tokens, "segments": segments, "labels": labels}

    def _lengths_of(
        self, chosen: Int[np.ndarray, " B"]
    ) -> Int[np.ndarray, " S"] | None:
        lengths = self._starts[chosen + 1] - self._starts[chosen]
        return np.minimum(lengths, self.config.seq_len)


class ImageDataset(Dataset):
    """Labelled images, standardised with the train split's mean and deviation.

    A batch holds images float32 [B, Hi, Wi, Ci] and labels int32 [B]; a row that only
    fills up the batch has label -1.
    """

    def __init__(self, config: ExperimentConfig, split: str, prepared: Prepared):
        super().__init__(config, split, prepared)
        self._images = prepared.array(split, "images")
        self._labels = prepared.array(split, "labels")
        self._mean = np.array(prepared.manifest["mean"], np.float32)
        self._deviation = np.array(prepared.manifest["deviation"], np.float32)
        self.num_examples = len(self._labels)
        _check_images(self)
        _check_labels(self)

    def examples(self, chosen: Int[np.ndarray, " B"]) -> Batch:
        """Return images [B, Hi, Wi, Ci] and labels [B]."""
        images = self._images[np.maximum(chosen, 0)].astype(np.float32)
        images = (images - self._mean) / self._deviation
        images[chosen < 0] = 0
        return {"images": images, "labels": _choose_labels(self._labels, chosen)}


def make_dataset(config: ExperimentConfig, split: str) -> Dataset:
    """Return one split of an experiment's data, prepared first if it isn't.

    Raises DataError if the data is missing, damaged, changed, too short or not of the
    model's kind, ConfigError for a model whose outputs no data here has targets for.
    """
    if split not in SPLITS:
        raise DataError(f"no split {split!r}; {nearest(split, SPLITS)}")
    check_targets(config.model)
    return open_dataset(config, split, prepare(config))


def check_targets(model: ModelConfig) -> None:
    """Raise ConfigError for a model whose outputs no data here has targets for."""
    if model.kind == "encoder" and model.encoder_head != "classes":
        raise ConfigError(
            f"model.encoder_head is {model.encoder_head!r}, which has no targets in "
            "data of classes; set model.encoder_head classes to train or evaluate it"
        )


def open_dataset(config: ExperimentConfig, split: str, prepared: Prepared) -> Dataset:
    """Return one split of data that is prepared already."""
    counts = prepared.manifest["splits"][split]
    if not counts["documents"]:
        option = f"data.{split}_fraction" if split != "train" else "the other fractions"
        raise DataError(
            f"{prepared.manifest['source']} has no {split} data; "
            f"change {option} or give more documents"
        )
    kinds = {"text": TokenDataset, "rows": RowDataset, "images": ImageDataset}
    return kinds[prepared.kind](config, split, prepared)


def _choose_labels(
    labels: np.ndarray, chosen: Int[np.ndarray, " B"]
) -> Int[np.ndarray, " B"]:
    picked = labels[np.maximum(chosen, 0)].astype(np.int32)
    return np.where(chosen < 0, np.int32(-1), picked)


def _too_short(dataset: TokenDataset, num_tokens: int) -> str:
    data = dataset.config.data
    needed = dataset.config.seq_len + 1
    if data.pack == "documents" or dataset.split != "train":
        needed = 2
    return (
        f"{dataset.info['source']} has {num_tokens} tokens of {dataset.split}; one "
        f"example needs {needed}, so give more data"
        + (f" or data.seq_len {max(num_tokens - 1, 1)}" if needed > 2 else "")
    )


def _check_vocab(tokenizer: Tokenizer, config: ExperimentConfig) -> None:
    if tokenizer.vocab_size > config.model.vocab_size:
        raise DataError(
            f"tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries but "
            f"model.vocab_size is {config.model.vocab_size}; set it to at least "
            f"{tokenizer.vocab_size}"
        )


def _check_labels(dataset: Dataset) -> None:
    classes, limit = len(dataset.info["classes"]), dataset.config.model.num_classes
    if classes > limit:
        raise DataError(
            f"{dataset.info['source']} has {classes} classes but model.num_classes is "
            f"{limit}; set it to {classes}"
        )


def _check_images(dataset: ImageDataset) -> None:
    model, (height, width, channels) = dataset.config.model, dataset.info["image_shape"]
    size = (model.image_size, model.image_size, model.image_channels)
    if (height, width, channels) != size:
        fix = f"set model.image_size {height} and model.image_channels {channels}"
        if height != width:
            fix = "make the images square, [N, height, width, channels]"
        raise DataError(
            f"{dataset.info['source']} has images of {height}x{width}x{channels} but "
            f"the model takes {size[0]}x{size[1]}x{size[2]}; {fix}"
        )
