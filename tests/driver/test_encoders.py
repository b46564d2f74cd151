"""The driver with encoders of other families than BERT: what it trains, and what it leaves."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from families import FAMILIES, POSITIONS, make_family
from safetensors.torch import load_file

from distilfast import cli, data
from distilfast.config import parse
from distilfast.driver import checks, heldout, results


@dataclass(frozen=True)
class Trained:
    """A run of three steps, and the student as it was in memory at its end."""

    recipe: list[str]
    output: Path
    student: Any

    def loaded(self) -> tuple[Any, Any]:
        """The model that it left, by plain transformers, and the tokenizer."""
        kind, folder = transformers.AutoModelForMaskedLM, self.output / "model"
        # As it was trained: on a CPU, short texts are faster without the fused attention.
        options = {"attn_implementation": "eager", "output_loading_info": True}
        model, info = kind.from_pretrained(folder, **options)
        assert not any(info.values()), info
        return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)

    def metrics(self) -> list[dict[str, Any]]:
        lines = (self.output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Callable[[str], Trained]:
    """A family's run, made once. Half of its layers, the longest texts there can be."""
    root, made = tmp_path_factory.mktemp("encoders"), dict[str, Trained]()

    def run(kind: str) -> Trained:
        if kind in made:
            return made[kind]
        folder = root / kind
        make_family(kind, folder / "teacher")
        config = folder / "recipe.yaml"
        config.write_text(
            f"""\
teacher: {folder / "teacher"}
student: {{dropout: 0}}
data: {{source: {corpus}, prepared: {folder / "tokens"}, max_length: {POSITIONS}, heldout: 0.1}}
masking: {{probability: 0.3}}
optimizer: {{learning_rate: 1.0e-3, max_grad_norm: 1.0}}
batch: {{sequences: 24, micro_sequences: 24}}
steps: 3
precision: fp32
tensorboard: false
output: {folder / "run"}
""",
            encoding="utf-8",
        )
        recipe, kept, write = ["--config", str(config)], [], results.write
        assert cli.main(["check", *recipe]) == 0

        def keep(config: Any, world: Any, setup: Any, *rest: Any) -> None:
            kept.append(setup.student)
            write(config, world, setup, *rest)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results, "write", keep)
            assert cli.main(["train", *recipe]) == 0
        made[kind] = Trained(recipe, folder / "run", kept[0].eval())
        return made[kind]

    return run


@pytest.mark.parametrize("kind", FAMILIES)
def test_model_gives_the_students_logits_in_plain_transformers(
    kind: str, trained: Callable[[str], Trained]
) -> None:
    run = trained(kind)
    model, tokenizer = run.loaded()
    assert model.config.model_type == kind
    assert model.config.num_hidden_layers == 2
    batch = tokenizer(
        ["the river", "king queen the north and a mountain"], padding=True, return_tensors="pt"
    )
    assert not batch["attention_mask"].all()
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, run.student(**batch).logits)
    lines = run.metrics()
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3]
    assert lines[-1]["eval_loss"] != lines[0]["eval_loss"]
    assert None not in lines[-1].values()


@pytest.mark.parametrize("kind", FAMILIES)
def test_card_has_an_example_that_runs(kind: str, trained: Callable[[str], Trained]) -> None:
    """With the tokenizer's own mask token; and `fill` says what transformers' pipeline says."""
    folder = trained(kind).output / "model"
    card = (folder / "README.md").read_text(encoding="utf-8")
    [text] = re.findall(r'model="path/to/this/folder"\)\("(.*)"\)', card)
    answers = transformers.pipeline("fill-mask", model=str(folder))(text)
    assert len(answers) == 5
    model, tokenizer = trained(kind).loaded()
    [guesses] = heldout.fill(model, tokenizer, ["Paris is the [MASK] of France."], k=5)
    assert [word for word, _ in guesses] == [answer["token_str"] for answer in answers]
    wanted = [answer["score"] for answer in answers]
    assert [share for _, share in guesses] == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("kind", FAMILIES)
def test_no_input_has_an_id_without_a_token(kind: str, trained: Callable[[str], Trained]) -> None:
    """A vocabulary may have more rows than tokens; special tokens are left alone."""
    run = trained(kind)
    _, tokenizer = run.loaded()
    shares = ["--masking.mask=0", "--masking.random=1", "--masking.keep=0"]
    config = parse([*run.recipe, *shares, "--masking.smoothing=0"])
    store = data.Store.open(config.token_folder)
    batches = checks.make_batches(config, tokenizer, store)
    special = torch.tensor(tokenizer.all_special_ids)
    seen = set()
    for step in range(12):
        for batch in batches.step(step, 0, 1, 24):
            chosen = batch.labels != data.IGNORE_INDEX
            assert not torch.isin(batch.labels[chosen], special).any()
            seen.update(batch.input_ids.flatten()[chosen].tolist())
    assert len(seen) > len(tokenizer) / 2
    assert seen <= set(tokenizer.get_vocab().values())
    rows = run.student.get_input_embeddings().num_embeddings
    assert rows == max(tokenizer.get_vocab().values()) + 1 + FAMILIES[kind].spare_rows


@pytest.mark.parametrize(
    "kind", [pytest.param("roberta", marks=pytest.mark.thorough), "modernbert"]
)
def test_split_of_a_batch_does_not_change_the_steps(
    kind: str, trained: Callable[[str], Trained], tmp_path: Path
) -> None:
    """With padding in the batches, which moves no position and no window."""
    whole = trained(kind)
    store = data.Store.open(whole.output.parent / "tokens")
    assert len(store.lengths("train").unique()) > 3
    changes = [f"--output={tmp_path / 'run'}", "--batch.micro_sequences=5"]
    assert cli.main(["train", *whole.recipe, *changes]) == 0
    other = Trained(whole.recipe, tmp_path / "run", None)
    for a, b in zip(whole.metrics(), other.metrics(), strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {"tokens_per_second"}:
            assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-5), key
    weights = [load_file(x.output / "model" / "model.safetensors") for x in (whole, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], atol=1e-4, rtol=0)
