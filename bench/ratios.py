"""Three ratios, each within one run: has a change made anything slower?

    python bench/ratios.py [--seconds 20] [--quick] [--json [FILE]]

- dense: `distillation_loss` (KL + CE) and its backward, over the time in which a copy moves its
  three tensors;
- head: `linear_distillation_loss` and its backward on bf16 inputs, over its four products in the
  dtype in which this machine multiplies fastest;
- step: teacher, student, fused head and backward, over the products of all linear layers and of
  the head.

Each ratio has a limit, loose enough for a slow day and a shared machine. If one is exceeded, the
script says which and exits with status 1. tests/bench/test_ratios.py runs it with the long tests.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from distilfast_kernels import cpp
from kit import measure
from kit.measure import Spread, figure
from kit.products import BareProducts
from step import Step
from torch import Tensor, nn

import distilfast
from distilfast.losses import backends
from distilfast.machine import multiplies_bf16

# By what the machine multiplies, and for the dense loss by its vectors: beyond means that a change
# has cost a third or more.
DENSE_LIMITS = {"plain": 40.0, "avx2": 8.0, "avx512": 4.0, "avx512bf16": 3.0}
HEAD_LIMITS, STEP_LIMIT = {True: 1.4, False: 2.0}, 4.0


class Ratio(NamedTuple):
    name: str
    case: str
    ours: Callable[[int], Any]
    yardstick: Callable[[int], Any]
    limit: float


def fastest_dtype() -> torch.dtype:
    return torch.bfloat16 if multiplies_bf16() else torch.float32


def dense(rows: int, vocab: int) -> Ratio:
    torch.manual_seed(0)
    student, teacher = (torch.randn(rows, vocab).bfloat16() for _ in range(2))
    leaf, labels = student.requires_grad_(), torch.randint(vocab, (rows,))
    to = torch.empty_like(teacher)

    def ours(_: int) -> None:
        leaf.grad = None
        distilfast.distillation_loss(leaf, teacher, labels, ce_weight=1.0).loss.backward()

    def copies(_: int) -> None:  # two tensors read or written each: one and a half of them
        to.copy_(teacher)
        to[: rows // 2].copy_(teacher[: rows // 2])

    limit = DENSE_LIMITS[cpp.level()] if backends.unavailable("cpp") is None else 200.0
    return Ratio("dense", f"{rows} x {vocab:,}, bf16", ours, copies, limit)


def head(rows: int, width: int, vocab: int) -> Ratio:
    torch.manual_seed(0)
    hidden, t_hidden = (torch.randn(rows, width).bfloat16() for _ in range(2))
    weight, t_weight = ((torch.randn(vocab, width) / width**0.5).bfloat16() for _ in range(2))
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    labels = torch.randint(vocab, (rows,))
    dtype = fastest_dtype()
    pairs = [tuple(x.detach().to(dtype) for x in pair) for pair in (leaves, (t_hidden, t_weight))]
    bare = BareProducts(*pairs, [rows])

    def ours(_: int) -> None:
        hidden.grad = weight.grad = None
        distilfast.linear_distillation_loss(
            *leaves, t_hidden, t_weight, labels, ce_weight=1.0
        ).loss.backward()

    name = "bf16" if multiplies_bf16() else "fp32"
    case = f"{rows} x {width} x {vocab:,}, bf16, over products of {name}"
    return Ratio("head", case, ours, lambda _: bare.run(rows), HEAD_LIMITS[multiplies_bf16()])


def step(shape: str, sequences: int, length: int) -> Ratio:
    dtype = fastest_dtype()
    made = Step(shape, sequences, length, torch.empty(0, dtype=dtype))
    products = [
        *linear_products(made.teacher, sequences * length, forward=True),
        *linear_products(made.student, sequences * length, forward=False),
    ]

    def bare(_: int) -> None:
        for a, b, out in products:
            torch.mm(a, b, out=out)

    case = f"{shape}, {sequences} x {length}, {'bf16' if multiplies_bf16() else 'fp32'}"
    return Ratio("step", case, lambda _: made.run_fused(), bare, STEP_LIMIT)


def linear_products(
    model: nn.Module, rows: int, forward: bool
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Operands and results of the products of all linear layers: one each, or with the backward
    three."""
    found = []
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            x = weight.new_zeros(rows, weight.shape[1])
            y = weight.new_zeros(rows, weight.shape[0])
            found.append((x, weight.T, y))
            if not forward:
                found += [(y, weight, torch.empty_like(x)), (y.T, x, torch.empty_like(weight))]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="for the rounds of each ratio")
    parser.add_argument("--quick", action="store_true", help="small shapes, without limits")
    parser.add_argument("--json", nargs="?", const="-", help="write JSON; no file: print only JSON")
    arguments = parser.parse_args()
    if arguments.quick:
        cases = [lambda: dense(8, 512), lambda: head(64, 32, 512), lambda: step("minilm", 1, 8)]
    else:
        cases = [
            lambda: dense(512, 30_522),
            lambda: head(1024, 768, 30_522),
            lambda: step("minilm", 8, 128),
        ]
    stopwatch = measure.Stopwatch(torch.device("cpu"))
    rows, beyond = [], []
    for make in cases:
        ratio = make()
        calls = {"ours": ratio.ours, "yardstick": ratio.yardstick}
        for call in calls.values():
            call(0)
        samples, failures = measure.interleave(calls, stopwatch, arguments.seconds)
        if failures:
            sys.exit(f"{ratio.name}: {failures}")
        found = [a / b for a, b in zip(samples["ours"], samples["yardstick"], strict=True)]
        spread = Spread.of(found)
        rows.append(
            {
                "ratio": ratio.name,
                "case": ratio.case,
                "ours_ms": Spread.of(samples["ours"]).median,
                "yardstick_ms": Spread.of(samples["yardstick"]).median,
                "median": spread.median,
                "p20": spread.p20,
                "p80": spread.p80,
                "limit": ratio.limit,
            }
        )
        # The best fifth of the rounds: a neighbour on the machine makes some slow, not all.
        if spread.p20 > ratio.limit and not arguments.quick:
            beyond.append(f"{ratio.name}: {spread.p20:.2f}, at most {ratio.limit}")
    environment = measure.environment(torch.device("cpu"))
    if arguments.json:
        measure.write_json(arguments.json, environment, rows)
    if arguments.json != "-":
        print(f"{environment['device']}, torch {environment['torch']}, {environment['commit']}")
        shown = [
            {k: figure(v) if isinstance(v, float) else str(v) for k, v in row.items()}
            for row in rows
        ]
        print(measure.markdown(shown))
    if beyond:
        sys.exit("slower than its limit: " + "; ".join(beyond))


if __name__ == "__main__":
    main()
