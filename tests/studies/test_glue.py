"""`distilfast glue`: the files that it leaves, the table, what is resumed and what is refused."""

from __future__ import annotations

import itertools
import json
import pickle
import re
import shutil
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, make_task, make_teacher

from distilfast import cli, tasks
from distilfast.config import ConfigError
from distilfast.report import markdown
from distilfast.studies import figures, glue, inputs, jobs
from distilfast.tasks import GLUE, TASKS, Task, fine_tuning
from distilfast.tasks.fine_tuning import FineTuning

pytestmark = pytest.mark.usefixtures("one_core")
TINY = ("--max_length", "24", "--learning_rate", "1e-3", "--batch_size", "8", "--epochs", "1",
        "--precision", "fp32", "--processes", "1")  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models and two tasks; copied by the tests that change them."""
    folder = tmp_path_factory.mktemp("glue")
    make_teacher(folder / "one", n_layers=1)
    make_teacher(folder / "two", n_layers=1, seed=1)
    make_task(folder / "data" / "words", n_train=24, n_dev=12)
    make_task(folder / "data" / "SST-2", n_train=24, n_dev=12)
    return folder


def command(place: Path, *changes: str, models: tuple[str, ...] = ("one", "two")) -> list[str]:
    """Of some models on one task from two seeds; later flags take the place of these."""
    given = [f"{name}={place / name}" for name in models]
    there = ("--data", str(place / "data"), "--tasks", "words", "--seeds", "2", *TINY)
    return ["glue", "--model", *given, *there, "--output", str(place / "out"), *changes]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by path."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


# --- From end to end ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The place with what a run has left."""
    folder = tmp_path_factory.mktemp("finished") / "place"
    shutil.copytree(place, folder)
    assert cli.main(command(folder)) == 0
    return folder


@pytest.fixture
def copy(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "place"))


def scores(out: Path) -> dict[str, Any]:
    """What the jobs have left, times apart."""
    found = {}
    for file in sorted((out / "scores").rglob("*.json")):
        found[str(file.relative_to(out))] = json.loads(file.read_text())
        assert found[str(file.relative_to(out))].pop("train_time_s") > 0
    return found


def test_run_leaves_results_a_table_and_a_page(finished: Path) -> None:
    out = finished / "out"
    assert sorted(p.name for p in out.iterdir()) == [
        "report.html",
        "report.json",
        "results.json",
        "scores",
        "settings.json",
    ]
    results = json.loads((out / "results.json").read_text())
    assert list(results) == ["one", "two"]
    by_file = scores(out)
    assert len(by_file) == 4
    for name, found in results.items():
        entry = found["words"]
        assert entry["metric"] == "accuracy"
        assert entry["scores"] == [
            by_file[f"scores/{name}/words/seed-{seed}.json"]["score"] for seed in (0, 1)
        ]
        assert entry["median"] == statistics.median(entry["scores"])
        assert entry["stdev"] == pytest.approx(statistics.stdev(entry["scores"]))
    settings = json.loads((out / "settings.json").read_text())
    assert (settings["learning_rate"], settings["epochs"], settings["device"]) == (1e-3, 1, "cpu")
    assert set(settings["models"]) == {"one", "two"}
    assert set(settings["data"]) == {"words"}


def test_score_is_that_of_a_model_trained_by_hand(finished: Path) -> None:
    import transformers

    data, source = str(finished / "data"), str(finished / "two")
    task = tasks.find("words", data)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    train, dev = (tasks.encode(e, tokenizer, 24) for e in tasks.read(task, data).values())
    settings = FineTuning(1e-3, batch_size=8, epochs=1, max_length=24)
    model = fine_tuning.load(source, task, 1, 24)
    fine_tuning.fine_tune(model, train, task, settings, 1, pad_token=0)
    score = task.score(dev.labels, fine_tuning.predict(model, dev, settings, pad_token=0))
    found = json.loads((finished / "out/scores/two/words/seed-1.json").read_text())
    assert found["metrics"] == {"dev": score}
    assert found["settings"] == asdict(settings)


