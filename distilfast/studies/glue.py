"""`distilfast glue`: models on the GLUE tasks, by the protocol of the DistilBERT paper.

    distilfast glue --model bert-base-uncased distilbert-base-uncased --data glue --seeds 5 \\
        --output runs/glue

Each model is fine-tuned on each task from each of the seeds 0, 1, ...; the table holds the medians.
What is done is kept in --output: the same command goes on, further models and tasks are added.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from distilfast import tasks
from distilfast.errors import ConfigError
from distilfast.models import fingerprint, loading_errors, quiet
from distilfast.progress import Bar
from distilfast.report import Chart, Report, Table, markdown, write_report
from distilfast.sources import lookup as names
from distilfast.studies import flags as options
from distilfast.studies import jobs
from distilfast.studies.jobs import Job, Result, Tell, Workers
from distilfast.tasks import GLUE, Encoded, Examples, Task
from distilfast.tasks import training as finetuning
from distilfast.tasks.training import FineTuning

# Sanh et al. 2019: table 1 (medians of 5 seeds on the development sets), its score and that without
# WNLI first, table 2 by column.
PUBLISHED: dict[str, tuple[tuple[float, float] | None, tuple[float, ...], dict[str, float]]] = {
    "ELMo": ((68.7, 70.2), (44.1, 68.6, 76.6, 71.1, 86.2, 53.4, 91.5, 70.4, 56.3), {}),
    "BERT-base": (
        (79.5, 82.75),
        (56.3, 86.7, 88.6, 91.8, 89.6, 69.3, 92.7, 89.0, 53.5),
        {"IMDb": 93.46, "SQuAD": 88.5, "SQuAD EM": 81.2},
    ),
    "DistilBERT": (
        (77.0, 79.6),
        (51.3, 82.2, 87.5, 89.2, 88.5, 59.9, 91.3, 86.9, 56.3),
        {"IMDb": 92.82, "SQuAD": 85.8, "SQuAD EM": 77.7},
    ),
    "DistilBERT, distilled again": (None, (), {"SQuAD": 86.9, "SQuAD EM": 79.1}),
}
MNLI_NOTE = (
    "* The published MNLI of BERT-base, 86.7, does not give its published score of 79.5; 84.7 does."
)
GRID = (16, 32), (2e-5, 3e-5, 5e-5), (2, 3, 4)  # batch, rate, epochs: Devlin et al. 2019, A.3


def main(arguments: Sequence[str]) -> int:
    """Run the command; the exit status."""
    parser = options.Parser("distilfast glue", __doc__)
    add = parser.add_argument
    add("--model", nargs="+", required=True, metavar="[NAME=]MODEL",
        help="folders or hub names, the teacher first")  # fmt: skip
    add("--seeds", type=options.positive, default=5, help="seeds 0 to SEEDS - 1")
    add("--grid", action="store_true",
        help="the best of BERT's grid of 18 settings on the development set")  # fmt: skip
    add_task_options(parser)
    add_tuning_options(parser)
    given = parser.parse_args(arguments)
    if given.grid and (given.epochs or given.learning_rate or given.batch_size):
        raise ConfigError("--grid: expected no --epochs, --learning_rate or --batch_size beside it")
    models = named_models("--model", given.model)
    chosen = chosen_tasks(given.tasks, given.data)
    workers = Workers.of(given.processes, given.device)
    settings = tuning(given, workers)
    inputs = read_inputs(chosen, given.data, models, settings)
    output = Path(given.output)
    what = {"command": "glue", "grid": given.grid, **workers.facts, **asdict(settings)}
    claim(output, what, {name: m.identity for name, m in inputs.models.items()}, inputs.identities)
    command = shlex.join(["distilfast", "glue", *arguments])
    scores = run(inputs, settings, range(given.seeds), workers, output, grid=given.grid)
    write(scores, given.data, what, output, command)
    return 0


# --- Options that finetune and ablate share -------------------------------------------------------


def add_task_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--data", default="glue", metavar="FOLDER|glue",
        help="a folder in GLUE's official layout, or glue: from the hub")  # fmt: skip
    add("--tasks", default="all", metavar="all|A,B",
        help=f"all: the nine of GLUE; else of {', '.join(tasks.TASKS)}, and one's own: folders "
        "with train.tsv and dev.tsv")  # fmt: skip
    add("--output", required=True, metavar="FOLDER")


def add_tuning_options(parser: argparse.ArgumentParser) -> None:
    default = FineTuning()
    add = parser.add_argument
    add("--learning_rate", type=float, help=f"default {default.learning_rate:g}")
    add("--batch_size", type=options.positive, help=f"default {default.batch_size}")
    add("--epochs", type=options.positive, help="default 3, of MRPC and WNLI 5, SQuAD 2")
    add("--max_length", type=options.positive, help="default 128 tokens, of IMDb 512, SQuAD 384")
    add("--weight_decay", type=float, help=f"default {default.weight_decay:g}")
    add("--max_grad_norm", type=float, help=f"default {default.max_grad_norm:g}; 0: never clipped")
    add("--precision", choices=("auto", "bf16", "fp32"), default="auto",
        help="auto: bf16 where the device computes in it")  # fmt: skip
    add("--processes", type=options.positive,
        help="jobs at a time; default: a process a GPU, or one for every four cores")  # fmt: skip
    add("--device", choices=("cpu", "cuda"), help="default: CUDA devices where there are any")


def tuning(given: argparse.Namespace, workers: Workers) -> FineTuning:
    """The settings given, the others at their defaults."""
    known = {key: value for key, value in vars(given).items() if key in FineTuning.__annotations__}
    changed = {key: value for key, value in known.items() if value is not None}
    if changed["precision"] == "auto":
        changed["precision"] = finetuning.best_precision(torch.device(workers.devices[0]))
    return FineTuning(**changed)


def named_models(key: str, given: Sequence[str]) -> dict[str, str]:
    """[NAME=]MODEL by name; the name is the model as given where there is none."""
    models: dict[str, str] = {}
    for entry in given:
        name, equals, source = entry.partition("=")
        name, source = (name, source) if equals and "/" not in name else (entry, entry)
        if not name or not source:
            raise ConfigError(f"{key}: expected MODEL or NAME=MODEL, got {entry!r}")
        if name in models:
            raise ConfigError(f"{key}: expected each name once, got {name!r} twice")
        models[name] = source
    return models


def chosen_tasks(given: str, data: str) -> list[Task]:
    wanted = list(GLUE) if given == "all" else options.names("--tasks", given)
    found = [tasks.find(name, data) for name in wanted]
    if len({task.name for task in found}) < len(found):
        raise ConfigError(f"--tasks: expected each task once, got {given!r}")
    return found


# --- Inputs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A model to start from."""

    source: str  # what transformers loads it from
    identity: str  # a hash of its files, or its name and commit on the hub
    tokenizer: Any
    work: int  # weights that take part in a token's forward
    fine_tuned: bool  # has a task's head already


