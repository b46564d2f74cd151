"""What does it cost to sum over micro-batches?

    OMP_NUM_THREADS=1 python bench/accumulation_cost.py [--steps 4] [--micro_batches 6]

Times forward and backward of a micro-batch of 32 x 128 tokens in three ways:

- engine: sums gradients in fp32;
- plain: `loss.backward()` of the same module, which sums gradients in the module's own precision
  (not to be used in bf16);
- fp32 sum, for bf16 alone: the same, with each gradient added to an fp32 sum by hand.

The student is that of configs/demo.yaml; the teacher's outputs are computed beforehand. All run in
one process, a micro-batch each in turn. An overhead is the median of the engine's ratios to another
way, less 1. Times are CPU times of the process, all threads together, so that they hold on a shared
machine too.

Then it counts the collectives of two ranks, in a micro-batch and at the end of a step, in every
layout. Stages 0 and 1 have to reduce only at the end; if they do more, the exit status is 1.

Appends to bench/results/accumulation_cost.csv and collectives.csv, which docs/exactness.md quotes.
"""

from __future__ import annotations

import argparse
import collections
import gc
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from kit import measure, parallel

from distilfast import models
from distilfast.driver import checks, engine, processes
from distilfast.driver.micro_batch import Distillation
from distilfast.sources import assets

RESULTS = Path(__file__).parent / "results"
COSTS = [("fp32", 0), ("bf16", 1)]  # one process runs at these stages, whatever is requested
SEQUENCES = 32


# --- Time -----------------------------------------------------------------------------------------


def make_encoder_recipe(folder: Path) -> Path:
    """configs/demo.yaml's student."""
    source = assets.minilm()
    encoder, _ = models.load_weights("AutoModelForMaskedLM", source, str(source), fresh_head=True)
    encoder.save_pretrained(folder / "teacher")
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(folder / "teacher")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""\
teacher: {folder / "teacher"}
student: {{dropout: 0}}
data: {{source: "asset:wikipedia-sample", prepared: {folder / "tokens"}, max_length: 128}}
loss: {{kd_rows: masked}}
batch: {{sequences: {SEQUENCES}, micro_sequences: {SEQUENCES}}}
steps: 1
output: {folder / "run"}
""",
        encoding="utf-8",
    )
    return recipe


def cost(
    recipe: Path, precision: str, stage: int, steps: int, micro_batches: int
) -> dict[str, float | None]:
    """Return medians in ms, and the overheads with their 20th and 80th percentiles."""
    world = processes.start()
    run = parallel.Run(world, recipe, f"--precision={precision}", f"--zero.stage={stage}")
    student = checks.prepare(run.config, world).student.to(engine.DTYPES[precision])
    plain = Distillation(student, run.config.loss, run.teacher)
    (batch,) = run.setup.batches.step(0, 0, 1, SEQUENCES)
    targets, normalizers = run.teacher(batch), run.normalizers([batch] * micro_batches)

    weights = [p for p in plain.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in weights]

    def ours() -> None:
        run.engine.backward(run.engine(batch, targets, normalizers)[0])

    def by_hand() -> None:
        plain(batch, targets, normalizers)[0].backward()

    def by_hand_in_fp32() -> None:
        by_hand()
        for weight, total in zip(weights, totals, strict=True):
            total += weight.grad
            weight.grad = None

    sides = [ours, by_hand] if precision == "fp32" else [ours, by_hand, by_hand_in_fp32]
    times: dict[Callable[[], None], list[float]] = {side: [] for side in sides}
    ends = []
    for step in range(1 + steps):
        for number in range(micro_batches):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                elapsed = cpu_ms(side)
                if step:  # the first one warms up
                    times[side].append(elapsed)
        elapsed = cpu_ms(lambda: run.engine.step(0.0))
        if step:
            ends.append(elapsed)
    row: dict[str, float | None] = {"engine_ms": statistics.median(times[ours])}
    for name, side in (("plain", by_hand), ("fp32_sum", by_hand_in_fp32)):
        ratios = [a / b - 1 for a, b in zip(times[ours], times.get(side, []), strict=False)]
        spread = measure.Spread.of(ratios) if ratios else measure.Spread(*[None] * 3)
        row[f"{name}_ms"] = statistics.median(times[side]) if ratios else None
        row |= {f"over_{name}{end}": x for end, x in zip(("", "_p20", "_p80"), spread, strict=True)}
    return row | {"end_ms": statistics.median(ends)}


def cpu_ms(call: Callable[[], None]) -> float:
    began = time.process_time()
    call()
    return (time.process_time() - began) * 1e3


# --- Collectives ----------------------------------------------------------------------------------


def collectives(world: processes.World, folder: Path) -> list[dict[str, Any]]:
    """Those of a micro-batch and of a step's end, by layout."""
    rows = []
    for precision in ("fp32", "bf16"):
        for stage, offload in parallel.layouts(precision, world.ranks):
            layout = f"--zero.stage={stage}", f"--zero.offload={offload}"
            batch = "--batch.micro_sequences=2", f"--batch.sequences={2 * world.ranks}"
            run = parallel.Run(
                world, folder / "recipe.yaml", f"--precision={precision}", *batch, *layout
            )
            batches = run.micro_batches(2)
            run.accumulate(batches)  # the first step does more, once
            run.engine.step(0.0)
            # From the second micro-batch on, all are alike.
            one = counted(lambda run=run, batches=batches: run.accumulate(batches[:1]))
            run.engine.step(0.0)
            two = counted(lambda run=run, batches=batches: run.accumulate(batches))
            end = counted(lambda run=run: run.engine.step(0.0))
            for name in sorted({*one, *two, *end}):
                rows.append(
                    {
                        "precision": precision,
                        "stage": stage,
                        "offload": offload,
                        "operation": name,
                        "a_micro_batch": two[name] - one[name],
                        "at_the_end": end[name],
                    }
                )
            gc.collect()  # DeepSpeed collects at every start, ever more slowly
    return rows