def test_what_is_missing_alone_is_run_again_to_the_same_bits(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy / "out"
    before, results = scores(out), json.loads((out / "results.json").read_text())
    lost = out / "scores/one/words/seed-1.json"
    lost.unlink()
    (out / "results.json").unlink()
    times = {p: p.stat().st_mtime_ns for p in (out / "scores").rglob("*.json")}
    assert cli.main(command(copy)) == 0
    assert scores(out) == before
    assert {p: p.stat().st_mtime_ns for p in times} == times
    again = json.loads((out / "results.json").read_text())
    for found in (results, again):
        found["one"]["words"].pop("train_time_s")  # one of the two times is new
    assert again == results
    printed = capsys.readouterr().out
    assert "| model | words | of one |" in printed
    assert f"report: {out / 'report.html'}" in printed


# --- With a job that takes no time ----------------------------------------------------------------

Calls = list[tuple[str, str, FineTuning, int]]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """A job that scores a model by its settings; what it was called with."""
    seen: Calls = []

    def job(
        source: str,
        task: Task,
        files: Mapping[str, str],
        pad_token: int,
        settings: FineTuning,
        seed: int,
        **_: Any,
    ) -> dict[str, Any]:
        seen.append((Path(source).name, task.name, settings, seed))
        epochs = settings.epochs or task.epochs
        score = 90 - abs(settings.batch_size - 16) - 1e6 * abs(settings.learning_rate - 3e-5)
        metrics = {split: {"accuracy": 0.0, "score": score + epochs + seed} for split in task.dev}
        return {
            "score": metrics[task.dev[0]]["score"],
            "metrics": metrics,
            "seed": seed,
            "train_time_s": 1.0,
            "settings": asdict(settings),
        }

    monkeypatch.setattr(glue, "fine_tune", job)
    return seen


def test_stopped_run_goes_on(
    place: Path,
    tmp_path: Path,
    calls: Calls,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    job = glue.fine_tune

    def stop(*arguments: Any, **keywords: Any) -> Any:
        if len(calls) == 2:
            raise KeyboardInterrupt
        return job(*arguments, **keywords)

    given = command(place, "--output", str(tmp_path / "out"))
    with monkeypatch.context() as stopping:
        stopping.setattr(glue, "fine_tune", stop)
        assert cli.main(given) == 130
    assert "what is done is kept" in capsys.readouterr().err
    assert not (tmp_path / "out" / "results.json").exists()
    assert cli.main(given) == 0
    assert [(name, seed) for name, _, _, seed in calls] == [
        ("one", 0),
        ("one", 1),
        ("two", 0),
        ("two", 1),
    ]


def test_table_keeps_what_earlier_commands_left(
    copy: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    make_teacher(copy / "three", n_layers=1, seed=2)
    assert cli.main(command(copy, models=("three",))) == 0
    results = json.loads((copy / "out" / "results.json").read_text())
    assert list(results) == ["one", "two", "three"]
    assert {name for name, *_ in calls} == {"three"}
    shown = [
        line.split("|")[1].strip() for line in capsys.readouterr().out.split("\n") if "|" in line
    ]
    assert shown == ["model", "---", "one", "two", "three"]
    # one of them gets a third seed: the others have none, and are not shown beside it
    calls.clear()
    assert cli.main(command(copy, "--seeds", "3", models=("one",))) == 0
    assert [(name, seed) for name, _, _, seed in calls] == [("one", 2)]
    results = json.loads((copy / "out" / "results.json").read_text())
    assert {name: len(found["words"]["scores"]) for name, found in results.items()} == {"one": 3}


def test_models_and_tasks_are_added(copy: Path, calls: Calls) -> None:
    make_teacher(copy / "three", n_layers=1, seed=2)
    before = scores(copy / "out")
    given = command(copy, "--tasks", "words,sst2", models=("one", "two", "three"))
    assert cli.main(given) == 0
    assert sorted({(name, task) for name, task, _, _ in calls}) == [
        ("one", "SST-2"),
        ("three", "SST-2"),
        ("three", "words"),
        ("two", "SST-2"),
    ]
    assert scores(copy / "out").items() >= before.items()
    results = json.loads((copy / "out" / "results.json").read_text())
    assert list(results) == ["one", "two", "three"]
    assert all(list(found) == ["words", "SST-2"] for found in results.values())
    settings = json.loads((copy / "out" / "settings.json").read_text())
    assert set(settings["models"]) == set(results)
    assert set(settings["data"]) == {"words", "SST-2"}


def test_grid_is_that_of_bert_and_says_so(
    place: Path, tmp_path: Path, calls: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny = ("--max_length", "24", "--precision", "fp32", "--processes", "1", "--grid")
    given = ["glue", "--model", f"one={place / 'one'}", "--data", str(place / "data")]
    given += ["--tasks", "words", "--seeds", "2", "--output", str(tmp_path / "out"), *tiny]
    assert cli.main(given) == 0
    tried = [(s.batch_size, s.learning_rate, s.epochs, seed) for _, _, s, seed in calls]
    grid = itertools.product((16, 32), (2e-5, 3e-5, 5e-5), (2, 3, 4), (0, 1))
    assert sorted(tried, key=str) == sorted(grid, key=str)
    entry = json.loads((tmp_path / "out" / "results.json").read_text())["one"]["words"]
    best = {k: entry["settings"][k] for k in ("batch_size", "learning_rate", "epochs")}
    assert best == {"batch_size": 16, "learning_rate": 3e-5, "epochs": 4}
    assert entry["scores"] == [94, 95]
    assert "best of BERT's grid" in (tmp_path / "out" / "report.html").read_text().replace(
        "&#39;", "'"
    )
    # a folder of the one is not gone on with by the other
    capsys.readouterr()
    assert cli.main([*given[:-1], "--batch_size", "16"]) == 2
    assert "differs in grid (True, now False)" in capsys.readouterr().err


def test_jobs_can_be_sent_to_processes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent = []

    def run(some: Any, *_: Any) -> Any:
        sent.extend(pickle.loads(pickle.dumps(list(some))))
        raise ConfigError("enough")

    monkeypatch.setattr(jobs, "run", run)
    assert cli.main(command(place, "--output", str(tmp_path / "out"))) == 2
    assert [job.name for job in sent] == [
        f"scores/{name}/words/seed-{seed}" for name in ("one", "two") for seed in (0, 1)
    ]
    assert all(job.work > 0 for job in sent)


def test_loss_that_is_not_finite_is_said_in_one_line(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def diverge(*_: Any, **__: Any) -> Any:
        raise FloatingPointError("words: the loss of step 3 is nan")

    monkeypatch.setattr(glue, "fine_tune", diverge)
    assert cli.main(command(place, "--output", str(tmp_path / "out"))) == 2
    error = capsys.readouterr().err
    assert error.startswith("distilfast: scores/one/words/seed-0: words: the loss of step 3 is nan")
    assert error.count("\n") == 1


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], calls: Calls
) -> Callable[[list[str]], str]:
    """Runs a command that has to be refused before anything is written; its one line."""

    def call(given: list[str]) -> str:
        before = contents(tmp_path)
        capfd.readouterr()
        assert cli.main(given) == 2
        out, err = capfd.readouterr()
        assert out == ""
        assert err.startswith("distilfast: ")
        assert err.count("\n") == 1, err
        assert contents(tmp_path) == before
        assert not calls
        return err.removeprefix("distilfast: ").strip()

    return call


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--epochs", "2"), "epochs (1, now 2)"),
        (("--learning_rate", "2e-3"), "learning_rate (0.001, now 0.002)"),
        (("--batch_size", "16"), "batch_size (8, now 16)"),
        (("--max_length", "16"), "max_length (24, now 16)"),
        (("--weight_decay", "0.1"), "weight_decay (0.0, now 0.1)"),
        (("--max_grad_norm", "0"), "max_grad_norm (1.0, now 0.0)"),
        (("--precision", "bf16"), "precision ('fp32', now 'bf16')"),
    ],
    ids=lambda x: x[0] if isinstance(x, tuple) else "",
)
def test_figures_of_other_settings_are_not_mixed(
    changes: tuple[str, ...], said: str, copy: Path, refused: Callable[[list[str]], str]
) -> None:
    line = refused(command(copy, *changes))
    assert line.startswith("--output: expected a new folder or figures of the same settings")
    assert line.endswith(f"differs in {said}")


def test_other_data_and_other_weights_under_the_same_name_are_refused(
    copy: Path, refused: Callable[[list[str]], str]
) -> None:
    dev = copy / "data" / "words" / "dev.tsv"
    text = dev.read_text()
    dev.write_text(text + "the river\t1\n")
    assert refused(command(copy)).endswith("differs in the files of words")
    dev.write_text(text)
    shutil.copytree(copy / "two", copy / "one", dirs_exist_ok=True)
    assert refused(command(copy)).endswith("differs in the files of one")


def test_folder_of_something_else_is_refused(
    copy: Path, refused: Callable[[list[str]], str]
) -> None:
    (copy / "thesis").mkdir()
    (copy / "thesis" / "chapter.txt").write_text("dear to someone")
    for name in ("thesis", "thesis/chapter.txt"):
        line = refused(command(copy, "--output", str(copy / name)))
        assert re.match("--output: expected a (new folder, got|folder, got the file) ", line)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"command": "glue"}', "\xff"])
