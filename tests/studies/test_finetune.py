"""`distilfast finetune`: students with labels alone, one teacher, an ensemble; what is cached."""

from __future__ import annotations

import json
import math
import pickle
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS, make_task, make_teacher
from safetensors.torch import load_file
from torch import Tensor

from distilfast import cli, tasks
from distilfast.config import ConfigError
from distilfast.losses import combine_teachers
from distilfast.studies import finetune, jobs, soft_targets
from distilfast.studies.figures import difference
from distilfast.studies.soft_targets import Teaching, agreements
from distilfast.tasks import GLUE, IGNORE_INDEX, encode, find, fine_tuning, read
from distilfast.tasks.fine_tuning import FineTuning

pytestmark = pytest.mark.usefixtures("one_core")
TINY = ("--max_length", "24", "--learning_rate", "1e-3", "--batch_size", "8", "--epochs", "1",
        "--precision", "fp32", "--processes", "1")  # fmt: skip
ROWS = [
    "labels alone",
    "taught by bert from seed 0",
    "taught by ensemble",
    "bert from seed 0",
    "bert from seed 1",
    "ensemble",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher without a head, a student, two teachers that have one, a task."""
    import transformers

    folder = tmp_path_factory.mktemp("finetune")
    make_teacher(folder / "bert", n_layers=2)
    make_teacher(folder / "small", n_layers=1, seed=1)
    for seed, name in enumerate(("headed", "other")):
        torch.manual_seed(seed)
        kind = transformers.AutoModelForSequenceClassification
        model = kind.from_pretrained(folder / "bert", num_labels=2)
        torch.nn.init.normal_(model.classifier.weight)
        shutil.copytree(folder / "bert", folder / name)
        model.save_pretrained(folder / name)
    make_task(folder / "data" / "words", n_train=24, n_dev=12)
    (folder / "texts.tsv").write_text("sentence\nthe river\na king and a queen\nred green blue\n")
    return folder


def command(place: Path, *changes: str, teachers: tuple[str, ...] = ("bert", "bert")) -> list[str]:
    """Two teachers, two seeds; later flags take the place of these."""
    given = ["finetune", "--teacher", *(str(place / name) for name in teachers)]
    given += ["--student", str(place / "small"), "--task", "words", "--seeds", "2", *TINY]
    given += ["--data", str(place / "data"), "--output", str(place / "out")]
    return [*given, *changes]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in a folder, by path."""
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): None if p.is_dir() else p.read_bytes() for p in paths}


def encoded(place: Path) -> dict[str, tasks.Encoded]:
    import transformers

    data = str(place / "data")
    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    return {k: encode(v, tokenizer, 24) for k, v in read(find("words", data), data).items()}


def says(model: Path, examples: tasks.Encoded) -> Tensor:
    """The logits of a saved model, by transformers."""
    import transformers

    kind = transformers.AutoModelForSequenceClassification
    loaded = kind.from_pretrained(model).eval()
    return fine_tuning.predict(loaded, examples, FineTuning(), pad_token=0)


def accuracy(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(-1) == labels).float().mean())


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


def test_table_has_students_teachers_and_the_ensemble(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = json.loads((copy / "out" / "results.json").read_text())
    assert list(results) == ROWS
    for name, found in results.items():
        assert found["metric"] == "accuracy"
        assert len(found["scores"]) == (2 if "labels" in name or "taught" in name else 1)
        assert list(found["agreement"]) == ["bert from seed 0", "ensemble"]
        assert all(len(a["scores"]) == len(found["scores"]) for a in found["agreement"].values())
    # once more: nothing is left to do, the table is printed again
    before = contents(copy / "out" / "students")
    assert cli.main(command(copy)) == 0
    assert contents(copy / "out" / "students") == before
    assert json.loads((copy / "out" / "results.json").read_text()) == results
    lines = capsys.readouterr().out.splitlines()
    head = "| model | accuracy | change | p | agrees with bert from seed 0 | agrees with ensemble |"
    start = lines.index(head)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in lines[start + 2 : start + 8]
    ]
    assert [row[0] for row in rows] == ROWS
    alone = results["labels alone"]["scores"]
    for name, _, change, p, *_ in rows:
        if name.startswith("taught"):
            scores = results[name]["scores"]
            found = difference(scores, alone)
            assert [change, p] == found.cells(1)
            assert found.mean == pytest.approx(statistics.fmean(scores) - statistics.fmean(alone))
        else:
            assert (change, p) == ("", "")
    assert not (copy / "out" / "tokens").exists()


