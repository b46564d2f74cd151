"""How many rows should a chunk of the fused head have, and what does it cost to sum over chunks?

    python bench/chunks.py [--rows N] [--width 768] [--vocab 30522] [--device cpu|cuda]

Times `linear_distillation_loss` (KL at T = 2, CE on 15 % of the rows, heads with a bias, bf16,
forward and backward) at several chunk_rows. In turns with it, it times the four products alone
(products.py) in chunks of the same size. Then it shows what each design decision gains: sums in
fp32, scratch memory that is kept, logits that are not computed a second time.

The error is that of the weight's gradient, the norm of the difference over the norm, against the
same loss on fp32 copies of the inputs. Appends to bench/results/chunks.csv, which docs/kernels.md
quotes.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kit import measure
from kit.measure import Spread, figure
from kit.products import BareProducts
from torch import Tensor

from distilfast import linear_distillation_loss
from distilfast.losses.scratch import Scratch

CSV = Path(__file__).parent / "results" / "chunks.csv"
CHUNKS = {"cpu": (128, 256, 512, 1024, 2048, 4096), "cuda": (512, 1024, 2048, 4096, 8192, 16384)}
ROWS = {"cpu": 4096, "cuda": 16384}
FEWEST = 64  # rows a chunk at which sums round most often, for the error alone
LABELLED = 0.15


class Head:
    """Inputs in bf16, and what is computed from them."""

    def __init__(self, rows: int, width: int, vocab: int, device: torch.device):
        torch.manual_seed(0)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(shape, device=device)).bfloat16()

        self.sides = [
            (draw(rows, width), draw(vocab, width, scale=2 / width**0.5), draw(vocab))
            for _ in range(2)
        ]
        self.labels = torch.randint(vocab, (rows,), device=device)
        self.labels[torch.rand(rows, device=device) >= LABELLED] = -100
        for x in self.sides[0]:
            x.requires_grad_()

    def gradients(self, **keywords: Any) -> tuple[Tensor, ...]:
        (hidden, weight, bias), (t_hidden, t_weight, t_bias) = self.sides
        output = linear_distillation_loss(
            hidden,
            weight,
            t_hidden,
            t_weight,
            self.labels,
            student_bias=bias,
            teacher_bias=t_bias,
            ce_weight=1.0,
            **keywords,
        )
        return torch.autograd.grad(output.loss, (hidden, weight, bias))

    def in_fp32(self) -> Head:
        copy = object.__new__(Head)
        copy.labels = self.labels
        copy.sides = [tuple(x.detach().float() for x in side) for side in self.sides]
        for x in copy.sides[0]:
            x.requires_grad_()
        return copy


def contestants(head: Head) -> dict[str, Callable[[int], Any]]:
    """Everything that is timed, by name."""
    sizes = [n for n in CHUNKS[head.labels.device.type] if n <= len(head.labels)]
    student, teacher = (side[:2] for side in head.sides)
    products = BareProducts(student, teacher, sizes)

    def without_scratch(_: int) -> None:
        Scratch.release()
        head.gradients()

    calls: dict[str, Callable[[int], Any]] = {}
    for n in sizes:
        if n in products.sizes:
            calls[f"products, chunks of {n}"] = lambda _, n=n: products.run(n)
        calls[f"fused, chunks of {n}"] = lambda _, n=n: head.gradients(chunk_rows=n)
    calls["fused, auto"] = lambda _: head.gradients()
    calls["fused, auto, sums in bf16"] = lambda _: head.gradients(accum_dtype=torch.bfloat16)
    calls["fused, auto, fresh scratch"] = without_scratch
    calls["both logits once more"] = lambda _: products.run(products.sizes[-1], gradients=False)
    return calls


def errors(head: Head) -> dict[str, float]:
    """Of the weight's gradient, relative."""
    exact = head.in_fp32().gradients()[1]

    def error(**keywords: Any) -> float:
        off = head.gradients(**keywords)[1].float() - exact
        return float(off.norm() / exact.norm())

    bf16 = functools.partial(error, accum_dtype=torch.bfloat16)
    return {
        "fused, auto": error(),
        "fused, auto, sums in bf16": bf16(),
        f"fused, chunks of {FEWEST}": error(chunk_rows=FEWEST),
        f"fused, chunks of {FEWEST}, sums in bf16": bf16(chunk_rows=FEWEST),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rows", type=int)
    add("--width", type=int, default=768)
    add("--vocab", type=int, default=30522)
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--seconds", type=float, default=90.0, help="time limit for the rounds")
    add("--csv", type=Path, default=CSV)
    options = parser.parse_args()
    device = torch.device(options.device)
    head = Head(options.rows or ROWS[device.type], options.width, options.vocab, device)
    off = errors(head)
    calls = contestants(head)

    def again(name: str, turn: int) -> None:
        """As in training, the call before had the same chunks, and left its scratch."""
        calls[name](turn)

    samples, failures = measure.interleave(
        calls, measure.Stopwatch(device), options.seconds, before=again
    )
    times = {name: Spread.of(x) for name, x in samples.items() if name not in failures}
    best = min(t.median for name, t in times.items() if name.startswith("products"))
    shape = {"rows": len(head.labels), "width": options.width, "vocab": options.vocab}
    rows = []
    for name in dict.fromkeys((*times, *off)):
        spread = times.get(name)
        rows.append(
            {
                **shape,
                "what": name,
                "time_ms": None if spread is None else spread.median,
                "time_ms_p20": None if spread is None else spread.p20,
                "time_ms_p80": None if spread is None else spread.p80,
                "of_best_products": None if spread is None else spread.median / best,
                "d_weight_error": off.get(name),
            }
        )
    environment = measure.environment(device)
    measure.append_csv(options.csv, [environment | row for row in rows])
    lines = [
        {
            "what": str(row["what"]),
            "time_ms": figure(row["time_ms"]),
            "of the best products": figure(row["of_best_products"]),
            "error of dW": "" if row["d_weight_error"] is None else f"{row['d_weight_error']:.1e}",
        }
        for row in rows
    ]
    print(measure.markdown(lines))


if __name__ == "__main__":
    main()
