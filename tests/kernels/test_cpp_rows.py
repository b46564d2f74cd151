"""Rows of the C++ kernels inside wider ones, at the widths where their loops end: what is read and
written, which rows are spoilt by a NaN or a wrong label, and by no other.

These are the cheapest calls that go through a whole kernel, so that the mutations of its lines are
held against them (tests/mutations/cpp.py). They call the launchers by way of
`backends.BACKENDS`, where a mutated one can stand in.
"""

from __future__ import annotations

from typing import Any

import pytest
import test_combine_teachers as ensembles
import torch
from oracle import DIVERGENCES, INF, NAN, PARTS, assert_same, assert_within, expect, logits_pair
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
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


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
    level: str, divergence: str, dtypes: tuple[torch.dtype, torch.dtype]
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
    level: str, dtypes: tuple[torch.dtype, torch.dtype, torch.dtype]
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
    level: str, mode: str, dtypes: tuple[torch.dtype, ...]
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
def test_scaled_rows_inside_wider_ones_are_scaled_whole(level: str, dtype: torch.dtype) -> None:
    before, _ = logits_pair((5, N_COLS), dtypes=(dtype, dtype))
    for by in (torch.tensor([1.0, -2.0, 0.3, 0.0, 7.0]), torch.tensor(0.3)):
        gradient = placed(before, stride=89)
        backends.BACKENDS["cpp"].scale([gradient], by)
        factor = by[:, None] if by.ndim else by
        assert_same([gradient], [(before.float() * factor).to(dtype)])
        assert_nothing_else_was_written(gradient)


@every_dtype
def test_streamed_gradient_is_the_stored_one(level: str, dtype: torch.dtype) -> None:
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


# --- NaN and labels ------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["cos", "mse"])
def test_nan_on_both_sides_is_no_excluded_column(level: str, part: str) -> None:
    student, teacher = logits_pair((3, 9))
    student[1, 3] = teacher[1, 3] = NAN
    gradient = torch.empty_like(student)
    weights = {"kd_weight": 0.0, f"{part}_weight": 1.0}
    parts = launch(student, teacher, gradient=gradient, **weights)
    assert parts[PARTS.index(part)].isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
@every_divergence
def test_nan_of_halves_makes_its_row_nan(level: str, divergence: str, side: str) -> None:
    # their exponential has a fraction of its own, in which a NaN could get lost
    student, teacher = logits_pair((3, N_COLS), dtypes=(BF16, BF16))
    (student if side == "student" else teacher)[1, 3] = NAN
    gradient = torch.empty_like(student)
    parts = launch(student, teacher, gradient=gradient, divergence=divergence)
    assert parts[0].isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_beside_a_zero_vector_is_no_zero_vector(level: str, side: str) -> None:
    student, teacher = logits_pair((3, 9))
    zero, other = (student, teacher) if side == "student" else (teacher, student)
    zero[1], other[1, 4] = 0, NAN
    gradient = torch.empty_like(student)
    parts = launch(student, teacher, gradient=gradient, kd_weight=0.0, cos_weight=1.0)
    assert parts[2].isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("label", [-1, 9, 2**40])
def test_unknown_label_makes_its_own_row_nan(level: str, label: int) -> None:
    # the public functions refuse it on a CPU; the kernels neither read nor write outside
    student, teacher = logits_pair((3, 9))
    gradient = hole(3, 9, FP32, "cpu", stride=12)
    labels = torch.tensor([0, label, 8])
    parts = launch(placed(student, stride=11), teacher, labels, gradient=gradient, ce_weight=1.0)
    assert parts[1].isnan().tolist() == [False, True, False]
    assert not parts[0].isnan().any()
    assert gradient.isnan().all(1).tolist() == [False, True, False]
    assert_nothing_else_was_written(gradient)
