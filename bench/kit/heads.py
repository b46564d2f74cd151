"""The contestants of bench/linear.py, heads from hidden states to a loss: ours and the peers'.

    cd bench && python -m kit.heads     # who can run here, what each computes, what each lacks

A contestant computes the loss of a `HeadCase` from hidden states and weights; the bench takes the
gradients. The rules of peers.py hold: what a contestant lacks, PyTorch adds, and the time includes
it; each runs in its best setting that still computes the case; and the bench measures whether it
does. A contestant that takes no bias computes the case without one, and is compared with the
reference without one; `lacks` says so.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import distilfast
from distilfast.losses import backends
from kit import peers
from kit.peers import IGNORED, Case, Contestant

LOSSES = ("kl_ce", "kl", "jsd", "ce")
# Of a materialised loss, by entry of N x V: both logits, their fp32 copies, divided by T, as logs
# and probabilities, and the gradients on the way back. A rough bound, for what to leave out.
MATERIALISED_BYTES = 40


class Inputs(NamedTuple):
    """The tensors of a call. CE has no teacher, a head without bias no bias."""

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    labels: Tensor | None

    @property
    def trained(self) -> list[Tensor]:
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def without_bias(self) -> Inputs:
        return self._replace(bias=None, teacher_bias=None)


HeadLoss = Callable[[Inputs], Tensor]


@dataclass(frozen=True)
class HeadCase:
    """What is computed: the losses of `Case`, whose logits are heads of hidden states."""

    loss: str
    rows: int
    width: int
    teacher_width: int
    columns: int  # the vocabulary
    labels: str = "none"
    bias: bool = False
    dtype: torch.dtype = torch.bfloat16
    temperature: float = 2.0

    @property
    def logits(self) -> Case:
        return Case(self.loss, self.rows, self.columns, self.labels, self.dtype, self.temperature)

    @property
    def teacher(self) -> bool:
        return self.loss != "ce"

    @property
    def needed_rows(self) -> int:
        """Rows whose logits the loss needs: CE alone needs those with a label."""
        return self.rows if self.teacher else self.logits.labelled

    @property
    def flop(self) -> int:
        """Of the products: the student's logits and both gradients, and the teacher's logits."""
        widths = 3 * self.width + (self.teacher_width if self.teacher else 0)
        return 2 * self.needed_rows * self.columns * widths

    @property
    def gradient_bytes(self) -> int:
        """What the caller gets: the gradients of hidden states, weight and bias."""
        entries = (self.rows + self.columns) * self.width + (self.columns if self.bias else 0)
        return entries * self.dtype.itemsize

    @property
    def input_bytes(self) -> int:
        sides = [self.width] + ([self.teacher_width] if self.teacher else [])
        entries = sum((self.rows + self.columns) * width for width in sides)
        entries += self.columns * len(sides) if self.bias else 0
        return entries * self.dtype.itemsize + (8 * self.rows if self.labels != "none" else 0)

    def __str__(self) -> str:
        width = f"{self.width}"
        if self.teacher and self.teacher_width != self.width:
            width += f" (teacher {self.teacher_width})"
        parts = [f"{self.loss}, {self.rows:,} rows, D = {width}, V = {self.columns:,}"]
        parts += [f"{self.labels} labels"] if self.labels != "none" else []
        parts += ["bias" if self.bias else "no bias", peers.dtype_name(self.dtype)]
        return ", ".join([*parts, f"T = {self.temperature:g}"])


@dataclass(frozen=True)
class HeadContestant(Contestant):
    build: Callable[[HeadCase], HeadLoss]
    takes_bias: bool = True
    one_mean: bool = False  # its KL is a mean over the labelled rows: kl_ce needs labels "all"
    materialises: bool = False  # holds N x V
    absent: str = ""  # why it is not in this PyTorch

    def skip(self, case: Any, device: torch.device) -> str | None:
        if self.one_mean and case.loss == "kl_ce" and case.labels != "all":
            return "its KL leaves out the rows without a label"
        return super().skip(case, device)

    def unavailable(self, device: torch.device, dtype: torch.dtype) -> str | None:
        if self.absent:
            return self.absent
        # "auto" takes what there is.
        return None if self.backend == "auto" else super().unavailable(device, dtype)


# --- Ours -----------------------------------------------------------------------------------------


def ours(case: HeadCase, backend: str, logits_dtype: torch.dtype | None = None) -> HeadLoss:
    def call(x: Inputs) -> Tensor:
        return distilfast.linear_distillation_loss(
            x.hidden,
            x.weight,
            x.teacher_hidden,
            x.teacher_weight,
            x.labels if case.loss in ("kl_ce", "ce") else None,
            student_bias=x.bias,
            teacher_bias=x.teacher_bias,
            temperature=case.temperature,
            kd_weight=float(case.teacher),
            ce_weight=float(case.loss in ("kl_ce", "ce")),
            divergence="jsd" if case.loss == "jsd" else "forward_kl",
            backend=backend,
            logits_dtype=logits_dtype,
        ).loss

    return call


def backend_of(contestant: Contestant, case: HeadCase, device: torch.device) -> str:
    """The backend that ours takes in a case, "" for the others."""
    return backends.choose(contestant.backend, device, [case.dtype]) if contestant.backend else ""


# --- PyTorch --------------------------------------------------------------------------------------


def materialised(case: HeadCase, upcast: bool = True) -> HeadLoss:
    """The logits in the dtype of the hidden states, and the loss as one writes it in PyTorch."""
    loss = peers.formula(case.logits, upcast)

    def call(x: Inputs) -> Tensor:
        student, teacher = [F.linear(x.hidden, x.weight, x.bias)], []
        if x.teacher_hidden is not None and x.teacher_weight is not None:
            with torch.no_grad():
                teacher = [F.linear(x.teacher_hidden, x.teacher_weight, x.teacher_bias)]
        return loss(student, teacher, x.labels)

    return call


def compiled(case: HeadCase, mode: str) -> HeadLoss:
    """The fp32 formula. Rows and widths are dynamic, which saves compilations and changes nothing
    in a product; the vocabulary, along which the kernels go, is static."""
    torch._dynamo.config.recompile_limit = 128
    loss = torch.compile(materialised(case), fullgraph=True, dynamic=False, mode=mode)

    def call(x: Inputs) -> Tensor:
        for tensor in (x.hidden, x.teacher_hidden, x.labels):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)
        for tensor in (x.hidden, x.teacher_hidden, x.weight, x.teacher_weight):
            if tensor is not None:
                torch._dynamo.maybe_mark_dynamic(tensor, 1)
        return loss(x)

    return call


def linear_cross_entropy(case: HeadCase, acc_policy: str) -> HeadLoss:
    """PyTorch's own, in chunks as it chooses them."""
    options = torch.nn.LinearCrossEntropyOptions(acc_policy=acc_policy)
    return lambda x: F.linear_cross_entropy(
        x.hidden, x.weight, x.labels, linear_bias=x.bias, ignore_index=IGNORED, options=options
    )


