"""Tasks: their metrics against constants worked by hand, scikit-learn and scipy; the official
layouts of GLUE and one's own, and what is wrong with them; tokens and the order of batches."""

from __future__ import annotations

import copy
import itertools
import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from scipy import stats
from sklearn import metrics
from torch import Tensor

from distilfast import tasks
from distilfast.config import ConfigError
from distilfast.sources import lookup
from distilfast.tasks import GLUE, IMDB, TASKS, Encoded, Examples, encode, find, order, read, tokens

# --- Metrics --------------------------------------------------------------------------------------


def score(name: str, labels: list[float], predictions: list[float]) -> dict[str, float]:
    """Of predicted classes or numbers, by way of the logits that say so."""
    task, found = TASKS[name], torch.tensor(predictions)
    logits = torch.eye(task.outputs)[found.long()] if task.classes else found[:, None]
    return task.score(torch.tensor(labels, dtype=torch.float32), logits)


# 4 true positives, 1 false one, 3 true negatives, 2 false ones
LABELS = [1, 1, 1, 1, 0, 0, 0, 0, 1, 1]
GUESSES = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]


def test_metrics_are_those_worked_by_hand() -> None:
    matthews = (4 * 3 - 1 * 2) / math.sqrt((4 + 1) * (4 + 2) * (3 + 1) * (3 + 2))
    assert score("CoLA", LABELS, GUESSES)["score"] == pytest.approx(100 * matthews)
    assert score("SST-2", LABELS, GUESSES) == {"accuracy": 70, "score": 70}
    f1 = 2 * 4 / (2 * 4 + 1 + 2)
    for name in ("MRPC", "QQP"):
        found = score(name, LABELS, GUESSES)
        assert found["F1"] == pytest.approx(100 * f1)
        assert found["score"] == pytest.approx(100 * (0.7 + f1) / 2)
    # deviations from the means -1.5 -0.5 0.5 1.5 and -1.5 0.5 -0.5 1.5: 4 / sqrt(5 * 5)
    found = score("STS-B", [1, 2, 3, 4], [1, 3, 2, 4])
    assert found == pytest.approx({"Pearson": 80, "Spearman": 80, "score": 80})
    # ranks 1 2.5 2.5 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5); 0, 1, 1, 3 about 1.25: 4.75 x 1, 2, 3, 9
    found = score("STS-B", [0, 1, 1, 3], [1, 2, 3, 9])
    assert found["Spearman"] == pytest.approx(100 * 4.5 / math.sqrt(4.5 * 5))
    assert found["Pearson"] == pytest.approx(100 * 13.25 / math.sqrt(4.75 * 38.75))
    assert found["score"] == pytest.approx((found["Spearman"] + found["Pearson"]) / 2)


EDGES = {
    "perfect": ([0, 1, 1, 0, 1], [0, 1, 1, 0, 1]),
    "inverted": ([0, 1, 1, 0, 1], [1, 0, 0, 1, 0]),
    "constant predictions": ([0, 1, 1, 0], [1, 1, 1, 1]),
    "constant predictions of class 0": ([0, 1, 1, 0], [0, 0, 0, 0]),
    "constant labels": ([1, 1, 1, 1], [0, 1, 1, 0]),
    "constant labels of class 0": ([0, 0, 0, 0], [0, 1, 1, 0]),
    "one class": ([1, 1, 1], [1, 1, 1]),
    "class 0 alone": ([0, 0, 0], [0, 0, 0]),
    "one example": ([1], [1]),
    "one example, wrong": ([1], [0]),
    "two examples": ([0, 1], [0, 1]),
}


@pytest.mark.parametrize("case", EDGES)
@pytest.mark.filterwarnings("error")
def test_metrics_of_classes_agree_with_scikit_learn_at_the_edges(case: str) -> None:
    labels, predictions = EDGES[case]
    with warnings.catch_warnings():  # scikit-learn's own, where there is one class
        warnings.simplefilter("ignore", UserWarning)
        matthews = metrics.matthews_corrcoef(labels, predictions)
        f1 = metrics.f1_score(labels, predictions, zero_division=0)
        accuracy = metrics.accuracy_score(labels, predictions)
    assert score("CoLA", labels, predictions)["score"] == pytest.approx(100 * matthews)
    assert score("RTE", labels, predictions)["score"] == pytest.approx(100 * accuracy)
    found = score("MRPC", labels, predictions)
    assert found == pytest.approx(
        {"accuracy": 100 * accuracy, "F1": 100 * f1, "score": 50 * (accuracy + f1)}
    )


