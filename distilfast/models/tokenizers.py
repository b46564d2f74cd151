"""What a tokenizer is, and what it makes of texts: identity, size, tokens."""

from __future__ import annotations

import copy
import functools
import hashlib
import json
from collections.abc import Sequence
from typing import Any

from distilfast.errors import ConfigError

NO_WORD = "\ufdd0"  # a code point that Unicode keeps free of characters


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
        ConfigError: the merges of the vocabulary make a special token of a word in a text.
    """
    options = {"split_special_tokens": True, "verbose": False, **options}
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    added = 0
    if options.get("add_special_tokens", True):
        added = tokenizer.num_special_tokens_to_add(pair=len(columns) > 1)

    def first_special(made: Any) -> int | None:
        """The first row that has more special tokens than were added."""
        rows = enumerate(made["input_ids"])
        return next((row for row, ids in rows if sum(map(special.__contains__, ids)) > added), None)

    made = tokenizer(*columns, **options)
    if first_special(made) is not None:
        made = _without_special_words(tokenizer)(*columns, **options)
    if (row := first_special(made)) is None:
        return made
    own = zip(made["input_ids"][row], made[row].special_tokens_mask, strict=True)
    word = tokenizer.convert_ids_to_tokens(next(i for i, s in own if i in special and not s))
    text = made.get("overflow_to_sample_mapping", range(row + 1))[row]
    raise ConfigError(
        f"{key}: expected texts without {word!r}, as this tokenizer cannot but take it for its "
        f"special token, got {' | '.join(column[text] for column in columns)[:80]!r}"
    )


@functools.lru_cache(maxsize=2)
def _without_special_words(tokenizer: Any) -> Any:
    """A copy of a tokenizer that makes no special token of a text's words.

    The vocabularies of XLM-R, ALBERT and DeBERTa-v2 have <s> and [MASK] among their pieces, with
    the highest score. `split_special_tokens` does not keep them out of a text; SentencePiece, with
    which these models were trained, does. Here these pieces get names that no text has. Merges
    (BPE) name their tokens, so such a vocabulary is left as it is.
    """
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {
        token["content"]: NO_WORD + token["content"]
        for token in parts["added_tokens"]
        if token["special"] and token["content"] != tokenizer.unk_token
    }
    model = parts["model"]
    if model["type"] == "BPE":
        return tokenizer
    for token in parts["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(word, word): i for word, i in model["vocab"].items()}
    else:
        model["vocab"] = [(names.get(word, word), score) for word, score in model["vocab"]]
    made = copy.copy(tokenizer)
    made._tokenizer = type(tokenizer.backend_tokenizer).from_str(json.dumps(parts))
    return made
