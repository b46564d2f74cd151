"""What single families do with their layers that the forms in `layers.py` do not say.

Source: the code of transformers 5.23.0. `bench/families.py` runs all families.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilfast.errors import ConfigError

State = dict[str, Tensor]
Missing = tuple[list[int], str] | None


@dataclass(frozen=True)
class Exceptional:
    """What a family does with its layers. `EXCEPTIONS` has a row for each.

    refused: why no student can be made by dropping layers; gets the configuration, and returns None
        where one can.
    required: the layers of which one has to be kept too, and why; None if the choice is valid. Gets
        the configuration, the layers kept and the number of layers.
    weights: changes the kept weights. Gets them, the old configuration, the new one, the layers
        kept, and the prefix of the layers' names.
    branches: lists of modules whose output is added to their input. A dropped one returns zeros.
    repeated: a module that stands for all layers, and is called once for each.
    """

    refused: Callable[[Any], str | None] | None = None
    required: Callable[[Any, list[int], int], Missing] | None = None
    weights: Callable[[State, Any, Any, list[int], str], State] | None = None
    branches: tuple[str, ...] = ()
    repeated: str | None = None


# --- Fields that say something for each layer in a form of their own ------------------------------


def _sparse_step(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """Qwen-MoE: layer i has experts if i + 1 is a multiple of the step and i is not in the list."""
    dense = config.mlp_only_layers or []
    step = config.decoder_sparse_step
    plain = [j for j, i in enumerate(kept) if i in dense or (i + 1) % step]
    return {"mlp_only_layers": plain, "decoder_sparse_step": 1}


def _experts_between(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """Ernie 4.5: every so many layers from the first to the last with experts, both included."""
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    last = n - 1 if last in (None, -1) else last
    inside = [
        j
        for j, i in enumerate(kept)
        if (i + 1) % config.moe_layer_interval == 0 and first <= i <= last
    ]
    if not inside:
        return {"moe_layer_start_index": n, "moe_layer_end_index": n}
    ends = {"moe_layer_start_index": inside[0], "moe_layer_end_index": inside[-1]}
    return {**ends, "moe_layer_interval": 1}


def _attention_types(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """GPT-Neo: pairs of kinds and how often they are repeated; the kinds are a field, too."""
    kinds = [config.attention_layers[i] for i in kept]
    return {"attention_types": [[[kind], 1] for kind in kinds], "attention_layers": kinds}


def _block_types(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """RecurrentGemma: kinds that are repeated for as many layers as there are."""
    types = config.block_types
    return {"block_types": [types[i % len(types)] for i in kept]}


def _period(name: str) -> Callable[[Any, list[int], int], dict[str, Any]]:
    """Jamba: layer i is of a kind if i leaves the rest `offset` when divided by `period`."""
    period, offset = f"{name}_layer_period", f"{name}_layer_offset"

    def search(config: Any, kept: list[int], n: int) -> dict[str, Any]:
        wanted = [i % getattr(config, period) == getattr(config, offset) for i in kept]
        for p in range(1, 2 * len(kept) + 1):
            for o in range(p):
                if [j % p == o for j in range(len(kept))] == wanted:
                    return {period: p, offset: o}
        kinds = ", ".join("yes" if x else "no" for x in wanted)
        raise ConfigError(
            f"student.layers: expected layers whose kinds recur with a period, as a Jamba's have "
            f"to, got {kept} ({name}: {kinds})"
        )

    return search


def _numbered_from_one(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """Qwen 4: the layers with embeddings of their own, counted from 1."""
    return {"ple_layer_ids": [j + 1 for j, i in enumerate(kept) if i + 1 in config.ple_layer_ids]}


def _blocks(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """xLSTM: a second name of the number of layers."""
    return {"num_blocks": len(kept)}


def _depth_scale(config: Any, kept: list[int], n: int) -> dict[str, Any]:
    """MiniCPM3: what a layer adds is scaled by scale_depth / sqrt(layers)."""
    return {"scale_depth": config.scale_depth * math.sqrt(len(kept) / n)}


# Each gets the configuration, the layers kept and the number of layers; returns the new fields.
FIELDS: dict[str, Callable[[Any, list[int], int], dict[str, Any]]] = {
    "attention_types": _attention_types,
    "attn_layer_period": _period("attn"),
    "block_types": _block_types,
    "decoder_sparse_step": _sparse_step,
    "expert_layer_period": _period("expert"),
    "moe_layer_start_index": _experts_between,
    "num_blocks": _blocks,
    "ple_layer_ids": _numbered_from_one,
    "scale_depth": _depth_scale,
}


# --- Layers that have to stay ---------------------------------------------------------------------


def _first(why: str) -> Callable[[Any, list[int], int], Missing]:
    def required(config: Any, kept: list[int], n: int) -> Missing:
        return None if 0 in kept else ([0], f"layer 0 has to stay, as {why}")

    return required


def _first_with_convolution(config: Any, kept: list[int], n: int) -> Missing:
    if getattr(config, "conv_kernel_size", 0):
        return _first("a convolution follows it")(config, kept, n)
    return None


def _attention(*kinds: str) -> Callable[[Any, list[int], int], Missing]:
    """At least one layer of these kinds."""

    def required(config: Any, kept: list[int], n: int) -> Missing:
        of_kind = [i for i, kind in enumerate(config.layer_types) if kind in kinds]
        if not of_kind or set(of_kind) & set(kept):
            return None
        return of_kind, "a layer of attention has to stay"

    return required


def _two_hybrids(config: Any, kept: list[int], n: int) -> Missing:
    """Zamba's class refuses a single hybrid layer."""
    hybrid = [i for i, kind in enumerate(config.layers_block_type) if kind == "hybrid"]
    here = set(hybrid) & set(kept)
    if len(here) != 1 or len(hybrid) == 1:
        return None
    return sorted(set(hybrid) - here), "of its hybrid layers none or two have to stay"