def test_edges_are_those_worked_by_hand() -> None:
    for case, expected in (
        ("perfect", 100), ("inverted", -100), ("constant predictions", 0), ("constant labels", 0),
        ("one class", 0), ("one example", 0),
    ):  # fmt: skip
        assert score("CoLA", *EDGES[case])["score"] == pytest.approx(expected), case
    assert score("QQP", *EDGES["class 0 alone"]) == {"accuracy": 100, "F1": 0, "score": 50}
    assert score("MNLI", [0, 1, 2, 2], [0, 1, 2, 0])["score"] == 75


NUMBERS = {
    "ties": ([0, 1, 1, 2, 2, 2, 5], [0.5, 0.5, 1, 1, 2, 2, 2]),
    "inverted": ([0, 1, 2, 3], [3, 2, 1, 0]),
    "two examples": ([1, 2], [1, 3]),
    "close together": ([0, 1, 2, 3, 4], [2.50004, 2.50001, 2.50003, 2.50002, 2.50007]),
    "constant predictions": ([0, 1, 2, 3], [2, 2, 2, 2]),
    "constant labels": ([2, 2, 2, 2], [0, 1, 2, 3]),
    "one example": ([2], [2]),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.filterwarnings("error")
def test_correlations_agree_with_scipy_at_the_edges(case: str) -> None:
    """NaN where they are not defined, which counts as 0."""
    labels, predictions = NUMBERS[case]
    found = score("STS-B", labels, predictions)
    if case in ("constant predictions", "constant labels", "one example"):
        assert math.isnan(found["Pearson"])
        assert math.isnan(found["Spearman"])
        assert found["score"] == 0
        return
    exact = torch.tensor(predictions).double().numpy()  # as the model gives them
    pearson = 100 * stats.pearsonr(labels, exact).statistic
    spearman = 100 * stats.spearmanr(labels, exact).statistic
    assert found["Pearson"] == pytest.approx(pearson, rel=1e-9)
    assert found["Spearman"] == pytest.approx(spearman, rel=1e-9)
    assert found["score"] == pytest.approx((pearson + spearman) / 2, rel=1e-9)


def test_tasks_follow_the_protocol() -> None:
    assert list(GLUE) == "CoLA MNLI MRPC QNLI QQP RTE SST-2 STS-B WNLI".split()
    metric = {name: task.metric for name, task in GLUE.items()}
    assert metric.pop("CoLA") == "Matthews"
    assert metric.pop("MRPC") == metric.pop("QQP") == "mean of accuracy and F1"
    assert metric.pop("STS-B") == "mean of Pearson and Spearman"
    assert set(metric.values()) == {"accuracy"}
    assert {name: task.epochs for name, task in GLUE.items() if task.epochs != 3} == {
        "MRPC": 5,
        "WNLI": 5,
    }
    assert {task.max_length for task in GLUE.values()} == {128}
    assert GLUE["MNLI"].dev == ("dev_matched", "dev_mismatched")
    assert {name: task.outputs for name, task in GLUE.items() if task.outputs != 2} == {
        "MNLI": 3,
        "STS-B": 1,
    }


# --- Reading --------------------------------------------------------------------------------------

PAIR = ("A man eats.", "Somebody eats.")
# The header (None: CoLA has none), a line of the training file, what it says.
OFFICIAL: dict[str, tuple[str | None, str, tuple[str, ...], float]] = {
    "CoLA": (None, 'gj04\t0\t*\tThe "book" fell.', ('The "book" fell.',), 0),
    "MNLI": (
        "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\t"
        "sentence1_parse\tsentence2_parse\tsentence1\tsentence2\tlabel1\tgold_label",
        "0\t1\t1n\tfiction\t( A )\t( B )\t(A)\t(B)\tA man eats.\tSomebody eats.\tneutral\tneutral",
        PAIR,
        1,
    ),
    "MRPC": (
        "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "1\t702876\t702977\tA man eats.\tSomebody eats.",
        PAIR,
        1,
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        "0\tA man eats.\tSomebody eats.\tnot_entailment",
        PAIR,
        1,
    ),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "133273\t213221\t213222\tA man eats.\tSomebody eats.\t1",
        PAIR,
        1,
    ),
    "RTE": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA man eats.\tSomebody eats.\tentailment",
        PAIR,
        0,
    ),
    "SST-2": ("sentence\tlabel", '" a 1\\2 film \t1', ('" a 1\\2 film ',), 1),
    "STS-B": (
        "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
        "0\tmain\tMSRvid\t2012\t0001\tnone\tnone\tA man eats.\tSomebody eats.\t3.800",
        PAIR,
        3.8,
    ),
    "WNLI": (
        "index\tsentence1\tsentence2\tlabel",
        "0\tA man eats.\tSomebody eats.\t0",
        PAIR,
        0,
    ),
}
# MNLI's development files have the labels of four more people before gold_label.
MNLI_DEV = str(OFFICIAL["MNLI"][0]).replace("label1", "label1\tlabel2\tlabel3\tlabel4\tlabel5")