@dataclass(frozen=True)
class Inputs:
    """All that the jobs need, read and checked."""

    models: dict[str, Model]
    tasks: dict[str, Task]
    splits: dict[str, dict[str, Examples]]  # by task, then by split
    identities: dict[str, str]  # by task, a hash of its splits


def read_inputs(
    chosen: Sequence[Task], data: str, models: Mapping[str, str], settings: FineTuning
) -> Inputs:
    """Read and check every task and every model. Writes nothing.

    Raises:
        ConfigError: the first thing found wrong.
    """
    splits = {task.name: tasks.read(task, data) for task in chosen}
    identities = {
        name: hashlib.sha256(json.dumps([vars(e) for e in found.values()]).encode()).hexdigest()
        for name, found in splits.items()
    }
    loaded = {
        name: open_model("--model", source, chosen, settings) for name, source in models.items()
    }
    for name, model in loaded.items():
        if model.fine_tuned:  # each task starts from the model as it was pretrained
            raise ConfigError(
                f"--model: expected a model before fine-tuning, got {name!r}, after it"
            )
    return Inputs(loaded, {task.name: task for task in chosen}, splits, identities)


def open_model(key: str, name: str, chosen: Sequence[Task], settings: FineTuning) -> Model:
    """Load a model once, for every task that it is to be fine-tuned on.

    Raises:
        ConfigError: it cannot be fine-tuned on one of them.
    """
    import transformers

    source = names.model_source(key, name)
    try:
        with quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    except loading_errors() as error:
        message = " ".join(str(error).split())
        raise ConfigError(
            f"{key}: the tokenizer of {name!r} cannot be loaded: {message}"
        ) from error
    empty = len(tokenizer) <= len(tokenizer.all_special_ids)  # made where no file of it is there
    if empty or not getattr(tokenizer, "is_fast", False) or tokenizer.pad_token_id is None:
        raise ConfigError(f"{key}: expected a fast tokenizer with a padding token in {name!r}")
    length = max(settings.max_length or task.max_length for task in chosen)
    for task in {(task.kind, task.outputs): task for task in chosen}.values():  # a head each
        model = finetuning.load(source, task, 0, length, key)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ConfigError(f"{key}: {name!r} has fewer embeddings than its tokenizer has tokens")
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    work = sum(p.numel() for p in model.parameters() if id(p) not in embedded)
    fine_tuned = finetuning.has_head(transformers.AutoConfig.from_pretrained(source))
    return Model(source, identity(source), tokenizer, work, fine_tuned)


