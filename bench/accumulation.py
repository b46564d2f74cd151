"""Does the sum over micro-batches lose anything?

    python bench/accumulation.py [--quick]

Runs a step of 1 to 4,096 micro-batches of two short sequences in bf16, in every layout (ZeRO stage
and offload), on 1 and 2 ranks. It compares the gradient that the optimiser receives with the fp64
sum of the bf16 gradients that autograd computed for the micro-batches. The error is the norm of the
difference over the norm, all parameters together; with more than 2e-3 the exit status is 1. For
comparison, the table also shows the error of a bf16 sum of the same gradients.

Every case runs twice: with different micro-batches, and "aligned", with one micro-batch repeated,
where a sum in bf16 stops growing.

There are three losses (kd, ce, hidden cosine) and a student of one layer of 64. Appends to
bench/results/accumulation.csv, which docs/exactness.md quotes.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from kit import measure, parallel
from torch import Tensor

from distilfast.driver import engine, processes

CSV = Path(__file__).parent / "results" / "accumulation.csv"
RANKS = (1, 2)
# Micro-batches of a step, all ranks together, and whether they are aligned.
PLAN = [*((4**i, False) for i in range(7)), (256, True), (1024, True)]
PLAN_OFFLOAD = [(64, False), (4096, False), (256, True)]
QUICK = [(256, True)]
MICRO_SEQUENCES, MAX_LENGTH = 2, 16
LIMIT = 2e-3


class Sums:
    """The gradients that autograd makes on this rank, added up in fp64 and in bf16."""

    def __init__(self, runner: engine.Engine):
        self.runner = runner
        self.exact: dict[str, Tensor] = {}
        self.bf16: dict[str, Tensor] = {}

    def __enter__(self) -> Sums:
        named = self.runner.deepspeed.module.named_parameters()
        self.hooks = [
            weight.register_hook(lambda gradient, name=name: self._add(name, gradient))
            for name, weight in named
            if weight.requires_grad
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def _add(self, name: str, gradient: Tensor) -> None:
        if gradient.dtype != torch.bfloat16:
            raise RuntimeError(f"{name}: expected a gradient in bf16, got {gradient.dtype}")
        gradient = gradient.detach().flatten()
        if name in self.exact:
            self.exact[name] += gradient
            self.bf16[name] += gradient
        else:
            self.exact[name] = gradient.double()
            self.bf16[name] = gradient.clone()

    def over_ranks(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The two sums over all ranks; each rank's loss had been multiplied by their number."""
        world = self.runner.world
        return tuple(
            {name: world.sum(x.clone()) / world.ranks for name, x in sums.items()}
            for sums in (self.exact, self.bf16)
        )


def measure_step(run: parallel.Run, micro_batches: int, aligned: bool) -> dict[str, float]:
    """The errors of one step of so many micro-batches, which leaves the weights as they are."""
    world, runner = run.world, run.engine
    count = 1 if aligned else micro_batches // world.ranks
    batches = run.micro_batches(count)
    if aligned:
        batches *= micro_batches // world.ranks
    with Sums(runner) as sums, parallel.Caught(runner) as caught:
        run.accumulate(batches)
        runner.step(0.0)
    exact, bf16 = sums.over_ranks()
    return {
        "error": parallel.distance(caught.by_name(), exact),
        "bf16_error": parallel.distance(bf16, exact),
    }


def work(world: processes.World, folder: Path, quick: bool) -> list[dict[str, Any]]:
    """Every layout and number of micro-batches on these ranks."""
    rows = []
    for stage, offload in parallel.layouts("bf16", world.ranks):
        if quick and offload != "none":
            continue
        layout = f"--zero.stage={stage}", f"--zero.offload={offload}"
        sequences = MICRO_SEQUENCES * world.ranks
        batch = f"--batch.micro_sequences={MICRO_SEQUENCES}", f"--batch.sequences={sequences}"
        run = parallel.Run(world, folder / "recipe.yaml", "--precision=bf16", *layout, *batch)
        plan = QUICK if quick else PLAN if offload == "none" else PLAN_OFFLOAD
        for micro_batches, aligned in [x for x in plan if x[0] >= world.ranks]:
            began = time.perf_counter()
            errors = measure_step(run, micro_batches, aligned)
            rows.append(
                {
                    "ranks": world.ranks,
                    "stage": stage,
                    "offload": offload,
                    "micro_batches": micro_batches,
                    "aligned": aligned,
                    **errors,
                    "seconds": time.perf_counter() - began,
                }
            )
        gc.collect()  # DeepSpeed collects at every start, ever more slowly
    return rows


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Errors by layout and number of micro-batches; in bf16 the worst of all layouts."""
    for aligned in (False, True):
        chosen = [r for r in rows if r["aligned"] == aligned]
        numbers = sorted({r["micro_batches"] for r in chosen})
        lines = []
        for ranks in dict.fromkeys(r["ranks"] for r in chosen):
            mine = [r for r in chosen if r["ranks"] == ranks]
            for layout in dict.fromkeys((r["stage"], r["offload"]) for r in mine):
                here = [r for r in mine if (r["stage"], r["offload"]) == layout]
                what = f"stage {layout[0]}, offload {layout[1]}"
                lines.append(line(ranks, what, "error", here, numbers))
            lines.append(line(ranks, "sum in bf16", "bf16_error", mine, numbers))
        if lines:
            title = "one micro-batch again and again" if aligned else "different micro-batches"
            yield f"{title}:\n\n{measure.markdown(lines)}"


def line(
    ranks: int, what: str, column: str, rows: list[dict[str, Any]], numbers: list[int]
) -> dict[str, str]:
    """A line of a table: the worst of some rows, by number of micro-batches."""
    errors = {n: [r[column] for r in rows if r["micro_batches"] == n] for n in numbers}
    cells = {f"{n:,}": f"{max(x):.1e}" if x else "" for n, x in errors.items()}
    return {"ranks": str(ranks), "": what} | cells


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--quick", action="store_true", help="256 aligned micro-batches on 2 ranks, without offload"
    )
    add("--csv", type=Path, default=CSV, help="append to this file")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    options = parser.parse_args()
    if options.folder:
        parallel.worker(options.folder, lambda world: work(world, options.folder, options.quick))
        return
    environment = measure.environment(torch.device("cpu"))
    began, rows = time.perf_counter(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parallel.make_recipe(folder, layers=2, max_length=MAX_LENGTH)
        for n in RANKS[-1:] if options.quick else RANKS:
            made = parallel.launch(__file__, n, folder, *["--quick"] * options.quick)
            measure.append_csv(options.csv, [environment | row for row in made])
            rows += made
            print(f"ranks {n}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
    print(*tables(rows), sep="\n\n")
    broken = [row for row in rows if not row["error"] <= LIMIT]
    for row in broken:
        print(f"more than {LIMIT:.0e}: {row}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