def write_task(data: Path, name: str, lines: dict[str, str | bytes] | None = None) -> Path:
    """A folder of a task with one official line a split, or ``lines`` in place of a split's."""
    header, line, _, _ = OFFICIAL[name]
    (data / name).mkdir(parents=True, exist_ok=True)
    for split in ("train", *TASKS[name].dev):
        text: str | bytes = "\n".join([*([header] if header else []), line]) + "\n"
        if name == "MNLI" and split != "train":
            text = f"{MNLI_DEV}\n{line}\tneutral\tneutral\tneutral\tneutral\n"
        text = (lines or {}).get(split, text)
        (data / name / f"{split}.tsv").write_bytes(
            text if isinstance(text, bytes) else text.encode()
        )
    return data


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_layouts_are_read(name: str, tmp_path: Path) -> None:
    found = read(TASKS[name], str(write_task(tmp_path, name)))
    _, _, texts, label = OFFICIAL[name]
    assert list(found) == ["train", *TASKS[name].dev]
    for examples in found.values():
        assert examples.texts == [texts]
        assert examples.labels == [label]


def test_marks_line_ends_and_odd_characters_are_read_as_they_stand(tmp_path: Path) -> None:
    """A byte-order mark and CRLF are no part of the text; a quote, a carriage return and Unicode's
    own line ends are."""
    lines = ["sentence\tlabel", 'one "quote\t1', "a\rb\u2028c\x85d\x0be\t0", "'last\t1"]
    for mark, end, last in (("\ufeff", "\r\n", "\r\n"), ("", "\n", "")):
        text = (mark + end.join(lines) + last).encode()
        found = read(GLUE["SST-2"], str(write_task(tmp_path, "SST-2", {"dev": text})))["dev"]
        assert found.texts == [('one "quote',), ("a\rb\u2028c\x85d\x0be",), ("'last",)]
        assert found.labels == [1, 0, 1]


