"""Scratch memory on a CPU, kept from call to call.

New memory is slow: the system clears it and hands it out page by page. It is slower still under a
hypervisor that takes freed memory back. On a GPU, PyTorch's allocator keeps freed memory; on a CPU
nothing does. Without this module a fused head would spend up to a quarter of its time on new
memory: docs/kernels.md.
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

LARGE_BYTES = 16 << 20  # smaller tensors are not kept: allocating them takes no noticeable time
KEPT_BYTES = 4 << 30  # the most that is kept, even if a call has used more
PAGE_BYTES = 2 << 20


def _block(n_bytes: int) -> Tensor:
    """Allocate at least ``n_bytes`` in whole pages, as a tensor of bytes."""
    n_bytes = -(-n_bytes // PAGE_BYTES) * PAGE_BYTES
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(n_bytes, dtype=torch.uint8)
    try:
        memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(f"{n_bytes} bytes of scratch memory") from error
    with contextlib.suppress(OSError):  # a system without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


class Scratch:
    """Memory for one call, from Scratch() to keep(), that the next call reuses.

    The process keeps up to KEPT_BYTES of a call's memory until a call uses other sizes, or until
    `release`. Two calls in two threads at the same time each have their own.
    """

    _kept: ClassVar[list[Tensor]] = []
    _lock = threading.Lock()

    def __init__(self) -> None:
        with Scratch._lock:
            self.free, Scratch._kept = Scratch._kept, []
        self.used: list[Tensor] = []

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Like torch.empty. The tensor must not be used after `keep`."""
        n_bytes = math.prod(shape) * dtype.itemsize
        if device.type != "cpu" or n_bytes < LARGE_BYTES:
            return torch.empty(shape, dtype=dtype, device=device)
        fitting = [i for i, b in enumerate(self.free) if n_bytes <= len(b) <= 2 * n_bytes]
        best = min(fitting, key=lambda i: len(self.free[i]), default=None)
        self.used.append(_block(n_bytes) if best is None else self.free.pop(best))
        return self.used[-1][:n_bytes].view(dtype).view(*shape)

    def keep(self) -> None:
        """End the call, and keep its memory for the next one."""
        kept, room = [], KEPT_BYTES
        for block in sorted(self.used, key=len):
            room -= len(block)
            if room >= 0:
                kept.append(block)
        with Scratch._lock:
            Scratch._kept = kept

    @staticmethod
    def release() -> None:
        """Return all kept memory to the system."""
        with Scratch._lock:
            Scratch._kept = []


def _after_fork() -> None:
    Scratch._lock = threading.Lock()  # another thread may have held it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
