"""The C++ kernels broken on purpose, one line at a time, as test_mutations.py breaks Triton's.

A mutated copy of kernels/csrc is compiled, without optimisation, for the one instruction set that
the mutation names, and stands in for the real library while the test runs that has to notice it.
The launcher, cpp.py, is mutated as any Python module.

Left out is what changes no number (prefetch, threads, large pages, streaming as such), what would
crash or write outside the tensors' memory, and what no number can tell: how far from its maximum a
row is taken while its exponentials stay in fp32's range, TINY, which half of a tie between teachers
counts as larger, and rules for a NaN that every way ends in NaN.

The first part are tests of their own, for what no other test looks at so closely. They leave out
bf16's subnormals, of which AVX-512's own conversion makes 0.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import distilfast_kernels
import pytest
import test_combine_teachers as ensembles
import test_heads as heads
import test_hidden_cosine as hidden
import test_losses as values
import test_losses_edges as edges
import test_near as near
import torch
from conftest import ROOT, cpu_levels
from distilfast_kernels import cpp
from oracle import DIVERGENCES, INF, NAN, PARTS, assert_same, assert_within, expect, logits_pair
from test_mutations import Call, call, load
from test_triton import (
    ALL_PARTS,
    assert_nothing_else_was_written,
    hole,
    options,
    placed,
    some_labels,
)
from torch import Tensor

from distilfast.losses import backends

FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
SOURCES = ROOT / "kernels" / "csrc"
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
halves = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


@pytest.fixture(params=cpu_levels())
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("DISTILFAST_CPU_LEVEL", request.param)
    return "cpp"


# --- Calling the launchers, with outputs of our own ----------------------------------------------


def launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gradient: Tensor | None = None,
    scale: Tensor | None = None,
    **keywords: Any,
) -> Tensor:
    """(4, N) parts by row; the scale is that of every part's gradient, () or (N,)."""
    by = torch.ones(()) if scale is None else scale
    chosen = options(**{"vocab_size": student.shape[1], **keywords})
    kernel = backends.BACKENDS["cpp"].distillation
    return kernel(student, teacher, labels, mask, by, by, chosen, gradient)


def check_launch(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gradient: Tensor,
    scale: Tensor | None = None,
    **keywords: Any,
) -> None:
    """Launch, and hold every row's parts and gradient against the oracle."""
    wanted = expect(
        student,
        teacher,
        labels,
        mask=mask,
        reduction="none",
        grad_output=1.0 if scale is None else scale,
        dtype=gradient.dtype,
        **keywords,
    )
    rows = launch(student, teacher, labels, mask, gradient=gradient, scale=scale, **keywords)
    for part, row in zip(PARTS, rows, strict=True):
        assert_within(part, row, wanted.value[part], wanted.slack[part])
    assert_within("gradient", gradient, wanted.grad, wanted.grad_slack)


