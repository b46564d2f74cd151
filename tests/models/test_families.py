"""Encoders of other families than BERT as teachers: positions, tokenizers, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, POSITIONS, make_family

from distilfast import models
from distilfast.config import Config, ConfigError, DataConfig, TeacherSpec, parse
from distilfast.driver import checks
from distilfast.models import tokenize

TABLES = ("roberta", "xlm-roberta", "electra", "albert")  # that have a table of positions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder, made once."""
    root = tmp_path_factory.mktemp("families")

    def made(kind: str) -> Path:
        return root / kind if (root / kind).exists() else make_family(kind, root / kind)

    return made


def load(folder: Path) -> tuple[models.Teacher, Any]:
    (teacher,), tokenizer = models.load_teachers([TeacherSpec(str(folder))])
    return teacher, tokenizer


# --- Positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_as_many_tokens_as_have_positions_are_taken(
    kind: str, folder: Callable[[str], Path]
) -> None:
    teacher, _ = load(folder(kind))
    assert models.most_positions(teacher.model) == POSITIONS
    ids = torch.full((1, POSITIONS + 1), 9)
    assert teacher.model(ids[:, 1:]).logits.isfinite().all()
    if kind in TABLES:
        with pytest.raises((IndexError, RuntimeError)):
            teacher.model(ids)
    config = Config(teacher=str(folder(kind)), data=DataConfig(max_length=POSITIONS), steps=1)
    checks.check_teachers(config, [teacher])
    longer = replace(config, data=DataConfig(max_length=POSITIONS + 1))
    with pytest.raises(ConfigError, match=f"^data.max_length: expected at most {POSITIONS}, "):
        checks.check_teachers(longer, [teacher])


def test_model_without_a_limit_takes_any_length() -> None:
    config = transformers.XLNetConfig(vocab_size=9, d_model=8, n_layer=1, n_head=2, d_inner=8)
    assert models.most_positions(transformers.XLNetLMHeadModel(config)) is None


def test_padding_that_begins_the_positions_is_left_as_it_is(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    """Another padding token in config.json would move the positions of what is saved."""
    other = shutil.copytree(folder("roberta"), tmp_path / "roberta")
    edit(other / "tokenizer_config.json", pad_token="<unk>")
    teacher, tokenizer = load(other)
    assert tokenizer.pad_token_id == 3
    assert teacher.model.config.pad_token_id == 1


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(content | changes), encoding="utf-8")


# --- Tokenizers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FAMILIES)
def test_words_of_special_tokens_are_text(kind: str) -> None:
    """The pieces of XLM-R, ALBERT and DeBERTa-v2 have them, with the highest score."""
    tokenizer = FAMILIES[kind].tokenizer()
    special = set(tokenizer.all_special_tokens) - {tokenizer.unk_token}
    texts = [f"the {word} of{word}a king" for word in sorted(special)]
    made = tokenize(tokenizer, [*texts, "the king"], key="data", add_special_tokens=False)
    for ids in made["input_ids"]:
        assert not special & set(tokenizer.convert_ids_to_tokens(ids))
    plain = tokenizer("the king", add_special_tokens=False)["input_ids"]
    assert made["input_ids"][-1] == plain
    before = len(tokenizer(f"{tokenizer.mask_token}", add_special_tokens=False)["input_ids"])
    assert before == 1  # the tokenizer itself is as it was


@pytest.mark.parametrize("kind", ["roberta", "modernbert", "deberta"])
def test_bytes_of_a_text_are_all_there(kind: str) -> None:
    """Spaces, line ends and letters of no word of the vocabulary, within a text and at its ends."""
    tokenizer = FAMILIES[kind].tokenizer()
    text = f"  the river\t\n of  {tokenizer.mask_token}kings, na\u00efve \U0001f642 "
    made = tokenize(tokenizer, [text], key="data", add_special_tokens=False)
    assert tokenizer.decode(made["input_ids"][0], clean_up_tokenization_spaces=False) == text
    assert tokenizer.unk_token_id not in made["input_ids"][0]


# --- What is refused ------------------------------------------------------------------------------


def need_remote_code(folder: Path) -> None:
    classes = {"AutoConfig": "own.Config", "AutoModelForMaskedLM": "own.Model"}
    edit(folder / "config.json", model_type="own", auto_map=classes)
    (folder / "own.py").write_text("raise SystemExit('this code was run')\n", encoding="utf-8")


def set_layers(count: int) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", num_hidden_layers=count)


def larger_tokenizer(folder: Path) -> None:
    """One that has more ids than the model has embeddings."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(20)])
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        (need_remote_code, "cannot be loaded: it needs remote code, which distilfast does not run"),
        # ModernBERT's own configuration refuses other counts than that of its list.
        (set_layers(3), "(expected the weights of a .* alone, got .*layer.3|must be equal to)"),
        (set_layers(5), "(expected all weights of a .*, got none for .*layer.4|must be equal to)"),
        (larger_tokenizer, "has embeddings for .* tokens, its tokenizer ids for"),
    ],
    ids=["remote code", "fewer layers", "more layers", "another tokenizer"],
)
def test_unfit_teacher_is_refused_in_one_line(
    kind: str,
    how: Callable[[Path], None],
    said: str,
    folder: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def asked(_: str = "") -> str:
        raise AssertionError("asked at the terminal")

    monkeypatch.setattr("builtins.input", asked)
    other = Path(shutil.copytree(folder(kind), tmp_path / "teacher"))
    how(other)
    with pytest.raises(ConfigError, match=f"^teacher: .*{said}") as raised:
        load(other)
    assert "\n" not in str(raised.value)


def test_identity_of_a_folder_has_all_files_of_its_tokenizer(
    folder: Callable[[str], Path], tmp_path: Path
) -> None:
    other = Path(shutil.copytree(folder("roberta"), tmp_path / "roberta"))
    found = {models.identity(str(other))}
    for name in ("vocab.json", "merges.txt", "sentencepiece.bpe.model"):
        (other / name).write_text("{}", encoding="utf-8")
        found.add(models.identity(str(other)))
    assert len(found) == 4


# --- Recipes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "config", "kept", "longest"),
    [
        (
            "distilroberta-base",
            transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514),
            [0, 2, 4, 7, 9, 11],
            512,
        ),
        (
            "xlm-roberta-base",
            transformers.XLMRobertaConfig(vocab_size=250002, max_position_embeddings=514),
            [0, 2, 4, 7, 9, 11],
            512,
        ),
        # Layers 0, 3, 6 ... attend to all of the text: four of these are.
        (
            "modernbert-base",
            transformers.ModernBertConfig(),
            [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21],
            8192,
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_recipe_fits_its_teacher(recipe: str, config: Any, kept: list[int], longest: int) -> None:
    """A model of its shape, without weights, stands for the one on the hub."""
    with torch.device("meta"):
        model = transformers.AutoModelForMaskedLM.from_config(config)
    made = parse(["--config", recipe])
    assert models.kept_layers(model, made.student) == kept
    assert models.most_positions(model) == longest
    assert made.data.max_length <= longest
    assert all(teacher.revision for teacher in made.teachers)
