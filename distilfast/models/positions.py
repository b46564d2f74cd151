"""How many tokens a model has positions for."""

from __future__ import annotations

from typing import Any


def positions(model: Any) -> int | None:
    """The most tokens in a sequence; None: no limit."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if most is None or most < 0:  # XLNet has -1
        return None
    return int(most) - first_position(model)


def first_position(model: Any) -> int:
    """The first token's position. RoBERTa's begin after the padding token's number."""
    tables = (m for name, m in model.named_modules() if name.endswith("position_embeddings"))
    taken = (getattr(table, "padding_idx", None) for table in tables)
    return next((index + 1 for index in taken if index is not None), 0)