def counted(call: Callable[[], None]) -> collections.Counter[str]:
    """How often this rank asked for each collective."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    names = [event.name for event in profile.events()]
    return collections.Counter(x.removeprefix("c10d::") for x in names if x.startswith("c10d::"))


# --- Tables ---------------------------------------------------------------------------------------


def cost_table(rows: list[dict[str, Any]]) -> str:
    def overhead(row: dict[str, Any], over: str) -> str:
        spread = [row[f"over_{over}{end}"] for end in ("", "_p20", "_p80")]
        return "" if spread[0] is None else "{:.1%} ({:.1%}, {:.1%})".format(*spread)

    return measure.markdown(
        [
            {
                "precision": row["precision"],
                "stage": str(row["stage"]),
                "engine_ms": measure.figure(row["engine_ms"]),
                "over backward()": overhead(row, "plain"),
                "over sums in fp32 by hand": overhead(row, "fp32_sum"),
                "end of a step, ms": measure.figure(row["end_ms"]),
            }
            for row in rows
        ]
    )


def collectives_table(rows: list[dict[str, Any]]) -> str:
    lines = []
    for key in dict.fromkeys((r["precision"], r["stage"], r["offload"]) for r in rows):
        mine = [r for r in rows if (r["precision"], r["stage"], r["offload"]) == key]
        line = dict(zip(("precision", "stage", "offload"), map(str, key), strict=True))
        for column in ("a_micro_batch", "at_the_end"):
            found = [f"{r[column]} {r['operation'].strip('_')}" for r in mine if r[column]]
            line[column.replace("_", " ")] = ", ".join(found) or "none"
        lines.append(line)
    return measure.markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=4)
    add("--micro_batches", type=int, default=6, help="in a step; a multiple of 6 is fair")
    add("--only", choices=("time", "collectives"), help="measure only this")
    add("--results", type=Path, default=RESULTS, help="folder of the CSVs")
    add("--folder", type=Path, help=argparse.SUPPRESS)  # of a rank
    options = parser.parse_args()
    if options.folder:
        parallel.worker(options.folder, lambda world: collectives(world, options.folder))
        return
    environment = measure.environment(torch.device("cpu"))
    size = {"steps": options.steps, "micro_batches": options.micro_batches}
    broken = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.only != "collectives":
            recipe = make_encoder_recipe(folder)
            rows = []
            for precision, stage in COSTS:
                what = {"precision": precision, "stage": stage}
                rows.append(what | size | cost(recipe, *what.values(), *size.values()))
            measure.append_csv(
                options.results / "accumulation_cost.csv", [environment | row for row in rows]
            )
            print(cost_table(rows), end="\n\n")
        if options.only != "time":
            tiny = folder / "tiny"
            tiny.mkdir()
            parallel.make_recipe(tiny, layers=4, max_length=64)
            rows = parallel.launch(__file__, 2, tiny)
            measure.append_csv(
                options.results / "collectives.csv", [environment | row for row in rows]
            )
            print(collectives_table(rows))
            broken = [row for row in rows if row["stage"] < 2 and row["a_micro_batch"]]
    for row in broken:
        print(f"more than none a micro-batch: {row}", file=sys.stderr)
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
