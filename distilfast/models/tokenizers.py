"""What a tokenizer is, and what it makes of texts: identity, size, tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

from distilfast.errors import ConfigError


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
    return hashlib.sha256(json.dumps(_rules(tokenizer), sort_keys=True).encode()).hexdigest()


def differing(one: Any, other: Any) -> list[str]:
    """What two tokenizers differ in: vocabulary, normalizer and so on."""
    a, b = _rules(one), _rules(other)
    names = {"model": "vocabulary"}
    return [names.get(key, key) for key in sorted({*a, *b}) if a.get(key) != b.get(key)]


def _rules(tokenizer: Any) -> dict[str, Any]:
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding", "post_processor"):  # ours, not the tokenizer's
        parts.pop(setting, None)
    return parts


def tokenize(tokenizer: Any, *columns: Sequence[str], key: str, **options: Any) -> Any:
    """Return what a fast tokenizer makes of texts, or pairs of texts.

    Text is text: words such as [MASK] or <s> in it become no special tokens.

    Args:
        columns: the n texts, and the n texts that follow them.
        key: what the error names: where the texts come from.
        options: the tokenizer's own.

    Raises:
        ConfigError: the vocabulary has a special token among its words, and a text has this word.
    """
    made = tokenizer(*columns, split_special_tokens=True, verbose=False, **options)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    added = 0
    if options.get("add_special_tokens", True):
        added = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)
    for row, ids in enumerate(made["input_ids"]):
        if sum(map(special.__contains__, ids)) > added:
            own = zip(ids, made[row].special_tokens_mask, strict=True)
            word = tokenizer.convert_ids_to_tokens(
                next(i for i, s in own if i in special and not s)
            )
            text = made.get("overflow_to_sample_mapping", range(row + 1))[row]
            raise ConfigError(
                f"{key}: expected texts without {word!r}, as this tokenizer cannot but take it for "
                f"its special token, got {' | '.join(column[text] for column in columns)[:80]!r}"
            )
    return made
