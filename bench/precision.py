"""How far is the gradient of a bf16 step from that of fp32, at the start and end of a distillation?

    distilfast train                                  # the demo's run, or any other
    python bench/precision.py [--config configs/demo.yaml] [--step 0] [--csv FILE]

Computes loss and gradient of one micro-batch of the run's step, for the student as the run began
and as it ended. The reference is the same in fp32. The lines of the table are:

- bf16: teacher and student in bf16 and fp32 logits, as a run with `precision: bf16`;
- bf16 logits: the same with logits in bf16;
- fp32 bodies: everything in fp32 except the inputs of the fused head, which are rounded to bf16;
- fp32 bodies, bf16 logits: the same with logits in bf16.

The error of a gradient is the norm of the difference over the norm, all parameters together; that
of kd is the difference over kd. "kd alone" sets the weights of the other losses to 0. Appends to
bench/results/precision.csv.
"""

from __future__ import annotations

import argparse
import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from kit import measure
from kit.measure import figure
from torch import Tensor

from distilfast import data, models
from distilfast.config import ConfigError, LossConfig, parse
from distilfast.data import MicroBatch
from distilfast.data.masking import Masker
from distilfast.driver import checks, micro_batch
from distilfast.driver.micro_batch import PARTS, Distillation, Normalizers, TeacherSide

ROOT = Path(__file__).parent.parent
CSV = Path(__file__).parent / "results" / "precision.csv"
BF16 = torch.bfloat16
VARIANTS: dict[str, tuple[torch.dtype, bool, torch.dtype | None]] = {
    # the bodies' dtype, whether the head's inputs are rounded, the logits' dtype
    "bf16": (BF16, False, None),
    "bf16 logits": (BF16, False, BF16),
    "fp32 bodies": (torch.float32, True, None),
    "fp32 bodies, bf16 logits": (torch.float32, True, BF16),
}
RESULT = "student loss kd variant kd_error gradient_error".split()


def rounding(loss: Any, rounded: bool, logits_dtype: torch.dtype | None) -> Any:
    """The fused head with these logits, and of inputs that are rounded to bf16 first."""
    loss = functools.partial(loss, logits_dtype=logits_dtype)
    if not rounded:
        return loss

    def of_rounded(*tensors: Any, student_bias: Tensor, teacher_bias: Any, **how: Any) -> Any:
        hidden, weight, teacher_hidden, teacher_weight, labels = tensors
        teachers = [
            [None if x is None else x.to(BF16) for x in xs]
            for xs in (teacher_hidden, teacher_weight, teacher_bias)
        ]
        return loss(
            hidden.to(BF16), weight.to(BF16), *teachers[:2], labels,
            student_bias=student_bias.to(BF16), teacher_bias=teachers[2], **how,
        )  # fmt: skip

    return of_rounded


@contextmanager
def head(rounded: bool, logits_dtype: torch.dtype | None) -> Iterator[None]:
    before = micro_batch.linear_distillation_loss
    micro_batch.linear_distillation_loss = rounding(before, rounded, logits_dtype)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        micro_batch.linear_distillation_loss = before  # type: ignore[attr-defined]


def gradient(
    student: Any,
    teachers: list[models.Teacher],
    loss: LossConfig,
    batch: MicroBatch,
    dtype: torch.dtype,
) -> tuple[float, Tensor]:
    """kd and the gradient of all parameters, in fp32."""
    student = copy.deepcopy(student).to(dtype)
    if dtype == BF16:
        models.use_fp32_sums(student)
    side = TeacherSide(copy.deepcopy(teachers), loss, torch.device("cpu"), dtype)
    rows, masked = (len(x) for x in (micro_batch.vocabulary_rows(batch, loss), batch.labelled))
    counts = Normalizers(*torch.tensor([rows, masked, len(batch.tokens)]).float())
    total, parts = Distillation(student, loss, side)(batch, side(batch), counts)
    total.backward()
    gradients = [p.grad.float().flatten() for p in student.parameters() if p.grad is not None]
    return float(parts[PARTS.index("kd")]), torch.cat(gradients)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(ROOT / "configs" / "demo.yaml"))
    parser.add_argument("--step", type=int, default=0, help="use this step's first micro-batch")
    parser.add_argument("--csv", type=Path, default=CSV)
    options = parser.parse_args()
    config = parse(["--config", options.config])
    trained = Path(config.output) / "model"
    if not (trained.is_dir() and config.token_folder.is_dir()):
        raise ConfigError(f"output: expected a run that is complete, got {config.output!r}")
    teachers, tokenizer, first = checks.load_models(config)
    last, _ = models.load_weights("AutoModelForMaskedLM", trained, str(trained))
    store = data.Store.open(config.token_folder)
    special, mask = tokenizer.all_special_ids, tokenizer.mask_token_id
    masker = Masker.from_counts(store.counts, special, mask, config.masking, config.seed)
    batches = data.Batches(store, masker, tokenizer.pad_token_id, config.batch)
    batch = next(iter(batches.step(options.step, 0, 1, config.batch.micro_sequences)))
    alone = replace(config.loss, kd_weight=1.0, ce_weight=0.0, hidden_cos_weight=0.0)
    rows: list[dict[str, Any]] = []
    for name, student in (("start", first), ("end", last)):
        for kind, loss in (("as configured", config.loss), ("kd alone", alone)):
            kd, exact = gradient(student, teachers, loss, batch, torch.float32)
            for variant, (dtype, rounded, logits_dtype) in VARIANTS.items():
                with head(rounded, logits_dtype):
                    found, g = gradient(student, teachers, loss, batch, dtype)
                error = float((g - exact).norm() / exact.norm())
                values = name, kind, kd, variant, abs(found - kd) / kd, error
                rows.append(dict(zip(RESULT, values, strict=True)))
                print(f"{name}, {kind}, {variant}: gradient off by {error:.2%}", flush=True)
    shown = [
        {k: figure(v) if isinstance(v, float) else str(v) for k, v in row.items()} for row in rows
    ]
    print(measure.markdown(shown))
    measure.append_csv(
        options.csv, [{**measure.environment(torch.device("cpu")), **row} for row in rows]
    )


if __name__ == "__main__":
    main()
