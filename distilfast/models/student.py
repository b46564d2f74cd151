"""Make a student from layers of its teacher."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.config import StudentConfig
from distilfast.errors import ConfigError
from distilfast.models import layers
from distilfast.models.distilbert import bert_to_distilbert, distilbert_config, unfold_token_type
from distilfast.models.parts import take_apart
from distilfast.models.proof import prove
from distilfast.models.twin import narrow_twin
from distilfast.models.weights import quiet

# Weights of a teacher on which the proof runs itself: 2 x 24 tokens through 4e9 are 0.4 TFLOP.
LARGEST = 4e9


def layers_of(config: StudentConfig, n_layers: int) -> list[int]:
    """The teacher's layers that the student keeps. For 12 layers, alternate is [0, 2, 4, 7, 9, 11].

    Raises:
        ConfigError: an index is outside the teacher.
    """
    if config.layers == "all":
        return list(range(n_layers))
    if config.layers == "alternate":
        spaced = torch.linspace(0, n_layers - 1, -(-n_layers // 2), dtype=torch.float64)
        return spaced.round().long().tolist()
    for layer in config.layers:
        if not isinstance(layer, int) or layer >= n_layers:
            raise ConfigError(
                f"student.layers: expected indices 0 to {n_layers - 1} of the teacher's {n_layers} "
                f"layers, got {config.layers}"
            )
    return list(config.layers)


def kept_layers(teacher: Any, config: StudentConfig) -> list[int]:
    """The layers that a student of this teacher keeps. `alternate` gives way to those that have to
    stay.

    Raises:
        ConfigError: the family's layers cannot be dropped, an index is outside the teacher, or a
            layer is missing that has to stay.
    """
    if getattr(teacher.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"student.layers: expected an encoder or a decoder, got a {teacher.config.model_type}, "
            "which has both: a list of layers would cut one of them alone"
        )
    refused = layers.exceptional(teacher).refused
    why = None if refused is None else refused(teacher.config.get_text_config())
    if why is not None:
        raise ConfigError(
            f"student.layers: expected a family whose layers can be dropped, got a "
            f"{teacher.config.model_type}: {why}; give a smaller model with student.model"
        )
    kept = layers_of(config, layers.depth(teacher))
    nearest, why = layers.valid_choice(teacher, kept)
    if why is not None and config.layers != "alternate":
        raise ConfigError(
            f"student.layers: expected layers that a {teacher.config.model_type} can do with, such "
            f"as {nearest}, got {kept}: {why}"
        )
    return nearest


def make_student(teacher: Any, config: StudentConfig, seed: int) -> Any:
    """Make an fp32 student on the CPU, of the teacher's family, or a DistilBERT for a BERT.

    It is proven first that this student, with the teacher's weights, gives the logits of the
    teacher without the dropped layers (`models/proof.py`).

    Args:
        teacher: a masked or causal language model of transformers, in any dtype and on any
            device.
        config: the student's layers, architecture and initial weights.
        seed: seed of what is drawn.

    Raises:
        ConfigError: the layers or the architecture do not fit the teacher, or the student cannot
            be proven.
    """
    if config.model is not None:
        raise ConfigError(
            "student.model: expected null, as this student is made of the teacher's layers, got "
            f"{config.model!r}"
        )
    kind = teacher.config.model_type
    masked_bert = kind == "bert" and not teacher.config.is_decoder
    to_distilbert = masked_bert and config.architecture in ("auto", "distilbert")
    if config.architecture == "distilbert" and not masked_bert and kind != "distilbert":
        raise ConfigError(f"student.architecture: expected same for a {kind} teacher")
    if any(p.device.type == "meta" or not p.numel() for p in teacher.parameters()):
        raise ConfigError(
            f"student.layers: expected a {kind} with its weights here, to copy some of them, got "
            "one that is partitioned or offloaded"
        )
    kept = kept_layers(teacher, config)
    architecture = "distilbert" if to_distilbert else "same"
    student = _cut(teacher, kept, architecture, config.dropout, seed)
    _prove(teacher, student, kept, architecture, seed)
    if config.init == "random":
        return _build(teacher, student.config, seed).train()
    if to_distilbert and not config.fold_token_type:
        unfold_token_type(student, teacher)
    if not config.copy_mlm_transform:
        drawn = _build(teacher, student.config, seed).state_dict()
        student.load_state_dict({n: drawn[n] for n in transform(student)}, strict=False)
    return student.train()


def _prove(teacher: Any, student: Any, kept: list[int], architecture: str, seed: int) -> None:
    """Prove a student: on a narrow twin of a large teacher, or on the teacher itself."""
    if sum(p.numel() for p in teacher.parameters()) > LARGEST:
        twin = small = None
        with contextlib.suppress(ConfigError):  # not every class can be made narrow
            twin = narrow_twin(teacher)
            small = _cut(twin, kept, architecture, None, seed)
        if small is not None:  # outside of the suppression: a difference on the twin is one
            prove(twin, small, kept)
            return
    proven = teacher
    if {(p.dtype, p.device.type) for p in teacher.parameters()} != {(torch.float32, "cpu")}:
        # Not a copy in fp32: `.bfloat16()` rounds the frequencies of rotary embeddings, too.
        proven = _cut(teacher, list(range(layers.depth(teacher))), "same", None, seed)
    prove(proven, student, kept)


def _cut(teacher: Any, kept: list[int], architecture: str, dropout: float | None, seed: int) -> Any:
    """A model of the layers ``kept``, with the teacher's weights."""
    with quiet():
        if architecture == "distilbert":
            config = distilbert_config(teacher.config, len(kept))
            state = bert_to_distilbert(layers.keep_weights(teacher, config, kept))
        else:
            config = layers.keep_config(teacher, kept)
            state = layers.keep_weights(teacher, config, kept)
        if dropout is not None:
            layers.set_dropout(config, dropout)
        student = _build(teacher, config, seed)
    n = layers.depth(teacher)
    _load(student, layers.pick(state, student.state_dict(), n, kept), teacher)
    return student


