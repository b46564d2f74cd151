"""The HTML report of a run: one self-contained page of tables, plots, samples and commands.

    from distilfast.report import ModelRow, Report, read_report, write_report
    from distilfast.report.training_run import read_training

The page needs no network, no JavaScript and no second file. Its plots are inlined SVG whose
colours are variables of the page's style sheet, so that they follow its light and dark modes.
Importing this module is cheap: matplotlib and jinja2 are imported when a report is written.
"""

from distilfast.report.content import (
    Blocks,
    Chart,
    Guess,
    ModelRow,
    Report,
    Sample,
    Table,
    markdown,
    models_table,
    read_report,
)
from distilfast.report.page import write_report

__all__ = [
    "Blocks",
    "Chart",
    "Guess",
    "ModelRow",
    "Report",
    "Sample",
    "Table",
    "markdown",
    "models_table",
    "read_report",
    "write_report",
]
