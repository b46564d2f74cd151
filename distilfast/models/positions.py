"""How many tokens a model has positions for, and which token is its padding.

RoBERTa and its relatives number positions from the padding token's id plus one, and the padding
itself with its id. The number of rows in their table is therefore larger than the longest text, and
another padding token would give other positions.
"""

from __future__ import annotations

from typing import Any


def most_positions(model: Any) -> int | None:
    """Return how many tokens of a text have positions. None: the model has no limit.

    Families that compute positions, such as ModernBERT, would take longer texts than their
    configuration says. They were not trained on them, so the limit holds for them too.
    """
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # XLNet has -1.
    return most - first_position(model) if isinstance(most, int) and most > 0 else None


def longest_steady_text(model: Any) -> int | None:
    """Return up to how many tokens a model treats a text the same, whatever it has read before.
    None: any number.

    BigBird gives up its sparse attention for good at the first text of up to so many tokens. A
    longer one then has other logits than before.
    """
    config = model.config
    if config.model_type != "big_bird" or config.attention_type != "block_sparse":
        return None
    return int(config.block_size * (5 + 2 * config.num_random_blocks))


def set_padding(model: Any, pad_token: int) -> None:
    """Tell a model which token is padding.

    Its embedding gets no gradient, and a decoder reads a text's class before it. Where positions
    begin after the padding token's number it is left as it is: the model would have other positions
    once it is saved and loaded.
    """
    if not first_position(model):
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = pad_token


def first_position(model: Any) -> int:
    """Return the first token's position: 0, or the padding token's id plus one."""
    tables = (m for n, m in model.named_modules() if n.endswith("position_embeddings"))
    taken = (getattr(table, "padding_idx", None) for table in tables)
    return next((index + 1 for index in taken if index is not None), 0)