# --- Peers ----------------------------------------------------------------------------------------


def liger_ce(case: HeadCase) -> HeadLoss:
    """The weight's gradient is summed in fp32, as ours is."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    ce = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, accum_dtype=torch.float32)
    return lambda x: ce(x.weight, x.hidden, x.labels, x.bias)


def liger_jsd(case: HeadCase) -> HeadLoss:
    """Beta 0 is forward KL. Labels would mask the KL, so CE is a second head."""
    from liger_kernel.transformers import LigerFusedLinearJSD

    T, ce = case.temperature, liger_ce(case)
    beta = 0.5 if case.loss == "jsd" else 0.0
    kd = LigerFusedLinearJSD(jsd_beta=beta, temperature=T, accum_dtype=torch.float32)

    def call(x: Inputs) -> Tensor:
        loss = T * T * kd(x.hidden, x.weight, x.teacher_hidden, x.teacher_weight, None)
        return loss if x.labels is None else loss + ce(x)

    return call


def liger_kl(case: HeadCase) -> HeadLoss:
    """It takes the teacher's probabilities, all of them."""
    from liger_kernel.transformers import LigerFusedLinearKLDivLoss

    T, ce = case.temperature, liger_ce(case)
    kd = LigerFusedLinearKLDivLoss(temperature=T, accum_dtype=torch.float32)

    def call(x: Inputs) -> Tensor:
        with torch.no_grad():
            teacher = F.linear(x.teacher_hidden, x.teacher_weight).float()
            target = F.softmax(peers.scaled(teacher, T), -1)
            del teacher
        loss = T * T * kd(x.hidden, x.weight, target)
        return loss if x.labels is None else loss + ce(x)

    return call


