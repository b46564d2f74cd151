"""Packing: several examples in one sequence of a batch, to save padding.

Best fit decreasing (Johnson 1973, "Near-optimal bin packing algorithms"): from the longest example
to the shortest, each goes into the fullest sequence that has room for it.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Divide examples over sequences. A pure function of the arguments.

    Args:
        lengths: of the examples, in tokens; none is above ``capacity``.
        capacity: most tokens in a sequence.

    Returns:
        The sequences, from the shortest to the longest; in each the indices of its examples, from
        the longest to the shortest.
    """
    sequences: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens that a sequence has room for, its index), sorted
    for example in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[example]
        place = bisect.bisect_left(rooms, (length, 0))
        if place == len(rooms):
            sequences.append([example])
            room, index = capacity - length, len(sequences) - 1
        else:
            room, index = rooms.pop(place)
            sequences[index].append(example)
            room -= length
        if room:
            bisect.insort(rooms, (room, index))
    return sorted(sequences, key=lambda sequence: sum(lengths[i] for i in sequence))
