"""Rows of the C++ kernels inside wider ones, at the widths where their loops end: what is read and
written, and which rows a NaN spoils.

These are the cheapest calls that go through a whole kernel, so that the mutations of its lines are
held against them (tests/mutations/cpp.py). They call the launchers by way of
`backends.BACKENDS`, where a mutated one can stand in.
"""

from __future__ import annotations

import pytest
import torch
from kernel_calls import calls_of, hole, placed, some_labels
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
    expect,
    logits_pair,
)

launch, check_launch, check_hidden, check_combination = calls_of("cpp")
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)


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
        # no allowance for what the plain level lacks
        check_launch(student, teacher, *arguments, wanted=expect, **told)


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
    check_hidden([student], [teacher], mask, [gradient], scale)


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
    z = hole(5, N_COLS, FP32, stride=89)
    check_combination(teachers, [0.2, 0.5, 0.3], 0.5, mode, z, size=200)


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