def identity(source: str) -> str:
    """A hash of a folder's weights, configuration and tokenizer, or a hub name and its commit."""
    folder = Path(source)
    if not folder.is_dir():
        import transformers

        return f"{source}@{transformers.AutoConfig.from_pretrained(source)._commit_hash}"
    digest = hashlib.sha256()
    patterns = ("*.safetensors", "*.bin", "config.json", "tokenizer*.json", "vocab.*")
    for file in sorted({f for pattern in patterns for f in folder.glob(pattern)}):
        with file.open("rb") as opened:
            digest.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def claim(
    output: Path, what: Mapping[str, Any], models: Mapping[str, str], data: Mapping[str, str]
) -> None:
    """Make the folder this command's: settings.json says what decides its figures.

    Raises:
        ConfigError: the folder holds something else, or figures of other settings; nothing is
            written then.
    """
    file = output / "settings.json"
    wanted = {**what, "models": dict(models), "data": dict(data)}
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        if not file.is_file():
            raise ConfigError(
                f"--output: expected a new folder, got {str(output)!r} of something else"
            )
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            if before["command"] != what["command"]:
                raise ConfigError(
                    f"--output: expected a new folder or one of `distilfast {what['command']}`, "
                    f"got {str(output)!r} of `distilfast {before['command']}`"
                )
            kept = {key: before[key] for key in wanted}
            for part in ("models", "data"):
                kept[part] = {**wanted[part], **before[part]}
                wanted[part] = {**before[part], **wanted[part]}
        except ConfigError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(
                f"{file}: expected the settings of `distilfast {what['command']}`, got a damaged "
                f"file ({error!r})"
            ) from error
        differing = [
            *(f"{k} ({kept[k]!r}, now {wanted[k]!r})" for k in what if kept[k] != wanted[k]),
            *(f"the files of {k}" for part in ("models", "data") for k in wanted[part]
              if kept[part][k] != wanted[part][k]),
        ]  # fmt: skip
        if differing:
            raise ConfigError(
                f"--output: expected a new folder or figures of the same settings, got "
                f"{str(output)!r}, which differs in {', '.join(differing)}"
            )
    folders: dict[str, str] = {}
    for name in wanted["models"]:
        if (other := folders.setdefault(slug(name), name)) != name:
            raise ConfigError(
                f"--output: expected names that differ as folders, got {other!r} and {name!r}, "
                f"both {slug(name)!r} there"
            )
    jobs.write_json(file, wanted)


# --- The jobs -------------------------------------------------------------------------------------


def run(
    inputs: Inputs,
    settings: FineTuning,
    seeds: Sequence[int],
    workers: Workers,
    output: Path,
    *,
    grid: bool = False,
) -> dict[str, dict[str, list[Result]]]:
    """Fine-tune every model on every task from every seed; the results by model and task, a result
    a seed (with ``grid``, those of the setting with the best median)."""
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
        if best is None or _median(these) > _median(best):
            found[name][task_name] = these
    return found


def _grid_points(settings: FineTuning) -> dict[str, FineTuning]:
    points = [
        replace(settings, batch_size=batch_size, learning_rate=rate, epochs=epochs)
        for batch_size, rate, epochs in itertools.product(*GRID)
    ]
    return {f"{p.batch_size}-{p.learning_rate:g}-{p.epochs}/": p for p in points}


def slug(name: str) -> str:
    """A model's name as the name of a folder."""
    return re.sub(r"[^\w.=-]+", "-", name.strip("./")) or "model"


