"""Weights that do not fit their model are refused by whatever loads it, others are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WORDS
from safetensors.torch import load_file, save_file
from torch import Tensor

from distilfast import cli, models
from distilfast.config import ConfigError, TeacherSpec
from distilfast.studies import sizes
from distilfast.tasks import GLUE, fine_tuning

State = dict[str, Tensor]
QUERY = "bert.encoder.layer.3.attention.self.query"
# The driver, `glue` and `finetune`, and `compare`.
LOADERS: dict[str, Callable[[str], Any]] = {
    "teacher": lambda folder: models.load_teachers([TeacherSpec(folder)])[0][0].model,
    "task": lambda folder: fine_tuning.load(folder, GLUE["SST-2"], 0, 24),
    "body": lambda folder: sizes.load([folder], None, False, 24)[0].build(),
}


def change(folder: Path, how: Callable[[State], State]) -> str:
    file = folder / "model.safetensors"
    state = {name: x.clone() for name, x in how(load_file(file)).items()}
    save_file(state, file, metadata={"format": "pt"})
    return str(folder)


def without(*starts: str) -> Callable[[State], State]:
    return lambda state: {k: v for k, v in state.items() if not k.startswith(starts)}


def having(*names: str) -> Callable[[State], State]:
    return lambda state: state | {name: torch.ones(2) for name in names}


@pytest.fixture
def classifier(teacher: Path, tmp_path: Path) -> Path:
    """The teacher with a classifier of two outputs and BERT's pooler."""
    import transformers

    folder = Path(shutil.copytree(teacher, tmp_path / "classifier"))
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    load(folder, num_labels=2).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("how", "named"),
    [
        (lambda s: {f"module.{k}": v for k, v in s.items()}, "got none for bert.embeddings"),
        (without("bert.encoder.layer.3."), "got none for bert.encoder.layer.3"),
        (without(f"{QUERY}.bias"), f"got none for {QUERY}.bias"),
        (having("bert.encoder.layer.3.output.adapter.weight"), "layer.3.output.adapter.weight"),
        (having(QUERY.replace("query", "distance_embedding.weight")), "distance_embedding"),
        (having("bert.encoder.layer.4.output.dense.bias"), "bert.encoder.layer.4"),
        (having("bert.prefix_tuning.weight"), "bert.prefix_tuning.weight"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    loader: str, how: Callable[[State], State], named: str, classifier: Path
) -> None:
    folder = change(classifier, how)
    with pytest.raises(ConfigError) as raised:
        LOADERS[loader](folder)
    said = str(raised.value)
    assert folder in said
    assert named.removeprefix("got none for bert.") in said
    assert ("got none for" in said) == ("got none for" in named)
    assert "\n" not in said


@pytest.mark.parametrize("prefix", ["bert.", ""])
@pytest.mark.parametrize("loader", LOADERS)
def test_weights_that_are_not_needed_are_allowed(
    loader: str, prefix: str, teacher: Path, tmp_path: Path
) -> None:
    """Heads of other tasks, a pooler, buffers and leftovers that files on the hub have."""
    import transformers

    folder = Path(shutil.copytree(teacher, tmp_path / "bert"))
    saved = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    (saved if prefix else saved.bert).save_pretrained(folder)
    rest = "embeddings.position_ids embeddings.token_type_ids encoder.layer.0.attn.masked_bias"
    inner = [*rest.split(), "embeddings.word_embeddings._weight", "decoder.layer.0.weight"]
    heads = ["cls.seq_relationship.weight", "lm_head.dense.weight", "vocab_projector.bias"]
    pooler = {
        f"{prefix}pooler.dense.weight": torch.eye(32),
        f"{prefix}pooler.dense.bias": torch.ones(32),
    }
    change(folder, having(*(prefix + name for name in inner), *heads))
    change(folder, lambda state: state | pooler)
    loaded = LOADERS[loader](str(folder)).base_model
    assert torch.equal(
        loaded.encoder.layer[3].output.dense.weight, saved.bert.encoder.layer[3].output.dense.weight
    )
    assert loaded.pooler is None or torch.equal(loaded.pooler.dense.weight, torch.eye(32))


def test_head_of_a_fine_tuned_model_has_to_be_there(classifier: Path) -> None:
    for lost in ("classifier.bias", "bert.pooler."):
        folder = change(classifier, without(lost))
        with pytest.raises(ConfigError, match=f"got none for .*{lost}"):
            LOADERS["task"](folder)


def test_head_of_its_own_is_kept_where_the_configuration_ties_it(
    teacher: Path, tmp_path: Path
) -> None:
    """A model made from that configuration, as the export makes one, would have the embeddings
    twice or the head twice."""
    folder = Path(shutil.copytree(teacher, tmp_path / "untied"))
    decoder = {"cls.predictions.decoder.weight": torch.randn(len(WORDS) + 5, 32)}
    model = LOADERS["teacher"](change(folder, lambda state: state | decoder))
    assert torch.equal(model.get_output_embeddings().weight, *decoder.values())
    again = type(model)(model.config)
    again.load_state_dict(model.state_dict())
    ids = torch.arange(5, 17)[None]
    assert torch.equal(again.eval()(ids).logits, model(ids).logits)
    assert LOADERS["teacher"](str(teacher)).config.tie_word_embeddings


def test_half_a_masked_lm_head_is_refused(teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "half"))
    for lost in ("cls.predictions.bias", "cls.predictions.transform.dense."):
        with pytest.raises(ConfigError, match=f"whole masked-LM head .* got none for .*{lost}"):
            LOADERS["teacher"](change(folder, without(lost)))


def test_commands_refuse_weights_that_do_not_fit(
    classifier: Path, teacher: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    from conftest import make_task

    folder = change(classifier, lambda state: {f"module.{k}": v for k, v in state.items()})
    make_task(tmp_path / "data" / "words")
    given = ["--data", str(tmp_path / "data"), "--output", str(tmp_path / "out")]
    finetune = ["finetune", "--teacher", folder, "--student", str(teacher), "--task", "words"]
    for command in (["glue", "--model", folder, "--tasks", "words"], finetune):
        assert cli.main([*command, *given, "--max_length", "24"]) == 2
        _, said = capfd.readouterr()
        assert "expected all weights of a BertForSequenceClassification, got none for" in said
        assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
