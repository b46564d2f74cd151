"""Compares the held-out losses of models on the same examples."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from distilfast.report.content import Blocks, Table
from distilfast.report.numbers import counted, fixed

FEWEST = 10  # blocks; fewer say little about their spread


@dataclass(frozen=True)
class Paired:
    """How much higher one model's mean loss is than another's, in nats.

    The error is the standard error of that difference, as held-out texts vary; None: not known. It
    says nothing of how another seed would have trained.
    """

    mean: float
    error: float | None

    @property
    def verdict(self) -> str:
        """What the difference shows: it has to exceed two standard errors."""
        if self.error is None or not abs(self.mean) > 2 * self.error:
            return "not distinguishable from"
        return "lower than" if self.mean < 0 else "higher than"

    def __str__(self) -> str:
        sign = "+" if self.mean > 0 else ""
        error = "" if self.error is None else f" ± {fixed(self.error, 3)}"
        return f"{sign}{fixed(self.mean, 3)}{error}"


def paired(ours: Blocks | None, theirs: Blocks | None) -> Paired | None:
    """Compare two models on the same blocks of held-out examples.

    The standard error is that of a ratio of sums over blocks (Cochran, Sampling Techniques, 1977,
    chapter 6). None: they were not scored on the same masked tokens, or there are none.
    """
    if ours is None or theirs is None or ours.tokens != theirs.tokens or not sum(ours.tokens):
        return None
    total = sum(ours.tokens)
    differences = [a - b for a, b in zip(ours.losses, theirs.losses, strict=True)]
    mean = math.fsum(differences) / total
    used = sum(n > 0 for n in ours.tokens)
    if used < FEWEST:
        return Paired(mean, None)
    rest = [d - mean * n for d, n in zip(differences, ours.tokens, strict=True)]
    variance = math.fsum(r * r for r in rest) * used / (used - 1)
    return Paired(mean, math.sqrt(variance) / total)


def held_out(blocks: Blocks) -> str:
    """Say how much was held out."""
    tokens = counted(sum(blocks.tokens), blocks.target)
    return f"{counted(blocks.examples, 'held-out example')} with {tokens}"


def claim(ours: Blocks | None, theirs: Blocks | None) -> tuple[str, str]:
    """Return the verdict on two models, and a sentence with what it rests on."""
    found = paired(ours, theirs)
    if ours is None or found is None:
        return "beside", "No losses are recorded that tell how sure the difference is."
    error = "too few for a standard error" if found.error is None else "its standard error"
    return (
        found.verdict,
        f"The difference is {found} ({error}), on {held_out(ours)}; one seed each.",
    )


def compared(blocks: Mapping[str, Blocks]) -> Iterator[Table]:
    """Yield a table that compares every model with the one of the lowest loss, if any can be."""
    means = {
        name: math.fsum(b.losses) / sum(b.tokens) for name, b in blocks.items() if sum(b.tokens)
    }
    best = min(means, key=lambda name: means[name], default="")
    found = {name: paired(blocks[name], blocks[best]) for name in means if name != best}
    rows = [[name, str(p), f"{p.verdict} {best}"] for name, p in found.items() if p]
    if rows:
        yield Table(
            "Held-out losses compared",
            ["model", f"more than {best}, nats", "so it is"],
            rows,
            f"Each difference is taken on the same {held_out(blocks[best])}, ± its standard error "
            "as texts vary. Losses within two standard errors are not told apart. How much another "
            "seed would change is not in it.",
        )
