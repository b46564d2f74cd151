"""Size, speed and memory of models side by side: `distilfast compare MODEL [MODEL ...]`.

It measures only the body, which transformers' AutoModel loads: a forward pass in eval mode under
inference_mode, with the attention that transformers chooses. A classifier on top of the body runs
the body in the same way.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from distilfast import __version__, atomic
from distilfast.errors import ConfigError, expect, writable
from distilfast.machine import cpu_name
from distilfast.report import Report, Table, markdown, write_report
from distilfast.report.numbers import counted
from distilfast.studies.figures import facts
from distilfast.studies.flags import Parser, positive
from distilfast.studies.sizes import MIB, Candidate, load
from distilfast.studies.speed import DTYPES, Mode, Plan, measure

# DistilBERT's table 3 (Sanh et al. 2019): parameters in millions, and seconds for one pass over the
# development set of STS-B on a CPU at batch 1.
PUBLISHED = {"ELMo": (180, 895), "BERT-base": (110, 668), "DistilBERT": (66, 410)}


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status, 1 if something could not be measured."""
    options = parse(arguments)
    candidates = load(options.models, options.data, options.depth_width, options.sequence_length)
    plan = Plan(
        device=options.device,
        threads=options.threads or torch.get_num_threads(),
        batches=options.batches,
        sequence_length=options.sequence_length,
        rounds=options.rounds,
    )
    modes = [
        Mode(p, c)
        for c in ([False, True] if options.compile else [False])
        for p in options.precisions
    ]
    results = measure(candidates, modes, plan)
    settings = {
        "command": "compare",
        "models": {c.name: c.source or "random weights" for c in candidates},
        **{k: v for k, v in vars(options).items() if k not in ("models", "output", "data")},
        "data": str(options.data) if options.data else None,
        "threads": plan.threads,
        "device_name": torch.cuda.get_device_name() if options.device == "cuda" else cpu_name(),
        "torch": str(torch.__version__),
        "distilfast": __version__,
    }
    tables = tabulate(candidates, modes, results)
    print("\n\n".join(markdown(table) for table in tables))
    write(options.output, arguments, settings, results, tables, lead(candidates, results))
    return 1 if any("error" in row for row in results) else 0


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse and check the flags.

    Raises:
        ConfigError: the first thing found wrong.
    """
    parser = Parser("distilfast compare", "Parameters, latency, throughput and memory of models.")
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="MODEL",
        help="a folder or hub name, or NAME=either; ratios are relative to the first model",
    )
    add("--output", type=Path, required=True, help="folder for the results")
    add("--batches", type=_counts, default=[1, 32], help="batch sizes: 1,32")
    add("--precisions", type=_precisions, default=list(DTYPES), help="fp32,bf16; weights are cast")
    add("--compile", action=argparse.BooleanOptionalAction, default=True, help="also torch.compile")
    add("--sequence_length", type=positive, default=128, help="random tokens, none of them padding")
    add("--rounds", type=positive, default=10, help="how often each measurement is taken")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--threads", type=positive, help="threads on a CPU; if not given, PyTorch's own number")
    add("--data", type=Path, help="time a pass at batch 1 over this .tsv, or folder with dev.tsv")
    add(
        "--depth_width",
        action="store_true",
        help="add the first model with half its layers, and narrower with as many parameters",
    )
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: expected auto or cpu, as PyTorch finds no GPU, got 'cuda'")
    _check_output(options.output)
    return options


def _counts(text: str) -> list[int]:
    return sorted({positive(number) for number in text.split(",")})


def _precisions(text: str) -> list[str]:
    for name in text.split(","):
        if name not in DTYPES:
            raise argparse.ArgumentTypeError(f"expected {' or '.join(DTYPES)}, got {name!r}")
    return list(dict.fromkeys(text.split(",")))


def _check_output(output: Path) -> None:
    """Check that the files to be overwritten are those of an earlier comparison."""
    writable("--output", output)
    if output.is_dir() and not any(output.iterdir()):
        return
    try:
        ours = json.loads((output / "settings.json").read_text("utf-8"))["command"] == "compare"
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    expect(
        ours or not output.exists(), "--output", "an empty folder or a comparison's", str(output)
    )


# --- Tables and files -----------------------------------------------------------------------------


def tabulate(
    candidates: Sequence[Candidate], modes: Sequence[Mode], results: Sequence[dict[str, Any]]
) -> list[Table]:
    """Make the tables: sizes, one table for each mode, and the pass over texts if there are any."""
    precisions = list(dict.fromkeys(mode.precision for mode in modes))
    sizes = Table(
        title="Size",
        columns=[
            *("model", "parameters, M", "of which embeddings, M"),
            *(f"weights in {p}, MiB" for p in precisions),
            "on disk, MiB",
        ],
        rows=[
            [
                c.name,
                *(short(n / 1e6) for n in (c.parameters, c.embedding_parameters)),
                *(short(c.parameters * DTYPES[p].itemsize / MIB) for p in precisions),
                short(c.disk_mib),
            ]
            for c in candidates
        ],
        caption="Of the body, without a head. On disk: the files of weights, with whatever head "
        "they hold.",
    )
    tables = [sizes, *(_speeds(mode, results, candidates[0].name) for mode in modes)]
    return [*tables, _passes(results, precisions)] if candidates[0].texts else tables


def _speeds(mode: Mode, results: Sequence[dict[str, Any]], first: str) -> Table:
    mine = [r for r in results if (r["precision"], r["compile"]) == (mode.precision, mode.compiled)]
    errors = [
        f" {row['model']} was not measured: {row['error']}." for row in mine if "error" in row
    ]
    left = ", and what the compiler keeps" if mode.compiled else ""
    return Table(
        title=f"Speed and memory in {mode}",
        columns=[
            *("model", "batch", "ms", "20 to 80 % of the rounds", f"times as fast as {first}"),
            *("sequences/s", "tokens/s", "peak MiB"),
        ],
        rows=[
            [
                *(row["model"], str(row["batch"]), short(row["latency_ms"])),
                f"{short(row['latency_p20_ms'])} to {short(row['latency_p80_ms'])}",
                "" if row["speedup"] is None else f"{row['speedup']:.2f}",
                *(short(row[key]) for key in ("sequences_per_s", "tokens_per_s", "peak_mib")),
            ]
            for row in mine
            if "batch" in row
        ],
        caption=f"Medians. Peak: weights and a pass{left}, above a process without a model."
        + "".join(errors),
    )


def _passes(results: Sequence[dict[str, Any]], precisions: Sequence[str]) -> Table:
    published = [
        [name, str(millions), str(seconds), *[""] * (len(precisions) - 1)]
        for name, (millions, seconds) in PUBLISHED.items()
    ]
    measured: dict[str, dict[str, Any]] = defaultdict(dict)
    for row in results:
        if "pass_s" in row:
            measured[row["model"]] |= {**row, row["precision"]: row["pass_s"]}
    rows = [
        [name, short(row["parameters"] / 1e6), *(short(row.get(p)) for p in precisions)]
        for name, row in measured.items()
    ]
    counts = sorted(
        {f"{counted(r['texts'], 'text')} of {r['tokens']:,} tokens" for r in measured.values()}
    )
    return Table(
        title="One pass over a data set at batch 1",
        columns=["model", "parameters, M", *(f"s in {p}" for p in precisions)],
        rows=[*published, *rows],
        caption=f"Here {' or '.join(counts)}. Published (DistilBERT's Table 3): STS-B's "
        "development set on another machine's CPU, so that nothing but ratios compares.",
        published=list(range(len(published))),
    )


def short(value: float | None) -> str:
    """Format a value with three significant digits, and None as nothing."""
    if not value:
        return "" if value is None else "0"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def lead(candidates: Sequence[Candidate], results: Sequence[dict[str, Any]]) -> str:
    """Return one sentence that compares the fastest model with the first one.

    It is about the first mode and batch.
    """
    timed = [row for row in results if "batch" in row]
    if not timed:
        return "Nothing could be measured."
    alike = [
        r for r in timed if all(r[k] == timed[0][k] for k in ("precision", "compile", "batch"))
    ]
    best = min(alike, key=lambda row: row["latency_ms"])
    how = f"at batch {best['batch']} in {Mode(best['precision'], best['compile'])}"
    first = candidates[0]
    if best["model"] == first.name or best["speedup"] is None:
        return f"{best['model']} takes {short(best['latency_ms'])} ms a pass {how}."
    share = best["parameters"] / first.parameters
    return (
        f"{best['model']} is {best['speedup']:.2f} times as fast as {first.name} {how}, with "
        f"{share:.0%} of its parameters."
    )


def write(
    output: Path,
    arguments: Sequence[str],
    settings: dict[str, Any],
    results: Sequence[dict[str, Any]],
    tables: list[Table],
    lead: str,
) -> None:
    """Write settings.json, results.json and the report."""
    output.mkdir(parents=True, exist_ok=True)
    for name, content in (("settings", settings), ("results", results)):
        atomic.write(output / f"{name}.json", json.dumps(content, indent=1))
    report = Report(
        title=f"distilfast {__version__}: models compared",
        lead=lead,
        facts=facts(
            {
                "device": settings["device_name"],
                "threads": settings["threads"],
                "torch": settings["torch"],
                "tokens a sequence": settings["sequence_length"],
                "rounds": settings["rounds"],
            }
        ),
        config=yaml.safe_dump(settings, sort_keys=False),
        tables=tables,
        commands=[shlex.join(["distilfast", "compare", *arguments])],
    )
    print(f"\nreport: {write_report(report, output / 'report.html')}")