def liger_chunked(case: HeadCase) -> HeadLoss:
    """PyTorch in chunks, compiled; labels and hard loss are in the same pass."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    T = case.temperature
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=float(case.loss == "kl_ce"),
        weight_soft_loss=T * T,
        beta=0.5 if case.loss == "jsd" else 0.0,
        ignore_index=IGNORED,
        temperature=T,
    )

    def call(x: Inputs) -> Tensor:
        sides = x.hidden, x.weight, x.teacher_hidden, x.teacher_weight
        return loss(*sides, any_labels(x), x.bias, x.teacher_bias)

    return call


def any_labels(x: Inputs) -> Tensor:
    """For those that ask for labels even where only the teacher counts."""
    if x.labels is not None:
        return x.labels
    return torch.zeros(len(x.hidden), dtype=torch.long, device=x.hidden.device)


def cut_cross_entropy(case: HeadCase, **options: Any) -> HeadLoss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x: linear_cross_entropy(
        x.hidden, x.weight, x.labels, ignore_index=IGNORED, **options
    )


def fla_kl(case: HeadCase) -> HeadLoss:
    """It knows T = 1: the hidden states are divided by T instead, exact for powers of two."""
    from fla.modules.fused_kl_div import fused_kl_div_loss

    T, ce = case.temperature, fla_ce(case)

    def call(x: Inputs) -> Tensor:
        hidden, target = (peers.scaled(h, T) for h in (x.hidden, x.teacher_hidden))
        loss = T * T * fused_kl_div_loss(hidden, target, x.weight, x.teacher_weight)
        return loss if x.labels is None else loss + ce(x)

    return call


def fla_ce(case: HeadCase) -> HeadLoss:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss

    return lambda x: fused_linear_cross_entropy_loss(
        x.hidden, x.labels, x.weight, x.bias, ignore_index=IGNORED
    )


def trl_divergence(case: HeadCase) -> HeadLoss:
    """It makes fp32 logits of tiles, twice (three times for JSD); CE is a second head."""
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    T, ce = case.temperature, trl_ce(case)
    beta = 0.5 if case.loss == "jsd" else 0.0

    def call(x: Inputs) -> Tensor:
        student = x.hidden, x.weight, x.bias
        teacher = x.teacher_hidden, x.teacher_weight, x.teacher_bias
        rows, _ = ChunkedDivergenceFunction.apply(*student, *teacher, beta, T)
        loss = T * T * rows.mean()
        return loss if x.labels is None else loss + ce(x)

    return call


def trl_ce(case: HeadCase) -> HeadLoss:
    """Log-probabilities of the labels, of the rows that have one, with no other output."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction
    from trl.trainer import utils

    columns = utils._CHUNKED_LOGPROB_CHUNK_SIZE  # at a time, as its trainers have it

    def call(x: Inputs) -> Tensor:
        chosen = x.labels != IGNORED
        hidden, labels = x.hidden[chosen], x.labels[chosen]
        found = ChunkedLogProbFunction.apply(
            hidden, x.weight, x.bias, labels, 1.0, columns, None, 1.0, ()
        )
        return -found[0].mean()

    return call


def orda(case: HeadCase, backend: str) -> HeadLoss:
    """The weight's gradient is summed in fp32, as ours is."""
    import orda_kernel

    variant: dict[str, Any] = {"kl_divergence": "forward"}
    if case.loss == "jsd":
        variant = {"kl_divergence": "skew_js", "kl_beta": 0.5}
    loss = orda_kernel.DistillationLoss(
        student_ce_weight=float(case.loss == "kl_ce"),
        kl_weight=1.0,
        kl_temperature=case.temperature,
        ignore_index=IGNORED,
        backend=backend,
        config=orda_kernel.KernelConfig(grad_weight_accumulation="fp32"),
        **variant,
    )

    def call(x: Inputs) -> Tensor:
        teacher = orda_kernel.SeparateTeacher(x.teacher_hidden, x.teacher_weight)
        return loss(x.hidden, x.weight, any_labels(x), teacher).loss

    return call


