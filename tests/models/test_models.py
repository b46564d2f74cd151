"""Teachers and students, their scores, the learning rate, and what is exported."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import WORDS
from safetensors.torch import load_file
from torch import Tensor, nn

from distilfast import cli, data, models
from distilfast.config import (
    BatchConfig,
    Config,
    ConfigError,
    DataConfig,
    LossConfig,
    MaskingConfig,
    StudentConfig,
    TeacherSpec,
)
from distilfast.data.masking import Masker
from distilfast.driver import checks, export, heldout, micro_batch
from distilfast.driver.heldout import Evaluator, Scores
from distilfast.driver.processes import World
from distilfast.losses import combine_teachers, distillation_loss

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
# DistilBERT's names for what BERT calls otherwise, written out here once more.
TWINS = {
    "attention.q_lin": "attention.self.query",
    "attention.k_lin": "attention.self.key",
    "attention.v_lin": "attention.self.value",
    "attention.out_lin": "attention.output.dense",
    "sa_layer_norm": "attention.output.LayerNorm",
    "ffn.lin1": "intermediate.dense",
    "ffn.lin2": "output.dense",
    "output_layer_norm": "output.LayerNorm",
}
BERT_LAYER, DISTILBERT_LAYER = "bert.encoder.layer.", "distilbert.transformer.layer."


def randomize(model: nn.Module, seed: int = 0) -> None:
    """Biases and LayerNorms too, which a fresh model has at 0 and 1, where a mistake hides."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.2 * torch.randn(p.shape, generator=generator))


def save(model: Any, folder: Path, words: list[str] = VOCABULARY, **tokenizer: Any) -> str:
    import transformers

    model.save_pretrained(folder)
    vocabulary = {word: i for i, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary, **tokenizer).save_pretrained(folder)
    return str(folder)


def make_bert(cls: str = "BertForMaskedLM", seed: int = 0, **settings: Any) -> Any:
    import transformers

    settings = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.2,
        "attention_probs_dropout_prob": 0.3,
    } | settings
    torch.manual_seed(seed)
    model = getattr(transformers, cls)(transformers.BertConfig(**settings))
    randomize(model, seed)
    return model


def make_distilbert(**settings: Any) -> Any:
    import transformers

    settings = {
        "vocab_size": len(VOCABULARY),
        "dim": 32,
        "n_layers": 4,
        "n_heads": 4,
        "hidden_dim": 48,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    } | settings
    torch.manual_seed(1)
    model = transformers.DistilBertForMaskedLM(transformers.DistilBertConfig(**settings))
    randomize(model)
    return model


def load(*names: str) -> list[models.Teacher]:
    return models.load_teachers([TeacherSpec(name) for name in names])[0]


@pytest.fixture(scope="module")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(make_bert(), tmp_path_factory.mktemp("teachers") / "bert")


@pytest.fixture(scope="module")
def tokenizer(bert_folder: str) -> Any:
    return models.load_teachers([TeacherSpec(bert_folder)])[1]


@pytest.fixture(scope="module")
def bert(bert_folder: str) -> models.Teacher:
    return load(bert_folder)[0]