HEADER = "sentence\tlabel\n"
NLI = "index\tsentence1\tsentence2\tlabel\n"
DUPLICATES = f"{OFFICIAL['QQP'][0]}\n"
ZERO_OR_ONE = "expected a label of 0, 1, got"
WRONG: dict[str, tuple[str, str | bytes, str]] = {
    "a tab too many": ("SST-2", HEADER + "a\t1\nb\tc\t0\n", "line 3: expected 2 fields, got 3"),
    "a tab too few": ("SST-2", HEADER + "a\t1\n\nb\t0\n", "line 3: expected 2 fields, got 1"),
    "CoLA's first line": ("CoLA", "gj04\t1\tfine\n", "line 1: expected 4 fields, got 3"),
    "QQP too many": ("QQP", DUPLICATES + "1\t1\t2\ta\tb\t0\tc\n", "line 2: expected 6 fields"),
    "unknown label": ("SST-2", HEADER + "a\t1\nb\t2\n", f"line 3: {ZERO_OR_ONE} '2'"),
    "no label": ("SST-2", HEADER + "a\t\n", f"line 2: {ZERO_OR_ONE} ''"),
    "hidden label": ("CoLA", "x\t-1\t\tfine\n", f"line 1: {ZERO_OR_ONE} '-1'"),
    "other words": (
        "RTE",
        NLI + "0\ta\tb\tcontradiction\n",
        "line 2: expected a label of entailment, not_entailment, got 'contradiction'",
    ),
    "missing column": ("SST-2", "text\tlabel\na\t1\n", "columns sentence, label, got text, label"),
    "commas": (
        "SST-2", "sentence,label\na,1\n", "got sentence,label; the line seems to be comma-separated"
    ),
    "a comma for a tab": (
        "SST-2", HEADER + "a\t1\nb,0\n", "line 3: expected 2 fields, got 1; the line seems to"
    ),
    "a lone CR": ("SST-2", "sentence\tlabel\ra\t1\r", r"label\ra, 1; its lines end with \r alone"),
    "a column twice": (
        "SST-2", "sentence\tlabel\tlabel\na\t1\t0\n", "expected the columns sentence, label, got"
    ),
    "header again": ("SST-2", 2 * f"{HEADER}a\t1\n", "line 3: expected an example, got the header"),
    "empty file": ("SST-2", "", "expected the columns sentence, label, got none"),
    "header alone": ("SST-2", HEADER, "expected examples in SST-2's dev, got none"),
    "CoLA empty": ("CoLA", "", "expected examples in CoLA's dev, got none"),
    "not UTF-8": ("SST-2", HEADER.encode() + b"caf\xe9\t1\n", "expected UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_file_is_said_with_its_line(case: str, tmp_path: Path) -> None:
    name, text, said = WRONG[case]
    data = write_task(tmp_path, name, {"dev": text})
    with pytest.raises(ConfigError) as caught:
        read(GLUE[name], str(data))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
    if "expected examples" not in said:
        assert str(data / name / "dev.tsv") in str(caught.value)


@pytest.mark.parametrize("number", ["nan", "inf", "-Infinity", "", "high"])
def test_number_that_is_none_is_refused(number: str, tmp_path: Path) -> None:
    text = f"{OFFICIAL['STS-B'][0]}\n0\ta\tb\tc\td\te\tf\tg\th\t{number}\n"
    data = write_task(tmp_path, "STS-B", {"train": text})
    with pytest.raises(ConfigError, match=f"train.tsv, line 2: expected a number, got '{number}'"):
        read(GLUE["STS-B"], str(data))


def test_files_and_folders_that_are_missing_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_task(tmp_path / "data", "MNLI")
    (data / "MNLI" / "dev_mismatched.tsv").unlink()
    with pytest.raises(ConfigError, match=r"dev_mismatched.tsv', which is missing"):
        read(GLUE["MNLI"], str(data))
    (data / "own").mkdir()
    (data / "own" / "train.csv").touch()
    with pytest.raises(
        ConfigError, match=r"'own' and '.*data'; train.csv is there, but its fields"
    ):
        tasks.find("own", str(data))
    with pytest.raises(ConfigError, match=r"; did you mean own\?"):
        tasks.find("owm", str(data))
    monkeypatch.chdir(data.rename(tmp_path / "glue").parent)
    with pytest.raises(ConfigError, match=r"'own' and 'glue'; ./glue is the folder, glue the hub"):
        tasks.find("own", "glue")
    Path("glue").rename(data)
    (data / "own").rename(tmp_path / "own")
    with pytest.raises(ConfigError, match=r"expected the folder RTE in .*data', which has MNLI"):
        read(GLUE["RTE"], str(data))
    with pytest.raises(ConfigError, match=r"--data: expected an existing .*, got '.*nothing'"):
        read(GLUE["RTE"], str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match=r"--data: expected a folder or glue or hub, got 'glued'"):
        read(GLUE["RTE"], "glued")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"--data: expected a folder.*file"):
        read(GLUE["RTE"], str(tmp_path / "file"))
    (data / "MNLI" / "dev_mismatched.tsv").mkdir()
    with pytest.raises(ConfigError, match=r"expected the file .*dev_mismatched.tsv"):
        read(GLUE["MNLI"], str(data))


def test_short_lines_of_qqp_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header, line, _, _ = OFFICIAL["QQP"]
    text = f"{header}\n{line}\n1\t2\t3\tHow\n{line}\nis it?\tWhy?\t0\n"
    with caplog.at_level(logging.WARNING, "distilfast"):
        found = read(GLUE["QQP"], str(write_task(tmp_path, "QQP", {"train": text})))
    assert found["train"].texts == [PAIR, PAIR]
    record = caplog.records[0]  # the next one counts what dev shares with it
    assert "2 lines have too few fields" in record.getMessage()


def test_texts_without_labels_have_the_tasks_columns_or_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "texts.tsv"
    for task, text, expected in (
        ("SST-2", "sentence\na\n", [("a",)]),
        ("CoLA", "sentence\tlabel\na\t1\n", [("a",)]),
        ("IMDb", "sentence\na\n", [("a",)]),
        ("MRPC", "#1 String\t#2 String\na\tb\n", [("a", "b")]),
        ("MRPC", "sentence1\tsentence2\na\tb\n", [("a", "b")]),
    ):
        file.write_text(text, encoding="utf-8")
        assert tasks.read_texts(file, TASKS[task]) == Examples(expected, [tasks.IGNORE_INDEX])


def test_sentences_are_read_as_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "dev.tsv"
    file.write_text('sentence2\tscore\tsentence1\n"b x\t1\ta\n d\t0\tc\n', encoding="utf-8")
    assert tasks.read_sentences("--data", file) == [("a", '"b x'), ("c", " d")]
    file.write_bytes("\ufeffsentence\tlabel\r\nein\rKönig\t1\r\n".encode())
    assert tasks.read_sentences("--data", file) == [("ein\rKönig",)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "--transfer: expected a file, got"),
        ("sentence\n", "--transfer: expected texts in"),
        ("", "expected the columns sentence"),
        ("text\na\n", "expected the columns sentence"),
        ("sentence\na\tb\n", "line 2: expected 1 fields, got 2"),
    ],
)
def test_texts_that_are_none_are_refused(text: str | None, said: str, tmp_path: Path) -> None:
    file = tmp_path / "texts.tsv"
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        tasks.read_texts(file, TASKS["SST-2"])


