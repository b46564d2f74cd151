"""How fast are the losses over the vocabulary, compared with the machine and with other libraries?

    python bench/losses.py [--quick] [--device cuda|cpu] [--csv FILE] [--json [FILE]]
    python bench/losses.py --loss kl_ce jsd --vocab 30528 --rows 8192 --labels none some all
    python bench/losses.py --loss kl --vocab 30528 --rows 8192 --only distilfast --profile FILE
    TRITON_INTERPRET=1 python bench/losses.py --device cpu --rows 8 --vocab 96    # agreement alone
    python -m triton.profiler.proton -n NAME -k triton bench/losses.py ...        # Proton's profile

A call goes from the logits to their gradient, forward and backward. For each it reports:

- the time, and the memory above the inputs;
- the bytes that the loss has to move over that time, as a fraction of the rate of a copy of the
  logits in the same rounds. peers.py declares the bytes: two reads and one write for a KL;
- the error of the call's loss and gradient against the fp64 reference, which exposes a contestant
  that computes something else.

Without --loss, --vocab, --rows or --labels it measures a plan of cases, the most telling first: on
a GPU V = 30,522, then 128,256. It begins nothing new after SECONDS: a run ends within five minutes,
with --quick within one and a half. Contestants that take long to get ready join only one case: the
plan's first, which is measured again later, so that nothing important waits for them. Every run
appends to bench/results/losses.csv, from which --plot draws.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from kit import measure, peers
from kit.measure import figure
from kit.peers import Case, Contestant
from torch import Tensor

from distilfast.losses import reference

CSV = Path(__file__).parent / "results" / "losses.csv"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# Every loss is measured at the first of each. Most rows of 30,522 (BERT) and of 50,257 (GPT-2)
# begin at no 16-byte boundary. 30,528 is BERT's, padded.
VOCABULARIES = {"cuda": [30522, 128256, 50257, 30528, 151936], "cpu": [30522]}
EARLY = 2  # the number of vocabularies measured at the plan's beginning
ROWS = {"cuda": [8192, 2048, 32768], "cpu": [512]}
QUICK_ROWS = {"cuda": 8192, "cpu": 128}
WIDTH, LAYERS, TEACHERS = 768, 6, 3  # of hidden_cosine and combine
SECONDS, QUICK_SECONDS = 240, 65  # nothing new is begun after so long
ROUNDS_SECONDS = {"cuda": 1.0, "cpu": 4.0}  # for the rounds of a case, at most
# A gradient may be off by so much of its row's largest entry: the budget of the tests.
GRADIENT_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}
VALUE_TOLERANCE = 1e-5
CHECKED_ROWS = 32  # rows whose gradient is compared
PROFILED_CALLS = 3
BLOCK_ELEMENTS = {"cpu": 1 << 17, "cuda": 1 << 24}  # the reference takes rows in blocks

RESULT = (  # the columns beside the environment's and the case's
    "contestant version status time_ms time_ms_p20 time_ms_p80 rounds peak_mib expected_mib "
    "gb_per_s copy_gb_per_s copy_fraction speedup value_error gradient_error agreement lacks"
).split()


# --- The cases ------------------------------------------------------------------------------------


class Planned(NamedTuple):
    """A case, and whether contestants that take long to get ready take part in it."""

    case: Case
    slow: bool


def plan(options: argparse.Namespace, kind: str) -> list[Planned]:
    """Return the cases, the most telling first: a run that is out of time leaves out the rest."""
    labels = options.labels or ["none", "some"] + ([] if options.quick else ["all"])
    found: list[Planned] = []

    def add(
        loss: str,
        n_rows: int,
        columns: int,
        label: str = "none",
        dtype: str = options.dtype,
        slow: bool = False,
    ) -> None:
        """A case once, under its own name: KL + CE without labels is KL, and CE is nothing."""
        tensors = {"hidden_cosine": LAYERS, "combine": TEACHERS}.get(loss, 1)
        if loss not in ("kl_ce", "ce"):
            label = "none"
        elif label == "none":
            if loss == "ce":
                return
            loss = "kl"
        case = Case(loss, n_rows, columns, label, DTYPES[dtype], options.temperature, tensors)
        if Planned(case, slow) not in found:
            found.append(Planned(case, slow))

    def block(
        losses: Sequence[str], rows: Sequence[int], vocabularies: Sequence[int], **keywords: bool
    ) -> None:
        """A loss at every vocabulary, then the next loss, then the next number of rows."""
        for n_rows, loss, label, columns in itertools.product(rows, losses, labels, vocabularies):
            width = WIDTH if loss == "hidden_cosine" and not options.vocab else columns
            add(loss, n_rows, width, label, **keywords)

    if any((options.loss, options.vocab, options.rows, options.labels)):
        slow = bool(options.vocab or options.rows or options.only)
        vocabularies = options.vocab or VOCABULARIES[kind][: 1 if options.quick else None]
        rows = options.rows or ([QUICK_ROWS[kind]] if options.quick else ROWS[kind])
        block(options.loss or ["kl_ce"], rows, vocabularies, slow=slow)
        return found
    slow = bool(options.only)
    first = VOCABULARIES[kind][0]
    if options.quick:
        rows = QUICK_ROWS[kind]
        block(["kl_ce"], [rows], [first], slow=slow)
        add("ce", rows, first, "all", slow=slow)
        add("hidden_cosine", rows, WIDTH, slow=slow)
        return found
    rows, *more_rows = ROWS[kind]
    early, late = VOCABULARIES[kind][:EARLY], VOCABULARIES[kind][EARLY:]
    block(["kl_ce"], [rows], early, slow=slow)
    add("ce", rows, first, "all", slow=slow)
    for loss in ("hidden_cosine", "ce", "reverse_kl", "jsd", "combine"):
        add(loss, rows, WIDTH if loss == "hidden_cosine" else first, "some", slow=slow)
    if kind == "cpu":  # small students are trained in fp32 there
        add("kl_ce", rows, first, "some", "fp32", slow=slow)
        add("hidden_cosine", rows, WIDTH, dtype="fp32", slow=slow)
    add("kl_ce", rows, first, "some", slow=True)
    block(["kl_ce"], [rows], late, slow=slow)
    for columns in VOCABULARIES[kind]:
        add("ce", rows, columns, "all", slow=slow)
    for n_rows in more_rows:
        add("hidden_cosine", n_rows, WIDTH, slow=slow)
    block(["kl_ce"], more_rows, VOCABULARIES[kind], slow=slow)
    return found


def skip(contestant: Contestant, planned: Planned, device: torch.device) -> str | None:
    """Return why a contestant does not take part in a case, or None."""
    if device.type in contestant.slow and not planned.slow:
        # Asked before anything is imported, which can be slow, too.
        return "slow to get ready: in one case of the plan, or with --vocab, --rows or --only"
    return contestant.skip(planned.case, device)


# --- One case -------------------------------------------------------------------------------------


class Copy(NamedTuple):
    """The inputs of a call. The tensors of a side lie one after the other in its block."""

    block: Tensor  # (tensors, N, V): the student's, or the teachers' where there is no student
    student: list[Tensor]
    teacher: list[Tensor]
    labels: Tensor | None


class Problem:
    """A case's tensors: a pristine block, and copies of everything to be taken in turn."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        shape = (case.tensors, case.rows, case.columns)
        inputs_bytes = shape[0] * shape[1] * shape[2] * case.dtype.itemsize
        sides = 1 if case.loss == "combine" else 2
        free = measure.free_bytes(device)
        # One copy of the inputs, the pristine block and a gradient: less is not worth a start.
        needed = inputs_bytes * (sides + 2) + measure.LEAD_BYTES
        if needed > free:
            raise MemoryError(f"needs {needed >> 20} MiB, {free >> 20} are free")

        def random(scale: float) -> Tensor:
            return torch.randn(shape, dtype=case.dtype, device=device).mul_(scale)

        n_copies = measure.rotation(sides * inputs_bytes, device)
        self.pristine = random(2.0)
        teacher = None if case.loss == "combine" else random(1.0).add_(self.pristine)
        labels = None
        if case.labels != "none":
            labels = torch.full((case.rows,), peers.IGNORED, device=device)
            chosen = torch.randperm(case.rows, device=device)[: case.labelled]
            labels[chosen] = torch.randint(case.columns, (case.labelled,), device=device)
        self.copies = []
        for number in range(n_copies):
            block = self.pristine.clone()
            tensors = [x.detach() for x in block]
            if teacher is None:
                self.copies.append(Copy(block, [], tensors, labels))
                continue
            own = teacher if number == 0 else teacher.clone()
            student = [x.requires_grad_() for x in tensors]
            self.copies.append(Copy(block, student, list(own), labels))

    def at(self, turn: int) -> Copy:
        return self.copies[turn % len(self.copies)]

    def restore(self, turn: int) -> Tensor:
        """What a call has overwritten."""
        return self.at(turn).block.copy_(self.pristine)

    def copy(self, turn: int) -> Tensor:
        """A copy of the logits, whose rate is the machine's: of one copy over the next, which holds
        the same. The pristine block would be in a CPU's cache after the first turn."""
        if len(self.copies) == 1:
            return self.restore(turn)
        return self.at(turn + 1).block.detach().copy_(self.at(turn).block.detach())