def _last_full(config: Any, kept: list[int], n: int) -> Missing:
    """Gemma 4 makes the last layer one of full attention, whatever it was."""
    if config.layer_types[kept[-1]] == "full_attention":
        return None
    full = [i for i, kind in enumerate(config.layer_types) if kind == "full_attention"]
    later = [i for i in full if i > kept[-1]]
    return later or full[-1:], "the last layer has to be one of full attention"


def _shared_keys(config: Any, kept: list[int], n: int) -> Missing:
    """The last layers of Gemma 3n and 4 read keys and values of the last one of their kind before
    them."""
    own = n - (getattr(config, "num_kv_shared_layers", 0) or 0)
    for kind in {config.layer_types[i] for i in kept if i >= own}:
        source = max((i for i in range(own) if config.layer_types[i] == kind), default=None)
        if source is not None and source not in kept:
            why = f"layer {source} has to stay, as later ones of its kind read its keys and values"
            return [source], why
    return None


def _gemma4(config: Any, kept: list[int], n: int) -> Missing:
    return _shared_keys(config, kept, n) or _last_full(config, kept, n)


def _indexers(config: Any, kept: list[int], n: int) -> Missing:
    """A layer of a shared indexer reads what the last full one before it selected."""
    types = config.indexer_types
    for i in kept:
        if types[i] == "shared":
            source = max(j for j in range(i) if types[j] == "full")
            if source not in kept:
                why = f"layer {source} has to stay, as layer {i} reads what its indexer selected"
                return [source], why
    return None


# --- Weights --------------------------------------------------------------------------------------


def _diffllama(state: State, old: Any, new: Any, kept: list[int], prefix: str) -> State:
    """A layer's lambda begins at 0.8 - 0.6 exp(-0.3 i), and 1 minus that scales its output.

    lambda is exp(q1 k1) - exp(q2 k2) + begin(i), so another k1 makes up for another begin.
    """

    def begin(i: int) -> float:
        return 0.8 - 0.6 * math.exp(-0.3 * i)

    for j, i in enumerate(kept):
        here = f"{prefix}{j}.self_attn."
        q, k = state[f"{here}lambda_q1"].double(), state[f"{here}lambda_k1"].double()
        wanted = torch.log((q * k).sum().exp() + begin(i) - begin(j))
        moved = k + q * ((wanted - (q * k).sum()) / (q * q).sum())
        state[f"{here}lambda_k1"] = moved.to(state[f"{here}lambda_k1"].dtype)
        name = f"{here}o_proj.weight"
        state[name] = state[name] * ((1 - begin(i)) / (1 - begin(j)))
    return state


def _esmc(state: State, old: Any, new: Any, kept: list[int], prefix: str) -> State:
    """What a layer adds is divided by sqrt(layers / 36)."""
    scale = math.sqrt(len(kept) / old.num_hidden_layers)
    added = (".self_attn.o_proj.weight", ".mlp.down_proj.weight")
    added_bias = (".self_attn.o_proj.bias", ".mlp.down_proj.bias")
    inside = {n for n in state if n.startswith(prefix) and n.endswith(added + added_bias)}
    return {n: x * scale if n in inside else x for n, x in state.items()}


