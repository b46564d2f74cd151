"""`distilfast finetune`: distil on a task, from its labels and one teacher or an ensemble.

    distilfast finetune --teacher A B --student S --task SST-2 --data FOLDER --output runs/sst-2

A student learns from the teachers' soft targets at T and the hard labels at 1 (Hinton et al. 2015,
section 2). For comparison, another one learns from the labels alone. Teachers without the task's
head are fine-tuned first; the teachers' logits are computed once. One table shows all models.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from distilfast import tasks
from distilfast.errors import ConfigError, writable
from distilfast.models import fingerprint, identity
from distilfast.report import Chart, Report, Table, markdown, write_report
from distilfast.report.numbers import counted
from distilfast.studies import flags, jobs
from distilfast.studies.figures import difference, facts, over_seeds, short, with_spread
from distilfast.studies.flags import add_tuning_options, tuning
from distilfast.studies.folder import TokenStore, claim, read_tokens, slug
from distilfast.studies.inputs import Model, open_model
from distilfast.studies.jobs import Job, Result, Workers
from distilfast.studies.soft_targets import (
    COMBINED,
    Taught,
    Teaching,
    agreements,
    cached_logits,
    learn,
    logits,
    targets_of,
)
from distilfast.tasks import Encoded, Examples, Task
from distilfast.tasks.fine_tuning import FineTuning

LABELS, ENSEMBLE, TAUGHT = "labels alone", "ensemble", "taught by "


def main(arguments: Sequence[str]) -> int:
    """Run the command; return the exit status."""
    parser = flags.Parser("distilfast finetune", __doc__)
    add, default = parser.add_argument, Teaching(weights=(1.0,))
    add("--teacher", nargs="+", required=True, metavar="MODEL",
        help="fine-tuned first if it lacks the task's head; a name given twice is fine-tuned from "
        "two seeds")  # fmt: skip
    add("--student", required=True, metavar="MODEL")
    add("--task", required=True, help="a task of GLUE, IMDb, SQuAD, or your own in --data")
    add("--data", default="glue", metavar="FOLDER|glue",
        help="a folder in GLUE's official layout; glue: from the hub")  # fmt: skip
    add("--output", required=True, metavar="FOLDER")
    add("--seeds", type=flags.positive, default=5, help="the students' seeds: 0 to SEEDS - 1")
    add("--temperature", type=float, default=default.temperature, help="T of the soft targets")
    add("--kd_weight", type=float, default=default.kd_weight, help="weight of the soft targets")
    add("--ce_weight", type=float, default=default.ce_weight, help="weight of the hard labels")
    add("--ensemble", choices=("probability", "logit"), default=default.ensemble,
        help="probability: arithmetic mean of the teachers' distributions; logit: geometric "
        "mean")  # fmt: skip
    add("--weights", type=numbers, metavar="A,B", help="the teachers' weights in the ensemble")
    add("--transfer", metavar="FILE", help="a .tsv of unlabelled texts: more soft targets")
    add("--cache", metavar="FOLDER", help="for the teachers' logits; default: in --output")
    add_tuning_options(parser)
    given = parser.parse_args(arguments)

    task = tasks.find(given.task, given.data, "--task")
    weights = given.weights or (1.0,) * len(given.teacher)
    if len(weights) != len(given.teacher):
        raise ConfigError(f"--weights: expected {len(given.teacher)}, one a teacher, got {weights}")
    teaching = Teaching(
        given.temperature, given.kd_weight, given.ce_weight, given.ensemble, weights
    )
    workers = Workers.of(given.processes, given.device, given.threads)
    settings = tuning(given, workers)
    inputs = read_inputs(task, given, settings)
    output = Path(given.output)
    cache = Path(given.cache or output / "logits")
    writable("--cache" if given.cache else "--output", cache)
    what = {
        "command": "finetune",
        "task": task.name,
        **workers.facts,
        **asdict(settings),
        **asdict(teaching),
        "weights": list(weights),
        "teachers": [t.name for t in inputs.teachers],
    }
    identities = {"student": inputs.student.identity}
    identities |= {teacher.name: teacher.model.identity for teacher in inputs.teachers}
    claim(output, what, identities, {task.name: inputs.identity})
    run = Run(inputs, settings, teaching, workers, output, cache)
    rows = run(range(given.seeds))
    write(rows, inputs, what, output, shlex.join(["distilfast", "finetune", *arguments]))
    return 0


def numbers(text: str) -> tuple[float, ...]:
    """Parse 1,2 as numbers."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers as in 1,2, got {text!r}") from None


