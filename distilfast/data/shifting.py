"""The objective of a causal LM: each token has to guess the next one of its document."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from distilfast.data.masking import IGNORE_INDEX


@dataclass(frozen=True)
class Shift:
    """Labels each token with the next one. The place of `Masker` for a causal LM.

    ``seed`` decides the order of the examples alone.
    """

    seed: int
    shifted = True  # a label belongs to the position before its own

    def evaluating(self) -> Shift:
        """The one for held-out text."""
        return self

    def apply(
        self, tokens: Tensor, lengths: Tensor, examples: Tensor, epochs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Label some examples. This is the one place where labels are shifted.

        Args:
            tokens: (n,) int64 ids, one example after the other, without padding.
            lengths: (B,) int64, which sum to n.
            examples, epochs: not used.

        Returns:
            The (n,) ids as they are; and the (n,) labels: the next id of the same example,
            IGNORE_INDEX at the last.
        """
        labels = torch.cat([tokens[1:], tokens[:1]])
        labels[lengths.cumsum(0) - 1] = IGNORE_INDEX
        return tokens, labels

    def count(self, tokens: Tensor, lengths: Tensor, examples: Tensor, epochs: Tensor) -> int:
        """Count the labels that `apply`, with the same arguments, gives."""
        return len(tokens) - len(lengths)
