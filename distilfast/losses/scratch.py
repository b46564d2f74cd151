"""Scratch memory on a CPU, kept from call to call.

Fresh memory costs: the system clears it and hands it out page by page, and under a hypervisor that
takes freed memory back it is slower still. On a GPU PyTorch's allocator keeps what was freed, on a
CPU nobody does, and a fused head would spend up to a quarter of its time on it: docs/kernels.md.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

LARGE_BYTES = 16 << 20  # from here on it shows
KEPT_BYTES = 4 << 30  # at most, whatever a call has used
PAGE_BYTES = 2 << 20


def _block(n_bytes: int) -> Tensor:
    """Whole pages, as bytes."""
    n_bytes = -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_bytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes of scratch memory") from error
    with contextlib.suppress(OSError):  # a system that has no larger ones
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Scratch:
    """Memory for the length of a call, from Scratch() to keep(), that the next call may have.

    What a call used stays with the process, up to KEPT_BYTES, until one that uses other sizes or
    `release`. Two calls at a time, in two threads, have each their own.
    """

    _kept: ClassVar[list[Tensor]] = []
    _lock = threading.Lock()

    def __init__(self) -> None:
        with Scratch._lock:
            self.free, Scratch._kept = Scratch._kept, []
        self.used: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """torch.empty, not to be touched after `keep`."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or n_bytes < LARGE_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        fitting = [i for i, b in enumerate(self.free) if n_bytes <= len(b) <= 2 * n_bytes]
        best = min(fitting, key=lambda i: len(self.free[i]), default=None)
        self.used.append(_block(n_bytes) if best is None else self.free.pop(best))
        return self.used[-1][:n_bytes].view(dtype).view(*shape)

    def keep(self) -> None:
        """The call is over."""
        kept, room = [], KEPT_BYTES
        for block in sorted(self.used, key=len):
            room -= len(block)
            if room >= 0:
                kept.append(block)
        with Scratch._lock:
            Scratch._kept = kept

    @staticmethod
    def release() -> None:
        """Give back to the system what is kept."""
        with Scratch._lock:
            Scratch._kept = []


def _after_fork() -> None:
    Scratch._lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
