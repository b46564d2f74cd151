"""The driver with causal LMs: whole runs, exact losses and gradients, resume, refusals."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from conftest import make_teacher
from families import make_causal
from safetensors.torch import load_file
from torch import Tensor

from distilfast import cli, models, train
from distilfast import config as configs
from distilfast.driver import checks, choices, heldout, processes
from distilfast.driver.heldout import Evaluator
from distilfast.driver.micro_batch import Distillation, Normalizers, TeacherSide
from distilfast.driver.step import count
from distilfast.errors import ConfigError

ALONE = processes.World(0, 1, torch.device("cpu"))
TIMES = ("tokens_per_second",)
Recipe = Callable[..., list[str]]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Recipe:
    """Makes the arguments of a run of three steps with a tiny teacher of a family."""
    root = tmp_path_factory.mktemp("causal")

    def make(kind: str, output: Path, *changes: str) -> list[str]:
        folder = root / kind
        if not folder.is_dir():
            make_causal(folder / "teacher", kind)
            settings: dict[str, Any] = {
                "teacher": str(folder / "teacher"),
                "student": {"dropout": 0.0},
                "data": {
                    "source": str(corpus),
                    "prepared": str(root / "tokens"),
                    "max_length": 32,
                    "min_length": 3,
                    "heldout": 0.1,
                },
                "optimizer": {"learning_rate": 1e-3, "max_grad_norm": 1.0},
                "batch": {"sequences": 24, "micro_sequences": 4},
                "steps": 3,
                "evaluate": {"every": 0},
                "precision": "fp32",
                "tensorboard": False,
            }
            (folder / "recipe.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
        return ["--config", str(folder / "recipe.yaml"), f"--output={output}", *changes]

    return make


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(x).items() if k not in TIMES} for x in lines]


# --- A run ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.thorough)])
def test_run_leaves_a_model_that_plain_transformers_continues_texts_with(
    kind: str, recipe: Recipe, tmp_path: Path, capsys: Any
) -> None:
    arguments = recipe(kind, tmp_path / "run")
    assert cli.main(["check", *arguments]) == 0
    assert "packing:  several examples a sequence" in capsys.readouterr().out
    assert cli.main(["train", *arguments]) == 0
    assert "perplexity" in capsys.readouterr().err
    run = tmp_path / "run"
    first, *_, last = (x for x in metrics(run) if "eval_loss" in x)
    assert last["eval_kl"] < first["eval_kl"]
    assert configs.parse(["--config", str(run / "config.yaml")]).objective == "causal"

    folder = run / "model"
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True
    )
    assert not any(info.values()), info
    assert models.depth(model) == 2
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    write = transformers.pipeline("text-generation", model=str(folder))
    [found] = write("the river city", max_new_tokens=4, do_sample=False)
    table = heldout.continued({"it": model}, tokenizer, ["the river city"], 4)
    [[text, written]] = table.rows
    assert found["generated_text"].removeprefix(text).strip() == written
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "pipeline_tag: text-generation" in card
    assert 'pipeline("text-generation", model="path/to/this/folder")("Paris is")' in card
    assert "2 x next-token cross entropy" in card
    assert "| perplexity | KL |" in card
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Held-out perplexity" in page
    assert "masked" not in re.sub(r"<(pre|style|script).*?</\1>", "", page, flags=re.DOTALL)
    assert "next tokens guessed first" in page


# --- Exactness ------------------------------------------------------------------------------------


class Parts:
    """A run's teachers, student and batches, without DeepSpeed."""

    def __init__(self, arguments: list[str]):
        self.config = configs.parse(arguments)
        self.setup = checks.prepare(self.config, ALONE)
        dtype = torch.float32
        self.teacher = TeacherSide(self.setup.teachers, self.config.loss, ALONE.device, dtype)
        self.module = Distillation(self.setup.student, self.config.loss, self.teacher)

    def step(self, ranks: int = 1) -> tuple[float, dict[str, Tensor]]:
        """Loss and gradient of the first step, in so many shares."""
        micro = self.config.batch.micro_sequences
        shares = [self.setup.batches.step(0, rank, ranks, micro) for rank in range(ranks)]
        counts = torch.stack([count(self.config, ALONE, share) for share in shares]).sum(0)
        total = 0.0
        self.module.zero_grad()
        for batch in (batch for share in shares for batch in share):
            loss, _ = self.module(batch, self.teacher(batch), Normalizers(*counts.float()))
            loss.backward()
            total += float(loss.detach())
        weights = self.module.named_parameters()
        return total, {n: p.grad.clone() for n, p in weights if p.grad is not None}

    def plain(self) -> tuple[float, dict[str, Tensor]]:
        """The same by the models' own logits, one document after the other."""
        config, student = self.config.loss, self.setup.student
        shares = [t.weight for t in self.setup.teachers]
        examples, _ = self.setup.batches.examples(0)
        documents = [x.tolist() for x in self.setup.batches.store.rows("train", examples)]
        targets, tokens = sum(len(x) - 1 for x in documents), sum(map(len, documents))
        v = self.module.columns
        total = torch.zeros(())
        for document in documents:
            ids = torch.tensor([document])
            out = student(ids, output_hidden_states=True)
            z, labels = out.logits[0, :-1, :v], ids[0, 1:]
            total = total + config.ce_weight * F.cross_entropy(z, labels, reduction="sum") / targets
            soft, t = torch.zeros(()), config.temperature
            for teacher, share in zip(self.setup.teachers, shares, strict=True):
                with torch.no_grad():
                    its = teacher.model(ids, output_hidden_states=True)
                share = share / sum(shares)
                soft = soft + share * (its.logits[0, :-1, :v] / t).softmax(-1)
                cosine = F.cosine_similarity(out.hidden_states[-1], its.hidden_states[-1], dim=-1)
                distance = (1 - cosine).sum() / tokens
                total = total + config.hidden_cos_weight * share * distance
            kl = (soft * (soft.log() - (z / t).log_softmax(-1))).sum()
            total = total + config.kd_weight * t * t * kl / targets
        self.module.zero_grad()
        total.backward()
        weights = self.module.named_parameters()
        return float(total.detach()), {n: p.grad.clone() for n, p in weights if p.grad is not None}


