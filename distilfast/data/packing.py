"""Packing: several documents in one row of a batch, to save padding.

Best fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"): from the longest document
to the shortest, each goes into the fullest row that has room for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide documents over rows. A pure function of the arguments.

    Args:
        lengths: of the documents, in tokens; none is above ``capacity``.
        capacity: most tokens in a row.

    Returns:
        The rows, from the longest to the shortest in all; in each the indices of its documents,
        from the longest to the shortest.
    """
    rows: list[list[int]] = []
    open_rows: list[tuple[int, int]] = []  # (room, row), sorted
    for document in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[document]
        place = bisect.bisect_left(open_rows, (length, 0))
        if place == len(open_rows):
            rows.append([document])
            room, row = capacity - length, len(rows) - 1
        else:
            room, row = open_rows.pop(place)
            rows[row].append(document)
            room -= length
        if room:
            bisect.insort(open_rows, (room, row))
    return sorted(rows, key=lambda row: -sum(lengths[i] for i in row))
