"""Which tile is the fastest on this GPU, and what the launcher's own choice costs against it.

    python bench/tune.py [--vocab 30522 ...] [--rows 8192] [--losses kl ...] [--seconds 60]
                         [--csv bench/results/tune.csv]

Every number of threads and every tile that the vocabulary kernel takes is compiled and timed in
rounds, from logits to gradient. The last column is what the launcher would choose; where that is
not the fastest, `variant` in kernels/distilfast_kernels/distillation.py wants another rule.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measure
import torch
from distilfast_kernels import distillation
from torch import Tensor

from distilfast.reference import Options

CSV = Path(__file__).parent / "results" / "tune.csv"
WARPS = (4, 8, 16, 32)
ELEMENTS = (8, 16, 32)  # of a side, a thread and turn
LABELLED = 0.15
LOSSES: dict[str, dict[str, Any]] = {
    "kl": {"kd_weight": 1.0},
    "kl_ce": {"kd_weight": 1.0, "ce_weight": 1.0},
    "reverse_kl": {"kd_weight": 1.0, "divergence": "reverse_kl"},
    "jsd": {"kd_weight": 1.0, "divergence": "jsd"},
    "ce": {"ce_weight": 1.0},
    "all": {"kd_weight": 1.0, "ce_weight": 1.0, "cos_weight": 1.0, "mse_weight": 1.0},
}


def options(vocab: int, loss: str) -> Options:
    weights = {f"{part}_weight": 0.0 for part in ("kd", "ce", "cos", "mse")}
    fixed = {"temperature": 2.0, "jsd_beta": 0.5, "divergence": "forward_kl", "ignore_index": -100}
    return Options(**{**fixed, **weights, **LOSSES[loss], "vocab_size": vocab})  # type: ignore


def launch(
    tensors: dict[str, Tensor], chosen: Options, change: dict[str, int]
) -> Callable[[int], Tensor]:
    """A call of the launcher, with another tile than its own."""
    own = distillation.variant

    def call(turn: int) -> Tensor:
        distillation.variant = lambda *a: own(*a)._replace(**change)
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


def tune(loss: str, vocab: int, n_rows: int, device: torch.device, seconds: float) -> list[dict]:
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
    chosen = options(vocab, loss)
    default = distillation.variant(chosen, bool(chosen.ce_weight), False, True, [2, 2], True)
    calls, failures = {}, {}
    for warps, elements in itertools.product(WARPS, ELEMENTS):
        change = {"THREADS": 32 * warps, "TILES": elements // default.VECTOR}
        name = f"{warps} {elements}"
        calls[name] = launch(tensors, chosen, change)
        try:
            calls[name](0)  # compiles
        except Exception as error:
            failures[name] = measure.reason(error)
            del calls[name]
    samples, late = measure.interleave(calls, measure.Stopwatch(device), seconds)
    failures |= late
    times = {name: measure.Spread.of(s) for name, s in samples.items() if name not in failures}
    best = min((t.median for t in times.values()), default=0.0)
    moved = (2 * bool(chosen.kd_weight) + 1 + (not chosen.kd_weight)) * student.nbytes
    rows = []
    for name in [*times, *failures]:
        warps, elements = (int(x) for x in name.split())
        own = (default.num_warps, default.TILES * default.VECTOR) == (warps, elements)
        time_ms = times[name].median if name in times else None
        rows.append(
            {
                "loss": loss,
                "vocab": vocab,
                "rows": n_rows,
                "warps": warps,
                "elements": elements,
                "status": failures.get(name, "ok"),
                "time_ms": measure.figure(time_ms),
                "gb_per_s": measure.figure(moved / time_ms / 1e6 if time_ms else None),
                "over_best": measure.figure(time_ms / best if time_ms else None),
                "launcher": "chosen" if own else "",
            }
        )
    return sorted(rows, key=lambda row: (row["status"] != "ok", float(row["over_best"] or 0)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cpu: in the interpreter, times are noise")
    parser.add_argument("--vocab", type=int, nargs="+", default=[30522, 50257, 128256])
    parser.add_argument("--rows", type=int, default=8192)
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=["kl", "kl_ce", "jsd", "ce"])
    parser.add_argument("--seconds", type=float, default=80, help="for all of it, about")
    parser.add_argument("--csv", type=Path, default=CSV)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device: nothing to tune")
    environment = measure.environment(device)
    cases = list(itertools.product(arguments.vocab, arguments.losses))
    began = time.perf_counter()
    for number, (vocab, loss) in enumerate(cases):
        left = arguments.seconds - (time.perf_counter() - began)
        if left <= 0:
            print(f"out of time before {loss} at V = {vocab} (--seconds)")
            break
        rows = tune(loss, vocab, arguments.rows, device, left / (len(cases) - number) / 2)
        measure.append_csv(arguments.csv, [{**environment, **row} for row in rows])
        print(measure.markdown([{k: str(v) for k, v in row.items()} for row in rows]), flush=True)


if __name__ == "__main__":
    main()
