"""The models to be compared: their sources, their sizes, and the texts they read."""

from __future__ import annotations

import bisect
import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from distilfast import models, tasks
from distilfast.errors import ConfigError, expect
from distilfast.sources import lookup

MIB = 1 << 20


@dataclass(frozen=True)
class Candidate:
    """A model to be measured.

    Args:
        source: the folder of its weights; None: random weights.
        config: the transformers configuration.
        parameters: the number of the body's parameters, each counted once.
        embedding_parameters: how many of them are in embeddings (tokens, positions, types).
        disk_mib: the size of the files of its weights, including any head.
        positions: the most tokens in a sequence; None: no limit.
        texts: the token ids of the texts of --data.
    """

    name: str
    source: str | None
    config: Any
    parameters: int
    embedding_parameters: int
    disk_mib: float | None = None
    positions: int | None = None
    texts: list[list[int]] = field(default_factory=list, repr=False)

    def build(self) -> Any:
        """Return the model, in fp32 on the CPU."""
        if self.source is None:
            import transformers

            torch.manual_seed(0)
            return transformers.AutoModel.from_config(self.config)
        return _body(self.source, f"MODEL: {self.name!r}")


def load(
    given: Sequence[str], data: Path | None, depth_width: bool, sequence_length: int
) -> list[Candidate]:
    """Return all models. Each is loaded once to check that it can be loaded.

    Args:
        given: "SOURCE" or "NAME=SOURCE"; a source is a folder or a model's name on the hub.
        data: the file of texts that each of them reads.
        depth_width: add the models of `depth_and_width`.
        sequence_length: the number of tokens that each must be able to take.

    Raises:
        ConfigError: the first thing found wrong.
    """
    candidates = [_load(*_name(text)) for text in given]
    if data:
        texts = tasks.read_sentences("--data", data / "dev.tsv" if data.is_dir() else data)
        candidates = [replace(c, texts=tokenize(c, texts)) for c in candidates]
    if depth_width:
        candidates += depth_and_width(candidates[0])
    for i, candidate in enumerate(candidates):
        if candidate.name in [c.name for c in candidates[:i]]:
            raise ConfigError(
                f"MODEL: expected names that differ, as NAME=MODEL gives, got {candidate.name!r} "
                "twice"
            )
        if candidate.positions is not None and sequence_length > candidate.positions:
            raise ConfigError(
                f"--sequence_length: expected at most {candidate.positions}, the positions of "
                f"{candidate.name!r}, got {sequence_length}"
            )
    return candidates


def _name(text: str) -> tuple[str, str]:
    """Return name and source.

    If no name is given it is the folder's name. `distilfast train` calls its folder "model"; such a
    model is named after its run.
    """
    name, equals, source = text.partition("=")
    path = Path(text)
    if path.exists():
        path = path.absolute()
        return (path.parent if path.name == "model" else path).name, text
    return (name, source) if name and equals else (text.removeprefix("asset:"), text)


def _load(name: str, given: str) -> Candidate:
    import huggingface_hub
    import transformers

    source = lookup.model_source("MODEL", given)
    with models.loading(f"MODEL: {given!r}"):
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if config.is_encoder_decoder or type(config) not in transformers.MODEL_MAPPING:
            raise ConfigError(f"MODEL: expected an encoder, got {given!r}, a {config.model_type}")
    model = _body(source, f"MODEL: {given!r}")
    path = Path(source)
    if not path.is_dir():
        path = Path(huggingface_hub.snapshot_download(given, local_files_only=True))
    files = list(path.glob("model*.safetensors")) or list(path.glob("pytorch_model*.bin"))
    disk_mib = sum(file.stat().st_size for file in files) / MIB
    parameters, embeddings = count(model)
    return Candidate(
        name, str(path), config, parameters, embeddings, disk_mib, models.most_positions(model)
    )


def _body(source: str, what: str) -> Any:
    """Load a body. Its pooler may be missing."""
    return models.load_weights("AutoModel", source, what, fresh_head=True)[0]