def test_scores_and_fidelity_are_those_counted_by_hand(finished: Path) -> None:
    out, dev = finished / "out", encoded(finished)["dev"]
    results = json.loads((out / "results.json").read_text())
    teachers = [says(p, dev) for p in sorted((out / "teachers").glob("*/model"))]
    assert len(teachers) == 2
    assert not torch.equal(*teachers)  # from two seeds
    at_2 = (teachers[0] / 2).softmax(-1) + (teachers[1] / 2).softmax(-1)
    at_1 = teachers[0].softmax(-1) + teachers[1].softmax(-1)
    for i, logits in enumerate(teachers):
        found = results[f"bert from seed {i}"]
        assert found["scores"] == pytest.approx([accuracy(logits, dev.labels)])
    assert results["ensemble"]["scores"] == pytest.approx([accuracy(at_1, dev.labels)])
    for name, folder in (
        ("labels alone", "labels-alone"),
        ("taught by bert from seed 0", "taught-by-bert-from-seed-0"),
        ("taught by ensemble", "taught-by-ensemble"),
    ):
        student = says(out / "students" / folder / "model", dev)  # of the first seed
        found = results[name]
        assert found["scores"][0] == pytest.approx(accuracy(student, dev.labels))
        for teacher, target in (("bert from seed 0", teachers[0]), ("ensemble", at_2)):
            share = accuracy(student, target.argmax(-1))
            assert found["agreement"][teacher]["scores"][0] == pytest.approx(share)


def test_students_learn_from_the_distribution_of_the_teachers(finished: Path) -> None:
    """Rebuilt from the saved teachers: targets, then the student of seed 1."""
    out, splits = finished / "out", encoded(finished)
    teachers = [says(p, splits["train"]) for p in sorted((out / "teachers").glob("*/model"))]
    targets = load_file(out / "targets" / "ensemble.safetensors")
    assert set(targets) == {"train", "dev"}
    expected = combine_teachers(teachers, [1.0, 1.0], temperature=2.0)
    torch.testing.assert_close(targets["train"], expected)
    mean = ((teachers[0] / 2).softmax(-1) + (teachers[1] / 2).softmax(-1)) / 2
    torch.testing.assert_close((targets["train"] / 2).softmax(-1), mean)
    first = load_file(out / "targets" / "bert-from-seed-0.safetensors")
    torch.testing.assert_close(first["train"], teachers[0])
    task = find("words", str(finished / "data"))
    settings = FineTuning(1e-3, batch_size=8, epochs=1, max_length=24)
    for name, file in (("ensemble", targets), ("bert-from-seed-0", first)):
        student = fine_tuning.load(str(finished / "small"), task, 1, 24)
        soft = fine_tuning.SoftTargets(file["train"], 2.0, 0.5, 0.5)
        fine_tuning.fine_tune(
            student, splits["train"], task, settings, 1, pad_token=0, targets=soft
        )
        logits = fine_tuning.predict(student, splits["dev"], settings, pad_token=0)
        found = json.loads((out / f"students/taught-by-{name}/seed-1.json").read_text())
        assert found["score"] == task.score(splits["dev"].labels, logits)["score"]


