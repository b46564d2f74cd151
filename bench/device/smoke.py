"""The first words of a GPU: is every launcher right on real shapes, and how fast is it?

    python bench/device/smoke.py      # on a GPU, in about a minute
    TRITON_INTERPRET=1 python bench/device/smoke.py --device cpu --rows 2 --scale 400

A line a case. A call on all rows is timed and, in some of its rows, compared with the float64
reference; of the fused head the gradients are compared with the torch backend's. "of copy" is the
rate of the bytes that the loss has to move, as a share of the rate of a copy on the same device.
"launches show" marks a time that includes the host's launches: the device was faster.

Then what a call costs apart from its bytes: the host's time on a few rows, the number of kernels
that a call launches, and whether a call with other numbers compiles anything again, which would
stop a training run for seconds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # bench/, for measure

import torch
from kit import measure
from torch import Tensor

from distilfast import (
    combine_teachers,
    distillation_loss,
    hidden_cosine_loss,
    linear_distillation_loss,
)

BERT, GPT2, LLAMA = 30522, 50257, 128256
LABELLED = 0.15
COPY_BYTES = 1 << 30
CALLS = 12  # timed calls of a case
HOST_CALLS = 200
CHECKED_ROWS = 32  # at either end of the batch
# What a bf16 gradient may be off, as the norm of the difference over the norm: 2^-9 of rounding is
# 1.1e-3 of the norm. Chunks of the fused head also round the logits, which the reference does
# otherwise.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, HEAD_TOLERANCE = 1e-5, 6e-3, 1.5e-2
COMBINE_TOLERANCE = 1e-4  # absolute, of fp32 logits


class WrongResultError(Exception):
    """What a kernel computed is not what the reference computes."""


class Smoke:
    """The device, the sizes, and what has failed."""

    def __init__(self, options: argparse.Namespace):
        self.device = torch.device(options.device)
        self.gpu = self.device.type == "cuda"
        self.rows, self.scale = options.rows, options.scale
        self.stopwatch = measure.Stopwatch(self.device)
        self.failed: list[str] = []
        self.copy_gb_per_s = self.copy()

    def copy(self) -> float:
        source = torch.ones(COPY_BYTES // 4 // self.scale, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.ms(lambda: target.copy_(source)) / 1e6

    def ms(self, call: Callable[[], Any]) -> float:
        """The median of some calls; on a CPU, whose times would say nothing, NaN and no call."""
        if not self.gpu:
            return math.nan
        for _ in range(3):
            call()
        self.stopwatch.exposed = 0
        return statistics.median(self.stopwatch.ms(call) for _ in range(CALLS))

    def speed(self, call: Callable[[], Any], n_bytes: int) -> str:
        ms = self.ms(call)
        rate = n_bytes / ms / 1e6
        shown = "  launches show" if self.stopwatch.exposed > CALLS // 2 else ""
        return f"{ms:8.3f} ms {rate:6.0f} GB/s {rate / self.copy_gb_per_s:4.0%} of copy{shown}"

    def case(self, name: str, body: Callable[[], str]) -> None:
        """One line; a failure is named in it, and its traceback goes to stderr."""
        began = time.perf_counter()
        try:
            line = f"ok     {body()}"
        except Exception as error:
            wrong = isinstance(error, WrongResultError)
            if not wrong:
                traceback.print_exc()
            line = f"{'WRONG' if wrong else 'FAILED'}  {measure.reason(error)}"
            self.failed.append(name)
        print(f"| {name:30} | {line} | {time.perf_counter() - began:.1f} s", flush=True)

    # --- Inputs ---

    def vocab(self, columns: int) -> int:
        return max(65, columns // self.scale)

    def draw(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=torch.bfloat16).mul_(scale)

    def labels(self, columns: int, share: float, n_rows: int) -> Tensor:
        labels = torch.randint(columns, (n_rows,), device=self.device)
        return labels.masked_fill_(torch.rand(n_rows, device=self.device) >= share, -100)

    # --- Cases ---

    def dense(self, columns: int, labelled: float = 0.0, **keywords: Any) -> str:
        """The loss over the vocabulary, from logits to gradient."""
        columns = self.vocab(columns)
        student = self.draw(self.rows, columns, scale=2.0)
        teacher = student + torch.randn_like(student)
        labels = self.labels(columns, labelled, self.rows) if labelled else None
        student.requires_grad_()

        def call() -> Tensor:
            loss = distillation_loss(student, teacher, labels, backend="triton", **keywords).loss
            return torch.autograd.grad(loss, student)[0]

        # In sums the rows do not depend on each other: a few of them are a whole case.
        rows = ends(self.rows, self.device)
        output = distillation_loss(
            student, teacher, labels, backend="triton", reduction="none", **keywords
        ).loss
        (gradient,) = torch.autograd.grad(output.sum(), student)
        few = student.detach()[rows].double().requires_grad_()
        want = distillation_loss(
            few,
            teacher[rows].double(),
            None if labels is None else labels[rows],
            backend="torch",
            reduction="none",
            **keywords,
        ).loss
        (right,) = torch.autograd.grad(want.sum(), few)
        found = {
            "loss": (relative(output.detach()[rows], want.detach()), LOSS_TOLERANCE),
            "gradient": (relative(gradient[rows], right), GRADIENT_TOLERANCE),
        }
        del output, gradient
        passes = 3 if keywords.get("kd_weight", 1.0) else 2  # CE alone reads no teacher
        return f"{within(found)} {self.speed(call, passes * student.nbytes)}"

    def hidden(self, layers: int = 6, width: int = 768) -> str:
        student = [self.draw(self.rows, width).requires_grad_() for _ in range(layers)]
        teacher = [s.detach() + torch.randn_like(s) for s in student]

        def call(backend: str = "triton") -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                hidden_cosine_loss(student, teacher, backend=backend), student
            )

        error = max(relative(*pair) for pair in zip(call(), call("torch"), strict=True))
        found = within({"gradient": (error, GRADIENT_TOLERANCE)})
        return f"{found} {self.speed(call, 3 * layers * student[0].nbytes)}"

    def ensemble(self, teachers: int = 3, temperature: float = 2.0) -> str:
        logits = [self.draw(self.rows, self.vocab(BERT)) for _ in range(teachers)]

        def call() -> Tensor:
            return combine_teachers(logits, temperature=temperature)

        rows, mixed = ends(self.rows, self.device), call()
        shares = [(x[rows].double() / temperature).softmax(-1) for x in logits]
        off = mixed[rows].double() - temperature * torch.stack(shares).mean(0).log()
        # Logits are the same up to a constant a row.
        error = float((off - off.mean(-1, keepdim=True)).abs().max())
        found = within({"logits": (error, COMBINE_TOLERANCE)})
        moved = teachers * logits[0].nbytes + mixed.nbytes
        return f"{found} {self.speed(call, moved)}"

    def head(self, columns: int, width: int, n_rows: int | None = None, **keywords: Any) -> str:
        """The fused head, with a bias and CE on some rows."""
        columns, n_rows = self.vocab(columns), n_rows or self.rows
        hidden, weight, bias = leaves = (
            self.draw(n_rows, width).requires_grad_(),
            self.draw(columns, width, scale=2 / width**0.5).requires_grad_(),
            self.draw(columns).requires_grad_(),
        )
        teacher = self.draw(n_rows, width), self.draw(columns, width, scale=2 / width**0.5)
        labels = self.labels(columns, LABELLED, n_rows)
        labels[0] = 0  # CE wants one at least

        def call(backend: str = "triton") -> tuple[Tensor, ...]:
            loss = linear_distillation_loss(
                hidden,
                weight,
                *teacher,
                labels,
                student_bias=bias,
                ce_weight=1.0,
                backend=backend,
                **keywords,
            ).loss
            return torch.autograd.grad(loss, leaves)

        pairs = zip(("dh", "dW", "db"), call(), call("torch"), strict=True)
        found = within({n: (relative(got, right), HEAD_TOLERANCE) for n, got, right in pairs})
        ms = self.ms(call)
        return f"{found} {ms:8.3f} ms {8 * n_rows * columns * width / ms / 1e9:6.0f} TFLOP/s"

    # --- What a call costs apart from its bytes ---

    def small_calls(self) -> dict[str, Callable[[], Any]]:
        """A dense loss and a fused head on few rows, forward and backward."""
        columns, width, n_rows = self.vocab(BERT), 768 // min(self.scale, 12), 8
        student = self.draw(n_rows, columns).requires_grad_()
        teacher, labels = self.draw(n_rows, columns), self.labels(columns, 1.0, n_rows)
        hidden = self.draw(n_rows, width).requires_grad_()
        weight = self.draw(columns, width).requires_grad_()
        fixed = {"ce_weight": 1.0, "backend": "triton"}

        def dense() -> None:
            loss = distillation_loss(student, teacher, labels, **fixed).loss
            torch.autograd.grad(loss, student)

        def head() -> None:
            loss = linear_distillation_loss(
                hidden, weight, hidden.detach(), weight.detach(), labels, **fixed
            ).loss
            torch.autograd.grad(loss, (hidden, weight))

        return {"dense loss": dense, "fused head": head}

    def host(self, call: Callable[[], Any]) -> str:
        """The host's time of a call whose kernels take less than that."""
        if not self.gpu:
            call()
            return "not timed: no GPU"
        call()
        samples = []
        for _ in range(HOST_CALLS):
            began = time.perf_counter()
            call()
            samples.append((time.perf_counter() - began) * 1e6)
        torch.cuda.synchronize()
        return f"{measure.figure(statistics.median(samples))} us"

    def kernels(self, call: Callable[[], Any]) -> str:
        """What a call launches, by the profiler."""
        if not self.gpu:
            return "not counted: no GPU"
        call()
        kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=kinds, acc_events=True) as profiler:
            call()
            torch.cuda.synchronize()
        cuda = torch.autograd.DeviceType.CUDA
        names = [event.name for event in profiler.events() if event.device_type == cuda]
        print("\n".join(names), file=sys.stderr)
        ours = sum(name.endswith("_kernel") for name in names)  # PyTorch's have arguments
        return f"{len(names)} kernels and copies, {ours} of them ours"

    def compilations(self) -> str:
        """Other rows, vocabulary, temperature, weights and labels: nothing may be compiled."""
        if not self.gpu:
            return "nothing is compiled here"
        import triton

        compiled: list[str] = []

        def note(*_: Any, **keywords: Any) -> None:
            compiled.append(keywords["repr"])

        def call(n_rows: int, columns: int, temperature: float, weight: float) -> None:
            student = self.draw(n_rows, columns).requires_grad_()
            labels = self.labels(columns, 1.0, n_rows)
            loss = distillation_loss(
                student,
                self.draw(n_rows, columns),
                labels,
                temperature=temperature,
                kd_weight=weight,
                ce_weight=1.0,
                backend="triton",
            ).loss
            (3 * loss).backward()

        call(8, BERT, 2.0, 1.0)
        triton.knobs.runtime.jit_post_compile_hook = note
        try:
            call(17, BERT, 3.0, 0.3)
            call(1, BERT - 1, 1.0, 1.0)
            call(16, BERT + 6, 4.0, 2.0)
        finally:
            triton.knobs.runtime.jit_post_compile_hook = None
        if compiled:
            raise WrongResultError(f"{len(compiled)} compiled again: {compiled[0]}")
        return "none for other rows, vocabularies, temperatures and weights"