def assert_equal(found: tuple[float, dict[str, Tensor]], wanted: Any) -> None:
    assert found[0] == pytest.approx(wanted[0], rel=1e-6)
    assert found[1].keys() == wanted[1].keys()
    norm = torch.stack([g.norm() for g in wanted[1].values()]).norm()
    off = torch.stack([(found[1][n] - g).norm() for n, g in wanted[1].items()]).norm()
    assert float(off / norm) < 1e-5


@pytest.mark.parametrize("kind", [pytest.param("gpt2", marks=pytest.mark.thorough), "llama"])
def test_step_is_the_plain_loss_however_it_is_split(
    kind: str, recipe: Recipe, tmp_path: Path
) -> None:
    """Packed or not, in micro-batches of any size, on ranks that have none left."""
    wanted = Parts(recipe(kind, tmp_path)).plain()
    for packing, micro, ranks in (("true", 3, 1), ("true", 24, 1), ("true", 2, 7), ("false", 5, 2)):
        changes = f"--data.packing={packing}", f"--batch.micro_sequences={micro}"
        parts = Parts(recipe(kind, tmp_path, *changes))
        assert parts.setup.batches.packed == (packing == "true")
        sequences = sum(len(batch.input_ids) for batch in parts.setup.batches.step(0, 0, 1, micro))
        assert (sequences < 22) == (packing == "true")  # of 24 examples
        assert_equal(parts.step(ranks), wanted)


def test_rows_of_the_losses_are_the_targets_whatever_kd_rows_says(
    recipe: Recipe, tmp_path: Path
) -> None:
    one, two = (
        Parts(recipe("gpt2", tmp_path, f"--loss.kd_rows={rows}")).step()
        for rows in ("all", "masked")
    )
    assert one[0] == two[0]


@pytest.mark.thorough
def test_ensemble_with_unequal_heads_is_the_plain_loss(recipe: Recipe, tmp_path: Path) -> None:
    """Two teachers and a student whose vocabularies are padded to other numbers of rows."""
    names = [
        make_causal(tmp_path / f"teacher-{i}", "gpt2", seed=i, vocab_size=380 + rows)
        for i, rows in enumerate((3, 16))
    ]
    student = make_causal(tmp_path / "student", "llama", seed=5, vocab_size=390)
    teachers = f"[{names[0]}, {{name: {names[1]}, weight: 3.0}}]"
    changes = f"--teacher={teachers}", f"--student.model={student}"
    parts = Parts(recipe("gpt2", tmp_path / "run", *changes))
    assert parts.module.columns == 383
    assert_equal(parts.step(), parts.plain())


def test_scores_are_those_of_plain_transformers(recipe: Recipe, tmp_path: Path) -> None:
    parts = Parts(recipe("gpt2", tmp_path))
    evaluator = Evaluator(parts.setup.batches, ALONE, 20, None)
    ask = torch.no_grad()(parts.teacher.predict)
    assert evaluator.teacher(ask).eval_kl == 0
    found = evaluator.student(torch.no_grad()(parts.module))
    store, sums = parts.setup.batches.store, torch.zeros(5, dtype=torch.float64)
    teacher, student = parts.setup.teachers[0].model, parts.setup.student.eval()
    for document in store.rows("heldout", torch.arange(len(store.heldout))):
        ids = torch.from_numpy(document.copy()).long()[None]
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (teacher, student))
        labels, guess = ids[0, 1:], q.argmax(-1)
        kl = (p.exp() * (p - q)).sum()
        loss = F.nll_loss(q, labels, reduction="sum")
        right, agreeing = (guess == labels).sum(), (guess == p.argmax(-1)).sum()
        sums += torch.tensor([float(x) for x in (loss, right, agreeing, kl, len(labels))])
    loss, right, agreeing, kl = (sums[:4] / sums[4]).tolist()
    assert found.eval_loss == pytest.approx(loss, rel=1e-5)
    assert found.eval_kl == pytest.approx(kl, rel=1e-4)
    assert found.eval_accuracy == pytest.approx(right)
    assert found.eval_agreement == pytest.approx(agreeing)
    assert evaluator.record()["target"] == "next token"
    assert sum(evaluator.record()["tokens"]) == int(sums[4])