def test_labels_alone_do_not_depend_on_the_teacher(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = command(finished, "--seeds", "1", "--output", str(tmp_path), teachers=("headed",))
    assert cli.main(given) == 0
    ours, theirs = (
        load_file(out / "students" / "labels-alone" / "model" / "model.safetensors")
        for out in (tmp_path, finished / "out")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # a teacher that has its head is taken as it is
    assert not (tmp_path / "teachers").exists()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["labels alone", "taught by headed", "headed"]
    dev = encoded(finished)["dev"]
    logits = says(finished / "headed", dev)
    assert results["headed"]["scores"] == pytest.approx([accuracy(logits, dev.labels)])


# --- The ensemble ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.0, 3.0), (0.0, 2.0)])
def test_ensemble_is_the_mean_of_distributions(
    weights: tuple[float, ...], temperature: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (3 * torch.randn(5, 3, generator=generator) for _ in range(2))
    u, v = (w / sum(weights) for w in weights)
    p, q = ((x / temperature).softmax(-1) for x in (a, b))
    arithmetic = u * p + v * q
    geometric = p**u * q**v / (p**u * q**v).sum(-1, keepdim=True)
    for kind, expected in (("probability", arithmetic), ("logit", geometric)):
        teaching = Teaching(temperature=temperature, ensemble=kind, weights=weights)
        combined = teaching.combine([a, b], GLUE["MNLI"], temperature)
        torch.testing.assert_close((combined / temperature).softmax(-1), expected)
    teaching = Teaching(weights=weights)
    number = teaching.combine([a[:, :1], b[:, :1]], GLUE["STS-B"], temperature)
    torch.testing.assert_close(number, u * a[:, :1] + v * b[:, :1])
    assert Teaching(weights=(1.0,)).combine([a], GLUE["MNLI"], temperature) is a


def test_fidelity_is_the_share_of_the_same_classes_or_a_correlation() -> None:
    predicted = torch.tensor([[2.0, 1.0], [0.0, 1.0], [5.0, 4.0], [1.0, 3.0]])
    one = torch.tensor([[9.0, 1.0], [1.0, 0.0], [5.0, 4.0], [1.0, 3.0]])
    none = tasks.Encoded(*4 * [torch.zeros(0)])
    found = agreements(GLUE["SST-2"], none, predicted, {"one": one, "self": predicted})
    assert found == {"one": 75, "self": 100}
    numbers = torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    other = torch.tensor([[1.0], [3.0], [2.0], [4.0]])
    found = agreements(GLUE["STS-B"], none, numbers, {"one": other, "inverted": -numbers})
    assert found == pytest.approx({"one": 80, "inverted": -100})


# --- With a job that takes no time ----------------------------------------------------------------

Calls = list[str]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """Students that learn nothing; the models whose logits were computed."""
    seen: Calls = []
    logits = soft_targets.logits

    def watched(source: str, *arguments: Any, **keywords: Any) -> Any:
        seen.append(Path(source).name)
        return logits(source, *arguments, **keywords)

    def learn(*arguments: Any, **_: Any) -> dict[str, Any]:
        taught = arguments[6]
        agreement = dict.fromkeys(taught.targets, 0.0)
        return {"score": 0.0, "metrics": {}, "seed": arguments[5], "agreement": agreement}

    monkeypatch.setattr(finetune, "logits", watched)
    monkeypatch.setattr(finetune, "learn", learn)
    return seen


def test_logits_are_computed_once_and_anew_where_something_has_changed(
    place: Path, tmp_path: Path, computed: Calls
) -> None:
    folder = Path(shutil.copytree(place, tmp_path / "place"))
    outputs = (str(tmp_path / f"out-{i}") for i in range(9))
    cache = tmp_path / "cache"

    def run(*changes: str) -> list[str]:
        computed.clear()
        teachers = ("headed", "other")
        given = command(folder, "--output", next(outputs), "--cache", str(cache), *changes)
        given[2:4] = [str(folder / name) for name in teachers]
        assert cli.main(given) == 0
        return sorted(computed)

    both = ["headed", "other"]
    assert run() == both
    assert run() == []
    assert run("--seeds", "3", "--temperature", "4", "--batch_size", "4") == []  # no matter to them
    assert run("--max_length", "16") == both
    assert run("--precision", "bf16") == both
    shutil.copy(folder / "bert" / "config.json", folder / "bert" / "unused.json")
    weights = load_file(folder / "other" / "model.safetensors")
    from safetensors.torch import save_file

    weights["classifier.bias"] += 1
    save_file(weights, folder / "other" / "model.safetensors", {"format": "pt"})
    assert run() == ["other"]
    with (folder / "data" / "words" / "train.tsv").open("a") as file:
        file.write("the river\t1\n")
    assert run() == both
    lost = sorted(cache.glob("*.safetensors"), key=lambda f: f.stat().st_mtime_ns)[-1]
    lost.unlink()
    assert len(run()) == 1


def test_damaged_logits_are_refused(
    place: Path, tmp_path: Path, computed: Calls, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import save_file

    output = tmp_path / "out"
    given = command(place, "--output", str(output))
    given[2:4] = [str(place / "headed"), str(place / "other")]
    assert cli.main(given) == 0
    cached = min((output / "logits").glob("*.safetensors"))
    whole, tensors = cached.read_bytes(), load_file(cached)
    for damaged, said in (
        (None, "got a damaged file"),
        ({split: logits[:5] for split, logits in tensors.items()}, "logits of the shapes"),
        ({"train": tensors["train"]}, "logits of the shapes"),
        ({split: logits * math.nan for split, logits in tensors.items()}, "expected finite logits"),
    ):
        cached.write_bytes(whole[:-9])
        if damaged:
            save_file(damaged, cached)
        capsys.readouterr()
        assert cli.main(given) == 2
        error = capsys.readouterr().err
        assert f"{cached}: expected" in error
        assert said in error


def test_texts_without_labels_are_for_taught_students_alone(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Any, Any]] = []

    def fine_tune(model: Any, train: Any, *_: Any, targets: Any, **__: Any) -> None:
        seen.append((train, targets))

    monkeypatch.setattr(fine_tuning, "fine_tune", fine_tune)
    given = ("--transfer", str(place / "texts.tsv"), "--seeds", "1", "--output", str(tmp_path))
    assert cli.main(command(place, *given, teachers=("headed", "other"))) == 0
    (alone, none), *taught = seen
    assert (len(alone), none) == (24, None)
    assert (alone.labels != IGNORE_INDEX).all()
    assert len(taught) == 2
    both = encoded(place)["train"] + _texts(place)
    expected = [says(place / name, both) for name in ("headed", "other")]
    for (train, targets), logits in zip(
        taught, (expected[0], combine_teachers(expected, temperature=2.0)), strict=True
    ):
        assert torch.equal(train.input_ids, both.input_ids)
        assert torch.equal(train.labels[:24], alone.labels)
        assert (train.labels[24:] == IGNORE_INDEX).all()
        torch.testing.assert_close(targets.logits, logits, atol=1e-5, rtol=1e-5)


def _texts(place: Path) -> tasks.Encoded:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(place / "bert")
    task = find("words", str(place / "data"))
    return encode(tasks.read_texts(place / "texts.tsv", task), tokenizer, 24)


def test_jobs_can_be_sent_to_processes(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(some: Any, *_: Any) -> Any:
        sent = pickle.loads(pickle.dumps(list(some)))
        raise ConfigError(f"{len(sent)} jobs")

    monkeypatch.setattr(jobs, "run", run)
    assert cli.main(command(place, "--output", str(tmp_path / "out"))) == 2


# --- What is refused ------------------------------------------------------------------------------


@pytest.fixture
def refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], computed: Calls
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
        assert not computed
        return err.removeprefix("distilfast: ").strip()

    return call


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--weights", "1"), "--weights: expected 2, one a teacher, got"),
        (("--weights", "1,2,3"), "--weights: expected 2, one a teacher, got"),
        (("--weights", "1,x"), "--weights: expected "),
        (("--weights", "1,nan"), "--weights: expected a number >= 0, got nan"),
        (("--weights", "0,0"), "--weights: expected a weight > 0"),
        (("--temperature", "0"), "--temperature: expected a number > 0, got 0.0"),
        (("--kd_weight", "-1"), "--kd_weight: expected a number > 0, got -1.0"),
        (("--ce_weight", "inf"), "--ce_weight: expected a number >= 0, got inf"),
        (("--ensemble", "vote"), "--ensemble: expected one of probability, logit"),
        (("--task", "sst3"), "--task: expected one of CoLA"),
        (("--student", "nowhere.d"), "--student: expected an existing file or folder"),
        (("--transfer", "nothing.tsv"), "--transfer: expected a file, got 'nothing.tsv'"),
        (("--seeds", "0"), "--seeds: expected a whole number from 1"),
        (("--output", "/proc/nothing"), "--output: expected a folder that can be written to, got"),
        (("--cache", "/proc/nothing"), "--cache: expected a folder that can be written to, got"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
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


def test_tokenizers_that_differ_are_refused(
    place: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    stranger = make_teacher(tmp_path / "stranger", n_layers=1, words=WORDS[::-1])
    given = command(place, "--output", str(tmp_path / "out"))
    given[3] = str(stranger)
    line = refused(given)
    assert line.startswith("--teacher: expected the student's tokenizer (")
    assert line.endswith(f"in {str(stranger)!r}")


@pytest.mark.parametrize(("kind", "n"), [("SequenceClassification", 3), ("QuestionAnswering", 2)])
def test_teacher_with_another_tasks_head_is_refused(
    kind: str, n: int, place: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    import transformers

    folder = shutil.copytree(place / "bert", tmp_path / "teacher")
    model = getattr(transformers, f"BertFor{kind}").from_pretrained(place / "bert", num_labels=n)
    model.save_pretrained(folder)
    given = command(place, "--output", str(tmp_path / "out"))
    given[2:4] = [str(folder)]
    line = refused(given)
    assert line.startswith("--teacher: ")
    assert f"BertFor{kind} of {n} outputs" in line


def test_fine_tuned_teacher_counts_once(
    place: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    given = command(place, "--output", str(tmp_path / "out"), teachers=("headed", "headed"))
    assert "expected each fine-tuned model once" in refused(given)


@pytest.mark.parametrize("name", ["ensemble", "labels alone", "student"])
def test_teacher_whose_name_is_another_rows_is_refused(
    name: str, place: Path, tmp_path: Path, refused: Callable[[list[str]], str]
) -> None:
    shutil.copytree(place / "headed", tmp_path / name)
    given = command(place, "--output", str(tmp_path / "out"), teachers=("headed", "other"))
    given[2] = str(tmp_path / name)
    assert refused(given).startswith("--teacher: expected")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("--temperature", "3"), "temperature (2.0, now 3.0)"),
        (("--weights", "1,2"), "weights ([1.0, 1.0], now [1.0, 2.0])"),
        (("--ensemble", "logit"), "ensemble ('probability', now 'logit')"),
        (("--transfer", "texts.tsv"), "the files of words"),
        (("--student", "bert"), "the files of student"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, tuple) else "",
)
def test_figures_of_other_settings_are_not_mixed(
    changes: tuple[str, ...],
    said: str,
    copy: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[[list[str]], str],
) -> None:
    monkeypatch.chdir(copy)
    changes = (changes[0], "./bert") if changes[1] == "bert" else changes
    assert refused(command(copy, *changes)).endswith(f"differs in {said}")
