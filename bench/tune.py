"""Which tile is the fastest on this GPU, and what does the launcher's own choice cost against it?

    python bench/tune.py [--losses kl ...] [--vocab 30522 ...] [--rows 8192] [--seconds 60]
                         [--csv bench/results/tune.csv]
    python bench/tune.py --compile-only [--jobs 12]     # times nothing; needs no GPU

Compiles the vocabulary kernel with every number of threads and every tile that it takes, and times
them in rounds, from logits to gradient. The last column is the launcher's choice. If that is not
the fastest, `variant` in kernels/distilfast_kernels/distillation.py needs another rule.

A loss is timed at every vocabulary before the next loss begins, and the last table has a line for
each. So a run that is cut off has still answered for KL, at small and large vocabularies.

--compile-only compiles the same tiles, several at a time. On a GPU it calls the launcher on a few
rows; the timed run then finds its kernels in Triton's cache, as neither rows nor vocabulary are
compiled in. Without a GPU it compiles for one (--target) and says which tiles do not compile.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from distilfast_kernels import distillation
from kit import measure
from torch import Tensor

from distilfast.losses.reference import Options

CSV = Path(__file__).parent / "results" / "tune.csv"
WARPS = (4, 8, 16, 32)
ELEMENTS = (8, 16, 32)  # a side's logits per thread and turn
FEW_ROWS = 8  # what --compile-only launches
LABELLED = 0.15
LOSSES: dict[str, dict[str, Any]] = {  # the most important first
    "kl": {"kd_weight": 1.0},
    "kl_ce": {"kd_weight": 1.0, "ce_weight": 1.0},
    "jsd": {"kd_weight": 1.0, "divergence": "jsd"},
    "ce": {"ce_weight": 1.0},
    "reverse_kl": {"kd_weight": 1.0, "divergence": "reverse_kl"},
    "all": {"kd_weight": 1.0, "ce_weight": 1.0, "cos_weight": 1.0, "mse_weight": 1.0},
}


class Tile(NamedTuple):
    warps: int
    elements: int

    def __str__(self) -> str:
        return f"{self.warps} {self.elements}"


def options(vocab: int, loss: str) -> Options:
    weights = {f"{part}_weight": 0.0 for part in ("kd", "ce", "cos", "mse")}
    fixed = {"temperature": 2.0, "jsd_beta": 0.5, "divergence": "forward_kl", "ignore_index": -100}
    return Options(**{**fixed, **weights, **LOSSES[loss], "vocab_size": vocab})  # type: ignore


def default_variant(chosen: Options) -> distillation.Variant:
    """The launcher's choice for bf16 logits without a mask, at aligned addresses."""
    return distillation.variant(chosen, bool(chosen.ce_weight), False, True, [2, 2], True)