@pytest.mark.thorough
def test_run_goes_on_to_the_bit(recipe: Recipe, tmp_path: Path) -> None:
    """With dropout, packed, from the middle; on another packing it goes on, too."""
    changes = "--student.dropout=0.1", "--checkpoint.every=2", "--steps=4"
    straight = recipe("gpt2", tmp_path / "straight", *changes)
    assert train.main(straight) == 0
    leave = shutil.ignore_patterns("summary.json", "model", "report.*")
    for name, more in (("again", []), ("apart", ["--data.packing=false"])):
        shutil.copytree(tmp_path / "straight", tmp_path / name, ignore=leave)
        assert not (tmp_path / name / "checkpoints" / "step-4").exists()
        assert train.main([*recipe("gpt2", tmp_path / name, *changes), *more]) == 0
    one, other = (
        load_file(tmp_path / x / "model/model.safetensors") for x in ("straight", "again")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "again")
    assert metrics(tmp_path / "apart")[:3] == metrics(tmp_path / "straight")[:3]


# --- What is refused ------------------------------------------------------------------------------


def refusal(arguments: list[str], capfd: Any) -> str:
    capfd.readouterr()
    assert train.main(arguments) == 2
    said = str(capfd.readouterr().err)
    assert said.count("\n") == 1, said
    return said.removeprefix("distilfast: ").strip()


def test_objective_of_the_other_kind_is_refused(
    recipe: Recipe, teacher: Path, tmp_path: Path, capfd: Any
) -> None:
    gpt2, run = recipe("gpt2", tmp_path / "run"), tmp_path / "run"
    said = refusal([*gpt2, "--objective=masked"], capfd)
    assert said.startswith("teacher: ")
    assert said.endswith(
        "transformers has as a masked LM, got one of type 'gpt2', with objective masked"
    )
    bert = [*gpt2, f"--teacher={teacher}"]
    said = refusal([*bert, "--objective=causal"], capfd)
    assert said.endswith("expected a causal LM, got a bert saved by BertForMaskedLM")
    said = refusal([*gpt2, f"--student.model={teacher}"], capfd)
    assert said.startswith("student.model: ")
    assert said.endswith("expected a causal LM, got a bert saved by BertForMaskedLM")
    assert not run.exists()


def test_unfit_settings_are_refused(recipe: Recipe, tmp_path: Path, capfd: Any) -> None:
    run = tmp_path / "run"
    said = refusal(recipe("mamba", run, "--data.packing=true"), capfd)
    assert said.startswith("data.packing: expected auto or false, as teacher ")
    assert said.endswith("does not keep the examples of a sequence apart, got true")
    said = refusal(recipe("gpt2", run, "--data.max_length=41"), capfd)
    assert said.startswith("data.max_length: expected at most 40, the positions of")
    assert not run.exists()


def test_tokenizer_without_an_end_token_is_refused(
    recipe: Recipe, tmp_path: Path, capfd: Any
) -> None:
    folder = make_causal(tmp_path / "teacher", "gpt2")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    del settings["eos_token"]
    path.write_text(json.dumps(settings), encoding="utf-8")
    said = refusal(recipe("gpt2", tmp_path / "run", f"--teacher={folder}"), capfd)
    assert said == f"teacher: the tokenizer of {str(folder)!r} has no ['eos'] token"


def test_family_that_cannot_be_packed_says_so_once(
    recipe: Recipe, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = Parts(recipe("mamba", tmp_path))
    assert not parts.setup.batches.packed
    [said] = [r.getMessage() for r in caplog.records if r.name == "distilfast"]
    assert said.startswith("data.packing: an example a sequence, as teacher ")


def test_objective_follows_the_class_that_saved_the_model(tmp_path: Path) -> None:
    """transformers has BERT as both. A run of an older version is one of masked LMs."""
    folder = make_teacher(tmp_path / "bert")
    path = folder / "config.json"
    config = configs.parse([f"--teacher={folder}", "--steps=1", f"--output={tmp_path / 'run'}"])
    assert choices.chosen_objective(config) == "masked"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for names, wanted in ((["BertLMHeadModel"], "causal"), (None, "masked")):
        path.write_text(json.dumps({**settings, "architectures": names}), encoding="utf-8")
        assert choices.chosen_objective(config) == wanted
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("{objective: causal, steps: 1}", encoding="utf-8")
    assert choices.chosen_objective(config) == "causal"  # as the run that is resumed
    masked = dataclasses.replace(config, objective="masked")
    for said in ("", ", objective: masked", ", objective: causal"):
        text = f"{{teacher: {folder}, steps: 1, output: {run}{said}}}"
        (run / "config.yaml").write_text(text, encoding="utf-8")
        if "causal" not in said:
            checks.check_output(masked, run)
            continue
        with pytest.raises(ConfigError, match=r"differs in objective \("):
            checks.check_output(masked, run)
