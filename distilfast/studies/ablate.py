"""`distilfast ablate`: measure what each part of the method contributes, over several seeds.

    distilfast ablate --config configs/demo.yaml --data FOLDER --tasks CoLA,SST-2 --seeds 5 \\
        --output runs/ablation
    distilfast ablate --config X --grid loss.temperature=1,2,4 --grid loss.kd_weight=1,5 ...

A row of the table is the configuration with some keys changed. All rows take the same steps on the
same data, from the same seeds. Each distilled model is fine-tuned on the tasks from the seed that
it was distilled from. Rows are compared with the unchanged configuration, seed by seed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from distilfast import config as configs
from distilfast import data
from distilfast.config import Config, parse
from distilfast.driver import checks
from distilfast.errors import ConfigError, expect
from distilfast.models import fingerprint, teacher_identity
from distilfast.report import Chart, Report, Table, markdown, write_report
from distilfast.studies import flags, jobs
from distilfast.studies.figures import Difference, difference, facts, mean, over_seeds
from distilfast.studies.flags import add_task_options, add_tuning_options, tuning
from distilfast.studies.folder import TokenStore, claim, slug
from distilfast.studies.inputs import Inputs, chosen_tasks, read_inputs
from distilfast.studies.jobs import Job, Result, Tell, Workers
from distilfast.studies.task_job import fine_tune
from distilfast.tasks import Task
from distilfast.tasks.fine_tuning import FineTuning, longest

# The changes of the macro score in Sanh et al. 2019, table 4.
PUBLISHED = {
    "without kd": -2.96,
    "without hidden_cos": -1.46,
    "without ce": -0.31,
    "random initialisation": -3.69,
}
TABLE_4 = {
    "without kd": ("loss.kd_weight=0",),
    "without hidden_cos": ("loss.hidden_cos_weight=0",),
    "without ce": ("loss.ce_weight=0",),
    "random initialisation": ("student.init=random",),
}
BASELINE = "as configured"
TAIL = 4096  # this many bytes at the end of metrics.jsonl contain its last line
FIXED = ("output", "seed", "data.", "steps", "epochs", "resume", "checkpoint.", "evaluate.")
NOT_SHARED = "--grid, --row: expected KEY=VALUE of a key that rows need not share"


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = flags.Parser("distilfast ablate", __doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="a run's YAML; --set changes its keys")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="set in all rows")
    add(
        "--grid",
        action="append",
        metavar="KEY=A,B",
        help="a row for each value; with several --grid, a row for each combination",
    )
    add("--row", nargs="+", action="append", metavar="NAME KEY=VALUE", help="a row of your own")
    add(
        "--seeds",
        type=flags.positive,
        default=5,
        help="number of seeds; the first is the configuration's, the others follow it",
    )
    add_task_options(parser)
    add_tuning_options(parser)
    given = parser.parse_args(arguments)

    output = Path(given.output)
    rows = chosen_rows(given.grid, given.row)
    for change in given.set:
        expect("=" in change, "--set", "KEY=VALUE", change)
    base = ["--config", given.config, *(f"--{key}" for key in given.set)]
    first = parse(base)
    seeds = range(first.seed, first.seed + given.seeds)
    runs = {
        (name, seed): run_config(base, changes, name, seed, output, first.data.prepared)
        for name, changes in rows.items()
        for seed in seeds
    }
    chosen = chosen_tasks(given.tasks, given.data)
    workers = Workers.of(given.processes, given.device, given.threads)
    settings = tuning(given, workers)
    splits = read_inputs(chosen, given.data, {}, settings)
    _, tokenizer, _ = checks.load_models(first)
    length = max(settings.max_length or task.max_length for task in chosen)
    for name, changes in rows.items():  # find errors of all rows before the first is trained
        config = runs[name, first.seed]
        if shared(config) != shared(runs[BASELINE, first.seed]):
            raise ConfigError(f"{NOT_SHARED}, got {' '.join(changes)!r}")
        config.batch.check(1, config.data.max_length)
        checks.check_backend(config, torch.device(workers.devices[0]))
        _, own, student = checks.load_models(config)
        same = fingerprint(own) == fingerprint(tokenizer)
        expect(same, "--row", "the tokenizer of the configuration's teacher", name)
        most = longest(student)
        expect(length <= most, "--max_length", f"at most {most} ({name!r})", length)
    what = {
        "command": "ablate",
        **workers.facts,
        **asdict(settings),
        "config": {
            k: v for k, v in yaml.safe_load(configs.to_yaml(first)).items() if k != "output"
        },
    }
    shown = {name: " ".join(changes) for name, changes in rows.items()}
    shown |= {
        f"teacher {teacher.name}": teacher_identity(teacher)
        for config in runs.values()
        for teacher in config.teachers
    }
    claim(output, what, shown, splits.identities)
    tokens = Path(runs[BASELINE, seeds[0]].token_folder)
    ours = not tokens.exists()
    store = data.prepare(first, tokenizer, tokens)
    try:
        for name in rows:
            config = runs[name, first.seed]
            checks.count_steps(config, int(store.sizes(config.batch).sum()))
    except ConfigError:
        if ours:  # a corrected command may have other data
            shutil.rmtree(tokens)
        raise
    trained = train(runs, workers, output)
    tuned = fine_tune_all(runs, splits, tokenizer, settings, workers, output)
    found = {
        name: Row(
            [trained[name, seed] for seed in seeds],
            {t.name: [tuned[name, seed, t.name] for seed in seeds] for t in chosen},
        )
        for name in rows
    }
    write(found, what, chosen, output, shlex.join(["distilfast", "ablate", *arguments]))
    return 0


# --- The rows -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row's figures, one result for each seed."""

    runs: list[Result]
    tasks: dict[str, list[Result]]

    @property
    def eval_loss(self) -> list[float | None]:
        """The held-out loss of each seed, in nats; None if no held-out token was masked."""
        return [run["eval_loss"] for run in self.runs]

    @property
    def score(self) -> list[float]:
        """The score of each seed: the mean over the tasks, x 100."""
        return [
            statistics.fmean(r["score"] for r in one)
            for one in zip(*self.tasks.values(), strict=True)
        ]