@dataclass(frozen=True)
class Teacher:
    """A teacher of the ensemble."""

    name: str  # in the table
    model: Model
    seed: int | None  # the seed to fine-tune it from; None: it has the task's head already


@dataclass(frozen=True)
class Inputs:
    """All inputs of the study, read and checked."""

    task: Task
    splits: dict[str, Examples]  # the task's sets, and "transfer" if given
    identity: str
    teachers: list[Teacher]
    student: Model


def read_inputs(task: Task, given: Any, settings: FineTuning) -> Inputs:
    """Read and check data and models. This writes no file.

    Raises:
        ConfigError: the first thing found wrong.
    """
    splits = tasks.read(task, given.data)
    if given.transfer:
        splits["transfer"] = tasks.read_texts(Path(given.transfer), task)
    content = json.dumps([vars(e) for e in splits.values()])
    student = open_model("--student", given.student, [task], settings)
    if student.fine_tuned:  # it may be another task with a head of the same shape
        raise ConfigError(
            f"--student: expected a model before fine-tuning, got {given.student!r}, after it"
        )
    teachers: list[Teacher] = []
    for name in given.teacher:
        known = {n: t.model for t, n in zip(teachers, given.teacher, strict=False)}.get(name)
        model = known or open_model("--teacher", name, [task], settings)
        if fingerprint(model.tokenizer) != fingerprint(student.tokenizer):
            raise ConfigError(
                f"--teacher: expected the student's tokenizer ({len(student.tokenizer)} tokens), "
                f"got another ({len(model.tokenizer)} tokens) in {name!r}"
            )
        seed = None if model.fine_tuned else given.teacher[: len(teachers)].count(name)
        label = short(name) + (f" from seed {seed}" if given.teacher.count(name) > 1 else "")
        if label in (LABELS, ENSEMBLE, "student", *(t.name for t in teachers)):
            raise ConfigError(
                f"--teacher: expected each fine-tuned model once, under its own name, got {name!r} "
                f"({label!r} is taken)"
            )
        teachers.append(Teacher(label, model, seed))
    return Inputs(task, splits, hashlib.sha256(content.encode()).hexdigest(), teachers, student)


@dataclass(frozen=True)
class Row:
    """A row of the table: one model, or a student from several seeds."""

    name: str
    results: list[Result]  # each with "score", "metrics" and "agreement"


