"""Tasks with encoders of other families than BERT: pairs of texts with and without token types."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from families import FAMILIES, POSITIONS, make_family

from distilfast import cli, tasks
from distilfast.tasks import fine_tuning
from distilfast.tasks.files import Examples
from distilfast.tasks.fine_tuning import FineTuning

pytestmark = pytest.mark.usefixtures("one_core")
TINY = ("--max_length", str(POSITIONS), "--learning_rate", "1e-3", "--batch_size", "8", "--seeds",
        "1", "--epochs", "1", "--precision", "fp32", "--processes", "1")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made once, with data beside it."""
    root = tmp_path_factory.mktemp("families")
    write_rte(root / "data" / "RTE")
    write_squad(root / "data")

    def made(kind: str) -> Path:
        return root / kind if (root / kind).exists() else make_family(kind, root / kind)

    return made


def some_words(rng: random.Random, least: int, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(least, most)))


def write_rte(folder: Path) -> None:
    rng = random.Random(0)
    folder.mkdir(parents=True)
    for split, count in (("train", 16), ("dev", 8)):
        lines = ["index\tsentence1\tsentence2\tlabel"]
        for i in range(count):
            pair = f"{some_words(rng, 2, 7)}\t{some_words(rng, 2, 7)}"
            lines.append(f"{i}\t{pair}\t{('entailment', 'not_entailment')[i % 2]}")
        (folder / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_squad(folder: Path) -> None:
    rng = random.Random(0)
    for split, count in (("train", 6), ("dev", 4)):
        paragraphs = []
        for i in range(count):
            context = some_words(rng, 8, 12)
            word = rng.choice(context.split())
            answer = {"text": word, "answer_start": context.index(word)}
            question = {"id": f"{split}{i}", "question": "which word", "answers": [answer]}
            paragraphs.append({"context": context, "qas": [question]})
        document = {"version": "1.1", "data": [{"title": "words", "paragraphs": paragraphs}]}
        (folder / f"{split}-v1.1.json").write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize("kind", FAMILIES)
def test_pair_gives_the_logits_of_plain_transformers(
    kind: str, folder: Callable[[str], Path]
) -> None:
    """Each pair by itself, with the inputs that its tokenizer makes; ours stand in one batch."""
    import transformers

    task, source = tasks.GLUE["RTE"], folder(kind)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    rng = random.Random(1)
    pairs = [(some_words(rng, 1, 7), some_words(rng, 1, 7)) for _ in range(6)]
    examples = tasks.encode(Examples(pairs, [0.0] * 6), tokenizer, POSITIONS)
    assert len(examples.lengths.unique()) > 2
    model = fine_tuning.load(str(source), task, 0, POSITIONS)
    found = fine_tuning.predict(model, examples, FineTuning(), pad_token=tokenizer.pad_token_id)
    with torch.no_grad():
        for logits, (first, second) in zip(found, pairs, strict=True):
            cut = {"truncation": True, "max_length": POSITIONS}
            # ALBERT was trained with types, and its tokenizer gives none unless it is asked.
            types = {"return_token_type_ids": True} if kind == "albert" else {}
            inputs = tokenizer(first, second, return_tensors="pt", **cut, **types)
            torch.testing.assert_close(logits, model(**inputs).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.thorough
@pytest.mark.parametrize("task", ["rte", "squad"])
@pytest.mark.parametrize("kind", FAMILIES)
def test_task_is_scored_and_taught(
    kind: str, task: str, folder: Callable[[str], Path], tmp_path: Path
) -> None:
    source = folder(kind)
    student = make_family(kind, tmp_path / "student", seed=1, num_hidden_layers=2)
    given = [*TINY, "--data", str(source.parent / "data")]
    glue = ["glue", "--model", f"it={source}", "--tasks", task, "--output", str(tmp_path / "glue")]
    assert cli.main([*glue, *given]) == 0
    scores = results(tmp_path / "glue")["it"]
    assert [len(found["scores"]) for found in scores.values()] == [1]
    taught = ["finetune", "--teacher", str(source), "--student", str(student), "--task", task]
    assert cli.main([*taught, *given, "--output", str(tmp_path / "taught")]) == 0
    rows = results(tmp_path / "taught")
    assert {name.split()[0] for name in rows} == {"labels", "taught", source.name}


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    return found
