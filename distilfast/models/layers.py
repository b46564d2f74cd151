"""Keep some of a model's layers: its configuration and weights, with the layers renumbered.

Many configurations say something for each layer: its kind of attention, its window, its experts,
whether it has a rotary embedding. Cutting the number of layers alone would give the kept layers the
kinds of the first ones, often without an error. Here every such field is renumbered with the
layers. `LISTS` and so on name the fields by the form in which they say it; what only one family
does is in `exceptions.py`. `proof.py` then shows that a student is right.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.errors import ConfigError
from distilfast.models.exceptions import EXCEPTIONS, FIELDS, Exceptional

# The number of layers. Where a configuration has two, the decoder's is that of a causal model.
COUNTS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_layers_per_stack",
    "num_hidden_layers",
    "num_layers",
)
# An entry for each layer.
LISTS = (
    "activation_sparsity_pattern",
    "attention_layers",
    "attention_window",
    "attn_layers",
    "indexer_types",
    "intermediate_size",
    "layer_rope_theta",
    "layer_types",
    "layers_block_type",
    "mlp_layer_types",
    "no_rope_layers",
    "num_attention_heads_per_layer",
)
# The numbers of some layers.
INDICES = (
    "attn_layer_indices",
    "cross_attention_layers",
    "full_attn_idxs",
    "hybrid_layer_ids",
    "local_layer_ids",
    "mlp_only_layers",
    "moe_layers",
)
FIRST = ("first_k_dense_replace", "num_dense_layers")  # the first k layers
LAST = ("num_kv_shared_layers",)  # the last k layers
OTHER_HEADS = ("classifier", "qa", "seq_classif", "summary")  # whose dropouts no LM uses
BY_NUMBER = ("per_layer_config",)  # a dictionary with layers' numbers as keys


def exceptional(model: Any) -> Exceptional:
    """What a model's family does that no other does."""
    return EXCEPTIONS.get(model.config.get_text_config().model_type, Exceptional())


def stacks(model: Any) -> dict[str, nn.ModuleList]:
    """A model's lists of layers by name; most have one. None where one module stands for all.

    Raises:
        ConfigError: there is no list as long as the configuration says.
    """
    if exceptional(model).repeated:
        return {}
    found = _lists(model)
    config = model.config.get_text_config()
    n = getattr(config, _count(model))
    layers = {name: module for name, module in found.items() if len(module) == n}
    if not layers:
        kind, lengths = model.config.model_type, sorted({len(x) for x in found.values()})
        raise ConfigError(
            f"student.layers: expected a list of {n} layers in a {kind}, got lists of {lengths}"
        )
    return layers


def _lists(model: Any) -> dict[str, nn.ModuleList]:
    """The lists of modules with weights that are inside no other such list."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        inside = name.startswith(tuple(f"{outer}." for outer in found))
        if isinstance(module, nn.ModuleList) and not inside and [*module.parameters()]:
            found[name] = module
    return found


def depth(model: Any) -> int:
    """How many layers a model has."""
    return int(getattr(model.config.get_text_config(), _count(model)))


def _count(model: Any) -> str:
    """The name of the number of layers in a model's configuration."""
    config = model.config.get_text_config()
    numbers = {name: getattr(config, name, None) for name in COUNTS}
    if not exceptional(model).repeated:
        lengths = {len(module) for module in _lists(model).values()}
        for name, number in numbers.items():
            if number in lengths:
                return name
    found = next((name for name, number in numbers.items() if number is not None), None)
    if found is None:
        kind = model.config.model_type
        raise ConfigError(f"student.layers: expected a number of layers in a {kind}, got none")
    return found


def keep_config(model: Any, kept: Sequence[int]) -> Any:
    """A copy of a model's configuration for the layers ``kept`` alone.

    Raises:
        ConfigError: the kinds of these layers cannot be written in its form.
    """
    whole = copy.deepcopy(model.config)
    config, n = whole.get_text_config(), depth(model)
    values = config.to_dict()
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if name in INDICES and value is not None:
            changed[name] = [kept.index(i) for i in sorted(value) if i in kept]
        elif name in BY_NUMBER and value:
            numbers = {int(i): x for i, x in value.items()}
            changed[name] = {str(j): numbers[i] for j, i in enumerate(kept) if i in numbers}
        elif name in FIRST and value is not None:
            changed[name] = sum(i < value for i in kept)
        elif name in LAST and value is not None:
            changed[name] = sum(i >= n - value for i in kept)
        elif _is_list(config, name, value, n):
            changed[name] = type(value)(value[i] for i in kept)
    for name, make in FIELDS.items():
        if values.get(name) is not None:
            changed |= make(config, list(kept), n)
    for name, value in changed.items():
        setattr(config, name, value)
    setattr(config, _count(model), len(kept))
    return whole