def run(loss: peers.Loss, inputs: Copy) -> tuple[Tensor, list[Tensor]]:
    """The loss (for combine: the logits), and the gradients of the student."""
    value = loss(inputs.student, inputs.teacher, inputs.labels)
    if not inputs.student:
        return value, []
    return value, list(torch.autograd.grad(value, inputs.student))


class Oracle:
    """A case in fp64: its loss, and some of the gradient's rows."""

    def __init__(self, case: Case, inputs: Copy):
        self.case = case
        n_rows, device = case.rows, inputs.block.device
        self.rows = torch.linspace(0, n_rows - 1, min(n_rows, CHECKED_ROWS), device=device).long()
        if inputs.labels is not None:
            labelled = (inputs.labels != peers.IGNORED).nonzero()[:8, 0]
            self.rows = torch.cat([self.rows, labelled]).unique()
        self.gradients: list[Tensor] = []
        student, teacher, labels = inputs.student, inputs.teacher, inputs.labels
        if case.loss == "combine":
            self.value = reference.combine_teachers(
                [t[self.rows].double() for t in teacher],
                [1 / len(teacher)] * len(teacher),
                case.temperature,
                "probability",
                case.columns,
            )
            return
        rows = self.rows
        picked = [s.detach()[rows] for s in student], [t[rows] for t in teacher]
        part = None if labels is None else labels[rows]
        _, self.gradients = peers.exact(case, *picked, part, True)
        block = max(1, BLOCK_ELEMENTS[device.type] // case.columns)
        total = torch.zeros((), dtype=torch.float64, device=device)
        for start in range(0, n_rows, block):
            part = slice(start, start + block)
            sides = [s.detach()[part] for s in student], [t[part] for t in teacher]
            chosen = None if labels is None else labels[part]
            total += peers.exact(case, *sides, chosen, False)[0]
        self.value = total

    def compare(self, value: Tensor, gradients: list[Tensor]) -> dict[str, Any]:
        """The errors of a contestant's results, and whether they are within the budget."""
        case = self.case
        if case.loss == "combine":
            value_error = measure.worst(value[self.rows].detach(), self.value)
            agrees = value_error <= VALUE_TOLERANCE
        else:
            error = float((value.detach().double() - self.value).abs())
            size = float(self.value.abs())
            value_error = error / size if size else error
            agrees = error <= VALUE_TOLERANCE * (size + max(1.0, case.temperature**2))
        agreement = [] if agrees else [f"loss off by {value_error:.1e}"]
        gradient_error = None
        if self.gradients:
            pairs = zip(gradients, self.gradients, strict=True)
            gradient_error = max(measure.worst(g[self.rows], right) for g, right in pairs)
            if not gradient_error <= GRADIENT_TOLERANCE[case.dtype]:
                agreement.append(f"gradient off by {gradient_error:.1e}")
        return {
            "value_error": value_error,
            "gradient_error": gradient_error,
            "agreement": ", ".join(agreement) or "ok",
        }


def measure_case(
    planned: Planned, field: Sequence[Contestant], device: torch.device, ends: float
) -> list[dict[str, Any]]:
    """Return a row for each contestant."""
    case = planned.case
    field = [c for c in field if case.loss in c.computes or c.unable]
    rows = {c.name: result_row(case, c) for c in field}
    waiting = []
    for c in field:
        why = skip(c, planned, device)
        if why is None:
            waiting.append(c)
        else:
            rows[c.name]["status"] = f"skipped: {why}"
    if not waiting:
        return list(rows.values())
    try:
        problem = Problem(case, device)
        oracle = Oracle(case, problem.at(0))
    except (torch.OutOfMemoryError, MemoryError) as error:
        text = "out of memory" if isinstance(error, torch.OutOfMemoryError) else str(error)
        for c in waiting:
            rows[c.name]["status"] = f"skipped: does not fit: {text}"
        return list(rows.values())

    losses: dict[str, peers.Loss] = {}
    builders = {c.name: c for c in waiting}

    def attempt(name: str) -> dict[str, Any]:
        try:
            loss = builders[name].build(case)
            found = oracle.compare(*run(loss, problem.at(0)))
            problem.restore(0)
            if builders[name].interpreted:
                return {**found, "status": "not timed: runs in Triton's interpreter"}
            peak = measure.peak_mib(lambda: run(loss, problem.at(0)), device)
            losses[name] = loss
            return {**found, "status": "ok", "peak_mib": peak}
        finally:
            problem.restore(0)

    measure.attempt_each(builders, rows, ends, attempt)
    if losses:
        fill_in(case, rows, losses, problem, {c.name: c for c in field}, device)
    return list(rows.values())


def fill_in(
    case: Case,
    rows: dict[str, dict[str, Any]],
    losses: dict[str, peers.Loss],
    problem: Problem,
    field: dict[str, Contestant],
    device: torch.device,
) -> None:
    """Time those that are ready, and what follows from the times."""

    def restore(name: str, turn: int) -> None:
        if name in losses and case.loss in field[name].overwrites:
            problem.restore(turn)

    calls = {
        name: lambda turn, loss=loss: run(loss, problem.at(turn)) for name, loss in losses.items()
    }
    samples, failures = measure.interleave(
        {"copy": problem.copy, **calls},
        measure.Stopwatch(device),
        ROUNDS_SECONDS[device.type],
        restore,
    )
    copied_bytes = 2 * problem.pristine.nbytes
    copy_gb_per_s = copied_bytes / measure.Spread.of(samples["copy"]).median / 1e6
    for name, text in failures.items():
        rows[name]["status"] = f"failed: {text}"
    for name in losses.keys() - failures.keys():
        times = measure.time_columns(samples[name])
        gb_per_s = case.expected_bytes / times["time_ms"] / 1e6
        rows[name] |= {
            **times,
            "gb_per_s": gb_per_s,
            "copy_gb_per_s": copy_gb_per_s,
            "copy_fraction": gb_per_s / copy_gb_per_s,
        }
    yardstick = rows.get("PyTorch eager, fp32", {}).get("time_ms")
    for row in rows.values():
        if yardstick and row["time_ms"]:
            row["speedup"] = yardstick / row["time_ms"]


def result_row(case: Case, contestant: Contestant) -> dict[str, Any]:
    return {
        "loss": case.loss,
        "rows": case.rows,
        "columns": case.columns,
        "tensors": case.tensors,
        "labels": case.labels,
        "dtype": peers.dtype_name(case.dtype),
        "temperature": case.temperature,
        **dict.fromkeys(RESULT),
        "contestant": contestant.name,
        "version": contestant.version,
        "expected_mib": case.expected_bytes / measure.MIB,
        "lacks": contestant.lacks,
    }


# --- What comes out -------------------------------------------------------------------------------


def table(case: Case, rows: Sequence[dict[str, Any]]) -> str:
    """A case for people: a line for each that ran, and who was skipped below, by reason."""
    copy = next((row["copy_gb_per_s"] for row in rows if row["copy_gb_per_s"]), None)
    rate = f"; a copy moves {figure(copy)} GB/s" if copy else ""
    lines = []
    for row in rows:
        if row["status"].startswith("skipped: "):
            continue
        median, p20, p80 = (figure(row[f"time_ms{part}"]) for part in ("", "_p20", "_p80"))
        lacks = f"without {row['lacks']}" if row["lacks"] else ""
        lines.append(
            {
                "contestant": " ".join(filter(None, (row["contestant"], row["version"]))),
                "time_ms (p20, p80)": f"{median} ({p20}, {p80})" if median else "",
                "peak_mib": "" if row["peak_mib"] is None else f"{row['peak_mib']:,.0f}",
                "gb_per_s": figure(row["gb_per_s"]),
                "of copy": "" if not median else f"{row['copy_fraction']:.0%}",
                "speed-up": "" if row["speedup"] is None else f"{row['speedup']:.2f}x",
                "agreement": row["agreement"] or "",
                "note": lacks if row["status"] == "ok" else row["status"],
            }
        )
    moved = figure(case.expected_bytes / measure.MIB)
    parts = [f"### {case}: {moved} MiB to move{rate}"]
    parts += [measure.markdown(lines)] if lines else []
    return "\n\n".join(filter(None, [*parts, measure.skipped(rows)])) + "\n"


def profile(
    planned: Planned, field: Sequence[Contestant], device: torch.device, path: Path
) -> None:
    """A Chrome trace of a case, and its kernels as a table beside it."""
    case = planned.case
    problem = Problem(case, device)
    losses: dict[str, peers.Loss] = {}
    for c in field:
        if c.interpreted or skip(c, planned, device) is not None:
            continue
        try:
            losses[c.name] = c.build(case)
            run(losses[c.name], problem.at(0))  # what is compiled first is no part of the profile
        except Exception as error:
            losses.pop(c.name, None)
            print(f"not profiled: {c.name}: {measure.reason(error)}", file=sys.stderr)
        problem.restore(0)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        for name, loss in losses.items():
            for turn in range(PROFILED_CALLS):
                problem.restore(turn)
                with torch.profiler.record_function(name):
                    run(loss, problem.at(turn))
        if device.type == "cuda":
            torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))
    kind = "device" if device.type == "cuda" else "cpu"
    averages = profiler.key_averages().table(
        sort_by=f"self_{kind}_time_total", row_limit=100, max_name_column_width=80
    )
    Path(f"{path}.txt").write_text(f"{case}, {PROFILED_CALLS} calls each\n{averages}\n")


