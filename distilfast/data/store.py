"""The store: the tokens of a corpus on disk."""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilfast.config import BatchConfig, ConfigError

# The store's format, raised when the meaning of its files changes. Format 1 has neither hashes nor
# counts of its texts, and equal texts may stand in both of its parts.
FORMAT = 2
# What the record counts: texts; and of those used, pieces that are no examples. For a causal LM
# also how many texts were cut.
COUNTED = ("read", "used", "repeated", "short", "unknown", "empty", "pieces")


@dataclass(frozen=True)
class Store:
    """The tokens of a corpus, memory-mapped by `datasets`."""

    train: Any
    heldout: Any
    counts: Tensor  # (V,) int64, each token's count in the training texts
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Open the store in ``folder``; ConfigError if there is none or it is damaged."""
        import datasets

        try:
            record = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            if record["format"] not in (1, FORMAT):
                raise ValueError(f"format {record['format']}, this version reads 1 and {FORMAT}")
            store = cls(
                datasets.load_from_disk(str(folder.absolute() / "train")),
                datasets.load_from_disk(str(folder.absolute() / "heldout")),
                torch.from_numpy(np.load(folder / "counts.npy")),
                record,
            )
            store._check()
            return store
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.prepared: expected a folder made by `distilfast prepare`, got "
                f"{str(folder)!r}: {' '.join(str(error).split())}"
            ) from error

    def _check(self) -> None:
        """Check that all is there: a file that was cut between two batches opens like a whole one.

        Raises:
            ValueError: it is not.
        """
        keys = {"max_length", "min_length", "max_unknown", "tokenizer"}
        keys |= {"source", "files", "texts"} if self.record["format"] == FORMAT else set()
        if missing := sorted(keys - self.record.keys()):
            raise ValueError(f"store.json without {', '.join(missing)}")
        if self.counts.ndim != 1 or self.counts.dtype != torch.int64:
            raise ValueError("counts.npy with no counts")
        made = [("train", int(self.counts.sum())), *self.record.get("tokens", {}).items()]
        for split, tokens in made:
            if (got := int(self.lengths(split).sum())) != tokens:
                raise ValueError(f"{got:,} tokens in {split}, of {tokens:,} that were made")

    def lengths(self, split: str) -> Tensor:
        """(n,), the number of tokens in each example."""
        chunks = getattr(self, split).data.column("input_ids").chunks
        parts = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))

    @property
    def objective(self) -> str:
        """What the tokens are for: masked or causal."""
        return str(self.record.get("objective", "masked"))

    @property
    def identity(self) -> str:
        """A hash of the record, which holds the hashes of the texts and the settings."""
        return hashlib.sha256(json.dumps(self.record, sort_keys=True).encode()).hexdigest()

    def sizes(self, batch: BatchConfig) -> Tensor:
        """(n,), each training example's size in the unit of the batch: its tokens, or 1."""
        lengths = self.lengths("train")
        return torch.ones_like(lengths) if batch.tokens is None else lengths

    @functools.cached_property
    def _chunks(self) -> dict[str, tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]]:
        """For train and held out: each Arrow chunk's first example and its (offsets, ids)."""
        found = {}
        for split in ("train", "heldout"):
            chunks = getattr(self, split).data.column("input_ids").chunks
            starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
            found[split] = (
                starts[:-1],
                [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks],
            )
        return found

    def rows(self, split: str, examples: Tensor) -> list[np.ndarray]:
        """The token ids of the given examples, int32, as read-only views of the file."""
        starts, chunks = self._chunks[split]
        numbers = examples.numpy()
        places = np.searchsorted(starts, numbers, side="right") - 1
        rows = []
        for place, i in zip(places.tolist(), (numbers - starts[places]).tolist(), strict=True):
            offsets, ids = chunks[place]
            rows.append(ids[offsets[i] : offsets[i + 1]])
        return rows

    def tokens(self, split: str, examples: Tensor) -> Tensor:
        """The token ids of the given examples, (n,) int32, one example after the other."""
        return torch.from_numpy(np.concatenate(self.rows(split, examples)))


def describe_texts(texts: dict[str, int], settings: dict[str, Any]) -> str:
    """What became of the texts, in words.

    Args:
        texts: the counts of a store's record, or those to be.
        settings: with ``max_length``, ``min_length`` and ``max_unknown``.
    """
    repeated = f" ({texts['repeated']:,} repeat another)" if texts["repeated"] else ""
    reasons = {
        "short": f"shorter than {settings['min_length']} tokens",
        "unknown": f"with {100 * settings['max_unknown']:g} % or more unknown tokens",
        "empty": "empty",
        "pieces": "pieces of the used",
    }
    lost = ", ".join(f"{texts[key]:,} {why}" for key, why in reasons.items() if texts[key])
    left = f"; left out: {lost}" if lost else ""
    cut = ""
    if number := texts.get("cut"):
        cut = f"; {number:,} longer than {settings['max_length']} tokens, cut into pieces"
    return f"{texts['read']:,} texts: {texts['used']:,} used{repeated}{left}{cut}"
