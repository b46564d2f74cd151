"""Runs whose student exists already: of another family, width, depth and number of rows."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import NARROW, ROOT, WORDS, make_masked_lm
from launches import torchrun
from safetensors.torch import load_file, save_file
from torch import Tensor

from distilfast import cli, train
from distilfast import config as configs
from distilfast.driver import checks, processes
from distilfast.driver.heldout import Evaluator
from distilfast.driver.micro_batch import Distillation, Normalizers, TeacherSide
from distilfast.driver.step import count

ALONE = processes.World(0, 1, torch.device("cpu"))
TOKENS = len(WORDS) + 5
COMMON, MORE = TOKENS + 3, TOKENS + 11  # rows of heads: both have more than the tokenizer's ids
BERT = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
BERT |= {"intermediate_size": 64, "max_position_embeddings": 64}


def run(recipe: Sequence[str], *changes: str) -> Path:
    assert train.main([*recipe, *changes]) == 0
    return Path(configs.parse([*recipe, *changes]).output)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scores(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key.startswith("eval_")}


def padding_wins(folder: Path, bias: str, rows: int) -> None:
    """Give the rows that no id has a bias with which they would win over all tokens."""
    file = folder / "model.safetensors"
    state = load_file(file)
    state[bias][rows:] = 50
    save_file(state, file, metadata={"format": "pt"})


@pytest.fixture(params=[(COMMON, MORE), (MORE, COMMON)], ids=["wider student", "wider teacher"])
def given(
    request: pytest.FixtureRequest, recipe: list[str], teacher: Path, tmp_path: Path
) -> list[str]:
    """The recipe with a BERT and a narrower DistilBERT whose heads have unequal numbers of rows. In
    the wider one a row that the other does not have would always win."""
    theirs, ours = request.param
    padded = make_masked_lm(tmp_path / "padded", "Bert", teacher, vocab_size=theirs, **BERT)
    student = make_masked_lm(tmp_path / "student", "DistilBert", teacher, vocab_size=ours, **NARROW)
    if ours > theirs:
        padding_wins(student, "vocab_projector.bias", COMMON)
    else:
        padding_wins(padded, "cls.predictions.bias", COMMON)
    changes = (f"--teacher={padded}", f"--student.model={student}", "--loss.hidden_cos_weight=0")
    return [*recipe, *changes, "--steps=3"]


def plain(folder: str) -> Any:
    import transformers

    return transformers.AutoModelForMaskedLM.from_pretrained(folder).eval()


def plain_scores(config: configs.Config, setup: checks.Setup) -> dict[str, dict[str, float]]:
    """The scores of both models on the held-out examples, one by one, by transformers alone."""
    models = {"teacher": plain(config.teachers[0].name), "student": plain(config.student.model)}
    loss, right, agreeing, total = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0), 0, 0
    for batch in setup.batches.heldout(0, 1, 1, None):
        n = len(batch.tokens)
        labels = batch.labels[:n]
        at = labels != -100
        guesses = []
        for name, model in models.items():
            with torch.no_grad():
                logits = model(batch.input_ids[:, :n]).logits[0, at, :COMMON].double()
            loss[name] += float(F.cross_entropy(logits, labels[at], reduction="sum"))
            guesses.append(logits.argmax(-1))
            right[name] += int((guesses[-1] == labels[at]).sum())
        agreeing += int((guesses[0] == guesses[1]).sum())
        total += int(at.sum())
    assert total > 50
    return {
        name: {"eval_loss": loss[name] / total, "eval_accuracy": right[name] / total}
        for name in models
    } | {"both": {"eval_agreement": agreeing / total}}


def test_models_are_compared_over_the_columns_of_both(given: list[str]) -> None:
    """Padding columns would win, and take all of the probability."""
    config = configs.parse(given)
    setup = checks.prepare(config, ALONE)
    teacher = TeacherSide(setup.teachers, config.loss, ALONE.device, torch.float32)
    module = Distillation(setup.student, config.loss, teacher).eval()
    assert module.columns == COMMON
    wanted = plain_scores(config, setup)
    evaluator = Evaluator(setup.batches, ALONE, 4, None, module.columns)
    for name, predict in (("teacher", teacher.predict), ("student", module)):
        found = getattr(evaluator, name)(torch.no_grad()(predict))
        assert found.eval_loss == pytest.approx(wanted[name]["eval_loss"], rel=1e-5)
        assert found.eval_accuracy == pytest.approx(wanted[name]["eval_accuracy"], abs=1e-12)
    assert found.eval_agreement == pytest.approx(wanted["both"]["eval_agreement"], abs=1e-12)
    # Without the limit one of them always guesses a padding column, which is no token's label.
    blind = Evaluator(setup.batches, ALONE, 4, None)
    assert 0 in (blind.teacher(teacher.predict).eval_accuracy, blind.student(module).eval_accuracy)


def plain_gradient(config: configs.Config, setup: checks.Setup, losses: dict[str, float]) -> Any:
    """Loss and gradients of a batch of 16, by transformers and PyTorch alone."""
    student, teacher = plain(config.student.model), plain(config.teachers[0].name)
    (batch,) = setup.batches.step(0, 0, 1, 16)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    z = student(**inputs).logits.flatten(0, 1)[:, :COMMON]
    with torch.no_grad():
        t = teacher(**inputs).logits.flatten(0, 1)[:, :COMMON]
    rows, T = batch.tokens, config.loss.temperature
    a, b = z[rows], t[rows]
    kd = T**2 * F.kl_div((a / T).log_softmax(-1), (b / T).softmax(-1), reduction="batchmean")
    ce = F.cross_entropy(z[batch.labelled], batch.labels[batch.labelled])
    mse = (a - b).square().sum(-1).mean()
    cosine = (1 - F.cosine_similarity(a, b, dim=-1)).mean()
    parts = {"kd": kd, "ce": ce, "mse": mse, "logit_cos": cosine}
    loss = sum(losses[name] * part for name, part in parts.items())
    loss.backward()
    return loss, {name: p.grad for name, p in student.named_parameters()}


@pytest.mark.parametrize(
    "losses",
    [
        {"kd": 5.0, "ce": 2.0, "mse": 0.0, "logit_cos": 0.0},
        {"kd": 0.0, "ce": 1.0, "mse": 0.0, "logit_cos": 0.0},  # the teacher is not asked
        {"kd": 1.0, "ce": 1.0, "mse": 0.5, "logit_cos": 0.5},
    ],
    ids=["kd, ce", "ce", "all"],
)
def test_gradient_is_that_of_plain_torch_in_any_split(
    losses: dict[str, float], given: list[str]
) -> None:
    changes = [f"--loss.{name}_weight={weight}" for name, weight in losses.items()]
    config = configs.parse([*given, *changes])
    setup = checks.prepare(config, ALONE)
    wanted_loss, wanted = plain_gradient(config, setup, losses)
    teacher = TeacherSide(setup.teachers, config.loss, ALONE.device, torch.float32)
    module = Distillation(setup.student, config.loss, teacher)
    scale = max(float(g.abs().max()) for g in wanted.values())
    for micro in (16, 3):
        module.zero_grad()
        share, total = setup.batches.step(0, 0, 1, micro), 0.0
        counts = Normalizers(*count(config, ALONE, share).float())
        for batch in share:
            loss, _ = module(batch, teacher(batch), counts)
            loss.backward()
            total += float(loss.detach())
        assert total == pytest.approx(float(wanted_loss.detach()), rel=1e-5)
        found = dict(setup.student.named_parameters())
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert torch.allclose(found[name].grad, gradient, rtol=1e-4, atol=1e-6 * scale), name
        bias = setup.student.vocab_projector.bias.grad
        assert not bias[COMMON:].any()


@pytest.mark.thorough
def test_finished_runs_model_is_a_student(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run begins with the scores that the first ended with."""
    first = run(given)
    config = configs.parse(given)
    summary = json.loads((first / "summary.json").read_text(encoding="utf-8"))
    assert summary["student_layers"] == 2
    assert summary["student"] == f"from {config.student.model}"
    assert set(summary["scores"]) == {"teacher", "untrained student", "student"}
    student = plain(config.student.model)
    assert summary["parameters"] == sum(p.numel() for p in student.parameters())
    wanted = plain_scores(config, checks.prepare(config, ALONE))
    untrained = summary["scores"]["untrained student"]
    assert untrained == pytest.approx(wanted["student"] | wanted["both"], rel=1e-5)
    teacher = {k: v for k, v in summary["scores"]["teacher"].items() if v is not None}
    assert teacher == pytest.approx(wanted["teacher"], rel=1e-5)
    trained = plain(str(first / "model"))
    before = dict(student.named_parameters())
    assert not any(torch.equal(x, before[name]) for name, x in trained.named_parameters())
    for page in ("model/README.md", "report.html"):
        assert f"from {config.student.model}" in (first / page).read_text(encoding="utf-8")
    card = (first / "model" / "README.md").read_text(encoding="utf-8")
    assert "A DistilBertForMaskedLM of 2 layers" in card
    assert "of the model that the student comes from" in card
    again = [*given, f"--student.model={first / 'model'}", f"--output={tmp_path / 'again'}"]
    capsys.readouterr()
    assert cli.main(["check", *again]) == 0
    assert f"student:  DistilBertForMaskedLM, 0.0 M parameters, from {first}" in (
        capsys.readouterr().out
    )
    second = run(again)
    assert scores(lines(second)[0]) == pytest.approx(scores(lines(first)[-1]), rel=1e-6)


