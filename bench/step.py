"""What does the loss cost inside a training step, and do its threads disturb PyTorch's?

    python bench/step.py [--shape bert minilm] [--sequences N] [--length 128] [--dtype bf16]

A step is the teacher's forward, the student's forward, KL at T = 2 on all rows and CE on 15 % of
them, and the backward. Weights are random, of the published shapes. The floor is the same step
without a loss: its gradient of the logits already exists. The contestants take turns, a step each.
A batch has 64 sequences on a GPU and 8 on a CPU: with 8 a GPU would wait for the host's launches.
torch.compile takes part on a GPU only if --only names it, because it compiles for a long time.

"fused head" takes the hidden states instead, as the driver does, and never holds all logits.

The table shows the whole step, the call of the loss inside it, and the same call on its own, on the
same logits, right after. If two thread pools competed for the cores, the call inside the step would
take longer. Ours compute the gradient in that call; the others compute it in the backward, so for
them only the whole step can be compared. Appends to bench/results/step.csv.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from kit import measure, peers
from kit.measure import Spread, figure
from torch import Tensor

from distilfast import linear_distillation_loss, models

CSV = Path(__file__).parent / "results" / "step.csv"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
VOCABULARY = 30522
SHAPES = {  # teacher's layers, student's layers, width, heads
    "bert": (12, 6, 768, 12),  # BERT-base to DistilBERT
    "minilm": (6, 3, 384, 12),  # the demo's
}
SEQUENCES = {"cuda": 64, "cpu": 8}
SECONDS = 25.0  # for the rounds of a shape
FUSED = "distilfast, fused head"


def masked_lm(layers: int, width: int, heads: int, like: Tensor) -> torch.nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=heads,
        intermediate_size=4 * width,
    )
    return transformers.BertForMaskedLM(config).eval().to(like.device, like.dtype)


class Step:
    """A teacher, a student and a batch."""

    def __init__(self, shape: str, sequences: int, length: int, like: Tensor):
        teacher, student, width, heads = SHAPES[shape]
        torch.manual_seed(0)
        self.teacher = masked_lm(teacher, width, heads, like)
        self.student = masked_lm(student, width, heads, like)
        self.teacher_parts = models.take_apart(self.teacher)
        self.student_parts = models.take_apart(self.student)
        self.tokens = torch.randint(VOCABULARY, (sequences, length), device=like.device)
        rows = sequences * length
        chosen = torch.randperm(rows, device=like.device)[: int(peers.LABELLED * rows)]
        self.labels = torch.full((rows,), peers.IGNORED, device=like.device)
        self.labels[chosen] = torch.randint(VOCABULARY, (len(chosen),), device=like.device)
        self.gradient = torch.randn((rows, VOCABULARY), device=like.device).to(like.dtype) / rows

    def run_fused(self) -> dict[str, float]:
        """The same step through the fused head."""
        began = now(self.tokens.device)

        def features(parts: models.Parts) -> Tensor:
            return parts.features(parts.hidden(self.tokens, None).flatten(0, 1))

        with torch.no_grad():
            target = features(self.teacher_parts)
        student, teacher = self.student_parts.head, self.teacher_parts.head
        linear_distillation_loss(
            features(self.student_parts),
            student.weight,
            target,
            teacher.weight,
            self.labels,
            student_bias=student.bias,
            teacher_bias=teacher.bias,
            ce_weight=1.0,
        ).loss.backward()
        found = {"step_ms": (now(self.tokens.device) - began) * 1e3}
        self.student.zero_grad()
        return found

    def run(self, loss: peers.Loss | None) -> dict[str, float]:
        """One step: its time in ms, that of the loss inside it, and of the loss alone after it."""
        device, inside = self.tokens.device, 0.0
        began = now(device)
        with torch.no_grad():
            target = self.teacher(self.tokens).logits.flatten(0, 1)
        logits = self.student(self.tokens).logits.flatten(0, 1)
        if loss is None:
            logits.backward(self.gradient)
        else:
            # A GPU is not waited for inside a step: there only the whole is timed.
            called = time.perf_counter()
            value = loss([logits], [target], self.labels)
            inside = (time.perf_counter() - called) * 1e3
            value.backward()
            del value
        found = {"step_ms": (now(device) - began) * 1e3}
        self.student.zero_grad()
        if loss is not None and device.type == "cpu":
            student = logits.detach().requires_grad_()
            found["loss_inside_ms"] = inside
            found["loss_alone_ms"] = measure.Stopwatch(device).ms(
                lambda: loss([student], [target], self.labels)
            )
        return found


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_shape(shape: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row a contestant."""
    device, dtype = torch.device(options.device), DTYPES[options.dtype]
    like = torch.empty(0, dtype=dtype, device=device)
    step = Step(shape, options.sequences, options.length, like)
    case = peers.Case("kl_ce", len(step.labels), VOCABULARY, "some", dtype)
    losses: dict[str, peers.Loss | None] = {"no loss": None, FUSED: None}
    for c in peers.contestants():
        wanted = not options.only or any(part.lower() in c.name.lower() for part in options.only)
        slow = device.type in c.slow and not options.only
        if wanted and not slow and c.skip(case, device) is None and not c.overwrites:
            losses[c.name] = c.build(case)

    def run(name: str) -> dict[str, float]:
        return step.run_fused() if name == FUSED else step.run(losses[name])

    for name in losses:  # what is compiled first is no part of the times
        run(name)
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in losses}
    names, began = list(losses), time.perf_counter()
    for number in range(measure.MOST_ROUNDS):
        if number >= measure.FEWEST_ROUNDS and time.perf_counter() - began > options.seconds:
            break
        first = number % len(names)
        for name in names[first:] + names[:first]:
            for column, value in run(name).items():
                samples[name].setdefault(column, []).append(value)
    rows = []
    for name, found in samples.items():
        spread = Spread.of(found["step_ms"])
        medians = {column: Spread.of(values).median for column, values in found.items()}
        rows.append(
            {
                "shape": shape,
                "sequences": options.sequences,
                "length": options.length,
                "dtype": options.dtype,
                "contestant": name,
                "rounds": len(found["step_ms"]),
                "step_ms": spread.median,
                "step_ms_p20": spread.p20,
                "step_ms_p80": spread.p80,
                "loss_inside_ms": medians.get("loss_inside_ms"),
                "loss_alone_ms": medians.get("loss_alone_ms"),
            }
        )
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--sequences", type=int, help="per batch; else 64 on a GPU, 8 on a CPU")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="contestants, by part of a name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time for a shape's rounds")
    parser.add_argument("--csv", type=Path, default=CSV, help="append to this file")
    options = parser.parse_args(arguments)
    options.sequences = options.sequences or SEQUENCES[torch.device(options.device).type]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    environment = measure.environment(torch.device(options.device))
    for shape in options.shape:
        rows = measure_shape(shape, options)
        measure.append_csv(options.csv, [environment | row for row in rows])
        floor = rows[0]["step_ms"]
        print(f"### {shape}, {options.sequences} x {options.length} tokens, {options.dtype}\n")
        lines = [
            {
                "contestant": row["contestant"],
                "step_ms (p20, p80)": f"{figure(row['step_ms'])} "
                f"({figure(row['step_ms_p20'])}, {figure(row['step_ms_p80'])})",
                "above the floor, ms": figure(row["step_ms"] - floor),
                "loss inside the step, ms": figure(row["loss_inside_ms"]),
                "alone, ms": figure(row["loss_alone_ms"]),
            }
            for row in rows
        ]
        print(measure.markdown(lines) + "\n")


if __name__ == "__main__":
    main()
