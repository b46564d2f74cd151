"""Export the distilled model so that plain transformers loads it, with a model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from distilfast import __version__, atomic
from distilfast.config import Config, to_yaml
from distilfast.loss_parts import NOTHING_MASKED, weighted_sum
from distilfast.report import markdown, models_table
from distilfast.report.numbers import counted
from distilfast.report.training_run import model_rows

CARD = """\
---
library_name: transformers
pipeline_tag: {task}
tags: [distillation, distilfast]
---
# {name}

A {architecture} of {layers} layers and {parameters:.1f} M parameters, distilled from
{teacher} with distilfast {version}.

```python
from transformers import pipeline
pipeline("{task}", model="path/to/this/folder")("{example}")
```

## How it was made

- Teacher: {teacher}
{student}- Data: {data}
- {recipe}
- {tokens} in {steps} of {batch}, {minutes:.1f} minutes on {device}

## What was measured

On the held-out part of the same data, at {targets}. Losses are cross entropies in nats;
agreement is the share of first guesses that are the teacher's{more}:

{models}
{undefined}
## Configuration

```yaml
{config}```

The licences of the teacher{given} and of the data apply to this model.
"""


def export(
    model: Any,
    weights: dict[str, Tensor],
    tokenizer: Any,
    config: Config,
    summary: dict[str, Any],
    folder: Path,
) -> None:
    """Write ``folder`` (safetensors, config, tokenizer, README.md), whole or not at all.

    Args:
        model: the student. Its class, its config and what it saves beside its weights are used.
        weights: its fp32 weights by name.
        summary: the run's measured figures, as in summary.json.
    """
    # Make a new model: the trained one may be bf16, and its config would say so.
    exported = type(model)(copy.deepcopy(model.config)).float()
    saved = {n: b for n, b in model.named_buffers() if n in exported.state_dict()}
    exported.load_state_dict({**saved, **weights})
    with atomic.folder(folder) as scratch:
        exported.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(
            card(model, tokenizer.mask_token, config, summary), encoding="utf-8"
        )


def card(model: Any, mask: str | None, config: Config, summary: dict[str, Any]) -> str:
    """Format the model card. ``mask`` is the tokenizer's mask token, of which a causal LM has no
    need."""
    name = Path(config.output).name
    causal = config.objective == "causal"
    given = config.student.model is not None
    undefined = summary["scores"]["student"]["eval_loss"] is None
    return CARD.format(
        name=name,
        task="text-generation" if causal else "fill-mask",
        example="Paris is" if causal else f"Paris is the {mask} of France.",
        targets="each next token" if causal else "the masked positions",
        more=";\nperplexity is exp(loss), KL is KL(teacher || model) at T = 1" if causal else "",
        architecture=type(model).__name__,
        layers=summary["student_layers"],
        parameters=summary["parameters"] / 1e6,
        teacher=", ".join(t.name for t in config.teachers),
        version=__version__,
        student=f"- Student: {config.student.origin}\n" if given else "",
        given=", of the model that the student comes from" if given else "",
        data=", ".join(s.name for s in config.sources) or config.data.prepared,
        recipe=f"Loss: {weighted_sum({**vars(config.loss), 'objective': config.objective})}",
        tokens=counted(summary["tokens"], "token"),
        steps=counted(summary["steps"], "step"),
        batch=counted(config.batch.size, config.batch.unit.removesuffix("s")),
        minutes=summary["seconds"] / 60,
        device=summary["device"],
        models=markdown(models_table(model_rows(name, summary))),
        undefined=f"\n{NOTHING_MASKED}.\n" if undefined else "",
        config=to_yaml(config),
    )
