"""What single families do with their layers that no other does: a row for each.

Source: transformers 5.23.0, measured on tiny models of every family (bench/families.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

State = dict[str, Tensor]
Missing = tuple[list[int], str] | None


@dataclass(frozen=True)
class Exceptional:
    """What a family does with its layers.

    refused: why no student can be made; None: one can.
    count: the name of the number of layers in the configuration.
    stacks: the names of the lists of layers.
    fields: fields of the configuration that are not renumbered by their form. The function gets the
        configuration, the layers kept and the number of layers, and returns the changed fields.
    weights: changes the kept weights. Gets them, the model, the new configuration, the layers kept.
    required: the layers of which one has to be kept too, and why; None: the choice is valid. Gets
        the configuration, the layers kept and the number of layers.
    """

    refused: str | None = None
    count: str | None = None
    stacks: tuple[str, ...] = ()
    fields: dict[str, Callable[[Any, list[int], int], dict[str, Any]]] = field(default_factory=dict)
    weights: Callable[[State, Any, Any, list[int]], State] | None = None
    required: Callable[[Any, list[int], int], Missing] | None = None


# --- Layers that have to stay ---------------------------------------------------------------------


def first_layer(why: str) -> Callable[[Any, list[int], int], Missing]:
    return lambda config, kept, n: None if 0 in kept else ([0], f"layer 0 has to stay: {why}")


# --- Fields ---------------------------------------------------------------------------------------


def _depth_scale(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """MiniCPM3 scales each layer by scale_depth / sqrt(layers)."""
    return {"scale_depth": config.scale_depth * math.sqrt(len(kept) / n)}


EXCEPTIONS = {
    "minicpm3": Exceptional(fields={"scale_depth": _depth_scale}),
    "modernbert": Exceptional(required=first_layer("it alone has no norm before its attention")),
    "modernbert-decoder": Exceptional(
        required=first_layer("it alone has no norm before its attention")
    ),
}
