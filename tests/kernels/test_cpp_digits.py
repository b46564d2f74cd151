"""The digits of the C++ kernels: conversions, exponentials, logarithms, and rows whose maximum is
not among their first columns. No other test looks at them so closely.

Left out are bf16's subnormals, of which AVX-512's own conversion makes 0.
"""

from __future__ import annotations

import pytest
import torch
from kernel_calls import calls_of
from oracle import BF16, FP16, FP32, INF, assert_same, combined_rows, expect, logits_pair
from torch import Tensor

from distilfast.losses import backends

launch, check_launch, *_ = calls_of("cpp")
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])
halves = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])


# --- Conversions ---------------------------------------------------------------------------------

TINY_BF16 = 2.0**-126  # below it AVX-512's own conversion gives 0


def without_gradient_of_columns(n_rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two columns of which the second has the label and no probability: CE's gradient there is
    minus the row's scale, whatever it is, and the first one's is the scale."""
    student = torch.tensor([[0.0, -INF]]).to(dtype).repeat(n_rows, 1)
    return student, torch.ones(n_rows, dtype=torch.int64), torch.empty_like(student)


@pytest.mark.parametrize("n_cols", [64, 3], ids=["vectors", "tails"])
@halves
def test_every_half_is_widened_exactly(level: str, dtype: torch.dtype, n_cols: int) -> None:
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
def test_rounding_is_to_nearest_even(level: str, dtype: torch.dtype) -> None:
    by = hard_to_round(dtype)
    gradient = torch.ones(len(by), 21, dtype=dtype)
    backends.BACKENDS["cpp"].scale([gradient], by)
    assert_same([gradient], [by.to(dtype)[:, None].expand(-1, 21)])


@halves
def test_label_column_is_rounded_to_nearest_even(level: str, dtype: torch.dtype) -> None:
    by = hard_to_round(dtype)
    by = by[~by.isinf()]
    student, labels, gradient = without_gradient_of_columns(len(by), dtype)
    launch(student, student, labels, gradient=gradient, scale=by, kd_weight=0.0, ce_weight=1.0)
    assert_same([gradient[:, 1]], [-by.to(dtype)])


# --- Exponentials, logarithms and the range of a row ---------------------------------------------


@every_dtype
def test_exponential_is_as_exact_as_fp32(level: str, dtype: torch.dtype) -> None:
    # ln(1 + e^x) of two columns, x over an octave: the gradient's budget would take much more
    second = (-torch.arange(0, 178) / 256).to(dtype)
    student = torch.stack([torch.zeros_like(second), second], 1)
    labels = torch.zeros(len(second), dtype=torch.int64)
    _, ce, _, _ = launch(student, student, labels, kd_weight=0.0, ce_weight=1.0)
    wanted = torch.log1p(second.double().exp())
    torch.testing.assert_close(ce.double(), wanted, rtol=0, atol=2e-7)


def test_logarithm_is_as_exact_as_fp32(level: str) -> None:
    # two teachers of equal weight, from alike to one that is 2^-8 of the other
    first = torch.zeros(600, 2)
    first[:, 0] = torch.linspace(-3, 3, 600)
    second = -0.7 * first
    z = torch.empty(600, 2)
    backends.BACKENDS["cpp"].combine_teachers([first, second], [0.5, 0.5], 1.0, "probability", 2, z)
    wanted = combined_rows([first, second], [1, 1], 1.0, "probability")
    torch.testing.assert_close(z.double(), wanted, rtol=0, atol=8e-7)


def test_fp32_probabilities_keep_their_digits(level: str) -> None:
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
def test_peak_in_any_column_stays_in_range(level: str, dtype: torch.dtype) -> None:
    # 173 bits above the others: beside a maximum that misses the column e is infinite
    student, teacher = logits_pair((77, 77), dtypes=(dtype, dtype))
    peaks = 120.0 * torch.eye(77)
    student, teacher = student + peaks.to(dtype), teacher + peaks.roll(5, 1).to(dtype)
    labels = torch.arange(77)
    keywords = {"gradient": torch.empty_like(student), "temperature": 1.0, "ce_weight": 1.0}
    check_launch(student, teacher, labels, wanted=expect, **keywords)


def test_maximum_far_above_the_first_columns_costs_no_digits(level: str) -> None:
    # exponents near 100 have lost 7 bits, which the budget of a loss would hide
    student, teacher = logits_pair((16, 2051), scale=0.5)
    student[:, :2048] -= 70
    teacher[:, :2048] -= 70
    kd, _, _, _ = launch(student, teacher, temperature=1.0)
    wanted = expect(student, teacher, temperature=1.0, reduction="none").value["kd"]
    torch.testing.assert_close(kd.double(), wanted, rtol=0, atol=1e-6)