def ends(n_rows: int, device: torch.device) -> Tensor:
    """The first and the last rows: the last ones are at the largest offsets."""
    rows = torch.arange(n_rows, device=device)
    return torch.cat([rows[:CHECKED_ROWS], rows[-CHECKED_ROWS:]]).unique()


def relative(found: Tensor, right: Tensor) -> float:
    found, right = found.double(), right.double()
    return float((found - right).norm() / right.norm().clamp_min(1e-30))


def within(errors: dict[str, tuple[float, float]]) -> str:
    """The errors in a line; an error where one is above its tolerance, or NaN."""
    text = " ".join(f"{name} {error:.0e}" for name, (error, _) in errors.items())
    if not all(error <= tolerance for error, tolerance in errors.values()):
        raise WrongResultError(f"off by {text}")
    return text


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--scale", type=int, default=1, help="divides the vocabularies")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device; --device cpu with TRITON_INTERPRET=1 rehearses")
    torch.manual_seed(0)
    smoke = Smoke(options)
    name = measure.device_name(smoke.device)
    print(f"{name}, torch {torch.__version__}, triton {measure.version('triton')}, ", end="")
    print(f"{smoke.rows} rows; a copy moves {smoke.copy_gb_per_s:.0f} GB/s", flush=True)
    ce = {"ce_weight": 1.0}
    chunk = max(1, smoke.rows // 4)
    four = {**ce, "cos_weight": 1.0, "mse_weight": 0.001}
    dense = {
        f"KL {BERT}": lambda: smoke.dense(BERT),
        f"KL {LLAMA}": lambda: smoke.dense(LLAMA),
        f"KL {GPT2}": lambda: smoke.dense(GPT2),
        f"KL {BERT + 6}": lambda: smoke.dense(BERT + 6),
        f"KL + CE on 15 % {BERT}": lambda: smoke.dense(BERT, LABELLED, **ce),
        f"KL + CE on 15 % {LLAMA}": lambda: smoke.dense(LLAMA, LABELLED, **ce),
        f"KL + CE on all {BERT}": lambda: smoke.dense(BERT, 1.0, **ce),
        f"KL + CE on all, T = 7.3 {BERT}": lambda: smoke.dense(BERT, 1.0, temperature=7.3, **ce),
        f"reverse KL {BERT}": lambda: smoke.dense(BERT, divergence="reverse_kl"),
        f"JSD {BERT}": lambda: smoke.dense(BERT, divergence="jsd"),
        f"JSD {LLAMA}": lambda: smoke.dense(LLAMA, divergence="jsd"),
        f"KL + CE + cosine + MSE {BERT}": lambda: smoke.dense(BERT, 1.0, **four),
        f"CE on all {BERT}": lambda: smoke.dense(BERT, 1.0, kd_weight=0.0, **ce),
    }
    heads = {
        f"head {BERT} x 768": lambda: smoke.head(BERT, 768),
        f"head {BERT} x 768, chunks": lambda: smoke.head(BERT, 768, chunk_rows=chunk),
        f"head {BERT} x 768, softcap": lambda: smoke.head(
            BERT, 768, chunk_rows=chunk, logit_softcap=30.0, logit_scale=0.5
        ),
        f"head {BERT} x 768, bf16 sums": lambda: smoke.head(
            BERT, 768, chunk_rows=chunk, accum_dtype=torch.bfloat16
        ),
        f"head {LLAMA} x 4096": lambda: smoke.head(LLAMA, 4096, min(smoke.rows, 4096)),
    }
    more = {"hidden cosine, 6 x 768": smoke.hidden, "ensemble of 3": smoke.ensemble}
    for name, body in {**dense, **more, **heads}.items():
        smoke.case(name, body)
    for name, call in smoke.small_calls().items():
        smoke.case(f"host time, {name}", lambda call=call: smoke.host(call))
        smoke.case(f"launches, {name}", lambda call=call: smoke.kernels(call))
    smoke.case("compilations", smoke.compilations)
    print(f"smoke: {len(smoke.failed)} failed{': ' if smoke.failed else ''}", end="")
    print("; ".join(smoke.failed))
    sys.exit(bool(smoke.failed))


if __name__ == "__main__":
    main()