def test_damaged_settings_are_refused(
    text: str, copy: Path, refused: Callable[[list[str]], str]
) -> None:
    file = copy / "out" / "settings.json"
    file.write_bytes(text.encode("latin-1"))
    assert refused(command(copy)).startswith(f"{file}: expected the settings of `distilfast glue`")


def test_folder_of_another_command_is_refused(
    copy: Path, refused: Callable[[list[str]], str]
) -> None:
    file = copy / "out" / "settings.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "command": "ablate"}))
    assert "of `distilfast ablate`" in refused(command(copy))


@pytest.mark.parametrize("content", ["{}", '{"score": 1.0}', "other seed", "other settings"])
def test_mixed_result_files_are_refused(
    content: str, copy: Path, calls: Calls, capfd: pytest.CaptureFixture[str]
) -> None:
    """A file of another run, under the name of one of this."""
    file = copy / "out" / "scores" / "one" / "words" / "seed-1.json"
    found = json.loads(file.read_text())
    if content == "other seed":
        content = json.dumps({**found, "seed": 0})
    if content == "other settings":
        content = json.dumps({**found, "settings": {**found["settings"], "epochs": 4}})
    file.write_text(content)
    capfd.readouterr()
    assert cli.main(command(copy)) == 2
    out, err = capfd.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith(f"distilfast: {file}: expected ")


