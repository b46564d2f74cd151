"""The content of a report, in Python and as JSON."""

from __future__ import annotations

import json
import types
from collections.abc import Iterable
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from distilfast.errors import shortened
from distilfast.report.numbers import count, counted, duration, fixed, percent, perplexity


@dataclass(frozen=True)
class ModelRow:
    """A row of the table of models: size, cost and figures on held-out text. None: not defined, or
    not measured."""

    name: str
    parameters: int
    size_mib: float  # size of the weights
    eval_loss: float | None  # cross entropy in nats at the targets: masked tokens, or next ones
    eval_accuracy: float | None  # share of targets that are the first guess, 0 to 1
    eval_agreement: float | None  # share of first guesses that are the teacher's
    train_time_s: float | None
    steps: int | None
    note: str = ""
    teacher: bool | None = None  # None, as in older files: it is one if it has no agreement
    eval_kl: float | None = None  # KL(teacher || model) in nats, of causal LMs alone

    @property
    def perplexity(self) -> str:
        """That of a causal LM, as it is shown; a masked LM has none."""
        return perplexity(None if self.eval_kl is None else self.eval_loss)

    @property
    def is_teacher(self) -> bool:
        return self.eval_agreement is None if self.teacher is None else self.teacher


@dataclass(frozen=True)
class Blocks:
    """A model's losses on blocks of held-out examples, for `paired.paired`."""

    examples: int  # in all blocks
    tokens: list[int]  # of each block, its targets
    losses: list[float]  # of each block, the sum of their losses in nats
    target: str = "masked token"


@dataclass(frozen=True)
class Guess:
    """A token that a model puts in place of [MASK], and its probability (0 to 1)."""

    token: str
    probability: float


@dataclass(frozen=True)
class Sample:
    """A text that contains [MASK], and the guesses of each model."""

    text: str
    guesses: dict[str, list[Guess]]  # model name -> guesses, best first
    answer: str | None = None


@dataclass(frozen=True)
class Table:
    """Rows of text under named columns."""

    title: str
    columns: list[str]  # the first one is the heading of the rows' names
    rows: list[list[str]]  # text as it is shown; "" if nothing was measured
    caption: str = ""
    published: list[int] = field(default_factory=list)  # indices of rows with published figures

    def __post_init__(self) -> None:
        """Raise a ValueError if a row has another width, or a published row does not exist.

        Figures under the wrong heading are worse than none.
        """
        for number, row in enumerate(self.rows, start=1):
            if len(row) != len(self.columns):
                expected = f"expected {counted(len(self.columns), 'cell')}, got {len(row)}"
                raise ValueError(f"table {self.title!r}, row {number}: {expected}")
        if not set(self.published) <= set(range(len(self.rows))):
            expected = f"expected indices below {len(self.rows)}, got {self.published}"
            raise ValueError(f"table {self.title!r}, published: {expected}")


@dataclass(frozen=True)
class Chart:
    """Values of several seeds, one row per name: a dot for each value, a bar at the median."""

    title: str
    unit: str
    # row name -> a value for each seed; None or not finite: only counted
    values: dict[str, list[float | None]]
    zero: bool = False  # the values are differences: show their signs, and a line at 0
    caption: str = ""


@dataclass(frozen=True)
class Report:
    """Everything that the page shows. Every string is text, never HTML."""

    title: str
    lead: str  # one sentence that sums up the figures
    models: list[ModelRow] = field(default_factory=list)
    # run name -> the parsed lines of its metrics.jsonl
    curves: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)  # device, versions, date, commit, ...
    config: str | dict[str, str] = ""  # the run's YAML; for several runs, by name
    tables: list[Table] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)  # commands that reproduce the figures
    blocks: dict[str, Blocks] = field(default_factory=dict)  # by the name of a model's row


def read_report(path: Path) -> Report:
    """Read the JSON that `write_report` left beside a page.

    Raises a ValueError that names the file, the field, what was expected and what was found.
    """
    try:
        report: Report = _typed(Report, json.loads(path.read_bytes()), "report")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return report


def models_table(rows: Iterable[ModelRow], title: str = "") -> Table:
    """Tabulate models as the page does, for a terminal or a model card."""
    rows = list(rows)
    causal = any(row.eval_kl is not None for row in rows)
    kl = "perplexity, KL, " if causal else ""
    columns = (
        f"model, held-out loss, {kl}accuracy, agreement, parameters, MiB, steps, training time"
    )
    cells = [
        [
            *(row.name, fixed(row.eval_loss, 3)),
            *((row.perplexity, fixed(row.eval_kl, 3)) if causal else ()),
            *(percent(row.eval_accuracy), percent(row.eval_agreement), count(row.parameters)),
            *(fixed(row.size_mib, 1), fixed(row.steps, 0), duration(row.train_time_s)),
        ]
        for row in rows
    ]
    return Table(title, columns.split(", "), cells)


def markdown(table: Table) -> str:
    """Format a table for a terminal or a README."""
    rows = [
        [row[0] + " (published)" * (i in table.published), *row[1:]]
        for i, row in enumerate(table.rows)
    ]
    lines = [
        f"| {' | '.join(cell.replace('|', '/') for cell in row)} |"
        for row in (table.columns, ["---"] * len(table.columns), *rows)
    ]
    heading = [f"**{table.title}.** {table.caption}", ""] if table.title else []
    return "\n".join([*heading, *lines])


def _typed(hint: Any, value: Any, where: str) -> Any:
    """Convert a JSON value to the type of a field's annotation."""
    kind, arguments = get_origin(hint), get_args(hint)
    if hint is Any or (kind is None and _fits(hint, value)):
        return value
    if is_dataclass(hint) and isinstance(value, dict):
        make: Any = hint
        hints, known = get_type_hints(hint), fields(hint)
        required = {f.name for f in known if (f.default, f.default_factory) == (MISSING, MISSING)}
        for key in required - value.keys():
            raise ValueError(f"{where}: expected {key}, which is missing")
        for key in value.keys() - hints.keys():
            raise ValueError(f"{where}: expected {', '.join(hints)}, got {shortened(key)}")
        return make(**{k: _typed(hints[k], v, f"{where}.{k}") for k, v in value.items()})
    if kind is list and isinstance(value, list):
        return [_typed(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(value)]
    if kind is dict and isinstance(value, dict):
        return {k: _typed(arguments[1], v, f"{where}[{k!r}]") for k, v in value.items()}
    if kind is types.UnionType:
        for option in arguments:
            if _fits(get_origin(option) or option, value):
                return _typed(option, value, where)
    name = str(hint) if kind is types.UnionType else (kind or hint).__name__
    expected = "an object" if is_dataclass(hint) else name
    raise ValueError(f"{where}: expected {expected}, got {shortened(repr(value))}")


def _fits(kind: type, value: Any) -> bool:
    return type(value) is kind or (kind is float and type(value) is int)
