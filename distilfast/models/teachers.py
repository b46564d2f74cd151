"""Load teachers and tokenizers from a folder or the hub."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from distilfast.config import TeacherSpec
from distilfast.errors import ConfigError
from distilfast.models.parts import Parts, take_apart
from distilfast.models.positions import set_padding
from distilfast.models.tokenizers import fingerprint, has_words, vocabulary_size
from distilfast.models.weights import identity, load_weights, loading, some
from distilfast.sources import lookup

# transformers' class to load with, by the objective.
AUTO = {"masked": "AutoModelForMaskedLM", "causal": "AutoModelForCausalLM"}


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher: fp32, in eval mode, without gradients."""

    name: str
    weight: float  # its share of the ensemble, not normalised
    model: Any
    has_head: bool  # whether its files hold the head

    @functools.cached_property
    def parts(self) -> Parts:
        """Its body and head."""
        return take_apart(self.model, f"teacher {self.name!r}")


def load_teachers(
    specs: Sequence[TeacherSpec], objective: str = "masked"
) -> tuple[list[Teacher], Any]:
    """Load the teachers and the tokenizer that they share.

    Args:
        objective: masked or causal.

    Raises:
        ConfigError: a folder is missing, the hub does not answer, or a family or tokenizer does not
            fit.
    """
    loaded = [_load(spec, objective) for spec in specs]
    tokenizer = loaded[0][1]
    for teacher, other in loaded:
        if fingerprint(other) != fingerprint(tokenizer):
            raise ConfigError(
                f"teacher: expected one vocabulary, got {loaded[0][0].name!r} with "
                f"{len(tokenizer)} tokens and {teacher.name!r} with {len(other)}, not the same"
            )
        rows = teacher.model.config.get_text_config().vocab_size
        if vocabulary_size(other) > rows:
            raise ConfigError(
                f"teacher: {teacher.name!r} has embeddings for {rows} "
                f"tokens, its tokenizer ids for {vocabulary_size(other)}"
            )
    needed = ("eos",) if objective == "causal" else ("cls", "sep", "mask", "pad")
    missing = [n for n in needed if tokenizer.__getattr__(f"{n}_token_id") is None]
    if missing:
        raise ConfigError(f"teacher: the tokenizer of {specs[0].name!r} has no {missing} token")
    for other in ("cls", "sep", "pad", "unk") if objective == "masked" else ():
        if tokenizer.mask_token_id == tokenizer.__getattr__(f"{other}_token_id"):
            raise ConfigError(
                f"teacher: expected a mask token of its own, got {tokenizer.mask_token!r} for mask "
                f"and {other} in the tokenizer of {specs[0].name!r}"
            )
    return [teacher for teacher, _ in loaded], tokenizer


def teacher_identity(spec: TeacherSpec) -> str:
    """Return a hash of a teacher's files, or its hub name and commit."""
    source = lookup.model_source("teacher", spec.name, spec.revision)
    return identity(source, spec.revision)


def teacher_objective(spec: TeacherSpec) -> Literal["masked", "causal"]:
    """What a teacher was trained for, by its configuration alone.

    Raises:
        ConfigError: there is no such model, or it cannot be read.
    """
    import transformers

    source = lookup.model_source("teacher", spec.name, spec.revision)
    revision = spec.revision if source == spec.name else None
    with loading(f"teacher: {spec.name!r}"):
        config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    return objective_of(config)


def _load(spec: TeacherSpec, objective: str) -> tuple[Teacher, Any]:
    import transformers

    source = lookup.model_source("teacher", spec.name, spec.revision)
    revision = spec.revision if source == spec.name else None
    what = f"teacher: {spec.name!r}"
    with loading(what):
        read_config(source, what, revision, objective)
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    model, has_head = load_lm(objective, source, what, revision=revision)
    if not (getattr(tokenizer, "is_fast", False) and has_words(tokenizer)):
        raise ConfigError(f"teacher: {spec.name!r} has no (fast) tokenizer")
    # The embedding of this id gets no gradient: with another tokenizer's, a word would get none.
    if objective == "masked":  # of a causal LM the end token may be the padding
        set_padding(model, tokenizer.pad_token_id)
    return Teacher(spec.name, spec.weight, model.eval().requires_grad_(False), has_head), tokenizer


