"""The texts of a source, in order and some at a time.

A file is opened by its name and read from beginning to end; nothing is kept of it on the way.
"""

from __future__ import annotations

import csv
import functools
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distilfast.config import ConfigError, SourceSpec
from distilfast.data.files import Files, kind
from distilfast.errors import shortened, writable

MOST_TEXTS, MOST_CHARACTERS = 1000, 2**23  # read at a time, but for a single text that is longer

Texts = list[str | None]


@dataclass(frozen=True)
class Source:
    """A source, found: local files, or a data set of the hub where ``files`` is None."""

    spec: SourceSpec
    files: Files | None

    def texts(self, txt_rows: str) -> Iterator[Texts]:
        """All texts; None where a row has none.

        Raises:
            ConfigError: a file is damaged or not UTF-8, or its column is missing or is no text.
        """
        if self.files is None:
            yield from self._texts_of_hub()
        else:
            for file in self.files.taken:
                yield from read(file, self.spec.column, txt_rows)

    def check(self, txt_rows: str) -> bool:
        """Read each local file up to its first text, and tell whether there is any.

        Raises:
            ConfigError: as for `texts`, or a data set of the hub has no cache to be kept in.
        """
        if self.files is None:
            import datasets

            writable("HF_DATASETS_CACHE", Path(datasets.config.HF_DATASETS_CACHE))
            return True
        found = False
        for file in self.files.taken:
            batches = read(file, self.spec.column, txt_rows)
            found |= any(any(text and text.strip() for text in batch) for batch in batches)
        return found

    @functools.cached_property
    def _loaded(self) -> Any:
        import datasets
        import huggingface_hub

        # `lookup` may have switched to offline mode; `datasets` has its own copy of that setting.
        datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE
        spec = self.spec
        try:
            return datasets.load_dataset(
                spec.name, spec.config, split=spec.split, revision=spec.revision
            )
        except (
            datasets.exceptions.DatasetNotFoundError,
            OSError,
            ValueError,
            RuntimeError,
        ) as error:
            message = " ".join(str(error).split())
            raise ConfigError(f"data.source: {spec.name!r} cannot be loaded: {message}") from error

    def _texts_of_hub(self) -> Iterator[Texts]:
        name, column = self.spec.name, self.spec.column
        if column not in self._loaded.column_names:
            raise _missing(column, name, self._loaded.column_names)
        rows = self._loaded.select_columns(column).with_format("arrow")
        for table in rows.iter(MOST_TEXTS):
            yield _strings(table.column(0), column, name)


def read(file: Path, column: str, txt_rows: str) -> Iterator[Texts]:
    """The texts of a file. An empty file has none.

    Args:
        file: of a type that `files.kind` knows.
        column: the column with the text; of no account in a .txt file.
        txt_rows: what is a text in a .txt file: line, paragraph or document.

    Raises:
        ConfigError: as for `Source.texts`.
    """
    reader = kind(file)
    try:
        if file.stat().st_size == 0:
            return
        if reader == "parquet":
            yield from _read_parquet(file, column)
            return
        # utf-8-sig: without the mark that some programs put at the start of a file
        with file.open(encoding="utf-8-sig", newline="" if reader == "csv" else None) as opened:
            if reader == "text":
                yield from _batches(_read_txt(opened, txt_rows))
            elif reader == "csv":
                yield from _batches(_read_csv(opened, column, str(file)))
            else:
                yield from _batches(_read_json(opened, column, str(file)))
    except ConfigError:
        raise
    except UnicodeDecodeError as error:
        got = error if reader == "parquet" else _undecodable(file)
        raise ConfigError(
            f"data.source: expected UTF-8 text in {str(file)!r}, got {got}"
        ) from error
    except (ValueError, OSError, RecursionError, csv.Error) as error:  # pyarrow's are among them
        cause = " ".join(str(error).split())
        message = f"data.source: {str(file)!r} cannot be read as {reader}: {cause}"
        raise ConfigError(message) from error


def _batches(texts: Iterable[str | None]) -> Iterator[Texts]:
    batch: Texts = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text or "")
        if len(batch) == MOST_TEXTS or characters >= MOST_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _undecodable(file: Path) -> str:
    """What is not UTF-8. The reader's error knows its place only within a piece of the file."""
    with file.open("rb") as opened:
        for number, line in enumerate(opened, 1):
            try:
                line.decode()
            except UnicodeDecodeError as error:
                return f"byte 0x{line[error.start]:02x} in line {number}"
    return "a file that changes"


