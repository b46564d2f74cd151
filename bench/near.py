"""How exact is a head's divergence near the teacher and far from it, and what does it cost?

    python bench/near.py [--rows 1024] [--width 512] [--vocab 16000] [--loss kl jsd]
    python bench/near.py --noise 0.003 0.5 --only distilfast TRL
    TRITON_INTERPRET=1 python bench/near.py --rows 64 --width 32 --vocab 300    # Triton on a CPU

The student's hidden states are the teacher's plus noise, in bf16. Both have the same head;
--own-heads adds noise to the student's head too. The last case, "far", is a student with its own
hidden states and head. Logits have a standard deviation of 3; T = 1; the loss is a mean over rows.

Near the teacher two softmaxes nearly cancel, so errors are relative: that of the loss to the loss,
that of a gradient as the norm of the difference over the norm. The reference is float64 on the
same bf16 inputs. A result that is exact until it is rounded to bf16 has an error of about 0.17%.

Times are taken in rounds, a call of each contestant in turn. A contestant whose call is too long
for the rounds is timed once; one whose call is longer still is left out. The peak is the memory
that one call needs above inputs and gradients. Nothing new is begun after --seconds. Every run
appends to bench/results/near.csv.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import linear
import torch
from kit import heads, measure
from kit.heads import HeadCase, HeadContestant, HeadLoss, Inputs
from kit.measure import figure
from torch import Tensor

CSV = Path(__file__).parent / "results" / "near.csv"
LOSSES = ("kl", "jsd")
NOISES = (0.003, 0.01, 0.05, 0.15, 0.5)  # of hidden states whose entries have variance 1
FAR = None  # in place of a noise
SPREAD = 3.0  # the logits' standard deviation
SECONDS = {"cuda": 150, "cpu": 420}
WARM_ROWS = 64
LONGEST_CALL_SECONDS = 20.0
LONGEST_IN_ROUNDS_SECONDS = {"cuda": 0.5, "cpu": 1.2}
ROUNDS_SECONDS = {"cuda": 0.5, "cpu": 4.0}  # for the rounds of a case, or five of them
INTERPRETED_ELEMENTS = 1 << 20  # of the logits, the most in Triton's interpreter
BLOCK_ELEMENTS = 1 << 22  # of the logits, at a time in float64

OURS = "distilfast"
PEERS = (  # of bench/kit/heads.py
    "TRL divergence",
    "Liger JSD",
    "ORDA",
    "ORDA torch",
    "Liger chunked JSD",
    "F.linear_cross_entropy, accurate",
)
RESULT = (  # the columns beside the environment's and the case's
    "contestant version backend status loss_nats loss_error hidden_error weight_error time_ms "
    "time_ms_p20 time_ms_p80 rounds time_ratio peak_mib"
).split()


# --- The contestants ------------------------------------------------------------------------------


def contestants() -> list[HeadContestant]:
    """Everyone, those that are not here included."""
    known = {c.name: c for c in heads.contestants()}
    ours = functools.partial(HeadContestant, computes=LOSSES, backend="auto")
    eager = functools.partial(HeadContestant, computes=LOSSES, materialises=True)
    rounded = functools.partial(heads.ours, backend="auto", logits_dtype=torch.bfloat16)
    # Each compiles once a loss, which is no reason to leave it out: the cases share their shapes.
    others = [replace(known[name], slow=()) for name in PEERS]
    return [
        ours(OURS, build=functools.partial(heads.ours, backend="auto")),
        ours("distilfast, bf16 logits", build=rounded),
        eager("PyTorch eager, fp32 logits", build=eager_in_fp32),
        eager("PyTorch eager, bf16 logits", build=heads.materialised),
        *(
            replace(c, unable="computes no divergence, CE only") if c.unable == "has CE only" else c
            for c in others
        ),
    ]


def eager_in_fp32(case: HeadCase) -> HeadLoss:
    """The fp32 formula of fp32 products, whose gradients autograd rounds to bf16."""
    loss = heads.materialised(case)
    sides = ("hidden", "weight", "teacher_hidden", "teacher_weight")
    return lambda x: loss(x._replace(**{name: getattr(x, name).float() for name in sides}))


def skip(contestant: HeadContestant, case: HeadCase, options: argparse.Namespace) -> str | None:
    """Why a contestant does not take part, or None."""
    why = linear.skip(contestant, case, options)
    if why is None and contestant.interpreted and options.device == "cpu":
        most = INTERPRETED_ELEMENTS
        if case.rows * case.columns > most:
            return f"in Triton's interpreter at most {most:,} logits, here {case.rows} x V"
    return why


# --- The case, and what it comes to in float64 ----------------------------------------------------


def make_inputs(
    case: HeadCase, noise: float | None, own_heads: bool, device: torch.device
) -> Inputs:
    """One seed: the cases differ in the size of their noise alone."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    scale = SPREAD / math.sqrt(case.width)
    teacher = [draw(case.rows, case.width), scale * draw(case.columns, case.width)]
    teacher = [x.to(case.dtype) for x in teacher]
    change = [draw(case.rows, case.width), scale * draw(case.columns, case.width)]
    if noise is FAR:
        student = [x.to(case.dtype) for x in change]
    else:
        student = [
            (x.float() + noise * y).to(case.dtype) for x, y in zip(teacher, change, strict=True)
        ]
        if not own_heads:
            student[1] = teacher[1].detach()  # the same memory
    student = [x.requires_grad_() for x in student]
    return Inputs(student[0], student[1], None, teacher[0], teacher[1], None, None)