def chosen_rows(
    grid: Sequence[str] | None, own: Sequence[Sequence[str]] | None
) -> dict[str, tuple[str, ...]]:
    """Return the changes of each row by its name; the unchanged configuration comes first."""
    rows: dict[str, tuple[str, ...]] = {BASELINE: ()}
    if not grid and not own:
        rows |= TABLE_4
    axes = []
    for axis in grid or ():
        key, _, values = axis.partition("=")
        if not key or not values:
            raise ConfigError(f"--grid: expected KEY=A,B, got {axis!r}")
        axes.append([f"{key}={value}" for value in flags.names("--grid", values)])
    if axes:
        rows |= {" ".join(changes): changes for changes in itertools.product(*axes)}
    for name, *changes in own or ():
        if name in rows or not changes:
            raise ConfigError(f"--row: expected a new name and KEY=VALUE, got {[name, *changes]}")
        rows[name] = tuple(changes)
    for row in rows.values():
        for change in row:
            if change.startswith(FIXED) or "=" not in change:
                raise ConfigError(f"{NOT_SHARED}, got {change!r}")
        keys = [change.partition("=")[0] for change in row]
        if len(set(keys)) < len(keys):
            raise ConfigError(f"--grid, --row: expected each key once a row, got {' '.join(row)!r}")
    return rows


def shared(config: Config) -> list[str]:
    """Return the values that all rows of one seed share, without `output`."""
    found = yaml.safe_load(configs.to_yaml(config))
    return [f"{part}: {found[part.strip('.')]}" for part in FIXED if part != "output"]


def run_config(
    base: Sequence[str],
    changes: Sequence[str],
    name: str,
    seed: int,
    output: Path,
    prepared: str | None,
) -> Config:
    """Return the configuration of one run. All runs share the tokens of the text."""
    shared = [f"--data.prepared={prepared or output / 'text-tokens'}"]
    own = [f"--seed={seed}", f"--output={output / 'runs' / slug(name) / f'seed-{seed}'}"]
    return parse([*base, *(f"--{change}" for change in changes), *shared, *own])