@pytest.fixture(scope="module")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> models.Teacher:
    return load(save(make_distilbert(), tmp_path_factory.mktemp("teachers") / "distilbert"))[0]


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    """Three texts, two of them padded."""
    ids = torch.randint(5, len(VOCABULARY), (3, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, length in enumerate((16, 9, 3)):
        ids[row, length:], mask[row, length:] = 0, 0
    return ids, mask


@torch.no_grad()
def logits(model: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """(tokens, V), of what is no padding."""
    ids, mask = inputs
    training = model.training
    made: Tensor = model.eval()(input_ids=ids, attention_mask=mask).logits
    model.train(training)
    return made[mask.bool()]


@torch.no_grad()
def own_logits(model: Any, inputs: tuple[Tensor, Tensor]) -> Tensor:
    """The same by way of Family, as the driver computes them."""
    ids, mask = inputs
    training = model.training
    made = models.take_apart(model.eval()).logits_at(ids, mask, mask.flatten().nonzero()[:, 0])
    model.train(training)
    return made


def close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-5, atol=1e-5)


# --- Masks ----------------------------------------------------------------------------------------


@pytest.fixture(params=["sdpa", "eager"])
def bodies(request: pytest.FixtureRequest) -> dict[str, Any]:
    """A model of each family, with both kinds of attention."""
    made = {"bert": make_bert(), "distilbert": make_distilbert()}
    for model in made.values():
        model.eval().set_attn_implementation(request.param)
    return made


@torch.no_grad()
def test_without_padding_no_mask_is_one_of_ones(
    bodies: dict[str, Any], inputs: tuple[Tensor, Tensor]
) -> None:
    """To the bit, in fp32 and bf16."""
    ids, _ = inputs
    for model in bodies.values():
        parts = models.take_apart(model)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            one, other = (parts.hidden(ids, m) for m in (None, torch.ones_like(ids)))
            assert torch.equal(one, other)


@torch.no_grad()
def test_mask_of_four_dimensions_is_the_one_that_transformers_makes(
    bodies: dict[str, Any], inputs: tuple[Tensor, Tensor]
) -> None:
    """It is taken as it is, also where the body is trained; hidden states to the bit."""
    from transformers import masking_utils

    ids, mask = inputs
    four = models.spread(mask)
    for model in bodies.values():
        if model.config._attn_implementation != "sdpa":
            continue
        embedded = torch.zeros(*ids.shape, 32)
        theirs = masking_utils.create_bidirectional_mask(model.config, embedded, mask)
        assert torch.equal(four, theirs)
        assert (four.dtype, four.shape) == (theirs.dtype, theirs.shape)
        parts = models.take_apart(model)
        for dtype in (torch.float32, torch.bfloat16):
            model.to(dtype)
            assert torch.equal(parts.hidden(ids, four), parts.hidden(ids, mask))


def test_mask_is_spread_on_a_gpu_where_every_token_attends_to_all(
    bodies: dict[str, Any], inputs: tuple[Tensor, Tensor]
) -> None:
    _, mask = inputs
    there = torch.empty_like(mask, device="meta")  # stands for a GPU
    for model in bodies.values():
        spread = model.config._attn_implementation == "sdpa"
        made = models.attend(model, there)
        assert (made.shape == (3, 1, 16, 16)) if spread else (made is there)
        assert models.attend(model, mask) is mask
        assert models.attend(model, None) is None
    causal = make_bert(is_decoder=True)
    causal.set_attn_implementation("sdpa")
    assert models.attend(causal, there) is there


# --- Layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layers", "wanted"),
    [
        (1, [0]),
        (2, [0]),
        (3, [0, 2]),
        (4, [0, 3]),
        (5, [0, 2, 4]),
        (6, [0, 2, 5]),
        (12, [0, 2, 4, 7, 9, 11]),
        (24, [0, 2, 4, 6, 8, 10, 13, 15, 17, 19, 21, 23]),
    ],
)
def test_alternate_layers_equal_hand_value(n_layers: int, wanted: list[int]) -> None:
    assert models.layers_of(StudentConfig(), n_layers) == wanted


def test_alternate_layers_are_the_rounded_linspace() -> None:
    """Halves to the even number, in exact fractions, which no real model has more of."""
    for n_layers in range(2, 49):
        n = -(-n_layers // 2)
        wanted = [round(Fraction(i * (n_layers - 1), max(n - 1, 1))) for i in range(n)]
        assert models.layers_of(StudentConfig(), n_layers) == wanted


def test_layers_are_those_asked_for() -> None:
    assert models.layers_of(StudentConfig(layers="all"), 3) == [0, 1, 2]
    assert models.layers_of(StudentConfig(layers=[1, 3]), 4) == [1, 3]
    for layers in ([0, 4], [9]):
        with pytest.raises(ConfigError, match=r"^student\.layers: .*0 to 3"):
            models.layers_of(StudentConfig(layers=layers), 4)


# --- Students of their teacher's weights ----------------------------------------------------------


@pytest.mark.parametrize("architecture", ["auto", "distilbert", "same"])
def test_student_of_all_layers_gives_the_teachers_logits(
    architecture: Any, bert: models.Teacher, inputs: tuple[Tensor, Tensor]
) -> None:
    config = StudentConfig(layers="all", architecture=architecture)
    student = models.make_student(bert.model, config, seed=1)
    kind = "bert" if architecture == "same" else "distilbert"
    assert student.config.model_type == kind
    wanted = logits(bert.model, inputs)
    assert close(logits(student, inputs), wanted)
    assert close(own_logits(student, inputs), wanted)
    assert close(own_logits(bert.model, inputs), wanted)


def test_student_without_folding_gives_other_logits(
    bert: models.Teacher, inputs: tuple[Tensor, Tensor]
) -> None:
    config = StudentConfig(layers="all", fold_token_type=False)
    student = models.make_student(bert.model, config, seed=1)
    assert (logits(student, inputs) - logits(bert.model, inputs)).abs().max() > 0.1
    position = student.distilbert.embeddings.position_embeddings.weight
    assert torch.equal(position, bert.model.bert.embeddings.position_embeddings.weight)


@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": False},
        {"hidden_act": "relu"},
        {"hidden_act": "gelu_new"},
        {"vocab_size": len(VOCABULARY) + 5},
        {"type_vocab_size": 1},
        {"pad_token_id": 3},
        {"num_attention_heads": 1},
    ],
    ids=str,
)
@pytest.mark.parametrize("architecture", ["auto", "same"])
def test_student_of_an_unusual_teacher_gives_its_logits(
    architecture: Any, settings: dict[str, Any], inputs: tuple[Tensor, Tensor]
) -> None:
    teacher = make_bert(num_hidden_layers=2, **settings).eval()
    config = StudentConfig(layers="all", architecture=architecture)
    student = models.make_student(teacher, config, seed=1)
    assert close(logits(student, inputs), logits(teacher, inputs))
    assert close(own_logits(student, inputs), logits(teacher, inputs))


@pytest.mark.parametrize("layers", ["alternate", [1, 2, 4], [5]], ids=str)
@pytest.mark.parametrize("architecture", ["auto", "same"])
def test_student_layers_are_the_teachers(
    architecture: Any, layers: Any, bert: models.Teacher
) -> None:
    config = StudentConfig(layers=layers, architecture=architecture)
    student = models.make_student(bert.model, config, seed=1)
    state, source = student.state_dict(), bert.model.state_dict()
    kept = [0, 2, 5] if layers == "alternate" else layers
    prefix = BERT_LAYER if architecture == "same" else DISTILBERT_LAYER
    own = [name for name in state if name.startswith(prefix)]
    assert len(own) == 16 * len(kept)
    for name in own:
        number, _, rest = name.removeprefix(prefix).partition(".")
        if architecture == "auto":
            module, _, kind = rest.rpartition(".")
            rest = f"{TWINS[module]}.{kind}"
        assert torch.equal(state[name], source[f"{BERT_LAYER}{kept[int(number)]}.{rest}"]), name


def test_student_outside_the_layers_is_the_teacher(bert: models.Teacher) -> None:
    student = models.make_student(bert.model, StudentConfig(), seed=1)
    ours, theirs = student.distilbert.embeddings, bert.model.bert.embeddings
    assert torch.equal(ours.word_embeddings.weight, theirs.word_embeddings.weight)
    assert torch.equal(ours.LayerNorm.weight, theirs.LayerNorm.weight)
    assert torch.equal(ours.LayerNorm.bias, theirs.LayerNorm.bias)
    folded = theirs.position_embeddings.weight + theirs.token_type_embeddings.weight[0]
    assert torch.equal(ours.position_embeddings.weight, folded)
    head = bert.model.cls.predictions
    assert torch.equal(student.vocab_projector.bias, head.decoder.bias)
    assert torch.equal(student.vocab_transform.weight, head.transform.dense.weight)
    assert torch.equal(student.vocab_layer_norm.bias, head.transform.LayerNorm.bias)


