"""IMDb: the folder aclImdb as it is unpacked, and the columns of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import WORDS

from distilfast import cli, tasks
from distilfast.config import ConfigError
from distilfast.tasks import IMDB


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """aclImdb with what else lies in it: unsup, lists of urls, numbers of words."""
    root = tmp_path / "aclImdb"
    for split in ("train", "test"):
        for label, words in (("neg", WORDS[:30]), ("pos", WORDS[30:])):
            place = root / split / label
            place.mkdir(parents=True)
            for i in range(3):
                text = f"{split} {label}<br /><br />{' '.join(words[i : i + 9])}"
                (place / f"{i}_{i + 1}.txt").write_text(text, encoding="utf-8")
        (root / split / f"urls_{label}.txt").write_text("http://x\n", encoding="utf-8")
        (root / split / "labeledBow.feat").write_text("9 0:1\n", encoding="utf-8")
    (root / "train" / "unsup").mkdir()
    (root / "train" / "unsup" / "0_0.txt").write_text("not to be read", encoding="utf-8")
    return root


def test_the_unpacked_folder_is_read(folder: Path) -> None:
    splits = tasks.read(IMDB, str(folder))
    assert list(splits) == ["train", "test"]
    for split, examples in splits.items():
        assert examples.labels == [0, 0, 0, 1, 1, 1]
        words = " ".join(WORDS[1:10])
        assert examples.texts[1] == (f"{split} neg\n\n{words}",)
        assert examples.texts[5] == (f"{split} pos\n\n{' '.join(WORDS[32:41])}",)


def test_its_name_is_found_in_any_case(folder: Path) -> None:
    for name in ("imdb", "IMDB", "IMDb"):
        assert tasks.find(name, str(folder)) is IMDB
    assert (IMDB.max_length, IMDB.outputs, IMDB.metric) == (512, 2, "accuracy")


def test_glue_scores_the_test_split_beside_the_published(
    folder: Path, teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    arguments = ["glue", "--model", f"bert={teacher}", "--tasks", "imdb", "--data", str(folder)]
    arguments += ["--seeds", "1", "--epochs", "1", "--max_length", "16", "--processes", "1"]
    assert cli.main([*arguments, "--output", str(output)]) == 0
    out = capsys.readouterr().out
    assert "| model | IMDb |" in out
    assert "| BERT-base (published) | 93.46 |" in out
    assert "| DistilBERT (published) | 92.82 |" in out
    assert "ELMo" not in out
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))["bert"]["IMDb"]
    assert found["scores"][0] in [pytest.approx(100 * i / 6) for i in range(7)]
    result = json.loads((output / "scores/bert/IMDb/seed-0.json").read_text(encoding="utf-8"))
    assert list(result["metrics"]) == ["test"]


@pytest.mark.parametrize("gone", ["train/neg", "test/pos"])
def test_a_folder_without_a_class_is_refused(folder: Path, gone: str) -> None:
    for file in (folder / gone).iterdir():
        file.unlink()
    with pytest.raises(ConfigError, match=rf"--data: expected files \*.txt in '.*{gone}', got non"):
        tasks.read(IMDB, str(folder))
    (folder / gone).rmdir()
    with pytest.raises(ConfigError, match=rf"--data: expected files \*.txt in '.*{gone}', got non"):
        tasks.read(IMDB, str(folder))


def test_a_text_that_is_not_utf_8_is_named(folder: Path) -> None:
    (folder / "test" / "pos" / "0_1.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ConfigError, match=r"0_1.txt: expected UTF-8, got .* at byte 3"):
        tasks.read(IMDB, str(folder))


def test_another_folder_has_to_hold_its_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder IMDb in"):
        tasks.read(IMDB, str(tmp_path))
    place = tmp_path / "IMDb"
    place.mkdir()
    for split in ("train", "test"):
        text = "text\tlabel\nbad\tneg\ngood\tpos\n"
        (place / f"{split}.tsv").write_text(text, encoding="utf-8")
    found = tasks.read(IMDB, str(tmp_path))["test"]
    assert (found.texts, found.labels) == ([("bad",), ("good",)], [0, 1])
