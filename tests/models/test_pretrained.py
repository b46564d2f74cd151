"""Students that exist already: what is loaded, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NARROW, WORDS, make_masked_lm, make_teacher
from torch import nn

from distilfast import models
from distilfast.config import ConfigError, StudentConfig, TeacherSpec

IDS = torch.tensor([[2, 7, 9, 4, 30, 3, 0, 0], [2, 60, 61, 5, 11, 12, 44, 3]])
MASK = (IDS != 0).long()
SMALL = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
SMALL |= {"intermediate_size": 40, "max_position_embeddings": 66}
# Families as students of a BERT. ALBERT's layers share their weights, ELECTRA's embeddings are
# narrower than its layers, RoBERTa's positions begin at 2.
FAMILIES: dict[str, dict[str, Any]] = {
    "DistilBert": NARROW,
    "Bert": SMALL,
    "Electra": SMALL | {"embedding_size": 12},
    "Albert": SMALL | {"embedding_size": 12},
    "Roberta": SMALL | {"pad_token_id": 0},
    "DebertaV2": SMALL | {"relative_attention": True, "pos_att_type": "p2c|c2p"},
    "ModernBert": SMALL | {"pad_token_id": 0},
}
LAYERS = {"DistilBert": 2}


@pytest.fixture(scope="module")
def tokenizer(teacher: Path) -> Any:
    return models.load_teachers([TeacherSpec(str(teacher))])[1]


def load(folder: Path, tokenizer: Any, seed: int = 5, **settings: Any) -> tuple[Any, bool]:
    return models.load_student(StudentConfig(model=str(folder), **settings), tokenizer, seed)


@pytest.fixture
def student(teacher: Path, tmp_path: Path) -> Path:
    return make_masked_lm(tmp_path / "student", "DistilBert", teacher, **NARROW)


def edit(folder: Path, file: str, **changes: Any) -> Path:
    content = json.loads((folder / file).read_text(encoding="utf-8")) | changes
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", FAMILIES)
def test_student_is_the_model_of_its_files(
    kind: str, teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    import transformers

    folder = make_masked_lm(tmp_path / "student", kind, teacher, **FAMILIES[kind])
    student, has_head = load(folder, tokenizer)
    assert has_head
    assert student.training
    assert {(p.dtype, p.requires_grad) for p in student.parameters()} == {(torch.float32, True)}
    assert models.depth(student) == LAYERS.get(kind, 3)
    plain = transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()
    rows = MASK.flatten().nonzero()[:, 0]
    with torch.no_grad():
        wanted = plain(IDS, attention_mask=MASK).logits.flatten(0, 1)[rows]
        parts = models.check_head("student", student.eval())
        assert torch.equal(student(IDS, attention_mask=MASK).logits.flatten(0, 1)[rows], wanted)
        found = parts.logits_at(IDS, MASK, rows)
    assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_dropout_is_the_students_own_unless_it_is_given(student: Path, tokenizer: Any) -> None:
    def dropouts(model: nn.Module) -> set[float]:
        return {m.p for m in model.modules() if isinstance(m, nn.Dropout)}

    edit(student, "config.json", dropout=0.3)
    assert dropouts(load(student, tokenizer)[0]) == {0.3, 0.1}  # 0.1: its attention's
    for value in (0.0, 0.25):
        made, _ = load(student, tokenizer, dropout=value)
        assert dropouts(made) == {value}
        assert made.config.dropout == made.config.attention_dropout == value


def test_random_student_has_the_shape_alone(student: Path, tokenizer: Any) -> None:
    """Not even its weights have to be there."""
    loaded, _ = load(student, tokenizer)
    (student / "model.safetensors").unlink()
    one, again, other = (load(student, tokenizer, s, init="random")[0] for s in (5, 5, 2**64 - 1))
    assert one.config.to_dict() == loaded.config.to_dict()
    assert one.training
    states = [model.state_dict() for model in (one, again, other, loaded)]
    matrices = [name for name, x in states[0].items() if x.ndim == 2]
    assert len(matrices) > 10
    for name in matrices:
        a, b, c, d = (state[name] for state in states)
        assert torch.equal(a, b), name
        assert not torch.equal(a, c), name
        assert not torch.equal(a, d), name


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_loading_leaves_the_generators_alone(init: Any, student: Path, tokenizer: Any) -> None:
    devices = list(range(torch.cuda.device_count()))
    before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    load(student, tokenizer, init=init)
    after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_body_alone_gets_a_head(student: Path, tokenizer: Any) -> None:
    """The identity where it is square; what is drawn follows from the seed."""
    import transformers

    body = transformers.DistilBertForMaskedLM.from_pretrained(student).distilbert
    body.save_pretrained(student)
    (one, has_head), (again, _) = load(student, tokenizer), load(student, tokenizer)
    assert not has_head
    assert torch.equal(one.vocab_transform.weight, torch.eye(16))
    assert not one.vocab_projector.bias.any()
    assert one.vocab_projector.weight is one.get_input_embeddings().weight
    assert torch.equal(one.get_input_embeddings().weight, body.embeddings.word_embeddings.weight)
    assert all(torch.equal(x, again.state_dict()[name]) for name, x in one.state_dict().items())


def test_drawn_part_of_a_head_follows_from_the_seed(
    teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """ELECTRA's transform is not square, so that it cannot be the identity."""
    import transformers

    folder = make_masked_lm(tmp_path / "student", "Electra", teacher, **FAMILIES["Electra"])
    transformers.ElectraForMaskedLM.from_pretrained(folder).electra.save_pretrained(folder)
    weights = [
        load(folder, tokenizer, seed)[0].generator_predictions.dense.weight for seed in (5, 5, 6)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_folder_without_a_tokenizer_gets_the_teachers(
    teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    load(make_masked_lm(tmp_path / "enough", "DistilBert", None, **NARROW), tokenizer)
    few = NARROW | {"vocab_size": len(WORDS) + 4}
    folder = make_masked_lm(tmp_path / "few", "DistilBert", None, **few)
    with pytest.raises(
        ConfigError, match=rf"embeddings of at least {len(WORDS) + 5} rows, .*got 74"
    ):
        load(folder, tokenizer)


def test_what_differs_between_the_tokenizers_is_named(
    student: Path, tokenizer: Any, tmp_path: Path
) -> None:
    start = rf"^student\.model: '{student}': expected the teacher's tokenizer"
    swapped = make_teacher(tmp_path / "swapped", words=WORDS[::-1])
    shutil.copy(swapped / "tokenizer.json", student)
    with pytest.raises(ConfigError, match=rf"{start}.*differ in vocabulary$"):
        load(student, tokenizer)
    edit(student, "tokenizer_config.json", do_lower_case=False)
    with pytest.raises(ConfigError, match=r"differ in vocabulary, normalizer$"):
        load(student, tokenizer)


def test_word_in_place_of_the_padding_is_trained(student: Path, tokenizer: Any) -> None:
    """Where config.json names another id than the tokenizer, as that of another model does."""
    edit(student, "config.json", pad_token_id=7)
    made, _ = load(student, tokenizer)
    assert made.config.pad_token_id == 0
    made.distilbert(torch.tensor([[7, 8]])).last_hidden_state[0, 0, 0].backward()
    assert made.get_input_embeddings().weight.grad[7].any()


def test_positions_that_count_from_another_padding_are_refused(
    teacher: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The trained positions would move."""
    settings = FAMILIES["Roberta"] | {"pad_token_id": 1}
    folder = make_masked_lm(tmp_path / "student", "Roberta", teacher, **settings)
    with pytest.raises(ConfigError, match=r"expected pad_token_id 0, .* got 1, from which"):
        load(folder, tokenizer)


def test_positions_are_those_of_tokens(teacher: Path, tokenizer: Any, tmp_path: Path) -> None:
    wanted = {"Bert": 66, "Roberta": 65, "DistilBert": 64}
    for kind, most in wanted.items():
        folder = make_masked_lm(tmp_path / kind, kind, teacher, **FAMILIES[kind])
        model = load(folder, tokenizer)[0].eval()
        assert models.most_positions(model) == most
        model(torch.full((1, most), 7))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 1), 7))