def write_own(folder: Path, header: str, *rows: str) -> str:
    """A task of one's own, its folder's parent."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "dev"):
        (folder / f"{split}.tsv").write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return str(folder.parent)


def test_own_task_of_one_sentence_or_two(tmp_path: Path) -> None:
    data = write_own(tmp_path / "one", "label\tsentence", "good\tfine", "bad\tno", "good\tyes")
    task = find("one", data)
    assert (task.classes, task.metric, task.outputs) == (("bad", "good"), "accuracy", 2)
    assert read(task, data)["dev"] == Examples([("fine",), ("no",), ("yes",)], [1, 0, 1])
    write_own(tmp_path / "two", "sentence1\tx\tsentence2\tlabel", "a\t-\tb\tyes", "c\t-\td\tno")
    found = read(find("two", data), data)["train"]
    assert found == Examples([("a", "b"), ("c", "d")], [1, 0])


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (("10", "9", "1"), ("1", "9", "10")),
        (("two", "10", "one"), ("one", "two", "10")),
        (("neutral", "for", "against"), ("against", "for", "neutral")),
    ],
)
def test_classes_of_an_own_task_are_in_order(
    labels: tuple[str, ...], classes: tuple[str, ...], tmp_path: Path
) -> None:
    data = write_own(tmp_path / "mine", "sentence\tlabel", *(f"text\t{label}" for label in labels))
    assert find("mine", data).classes == classes


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (("a\t1", "b\t1"), "expected at least two labels, got '1' alone"),
        ((), "expected at least two labels"),
        (("a\t1", "b\t0", "c\t"), "line 4: expected a label"),
        (("a\t1", "b"), "line 3: expected 2 fields, got 1"),
        (("a\t1", "b\t0", "sentence\tlabel"), "line 4: expected an example, got the header line"),
        (("a\t1", "b\t0.5"), "expected labels that are classes, got the number '0.5'"),
        (("a\t1", "b\t0", "c\tnan"), "expected labels that are classes, got the number 'nan'"),
        (("a\t1", "b\t1.0"), "expected one spelling of each label, got '1.0' and '1'"),
        (("a\tx", "b\tX ", "c\ty"), "expected one spelling of each label, got 'X ' and 'x'"),
        ([f"{i % 2}\ttext {i}" for i in range(20)], "expected labels that repeat, got 20 in 20"),
    ],
)
def test_own_task_that_cannot_be_learned_is_refused(
    rows: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    data = write_own(tmp_path / "mine", "sentence\tlabel", *rows)
    with pytest.raises(ConfigError, match=said):
        find("mine", data)


def test_label_that_training_has_not_is_refused_in_dev(tmp_path: Path) -> None:
    data = write_own(tmp_path / "mine", "sentence\tlabel", "a\tyes", "b\tno")
    (tmp_path / "mine" / "dev.tsv").write_text("sentence\tlabel\na\tmaybe\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"dev.tsv, line 2: expected a label of no, yes"):
        read(find("mine", data), data)


def test_examples_that_are_trained_on_and_scored_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = HEADER + "".join(f"text {i}\t{i % 2}\n" for i in range(10))
    for shared, said in ((1, ""), (2, "2 of the 10 examples of dev are trained on too")):
        dev = train.replace("text", "other", 10 - shared)
        data = str(write_task(tmp_path, "SST-2", {"train": train, "dev": dev}))
        read(GLUE["SST-2"], data)
        assert said in caplog.text
        assert bool(said) == bool(caplog.text)


def test_tasks_are_found_in_any_case(tmp_path: Path) -> None:
    for name, task in (("sst2", "SST-2"), ("Sst-2", "SST-2"), ("stsb", "STS-B"), ("cola", "CoLA")):
        assert find(name, str(tmp_path)) is GLUE[task]
    assert find("IMDB", "hub") is IMDB


@pytest.mark.parametrize("name", ["sst3", "", ".", "..", "../mine", "mine/deeper"])
def test_unknown_task_is_refused(name: str, tmp_path: Path) -> None:
    """A name is one of a folder in --data, as it names folders of --output as well."""
    data = tmp_path / "data"
    for folder in (data, tmp_path / "mine", data / "mine" / "deeper", tmp_path):
        write_own(folder, "sentence\tlabel", "a\t0", "b\t1")
    with pytest.raises(ConfigError, match=r"--tasks: expected one of CoLA, .*, got"):
        find(name, str(data))


# --- The hub --------------------------------------------------------------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, splits: dict[str, dict[str, list[Any]]]) -> list[Any]:
    """A hub that holds one data set; what it was asked for."""
    import datasets

    asked: list[Any] = []

    def load(*name: Any) -> Any:
        asked.append(name)
        return datasets.DatasetDict({k: datasets.Dataset.from_dict(v) for k, v in splits.items()})

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(lookup, "require_hub", lambda *_, **__: None)
    return asked


def test_hub_gives_the_same_and_labels_of_minus_one_are_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = {
        "premise": ["a", "b", "c"],
        "hypothesis": ["d", "e", "f"],
        "label": [2, -1, 0],
        "idx": [0, 1, 2],
    }
    asked = hub(
        monkeypatch,
        {
            "train": rows,
            "validation_matched": {k: v[:1] for k, v in rows.items()},
            "validation_mismatched": {k: v[2:] for k, v in rows.items()},
            "test_matched": rows,
        },
    )
    found = read(GLUE["MNLI"], "glue")
    assert asked == [("nyu-mll/glue", "mnli")]
    assert list(found) == ["train", "dev_matched", "dev_mismatched"]
    assert found["train"] == Examples([("a", "d"), ("c", "f")], [2, 0])
    assert found["dev_matched"] == Examples([("a", "d")], [2])
    assert found["dev_mismatched"] == Examples([("c", "f")], [0])


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": {"sentence": ["a"], "label": [1]}}, "cannot be loaded: .*validation"),
        ({s: {"text": ["a"], "label": [1]} for s in ("train", "validation")}, "cannot be loaded"),
        (
            {s: {"sentence": ["a"], "label": [-1]} for s in ("train", "validation")},
            "expected examples in SST-2's train, got none",
        ),
    ],
)
def test_hub_of_another_shape_is_refused(
    splits: Any, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub(monkeypatch, splits)
    with pytest.raises(ConfigError, match=said) as caught:
        read(GLUE["SST-2"], "glue")
    assert "\n" not in str(caught.value)


# --- Tokens ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(teacher: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(teacher)


TEXTS = ["the river", "a city and a king", "water " * 9, "they", "red green blue white " * 8]


def encoded(tokenizer: Any, max_length: int = 24) -> tuple[list[tuple[str, ...]], Encoded]:
    pairs: list[tuple[str, ...]] = list(zip(TEXTS, reversed(TEXTS), strict=True))
    return pairs, encode(Examples(pairs, [0.0] * len(pairs)), tokenizer, max_length)


def test_batch_is_what_the_tokenizer_pads(tokenizer: Any) -> None:
    pairs, made = encoded(tokenizer)
    for rows in ([3, 0, 4], [1], [2, 2]):
        expected = tokenizer(
            *map(list, zip(*(pairs[i] for i in rows), strict=True)),
            truncation=True,
            max_length=24,
            padding=True,
            pad_to_multiple_of=8,
            return_tensors="pt",
        )
        batch = made.batch(torch.tensor(rows), tokenizer.pad_token_id)
        assert set(batch) == set(expected)
        for key, value in batch.items():
            assert value.shape[1] % 8 == 0
            torch.testing.assert_close(value, expected[key])
    assert made.batch(torch.tensor([3]), 0)["token_type_ids"].sum() > 0


def test_padding_is_the_tokenizers_token(tokenizer: Any) -> None:
    _, made = encoded(tokenizer)
    batch = made.batch(torch.tensor([0]), 77)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 77).all()
    assert (batch["input_ids"][batch["attention_mask"] == 1] != 77).all()


def test_token_types_are_there_whatever_the_tokenizers_model_takes(tokenizer: Any) -> None:
    """DistilBERT's tokenizer gives none, and BERT, which needs them, reads the same store."""
    bare = copy.deepcopy(tokenizer)
    bare.model_input_names = ["input_ids", "attention_mask"]
    assert "token_type_ids" not in bare("river", "stone")
    _, wanted = encoded(tokenizer)
    _, made = encoded(bare)
    assert wanted.token_type_ids.sum() > 0
    assert torch.equal(made.token_type_ids, wanted.token_type_ids)