def checkpoint_activations(model: Any, what: str) -> None:
    """Make each of a model's layers keep its inputs alone for the backward (Chen et al. 2016,
    arXiv:1604.06174), by transformers' own means.

    The backward runs each layer's forward again, with the draws of its dropout: the gradients are
    the same to the bit. In eval mode nothing changes.

    Args:
        what: the key that asks for it, which begins an error.

    Raises:
        ConfigError: the family's layers cannot be computed again.
    """
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name in older versions
        enable = model.gradient_checkpointing_enable
    try:
        enable({"use_reentrant": False})
    except ValueError as error:
        raise ConfigError(
            f"{what}: expected false with a {model.config.model_type}, whose layers transformers "
            "cannot compute again"
        ) from error


def transform(model: Any) -> list[str]:
    """The names of the weights between a model's body and its head's product."""
    parts = take_apart(model)
    known = {id(p) for p in model.get_submodule(parts.body).parameters()}
    known |= {id(x) for x in parts.head}
    return [name for name, p in model.named_parameters() if id(p) not in known]


def _build(teacher: Any, config: Any, seed: int) -> Any:
    """A model with drawn weights, in fp32.

    Raises:
        ConfigError: the class does not accept the configuration, such as a dropout.
    """
    import transformers

    like = config.model_type == teacher.config.model_type
    kind = type(teacher) if like else transformers.DistilBertForMaskedLM
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        try:
            return kind(config).float()
        except Exception as error:  # what a class says to values that it was not made for
            said = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"student: expected layers and a dropout that a {config.model_type} accepts, got "
                f"{type(error).__name__}: {said}"
            ) from error


def _load(student: Any, state: dict[str, Tensor], teacher: Any) -> None:
    """Load the teacher's weights, all of them.

    T5's configurations say that the head is tied where it is not: the head then gets a weight of
    its own first, or it would overwrite the embeddings.
    """
    head, embeddings = teacher.get_output_embeddings(), teacher.get_input_embeddings()
    if head is not None and getattr(head, "weight", None) is not embeddings.weight:
        own = student.get_output_embeddings()
        if own is not None and own.weight is student.get_input_embeddings().weight:
            own.weight = nn.Parameter(torch.empty_like(own.weight))
    try:
        missing, unexpected = student.load_state_dict(state, strict=False)
    except RuntimeError as error:
        raise _unfit(teacher, " ".join(str(error).split())[:300]) from error
    tied = {n for n, p in student.named_parameters(remove_duplicate=False)} - {
        n for n, _ in student.named_parameters()
    }
    missing = set(missing) - tied
    if missing or unexpected:
        names = ", ".join(sorted({*missing, *unexpected})[:3])
        raise _unfit(teacher, f"the student has other weights, such as {names}")
    student.tie_weights()


def _unfit(teacher: Any, why: str) -> ConfigError:
    return ConfigError(
        f"student.layers: expected layers that fit a student of a {teacher.config.model_type}, got "
        f"others: {why}"
    )