@pytest.mark.parametrize("architecture", ["auto", "distilbert", "same"])
def test_distilbert_makes_a_distilbert(
    architecture: Any, distilbert: models.Teacher, inputs: tuple[Tensor, Tensor]
) -> None:
    config = StudentConfig(layers="all", architecture=architecture)
    student = models.make_student(distilbert.model, config, seed=1)
    assert student.config.model_type == "distilbert"
    assert close(logits(student, inputs), logits(distilbert.model, inputs))
    assert close(own_logits(student, inputs), logits(distilbert.model, inputs))
    half = models.make_student(distilbert.model, StudentConfig(architecture=architecture), seed=1)
    assert half.config.n_layers == 2
    state, source = half.state_dict(), distilbert.model.state_dict()
    for i, layer in enumerate((0, 3)):
        name = f"{DISTILBERT_LAYER}%d.ffn.lin1.weight"
        assert torch.equal(state[name % i], source[name % layer])


def test_student_shares_no_memory_with_its_teacher(bert: models.Teacher) -> None:
    before = {name: p.clone() for name, p in bert.model.named_parameters()}
    for architecture in ("auto", "same"):
        student = models.make_student(bert.model, StudentConfig(architecture=architecture), 1)
        with torch.no_grad():
            for p in student.parameters():
                assert p.requires_grad
                p.fill_(7)
    assert all(torch.equal(p, before[name]) for name, p in bert.model.named_parameters())
    assert len(before) > 90


def test_student_is_fp32_and_in_training(bert: models.Teacher) -> None:
    for architecture in ("auto", "same"):
        student = models.make_student(bert.model, StudentConfig(architecture=architecture), 1)
        assert student.training
        assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_random_student_is_reproducible_by_its_seed(bert: models.Teacher) -> None:
    config = StudentConfig(init="random")
    one, again, other = (
        models.make_student(bert.model, config, seed).state_dict() for seed in (5, 5, 6)
    )
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["vocab_transform.weight"], other["vocab_transform.weight"])
    taken = models.make_student(bert.model, StudentConfig(), 5).state_dict()
    drawn = [name for name in one if one[name].ndim == 2]
    assert len(drawn) > 15
    for name in drawn:
        assert not torch.equal(one[name], taken[name]), name
        assert not torch.equal(one[name], other[name]), name


@pytest.mark.parametrize("seed", [2**32, 2**63 - 1, 2**64 - 1])
def test_random_student_takes_every_seed(seed: int, bert: models.Teacher) -> None:
    models.make_student(bert.model, StudentConfig(init="random", layers=[0]), seed)


@pytest.mark.parametrize("init", ["teacher", "random"])
def test_making_a_student_leaves_the_generators_alone(init: Any, bert: models.Teacher) -> None:
    config = StudentConfig(init=init, copy_mlm_transform=False)
    devices = list(range(torch.cuda.device_count()))
    before = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    models.make_student(bert.model, config, 5)
    after = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("architecture", ["auto", "same"])
def test_transform_that_is_not_copied_is_fresh(architecture: Any, bert: models.Teacher) -> None:
    config = StudentConfig(copy_mlm_transform=False, architecture=architecture)
    student = models.make_student(bert.model, config, 1)
    copied = models.make_student(bert.model, StudentConfig(architecture=architecture), 1)
    dense, norm, theirs = (
        (student.vocab_transform, student.vocab_layer_norm, copied.vocab_transform)
        if architecture == "auto"
        else (
            student.cls.predictions.transform.dense,
            student.cls.predictions.transform.LayerNorm,
            copied.cls.predictions.transform.dense,
        )
    )
    assert not torch.allclose(dense.weight, theirs.weight, atol=0.1)
    assert 0.15 < float(dense.weight.detach().std()) < 0.25  # the initializer_range
    assert (dense.bias == 0).all()
    assert (norm.weight == 1).all()
    assert (norm.bias == 0).all()
    rest, wanted = student.state_dict(), copied.state_dict()
    transform = ("vocab_transform", "vocab_layer_norm", "cls.predictions.transform")
    same = [name for name in rest if not name.startswith(transform)]
    assert len(same) == len(rest) - 4
    assert all(torch.equal(rest[name], wanted[name]) for name in same)
    again = models.make_student(bert.model, config, 1).state_dict()
    assert all(torch.equal(rest[name], again[name]) for name in rest)


def test_other_layer_norm_epsilon_refuses_distilbert(inputs: tuple[Tensor, Tensor]) -> None:
    teacher = make_bert(layer_norm_eps=1e-5).eval()
    for architecture in ("auto", "distilbert"):
        with pytest.raises(ConfigError, match=r"^student\.architecture: expected same.*1e-05"):
            models.make_student(teacher, StudentConfig(architecture=architecture), 1)
    student = models.make_student(teacher, StudentConfig(architecture="same", layers="all"), 1)
    assert close(logits(student, inputs), logits(teacher, inputs))


# --- Dropout --------------------------------------------------------------------------------------


def dropouts(model: nn.Module) -> set[float]:
    found = {m.p for m in model.modules() if isinstance(m, nn.Dropout)}
    return found | {m.dropout_prob for m in model.modules() if hasattr(m, "dropout_prob")}


@pytest.mark.parametrize("architecture", ["auto", "same"])
@pytest.mark.parametrize("init", ["teacher", "random"])
def test_dropout_reaches_the_modules(init: Any, architecture: Any, bert: models.Teacher) -> None:
    wanted = {None: {0.2, 0.3}, 0.0: {0.0}, 0.4: {0.4}}
    for dropout, values in wanted.items():
        config = StudentConfig(dropout=dropout, architecture=architecture, init=init)
        assert dropouts(models.make_student(bert.model, config, 1)) == values


