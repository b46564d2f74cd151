"""What a tokenizer is: its identity, its size, whether it has any words."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def vocabulary_size(tokenizer: Any) -> int:
    """The largest id plus one: how many rows counts, embeddings and heads need.

    ``len(tokenizer)`` counts the tokens. They are fewer where ids are left out, as that of a word
    that stands twice in vocab.txt.
    """
    return max(tokenizer.get_vocab().values()) + 1


def has_words(tokenizer: Any) -> bool:
    """False for what transformers makes where a tokenizer's files are missing."""
    return len(tokenizer) > len(tokenizer.all_special_ids)


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides a text's tokens. Equal hashes mean equal ids."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding", "post_processor"):  # ours, not the tokenizer's
        parts.pop(setting, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
