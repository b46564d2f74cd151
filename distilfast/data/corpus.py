"""Turn text into a store of tokens."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import logging
import os
import shutil
import sys
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from distilfast import atomic
from distilfast.config import Config, ConfigError, SourceSpec
from distilfast.data import files
from distilfast.data.masking import permutation
from distilfast.data.store import COUNTED, FORMAT, Store, describe_texts
from distilfast.data.texts import Source
from distilfast.errors import expect, writable
from distilfast.models.tokenizers import fingerprint, tokenize, vocabulary_size
from distilfast.sources import lookup

log = logging.getLogger("distilfast")


def prepare(config: Config, tokenizer: Any, folder: Path) -> Store:
    """Make the store in ``folder`` if there is none, and open it.

    The texts of a store that is there are compared with those of today, by the hashes of their
    files. A source may have been removed since then; the store is then taken as it is.

    Raises:
        ConfigError: no source, a missing file or column, an empty corpus, a file that changes while
            it is read, or a folder that holds something else. Then nothing is left behind.
    """
    if not (folder / "store.json").is_file():
        sources = check(config, folder)
        record = _record(config, tokenizer, sources)
        if _make(config, sources, tokenizer, folder, record):
            return Store.open(folder)
    store = Store.open(folder)
    wanted = "causal" if config.objective == "causal" else "masked"
    if store.objective != wanted:
        raise ConfigError(
            f"data.prepared: expected tokens for the {wanted} objective, got {str(folder)!r}, made "
            f"for the {store.objective} one"
        )
    if config.sources:
        _compare(store, _record(config, tokenizer, locate(config, missing_ok=True)), folder)
    if store.record["max_length"] > config.data.max_length:
        raise ConfigError(
            f"data.max_length: expected at least {store.record['max_length']}, that of the "
            f"tokens in {str(folder)!r}, got {config.data.max_length}"
        )
    if store.record["tokenizer"] != fingerprint(tokenizer):
        raise ConfigError(
            f"data.prepared: expected tokens of the teacher's tokenizer, got {str(folder)!r}, "
            "made with another"
        )
    return store


def check(config: Config, folder: Path) -> list[Source]:
    """Check that a store can be made in ``folder``, and find its sources.

    Of each local file this reads the first texts, of a data set of the hub nothing.
    """
    for place in (folder, folder.parent):  # it is made beside its place, and renamed
        writable("data.prepared", place)
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"data.prepared: expected an empty folder, got {str(folder)!r}")
    if "::" in str(folder.absolute()):  # `datasets` would write to what stands before it
        raise ConfigError(f"data.prepared: expected a path without '::', got {str(folder)!r}")
    got = config.data.source
    expect(bool(config.sources), "data.source", "a file, folder or hub name", got)
    sources = locate(config)
    for source in sources:
        if not source.check(config.data.txt_rows):
            raise ConfigError(f"data.source: expected text, got none in {source.spec.name!r}")
    taken = (
        (s.spec.column, os.path.realpath(f)) for s in sources if s.files for f in s.files.taken
    )
    for (_, file), times in Counter(taken).items():
        if times > 1:
            log.warning("data.source: %r is read %d times", file, times)
    return sources


def locate(config: Config, missing_ok: bool = False) -> list[Source]:
    """Find the sources of a run, and list their files without reading them.

    Args:
        config: the run, whose output and tokens are no text even in the folder of its source.
        missing_ok: a local source may be gone, and is then taken for one of the hub.

    Raises:
        ConfigError: nothing has that name, no file has a known type, or a local source has what
            only the hub knows.
    """
    own, found = [Path(config.output), config.token_folder], []
    for spec in config.sources:
        if missing_ok:
            path = lookup.existing(spec.name)
        elif (path := lookup.local_path("data.source", spec.name)) is None:
            lookup.require_hub("data.source", spec.name, "dataset", spec.revision)
        if path is not None and spec != SourceSpec(spec.name, column=spec.column):
            raise ConfigError(
                "data.source: expected config, revision and split for a data set of the hub, got "
                f"them for {str(path)!r}"
            )
        found.append(Source(spec, None if path is None else files.find(path, own)))
    return found


def _record(config: Config, tokenizer: Any, sources: Sequence[Source]) -> dict[str, Any]:
    """The record of what a store is made from. Equal records mean equal tokens."""
    settings = asdict(config.data)
    for key in ("prepared", "source", "packing"):
        del settings[key]
    causal = {}
    if config.objective == "causal":  # old records are of masked LMs, and do not say it
        around = _around(config, tokenizer)
        causal = {"objective": "causal", "begin": around[0], "end": around[1]}
    return {
        "format": FORMAT,
        **causal,
        "source": [asdict(s.spec) for s in sources],
        "files": _digests(sources),
        "tokenizer": fingerprint(tokenizer),
        **settings,
    }


def _around(config: Config, tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens before and after those of a text.

    A causal LM gets the tokenizer's end token after a text, and before it what the tokenizer itself
    puts there, such as Llama's begin token, as the teacher was trained with it.
    """
    if config.objective != "causal":
        return [tokenizer.cls_token_id], [tokenizer.sep_token_id]
    begin, first = tokenizer.bos_token_id, tokenizer("a")["input_ids"][:1]
    return first if first == [begin] else [], [tokenizer.eos_token_id]


