"""The C++ kernels: a shared library with a plain C interface, called through ctypes.

The kernels are in kernels/csrc; setup.py builds the library beside this file. They use the OpenMP
runtime that PyTorch has loaded, and as many threads as it does: one pool, not two that fight.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import re
from collections.abc import Sequence
from ctypes import c_double, c_int, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_cpp.so")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DIVERGENCES = {"forward_kl": 1, "reverse_kl": 2, "jsd": 3}
# The instruction sets, worst first. DISTILFAST_CPU_LEVEL asks for one by name.
LEVELS = ("plain", "avx2", "avx512", "avx512bf16")
ABI = 4


# --- The declarations of kernels/csrc/distilfast.h -----------------------------------------------


class _Matrix(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("stride", c_int64), ("dtype", c_int64))


class _Head(ctypes.Structure):
    _fields_ = (("scale", c_double), ("softcap", c_double), ("bias", c_void_p))


class _DistillationArguments(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("student", "teacher", "gradient")),
        *((name, _Head) for name in ("student_head", "teacher_head")),
        ("bias_gradient", c_void_p),
        *((name, c_void_p) for name in ("labels", "mask", "kd_scale", "ce_scale")),
        *((name, c_int64) for name in ("kd_scale_stride", "ce_scale_stride")),
        *((name, c_void_p) for name in ("rows", "statistics")),
        *(
            (name, c_int64)
            for name in ("n_rows", "n_cols", "n_padded", "ignore_index", "divergence")
        ),
        *((name, c_double) for name in ("temperature", "kd_weight", "ce_weight", "cos_weight")),
        *((name, c_double) for name in ("mse_weight", "beta")),
    )


class _CosineArguments(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("student", "teacher", "gradient")),
        *((name, c_void_p) for name in ("mask", "scale")),
        ("scale_stride", c_int64),
        ("rows", c_void_p),
        *((name, c_int64) for name in ("n_rows", "n_cols")),
        ("share", c_double),
    )


class _EnsembleArguments(ctypes.Structure):
    _fields_ = (
        ("teachers", ctypes.POINTER(_Matrix)),
        ("weights", ctypes.POINTER(c_double)),
        ("n_teachers", c_int64),
        ("z", c_void_p),
        *((name, c_int64) for name in ("stride_z", "n_rows", "n_cols", "mean")),
        ("temperature", c_double),
    )


class _ScaleArguments(ctypes.Structure):
    _fields_ = (
        ("gradient", _Matrix),
        ("by", c_void_p),
        *((name, c_int64) for name in ("by_stride", "n_rows", "n_cols")),
    )


class _AccumulateArguments(ctypes.Structure):
    _fields_ = (
        ("total", c_void_p),
        ("share", _Matrix),
        *((name, c_int64) for name in ("stride_total", "n_rows", "n_cols", "begun")),
    )


class _ProductArguments(ctypes.Structure):
    _fields_ = (
        *((name, _Matrix) for name in ("hidden", "weight")),
        *((name, c_void_p) for name in ("product", "bias")),
        *((name, c_int64) for name in ("stride_product", "n_rows", "n_cols", "depth")),
    )


_ARGUMENTS = {
    "distillation": _DistillationArguments,
    "hidden_cosine": _CosineArguments,
    "combine_teachers": _EnsembleArguments,
    "scale": _ScaleArguments,
    "accumulate": _AccumulateArguments,
    "product": _ProductArguments,
}


def _share_openmp() -> None:
    """Make PyTorch's OpenMP runtime visible to the kernels, which are linked with none. Each build
    of PyTorch brings its own, under names like libgomp-a34b3233.so.1 that no linker could know."""
    if hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    lines = Path("/proc/self/maps").read_text().splitlines()
    loaded = [line.split(maxsplit=5)[-1] for line in lines]
    runtimes = [path for path in loaded if re.search(r"/lib(gomp|iomp5|omp)[-.][^/]*$", path)]
    runtimes.sort(key=lambda path: "/torch" not in path)  # other packages bring theirs, too
    ctypes.CDLL(runtimes[0] if runtimes else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


@functools.cache
def _library() -> ctypes.CDLL:
    _share_openmp()
    library = ctypes.CDLL(str(LIBRARY))
    library.distilfast_abi.restype = c_int64
    sizes = map(ctypes.sizeof, (_Matrix, *_ARGUMENTS.values()))
    if library.distilfast_abi() != ABI * 1_000_000 + sum(sizes):
        raise OSError("it was built from other sources; install distilfast again")
    for name in _ARGUMENTS:
        getattr(library, f"distilfast_{name}").argtypes = (c_void_p, c_int, c_int)
    return library


def load_error() -> str | None:
    """Why the library cannot be used here; None where it can."""
    if not LIBRARY.exists():
        return (
            "its library was not built when distilfast was installed: that takes a C++ compiler, "
            "and pip install -v says what went wrong"
        )
    try:
        _library()
    except OSError as error:
        return f"its library cannot be loaded: {error}"
    return None


@functools.cache
def best_level() -> str:
    """The instruction set that this machine's kernels use."""
    return LEVELS[_library().distilfast_best_level()]


def level() -> str:
    """The instruction set in use: the best, or DISTILFAST_CPU_LEVEL."""
    wanted = os.environ.get("DISTILFAST_CPU_LEVEL") or best_level()
    if wanted not in LEVELS[: LEVELS.index(best_level()) + 1]:
        raise ValueError(
            f"DISTILFAST_CPU_LEVEL: expected one of {', '.join(LEVELS)}, up to {best_level()} on "
            f"this machine, got {wanted!r}"
        )
    return wanted