def test_tokens_are_the_same_in_one_piece_or_several(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, whole = encoded(tokenizer)
    monkeypatch.setattr(tokens, "CHUNK", 2)
    _, pieces = encoded(tokenizer)
    for name, tensor in whole.tensors().items():
        assert torch.equal(pieces.tensors()[name], tensor), name


def test_words_of_special_tokens_are_text(tokenizer: Any) -> None:
    """Also where a vocabulary has them among its pieces, with the highest score."""
    pairs = [("the [MASK]", "a [SEP] [PAD]"), ("[CLS]", "[UNK]")]
    made = encode(Examples(pairs, [0.0, 0.0]), tokenizer, 64)
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert sum(token in special for token in made.input_ids.tolist()) == 3 * len(pairs)
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"the[MASK]"]
    unigram = tokenizers.models.Unigram([(w, -1.0) for w in words], 0)
    made = encode(Examples([("the", "he[MASK]")], [0.0]), made_from(unigram), 64)
    assert made.input_ids.tolist() == [*(5, 6, 7), *(6, 7, 8, 9, 10, 11, 12, 13)]


def test_word_that_merges_to_a_special_token_is_refused() -> None:
    words = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "[MASK]", *"the", "he"]
    merging = tokenizers.models.BPE({w: i for i, w in enumerate(words)}, [("h", "e")])
    other = made_from(merging, mask_token="he")
    assert len(encode(Examples([("th", "eh")], [0.0]), other, 64).input_ids) == 4
    said = r"^--data: expected texts without 'he', .*, got 't \| the'$"
    with pytest.raises(ConfigError, match=said):
        encode(Examples([("th", "eh"), ("t", "the")], [0.0, 0.0]), other, 64)


