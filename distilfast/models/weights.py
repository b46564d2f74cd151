"""Load a model's weights from a folder or the hub, and refuse those that do not fit.

transformers draws weights that it does not find at random, leaves out those that it has no place
for, and says so in a log alone. Such a model would be scored under the other one's name. So would
one of quantised weights, which it may read as if they were not.
"""

from __future__ import annotations

import hashlib
import pickle
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
        ConfigError: the model cannot be loaded, a weight is missing, of another shape, not finite
            or quantised, or the files have weights for the body that it does not have, such as
            adapters.
    """
    import transformers

    with loading(what):
        # Otherwise transformers would ask at the terminal whether to run code of the repository.
        options = {"trust_remote_code": False, **options}
        given = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
        refuse_quantised(transformers.AutoConfig.from_pretrained(source, **given), what)
        model, info = getattr(transformers, auto).from_pretrained(
            source,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused here, by name
            **options,
        )
    for name, found, wanted in sorted(info["mismatched_keys"]):
        raise ConfigError(f"{what}: expected {name} of shape {tuple(wanted)}, got {tuple(found)}")
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
    broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise ConfigError(f"{what}: expected finite weights, got NaN or inf in {some(broken)}")
    if _untied(model):
        model.config.tie_word_embeddings = False
    return model, drawn


def refuse_quantised(config: Any, what: str) -> None:
    if getattr(config, "quantization_config", None):
        raise ConfigError(f"{what}: expected weights that are not quantised, got others")


def identity(source: str, revision: str | None = None) -> str:
    """Return a hash of a folder's weights, configuration and tokenizer, or hub name and commit."""
    folder = Path(source)
    if not folder.is_dir():
        import transformers

        config = transformers.AutoConfig.from_pretrained(source, revision=revision)
        return f"{source}@{config._commit_hash}"
    digest = hashlib.sha256()
    patterns = ["*.safetensors", "*.bin", "config.json", "tokenizer*.json", "vocab.*"]
    patterns += ["merges.txt", "*.model"]  # byte-level and SentencePiece tokenizers
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def some(names: Iterable[str]) -> str:
    """Format names for an error: the first few, and how many more there are."""
    first, *others = sorted(names)
    shown = ", ".join([first, *others[: SHOWN - 1]])
    more = len(others) - SHOWN + 1
    return f"{shown} and {more} more" if more > 0 else shown


def _untied(model: Any) -> bool:
    """Return whether the head has weights of its own although the configuration ties it to the
    embeddings. A model made from that configuration would lose them."""
    head = model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or not hasattr(head, "weight"):
        return False
    embeddings = model.get_input_embeddings()
    return head.weight is not embeddings.weight and head.weight.shape == embeddings.weight.shape


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
    except Exception as error:  # what reads the files may raise anything
        raise ConfigError(f"{what} cannot be loaded: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What an error of a library says, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # its own advice is to execute the file
        return "a file of weights is damaged, or holds more than tensors"
    said = " ".join(str(error).split())
    if "trust_remote_code" in said:
        return "it needs remote code, which distilfast does not run"
    bare = isinstance(error, LookupError | EOFError) or not said
    return f"{type(error).__name__} {said}".strip() if bare else said


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
