"""Rows of the C++ kernels inside wider ones, at the widths where their loops end: what is read and
written, which rows are spoilt by a NaN or a wrong label, and by no other.

These are the cheapest calls that go through a whole kernel, so that the mutations of its lines are
held against them (tests/mutations/cpp.py). They call the launchers by way of
`backends.BACKENDS`, where a mutated one can stand in.
"""

from __future__ import annotations

import functools

import kernel_calls
import pytest
import torch
from kernel_calls import assert_nothing_else_was_written, hole, placed, some_labels
from oracle import (
    ALL_PARTS,
    BF16,
    DIVERGENCES,
    FP16,
    FP32,
    INF,
    MODES,
    NAN,
    PARTS,
    assert_within,
    combined_rows,
    expect,
    logits_pair,
)

from distilfast.losses import backends

launch = functools.partial(kernel_calls.launch, "cpp")
# no allowance for what the plain level lacks
check_launch = functools.partial(kernel_calls.check_launch, "cpp", wanted=expect)
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=["fp32", "bf16", "fp16"])


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
    gradient = hole(5, width, dtypes[0], stride=89)
    teacher[1] = NAN  # outside the mask
    arguments = (some_labels(5, N_COLS), torch.tensor(ROW_WEIGHTS))
    keywords = {"vocab_size": N_COLS, "divergence": divergence, "jsd_beta": 0.3}
    scale = torch.tensor([1.0, -2.0, 0.5, 3.0, 1.0])
    only_cosine = {"kd_weight": 0.0, "cos_weight": 1.0}  # too small to be seen beside the others
    for weights in (ALL_PARTS, {}, only_cosine):
        told = {"gradient": gradient.fill_(NAN), "scale": scale, **keywords, **weights}
        check_launch(student, teacher, *arguments, **told)


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
    gradient = hole(5, N_COLS, dtypes[2], stride=89)
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
@pytest.mark.parametrize("mode", MODES)
def test_teachers_inside_wider_rows_are_read_and_written_whole(
    level: str, mode: str, dtypes: tuple[torch.dtype, ...]
) -> None:
    pairs = [
        logits_pair((5, N_COLS), seed=i, offset=100.0, dtypes=(dtype, dtype))[0]
        for i, dtype in enumerate(dtypes)
    ]
    teachers = [placed(x, stride=95 + 6 * i) for i, x in enumerate(pairs)]
    weights, z = [0.2, 0.5, 0.3], hole(5, N_COLS, FP32, stride=89)
    backends.BACKENDS["cpp"].combine_teachers(teachers, weights, 0.5, mode, N_COLS, z)
    wanted = combined_rows(teachers, weights, 0.5, mode)
    torch.testing.assert_close(z.double(), wanted, rtol=1e-5, atol=1e-5)
    assert_nothing_else_was_written(z)


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
