"""The fused kernels of distilfast: what `distilfast.backends` may reach, and nothing else may.

One file a family, each from top to bottom: mathematics, kernel, launcher.

    distillation    every loss over the vocabulary and its gradient
    hidden_cosine   the cosine distance of hidden states
    ensemble        several teachers as one
    scale           finished gradients times what the backward brings
    reductions      what stands around a row kernel: totals before it, sums after it
    rows            what those have in common
    cpp             the first four on a CPU, in C++ (kernels/csrc)

Operators, fakes and autograd are the same for every backend and live in `distilfast.losses`. The
files import torch and triton only, on first use, so that a machine without triton can still import
this package.
"""

from __future__ import annotations

import importlib.util
import os

import torch

from distilfast_kernels import cpp

# Looked up once; triton without importing it, which takes a second, and not every run needs it.
_HAS_TRITON = importlib.util.find_spec("triton") is not None
_CPP_ERROR = cpp.load_error()


def unavailable(backend: str) -> str | None:
    """Why the kernels of ``backend``, "triton" or "cpp", cannot be used; None where they can."""
    if backend == "triton":
        if not _HAS_TRITON:
            return "triton is not installed"
        if torch.version.hip is not None:
            return "these kernels are for NVIDIA's GPUs"
        if not (torch.cuda.is_available() or interpreted()):
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels, slowly, on a CPU)"
        return None
    return _CPP_ERROR


def interpreted() -> bool:
    """Whether triton runs its kernels in Python, on CPU tensors: TRITON_INTERPRET=1, set before
    triton is imported."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")
