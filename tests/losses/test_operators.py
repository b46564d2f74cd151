"""The custom operators: opcheck, on the calls that the public functions make, and what a call of
each would launch on a GPU."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distilfast import hidden_cosine_loss
from distilfast.losses import (
    arguments,
    backends,
    dense,
    linear,
    linear_operator,
    operators,
    products,
)

ALL = {"kd_weight": 1.0, "ce_weight": 0.5, "cos_weight": 0.2, "mse_weight": 0.1}


def logits(reduction: str, backend: str, device: str, dtype: torch.dtype) -> None:
    student = torch.randn(5, 9, device=device).to(dtype).requires_grad_()
    teacher = torch.randn(5, 9, device=device)
    labels = torch.tensor([1, -100, 3, -100, 6], device=device)
    mask = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0], device=device)
    dense.distillation_loss(
        student, teacher, labels, mask=mask, reduction=reduction, backend=backend, **ALL
    )


def hidden(reduction: str, backend: str, device: str, dtype: torch.dtype) -> None:
    student = [torch.randn(5, 4, device=device).to(dtype).requires_grad_() for _ in range(2)]
    teacher = [torch.randn(5, 4, device=device) for _ in range(2)]
    dense.hidden_cosine_loss(student, teacher, reduction=reduction, backend=backend)


def head(reduction: str, backend: str, device: str, dtype: torch.dtype) -> None:
    made = [torch.randn(n, 4, device=device).to(dtype).requires_grad_() for n in (5, 9)]
    bias = torch.randn(9, device=device).to(dtype).requires_grad_()
    teachers = [torch.randn(n, 3, device=device) for n in (5, 9)]
    linear.linear_distillation_loss(
        *made, *([x, x] for x in teachers), student_bias=bias, reduction=reduction, backend=backend
    )


CALLS: dict[str, tuple[Any, str, Callable[..., None]]] = {
    "distillation": (dense, "distillation_op", logits),
    "hidden_cosine": (dense, "hidden_cosine_op", hidden),
    "linear": (linear, "linear_distillation_op", head),
}


# PyTorch from 2.14 on warns in its own opcheck.
@pytest.mark.thorough
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
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


# What a call launches on a GPU


class Launches(TorchDispatchMode):
    """The graph of a call below autograd, by names: PyTorch's operators but for views and empty
    tensors, and the Triton kernels, which tell their name and do nothing."""

    NO_KERNEL = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach")

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.seen: list[str] = []
        self.bodies = {
            op._qualname: op._init_fn
            for module in (operators, linear_operator)
            for op in vars(module).values()
            if isinstance(op, torch.library.CustomOpDef)
        }
        for file in ("distillation", "hidden_cosine", "ensemble", "scale", "reductions"):
            module = importlib.import_module(f"distilfast_kernels.{file}")
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Told(name.removesuffix("_kernel"), self.seen))
        # CPU tensors take a GPU's way. The values of labels and masks are looked at on CPUs alone.
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True), raising=False)
        monkeypatch.setattr(torch.cuda, "device_of", lambda _: contextlib.nullcontext())
        for module in (operators, linear_operator):
            monkeypatch.setattr(module, "check_values", lambda *_: None)
        monkeypatch.setattr(operators, "check_mask_values", lambda _: None)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = function._schema.name
        if name in self.bodies:
            with self:
                return self.bodies[name](*args, **(kwargs or {}))
        result = function(*args, **(kwargs or {}))
        writes = any(a.alias_info and a.alias_info.is_write for a in function._schema.arguments)
        made = {x.untyped_storage().data_ptr() for x in tree_leaves(result) if is_tensor(x)}
        given = {x.untyped_storage().data_ptr() for x in tree_leaves(args) if is_tensor(x)}
        view = made and made <= given and not writes
        if not view and name.removeprefix("aten::") not in self.NO_KERNEL:
            self.seen.append(name.removeprefix("aten::"))
        return result


class Told:
    """In the place of a Triton kernel."""

    def __init__(self, name: str, seen: list[str]):
        self.name, self.seen = name, seen

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *_, **__: self.seen.append(self.name)


N, V, D = 64, 512, 32


def logits(**keywords: Any) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """KL + CE, from logits."""
    student, teacher = torch.zeros(N, V, requires_grad=True), torch.zeros(N, V)
    labels = torch.zeros(N, dtype=torch.int64) if keywords.get("ce_weight", 1.0) else None
    keywords = {"ce_weight": 1.0, "backend": "triton", **keywords}
    return lambda: (
        dense.distillation_loss(student, teacher, labels, **keywords).loss,
        [student],
    )


def cosine(layers: int) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    student = [torch.zeros(N, D, requires_grad=True) for _ in range(layers)]
    teacher, mask = [torch.zeros(N, D)] * layers, torch.ones(N, dtype=torch.bool)
    return lambda: (hidden_cosine_loss(student, teacher, mask, backend="triton"), student)


def hidden_states(
    dtype: torch.dtype = torch.float32, **keywords: Any
) -> Callable[[], tuple[Tensor, list[Tensor]]]:
    """KL + CE, from hidden states, through heads with a bias."""
    hidden, weight, bias = (torch.zeros(s, dtype=dtype) for s in ((N, D), (V, D), (V,)))
    leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
    labels = torch.zeros(N, dtype=torch.int64)
    keywords = {"student_bias": leaves[2], "teacher_bias": bias, "ce_weight": 1.0, **keywords}
    return lambda: (
        linear.linear_distillation_loss(
            *leaves[:2], hidden, weight, labels, backend="triton", **keywords
        ).loss,
        leaves,
    )


TOTALS = {"kd_normalizer": torch.tensor(3.0), "ce_normalizer": torch.tensor(2.0)}
MASK = torch.ones(N, dtype=torch.bool)
AROUND = ["scales", "distillation", "reduce"]
PRODUCTS = ["addmm", "addmm", "distillation", "sum", "add_", "mm", "addmm"]  # of a chunk
CALLED: dict[str, tuple[Callable[[], Any], list[str], list[str]]] = {
    "KL": (lambda: logits(ce_weight=0.0), AROUND, ["scale"]),
    "KL + CE": (logits, AROUND, ["scale"]),
    "KL + CE under a mask": (lambda: logits(mask=MASK), AROUND, ["scale"]),
    "KL + CE over given totals": (lambda: logits(mask=MASK, **TOTALS), AROUND, ["scale"]),
    "KL + CE by rows": (
        lambda: logits(reduction="none"),
        ["scales", "distillation", "weigh"],
        ["scale"],
    ),
    "in place": (lambda: logits(inplace_backward=True), AROUND, ["mul", "distillation"]),
    "hidden states": (lambda: cosine(6), ["scales", "hidden_cosine", "reduce"], ["scale"]),
    "twelve layers": (
        lambda: cosine(12),
        ["scales", "hidden_cosine", "hidden_cosine", "reduce"],
        ["scale", "scale"],
    ),
    "a head": (hidden_states, ["scales", "zeros", *PRODUCTS, "reduce"], ["scale"]),
    "a head over given totals": (
        lambda: hidden_states(**TOTALS),
        ["scales", "zeros", "where", *PRODUCTS, "reduce"],
        ["scale"],
    ),
    "a head in chunks": (
        lambda: hidden_states(chunk_rows=N // 2),
        ["scales", "zeros", *(2 * [*PRODUCTS[:5], "copy_", *PRODUCTS[5:]]), "reduce"],
        ["scale"],
    ),
    "a head in fp16": (
        # A CPU's product of fp16 cannot give fp32; the number of launches is the same.
        lambda: hidden_states(torch.float16, logits_dtype=torch.float16),
        ["scales", "addmm", "addmm", "distillation", "reduce"],
        # times the loss scale; which rows are needed; and no scaling of what is finished
        [*"mul ne ne ne __and__ __or__ zeros where".split(), *PRODUCTS, "reduce", "to"],
    ),
}


@pytest.mark.skipif(backends.unavailable("triton") is not None, reason="triton is not installed")
@pytest.mark.parametrize("name", CALLED)
def test_call_launches_so_many_kernels_on_a_gpu(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    make, forward, backward = CALLED[name]
    call = make()
    for module in (arguments, dense):  # it reads a CPU's totals
        monkeypatch.setattr(module, "check_reduction", lambda *_: None)
    launches = Launches(monkeypatch)
    monkeypatch.setattr(operators, "_is_traced", lambda _: False)  # by whoever counts here
    on_a_gpu = products.Products(backends.BACKENDS["triton"])
    monkeypatch.setattr(products.Products, "of", lambda *_: on_a_gpu)
    monkeypatch.setattr(importlib.import_module("distilfast_kernels.rows"), "is_aligned", _true)
    with launches:
        loss, leaves = call()
        assert launches.seen == forward
        upstream = torch.full_like(loss, 2.0)
        launches.seen.clear()
        torch.autograd.grad(loss, leaves, upstream)
    # Of a CPU's grad_output the value is looked at: a GPU's is left to the kernel.
    looked_at = ["eq", "_local_scalar_dense"] * (launches.seen[:1] == ["eq"])
    assert launches.seen == [*looked_at, *backward]


def _true(*_: Any) -> bool:
    return True