def made_from(model: Any, **names: str) -> Any:
    """A tokenizer of a model, whose special tokens are BERT's unless given."""
    own = {f"{name}_token": f"[{name.upper()}]" for name in ("unk", "pad", "cls", "sep", "mask")}
    made = tokenizers.Tokenizer(model)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made, **(own | names))


def test_longer_text_of_a_pair_is_cut(tokenizer: Any) -> None:
    for pair in (("city " * 30, "red green blue"), ("red green blue", "city " * 30)):
        made = encode(Examples([pair], [0.0]), tokenizer, 16)
        words = tokenizer.convert_ids_to_tokens(made.input_ids)
        assert len(words) == 16
        assert words.count("city") == 16 - 3 - 3
        assert {"red", "green", "blue"} <= set(words)


def test_examples_of_two_splits_follow_each_other(tokenizer: Any) -> None:
    _, made = encoded(tokenizer)
    both = made + made
    assert len(both) == 2 * len(TEXTS)
    for i in range(len(TEXTS)):
        one, other = (both.batch(torch.tensor([j]), 0) for j in (i, i + len(TEXTS)))
        assert all(torch.equal(one[key], other[key]) for key in one)


# --- The order ------------------------------------------------------------------------------------


def batches(lengths: Tensor, batch_size: int, seed: int = 0) -> list[Tensor]:
    return list(order(lengths, batch_size, torch.Generator().manual_seed(seed)))