# --- The jobs -------------------------------------------------------------------------------------


def train(
    runs: Mapping[tuple[str, int], Config], workers: Workers, output: Path
) -> dict[tuple[str, int], Result]:
    """Distil each run; return its held-out figures."""
    wanted = {}
    for (name, seed), config in runs.items():
        wanted[name, seed] = Job(
            f"distilled/{slug(name)}/seed-{seed}",
            2.0 if config.loss.needs_teacher else 1.0,
            distil,
            (configs.to_yaml(config), config.output, workers.threads),
        )
    results = jobs.run(list(wanted.values()), output, workers, "distil")
    return {key: results[job.name] for key, job in wanted.items()}


def distil(config: str, output: str, threads: int, *, device: str, tell: Tell) -> Result:
    """A job: run `distilfast train` in its own process; it resumes where it stopped."""
    folder = Path(output)
    folder.parent.mkdir(parents=True, exist_ok=True)
    file = folder.with_suffix(".yaml")
    file.write_text(config, encoding="utf-8")
    log = folder.with_suffix(".log")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": _visible(device),
    }
    command = [sys.executable, "-m", "distilfast", "train"]
    with log.open("w", encoding="utf-8") as opened:
        process = subprocess.Popen(
            [*command, "--config", str(file)],
            stdout=opened,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        try:
            steps = parse(["--config", str(file)]).steps
            while process.poll() is None:
                tell(_share_done(folder / "metrics.jsonl", steps))
                time.sleep(0.5)
        finally:
            process.terminate()
            process.wait()  # it saves a checkpoint, from which the next one resumes
    summary = folder / "summary.json"
    if process.returncode or not summary.is_file():
        last = (log.read_text(encoding="utf-8").strip().splitlines() or ["nothing"])[-1]
        raise ConfigError(
            f"{folder} ended with exit status {process.returncode}: {last}; see {log}"
        )
    found = json.loads(summary.read_text(encoding="utf-8"))
    return {**found["scores"]["student"], "seconds": found["seconds"], "steps": found["steps"]}


def _visible(device: str) -> str:
    """Return the CUDA_VISIBLE_DEVICES with which a process sees only this device.

    "cuda:1" is the second of the devices that this process sees.
    """
    _, _, index = device.partition(":")
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return seen.split(",")[int(index)].strip() if index and seen else index


def _share_done(metrics: Path, steps: int | None) -> float:
    """Return the share done of a running run, from the last whole line of its metrics."""
    if steps is None or not metrics.is_file():
        return 0.0
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - TAIL))
        lines = file.read().split(b"\n")[:-1]
    found = re.match(rb'\{"step": (\d+)', lines[-1]) if lines else None
    return min(int(found[1]) / steps, 0.99) if found else 0.0


def fine_tune_all(
    runs: Mapping[tuple[str, int], Config],
    splits: Inputs,
    tokenizer: Any,
    settings: FineTuning,
    workers: Workers,
    output: Path,
) -> dict[tuple[str, int, str], Result]:
    """Fine-tune each distilled model on each task, from the seed that it was distilled from.

    Args:
        tokenizer: the tokenizer of all models, as they share the tokens of the text.
    """
    store = TokenStore(output / "tokens")
    wanted = {}
    for ((name, seed), config), task in itertools.product(runs.items(), splits.tasks.values()):
        source = str(Path(config.output) / "model")
        files, tokens = store.files(splits.splits[task.name], task, tokenizer, settings)
        work = tokens * (settings.epochs or task.epochs)
        wanted[name, seed, task.name] = Job(
            f"scores/{slug(name)}/{task.name}/seed-{seed}",
            work,
            fine_tune,
            (source, task, files, tokenizer.pad_token_id, settings, seed),
            {"seed": seed, "settings": asdict(settings)},
        )
    results = jobs.run(list(wanted.values()), output, workers, "fine-tune")
    store.remove()
    return {key: results[job.name] for key, job in wanted.items()}