def test_models_that_would_share_a_name_or_files_are_refused(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[list[str]], str],
) -> None:
    for name in ("a/b", "a-b"):
        shutil.copytree(place / "one", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    rest = command(place, "--output", str(tmp_path / "out"), models=())[2:]
    for models in (["x=a/b", "x=a-b"], ["a-b", "a-b"]):
        line = refused(["glue", "--model", *models, *rest])
        assert line == f"--model: expected each name once, got {models[0].split('=')[0]!r} twice"
    line = refused(["glue", "--model", "a/b", "a-b", *rest])
    assert line.startswith("--output: expected names that differ as folders, got 'a/b' and 'a-b'")


def test_model_added_later_does_not_take_over_anothers_files(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    for name in ("a/b", "a-b"):
        shutil.copytree(place / "one", tmp_path / name)
    monkeypatch.chdir(tmp_path)
    rest = command(place, "--output", str(tmp_path / "out"), models=())[2:]
    assert cli.main(["glue", "--model", "a/b", *rest]) == 0
    assert len(calls) == 2
    assert cli.main(["glue", "--model", "a-b", *rest]) == 2
    assert cli.main(["glue", "--model", "other=a-b", *rest]) == 0
    assert len(calls) == 4


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--tasks", "words,,sst2"), "--tasks: expected"),
        (("--tasks", "words,words"), "--tasks: expected"),
        (("--tasks", "SST-2,sst2"), "--tasks: expected each task once, got 'SST-2,sst2'"),
        (("--tasks", "sst3"), "--tasks: expected one of CoLA, MNLI"),
        (("--tasks", "CoLA"), "--data: expected the folder CoLA in"),
        (("--data", "nowhere.d"), "--data: expected an existing file or folder"),
        (("--data", "glue", "--tasks", "SST-2"), "--data: expected a folder or a name that"),
        (("--output", "/proc/nothing"), "--output: expected a folder that can be written"),
        (("--seeds", "0"), "--seeds: expected a whole number from 1, got '0'"),
        (("--seeds", "two"), "--seeds: expected a whole number from 1, got 'two'"),
        (("--learning_rate", "fast"), "--learning_rate: expected a number, got 'fast'"),
        (("--learning_rate", "nan"), "--learning_rate: expected a number > 0, got nan"),
        (("--max_length", "65"), "--max_length: expected at most 64"),
        (("--precision", "fp16"), "--precision: expected one of auto, bf16, fp32"),
        (("--grid",), "--grid: expected no --epochs, --learning_rate or --batch_size beside it"),
        (("--nonsense",), "--nonsense: unknown flag"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)  # fmt: skip
def test_what_cannot_be_run_is_refused(
    changes: tuple[str, ...],
    said: str,
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[list[str]], str],
) -> None:
    monkeypatch.chdir(tmp_path)
    given = command(place, "--output", str(tmp_path / "out"), *changes)
    assert refused(given).startswith(said)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("nowhere", "--model: expected an existing file or folder, got"),
        ("empty", "--model: expected a folder with config.json, got"),
        ("fine-tuned", "--model: expected a model before fine-tuning, got 'wrong', after it"),
        ("three classes", "--model: "),
        ("no tokenizer", "--model: expected a fast tokenizer"),
        ("few embeddings", "--model: "),
        ("damaged", "--model: "),
    ],
)
def test_model_that_cannot_be_fine_tuned_is_refused(
    wrong: str,
    said: str,
    place: Path,
    tmp_path: Path,
    refused: Callable[[list[str]], str],
) -> None:
    import transformers

    folder = tmp_path / "wrong"
    kind = transformers.AutoModelForSequenceClassification
    if wrong == "empty":
        folder.mkdir()
    elif wrong == "few embeddings":
        make_teacher(folder, n_layers=1, words=WORDS[:-9])
        for file in place.joinpath("one").glob("*token*"):
            shutil.copy(file, folder)
    elif wrong != "nowhere":
        shutil.copytree(place / "one", folder)
    if wrong in ("fine-tuned", "three classes"):
        n = 2 if wrong == "fine-tuned" else 3
        kind.from_pretrained(place / "one", num_labels=n).save_pretrained(folder)
    if wrong == "no tokenizer":
        for file in (*folder.glob("*token*"), folder / "vocab.txt"):
            file.unlink()
    if wrong == "damaged":
        (folder / "model.safetensors").write_bytes(b"no weights")
    given = command(place, "--output", str(tmp_path / "out"))
    given[2] = f"wrong={folder}"
    assert refused(given).startswith(said)


