"""Text to store to batches: nothing lost, nothing leaked, and a batch that is the same however it
is split."""

from __future__ import annotations

import contextlib
import csv
import gc
import json
import os
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import make_teacher
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from distilfast import data
from distilfast.config import (
    BatchConfig,
    Config,
    ConfigError,
    DataConfig,
    MaskingConfig,
    SourceSpec,
)
from distilfast.data import Batches, MicroBatch, Store, corpus, texts
from distilfast.data.masking import IGNORE_INDEX, Masker, permutation
from distilfast.driver import checks
from distilfast.models import fingerprint

PAD, UNK, CLS, SEP, MASK = range(5)
N_WORDS = 3000


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of a text is kept where `datasets` keeps what it reads."""
    import datasets

    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
        yield
    assert not list(folder.iterdir())


def make_tokenizer(n_words: int = N_WORDS, **options: Any) -> Any:
    import transformers

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{i}" for i in range(n_words))]
    return transformers.BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)}, **options)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Word wI is token I + 5, so that a text is a list of numbers and a token says whose it is."""
    return make_tokenizer()


def make_texts(lengths: Sequence[int]) -> list[list[int]]:
    """Texts of so many words; no word stands in two of them."""
    starts = np.cumsum([0, *lengths])
    assert starts[-1] <= N_WORDS
    return [list(range(a, b)) for a, b in pairwise(starts)]


def spell(text: Sequence[int]) -> str:
    return " ".join(f"w{word}" for word in text)


def tokens(text: Sequence[int]) -> list[int]:
    return [CLS, *(word + 5 for word in text), SEP]


TEXTS = make_texts([10, 14, 22, 12, 18, 11, 20, 13, 16, 15])


def write_txt(path: Path, texts: Sequence[str]) -> None:
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")


