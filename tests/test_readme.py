"""The examples of the README and of the documents, run; and whether their links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

from distilfast.config import parse

DOCUMENTS = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "bench/*.md", "bench/device/*.md")
    for path in ROOT.glob(pattern)
)


def blocks(language: str, document: str) -> list[str]:
    """The fenced blocks of a language in a document."""
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def example(marker: str, document: str = "README.md") -> str:
    """The Python block that contains a line."""
    return next(b for b in blocks("python", document) if marker in b)


def anchors(path: Path) -> set[str]:
    """The names that a document's headings have as targets of links."""
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    text = re.sub(r"```.*?```", "", document.read_text(encoding="utf-8"), flags=re.DOTALL)
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        file, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (document.parent / file).resolve() if file else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
    assert not wrong


def test_yaml_example_is_a_configuration(tmp_path: Path) -> None:
    (file := tmp_path / "my.yaml").write_text(blocks("yaml", "README.md")[0], encoding="utf-8")
    config = parse(["--config", str(file)])
    assert (config.teachers[0].name, config.epochs) == ("bert-base-uncased", 3)


def models_and_batch(teacher: Path) -> dict[str, Any]:
    import transformers

    torch.manual_seed(0)
    load = transformers.AutoModelForMaskedLM.from_pretrained
    student, large = load(teacher).eval(), load(teacher).eval()
    for weight in student.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    for module in student.modules():  # its draws would differ with the split
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    ids = torch.randint(5, 60, (8, 12))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0  # so that a mean per micro-batch would show
    labels = torch.where((torch.rand(ids.shape) < 0.3) & mask.bool(), ids, -100)
    labels[1::2, :4] = ids[1::2, :4]
    batch = {"input_ids": ids, "attention_mask": mask}
    return {"student": student, "teacher": large, "batch": batch, "labels": labels}


def test_own_loop_example_runs(teacher: Path) -> None:
    names = models_and_batch(teacher)
    exec(example("hidden_cosine_loss"), names)
    assert names["loss"].item() > 0
    assert all(p.grad is not None for p in names["student"].parameters() if p.requires_grad)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")
def test_trainer_example_does_not_depend_on_accumulation(teacher: Path, tmp_path: Path) -> None:
    """One micro-batch of eight or four of two: the same gradient, and so the same weights."""
    import transformers

    results = []
    for accumulation in (1, 4):
        names = models_and_batch(teacher)
        exec(example("class DistillationTrainer", "docs/losses.md"), names)
        rows = [
            {**{k: v[i] for k, v in names["batch"].items()}, "labels": names["labels"][i]}
            for i in range(8)
        ]
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(accumulation)),
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
            remove_unused_columns=False,
        )
        trainer = names["DistillationTrainer"](
            model=names["student"], args=arguments, train_dataset=rows
        )
        trainer.train()
        results.append({k: v.detach().clone() for k, v in names["student"].state_dict().items()})
    start = models_and_batch(teacher)["student"].state_dict()
    moved = sum((results[0][k] - start[k]).norm() ** 2 for k in start).sqrt()
    apart = sum((results[0][k] - results[1][k]).norm() ** 2 for k in start).sqrt()
    assert moved > 0
    assert apart / moved < 1e-5