def _digests(sources: Sequence[Source]) -> dict[str, dict[str, str] | None]:
    """The hashes of each source's files; None: it is not local, or gone."""
    return {s.spec.name: None if s.files is None else s.files.digests() for s in sources}


def _compare(store: Store, record: dict[str, Any], folder: Path) -> None:
    """Check that a store is what ``record`` would give, but for sources that are gone.

    Raises:
        ConfigError: it is not, or too old to tell.
    """
    before = store.record
    if before["format"] < 2:
        raise ConfigError(
            f"data.prepared: expected tokens with hashes of their texts, got {str(folder)!r}, made "
            "by an older version without; make them anew, or set data.source to null to use them "
            "as they are"
        )
    differing = [k for k, v in record.items() if k != "files" and before.get(k) != v]
    for name, now in record["files"].items():
        then = before["files"].get(name) or {}
        if now is not None and now != then:
            changed = sorted(x for x in {*now, *then} if now.get(x) != then.get(x))
            more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
            differing.append(f"the texts of {', '.join(map(repr, changed[:3]))}{more} in {name!r}")
    if differing:
        raise ConfigError(
            f"data.prepared: expected an empty folder or tokens made with these settings, "
            f"got {str(folder)!r}, which differs in {', '.join(differing)}"
        )


def _make(
    config: Config, sources: Sequence[Source], tokenizer: Any, folder: Path, record: dict[str, Any]
) -> bool:
    """Make the store; False: another process was faster."""
    scratch = atomic.beside(folder)
    made = [parent for parent in scratch.parents if not parent.exists()]
    try:
        shutil.rmtree(scratch, ignore_errors=True)  # of a process that had the same number
        scratch.mkdir(parents=True)
        record["texts"], record["tokens"] = _fill(config, sources, tokenizer, scratch)
        if _digests(locate(config)) != record["files"]:
            raise ConfigError(
                "data.source: expected files that do not change while they are read, got a change "
                f"in {_names(config)}"
            )
        (scratch / "store.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        if (folder / "store.json").is_file():
            shutil.rmtree(scratch)
            return False
        if folder.exists():
            folder.rmdir()
        os.replace(scratch, folder)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):  # missing, or another process uses it too
                parent.rmdir()
        raise
    return True


def _fill(
    config: Config, sources: Sequence[Source], tokenizer: Any, folder: Path
) -> tuple[dict[str, int], dict[str, int]]:
    """Write the tokens into ``folder``, and tell what became of the texts (see `describe_texts`),
    and how many tokens are in train and held out.

    Raises:
        ConfigError: a source cannot be read, or gives too little to train on and hold out.
    """
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    whole = folder / "examples.arrow"
    keys, of_sources = _tokenize(config, sources, tokenizer, whole)
    seen = {key: sum(counts[key] for counts in of_sources) for key in of_sources[0]}
    texts = _numbered(keys)
    distinct = int(texts.max()) + 1 if len(texts) else 0
    seen["repeated"] = seen["used"] - distinct
    told = describe_texts(seen, asdict(config.data))
    if distinct < 2:
        raise ConfigError(
            f"data.source: expected two different texts of at least {config.data.min_length} "
            f"tokens, one to train on and one held out, got {told} in {_names(config)}"
        )
    for source, its in zip(sources, of_sources, strict=True):
        if its["used"] < its["read"] / 2:
            log.warning(
                "data.source: more than half of the texts of %r are left out: %s",
                source.spec.name,
                describe_texts(its, asdict(config.data)),
            )
    examples = datasets.Dataset.from_file(str(whole))
    flags = _held_out(texts, config.data.heldout)
    if flags.mean() > 0.5 >= config.data.heldout:
        log.warning(
            "data.heldout: %d of %d examples are held out, as texts are held out whole and the "
            "longest of these was drawn",
            flags.sum(),
            len(flags),
        )
    counts, tokens = np.zeros(vocabulary_size(tokenizer), dtype=np.int64), {}
    for split, chosen in (("heldout", flags), ("train", ~flags)):
        # An absolute path, because `datasets` takes a ~ at the start for the home folder.
        place = str(folder.absolute() / split)
        examples.select(np.flatnonzero(chosen)).save_to_disk(place)
        counts[:] = 0
        for piece in _token_arrays(datasets.load_from_disk(place)):
            counts += np.bincount(piece, minlength=len(counts))
        tokens[split] = int(counts.sum())
    np.save(folder / "counts.npy", counts)  # the training part's
    whole.unlink()
    return seen, tokens


