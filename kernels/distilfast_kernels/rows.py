"""What the kernels along a vocabulary share: where a row's elements are, and sums in bits.

A program owns a row. A tile of it is (TILES, THREADS, VECTOR): VECTOR neighbours fill 16 bytes,
and a thread holds (TILES, 1, VECTOR).
"""

from __future__ import annotations

from collections.abc import Iterable

import triton
import triton.language as tl
from torch import Tensor

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
INF = tl.constexpr(float("inf"))
# The m of a thread that has seen nothing: finite, so that differences of it are too. A row whose
# every logit is lower comes out as NaN.
FLOOR = tl.constexpr(-1.0e30)
# About the smallest number that the hardware does not flush to 0.
TINY = tl.constexpr(1.2e-38)
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# --- Where the elements are -----------------------------------------------------------------------


@triton.jit
def split(offset, n_cols, VECTOR: tl.constexpr):
    """The number of elements before the row's first 16-byte boundary, and of those in its body."""
    head = tl.minimum((VECTOR - offset % VECTOR) % VECTOR, n_cols).to(tl.int32)
    return head, (n_cols - head) // VECTOR * VECTOR


@triton.jit
def aligned(offset, head, VECTOR: tl.constexpr):
    """offset + head, written so that the compiler sees a multiple of VECTOR."""
    return (offset + head) // VECTOR * VECTOR


@triton.jit
def tile(TILES: tl.constexpr, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """Offsets of a tile, (TILES, THREADS, VECTOR): a thread holds (TILES, 1, VECTOR) of them."""
    i = tl.arange(0, TILES)[:, None, None] * (THREADS * VECTOR)
    j = tl.arange(0, THREADS)[None, :, None] * VECTOR
    return i + j + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def edges(head, body, n_cols, THREADS: tl.constexpr, VECTOR: tl.constexpr):
    """The columns outside the body, one a thread, (1, THREADS, 1), and which of them exist."""
    i = tl.arange(0, THREADS)[None, :, None]
    cols = tl.where(i < VECTOR, i, head + body + i - VECTOR)
    return cols, tl.where(i < VECTOR, i < head, cols < n_cols)


# --- Sums -----------------------------------------------------------------------------------------


@triton.jit
def thread_sum(tile):
    """(TILES, THREADS, VECTOR) -> (THREADS,): what a thread holds, without a word to the others."""
    return tl.sum(tl.sum(tile, axis=2), axis=0)


@triton.jit
def exponents(x, scale, m):
    """The new m, how far the old one lies below it (<= 0), and the exponents against the new."""
    highest = tl.max(tl.max(x, axis=2), axis=0)
    m_new = tl.maximum(m, tl.ceil(highest * scale))
    return m_new, m - m_new, x * scale - m_new[None, :, None]


@triton.jit
def exp2_whole(x):
    """2^x for whole x <= 0, exactly; 0 below -126."""
    return ((tl.maximum(x, -127.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _max_of_two(a, b, c, d):
    return tl.maximum(a, c), tl.maximum(b, d)


@triton.jit
def _sum_of_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def max_two(a, b):
    """The maxima of two (THREADS,), with the barriers of one. The interpreter takes them singly: of
    several it goes from element to element, which is slow, and rounds more than a tree would."""
    if INTERPRETED:
        result = tl.max(a, 0), tl.max(b, 0)
    else:
        result = tl.reduce((a, b), 0, _max_of_two)
    return result


@triton.jit
def sum_four(a, b, c, d):
    """The sums of four (THREADS,), likewise."""
    if INTERPRETED:
        result = tl.sum(a, 0), tl.sum(b, 0), tl.sum(c, 0), tl.sum(d, 0)
    else:
        result = tl.reduce((a, b, c, d), 0, _sum_of_four)
    return result


@triton.jit
def first_highest(tile, cols, highest, col):
    """(THREADS,): the largest element that a thread has seen and the first column that has it."""
    here = tl.max(tl.max(tile, axis=2), axis=0)
    at = tl.where(tile == here[None, :, None], cols, 2147483647)
    at = tl.min(tl.min(at, axis=2), axis=0).to(tl.int32)
    col = tl.where(here > highest, at, tl.where(here == highest, tl.minimum(at, col), col))
    return tl.maximum(highest, here), col


@triton.jit
def first_column(highest, col):
    """The first column of the largest element of all threads."""
    return tl.min(tl.where(highest == tl.max(highest, 0), col, 2147483647), 0)


@triton.jit
def reciprocal_root(x):
    """1 / sqrt(x) of subnormal numbers, too: the hardware's own takes them for 0."""
    return tl.div_rn(1.0, tl.sqrt_rn(x))


@triton.jit
def log2(x):
    """Of positive numbers; errs by 2^-22, of 1 near 1 and of its value elsewhere."""
    if INTERPRETED:
        result = tl.log2(x)
    else:  # tl.log2 is some twenty instructions, this is one
        result = tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1
        )
    return result


# --- For the launchers ----------------------------------------------------------------------------

# The next sweep is to find its row in L2. A multiprocessor holds 32 warps of these kernels (at 64
# registers a thread), so with a warp for every 8 KiB that a program reads, the rows in flight on
# the 132 of an H200 take 33 MiB of its 50. docs/kernels.md has the model.
ROW_BYTES_A_WARP = 8192


def warps_for(row_bytes: int, most: int) -> int:
    """The number of warps for a program whose rows, all it reads, take this many bytes."""
    warps = 1
    while warps < most and warps * ROW_BYTES_A_WARP < row_bytes:
        warps *= 2
    return warps


def odd(numbers: Iterable[int]) -> tuple[int, ...]:
    """Each n as 2 n + 1, for a kernel that takes them in a tuple. There triton specialises on 1 and
    on multiples of 16, whatever do_not_specialize says; an odd number above 1 avoids both."""
    return tuple(2 * n + 1 for n in numbers)


def is_aligned(tensors: list[Tensor], vector: int) -> bool:
    """Whether in every row all of them reach a 16-byte boundary at the same column."""
    return len({x.stride(0) % vector for x in tensors}) == 1 and all(
        x.data_ptr() % 16 == 0 for x in tensors
    )