def _call(name: str, arguments: ctypes.Structure) -> None:
    function = getattr(_library(), f"distilfast_{name}")
    status = function(ctypes.byref(arguments), LEVELS.index(level()), torch.get_num_threads())
    if status == errno.ENOMEM:
        raise MemoryError(f"distilfast {name}: {os.strerror(status)}")
    if status:
        raise OSError(status, f"distilfast {name}: {os.strerror(status)}")


def _matrix(x: Tensor | None) -> _Matrix:
    if x is None:
        return _Matrix(None, 0, 0)
    return _Matrix(x.data_ptr(), x.stride(0), DTYPES[x.dtype])


def _dense(x: Tensor) -> Tensor:
    """Dense along its rows, by a copy where the innermost dimension is another."""
    return x if x.stride(1) == 1 else x.contiguous()


def _vector(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype).contiguous()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def _stride(x: Tensor) -> int:
    return int(x.stride(0)) if x.ndim else 0


# --- Launchers -----------------------------------------------------------------------------------


def distillation(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None,
    mask: Tensor | None,
    kd_scale: Tensor,
    ce_scale: Tensor,
    options: Any,
    gradient: Tensor | None,
    heads: Any = ((1.0, 0.0, None), (1.0, 0.0, None)),
    bias_gradient: Tensor | None = None,
    statistics: Tensor | None = None,
) -> Tensor:
    """`distilfast.reference.distillation` for bf16, fp16 and fp32; biases in fp32. The gradient of
    an fp32 student may have 16 bits, and then lie in the student's own memory."""
    student, teacher = _dense(student), _dense(teacher)
    labels, mask = _vector(labels, torch.int64), _vector(mask, torch.float32)
    losses = torch.empty(4, student.shape[0], dtype=torch.float32)
    arguments = _DistillationArguments(
        _matrix(student),
        _matrix(teacher),
        _matrix(gradient),
        *(_Head(scale, softcap, _pointer(bias)) for scale, softcap, bias in heads),
        _pointer(bias_gradient),
        _pointer(labels),
        _pointer(mask),
        _pointer(kd_scale),
        _pointer(ce_scale),
        _stride(kd_scale),
        _stride(ce_scale),
        _pointer(losses),
        _pointer(statistics),
        student.shape[0],
        options.vocab_size,
        student.shape[1],
        options.ignore_index,
        DIVERGENCES[options.divergence] if options.kd_weight else 0,
        options.temperature,
        options.kd_weight,
        options.ce_weight,
        options.cos_weight,
        options.mse_weight,
        options.jsd_beta,
    )
    _call("distillation", arguments)
    return losses


def hidden_cosine(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor | None,
    scale: Tensor,
    gradients: Sequence[Tensor],
) -> Tensor:
    """`distilfast.reference.hidden_cosine` for bf16, fp16, fp32."""
    mask = _vector(mask, torch.float32)
    losses = torch.zeros(student[0].shape[0], dtype=torch.float32)
    for layer, (s, t) in enumerate(zip(student, teacher, strict=True)):
        s, t = _dense(s), _dense(t)
        arguments = _CosineArguments(
            _matrix(s),
            _matrix(t),
            _matrix(gradients[layer] if gradients else None),
            _pointer(mask),
            _pointer(scale),
            _stride(scale),
            _pointer(losses),
            *s.shape,
            1 / len(student),
        )
        _call("hidden_cosine", arguments)
    return losses


def combine_teachers(
    logits: Sequence[Tensor],
    weights: Sequence[float],
    temperature: float,
    mode: str,
    vocab_size: int,
    z: Tensor,
) -> None:
    """`distilfast.reference.combine_teachers` for bf16, fp16 and fp32, into z, (N, vocab_size)."""
    used = [(_dense(t), w) for t, w in zip(logits, weights, strict=True) if w]
    arguments = _EnsembleArguments(
        (_Matrix * len(used))(*(_matrix(t) for t, _ in used)),
        (c_double * len(used))(*(w for _, w in used)),
        len(used),
        _pointer(z),
        z.stride(0),
        z.shape[0],
        vocab_size,
        mode == "probability",
        temperature,
    )
    _call("combine_teachers", arguments)


def scale(gradients: Sequence[Tensor], by: Tensor) -> None:
    """Each gradient, (N, M), times by, () or (N,), in place, computed in fp32."""
    by = by.to(torch.float32).contiguous()
    for gradient in gradients:
        arguments = _ScaleArguments(_matrix(gradient), _pointer(by), _stride(by), *gradient.shape)
        _call("scale", arguments)


def accumulate(total: Tensor, share: Tensor, begun: bool) -> None:
    """total, (N, M) fp32, plus share; without ``begun`` what total holds is not read."""
    arguments = _AccumulateArguments(
        _pointer(total), _matrix(share), total.stride(0), *share.shape, begun
    )
    _call("accumulate", arguments)


def multiplies() -> bool:
    """Whether `product` can be used at the level in use."""
    return level() == "avx512bf16"


def product(hidden: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> None:
    """h W^T + b of bf16 (n, D) and (V, D) into fp32 ``out``, (n, V); b (V,) fp32 or None."""
    hidden, weight = _dense(hidden), _dense(weight)
    arguments = _ProductArguments(
        _matrix(hidden),
        _matrix(weight),
        _pointer(out),
        _pointer(bias),
        out.stride(0),
        *out.shape,
        hidden.shape[1],
    )
    _call("product", arguments)
