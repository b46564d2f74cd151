"""Does a step depend on how it is split?

    python bench/exactness.py [--quick] [--precision fp32 bf16]

Trains on the same 64 sequences of 6 to 62 tokens in many splits: on 1, 2 and 4 ranks; in
micro-batches of 1, of 8, and of all that a rank has; in every layout (ZeRO stage and offload);
padded to multiples of 8 and to the longest possible length. The reference is one process that takes
all 64 at once at the lowest stage.

For each split it compares the gradient at the first step and the parameters after five: the norm of
the difference over the norm, all parameters together. If one is above 1e-5 in fp32, the exit status
is 1. bf16 is compared with bf16 and has no limit, because it rounds every micro-batch's gradient.

For comparison it runs the usual mean per micro-batch: each loss is divided by the counts of its own
micro-batch, then averaged over micro-batches and ranks.

There are three losses (kd, ce, hidden cosine), AdamW, dropout 0, no clipping, and a student of two
layers of 64. Appends to bench/results/exactness.csv, which docs/exactness.md quotes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kit import measure, parallel

from distilfast.data import batches
from distilfast.driver import engine, processes
from distilfast.driver.micro_batch import Normalizers, vocabulary_rows

CSV = Path(__file__).parent / "results" / "exactness.csv"
RANKS = (1, 2, 4)
PRECISIONS = ("fp32", "bf16")
SEQUENCES, STEPS, MAX_LENGTH = 64, 5, 64
LIMIT = 1e-5  # of fp32


@dataclass(frozen=True)
class Case:
    precision: str
    stage: int
    offload: str
    micro_sequences: int
    padding: str = "8"  # or "longest"
    mean: str = "step"  # or "micro-batch"

    @property
    def changes(self) -> list[str]:
        return [
            f"--precision={self.precision}",
            f"--zero.stage={self.stage}",
            f"--zero.offload={self.offload}",
            f"--batch.micro_sequences={self.micro_sequences}",
            f"--batch.sequences={SEQUENCES}",
        ]


def cases(ranks: int, quick: bool, precisions: Sequence[str]) -> Iterator[Case]:
    """The first of one rank and a precision is what its others are held against."""
    sizes = (SEQUENCES // ranks, 8, 1)
    if quick:
        yield from (Case("fp32", 0, "none", size) for size in sizes)
        yield Case("fp32", 0, "none", 8, padding="longest")
        yield Case("fp32", 0, "none", 8, mean="micro-batch")
        for layout in parallel.layouts("fp32", ranks)[1:]:
            if layout[1] == "none":
                yield Case("fp32", *layout, 8)
        return
    for precision in precisions:
        lowest, *others = parallel.layouts(precision, ranks)
        for size in sizes:
            yield Case(precision, *lowest, size)
            yield Case(precision, *lowest, size, padding="longest")
            yield Case(precision, *lowest, size, mean="micro-batch")
        for layout in others:
            for size in sizes:
                yield Case(precision, *layout, size)
            if layout == (3, "none"):
                yield Case(precision, *layout, 8, padding="longest")


class MeanOfMeans(engine.Engine):
    """What is usual: the mean over micro-batches and ranks of each one's own mean."""

    def __call__(self, batch: batches.MicroBatch, targets: Any, _: Normalizers) -> Any:
        counts = (
            len(vocabulary_rows(batch, self.config.loss)),
            len(batch.labelled),
            len(batch.tokens),
        )
        share = SEQUENCES / len(batch.input_ids)
        own = Normalizers(*(torch.tensor(float(n * share)) for n in counts))
        return super().__call__(batch, targets, own)


def measure_case(world: processes.World, recipe: Path, case: Case) -> list[dict[str, torch.Tensor]]:
    """The first step's gradient and the parameters after the last."""
    batches.PAD_TO = MAX_LENGTH if case.padding == "longest" else 8
    kind = MeanOfMeans if case.mean == "micro-batch" else engine.Engine
    run = parallel.Run(world, recipe, *case.changes, kind=kind)
    with parallel.Caught(run.engine) as caught:
        run.step(0)
    gradient = caught.by_name()
    for number in range(1, STEPS):
        run.step(number)
    return [gradient, run.engine.weights()]


def work(world: processes.World, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Every case on these ranks."""
    rows, folder = [], options.folder
    for case in cases(world.ranks, options.quick, options.precision):
        began = time.perf_counter()
        found = measure_case(world, folder / "recipe.yaml", case)
        right = folder / f"{case.precision}.pt"
        if world.rank == 0 and not right.exists():
            torch.save(found, right)
        if world.rank == 0:
            gradient, parameters = map(parallel.distance, found, torch.load(right))
            rows.append(
                {
                    "ranks": world.ranks,
                    **asdict(case),
                    "gradient": gradient,
                    "parameters": parameters,
                    "seconds": time.perf_counter() - began,
                }
            )
        gc.collect()  # DeepSpeed collects at every start, ever more slowly
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """The worst of all splits by layout, and the usual mean by split."""

    def cell(chosen: list[dict[str, Any]]) -> str:
        worst = [
            max((r[what] for r in chosen), default=None) for what in ("gradient", "parameters")
        ]
        return "" if worst[0] is None else "{:.1e}, {:.1e}".format(*worst)

    def line(chosen: list[dict[str, Any]]) -> dict[str, str]:
        return {
            f"{n} rank{'s' * (n > 1)}": cell([r for r in chosen if r["ranks"] == n]) for n in RANKS
        }

    exact = [r for r in rows if r["mean"] == "step"]
    lines = []
    for precision in dict.fromkeys(r["precision"] for r in exact):
        for stage, offload in parallel.LAYOUTS:
            key = (precision, stage, offload)
            chosen = [r for r in exact if (r["precision"], r["stage"], r["offload"]) == key]
            if chosen:
                name = {"precision": precision, "stage": str(stage), "offload": offload}
                lines.append(name | line(chosen))
    yield measure.markdown(lines)
    usual = [r for r in rows if r["mean"] == "micro-batch"]
    lines = []
    for precision in dict.fromkeys(r["precision"] for r in usual):
        for size in sorted({r["micro_sequences"] for r in usual}, reverse=True):
            key = (precision, size)
            chosen = [r for r in usual if (r["precision"], r["micro_sequences"]) == key]
            lines.append({"usual mean": precision, "micro-batches of": str(size)} | line(chosen))
    yield measure.markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fp32 without offload, in a minute")
    add("--precision", nargs="+", choices=PRECISIONS, default=PRECISIONS)
    add("--csv", type=Path, default=CSV, help="append to this file")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    options = parser.parse_args()
    if options.folder:
        parallel.worker(options.folder, lambda world: work(world, options))
        return
    environment = measure.environment(torch.device("cpu"))
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parallel.make_recipe(folder, layers=4, max_length=MAX_LENGTH)
        for n in RANKS:
            made = parallel.launch(__file__, n, folder, *sys.argv[1:])
            measure.append_csv(options.csv, [environment | row for row in made])
            rows += made
            print(f"ranks {n}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(*tables(rows), sep="\n\n")
    broken = [
        row
        for row in rows
        if (row["precision"], row["mean"]) == ("fp32", "step")
        and not max(row["gradient"], row["parameters"]) <= LIMIT
    ]
    for row in broken:
        print(f"more than {LIMIT:.0e}: {row}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
