"""The fused kernels of distilfast: what `distilfast.backends` may reach, and nothing else may.

One file a family, each from top to bottom: mathematics, kernel, launcher.

    distillation    every loss over the vocabulary and its gradient
    hidden_cosine   the cosine distance of hidden states
    ensemble        several teachers as one
    scale           a finished gradient times what the backward brings
    rows            what those have in common

Operators, fakes and autograd are the same for every backend and live in `distilfast.losses`. The
files import torch and triton only, on first use, so that a machine without triton can still import
this package.
"""

from __future__ import annotations

import functools
import importlib.util

import torch


# Cached: asked at every call of a loss. Constant to torch.compile, which cannot look into triton.
@torch.compiler.assume_constant_result
@functools.cache
def unavailable(backend: str) -> str | None:
    """Why the kernels of ``backend``, "triton" or "cpp", cannot be used; None where they can."""
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if not (torch.cuda.is_available() or interpreted()):
            return "no CUDA device (TRITON_INTERPRET=1 runs the kernels, slowly, on a CPU)"
        return None
    return f"this release of distilfast has no {backend} kernels yet"


@torch.compiler.assume_constant_result
@functools.cache
def interpreted() -> bool:
    """Whether triton runs its kernels in Python, on CPU tensors (TRITON_INTERPRET=1)."""
    import triton

    return bool(triton.knobs.runtime.interpret)
