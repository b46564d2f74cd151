"""The list of backends, and the choice between them. A new backend is one entry in BACKENDS.

A backend is a set of functions. Most have the name and the definition of a function in
`reference.py`. They work on rows: they take (N, V) logits, return (4, N) parts and fill gradient
tensors that the caller provides. The public functions handle shapes and errors, the custom
operators autograd and torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import distilfast_kernels
import torch
from torch import Tensor

from distilfast.losses import reference
from distilfast.losses.reference import Options

logger = logging.getLogger("distilfast")


def torch_accumulate(total: Tensor, share: Tensor, begun: bool) -> None:
    if begun:
        total += share
    else:
        total.copy_(share)


@dataclass(frozen=True)
class Backend:
    """An implementation of the losses.

    Every tensor that a function fills is dense along its rows.

    - ``unavailable``: why the backend cannot be used on this machine; None if it can.
    - ``accepts``: whether it takes tensors of a device type ("cpu", "cuda") and dtype.
    - ``distillation``, ``hidden_cosine``: as in `reference.py`.
    - ``combine_teachers``: fills its last argument, (N, vocab_size), which may be the first of the
      logits.
    - ``scale``: multiplies each (N, M) tensor of a list by a () or (N,) factor, in place, and
      computes in fp32 at least.
    - ``row_scales``, ``reduce_rows``: run before and after the row kernels.
    - ``accumulate``: adds (N, M) to an fp32 sum; with ``begun`` False it overwrites the sum.
    - ``adds_bias``: ``distillation`` takes heads with a bias, and is faster than a separate pass
      that adds the bias to the products.
    - ``overwrites``: a gradient of fewer bits than the logits may lie in the logits' memory.
    - ``product``: computes fp32 logits from bf16 hidden states and a weight. It is used where
      ``multiplies`` returns True.
    """

    name: str
    unavailable: Callable[[], str | None]
    accepts: Callable[[str, torch.dtype], bool]
    distillation: Callable[..., Tensor]
    hidden_cosine: Callable[..., Tensor]
    combine_teachers: Callable[..., None]
    scale: Callable[[Sequence[Tensor], Tensor], None]
    row_scales: Callable[..., Tensor] = reference.row_scales
    reduce_rows: Callable[..., tuple[Tensor, Tensor]] = reference.reduce_rows
    accumulate: Callable[[Tensor, Tensor, bool], None] = torch_accumulate
    adds_bias: bool = False
    overwrites: bool = False
    multiplies: Callable[[], bool] = lambda: False
    product: Callable[..., None] = reference.product


# Logits in a block of rows. A block's intermediates stay in cache, which halves the time on a CPU.
# Memory beyond inputs and gradient does not grow with N.
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 26}


def _torch_distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    options: Options,
    gradient: Tensor | None,
    heads: tuple[reference.Head, reference.Head] = reference.PLAIN,
    bias_gradient: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """Run `reference.distillation` on one block of rows at a time."""
    n_rows = student.shape[0]
    block = max(1, BLOCK_ELEMENTS.get(student.device.type, 1 << 26) // options.vocab_size)
    rows = []
    for start in range(0, max(n_rows, 1), block):
        part = slice(start, start + block)
        rows.append(
            reference.distillation(
                student[part],
                teacher[part],
                None if labels is None else labels[part],
                None if mask is None else mask[part],
                kd_scale[part] if kd_scale.ndim else kd_scale,
                ce_scale[part] if ce_scale.ndim else ce_scale,
                options,
                None if gradient is None else gradient[part],
                heads,
                bias_gradient,
                None if statistics is None else statistics[:, part],
            )
        )
    return torch.cat(rows, dim=1)


def _torch_combine_teachers(*arguments: Any) -> None:
    logits, *others, z = arguments
    block = max(1, BLOCK_ELEMENTS.get(z.device.type, 1 << 26) // max(1, z.shape[1]))
    for start in range(0, z.shape[0], block):
        part = slice(start, start + block)
        z[part] = reference.combine_teachers([t[part] for t in logits], *others)


def _torch_scale(gradients: Sequence[Tensor], by: Tensor) -> None:
    for gradient in gradients:
        compute = reference.accumulation_dtype(gradient)
        elements = BLOCK_ELEMENTS.get(gradient.device.type, 1 << 26)
        block = max(1, elements // max(1, gradient.shape[1]))
        for start in range(0, gradient.shape[0], block):
            part = gradient[start : start + block]
            factor = by[start : start + block, None] if by.ndim else by
            part.copy_(part.to(compute) * factor.to(compute))


def _kernels(file: str, function: str) -> Callable[..., Any]:
    """Return a launcher that is imported at its first call: triton or the library may be missing.

    Triton launches on the current device, so the caller wraps the call in `on_device`.
    """
    name = f"distilfast_kernels.{file}"

    def launch(*arguments: Any) -> Any:
        module = sys.modules.get(name) or importlib.import_module(name)
        return getattr(module, function)(*arguments)

    return launch


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's device the current one, once for all launches of an operator."""
    return torch.cuda.device_of(tensor) if tensor.is_cuda else contextlib.nullcontext()