def _is_list(config: Any, name: str, value: Any, n: int) -> bool:
    """Whether a field has an entry for each layer. A list of n entries may be another thing: one
    that is not in LISTS has to follow the number of layers in a new configuration."""
    if not isinstance(value, list | tuple) or len(value) != n:
        return False
    return name in LISTS or _follows(config, name, n)


def _follows(config: Any, name: str, n: int) -> bool:
    count = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    try:
        lengths = [len(getattr(type(config)(**{count: n + more}), name)) for more in (2, 4)]
    except Exception:  # a class may refuse to be made, or have no default for the field
        return False
    return lengths == [n + 2, n + 4]


def set_dropout(config: Any, value: float) -> None:
    """Set all dropouts of the body and the masked-LM head.

    0 also stops the dropping of layers, and the noise that routers add to their input.
    """
    own = config.get_text_config()
    for name, before in own.to_dict().items():
        number = isinstance(before, int | float) and not isinstance(before, bool)
        if not number or name.startswith(OTHER_HEADS):
            continue
        if "drop" in name and "layerdrop" not in name:
            setattr(own, name, value)
        elif value == 0 and ("layerdrop" in name or "jitter" in name):
            setattr(own, name, 0.0)


def keep_weights(model: Any, config: Any, kept: Sequence[int]) -> dict[str, Tensor]:
    """A model's state dict for the layers ``kept``, renumbered.

    Args:
        config: as `keep_config` returns it.
    """
    prefixes = tuple(f"{name}." for name in stacks(model))
    made = {}
    for name, value in model.state_dict().items():
        prefix = next((p for p in prefixes if name.startswith(p)), None)
        if prefix is not None:
            number, dot, rest = name.removeprefix(prefix).partition(".")
            if int(number) not in kept:
                continue
            name = f"{prefix}{kept.index(int(number))}{dot}{rest}"
        made[name] = value
    change = exceptional(model).weights
    if change is None:
        return made
    old, new = model.config.get_text_config(), config.get_text_config()
    return change(made, old, new, list(kept), prefixes[0])


def pick(
    state: dict[str, Tensor], wanted: dict[str, Tensor], n: int, kept: Sequence[int]
) -> dict[str, Tensor]:
    """The state dict with the parts of the layers ``kept`` of weights that serve all of them, as
    Gemma 3n's table with a column of embeddings for each layer does.

    Args:
        wanted: the student's state dict, which shows their shapes.
        n: the number of layers.
    """
    made = dict(state)
    for name, value in state.items():
        shape = wanted[name].shape if name in wanted else value.shape
        if value.ndim != len(shape):
            continue
        for d in [d for d in range(value.ndim) if value.shape[d] != shape[d]]:
            if value.shape[d] * len(kept) == shape[d] * n:
                by_layer = value.unflatten(d, (n, -1))
                chosen = torch.tensor(kept, device=value.device)
                made[name] = by_layer.index_select(d, chosen).flatten(d, d + 1)
    return made


def valid_choice(model: Any, kept: Sequence[int]) -> tuple[list[int], str | None]:
    """The nearest choice of as many layers that the family allows, and why ``kept`` is not one;
    None if it is.

    Raises:
        ConfigError: none of as many layers is near.
    """
    required, n = exceptional(model).required, depth(model)
    config, choice, why = model.config.get_text_config(), list(kept), None
    if required is None:
        return choice, None
    fixed: set[int] = set()
    for _ in range(n):
        missing = required(config, choice, n)
        if missing is None:
            return choice, why
        wanted, reason = missing
        why = why or reason
        near = min(
            ((w, c) for w in wanted for c in choice if c not in fixed),
            key=lambda pair: abs(pair[0] - pair[1]),
            default=None,
        )
        if near is None:
            break
        fixed.add(near[0])
        choice = sorted({*choice, near[0]} - {near[1]})
    raise ConfigError(
        f"student.layers: expected layers that a {model.config.model_type} can do with, got "
        f"{list(kept)}: {why}"
    )