def with_tile(variant: distillation.Variant, tile: Tile) -> distillation.Variant:
    return variant._replace(THREADS=32 * tile.warps, TILES=tile.elements // variant.VECTOR)


def make_tensors(vocab: int, n_rows: int, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(0)
    student = torch.randn(n_rows, vocab, dtype=torch.bfloat16, device=device)
    tensors = {
        "student": student,
        "teacher": student + torch.randn_like(student),
        "gradient": torch.empty_like(student),
        "labels": torch.randint(vocab, (n_rows,), device=device),
        "scale": torch.ones((), device=device),
    }
    tensors["labels"][torch.rand(n_rows, device=device) > LABELLED] = -100
    return tensors


def launch(tensors: dict[str, Tensor], chosen: Options, tile: Tile) -> Callable[[int], Tensor]:
    """A call of the launcher, with another tile than its own."""
    own = distillation.variant

    def changed(*arguments: Any) -> distillation.Variant:
        return with_tile(own(*arguments), tile)

    def call(turn: int) -> Tensor:
        distillation.variant = changed
        try:
            return distillation.distillation(
                tensors["student"],
                tensors["teacher"],
                tensors["labels"] if chosen.ce_weight else None,
                None,
                tensors["scale"],
                tensors["scale"],
                chosen,
                tensors["gradient"],
            )
        finally:
            distillation.variant = own

    return call


# --- Compiling alone ------------------------------------------------------------------------------


def compile_tile(loss: str, vocab: int, tile: Tile, target: int | None) -> dict[str, Any]:
    """Through the launcher on this GPU, or for another where ``target`` names its architecture."""
    began, status, chosen = time.perf_counter(), "ok", options(vocab, loss)
    try:
        if target is None:
            tensors = make_tensors(vocab, FEW_ROWS, torch.device("cuda"))
            launch(tensors, chosen, tile)(0)
            torch.cuda.synchronize()
        else:
            import resources

            resources.compiled(with_tile(default_variant(chosen), tile), "bf16", target)
    except Exception as error:
        status = measure.reason(error)
    seconds = measure.figure(time.perf_counter() - began)
    return {"loss": loss, **tile._asdict(), "seconds": seconds, "status": status}


def compile_all(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every tile of every loss, in processes of their own: a compiler is busy with one at a time.

    One vocabulary does for all, as the width of a row is not compiled in.
    """
    target = None if arguments.device == "cuda" else arguments.target
    tasks = [
        (loss, arguments.vocab[0], tile, target)
        for loss in arguments.losses
        for tile in tiles(arguments)
    ]
    if arguments.jobs == 1:
        return [compile_tile(*task) for task in tasks]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        return list(pool.map(compile_tile, *zip(*tasks, strict=True)))


# --- Timing ---------------------------------------------------------------------------------------


def tiles(arguments: argparse.Namespace) -> list[Tile]:
    return [Tile(*x) for x in itertools.product(arguments.warps, arguments.elements)]


def tune(
    loss: str, vocab: int, wanted: Sequence[Tile], n_rows: int, device: torch.device, seconds: float
) -> list[dict[str, Any]]:
    """A row a tile, the fastest first."""
    tensors, chosen = make_tensors(vocab, n_rows, device), options(vocab, loss)
    calls, failures = {}, {}
    for tile in wanted:
        calls[str(tile)] = launch(tensors, chosen, tile)
        try:
            calls[str(tile)](0)  # compiles
        except Exception as error:
            failures[str(tile)] = measure.reason(error)
            del calls[str(tile)]
    samples, late = measure.interleave(calls, measure.Stopwatch(device), seconds)
    failures |= late
    times = {name: measure.Spread.of(s) for name, s in samples.items() if name not in failures}
    best = min((t.median for t in times.values()), default=0.0)
    moved = (2 * bool(chosen.kd_weight) + 1 + (not chosen.kd_weight)) * tensors["student"].nbytes
    default = default_variant(chosen)
    rows = []
    for tile in wanted:
        time_ms = times[str(tile)].median if str(tile) in times else None
        rows.append(
            {
                "loss": loss,
                "vocab": vocab,
                "rows": n_rows,
                "warps": tile.warps,
                "elements": tile.elements,
                "status": failures.get(str(tile), "ok"),
                "time_ms": measure.figure(time_ms),
                "gb_per_s": measure.figure(moved / time_ms / 1e6 if time_ms else None),
                "over_best": measure.figure(time_ms / best if time_ms else None),
                "launcher": "chosen" if with_tile(default, tile) == default else "",
            }
        )
    return sorted(rows, key=lambda row: (row["status"] != "ok", float(row["over_best"] or 0)))


def summary(found: Sequence[Sequence[dict[str, Any]]]) -> str:
    """A line a loss and vocabulary: the fastest tile, and the launcher's own beside it."""
    lines = []
    for rows in found:
        best = rows[0]
        own = next((row for row in rows if row["launcher"]), None)
        lines.append(
            {
                "loss": best["loss"],
                "vocab": str(best["vocab"]),
                "best: warps, elements": f"{best['warps']}, {best['elements']}",
                "time_ms": best["time_ms"],
                "gb_per_s": best["gb_per_s"],
                "launcher's": f"{own['warps']}, {own['elements']}" if own else "",
                "over_best": own["over_best"] if own else "",
                "failed tiles": str(sum(row["status"] != "ok" for row in rows)),
            }
        )
    return measure.markdown(lines)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), help="cpu: in the interpreter; times mean nothing")
    add("--losses", nargs="+", choices=LOSSES, default=["kl", "kl_ce", "jsd", "ce"])
    add("--vocab", type=int, nargs="+", default=[30522, 128256, 50257])
    add("--rows", type=int, default=8192)
    add("--warps", type=int, nargs="+", default=WARPS)
    add("--elements", type=int, nargs="+", default=ELEMENTS, help="per side, thread and turn")
    add("--seconds", type=float, default=80, help="about the time of the whole run")
    add("--csv", type=Path, default=CSV)
    add("--compile-only", action="store_true", help="compile the tiles, time nothing")
    add("--jobs", type=int, default=os.cpu_count(), help="compilations at a time")
    add("--target", type=int, default=90, help="for --compile-only without a GPU; 90 is sm_90")
    return parser


def main() -> None:
    arguments = parser().parse_args()
    there = torch.cuda.is_available()
    if arguments.compile_only:
        if os.environ.get("TRITON_INTERPRET"):
            sys.exit("TRITON_INTERPRET is set: nothing is compiled; unset it")
        arguments.device = arguments.device or ("cuda" if there else "cpu")
        rows = compile_all(arguments)
        print(measure.markdown([{k: str(v) for k, v in row.items()} for row in rows]))
        failed = sum(row["status"] != "ok" for row in rows)
        print(f"{len(rows) - failed} tiles compiled, {failed} failed")
        sys.exit(failed > 0)
    device = torch.device(arguments.device or "cuda")
    if device.type == "cuda" and not there:
        sys.exit("no CUDA device: nothing to tune")
    environment = measure.environment(device)
    cases = list(itertools.product(arguments.losses, arguments.vocab))
    began, found = time.perf_counter(), []
    for number, (loss, vocab) in enumerate(cases):
        left = arguments.seconds - (time.perf_counter() - began)
        if left <= 0 and number:
            print(f"out of time before {loss} at V = {vocab} (--seconds)")
            break
        share = left / (len(cases) - number) / 2
        rows = tune(loss, vocab, tiles(arguments), arguments.rows, device, share)
        measure.append_csv(arguments.csv, [{**environment, **row} for row in rows])
        print(measure.markdown([{k: str(v) for k, v in row.items()} for row in rows]), flush=True)
        found.append(rows)
    print(f"\n{summary(found)}")


if __name__ == "__main__":
    main()
