"""What is the C++ kernels' own: vectors and their rests, the maximum from a row's first columns,
streamed gradients, threads, the library and its loader, the build. The mathematics is tested for
every backend, and so for every instruction set, in test_losses.py and its neighbours, and what the
launchers share with Triton's in test_launchers.py.

What is read too much only a page that must not be touched can tell, in a process of its own.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import ROOT, cpu_levels
from distilfast_kernels import cpp
from kernel_calls import (
    assert_nothing_else_was_written,
    bits,
    calls_of,
    expect_of_cpp,
    hole,
    placed,
    some_labels,
)
from oracle import (
    ALL_PARTS,
    BF16,
    DIVERGENCES,
    FP16,
    FP32,
    IGNORE,
    INF,
    MODES,
    NAN,
    PARTS,
    assert_same,
    check,
    logits_pair,
    read,
    value_and_grad,
)
from torch import Tensor

from distilfast import distillation_loss

launch, check_launch, check_hidden, check_combination = calls_of("cpp")
SOFT = {"kd_weight": 0.0}
DTYPES = (FP32, FP16, BF16)
CSRC = ROOT / "kernels" / "csrc"
# Each branch of the kernel: every divergence alone, beside a cross entropy, beside everything; and
# the other parts alone.
TERMS = [
    *({"divergence": d, **more} for d in DIVERGENCES for more in ({}, {"ce_weight": 2.0})),
    *({"divergence": d, "jsd_beta": 0.3, **ALL_PARTS} for d in DIVERGENCES),
    *({**SOFT, f"{part}_weight": 1.5} for part in PARTS[1:]),
]

every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
needs_library = pytest.mark.skipif(not cpu_levels(), reason="the C++ kernels were not built")
on_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="its other levels are x86's"
)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """torch.set_num_threads, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@contextmanager
def told(**circumstances: Any) -> Iterator[None]:
    """An error inside says which turn of a loop it is from."""
    try:
        yield
    except Exception as error:
        error.add_note(f"with {circumstances}")
        raise


def constant(name: str) -> int:
    """A whole number or a product of such, as the headers have it."""
    for header in sorted(CSRC.glob("*.h")):
        found = re.search(rf"\b{name} = ([^;]+);", header.read_text(encoding="utf-8"))
        if found:
            return int(eval(found[1].replace("int64_t", ""), {"__builtins__": {}}))
    raise AssertionError(f"no {name} in {CSRC}")


FIRST_COLUMNS = constant("FIRST_COLUMNS")
LARGE_BYTES = constant("LARGE_BYTES")


def check_rows(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any
) -> None:
    """distillation_loss of each row, and its gradient, against the oracle."""
    used = read(labels=labels, reduction="none", backend="cpp", **keywords)
    output, gradient = value_and_grad(distillation_loss, student, teacher, **used)
    check(output, gradient, expect_of_cpp(student, teacher, labels, **keywords))


# Vectors, four at a time, one at a time, and the rest


@every_dtype
@pytest.mark.parametrize("terms", TERMS, ids=lambda terms: "-".join(map(str, terms.values())))
def test_poisoned_gradient_is_written_whole_around_each_boundary(
    level: str, terms: dict[str, Any], dtype: torch.dtype
) -> None:
    # every length up to four vectors of 16 and a rest; an odd one makes each row begin at another
    # address, and so does the first, from length to length
    for vocab in (*range(1, 71), *range(255, 259)):
        student, teacher = logits_pair((4, vocab), dtypes=(dtype, dtype))
        mask = torch.tensor([1.0, 0.0, 0.5, 2.0])
        gradient = hole(4, vocab, dtype, shift=vocab * 7 % 17)
        with told(vocab=vocab):
            labels = some_labels(4, vocab)
            check_launch(student, teacher, labels, mask, gradient=gradient, **terms)


@every_dtype
@every_divergence
def test_poisoned_gradient_of_long_rows_is_written_whole(
    level: str, divergence: str, dtype: torch.dtype
) -> None:
    # around the columns that give the maximum, with few columns behind them and as many again
    for vocab in (
        *range(FIRST_COLUMNS - 1, FIRST_COLUMNS + 3),
        *range(2 * FIRST_COLUMNS - 1, 2 * FIRST_COLUMNS + 5),
    ):
        student, teacher = logits_pair((2, vocab), dtypes=(dtype, dtype))
        student[1] = student[1].flip(0)
        for terms in ({}, ALL_PARTS):
            gradient = hole(2, vocab, dtype, shift=vocab % 17)
            with told(vocab=vocab, terms=terms):
                labels = torch.tensor([vocab - 1, min(FIRST_COLUMNS, vocab - 1)])
                terms = {"divergence": divergence, **terms}
                check_launch(student, teacher, labels, gradient=gradient, **terms)


@every_dtype
def test_poisoned_gradient_of_padded_rows_is_written_whole(level: str, dtype: torch.dtype) -> None:
    # rows further apart than they are long, of a padded head: there the gradient is 0
    for vocab, width, stride in (
        *((v, v, v + 1 + v % 5) for v in range(1, 40)),
        *((v, v + 1 + v % 19, v + 21) for v in range(1, 70)),
        (FIRST_COLUMNS + 1, FIRST_COLUMNS + 40, FIRST_COLUMNS + 43),
    ):
        pair = logits_pair((5, width), dtypes=(dtype, dtype))
        student, teacher = (placed(x, stride=stride + i) for i, x in enumerate(pair))
        student[:, vocab:], teacher[:, vocab:] = NAN, INF
        gradient = hole(5, width, dtype, stride=stride + 2, shift=vocab % 17)
        labels, mask = some_labels(5, vocab), torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5])
        with told(vocab=vocab, width=width, stride=stride):
            keywords = {"vocab_size": vocab, "divergence": DIVERGENCES[vocab % 3], **ALL_PARTS}
            check_launch(student, teacher, labels, mask, gradient=gradient, **keywords)