def _tokenize(
    config: Config, sources: Sequence[Source], tokenizer: Any, file: Path
) -> tuple[np.ndarray, list[Counter[str]]]:
    """Write the examples of all texts to an Arrow file, in order.

    Returns:
        For each example a number that is the same for equal texts, (n,) int64; and of each source
        how many texts were read, used, and left out for which reason.
    """
    import pyarrow
    from datasets.utils import tqdm

    data, causal = config.data, config.objective == "causal"
    # Read every source before tokenising the first, so that errors show early.
    total = sum(len(batch) for source in sources for batch in source.texts(data.txt_rows))
    begin, end = _around(config, tokenizer)
    unknown = tokenizer.unk_token_id
    if [unknown] == end:  # as GPT-2's
        unknown = None

    def pieces(ids: list[int]) -> Iterator[list[int]]:
        """A text in pieces of at most max_length tokens: each with CLS and SEP, or one text of a
        causal LM, from its begin to its end, in all of them."""
        if causal:
            ids = [*begin, *ids, *end] if ids else []
            yield from (ids[i : i + data.max_length] for i in range(0, len(ids), data.max_length))
            return
        body = data.max_length - 2
        yield from ([*begin, *ids[i : i + body], *end] for i in range(0, len(ids), body))

    def cut(ids: list[int]) -> tuple[list[list[int]], Counter[str]]:
        """The examples of a text, and how many pieces are none, by the reason."""
        kept, lost = [], Counter[str]()
        for piece in pieces(ids):
            if len(piece) < data.min_length:
                lost["short"] += 1
            elif piece.count(unknown) >= data.max_unknown * len(piece):
                lost["unknown"] += 1
            else:
                kept.append(piece)
        return kept, lost

    encode = functools.partial(tokenize, tokenizer, key="data.special_tokens")
    if data.special_tokens == "tokens":
        encode = functools.partial(tokenizer, split_special_tokens=False, verbose=False)
    counted = (*COUNTED, "cut") if causal else COUNTED
    keys, of_sources = array("q"), [Counter(dict.fromkeys(counted, 0)) for _ in sources]
    batches = (
        (seen, batch)
        for seen, source in zip(of_sources, sources, strict=True)
        for batch in source.texts(data.txt_rows)
    )
    column = pyarrow.list_(pyarrow.int32())
    with (
        file.open("wb") as opened,
        pyarrow.ipc.new_stream(opened, pyarrow.schema({"input_ids": column})) as writer,
        tqdm(total=total, desc="tokenizing", unit=" texts") as bar,
    ):
        for seen, batch in batches:
            strings = [text or "" for text in batch]
            made_of = encode(strings, add_special_tokens=False)["input_ids"]
            examples: list[list[int]] = []
            for ids in made_of:
                kept, lost = cut(ids)
                examples += kept
                keys.extend([_key(kept)] * len(kept))
                seen["read"] += 1
                if kept:
                    seen["used"] += 1
                    seen["pieces"] += lost.total()
                    if causal:
                        seen["cut"] += len(kept) + lost.total() > 1
                else:
                    seen["unknown" if lost["unknown"] else "short" if lost else "empty"] += 1
            made = pyarrow.array(examples, column)
            writer.write_batch(pyarrow.record_batch([made], ["input_ids"]))
            bar.update(len(batch))
    return np.array(keys, dtype=np.int64), of_sources


def _key(examples: list[list[int]]) -> int:
    """A number for a text. Unequal texts with the same one would only be kept together."""
    tokens = np.fromiter(chain.from_iterable(examples), np.int32).tobytes()
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "big", signed=True)


def _numbered(keys: np.ndarray) -> np.ndarray:
    """(n,), the number of each example's text; equal texts have that of the first of them."""
    _, first, text = np.unique(keys, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[text]


def _held_out(texts: np.ndarray, share: float) -> np.ndarray:
    """Choose the examples to hold out, given the number of each example's text.

    Whole texts are held out, at least one and not all, and equal ones together: no piece of an
    evaluated text is trained on.
    """
    distinct = int(texts.max()) + 1
    count = min(max(1, round(share * distinct)), distinct - 1)
    chosen = np.zeros(distinct, dtype=bool)
    chosen[permutation(0, 0, distinct)[:count].numpy()] = True
    return chosen[texts]


def _names(config: Config) -> str:
    return ", ".join(repr(spec.name) for spec in config.sources)


def _token_arrays(dataset: Any) -> Iterator[np.ndarray]:
    """All token ids of a data set, one array for each of its Arrow chunks."""
    for chunk in dataset.data.column("input_ids").chunks:
        yield chunk.flatten().to_numpy(zero_copy_only=False)
