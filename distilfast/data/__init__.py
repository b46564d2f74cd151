"""Text to tokens to batches.

`prepare` turns text into a store: two `datasets` folders of token ids (train and held out), the
tokens' counts, and a record of what it was made from. A `Store` opens one. `Batches` deals a step's
examples to ranks and micro-batches; the counts of a step are known before its first forward, so
that every loss can be divided by them, and its micro-batches are made one at a time.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from distilfast.sources import lookup as names
from distilfast.config import BatchConfig, Config, ConfigError, DataConfig, SourceSpec
from distilfast.data.masking import (
    EVALUATION_EPOCH,
    EVALUATION_SEED,
    IGNORE_INDEX,
    Masker,
    permutation,
)

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
FORMAT = 1  # of the store; raised when its files change meaning
PAD_TO = 8  # widths of a batch are multiples of this
# At most so many tokens are drawn for at once when a step is counted: they stay in a core's cache,
# and PyTorch leaves them to one thread.
COUNTED = 2**15 - 1
Item = TypeVar("Item")


# --- From text to a store -------------------------------------------------------------------------


def prepare(config: Config, tokenizer: Any, folder: Path) -> Store:
    """Make the store in ``folder``, unless a valid one is there, and open it.

    Raises:
        ConfigError: no source, a missing file or column, an empty corpus, or a folder that holds
            something else. Nothing is left behind.
    """
    record = _record(config, tokenizer)
    if (folder / "store.json").is_file():
        store = Store.open(folder)
        # A source that is gone since then is no matter; one that has changed is.
        gone = {name for name, size in record["bytes"].items() if size is None}
        store.record.setdefault("bytes", {}).update(dict.fromkeys(gone))
        differing = [k for k, v in record.items() if store.record.get(k) != v]
        if config.sources and differing:
            raise ConfigError(
                f"data.prepared: expected an empty folder or tokens made with these settings, "
                f"got {str(folder)!r}, which differs in {', '.join(differing)}"
            )
        if store.record["max_length"] > config.data.max_length:
            raise ConfigError(
                f"data.max_length: expected at least {store.record['max_length']}, that of the "
                f"tokens in {str(folder)!r}, got {config.data.max_length}"
            )
        if store.record["tokenizer"] != record["tokenizer"]:
            raise ConfigError(
                f"data.prepared: expected tokens of the teacher's tokenizer, got {str(folder)!r}, "
                "made with another"
            )
        return store
    check(config, folder)
    scratch = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    made = [parent for parent in scratch.parents if not parent.exists()]
    try:
        _tokenize(config.data, config.sources, tokenizer, scratch, record)
        folder.parent.mkdir(parents=True, exist_ok=True)
        if (folder / "store.json").is_file():  # another process was faster
            shutil.rmtree(scratch)
            return Store.open(folder)
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # not there, or no longer only ours
                parent.rmdir()
        raise
    return Store.open(folder)


def check(config: Config, folder: Path) -> None:
    """That a store can be made in ``folder``, as far as can be told without reading the text."""
    for parent in (folder, *folder.parents):
        if parent.exists() and not parent.is_dir():
            raise ConfigError(f"data.prepared: expected a folder, got the file {str(parent)!r}")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"data.prepared: expected an empty folder, got {str(folder)!r}")
    if not config.sources:
        raise ConfigError("data.source: expected a file, folder or hub name, got null")
    for source in config.sources:
        locate(source)


def fingerprint(tokenizer: Any) -> str:
    """A hash of all that makes tokens of a text: tokenizers of one hash give the same ids."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    for setting in ("truncation", "padding", "post_processor"):  # ours, not the tokenizer's
        parts.pop(setting, None)
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _record(config: Config, tokenizer: Any) -> dict[str, Any]:
    """What a store is made from: equal records, equal tokens."""
    settings = asdict(config.data)
    del settings["prepared"], settings["source"]
    return {
        "format": FORMAT,
        "source": [asdict(s) for s in config.sources],
        "bytes": {s.name: _bytes(Path(s.name).expanduser()) for s in config.sources},
        "tokenizer": fingerprint(tokenizer),
        **settings,
    }


def _bytes(path: Path) -> int | None:
    """The size of a local source's files, by which it is seen to have changed; None: not local."""
    if not path.exists():
        return None
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())


