"""How fast is the fused head, compared with the bare matrix products and with other libraries?

    python bench/linear.py [--quick] [--device cuda|cpu] [--csv FILE] [--json [FILE]] [--plot FILE]
    python bench/linear.py --loss kl_ce --width 768 --vocab 30522 --rows 4096 --only distilfast
    python bench/linear.py --memory [--rows 4096 262144]    # does the peak depend on the rows?

A call goes from hidden states and weights to the loss and the gradients of hidden states, weight
and bias.

The yardstick is the products that the loss needs, and nothing else: the student's logits, the
teacher's unless the loss is CE alone, and the two gradients. They run in chunks of rows, at the
chunk size that is fastest here, into existing outputs; nothing is added up. `gemm_ratio` is a
contestant's time over the time of these products in the same rounds. CE alone needs only the rows
with a label.

The peak is the memory that a call needs above the inputs, less the bytes of the gradients that it
returns. Scratch that ours keeps from an earlier call is released first. Loss and gradients of the
measured call are compared with a reference: fp32 products and the fp64 loss, in blocks of rows;
of each gradient, 64 rows are compared. Data are random, so a contestant that skips negligible
gradients finds few to skip.

Heads have a bias at V = 30,522, as BERT's have, and none at other V. --bias and --no-bias override
that for all.

Without --loss, --vocab, --width, --rows or --labels it measures a plan, the most telling cases
first, and begins nothing new after SECONDS. A run then ends within eight minutes on a CPU, two on a
GPU, and one and a half with --quick. On a CPU that may leave out the largest heads; --seconds 1200
includes them. Every run appends to bench/results/linear.csv, from which --plot draws.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from kit import heads, measure, peers
from kit.heads import HeadCase, HeadContestant, HeadLoss, Inputs
from kit.measure import figure
from kit.products import BareProducts
from torch import Tensor

CSV = Path(__file__).parent / "results" / "linear.csv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
BERT = 30522  # the vocabulary whose heads have a bias
WIDTHS, VOCABULARIES = (768, 4096, 384, 2048), (BERT, 128256, 50257, 151936)
CHUNKS = (256, 512, 1024, 2048, 4096, 8192, 16384)  # rows, of the bare products
ROWS = {"cuda": 8192, "cpu": 4096}
QUICK_ROWS = {"cuda": 8192, "cpu": 512}
# Beyond its first case a CPU gets fewer rows: the products of a pass, and the fewest rows.
CPU_FLOP, CPU_FEWEST_ROWS = 2**38, 256
MEMORY_ROWS = (4096, 16384, 65536, 262144)
MEMORY_WIDTH = {"cuda": 768, "cpu": 128}
COMPARED_ROWS = 4096  # of --memory: above, a reference would take longer than all the rest
WARM_ROWS = 64
SECONDS, QUICK_SECONDS = {"cuda": 75, "cpu": 360}, 45  # nothing new is begun after so long
ROUNDS_SECONDS = {"cuda": 0.5, "cpu": 4.0}  # for the rounds of a case, or five of them
LONGEST_CALL_SECONDS = 10.0  # one that takes longer would take the time of all others
# What rounding gradients to the dtype costs, and logits, where a contestant rounds them. A row of
# the hidden states' gradient may be off by so much of its largest entry. A row of the weight's
# gradient sums over the rows: its budget is for the root mean square of the rows' relative errors,
# which a few rows that are wrong exceed too.
VALUE_TOLERANCE = {torch.bfloat16: 5e-4, torch.float16: 1e-4, torch.float32: 1e-5}
HIDDEN_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2e-5}
WEIGHT_TOLERANCE = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float32: 2e-5}
CHECKED_ROWS = 64  # of each gradient
# Logits of the reference at a time, from fp32 products, and of these in fp64.
BLOCK_ELEMENTS = {"cpu": (1 << 26, 1 << 22), "cuda": (1 << 29, 1 << 27)}
COLUMNS_AT_ONCE = 1 << 14  # of the weight, in fp32

RESULT = (  # the columns beside the environment's and the case's
    "contestant version backend status time_ms time_ms_p20 time_ms_p80 rounds peak_mib inputs_mib "
    "gradients_mib tflop tflop_per_s gemm_chunk_rows gemm_ms gemm_tflop_per_s gemm_ratio "
    "matrix_fraction speedup value_error hidden_error weight_error agreement lacks"
).split()
BARE = "bare products"


# --- The cases ------------------------------------------------------------------------------------


def plan(options: argparse.Namespace) -> list[HeadCase]:
    """What is measured, the most telling first: a run that is out of time leaves out the rest."""
    kind, found = options.device, []

    def add(loss: str, width: int, vocab: int, rows: int = 0, labels: str = "") -> None:
        labels = labels or {"kl_ce": "some", "ce": "all"}.get(loss, "none")
        if loss not in ("kl_ce", "ce"):
            labels = "none"
        bias = vocab == BERT if options.bias is None else options.bias
        teacher_width = options.teacher_width or width
        settings = labels, bias, DTYPES[options.dtype], options.temperature
        case = HeadCase(loss, rows or 1, width, teacher_width, vocab, *settings)
        if not rows:
            rows = ROWS[kind] if kind == "cuda" else fitting_rows(case)
            case = HeadCase(loss, rows, width, teacher_width, vocab, *settings)
        if case not in found:
            found.append(case)

    first = QUICK_ROWS[kind] if options.quick else ROWS[kind]
    if any((options.loss, options.vocab, options.width, options.rows, options.labels)):
        axes = (
            options.vocab or [BERT],
            options.width or [WIDTHS[0]],
            options.rows or [first],
            options.loss or ["kl_ce"],
            options.labels or [""],
        )
        for vocab, width, rows, loss, labels in itertools.product(*axes):
            add(loss, width, vocab, rows, labels)
        return found
    add("kl_ce", WIDTHS[0], BERT, first)
    if options.quick:
        add("ce", WIDTHS[0], BERT, first)
        return found
    add("kl_ce", WIDTHS[1], VOCABULARIES[1])
    for loss in heads.LOSSES[1:]:
        add(loss, WIDTHS[0], BERT)
    for vocab, width in itertools.product(VOCABULARIES, WIDTHS):
        if (vocab, width) != (BERT, WIDTHS[0]):  # with more rows it was the first
            add("kl_ce", width, vocab)
    add("ce", WIDTHS[1], VOCABULARIES[1])
    if kind == "cpu":  # the largest heads take a minute each there
        found[1:] = sorted(found[1:], key=lambda case: (case.loss == "kl_ce", case.input_bytes))
    return found


def fitting_rows(case: HeadCase) -> int:
    """A power of two, for a CPU; the case has one row."""
    rows = CPU_FEWEST_ROWS
    while 2 * rows * case.flop <= CPU_FLOP and 2 * rows <= ROWS["cpu"]:
        rows *= 2
    return rows


def skip(contestant: HeadContestant, case: HeadCase, options: argparse.Namespace) -> str | None:
    """Why a contestant does not take part in a case, or None."""
    device = torch.device(options.device)
    if device.type in contestant.slow and not options.only:
        return "slow to get ready, ask for it with --only"
    why = contestant.skip(case, device)
    if why is None and contestant.materialises:
        needed = heads.MATERIALISED_BYTES * case.needed_rows * case.columns
        free = measure.free_bytes(device)
        if needed > free:
            return f"N x V does not fit: needs about {needed >> 30} GiB, {free >> 30} are free"
    return why


# --- One case -------------------------------------------------------------------------------------


def make_inputs(case: HeadCase, device: torch.device) -> Inputs:
    """Logits of variance 4, and a bias of variance 1/4."""
    torch.manual_seed(0)

    def random(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, dtype=case.dtype, device=device).mul_(scale)

    def side(width: int) -> tuple[Tensor, Tensor, Tensor | None]:
        weight = random(case.columns, width, scale=2 / width**0.5)
        return (
            random(case.rows, width),
            weight,
            random(case.columns, scale=0.5) if case.bias else None,
        )

    student = [x if x is None else x.requires_grad_() for x in side(case.width)]
    teacher = side(case.teacher_width) if case.teacher else (None, None, None)
    labels = None
    if case.labels != "none":
        labels = torch.full((case.rows,), peers.IGNORED, device=device)
        chosen = torch.randperm(case.rows, device=device)[: case.logits.labelled]
        labels[chosen] = torch.randint(case.columns, (len(chosen),), device=device)
    return Inputs(*student, *teacher, labels)


def run(loss: HeadLoss, inputs: Inputs) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of hidden states, weight and bias."""
    value = loss(inputs)
    return value.detach(), list(torch.autograd.grad(value, inputs.trained))


