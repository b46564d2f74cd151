"""The README's examples, run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def example(marker: str) -> str:
    """The Python block that contains a line."""
    return next(b for b in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if marker in b)


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
        exec(example("class DistillationTrainer"), names)
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