def _tokenize(
    data: DataConfig,
    sources: Sequence[SourceSpec],
    tokenizer: Any,
    folder: Path,
    record: dict[str, Any],
) -> None:
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    # Every source is looked at before the first is tokenised.
    texts = datasets.concatenate_datasets([_read(spec, data) for spec in sources])
    if len(texts) == 0:
        raise ConfigError(f"data.source: expected text, got none in {_names(sources)}")
    cls_token, sep_token = tokenizer.cls_token_id, tokenizer.sep_token_id
    unknown, body = tokenizer.unk_token_id, data.max_length - 2

    def cut(batch: dict[str, list[Any]], rows: list[int]) -> dict[str, list[Any]]:
        made: dict[str, list[Any]] = {"input_ids": [], "text": []}
        strings = [text or "" for text in batch["text"]]
        encoded = tokenizer(strings, add_special_tokens=False, verbose=False)["input_ids"]
        for row, ids in zip(rows, encoded, strict=True):
            for start in range(0, len(ids), body):
                piece = ids[start : start + body]
                if len(piece) + 2 < data.min_length:
                    continue
                if piece.count(unknown) >= data.max_unknown * (len(piece) + 2):
                    continue
                made["input_ids"].append([cls_token, *piece, sep_token])
                made["text"].append(row)
        return made

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "text": datasets.Value("int64")}
    )
    try:
        examples = texts.map(
            cut,
            batched=True,
            with_indices=True,
            remove_columns=texts.column_names,
            features=features,
            desc="tokenizing",
        )
    except UnicodeDecodeError as error:
        message = f"data.source: expected UTF-8 text in {_names(sources)}, got {error}"
        raise ConfigError(message) from error
    flags = _held_out(np.asarray(examples.data.column("text").to_numpy()), data.heldout)
    counts = np.zeros(len(tokenizer), dtype=np.int64)
    for split, chosen in (("train", ~flags), ("heldout", flags)):
        part = examples.select(np.flatnonzero(chosen)).remove_columns("text")
        part = part.flatten_indices() if len(part) else part
        if len(part) == 0:
            raise ConfigError(
                f"data.source: expected examples of at least {data.min_length} tokens for both "
                f"training and evaluation, got none for {split} in {_names(sources)}"
            )
        part.save_to_disk(folder / split)
        if split == "train":
            for piece in _token_arrays(part):
                counts += np.bincount(piece, minlength=len(counts))
    np.save(folder / "counts.npy", counts)
    (folder / "store.json").write_text(json.dumps(record, indent=1), encoding="utf-8")


def locate(spec: SourceSpec) -> list[Path] | None:
    """A source's files, or None for a data set of the hub; reads none of them.

    Raises:
        ConfigError: there is nothing by that name, or nothing of a known type.
    """
    path = names.local_path("data.source", spec.name)
    if path is None:
        names.require_hub("data.source", spec.name, "dataset", spec.revision)
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    known = [p for p in files if p.suffix in READERS]
    if not known:
        raise ConfigError(
            f"data.source: expected files of type {', '.join(READERS)}, got {str(path)!r}"
        )
    return known


def _read(spec: SourceSpec, data: DataConfig) -> Any:
    """One source as a data set of the one column "text"."""
    import datasets
    import huggingface_hub

    files = locate(spec)
    if files is not None:
        parts = [_read_file(file, spec.column, data.txt_rows) for file in files]
        return datasets.concatenate_datasets(parts)
    # `locate` may have found that the hub does not answer; datasets keeps a copy of the setting.
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
    try:
        loaded = datasets.load_dataset(
            spec.name, spec.config, split=spec.split, revision=spec.revision
        )
    except (datasets.exceptions.DatasetNotFoundError, OSError, ValueError, RuntimeError) as error:
        message = " ".join(str(error).split())
        raise ConfigError(f"data.source: {spec.name!r} cannot be loaded: {message}") from error
    return _text_column(loaded, spec.column, spec.name)


def _read_file(file: Path, column: str, txt_rows: str) -> Any:
    import datasets

    reader = READERS[file.suffix]
    features = datasets.Features({"text": datasets.Value("string")})
    empty = datasets.Dataset.from_dict({"text": []}, features=features)
    if file.stat().st_size == 0:
        return empty
    options = {"sample_by": txt_rows} if reader == "text" else {}
    level = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises
    try:
        loaded = datasets.load_dataset(reader, data_files=str(file), split="train", **options)
    except (datasets.exceptions.DatasetGenerationError, ValueError, TypeError) as error:
        if "corresponds to no data" in str(error):
            return empty
        cause = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(
            f"data.source: {str(file)!r} is no valid {reader} file: {cause}"
        ) from error
    finally:
        datasets.logging.set_verbosity(level)
    return _text_column(loaded, "text" if reader == "text" else column, str(file))


