"""The fused kernels of distilfast: what `distilfast.backends` may reach, and nothing else may.

Imports torch and triton only, each kernel file on first use, so that a machine without triton or a
compiler can still import this package. `unavailable` is the whole contract so far: the Triton and
C++ kernels have not landed, and this says so rather than pretending.
"""

from __future__ import annotations


def unavailable(backend: str) -> str | None:
    """Why the kernels of ``backend``, "triton" or "cpp", cannot be used; None where they can."""
    return f"this release of distilfast has no {backend} kernels yet"