def objective_of(config: Any) -> Literal["masked", "causal"]:
    """What a model of this configuration was trained for: causal or masked.

    transformers has BERT and its relatives as both. There the class that saved the model decides.
    """
    import transformers
    from transformers.models.auto import modeling_auto

    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        return "masked"
    if type(config) not in transformers.AutoModelForMaskedLM._model_mapping:
        return "causal"
    kind = config.model_type
    named = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    both = named == modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES[kind]
    return "causal" if named in (config.architectures or ()) and not both else "masked"


def read_config(source: str, what: str, revision: str | None, objective: str) -> Any:
    """Read the configuration of a model. Runs no code of the model's own.

    Args:
        what: the model's key and name, which begin an error.
        objective: masked or causal.

    Raises:
        ConfigError: it is of another kind.
    """
    import transformers

    with loading(what):
        config = transformers.AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    auto = getattr(transformers, AUTO[objective])
    if type(config) not in auto._model_mapping:
        raise ConfigError(
            f"{what}: expected a model that transformers has as a {objective} LM, got one of type "
            f"{config.model_type!r}, with objective {objective}"
        )
    if objective_of(config) != objective:
        raise ConfigError(
            f"{what}: expected a {objective} LM, got a {config.model_type} saved by "
            f"{', '.join(config.architectures or ['no class'])}"
        )
    if objective == "causal":  # `check_causal` tries what it reads
        return config
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{what}: expected an encoder, got {config.model_type!r}, which has a decoder too"
        )
    if getattr(config, "is_decoder", False):  # a student would attend to all tokens
        raise ConfigError(f"{what}: expected an encoder, got is_decoder true in config.json")
    return config


def load_lm(objective: str, source: str, what: str, **options: Any) -> tuple[Any, bool]:
    """Load a masked or causal LM in fp32. A masked LM's head that its files do not have starts as
    the identity; a causal LM's has to be there.

    Args:
        objective: masked or causal.
        what: the model's key and name, which begin an error.
        options: those of ``from_pretrained``.

    Returns:
        The model, and whether its files hold a head.

    Raises:
        ConfigError: the weights do not fit (see `load_weights`), or a part of the head is missing.
    """
    fresh = objective == "masked"
    model, drawn = load_weights(AUTO[objective], source, what, fresh_head=fresh, **options)
    if drawn and (found := _head(model) - drawn):
        raise ConfigError(
            f"{what}: expected a whole masked-LM head or none, got none for {some(drawn)} and "
            f"weights for {some(found)}"
        )
    if drawn:
        start_transform(model)
    return model, not drawn


def _head(model: Any) -> set[str]:
    """Return the names of the head's weights, without those that are tied to the embeddings."""
    named, body = model.named_parameters(remove_duplicate=False), set(model.base_model.parameters())
    return {name for name, weight in named if weight not in body}


# On a CPU and up to this length, the backward of PyTorch's fused attention takes longer than plain
# products (a three-layer student, 32 x 128 tokens, bf16: 380 ms a step with it, 228 ms without).
SHORT = 128


def choose_attention(model: Any, device: torch.device, max_length: int) -> None:
    """Choose the attention implementation that trains faster."""
    if device.type == "cpu" and max_length <= SHORT:
        model.set_attn_implementation("eager")


def start_transform(model: Any) -> None:
    """Set a masked-LM transform that was never trained to the identity.

    If an encoder's hidden states already resemble its embeddings, it then starts far ahead of one
    with a random transform.
    """
    parts = take_apart(model)
    head = model.get_submodule(parts.product)
    body = set(model.get_submodule(parts.body).modules())
    with torch.no_grad():
        for module in model.modules():
            if module in body:
                continue
            weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
            if bias is not None:
                bias.zero_()
            if module is head or weight is None:
                continue
            if weight.ndim == 1:
                weight.fill_(1)
            elif weight.shape[0] == weight.shape[1]:
                nn.init.eye_(weight)
        if parts.head.bias is not None:
            parts.head.bias.zero_()