# The dtypes of the fused kernels. Only the reference takes fp64.
_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _triton_accepts(device: str, dtype: torch.dtype) -> bool:
    on_device = device == "cuda" or (device == "cpu" and distilfast_kernels.interpreted())
    return on_device and dtype in _FUSED_DTYPES


BACKENDS: dict[str, Backend] = {
    "triton": Backend(
        name="triton",
        unavailable=lambda: distilfast_kernels.unavailable("triton"),
        accepts=_triton_accepts,
        distillation=_kernels("distillation", "distillation"),
        hidden_cosine=_kernels("hidden_cosine", "hidden_cosine"),
        combine_teachers=_kernels("ensemble", "combine_teachers"),
        scale=_kernels("scale", "scale"),
        row_scales=_kernels("reductions", "row_scales"),
        reduce_rows=_kernels("reductions", "reduce_rows"),
    ),
    "cpp": Backend(
        name="cpp",
        unavailable=lambda: distilfast_kernels.unavailable("cpp"),
        accepts=lambda device, dtype: device == "cpu" and dtype in _FUSED_DTYPES,
        distillation=_kernels("cpp", "distillation"),
        hidden_cosine=_kernels("cpp", "hidden_cosine"),
        combine_teachers=_kernels("cpp", "combine_teachers"),
        scale=_kernels("cpp", "scale"),
        accumulate=_kernels("cpp", "accumulate"),
        adds_bias=True,
        overwrites=True,
        multiplies=_kernels("cpp", "multiplies"),
        product=_kernels("cpp", "product"),
    ),
    "torch": Backend(
        name="torch",
        unavailable=lambda: None,
        accepts=lambda device, dtype: True,
        distillation=_torch_distillation,
        hidden_cosine=reference.hidden_cosine,
        combine_teachers=_torch_combine_teachers,
        scale=_torch_scale,
        overwrites=True,
    ),
}


def unavailable(name: str) -> str | None:
    """Return why the backend cannot be used on this machine, or None if it can."""
    return BACKENDS[name].unavailable()


def usable() -> list[str]:
    """Return the names of the backends that can be used on this machine."""
    return [name for name in BACKENDS if unavailable(name) is None]


def choose(name: str, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Return the name of the backend for tensors of this device and these dtypes.

    A backend requested by name is used or refused, never replaced. "auto" chooses triton for CUDA
    tensors and cpp for CPU tensors. If that backend cannot be used, "auto" chooses torch and logs
    the reason once.

    Raises:
        ValueError: the name is unknown, or the backend cannot be used here or for these tensors.
    """
    if name == "auto":
        fused = {"cuda": "triton", "cpu": "cpp"}.get(device.type)
        if fused is None or torch.float64 in dtypes:
            return "torch"
        if unavailable(fused) is None:
            return fused
        if not torch.compiler.is_compiling():
            why = f"as {fused} cannot be used: {unavailable(fused)}"
            _say_once(f"backend auto: torch on {device.type}, {why}")
        return "torch"
    if name not in tuple(BACKENDS):  # a tuple, as the name may not be hashable
        known = ", ".join(("auto", *BACKENDS))
        raise ValueError(f"backend: expected one of {known}, got {name!r}")
    reason = unavailable(name)
    if reason is not None:
        raise ValueError(f"backend: {name!r} cannot be used here: {reason}")
    for dtype in dtypes:
        if not BACKENDS[name].accepts(device.type, dtype):
            raise ValueError(f"backend: {name!r} does not take {dtype} tensors on {device.type}")
    return name


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)