@pytest.mark.thorough
def test_run_whose_student_has_changed_is_not_resumed(
    recipe: list[str], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = make_masked_lm(tmp_path / "student", "DistilBert", teacher, **NARROW)
    changes = [f"--student.model={student}", "--loss.hidden_cos_weight=0"]
    changes += ["--checkpoint.every=2", "--steps=3"]
    folder = run(recipe, *changes)
    before = (student / "model.safetensors").read_bytes()
    wanted = load_file(folder / "model" / "model.safetensors")
    for _ in range(2):
        make_masked_lm(student, "DistilBert", teacher, seed=2, **NARROW)
        (folder / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(folder / "model", ignore_errors=True)
        assert train.main([*recipe, *changes]) == 2
        message = capsys.readouterr().err
        assert f"others for student {str(student)!r}; a run on these needs an output" in message
    (student / "model.safetensors").write_bytes(before)
    capsys.readouterr()
    run(recipe, *changes)
    assert "resumes from step 2" in capsys.readouterr().out
    found = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(x, wanted[name]) for name, x in found.items())


def test_hidden_loss_takes_a_student_of_the_teachers_width(
    recipe: list[str], teacher: Path, tmp_path: Path
) -> None:
    """This is all that has to be written: the keys of `loss` keep their defaults."""
    wide = make_masked_lm(tmp_path / "wide", "DistilBert", teacher, **NARROW | {"dim": 32})
    folder = run(recipe, f"--student.model={wide}", "--steps=2")
    assert all(line["hidden_cos"] > 0 for line in lines(folder) if "loss" in line)


def test_student_without_a_head_is_said_to_get_one(
    recipe: list[str],
    teacher: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    body = make_masked_lm(tmp_path / "body", "DistilBert", teacher, **NARROW)
    plain(str(body)).distilbert.save_pretrained(body)
    changes = [f"--student.model={body}", "--loss.hidden_cos_weight=0"]
    said = f"student.model: {str(body)!r} has no masked-LM head: it begins with a new one"
    assert cli.main(["check", *recipe, *changes]) == 0
    assert [record.getMessage() for record in caplog.records] == [said]
    assert cli.main(["check", *recipe, *changes, "--student.init=random"]) == 0
    assert f"drawn, in the shape of {body}" in capsys.readouterr().out
    assert len(caplog.records) == 1


ENCODER = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2}
ENCODER |= {"intermediate_size": 40, "max_position_embeddings": 66, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "Roberta": ENCODER,
    "ModernBert": ENCODER,
    "Electra": ENCODER | {"embedding_size": 12},
    "Albert": ENCODER | {"embedding_size": 12},
    "DebertaV2": ENCODER | {"relative_attention": True, "pos_att_type": "p2c|c2p"},
    "Bert": ENCODER | {"tie_word_embeddings": False},
}


@pytest.mark.thorough
@pytest.mark.parametrize("kind", FAMILIES)
def test_student_of_any_family_is_saved_as_it_was_trained(
    kind: str, recipe: list[str], teacher: Path, tmp_path: Path
) -> None:
    """Plain transformers scores what was saved as the run scored its last student."""
    student = make_masked_lm(
        tmp_path / "student", kind, teacher, vocab_size=TOKENS + 9, **FAMILIES[kind]
    )
    changes = [f"--student.model={student}", "--loss.hidden_cos_weight=0", "--student.dropout=0"]
    folder = run(recipe, *changes, "--steps=3", "--optimizer.learning_rate=5e-3")
    steps = [line["loss"] for line in lines(folder) if "loss" in line]
    assert len(steps) == 3
    before, after = (scores(line) for line in (lines(folder)[0], lines(folder)[-1]))
    assert after["eval_loss"] < before["eval_loss"]
    config = configs.parse([*recipe, f"--student.model={folder / 'model'}"])
    setup = checks.prepare(configs.parse([*recipe, *changes]), ALONE)
    common = plain_scores_of(config, setup, TOKENS)
    assert after["eval_loss"] == pytest.approx(common, rel=1e-5)


def plain_scores_of(config: configs.Config, setup: checks.Setup, columns: int) -> float:
    """The loss of the configuration's student on the held-out examples."""
    model, losses = plain(config.student.model), []
    for batch in setup.batches.heldout(0, 1, 1, None):
        n = len(batch.tokens)
        at = batch.labels[:n] != -100
        with torch.no_grad():
            logits = model(batch.input_ids[:, :n]).logits[0, at, :columns].double()
        losses.append(F.cross_entropy(logits, batch.labels[:n][at], reduction="none"))
    return float(torch.cat(losses).mean())


@pytest.mark.thorough
@pytest.mark.parametrize("given", [(COMMON, MORE)], indirect=True, ids=["wider student"])
def test_two_ranks_at_stage_3_train_it_as_one_does(given: list[str], tmp_path: Path) -> None:
    """Where a head exists only inside the student's forward, and teachers are sharded."""
    one = run(given, "--batch.micro_sequences=16")
    changes = ("--zero.stage=3", "--zero.shard_teacher=true", f"--output={tmp_path / 'two'}")
    torchrun(str(ROOT / "distilfast" / "train.py"), *given, *changes)
    a, b = lines(one), lines(tmp_path / "two")
    assert len(a) == len(b) == 3 + 2
    for x, y in zip(a, b, strict=True):
        for key in x.keys() - {"tokens_per_second"}:
            assert x[key] == pytest.approx(y[key], rel=1e-5, abs=1e-5), key
    weights: list[dict[str, Tensor]] = [
        load_file(folder / "model" / "model.safetensors") for folder in (one, tmp_path / "two")
    ]
    assert all(torch.allclose(x, weights[1][name], atol=1e-4) for name, x in weights[0].items())
