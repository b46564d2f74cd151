"""The contestants of bench/losses.py, ours and the peers': one entry of `contestants()` each.

    cd bench && python -m kit.peers     # who can run here, what each computes, what each lacks

A contestant computes the loss of a `Case` from its tensors; the bench takes the gradient. What a
contestant lacks, PyTorch adds around it (a division by T, a log-softmax). The time includes that,
since its users pay for it too. Each runs in its best setting that still computes the case; if the
fastest setting is not the most exact, both take part. The bench measures whether a contestant
computes what it should: see its column `agreement`.
"""

from __future__ import annotations

import functools
import importlib
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

import distilfast
from distilfast.losses import backends, reference
from kit import measure

LABELLED = 0.15  # of the rows, with labels "some": what masked language modelling has
IGNORED = -100
DISTILLATION = ("kl", "kl_ce", "ce", "reverse_kl", "jsd")
LOSSES = (*DISTILLATION, "hidden_cosine", "combine")
# student, teacher, labels -> the loss, or for "combine" the ensemble's logits. A list holds one
# tensor of logits, a tensor a layer of hidden_cosine, or a tensor a teacher of combine.
Loss = Callable[[list[Tensor], list[Tensor], Tensor | None], Tensor]


@dataclass(frozen=True)
class Case:
    """What is computed: T^2 KL at T, CE at 1, and so on, as means over (labelled) rows."""

    loss: str
    rows: int
    columns: int  # the vocabulary; the width of hidden_cosine
    labels: str = "none"  # "some" or "all" for CE
    dtype: torch.dtype = torch.bfloat16
    temperature: float = 2.0
    tensors: int = 1  # layers of hidden_cosine, teachers of combine

    @property
    def labelled(self) -> int:
        share = {"none": 0.0, "some": LABELLED, "all": 1.0}[self.labels]
        return math.ceil(share * self.rows)

    @property
    def expected_bytes(self) -> int:
        """What has to move: student and teacher read once, the gradient written once. CE reads no
        teacher and no row without a label; combine writes fp32 and has no student."""
        if self.loss == "combine":
            return self.rows * self.columns * (self.tensors * self.dtype.itemsize + 4)
        rows = self.rows + self.labelled if self.loss == "ce" else 3 * self.rows
        return rows * self.columns * self.tensors * self.dtype.itemsize

    def __str__(self) -> str:
        size = f"{self.rows} x {self.columns}"
        size += f" x {self.tensors}" if self.tensors > 1 else ""
        labels = f", {self.labels} labels" if self.loss in ("kl_ce", "ce") else ""
        return f"{self.loss}, {size} {dtype_name(self.dtype)}{labels}, T = {self.temperature:g}"


def dtype_name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}[dtype]


