"""The yardstick of the fused head: the matrix products that a loss needs, and nothing else.

They are the student's logits, the teacher's if there is one, and the gradients of hidden states and
weight, in chunks of rows, into existing memory. Nothing is added up. linear.py and chunks.py divide
by their time.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kit import measure

# A GPU's products are fastest where the vocabulary is a multiple of 64, and the fused head pads its
# weights to one. A yardstick without the padding would be slower than what it measures.
MULTIPLES = {"cuda": 64}
FEWEST_ROUNDS = 3  # for the choice of the chunk


class BareProducts:
    """The products in chunks of at most ``sizes[-1]`` rows.

    Args:
        student: hidden states (N, D) and weight (V, D).
        teacher: the same of a teacher, or None.
        sizes: numbers of rows a chunk. Those whose logits take more than a quarter of the free
            memory are left out.
        multiple: the vocabulary is padded with zeros to a multiple of this. None: as on the device.
    """

    def __init__(
        self,
        student: tuple[Tensor, Tensor],
        teacher: tuple[Tensor, Tensor] | None,
        sizes: list[int],
        multiple: int | None = None,
    ):
        self.hidden, weight = (x.detach() for x in student)
        device = self.hidden.device
        multiple = multiple or MULTIPLES.get(device.type, 1)
        self.weight = padded(weight, multiple)
        self.teacher = None if teacher is None else (teacher[0], padded(teacher[1], multiple))
        self.rows, columns = len(self.hidden), len(self.weight)
        sides = 1 if teacher is None else 2
        a_row = sides * columns * self.hidden.element_size()
        room = measure.free_bytes(device) // 4
        self.sizes = [n for n in sorted(sizes) if n == min(sizes) or n * a_row <= room]
        # Zeros: a gradient of whatever was in memory may be full of NaN or slow subnormals.
        self.logits = [self.hidden.new_zeros(self.sizes[-1], columns) for _ in range(sides)]
        self.d_hidden, self.d_weight = torch.empty_like(self.hidden), torch.empty_like(self.weight)

    def run(self, chunk: int, gradients: bool = True) -> None:
        for start in range(0, self.rows, chunk):
            hidden = self.hidden[start : start + chunk]
            gradient = self.logits[0][: len(hidden)]
            torch.mm(hidden, self.weight.T, out=gradient)
            if self.teacher is not None:
                teacher_hidden, teacher_weight = self.teacher
                logits = self.logits[1][: len(hidden)]
                torch.mm(teacher_hidden[start : start + chunk], teacher_weight.T, out=logits)
            if gradients:
                torch.mm(gradient, self.weight, out=self.d_hidden[start : start + chunk])
                torch.mm(gradient.T, hidden, out=self.d_weight)

    def fastest_chunk(self, stopwatch: measure.Stopwatch) -> dict[int, float]:
        """Milliseconds by chunk size, the fastest first."""
        calls = {str(n): lambda turn, n=n: self.run(n) for n in self.sizes}
        self.run(self.sizes[0])
        samples, failures = measure.interleave(calls, stopwatch, 0, fewest=FEWEST_ROUNDS)
        if not any(name not in failures for name in samples):
            raise RuntimeError(next(iter(failures.values())))
        found = {
            int(n): measure.Spread.of(x).median for n, x in samples.items() if n not in failures
        }
        return dict(sorted(found.items(), key=lambda item: item[1]))


def padded(weight: Tensor, multiple: int) -> Tensor:
    """(V, D) with rows of zeros up to a multiple."""
    missing = -len(weight) % multiple
    return F.pad(weight, (0, 0, 0, missing)) if missing else weight