def without_gradient_of_columns(n_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two columns of which the second has the label and no probability: CE's gradient there is
    minus the row's scale, whatever it is, and the first one's is the scale."""
    student = torch.tensor([[0.0, -INF]]).to(dtype).repeat(n_rows, 1)
    return student, torch.ones(n_rows, dtype=torch.int64), torch.empty_like(student)


# --- Memory --------------------------------------------------------------------------------------

# Whole vectors of each level, by four and by one, and a tail.
N_COLS = 77
# Rows with the mask's weight and a label; without both; with a label alone.
ROW_WEIGHTS = (1.0, 0.0, 0.5, 2.0, 0.0)


@pytest.mark.parametrize(
    "dtypes",
    [(FP32, FP32), (BF16, BF16), (FP16, FP16), (FP32, FP16), (BF16, FP32), (FP16, BF16)],
    ids=str,
)
@every_divergence
def test_rows_inside_wider_ones_are_read_and_written_whole(
    backend: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    # NaN all around, in what is read and in what is written, and a stride for each
    width = N_COLS + 5
    student, teacher = logits_pair((5, width), dtypes=dtypes)
    student[:, N_COLS:], teacher[:, N_COLS:] = NAN, NAN
    student, teacher = placed(student, stride=95), placed(teacher, stride=101)
    gradient = hole(5, width, dtypes[0], "cpu", stride=89)
    teacher[1] = NAN  # outside the mask
    arguments = (some_labels(5, N_COLS, "cpu"), torch.tensor(ROW_WEIGHTS))
    keywords = {"vocab_size": N_COLS, "divergence": divergence, "jsd_beta": 0.3}
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    only_cosine = {"kd_weight": 0.0, "cos_weight": 1.0}  # too small to be seen beside the others
    for weights in (ALL_PARTS, {}, only_cosine):
        gradient.fill_(NAN)
        check_launch(
            student, teacher, *arguments, gradient=gradient, scale=scale, **keywords, **weights
        )
        assert (gradient[:, N_COLS:] == 0).all()
        assert_nothing_else_was_written(gradient)


@pytest.mark.parametrize(
    "dtypes",
    [(FP32, FP32, FP32), (BF16, BF16, BF16), (FP16, BF16, FP32), (BF16, FP32, BF16)],
    ids=str,
)
def test_hidden_rows_inside_wider_ones_are_read_and_written_whole(
    backend: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
) -> None:
    student, teacher = logits_pair((5, N_COLS), dtypes=dtypes[:2])
    student[2, 3] = teacher[2, 3] = -INF  # both exclude it
    student, teacher = placed(student, stride=95), placed(teacher, stride=101)
    student[1] = NAN  # outside the mask
    gradient = hole(5, N_COLS, dtypes[2], "cpu", stride=89)
    mask, scale = torch.tensor(ROW_WEIGHTS), torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    kernel = backends.BACKENDS["cpp"].hidden_cosine
    losses = kernel([student], [teacher], mask, scale, [gradient])
    wanted = expect(
        student,
        teacher,
        mask=mask,
        kd_weight=0.0,
        cos_weight=1.0,
        reduction="none",
        grad_output=scale,
        dtype=gradient.dtype,
    )
    assert_within("loss", losses, wanted.value["cos"], wanted.slack["cos"])
    assert_within("gradient", gradient, wanted.grad, wanted.grad_slack)
    assert_nothing_else_was_written(gradient)


@pytest.mark.parametrize("dtypes", [(FP32, FP32, FP32), (FP32, BF16, FP16)], ids=str)
@pytest.mark.parametrize("mode", ensembles.MODES)
def test_teachers_inside_wider_rows_are_read_and_written_whole(
    backend: str, mode: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    pairs = [
        logits_pair((5, N_COLS), seed=i, offset=100.0, dtypes=(dtype, dtype))[0]
        for i, dtype in enumerate(dtypes)
    ]
    teachers = [placed(x, stride=95 + 6 * i) for i, x in enumerate(pairs)]
    weights, z = [0.2, 0.5, 0.3], hole(5, N_COLS, FP32, "cpu", stride=89)
    backends.BACKENDS["cpp"].combine_teachers(teachers, weights, 0.5, mode, N_COLS, z)
    wanted = ensembles.by_hand(teachers, weights, 0.5, mode)
    torch.testing.assert_close(z.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_nothing_else_was_written(z)


@every_dtype
def test_scaled_rows_inside_wider_ones_are_scaled_whole(backend: str, dtype: torch.dtype) -> None:
    before, _ = logits_pair((5, N_COLS), dtypes=(dtype, dtype))
    for by in (torch.tensor([1.0, -2.0, 0.3, 0.0, 7.0]), torch.tensor(0.3)):
        gradient = placed(before, stride=89)
        backends.BACKENDS["cpp"].scale([gradient], by)
        factor = by[:, None] if by.ndim else by
        assert_same([gradient], [(before.float() * factor).to(dtype)])
        assert_nothing_else_was_written(gradient)


def test_shares_inside_wider_rows_are_added_whole(backend: str) -> None:
    # all widths of a vector's rest; what is beside the rows stays
    for width in (1, 7, 16, 33):
        wide = torch.full((3, width + 5), 7.0)
        total, share = wide[:, :width], torch.randn(3, width + 2)[:, :width]
        cpp.accumulate(total.fill_(NAN), share, False)
        assert torch.equal(total, share)
        cpp.accumulate(total, share, True)
        assert torch.equal(total, 2 * share)
        assert (wide[:, width:] == 7).all()


def test_padding_beside_logits_that_their_gradient_overwrites_is_zeroed(backend: str) -> None:
    # after what it lies over has been read
    student, teacher = logits_pair((3, 70))
    wanted = torch.empty(3, 70, dtype=BF16)
    launch(student, teacher, gradient=wanted, vocab_size=61)
    gradient = student.view(BF16)[:, :70]
    launch(student, teacher, gradient=gradient, vocab_size=61)
    assert torch.equal(gradient, wanted)


def test_product_is_one_of_fp32(backend: str) -> None:
    if not cpp.multiplies():
        pytest.skip("this level has no products of bf16")
    for n, vocab, depth in ((9, 100, 33), (17, 49, 64), (1, 15, 1)):
        hidden, weight = (torch.randn(rows, depth + 3).to(BF16)[:, :depth] for rows in (n, vocab))
        bias, wide = torch.randn(vocab), torch.full((n + 1, vocab + 5), 7.0)
        cpp.product(hidden, weight, bias, wide[:n, :vocab])
        exact = hidden.double() @ weight.double().T + bias.double()
        assert (wide[:n, :vocab] - exact).abs().max() <= 1e-6 * (1 + depth)
        assert (wide[n:] == 7).all()
        assert (wide[:, vocab:] == 7).all()


def test_operands_of_any_stride_are_taken(backend: str) -> None:
    student, teacher = logits_pair((4, 9))
    arguments = (
        student,
        teacher,
        torch.tensor([1, 8, -100, 0]),
        torch.tensor([1.0, 0.0, 0.5, 2.0]),
    )
    strided = [torch.stack([x, torch.full_like(x, 7)], -1)[..., 0] for x in arguments]
    ours, wanted = torch.empty(4, 9), torch.empty(4, 9)
    parts = launch(*arguments, gradient=wanted, **ALL_PARTS)
    assert_same([launch(*strided, gradient=ours, **ALL_PARTS), ours], [parts, wanted])


def test_factors_of_any_layout_and_dtype_are_taken(backend: str) -> None:
    before, _ = logits_pair((5, 9))
    every_other = torch.tensor([[1.0, NAN], [-2.0, NAN], [0.3, NAN], [0.0, NAN], [7.0, NAN]])[:, 0]
    for by in (every_other, every_other.to(BF16), torch.tensor(0.25).expand(5)):
        gradient = before.clone()
        backends.BACKENDS["cpp"].scale([gradient], by)
        assert_same([gradient], [before * by.float()[:, None]])


@every_dtype
def test_streamed_gradient_is_the_stored_one(backend: str, dtype: torch.dtype) -> None:
    # as large by its stride as one that no cache holds, most of it never touched; the rows begin
    # at any place within a vector
    student, teacher = logits_pair((2, N_COLS), dtypes=(dtype, dtype))
    labels = torch.tensor([1, N_COLS - 1])
    stored = torch.empty_like(student)
    parts = launch(student, teacher, labels, gradient=stored, **ALL_PARTS)
    stride = (1 << 23) + 5
    streamed = torch.empty(2 * stride, dtype=dtype).as_strided((2, N_COLS), (stride, 1), 3)
    streamed.fill_(NAN)
    assert_same(
        [launch(student, teacher, labels, gradient=streamed, **ALL_PARTS), streamed],
        [parts, stored],
    )


@pytest.mark.parametrize("temperature", [2.0, 7.3])
@every_divergence
def test_gradient_in_place_of_the_logits_is_the_same_to_the_bit(
    backend: str, divergence: str, temperature: float
) -> None:
    # what is still needed must not be overwritten, the label's column least of all
    student, teacher = logits_pair((4, N_COLS))
    arguments = (teacher, some_labels(4, N_COLS, "cpu"), torch.tensor(ROW_WEIGHTS[:4]))
    keywords = {"divergence": divergence, "temperature": temperature, **ALL_PARTS}
    beside, inside = torch.empty_like(student), student.clone()
    parts = launch(student, *arguments, gradient=beside, **keywords)
    assert_same([launch(inside, *arguments, gradient=inside, **keywords), inside], [parts, beside])


# --- Conversions ---------------------------------------------------------------------------------

TINY_BF16 = 2.0**-126  # below it AVX-512's own conversion gives 0


@pytest.mark.parametrize("n_cols", [64, 3], ids=["vectors", "tails"])
@halves
def test_every_half_is_widened_exactly(backend: str, dtype: torch.dtype, n_cols: int) -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    teacher = every[: len(every) // n_cols * n_cols].reshape(-1, n_cols)
    z = torch.empty(teacher.shape)
    backends.BACKENDS["cpp"].combine_teachers([teacher], [1.0], 1.0, "logit", n_cols, z)
    assert_same([z], [teacher.float()])


def hard_to_round(dtype: torch.dtype) -> Tensor:
    """fp32 numbers: ties, their neighbours, subnormals, overflows and NaNs of this dtype."""
    generator = torch.Generator().manual_seed(0)
    any_bits = torch.randint(-(2**31), 2**31, (500,), generator=generator).to(torch.int32)
    of_its_size = 10 ** (8 * torch.rand(1500, generator=generator) - 4)
    step = torch.finfo(dtype).eps
    ties = torch.tensor([1 + (i + 0.5) * step for i in range(8)])
    ties = torch.cat([ties, 2.0**-17 * ties, 8192 * ties])
    small = torch.tensor([2.0**-24 * x for x in (0.25, 0.5, 0.75, 1.0, 1.5, 2.5, 100.5, 1023.5)])
    # the largest finite fp16, the first that rounds to infinity, and its predecessor
    large = torch.tensor([65504.0, 65520.0, 65519.996, 70000.0, 1e30, 3.4e38, INF])
    numbers = torch.cat([any_bits.view(FP32), of_its_size, ties, small, large])
    around = numbers.view(torch.int32)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    nans = torch.tensor([0x7FFFFFFF, 0x7FC00000, -1], dtype=torch.int32)  # -1: all bits are set
    numbers = torch.cat([around.flatten().view(FP32), nans.view(FP32)])
    normal = ~(numbers.abs() < TINY_BF16) | (dtype == FP16)
    return torch.cat([numbers[normal], -numbers[normal]])


@halves
def test_rounding_is_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    by = hard_to_round(dtype)
    gradient = torch.ones(len(by), 21, dtype=dtype)
    backends.BACKENDS["cpp"].scale([gradient], by)
    assert_same([gradient], [by.to(dtype)[:, None].expand(-1, 21)])


@halves
def test_label_column_is_rounded_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    by = hard_to_round(dtype)
    by = by[~by.isinf()]
    student, labels, gradient = without_gradient_of_columns(len(by), dtype)
    launch(student, student, labels, gradient=gradient, scale=by, kd_weight=0.0, ce_weight=1.0)
    assert_same([gradient[:, 1]], [-by.to(dtype)])


# --- Exponentials, logarithms and the range of a row ---------------------------------------------


@every_dtype
def test_exponential_is_as_exact_as_fp32(backend: str, dtype: torch.dtype) -> None:
    # ln(1 + e^x) of two columns, x over an octave: the gradient's budget would take much more
    second = (-torch.arange(0, 178) / 256).to(dtype)
    student = torch.stack([torch.zeros_like(second), second], 1)
    labels = torch.zeros(len(second), dtype=torch.int64)
    _, ce, _, _ = launch(student, student, labels, kd_weight=0.0, ce_weight=1.0)
    wanted = torch.log1p(second.double().exp())
    torch.testing.assert_close(ce.double(), wanted, rtol=0, atol=2e-7)


def test_logarithm_is_as_exact_as_fp32(backend: str) -> None:
    # two teachers of equal weight, from alike to one that is 2^-8 of the other
    first = torch.zeros(600, 2)
    first[:, 0] = torch.linspace(-3, 3, 600)
    second = -0.7 * first
    z = torch.empty(600, 2)
    backends.BACKENDS["cpp"].combine_teachers([first, second], [0.5, 0.5], 1.0, "probability", 2, z)
    wanted = ensembles.by_hand([first, second], [1, 1], 1.0, "probability")
    torch.testing.assert_close(z.double(), wanted, rtol=0, atol=8e-7)


def test_fp32_probabilities_keep_their_digits(backend: str) -> None:
    # 2^15 to 2^19 times what the row begins with, where fp32 is left with 19 digits of the exponent
    generator = torch.Generator().manual_seed(0)
    student = torch.full((32, 2050), -INF)
    student[:, 0] = 0
    student[:, 2048:] = 10 + 3 * torch.rand(32, 2, generator=generator)
    labels = torch.zeros(32, dtype=torch.int64)
    gradient = torch.empty_like(student)
    launch(student, student, labels, gradient=gradient, kd_weight=0.0, ce_weight=1.0)
    wanted = student.double().softmax(-1)
    torch.testing.assert_close(gradient[:, 2048:].double(), wanted[:, 2048:], rtol=4e-7, atol=0)


@every_dtype
def test_peak_in_any_column_stays_in_range(backend: str, dtype: torch.dtype) -> None:
    # 173 bits above the others: beside a maximum that misses the column e is infinite
    student, teacher = logits_pair((N_COLS, N_COLS), dtypes=(dtype, dtype))
    peaks = 120.0 * torch.eye(N_COLS)
    student, teacher = student + peaks.to(dtype), teacher + peaks.roll(5, 1).to(dtype)
    labels = torch.arange(N_COLS)
    gradient = torch.empty_like(student)
    check_launch(student, teacher, labels, gradient=gradient, temperature=1.0, ce_weight=1.0)


@pytest.mark.parametrize("who", ["student", "teacher", "both"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.3])
@pytest.mark.parametrize("dtype", [FP32, FP16], ids=["fp32", "fp16"])
def test_maximum_far_above_the_first_columns_is_found(
    backend: str, dtype: torch.dtype, temperature: float, who: str
) -> None:
    # 2^137 at T = 1, which only CE sees at T = 7.3, where it is 2^19; at T = 2 only kd looks
    student, teacher = logits_pair((3, 2051), scale=0.5, dtypes=(dtype, dtype))
    if who != "teacher":
        student[:, 2049] = 95.0
    if who != "student":
        teacher[:, 2050] = 95.0
    labels, gradient = torch.tensor([3, 2049, 2050]), torch.empty_like(student)
    for divergence in DIVERGENCES:
        check_launch(
            student,
            teacher,
            labels,
            gradient=gradient,
            divergence=divergence,
            temperature=temperature,
            ce_weight=1.0,
        )


@pytest.mark.parametrize("low", [-95.0, -INF], ids=["far", "excluded"])
def test_maximum_far_above_the_first_columns_is_found_for_labels_alone(
    backend: str, low: float
) -> None:
    student, teacher = logits_pair((3, 2051), scale=0.5)
    student[:, :2048] = low
    labels, gradient = torch.tensor([2048, 2049, 2050]), torch.empty_like(student)
    check_launch(student, teacher, labels, gradient=gradient, kd_weight=0.0, ce_weight=1.0)


def test_maximum_far_above_the_first_columns_costs_no_digits(backend: str) -> None:
    # exponents near 100 have lost 7 bits, which the budget of a loss would hide
    student, teacher = logits_pair((16, 2051), scale=0.5)
    student[:, :2048] -= 70
    teacher[:, :2048] -= 70
    kd, _, _, _ = launch(student, teacher, temperature=1.0)
    wanted = expect(student, teacher, temperature=1.0, reduction="none").value["kd"]
    torch.testing.assert_close(kd.double(), wanted, rtol=0, atol=1e-6)


# --- NaN, minus infinity and labels --------------------------------------------------------------


@pytest.mark.parametrize("part", ["cos", "mse"])
def test_nan_on_both_sides_is_no_excluded_column(backend: str, part: str) -> None:
    student, teacher = logits_pair((3, 9))
    student[1, 3] = teacher[1, 3] = NAN
    gradient = torch.empty_like(student)
    weights = {"kd_weight": 0.0, f"{part}_weight": 1.0}
    parts = launch(student, teacher, gradient=gradient, **weights)
    assert parts[PARTS.index(part)].isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
@every_divergence
def test_nan_of_halves_makes_its_row_nan(backend: str, divergence: str, side: str) -> None:
    # their exponential has a fraction of its own, in which a NaN could get lost
    student, teacher = logits_pair((3, N_COLS), dtypes=(BF16, BF16))
    (student if side == "student" else teacher)[1, 3] = NAN
    gradient = torch.empty_like(student)
    parts = launch(student, teacher, gradient=gradient, divergence=divergence)
    assert parts[0].isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_beside_a_zero_vector_is_no_zero_vector(backend: str, side: str) -> None:
    student, teacher = logits_pair((3, 9))
    zero, other = (student, teacher) if side == "student" else (teacher, student)
    zero[1], other[1, 4] = 0, NAN
    gradient = torch.empty_like(student)
    parts = launch(student, teacher, gradient=gradient, kd_weight=0.0, cos_weight=1.0)
    assert parts[2].isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_unknown_label_makes_its_own_row_nan(backend: str, label: int) -> None:
    # the public functions refuse it on a CPU; the kernels neither read nor write outside
    student, teacher = logits_pair((3, 9))
    gradient = hole(3, 9, FP32, "cpu", stride=12)
    labels = torch.tensor([0, label, 8])
    parts = launch(placed(student, stride=11), teacher, labels, gradient=gradient, ce_weight=1.0)
    assert parts[1].isnan().tolist() == [False, True, False]
    assert not parts[0].isnan().any()
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert_nothing_else_was_written(gradient)


# --- Levels --------------------------------------------------------------------------------------


def test_best_level_is_the_processors(backend: str) -> None:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        pytest.skip("no /proc/cpuinfo to compare with")
    has = set(next((x for x in text.splitlines() if x.startswith("flags")), "").split())
    wanted = "plain"
    if has >= {"avx2", "fma", "f16c"}:
        wanted = "avx2"
    if has >= {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"}:
        wanted = "avx512bf16" if "avx512_bf16" in has else "avx512"
    assert cpp.best_level() == wanted


def test_level_asked_for_is_the_level_used(backend: str) -> None:
    """Whatever the machine's best level is: here it is always another, and better."""
    wanted = os.environ["DISTILFAST_CPU_LEVEL"]
    better = cpp.LEVELS[cpp.LEVELS.index(wanted) + 1]
    module = sys.modules["distilfast_kernels.cpp"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "best_level", lambda: better)
        assert module.level() == wanted


def test_unknown_level_is_refused_and_nothing_runs(backend: str) -> None:
    nothing = cpp._ScaleArguments()
    for level in (-1, len(cpp.LEVELS)):
        assert cpp._library().distilfast_scale(ctypes.byref(nothing), level, 1) == errno.ENOTSUP


# --- The mutations -------------------------------------------------------------------------


class Mutation(NamedTuple):
    name: str
    level: str  # the instruction set that it is compiled for
    file: str
    old: str
    new: str
    caught_by: Call


PLAIN, AVX2, AVX512, AVX512_BF16 = "plain", "avx2", "avx512", "avx512bf16"

# The cheapest calls that notice something.
ROWS = {
    (kind, dtype): call(
        test_rows_inside_wider_ones_are_read_and_written_whole,
        divergence=kind,
        dtypes=(dtype, dtype),
    )
    for kind in DIVERGENCES
    for dtype in (FP32, BF16, FP16)
}
FORWARD, REVERSE, JSD = (ROWS[kind, FP32] for kind in DIVERGENCES)
MIXED = {
    dtypes: call(
        test_rows_inside_wider_ones_are_read_and_written_whole,
        divergence="forward_kl",
        dtypes=dtypes,
    )
    for dtypes in ((FP32, FP16), (BF16, FP32))
}
HIDDEN = {
    dtypes: call(test_hidden_rows_inside_wider_ones_are_read_and_written_whole, dtypes=dtypes)
    for dtypes in ((FP32, FP32, FP32), (FP16, BF16, FP32))
}
HIDDEN_FP32, HIDDEN_MIXED = HIDDEN.values()
TEACHERS = {
    mode: call(
        test_teachers_inside_wider_rows_are_read_and_written_whole,
        mode=mode,
        dtypes=(FP32, FP32, FP32),
    )
    for mode in ensembles.MODES
}
BY_PROBABILITY, BY_LOGIT = TEACHERS["probability"], TEACHERS["logit"]
HEAD = {
    name: call(heads.test_parity_with_the_oracle, name=name, divergence="forward_kl", dtype=FP32)
    for name in heads.HEADS
}
HEAD_MIXED = call(heads.test_dtypes_of_the_sides_may_differ, name="bias", dtypes=(BF16, FP32))
NEAR = {
    (kind, noise): call(
        near.test_small_divergence_keeps_its_digits,
        divergence=kind,
        noise=noise,
        temperature=1.0,
    )
    for kind in ("forward_kl", "reverse_kl", "jsd")
    for noise in (1e-3, 0.15)
}
FAR_COLUMNS = {
    kind: call(near.test_few_columns_far_apart_in_a_small_divergence, divergence=kind)
    for kind in ("forward_kl", "reverse_kl", "jsd")
}
EXCLUDED = call(near.test_small_divergence_with_excluded_columns, divergence="forward_kl")
COUNTED = call(
    near.test_statistics_are_the_softmaxes, divergence="forward_kl", noise=0.5, vocab=1003
)
FIRST_OF_EQUALS = call(near.test_first_of_equal_largest_logits_counts)
OVER_LOGITS = call(test_padding_beside_logits_that_their_gradient_overwrites_is_zeroed)
PRODUCT = call(test_product_is_one_of_fp32)
ACCUMULATED = call(test_shares_inside_wider_rows_are_added_whole)
SOFTCAP = call(heads.test_softcap_of_large_small_and_infinite_products, softcap=30.0)
BIAS_OF_MANY_ROWS = call(heads.test_bias_gradient_is_added_to_and_not_only_by_whole_blocks)
SCALED = call(test_scaled_rows_inside_wider_ones_are_scaled_whole, dtype=FP32)
STREAMED = {
    dtype: call(test_streamed_gradient_is_the_stored_one, dtype=dtype)
    for dtype in (FP32, BF16, FP16)
}
IN_PLACE = call(
    test_gradient_in_place_of_the_logits_is_the_same_to_the_bit,
    divergence="reverse_kl",
    temperature=2.0,
)
WIDENED = {
    (dtype, n_cols): call(test_every_half_is_widened_exactly, dtype=dtype, n_cols=n_cols)
    for dtype in (BF16, FP16)
    for n_cols in (64, 3)
}
ROUNDED = {dtype: call(test_rounding_is_to_nearest_even, dtype=dtype) for dtype in (BF16, FP16)}
LABEL_ROUNDED = {
    dtype: call(test_label_column_is_rounded_to_nearest_even, dtype=dtype) for dtype in (BF16, FP16)
}
EXPONENTIAL = {
    dtype: call(test_exponential_is_as_exact_as_fp32, dtype=dtype) for dtype in (FP32, BF16)
}
LOGARITHM = call(test_logarithm_is_as_exact_as_fp32)
DIGITS = call(test_fp32_probabilities_keep_their_digits)
PEAKS = call(test_peak_in_any_column_stays_in_range, dtype=FP32)
FAR = {
    (temperature, who): call(
        test_maximum_far_above_the_first_columns_is_found,
        dtype=FP32,
        temperature=temperature,
        who=who,
    )
    for temperature in (1.0, 2.0, 7.3)
    for who in ("student", "teacher")
}
BLOCKS = call(values.test_parity_with_a_peak_anywhere, vocab=4200, where="last")
FAR_DIGITS = call(test_maximum_far_above_the_first_columns_costs_no_digits)
NAN_TWICE = call(test_nan_on_both_sides_is_no_excluded_column, part="mse")
NAN_HALF = {
    side: call(test_nan_of_halves_makes_its_row_nan, divergence="forward_kl", side=side)
    for side in ("student", "teacher")
}
LABELS_ALONE = call(test_maximum_far_above_the_first_columns_is_found_for_labels_alone, low=-95.0)
ANY_STRIDE = call(test_operands_of_any_stride_are_taken)
NAN_OR_ZERO = call(test_nan_beside_a_zero_vector_is_no_zero_vector, side="student")
UNKNOWN = {label: call(test_unknown_label_makes_its_own_row_nan, label=label) for label in (-1, 9)}
ANY_FACTOR = call(test_factors_of_any_layout_and_dtype_are_taken)
ASKED_FOR = call(test_level_asked_for_is_the_level_used)
UNKNOWN_LEVEL = call(test_unknown_level_is_refused_and_nothing_runs)
BEST_LEVEL = call(test_best_level_is_the_processors)
AT = {
    temperature: call(
        values.test_parity_at_every_temperature,
        divergence="forward_kl",
        temperature=temperature,
        near=False,
    )
    for temperature in (2.0, 3.0, 4.0, 5.0, 7.3)
}
REVERSE_FAR, JSD_FAR = (
    call(values.test_parity_at_every_temperature, divergence=kind, temperature=2.0, near=False)
    for kind in ("reverse_kl", "jsd")
)
MASKS = call(values.test_float_mask_weights_rows_and_their_divisor)
DIVISORS = call(values.test_mean_divides_each_part_by_its_own_count)
NOT_CENTRED = {
    offset: call(
        values.test_parity_of_logits_that_are_not_centred, divergence="forward_kl", offset=offset
    )
    for offset in (100.0, -100.0)
}
NO_KD = call(values.test_part_of_weight_zero_is_zero, part="kd")
NO_CE = call(values.test_part_of_weight_zero_is_zero, part="ce")
MASKED_NAN = call(
    edges.test_masked_rows_contribute_exactly_nothing, divergence="jsd", kind="bool", bad=NAN
)
NOTHING_COUNTS = call(
    values.test_total_of_zero_counts_nothing_whatever_the_rows_hold, as_tensor=True
)
OUTSIDE_THE_MASK = call(edges.test_labelled_row_outside_the_mask_keeps_its_ce_beside_a_cosine)
BANNED = {
    name: call(edges.test_column_minus_inf_in_both_adds_nothing, keywords=keywords, columns=[4, 11])
    for name, keywords in zip(edges.ALONE_IDS, edges.ALONE, strict=True)
}
NAN_ROW = {
    (kind, side): call(
        edges.test_nan_row_gives_a_nan_row_and_leaves_the_others_alone,
        keywords=edges.with_part("kd", kind),
        side=side,
        columns=3,
    )
    for kind in DIVERGENCES
    for side in ("student", "teacher")
}
IMPOSSIBLE = call(edges.test_reverse_kl_of_an_impossible_token_is_inf_with_a_nan_row)
UNDERFLOW = call(edges.test_tiny_probability_against_an_impossible_token_is_inf_and_not_nan)
INFINITE_MSE = call(edges.test_infinite_mse_has_a_nan_row, side="student")
FAR_APART = call(
    edges.test_finite_logits_never_give_an_infinite_divergence,
    divergence="forward_kl",
    temperature=0.5,
)
ZERO_VECTOR = call(edges.test_zero_vector_has_cosine_loss_one_and_no_gradient, side="student")
ANY_IGNORE_INDEX = call(edges.test_ignore_index_may_be_any_number, ignore_index=0)
HIDDEN_LAYERS = call(
    hidden.test_layers_equal_the_mean_of_single_calls, which="float", reduction="sum"
)
LAYERS_ALIKE = call(hidden.test_only_layers_that_require_grad_get_one)
ONE_TEACHER_EXCLUDES = call(
    ensembles.test_column_minus_inf_in_one_teacher_keeps_the_others_share, place=0
)
NAN_TEACHER = call(ensembles.test_nan_row_leaves_the_others_alone, mode="probability")
SILENT_TEACHER = call(
    ensembles.test_teacher_of_weight_zero_is_ignored_whatever_it_holds,
    place=0,
    bad=NAN,
    mode="probability",
)

D, R, V, H, E, L = "distillation.h", "rows.h", "vec.h", "hidden_cosine.h", "ensemble.h", "cpp.py"
A, P = "accumulate.h", "product.h"
MUTATIONS = [
    # distillation.h: exponentials
    Mutation("no square", AVX2, D, "power > 1 ? e * e : e", "power > 2 ? e * e : e", AT[2.0]),
    Mutation("no third power", AVX512, D, "? square * e :", "? square :", AT[3.0]),
    Mutation(
        "fp32 has the exponential of halves",
        AVX2,
        D,
        "sizeof(E) < sizeof(float)",
        "sizeof(E) <= sizeof(float)",
        DIGITS,
    ),
    Mutation(
        "x_t is the student's", AVX512, D, "(t - top_t) * scale", "(t - top_s) * scale", FORWARD
    ),
    Mutation(
        "CE at T where T is no power",
        PLAIN,
        D,
        "return exponential<S>(",
        "if (true) return e_s; return exponential<S>(",
        AT[7.3],
    ),
    Mutation("a power where T is not whole", AVX512, D, "row.power = 0;", ";", AT[7.3]),
    Mutation("no temperature", AVX2, D, "float(LOG2_E / temperature)", "float(LOG2_E)", FORWARD),
    # the range of a row
    Mutation("any l_s will do", PLAIN, D, "l_s <= RANGE", "l_s == l_s", FAR[2.0, "student"]),
    Mutation("any l_t will do", AVX2, D, "l_t <= RANGE", "l_t == l_t", FAR[1.0, "teacher"]),
    Mutation("any l_1 will do", AVX512, D, "l_1 <= RANGE", "l_1 == l_1", FAR[7.3, "student"]),
    Mutation("a range of 2^120", AVX512, D, "RANGE = 0x1p20", "RANGE = 0x1p120", FAR_DIGITS),
    Mutation(
        "the teacher's maximum is the student's",
        PLAIN,
        D,
        "top_t.add(k, get(t + i, n, -INF))",
        "top_t.add(k, get(s + i, n, -INF))",
        FAR_APART,
    ),
    Mutation(
        "no maximum", AVX2, D, "row.top_s = top_s.total()", "row.top_s = 0", NOT_CENTRED[100.0]
    ),
    # its sums
    Mutation("forward: the sign", PLAIN, D, "gap(x_t, x_s)", "gap(x_s, x_t)", AT[2.0]),
    Mutation(
        "reverse: the mean", AVX2, D, "d.add(k, e_s,", "d.add(k, e_s * Vec(2.f),", REVERSE_FAR
    ),
    Mutation("l_t is l_s", AVX512, D, "l_t.add(k, e_t)", "l_t.add(k, e_s)", FORWARD),
    Mutation("e_t is e_s", PLAIN, D, "scratch.e_t + i, e_t)", "scratch.e_t + i, e_s)", FORWARD),
    Mutation(
        "tiny against impossible is NaN", AVX2, D, "row.d = INFINITY", "row.d = row.d", UNDERFLOW
    ),
    Mutation(
        "JSD: the mixture of unnormalised ones",
        PLAIN,
        D,
        "float(beta * row.l_s / row.l_t)",
        "float(beta)",
        JSD,
    ),
    Mutation("JSD: b is doubled", AVX2, D, "b.add(k, e_s,", "b.add(k, e_s * Vec(2.f),", JSD_FAR),
    Mutation(
        "JSD: a from the student",
        AVX512,
        D,
        "a.add(k, e_t, gap(row.x_t(get(t + i, n, -INF)), mixture))",
        "a.add(k, e_t, from_m)",
        JSD_FAR,
    ),
    Mutation("JSD: no mean", AVX2, D, "row.mean = float(kl_s)", "row.mean = 0", JSD),
    Mutation(
        "JSD: sums of two sizes",
        AVX512,
        D,
        "(a.total() / row.l_t + ::log2(row.l_s / row.l_t))",
        "(a.total() / row.l_t)",
        JSD,
    ),
    # cosine and MSE
    Mutation(
        "MSE ignores the mask",
        AVX512,
        D,
        "float(found.squares * weight)",
        "float(found.squares)",
        MASKS,
    ),
    Mutation(
        "cos goes where MSE does",
        PLAIN,
        D,
        "a.rows[2 * a.n_rows + r]",
        "a.rows[3 * a.n_rows + r]",
        FORWARD,
    ),
    Mutation(
        "cos forgets its weight",
        AVX2,
        D,
        "a.cos_weight * scale * found.by",
        "scale * found.by",
        FORWARD,
    ),
    Mutation(
        "half of MSE's gradient",
        AVX512,
        D,
        "2 * a.mse_weight * scale",
        "a.mse_weight * scale",
        FORWARD,
    ),
    Mutation(
        "infinite MSE has a gradient",
        PLAIN,
        D,
        "found.squares < INFINITY ?",
        "found.squares <= INFINITY ?",
        INFINITE_MSE,
    ),
    Mutation("cos: the sign", AVX2, D, "Vec(0.f) - y) * Vec(by_cos)", "y) * Vec(by_cos)", FORWARD),
    Mutation("MSE: the sign", AVX512, D, "fma(x - y, by_gap, c)", "fma(y - x, by_gap, c)", FORWARD),
    # the gradient
    Mutation("forward: l_s for l_t", PLAIN, D, "float(row.l_s / row.l_t);", "1;", FORWARD),
    Mutation(
        "reverse: no mean", AVX2, D, "(apart - Vec(row.mean)), row.by_s", "apart, row.by_s", REVERSE
    ),
    Mutation(
        "reverse: infinite has a gradient",
        AVX512,
        D,
        "row.by_s, row.spoilt)",
        "row.by_s, 0.f)",
        IMPOSSIBLE,
    ),
    Mutation(
        "JSD's gradient has no mean",
        PLAIN,
        D,
        "(load(scratch.e_t + i) - Vec(row.mean))",
        "load(scratch.e_t + i)",
        JSD,
    ),
    Mutation("CE's gradient stands alone", AVX2, D, "row.by_1, g)", "row.by_1, 0.f)", FORWARD),
    Mutation(
        "cos and MSE stand alone",
        AVX512,
        D,
        "g = g + load(scratch.extra",
        "g = load(scratch.extra",
        FORWARD,
    ),
    Mutation(
        "the label is not taken off",
        PLAIN,
        D,
        "(first(e_1) - row.l_1) / row.l_1",
        "first(e_1) / row.l_1",
        FORWARD,
    ),
    Mutation(
        "the label's column has CE alone",
        AVX2,
        D,
        "float(ce + first(",
        "float(ce + 0 * first(",
        FORWARD,
    ),
    Mutation("the label is column 0", AVX2, D, "narrow(g[label],", "narrow(g[0],", FORWARD),
    Mutation(
        "the label's column is read when overwritten",
        AVX512,
        D,
        "narrow(g[label], at_label)",
        "narrow(g[label], float(by * (first(row.template e_1<S>(load(scratch.e_s + label), 0.f))"
        " - row.l_1) / row.l_1"
        " + first(gradient_at<KD, false>(row, s, t, scratch, extra, label, 1))))",
        IN_PLACE,
    ),
    # a row
    Mutation("no mask", PLAIN, D, "a.mask ? a.mask[r] : 1", "1", FORWARD),
    Mutation(
        "a total of 0 leaves kd in",
        PLAIN,
        D,
        "if (a.kd_scale[r * a.kd_scale_stride] == 0) return 0;",
        "",
        NOTHING_COUNTS,
    ),
    Mutation(
        "a total of 0 leaves ce in",
        PLAIN,
        D,
        "!= a.ignore_index && ce_scale != 0;",
        "!= a.ignore_index;",
        NOTHING_COUNTS,
    ),
    Mutation(
        "every row takes the first one's scale",
        AVX2,
        D,
        "kd_scale = a.kd_scale[r *",
        "kd_scale = a.kd_scale[0 *",
        FORWARD,
    ),
    Mutation(
        "masked rows have a divergence",
        PLAIN,
        D,
        "weight != 0 ? int(a.divergence) : NO_KD",
        "int(a.divergence)",
        MASKED_NAN,
    ),
    Mutation(
        "masked rows have a cosine",
        AVX2,
        D,
        "const bool extra = weight != 0 && (",
        "const bool extra = (",
        OUTSIDE_THE_MASK,
    ),
    Mutation(
        "what is ignored is negative",
        AVX512,
        D,
        "a.labels[r] != a.ignore_index",
        "a.labels[r] >= 0",
        ANY_IGNORE_INDEX,
    ),
    Mutation(
        "labels without a weight", PLAIN, D, "a.ce_weight != 0 && a.labels", "a.labels", FORWARD
    ),
    Mutation(
        "parts begin at 1",
        AVX2,
        D,
        "a.rows[part * a.n_rows + r] = 0;",
        "a.rows[part * a.n_rows + r] = 1;",
        NO_CE,
    ),
    Mutation("the padding is not written", AVX512, D, "i < a.n_padded;", "i < n_cols;", FORWARD),
    Mutation(
        "the gradient forgets T",
        PLAIN,
        D,
        "a.kd_weight * kd_scale * a.temperature",
        "a.kd_weight * kd_scale",
        FORWARD,
    ),
    Mutation("forward: l_s is forgotten", AVX512, D, " + ::log2(row.l_s);", ";", FORWARD),
    Mutation("reverse: l_t is forgotten", AVX2, D, " + ::log2(row.l_t);", ";", REVERSE),
    Mutation(
        "reverse: bits for nats in the gradient",
        PLAIN,
        D,
        "float(by_kd * LN_2 / row.l_s)",
        "float(by_kd / row.l_s)",
        REVERSE,
    ),
    Mutation(
        "JSD: a NaN teacher has a gradient",
        AVX2,
        D,
        "bits == bits ?",
        "true ?",
        NAN_ROW["jsd", "teacher"],
    ),
    Mutation(
        "JSD's gradient forgets 1 - beta",
        AVX512,
        D,
        "by_kd * LN_2 * (1 - a.beta)",
        "by_kd * LN_2",
        JSD,
    ),
    Mutation(
        "T squared becomes T",
        PLAIN,
        D,
        "LN_2 * a.temperature * a.temperature * weight",
        "LN_2 * a.temperature * weight",
        FORWARD,
    ),
    Mutation(
        "kd ignores the mask",
        AVX512,
        D,
        "a.temperature * a.temperature * weight)",
        "a.temperature * a.temperature)",
        FORWARD,
    ),
    Mutation(
        "a negative label is known", PLAIN, D, "label >= 0 && label <", "label <", UNKNOWN[-1]
    ),
    Mutation("n_cols is a known label", AVX2, D, "label < n_cols;", "label <= n_cols;", UNKNOWN[9]),
    Mutation(
        "CE's logit is not below the maximum",
        AVX512,
        D,
        "double(widen(s[label])) - row.top_s",
        "double(widen(s[label]))",
        FORWARD,
    ),
    Mutation(
        "CE at T in the gradient",
        PLAIN,
        D,
        "exponential<S>(s - top_s, float(LOG2_E))",
        "exponential<S>(s - top_s, scale)",
        AT[7.3],
    ),
    Mutation(
        "bits for nats in CE",
        AVX2,
        D,
        "LN_2 * ::log2(row.l_1) - above",
        "::log2(row.l_1) - above",
        FORWARD,
    ),
    Mutation(
        "ce takes kd's divisor",
        AVX512,
        D,
        "a.ce_scale[r * a.ce_scale_stride]",
        "a.kd_scale[r * a.kd_scale_stride]",
        DIVISORS,
    ),
    Mutation(
        "CE's gradient is not normalised",
        PLAIN,
        D,
        "float(by_ce / row.l_1)",
        "float(by_ce)",
        FORWARD,
    ),
    Mutation(
        "half of a row that nothing needs",
        AVX2,
        D,
        "a.n_padded * sizeof(G));",
        "a.n_padded);",
        FORWARD,
    ),
    Mutation(
        "kd does not need the teacher",
        AVX512,
        D,
        "extra || a.divergence != NO_KD",
        "extra",
        call(
            values.test_parity_in_every_dtype,
            divergence="forward_kl",
            dtypes=(FP32, BF16),
            near=False,
        ),
    ),
    Mutation(
        "the gradient has the student's stride",
        PLAIN,
        D,
        "(E*)a.gradient.data + r * a.gradient.stride",
        "(E*)a.gradient.data + r * a.student.stride",
        ROWS["forward_kl", BF16],
    ),
    # rows.h
    Mutation(
        "columns before the first aligned vector are not written",
        AVX2,
        R,
        "if (i) f(int64_t(0), int(i), Constant<0>());",
        "",
        STREAMED[FP32],
    ),
    Mutation(
        "one vector for another",
        AVX512,
        R,
        "f(i + 2 * WIDTH, Constant<WIDTH>()",
        "f(i + WIDTH, Constant<WIDTH>()",
        SCALED,
    ),
    Mutation("a long tail", AVX2, R, "int(n_cols - i)", "int(n_cols - i) + 1", FORWARD),
    Mutation("a tail full of zeros", AVX2, R, "load(p, n, other);", "load(p, n, 0.f);", FORWARD),
    Mutation(
        "a part of a sum is its last vector",
        AVX512,
        R,
        "part[k] = part[k] + x",
        "part[k] = x",
        AT[2.0],
    ),
    Mutation(
        "a lane is not summed",
        PLAIN,
        R,
        "i < WIDTH; i++) total",
        "i < WIDTH - 1; i++) total",
        FORWARD,
    ),
    Mutation("the last part is the sum", AVX2, R, "blocks += ", "blocks = ", FORWARD),
    Mutation("blocks are added again", AVX512, R, "            x = 0.f;", "            ;", BLOCKS),
    Mutation("every block is the first", PLAIN, R, "f(start + i, n, k)", "f(i, n, k)", BLOCKS),
    Mutation("products are squares", AVX2, R, "fma(x, y, part[k])", "fma(x, x, part[k])", FORWARD),
    Mutation(
        "the maximum of half a row",
        AVX512,
        R,
        "max(max(part[0], part[1]), max(part[2], part[3]))",
        "max(part[0], part[1])",
        PEAKS,
    ),
    Mutation(
        "a maximum of 0 at least",
        PLAIN,
        R,
        "Vec part[4] = {-INF, -INF, -INF, -INF}",
        "Vec part[4] = {0.f, 0.f, 0.f, 0.f}",
        NOT_CENTRED[-100.0],
    ),
    Mutation("0 log 0", AVX2, R, "max(x - y, -1024.f)", "max(x - y, -INF)", BANNED["forward_kl"]),
    Mutation(
        "one side alone excludes",
        PLAIN,
        R,
        "both(equal(s, -INF), equal(t, -INF))",
        "equal(s, -INF)",
        INFINITE_MSE,
    ),
    Mutation(
        "MSE is a product", AVX512, R, "sq.add(k, a - b, a - b)", "sq.add(k, a - b, a)", FORWARD
    ),
    Mutation(
        "half of a zero rule", PLAIN, R, "s2 == 0 || t2 == 0", "s2 == 0 && t2 == 0", ZERO_VECTOR
    ),
    Mutation("NaN is a zero vector", AVX2, R, " && s2 + t2 == s2 + t2)", ")", NAN_OR_ZERO),
    Mutation(
        "the teacher's length",
        PLAIN,
        R,
        "::sqrt(s2) * ::sqrt(t2)",
        "::sqrt(t2) * ::sqrt(t2)",
        HIDDEN_FP32,
    ),
    Mutation("cosine's ratio", AVX2, R, "float(dot / s2)", "float(dot / t2)", HIDDEN_FP32),
    Mutation("NaN is 0", AVX512, R, "NOT_A_NUMBER = NAN", "NOT_A_NUMBER = 0", UNKNOWN[9]),
    Mutation("log2(e)", PLAIN, R, "LOG2_E = 1.4426", "LOG2_E = 1.4436", FORWARD),
    Mutation("ln(2)", AVX2, R, "LN_2 = 0.6931", "LN_2 = 0.6932", FORWARD),
    Mutation(
        "all rows are the first",
        AVX512,
        R,
        "const int64_t at = r * m.stride",
        "const int64_t at = 0",
        FORWARD,
    ),
    Mutation(
        "bf16 is fp16",
        PLAIN,
        R,
        "f((bf16*)m.data + at)",
        "f((fp16*)m.data + at)",
        ROWS["forward_kl", BF16],
    ),
    Mutation(
        "the teacher has the student's stride",
        AVX2,
        R,
        "(const S*)teacher.data + r * teacher.stride",
        "(const S*)teacher.data + r * student.stride",
        FORWARD,
    ),
    Mutation(
        "an fp32 teacher has the student's stride",
        AVX512,
        R,
        "(const float*)teacher.data + r * teacher.stride",
        "(const float*)teacher.data + r * student.stride",
        MIXED[BF16, FP32],
    ),
    Mutation(
        "a teacher is widened by halves",
        PLAIN,
        R,
        "store(wide + i, get(t + i,",
        "store(wide + i / 2, get(t + i,",
        MIXED[FP32, FP16],
    ),
    Mutation("one buffer for all", AVX2, R, "buffers + room * number", "buffers", FORWARD),
    # hidden_cosine.h
    Mutation("hidden: no mask", PLAIN, H, "a.mask ? a.mask[r] : 1", "1", HIDDEN_FP32),
    Mutation(
        "hidden: half a row is zeroed", AVX512, H, "a.n_cols * sizeof(G)", "a.n_cols", HIDDEN_FP32
    ),
    Mutation(
        "hidden: the last layer counts",
        PLAIN,
        H,
        "a.rows[r] += float(",
        "a.rows[r] = float(",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "hidden: the sum over layers",
        AVX2,
        H,
        "found.distance * a.share * weight",
        "found.distance * weight",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "hidden: the gradient of the sum over layers",
        AVX512,
        H,
        "weight * a.share * found.by",
        "weight * found.by",
        HIDDEN_LAYERS,
    ),
    Mutation("hidden: the sign", AVX2, H, "Vec(0.f) - y) * by", "y) * by", HIDDEN_FP32),
    Mutation(
        "hidden: excluded columns have a gradient",
        AVX512,
        H,
        "const Vec x = drop(u, u, w)",
        "const Vec x = u",
        HIDDEN_FP32,
    ),
    Mutation(
        "hidden: the gradient has the student's dtype",
        PLAIN,
        H,
        "a.gradient.dtype == a.student.dtype",
        "true",
        HIDDEN_MIXED,
    ),
    Mutation(
        "hidden: the gradient is dense",
        AVX2,
        H,
        "r * a.gradient.stride",
        "r * a.n_cols",
        HIDDEN_FP32,
    ),
    # ensemble.h
    Mutation(
        "logits are not weighed",
        AVX512,
        E,
        "get(t + i, n, 0.f) * weight",
        "get(t + i, n, 0.f)",
        BY_LOGIT,
    ),
    Mutation(
        "the last logit counts", PLAIN, E, "k == 0 ? x : x + get(z + i, n, 0.f)", "x", BY_LOGIT
    ),
    Mutation(
        "teachers at T = 1",
        AVX2,
        E,
        "float(LOG2_E / a.temperature)",
        "float(LOG2_E)",
        BY_PROBABILITY,
    ),
    Mutation(
        "a teacher without a maximum", AVX512, E, "m = top.total()", "m = 0.f", BY_PROBABILITY
    ),
    Mutation(
        "a teacher's tail is full of 100",
        PLAIN,
        E,
        "exp2((get(t + i, n, -INF)",
        "exp2((get(t + i, n, 100.f)",
        BY_PROBABILITY,
    ),
    Mutation("teachers are not normalised", AVX512, E, " - ::log2(l.total())", "", BY_PROBABILITY),
    Mutation(
        "totals begin at 0",
        PLAIN,
        E,
        "store(total + i, 1.f)",
        "store(total + i, 0.f)",
        BY_PROBABILITY,
    ),
    Mutation(
        "a larger teacher is added as a smaller one",
        AVX2,
        E,
        "select(more, fma(sum, e, 1.f), sum + e)",
        "sum + e",
        BY_PROBABILITY,
    ),
    Mutation(
        "the smaller of two teachers",
        AVX512,
        E,
        "select(more, y, select(",
        "select(more, so_far, select(",
        BY_PROBABILITY,
    ),
    Mutation(
        "a NaN does not reach z", AVX2, E, "select(equal(y, y), so_far, y)", "so_far", NAN_TEACHER
    ),
    Mutation("the largest teacher alone", AVX512, E, "+ log2(load(total + i))", "", BY_PROBABILITY),
    Mutation(
        "z is not multiplied by T", PLAIN, E, "LN_2 * a.temperature", "LN_2 * 1", BY_PROBABILITY
    ),
    Mutation("z is dense", AVX2, E, "r * a.stride_z", "r * a.n_cols", BY_LOGIT),
    # scale.h
    Mutation(
        "every row takes the first factor",
        PLAIN,
        "scale.h",
        "a.by[r * a.by_stride]",
        "a.by[0]",
        SCALED,
    ),
    Mutation(
        "nothing is scaled",
        AVX2,
        "scale.h",
        "get(g + i, n, 0.f) * by",
        "get(g + i, n, 0.f)",
        SCALED,
    ),
    # vec.h: AVX-512
    Mutation("the tail is a column longer", AVX512, V, "(1u << n) - 1", "(2u << n) - 1", FORWARD),
    Mutation("fma subtracts", AVX512, V, "_mm512_fmadd_ps", "_mm512_fmsub_ps", FORWARD),
    Mutation(
        "the maximum of a NaN is it",
        AVX512,
        V,
        "_mm512_max_ps(a.v, b.v)",
        "_mm512_max_ps(b.v, a.v)",
        BANNED["forward_kl"],
    ),
    Mutation(
        "NaN equals all",
        AVX512,
        V,
        "_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)",
        "_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_UQ)",
        NAN_TWICE,
    ),
    Mutation(
        "greater is less",
        AVX512,
        V,
        "_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)",
        "_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)",
        ONE_TEACHER_EXCLUDES,
    ),
    Mutation(
        "yes is no",
        AVX512,
        V,
        "_mm512_mask_blend_ps(m, no.v, yes.v)",
        "_mm512_mask_blend_ps(m, yes.v, no.v)",
        ROWS["forward_kl", BF16],
    ),
    Mutation("the lowest", AVX512, V, "_mm512_reduce_max_ps", "_mm512_reduce_min_ps", PEAKS),
    Mutation(
        "bf16 shifted too little",
        AVX512,
        V,
        "_mm512_cvtepu16_epi32(x), 16)",
        "_mm512_cvtepu16_epi32(x), 15)",
        WIDENED[BF16, 64],
    ),
    Mutation(
        "fp16 read as bf16",
        AVX512,
        V,
        "load(const fp16* p) { return _mm512_cvtph_ps(",
        "load(const fp16* p) { return widen16(",
        WIDENED[FP16, 64],
    ),
    Mutation(
        "an fp32 tail is full of zeros",
        AVX512,
        V,
        "_mm512_mask_loadu_ps(_mm512_set1_ps(other),",
        "_mm512_mask_loadu_ps(_mm512_setzero_ps(),",
        FORWARD,
    ),
    Mutation(
        "a bf16 tail is full of zeros",
        AVX512,
        V,
        "select(leading(n), widen16(_mm256_maskz_loadu_epi16(leading(n), p)), other)",
        "widen16(_mm256_maskz_loadu_epi16(leading(n), p))",
        ROWS["forward_kl", BF16],
    ),
    Mutation(
        "an fp16 tail read as bf16",
        AVX512,
        V,
        "_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(leading(n), p))",
        "widen16(_mm256_maskz_loadu_epi16(leading(n), p))",
        WIDENED[FP16, 3],
    ),
    Mutation(
        "bf16 is cut off",
        AVX512_BF16,
        V,
        "(__m256i)_mm512_cvtneps_pbh(x.v)",
        "_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.v), 16))",
        ROUNDED[BF16],
    ),
    Mutation(
        "bf16 ties go to odd",
        AVX512,
        V,
        "_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1)",
        "_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(0)",
        ROUNDED[BF16],
    ),
    Mutation(
        "bf16 NaNs are rounded",
        AVX512,
        V,
        "_mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000))",
        "up",
        ROUNDED[BF16],
    ),
    Mutation(
        "fp16 is cut off",
        AVX512,
        V,
        "_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT",
        "_mm512_cvtps_ph(x.v, _MM_FROUND_TO_ZERO",
        ROUNDED[FP16],
    ),
    Mutation(
        "a tail is written as a whole",
        AVX512,
        V,
        "_mm512_mask_storeu_ps(p, leading(n), x.v)",
        "_mm512_storeu_ps(p, x.v)",
        SCALED,
    ),
    Mutation(
        "fp16 is streamed as bf16",
        AVX512,
        V,
        "_mm256_stream_si256((__m256i*)p, to_fp16(x))",
        "_mm256_stream_si256((__m256i*)p, to_bf16(x))",
        STREAMED[FP16],
    ),
    Mutation(
        "the nearest whole number",
        AVX512,
        V,
        "_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF",
        "_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT",
        FORWARD,
    ),
    Mutation(
        "the nearest's fraction",
        AVX512,
        V,
        "_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF",
        "_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT",
        ROWS["forward_kl", BF16],
    ),
    Mutation("no power of two", AVX512, V, "_mm512_scalef_ps(a.v, x.v)", "a.v", FORWARD),
    Mutation(
        "an exponent from 1 on",
        AVX512,
        V,
        "_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3f3504f3)",
        "_mm512_castps_si512(x.v), _mm512_set1_epi32(0x3f800000)",
        JSD,
    ),
    Mutation(
        "a mantissa from 1 on",
        AVX512,
        V,
        "__m512i base = _mm512_set1_epi32(0x3f3504f3)",
        "__m512i base = _mm512_set1_epi32(0x3f800000)",
        JSD,
    ),
    Mutation(
        "a mantissa too short",
        AVX512,
        V,
        "_mm512_set1_epi32(0x7fffff)",
        "_mm512_set1_epi32(0x3fffff)",
        JSD,
    ),
    Mutation(
        "the first element is the highest",
        AVX512,
        V,
        "_mm512_cvtss_f32(a.v)",
        "highest(a)",
        FORWARD,
    ),
    # AVX2
    Mutation(
        "fma rounds twice",
        AVX2,
        V,
        "_mm256_fmadd_ps(a.v, b.v, c.v)",
        "_mm256_add_ps(_mm256_mul_ps(a.v, b.v), c.v)",
        DIGITS,
    ),
    Mutation(
        "the maximum of a NaN is it",
        AVX2,
        V,
        "_mm256_max_ps(a.v, b.v)",
        "_mm256_max_ps(b.v, a.v)",
        BANNED["reverse_kl"],
    ),
    Mutation(
        "the minimum of a NaN is no NaN",
        AVX2,
        V,
        "_mm256_min_ps(a.v, b.v)",
        "_mm256_min_ps(b.v, a.v)",
        NAN_HALF["teacher"],
    ),
    Mutation(
        "NaN equals all",
        AVX2,
        V,
        "_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)",
        "_mm256_cmp_ps(a.v, b.v, _CMP_EQ_UQ)",
        NAN_TWICE,
    ),
    Mutation(
        "greater is less",
        AVX2,
        V,
        "_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)",
        "_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)",
        ONE_TEACHER_EXCLUDES,
    ),
    Mutation("both is either", AVX2, V, "_mm256_and_ps(a, b)", "_mm256_or_ps(a, b)", INFINITE_MSE),
    Mutation(
        "yes is no",
        AVX2,
        V,
        "_mm256_blendv_ps(no.v, yes.v, m)",
        "_mm256_blendv_ps(yes.v, no.v, m)",
        FORWARD,
    ),
    Mutation("the lowest", AVX2, V, "most = y > most ?", "most = y < most ?", PEAKS),
    Mutation(
        "bf16 shifted too little",
        AVX2,
        V,
        "_mm256_slli_epi32(x, 16)",
        "_mm256_slli_epi32(x, 15)",
        WIDENED[BF16, 64],
    ),
    Mutation(
        "bf16 ties go to odd",
        AVX2,
        V,
        "_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1)",
        "_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(0)",
        ROUNDED[BF16],
    ),
    Mutation(
        "bf16 NaNs are rounded",
        AVX2,
        V,
        "_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan)",
        "up",
        ROUNDED[BF16],
    ),
    Mutation(
        "bf16 out of order",
        AVX2,
        V,
        "_mm256_packus_epi32(up, up), 0xd8)",
        "_mm256_packus_epi32(up, up), 0xe4)",
        ROWS["forward_kl", BF16],
    ),
    Mutation(
        "fp16 is cut off",
        AVX2,
        V,
        "_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT",
        "_mm256_cvtps_ph(x.v, _MM_FROUND_TO_ZERO",
        ROUNDED[FP16],
    ),
    Mutation(
        "bf16 is streamed as fp16",
        AVX2,
        V,
        "_mm_stream_si128((__m128i*)p, to_bf16(x))",
        "_mm_stream_si128((__m128i*)p, to_fp16(x))",
        STREAMED[BF16],
    ),
    Mutation(
        "2^-inf is not 0",
        AVX2,
        V,
        "max(-126.5f, x)); }\ninline Vec whole(Vec x) {\n    return _mm256",
        "max(-125.5f, x)); }\ninline Vec whole(Vec x) {\n    return _mm256",
        BANNED["reverse_kl"],
    ),
    Mutation(
        "the nearest whole number",
        AVX2,
        V,
        "_mm256_round_ps(x.v, _MM_FROUND_TO_NEG_INF",
        "_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT",
        EXPONENTIAL[BF16],
    ),
    Mutation(
        "another bias of the exponent",
        AVX2,
        V,
        "_mm256_cvtps_epi32(whole(x).v), _mm256_set1_epi32(127)",
        "_mm256_cvtps_epi32(whole(x).v), _mm256_set1_epi32(126)",
        FORWARD,
    ),
    Mutation(
        "an exponent from 1 on",
        AVX2,
        V,
        "_mm256_castps_si256(x.v), _mm256_set1_epi32(0x3f3504f3)",
        "_mm256_castps_si256(x.v), _mm256_set1_epi32(0x3f800000)",
        LOGARITHM,
    ),
    Mutation(
        "a mantissa too short",
        AVX2,
        V,
        "_mm256_set1_epi32(0x7fffff)",
        "_mm256_set1_epi32(0x3fffff)",
        LOGARITHM,
    ),
    Mutation(
        "the first element is the highest", AVX2, V, "_mm256_cvtss_f32(a.v)", "highest(a)", FORWARD
    ),
    # any machine
    Mutation("fma subtracts", PLAIN, V, "a.v * b.v + c.v", "a.v * b.v - c.v", FORWARD),
    Mutation(
        "the exact fma subtracts",
        PLAIN,
        V,
        "x * y + __builtin_convertvector",
        "x * y - __builtin_convertvector",
        FORWARD,
    ),
    Mutation(
        "the exact fma rounds twice",
        PLAIN,
        V,
        "inline Vec exact_fma(Vec a, Vec b, Vec c) {  //",
        "inline Vec exact_fma(Vec a, Vec b, Vec c) { return fma(a, b, c); //",
        DIGITS,
    ),
    Mutation(
        "the maximum of a NaN is it",
        PLAIN,
        V,
        "a.v > b.v ? a.v : b.v; }\ninline Vec min",
        "a.v < b.v ? b.v : a.v; }\ninline Vec min",
        BANNED["forward_kl"],
    ),
    Mutation(
        "the minimum of a NaN is no NaN",
        PLAIN,
        V,
        "return a.v < b.v ? a.v : b.v",
        "return a.v > b.v ? b.v : a.v",
        NAN_HALF["student"],
    ),
    Mutation(
        "NaN equals all",
        PLAIN,
        V,
        "return a.v == b.v",
        "return ~((a.v < b.v) | (a.v > b.v))",
        NAN_TWICE,
    ),
    Mutation(
        "greater is less",
        PLAIN,
        V,
        "Mask greater(Vec a, Vec b) { return a.v > b.v",
        "Mask greater(Vec a, Vec b) { return a.v < b.v",
        ONE_TEACHER_EXCLUDES,
    ),
    Mutation("yes is no", PLAIN, V, "return m ? yes.v : no.v", "return m ? no.v : yes.v", FORWARD),
    Mutation("the highest of two", PLAIN, V, "return x > y ? x : y;", "return x;", PEAKS),
    Mutation("the second element first", PLAIN, V, "return a.v[0];", "return a.v[1];", FORWARD),
    Mutation(
        "infinite fp16 is 65536",
        PLAIN,
        V,
        "magnitude >= 0x7c00 ? other : finite",
        "finite",
        WIDENED[FP16, 64],
    ),
    Mutation(
        "bf16 ties go to odd",
        PLAIN,
        V,
        "const Bits rounded = (bits + 0x7fff + (bits >> 16 & 1))",
        "const Bits rounded = (bits + 0x7fff)",
        ROUNDED[BF16],
    ),
    Mutation(
        "bf16 NaNs are rounded", PLAIN, V, "x.v == x.v ? rounded : nan", "rounded", ROUNDED[BF16]
    ),
    Mutation(
        "fp16 ties go to odd",
        PLAIN,
        V,
        "Bits half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1))",
        "Bits half = (magnitude - 0x38000000 + 0xfff)",
        ROUNDED[FP16],
    ),
    Mutation(
        "fp16 has no subnormals",
        PLAIN,
        V,
        "half = magnitude < 0x38800000 ? subnormal : half;",
        "",
        ROUNDED[FP16],
    ),
    Mutation(
        "fp16 does not overflow",
        PLAIN,
        V,
        "half = magnitude >= 0x477ff000 ?",
        "half = magnitude >= 0x48000000 ?",
        ROUNDED[FP16],
    ),
    Mutation(
        "fp16 has no NaN",
        PLAIN,
        V,
        "half = magnitude > 0x7f800000 ?",
        "half = magnitude > 0x7fffffff ?",
        ROUNDED[FP16],
    ),
    Mutation(
        "2^200 is negative",
        PLAIN,
        V,
        "min(128.5f, max(-126.5f, x)); }\n//",
        "min(130.5f, max(-126.5f, x)); }\n//",
        FAR[1.0, "student"],
    ),
    Mutation(
        "NaN is 2^-126.5",
        PLAIN,
        V,
        "max(-126.5f, x)); }\n//",
        "max(x, -126.5f)); }\n//",
        NAN_HALF["student"],
    ),
    Mutation(
        "the nearest whole number",
        PLAIN,
        V,
        "return (x.v - 0.5f + 0x1.8p23f) - 0x1.8p23f",
        "return (x.v + 0x1.8p23f) - 0x1.8p23f",
        FORWARD,
    ),
    Mutation(
        "another bias of the exponent", PLAIN, V, "0x1.8p23f) + 127;", "0x1.8p23f) + 126;", FORWARD
    ),
    Mutation("an exponent a bit short", PLAIN, V, "0x3f3504f3) >> 23", "0x3f3504f3) >> 24", JSD),
    Mutation(
        "a mantissa from 1 on", PLAIN, V, "0x7fffff) + 0x3f3504f3", "0x7fffff) + 0x3f800000", JSD
    ),
    # one element, and the tails without AVX-512
    Mutation(
        "one bf16 shifted too little",
        AVX2,
        V,
        "as_float(uint32_t(x.bits) << 16)",
        "as_float(uint32_t(x.bits) << 15)",
        WIDENED[BF16, 3],
    ),
    Mutation(
        "one fp16 is half of itself",
        AVX2,
        V,
        "as_float(magnitude << 13) * 0x1p112f",
        "as_float(magnitude << 13) * 0x1p111f",
        WIDENED[FP16, 3],
    ),
    Mutation(
        "one infinite fp16 is 65536",
        PLAIN,
        V,
        "if (magnitude >= 0x7c00)",
        "if (magnitude > 0x7c00)",
        WIDENED[FP16, 3],
    ),
    Mutation(
        "one NaN of bf16 is rounded",
        AVX512,
        V,
        "if (x != x) {",
        "if (false) {",
        LABEL_ROUNDED[BF16],
    ),
    Mutation(
        "one bf16's ties go to odd",
        AVX2,
        V,
        "uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)",
        "uint16_t((bits + 0x7fff) >> 16)",
        LABEL_ROUNDED[BF16],
    ),
    Mutation(
        "one fp16's ties go to odd",
        AVX512,
        V,
        "uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))",
        "uint16_t(sign | ((magnitude - 0x38000000 + 0xfff) >> 13))",
        LABEL_ROUNDED[FP16],
    ),
    Mutation(
        "one subnormal fp16 is cut off",
        PLAIN,
        V,
        "as_bits(as_float(magnitude) + 0.5f)",
        "as_bits(as_float(magnitude) + 0.25f)",
        LABEL_ROUNDED[FP16],
    ),
    Mutation(
        "one fp16 is subnormal too late",
        AVX2,
        V,
        "} else if (magnitude < 0x38800000) {",
        "} else if (magnitude < 0x38000000) {",
        LABEL_ROUNDED[FP16],
    ),
    Mutation(
        "one fp16 overflows too late",
        AVX512,
        V,
        "} else if (magnitude >= 0x477ff000) {",
        "} else if (magnitude >= 0x48000000) {",
        LABEL_ROUNDED[FP16],
    ),
    Mutation(
        "one NaN of fp16 is infinite",
        AVX2,
        V,
        "to.bits = uint16_t(sign | 0x7e00);",
        "to.bits = uint16_t(sign | 0x7c00);",
        LABEL_ROUNDED[FP16],
    ),
    Mutation("a tail reads one column more", AVX2, V, "x[i] = i < n ?", "x[i] = i <= n ?", FORWARD),
    Mutation(
        "a tail writes one column more", PLAIN, V, "n * sizeof(E))", "(n + 1) * sizeof(E))", SCALED
    ),
    # the polynomials
    Mutation("2^x: the 5th", AVX512, V, "1.86713008e-3f", "1.86813008e-3f", EXPONENTIAL[BF16]),
    Mutation("2^x: the 3rd", PLAIN, V, "5.57999131e-2f", "5.58099131e-2f", EXPONENTIAL[BF16]),
    Mutation("2^x: the 1st", AVX2, V, "6.93151312e-1f", "6.93251312e-1f", EXPONENTIAL[BF16]),
    Mutation("fp32's 2^x: the 6th", PLAIN, V, "2.1612915e-4f", "2.1712915e-4f", EXPONENTIAL[FP32]),
    Mutation("fp32's 2^x: the 4th", AVX2, V, "9.67545157e-3f", "9.67645157e-3f", EXPONENTIAL[FP32]),
    Mutation(
        "fp32's 2^x: the 2nd", AVX512, V, "2.40229306e-1f", "2.40329306e-1f", EXPONENTIAL[FP32]
    ),
    Mutation("fp32's 2^x: the 1st", AVX2, V, "6.93147044e-1f", "6.93247044e-1f", EXPONENTIAL[FP32]),
    Mutation("log2: the 9th", PLAIN, V, "1.25836446e-1f", "1.35836446e-1f", LOGARITHM),
    Mutation("log2: the 6th", AVX2, V, "-2.38944867e-1f", "-2.39944867e-1f", LOGARITHM),
    Mutation("log2: the 2nd", AVX512, V, "-7.21347347e-1f", "-7.21447347e-1f", LOGARITHM),
    Mutation("log2: the 1st", AVX2, V, "1.442695f", "1.443695f", LOGARITHM),
    # dispatch.cpp, level.h and the enumerations of distilfast.h
    Mutation(
        "AVX-512 is AVX2",
        AVX512,
        "dispatch.cpp",
        "case DISTILFAST_AVX512: return function##_avx512(",
        "case DISTILFAST_AVX512: return function##_avx2(",
        SCALED,
    ),
    Mutation(
        "AVX-512 with bf16 is that without",
        AVX512_BF16,
        "dispatch.cpp",
        "IF_BF16(function##_avx512bf16(",
        "IF_BF16(function##_avx512(",
        SCALED,
    ),
    Mutation(
        "AVX2 is any machine's",
        AVX2,
        "dispatch.cpp",
        "return function##_avx2(",
        "return function##_plain(",
        SCALED,
    ),
    Mutation(
        "a level beyond the best",
        PLAIN,
        "dispatch.cpp",
        "level < 0 || level > distilfast_best_level()",
        "level < 0",
        UNKNOWN_LEVEL,
    ),
    Mutation(
        "a level below the first",
        PLAIN,
        "dispatch.cpp",
        "level < 0 || level >",
        "level >",
        UNKNOWN_LEVEL,
    ),
    Mutation(
        "AVX-512 with bf16 is not the best",
        AVX512_BF16,
        "dispatch.cpp",
        "? DISTILFAST_AVX512BF16 :",
        "? DISTILFAST_AVX2 :",
        BEST_LEVEL,
    ),
    Mutation(
        "scaling does nothing", AVX2, "level.h", "return scale(*a, threads);", "return 0;", SCALED
    ),
    Mutation(
        "dtypes in another order",
        PLAIN,
        "distilfast.h",
        "DISTILFAST_BF16, DISTILFAST_FP16 }",
        "DISTILFAST_FP16, DISTILFAST_BF16 }",
        ROWS["forward_kl", BF16],
    ),
    Mutation(
        "divergences in another order",
        AVX512,
        D,
        "FORWARD_KL = DISTILFAST_FORWARD_KL,\n    REVERSE_KL = DISTILFAST_REVERSE_KL,",
        "FORWARD_KL = DISTILFAST_REVERSE_KL,\n    REVERSE_KL = DISTILFAST_FORWARD_KL,",
        FORWARD,
    ),
    Mutation(
        "labels alone never look for a maximum",
        AVX2,
        D,
        "power > 1 || l_1",
        "power || l_1",
        LABELS_ALONE,
    ),
    # cpp.py
    Mutation(
        "fp16 for bf16",
        AVX2,
        L,
        "torch.bfloat16: 1, torch.float16: 2",
        "torch.bfloat16: 2, torch.float16: 1",
        ROWS["forward_kl", BF16],
    ),
    Mutation(
        "JSD for reverse KL",
        PLAIN,
        L,
        '"reverse_kl": 2, "jsd": 3',
        '"reverse_kl": 3, "jsd": 2',
        REVERSE,
    ),
    Mutation(
        "teacher and student change places",
        AVX512,
        L,
        "        _matrix(student),\n        _matrix(teacher),",
        "        _matrix(teacher),\n        _matrix(student),",
        FORWARD,
    ),
    Mutation(
        "every row is the first",
        AVX2,
        L,
        "_Matrix(x.data_ptr(), x.stride(0),",
        "_Matrix(x.data_ptr(), 0,",
        FORWARD,
    ),
    Mutation(
        "rows are taken for dense",
        PLAIN,
        L,
        "return x if x.stride(1) == 1 else x.contiguous()",
        "return x",
        ANY_STRIDE,
    ),
    Mutation(
        "vectors are taken for dense",
        AVX512,
        L,
        "return None if x is None else x.to(dtype).contiguous()",
        "return x",
        ANY_STRIDE,
    ),
    Mutation(
        "every row takes the first scale",
        AVX2,
        L,
        "int(x.stride(0)) if x.ndim else 0",
        "0",
        FORWARD,
    ),
    Mutation(
        "the mask is kd's scale",
        PLAIN,
        L,
        "        _pointer(mask),\n        _pointer(kd_scale),",
        "        _pointer(kd_scale),\n        _pointer(mask),",
        FORWARD,
    ),
    Mutation(
        "the divisors change places",
        AVX512,
        L,
        "        _pointer(kd_scale),\n        _pointer(ce_scale),",
        "        _pointer(ce_scale),\n        _pointer(kd_scale),",
        DIVISORS,
    ),
    Mutation(
        "the padding is part of the vocabulary",
        AVX2,
        L,
        "        options.vocab_size,\n        student.shape[1],",
        "        student.shape[1],\n        student.shape[1],",
        FORWARD,
    ),
    Mutation(
        "the padding is nothing's",
        PLAIN,
        L,
        "        options.vocab_size,\n        student.shape[1],",
        "        options.vocab_size,\n        options.vocab_size,",
        FORWARD,
    ),
    Mutation(
        "labels are ignored at -100",
        AVX512,
        L,
        "        options.ignore_index,",
        "        -100,",
        ANY_IGNORE_INDEX,
    ),
    Mutation(
        "a divergence of weight 0",
        AVX2,
        L,
        "DIVERGENCES[options.divergence] if options.kd_weight else 0",
        "DIVERGENCES[options.divergence]",
        NO_KD,
    ),
    Mutation(
        "T for kd's weight",
        PLAIN,
        L,
        "        options.temperature,\n        options.kd_weight,",
        "        options.kd_weight,\n        options.temperature,",
        FORWARD,
    ),
    Mutation(
        "cos and MSE change weights",
        AVX512,
        L,
        "        options.cos_weight,\n        options.mse_weight,",
        "        options.mse_weight,\n        options.cos_weight,",
        FORWARD,
    ),
    # what a fused head leaves to the kernels
    Mutation("tanh is a line", AVX512, D, "fma(p * y2, y, y)", "y", SOFTCAP),
    Mutation(
        "tanh cancels",
        PLAIN,
        D,
        "greater(y2, 0.0625f), far, near",
        "equal(y, y), far, near",
        SOFTCAP,
    ),
    Mutation(
        "the scale is under no cap",
        AVX2,
        D,
        "tanh(x * scale * Vec(inverse))",
        "tanh(x * Vec(inverse))",
        HEAD["both"],
    ),
    Mutation(
        "the gradient has no scale",
        AVX512,
        D,
        "- cosine, 1.f) * scale",
        "- cosine, 1.f)",
        HEAD["scale"],
    ),
    Mutation(
        "the gradient does not bend",
        PLAIN,
        D,
        "softcap != 0 ? y * inverse : Vec(0.f)",
        "0.f",
        HEAD["softcap"],
    ),
    Mutation(
        "a scale alone is nothing",
        AVX2,
        D,
        "return scale == 1 && softcap == 0;",
        "return softcap == 0;",
        HEAD["scale"],
    ),
    Mutation(
        "the label's gradient does not bend",
        AVX512,
        D,
        "at_label *= first(head.slope(widen(s[label])));",
        ";",
        HEAD["softcap"],
    ),
    Mutation(
        "no other gradient bends",
        AVX2,
        D,
        "x = x * head.slope(get(s + i, n, 0.f));",
        ";",
        HEAD["softcap"],
    ),
    Mutation(
        "the label has no bias gradient of its own",
        PLAIN,
        D,
        "if (sums) sums[label] = sum_at_label + at_label;",
        ";",
        HEAD["bias"],
    ),
    Mutation(
        "the label's bias gradient begins anew",
        AVX512,
        D,
        "sum_at_label + at_label;",
        "at_label;",
        HEAD["bias"],
    ),
    Mutation(
        "a block's bias gradient is its last row's",
        AVX2,
        D,
        "if (r % block == 0) memset",
        "memset",
        HEAD["bias"],
    ),
    Mutation(
        "the bias gradient is the last block's",
        AVX512,
        D,
        "sum = sum + load(sums",
        "sum = load(sums",
        BIAS_OF_MANY_ROWS,
    ),
    Mutation(
        "the bias gradient is not added to",
        PLAIN,
        D,
        "get(to + start + i, n, 0.f) + sum",
        "sum",
        BIAS_OF_MANY_ROWS,
    ),
    Mutation(
        "one head for both sides",
        AVX2,
        D,
        "a.n_cols, teacher_head, wide_t",
        "a.n_cols, student_head, wide_t",
        HEAD["both"],
    ),
    Mutation(
        "one bias for both sides",
        AVX512,
        D,
        "a.teacher.stride, teacher_head.bias}",
        "a.teacher.stride, student_head.bias}",
        HEAD["bias"],
    ),
    Mutation(
        "the biases of other dtypes",
        AVX2,
        D,
        "a.student.dtype == DISTILFAST_FP32 &&",
        "true &&",
        HEAD_MIXED,
    ),
    Mutation(
        "a cap without its bias",
        PLAIN,
        D,
        "head.bias ? product + get(head.bias + i, n, 0.f) : product",
        "product",
        HEAD["all"],
    ),
    Mutation(
        "no bias",
        AVX2,
        R,
        "get(x.p, n, other) + get(x.bias, n, 0.f)",
        "get(x.p, n, other)",
        HEAD["bias"],
    ),
    Mutation(
        "the label has no bias", AVX512, R, "widen(p[i]) + bias[i]", "widen(p[i])", HEAD["bias"]
    ),
    Mutation(
        "the first columns' bias for all",
        AVX512_BF16,
        R,
        "{p + i, bias + i}",
        "{p + i, bias}",
        HEAD["bias"],
    ),
    Mutation(
        "shares are not added",
        AVX2,
        A,
        "a.begun ? get(total + i, n, 0.f) + share : share",
        "share",
        ACCUMULATED,
    ),
    Mutation(
        "the first share is added to what is there",
        AVX512,
        A,
        "a.begun ? get(total + i, n, 0.f) + share : share",
        "get(total + i, n, 0.f) + share",
        ACCUMULATED,
    ),
    Mutation(
        "rows of the sum lie side by side",
        PLAIN,
        A,
        "r * a.stride_total",
        "r * a.n_cols",
        ACCUMULATED,
    ),
    Mutation(
        "heads change sides",
        PLAIN,
        L,
        "for scale, softcap, bias in heads)",
        "for scale, softcap, bias in heads[::-1])",
        HEAD["both"],
    ),
    Mutation("beta is 1/2", AVX2, L, "        options.jsd_beta,", "        0.5,", JSD),
    Mutation("hidden: the sum over layers", PLAIN, L, "1 / len(student)", "1", HIDDEN_LAYERS),
    Mutation(
        "hidden: every layer's gradient is the first's",
        AVX512,
        L,
        "gradients[layer] if gradients",
        "gradients[0] if gradients",
        LAYERS_ALIKE,
    ),
    Mutation(
        "hidden: rows begin at 1",
        AVX2,
        L,
        "losses = torch.zeros(",
        "losses = torch.ones(",
        HIDDEN_FP32,
    ),
    Mutation(
        "silent teachers are heard", PLAIN, L, "strict=True) if w]", "strict=True)]", SILENT_TEACHER
    ),
    Mutation(
        "probabilities for logits", AVX512, L, 'mode == "probability"', 'mode == "logit"', BY_LOGIT
    ),
    Mutation("z is dense", AVX2, L, "        z.stride(0),", "        vocab_size,", BY_LOGIT),
    Mutation(
        "factors of any dtype",
        PLAIN,
        L,
        "by.to(torch.float32).contiguous()",
        "by.contiguous()",
        ANY_FACTOR,
    ),
    Mutation(
        "another level than asked for",
        AVX2,
        L,
        'os.environ.get("DISTILFAST_CPU_LEVEL") or best_level()',
        "best_level()",
        ASKED_FOR,
    ),
    # near the teacher
    Mutation(
        "small divergences are differences",
        AVX2,
        D,
        "if (bits < SMALL) bits = add_small<FORWARD_KL>",
        "if (bits < -1) bits = add_small<FORWARD_KL>",
        NEAR["forward_kl", 1e-3],
    ),
    Mutation(
        "small reverse divergences are differences",
        PLAIN,
        D,
        "if (bits < SMALL) bits = add_small<REVERSE_KL>",
        "if (bits < -1) bits = add_small<REVERSE_KL>",
        NEAR["reverse_kl", 1e-3],
    ),
    Mutation(
        "small mixtures are differences",
        AVX2,
        D,
        "if (bits < SMALL) bits = add_small<JSD>",
        "if (bits < -1) bits = add_small<JSD>",
        NEAR["jsd", 1e-3],
    ),
    Mutation(
        "phi is a square",
        PLAIN,
        D,
        "p = fma(p, x, 1.6666667e-1f);\n    p = fma(p, x, 5e-1f);",
        "p = 5e-1f;",
        NEAR["forward_kl", 0.15],
    ),
    Mutation(
        "psi is a square",
        AVX2,
        D,
        "p = fma(p, x, -3.3333333e-1f);\n    p = fma(p, x, 5e-1f);",
        "p = 5e-1f;",
        NEAR["jsd", 0.15],
    ),
    Mutation(
        "the sums' ratio is not in d",
        AVX512,
        D,
        "::log(row.l_s / row.l_t) + (tops",
        "(tops",
        NEAR["forward_kl", 0.15],
    ),
    Mutation(
        "the maxima are not in d",
        AVX2,
        D,
        "logit_t - Vec(offset)",
        "logit_t",
        NEAR["forward_kl", 0.15],
    ),
    Mutation(
        "small KL leaves out what is far",
        AVX2,
        D,
        "e_s - e_t - e_t * d)",
        "Vec(0.f))",
        FAR_COLUMNS["forward_kl"],
    ),
    Mutation(
        "small reverse KL leaves out what is far",
        PLAIN,
        D,
        "fma(e_s, d, e_t - e_s))",
        "Vec(0.f))",
        FAR_COLUMNS["reverse_kl"],
    ),
    Mutation(
        "small JSD forgets the mixture",
        AVX2,
        D,
        "fma(e_t, far_t, mixture - e_t)",
        "e_t * far_t",
        FAR_COLUMNS["jsd"],
    ),
    Mutation(
        "small JSD takes a vector for near",
        AVX2,
        D,
        "if (!all(near))",
        "if (false)",
        FAR_COLUMNS["jsd"],
    ),
    Mutation(
        "all: of AVX2 is any",
        AVX2,
        V,
        "_mm256_movemask_ps(m) == 0xff",
        "_mm256_movemask_ps(m) != 0",
        FAR_COLUMNS["jsd"],
    ),
    Mutation(
        "all: of the plain vectors is the first",
        PLAIN,
        V,
        "m[0] && m[1] && m[2] && m[3]",
        "m[0]",
        FAR_COLUMNS["jsd"],
    ),
    Mutation(
        "small JSD takes what the mixture's sweep left",
        PLAIN,
        D,
        "KD == JSD ? exponential",
        "KD == NO_KD ? exponential",
        NEAR["jsd", 0.15],
    ),
    Mutation(
        "small KL's gradient is off by the constant",
        AVX2,
        D,
        "row.keep = float(-off)",
        "row.keep = 1",
        NEAR["forward_kl", 1e-3],
    ),
    Mutation(
        "small reverse KL's gradient has no mean",
        PLAIN,
        D,
        "row.mean = float(LOG2_E * (a.total() / row.l_s + off));",
        "row.mean = 0;",
        NEAR["reverse_kl", 0.15],
    ),
    Mutation(
        "small reverse KL's gradient is the large one's",
        AVX2,
        D,
        "row.small\n                              ? load(scratch.e_t + i)",
        "false\n                              ? load(scratch.e_t + i)",
        NEAR["reverse_kl", 1e-3],
    ),
    Mutation(
        "no bound of d",
        AVX2,
        D,
        "min(max(apart, -1024.f), 1024.f)",
        "apart",
        EXCLUDED,
    ),
    Mutation(
        "entropy of the sums alone",
        AVX2,
        D,
        "::log2(row.l_s) - h_s.total() / row.l_s",
        "::log2(row.l_s)",
        COUNTED,
    ),
    Mutation(
        "the teacher's entropy is the student's",
        PLAIN,
        D,
        "::log2(row.l_t) - h_t.total() / row.l_t",
        "::log2(row.l_s) - h_s.total() / row.l_s",
        COUNTED,
    ),
    Mutation(
        "the last of equal columns",
        AVX2,
        R,
        "columns[j] < columns[best])",
        "columns[j] > columns[best])",
        FIRST_OF_EQUALS,
    ),
    Mutation(
        "a column is its vector's first",
        PLAIN,
        R,
        "columns[j] += float(j);",
        "columns[j] += 0;",
        FIRST_OF_EQUALS,
    ),
    Mutation(
        "padding is zeroed over logits that are still to be read",
        AVX2,
        D,
        "    Row row;\n    const double temperature",
        "    for (int64_t i = n_cols; g && i < a.n_padded; i++) narrow(g[i], 0.f);\n"
        "    Row row;\n    const double temperature",
        OVER_LOGITS,
    ),
    # product.h
    Mutation(
        "the last of an odd depth is left out",
        AVX512_BF16,
        P,
        "if (depth % 2) add",
        "if (false) add",
        PRODUCT,
    ),
    Mutation(
        "the bias of the first panel",
        AVX512_BF16,
        P,
        "a.bias ? a.bias + column : nullptr",
        "a.bias",
        PRODUCT,
    ),
    Mutation(
        "the first rows for all",
        AVX512_BF16,
        P,
        "a.hidden.data + r * a.hidden.stride",
        "a.hidden.data",
        PRODUCT,
    ),
    Mutation(
        "a transposition of lanes",
        AVX512_BF16,
        P,
        "x[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0x88);",
        "x[4 + c] = _mm512_shuffle_i32x4(odd_low, odd_high, 0xdd);",
        PRODUCT,
    ),
    Mutation(
        "a tile is written too far",
        AVX512_BF16,
        P,
        "store(at, tile[i][j], left);",
        "store(at, tile[i][j]);",
        PRODUCT,
    ),
]


# --- The mutated code in place of the real -----------------------------------------------

KERNELS = {
    "distillation": "distillation",
    "hidden_cosine": "cosine",
    "combine_teachers": "ensemble",
    "scale": "scale",
    "accumulate": "accumulate",
    "product": "product",
}


@functools.cache
def flags_of_levels() -> dict[str, list[str]]:
    """setup.py's, which builds nothing while its setup() does nothing."""
    setuptools = pytest.importorskip("setuptools")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setattr(setuptools, "setup", lambda **_: None)
        return runpy.run_path(str(ROOT / "setup.py"))["LEVELS"]


def skip_without(level: str, compiler: bool = True) -> None:
    reason = backends.unavailable("cpp")
    if reason is not None:
        pytest.skip(reason)
    if level not in cpu_levels():
        pytest.skip(f"this machine has no {level}")
    if compiler and shutil.which("g++") is None:
        pytest.skip("no g++")


def library_of(sources: Path, level: str) -> Path:
    """A library of one instruction set, in which the others' functions do nothing."""
    levels = sorted(path.stem for path in sources.glob("*.cpp"))
    others = [
        f"int {name}_{other}(const distilfast_{kind}_args*, int) {{ return 0; }}"
        for other in levels
        if other not in (level, "dispatch")
        for name, kind in KERNELS.items()
    ]
    others = ['#include "distilfast.h"', *others]
    (sources / "others.cpp").write_text("\n".join(others) + "\n", encoding="utf-8")
    library = sources / "mutated.so"
    command = [
        "g++",
        "-O0",
        "-ffp-contract=off",
        "-std=c++17",
        "-fPIC",
        "-fopenmp",
        "-fvisibility=hidden",
        "-w",
    ]
    command += ["-shared", *flags_of_levels()[level], "-o", str(library)]
    command += [str(sources / f"{name}.cpp") for name in (level, "dispatch", "others")]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    if compiled.returncode:
        pytest.fail(f"malformed, it does not compile: {compiled.stderr[:2000]}")
    return library


def forget_library() -> None:
    cpp._library.cache_clear()
    cpp.best_level.cache_clear()


@contextmanager
def instead(file: str, folder: Path, level: str) -> Iterator[None]:
    """The launcher or the library made from this folder, and only this level."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DISTILFAST_CPU_LEVEL", level)
        if file == L:
            patch.setitem(sys.modules, cpp.__name__, cpp)  # so that it comes back
            module = load(cpp.__name__, folder / L)
            patch.setattr(module, "LIBRARY", cpp.LIBRARY)
            patch.setattr(distilfast_kernels, "cpp", module)
        else:
            patch.setattr(cpp, "LIBRARY", library_of(folder, level))
        forget_library()
        try:
            yield
        finally:
            forget_library()


WITH_HALVES = (
    test_nan_of_halves_makes_its_row_nan,
    test_padding_beside_logits_that_their_gradient_overwrites_is_zeroed,
)


def takes_halves(calls: Call) -> bool:
    flat = torch.utils._pytree.tree_leaves(calls.arguments)
    return any(x in (BF16, FP16) for x in flat) or calls.test in WITH_HALVES


def copy_of(file: str, folder: Path, halves_too: bool) -> Path:
    """Where fp32 is all that a call needs, only that is compiled: in a third of the time."""
    if file == L:
        shutil.copy(cpp.__file__, folder)
        return folder
    shutil.copytree(SOURCES, folder / "csrc")
    if not halves_too:
        path = folder / "csrc" / R
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        left = [
            x
            for x in lines
            if "case DISTILFAST_BF16:" not in x and "case DISTILFAST_FP16:" not in x
        ]
        assert len(left) == len(lines) - 2
        path.write_text("".join(left), encoding="utf-8")
    return folder / "csrc"


def mutate(mutation: Mutation, folder: Path) -> None:
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.old!r} is not in {mutation.file} exactly once"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda x: f"{x.level}-{x.file}-{x.name}")
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    folder = copy_of(mutation.file, tmp_path, takes_halves(mutation.caught_by))
    mutate(mutation, folder)
    skip_without(mutation.level, compiler=mutation.file != L)
    with instead(mutation.file, folder, mutation.level):
        try:
            mutation.caught_by("cpp")
        except AssertionError:
            return
        except Exception as error:
            pytest.fail(f"malformed, it raises {error!r}")
    pytest.fail(f"{mutation.caught_by.test.__name__} did not notice")


@pytest.mark.parametrize("level", cpp.LEVELS)
@pytest.mark.parametrize(
    ("file", "halves_too"), [(L, True), (V, True), (V, False)], ids=["cpp.py", "all", "fp32"]
)
def test_unmutated_copy_passes_the_same_calls(
    file: str, halves_too: bool, level: str, tmp_path: Path
) -> None:
    skip_without(level, compiler=file != L)
    calls = {
        repr(x.caught_by): x.caught_by
        for x in MUTATIONS
        if x.level == level and (x.file == L) == (file == L)
    }
    with instead(file, copy_of(file, tmp_path, halves_too), level):
        for caught_by in calls.values():
            if halves_too or not takes_halves(caught_by):
                caught_by("cpp")
    # and the real ones are back
    assert sys.modules[cpp.__name__] is distilfast_kernels.cpp is cpp
    assert cpp._library()._name == str(cpp.LIBRARY)
