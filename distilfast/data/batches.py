"""The micro-batches of a step, made from a store."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from distilfast.config import BatchConfig
from distilfast.data.masking import (
    EVALUATION_EPOCH,
    IGNORE_INDEX,
    Masker,
    permutation,
    positions,
)
from distilfast.data.packing import pack
from distilfast.data.shifting import Shift
from distilfast.data.store import Store

PAD_TO = 8  # the width of a batch is a multiple of this
# Most tokens to draw random numbers for at once while a step is counted. So many stay in a core's
# cache, and PyTorch processes them in one thread.
COUNTED = 2**15 - 1
Item = TypeVar("Item")


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward, of B sequences. A sequence is an example; of packed ones it holds
    several, and their positions restart. Row numbers count the B x L positions, sequence by
    sequence."""

    input_ids: Tensor  # (B, L) int64; for a masked LM masked
    attention_mask: Tensor | None  # (B, L) int64; None if there is no padding, or it is packed
    tokens: Tensor  # (n,) int64, the rows that are not padding
    labelled: Tensor  # (m,) int64, the rows with a label
    labels: Tensor  # (B * L,) int64, IGNORE_INDEX in rows without a label
    position_ids: Tensor | None = None  # (B, L) int64; None if it is not packed
    shifted: bool = False  # a row's label is the next token, as of a causal LM

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``. To a GPU, one copy is queued on the current stream and the host
        does not wait for it; the tensors are views of one piece of memory."""
        if device.type == "cpu":
            return self
        fields = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        moved = copy_to(device, list(fields.values()))
        changed: dict[str, Any] = dict(zip(fields, moved, strict=True))
        return dataclasses.replace(self, **changed)

    def without_rows(self) -> MicroBatch:
        """The same forward without any rows, so that it adds nothing to a loss."""
        labels = torch.full_like(self.labels, IGNORE_INDEX)
        return dataclasses.replace(
            self, tokens=self.tokens[:0], labelled=self.labelled[:0], labels=labels
        )


class Batches:
    """The micro-batches of each step, a pure function of (seed, step).

    The steps divide an endless sequence of epochs, each in its own order, at their borders. A step
    takes the examples that begin between its borders. Within a step, examples are sorted by length:
    this saves padding and does not change the gradient.

    Args:
        objective: gives the labels: a Masker, or the Shift of a causal LM.
        pad_token: the id of padding. That of a causal LM may be any: nothing attends to it.
        packed: put several of a step's examples into one sequence, of at most max_length tokens.
            The held-out ones have a sequence each all the same, as they are scored one by one.
    """

    def __init__(
        self,
        store: Store,
        objective: Masker | Shift,
        pad_token: int,
        batch: BatchConfig,
        packed: bool = False,
    ):
        self.store, self.objective, self.pad_token, self.batch = store, objective, pad_token, batch
        self.packed = packed
        self.lengths = {split: store.lengths(split) for split in ("train", "heldout")}
        self.sizes = store.sizes(batch)
        self.epoch_size = int(self.sizes.sum())
        self._epoch: tuple[int, Tensor, Tensor] | None = None

    def examples(self, step: int) -> tuple[Tensor, Tensor]:
        """The examples of a step (0, 1, ...) and their epochs, both int64."""
        borders = self.batch.before(step), self.batch.before(step + 1)
        first, last = borders[0] // self.epoch_size, (borders[1] - 1) // self.epoch_size
        examples, epochs = [], []
        for epoch in range(first, last + 1):
            order, starts = self._order(epoch)
            inside = torch.tensor(borders) - epoch * self.epoch_size
            begin, end = torch.searchsorted(starts, inside).tolist()
            examples.append(order[begin:end])
            epochs.append(torch.full((end - begin,), epoch))
        return torch.cat(examples), torch.cat(epochs)

    def _order(self, epoch: int) -> tuple[Tensor, Tensor]:
        """An epoch's examples in order, and each one's start within the epoch."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = permutation(self.objective.seed, epoch, len(self.sizes))
            sizes = self.sizes[order]
            self._epoch = epoch, order, sizes.cumsum(0) - sizes
        return self._epoch[1:]

    def step(self, step: int, rank: int, ranks: int, micro_sequences: int) -> Share:
        """This rank's micro-batches of a step. Every rank has the same number of them.

        Each has at most ``micro_sequences`` sequences, and sizes differ by at most one. A
        micro-batch holds sequences of similar length. In order of length, micro-batches go to the
        ranks in turn, so that the ranks finish together.
        """
        examples, epochs = self.examples(step)
        order, counts = self._sequences(examples)
        turns = -(-len(counts) // (micro_sequences * ranks))
        parts = torch.arange(turns * ranks)
        size, larger = divmod(len(counts), len(parts))
        sizes = size + (parts < larger).long()
        own = (parts % ranks == rank).repeat_interleave(sizes)
        mine = order[own.repeat_interleave(counts)]
        return Share(self, examples[mine], epochs[mine], sizes[rank::ranks].tolist(), counts[own])

    def _sequences(self, examples: Tensor) -> tuple[Tensor, Tensor]:
        """A step's sequences, from the shortest to the longest: their examples, as (n,) places in
        ``examples``, and the number of examples in each sequence."""
        lengths = self.lengths["train"][examples]
        if not self.packed:
            return lengths.argsort(stable=True), torch.ones_like(lengths)
        sequences = pack(lengths.tolist(), self.store.record["max_length"])
        counts = torch.tensor([len(sequence) for sequence in sequences])
        return torch.tensor(list(itertools.chain.from_iterable(sequences))), counts

    def heldout(
        self, rank: int, ranks: int, micro_sequences: int, limit: int | None
    ) -> Iterator[MicroBatch]:
        """This rank's share of the held-out examples, masked the same way every time.

        Under ZeRO-3 all ranks run each forward together, so every rank gets the same number of
        micro-batches. A rank that has none left gets one example again, without labels.
        """
        for part in self.heldout_parts(rank, ranks, micro_sequences, limit):
            examples = part if len(part) else torch.zeros(1, dtype=torch.int64)
            epochs = torch.full_like(examples, EVALUATION_EPOCH)
            batch = self._micro_batch("heldout", examples, epochs, torch.ones_like(examples))
            yield batch if len(part) else batch.without_rows()

    def heldout_parts(
        self, rank: int, ranks: int, micro_sequences: int, limit: int | None
    ) -> list[Tensor]:
        """The held-out examples of each of this rank's micro-batches, one tensor each. It is empty
        where the rank has none left."""
        by_length = self.lengths["heldout"][:limit].argsort(stable=True)
        parts = list(by_length.split(micro_sequences)) if len(by_length) else []
        parts += [by_length[:0]] * (-len(parts) % ranks)
        return parts[rank::ranks]

    def _micro_batch(
        self, split: str, examples: Tensor, epochs: Tensor, counts: Tensor
    ) -> MicroBatch:
        """The micro-batch of some examples, ``counts`` of them in each sequence."""
        lengths = self.lengths[split][examples]
        last = counts.cumsum(0) - 1
        filled = lengths.cumsum(0)[last].diff(prepend=torch.zeros(1, dtype=torch.int64))
        longest = int(filled.max())
        width = max(longest, min(-(-longest // PAD_TO) * PAD_TO, self.store.record["max_length"]))
        columns = torch.arange(width)
        real = columns < filled[:, None]
        padded = int(filled.min()) < width
        objective = self.objective.evaluating() if split == "heldout" else self.objective
        tokens = self.store.tokens(split, examples).long()
        tokens, known = objective.apply(tokens, lengths, examples, epochs)
        input_ids = torch.full(real.shape, self.pad_token)
        input_ids[real] = tokens
        labels = torch.full(real.shape, IGNORE_INDEX)
        labels[real] = known
        labels, places = labels.flatten(), None
        if self.packed and split == "train":
            places = columns - filled[:, None]  # padding is a document of its own
            places[real] = positions(lengths)
        return MicroBatch(
            input_ids=input_ids,
            attention_mask=real.long() if padded and places is None else None,
            tokens=real.flatten().nonzero()[:, 0],
            labelled=(labels != IGNORE_INDEX).nonzero()[:, 0],
            labels=labels,
            position_ids=places,
            shifted=objective.shifted,
        )


@dataclass(frozen=True)
class Share:
    """A rank's share of a step: it counts the tokens and yields the micro-batches one by one. It
    holds only the numbers of its examples, so a batch may have any size."""

    batches: Batches
    examples: Tensor  # (n,) int64
    epochs: Tensor  # (n,) int64
    sizes: list[int]  # of the micro-batches, in sequences
    counts: Tensor  # (sum of the sizes,) int64, of the examples in each sequence

    def __len__(self) -> int:
        return len(self.sizes)

    def parts(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The examples of each micro-batch, their epochs, and how many are in each sequence."""
        first = begin = 0
        for size in self.sizes:
            counts = self.counts[first : first + size]
            end = begin + int(counts.sum())
            yield self.examples[begin:end], self.epochs[begin:end], counts
            first, begin = first + size, end

    def __iter__(self) -> Iterator[MicroBatch]:
        make = self.batches._micro_batch
        for examples, epochs, counts in self.parts():
            if len(counts):
                yield make("train", examples, epochs, counts)
                continue
            # With ZeRO 2 and 3 all ranks run each forward and backward together, so a rank that
            # has no example left takes one again.
            first = torch.zeros(1, dtype=torch.int64)
            examples, epochs = (torch.cat([x, first])[:1] for x in (self.examples, self.epochs))
            yield make("train", examples, epochs, torch.ones_like(first)).without_rows()

    def count(self) -> tuple[int, int]:
        """The number of its tokens, and of those with a label."""
        store, objective = self.batches.store, self.batches.objective
        if not len(self.examples):
            return 0, 0
        lengths = self.batches.lengths["train"][self.examples]
        at_once = max(1, COUNTED // int(lengths.max()))
        pieces = (x.split(at_once) for x in (lengths, self.examples, self.epochs))
        labelled = sum(
            objective.count(store.tokens("train", examples), lengths, examples, epochs)
            for lengths, examples, epochs in zip(*pieces, strict=True)
        )
        return int(lengths.sum()), labelled


def copy_to(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy CPU tensors of one dtype to ``device`` in one copy that the host does not wait for.

    From pageable memory the host would wait for the copy, and so for all work queued on the GPU
    before it. The pinned memory is released on return, but PyTorch reuses it only after the copy is
    done. The GPU's memory belongs to the current stream, where later work runs after the copy;
    another stream would have to wait for it.
    """
    sizes = [x.numel() for x in tensors]
    pinned = device.type == "cuda"
    staged = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=pinned)
    torch.cat([x.flatten() for x in tensors], out=staged)
    moved = staged.to(device, non_blocking=True).split(sizes)
    return [there.view(x.shape) for there, x in zip(moved, tensors, strict=True)]


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """Move the batches to ``device`` on the caller's current stream. The thread that iterates may
    be another one, which has its own current stream."""
    if device.type != "cuda":
        return (batch.to(device) for batch in batches)
    stream = torch.cuda.current_stream(device)

    def moved() -> Iterator[MicroBatch]:
        for batch in batches:
            with torch.cuda.stream(stream):
                batch = batch.to(device)
            yield batch

    return moved()


def prefetch(items: Iterable[Item], ahead: int = 2) -> Generator[Item]:
    """Yield ``items`` in order; a thread makes up to ``ahead`` of them in advance. An error in
    making one is raised in its place. Closing the generator ends the thread."""
    source, end = iter(items), cast(Item, object())
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        made = collections.deque(pool.submit(next, source, end) for _ in range(ahead))
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
