"""Kernels called as `losses.py` calls them, and held against the oracle.

Their outputs hold NaN and lie inside more NaN: an element that is not written stays NaN, one that
is written too much is missed outside.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import torch
from oracle import (
    FP32,
    IGNORE,
    NAN,
    PARTS,
    Expected,
    assert_same,
    assert_within,
    combined_rows,
    expect,
)
from torch import Tensor

from distilfast.losses import backends
from distilfast.losses.reference import Options

MARGIN = 64  # elements around a matrix; a multiple of 16 bytes


# Memory


def hole(
    n_rows: int,
    columns: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
    *,
    stride: int | None = None,
    shift: int = 0,
) -> Tensor:
    """(N, columns) of NaN inside more NaN; ``shift`` elements behind a 16-byte boundary."""
    stride = columns if stride is None else stride
    around = torch.full((2 * MARGIN + shift + n_rows * stride,), NAN, dtype=dtype, device=device)
    return around.as_strided((n_rows, columns), (stride, 1), MARGIN + shift)


def placed(values: Tensor, **layout: int) -> Tensor:
    """The same values in another memory layout."""
    return hole(*values.shape, values.dtype, values.device, **layout).copy_(values)


def bits(tensor: Tensor) -> Tensor:
    by_size = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(by_size[tensor.element_size()])


def assert_nothing_else_was_written(window: Tensor) -> None:
    """Around it there is the NaN of `hole`, to the bit."""
    size = window.untyped_storage().nbytes() // window.element_size()
    around = window.as_strided((size,), (1,), 0)
    left = around.clone()
    left.as_strided(window.size(), window.stride(), window.storage_offset()).fill_(NAN)
    wrong = (bits(left) != bits(torch.full_like(left, NAN))).nonzero()
    assert not wrong.numel(), f"written outside: {(wrong[:, 0] - window.storage_offset()).tolist()}"


def some_labels(n_rows: int, vocab: int, device: str = "cpu") -> Tensor:
    """First, last and some other columns, every fifth row without one."""
    columns = [0, vocab - 1, vocab // 2, 1 % vocab, IGNORE]
    return torch.tensor([columns[i % 5] for i in range(n_rows)], device=device)


# Calls


def expect_of_cpp(
    student: Tensor, teacher: Tensor, labels: Tensor | None = None, **keywords: Any
) -> Expected:
    """The oracle's rows. Two things are added to their budget.

    Where one token has nearly all of the probability its logarithm is nearly 0, and so are the
    gradient and its budget. The kernels count from a whole number of bits above the maximum: what
    they round there is a part of a bit. And the plain level has no fused multiply-add, so that a
    logit's own size costs it digits.
    """
    found = expect(student, teacher, labels, **{**keywords, "reduction": "none"})
    temperature, by = keywords.get("temperature", 2.0), keywords.get("grad_output", 1.0)
    weight = keywords.get("kd_weight", 1.0) * torch.as_tensor(by).abs().double().reshape(-1, 1)
    vocab = keywords.get("vocab_size", student.shape[1])
    s, t = student[:, :vocab].double(), teacher[:, :vocab].double()
    both = torch.cat([(x / temperature).softmax(1) for x in (s, t)], 1)
    highest = both.nan_to_num(0).amax(1, keepdim=True)
    slack = found.grad_slack + 2.0**-23 * temperature * weight * highest
    values = dict(found.slack)
    if os.environ.get("DISTILFAST_CPU_LEVEL") == "plain":
        both = torch.cat([s, t], 1)
        digits = both.abs().nan_to_num(0, 0, 0).amax(1) / temperature * 2.0**-23  # of exponents
        ce_weight = keywords.get("ce_weight", 0.0)
        slack = slack + digits[:, None] * (temperature * weight + ce_weight * temperature)
        values["kd"] = values["kd"] + temperature**2 * digits
        values["ce"] = values["ce"] + temperature * digits
        values["loss"] = (
            values["loss"]
            + keywords.get("kd_weight", 1.0) * temperature**2 * digits
            + ce_weight * temperature * digits
        )
    return found._replace(slack=values, grad_slack=slack)


def options(vocab_size: int, **keywords: Any) -> Options:
    weights = {f"{part}_weight": 0.0 for part in PARTS} | {"kd_weight": 1.0}
    fixed = {"temperature": 2.0, "jsd_beta": 0.5, "divergence": "forward_kl"}
    rest = {"ignore_index": IGNORE, "vocab_size": vocab_size}
    return Options(**{**fixed, **weights, **rest, **keywords})


def launch(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gradient: Tensor | None = None,
    scale: float | Tensor = 1.0,
    heads: Any = backends.reference.PLAIN,
    **keywords: Any,
) -> Tensor:
    """(4, N) parts by row; the gradient goes where it is told to. The scale is that of every part's
    gradient: a number, (), or (N,)."""
    by = torch.as_tensor(scale, dtype=FP32, device=student.device)
    chosen = options(**{"vocab_size": student.shape[1], **keywords})
    kernel = backends.BACKENDS[backend].distillation
    return kernel(student, teacher, labels, mask, by, by, chosen, gradient, heads)


def check_launch(
    backend: str,
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    gradient: Tensor,
    scale: float | Tensor = 1.0,
    wanted: Callable[..., Expected] | None = None,
    **keywords: Any,
) -> None:
    """Every row's parts and gradient are the oracle's (wanted: whose), and nothing else is written,
    inputs included. gradient: a `hole`, or all of its memory."""
    inputs = [x for x in (student, teacher, labels, mask) if x is not None]
    before = [x.clone() for x in inputs]
    more = {"mask": mask, "reduction": "none", "grad_output": scale, "dtype": gradient.dtype}
    wanted = wanted or (expect_of_cpp if backend == "cpp" else expect)
    exact = wanted(student, teacher, labels, **more, **keywords)
    rows = launch(
        backend, student, teacher, labels, mask, gradient=gradient, scale=scale, **keywords
    )
    counted = torch.as_tensor(scale).cpu() != 0  # a row of scale 0 has no loss either
    for part, row in zip(PARTS, rows, strict=True):
        assert_within(part, row, exact.value[part] * counted, exact.slack[part])
    assert_within("gradient", gradient, exact.grad, exact.grad_slack)
    assert (gradient[:, keywords.get("vocab_size", gradient.shape[1]) :] == 0).all()
    assert_nothing_else_was_written(gradient)
    for x, as_it_was in zip(inputs, before, strict=True):
        assert torch.equal(bits(x), bits(as_it_was)), "an input was written to"


def check_hidden(
    backend: str,
    students: list[Tensor],
    teachers: list[Tensor],
    mask: Tensor | None,
    gradients: list[Tensor],
    scale: float | Tensor = 1.0,
) -> None:
    """Rows and gradients of a launch against the oracle's, layer by layer."""
    by = torch.as_tensor(scale, dtype=FP32, device=students[0].device)
    kernel, share = backends.BACKENDS[backend].hidden_cosine, 1 / len(students)
    rows = kernel(students, teachers, mask, by, gradients)
    cosine = {"mask": mask, "kd_weight": 0.0, "cos_weight": 1.0, "reduction": "none"}
    layers = [
        expect(*pair, grad_output=scale * share, dtype=gradient.dtype, **cosine)
        for *pair, gradient in zip(students, teachers, gradients, strict=True)
    ]
    value, slack = (
        torch.stack([x["cos"] for x in each]).mean(0)
        for each in ([x.value for x in layers], [x.slack for x in layers])
    )
    assert_within("rows", rows, value * (torch.as_tensor(scale).cpu() != 0), slack)
    for gradient, layer in zip(gradients, layers, strict=True):
        assert_within("gradient", gradient, layer.grad, layer.grad_slack)
        assert_nothing_else_was_written(gradient)
    if backend == "cpp":  # on a GPU another kernel, which a compiler may sum otherwise
        assert_same([kernel(students, teachers, mask, by, [])], [rows])


def check_combination(
    backend: str,
    teachers: list[Tensor],
    weights: list[float],
    temperature: float,
    mode: str,
    z: Tensor,
    size: float = 1.0,
) -> None:
    """size: of the logits; beyond 100 their own rounding counts."""
    vocab, before = z.shape[1], [t.clone() for t in teachers]
    backends.BACKENDS[backend].combine_teachers(teachers, weights, temperature, mode, vocab, z)
    wanted = combined_rows([t[:, :vocab] for t in teachers], weights, temperature, mode)
    assert_within("z", z, wanted.cpu(), 1e-5 * max(1.0, temperature, size / 100))
    assert_nothing_else_was_written(z)
    assert_same(teachers, before)


def calls_of(backend: str) -> list[Callable[..., Any]]:
    """launch, check_launch, check_hidden and check_combination of this backend."""
    calls = launch, check_launch, check_hidden, check_combination
    return [functools.partial(call, backend) for call in calls]