def plot(source: Path, target: Path) -> None:
    """The latest run in the CSV: a panel a loss, the share of a copy's rate over its cases."""
    measure.plot(
        source,
        target,
        "copy_fraction",
        "bytes to move over time, as a share of a copy's rate, by columns and rows",
        lambda row: row["loss"] + (f", {row['labels']} labels" if row["labels"] != "none" else ""),
        lambda row: (int(row["columns"]), int(row["rows"])),
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--loss", nargs="+", choices=peers.LOSSES)
    add("--vocab", nargs="+", type=int, help="columns")
    add("--rows", nargs="+", type=int)
    add("--labels", nargs="+", choices=("none", "some", "all"), help="some is 15 %%")
    add("--dtype", choices=DTYPES, default="bf16")
    add("--temperature", type=float, default=2.0)
    add("--only", nargs="+", metavar="NAME", help="contestants whose name contains one of these")
    add("--quick", action="store_true", help="few cases, in about a minute")
    add("--seconds", type=float, help=f"begin nothing new after: {SECONDS}, quick {QUICK_SECONDS}")
    add("--csv", type=Path, default=CSV, help="append to this file")
    add("--json", nargs="?", const="-", metavar="FILE", help="write JSON; no FILE: print only JSON")
    add("--profile", type=Path, metavar="FILE", help="write a Chrome trace of the first case")
    add("--plot", type=Path, metavar="FILE", help="draw the latest run in the CSV")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    began = time.perf_counter()
    options = parser().parse_args(arguments)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: there is no CUDA device here")
    field = [
        c
        for c in peers.contestants()
        if not options.only or any(part.lower() in c.name.lower() for part in options.only)
    ]
    cases = plan(options, device.type)
    if not cases or not field:
        raise SystemExit("nothing to measure: CE needs --labels some or all, --only a known name")
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    environment, results = measure.environment(device), []
    try:
        measure.check_csv(options.csv, [*environment, *result_row(cases[0].case, field[0])])
    except ValueError as error:
        raise SystemExit(str(error)) from None
    for number, planned in enumerate(cases, 1):
        case, spent = planned.case, time.perf_counter() - began
        print(f"[{number}/{len(cases)}, {spent:.0f} s] {case}", file=sys.stderr)
        try:
            rows = measure_case(planned, field, device, began + seconds)
        except Exception as error:  # a device that no longer answers, say: the others keep theirs
            status = {"status": f"failed: {measure.reason(error)}"}
            rows = [result_row(case, c) | status for c in field]
        measure.append_csv(options.csv, [{**environment, **row} for row in rows])
        results += rows
        if options.json != "-":
            print(table(case, rows), flush=True)
    if options.json is not None:
        measure.write_json(options.json, environment, results)
    if options.plot:
        plot(options.csv, options.plot)
    if options.profile:
        profile(cases[0], field, device, options.profile)
    print(f"{time.perf_counter() - began:.0f} s, appended to {options.csv}", file=sys.stderr)


if __name__ == "__main__":
    main()