@every_dtype
def test_rows_at_every_address_give_the_same_bits(level: str, dtype: torch.dtype) -> None:
    # inputs and gradient at each of 64 bytes' elements; loads that need an aligned address fault,
    # and no result depends on where it lies
    for vocab in (3, 70, 133):
        student, teacher = logits_pair((2, vocab), dtypes=(dtype, dtype))
        labels = torch.tensor([0, vocab - 1])
        first = hole(2, vocab, dtype)
        wanted = launch(student, teacher, labels, gradient=first, **ALL_PARTS)
        for shift in range(1, 64 // dtype.itemsize + 1):
            elsewhere = [placed(x, shift=shift + i) for i, x in enumerate((student, teacher))]
            gradient = hole(2, vocab, dtype, shift=shift + 3)
            parts = launch(*elsewhere, labels, gradient=gradient, **ALL_PARTS)
            with told(vocab=vocab, shift=shift):
                assert_same([parts, gradient], [wanted, first])
                assert_nothing_else_was_written(gradient)


@every_dtype
def test_poisoned_rows_that_nothing_needs_become_zero(level: str, dtype: torch.dtype) -> None:
    # the early way out: no logit is read, each gradient is overwritten
    for vocab in (*range(1, 36), FIRST_COLUMNS + 1):
        student, teacher, gradient = (hole(3, vocab + 2, dtype, shift=vocab % 3) for _ in range(3))
        for labels, mask, weights in (
            (None, torch.zeros(3), {**ALL_PARTS, "ce_weight": 0.0}),
            (torch.full((3,), IGNORE), torch.zeros(3), ALL_PARTS),
            (torch.full((3,), IGNORE), None, {**SOFT, "ce_weight": 1.0}),
        ):
            gradient.fill_(NAN)
            keywords = {"gradient": gradient, "vocab_size": vocab, **weights}
            assert (launch(student, teacher, labels, mask, **keywords) == 0).all()
            assert (gradient == 0).all()
            assert_nothing_else_was_written(gradient)


@every_divergence
@pytest.mark.parametrize("vocab", [37, 517, FIRST_COLUMNS + 552])
@pytest.mark.parametrize("temperature", [2.0, 7.3])
def test_gradient_in_place_of_the_logits_is_the_same_to_the_bit(
    level: str, temperature: float, vocab: int, divergence: str
) -> None:
    # what a sweep still needs must not be overwritten by it, the label's column least of all
    for dtype in DTYPES:
        student, teacher = logits_pair((4, vocab), dtypes=(dtype, dtype))
        labels = torch.tensor([0, vocab - 1, 20, IGNORE])
        mask = torch.tensor([1.0, 0.0, 0.5, 2.0])
        for weights in ({}, {"ce_weight": 1.0}, ALL_PARTS):
            keywords = {"divergence": divergence, "temperature": temperature, **weights}
            keywords["scale"] = -0.5
            beside = hole(4, vocab, dtype)
            wanted = launch(student, teacher, labels, mask, gradient=beside, **keywords)
            inside = placed(student)
            parts = launch(inside, teacher, labels, mask, gradient=inside, **keywords)
            assert_same([parts, inside], [wanted, beside])
            assert_nothing_else_was_written(inside)


@every_divergence
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("vocab", [1, 37, 517, FIRST_COLUMNS + 552])
def test_gradient_of_fewer_bits_in_place_of_fp32_logits_is_the_same_to_the_bit(
    level: str, vocab: int, dtype: torch.dtype, divergence: str
) -> None:
    # it begins where the logits' row does, so that it lies over those that come later
    student, teacher = logits_pair((5, vocab))
    teacher[4] = student[4] * 1.0001  # a small divergence
    labels = torch.tensor([0, vocab - 1, 20 % vocab, IGNORE, IGNORE])
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    bias = torch.linspace(-1, 1, vocab)
    plain, biased, capped = (1.0, 0.0, None), (1.0, 0.0, bias), (0.5, 9.0, bias)
    for heads in ((plain, plain), (biased, biased), (capped, plain)):
        for weights in ({}, {"ce_weight": 1.0}, ALL_PARTS):
            keywords = {"divergence": divergence, "scale": -0.5, "temperature": 2.5, **weights}
            keywords["heads"] = heads
            beside = hole(5, vocab, dtype)
            wanted = launch(student, teacher, labels, mask, gradient=beside, **keywords)
            inside = placed(student)
            room = inside.untyped_storage()
            gradient = torch.empty(0, dtype=dtype).set_(
                room, 2 * inside.storage_offset(), (5, vocab), (2 * inside.stride(0), 1)
            )
            parts = launch(inside, teacher, labels, mask, gradient=gradient, **keywords)
            assert_same([parts, gradient], [wanted, beside])


def test_padding_beside_logits_that_their_gradient_overwrites_is_zeroed(level: str) -> None:
    # after what it lies over has been read
    student, teacher = logits_pair((3, 70))
    wanted = torch.empty(3, 70, dtype=BF16)
    launch(student, teacher, gradient=wanted, vocab_size=61)
    gradient = student.view(BF16)[:, :70]
    launch(student, teacher, gradient=gradient, vocab_size=61)
    assert torch.equal(gradient, wanted)
    assert (gradient[:, 61:] == 0).all()


def heads_products(n: int, vocab: int, depth: int, bias: bool) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(n + vocab + depth)
    hidden, weight = (
        torch.randn(rows, depth + 3, generator=generator).to(BF16)[:, :depth] for rows in (n, vocab)
    )
    offset = torch.randn(vocab, generator=generator) if bias else None
    exact = hidden.double() @ weight.double().T
    return hidden, weight, offset, exact if offset is None else exact + offset.double()


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("n", [1, 7, 8, 9, 17])
@pytest.mark.parametrize("vocab", [1, 15, 47, 48, 49, 100, 300])
def test_product_of_bf16_is_one_of_fp32(level: str, n: int, vocab: int, bias: bool) -> None:
    # rows around the tile's 8, columns around its 3 x 16, depths that are odd or no whole vectors
    if not cpp.multiplies():
        pytest.skip(f"{level} has no products of bf16")
    for depth in (1, 2, 31, 32, 33, 64, 97):
        hidden, weight, offset, exact = heads_products(n, vocab, depth, bias)
        wide = torch.full((n + 1, vocab + 5), 7.0)
        cpp.product(hidden, weight, offset, wide[:n, :vocab])
        size = (hidden.double().abs() @ weight.double().abs().T).amax()
        assert (wide[:n, :vocab] - exact).abs().max() <= 1e-6 * size
        assert (wide[n:] == 7).all()
        assert (wide[:, vocab:] == 7).all()


def test_large_product_written_past_the_caches_is_the_small_ones(level: str) -> None:
    if not cpp.multiplies():
        pytest.skip(f"{level} has no products of bf16")
    n, vocab, depth = 256, 20_000, 66
    hidden, weight, offset, exact = heads_products(n, vocab, depth, True)
    large = torch.empty(n, 20_032)[:, :vocab]
    cpp.product(hidden, weight, offset, large)
    parts = torch.empty(n, vocab)
    for start in range(0, n, 50):  # below what is streamed, and from another row on
        cpp.product(hidden[start : start + 50], weight, offset, parts[start : start + 50])
    assert torch.equal(large, parts)
    assert relative_error(large, exact) < 1e-6


def relative_error(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).norm() / exact.norm())