def bare_products(case: HeadCase, x: Inputs) -> BareProducts:
    """The products that a loss needs: CE alone needs those of the labelled rows."""
    hidden, teacher = x.hidden.detach(), None
    if case.needed_rows < case.rows:
        hidden = hidden[x.labels != peers.IGNORED]
    if x.teacher_hidden is not None:
        teacher = x.teacher_hidden, x.teacher_weight
    sizes = [n for n in CHUNKS if n <= len(hidden)] or [len(hidden)]
    return BareProducts((hidden, x.weight), teacher, sizes)


class Oracle:
    """A case from fp32 products and the fp64 loss: the value, and some rows of each gradient."""

    def __init__(self, case: HeadCase, x: Inputs):
        self.case = case
        device, logits = x.hidden.device, case.logits
        self.rows = spread_over(case.rows, x.labels, device)
        self.columns = spread_over(case.columns, None, device)
        n_columns = len(self.columns)
        total = torch.zeros((), dtype=torch.float64, device=device)
        d_logits = []  # of the checked rows
        d_weight = torch.zeros(n_columns, case.width, dtype=torch.float64, device=device)
        d_bias = torch.zeros(n_columns, dtype=torch.float64, device=device)
        block, part = (max(1, n // case.columns) for n in BLOCK_ELEMENTS[device.type])
        for start in range(0, case.rows, block):
            rows = slice(start, start + block)
            student = project(x.hidden.detach()[rows], x.weight.detach(), x.bias)
            teacher = student  # which nothing reads where the loss is CE
            if x.teacher_hidden is not None:
                teacher = project(x.teacher_hidden[rows], x.teacher_weight, x.teacher_bias)
            end = start
            for s, t in zip(student.split(part), teacher.split(part), strict=True):
                rows = slice(end, end + len(s))
                end = rows.stop
                labels = None if x.labels is None else x.labels[rows]
                value, (gradient,) = peers.exact(logits, [s], [t], labels, True)
                total += value
                inside = self.rows[(self.rows >= rows.start) & (self.rows < rows.stop)]
                d_logits.append(gradient[inside - rows.start])
                picked = gradient[:, self.columns]
                d_weight += picked.T @ x.hidden.detach()[rows].double()
                d_bias += picked.sum(0)
        self.value = total
        self.d_hidden = backproject(torch.cat(d_logits).float(), x.weight.detach())
        self.d_weight, self.d_bias = d_weight, d_bias

    def compare(self, value: Tensor, gradients: list[Tensor]) -> dict[str, Any]:
        """The errors of a contestant's results, and whether they are within the budget."""
        case, agreement = self.case, []
        error, size = float((value.double() - self.value).abs()), float(self.value.abs())
        scale = size + (max(1.0, case.temperature**2) if case.teacher else 1.0)
        if not error <= VALUE_TOLERANCE[case.dtype] * scale:
            agreement.append(f"loss off by {error / (size or 1):.1e}")
        hidden_error = measure.worst(gradients[0][self.rows], self.d_hidden)
        if not hidden_error <= HIDDEN_TOLERANCE[case.dtype]:
            agreement.append(f"dX off by {hidden_error:.1e}")
        weight_error = typical(gradients[1][self.columns], self.d_weight)
        if len(gradients) > 2:
            bias_error = typical(gradients[2][self.columns][None], self.d_bias[None])
            weight_error = max(weight_error, bias_error)
        if not weight_error <= WEIGHT_TOLERANCE[case.dtype]:
            agreement.append(f"dW or dbias off by {weight_error:.1e}")
        return {
            "value_error": error / (size or 1),
            "hidden_error": hidden_error,
            "weight_error": weight_error,
            "agreement": ", ".join(agreement) or "ok",
        }


def spread_over(length: int, labels: Tensor | None, device: torch.device) -> Tensor:
    """Some indices, those of some labelled rows included."""
    found = torch.linspace(0, length - 1, min(length, CHECKED_ROWS), device=device).long()
    if labels is not None:
        found = torch.cat([found, (labels != peers.IGNORED).nonzero()[:8, 0]])
    return found.unique()


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Logits with fp32 products, without a copy of the whole weight."""
    hidden, parts = hidden.float(), weight.split(COLUMNS_AT_ONCE)
    logits = torch.cat([hidden @ part.float().T for part in parts], 1)
    return logits if bias is None else logits + bias.detach().float()


def backproject(d_logits: Tensor, weight: Tensor) -> Tensor:
    pairs = zip(d_logits.split(COLUMNS_AT_ONCE, 1), weight.split(COLUMNS_AT_ONCE), strict=True)
    return sum((part @ rows.float()).double() for part, rows in pairs)


def typical(found: Tensor, right: Tensor) -> float:
    """The root mean square of the rows' relative errors; NaN counts as infinite."""
    error = (found.double() - right).norm(dim=-1)
    size = right.norm(dim=-1).clamp_min(torch.finfo(found.dtype).tiny)
    return float((error / size).nan_to_num(torch.inf).square().mean().sqrt())


class Problem:
    """A case's tensors and references. There is one copy: a head's weights are more than a cache
    holds, and the products hide where they come from."""

    def __init__(self, case: HeadCase, device: torch.device):
        needed = case.input_bytes + 2 * case.gradient_bytes + 8 * case.columns * case.width
        free = measure.free_bytes(device)
        if needed > free:
            raise MemoryError(f"needs {needed >> 20} MiB, {free >> 20} are free")
        self.case, self.inputs = case, make_inputs(case, device)
        self.oracles: dict[bool, Oracle] = {}

    def inputs_of(self, contestant: HeadContestant) -> Inputs:
        return self.inputs if contestant.takes_bias else self.inputs.without_bias()

    def oracle_of(self, contestant: HeadContestant) -> Oracle:
        """With the bias, or of the case without; made when it is first asked for."""
        bias = self.case.bias and contestant.takes_bias
        if bias not in self.oracles:
            self.oracles[bias] = Oracle(self.case, self.inputs_of(contestant))
        return self.oracles[bias]


def workspace_mib(
    loss: HeadLoss, inputs: Inputs, gradient_bytes: int, device: torch.device
) -> float | None:
    """The peak above inputs and gradients."""
    peak = measure.peak_mib(lambda: run(loss, inputs), device)
    return None if peak is None else max(0.0, peak - gradient_bytes / measure.MIB)


def measure_case(
    case: HeadCase, field: Sequence[HeadContestant], options: argparse.Namespace, ends: float
) -> list[dict[str, Any]]:
    """A row a contestant, the bare products first."""
    device = torch.device(options.device)
    field = [c for c in field if case.loss in c.computes or c.unable]
    rows = {BARE: result_row(case, BARE)} | {c.name: result_row(case, c) for c in field}
    waiting = {}
    for c in field:
        why = skip(c, case, options)
        if why is None:
            waiting[c.name] = c
        else:
            rows[c.name]["status"] = f"skipped: {why}"
    try:
        problem = Problem(case, device)
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        for name in (BARE, *waiting):
            rows[name]["status"] = f"skipped: does not fit: {text}"
        return list(rows.values())
    losses: dict[str, HeadLoss] = {}

    def attempt(name: str) -> dict[str, Any]:
        contestant = waiting[name]
        loss, inputs = contestant.build(case), problem.inputs_of(contestant)
        found = problem.oracle_of(contestant).compare(*run(loss, inputs))
        found["backend"] = heads.backend_of(contestant, case, device)
        if contestant.interpreted or (found["backend"] == "triton" and device.type == "cpu"):
            return {**found, "status": "not timed: runs in Triton's interpreter"}
        gradient_bytes = sum(x.nbytes for x in inputs.trained)
        began = time.perf_counter()
        found["peak_mib"] = workspace_mib(loss, inputs, gradient_bytes, device)
        seconds = time.perf_counter() - began
        if seconds > LONGEST_CALL_SECONDS:
            return {**found, "status": f"not in the rounds: a call takes {seconds:.0f} s"}
        losses[name] = loss
        return {**found, "status": "ok"}

    measure.attempt_each(waiting, rows, ends, attempt)
    problem.oracles.clear()
    if losses:
        fill_in(case, rows, losses, problem, waiting, device)
    else:
        rows[BARE]["status"] = "skipped: nobody to compare with"
    return list(rows.values())


def fill_in(
    case: HeadCase,
    rows: dict[str, dict[str, Any]],
    losses: dict[str, HeadLoss],
    problem: Problem,
    field: dict[str, HeadContestant],
    device: torch.device,
) -> None:
    """Time those that are ready, and what follows from the times."""
    stopwatch = measure.Stopwatch(device)
    calls = {
        name: lambda turn, name=name, loss=loss: run(loss, problem.inputs_of(field[name]))
        for name, loss in losses.items()
    }
    chunk = None
    try:
        bare = bare_products(case, problem.inputs)
        by_chunk = bare.fastest_chunk(stopwatch)
        chunk = next(iter(by_chunk))
        calls = {BARE: lambda turn: bare.run(chunk), **calls}
        told = (f"{n:,}: {figure(case.flop / ms / 1e9)}" for n, ms in sorted(by_chunk.items()))
        print(f"  bare products, TFLOP/s by rows a chunk: {', '.join(told)}", file=sys.stderr)
        rows[BARE]["status"] = "ok"
    except Exception as error:
        rows[BARE]["status"] = f"failed: {measure.reason(error)}"
    samples, failures = measure.interleave(calls, stopwatch, ROUNDS_SECONDS[device.type])
    for name, text in failures.items():
        rows[name]["status"] = f"failed: {text}"
    for name in calls.keys() - failures.keys():
        rows[name] |= measure.time_columns(samples[name])
    gemm_ms, eager_ms = (rows.get(x, {}).get("time_ms") for x in (BARE, "PyTorch eager, fp32"))
    for row in rows.values():
        if not row["time_ms"]:
            continue
        row["tflop_per_s"] = case.flop / row["time_ms"] / 1e9
        if gemm_ms:
            row["gemm_chunk_rows"], row["gemm_ms"] = chunk, gemm_ms
            row["gemm_tflop_per_s"] = case.flop / gemm_ms / 1e9
            row["gemm_ratio"] = row["time_ms"] / gemm_ms
            row["matrix_fraction"] = gemm_ms / row["time_ms"]
        if eager_ms:
            row["speedup"] = eager_ms / row["time_ms"]


def result_row(case: HeadCase, contestant: HeadContestant | str) -> dict[str, Any]:
    row = {
        "loss": case.loss,
        "rows": case.rows,
        "width": case.width,
        "teacher_width": case.teacher_width if case.teacher else None,
        "columns": case.columns,
        "labels": case.labels,
        "bias": case.bias,
        "dtype": peers.dtype_name(case.dtype),
        "temperature": case.temperature,
        **dict.fromkeys(RESULT),
        "inputs_mib": case.input_bytes / measure.MIB,
        "gradients_mib": case.gradient_bytes / measure.MIB,
        "tflop": case.flop / 1e12,
    }
    if isinstance(contestant, str):
        return row | {"contestant": contestant}
    return row | {
        "contestant": contestant.name,
        "version": contestant.version,
        "lacks": contestant.lacks,
    }


# --- Memory by rows -------------------------------------------------------------------------------


def memory_case(
    case: HeadCase, field: Sequence[HeadContestant], options: argparse.Namespace, ends: float
) -> list[dict[str, Any]]:
    """A row a contestant: the peak of one call, after one of few rows. Up to COMPARED_ROWS what it
    computes is compared, in a call of its own."""
    device = torch.device(options.device)
    field = [c for c in field if case.loss in c.computes]
    rows = {c.name: result_row(case, c) for c in field}
    waiting = {}
    for c in field:
        why = skip(c, case, options)
        rows[c.name]["status"] = f"skipped: {why}"
        if why is None:
            waiting[c.name] = c
    if not waiting:
        return list(rows.values())
    problem = Problem(case, device)

    def attempt(name: str) -> dict[str, Any]:
        contestant = waiting[name]
        loss, x = contestant.build(case), problem.inputs_of(contestant)
        found = {"backend": heads.backend_of(contestant, case, device), "status": "ok"}
        if case.rows <= COMPARED_ROWS:
            found |= problem.oracle_of(contestant).compare(*run(loss, x))
        # What is loaded or compiled first is no part of the peak.
        run(loss, first_rows(x, WARM_ROWS))
        found["peak_mib"] = workspace_mib(loss, x, sum(t.nbytes for t in x.trained), device)
        return found

    measure.attempt_each(waiting, rows, ends, attempt)
    return list(rows.values())


def first_rows(x: Inputs, count: int) -> Inputs:
    def part(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:count]

    return x._replace(
        hidden=x.hidden.detach()[:count].requires_grad_(),
        teacher_hidden=part(x.teacher_hidden),
        labels=part(x.labels),
    )


def memory_plan(options: argparse.Namespace) -> list[HeadCase]:
    options.width = options.width or [MEMORY_WIDTH[options.device]]
    options.rows = sorted(options.rows or MEMORY_ROWS)
    options.only = options.only or ["distilfast auto"]
    return sorted(plan(options), key=lambda case: case.rows)


def memory_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        {
            "contestant": named(row),
            "case": f"{row['loss']}, D = {row['width']}, V = {row['columns']:,}",
            "rows": f"{row['rows']:,}",
            "inputs_mib": f"{row['inputs_mib']:,.0f}",
            "gradients_mib": f"{row['gradients_mib']:,.0f}",
            "peak_mib above both": "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
            "agreement": row["agreement"] or ("not compared" if row["status"] == "ok" else ""),
            "note": "" if row["status"] == "ok" else row["status"],
        }
        for row in rows
    ]
    return measure.markdown(lines) + "\n"


# --- What comes out -------------------------------------------------------------------------------


def named(row: dict[str, Any]) -> str:
    backend = f"({row['backend']})" if row["backend"] and "auto" in row["contestant"] else ""
    return " ".join(filter(None, (row["contestant"], row["version"], backend)))


def table(case: HeadCase, rows: Sequence[dict[str, Any]]) -> str:
    """A case for people: a line for each that ran, and who was skipped below, by reason."""
    lines = []
    for row in rows:
        if row["status"].startswith("skipped: "):
            continue
        median, p20, p80 = (figure(row[f"time_ms{part}"]) for part in ("", "_p20", "_p80"))
        lacks = f"without {row['lacks']}" if row["lacks"] else ""
        chunk = f"chunks of {row['gemm_chunk_rows']:,} rows" if row["contestant"] == BARE else ""
        lines.append(
            {
                "contestant": named(row),
                "time_ms (p20, p80)": f"{median} ({p20}, {p80})" if median else "",
                "of bare": "" if row["gemm_ratio"] is None else f"{row['gemm_ratio']:.2f}x",
                "TFLOP/s": figure(row["tflop_per_s"]),
                "of matrix rate": (
                    "" if row["matrix_fraction"] is None else f"{row['matrix_fraction']:.0%}"
                ),
                "speed-up": "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
                "peak_mib": "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
                "agreement": row["agreement"] or "",
                "note": (chunk or lacks) if row["status"] == "ok" else row["status"],
            }
        )
    inputs, gradients = (figure(rows[0][f"{part}_mib"]) for part in ("inputs", "gradients"))
    title = f"### {case}: {figure(case.flop / 1e12)} TFLOP, "
    title += f"{inputs} MiB of inputs, {gradients} of gradients"
    parts = [title, measure.markdown(lines) if lines else "", measure.skipped(rows)]
    return "\n\n".join(filter(None, parts)) + "\n"


def plot(source: Path, target: Path) -> None:
    """The latest run in the CSV: a panel a loss, the share of the matrix rate over its cases."""
    measure.plot(
        source,
        target,
        "matrix_fraction",
        "the bare products' time over a contestant's, by width, vocabulary and rows",
        lambda row: row["loss"] + (f", {row['labels']} labels" if row["labels"] != "none" else ""),
        lambda row: (int(row["width"]), int(row["columns"]), int(row["rows"])),
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--loss", nargs="+", choices=heads.LOSSES)
    add("--vocab", nargs="+", type=int)
    add("--width", nargs="+", type=int, help="width of the student's hidden states")
    add("--teacher-width", type=int, help="width of the teacher's; if not given, the student's")
    add("--rows", nargs="+", type=int)
    add("--labels", nargs="+", choices=("some", "all"), help="some (15 %%) for kl_ce; all for ce")
    add("--bias", action=argparse.BooleanOptionalAction, help=f"if not given: only at V = {BERT}")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--temperature", type=float, default=2.0)
    add("--only", nargs="+", metavar="NAME", help="contestants whose name contains one of these")
    add("--quick", action="store_true", help="few rows, two cases, in about a minute")
    add("--memory", action="store_true", help=f"only peaks, at {', '.join(map(str, MEMORY_ROWS))}")
    add("--seconds", type=float, help=f"begin nothing new after: {SECONDS}, quick {QUICK_SECONDS}")
    add("--csv", type=Path, default=CSV, help="append to this file")
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON; no FILE: print only JSON")
    add("--plot", type=Path, metavar="FILE", help="draw the latest run in the CSV")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here")
    cases = memory_plan(options) if options.memory else plan(options)
    field = [
        c
        for c in heads.contestants()
        if not options.only or any(part.lower() in c.name.lower() for part in options.only)
    ]
    if not field:
        raise SystemExit("nothing to measure: --only knows no such contestant")
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS[device.type])
    environment, results = measure.environment(device), []
    try:
        measure.check_csv(options.csv, [*environment, *result_row(cases[0], BARE)])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    one = memory_case if options.memory else measure_case
    for number, case in enumerate(cases, 1):
        spent = time.perf_counter() - began
        print(f"[{number}/{len(cases)}, {spent:.0f} s] {case}", file=sys.stderr)
        try:
            if spent > seconds:
                status = {"status": "skipped: out of time (--seconds)"}
                rows = [result_row(case, c) | status for c in (BARE, *field)]
            else:
                rows = one(case, field, options, began + seconds)
        except Exception as error:  # a device that no longer answers, say: the others keep theirs
            status = {"status": f"failed: {measure.reason(error)}"}
            rows = [result_row(case, c) | status for c in field]
        measure.append_csv(options.csv, [{**environment, **row} for row in rows])
        results += rows
        if options.json != "-" and not options.memory:
            print(table(case, rows), flush=True)
    if options.memory and options.json != "-":
        print(memory_table(results))
    if options.json is not None:
        measure.write_json(options.json, environment, results)
    if options.plot:
        plot(options.csv, options.plot)
    print(f"{time.perf_counter() - began:.0f} s, appended to {options.csv}", file=sys.stderr)


if __name__ == "__main__":
    main()