def _gpt2(state: State, old: Any, new: Any, kept: list[int], prefix: str) -> State:
    """With scale_attn_by_inverse_layer_idx, layer i divides its products by i + 1."""
    if not old.scale_attn_by_inverse_layer_idx:
        return state
    for j, i in enumerate(kept):
        for name in (f"{prefix}{j}.attn.c_attn.weight", f"{prefix}{j}.attn.c_attn.bias"):
            queries = state[name].clone()
            queries[..., : old.hidden_size] *= (j + 1) / (i + 1)
            state[name] = queries
    return state


def _gpt_neox_japanese(state: State, old: Any, new: Any, kept: list[int], prefix: str) -> State:
    """The last layer alone has a bias. A layer that becomes the last gets one of zeros."""
    name = f"{prefix}{len(kept) - 1}.attention.dense_bias"
    weight = state[f"{prefix}0.attention.dense.weight"]
    return {**state, name: state.get(name, weight.new_zeros(weight.shape[0]))}


def _zamba2(state: State, old: Any, new: Any, kept: list[int], prefix: str) -> State:
    """The shared block has an adapter for each hybrid layer, by their order."""
    order = [i for i, kind in enumerate(old.layers_block_type) if kind == "hybrid"]
    places = {order.index(i): k for k, i in enumerate(h for h in kept if h in order)}
    made = {}
    for name, value in state.items():
        head, found, tail = name.partition("_adapter_list.")
        if found:
            number, _, rest = tail.partition(".")
            if int(number) not in places:
                continue
            name = f"{head}{found}{places[int(number)]}.{rest}"
        made[name] = value
    return made


# --- The families ---------------------------------------------------------------------------------


def _groups(config: Any) -> str | None:
    if config.num_hidden_groups == 1:
        return None
    return "its layers share weights in groups, and another number of layers regroups them"


def _rescaled(config: Any) -> str | None:
    if not config.rescale_every:
        return None
    return "its first forward divides its weights; set rescale_every to 0 in its configuration"


def _always(why: str) -> Callable[[Any], str]:
    return lambda config: why


EXCEPTIONS = {
    "albert": Exceptional(refused=_groups, repeated="encoder.albert_layer_groups.0"),
    "beam": Exceptional(
        refused=_always("a layer's number scales what it adds, and no field can say so")
    ),
    "blt": Exceptional(refused=_always("it has several stacks, each with a number of layers")),
    "deberta-v2": Exceptional(required=_first_with_convolution),
    "diffllama": Exceptional(weights=_diffllama),
    "esmc": Exceptional(weights=_esmc),
    "flaubert": Exceptional(branches=("attentions", "ffns")),
    "funnel": Exceptional(
        refused=_always("its layers are in blocks, each of which shortens the text")
    ),
    "gemma3n_text": Exceptional(required=_shared_keys),
    "gemma4_text": Exceptional(required=_gemma4),
    "gemma4_unified_text": Exceptional(required=_gemma4),
    "glm_moe_dsa": Exceptional(required=_indexers),
    "gpt2": Exceptional(weights=_gpt2),
    "gpt_neox_japanese": Exceptional(weights=_gpt_neox_japanese),
    "granitemoehybrid": Exceptional(required=_attention("attention", "full_attention")),
    "hy_v4": Exceptional(required=_indexers),
    "inkling2_text": Exceptional(
        refused=_always("its layers read sums over blocks of layers, which others would regroup")
    ),
    "modernbert": Exceptional(required=_first("it alone has no norm before its attention")),
    "modernbert-decoder": Exceptional(required=_first("it alone has no norm before its attention")),
    "neomme": Exceptional(required=_attention("full_attention")),
    "olmo_hybrid": Exceptional(required=_attention("full_attention")),
    "reformer": Exceptional(
        refused=_always("its layers are reversible, so a dropped one cannot be bypassed")
    ),
    "rwkv": Exceptional(refused=_rescaled, required=_first("it alone has a norm before it")),
    "xlm": Exceptional(branches=("attentions", "ffns")),
    "zamba": Exceptional(required=_two_hybrids),
    "zamba2": Exceptional(weights=_zamba2),
    "zaya": Exceptional(required=_first("it alone has no scale of the router's states")),
}