def count(model: nn.Module) -> tuple[int, int]:
    """Count all parameters, and those in embeddings. A tied parameter counts once."""
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    embeddings = {id(weight): weight.numel() for weight in tables}
    return sum(p.numel() for p in model.parameters()), sum(embeddings.values())


def tokenize(candidate: Candidate, texts: Sequence[tuple[str, ...]]) -> list[list[int]]:
    """Return the token ids of each text, or pair of texts, uncut and without padding."""
    import transformers

    missing = ConfigError(f"MODEL: {candidate.name!r} has no tokenizer, which --data needs")
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            candidate.source, trust_remote_code=False
        )
    except Exception as error:  # what reads the files may raise anything
        raise missing from error
    if not models.has_words(tokenizer):
        raise missing
    cut = {} if candidate.positions is None else {"max_length": candidate.positions}
    options = {"truncation": bool(cut), "split_special_tokens": True, **cut}
    found = [tokenizer(*text, **options)["input_ids"] for text in texts]
    rows, most = candidate.config.get_text_config().vocab_size, max(map(max, filter(None, found)))
    if most >= rows:
        raise ConfigError(
            f"MODEL: {candidate.name!r} has {rows} embeddings, and its tokenizer gives the id "
            f"{most} for a text of --data"
        )
    return found


# --- Depth against width --------------------------------------------------------------------------


def depth_and_width(first: Candidate) -> list[Candidate]:
    """Return smaller versions of the first model: half the layers, or all layers but narrower.

    The narrower ones have as many parameters as the one with half the layers; there is one with
    embeddings counted and one without. For BERT-base these are 6 x 768; 12 x 576 with embeddings
    counted; 12 x 540 without. Their weights are random, which does not change their speed.

    Raises:
        ConfigError: the model cannot be halved, or lacks the sizes that BERT has.
    """
    config, layers = first.config, getattr(first.config, "num_hidden_layers", 0)
    expect(layers > 1, "--depth_width", "a first model of 2 layers or more", first.name)
    try:
        half = resized(config, layers // 2, config.hidden_size)
        widths = {
            narrower(config, half, size): None
            for size in (
                lambda model: count(model)[0],
                lambda model: count(model)[0] - count(model)[1],
            )
        }
        configs = [half, *(resized(config, layers, width) for width in widths)]
        sizes = [count(skeleton(c)) for c in configs]
    except Exception as error:  # as may a model of other sizes
        raise ConfigError(
            f"--depth_width: {first.name!r}, a {config.model_type}, cannot be resized: {error}"
        ) from error
    return [
        Candidate(
            name=f"{c.num_hidden_layers} x {c.hidden_size}, random",
            source=None,
            config=c,
            parameters=parameters,
            embedding_parameters=embeddings,
            positions=first.positions,
            texts=first.texts,
        )
        for c, (parameters, embeddings) in zip(configs, sizes, strict=True)
    ]


def resized(config: Any, layers: int, width: int) -> Any:
    """Return the config with another depth and width; the feed-forward width scales along."""
    changed = copy.deepcopy(config)
    inner = "hidden_dim" if config.model_type == "distilbert" else "intermediate_size"
    setattr(changed, inner, getattr(config, inner) * width // config.hidden_size)
    changed.num_hidden_layers, changed.hidden_size = layers, width
    return changed


def skeleton(config: Any) -> Any:
    """Return a model that has no memory for its weights."""
    import transformers

    with torch.device("meta"):
        return transformers.AutoModel.from_config(config)


def narrower(config: Any, target: Any, size: Callable[[nn.Module], int]) -> int:
    """Return the width at which a model of ``config`` is closest in ``size`` to one of ``target``.

    The width is a multiple of the number of attention heads.
    """
    wanted = size(skeleton(target))

    def excess(width: int) -> int:
        return size(skeleton(resized(config, config.num_hidden_layers, width))) - wanted

    heads = config.num_attention_heads
    widths = range(heads, config.hidden_size + 1, heads)
    above = bisect.bisect_left(widths, 0, key=excess)
    return min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(excess(width)))
