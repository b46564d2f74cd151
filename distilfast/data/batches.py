"""From a store to the micro-batches of a step."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from distilfast.config import BatchConfig
from distilfast.data.masking import (
    EVALUATION_EPOCH,
    EVALUATION_SEED,
    IGNORE_INDEX,
    Masker,
    permutation,
)
from distilfast.data.store import Store

PAD_TO = 8  # widths of a batch are multiples of this
# At most so many tokens are drawn for at once when a step is counted: they stay in a core's cache,
# and PyTorch leaves them to one thread.
COUNTED = 2**15 - 1
Item = TypeVar("Item")


@dataclass(frozen=True)
class MicroBatch:
    """What one forward sees. Row numbers count the B x L positions, row by row."""

    input_ids: Tensor  # (B, L) int64, masked
    attention_mask: Tensor | None  # (B, L) int64; None where nothing is padding
    tokens: Tensor  # (n,) int64, rows that are no padding
    masked: Tensor  # (m,) int64, rows with a label
    labels: Tensor  # (B * L,) int64, IGNORE_INDEX where there is none

    def to(self, device: torch.device) -> MicroBatch:
        """The same on ``device``. A GPU's copy is queued on the current stream, and nobody waits
        for it; its tensors are views of one piece of memory."""
        if device.type == "cpu":
            return self
        fields = {name: x for name, x in vars(self).items() if x is not None}
        moved = copy_to(device, list(fields.values()))
        return dataclasses.replace(self, **dict(zip(fields, moved, strict=True)))

    def without_rows(self) -> MicroBatch:
        """The same forward, of which nothing counts."""
        labels = torch.full_like(self.labels, IGNORE_INDEX)
        return dataclasses.replace(
            self, tokens=self.tokens[:0], masked=self.masked[:0], labels=labels
        )


class Batches:
    """The micro-batches of a step: a pure function of (seed, step), whatever ran before it.

    Step after step takes the next examples of an endless sequence of epochs, each in an order of
    its own: those that begin between the step's borders. Within a step the examples are sorted by
    length, which leaves its gradient as it is and saves padding.
    """

    def __init__(self, store: Store, masker: Masker, pad_token: int, batch: BatchConfig):
        self.store, self.masker, self.pad_token, self.batch = store, masker, pad_token, batch
        self.lengths = {split: store.lengths(split) for split in ("train", "heldout")}
        self.sizes = store.sizes(batch)
        self.epoch_size = int(self.sizes.sum())
        self._epoch: tuple[int, Tensor, Tensor] | None = None

    def examples(self, step: int) -> tuple[Tensor, Tensor]:
        """The examples of step 0, 1, ... and their epochs, int64 each."""
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
        """An epoch's examples, and how far into it each begins."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = permutation(self.masker.seed, epoch, len(self.sizes))
            sizes = self.sizes[order]
            self._epoch = epoch, order, sizes.cumsum(0) - sizes
        return self._epoch[1:]

    def step(self, step: int, rank: int, ranks: int, micro_sequences: int) -> Share:
        """This rank's micro-batches of a step, as many as every other's: of at most
        ``micro_sequences`` examples, and of sizes that differ by at most one. Neighbours in length
        share a micro-batch, and the ranks take turns, so that they finish together."""
        examples, epochs = self.examples(step)
        by_length = self.lengths["train"][examples].argsort(stable=True)
        turns = -(-len(examples) // (micro_sequences * ranks))
        parts = torch.arange(turns * ranks)
        size, larger = divmod(len(examples), len(parts))
        sizes = size + (parts < larger).long()
        mine = by_length[(parts % ranks == rank).repeat_interleave(sizes)]
        return Share(self, examples[mine], epochs[mine], sizes[rank::ranks].tolist())

    def heldout(
        self, rank: int, ranks: int, micro_sequences: int, limit: int | None
    ) -> Iterator[MicroBatch]:
        """This rank's share of the held-out examples, masked the same way every time.

        Under ZeRO-3 the ranks go through a forward together, so all get as many micro-batches:
        whoever has no share left gets one example again, without labels.
        """
        by_length = self.lengths["heldout"][:limit].argsort(stable=True)
        parts = by_length.split(micro_sequences)
        for number in range(rank, -(-len(parts) // ranks) * ranks, ranks):
            spare = number >= len(parts)
            part = parts[0][:1] if spare else parts[number]
            batch = self._micro_batch("heldout", part, EVALUATION_EPOCH)
            yield batch.without_rows() if spare else batch

    def _micro_batch(self, split: str, examples: Tensor, epochs: Tensor | int) -> MicroBatch:
        lengths = self.lengths[split][examples]
        longest = int(lengths.max())
        width = max(longest, min(-(-longest // PAD_TO) * PAD_TO, self.store.record["max_length"]))
        real = torch.arange(width) < lengths[:, None]
        padded = int(lengths.min()) < width
        input_ids = torch.full(real.shape, self.pad_token)
        input_ids[real] = self.store.tokens(split, examples).long()
        masker = self.masker
        if split == "heldout":  # runs of different seeds are asked the same questions
            masker = dataclasses.replace(masker, seed=EVALUATION_SEED)
        masked_ids, labels = masker.apply(input_ids, examples, epochs)
        labels = labels.flatten()
        return MicroBatch(
            input_ids=masked_ids,
            attention_mask=real.long() if padded else None,
            tokens=real.flatten().nonzero()[:, 0],
            masked=(labels != IGNORE_INDEX).nonzero()[:, 0],
            labels=labels,
        )


@dataclass(frozen=True)
class Share:
    """A rank's share of a step: its counts, and its micro-batches one after the other. What it
    holds are the numbers of its examples, so that a batch may be of any size."""

    batches: Batches
    examples: Tensor  # (n,) int64
    epochs: Tensor  # (n,) int64
    sizes: list[int]  # of the micro-batches

    def __len__(self) -> int:
        return len(self.sizes)

    def parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The examples of each micro-batch, and their epochs."""
        return zip(self.examples.split(self.sizes), self.epochs.split(self.sizes), strict=True)

    def __iter__(self) -> Iterator[MicroBatch]:
        begin = 0
        for size in self.sizes:
            # Where gradients or weights are split (ZeRO 2 and 3) the ranks go through a turn
            # together, so whoever has no example left takes one again.
            part = slice(begin, begin + size) if size else slice(1)
            begin += size
            batch = self.batches._micro_batch("train", self.examples[part], self.epochs[part])
            yield batch if size else batch.without_rows()

    def counts(self) -> tuple[int, int]:
        """Its tokens and its masked ones."""
        store, masker = self.batches.store, self.batches.masker
        lengths = self.batches.lengths["train"][self.examples]
        at_once = max(1, COUNTED // int(lengths.max()))
        pieces = (x.split(at_once) for x in (lengths, self.examples, self.epochs))
        masked = sum(
            masker.count(store.tokens("train", examples), lengths, examples, epochs)
            for lengths, examples, epochs in zip(*pieces, strict=True)
        )
        return int(lengths.sum()), masked


def copy_to(device: torch.device, tensors: Sequence[Tensor]) -> list[Tensor]:
    """CPU tensors of one dtype on ``device``, by one copy that the host does not wait for.

    From pageable memory it would wait until the copy is done, and so for all that the GPU was told
    to do before. The pinned memory is given back on return: PyTorch hands it out again when the
    copy is done, and not before. The GPU's memory belongs to the current stream, on which the copy
    comes before whatever is queued later; another stream would have to wait for it.
    """
    sizes = [x.numel() for x in tensors]
    pinned = device.type == "cuda"
    staged = torch.empty(sum(sizes), dtype=tensors[0].dtype, pin_memory=pinned)
    torch.cat([x.flatten() for x in tensors], out=staged)
    moved = staged.to(device, non_blocking=True).split(sizes)
    return [there.view(x.shape) for there, x in zip(moved, tensors, strict=True)]


def on_device(batches: Iterable[MicroBatch], device: torch.device) -> Iterator[MicroBatch]:
    """The batches on ``device``, for the stream that is current here, whichever thread takes them:
    a thread has a current stream of its own."""
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
    """``items`` in their order, made by a thread that is up to ``ahead`` of whoever takes them. An
    error in making one is raised in its place; close the generator to be rid of the thread."""
    source, end = iter(items), cast(Item, object())
    pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
    try:
        made = collections.deque(pool.submit(next, source, end) for _ in range(ahead))
        while (item := made.popleft().result()) is not end:
            made.append(pool.submit(next, source, end))
            yield item
    finally:
        pool.shutdown(cancel_futures=True)