def test_dropout_of_a_distilbert_reaches_the_modules(distilbert: models.Teacher) -> None:
    student = models.make_student(distilbert.model, StudentConfig(dropout=0.4), 1)
    assert dropouts(student) == {0.4}


@pytest.mark.parametrize("architecture", ["auto", "same"])
def test_student_without_dropout_is_a_function(
    architecture: Any, bert: models.Teacher, inputs: tuple[Tensor, Tensor]
) -> None:
    ids, mask = inputs
    for dropout, constant in ((0.0, True), (0.3, False)):
        config = StudentConfig(dropout=dropout, architecture=architecture)
        student = models.make_student(bert.model, config, 1)
        one, two = (student(ids, attention_mask=mask).logits for _ in range(2))
        assert torch.equal(one, two) == constant


# --- Loading --------------------------------------------------------------------------------------


def test_teacher_is_frozen_and_fp32(
    bert: models.Teacher, bert_folder: str, tmp_path: Path, inputs: tuple[Tensor, Tensor]
) -> None:
    folder = save(make_bert().bfloat16(), tmp_path / "bf16")
    for teacher in (bert, load(folder)[0]):
        assert not teacher.model.training
        assert not any(p.requires_grad for p in teacher.model.parameters())
        assert {p.dtype for p in teacher.model.parameters()} == {torch.float32}
        assert teacher.has_head
    made = make_bert().eval()
    assert torch.equal(logits(bert.model, inputs), logits(made, inputs))


def test_teachers_of_different_widths_are_an_ensemble(bert_folder: str, tmp_path: Path) -> None:
    narrow = save(make_bert(hidden_size=16, num_hidden_layers=2), tmp_path / "narrow")
    mixed = save(make_distilbert(dim=48), tmp_path / "mixed")
    specs = [TeacherSpec(bert_folder, 2.0), TeacherSpec(narrow, 0.5), TeacherSpec(mixed)]
    teachers, tokenizer = models.load_teachers(specs)
    assert [t.name for t in teachers] == [bert_folder, narrow, mixed]
    assert [t.weight for t in teachers] == [2.0, 0.5, 1.0]
    assert [t.parts.head.weight.shape[1] for t in teachers] == [32, 16, 48]
    assert tokenizer.get_vocab() == {word: i for i, word in enumerate(VOCABULARY)}


def test_encoder_without_head_gets_the_identity(
    tmp_path: Path, inputs: tuple[Tensor, Tensor]
) -> None:
    encoder = make_bert("BertModel")
    teacher = load(save(encoder, tmp_path / "encoder"))[0]
    assert not teacher.has_head
    head = teacher.model.cls.predictions
    assert torch.equal(head.transform.dense.weight, torch.eye(32))
    for zero in (head.transform.dense.bias, head.transform.LayerNorm.bias, head.decoder.bias):
        assert (zero == 0).all()
    assert (head.transform.LayerNorm.weight == 1).all()
    assert head.decoder.weight is teacher.model.bert.embeddings.word_embeddings.weight
    ids, mask = inputs
    with torch.no_grad():
        wanted = encoder.eval()(ids, attention_mask=mask).last_hidden_state
        got = teacher.parts.hidden(ids, mask)
    assert torch.equal(got, wanted)
    student = models.make_student(teacher.model, StudentConfig(layers="all"), 1)
    assert torch.equal(student.vocab_transform.weight, torch.eye(32))
    assert close(logits(student, inputs), logits(teacher.model, inputs))


def edit(folder: Path, file: str, **changes: Any) -> None:
    content = json.loads((folder / file).read_text(encoding="utf-8")) | changes
    (folder / file).write_text(json.dumps(content), encoding="utf-8")