# --- The table ------------------------------------------------------------------------------------


def entry(task: str, *scores: float) -> dict[str, Any]:
    return {"metric": TASKS[task].metric, **figures.over_seeds(list(scores))}


def made_up(shift: float = 0.0, names: Any = GLUE) -> dict[str, Any]:
    """50, 52, ... 66 on the nine tasks, three seeds each."""
    return {n: entry(n, *(50 + 2 * i + shift + d for d in (1, -2, 0))) for i, n in enumerate(names)}


def rows(table: Any) -> dict[str, dict[str, str]]:
    return {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}


def test_table_has_both_macros_the_share_and_the_published_rows() -> None:
    results = {"runs/big/model": made_up(), "small": made_up(-5.8)}
    table = figures.table(results, list(GLUE.values()), "GLUE", 3)
    assert table.columns == ["model", "score", "without WNLI", *GLUE, "of big"]
    found = rows(table)
    # (50 + ... + 66) / 9 and (50 + ... + 64) / 8; the standard deviation of 1, -2, 0
    assert found["big"]["score"] == "58.0"
    assert found["big"]["without WNLI"] == "57.0"
    assert found["big"]["MNLI"] == "52.0 ± 1.5"
    assert found["big"]["of big"] == "100.0%"
    assert found["small"]["score"] == "52.2"
    assert found["small"]["of big"] == "90.0%"  # 52.2 / 58
    published = [row[0] for i, row in enumerate(table.rows) if i in table.published]
    assert published == ["ELMo", "BERT-base", "DistilBERT"]
    assert [list(found[n].values())[1:-1] for n in published] == [
        "68.7 70.2 44.1 68.6 76.6 71.1 86.2 53.4 91.5 70.4 56.3".split(),
        "79.5 82.8 56.3 86.7* 88.6 91.8 89.6 69.3 92.7 89.0 53.5".split(),
        "77.0 79.6 51.3 82.2 87.5 89.2 88.5 59.9 91.3 86.9 56.3".split(),
    ]
    assert {found[n]["of big"] for n in published} == {""}
    assert "* The published MNLI of BERT-base, 86.7, does not give" in table.caption
    assert "84.7 does" in table.caption
    assert "Published: Sanh et al. 2019" in table.caption
    assert "Medians of 3 seeds" in table.caption
    assert "MRPC: mean of accuracy and F1" in table.caption
    text = markdown(table)
    assert "| big | 58.0 | 57.0 |" in text
    assert "| ELMo (published) | 68.7 | 70.2 |" in text