def exact(
    case: Case,
    student: list[Tensor],
    teacher: list[Tensor],
    labels: Tensor | None,
    wanted: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The specification: what some of the rows add to the loss in fp64, and their gradients."""
    student, teacher = [s.double() for s in student], [t.double() for t in teacher]
    gradients = [torch.empty_like(s) for s in student] if wanted else []
    kd_scale = student[0].new_tensor(1 / case.rows)
    if case.loss == "hidden_cosine":
        found = reference.hidden_cosine(student, teacher, None, kd_scale, gradients)
        return found.sum() * kd_scale, gradients
    ce_scale = student[0].new_tensor(1 / max(case.labelled, 1))
    options = reference.Options(
        temperature=case.temperature,
        kd_weight=float(case.loss != "ce"),
        ce_weight=float(case.loss in ("kl_ce", "ce")),
        cos_weight=0.0,
        mse_weight=0.0,
        jsd_beta=0.5,
        divergence=case.loss if case.loss in ("reverse_kl", "jsd") else "forward_kl",
        ignore_index=IGNORED,
        vocab_size=case.columns,
    )
    gradient = gradients[0] if wanted else None
    kd, ce, _, _ = reference.distillation(
        student[0], teacher[0], labels, None, kd_scale, ce_scale, options, gradient
    )
    return kd.sum() * kd_scale + ce.sum() * ce_scale, gradients


@dataclass(frozen=True)
class Contestant:
    name: str
    computes: tuple[str, ...]  # losses of LOSSES
    build: Callable[[Case], Loss]
    lacks: str = ""  # what it does not compute; PyTorch's share in its time
    unable: str = ""  # why it cannot compute the other losses; "": it is left out there
    package: str = ""  # the distribution, and the module that its adapter imports
    module: str = ""
    backend: str = ""  # for ours
    kernels: str = ""  # "triton" needs a GPU or Triton's interpreter, "cuda" a GPU
    overwrites: tuple[str, ...] = ()  # losses in which the gradient replaces the student's logits
    slow: tuple[str, ...] = ()  # devices where it takes long to get ready for each case

    @property
    def interpreted(self) -> bool:
        """It runs, and its time says nothing."""
        return self.kernels == "triton" and os.environ.get("TRITON_INTERPRET") == "1"

    @property
    def version(self) -> str:
        return measure.version(self.package) if self.package else ""

    def skip(self, case: Case, device: torch.device) -> str | None:
        """Why it cannot take part in a case, or None."""
        if case.loss not in self.computes:
            return self.unable
        return self.unavailable(device, case.dtype)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why it cannot run here, or None."""
        if self.backend:
            missing = backends.unavailable(self.backend)
            if missing is not None:
                return missing
        if self.kernels and device.type != "cuda" and not self.interpreted:
            return "its kernels need a CUDA device"
        if self.backend and not backends.BACKENDS[self.backend].accepts(device.type, dtype):
            return f"does not take {dtype_name(dtype)} tensors on {device.type}"
        if self.package and not self.version:
            return f"{self.package} is not installed"
        return import_error(self.module) if self.module else None


@functools.cache
def import_error(module: str) -> str | None:
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{module} cannot be imported: {measure.reason(error)}"
    return None


# --- Ours -----------------------------------------------------------------------------------------


def ours(backend: str, inplace: bool) -> Callable[[Case], Loss]:
    def build(case: Case) -> Loss:
        if case.loss == "combine":
            return lambda student, teacher, labels: distilfast.combine_teachers(
                teacher, temperature=case.temperature
            )
        if case.loss == "hidden_cosine":
            return lambda student, teacher, labels: distilfast.hidden_cosine_loss(
                student, teacher, backend=backend
            )
        loss = distilfast.DistillationLoss(
            temperature=case.temperature,
            kd_weight=float(case.loss != "ce"),
            ce_weight=float(case.loss in ("kl_ce", "ce")),
            divergence=case.loss if case.loss in ("reverse_kl", "jsd") else "forward_kl",
            inplace_backward=inplace,
            backend=backend,
        )
        hard = case.loss in ("kl_ce", "ce")
        return lambda student, teacher, labels: (
            loss(student[0], teacher[0], labels if hard else None).loss
        )

    return build


# --- PyTorch --------------------------------------------------------------------------------------


def formula(case: Case, upcast: bool = True) -> Loss:
    """The losses as one writes them in PyTorch."""
    T = case.temperature

    def cast(x: Tensor) -> Tensor:
        return x.float() if upcast else x

    def dense(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None) -> Tensor:
        s = cast(student[0])
        if case.loss == "ce":
            return F.cross_entropy(s, labels)
        t, log_q = cast(teacher[0]), F.log_softmax(s / T, -1)
        if case.loss == "reverse_kl":
            log_p = F.log_softmax(t / T, -1)
            return T * T * F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        if case.loss == "jsd":
            log_p = F.log_softmax(t / T, -1)
            log_m = torch.logaddexp(log_p, log_q) - math.log(2)
            both = F.kl_div(log_m, log_p, reduction="batchmean", log_target=True)
            both = both + F.kl_div(log_m, log_q, reduction="batchmean", log_target=True)
            return T * T * both / 2
        kd = T * T * F.kl_div(log_q, F.softmax(t / T, -1), reduction="batchmean")
        return kd if labels is None else kd + F.cross_entropy(s, labels)

    def hidden_cosine(
        student: list[Tensor], teacher: list[Tensor], labels: Tensor | None
    ) -> Tensor:
        layers = [
            1 - F.cosine_similarity(cast(s), cast(t), dim=-1).mean()
            for s, t in zip(student, teacher, strict=True)
        ]
        return torch.stack(layers).mean()

    def combine(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None) -> Tensor:
        logs = [F.log_softmax(cast(t) / T, -1) for t in teacher]
        return T * (functools.reduce(torch.logaddexp, logs) - math.log(len(logs)))

    return {"hidden_cosine": hidden_cosine, "combine": combine}.get(case.loss, dense)


def compiled(case: Case, mode: str) -> Loss:
    """The fp32 formula, one graph for a vocabulary: its width is static, the rows are not, which
    saves a compilation for each number of rows and changes nothing in a kernel along the columns.
    """
    torch._dynamo.config.recompile_limit = 128  # losses, widths and modes share their code
    loss = torch.compile(formula(case), fullgraph=True, dynamic=False, mode=mode)

    def call(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None) -> Tensor:
        for x in (*student, *teacher, *([] if labels is None else [labels])):
            torch._dynamo.maybe_mark_dynamic(x, 0)
        return loss(student, teacher, labels)

    return call


# --- Peers ----------------------------------------------------------------------------------------


def scaled(x: Tensor, temperature: float) -> Tensor:
    return x if temperature == 1 else x / temperature


def liger(case: Case, upcast: bool) -> Loss:
    """Upcast to fp32 once, or all in the dtype of the logits."""
    from liger_kernel.transformers import LigerCrossEntropyLoss, LigerJSD, LigerKLDIVLoss

    T = case.temperature
    kl, ce = LigerKLDIVLoss(reduction="batchmean"), LigerCrossEntropyLoss(ignore_index=IGNORED)
    # Its mixture at beta 1 is the student's own distribution: reverse KL.
    jsd = LigerJSD(beta=1.0 if case.loss == "reverse_kl" else 0.5)

    def call(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None) -> Tensor:
        s = student[0].float() if upcast else student[0]
        if case.loss == "ce":
            return ce(s, labels)
        t = teacher[0].float() if upcast else teacher[0]
        log_q = F.log_softmax(scaled(s, T), -1)
        if case.loss in ("reverse_kl", "jsd"):
            return T * T * jsd(log_q, F.log_softmax(scaled(t, T), -1))
        kd = T * T * kl(log_q, F.softmax(scaled(t, T), -1))
        # CE comes last: it overwrites the logits that it is given.
        return kd if labels is None else kd + ce(s, labels)

    return call


def flash_linear_attention(case: Case) -> Loss:
    from fla.modules.fused_cross_entropy import cross_entropy_loss

    def call(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None) -> Tensor:
        assert labels is not None
        rows, _ = cross_entropy_loss(student[0], labels, ignore_index=IGNORED)
        return rows.sum() / (labels != IGNORED).sum()

    return call


def speculators(case: Case) -> Loss:
    from speculators.losses import js_div_loss, kl_div_loss, reverse_kl_div_loss

    T = case.temperature
    # Logits in bf16 can be divided by a power of two without loss.
    exact = math.frexp(T)[0] == 0.5
    loss = {"kl": kl_div_loss, "reverse_kl": reverse_kl_div_loss, "jsd": js_div_loss}[case.loss]

    def call(student: list[Tensor], teacher: list[Tensor], labels: Tensor | None) -> Tensor:
        s, t = (x if exact else x.float() for x in (student[0], teacher[0]))
        return T * T * loss(scaled(s, T)[None], scaled(t, T)[None]).mean()

    return call


def quack(case: Case) -> Loss:
    from quack.cross_entropy import cross_entropy

    return lambda student, teacher, labels: cross_entropy(
        student[0], labels, ignore_index=IGNORED, reduction="mean"
    )


def no_logits(case: Case) -> Loss:
    raise NotImplementedError(f"{case}: never called, it computes no loss from logits")


def contestants() -> list[Contestant]:
    """Everyone, those that are not here included. The slowest to get ready come last, so that a run
    that is out of time has measured the others."""
    own = [
        Contestant(
            f"distilfast {backend}{', in place' if inplace else ''}",
            DISTILLATION if inplace else (*DISTILLATION, "hidden_cosine"),
            ours(backend, inplace),
            unable="is in place for logits only" if inplace else "combine chooses its own backend",
            backend=backend,
            kernels="triton" if backend == "triton" else "",
            overwrites=DISTILLATION if inplace else (),
        )
        for backend in backends.BACKENDS
        for inplace in (False, True)
    ]
    own.append(Contestant("distilfast", ("combine",), ours("auto", False)))
    torch_own = [
        Contestant("PyTorch eager, fp32", LOSSES, formula),
        Contestant("PyTorch eager, same dtype", LOSSES, functools.partial(formula, upcast=False)),
    ]
    liger_entry = functools.partial(
        Contestant,
        computes=DISTILLATION,
        lacks="temperature, T^2 and softmaxes (PyTorch's, timed); mask; KL and CE in one kernel",
        unable="has KL, reverse KL, JSD and CE only",
        package="liger-kernel",
        module="liger_kernel.transformers",
        kernels="triton",
    )
    linear = "takes hidden states and a weight, not logits"
    return [
        *own,
        *torch_own,
        liger_entry(
            "Liger, same dtype",
            build=functools.partial(liger, upcast=False),
            overwrites=("kl_ce", "ce"),
        ),
        liger_entry("Liger, fp32", build=functools.partial(liger, upcast=True)),
        Contestant(
            "flash-linear-attention",
            ("ce",),
            flash_linear_attention,
            lacks="the mean (PyTorch's, timed)",
            unable=f"has CE only: its KL {linear}",
            package="fla-core",
            module="fla.modules.fused_cross_entropy",
            kernels="triton",
        ),
        Contestant(
            "quack",
            ("ce",),
            quack,
            unable="has CE only",
            package="quack-kernels",
            module="quack.cross_entropy",
            kernels="cuda",
        ),
        Contestant("Cut Cross Entropy", (), no_logits, unable=linear, package="cut-cross-entropy"),
        Contestant("F.linear_cross_entropy", (), no_logits, unable=linear),
        Contestant(
            "torch.compile", LOSSES, functools.partial(compiled, mode="default"), slow=("cuda",)
        ),
        Contestant(
            "torch.compile, max-autotune",
            LOSSES,
            functools.partial(compiled, mode="max-autotune-no-cudagraphs"),
            slow=("cuda", "cpu"),
        ),
        Contestant(
            "speculators",
            ("kl", "reverse_kl", "jsd"),
            speculators,
            lacks="temperature and T^2 (PyTorch's, timed); hard labels; mask",
            unable="has KL, reverse KL and JSD only: its CE takes no labels",
            package="speculators",
            module="speculators.losses.fused",
            kernels="triton",
            slow=("cuda", "cpu"),
        ),
    ]


def print_table(field: Iterable[Contestant]) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [
        {
            "contestant": c.name,
            "version": c.version,
            "computes": ", ".join(c.computes) or "nothing here",
            "does not compute": c.lacks,
            "otherwise": c.unable,
            "here": c.unavailable(device, torch.bfloat16) or "yes",
        }
        for c in field
    ]
    print(measure.markdown(rows))


if __name__ == "__main__":
    print_table(contestants())
