"""Identify a tokenizer."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def fingerprint(tokenizer: Any) -> str:
    """A hash of everything that decides a text's tokens. Equal hashes mean equal ids."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding", "post_processor"):  # ours, not the tokenizer's
        parts.pop(setting, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