class TokenStore:
    """The splits as tokens on disk, made once for each tokenizer and read by all processes."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.made: dict[str, tuple[dict[str, str], int]] = {}

    def files(
        self, splits: Mapping[str, Examples], task: Task, tokenizer: Any, settings: FineTuning
    ) -> tuple[dict[str, str], int]:
        """The file of each split, and the tokens of the first."""
        from safetensors.torch import save_file

        key = f"{task.name}-{fingerprint(tokenizer)[:16]}"
        if key not in self.made:
            self.folder.mkdir(parents=True, exist_ok=True)
            files, tokens = {}, []
            for split, examples in splits.items():
                encode = tasks.encode_windows if task.spans else tasks.encode
                length = settings.max_length or task.max_length
                with Bar(f"tokens of {task.name}, {split}", len(examples.texts)) as bar:
                    made = encode(examples, tokenizer, length, bar.update)
                files[split] = str(self.folder / f"{key}-{split}.safetensors")
                save_file(made.tensors(), files[split])
                tokens.append(int(made.offsets[-1]))
            self.made[key] = files, tokens[0]
        return self.made[key]

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def read_tokens(file: str) -> Encoded:
    from safetensors.torch import load_file

    return tasks.encoded(load_file(file))


def fine_tune(
    source: str,
    task: Task,
    files: Mapping[str, str],
    pad_token: int,
    settings: FineTuning,
    seed: int,
    *,
    device: str,
    tell: Tell,
) -> Result:
    """A job: one model on one task from one seed, scored on the development sets."""
    splits = {split: read_tokens(file) for split, file in files.items()}
    length = settings.max_length or task.max_length
    model = finetuning.load(source, task, seed, length).to(device)
    began = time.monotonic()
    finetuning.fine_tune(
        model, splits["train"], task, settings, seed, pad_token=pad_token, tell=tell
    )
    seconds = time.monotonic() - began
    metrics = {}
    for split in task.dev:
        logits = finetuning.predict(model, splits[split], settings, pad_token=pad_token)
        metrics[split] = tasks.score(task, splits[split], logits)
    return {
        "score": metrics[task.dev[0]]["score"],
        "metrics": metrics,
        "seed": seed,
        "train_time_s": seconds,
        "settings": asdict(settings),
    }


# --- The table ------------------------------------------------------------------------------------


def write(
    scores: Mapping[str, Mapping[str, Sequence[Result]]],
    data: str,
    what: Mapping[str, Any],
    output: Path,
    command: str,
) -> None:
    """results.json, report.html, and the table on stdout: of these models, and of those that
    earlier commands have left in the folder."""
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
    # What all models have; the rest is in results.json.
    shown = [t for t in known.values() if all(t.name in found for found in results.values())]
    made = table(results, shown, title, seeds)
    print(markdown(made))
    report = Report(
        title=f"{title}: {', '.join(results)}",
        lead=lead(results, [task.name for task in shown]),
        facts={key: str(value) for key, value in what.items() if value is not None},
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
    """The results in the folder, by model and task, where there is one of every seed."""
    found: dict[str, dict[str, list[Result]]] = {}
    for name, task in itertools.product(models, known):
        folder = output / "scores" / slug(name) / task
        files = [folder / f"seed-{seed}.json" for seed in range(seeds)]
        if all(file.is_file() for file in files):
            results = [json.loads(file.read_text(encoding="utf-8")) for file in files]
            found.setdefault(name, {})[task] = results
    return found


def summary(task: Task, found: Sequence[Result]) -> dict[str, Any]:
    """A model's figures on a task: a score a seed, x 100."""
    entry: dict[str, Any] = {"metric": task.metric, **over_seeds([r["score"] for r in found])}
    names = [m for m in found[0]["metrics"][task.dev[0]] if m != "score"]
    if len(names) > 1:
        for name in names:
            entry[name] = over_seeds([r["metrics"][task.dev[0]][name] for r in found])
    for other in task.dev[1:]:
        both = [[r["metrics"][split]["score"] for split in (task.dev[0], other)] for r in found]
        entry[other] = over_seeds([pair[1] for pair in both])
        entry[f"mean of {task.dev[0]} and {other}"] = over_seeds([sum(p) / 2 for p in both])
    entry["train_time_s"] = statistics.median(r["train_time_s"] for r in found)
    entry["settings"] = found[0]["settings"]
    return entry


def over_seeds(scores: Sequence[float | None]) -> dict[str, Any]:
    """Scores, their median and standard deviation; one that is not defined is None, and left out
    of both."""
    defined = [s for s in scores if s is not None and math.isfinite(s)]
    shown = [s if s in defined else None for s in scores]
    median = statistics.median(defined) if defined else None
    return {"scores": shown, "median": median, "stdev": _stdev(defined)}