@dataclass(frozen=True)
class Run:
    """Computes the study: teachers, their logits, students."""

    inputs: Inputs
    settings: FineTuning
    teaching: Teaching
    workers: Workers
    output: Path
    cache: Path

    def __call__(self, seeds: Sequence[int]) -> list[Row]:
        """Return the rows of the table, students first."""
        task, student = self.inputs.task, self.inputs.student
        store = TokenStore(self.output / "tokens")
        files, tokens = store.files(self.inputs.splits, task, student.tokenizer, self.settings)
        folders = self.fine_tune_teachers(files, tokens)
        logits = self.teachers_logits(files, folders)
        targets = self.targets(files, logits)
        rows = self.students(files, tokens, targets, seeds)
        examples = read_tokens(files[task.dev[0]])
        dev = [found[task.dev[0]] for found in logits]
        named = {t.name: [x] for t, x in zip(self.inputs.teachers, dev, strict=True)}
        if len(dev) > 1:
            named[ENSEMBLE] = dev
        for name, members in named.items():
            own = self.combined(members, examples, 1.0)
            score = tasks.score(task, examples, own)
            agreement = agreements(task, examples, own, targets_of(targets, task.dev[0]))
            result = {"score": score["score"], "metrics": score, "agreement": agreement}
            rows.append(Row(name, [result]))
        store.remove()
        return rows

    def fine_tune_teachers(self, files: Mapping[str, str], tokens: int) -> list[str]:
        """Fine-tune the teachers without the task's head; return where each teacher's model is."""
        task, wanted, folders = self.inputs.task, [], []
        for teacher in self.inputs.teachers:
            if teacher.seed is None:
                folders.append(teacher.model.source)
                continue
            name = f"teachers/{slug(teacher.name)}"
            folders.append(str(self.output / name / "model"))
            if not (self.output / name / "model" / "config.json").is_file():
                (self.output / name / "scores.json").unlink(missing_ok=True)  # train it again
            arguments = (teacher.model.source, task, files, teacher.model.tokenizer, self.settings)
            work = tokens * (self.settings.epochs or task.epochs) * teacher.model.work
            wanted.append(
                Job(
                    f"{name}/scores",
                    work,
                    learn,
                    (*arguments, teacher.seed, None, folders[-1]),
                    {"seed": teacher.seed},
                )
            )
        jobs.run(wanted, self.output, self.workers, "teachers")
        return folders

    def teachers_logits(
        self, files: Mapping[str, str], folders: Sequence[str]
    ) -> list[dict[str, Tensor]]:
        """Return each teacher's logits of all examples, by set of the data.

        They are read from disk if they were computed with the same model, data and settings.
        """
        task = self.inputs.task
        length = self.settings.max_length or task.max_length
        wanted, places = [], []
        for teacher, folder in zip(self.inputs.teachers, folders, strict=True):
            key = [identity(folder), self.inputs.identity, length, self.settings.precision]
            digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
            places.append(self.cache / f"{digest}.safetensors")
            if not places[-1].is_file():
                (self.cache / f"{digest}.json").unlink(missing_ok=True)
                arguments = (folder, task, files, teacher.model.tokenizer.pad_token_id)
                wanted.append(
                    Job(
                        digest,
                        teacher.model.work,
                        logits,
                        (*arguments, self.settings, str(places[-1])),
                    )
                )
        jobs.run(wanted, self.cache, self.workers, "logits")
        wanted_shapes = {
            split: read_tokens(file).empty_logits(task.outputs).shape
            for split, file in files.items()
        }
        return [cached_logits(place, wanted_shapes) for place in places]

    def combined(self, logits: Sequence[Tensor], examples: Encoded, temperature: float) -> Tensor:
        """Return the ensemble's logits of all examples, in the shape of one teacher's."""
        made = torch.empty_like(logits[0])
        for rows in torch.arange(len(examples)).split(COMBINED):
            batch = [examples.take(member, rows) for member in logits]
            examples.put(made, rows, self.teaching.combine(batch, self.inputs.task, temperature))
        return made

    def targets(
        self, files: Mapping[str, str], logits: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, str]:
        """Write the soft targets of the first teacher and of all; return their files."""
        from safetensors.torch import save_file

        first, temperature = self.inputs.teachers[0].name, self.teaching.temperature
        taught = {first: logits[:1]} | ({ENSEMBLE: logits} if len(logits) > 1 else {})
        splits = {split: read_tokens(file) for split, file in files.items()}
        targets = {}
        for name, members in taught.items():
            combined = {
                split: self.combined([m[split] for m in members], examples, temperature)
                for split, examples in splits.items()
            }
            targets[name] = str(self.output / "targets" / f"{slug(name)}.safetensors")
            Path(targets[name]).parent.mkdir(parents=True, exist_ok=True)
            save_file(combined, targets[name])
        return targets

    def students(
        self,
        files: Mapping[str, str],
        tokens: int,
        targets: Mapping[str, str],
        seeds: Sequence[int],
    ) -> list[Row]:
        """Train a student from each seed: on labels alone, and on each kind of soft targets."""
        task, student = self.inputs.task, self.inputs.student
        wanted: dict[str, list[Job]] = {}
        work = tokens * (self.settings.epochs or task.epochs) * student.work
        for name in (None, *targets):
            label = LABELS if name is None else f"{TAUGHT}{name}"
            wanted[label] = []
            for seed in seeds:
                folder = f"students/{slug(label)}"
                taught = Taught(name, dict(targets), self.teaching)
                kept = str(self.output / folder / "model") if seed == seeds[0] else None
                arguments = (student.source, task, files, student.tokenizer, self.settings)
                job = Job(
                    f"{folder}/seed-{seed}",
                    work,
                    learn,
                    (*arguments, seed, taught, kept),
                    {"seed": seed},
                )
                wanted[label].append(job)
        every = list(itertools.chain.from_iterable(wanted.values()))
        results = jobs.run(every, self.output, self.workers, "students")
        return [Row(label, [results[job.name] for job in some]) for label, some in wanted.items()]


