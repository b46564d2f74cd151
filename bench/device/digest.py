"""Some columns of a bench's CSV as a narrow table: what fits into a short reply.

    python bench/device/digest.py results/losses.csv loss columns contestant time_ms agreement

Rows without a time are left out if they were skipped; those that failed show why. Imports nothing
but the standard library: importing torch would take seconds of the device's time.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path

LONGEST = 40  # characters of a cell


def short(text: str) -> str:
    """A number to three digits, anything else cut to LONGEST."""
    try:
        number = float(text)
    except ValueError:
        return text[:LONGEST]
    return text if number.is_integer() and "." not in text else f"{number:.3g}"


def digest(path: Path, columns: Sequence[str]) -> list[str]:
    """The lines of the table."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    lines = [" | ".join(columns)]
    for row in rows:
        status = row.get("status") or "ok"
        if status.startswith("skipped"):
            continue
        cells = [short(row[column]) for column in columns]
        lines.append(" | ".join(cells if status == "ok" else [*cells, status[:LONGEST]]))
    return lines


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] in ("-h", "--help"):
        sys.exit(__doc__)
    path, *columns = sys.argv[1:]
    if not Path(path).exists():
        sys.exit(f"{path}: not written")
    print("\n".join(digest(Path(path), columns)))


if __name__ == "__main__":
    main()
