"""Turn text into a store of tokens."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from distilfast import atomic
from distilfast.config import Config, ConfigError, DataConfig, SourceSpec
from distilfast.data.masking import permutation
from distilfast.data.store import FORMAT, Store
from distilfast.errors import writable
from distilfast.models.tokenizers import fingerprint, vocabulary_size
from distilfast.sources import lookup

READERS = {".txt": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def prepare(config: Config, tokenizer: Any, folder: Path) -> Store:
    """Make the store in ``folder`` if no valid one is there, and open it.

    Raises:
        ConfigError: no source, a missing file or column, an empty corpus, or a folder that holds
            something else. Then nothing is left behind.
    """
    record = _record(config, tokenizer)
    if (folder / "store.json").is_file():
        store = Store.open(folder)
        # A source may have been removed since then, but it must not have changed.
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
    scratch = atomic.beside(folder)
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
            with contextlib.suppress(OSError):  # missing, or another process uses it too
                parent.rmdir()
        raise
    return Store.open(folder)


def check(config: Config, folder: Path) -> None:
    """Check that a store can be made in ``folder``, as far as possible without reading the text."""
    import datasets

    for place in (folder, folder.parent):  # it is made beside its place, and renamed
        writable("data.prepared", place)
    writable("HF_DATASETS_CACHE", Path(datasets.config.HF_DATASETS_CACHE))
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"data.prepared: expected an empty folder, got {str(folder)!r}")
    if not config.sources:
        raise ConfigError("data.source: expected a file, folder or hub name, got null")
    for source in config.sources:
        locate(source)


def _record(config: Config, tokenizer: Any) -> dict[str, Any]:
    """The record of what a store is made from. Equal records mean equal tokens."""
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
    """The size of a local source's files, to notice a change; None: the source is not local."""
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
    # Read every source before tokenising the first, so that errors show early.
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
    counts = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
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
    """List a source's files without reading them; None for a data set of the hub.

    Raises:
        ConfigError: nothing has that name, or no file has a known type.
    """
    path = lookup.local_path("data.source", spec.name)
    if path is None:
        lookup.require_hub("data.source", spec.name, "dataset", spec.revision)
        return None
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    known = [p for p in files if p.suffix in READERS]
    if not known:
        raise ConfigError(
            f"data.source: expected files of type {', '.join(READERS)}, got {str(path)!r}"
        )
    return known


def _read(spec: SourceSpec, data: DataConfig) -> Any:
    """Load one source as a data set whose only column is "text"."""
    import datasets
    import huggingface_hub

    files = locate(spec)
    if files is not None:
        parts = [_read_file(file, spec.column, data.txt_rows) for file in files]
        return datasets.concatenate_datasets(parts)
    # `locate` may have switched to offline mode; `datasets` has its own copy of that setting.
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
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs an error, then raises it
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
    """Reduce a data set to one column of strings, named "text"."""
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
    """Choose the examples to hold out, given the number of each example's text.

    Whole texts are held out, at least one, so that no piece of an evaluated text is trained on.
    """
    numbers, text_of_example = np.unique(texts, return_inverse=True)
    count = min(max(1, round(share * len(numbers))), len(numbers) - 1) if len(numbers) > 1 else 0
    chosen = np.zeros(len(numbers), dtype=bool)
    chosen[permutation(0, 0, len(numbers))[:count].numpy()] = True
    return chosen[text_of_example]


def _token_arrays(dataset: Any) -> Iterator[np.ndarray]:
    """All token ids of a data set, one array for each of its Arrow chunks."""
    for chunk in dataset.data.column("input_ids").chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=False)
