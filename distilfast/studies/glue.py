"""`distilfast glue`: score models on the GLUE tasks, with the protocol of the DistilBERT paper.

    distilfast glue --model bert-base-uncased distilbert-base-uncased --data glue --seeds 5 \\
        --output runs/glue

Each model is fine-tuned on each task from each of the seeds 0, 1, ...; the table shows the medians.
Results are kept in --output: the same command resumes there, and further models and tasks are added
to the table.
"""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from distilfast import tasks
from distilfast.errors import ConfigError
from distilfast.report import Chart, Report, markdown, write_report
from distilfast.report.numbers import counted
from distilfast.studies import flags, jobs
from distilfast.studies.figures import facts, macro, median_score, short, summary, table
from distilfast.studies.flags import add_task_options, add_tuning_options, tuning
from distilfast.studies.folder import TokenStore, claim, slug
from distilfast.studies.inputs import Inputs, chosen_tasks, named_models, read_inputs
from distilfast.studies.jobs import Job, Result, Workers
from distilfast.studies.task_job import fine_tune
from distilfast.tasks import GLUE, Task
from distilfast.tasks.fine_tuning import FineTuning

GRID = (16, 32), (2e-5, 3e-5, 5e-5), (2, 3, 4)  # batch, rate, epochs: Devlin et al. 2019, A.3


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = flags.Parser("distilfast glue", __doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="[NAME=]MODEL",
        help="folders or hub names, the teacher first")  # fmt: skip
    add("--seeds", type=flags.positive, default=5, help="seeds 0 to SEEDS - 1")
    add("--grid", action="store_true",
        help="try BERT's grid of 18 settings; the best on the development set counts")  # fmt: skip
    add_task_options(parser)
    add_tuning_options(parser)
    given = parser.parse_args(arguments)
    if given.grid and (given.epochs or given.learning_rate or given.batch_size):
        raise ConfigError("--grid: expected no --epochs, --learning_rate or --batch_size beside it")
    models = named_models("--model", given.model)
    chosen = chosen_tasks(given.tasks, given.data)
    workers = Workers.of(given.processes, given.device, given.threads)
    settings = tuning(given, workers)
    inputs = read_inputs(chosen, given.data, models, settings)
    output = Path(given.output)
    what = {"command": "glue", "grid": given.grid, **workers.facts, **asdict(settings)}
    claim(output, what, {name: m.identity for name, m in inputs.models.items()}, inputs.identities)
    command = shlex.join(["distilfast", "glue", *arguments])
    scores = run(inputs, settings, range(given.seeds), workers, output, grid=given.grid)
    write(scores, given.data, what, output, command)
    return 0


def run(
    inputs: Inputs,
    settings: FineTuning,
    seeds: Sequence[int],
    workers: Workers,
    output: Path,
    *,
    grid: bool = False,
) -> dict[str, dict[str, list[Result]]]:
    """Fine-tune every model on every task from every seed.

    Return the results by model and task, one for each seed. With ``grid``, they are those of the
    setting with the best median.
    """
    points = _grid_points(settings) if grid else {"": settings}
    store = TokenStore(output / "tokens")
    wanted: dict[tuple[str, str, str], list[Job]] = {}
    for (name, model), (task_name, task) in itertools.product(
        inputs.models.items(), inputs.tasks.items()
    ):
        files, tokens = store.files(inputs.splits[task_name], task, model.tokenizer, settings)
        for point, chosen in points.items():
            work = tokens * (chosen.epochs or task.epochs) * model.work
            wanted[name, task_name, point] = [
                Job(
                    f"scores/{slug(name)}/{task_name}/{point}seed-{seed}",
                    work,
                    fine_tune,
                    (model.source, task, files, model.tokenizer.pad_token_id, chosen, seed),
                    {"seed": seed, "settings": asdict(chosen)},
                )
                for seed in seeds
            ]
    every = [job for some in wanted.values() for job in some]
    results = jobs.run(every, output, workers, "glue")
    store.remove()
    found: dict[str, dict[str, list[Result]]] = {name: {} for name in inputs.models}
    for (name, task_name, _), some in wanted.items():
        these = [results[job.name] for job in some]
        best = found[name].get(task_name)
        if best is None or median_score(these) > median_score(best):
            found[name][task_name] = these
    return found


def _grid_points(settings: FineTuning) -> dict[str, FineTuning]:
    points = [
        replace(settings, batch_size=batch_size, learning_rate=rate, epochs=epochs)
        for batch_size, rate, epochs in itertools.product(*GRID)
    ]
    return {f"{p.batch_size}-{p.learning_rate:g}-{p.epochs}/": p for p in points}


def write(
    scores: Mapping[str, Mapping[str, Sequence[Result]]],
    data: str,
    what: Mapping[str, Any],
    output: Path,
    command: str,
) -> None:
    """Write results.json and report.html, and print the table.

    They cover these models, and those that earlier commands have left in the folder.
    """
    seeds = len(next(iter(next(iter(scores.values())).values())))
    settings = json.loads((output / "settings.json").read_text(encoding="utf-8"))
    known = {name: tasks.find(name, data) for name in settings["data"]}
    if not what["grid"]:
        scores = recorded(output, settings["models"], known, seeds)
    results = {
        name: {task: summary(known[task], found) for task, found in of_model.items()}
        for name, of_model in scores.items()
    }
    jobs.write_json(output / "results.json", results)
    title = "GLUE" if set(known) & set(GLUE) else "Tasks"
    title += ": best of BERT's grid on the development sets" if what["grid"] else ""
    # The table shows the tasks that all models have; the rest is in results.json.
    shown = [t for t in known.values() if all(t.name in found for found in results.values())]
    made = table(results, shown, title, seeds)
    print(markdown(made))
    report = Report(
        title=f"{title}: {', '.join(results)}",
        lead=lead(results, [task.name for task in shown]),
        facts=facts(what),
        config=yaml.safe_dump(settings),
        tables=[made],
        charts=[
            Chart(task.name, task.metric, {n: r[task.name]["scores"] for n, r in results.items()})
            for task in shown
        ],
        commands=[command],
    )
    print(f"\nreport: {write_report(report, output / 'report.html')}")


def recorded(
    output: Path, models: Sequence[str], known: Mapping[str, Task], seeds: int
) -> dict[str, dict[str, list[Result]]]:
    """Return the folder's results by model and task, if there is one for every seed."""
    found: dict[str, dict[str, list[Result]]] = {}
    for name, task in itertools.product(models, known):
        folder = output / "scores" / slug(name) / task
        files = [folder / f"seed-{seed}.json" for seed in range(seeds)]
        if all(file.is_file() for file in files):
            results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            found.setdefault(name, {})[task] = results
    return found


def lead(results: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> str:
    """Return one sentence that sums up the figures."""
    macros = {n: macro({t: found[t]["median"] for t in known}) for n, found in results.items()}
    (first, best), *others = macros.items()
    said = [f"{short(first)} scores {best:.1f}"]
    said += [f"{short(n)} {m:.1f} ({m / best:.1%} of it)" for n, m in others if best]
    return ", ".join(said) + f", the mean over {counted(len(known), 'task')}."