def spoil(folder: Path, how: str) -> None:
    match how:
        case "gone":
            shutil.rmtree(folder)
        case "no config":
            (folder / "config.json").unlink()
        case "half a config":
            (folder / "config.json").write_text('{"model_type": "be', encoding="utf-8")
        case "no weights":
            (folder / "model.safetensors").unlink()
        case "half the weights":
            weights = (folder / "model.safetensors").read_bytes()
            (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
        case "other shapes":
            edit(folder, "config.json", hidden_size=64)
        case "missing layers":
            edit(folder, "config.json", num_hidden_layers=8)
        case "another family":
            edit(folder, "config.json", model_type="roberta")
        case "no tokenizer":
            for path in folder.glob("tokenizer*"):
                path.unlink()
        case "no [MASK]":
            edit(folder, "tokenizer_config.json", mask_token=None)
        case "[MASK] is [PAD]":
            edit(folder, "tokenizer_config.json", mask_token="[PAD]")


@pytest.mark.parametrize(
    "how",
    [
        "gone",
        "no config",
        "half a config",
        "no weights",
        "half the weights",
        "other shapes",
        "missing layers",
        "another family",
        "no tokenizer",
        "no [MASK]",
        "[MASK] is [PAD]",
    ],
)
def test_unfit_teacher_is_refused(how: str, bert_folder: str, tmp_path: Path) -> None:
    """In one line that names it, and not by whatever the libraries below happen to raise."""
    folder = tmp_path / "bert"
    shutil.copytree(bert_folder, folder)
    spoil(folder, how)
    with pytest.raises(ConfigError, match=r"^teacher: ") as raised:
        load(str(folder))
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_word_in_place_of_the_padding_is_trained(bert_folder: str, tmp_path: Path) -> None:
    """Where config.json names another id than the tokenizer, as that of another model does."""
    folder = Path(shutil.copytree(bert_folder, tmp_path / "bert"))
    edit(folder, "config.json", pad_token_id=7)
    student = models.make_student(load(str(folder))[0].model, StudentConfig(), 1)
    assert student.config.pad_token_id == 0
    student.distilbert(torch.tensor([[7, 8]])).last_hidden_state[0, 0, 0].backward()
    assert student.distilbert.embeddings.word_embeddings.weight.grad[7].any()


def test_teachers_of_other_words_are_refused(bert_folder: str, tmp_path: Path) -> None:
    words = [*VOCABULARY[:-2], VOCABULARY[-1], VOCABULARY[-2]]
    other = save(make_bert(), tmp_path / "other", words)
    with pytest.raises(ConfigError, match=r"^teacher: expected one vocabulary"):
        load(bert_folder, other)


def test_teacher_with_too_few_embeddings_is_refused(tmp_path: Path) -> None:
    folder = save(make_bert(vocab_size=len(VOCABULARY) - 1), tmp_path / "few")
    with pytest.raises(ConfigError, match=r"^teacher: .*embeddings"):
        load(folder)


def test_ids_may_go_beyond_the_number_of_tokens(recipe: list[str], tmp_path: Path) -> None:
    """A word twice in vocab.txt has the later id, which a text then has."""
    words = [*VOCABULARY, WORDS[0]]
    few, folder = save(make_bert(), tmp_path / "few", words), tmp_path / "twice"
    with pytest.raises(ConfigError, match=f"ids for {len(words)}"):
        load(few)
    teacher = save(make_bert(vocab_size=len(words)), folder, words)
    assert cli.main(["train", *recipe, f"--teacher={teacher}", "--steps=1"]) == 0
    counts = data.Store.open(tmp_path / "tokens").counts
    assert len(counts) == len(words)
    assert counts[-1] > 0
    assert counts[VOCABULARY.index(WORDS[0])] == 0


def test_ensemble_of_padded_vocabularies_is_refused_or_works(
    bert_folder: str, tmp_path: Path, inputs: tuple[Tensor, Tensor]
) -> None:
    """Heads are often padded to a multiple of 8 or 64; one step has to go through, or none to
    begin."""
    padded = save(make_bert(vocab_size=88), tmp_path / "padded")
    loss = LossConfig(hidden_cos_weight=0)
    config = Config(
        teacher=[bert_folder, padded], loss=loss, data=DataConfig(max_length=16), steps=1
    )
    for specs in (config.teachers, config.teachers[::-1]):
        try:
            teachers, _ = models.load_teachers(specs)
            checks.check_teachers(config, teachers)
        except ConfigError:
            continue
        side = micro_batch.TeacherSide(teachers, loss, torch.device("cpu"), torch.float32)
        student = models.make_student(teachers[0].model, config.student, 1)
        ids, mask = inputs
        labels = torch.full((ids.numel(),), -100)
        labels[2] = 7
        rows = mask.flatten().nonzero()[:, 0]
        batch = data.MicroBatch(ids, mask, rows, torch.tensor([2]), labels)
        counts = micro_batch.Normalizers(*torch.tensor([float(len(rows)), 1.0, float(len(rows))]))
        value, _ = micro_batch.Distillation(student, loss, side)(batch, side(batch), counts)
        assert torch.isfinite(value)


# --- Heads that do more, or less ------------------------------------------------------------------


def more(model: Any, what: Callable[[Tensor], Tensor]) -> Any:
    """The model with something more done to its logits."""
    forward = model.forward

    def changed(*arguments: Any, **keywords: Any) -> Any:
        out = forward(*arguments, **keywords)
        out.logits = what(out.logits)
        return out

    model.forward = changed
    return model


class ExtraNorm(torch.nn.Module):
    """A product with a norm before it, which `Family.features` knows nothing of."""

    def __init__(self, transform: torch.nn.Module, width: int) -> None:
        super().__init__()
        self.transform = transform
        self.norm = torch.nn.RMSNorm(width)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.norm(self.transform(hidden))


HEADS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "scale": (lambda x: x * 0.125, "a scale of 0.125"),
    "small scale": (lambda x: x * 1.001, "a scale of 1.001"),
    "softcap": (lambda x: 3 * torch.tanh(x / 3), "a softcap of 3"),
    "wide softcap": (lambda x: 100 * torch.tanh(x / 100), "a softcap of 100"),
    "bias": (lambda x: x + torch.arange(x.shape[-1]) * 0.01, "a bias added after the product"),
    "softmax": (lambda x: x.log_softmax(-1), "another layer before the product"),
}


@pytest.mark.parametrize("make", [make_bert, make_distilbert])
@pytest.mark.parametrize("head", HEADS)
def test_head_that_does_more_is_refused_with_its_cause(
    make: Any, head: str, tokenizer: Any
) -> None:
    what, cause = HEADS[head]
    model = make().train()
    models.check_head("teacher 'x'", model)
    with pytest.raises(ConfigError) as refused:
        models.check_head("teacher 'x'", more(model, what))
    message = str(refused.value)
    assert message.startswith("teacher 'x': expected the logits of a ")
    assert f"probably {cause}" in message
    assert "\n" not in message
    assert model.training


def test_norm_in_a_head_is_part_of_its_features() -> None:
    """In the module that holds the head, and that is cut before it."""
    model = make_bert()
    transform = model.cls.predictions.transform
    model.cls.predictions.transform = ExtraNorm(transform, 32)
    models.check_head("student", model)


def test_norm_after_the_body_is_refused() -> None:
    """That no module does."""
    model = make_bert()
    model.bert.register_forward_hook(lambda body, args, output: setattr(body, "out", output))
    body_forward = model.bert.forward
    model.bert.forward = body_forward
    model.cls.register_forward_pre_hook(lambda head, args: (args[0] / args[0].norm(),))
    with pytest.raises(ConfigError, match=r"^student: .* probably a"):
        models.check_head("student", model)


def test_head_of_nan_is_refused(tokenizer: Any) -> None:
    model = make_bert()
    with torch.no_grad():
        model.cls.predictions.decoder.bias.fill_(math.nan)
    with pytest.raises(ConfigError, match=r"^teacher: expected finite logits"):
        models.check_head("teacher", model)