def _read_txt(opened: Any, txt_rows: str) -> Iterator[str]:
    lines = _without_nul(opened)
    if txt_rows == "document":
        yield "".join(lines)
    elif txt_rows == "line":
        yield from (line.rstrip("\n") for line in lines)
    else:
        for blank, paragraph in itertools.groupby(lines, str.isspace):
            if not blank:
                yield "".join(paragraph)


def _without_nul(lines: Iterable[str]) -> Iterator[str]:
    """Most texts in UTF-16 or UTF-32 are UTF-8, too, of other letters: their NUL bytes tell."""
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise ValueError(f"expected UTF-8 without NUL bytes, got one in line {number}")
        yield line


def _read_csv(opened: Any, column: str, name: str) -> Iterator[str]:
    csv.field_size_limit(sys.maxsize)  # a text may be long
    rows = csv.reader(opened, strict=True)
    try:
        header = next((row for row in rows if row), None)
        if header is None:
            return
        if header.count(column) != 1:
            raise _missing(column, name, header)
        place = header.index(column)
        for row in rows:
            if row and len(row) != len(header):
                raise csv.Error(f"expected {len(header)} fields as in the header, got {len(row)}")
            if row:
                yield row[place]
    except csv.Error as error:
        raise csv.Error(f"line {rows.line_num}: {error}") from error


def _read_json(opened: Any, column: str, name: str) -> Iterator[str | None]:
    first, found = None, False
    for number, (place, record) in enumerate(_records(opened)):
        if not isinstance(record, dict):
            raise ValueError(f"{place}: expected an object, got {type(record).__name__}")
        first, found = first or record, found or column in record
        if not found and number == MOST_TEXTS:
            break
        text = record.get(column)
        if not isinstance(text, str | None):
            raise _no_text(column, name, f"{type(text).__name__} in {place}")
        if text and not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # an escape such as \\ud800 is half a character
                raise ValueError(f"{place}: {error}") from error
        yield text
    if first is not None and not found:
        raise _missing(column, name, list(first))


def _records(opened: Any) -> Iterator[tuple[str, Any]]:
    """The values of a JSON file and where they stand: a value a line, or all in one list."""
    alone = True
    for number, line in enumerate(opened, 1):
        start = line.strip()
        if not start:
            continue
        whole = alone and (start.startswith("[") or start == "{")
        try:
            value = json.loads(line + opened.read() if whole else line, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            place = f"line {number + error.lineno - 1}, column {error.colno}"
            raise ValueError(f"{place}: {error.msg}") from error
        except ValueError as error:
            raise ValueError(f"{'from ' * whole}line {number}: {error}") from error
        if whole and isinstance(value, list):
            yield from ((f"entry {i}", entry) for i, entry in enumerate(value, 1))
        else:
            yield f"line {number}", value
        alone = False


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"expected an object with each key once, got {twice!r} twice")
    return made


def _read_parquet(file: Path, column: str) -> Iterator[Texts]:
    from pyarrow import parquet

    with file.open("rb") as opened, parquet.ParquetFile(opened) as table:
        if table.schema_arrow.names.count(column) != 1:
            raise _missing(column, str(file), table.schema_arrow.names)
        for batch in table.iter_batches(MOST_TEXTS, columns=[column]):
            yield _strings(batch.column(0), column, str(file))


def _strings(values: Any, column: str, name: str) -> Texts:
    """The strings in a column of Arrow's."""
    import pyarrow

    kind = values.type.value_type if pyarrow.types.is_dictionary(values.type) else values.type
    tests = (pyarrow.types.is_string, pyarrow.types.is_large_string, pyarrow.types.is_null)
    if not any(test(kind) for test in (*tests, pyarrow.types.is_string_view)):
        raise _no_text(column, name, str(values.type))
    return values.to_pylist()


def _missing(column: str, name: str, got: list[str]) -> ConfigError:
    columns = ", ".join(map(shortened, got[:20])) + ", ..." * (len(got) > 20)
    return ConfigError(
        f"data.source: expected one column {column!r} in {name!r}, got {columns or 'no columns'}; "
        "name it with data.column"
    )


def _no_text(column: str, name: str, got: str) -> ConfigError:
    return ConfigError(f"data.source: expected text in column {column!r} of {name!r}, got {got}")
