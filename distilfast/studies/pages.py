"""`distilfast report`: make a page from the files that runs have left.

    distilfast report RUN [NAME=RUN ...] [--output FILE]

RUN is the output folder of any command. Several runs become one page: one table of their models,
one plot of their curves, and one table of the keys in which their configurations differ. Tables
and charts of the same title are merged.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from distilfast.errors import ConfigError, expect, writable
from distilfast.report import Report, read_report, write_report
from distilfast.report.merging import merge
from distilfast.report.training_run import read_training
from distilfast.studies.flags import Parser

COMMAND = "distilfast report"


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status.

    Raises:
        ConfigError: something was wrong; the error says what, in one line.
    """
    parser = Parser(prog=COMMAND, description="One page that compares runs.")
    parser.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run's folder, or NAME=FOLDER to name the run"
    )
    parser.add_argument(
        "--output",
        default="runs-report.html",
        metavar="FILE",
        help="the page; its JSON is written beside it (default: %(default)s)",
    )
    given = parser.parse_args(list(arguments))
    folders = [_named(run) for run in given.runs]
    for name, count in Counter(name for name, _ in folders).items():
        if count > 1:
            raise ConfigError(f"RUN: expected names that differ, got {name!r} twice; try NAME=RUN")
    output = Path(given.output)
    _check_output(output)
    report = merge({name: read_run(folder, name) for name, folder in folders})
    again = shlex.join([*COMMAND.split(), *arguments])
    try:
        write_report(replace(report, commands=[*report.commands, again]), output)
    except OSError as error:
        raise ConfigError(f"--output: expected a file that can be written, got {error}") from error
    print(output)
    return 0


def _named(run: str) -> tuple[str, Path]:
    name, equals, folder = run.partition("=")
    if not equals or Path(run).is_dir():  # a folder's name may contain "="
        name, folder = Path(run).resolve().name, run
    expect(bool(name), "RUN", "a name before =", run)
    expect(Path(folder).is_dir(), "RUN", "a folder", folder)
    return name, Path(folder)


def _check_output(output: Path) -> None:
    """Check that the page and the JSON to be overwritten are earlier ones of this command."""
    expect(output.suffix == ".html", "--output", "a file named *.html", str(output))
    writable("--output", output.parent)
    data = output.with_suffix(".json")
    if output.exists() or data.exists():
        try:
            ours = read_report(data).commands[-1:]
        except (OSError, ValueError):
            ours = []
        expected = f"a new file, or a page of `{COMMAND}`"
        expect(bool(ours) and ours[0].startswith(COMMAND), "--output", expected, str(output))


def read_run(folder: Path, name: str) -> Report:
    """Return a run's report.

    For a training run it is made from the run's files, finished or not; else it is report.json.

    Raises:
        ConfigError: there is neither, or one of the files is damaged.
    """
    try:
        if (folder / "metrics.jsonl").is_file():
            return read_training(folder, name)
        if (folder / "report.json").is_file():
            return read_report(folder / "report.json")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"RUN: {' '.join(str(error).split())}") from error
    raise ConfigError(
        f"RUN: expected a folder with metrics.jsonl or report.json, got {str(folder)!r}"
    )
