"""Load a model's weights from a folder or the hub, and refuse those that do not fit.

transformers draws weights that it does not find at random, leaves out those that it has no place
for, and says so in a log alone. Such a model would be scored under the other one's name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from distilfast.errors import ConfigError

# Parts of a body that a class may do without: BERT's pooler, Funnel's decoder.
OPTIONAL_PARTS = ("pooler", "decoder")
# Leftovers of other code, which say nothing: masks of GPT-2, GPT-Neo and GPT-J that once were
# saved, and the embeddings of DeBERTa-v3's generator.
LEFTOVERS = (".masked_bias", "word_embeddings._weight")
SHOWN = 3  # names in an error


def load_weights(
    auto: str, source: str | Path, what: str, *, fresh_head: bool = False, **options: Any
) -> tuple[Any, set[str]]:
    """Load an fp32 model whose weights all come from its files.

    Heads of other tasks, a pooler and buffers that the model does not use may be in the files.

    Args:
        auto: the name of transformers' class to load with, such as AutoModelForMaskedLM.
        what: the model's key and name, which begin an error.
        fresh_head: the head and the pooler may be missing. They are then drawn from PyTorch's
            generator.
        options: those of ``from_pretrained``.

    Returns:
        The model, and the names of its weights that were drawn.

    Raises:
        ConfigError: the model cannot be loaded, a weight is missing, or the files have weights for
            the body that it does not have, such as adapters.
    """
    import transformers

    with loading(what):
        model, info = getattr(transformers, auto).from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, **options
        )
    drawn, unused = set(info["missing_keys"]), set(info["unexpected_keys"])
    missing = {name for name in drawn if not (fresh_head and _is_head(model, name))}
    kind = type(model).__name__
    if missing:
        rest = f"; not used: {some(unused)}" if unused else ""
        raise ConfigError(
            f"{what}: expected all weights of a {kind}, got none for {some(missing)}{rest}"
        )
    foreign = {name for name in unused if _is_of_body(model, name)}
    if foreign:
        raise ConfigError(f"{what}: expected the weights of a {kind} alone, got {some(foreign)}")
    return model, drawn


def some(names: Iterable[str]) -> str:
    """Format names for an error: the first few, and how many more there are."""
    first, *others = sorted(names)
    shown = ", ".join([first, *others[: SHOWN - 1]])
    more = len(others) - SHOWN + 1
    return f"{shown} and {more} more" if more > 0 else shown


def _is_head(model: Any, name: str) -> bool:
    """Return whether a weight of the model is its head's, or the pooler's below the head."""
    prefix = f"{model.base_model_prefix}."
    if model.base_model is not model and not name.startswith(prefix):
        return True
    # T5 for question answering has no body of its own.
    return name.removeprefix(prefix).startswith(("pooler.", "qa_outputs."))


def _is_of_body(model: Any, name: str) -> bool:
    """Return whether a weight that the model has no place for would belong to its body."""
    parts = {child for child, _ in model.base_model.named_children()}
    inner = name.removeprefix(f"{model.base_model_prefix}.")
    part = inner.split(".")[0]
    if part not in parts and (inner == name or part in OPTIONAL_PARTS):
        return False  # another head, as the files of a body alone have no prefix
    buffers = dict(model.base_model.named_buffers())
    return not (inner.endswith(LEFTOVERS) or inner in buffers)


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Keep transformers quiet while it loads ``what``, and turn its errors into a ConfigError of
    one line."""
    try:
        with quiet():
            yield
    except ConfigError:
        raise
    except loading_errors() as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"{what} cannot be loaded: {message}") from error


def loading_errors() -> tuple[type[Exception], ...]:
    """The errors that transformers raises for files that are damaged or do not fit together."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    own = (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, EOFError)
    return (*own, StrictDataclassError, SafetensorError)


@contextmanager
def quiet() -> Iterator[None]:
    """Hide transformers' load report and progress bars. We check ourselves what matters in them."""
    import transformers

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