def contestants() -> list[HeadContestant]:
    """Everyone, those that are not here included; the slowest to get ready come last."""
    with_teacher = ("kl_ce", "kl", "jsd")
    liger = functools.partial(
        HeadContestant, package="liger-kernel", module="liger_kernel.transformers", kernels="triton"
    )
    fla = functools.partial(HeadContestant, package="fla-core", kernels="triton")
    two_heads = "KL and CE in one pass (CE is a second head, timed)"
    cce = functools.partial(
        HeadContestant,
        computes=("ce",),
        unable="has CE only",
        takes_bias=False,
        lacks="bias",
        package="cut-cross-entropy",
        module="cut_cross_entropy",
    )
    trl = functools.partial(HeadContestant, package="trl")
    orda_entry = functools.partial(
        HeadContestant,
        computes=with_teacher,
        unable="has CE only beside a teacher",
        takes_bias=False,
        one_mean=True,
        lacks="bias",
        package="orda-kernel",
        module="orda_kernel",
    )
    has_linear = hasattr(F, "linear_cross_entropy") and hasattr(
        torch.nn, "LinearCrossEntropyOptions"
    )
    return [
        HeadContestant(
            "distilfast auto", LOSSES, functools.partial(ours, backend="auto"), backend="auto"
        ),
        HeadContestant(
            "distilfast torch", LOSSES, functools.partial(ours, backend="torch"), backend="torch"
        ),
        HeadContestant("PyTorch eager, fp32", LOSSES, materialised, materialises=True),
        HeadContestant(
            "PyTorch eager, same dtype",
            LOSSES,
            functools.partial(materialised, upcast=False),
            materialises=True,
        ),
        liger(
            "Liger JSD",
            with_teacher,
            liger_jsd,
            takes_bias=False,
            lacks=f"bias; T^2 (PyTorch's, timed); {two_heads}",
            unable="has KL and JSD only",
        ),
        liger(
            "Liger KL",
            ("kl_ce", "kl"),
            liger_kl,
            takes_bias=False,
            lacks=f"bias; the teacher's head and softmax, T^2 (PyTorch's, timed); {two_heads}",
            unable="has KL only",
            materialises=True,
        ),
        liger("Liger CE", ("ce",), liger_ce, unable="has CE only"),
        fla(
            "flash-linear-attention KL",
            ("kl_ce", "kl"),
            fla_kl,
            takes_bias=False,
            lacks=f"bias; T and T^2 (PyTorch's, timed); {two_heads}",
            unable="has KL only",
            module="fla.modules.fused_kl_div",
        ),
        fla(
            "flash-linear-attention CE",
            ("ce",),
            fla_ce,
            unable="has CE only",
            module="fla.modules.fused_linear_cross_entropy",
        ),
        trl(
            "TRL divergence",
            with_teacher,
            trl_divergence,
            lacks=f"T^2 (PyTorch's, timed); {two_heads}",
            unable="has KL and JSD only",
            module="trl.kernels.chunked_divergence",
        ),
        trl("TRL CE", ("ce",), trl_ce, unable="has CE only", module="trl.kernels.chunked_logprob"),
        orda_entry(
            "ORDA",
            build=functools.partial(orda, backend="triton"),
            kernels="cuda",  # Triton's, but it refuses a CPU's tensors under the interpreter too
        ),
        orda_entry("ORDA torch", build=functools.partial(orda, backend="torch"), materialises=True),
        cce("Cut Cross Entropy", build=cut_cross_entropy, kernels="triton"),
        cce(
            "Cut Cross Entropy, unfiltered",
            build=functools.partial(cut_cross_entropy, filter_eps=None),
            kernels="triton",
        ),
        *(
            HeadContestant(
                f"F.linear_cross_entropy, {policy}",
                ("ce",),
                functools.partial(linear_cross_entropy, acc_policy=policy),
                unable="has CE only",
                absent="" if has_linear else f"torch {torch.__version__} has none",
            )
            # On a CPU "auto" sums in fp32 and is ten times slower.
            for policy in ("accurate", "auto")
        ),
        HeadContestant(
            "torch.compile",
            LOSSES,
            functools.partial(compiled, mode="default"),
            materialises=True,
            slow=("cuda",),
        ),
        cce(
            "Cut Cross Entropy, torch.compile",
            build=functools.partial(cut_cross_entropy, impl="torch_compile"),
            materialises=True,
            slow=("cuda",),
        ),
        HeadContestant(
            "Liger chunked JSD",
            with_teacher,
            liger_chunked,
            unable="has KL and JSD, with or without CE, only",
            one_mean=True,
            lacks="T^2 (PyTorch's, timed)",
            package="liger-kernel",
            module="liger_kernel.chunked_loss",
            slow=("cuda",),
        ),
        HeadContestant(
            "torch.compile, max-autotune",
            LOSSES,
            functools.partial(compiled, mode="max-autotune-no-cudagraphs"),
            materialises=True,
            slow=("cuda", "cpu"),
        ),
    ]


if __name__ == "__main__":
    peers.print_table(contestants())