def write(
    rows: Sequence[Row], inputs: Inputs, what: Mapping[str, Any], output: Path, command: str
) -> None:
    """Write results.json and report.html, and print the table."""
    results = {row.name: summary(inputs.task, row) for row in rows}
    jobs.write_json(output / "results.json", results)
    made = table(inputs, results, what)
    print(markdown(made))
    students = {n: r["scores"] for n, r in results.items() if len(r["scores"]) > 1}
    report = Report(
        title=f"{inputs.task.name}: {short(inputs.student.source)}",
        lead=lead(results),
        facts=facts(what),
        config=yaml.safe_dump(json.loads((output / "settings.json").read_text(encoding="utf-8"))),
        tables=[made],
        charts=[Chart("Student", inputs.task.metric, students)] if students else [],
        commands=[command],
    )
    print(f"\nreport: {write_report(report, output / 'report.html')}")


def summary(task: Task, row: Row) -> dict[str, Any]:
    """Return a row's figures, with a score for each seed, x 100."""
    agreement = {
        name: over_seeds([r["agreement"][name] for r in row.results])
        for name in row.results[0]["agreement"]
    }
    scores = over_seeds([r["score"] for r in row.results])
    entry = {"metric": task.metric, **scores, "agreement": agreement}
    if task.spans:
        entry["EM"] = over_seeds([r["metrics"]["EM"] for r in row.results])
    return entry


def table(
    inputs: Inputs, results: Mapping[str, Mapping[str, Any]], what: Mapping[str, Any]
) -> Table:
    """Tabulate score and fidelity of students, teachers and the ensemble."""
    taught_by = list(next(iter(results.values()))["agreement"])
    beside = ["EM"] if inputs.task.spans else []
    columns = ["model", inputs.task.metric, "change", "p", *beside]
    columns += [f"agrees with {name}" for name in taught_by]
    alone = results[LABELS]["scores"]
    rows = []
    for name, found in results.items():
        change = ["", ""]
        if name.startswith(TAUGHT):
            change = difference(found["scores"], alone).cells(1)
        cells = [with_spread(found["median"], found["stdev"]), *change]
        figures = (found[metric] for metric in beside)
        cells += [with_spread(figure["median"], figure["stdev"]) for figure in figures]
        for teacher in taught_by:
            fidelity = found["agreement"][teacher]
            shown = with_spread(fidelity["median"], fidelity["stdev"])
            cells.append("" if name == teacher else shown)
        rows.append([name, *cells])
    kind = {
        "classes": "examples of the teacher's class",
        "spans": "questions with the teacher's answer",
        "number": "correlation",
    }[inputs.task.kind]
    mean = {"probability": "arithmetic", "logit": "geometric"}[what["ensemble"]]
    number, seeds = inputs.task.kind == "number", len(results[LABELS]["scores"])
    soft = "squared error to the teacher's" if number else "KL at T = {temperature:g}"
    hard = "squared error to the labels" if number else "cross entropy at 1"
    shown = f"the medians of {seeds} seeds, ± standard deviation" if seeds > 1 else "one seed"
    notes = [
        f"{inputs.task.name}, development set, times 100. Of students {shown}. Agreement: {kind}, "
        "percent.",
        "A change is from the labels alone, seed by seed; p is of a two-sided paired t-test.",
        f"Loss: {{kd_weight:g}} x {soft} + {{ce_weight:g}} x {hard}.".format(**what),
    ]
    if len(inputs.teachers) > 1:
        notes.append(f"The ensemble is the {mean} mean of the teachers' distributions.")
    if "transfer" in inputs.splits:
        texts = counted(len(inputs.splits["transfer"].texts), "unlabelled text")
        notes.append(f"Students with a teacher learn from {texts} besides.")
    return Table("Distilled on a task", columns, rows, " ".join(notes))


def lead(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return one sentence that sums up the figures."""
    medians = {name: found["median"] for name, found in results.items()}
    alone = medians.pop(LABELS)
    taught = [f"{m:.1f} {n}" for n, m in medians.items() if n.startswith(TAUGHT)]
    return f"The student scores {alone:.1f} on {LABELS}, {' and '.join(taught)}."
