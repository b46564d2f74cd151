"""A narrow random model with the layers of a large one.

Whether a configuration was cut right does not depend on the widths. A model that is too large to
run on a whole text for a proof is proven on this twin instead.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch

from distilfast.errors import ConfigError

VOCABULARY, HEAD, INNER = 512, 8, 16
HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
# Vectors of the vocabulary, of a head, of a token, of a layer's inside.
NARROW = {
    VOCABULARY: ("vocab_size", "vocab_size_per_layer_input"),
    HEAD: ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "rotary_dim", "v_head_dim"),
    INNER: (
        "ffn_dim",
        "ffn_hidden_size",
        "hidden_dim",
        "intermediate_size",
        "kv_lora_rank",
        "moe_intermediate_size",
        "n_inner",
        "q_lora_rank",
        "shared_expert_intermediate_size",
    ),
}
WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")


def narrow_twin(model: Any) -> Any:
    """A model of the same class and layers, with drawn weights and heads of 8 numbers, fp32.

    Raises:
        ConfigError: the class cannot be made so narrow.
    """
    try:
        whole = copy.deepcopy(model.config)
        _shrink(whole.get_text_config())
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


def _shrink(config: Any) -> None:
    """Make the widths of a configuration small. Its heads, experts and layers stay as many."""
    small = {name: value for value, names in NARROW.items() for name in names}
    heads = next((n for name in HEADS if (n := getattr(config, name, None))), None)
    small |= dict.fromkeys(WIDTHS, (heads or HEAD) * HEAD)
    for name, value in small.items():
        if isinstance(getattr(config, name, None), int):
            with contextlib.suppress(AttributeError):  # a property that follows from others
                setattr(config, name, value)
    for name, value in config.to_dict().items():
        if name.endswith("_token_id") and isinstance(value, int) and value >= VOCABULARY:
            setattr(config, name, VOCABULARY - 1)