def test_driver_checks_every_head(bert_folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of teachers and student."""
    config = Config(teacher=[bert_folder, bert_folder], data=DataConfig(max_length=16), steps=1)
    checked: list[str] = []
    monkeypatch.setattr(checks.models, "check_head", lambda what, *_: checked.append(what))
    checks.load_models(config)
    assert checked == [f"teacher {bert_folder!r}"] * 2 + ["student"]


def one_step(
    teachers: list[Any], student: Any, loss: LossConfig, inputs: Any
) -> tuple[float, float]:
    """The driver's loss of a batch, and the same from whole logits."""
    ids, mask = inputs
    labels = torch.full((ids.numel(),), -100)
    labels[2] = 7
    rows = mask.flatten().nonzero()[:, 0]
    batch = data.MicroBatch(ids, mask, rows, torch.tensor([2]), labels)
    loaded = [models.Teacher(str(i), i + 1.0, t.eval(), True) for i, t in enumerate(teachers)]
    side = micro_batch.TeacherSide(loaded, loss, torch.device("cpu"), torch.float32)
    counts = micro_batch.Normalizers(*torch.tensor([float(len(rows)), 1.0, float(len(rows))]))
    value, _ = micro_batch.Distillation(student.eval(), loss, side)(batch, side(batch), counts)
    targets = [t(ids, attention_mask=mask).logits.detach() for t in teachers]
    target = combine_teachers(targets, side.weights, temperature=loss.temperature)
    wanted = distillation_loss(
        student(ids, attention_mask=mask).logits,
        target,
        labels.view_as(ids),
        kd_weight=loss.kd_weight,
        ce_weight=loss.ce_weight,
        mask=mask.bool(),
    )
    return value.item(), wanted.loss.item()


@pytest.mark.parametrize("without", [(0,), (1,), (0, 1), (0, 1, 2)], ids=str)
def test_heads_without_bias_are_heads(without: Any, inputs: tuple[Tensor, Tensor]) -> None:
    """Of one teacher, of all, of the student too."""
    made = [make_bert(initializer_range=0.3), make_bert(), make_distilbert()]
    for i in without:
        made[i].get_output_embeddings().bias = None
    value, wanted = one_step(made[:2], made[2], LossConfig(hidden_cos_weight=0), inputs)
    assert value == pytest.approx(wanted, rel=1e-5)


def scaled(model: Any, softcap: float = 2.0) -> Any:
    """A model whose logits are half its head's product, capped, as its configuration says."""
    model.config.logit_scale, model.config.final_logit_softcapping = 0.5, softcap
    return more(model, lambda x: softcap * torch.tanh(x / 2 / softcap))


def test_scale_and_softcap_come_from_the_configuration(inputs: tuple[Tensor, Tensor]) -> None:
    """The teachers' differs from the student's, and evaluation goes by it, too."""
    made = [scaled(make_bert()) for _ in range(2)]
    parts = models.check_head("teacher", made[0])
    assert (parts.scale, parts.softcap) == (0.5, 2.0)
    assert close(own_logits(made[0], inputs), logits(made[0], inputs))
    for teachers, student in ((made, make_distilbert()), ([make_distilbert()], made[0])):
        value, wanted = one_step(teachers, student, LossConfig(hidden_cos_weight=0), inputs)
        assert value == pytest.approx(wanted, rel=1e-5)


def test_teachers_of_different_softcaps_are_refused(distilbert: models.Teacher) -> None:
    other = models.Teacher("other", 1.0, scaled(make_bert()), True)
    config = Config(data=DataConfig(max_length=16), steps=1)
    with pytest.raises(ConfigError, match=r"^teacher: expected one \(logit_scale, logit_softcap"):
        checks.check_teachers(config, [other, distilbert])
    apart = Config(loss=LossConfig(kd_weight=0), data=DataConfig(max_length=16), steps=1)
    checks.check_teachers(apart, [other, distilbert])  # nobody reads their logits


# --- Evaluation -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Held-out batches, and a model whose guesses are not all the same."""

    batches: data.Batches
    teacher: Any
    student: Any


SIDES = ("teacher", "student")
ALONE = World(rank=0, ranks=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def held(bert: models.Teacher, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Held:
    settings = DataConfig(source=str(corpus), max_length=24, heldout=0.4)
    config = Config(teacher=bert.name, data=settings, steps=1)
    tokenizer = models.load_teachers(config.teachers)[1]
    store = data.prepare(config, tokenizer, tmp_path_factory.mktemp("held") / "tokens")
    masking = MaskingConfig(probability=0.4, mask=0.4, random=0.2, keep=0.4)
    special, mask = tokenizer.all_special_ids, tokenizer.mask_token_id
    masker = Masker.from_counts(store.counts, special, mask, masking, seed=3)
    # One layer and large weights: its guesses differ from place to place.
    teacher = make_bert(num_hidden_layers=1, initializer_range=1.0).eval()
    student = models.make_student(teacher, StudentConfig(layers="all"), 1)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(1 + 0.1 * torch.randn_like(p))
    return Held(data.Batches(store, masker, 0, BatchConfig(8)), teacher, student)


@torch.no_grad()
def direct_scores(model: Any, teacher: Any, held: Held) -> Scores:
    """One text at a time, without padding, from transformers' own logits, in float64."""
    loss, right, agreeing, total = 0.0, 0, 0, 0
    for batch in held.batches.heldout(0, 1, 1, None):
        n = len(batch.tokens)
        labels = batch.labels[:n]
        at = labels != -100
        made = {}
        for name, m in (("model", model), ("teacher", teacher)):
            training = m.training
            made[name] = m.eval()(input_ids=batch.input_ids[:, :n]).logits[0][at].double()
            m.train(training)
        chosen = made["model"].log_softmax(-1).gather(1, labels[at, None])
        loss -= float(chosen.sum())
        right += int((made["model"].argmax(-1) == labels[at]).sum())
        agreeing += int((made["model"].argmax(-1) == made["teacher"].argmax(-1)).sum())
        total += int(at.sum())
    assert total > 100
    return Scores(loss / total, right / total, agreeing / total)


def predict(model: Any) -> Any:
    """The model's guesses as the driver asks for them."""

    def logits_of(batch: data.MicroBatch) -> Tensor:
        inputs = batch.input_ids, batch.attention_mask, batch.labelled
        return models.take_apart(model.eval()).logits_at(*inputs)

    return logits_of


def test_scores_equal_a_direct_computation(held: Held) -> None:
    """Whatever the micro-batches."""
    wanted = {name: direct_scores(getattr(held, name), held.teacher, held) for name in SIDES}
    assert wanted["teacher"].eval_agreement == 1
    assert 0.1 < wanted["student"].eval_agreement < 0.9
    assert wanted["student"].eval_accuracy > 0
    records = []
    for micro in (1, 5, 1000):
        evaluator = Evaluator(held.batches, ALONE, micro, None)
        got = {name: getattr(evaluator, name)(predict(getattr(held, name))) for name in SIDES}
        for name in SIDES:
            assert got[name].eval_loss == pytest.approx(wanted[name].eval_loss, rel=1e-5)
            assert got[name].eval_accuracy == pytest.approx(wanted[name].eval_accuracy, abs=1e-12)
        agreement = wanted["student"].eval_agreement
        assert got["student"].eval_agreement == pytest.approx(agreement, abs=1e-12)
        records.append(evaluator.record())
        total = sum(records[-1]["losses"]) / sum(records[-1]["tokens"])
        assert total == pytest.approx(wanted["student"].eval_loss, rel=1e-5)
    assert all(r["tokens"] == records[0]["tokens"] for r in records)
    assert all(r["losses"] == pytest.approx(records[0]["losses"], rel=1e-4) for r in records)


def test_losses_are_recorded_in_blocks_of_neighbours(
    held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluator = Evaluator(held.batches, ALONE, 3, 7)
    evaluator.student(predict(held.student))
    one_by_one = evaluator.record()
    assert one_by_one["examples"] == len(one_by_one["losses"]) == 7
    monkeypatch.setattr(heldout, "BLOCKS", 3)
    for key in ("tokens", "losses"):
        a, b, c, *rest = one_by_one[key]
        wanted = [a + b + c, sum(rest[:2]), sum(rest[2:])]
        assert evaluator.record()[key] == pytest.approx(wanted, abs=1e-3)


def test_scores_of_no_masked_token_are_not_defined(held: Held) -> None:
    evaluator = Evaluator(held.batches, ALONE, 3, 7)
    evaluator.batches = [batch.without_rows() for batch in evaluator.batches]
    assert evaluator.student(predict(held.student)) == Scores(None, None, None)


def test_agreement_of_the_teacher_with_itself_is_one(held: Held) -> None:
    evaluator = Evaluator(held.batches, ALONE, 4, None)
    assert (
        evaluator.student(predict(held.student)).eval_agreement is None
    )  # nobody to agree with yet
    before = evaluator.teacher(predict(held.teacher))
    assert evaluator.student(predict(held.teacher)).eval_agreement == 1.0
    assert evaluator.student(predict(held.teacher)).eval_loss == before.eval_loss


def test_scores_of_ranks_sum_to_those_of_one(held: Held) -> None:
    """Two ranks' sums, added up by hand."""

    class Half(World):
        def sum(self, values: Tensor) -> Tensor:
            sums.append(values.clone())
            return values

    sums: list[Tensor] = []
    for rank in range(2):
        evaluator = Evaluator(held.batches, Half(rank, 2, torch.device("cpu")), 3, None)
        evaluator.teacher(predict(held.teacher))
        evaluator.student(predict(held.student))
    together = sums[1] + sums[3]
    evaluator = Evaluator(held.batches, ALONE, 7, None)
    evaluator.teacher(predict(held.teacher))
    wanted = evaluator.student(predict(held.student))
    loss, right, agreeing, total, _ = together.sum(1).tolist()
    assert loss / total == pytest.approx(wanted.eval_loss, rel=1e-5)
    assert right / total == pytest.approx(wanted.eval_accuracy)
    assert agreeing / total == pytest.approx(wanted.eval_agreement)


def test_scores_keep_to_the_limit(held: Held) -> None:
    """The first texts, and no others."""
    evaluator = Evaluator(held.batches, ALONE, 4, 7)
    assert sum(len(batch.input_ids) for batch in evaluator.batches) == 7


# --- Export ---------------------------------------------------------------------------------------

LOADER = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, pipeline
made = {}
for folder in sys.argv[2:]:
    model, info = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(["the river of the [MASK]", "a king"], padding=True, return_tensors="pt")
    with torch.no_grad():
        kept = {n: batch[n] for n in ("input_ids", "attention_mask")}
        made[folder] = {
            "logits": model(**kept).logits,
            "answers": pipeline("fill-mask", model=folder)("the river of the [MASK]"),
            "type": type(model).__name__,
            "tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
            **kept,
        }
assert not [name for name in sys.modules if name.split(".")[0] == "distilfast"]
torch.save(made, sys.argv[1])
"""
SUMMARY = {
    "teacher": ["bert"],
    "teacher_parameters": 109_514_298,
    "parameters": 66_985_530,
    "student_layers": 3,
    "steps": 12_345,
    "tokens": 987_654_321,
    "seconds": 5430.0,
    "device": "one abacus",
    "scores": {
        "teacher": {"eval_loss": 1.23456, "eval_accuracy": 0.75, "eval_agreement": None},
        "student": {"eval_loss": 2.34567, "eval_accuracy": 0.625, "eval_agreement": 0.8125},
    },
}


@dataclass(frozen=True)
class Exported:
    folder: Path
    student: Any
    config: Config
    loaded: dict[str, Any]  # what a process without distilfast made of it


@pytest.fixture(scope="module")
def exported(
    bert_folder: str, bert: models.Teacher, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Exported]:
    """A DistilBERT and a BERT, exported with the weights as the engine gives them: a copy under
    each name, tied or not."""
    root, made = tmp_path_factory.mktemp("exported"), {}
    tokenizer = models.load_teachers([TeacherSpec(bert_folder)])[1]
    for architecture in ("auto", "same"):
        settings = StudentConfig(architecture=architecture)
        student = models.make_student(bert.model, settings, 1)
        randomize(student, seed=9)
        config = Config(
            teacher=bert_folder,
            student=settings,
            data=DataConfig(source="some/text.txt"),
            steps=12_345,
            output=f"runs/{architecture}-student",
        )
        named = student.named_parameters(remove_duplicate=False)
        weights = {name: p.detach().clone() for name, p in named}
        export.export(student, weights, tokenizer, config, SUMMARY, root / architecture)
        made[architecture] = (student, config)
    folders = [str(root / name) for name in made]
    command = [sys.executable, "-c", LOADER, str(root / "made.pt"), *folders]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    loaded = torch.load(root / "made.pt")
    return {n: Exported(root / n, *made[n], loaded[str(root / n)]) for n in made}


both = pytest.mark.parametrize("architecture", ["auto", "same"])


@pytest.mark.thorough
@both
def test_exported_model_gives_the_students_logits(
    architecture: str, exported: dict[str, Exported]
) -> None:
    """In a process that knows nothing of distilfast, with every weight found."""
    made = exported[architecture]
    loaded = made.loaded
    assert loaded["type"] == type(made.student).__name__
    assert loaded["attention_mask"].min() == 0
    inputs = (loaded["input_ids"], loaded["attention_mask"])
    wanted = logits(made.student, inputs)
    assert close(loaded["logits"][loaded["attention_mask"].bool()], wanted)


@both
def test_exported_model_fills_masks(architecture: str, exported: dict[str, Exported]) -> None:
    """By transformers' pipeline, and as `fill` says, which the report prints."""
    made = exported[architecture]
    answers = made.loaded["answers"]
    assert len(answers) == 5
    tokenizer = models.load_teachers(made.config.teachers)[1]
    [guesses] = heldout.fill(made.student.eval(), tokenizer, ["the river of the [MASK]"], k=5)
    assert [word for word, _ in guesses] == [answer["token_str"] for answer in answers]
    wanted = [answer["score"] for answer in answers]
    assert [share for _, share in guesses] == pytest.approx(wanted, rel=1e-4)
    assert set(word for word, _ in guesses) <= set(VOCABULARY)


@both
def test_exported_head_is_tied_and_stored_once(
    architecture: str, exported: dict[str, Exported]
) -> None:
    made = exported[architecture]
    assert models.take_apart(made.student).head.weight is (
        made.student.get_input_embeddings().weight
    )
    assert made.loaded["tied"]
    stored = load_file(made.folder / "model.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float32}
    size = sum(value.numel() for value in stored.values())
    assert size == sum(p.numel() for p in made.student.parameters())


@both
def test_card_holds_the_figures(architecture: str, exported: dict[str, Exported]) -> None:
    made = exported[architecture]
    card = (made.folder / "README.md").read_text(encoding="utf-8")
    head = yaml.safe_load(card.split("---")[1])
    assert head["library_name"] == "transformers"
    assert head["pipeline_tag"] == "fill-mask"
    text = " ".join(card.split())
    for figure in (
        f"# {architecture}-student",
        f"A {type(made.student).__name__} of 3 layers and 67.0 M parameters",
        made.config.teachers[0].name,
        "some/text.txt",
        "5 x KL at T = 2, 2 x masked-LM cross entropy, 1 x hidden-state cosine",
        "987,654,321 tokens in 12,345 steps of 4,096 sequences, 90.5 minutes on one abacus",
        "| teacher | 1.235 | 75.0 % | – | 109.5 M |",
        f"| {architecture}-student | 2.346 | 62.5 % | 81.2 % | 67.0 M |",
    ):
        assert figure in text, figure
    assert "logit" not in text.split("## Configuration")[0]
    [block] = re.findall(r"```yaml\n(.*?)```", card, flags=re.DOTALL)
    again = yaml.safe_load(block)
    again["optimizer"]["betas"] = tuple(again["optimizer"]["betas"])
    assert again == asdict(made.config)


def test_export_replaces_an_older_one_whole(exported: dict[str, Exported], tmp_path: Path) -> None:
    made, folder = exported["auto"], tmp_path / "model"
    folder.mkdir()
    (folder / "pytorch_model.bin").write_bytes(b"of an older run")
    weights = {n: p.detach() for n, p in made.student.named_parameters(remove_duplicate=False)}
    tokenizer = models.load_teachers(made.config.teachers)[1]
    export.export(made.student, weights, tokenizer, made.config, SUMMARY, folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in made.folder.iterdir()}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_failed_export_leaves_the_older_one(
    exported: dict[str, Exported], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = exported["auto"], tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}", encoding="utf-8")

    def fail(*_: Any) -> str:
        raise OSError("no space left on device")

    monkeypatch.setattr(export, "card", fail)
    weights = {n: p.detach() for n, p in made.student.named_parameters(remove_duplicate=False)}
    tokenizer = models.load_teachers(made.config.teachers)[1]
    with pytest.raises(OSError, match="no space"):
        export.export(made.student, weights, tokenizer, made.config, SUMMARY, folder)
    assert [p.name for p in folder.iterdir()] == ["config.json"]


def test_weights_exported_are_those_given(
    exported: dict[str, Exported], tmp_path: Path, inputs: tuple[Tensor, Tensor]
) -> None:
    """The fp32 masters, and not the model's own, which may be rounded to bf16."""
    import transformers

    made = exported["auto"]
    weights = {
        name: p.detach().clone()
        for name, p in made.student.named_parameters(remove_duplicate=False)
    }
    rounded = models.make_student(made.student, StudentConfig(layers="all"), 1).bfloat16()
    tokenizer = models.load_teachers(made.config.teachers)[1]
    export.export(rounded, weights, tokenizer, made.config, SUMMARY, tmp_path / "model")
    loaded = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    assert torch.equal(logits(loaded, inputs), logits(made.student, inputs))