def write_jsonl(path: Path, texts: Sequence[str], column: str = "text") -> None:
    lines = [json.dumps({"id": i, column: text}) for i, text in enumerate(texts)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_json(path: Path, texts: Sequence[str]) -> None:
    path.write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")


def write_csv(path: Path, texts: Sequence[str], column: str = "text") -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([["id", column], *([i, t] for i, t in enumerate(texts))])


def write_parquet(path: Path, texts: Sequence[str], column: str = "text") -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({column: list(texts), "id": list(range(len(texts)))})
    pyarrow.parquet.write_table(table, path)


WRITERS: dict[str, Callable[..., None]] = {
    "txt": write_txt,
    "jsonl": write_jsonl,
    "json": write_json,
    "csv": write_csv,
    "parquet": write_parquet,
}


def config(source: Any, **settings: Any) -> Config:
    settings = {"max_length": 24, "min_length": 3, "heldout": 0.01} | settings
    source = str(source) if isinstance(source, Path) else source
    return Config(steps=1, data=DataConfig(source=source, **settings))


def rows(part: Any) -> list[list[int]]:
    return [list(row) for row in part["input_ids"]]


def everything(store: Store) -> list[list[int]]:
    """The examples of both parts, in the order of `make_texts`, if they are of its texts."""
    return sorted(rows(store.train) + rows(store.heldout))


def words_of(part: Any) -> set[int]:
    return {token - 5 for row in rows(part) for token in row if token >= 5}


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (p for p in sorted(folder.rglob("*")) if p.is_file())
    return {str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


# --- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_every_format_gives_its_texts_in_order(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / f"text.{suffix}"
    WRITERS[suffix](source, [spell(t) for t in TEXTS])
    store = data.prepare(config(source), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_column_is_the_one_named(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / f"text.{suffix}"
    WRITERS[suffix](source, [spell(t) for t in TEXTS], column="body")
    store = data.prepare(config(source, column="body"), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]


@pytest.mark.parametrize(
    ("txt_rows", "wanted"),
    [
        ("line", TEXTS[:6]),
        ("paragraph", [TEXTS[0] + TEXTS[1], TEXTS[2] + TEXTS[3] + TEXTS[4], TEXTS[5]]),
        ("document", [list(chain(*TEXTS[:6]))]),
    ],
)
def test_txt_is_cut_into_the_rows_asked_for(
    txt_rows: str, wanted: list[list[int]], tokenizer: Any, tmp_path: Path
) -> None:
    lines = [spell(t) for t in TEXTS]
    paragraphs = ["\n".join(lines[:2]), "\n".join(lines[2:5]), lines[5]]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("\n \t\n".join(paragraphs), encoding="utf-8")
    write_txt(tmp_path / "texts" / "b.txt", lines[6:7])
    settings = config(tmp_path / "texts", txt_rows=txt_rows, max_length=512, heldout=0.3)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in (*wanted, TEXTS[6])]


def test_folder_of_mixed_files_is_read_whole(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "deeper").mkdir(parents=True)
    for i, (suffix, write) in enumerate(WRITERS.items()):
        where = folder / "deeper" if i % 2 else folder
        write(where / f"part.{suffix}", [spell(t) for t in TEXTS[2 * i : 2 * i + 2]])
    (folder / "README.md").write_text("w1 w2 w3 w4", encoding="utf-8")
    (folder / "empty.txt").touch()
    store = data.prepare(config(folder), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]


def test_folder_with_the_name_of_a_file_is_a_folder(tokenizer: Any, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "old.txt").mkdir(parents=True)
    write_txt(folder / "old.txt" / "a.txt", [spell(t) for t in TEXTS[:5]])
    write_txt(folder / "b.txt", [spell(t) for t in TEXTS[5:]])
    store = data.prepare(config(folder), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]


def test_names_of_files_are_only_names(tokenizer: Any, tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "[a]*::b", tmp_path / "elsewhere"
    names = ["a1.txt", "a[1].txt", "*.jsonl", "?.csv", "{a,b}.parquet", "c::d.json", "~ .TXT"]
    names += ["hf:/user/e.txt", "link.txt", "folder/f.txt"]
    (folder / "hf:" / "user").mkdir(parents=True)
    elsewhere.mkdir()
    (folder / "folder").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(folder)
    (folder / "link.txt").symlink_to(elsewhere / "target")
    for name, text in zip(names, TEXTS, strict=True):
        WRITERS[name.rpartition(".")[2].lower()](folder / name, [spell(text)])
    store = data.prepare(config(folder), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]
    store = data.prepare(
        config([str(folder / name) for name in names]), tokenizer, tmp_path / "each"
    )
    assert everything(store) == [tokens(t) for t in TEXTS]


def test_what_is_no_text_is_told_and_does_not_count(tokenizer: Any, tmp_path: Path) -> None:
    """Beside the texts: other files, hidden ones, the run itself. A text that is new does count."""
    folder = tmp_path / "texts"
    settings = replace(config(folder), output=str(folder / "run"))
    (folder / ".git").mkdir(parents=True)
    write_txt(folder / "a.txt", [spell(t) for t in TEXTS])
    for other in (".git/b.txt", ".c.txt", "d.text", "e.md", "f"):
        (folder / other).write_text("w1 w2 w3\n", encoding="utf-8")
    kill(settings, tokenizer, settings.token_folder, "counts", outright=True)
    store = data.prepare(settings, tokenizer, settings.token_folder)
    assert everything(store) == [tokens(t) for t in TEXTS]
    (folder / "run" / "metrics.jsonl").write_text("{}", encoding="utf-8")
    (folder / "notes.md").touch()
    assert same_store(store, data.prepare(settings, tokenizer, settings.token_folder), least=0)
    told = "1 .txt; not read: 2 .md, 1 .text, 2 hidden, 1 without a type"
    assert [str(source.files) for source in data.locate(settings)] == [told]
    (folder / "new.txt").touch()
    with pytest.raises(ConfigError, match=r"^data\.prepared: .*the texts of 'new\.txt'"):
        data.prepare(settings, tokenizer, settings.token_folder)


def test_data_set_of_the_hub_is_read_whole(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    hub = datasets.Dataset.from_dict({"body": [*(spell(t) for t in TEXTS), None], "text": [1] * 11})
    asked = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append((*a, k)) or hub)
    monkeypatch.setattr("distilfast.sources.lookup.require_hub", lambda *_: None)
    spec = SourceSpec("user/texts", "en", "abc", "test", column="body")
    store = data.prepare(config([spec]), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]
    assert asked == [("user/texts", "en", {"split": "test", "revision": "abc"})]
    for column, message in (("text", "expected text in"), ("title", "expected one column 'title'")):
        with pytest.raises(ConfigError, match=f"^data.source: {message}"):
            data.prepare(config([replace(spec, column=column)]), tokenizer, tmp_path / "none")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nothing")
    with pytest.raises(ConfigError, match=r"^HF_DATASETS_CACHE: expected a folder"):
        data.prepare(config([spec]), tokenizer, tmp_path / "none")


def test_list_of_sources_is_read_in_order(tokenizer: Any, tmp_path: Path) -> None:
    write_txt(tmp_path / "a.txt", [spell(t) for t in TEXTS[:3]])
    write_jsonl(tmp_path / "b.jsonl", [spell(t) for t in TEXTS[3:7]], column="body")
    write_parquet(tmp_path / "c.parquet", [spell(t) for t in TEXTS[7:]])
    sources = [
        str(tmp_path / "a.txt"),
        SourceSpec(str(tmp_path / "b.jsonl"), column="body"),
        str(tmp_path / "c.parquet"),
    ]
    store = data.prepare(config(sources), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(t) for t in TEXTS]


def test_null_and_blank_rows_are_passed_over(tokenizer: Any, tmp_path: Path) -> None:
    source = tmp_path / "text.jsonl"
    made = [{"text": spell(TEXTS[0])}, {"text": None}, {"text": ""}, {"text": spell(TEXTS[1])}]
    source.write_text("\n".join(map(json.dumps, made)), encoding="utf-8")
    store = data.prepare(config(source), tokenizer, tmp_path / "tokens")
    assert everything(store) == [tokens(TEXTS[0]), tokens(TEXTS[1])]


# What a reader could take for something else than the text that it is.
CELLS = ["null", "NA", "nan", "None", "007", "1.0", "1e5", "2020-01-01", "true", "", "# no comment"]
CELLS += ['say "so", twice', "two\nlines", " spaced ", "#", "\u2028|\x0b|\t|", '"quoted"']


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet"])
def test_cells_are_read_as_they_are_written(suffix: str, tmp_path: Path) -> None:
    for i, cells in enumerate((CELLS, *([cell] for cell in CELLS if cell))):
        file = tmp_path / f"{i}.{suffix}"
        WRITERS[suffix](file, cells)
        if suffix != "parquet":  # a byte-order mark is no part of the first name
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        assert list(chain.from_iterable(texts.read(file, "text", "line"))) == cells


def broken_source(name: str, folder: Path) -> tuple[Any, str]:
    """A source that gives no text, and what the error has to name."""
    import pyarrow.parquet

    path = folder / name
    match name:
        case "column.jsonl":
            write_jsonl(path, [spell(t) for t in TEXTS], column="body")
            return str(path), "body"
        case "row.csv":  # pandas would take the first cells for names of the rows
            path.write_text("text\nHello, world\nw1, w2\n", encoding="utf-8")
            return str(path), "row.csv' cannot be read as csv: line 2: expected 1 fields"
        case "twice.csv":
            path.write_text("text,text\nw1,w2\n", encoding="utf-8")
            return str(path), "twice.csv', got text, text"
        case "long.csv":  # a text that is no table is not shown whole
            path.write_text("w1 " * 10**6 + "\n", encoding="utf-8")
            return str(path), f"got {'w1 ' * 20}...; name it"
        case "twice.jsonl":
            path.write_text('{"text": "w1"}\n{"text": "w1", "text": "w2"}\n', encoding="utf-8")
            return str(path), "line 2: expected an object with each key once, got 'text' twice"
        case "twice.parquet":
            column = pyarrow.array(["w1", "w2"])
            table = pyarrow.Table.from_arrays([column, column], ["text", "text"])
            pyarrow.parquet.write_table(table, path)
            return str(path), "twice.parquet', got text, text"
        case "utf-16.txt":  # without a mark, this is UTF-8: letters such as 4 and 0, and NUL
            path.write_text("\u0434\u0430 \u0434\u0430", encoding="utf-16-le")
            return str(path), "expected UTF-8 without NUL bytes, got one in line 1"
        case "pipe.txt":
            os.mkfifo(path)
        case "good, blank.txt":
            write_txt(folder / "good.txt", [spell(t) for t in TEXTS])
            write_txt(folder / "blank.txt", [""])
            return [str(folder / "good.txt"), str(folder / "blank.txt")], "blank.txt"
        case "local.txt":
            write_txt(path, [spell(t) for t in TEXTS])
            return [SourceSpec(str(path), split="test")], "for a data set of the hub"
        case "empty list":
            return [], "got []"
        case "open.csv":
            path.write_text('text\nw1\n"w2\nw3\n', encoding="utf-8")
        case "number.jsonl":
            path.write_text('{"text": "w1"}\n\n{"text": 7}\n', encoding="utf-8")
            return str(path), "number.jsonl', got int in line 3"
        case "numbers.parquet":
            write_parquet(path, [1, 2])  # type: ignore[list-item]
        case "lists.jsonl":
            path.write_text('{"text": ["w1", "w2"]}', encoding="utf-8")
        case "half.jsonl":
            path.write_text('{"text": "w1 w2', encoding="utf-8")
        case "half.parquet":
            path.write_bytes(b"PAR1 and no more")
        case "latin.txt":
            path.write_bytes(b"w1 w2\n" * 20_000 + b"w1 caf\xe9 w2\n")
            return str(path), "byte 0xe9 in line 20001"
        case "empty.txt":
            path.touch()
        case "blank.txt":
            path.write_text("\n" * 20, encoding="utf-8")
        case "text.pdf":
            path.write_bytes(b"%PDF")
        case "folder":
            path.mkdir()
        case "broken link":
            path.mkdir()
            (path / "a.txt").symlink_to("nowhere")
        case "single.txt":  # nothing left to train on
            write_txt(path, [spell(TEXTS[0])])
        case "good, missing.txt":
            write_txt(folder / "good.txt", [spell(t) for t in TEXTS])
            return [str(folder / "good.txt"), str(folder / "missing.txt")], "missing.txt"
        case "nothing":
            return None, "null"
    return str(path), name


@pytest.mark.parametrize(
    "name",
    [
        "missing.txt",
        "column.jsonl",
        "row.csv",
        "twice.csv",
        "long.csv",
        "twice.jsonl",
        "twice.parquet",
        "utf-16.txt",
        "pipe.txt",
        "good, blank.txt",
        "local.txt",
        "empty list",
        "open.csv",
        "number.jsonl",
        "numbers.parquet",
        "lists.jsonl",
        "half.jsonl",
        "half.parquet",
        "latin.txt",
        "empty.txt",
        "blank.txt",
        "text.pdf",
        "folder",
        "broken link",
        "single.txt",
        "good, missing.txt",
        "nothing",
    ],
)
def test_source_without_text_is_named_and_leaves_nothing(
    name: str, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    source, named = broken_source(name, tmp_path / "in")
    with pytest.raises(ConfigError, match=r"^data\.source: ") as raised:
        data.prepare(config(source, heldout=0.1), tokenizer, tmp_path / "out" / "tokens")
    assert named in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


# --- Cutting and filtering ------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [3, 4, 10, 24, 512])
def test_long_text_is_cut_without_loss(max_length: int, tokenizer: Any, tmp_path: Path) -> None:
    texts = make_texts([100, 1, 8, 9, 16, 66])
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    settings = config(tmp_path / "text.txt", max_length=max_length)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    made, body = everything(store), max_length - 2
    for row in made:
        assert row[0] == CLS
        assert row[-1] == SEP
        assert 3 <= len(row) <= max_length
    assert [x for row in made for x in row[1:-1]] == [w + 5 for text in texts for w in text]
    assert len(made) == sum(-(-len(text) // body) for text in texts)


@pytest.mark.parametrize("min_length", [3, 5, 12, 24])
def test_examples_shorter_than_min_length_are_dropped(
    min_length: int, tokenizer: Any, tmp_path: Path
) -> None:
    """CLS and SEP count. A text's last piece is an example like any other."""
    texts = make_texts([min_length - 3, min_length - 2, 22 + min_length - 3, 22 + min_length - 2])
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    settings = config(tmp_path / "text.txt", min_length=min_length)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    pieces = [texts[1], texts[2][:22], texts[2][22:], texts[3][:22], texts[3][22:]]
    kept = [tokens(p) for p in pieces if len(p) + 2 >= min_length]
    assert len(kept) == 4
    assert everything(store) == kept


def test_examples_of_unknown_tokens_are_dropped(tokenizer: Any, tmp_path: Path) -> None:
    """An example, not its whole text: 20 words, of which so many are unknown."""
    texts = make_texts([20] * 4)
    lines = [
        f"{spell(text[:-unknown] if unknown else text)} {'xyz ' * unknown}"
        for text, unknown in zip(texts, (0, 4, 11, 20), strict=True)
    ]
    lines.append(f"{spell(texts[0] + [2000, 2001])} {'xyz ' * 22}")  # two pieces of max_length
    write_txt(tmp_path / "text.txt", lines)
    # 11 of 20, or of 22 with CLS and SEP, is half or more, 4 is less.
    store = data.prepare(config(tmp_path / "text.txt"), tokenizer, tmp_path / "tokens")
    some = [CLS, *(w + 5 for w in texts[1][:16]), *[UNK] * 4, SEP]
    long = tokens([*texts[0], 2000, 2001])
    assert everything(store) == [tokens(texts[0]), long, some]
    settings = config(tmp_path / "text.txt", max_unknown=0.1)
    store = data.prepare(settings, tokenizer, tmp_path / "strict")
    assert everything(store) == [tokens(texts[0]), long]


@pytest.mark.parametrize("how", ["text", "tokens"])
def test_words_of_special_tokens_are_what_was_asked_for(
    how: str, tokenizer: Any, tmp_path: Path
) -> None:
    write_txt(tmp_path / "text.txt", ["w1 [MASK] w2[SEP]", "w3 w4"])
    settings = config(tmp_path / "text.txt", special_tokens=how, max_unknown=1.0)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    body = [6, UNK, UNK, UNK, 7, UNK, UNK, UNK] if how == "text" else [6, MASK, 7, SEP]
    assert everything(store) == [[CLS, *body, SEP], tokens([3, 4])]
    assert store.record["special_tokens"] == how


# --- Training and held-out text -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_texts", "share", "wanted"),
    [(40, 0.25, 10), (40, 0.5, 20), (40, 0.01, 1), (2, 0.9, 1), (2, 0.001, 1)],
)
def test_heldout_is_the_share_asked_for_and_at_least_one(
    n_texts: int, share: float, wanted: int, tokenizer: Any, tmp_path: Path
) -> None:
    texts = make_texts([12] * n_texts)
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    settings = config(tmp_path / "text.txt", heldout=share)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    assert len(store.heldout) == wanted
    assert len(store.train) == n_texts - wanted


def test_heldout_of_zero_is_refused_or_holds_nothing_out(tokenizer: Any, tmp_path: Path) -> None:
    write_txt(tmp_path / "text.txt", [spell(t) for t in TEXTS])
    try:
        settings = config(tmp_path / "text.txt", heldout=0.0)
    except ConfigError:
        return
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    assert rows(store.train) == [tokens(t) for t in TEXTS]
    assert store.lengths("heldout").tolist() == []
    assert list(make_batches(store, 4).heldout(0, 1, 4, None)) == []


def test_heldout_texts_are_whole_and_none_is_trained_on(tokenizer: Any, tmp_path: Path) -> None:
    """Texts of several pieces each: a word says which text it is of."""
    texts = make_texts([60] * 30)
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    settings = config(tmp_path / "text.txt", heldout=0.2)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    heldout, trained = words_of(store.heldout), words_of(store.train)
    assert not heldout & trained
    assert heldout | trained == {word for text in texts for word in text}
    whole = [set(text) <= heldout for text in texts]
    assert sum(whole) == 6
    assert heldout == set().union(*(t for t, out in zip(texts, whole, strict=True) if out))
    assert whole != sorted(whole)  # not simply the first texts
    assert whole != sorted(whole, reverse=True)


def test_equal_texts_fall_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    """Equal in what is made of them: spaces, capitals and a short last piece do not count."""
    texts = make_texts([30] * 12)
    lines = [how(spell(t)) for how in (str, str.upper, "  {} w2999".format) for t in texts]
    write_txt(tmp_path / "text.txt", lines)
    settings = config(tmp_path / "text.txt", heldout=0.25, min_length=12)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    heldout, trained = rows(store.heldout), rows(store.train)
    assert len(heldout) == len({*map(tuple, heldout)}) * 3 == 9
    assert not {*map(tuple, heldout)} & {*map(tuple, trained)}
    assert len(trained) == 27
    assert store.record["texts"]["repeated"] == 24


def test_texts_left_out_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    lines = [spell(t) for t in (*TEXTS, TEXTS[0], range(30))]
    lines += ["w1 w2", "", " ", "xyz " * 20, f"{'xyz ' * 20} {spell(range(4))}", "w7"]
    write_txt(tmp_path / "text.txt", lines)
    settings = config(tmp_path / "text.txt", min_length=12)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    assert data.describe_texts(store.record["texts"], store.record) == (
        "18 texts: 12 used (1 repeat another); left out: 2 shorter than 12 tokens, 2 with 50 % or "
        "more unknown tokens, 2 empty, 1 pieces of the used"
    )


HALF, LONG = "more than half of the texts of '{}/b.txt'", "20 of 21 examples are held out"


@pytest.mark.parametrize(
    ("second", "said"), [("a.txt", "/a.txt' is read 2 times"), ("b.txt", HALF), ("long.txt", LONG)]
)
def test_what_is_odd_about_the_texts_is_said(
    second: str, said: str, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_txt(tmp_path / "a.txt", [spell(t) for t in TEXTS[: 1 if second == "long.txt" else 10]])
    write_txt(tmp_path / "b.txt", ["w1", "w2"])
    write_txt(tmp_path / "long.txt", [spell(range(100, 540))])
    sources = [str(tmp_path / second), str(tmp_path / "a.txt")]
    data.prepare(config(sources, min_length=8), tokenizer, tmp_path / "tokens")
    assert [said.format(tmp_path) in line for line in caplog.messages] == [True]


@pytest.mark.parametrize("n_texts", [7, 8, 9, 10, 11, 12])
def test_heldout_text_is_found_between_blank_lines(
    n_texts: int, tokenizer: Any, tmp_path: Path
) -> None:
    """A blank line is no text: it neither counts as one nor is kept for evaluation."""
    texts = make_texts([12] * n_texts)
    lines = [line for text in texts for line in (spell(text), "", "")]
    write_txt(tmp_path / "text.txt", lines)
    settings = config(tmp_path / "text.txt", heldout=0.01)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    assert len(store.heldout) == 1
    assert len(store.train) == n_texts - 1


def test_counts_are_those_of_the_training_part(tokenizer: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    texts = [rng.zipf(1.5, size=50).clip(max=500).tolist() for _ in range(40)]
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    settings = config(tmp_path / "text.txt", heldout=0.2, min_length=6)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    assert store.counts.shape == (len(tokenizer),)
    assert store.counts.dtype == torch.int64
    recount = Counter(token for row in rows(store.train) for token in row)
    wanted = torch.tensor([recount[token] for token in range(len(tokenizer))])
    assert torch.equal(store.counts, wanted)
    assert store.counts[CLS] == store.counts[SEP] == len(store.train)
    everything = Counter(token for row in rows(store.heldout) for token in row) + recount
    assert sum(everything.values()) > store.counts.sum()
    # 22 + 22 + 6 words a text: nothing is dropped, so the texts themselves give the same counts.
    assert everything[6] == sum(text.count(1) for text in texts)


def test_text_of_many_chunks_is_one_text(tokenizer: Any, tmp_path: Path) -> None:
    """Rows are read, mapped and written a thousand at a time: numbers run on over the borders."""
    texts = [[i, *range(i % 5)] for i in range(2500)]
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    settings = config(tmp_path / "text.txt", heldout=0.04)
    store = data.prepare(settings, tokenizer, tmp_path / "tokens")
    train, heldout = rows(store.train), rows(store.heldout)
    assert len(heldout) == 100
    assert everything(store) == sorted(tokens(t) for t in texts)
    assert store.lengths("train").tolist() == [len(row) for row in train]
    places = torch.tensor([0, 999, 1000, 1001, 1999, 2000, 2399])
    assert [r.tolist() for r in store.rows("train", places)] == [train[i] for i in places]
    recount = Counter(token for row in train for token in row)
    assert store.counts.tolist() == [recount[token] for token in range(len(tokenizer))]


def test_contents_of_a_source_decide(tokenizer: Any, tmp_path: Path) -> None:
    """Not its name, length and time, which are those of another text."""
    source = tmp_path / "text.txt"
    for i, text in enumerate(["w1 w2 w3", "w4 w5 w6"]):
        write_txt(source, [text, "w7 w8 w9"])
        os.utime(source, (1e9, 1e9))
        store = data.prepare(config(source), tokenizer, tmp_path / f"tokens-{i}")
        assert everything(store) == [tokens([1 + 3 * i, 2 + 3 * i, 3 + 3 * i]), tokens([7, 8, 9])]
    with pytest.raises(
        ConfigError, match=r"^data\.prepared: .* differs in the texts of 'text\.txt'"
    ):
        data.prepare(config(source), tokenizer, tmp_path / "tokens-0")
    source.unlink()
    assert len(data.prepare(config(source), tokenizer, tmp_path / "tokens-0").train) == 1


def test_source_that_changes_while_it_is_read_is_refused(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*given: Any) -> Any:
        write_txt(tmp_path / "text.txt", [spell(t) for t in TEXTS[1:]])
        return filled(*given)

    filled = corpus._fill
    write_txt(tmp_path / "text.txt", [spell(t) for t in TEXTS])
    monkeypatch.setattr(corpus, "_fill", fill)
    with pytest.raises(ConfigError, match=r"^data\.source: expected files that do not change"):
        data.prepare(config(tmp_path / "text.txt"), tokenizer, tmp_path / "tokens")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


# --- The store ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 texts of 3 to 40 words."""
    lengths = np.random.default_rng(1).integers(3, 41, size=64).tolist()
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    write_txt(path, [spell(t) for t in make_texts(lengths)])
    return path


@pytest.fixture(scope="module")
def stored(corpus_file: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a store that no test changes."""
    folder = tmp_path_factory.mktemp("stored") / "tokens"
    data.prepare(config(corpus_file, heldout=0.2), tokenizer, folder)
    return folder


def test_store_reopened_is_the_same(
    stored: Path, corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    made = data.prepare(config(corpus_file, heldout=0.2), tokenizer, tmp_path / "tokens")
    opened = Store.open(tmp_path / "tokens")
    assert same_store(made, opened)
    assert same_store(opened, Store.open(stored))  # and the same wherever and whenever it is made


def same_store(a: Store, b: Store, least: int = 40) -> bool:
    assert len(a.train) > least
    assert len(a.heldout) > least // 4
    return (
        rows(a.train) == rows(b.train)
        and rows(a.heldout) == rows(b.heldout)
        and torch.equal(a.counts, b.counts)
        and a.record == b.record
    )


def test_preparing_again_changes_nothing(
    corpus_file: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tokens"
    made = data.prepare(config(corpus_file, heldout=0.2), tokenizer, folder)
    before = snapshot(tmp_path)
    monkeypatch.setattr(corpus, "_fill", lambda *_: pytest.fail("tokenised again"))
    assert same_store(made, data.prepare(config(corpus_file, heldout=0.2), tokenizer, folder))
    assert same_store(made, data.prepare(config(None, heldout=0.2), tokenizer, folder))
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize(
    "setting",
    [
        {"max_length": 16},
        {"min_length": 4},
        {"max_unknown": 0.4},
        {"heldout": 0.1},
        {"txt_rows": "document"},
        {"column": "body"},
        {"special_tokens": "tokens"},
    ],
    ids=lambda x: next(iter(x)),
)
def test_store_of_other_settings_is_refused(
    setting: dict[str, Any], stored: Path, corpus_file: Path, tokenizer: Any
) -> None:
    before = snapshot(stored)
    settings = config(corpus_file, **{"heldout": 0.2} | setting)
    with pytest.raises(ConfigError, match=r"^data\.prepared: .*" + next(iter(setting))):
        data.prepare(settings, tokenizer, stored)
    assert snapshot(stored) == before


def test_store_of_another_source_is_refused(stored: Path, tokenizer: Any, tmp_path: Path) -> None:
    write_txt(tmp_path / "text.txt", ["w1 w2 w3"])
    with pytest.raises(ConfigError, match=r"^data\.prepared: .*source"):
        data.prepare(config(tmp_path / "text.txt", heldout=0.2), tokenizer, stored)


@pytest.mark.parametrize("with_source", [True, False])
def test_store_of_another_tokenizer_is_refused(
    with_source: bool, stored: Path, corpus_file: Path
) -> None:
    settings = config(corpus_file if with_source else None, heldout=0.2)
    with pytest.raises(ConfigError, match=r"^data\.prepared: .*tokenizer"):
        data.prepare(settings, make_tokenizer(N_WORDS - 1), stored)


def test_old_store_is_read_but_never_compared(
    stored: Path, corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """It has no hashes, so nobody knows whether it is of these texts."""
    shutil.copytree(stored, tmp_path / "tokens")
    record = json.loads((stored / "store.json").read_text(encoding="utf-8")) | {"format": 1}
    del record["files"], record["texts"]
    (tmp_path / "tokens" / "store.json").write_text(json.dumps(record), encoding="utf-8")
    store = data.prepare(config(None), tokenizer, tmp_path / "tokens")
    assert rows(store.train) == rows(Store.open(stored).train)
    with pytest.raises(ConfigError, match=r"^data\.prepared: .*hashes.*data\.source to null"):
        data.prepare(config(corpus_file, heldout=0.2), tokenizer, tmp_path / "tokens")


def test_store_of_longer_texts_is_refused(stored: Path, tokenizer: Any) -> None:
    """Without a source it may be of other settings; but it has to fit the model and the batch."""
    assert data.prepare(config(None, max_length=25), tokenizer, stored).record["max_length"] == 24
    with pytest.raises(ConfigError, match=r"^data\.max_length: expected at least 24, .* got 23$"):
        data.prepare(config(None, max_length=23), tokenizer, stored)


def test_fingerprint_survives_saving(tokenizer: Any, tmp_path: Path) -> None:
    """A store outlives the run: the teacher of the next stage has its tokenizer saved by this."""
    import transformers

    tokenizer.save_pretrained(tmp_path)
    tokenizer(["w1 w2", "w3"], padding=True, truncation=True, max_length=3)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer) == fingerprint(make_tokenizer())


def test_tokenizers_of_one_fingerprint_give_the_same_ids(tokenizer: Any) -> None:
    """The same words in another order, or read with another case, are other tokens."""
    import transformers

    vocabulary = tokenizer.get_vocab()
    swapped = vocabulary | {"w1": vocabulary["w2"], "w2": vocabulary["w1"]}
    others = {
        "swapped": transformers.BertTokenizer(vocab=swapped),
        "cased": make_tokenizer(do_lower_case=False),
    }
    for name, other in others.items():
        assert other("W1 w1").input_ids != tokenizer("W1 w1").input_ids
        assert fingerprint(other) != fingerprint(tokenizer), name


def test_folder_of_something_else_is_left_alone(
    corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^data\.prepared: expected an empty folder"):
        data.prepare(config(corpus_file), tokenizer, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


def test_empty_folder_is_filled(corpus_file: Path, tokenizer: Any, tmp_path: Path) -> None:
    data.prepare(config(corpus_file), tokenizer, tmp_path)
    assert len(Store.open(tmp_path).train) > 60


class Killed(BaseException):
    """What neither `except Exception` nor `except ConfigError` catches."""


def kill(settings: Config, tokenizer: Any, folder: Path, stage: str, outright: bool) -> None:
    """Prepare, and die at a stage, with half of the files written. Outright: nothing is cleared
    away."""
    import datasets

    save, saved = datasets.Dataset.save_to_disk, []

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    def save_to_disk(self: Any, path: Any, *arguments: Any, **options: Any) -> None:
        save(self, path, *arguments, **options)
        saved.append(path)
        if len(saved) == STAGES.index(stage) + 1:
            die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.Dataset, "save_to_disk", save_to_disk)
        if stage == "counts":
            patch.setattr(np, "save", die)
        elif stage == "publishing":
            patch.setattr(os, "replace", die)
        if outright:
            patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(Killed):
            data.prepare(settings, tokenizer, folder)


STAGES = ["first split", "second split", "counts", "publishing"]


@pytest.mark.parametrize("stage", STAGES)
def test_failed_preparation_leaves_nothing(
    stage: str, stored: Path, corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    settings, folder = config(corpus_file, heldout=0.2), tmp_path / "out" / "tokens"
    kill(settings, tokenizer, folder, stage, outright=False)
    assert not folder.parent.exists() or not list(folder.parent.iterdir())
    made = data.prepare(settings, tokenizer, folder)
    assert same_store(made, Store.open(stored))


@pytest.mark.parametrize("stage", STAGES)
def test_half_written_store_is_not_taken_for_one(
    stage: str, stored: Path, corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """Killed outright, so that nothing is cleared away; the next process may have the same id."""
    settings, folder = config(corpus_file, heldout=0.2), tmp_path / "out" / "tokens"
    kill(settings, tokenizer, folder, stage, outright=True)
    assert list(folder.parent.iterdir())
    with pytest.raises(ConfigError, match=r"^data\.prepared"):
        Store.open(folder)
    made = data.prepare(settings, tokenizer, folder)
    assert same_store(made, Store.open(stored))
    assert [p.name for p in folder.parent.iterdir()] == ["tokens"]


@pytest.mark.parametrize("place", ["tokens", "data/tokens"])
def test_killed_preparation_does_not_block_the_next_run(
    place: str, corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A run's tokens are made in its output, which has to pass for empty when they are not done;
    but not with what only resembles them."""
    output = tmp_path / "run"
    settings = config(corpus_file, heldout=0.2, prepared=str(output / place))
    settings = replace(settings, output=str(output))
    kill(settings, tokenizer, output / place, "counts", outright=True)
    checks.check_output(settings, output)
    for other in (f"{place}-backup", f"{place}.tmp-old", "config.yaml.tmp-mine"):
        (output / other).mkdir()
        with pytest.raises(ConfigError, match=r"^output: expected an empty folder"):
            checks.check_output(settings, output)
        checks.claim(settings, output, {})
        assert (output / other).is_dir()
        (output / other).rmdir()
        (output / "config.yaml").unlink()


def damage(folder: Path, how: str) -> None:
    arrow = next((folder / "train").glob("*.arrow"))
    if how == "no split":
        for path in (folder / "heldout").iterdir():
            path.unlink()
        (folder / "heldout").rmdir()
    elif how == "no arrow":
        arrow.unlink()
    elif how == "half an arrow":
        arrow.write_bytes(arrow.read_bytes()[: arrow.stat().st_size // 2])
    elif how == "first batches of an arrow":
        border = arrow.read_bytes().rindex(b"\xff" * 4, 0, -8)
        arrow.write_bytes(arrow.read_bytes()[:border])
    elif how == "the other split":
        shutil.rmtree(folder / "heldout")
        shutil.copytree(folder / "train", folder / "heldout")
    elif how == "no keys":
        (folder / "store.json").write_text('{"format": 2}', encoding="utf-8")
    elif how == "matrix of counts":
        np.save(folder / "counts.npy", np.load(folder / "counts.npy")[None])
    elif how == "no counts":
        (folder / "counts.npy").unlink()
    elif how == "half the counts":
        (folder / "counts.npy").write_bytes((folder / "counts.npy").read_bytes()[:200])
    elif how == "empty counts":
        (folder / "counts.npy").write_bytes(b"")
    elif how == "half a record":
        record = (folder / "store.json").read_text(encoding="utf-8")
        (folder / "store.json").write_text(record[: len(record) // 2], encoding="utf-8")
    elif how == "no record":
        (folder / "store.json").unlink()
    elif how == "a list for a record":
        (folder / "store.json").write_text("[]", encoding="utf-8")
    else:
        (folder / "store.json").write_text('{"format": 99}', encoding="utf-8")


@pytest.mark.parametrize(
    "how",
    [
        "no split",
        "no arrow",
        "half an arrow",
        "first batches of an arrow",
        "the other split",
        "no keys",
        "matrix of counts",
        "no counts",
        "half the counts",
        "empty counts",
        "no record",
        "half a record",
        "a list for a record",
        "another format",
    ],
)
def test_damaged_store_is_refused(how: str, stored: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "tokens"
    shutil.copytree(stored, folder)
    assert len(Store.open(folder).train) > 40
    damage(folder, how)
    with pytest.raises(ConfigError, match=r"^data\.prepared: .*tokens"):
        Store.open(folder)


def test_store_gives_lengths_and_rows(stored: Path) -> None:
    store = Store.open(stored)
    for split, part in (("train", store.train), ("heldout", store.heldout)):
        made = rows(part)
        assert store.lengths(split).tolist() == [len(row) for row in made]
        assert store.lengths(split).dtype == torch.int64
        wanted = torch.tensor([3, 0, 3, len(made) - 1])
        assert [row.tolist() for row in store.rows(split, wanted)] == [made[i] for i in wanted]


def test_rows_of_equal_length_are_rows(tokenizer: Any, tmp_path: Path) -> None:
    """An array of arrays of one length is easily taken for a matrix."""
    texts = make_texts([10] * 6)
    write_txt(tmp_path / "text.txt", [spell(t) for t in texts])
    store = data.prepare(config(tmp_path / "text.txt"), tokenizer, tmp_path / "tokens")
    made = rows(store.train)
    assert len(made) == 5
    for examples in ([2], [4, 1], [0, 1, 2, 3, 4]):
        got = store.rows("train", torch.tensor(examples))
        assert [row.tolist() for row in got] == [made[i] for i in examples]


# --- Batches --------------------------------------------------------------------------------------


def make_batches(
    store: Store,
    sequences: int | None = None,
    seed: int = 56,
    probability: float = 0.3,
    **batch: int | None,
) -> Batches:
    masker = Masker.from_counts(
        store.counts, [PAD, UNK, CLS, SEP, MASK], MASK, MaskingConfig(probability), seed
    )
    batch |= {"sequences": sequences}
    return Batches(store, masker, PAD, BatchConfig(**batch))


@pytest.fixture(scope="module")
def store(stored: Path) -> Store:
    return Store.open(stored)


def real(batch: MicroBatch) -> Tensor:
    """(B, L) bool, what is no padding."""
    if batch.attention_mask is None:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)
    return batch.attention_mask.bool()


def examples_of(batches: Sequence[MicroBatch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each example's (ids as seen, labels), without its padding, in some order that is none of the
    batches'."""
    found = []
    for batch in batches:
        labels = batch.labels.view(batch.input_ids.shape)
        for ids, kept, label in zip(batch.input_ids, real(batch), labels, strict=True):
            found.append((tuple(ids[kept].tolist()), tuple(label[kept].tolist())))
    return sorted(found)


def deal(
    batches: Batches, ranks: int, micro: int, limit: int | None
) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """The held-out batches in the order of the rounds, as many for each rank, and those beyond."""
    shares = [list(batches.heldout(rank, ranks, micro, limit)) for rank in range(ranks)]
    rounds = [batch for turn in zip(*shares, strict=True) for batch in turn]
    n_parts = -(-len(batches.lengths["heldout"][:limit]) // micro)
    return rounds[:n_parts], rounds[n_parts:]


def unmasked(batch: MicroBatch) -> list[list[int]]:
    labels = batch.labels.view(batch.input_ids.shape)
    whole = torch.where(labels != IGNORE_INDEX, labels, batch.input_ids)
    return [row[kept].tolist() for row, kept in zip(whole, real(batch), strict=True)]


# The longest text is of 24 tokens.
SIZES = st.integers(1, 200).map(lambda n: {"sequences": n}) | st.integers(24, 3000).map(
    lambda n: {"tokens": n}
)
BATCHES = SIZES | st.tuples(SIZES, st.integers(0, 30)).map(
    lambda drawn: {
        **drawn[0],
        "warmup_from": max(24 if "tokens" in drawn[0] else 1, *(n // 2 for n in drawn[0].values())),
        "warmup_steps": drawn[1] + 1,
    }
)


@given(BATCHES)
@settings(max_examples=60, deadline=None)
def test_every_example_comes_once_an_epoch(store: Store, batch: dict[str, int]) -> None:
    """Steps cross the border of epochs, and may hold several of them. Against the endless sequence
    of epochs written out: an example belongs to the step in which it begins."""
    batches, n = make_batches(store, **batch), len(store.train)
    lengths = store.lengths("train")
    orders = [permutation(56, epoch, n) for epoch in range(3)]
    assert not torch.equal(orders[0], orders[1])
    wanted: dict[int, list[tuple[int, int]]] = {}
    begin = step = 0
    for epoch, order in enumerate(orders):
        for number in order.tolist():
            while begin >= batches.batch.before(step + 1):
                step += 1
            wanted.setdefault(step, []).append((number, epoch))
            begin += int(lengths[number]) if "tokens" in batch else 1
    for number in range(step):  # all but the last, which the fourth epoch fills
        examples, epochs = batches.examples(number)
        assert list(zip(examples.tolist(), epochs.tolist(), strict=True)) == wanted[number]


@given(st.integers(24, 800), st.integers(0, 20))
@settings(max_examples=30, deadline=None)
def test_step_of_tokens_is_within_a_text_of_them(store: Store, tokens: int, step: int) -> None:
    batches = make_batches(store, tokens=tokens)
    held = int(store.lengths("train")[batches.examples(step)[0]].sum())
    assert abs(held - tokens) < 24


def test_step_depends_on_its_number_and_the_seed_alone(store: Store) -> None:
    fresh = [examples_of(make_batches(store, 24).step(i, 0, 1, 4)) for i in range(6)]
    used = make_batches(store, 24)
    for i in (5, 0, 3, 3, 1, 4, 2):
        assert examples_of(used.step(i, 0, 1, 4)) == fresh[i]
    other = make_batches(store, 24, seed=57)
    assert examples_of(other.step(0, 0, 1, 4)) != fresh[0]
    assert len({str(step) for step in fresh}) == 6


def test_step_holds_the_examples_that_it_names(store: Store) -> None:
    batches, texts = make_batches(store, 24), rows(store.train)
    for step in range(4):
        made = [row for batch in batches.step(step, 0, 1, 4) for row in unmasked(batch)]
        assert sorted(made) == sorted(texts[i] for i in batches.examples(step)[0])


@given(SIZES, st.integers(1, 5), st.integers(1, 9), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
@example({"sequences": 32}, 1, 8, 1)
@example({"sequences": 5}, 4, 1, 0)  # fewer than its two turns of four ranks
def test_split_of_a_step_changes_no_example(
    store: Store, batch: dict[str, int], ranks: int, micro: int, step: int
) -> None:
    """Every example once, masked as in any other split; to each rank as many micro-batches, of
    sizes that differ by at most one; and counts that are those of what is then made."""
    batches = make_batches(store, **batch)
    n = len(batches.examples(step)[0])
    assume(n >= ranks)
    shares = [batches.step(step, rank, ranks, micro) for rank in range(ranks)]
    dealt = [list(share) for share in shares]
    assert {len(mine) for mine in dealt} == {len(share) for share in shares}
    assert len(dealt[0]) == -(-n // (micro * ranks))
    sizes = {len(b.input_ids) if len(b.tokens) else 0 for mine in dealt for b in mine}
    made = [b for mine in dealt for b in mine if len(b.tokens)]
    assert max(sizes) <= micro
    assert max(sizes) - min(sizes) <= 1
    assert examples_of(made) == examples_of(list(batches.step(step, 0, 1, n)))
    for share, mine in zip(shares, dealt, strict=True):
        counts = sum(len(b.tokens) for b in mine), sum(len(b.labelled) for b in mine)
        assert share.count() == counts


def test_step_that_spans_epochs_is_masked_by_each(store: Store) -> None:
    batches, border = make_batches(store, 32), len(store.train) // 32
    assert len(batches.examples(border)[1].unique()) == 2
    wanted = examples_of(list(batches.step(border, 0, 1, 32)))
    assert examples_of([b for r in range(3) for b in batches.step(border, r, 3, 4)]) == wanted


def test_counts_do_not_depend_on_the_pieces_counted(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    share = make_batches(store, 100).step(3, 0, 1, 8)
    found = set()
    for tokens in (1, 100, 10**6):
        monkeypatch.setattr("distilfast.data.batches.COUNTED", tokens)
        found.add(share.count())
    assert len(found) == 1


def test_spare_batch_counts_nothing(store: Store) -> None:
    """Five examples of four ranks, one at a time: two turns, of which three ranks sit out one."""
    dealt = [list(make_batches(store, 5).step(0, rank, 4, 1)) for rank in range(4)]
    last = [mine[1] for mine in dealt]
    assert [len(b.tokens) > 0 for b in last] == [True, False, False, False]
    for batch in last[1:]:
        assert batch.input_ids.shape[0] == 1
        assert len(batch.labelled) == 0
        assert (batch.labels == IGNORE_INDEX).all()


def test_neighbours_in_length_share_a_batch_and_ranks_take_turns(store: Store) -> None:
    """Little padding, and no rank has much more to do than another."""
    batches = make_batches(store, 32)
    dealt = [batches.step(0, rank, 4, 2) for rank in range(4)]
    lengths = sorted(sorted(real(b).sum(1).tolist()) for mine in dealt for b in mine)
    assert list(chain(*lengths)) == sorted(chain(*lengths))
    work = [sum(b.input_ids.numel() for b in mine) for mine in dealt]
    assert max(work) - min(work) <= max(b.input_ids.numel() for mine in dealt for b in mine)


def test_prefetch_keeps_order_and_is_no_further_ahead_than_asked() -> None:
    made: list[int] = []

    def source() -> Iterator[int]:
        for i in range(20):
            made.append(i)
            yield i

    taken = []
    for item in data.prefetch(source(), ahead=2):
        taken.append(item)
        assert len(made) <= len(taken) + 2
    assert taken == list(range(20))
    assert list(data.prefetch([])) == []


def test_error_in_making_a_batch_is_raised_in_its_place() -> None:
    def source() -> Iterator[int]:
        yield 0
        yield 1
        raise RuntimeError("disk gone")

    items = data.prefetch(source())
    assert [next(items), next(items)] == [0, 1]
    with pytest.raises(RuntimeError, match="disk gone"):
        next(items)
    assert not prefetching()


def test_abandoned_prefetch_ends_its_thread() -> None:
    items = data.prefetch(range(10**9))
    assert next(items) == 0
    assert prefetching()
    items.close()
    assert not prefetching()


def prefetching() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_size_of_a_step_costs_no_memory(tokenizer: Any, tmp_path: Path) -> None:
    """8,192 texts of 128 tokens: 50 MiB, were they held all at once."""
    lines = [spell([(i * j) % N_WORDS for j in range(126)]) for i in range(300)]
    write_txt(tmp_path / "text.txt", lines)
    made = data.prepare(config(tmp_path / "text.txt", max_length=128), tokenizer, tmp_path / "t")
    held = []
    for sequences in (256, 8192):
        share = make_batches(made, sequences).step(0, 0, 1, 32)
        share.count()
        for number, _ in enumerate(data.prefetch(share)):
            if number == len(share) - 2:
                held.append(held_bytes())
    assert held[1] - held[0] < 8 * 2**20


def held_bytes() -> int:
    """Of all tensors that are alive."""
    tensors = (x for x in gc.get_objects() if type(x) is Tensor and x.device.type == "cpu")
    return sum(x.untyped_storage().nbytes() for x in tensors)


def check_fields(batch: MicroBatch) -> None:
    n_rows, width = batch.input_ids.shape
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    kept = real(batch)
    assert kept.shape == (n_rows, width)
    assert (batch.attention_mask is None) == bool(kept.all())
    assert batch.labels.shape == (n_rows * width,)
    lengths = kept.sum(1)
    assert width % 8 == 0
    assert width - int(lengths.max()) < 8
    if batch.attention_mask is not None:
        assert torch.equal(batch.attention_mask, (torch.arange(width) < lengths[:, None]).long())
    assert (batch.input_ids[~kept] == PAD).all()
    assert (batch.input_ids[kept] != PAD).all()
    assert (batch.input_ids[:, 0] == CLS).all()
    assert (batch.input_ids[torch.arange(n_rows), lengths - 1] == SEP).all()
    flat = kept.flatten()
    assert batch.tokens.tolist() == [i for i in range(n_rows * width) if flat[i]]
    labelled = [i for i in range(n_rows * width) if batch.labels[i] != IGNORE_INDEX]
    assert batch.labelled.tolist() == labelled
    assert set(labelled) <= set(batch.tokens.tolist())
    assert (batch.labels[batch.labelled] >= 5).all()


def test_fields_of_a_batch_agree(store: Store) -> None:
    batches = make_batches(store, 32)
    made = [*batches.step(0, 0, 1, 8), *batches.step(1, 1, 2, 4), *batches.heldout(0, 1, 5, None)]
    assert len(made) > 8
    for batch in made:
        check_fields(batch)
    assert len({batch.input_ids.shape[1] for batch in made}) > 1
    assert sum(len(batch.labelled) for batch in made) > 100


def test_batch_moves_whole(store: Store) -> None:
    for batch in make_batches(store, 32).step(0, 0, 1, 1):
        assert batch.to(torch.device("cpu")) is batch
        moved = batch.to(torch.device("meta"))
        for name, value in vars(batch).items():
            there = getattr(moved, name)
            assert (there is None) == (value is None)
            if isinstance(value, Tensor):
                assert there.device.type == "meta"
                assert (there.shape, there.dtype) == (value.shape, value.dtype)


def test_tensors_are_copied_in_one_piece_to_the_same_bits() -> None:
    tensors = [torch.arange(6).view(2, 3), torch.arange(0), torch.tensor(7), -torch.arange(5)[::2]]
    copies = data.copy_to(torch.device("cpu"), tensors)
    for copied, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copied, tensor)
        assert copied.dtype == tensor.dtype
    assert len({copied.untyped_storage().data_ptr() for copied in copies}) == 1
    assert copies[0].untyped_storage().data_ptr() != tensors[0].untyped_storage().data_ptr()


@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_memory_is_pinned_for_a_gpu_alone(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And on the stream of the caller, though another thread makes the copies."""
    asked, streams, empty = [], [], torch.empty

    def fake_empty(*shape: Any, pin_memory: bool, **keywords: Any) -> Tensor:
        asked.append(pin_memory)
        return empty(*shape, **keywords)

    @contextlib.contextmanager
    def on(stream: Any) -> Iterator[None]:
        streams.append(stream)
        yield
        streams.append(None)

    monkeypatch.setattr(torch, "empty", fake_empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: threading.current_thread())
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(
        Tensor, "to", lambda x, *_, non_blocking: x.clone() if non_blocking else None
    )
    labels = torch.tensor([4, 5])
    batch = MicroBatch(torch.tensor([[1, 2]]), None, torch.tensor([0, 1]), labels[:0], labels)
    (moved,) = data.prefetch(data.on_device([batch], torch.device(device)))
    assert [x.tolist() if isinstance(x, Tensor) else x for x in vars(moved).values()] == [
        [[1, 2]],
        None,
        [0, 1],
        [],
        [4, 5],
        None,
        False,
    ]
    assert asked == {"cuda": [True], "cpu": [], "meta": [False]}[device]
    assert streams == ([threading.current_thread(), None] if device == "cuda" else [])


def test_masks_change_from_epoch_to_epoch(store: Store) -> None:
    """The same texts in whole epochs, masked anew."""
    batches = make_batches(store, len(store.train))
    epochs = [batches.step(i, 0, 1, len(store.train)) for i in range(3)]
    texts = [sorted(row for b in step for row in unmasked(b)) for step in epochs]
    assert texts[0] == texts[1] == texts[2] == sorted(rows(store.train))
    assert len({str(examples_of(step)) for step in epochs}) == 3


def test_masked_share_of_the_training_text_is_the_one_asked_for(store: Store) -> None:
    batches = make_batches(store, len(store.train), probability=0.2)
    made = [b for step in range(60) for b in batches.step(step, 0, 1, len(store.train))]
    masked, total = sum(len(b.labelled) for b in made), sum(len(b.tokens) for b in made)
    assert total > 50_000
    assert abs(masked / total - 0.2) < 5 * (0.2 * 0.8 / total) ** 0.5


@pytest.mark.parametrize("ranks", [1, 2, 4, 20])
@pytest.mark.parametrize("micro", [1, 3, 100])
def test_heldout_batches_hold_every_text_once(ranks: int, micro: int, store: Store) -> None:
    """Whatever the step before, the ranks and the micro-batches. The ranks have as many batches; of
    some there is nothing to guess."""
    batches = make_batches(store, 32)
    wanted = examples_of(list(batches.heldout(0, 1, 1, None)))
    assert len(wanted) == len(store.heldout)
    batches.step(5, 0, 1, 8)
    dealt, spare = deal(batches, ranks, micro, None)
    assert len(spare) < ranks
    assert all(len(b.labelled) == 0 and (b.labels == -100).all() for b in spare)
    assert examples_of(dealt) == wanted
    texts = sorted(row for b in dealt for row in unmasked(b))
    assert texts == sorted(rows(store.heldout))


@pytest.mark.parametrize("limit", [1, 5, 10_000])
def test_heldout_batches_keep_to_the_limit(limit: int, store: Store) -> None:
    batches = make_batches(store, 32)
    dealt, _ = deal(batches, 2, 3, limit)
    assert len(examples_of(dealt)) == min(limit, len(store.heldout))
    assert set(examples_of(dealt)) <= set(examples_of(list(batches.heldout(0, 1, 4, None))))


def test_longest_text_fits_the_teachers_positions(
    corpus_file: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A max_length of all the positions there are is either refused before training or runs."""
    import transformers

    from distilfast import models
    from distilfast.config import TeacherSpec

    folder = make_teacher(tmp_path / "bert", n_layers=1)
    loaded = transformers.BertConfig.from_pretrained(folder)
    loaded.max_position_embeddings = 20
    loaded.vocab_size = len(tokenizer)
    transformers.BertForMaskedLM(loaded).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    teachers, loaded_tokenizer = models.load_teachers([TeacherSpec(str(folder))])
    settings = config(corpus_file, max_length=20)
    try:
        checks.check_teachers(settings, teachers)
    except ConfigError:
        return
    made = data.prepare(settings, loaded_tokenizer, tmp_path / "tokens")
    assert int(made.lengths("train").max()) == 20
    for batch in make_batches(made, len(made.train)).step(0, 0, 1, len(made.train)):
        logits: Tensor = teachers[0].model(batch.input_ids, batch.attention_mask).logits
        assert torch.isfinite(logits.flatten(0, 1)[batch.tokens]).all()