def _stdev(scores: Sequence[float]) -> float | None:
    return statistics.stdev(scores) if len(scores) > 1 else None


def _median(found: Sequence[Result]) -> float:
    return statistics.median(r["score"] for r in found)


def macro(medians: Mapping[str, float], with_wnli: bool = True) -> float:
    """The mean over the tasks; NaN without any."""
    counted = [score for task, score in medians.items() if with_wnli or task != "WNLI"]
    return statistics.fmean(counted) if counted else float("nan")


def table(
    results: Mapping[str, Mapping[str, Any]], chosen: Sequence[Task], title: str, n_seeds: int
) -> Table:
    """Medians and standard deviations, both macro scores, the share of the first model's score, and
    the published rows."""
    known = [task.name for task in chosen]
    split_wnli = "WNLI" in known and len(known) > 1
    several = len(known) > 1
    heads = ["score"] * several + ["without WNLI"] * split_wnli
    first = next(iter(results), "")
    exact_match = [task.name for task in chosen if task.spans]
    shown = [*known, *(f"{task} EM" for task in exact_match)]
    columns = ["model", *heads, *shown, *([f"of {short(first)}"] if len(results) > 1 else [])]
    rows = []
    for name, found in results.items():
        medians = {task: found[task]["median"] for task in known}
        cells = [f"{macro(medians):.1f}"] * several
        cells += [f"{macro(medians, False):.1f}"] * split_wnli
        figures = [found[task] for task in known] + [found[task]["EM"] for task in exact_match]
        cells += [with_spread(figure["median"], figure["stdev"]) for figure in figures]
        if len(results) > 1:
            whole = macro({task: results[first][task]["median"] for task in known})
            cells.append(f"{macro(medians) / whole:.1%}" if whole else "")
        rows.append([short(name), *cells])
    published = published_rows(known, shown, several, split_wnli)
    rows += [[*row, *([""] if len(results) > 1 else [])] for row in published]
    notes = [
        f"Medians of {n_seeds} seeds on the development sets, ± standard deviation, times 100."
        if n_seeds > 1
        else "One seed, on the development sets, times 100.",
        "; ".join(f"{task.name}: {task.metric}" for task in chosen) + ".",
    ]
    if several:
        both = ", with and without WNLI." if split_wnli else "."
        notes.append(f"Score is the mean of the tasks shown{both}")
    if published:
        notes.append("Published: Sanh et al. 2019, on the official development sets.")
    if "MNLI" in known:
        notes.append(MNLI_NOTE)
    ours = len(rows) - len(published)
    return Table(title, columns, rows, " ".join(notes), list(range(ours, len(rows))))


def published_rows(
    known: Sequence[str], shown: Sequence[str], several: bool, split_wnli: bool
) -> list[list[str]]:
    """Of the models that have a published figure for one of the tasks.

    Args:
        known: the tasks.
        shown: the columns of their figures.
    """
    rows = []
    for name, (scores, by_task, others) in PUBLISHED.items():
        figures = {**dict(zip(GLUE, by_task, strict=False)), **others}
        medians = {task: figures[task] for task in known if task in figures}
        if not medians:
            continue
        complete = set(medians) == set(known)
        whole = macro(medians) if complete else None
        without = macro(medians, False) if complete else None
        if scores and set(known) == set(GLUE):
            whole, without = scores  # which the published tasks need not give
        heads = [whole] * several + [without] * split_wnli
        cells = ["" if value is None else f"{value:.1f}" for value in heads]
        for column in shown:
            mark = "*" if (name, column) == ("BERT-base", "MNLI") else ""
            cells.append(f"{figures[column]}{mark}" if column in figures else "")
        rows.append([name, *cells])
    return rows


def with_spread(median: float | None, stdev: float | None) -> str:
    if median is None:
        return ""
    return f"{median:.1f}" if stdev is None else f"{median:.1f} ± {stdev:.1f}"


def short(name: str) -> str:
    """A model's name as a table shows it: a run's name for runs/X/model."""
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def lead(results: Mapping[str, Mapping[str, Any]], known: Sequence[str]) -> str:
    """One sentence: what the figures say."""
    macros = {n: macro({t: found[t]["median"] for t in known}) for n, found in results.items()}
    (first, best), *others = macros.items()
    said = [f"{short(first)} scores {best:.1f}"]
    said += [f"{short(n)} {m:.1f} ({m / best:.1%} of it)" for n, m in others if best]
    return ", ".join(said) + f", the mean over {len(known)} tasks."