def test_product_of_another_level_is_refused(level: str) -> None:
    if cpp.multiplies():
        pytest.skip(f"{level} has it")
    hidden, weight, _, _ = heads_products(3, 5, 4, False)
    with pytest.raises(OSError, match="distilfast product"):
        cpp.product(hidden, weight, None, torch.empty(3, 5))


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("student_dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_any_two_dtypes_agree_with_the_oracle(
    level: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    # where they differ the teacher is widened into a buffer, which is as long as the row needs
    for vocab in (1, 5, 16, 33, 64, 131, FIRST_COLUMNS + 5):
        pair = logits_pair((6, vocab), dtypes=(student_dtype, teacher_dtype))
        student, teacher = placed(pair[0], stride=vocab + 3), placed(pair[1], shift=1)
        teacher[3, : vocab // 2] = -INF
        labels = some_labels(6, vocab)
        mask = torch.arange(6).remainder(3).float()
        for divergence in DIVERGENCES:
            gradient = hole(6, vocab, student_dtype, shift=2)
            for weights in ({}, {"ce_weight": 2.0}, ALL_PARTS):
                keywords = {"divergence": divergence, **weights}
                gradient.fill_(NAN)
                with told(vocab=vocab, **keywords):
                    check_launch(student, teacher, labels, mask, gradient=gradient, **keywords)


# The maximum: of the first columns, and looked for only where the sums say that it is not there


HEIGHTS = (0.0, 10.0, 13.0, 14.0, 15.0, 30.0, 60.0, 200.0, 1e4)  # around ln 2^20 = 13.9
TEMPERATURES = (0.5, 1.0, 2.0, 2.5, 3.0, 4.0, 8.0)


def late_maxima(temperature: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels, a row for each height and each side or both: its maximum stands
    behind the first columns, higher than any of these by so much."""
    sides = ("student", "teacher", "both", "apart")
    n_rows, vocab = len(HEIGHTS) * len(sides), FIRST_COLUMNS + 70
    # near: else what the heights do to a row is small beside its divergence
    student, teacher = logits_pair((n_rows, vocab), near=True)
    late = torch.tensor([FIRST_COLUMNS + 70 * row // n_rows for row in range(n_rows)])
    late[-1] = vocab - 1
    for row in range(n_rows):
        side, height = sides[row % len(sides)], HEIGHTS[row // len(sides)] * temperature
        for name, x in (("student", student), ("teacher", teacher)):
            if side in (name, "both", "apart"):
                column = int(late[row])
                if side == "apart" and name == "teacher":
                    column = FIRST_COLUMNS + (column - FIRST_COLUMNS + 35) % 70
                highest = float(x[row, :FIRST_COLUMNS].max()) + height
                x[row, column] = min(highest, 6e4)  # fp16's numbers end at 65,504
    labels = torch.where(torch.arange(n_rows) % 3 == 0, 5, late)
    return student.to(dtype), teacher.to(dtype), labels


@every_dtype
@every_divergence
def test_maximum_behind_the_first_columns_costs_no_digits(
    level: str, divergence: str, dtype: torch.dtype
) -> None:
    for temperature in TEMPERATURES:
        student, teacher, labels = late_maxima(temperature, dtype)
        for weights in ({}, {"ce_weight": 0.5}):
            keywords = {"temperature": temperature, "divergence": divergence, **weights}
            with told(**keywords):
                check_rows(student, teacher, labels, **keywords)


@pytest.mark.parametrize("masked", [False, True])
def test_cross_entropy_alone_finds_a_late_maximum(level: str, masked: bool) -> None:
    # without a divergence, or in rows that the mask leaves out of it; T = 1 whatever T is
    for temperature in (1.0, 2.0, 2.5):
        student, teacher, labels = late_maxima(1.0, FP32)
        keywords = {"temperature": temperature, **SOFT, "ce_weight": 1.0}
        if masked:
            keywords |= {"kd_weight": 1.0, "mask": torch.arange(len(labels)) % 2 == 0}
        with told(temperature=temperature):
            check_rows(student, teacher, labels, **keywords)


@pytest.mark.thorough
@every_divergence
def test_rows_with_infinities_and_nan_early_and_late_equal_the_oracle(
    level: str, divergence: str
) -> None:
    # one row for each; the first columns all -inf leave no maximum to start from
    early, vocab = slice(0, FIRST_COLUMNS), FIRST_COLUMNS + 70
    places = (early, slice(early.stop, None), slice(7, 8), slice(vocab - 9, vocab - 8), slice(None))
    cases = [
        (side, place, value)
        for side in ("student", "teacher", "both")
        for place in places
        for value in (-INF, INF, NAN)
    ]
    student, teacher = logits_pair((len(cases) + 1, vocab))  # the last row is a row like any other
    for row, (side, place, value) in enumerate(cases):
        for name, x in (("student", student), ("teacher", teacher)):
            if side in (name, "both"):
                x[row, place] = value
    for dtype in DTYPES:
        pair = student.to(dtype), teacher.to(dtype)
        for temperature in TEMPERATURES:
            keywords = {"temperature": temperature, "divergence": divergence}
            with told(temperature=temperature, dtype=dtype):
                check_rows(*pair, **keywords)
                for label in (7, vocab - 1):
                    labels = torch.full((len(cases) + 1,), label)
                    check_rows(*pair, labels, ce_weight=0.5, **keywords)


@pytest.mark.thorough
def test_many_equal_columns_are_no_late_maximum(level: str) -> None:
    # their sum grows without any of them being high; both sides of the bound on the sums are as
    # good. Not for jsd: a million terms that are all alike are all rounded alike, in fp32 to 1e-4
    for vocab in (FIRST_COLUMNS + 1, 32_000, 2**20 - 1, 2**20 + 9):
        student, teacher = torch.zeros(1, vocab), torch.zeros(1, vocab)
        teacher[:, ::2] = 0.5
        for divergence in DIVERGENCES[: 3 if vocab < 2**16 else 2]:
            keywords = {"divergence": divergence, "ce_weight": 0.5}
            with told(vocab=vocab, divergence=divergence):
                check_rows(student, teacher, torch.tensor([vocab - 1]), **keywords)


# Streamed gradients


@every_dtype
def test_streamed_gradient_is_that_of_small_batches_to_the_bit(
    level: str, dtype: torch.dtype
) -> None:
    # one element behind a line's beginning, and so odd that each row begins elsewhere in its line;
    # the same 64 rows again and again are 64 rows still
    vocab, few = 8209, 64
    times = LARGE_BYTES // (few * vocab * dtype.itemsize) + 1
    n_rows = few * times
    student, teacher = logits_pair((few, vocab), dtypes=(dtype, dtype))
    columns = torch.tensor([0, 1, vocab - 1, IGNORE, vocab // 2])
    labels, mask = columns.repeat(13)[:few], torch.arange(few).remainder(4) / 2
    large = student.repeat(times, 1), teacher.repeat(times, 1), labels.repeat(times)
    gradient = hole(n_rows, vocab, dtype, shift=1)
    assert gradient.numel() * dtype.itemsize > LARGE_BYTES
    assert gradient.data_ptr() % 64 == dtype.itemsize
    before = [x.clone() for x in large]
    for terms in ({}, {"ce_weight": 1.0, "divergence": "reverse_kl"}, {**ALL_PARTS}):
        small = hole(few, vocab, dtype)
        assert few * vocab * dtype.itemsize < LARGE_BYTES
        wanted = launch(student, teacher, labels, mask, gradient=small, **terms)
        parts = launch(*large, mask.repeat(times), gradient=gradient.fill_(NAN), **terms)
        with told(terms=terms):
            again = gradient.reshape(times, few, vocab)
            assert_same([again, parts], [small.expand_as(again), wanted.repeat(1, times)])
            assert_nothing_else_was_written(gradient)
            assert_same(large, before)
    inside = placed(large[0], shift=1)
    parts = launch(inside, *large[1:], mask.repeat(times), gradient=inside, **terms)
    assert_same([inside, parts], [gradient, wanted.repeat(1, times)])
    assert_nothing_else_was_written(inside)


@every_dtype
def test_streamed_gradient_of_short_rows_is_that_of_small_batches_to_the_bit(
    level: str, dtype: torch.dtype
) -> None:
    # rows shorter than what is missing to the first multiple of a vector, and a little longer; they
    # are far enough apart to count as streamed
    n_rows = 40  # begin at each element of a line
    stride = LARGE_BYTES // (n_rows * dtype.itemsize) // 64 * 64 + 65
    longest = 70
    memory = hole(n_rows, longest, dtype, stride=stride, shift=1)
    assert n_rows * stride * dtype.itemsize >= LARGE_BYTES
    for vocab in range(1, longest + 1):
        student, teacher = logits_pair((n_rows, vocab), dtypes=(dtype, dtype))
        labels = some_labels(n_rows, vocab)
        terms = {"divergence": DIVERGENCES[vocab % 3], **(ALL_PARTS if vocab % 2 else {})}
        small, gradient = torch.empty_like(student), memory[:, :vocab]
        wanted = launch(student, teacher, labels, gradient=small, **terms)
        parts = launch(student, teacher, labels, gradient=gradient, **terms)
        with told(vocab=vocab):
            assert_same([gradient, parts], [small, wanted])
        gradient.fill_(NAN)
        with told(vocab=vocab):
            assert memory.isnan().all()
    assert_nothing_else_was_written(memory)


# Threads


def everything(n_rows: int, vocab: int) -> list[Tensor]:
    """What all four functions compute from n_rows rows."""
    found = []
    for dtype in DTYPES:
        student, teacher = logits_pair((n_rows, vocab), dtypes=(dtype, dtype))
        labels, mask = some_labels(n_rows, vocab), torch.arange(n_rows).add(1).remainder(3)
        mask = mask.float()
        for divergence in DIVERGENCES:
            gradient = torch.empty_like(student)
            keywords = {"gradient": gradient, "divergence": divergence, **ALL_PARTS}
            found += [launch(student, teacher, labels, mask, **keywords), gradient]
        gradients = [torch.empty_like(student) for _ in range(2)]
        by, z = torch.tensor(-0.3), torch.empty(n_rows, vocab)
        layers = [student, teacher], [teacher, student]
        found += [cpp.hidden_cosine(*layers, mask, by, gradients), *gradients, z]
        cpp.combine_teachers([student, teacher], [0.3, 0.7], 2.0, "probability", vocab, z)
        cpp.scale([gradients[0]], by)
    return found


@pytest.mark.parametrize(("n_rows", "vocab"), [(1, 40_003), (2, 20_001), (131, 517)])
def test_results_are_the_same_bits_from_run_to_run_and_with_any_threads(
    level: str, n_rows: int, vocab: int, threads: Callable[[int], None]
) -> None:
    # fewer rows than threads included; each is enough to be worth a second thread
    assert n_rows * vocab > constant("WORTH_A_THREAD")
    threads(1)
    wanted = everything(n_rows, vocab)
    for count in (1, 2, 3):
        threads(count)
        found = everything(n_rows, vocab)
        threads(1)
        with told(threads=count):
            assert_same(found, wanted)


TASKS = r"""
import json, os
import torch
from distilfast import distillation_loss

def tasks():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(1)  # else the first line already starts some
student, teacher = torch.ones(64, 700), torch.zeros(64, 700)
leaf = student.requires_grad_()
started = []
for count in (1, 2):
    torch.set_num_threads(count)
    before = tasks()
    for _ in range(3):
        distillation_loss(leaf, teacher, backend="cpp").loss.backward()
    started.append(tasks() - before)
with open("/proc/self/maps") as maps:
    mapped = {line.split()[-1] for line in maps if "/" in line}
print(json.dumps({"started": started, "mapped": sorted(mapped)}))
"""


def run_python(
    code: str, *arguments: str, folder: Path = ROOT, path: str = "", **environment: str
) -> Any:
    """A process of its own, where nothing but itself says how many threads there are."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "DISTILFAST_"))}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env={**kept, **({"PYTHONPATH": path} if path else {}), **environment},
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.mark.thorough
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux's list of threads")
def test_calls_start_as_many_threads_as_torch_uses_in_its_own_openmp(level: str) -> None:
    # a second runtime would start threads of its own, which wait for work on the first one's cores
    done = run_python(TASKS, DISTILFAST_CPU_LEVEL=level)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    alone, beside_one_more = found["started"]
    assert alone == 0
    assert beside_one_more <= 1
    names = [Path(path).name for path in found["mapped"]]
    assert "_cpp.so" in names
    assert len([name for name in names if re.match(r"lib(gomp|iomp|omp)\d*\b", name)]) == 1


# The loader


@needs_library
@pytest.mark.parametrize("wanted", ["sse9", " ", "AVX2", "above"])
def test_level_that_is_not_there_is_refused_by_name(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if wanted == "above":  # known, but more than this machine has
        monkeypatch.setattr(cpp, "best_level", lambda: "avx2")
        wanted = "avx512"
    monkeypatch.setenv("DISTILFAST_CPU_LEVEL", wanted)
    best = cpp.best_level()
    student, teacher = logits_pair((2, 5))
    before = student.clone()
    for call in (
        lambda: launch(student, teacher, gradient=student),
        lambda: cpp.scale([student], torch.tensor(2.0)),
        lambda: distillation_loss(student, teacher, backend="cpp"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        message = str(caught.value)
        assert message.startswith("DISTILFAST_CPU_LEVEL: expected one of plain, avx2, avx512"), (
            message
        )
        assert f"up to {best} " in message
        assert message.endswith(f"got {wanted!r}")
    assert_same([student], [before])


def test_level_and_threads_reach_the_library(
    level: str, monkeypatch: pytest.MonkeyPatch, threads: Callable[[int], None]
) -> None:
    seen = []

    def function(arguments: Any, level: int, threads: int) -> int:
        seen.append((level, threads))
        return 0

    monkeypatch.setattr(cpp, "_library", lambda: SimpleNamespace(distilfast_scale=function))
    for count in (1, 3):
        threads(count)
        cpp.scale([torch.ones(1, 1)], torch.tensor(1.0))
    assert seen == [(cpp.LEVELS.index(level), count) for count in (1, 3)]


def test_level_asked_for_is_the_level_used(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although the machine has a better one."""
    module = sys.modules[cpp.__name__]  # a mutated one, when one stands in
    monkeypatch.setattr(module, "best_level", lambda: cpp.LEVELS[-1])
    assert module.level() == level


@needs_library
def test_best_level_is_the_default_and_one_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DISTILFAST_CPU_LEVEL", raising=False)
    assert cpp.level() == cpp.best_level() == cpu_levels()[0]
    flags = Path("/proc/cpuinfo")
    if flags.exists() and platform.machine() == "x86_64":
        has = set(re.findall(r"\w+", flags.read_text(encoding="utf-8")))
        avx2 = {"avx2", "fma", "f16c"}
        avx512 = {*avx2, "avx512f", "avx512bw", "avx512vl", "avx512dq"}
        levels = {"avx512bf16": {*avx512, "avx512_bf16"}, "avx512": avx512, "avx2": avx2}
        known = (name for name, sets in levels.items() if sets <= has)
        assert cpp.best_level() == next(known, "plain")


@needs_library
def test_library_of_other_sources_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # an editable install whose Python was updated and whose library was not
    cpp._library.cache_clear()
    monkeypatch.setattr(cpp, "ABI", cpp.ABI + 1)
    try:
        assert "built from other sources" in str(cpp.load_error())
    finally:
        monkeypatch.undo()
        cpp._library.cache_clear()
    assert cpp.load_error() is None


STRUCTURES = {
    "distilfast_matrix": cpp._Matrix,
    "distilfast_head": cpp._Head,
    "distilfast_distillation_args": cpp._DistillationArguments,
    "distilfast_cosine_args": cpp._CosineArguments,
    "distilfast_ensemble_args": cpp._EnsembleArguments,
    "distilfast_scale_args": cpp._ScaleArguments,
    "distilfast_accumulate_args": cpp._AccumulateArguments,
    "distilfast_product_args": cpp._ProductArguments,
}


@needs_library
def test_library_refuses_a_level_above_the_best_and_below_the_first() -> None:
    library, best = cpp._library(), cpp.LEVELS.index(cpp.best_level())
    for name, structure in (
        ("distillation", cpp._DistillationArguments),
        ("hidden_cosine", cpp._CosineArguments),
        ("combine_teachers", cpp._EnsembleArguments),
        ("scale", cpp._ScaleArguments),
        ("accumulate", cpp._AccumulateArguments),
    ):
        nothing = ctypes.byref(structure())  # no rows
        function = getattr(library, f"distilfast_{name}")
        assert not any(function(nothing, level, 1) for level in range(best + 1))
        for level in (best + 1, len(cpp.LEVELS), 100, -1):
            assert function(nothing, level, 1) == errno.ENOTSUP, (name, level)


def test_scratch_that_the_system_refuses_is_a_memory_error(
    level: str, threads: Callable[[int], None]
) -> None:
    # 2^50 columns: nothing is read or written, though there is nothing to be read or written
    rows = torch.full((4, 3), NAN)
    one = torch.ones(())
    arguments = cpp._DistillationArguments(
        rows=rows.data_ptr(),
        kd_scale=one.data_ptr(),
        ce_scale=one.data_ptr(),
        n_rows=3,
        n_cols=2**50,
        n_padded=2**50,
        divergence=1,
        temperature=1.0,
        kd_weight=1.0,
    )
    for count in (1, 2):
        threads(count)
        with pytest.raises(MemoryError, match=r"^distilfast distillation: "):
            cpp._call("distillation", arguments)
    assert rows.isnan().all()


def program(*names: str) -> str:
    """A program by the first of its names that there is; else the test is skipped."""
    for name in names:
        if name and shutil.which(name):
            return name
    pytest.skip(f"no {' or '.join(name for name in names if name)} here")


def test_declarations_of_the_loader_agree_with_the_header(tmp_path: Path) -> None:
    # every structure's size and every field's place and size; a field that one side lacks is an
    # error of the compiler's or another size
    compiler = program(os.environ.get("CC", ""), "cc", "gcc", "clang")
    lines = []
    for name, structure in STRUCTURES.items():
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        for field, *_ in structure._fields_:
            place = f"offsetof({name}, {field}), sizeof((({name}*)0)->{field})"
            lines.append(f'printf("{name}.{field} %zu %zu\\n", {place});')
    constants = {
        **{
            f"DISTILFAST_{d}": cpp.DTYPES[x]
            for d, x in zip(("FP32", "BF16", "FP16"), (FP32, BF16, FP16), strict=True)
        },
        **{f"DISTILFAST_{name.upper()}": number for name, number in cpp.DIVERGENCES.items()},
        **{f"DISTILFAST_{name.upper()}": i for i, name in enumerate(cpp.LEVELS)},
        "DISTILFAST_NO_KD": 0,
    }
    lines += [f'printf("{name} %d\\n", (int){name});' for name in constants]
    source = tmp_path / "layout.c"
    body = "\n".join(lines)
    source.write_text(
        f'#include "distilfast.h"\n#include <stddef.h>\n#include <stdio.h>\n'
        f"int main(void) {{\n{body}\nreturn 0;\n}}\n",
        encoding="utf-8",
    )
    binary = tmp_path / "layout"
    flags = ["-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]  # the header is C, too
    done = subprocess.run(
        [compiler, *flags, str(source), "-o", str(binary)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    printed = subprocess.run([str(binary)], capture_output=True, text=True, check=True).stdout
    wanted = []
    for name, structure in STRUCTURES.items():
        wanted.append(f"{name} {ctypes.sizeof(structure)}")
        for field, *_ in structure._fields_:
            at = getattr(structure, field)
            wanted.append(f"{name}.{field} {at.offset} {at.size}")
    wanted += [f"{name} {number}" for name, number in constants.items()]
    assert printed.splitlines() == wanted
    declared = re.findall(r"^\} (\w+);", (CSRC / "distilfast.h").read_text("utf-8"), re.MULTILINE)
    assert sorted(declared) == sorted(STRUCTURES)


# The library


def copy_of_the_repository(folder: Path) -> Path:
    """What a build needs, without what one left behind."""
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("kernels", "distilfast", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def setup_py(folder: Path, *arguments: str, **environment: str) -> Any:
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with objects and library, by setup.py: minutes."""
    pytest.importorskip("setuptools")
    program((os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++").split()[0])
    folder = copy_of_the_repository(tmp_path_factory.mktemp("built") / "copy")
    done = setup_py(folder, "build_ext", "--inplace")
    assert done.returncode == 0, done.stderr
    (folder / "said").write_text(done.stdout + done.stderr, encoding="utf-8")
    return folder


@pytest.mark.thorough
def test_build_warns_of_nothing_and_makes_one_library(built: Path) -> None:
    # -Wall -Wextra are on; the library lies beside the package's files
    assert [p.name for p in (built / "kernels/distilfast_kernels").glob("*.so")] == ["_cpp.so"]
    said = (built / "said").read_text(encoding="utf-8")
    assert "-Wextra" in said
    assert not re.search("warning|left out", said), said


def symbols(*arguments: str) -> list[tuple[str, str]]:
    """(kind, name) of each that nm prints."""
    listed = subprocess.run(
        [program("nm"), *arguments], capture_output=True, text=True, check=True
    ).stdout
    return [(kind, name) for *_, kind, name in (line.split() for line in listed.splitlines())]


def declared_functions() -> set[str]:
    header = (CSRC / "distilfast.h").read_text(encoding="utf-8")
    return set(re.findall(r"^DISTILFAST_API \w+ (\w+)\(", header, re.MULTILINE))


@needs_library
def test_library_shows_the_functions_of_its_header_and_nothing_else() -> None:
    # neither weak nor unique: those the loader would take from whoever came first
    assert len(declared_functions()) == 8
    shown = symbols("-D", "--defined-only", str(cpp.LIBRARY))
    assert sorted(shown) == sorted(("T", name) for name in declared_functions())


def objects(built: Path) -> dict[str, Path]:
    found = {path.stem: path for path in built.glob("build/temp*/**/*.o")}
    assert set(found) == {path.stem for path in CSRC.glob("*.cpp")}
    return found


def instructions(path: Path) -> list[str]:
    """Disassembled, one each, without addresses."""
    listed = subprocess.run(
        [program("objdump"), "-d", "--no-show-raw-insn", "-M", "att", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = [line.split("\t", 1)[1] for line in listed.splitlines() if "\t" in line]
    assert len(found) > 10
    return found


@pytest.mark.thorough
@on_x86
def test_no_function_of_a_level_can_stand_in_for_anothers(built: Path) -> None:
    # of an inline function that two objects share, the linker keeps one, whatever it is compiled
    # for; only the functions with the level in their names may leave an object
    for level, path in objects(built).items():
        shared = [
            (kind, name) for kind, name in symbols("--defined-only", str(path)) if kind in "WuVT"
        ]
        functions = [pair for pair in shared if not pair[1].startswith("DW.ref.")]  # a pointer
        assert {kind for kind, _ in functions} == {"T"}, functions
        names = sorted(name for _, name in functions)
        if level == "dispatch":
            assert names == sorted(declared_functions())
        else:
            assert len(names) == 6
            assert all(f"_{level}" in name for name in names)


@pytest.mark.thorough
@on_x86
def test_each_level_holds_the_instructions_of_its_own_set_only(built: Path) -> None:
    # any machine runs `plain` and `dispatch` before it knows what it is
    listed = {name: instructions(path) for name, path in objects(built).items()}
    avx = re.compile(r"^v\w+ |%[yz]mm|%k[0-7]")
    avx512 = re.compile(r"%zmm|%k[0-7]|%[xy]mm(1[6-9]|2\d|3[01])\b|\{[1z]")
    for name in ("plain", "dispatch"):
        assert [line for line in listed[name] if avx.search(line)] == []
    assert [line for line in listed["avx2"] if avx512.search(line)] == []
    # and the two are what they are called
    assert sum("%ymm" in line for line in listed["avx2"]) > 1000
    assert sum("vfmadd" in line for line in listed["avx2"]) > 100
    assert sum("%zmm" in line for line in listed["avx512"]) > 1000
    assert sum("vcvtneps2bf16" in line for line in listed["avx512bf16"]) > 10
    assert not any("vcvtneps2bf16" in line for line in listed["avx512"])
    assert sum("mulps" in line for line in listed["plain"]) > 100


# The build without a compiler


@pytest.fixture(scope="session")
def left_out(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A copy of the repository, and what its build said where there is no compiler."""
    pytest.importorskip("setuptools")
    folder = copy_of_the_repository(tmp_path_factory.mktemp("left-out") / "copy")
    missing = {"CC": "/nowhere/a-compiler", "CXX": "/nowhere/a-compiler"}
    return folder, setup_py(folder, "build_ext", "--inplace", **missing)


@pytest.mark.thorough
def test_build_without_a_compiler_says_so_in_one_line_and_succeeds(
    left_out: tuple[Path, Any],
) -> None:
    folder, done = left_out
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stdout + done.stderr).splitlines() if "left out" in line]
    assert len(said) == 1, said
    assert "distilfast: the C++ kernels are left out, they could not be built: " in said[0]
    assert "/nowhere/a-compiler" in said[0].split("built: ")[1]
    assert "Traceback" not in done.stderr
    assert list(folder.rglob("*.so")) == []


LEFT_OUT = r"""
import json
import distilfast, distilfast_kernels, torch
from distilfast import distillation_loss

student, teacher = torch.arange(12.0).reshape(3, 4).requires_grad_(), torch.ones(3, 4)
try:
    distillation_loss(student, teacher, backend="cpp")
    refused = None
except ValueError as error:
    refused = str(error)
auto = [distillation_loss(student, teacher).loss.item() for _ in range(3)]
wanted = distillation_loss(student, teacher, backend="torch").loss.item()
print(json.dumps({
    "files": [distilfast.__file__, distilfast_kernels.__file__],
    "unavailable": distilfast_kernels.unavailable("cpp"),
    "refused": refused,
    "auto": auto,
    "wanted": wanted,
}))
"""


@pytest.mark.thorough
def test_install_without_a_compiler_computes_with_torch_and_says_so_once(
    left_out: tuple[Path, Any],
) -> None:
    folder, _ = left_out
    path = os.pathsep.join([str(folder), str(folder / "kernels")])
    done = run_python(LEFT_OUT, folder=folder, path=path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert all(file.startswith(str(folder)) for file in found["files"])
    assert "was not built" in found["unavailable"]
    assert "C++ compiler" in found["unavailable"]
    assert found["refused"] == f"backend: 'cpp' cannot be used here: {found['unavailable']}"
    assert found["auto"] == [found["wanted"]] * 3
    said = [line for line in done.stderr.splitlines() if line.strip()]
    assert said == [f"backend auto: torch on cpu, as cpp cannot be used: {found['unavailable']}"]


# accumulate


@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("width", [1, 15, 16, 17, 64, 131])
def test_accumulate_adds_in_fp32_inside_wider_rows(
    level: str, dtype: torch.dtype, width: int
) -> None:
    wide = torch.full((5, width + 3), 7.0)
    total, share = wide[:, :width], torch.randn(5, width + 1).to(dtype)[:, :width]
    total.copy_(torch.randn(5, width))
    before = total.clone()
    cpp.accumulate(total, share, True)
    assert torch.equal(total, before + share.float())
    total.fill_(NAN)  # what is there before the first share is not read
    cpp.accumulate(total, share, False)
    assert torch.equal(total, share.float())
    assert (wide[:, width:] == 7).all()


# scale


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_scale_reads_and_rounds_every_number_as_torch_does(level: str, dtype: torch.dtype) -> None:
    # all 65,536 of them, alone in the rest of a row, too: subnormal, infinite, NaN, -0
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    factors = (1.0, -1.0, 1 / 3, 1.0 + 2**-9, 2.0**-9, 3e-5, 2.0**9, 2.0**100, 0.0, -0.0, INF, NAN)
    for by in factors:
        exact = (numbers.float() * by).to(dtype)
        for shape in ((1, 2**16), (2**14, 4), (2**13, 8), (2**15, 2)):
            ours = numbers.clone().reshape(shape)
            cpp.scale([ours], torch.tensor(by))
            ours = ours.reshape(-1)
            good = (bits(ours) == bits(exact)) | (ours.isnan() & exact.isnan())
            if dtype == BF16 and level == "avx512bf16":
                # the instruction that rounds to bf16 takes what is below 2^-126 for 0
                tiny = exact.abs() <= 2.0**-126
                good |= tiny & (ours == 0)
            with told(by=by, shape=shape):
                bad = (~good).nonzero()[:, 0].tolist()
                assert not bad, [
                    (numbers[i].item(), ours[i].item(), exact[i].item()) for i in bad[:4]
                ]


# hidden_cosine


@every_dtype
@pytest.mark.parametrize("wide", [False, True], ids=["own-dtype", "fp32-gradients"])
def test_poisoned_gradient_of_hidden_rows_is_written_whole_around_each_boundary(
    level: str, wide: bool, dtype: torch.dtype
) -> None:
    # wide: what losses.py asks for where the student is fp16
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0])
    for width in (*range(1, 71), 255, 256, 257, 1030):
        pair = logits_pair((5, width), dtypes=(dtype, dtype))
        student, teacher = placed(pair[0], stride=width + 1), placed(pair[1], shift=1)
        student[1], teacher[1] = NAN, INF  # outside the mask
        student[2] = 0
        student[3, : width // 2], teacher[3, : width // 2] = -INF, -INF
        gradient = hole(
            5, width, FP32 if wide else dtype, stride=width + width % 4, shift=width % 17
        )
        before = student.clone(), teacher.clone()
        with told(width=width):
            check_hidden([student], [teacher], mask, [gradient], scale=-2.0)
            assert_same([student, teacher], before)
            student[1] = teacher[1] = 1.0
            check_hidden([student], [teacher], None, [gradient.fill_(NAN)])


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("student_dtype", DTYPES, ids=["fp32", "fp16", "bf16"])
def test_hidden_layers_of_any_dtypes_and_widths_are_averaged(
    level: str, student_dtype: torch.dtype, teacher_dtype: torch.dtype
) -> None:
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0])
    widths = (33, 12, 5, 64, 131)
    pairs = [
        logits_pair((7, width), seed=i, dtypes=(student_dtype, teacher_dtype))
        for i, width in enumerate(widths)
    ]
    for s, t in pairs:
        s[1], t[1] = NAN, INF
    students, teachers = [s for s, _ in pairs], [t.T.contiguous().T for _, t in pairs]
    for dtype in (student_dtype, FP32):
        gradients = [hole(7, width, dtype, stride=width + 2) for width in widths]
        check_hidden(students, teachers, mask, gradients, scale=3.0)


# combine_teachers


WEIGHTS = {1: [1.0], 2: [0.25, 0.75], 5: [0.1, 0.0, 0.2, 0.3, 0.4]}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", WEIGHTS)
def test_poisoned_combination_is_written_whole_around_each_boundary(
    level: str, count: int, mode: str
) -> None:
    weights = WEIGHTS[count]
    for vocab in (*range(1, 71), 255, 256, 257, FIRST_COLUMNS + 1):
        teachers = []
        for k in range(count):
            dtype = DTYPES[(vocab + k) % 3]
            logits, _ = logits_pair((4, vocab + k), seed=k, dtypes=(dtype, dtype))
            logits[:, vocab:] = NAN  # a wider head
            teachers.append(placed(logits, stride=vocab + k + 2, shift=k))
            if not weights[k]:
                teachers[k].fill_(NAN)  # not read
        z = hole(4, vocab, FP32, stride=vocab + vocab % 3, shift=vocab % 17)
        with told(vocab=vocab):
            temperature = (0.5, 1.0, 2.0, 7.3)[vocab % 4]
            check_combination(teachers, weights, temperature, mode, z)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", WEIGHTS)
def test_combination_of_teachers_that_exclude_columns_equals_the_definition(
    level: str, count: int, mode: str
) -> None:
    # a column that the first, a later one, each but one, or all exclude
    vocab = 2 * count + 40
    weights = WEIGHTS[count]
    teachers = [logits_pair((3, vocab), seed=k)[0] for k in range(count)]
    for k in range(count):
        teachers[k][0, k] = -INF
        teachers[k][0, [count + j for j in range(count) if j != k]] = -INF
        teachers[k][0, 30] = -INF
        teachers[k][1, 1 + k :] = -INF  # all but the first few
    check_combination(teachers, weights, 2.0, mode, hole(3, vocab, FP32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
def test_what_one_teacher_spoils_is_spoilt_and_no_other_row(
    level: str, bad: float, mode: str
) -> None:
    # a NaN, an infinity, or a whole row without a token, of each teacher in turn
    for who in range(3):
        for columns in (slice(7, 8), slice(69, 70), slice(None)):
            teachers = [logits_pair((3, 70), seed=k)[0] for k in range(3)]
            teachers[who][1, columns] = bad
            with told(who=who, columns=columns):
                z = hole(3, 70, FP32)
                check_combination(teachers, [0.2, 0.3, 0.5], 2.0, mode, z)


@pytest.mark.parametrize("mode", MODES)
def test_combination_of_teachers_far_apart_is_one_of_them(level: str, mode: str) -> None:
    # the size of the third is rounded away where there is a fused multiply-add
    first, _ = logits_pair((3, 264), offset=-700.0)
    teachers = [first, first + 500.0, first.flip(1) * 30]
    size = 700 if mode == "probability" and level != "plain" else 30 * 700
    z = hole(3, 264, FP32)
    check_combination(teachers, [0.25, 0.25, 0.5], 4.0, mode, z, size=size)


# What is touched beyond a tensor: nothing


# Every tensor is as small as it can be, and behind it (mode "end") or before it ("begin") is a page
# that must not be touched; or ("malloc") it is memory that a sanitizer watches. Masked loads and
# stores, which a sanitizer of GCC's does not see, fault there too. `short`: of the gradient of one
# launch so many bytes are beyond; that must be noticed.
BEYOND = r"""
import ctypes, itertools, math, mmap, os, sys
import torch
from distilfast.losses.reference import Options
from distilfast_kernels import cpp

mode, library, short = sys.argv[1], sys.argv[2], int(sys.argv[3])
if library:
    cpp.LIBRARY = library
    cpp._library.cache_clear()
    cpp.best_level.cache_clear()
    assert cpp._library()._name == library
libc = ctypes.CDLL(None, use_errno=True)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
fences, used, kept = {}, itertools.count(), []

def allocate(size, beyond=0):
    if mode == "malloc":
        kept.append(libc.malloc(size - beyond))
        return kept[-1]
    pages = 1 << max(1, size // mmap.PAGESIZE).bit_length()
    key = next(used), pages
    if key not in fences:
        memory = mmap.mmap(-1, (pages + 2) * mmap.PAGESIZE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for page in (0, pages + 1):
            assert libc.mprotect(start + page * mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
        fences[key] = memory, start + mmap.PAGESIZE, start + (pages + 1) * mmap.PAGESIZE
    _, begin, end = fences[key]
    return begin - beyond if mode == "begin" else end - size + beyond

def tight(n_rows, n_cols, dtype, stride=None, beyond=0):
    stride = stride or n_cols
    size = ((n_rows - 1) * stride + n_cols) * dtype.itemsize
    memory = (ctypes.c_char * size).from_address(allocate(size, beyond))
    flat = torch.frombuffer(memory, dtype=dtype)
    return flat.as_strided((n_rows, n_cols), (stride, 1))

def filled(n_rows, n_cols, dtype, stride=None):
    return tight(n_rows, n_cols, dtype, stride).copy_(numbers[:n_rows, :n_cols])

def vector(values, dtype):
    return tight(1, len(values), dtype)[0].copy_(torch.tensor(values, dtype=dtype))

def again():
    global used
    used = itertools.count()
    while kept:
        libc.free(kept.pop())

numbers = torch.randn(64, 4200, generator=torch.Generator().manual_seed(0))
FP32, FP16, BF16 = dtypes = torch.float32, torch.float16, torch.bfloat16
every = [
    (1.0, 0.0, 0.0, 0.0), (1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0), (0.0, 1.0, 0.0, 0.0),
    (0.0, 0.0, 1.0, 0.0), (0.0, 0.0, 0.0, 1.0),
]
kinds = "forward_kl", "reverse_kl", "jsd"
long = [*range(2046, 2051), 2063, 2065, 2111, 4097]
calls = 0

def distil(n_rows, vocab, dtypes, weights, kind, beyond=0, padded=0, stride=0, temperature=2.0,
           layout="beside", masked=True):
    global calls
    again()
    width = vocab + padded
    student = filled(n_rows, width, dtypes[0], width + stride % 7)
    teacher = filled(n_rows, width, dtypes[1], width + stride % 5)
    if layout == "inside":
        gradient = student
    else:
        gradient = tight(n_rows, width, dtypes[0], width + stride, beyond)
    labels = vector([(0, vocab - 1, -100)[row % 3] for row in range(n_rows)], torch.int64)
    mask = vector([(1.0, 0.5, 0.0, 2.0)[row % 4] for row in range(n_rows)], FP32)
    by = vector([1.0] * n_rows, FP32)
    chosen = Options(temperature, *weights, 0.5, kind, -100, vocab)
    calls += 1
    return cpp.distillation(
        student, teacher, labels, mask if masked else None, by, by, chosen,
        None if layout == "nowhere" else gradient,
    )

for level in cpp.LEVELS[: cpp.LEVELS.index(cpp.best_level()) + 1]:
    os.environ["DISTILFAST_CPU_LEVEL"] = level
    if short:
        print(level if len(sys.argv) < 5 else sys.argv[4], flush=True)
        os.environ["DISTILFAST_CPU_LEVEL"] = sys.argv[4]
        distil(1, 64, (FP32, FP32), every[0], kinds[0], beyond=short)
        sys.exit("nobody noticed")
    for number, (vocab, pair) in enumerate(
        itertools.product([*range(1, 71), *long], itertools.product(dtypes, repeat=2))
    ):
        if pair[0] != pair[1] and vocab % 3 and vocab > 40:
            continue
        for i, weights in enumerate(every):
            distil(
                1 + vocab % 3, vocab, pair, weights, kinds[(number + i) % 3],
                padded=(0, 0, 3)[i % 3], stride=(0, 1, 5)[number % 3],
                temperature=(2.0, 2.5)[number % 2],
                layout=("beside", "inside", "nowhere", "beside")[(number + i) % 4],
                masked=number % 5 > 0,
            )
    # streamed
    for dtype, vocab in itertools.product(dtypes, [*range(1, 20), 33, 64, 65, 130]):
        stride = (16 << 20) // 64 // dtype.itemsize + 1
        distil(64, vocab, (dtype, dtype), every[2], kinds[vocab % 3], stride=stride)
    for width, pair in itertools.product([*range(1, 71), 700], itertools.product(dtypes, repeat=2)):
        again()
        student, teacher = filled(3, width, pair[0], width + 2), filled(3, width, pair[1])
        mask, by = vector([1.0, 0.0, 0.5], FP32), vector([1.0, 2.0, 3.0], FP32)
        gradient = tight(3, width, pair[0] if width % 2 else FP32, width + width % 3)
        cpp.hidden_cosine([student], [teacher], mask, by, [gradient])
        cpp.hidden_cosine([student], [teacher], None, by, [])
        teachers = [student, teacher, filled(3, width, pair[1], width + 1)]
        for how in ("probability", "logit"):
            z = tight(3, width, FP32, width + 3)
            for count in (1, 2, 3):
                cpp.combine_teachers(teachers[:count], [1 / count] * count, 2.0, how, width, z)
        cpp.scale([student], by)
        cpp.scale([teacher], by[:1].reshape(()))
        calls += 10
    torch.set_num_threads(2)
    for vocab in (700, 2049, 4097):  # enough to be worth a second thread
        distil(64, vocab, (BF16, FP32), every[2], "jsd")
    torch.set_num_threads(1)
print(calls)
"""


@pytest.mark.thorough
@needs_library
@pytest.mark.parametrize("mode", ["end", "begin"])
def test_nothing_beyond_a_tensor_is_touched(mode: str) -> None:
    done = run_python(BEYOND, mode, "", "0", PYTHONFAULTHANDLER="1")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 1000


@pytest.mark.thorough
@pytest.mark.parametrize("mode", ["end", "begin"])
def test_touch_beyond_a_tensor_would_be_noticed(level: str, mode: str) -> None:
    # else the test above proves nothing
    done = run_python(BEYOND, mode, "", "4", level)
    assert done.returncode < 0, done.stderr  # a signal
    assert done.stdout == f"{level}\n"


def sanitizers(compiler: str) -> str:
    """What has to be loaded before Python is, for LD_PRELOAD."""
    paths = []
    for name in ("libasan.so", "libubsan.so"):
        asked = [compiler, f"-print-file-name={name}"]
        path = subprocess.run(asked, capture_output=True, text=True).stdout.strip()
        if not Path(path).is_absolute():
            pytest.skip(f"{compiler} has no {name}")
        paths.append(path)
    return " ".join(paths)


@pytest.mark.slow
@needs_library
def test_sanitizers_find_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    compiler = program("g++")
    preload = sanitizers(compiler)
    monkeypatch.setattr(setuptools, "setup", lambda **keywords: None)
    monkeypatch.chdir(ROOT)
    chosen = runpy.run_path("setup.py")
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    for level, flags in chosen["LEVELS"].items():
        source, target = str(CSRC / f"{level}.cpp"), str(tmp_path / f"{level}.o")
        command = [compiler, *chosen["FLAGS"], *flags, "-O1", "-g", *checks]
        done = subprocess.run(
            [*command, "-c", source, "-o", target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    library = str(tmp_path / "library.so")
    linked = sorted(str(path) for path in tmp_path.glob("*.o"))
    subprocess.run([compiler, "-shared", *checks, *linked, "-o", library], check=True)
    environment = {
        "LD_PRELOAD": preload,
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    done = run_python(BEYOND, "malloc", library, "0", **environment)
    assert done.returncode == 0, done.stderr[-6000:]
    assert int(done.stdout) > 1000
    for level in cpu_levels():  # an element too much would have been noticed
        done = run_python(BEYOND, "malloc", library, "4", level, **environment)
        assert done.returncode != 0
        assert re.search("ERROR: AddressSanitizer.*WRITE of size", done.stderr, re.DOTALL), (
            done.stderr[-6000:]
        )