def test_table_of_one_model_and_one_task_has_no_macro_and_no_share() -> None:
    table = figures.table({"a": {"CoLA": entry("CoLA", 41.26)}}, [GLUE["CoLA"]], "GLUE", 1)
    assert table.columns == ["model", "CoLA"]
    assert table.rows[0] == ["a", "41.3"]
    assert [row[1] for row in table.rows[1:]] == ["44.1", "56.3", "51.3"]
    assert "seed" in table.caption
    assert "MNLI" not in table.caption


def test_published_macro_of_some_tasks_is_theirs() -> None:
    names = ["CoLA", "WNLI", "SST-2"]
    table = figures.table({"a": made_up(names=names)}, [GLUE[n] for n in names], "GLUE", 3)
    found = rows(table)
    assert found["DistilBERT"]["score"] == f"{(51.3 + 56.3 + 91.3) / 3:.1f}"
    assert found["DistilBERT"]["without WNLI"] == f"{(51.3 + 91.3) / 2:.1f}"
    order = dict(zip(GLUE, reversed(GLUE.values()), strict=True)).values()
    turned = figures.table({"a": made_up()}, list(order), "GLUE", 3)
    assert rows(turned)["BERT-base"]["score"] == "79.5"


def test_own_task_and_imdb_have_the_published_figures_that_there_are() -> None:
    own = Task("mine", ("sentence",))
    table = figures.table({"a": {"mine": entry("WNLI", 80, 81)}}, [own], "GLUE", 2)
    assert len(table.rows) == 1
    assert table.published == []
    table = figures.table({"a": {"IMDb": entry("IMDb", 90, 91)}}, [TASKS["IMDb"]], "GLUE", 2)
    assert {name: row["IMDb"] for name, row in rows(table).items()} == {
        "a": "90.5 ± 0.7",
        "BERT-base": "93.46",
        "DistilBERT": "92.82",
    }


def test_summary_has_the_parts_of_a_mean_and_both_of_mnli() -> None:
    def result(seed: int, **metrics: dict[str, float]) -> dict[str, Any]:
        first = next(iter(metrics.values()))
        common = {"seed": seed, "train_time_s": 1.0 + seed, "settings": {}}
        return {"score": first["score"], "metrics": metrics, **common}

    pair = {"accuracy": 70.0, "F1": 80.0, "score": 75.0}
    found = figures.summary(GLUE["MRPC"], [result(0, dev=pair), result(1, dev=pair)])
    assert (found["metric"], found["median"]) == ("mean of accuracy and F1", 75)
    assert (found["accuracy"]["scores"], found["F1"]["median"]) == ([70, 70], 80)
    results = [
        result(
            seed,
            dev_matched={"accuracy": 60.0 + seed, "score": 60.0 + seed},
            dev_mismatched={"accuracy": 62.0 + 3 * seed, "score": 62.0 + 3 * seed},
        )
        for seed in range(3)
    ]
    found = figures.summary(GLUE["MNLI"], results)
    assert (found["metric"], found["scores"], found["median"]) == ("accuracy", [60, 61, 62], 61)
    assert found["dev_mismatched"]["scores"] == [62, 65, 68]
    assert found["mean of dev_matched and dev_mismatched"]["scores"] == [61, 63, 65]
    assert found["train_time_s"] == 2


def test_names_and_their_models() -> None:
    given = ["bert-base-uncased", "x=runs/a/model", "runs/a=b/model"]
    assert inputs.named_models("--model", given) == {
        "bert-base-uncased": "bert-base-uncased",
        "x": "runs/a/model",
        "runs/a=b/model": "runs/a=b/model",
    }
    for wrong in ("=x", "x=", ""):
        with pytest.raises(ConfigError, match="--model: expected MODEL or NAME=MODEL"):
            inputs.named_models("--model", [wrong])


def test_scores_are_on_the_scale_of_the_published_ones() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    found = GLUE["SST-2"].score(torch.tensor([1.0, 0.0, 1.0, 0.0]), logits)
    assert found["score"] == 75
