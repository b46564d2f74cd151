"""A narrow random model with the layers of a large one.

Whether a configuration was cut right does not depend on the widths. A model that is too large to
run on a whole text for a proof is proven on this twin instead.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from distilfast.errors import ConfigError

VOCABULARY, HEAD, INNER = 512, 8, 64
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
INNER_WIDTHS = (
    "ffn_dim",
    "hidden_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_inner",
    "shared_expert_intermediate_size",
)


def narrow_twin(model: Any) -> Any:
    """A model of the same class and layers, with drawn weights and heads of 8 numbers, fp32.

    Raises:
        ConfigError: the class cannot be made so narrow.
    """
    whole = copy.deepcopy(model.config)
    config = whole.get_text_config()
    heads = next(getattr(config, name) for name in HEADS if getattr(config, name, None))
    small = {"vocab_size": VOCABULARY}
    if not getattr(config, "qk_rope_head_dim", None):  # latent attention has widths of its own
        small["head_dim"] = HEAD
    small |= dict.fromkeys(WIDTHS, heads * HEAD) | dict.fromkeys(INNER_WIDTHS, INNER)
    for name, value in small.items():
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, value)
    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            setattr(config, name, VOCABULARY - 1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            twin = type(model)(whole).float()
            for parameter in twin.parameters():
                if parameter.ndim > 1:
                    # Those that classes draw are too small for a wrong layer to show.
                    torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    except Exception as error:  # what a class says to sizes that it was not made for
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"student.layers: expected a {model.config.model_type} that can be made narrow, to "
            f"prove a student of so large a teacher, got {type(error).__name__}: {said}"
        ) from error
    return twin.eval()