# --- The table ------------------------------------------------------------------------------------


def write(
    rows: Mapping[str, Row],
    what: Mapping[str, Any],
    chosen: Sequence[Task],
    output: Path,
    command: str,
) -> None:
    """Write results.json and report.html, and print the table."""
    baseline = rows[BASELINE]
    differences = {
        name: {
            "score": difference(row.score, baseline.score),
            "eval_loss": difference(row.eval_loss, baseline.eval_loss),
        }
        for name, row in rows.items()
        if name != BASELINE
    }
    results = {
        name: {
            "score": over_seeds(row.score),
            "eval_loss": over_seeds(row.eval_loss),
            "tasks": {t: over_seeds([r["score"] for r in f]) for t, f in row.tasks.items()},
            "difference": {
                part: {"values": d.values, "mean": d.mean, "stdev": d.stdev, "p": d.p}
                for part, d in differences.get(name, {}).items()
            },
        }
        for name, row in rows.items()
    }
    jobs.write_json(output / "results.json", results)
    made = table(rows, differences, chosen, len(baseline.runs))
    print(markdown(made))
    report = Report(
        title=f"Ablation: {', '.join(task.name for task in chosen)}",
        lead=lead(differences),
        facts=facts({key: value for key, value in what.items() if key != "config"}),
        config=yaml.safe_dump(what["config"], sort_keys=False),
        tables=[made],
        charts=[
            Chart(
                "Change of the score",
                "x 100",
                {n: d["score"].values for n, d in differences.items()},
                zero=True,
            ),
            Chart(
                "Change of the held-out loss",
                "nats",
                {n: d["eval_loss"].values for n, d in differences.items()},
                zero=True,
            ),
        ],
        commands=[command],
    )
    print(f"\nreport: {write_report(report, output / 'report.html')}")


def table(
    rows: Mapping[str, Row],
    differences: Mapping[str, Mapping[str, Difference]],
    chosen: Sequence[Task],
    n_seeds: int,
) -> Table:
    """Tabulate each row's means, and its changes with their standard deviations and p."""
    published = {name: PUBLISHED[name] for name in rows if name in PUBLISHED}
    columns = [
        "row",
        "score",
        "change",
        "p",
        "held-out loss",
        "change",
        "p",
        *(t.name for t in chosen),
    ]
    columns += ["change in the paper"] if published else []
    lines = []
    for name, row in rows.items():
        cells = []
        figures = (("score", mean(row.score), 1), ("eval_loss", mean(row.eval_loss), 3))
        for part, value, digits in figures:
            cells.append("" if value is None else f"{value:.{digits}f}")
            found = differences.get(name, {}).get(part)
            cells += ["", ""] if found is None else found.cells(digits)
        cells += [f"{statistics.fmean(r['score'] for r in row.tasks[t.name]):.1f}" for t in chosen]
        if published:
            cells.append(f"{published[name]:+.2f}" if name in published else "")
        lines.append([name, *cells])
    several = f"Means of {n_seeds} seeds" if n_seeds > 1 else "One seed"
    caption = (
        f"{several}; score: the mean over {', '.join(t.name for t in chosen)}, times 100; held-out "
        "loss: masked-LM cross entropy, nats. A change is a row's less the configuration's own, "
        "seed by seed, ± standard deviation; p is of a two-sided paired t-test."
    )
    if published:
        caption += " In the paper (Sanh et al. 2019, table 4): change of the score of nine tasks."
    return Table("Ablation", columns, lines, caption)


def lead(differences: Mapping[str, Mapping[str, Difference]]) -> str:
    """Return one sentence that sums up the figures."""
    clear = [n for n, d in differences.items() if d["score"].p is not None and d["score"].p < 0.05]
    if not clear:
        return "No row's score differs from the configuration's own at p < 0.05."
    said = [f"{name} ({differences[name]['score'].mean:+.1f})" for name in clear]
    return f"The score differs from the configuration's own at p < 0.05: {', '.join(said)}."