def _text_column(loaded: Any, column: str, source: str) -> Any:
    """The one column, named "text", of strings."""
    import datasets

    if column not in loaded.column_names:
        raise ConfigError(
            f"data.source: expected a column {column!r} in {source!r}, got "
            f"{', '.join(loaded.column_names)}; name it with data.column"
        )
    loaded = loaded.select_columns(column)
    loaded = loaded if column == "text" else loaded.rename_column(column, "text")
    try:
        return loaded.cast(datasets.Features({"text": datasets.Value("string")}))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"data.source: expected text in column {column!r} of {source!r}, got "
            f"{loaded.features['text']}"
        ) from error


def _names(sources: Sequence[SourceSpec]) -> str:
    return ", ".join(repr(s.name) for s in sources)


def _held_out(texts: np.ndarray, share: float) -> np.ndarray:
    """Which examples are held out, from the number of each one's text: whole texts, at least one,
    so that no piece of a text that is evaluated was trained on."""
    numbers, text_of_example = np.unique(texts, return_inverse=True)
    count = min(max(1, round(share * len(numbers))), len(numbers) - 1) if len(numbers) > 1 else 0
    chosen = np.zeros(len(numbers), dtype=bool)
    chosen[permutation(0, 0, len(numbers))[:count].numpy()] = True
    return chosen[text_of_example]


def _token_arrays(dataset: Any) -> Iterator[np.ndarray]:
    """All token ids of a data set, an array for each of its Arrow chunks."""
    for chunk in dataset.data.column("input_ids").chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=False)


# --- A store --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Store:
    """Tokens on disk, memory-mapped by `datasets`."""

    train: Any
    heldout: Any
    counts: Tensor  # (V,) int64, of the training part
    record: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> Store:
        """Raises ConfigError where ``folder`` holds no store, or a damaged one."""
        import datasets

        try:
            record = json.loads((folder / "store.json").read_text(encoding="utf-8"))
            if record["format"] != FORMAT:
                raise ValueError(f"format {record['format']}, this version reads {FORMAT}")
            return cls(
                datasets.load_from_disk(str(folder / "train")),
                datasets.load_from_disk(str(folder / "heldout")),
                torch.from_numpy(np.load(folder / "counts.npy")),
                record,
            )
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"data.prepared: expected a folder made by `distilfast prepare`, got "
                f"{str(folder)!r}: {' '.join(str(error).split())}"
            ) from error

    def lengths(self, split: str) -> Tensor:
        """(n,) tokens of each example."""
        chunks = getattr(self, split).data.column("input_ids").chunks
        parts = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
        return torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *parts]).astype(np.int64))

    def sizes(self, batch: BatchConfig) -> Tensor:
        """(n,) what each training example takes of a step: its tokens, or 1."""
        lengths = self.lengths("train")
        return torch.ones_like(lengths) if batch.tokens is None else lengths

    @functools.cached_property
    def _chunks(self) -> dict[str, tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]]]]:
        """Of each split, the first example of each Arrow chunk, and the chunks' (offsets, ids)."""
        found = {}
        for split in ("train", "heldout"):
            chunks = getattr(self, split).data.column("input_ids").chunks
            starts = np.cumsum([0, *(len(chunk) for chunk in chunks)])
            found[split] = (
                starts[:-1],
                [(chunk.offsets.to_numpy(), chunk.values.to_numpy()) for chunk in chunks],
            )
        return found

    def rows(self, split: str, examples: Tensor) -> list[np.ndarray]:
        """The token ids of some examples, int32: read-only views of the file."""
        starts, chunks = self._chunks[split]
        numbers = examples.numpy()
        places = np.searchsorted(starts, numbers, side="right") - 1
        rows = []
        for place, i in zip(places.tolist(), (numbers - starts[places]).tolist(), strict=True):
            offsets, ids = chunks[place]
            rows.append(ids[offsets[i] : offsets[i + 1]])
        return rows

    def tokens(self, split: str, examples: Tensor) -> Tensor:
        """The token ids of some examples, (n,) int32, one example after the other."""
        return torch.from_numpy(np.concatenate(self.rows(split, examples)))


# --- Batches --------------------------------------------------------------------------------------


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
