"""A task's examples as tokens, and the predictions and scores from a model's logits."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distilfast.errors import ConfigError
from distilfast.models import tokenize
from distilfast.tasks import squad
from distilfast.tasks.catalogue import Task
from distilfast.tasks.files import IGNORE_INDEX, Examples

log = logging.getLogger("distilfast.tasks")
CHUNK = 10_000  # examples tokenised at a time, because the tokenizer's own lists are large
LEAST_WITHIN_REACH = 0.95  # of the answers: some begin or end within a token
PAD_TO = 8  # the width of a batch is a multiple of this


@dataclass(frozen=True)
class Encoded:
    """The tokens of n examples, one example after the other.

    input_ids, token_type_ids: (tokens,) int32.
    offsets: (n + 1,) int64, where each example begins.
    labels: (n,) float32; the number of the class, the number to predict, or IGNORE_INDEX.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    offsets: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> Tensor:
        """(n,): the number of tokens of each example."""
        return self.offsets.diff()

    def batch(self, rows: Tensor, pad_token: int) -> dict[str, Tensor]:
        """Return a model's inputs for some examples, (B, L) each, L a multiple of PAD_TO."""
        real, places = self._places(rows)
        return {
            "input_ids": _padded(self.input_ids[places].long(), real, pad_token),
            "attention_mask": real.long(),
            "token_type_ids": _padded(self.token_type_ids[places].long(), real, 0),
        }

    def _places(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return where a batch holds tokens, (B, L) bool, and the index of each token."""
        lengths = self.offsets[rows + 1] - self.offsets[rows]
        column = torch.arange(-(-int(lengths.max()) // PAD_TO) * PAD_TO)
        real = column < lengths[:, None]
        return real, (self.offsets[rows][:, None] + column)[real]

    def empty_logits(self, outputs: int) -> Tensor:
        """Return a tensor for all examples' logits, (n, outputs) fp32, for `take` and `put`."""
        return torch.zeros(len(self), outputs)

    def take(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return the logits of a batch, (B, outputs)."""
        return logits[rows]

    def put(self, logits: Tensor, rows: Tensor, batch: Tensor) -> None:
        """Store the logits of a batch."""
        logits[rows] = batch

    def __add__(self, other: Encoded) -> Encoded:
        """Join the examples of both."""
        return Encoded(
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.token_type_ids, other.token_type_ids]),
            torch.cat([self.offsets, other.offsets[1:] + self.offsets[-1]]),
            torch.cat([self.labels, other.labels]),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name, as they are saved."""
        return dict(vars(self))


@dataclass(frozen=True)
class Windows(Encoded):
    """Windows of questions and contexts. Each window is an example; its tokens are the classes.

    labels: (n, 2), the positions of the answer's first and last token.
    questions: (n,) int32, the number of each window's question.
    chars: (tokens, 2) int32: each token's begin and end in the context; -1: not in it.
    source: uint8, JSON: each question's context and the texts of its gold answers.

    The logits of all windows are one (tokens, 2) tensor. Those of a batch are (B, 2, L), two rows
    for each window, with -inf at the padding.
    """

    questions: Tensor
    chars: Tensor
    source: Tensor

    def empty_logits(self, outputs: int) -> Tensor:
        return torch.zeros(len(self.input_ids), outputs)

    def take(self, logits: Tensor, rows: Tensor) -> Tensor:
        real, places = self._places(rows)
        return _padded(logits[places], real, -math.inf).transpose(1, 2)

    def put(self, logits: Tensor, rows: Tensor, batch: Tensor) -> None:
        real, places = self._places(rows)
        logits[places] = batch.transpose(1, 2)[real]

    def answers(self, logits: Tensor) -> list[str]:
        """Return the text that answers each question.

        Args:
            logits: (tokens, 2).
        """
        bounds, chars = self.offsets.tolist(), self.chars.numpy()
        start, end = logits.float().numpy().T
        spans = (
            squad.best_span(start[a:b], end[a:b], chars[a:b]) for a, b in itertools.pairwise(bounds)
        )
        contexts = [context for context, _ in self._source()]
        return squad.answers(contexts, zip(self.questions.tolist(), spans, strict=True))

    def gold(self) -> list[list[str]]:
        """Return, for each question, the texts of its gold answers."""
        return [answers for _, answers in self._source()]

    def _source(self) -> list[tuple[str, list[str]]]:
        return json.loads(self.source.numpy().tobytes())

    def __add__(self, other: Encoded) -> Windows:
        """Join the windows of both."""
        assert isinstance(other, Windows)
        source = self._source()
        return Windows(
            **vars(super().__add__(other)),
            questions=torch.cat([self.questions, other.questions + len(source)]),
            chars=torch.cat([self.chars, other.chars]),
            source=_packed([*source, *other._source()]),
        )


def _padded(values: Tensor, real: Tensor, fill: float) -> Tensor:
    """Return (B, L, ...) with the values at the tokens and ``fill`` at the padding."""
    made = values.new_full((*real.shape, *values.shape[1:]), fill)
    made[real] = values
    return made


def _packed(content: Any) -> Tensor:
    """Return JSON as a tensor of bytes: the file can hold only tensors."""
    return torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)


def encoded(tensors: dict[str, Tensor]) -> Encoded:
    """Build the examples from their tensors by name."""
    return (Windows if "chars" in tensors else Encoded)(**tensors)


def predictions(task: Task, examples: Encoded, logits: Tensor) -> np.ndarray:
    """Return a model's predictions: (n,) classes or numbers, or a text for each question.

    Args:
        logits: those of all examples.
    """
    if isinstance(examples, Windows):
        return np.array(examples.answers(logits), dtype=object)
    return (logits.argmax(-1) if task.classes else logits[:, 0]).numpy()


def score(task: Task, examples: Encoded, logits: Tensor) -> dict[str, float]:
    """Return the metrics of a model and its "score", each x 100.

    Args:
        logits: those of all examples.
    """
    if isinstance(examples, Windows):
        found = squad.score(examples.answers(logits), examples.gold())
        return {**found, "score": found["F1"]}
    return task.score(examples.labels, logits)


def encode_windows(
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Windows:
    """Turn questions and contexts into windows of at most ``max_length`` tokens.

    Raises:
        ConfigError: even perfect logits would give fewer than LEAST_WITHIN_REACH of the answers.
    """
    made = []
    reached = set()
    for window in squad.windows(examples.texts, tokenizer, max_length):
        made.append(window)
        context, gold = examples.texts[window.question][1], examples.labels[window.question]
        if any(squad.within_reach(window.chars, context, answer) for answer in gold):
            reached.add(window.question)
        tell(window.question)
    missed = [i for i, gold in enumerate(examples.labels) if gold and i not in reached]
    if missed:
        said = (
            f"{len(missed)} of {len(examples.labels)} answers that no span of tokens gives, such "
            f"as {examples.labels[missed[0]][0][0][:40]!r}"
        )
        if len(missed) > (1 - LEAST_WITHIN_REACH) * len(examples.labels):
            raise ConfigError(f"--data: expected answers of whole tokens in a window, got {said}")
        log.warning("no model can be right about %s", said)
    labels = [
        squad.positions(window.chars, answers[0]) if answers else (IGNORE_INDEX, IGNORE_INDEX)
        for window in made
        for answers in [examples.labels[window.question]]
    ]
    gold = [[text for text, _ in answers] for answers in examples.labels]
    contexts = [context for _, context in examples.texts]
    return Windows(
        torch.from_numpy(np.concatenate([window.input_ids for window in made])),
        torch.from_numpy(np.concatenate([window.token_type_ids for window in made])),
        torch.tensor([0, *(len(window.input_ids) for window in made)]).cumsum(0),
        torch.tensor(labels, dtype=torch.float32),
        torch.tensor([window.question for window in made], dtype=torch.int32),
        torch.from_numpy(np.concatenate([window.chars for window in made])),
        _packed(list(zip(contexts, gold, strict=True))),
    )


def encode(
    examples: Examples,
    tokenizer: Any,
    max_length: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Encoded:
    """Turn texts into tokens. If a pair is too long, its longer text is cut.

    Args:
        tell: called with the number of examples done.
    """
    ids: list[np.ndarray] = []
    types: list[np.ndarray] = []
    for begin in range(0, len(examples.texts), CHUNK):
        columns = map(list, zip(*examples.texts[begin : begin + CHUNK], strict=True))
        # Request token types always: models whose tokenizers differ only in them share a store.
        options = {"max_length": max_length, "return_token_type_ids": True}
        made = tokenize(tokenizer, *columns, key="--data", truncation=True, **options)
        ids += (np.asarray(row, np.int32) for row in made["input_ids"])
        types += (np.asarray(row, np.int32) for row in made["token_type_ids"])
        tell(len(ids))
    return Encoded(
        torch.from_numpy(np.concatenate(ids)),
        torch.from_numpy(np.concatenate(types)),
        torch.tensor([0, *map(len, ids)]).cumsum(0),
        torch.tensor(examples.labels, dtype=torch.float32),
    )


def order(lengths: Tensor, batch_size: int, generator: torch.Generator) -> Sequence[Tensor]:
    """Return an epoch's batches: all examples in random order, with similar lengths together.

    The shuffled examples are taken in groups of 50 batches. Within a group, examples of similar
    length share a batch, and the batches are shuffled again. Only one batch of an epoch may be
    smaller than the rest.
    """
    shuffled = torch.randperm(len(lengths), generator=generator)
    batches: list[Tensor] = []
    for pool in shuffled.split(50 * batch_size):
        batches += pool[lengths[pool].argsort(stable=True)].split(batch_size)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]