def padded(lengths: Tensor, made: list[Tensor]) -> int:
    return sum(len(rows) * int(lengths[rows].max()) for rows in made)


@pytest.mark.parametrize("n", [1, 7, 8, 1000])
def test_epoch_has_each_example_once(n: int) -> None:
    lengths = torch.randint(5, 60, (n,), generator=torch.Generator().manual_seed(1))
    made = batches(lengths, 8)
    assert torch.cat(made).sort().values.tolist() == list(range(n))
    sizes = sorted(len(rows) for rows in made)
    assert sizes[1:] == [8] * (len(made) - 1)  # one batch may be smaller
    assert len(made) == -(-n // 8)


def test_order_belongs_to_the_seed() -> None:
    lengths = torch.randint(5, 60, (200,), generator=torch.Generator().manual_seed(1))
    for one, other in zip(batches(lengths, 8), batches(lengths, 8), strict=True):
        assert torch.equal(one, other)
    assert not torch.equal(torch.cat(batches(lengths, 8)), torch.cat(batches(lengths, 8, seed=1)))
    generator = torch.Generator().manual_seed(0)
    epochs = [torch.cat(list(order(lengths, 8, generator))) for _ in range(2)]
    assert not torch.equal(*epochs)


def test_batches_of_one_length_are_random() -> None:
    made = batches(torch.full((400,), 9), 8)
    assert sum(bool((rows.diff() == 1).all()) for rows in made) == 0


def test_neighbours_in_length_are_together_and_batches_in_no_order_of_length() -> None:
    lengths = torch.randint(5, 60, (400,), generator=torch.Generator().manual_seed(1))
    made = batches(lengths, 8)  # 50 batches: one pool
    ranges = [(int(lengths[rows].min()), int(lengths[rows].max())) for rows in made]
    by_length = sorted(ranges)
    assert all(low[1] <= high[0] for low, high in itertools.pairwise(by_length))
    assert ranges != by_length
    assert ranges != by_length[::-1]


def test_batches_hold_less_padding_than_a_plain_shuffle() -> None:
    lengths = torch.randint(5, 60, (2000,), generator=torch.Generator().manual_seed(1))
    shuffled = list(torch.randperm(2000, generator=torch.Generator().manual_seed(2)).split(16))
    real = int(lengths.sum())
    waste, plain = (padded(lengths, made) - real for made in (batches(lengths, 16), shuffled))
    assert waste < plain / 10


def test_own_labels_are_kept_whole(tokenizer: Any) -> None:
    made = encode(Examples([("the",), ("a",)], [3.8, tasks.IGNORE_INDEX]), tokenizer, 16)
    assert made.labels.tolist() == pytest.approx([3.8, -100])
    assert made.labels.dtype == torch.float32
