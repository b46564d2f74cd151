"""The custom operators: opcheck, on the calls that the public functions make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from distilfast import linear, losses

ALL = {"kd_weight": 1.0, "ce_weight": 0.5, "cos_weight": 0.2, "mse_weight": 0.1}


def dense(reduction: str, backend: str, device: str, dtype: torch.dtype) -> None:
    student = torch.randn(5, 9, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(5, 9, device=device)
    labels = torch.tensor([1, -100, 3, -100, 6], device=device)
    mask = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], device=device)
    losses.distillation_loss(
        student, teacher, labels, mask=mask, reduction=reduction, backend=backend, **ALL
    )


def hidden(reduction: str, backend: str, device: str, dtype: torch.dtype) -> None:
    student = [torch.randn(5, 4, device=device).to(dtype).requires_grad_() for _ in range(2)]
    teacher = [torch.randn(5, 4, device=device) for _ in range(2)]
    losses.hidden_cosine_loss(student, teacher, reduction=reduction, backend=backend)


def head(reduction: str, backend: str, device: str, dtype: torch.dtype) -> None:
    made = [torch.randn(n, 4, device=device).to(dtype).requires_grad_() for n in (5, 9)]
    bias = torch.randn(9, device=device).to(dtype).requires_grad_()
    teachers = [torch.randn(n, 3, device=device) for n in (5, 9)]
    linear.linear_distillation_loss(
        *made, *([x, x] for x in teachers), student_bias=bias, reduction=reduction, backend=backend
    )


CALLS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "distillation": (losses, "distillation_op", dense),
    "hidden_cosine": (losses, "hidden_cosine_op", hidden),
    "linear": (linear, "linear_distillation_op", head),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("name", CALLS)
def test_operator_passes_opcheck(
    name: str,
    reduction: str,
    dtype: torch.dtype,
    backend: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Schema, fake implementation and autograd registration fit the operator; fp16 and "none" take
    the path where the backward computes the gradient."""
    module, attribute, call = CALLS[name]
    operator, seen = getattr(module, attribute), []

    def spy(*arguments: Any) -> Any:
        seen.append(arguments)
        return operator(*arguments)

    monkeypatch.setattr(module, attribute, spy)
    torch.manual_seed(0)
    call(reduction, backend, device, dtype)
    (arguments,) = seen
    torch.library.opcheck(operator, leaves(arguments))


def leaves(value: Any) -> Any:
    """The same arguments with tensors that are leaves: opcheck looks at their .grad."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, (list, tuple)):
        return type(value)(map(leaves, value))
    return value