def divergence(loss: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row and its gradient for the student's logits, in float64.

    With d = log q - log p, both divergences are written as sums of terms that are never negative,
    since nothing cancels in such a sum:

        KL(p || q)  = sum p (expm1(d) - d)
        JSD(p, q)   = (sum p g(d) + sum q g(-d)) / 2,  g(x) = expm1(x) / 2 - log1p(expm1(x) / 2)

    What is added to the definitions is sum (q - p) = 0 and the like. The gradients are p expm1(d),
    which is q - p, and q (w - sum q w) / 2 with w = log(q / m) = -log1p(expm1(-d) / 2).
    """
    log_p, log_q = teacher.log_softmax(-1), student.log_softmax(-1)
    d = log_q - log_p
    p = log_p.exp()
    if loss == "kl":
        excess = torch.expm1(d)
        return (p * (excess - d)).sum(-1), p * excess
    q = log_q.exp()
    up, down = torch.expm1(d) / 2, torch.expm1(-d) / 2
    log_up, log_down = torch.log1p(up), torch.log1p(down)
    rows = (p * (up - log_up) + q * (down - log_down)).sum(-1) / 2
    mean = (q * log_down).sum(-1, keepdim=True)
    return rows, q * (mean - log_down) / 2


class Exact:
    """The loss and the gradients of hidden states and weight in float64, in blocks of rows."""

    def __init__(self, case: HeadCase, x: Inputs):
        hidden, weight, teacher_hidden, teacher_weight = (
            t.detach().double() for t in (x.hidden, x.weight, x.teacher_hidden, x.teacher_weight)
        )
        self.loss = hidden.new_zeros(())
        self.d_hidden = torch.empty_like(hidden)
        self.d_weight = torch.zeros_like(weight)
        size = max(1, BLOCK_ELEMENTS // case.columns)
        for start in range(0, case.rows, size):
            rows = slice(start, start + size)
            teacher = teacher_hidden[rows] @ teacher_weight.T
            found, gradient = divergence(case.loss, hidden[rows] @ weight.T, teacher)
            gradient /= case.rows
            self.loss += found.sum() / case.rows
            self.d_hidden[rows] = gradient @ weight
            self.d_weight.addmm_(gradient.T, hidden[rows])

    def compare(self, value: Tensor, gradients: Sequence[Tensor]) -> dict[str, float]:
        return {
            "loss_error": relative(value, self.loss),
            "hidden_error": relative(gradients[0], self.d_hidden),
            "weight_error": relative(gradients[1], self.d_weight),
        }


def relative(found: Tensor, right: Tensor) -> float:
    """The norm of the difference over the norm of what is right; NaN counts as infinite."""
    error = (found.double() - right).norm() / right.norm()
    return float(error.nan_to_num(torch.inf))


# --- One loss -------------------------------------------------------------------------------------


class Ready(NamedTuple):
    """Who has run once already."""

    contestant: HeadContestant
    loss: HeadLoss
    in_rounds: bool  # else a call takes too long for them


def measure_loss(
    case: HeadCase, field: Sequence[HeadContestant], options: argparse.Namespace, ends: float
) -> list[dict[str, Any]]:
    """A row for each case and contestant."""
    device = torch.device(options.device)
    standing, waiting = {}, {}
    for c in field:
        why = skip(c, case, options)
        standing[c.name] = {"status": f"skipped: {why}"}
        if why is None:
            waiting[c.name] = c
    noises = [*options.noise, FAR]
    ready: dict[str, Ready] = {}

    def prepare(name: str) -> dict[str, Any]:
        """What is loaded or compiled in the first calls is no part of a time or a peak."""
        loss = waiting[name].build(case)
        few = linear.first_rows(x, WARM_ROWS)
        linear.run(loss, few)
        began = time.perf_counter()
        linear.run(loss, few)
        synchronize(device)
        seconds = (time.perf_counter() - began) * max(1, case.rows / WARM_ROWS)
        if seconds > LONGEST_CALL_SECONDS:
            return {"status": f"skipped: a call would take about {seconds:.0f} s"}
        began = time.perf_counter()
        linear.run(loss, x)  # compiled for this shape, it may be
        synchronize(device)
        seconds = min(seconds, time.perf_counter() - began)
        in_rounds = seconds <= LONGEST_IN_ROUNDS_SECONDS[device.type]
        ready[name] = Ready(waiting[name], loss, in_rounds)
        return {"status": "ready"}

    print(f"{case}, getting ready", file=sys.stderr)
    x = make_inputs(case, noises[0], options.own_heads, device)
    measure.attempt_each(waiting, standing, ends, prepare)
    results: list[dict[str, Any]] = []
    for noise in noises:
        rows = {c.name: result_row(case, noise, options, c) | standing[c.name] for c in field}
        print(f"{case}, noise {label(noise)}", file=sys.stderr)
        x = make_inputs(case, noise, options.own_heads, device)
        measure_case(case, x, rows, ready, ends)
        results += rows.values()
    return results


def measure_case(
    case: HeadCase,
    x: Inputs,
    rows: dict[str, dict[str, Any]],
    field: dict[str, Ready],
    ends: float,
) -> None:
    """Fill in the rows of those that are ready."""
    device, timed = x.hidden.device, {}
    exact = Exact(case, x)
    gradient_mib = sum(t.nbytes for t in x.trained) / measure.MIB
    for row in rows.values():
        row["loss_nats"] = float(exact.loss)

    def attempt(name: str) -> dict[str, Any]:
        contestant, loss, in_rounds = field[name]
        kept: list[tuple[Tensor, list[Tensor]]] = []
        began = time.perf_counter()
        peak = measure.peak_mib(lambda: kept.append(linear.run(loss, x)), device)
        synchronize(device)
        seconds = time.perf_counter() - began
        if peak is None:  # then nothing has run yet
            kept.append(linear.run(loss, x))
        found: dict[str, Any] = exact.compare(*kept[0])
        found["backend"] = heads.backend_of(contestant, case, device)
        if contestant.interpreted and device.type == "cpu":
            return {**found, "status": "not timed: runs in Triton's interpreter"}
        found["peak_mib"] = None if peak is None else max(0.0, peak - gradient_mib)
        if not in_rounds:
            return {**found, **measure.time_columns([seconds * 1e3]), "status": "timed once"}
        timed[name] = lambda turn: linear.run(loss, x)
        return {**found, "status": "ok"}

    measure.attempt_each(field, rows, ends, attempt)
    stopwatch = measure.Stopwatch(device)
    samples, failures = measure.interleave(timed, stopwatch, ROUNDS_SECONDS[device.type])
    for name, text in failures.items():
        rows[name]["status"] = f"failed: {text}"
    for name in timed.keys() - failures.keys():
        rows[name] |= measure.time_columns(samples[name])
    ours = rows.get(OURS, {}).get("time_ms")
    for row in rows.values():
        if ours and row["time_ms"]:
            row["time_ratio"] = row["time_ms"] / ours


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def result_row(
    case: HeadCase, noise: float | None, options: argparse.Namespace, contestant: HeadContestant
) -> dict[str, Any]:
    return {
        "loss": case.loss,
        "noise": label(noise),
        "rows": case.rows,
        "width": case.width,
        "columns": case.columns,
        "heads": "own" if options.own_heads or noise is FAR else "same",
        "temperature": case.temperature,
        **dict.fromkeys(RESULT),
        "contestant": contestant.name,
        "version": contestant.version,
    }


# --- What comes out -------------------------------------------------------------------------------


def label(noise: float | None) -> str:
    return "far" if noise is FAR else f"{noise:g}"


def percent(error: float | None) -> str:
    return "" if error is None else f"{figure(100 * error, 2)}%"


def table(case: HeadCase, rows: Sequence[dict[str, Any]]) -> str:
    """A loss for people: a line for each case and contestant, and who was skipped below it."""
    lines: list[dict[str, str]] = []
    before = None
    for row in rows:
        if row["status"].startswith("skipped: "):
            continue
        median, p20, p80 = (figure(row[f"time_ms{part}"]) for part in ("", "_p20", "_p80"))
        first = row["noise"] != before
        before = row["noise"]
        peak, ratio = row["peak_mib"], row["time_ratio"]
        lines.append(
            {
                "noise": row["noise"] if first else "",
                "nats": figure(row["loss_nats"]) if first else "",
                "contestant": linear.named(row),
                "loss off by": percent(row["loss_error"]),
                "d_hidden": percent(row["hidden_error"]),
                "d_weight": percent(row["weight_error"]),
                "time_ms (p20, p80)": f"{median} ({p20}, {p80})" if median else "",
                "of ours": "" if ratio is None else f"{ratio:.2f}x",
                "peak_mib": "" if peak is None else f"{peak:,.0f}",
                "note": "" if row["status"] == "ok" else row["status"],
            }
        )
    heads_are = (
        "each its own head" if rows[0]["heads"] == "own" else "one head but for the last case"
    )
    parts = [f"### {case}, {heads_are}", measure.markdown(lines) if lines else ""]
    parts.append(skipped(rows))
    return "\n\n".join(filter(None, parts)) + "\n"


def skipped(rows: Sequence[dict[str, Any]]) -> str:
    """Who was skipped, by reason; with the cases where it was not in all of them."""
    cases: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        cases.setdefault((row["contestant"], row["status"]), []).append(row["noise"])
    number, lines = len({row["noise"] for row in rows}), []
    for (name, status), noises in cases.items():
        where = "" if len(noises) == number else f": noise {', '.join(noises)}"
        lines.append({"contestant": name, "status": status + where})
    return measure.skipped(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--rows", type=int, default=1024)
    add("--width", type=int, default=512, help="width of the hidden states")
    add("--vocab", type=int, default=16000)
    add("--noise", nargs="+", type=float, default=NOISES, help="standard deviations of the noise")
    add("--loss", nargs="+", choices=LOSSES, default=LOSSES)
    add("--own-heads", action="store_true", help="add noise to the student's head too")
    add("--only", nargs="+", metavar="NAME", help="contestants whose name contains one of these")
    add("--seconds", type=float, help=f"begin nothing new after: {SECONDS}")
    add("--csv", type=Path, default=CSV, help="append to this file")
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON; no FILE: print only JSON")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here")
    if not all(noise > 0 for noise in options.noise):
        raise SystemExit("--noise: expected numbers above 0, without noise the loss is 0")
    field = [
        c
        for c in contestants()
        if not options.only or any(part.lower() in c.name.lower() for part in options.only)
    ]
    if not field:
        raise SystemExit("nothing to measure: --only knows no such contestant")
    sizes = options.rows, options.width, options.width, options.vocab
    cases = [HeadCase(loss, *sizes, temperature=1.0) for loss in options.loss]
    environment, results = measure.environment(device), []
    try:
        columns = [*environment, *result_row(cases[0], FAR, options, field[0])]
        measure.check_csv(options.csv, columns)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    ends = began + (options.seconds or SECONDS[device.type])
    for case in cases:
        rows = measure_loss(case, field, options, ends)
        measure.append_csv(options.csv, [{**environment, **row} for row in rows])
        results += rows
        if options.json != "-":
            print(table(case, rows), flush=True)
    if options.json is not None:
        measure.write_json(options.json, environment, results)
    print(f"{time.perf_counter() - began:.0f} s, appended to {options.csv}", file=sys.stderr)


if __name__ == "__main__":
    main()
