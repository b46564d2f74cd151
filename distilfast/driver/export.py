"""Export the distilled model so that plain transformers loads it, with a model card."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

from torch import Tensor

from distilfast import __version__, atomic
from distilfast.config import Config, to_yaml
from distilfast.loss_parts import LOSSES, NOTHING_MASKED

CARD = """\
---
library_name: transformers
pipeline_tag: fill-mask
tags: [distillation, distilfast]
---
# {name}

A {architecture} of {layers} layers and {parameters:.1f} M parameters, distilled from
{teacher} with distilfast {version}.

```python
from transformers import pipeline
pipeline("fill-mask", model="path/to/this/folder")("Paris is the [MASK] of France.")
```

## How it was made

- Teacher: {teacher}
- Data: {data}
- {recipe}
- {tokens:,} tokens in {steps:,} steps of {batch}, {minutes:.1f} minutes on {device}

## What was measured

On the held-out part of the same data, at the masked positions:

| model | cross entropy (nats) | accuracy | agreement with the teacher |
|---|---|---|---|
{rows}
{undefined}
## Configuration

```yaml
{config}```

The licences of the teacher and of the data apply to this model.
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
        model: the student. Only its class and config are used.
        weights: its fp32 weights by name.
        summary: the run's measured figures, as in summary.json.
    """
    # Make a new model: the trained one may be bf16, and its config would say so.
    exported = type(model)(copy.deepcopy(model.config)).float()
    exported.load_state_dict(weights)
    with atomic.folder(folder) as scratch:
        exported.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        (scratch / "README.md").write_text(card(model, config, summary), encoding="utf-8")


def card(model: Any, config: Config, summary: dict[str, Any]) -> str:
    """Format the model card."""
    loss = config.loss
    scores = summary["scores"]["student"]
    weights = {part.title.format(T=loss.temperature): getattr(loss, part.weight) for part in LOSSES}
    return CARD.format(
        name=Path(config.output).name,
        architecture=type(model).__name__,
        layers=summary["student_layers"],
        parameters=summary["parameters"] / 1e6,
        teacher=", ".join(t.name for t in config.teachers),
        version=__version__,
        data=", ".join(s.name for s in config.sources) or config.data.prepared,
        recipe="Loss: " + ", ".join(f"{w:g} x {name}" for name, w in weights.items() if w),
        tokens=summary["tokens"],
        steps=summary["steps"],
        batch=f"{config.batch.size} {config.batch.unit}",
        minutes=summary["seconds"] / 60,
        device=summary["device"],
        rows="\n".join(_row(name, scores) for name, scores in summary["scores"].items()),
        undefined=f"\n{NOTHING_MASKED}.\n" if scores["eval_loss"] is None else "",
        config=to_yaml(config),
    )


def _row(name: str, scores: dict[str, Any]) -> str:
    formats = {"eval_loss": ".3f", "eval_accuracy": ".1%", "eval_agreement": ".1%"}
    cells = ["" if scores[k] is None else format(scores[k], form) for k, form in formats.items()]
    return f"| {' | '.join([name, *cells])} |"
