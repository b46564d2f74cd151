"""Dynamic masking: the tokens that the model has to guess, and what replaces them in its input.

Each position is masked independently with probability 1 - exp(-c w). The weight w is
max(count, 1)^-smoothing of its token, and 0 for special tokens (the published recipe's weights, in
the code of Sanh et al. 2019). The constant c is solved for once, so that the expected share of
masked non-padding tokens is exactly the configured one.

The random numbers are a pure function of (seed, epoch, example, position), from the counter-based
generator Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"). It uses
only integers, so every rank, device and resumed run draws the same bits.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distilfast.config import MaskingConfig
from distilfast.errors import ConfigError

IGNORE_INDEX = -100
# Held-out text is masked the same way in every run, independently of its seed.
EVALUATION_SEED, EVALUATION_EPOCH = 56, 0xFFFFFFFF
ORDER_POSITION = 0xFFFFFFFF  # not a position in a text: these draws shuffle the examples

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(seed: int, epoch: int | Tensor, example: Tensor, position: Tensor) -> tuple[Tensor, ...]:
    """Draw four independent uniform 32-bit integers for each (epoch, example, position).

    The counter is (position, low word of example, high word of example, epoch).

    Args:
        seed: the key, 0 to 2^64 - 1.
        epoch, example, position: int64 tensors whose shapes broadcast, with values >= 0; epoch and
            position < 2^32. The epoch may be a plain int.

    Returns:
        Four int64 tensors with values from 0 to 2^32 - 1.
    """
    numbers = torch.as_tensor(epoch, device=position.device), example, position
    epochs, example, position = torch.broadcast_tensors(*numbers)
    counter = [position, example & _LOW, (example >> 32) & _LOW, epochs]
    key = [seed & _LOW, seed >> 32]
    for _ in range(10):
        # int64 products wrap around, so their bits equal those of the unsigned product.
        products = [counter[0] * _MULTIPLIERS[0], counter[2] * _MULTIPLIERS[1]]
        high, low = [(p >> 32) & _LOW for p in products], [p & _LOW for p in products]
        counter = [high[1] ^ counter[1] ^ key[0], low[1], high[0] ^ counter[3] ^ key[1], low[0]]
        key = [(k + w) & _LOW for k, w in zip(key, _WEYL, strict=True)]
    return tuple(counter)


def permutation(seed: int, epoch: int, n_examples: int) -> Tensor:
    """An epoch's examples in order, (n_examples,) int64. A pure function of the arguments."""
    high, low, *_ = philox(seed, epoch, torch.arange(n_examples), torch.tensor(ORDER_POSITION))
    return ((high >> 1 << 32) | low).argsort(stable=True)


def positions(lengths: Tensor) -> Tensor:
    """Each token's position in its example, (n,) int64, of (B,) lengths that sum to n."""
    starts = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum()), device=lengths.device) - starts.repeat_interleave(
        lengths
    )


@dataclass(frozen=True)
class Masker:
    """Masks examples: the objective of a masked LM.

    ``thresholds``: (V,) int64. A token is masked if a uniform 32-bit integer is below its own.
    """

    thresholds: Tensor
    mask_token: int
    config: MaskingConfig
    seed: int
    shifted = False  # a label belongs to its own position

    @classmethod
    def from_counts(
        cls, counts: Tensor, special: list[int], mask_token: int, config: MaskingConfig, seed: int
    ) -> Masker:
        """Make a Masker whose c fits the corpus.

        Args:
            counts: (V,), how often each token occurs in the training text.
            special: ids that are never masked.
            mask_token: the id of [MASK].

        Raises:
            ConfigError: the configured share cannot be reached.
        """
        counts = counts.double()
        weights = counts.clamp_min(1) ** -config.smoothing
        weights[special] = 0
        wanted, reachable = config.probability * counts.sum(), counts[weights > 0].sum()
        if wanted >= reachable:
            raise ConfigError(
                f"masking.probability: expected less than {reachable / counts.sum():.3f}, the "
                f"share of tokens that may be masked, got {config.probability}"
            )
        low, high = 0.0, 1.0

        def expected(c: float) -> float:
            return float((counts * -torch.expm1(-c * weights)).sum())

        while expected(high) < wanted:
            low, high = high, 2 * high
        while low < (middle := (low + high) / 2) < high:  # until the doubles are neighbours
            low, high = (middle, high) if expected(middle) < wanted else (low, middle)
        probabilities = -torch.expm1(-high * weights)
        return cls((probabilities * 2**32).round().long(), mask_token, config, seed)

    def evaluating(self) -> Masker:
        """The one for held-out text: the same masks for runs of different seeds."""
        return dataclasses.replace(self, seed=EVALUATION_SEED)

    def apply(
        self, tokens: Tensor, lengths: Tensor, examples: Tensor, epochs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mask some examples.

        Args:
            tokens: (n,) int64 ids, one example after the other, without padding.
            lengths, examples, epochs: (B,) int64: of each example the number of its tokens, its
                number in the data set, and its epoch. The lengths sum to n.

        Returns:
            The (n,) ids, with the chosen positions replaced 80/10/10 or as configured; and the (n,)
            labels: the original id at chosen positions, IGNORE_INDEX elsewhere.
        """
        choose, action, replacement, _ = self._draw(lengths, examples, epochs)
        chosen = choose < self.thresholds[tokens]
        labels = torch.where(chosen, tokens, IGNORE_INDEX)
        to_mask = math.floor(self.config.mask * 2**32)
        to_random = math.floor((self.config.mask + self.config.random) * 2**32)
        vocab = len(self.thresholds)
        masked = torch.where(chosen & (action < to_mask), self.mask_token, tokens)
        random = chosen & (action >= to_mask) & (action < to_random)
        return torch.where(random, (replacement * vocab) >> 32, masked), labels

    def count(self, tokens: Tensor, lengths: Tensor, examples: Tensor, epochs: Tensor) -> int:
        """Count the positions that `apply`, with the same arguments, masks."""
        choose, *_ = self._draw(lengths, examples, epochs)
        return int((choose < self.thresholds[tokens]).sum())

    def _draw(self, lengths: Tensor, examples: Tensor, epochs: Tensor) -> tuple[Tensor, ...]:
        """Four (n,) random integers for each token."""
        examples, epochs = (x.repeat_interleave(lengths) for x in (examples, epochs))
        return philox(self.seed, epochs, examples, positions(lengths))
