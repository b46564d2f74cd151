"""Evaluate how well a model guesses the masked tokens of held-out text, and how often it agrees
with its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distilfast.data import Batches, MicroBatch
from distilfast.driver.processes import World

Predict = Callable[[MicroBatch], Tensor]  # the logits at the masked positions, (masked, V)


@dataclass(frozen=True)
class Scores:
    """Scores over all masked held-out tokens. If there are none, nothing is defined: None.

    eval_loss: cross entropy in nats.
    eval_accuracy: the share of tokens that the first guess gets right.
    eval_agreement: the share of tokens where the first guess is the teacher's; None without one.
    """

    eval_loss: float | None
    eval_accuracy: float | None
    eval_agreement: float | None


class Evaluator:
    """Scores models on this rank's held-out batches, which are made once. Keeps the teacher's
    guesses."""

    def __init__(self, batches: Batches, world: World, micro_sequences: int, limit: int | None):
        self.world = world
        self.batches: list[MicroBatch] = list(
            batches.heldout(world.rank, world.ranks, micro_sequences, limit)
        )
        self.guesses: list[Tensor] | None = None

    def teacher(self, predict: Predict) -> Scores:
        """Score the teacher and keep its guesses for `student`."""
        self.guesses = []
        return self._score(predict, self.guesses)

    def student(self, predict: Predict) -> Scores:
        return self._score(predict, None)

    @torch.no_grad()
    def _score(self, predict: Predict, keep: list[Tensor] | None) -> Scores:
        """Score this rank's batches and sum over the ranks. Collective."""
        device = self.world.device
        sums = torch.zeros(4, dtype=torch.float64, device=device)  # loss, right, agreeing, tokens
        for i, batch in enumerate(self.batches):
            batch = batch.to(device)
            logits = predict(batch).float()
            labels, guess = batch.labels[batch.masked], logits.argmax(-1)
            if keep is not None:
                keep.append(guess)
            teacher = guess if self.guesses is None or keep is not None else self.guesses[i]
            loss = torch.nn.functional.cross_entropy(logits, labels, reduction="sum")
            sums += torch.stack(
                [
                    loss,
                    (guess == labels).sum(),
                    (guess == teacher).sum(),
                    loss.new_full((), len(labels)),  # new_tensor would wait for the device
                ]
            ).double()
        loss, right, agreeing, tokens = self.world.sum(sums).tolist()
        if not tokens:
            return Scores(None, None, None)
        known = self.guesses is not None and keep is None
        return Scores(loss / tokens, right / tokens, agreeing / tokens if known else None)


def fill(
    model: Any, tokenizer: Any, texts: Sequence[str], k: int = 3
) -> list[list[tuple[str, float]]]:
    """The k likeliest tokens, with probabilities, at the first [MASK] of each text."""
    guesses = []
    for text in texts:
        batch = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            logits = model(**{n: batch[n] for n in ("input_ids", "attention_mask")}).logits[0]
        position = int((batch["input_ids"][0] == tokenizer.mask_token_id).nonzero()[0])
        top = logits[position].float().softmax(-1).topk(k)
        words = tokenizer.convert_ids_to_tokens(top.indices.tolist())
        guesses.append(list(zip(words, top.values.tolist(), strict=True)))
    return guesses
