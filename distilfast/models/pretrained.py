"""Load a student that exists already: a smaller model with the teacher's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilfast.config import StudentConfig
from distilfast.errors import ConfigError
from distilfast.models import layers
from distilfast.models.parts import take_apart
from distilfast.models.positions import set_padding
from distilfast.models.teachers import AUTO, load_lm, read_config
from distilfast.models.tokenizers import differing, fingerprint, has_words, vocabulary_size
from distilfast.models.weights import identity, loading, refuse_quantised
from distilfast.sources import lookup

# A folder with a tokenizer has one of them. Without them transformers makes an empty one.
TOKENIZER_FILES = ("tokenizer.json", "vocab.*", "*.model")


def load_student(
    config: StudentConfig, tokenizer: Any, seed: int, objective: str = "masked"
) -> tuple[Any, bool]:
    """Load the model that a student begins as, in fp32 and in train mode.

    Args:
        config: with a ``model``. With ``init`` random, its files give the shape alone.
        tokenizer: the teachers'.
        seed: seed of what is drawn.
        objective: masked or causal.

    Returns:
        The model, and whether its head comes from its files. A head that they do not have starts as
        the identity.

    Raises:
        ConfigError: the model cannot be loaded, is of another objective, needs code of its own, has
            another tokenizer or too few embeddings, or counts its positions from another padding
            token.
    """
    import transformers

    assert config.model is not None
    source = lookup.model_source("student.model", config.model, config.revision)
    revision = config.revision if source == config.model else None
    what = f"student.model: {config.model!r}"
    own = read_config(source, what, revision, objective)
    _check_tokenizer(source, what, revision, tokenizer)
    if config.dropout is not None:
        layers.set_dropout(own, config.dropout)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed % 2**63)
        if config.init == "random":
            refuse_quantised(own, what)
            with loading(what):
                auto = getattr(transformers, AUTO[objective])
                model = auto.from_config(own, dtype=torch.float32)
            has_head = True
        else:
            model, has_head = load_lm(objective, source, what, config=own, revision=revision)
    _check_rows(model, what, tokenizer)
    if objective == "masked":
        _set_padding(model, what, tokenizer.pad_token_id)
    return model.train(), has_head


def student_identity(config: StudentConfig) -> str:
    """Return a hash of the files of a student's ``model``, or its hub name and commit."""
    assert config.model is not None
    source = lookup.model_source("student.model", config.model, config.revision)
    return identity(source, config.revision)


def _check_tokenizer(source: str, what: str, revision: str | None, tokenizer: Any) -> None:
    """Check that a model has the teachers' tokenizer, or none."""
    import transformers

    folder = Path(source)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in TOKENIZER_FILES):
        return
    with loading(f"{what}: its tokenizer"):
        own = transformers.AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=False
        )
    if not has_words(own):
        return
    if not getattr(own, "is_fast", False):
        raise ConfigError(f"{what}: expected a fast tokenizer, got a {type(own).__name__}")
    if fingerprint(own) != fingerprint(tokenizer):
        raise ConfigError(
            f"{what}: expected the teacher's tokenizer, of {len(tokenizer)} tokens, got one of "
            f"{len(own)}; they differ in {', '.join(differing(own, tokenizer))}"
        )


def _check_rows(model: Any, what: str, tokenizer: Any) -> None:
    """Check that all of the tokenizer's ids have rows in the embeddings and in the head."""
    needed, head = vocabulary_size(tokenizer), take_apart(model, what).head
    found = {"embeddings": model.get_input_embeddings(), "head": head}
    for name, module in found.items():
        if (rows := len(module.weight)) < needed:
            raise ConfigError(
                f"{what}: expected {name} of at least {needed} rows, for the ids of the teacher's "
                f"tokenizer, got {rows}"
            )


def _set_padding(model: Any, what: str, pad_token: int) -> None:
    """Make the tokenizer's padding token the model's.

    The embedding of the model's padding token gets no gradient. If that is another token of the
    tokenizer, a word would get none.
    """
    set_padding(model, pad_token)
    if model.config.pad_token_id not in (None, pad_token):
        raise ConfigError(
            f"{what}: expected pad_token_id {pad_token}, as in the teacher's tokenizer, got "
            f"{model.config.pad_token_id}, from which this model counts its positions"
        )
    embeddings = model.get_input_embeddings()
    if isinstance(embeddings, nn.Embedding) and embeddings.padding_idx is not None:
        embeddings.padding_idx = pad_token
