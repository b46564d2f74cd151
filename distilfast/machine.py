"""This machine: its processor, the precision that it computes fast in, the code that it runs."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Literal

import torch

from distilfast._version import __version__


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16 products. Without them, PyTorch's bf16
    products take up to 200 times as long as its fp32 products (docs/kernels.md)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def best_precision(device: torch.device) -> Literal["bf16", "fp32"]:
    """bf16 if the device has instructions for it, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    return "bf16" if multiplies_bf16() else "fp32"


def cpu_name() -> str:
    """The processor's name, as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.partition(":")[2].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()


def code_version() -> str:
    """distilfast's version and, in a checkout, its commit: "distilfast 1.0.0 at 0123456789ab",
    with "-dirty" if a file was changed since."""
    named = f"distilfast {__version__}"
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return named
    describe = "git describe --always --dirty --abbrev=12 --exclude=*".split()
    try:
        ran = subprocess.run(describe, cwd=root, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return named
    return f"{named} at {ran.stdout.strip()}" if ran.returncode == 0 else named
