"""Fine-tunes one model on one task: settings, loop, predictions.

The protocol is that of Sanh et al. 2019 (Devlin et al. 2019 without its grid): AdamW, a learning
rate that falls linearly to 0, no warm-up, the last weights. With teachers, `distillation_loss`
replaces the cross entropy: soft targets at T, hard labels at 1 (Hinton et al. 2015).
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.errors import ConfigError, expect, not_negative, positive
from distilfast.losses import distillation_loss
from distilfast.models import (
    choose_attention,
    load_weights,
    loading,
    most_positions,
    set_padding,
    use_fp32_sums,
)
from distilfast.sources.lookup import model_source
from distilfast.tasks.catalogue import Task
from distilfast.tasks.files import IGNORE_INDEX
from distilfast.tasks.tokens import PAD_TO, Encoded, order

EVALUATION_BATCH = 64


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned.

    Args:
        learning_rate: AdamW's at the first step (betas 0.9 and 0.999, epsilon 1e-8).
        batch_size: examples per step.
        epochs: None is the task's own number: 5 for MRPC and WNLI, 2 for SQuAD, else 3.
        max_length: tokens of an example. None is the task's own: 512 for IMDb, 384 for SQuAD, else
            128.
        weight_decay: not applied to biases and LayerNorms.
        max_grad_norm: gradients are scaled down to this norm; 0: never.
        precision: that of activations and products; the weights are fp32.
    """

    learning_rate: float = 2e-5
    batch_size: int = 32
    epochs: int | None = None
    max_length: int | None = None
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        positive("--learning_rate", self.learning_rate)
        not_negative("--weight_decay", self.weight_decay)
        not_negative("--max_grad_norm", self.max_grad_norm)
        expect(self.batch_size >= 1, "--batch_size", "at least 1", self.batch_size)
        expect(self.epochs is None or self.epochs >= 1, "--epochs", "at least 1", self.epochs)
        ok = self.max_length is None or self.max_length >= 8
        expect(ok, "--max_length", "at least 8", self.max_length)
        expect(self.precision in ("bf16", "fp32"), "--precision", "bf16 or fp32", self.precision)


@dataclass(frozen=True)
class SoftTargets:
    """The teachers' logits, and the weights of the loss.

    Args:
        logits: (n, outputs) fp32, for every training example; for spans (tokens, 2).
        temperature: T of the teachers' softmax and the student's.
        kd_weight: the weight of the soft targets' loss at T.
        ce_weight: the weight of the hard labels' loss at temperature 1.
    """

    logits: Tensor
    temperature: float = 2.0
    kd_weight: float = 0.5
    ce_weight: float = 0.5

    def of(self, examples: Encoded, rows: Tensor, device: torch.device) -> SoftTargets:
        """Return the soft targets of some examples."""
        return replace(self, logits=examples.take(self.logits, rows).to(device))


def load(name: str, task: Task, seed: int, max_length: int, key: str = "--model") -> Any:
    """Load a model with the task's head, in fp32. A head that is missing is drawn from ``seed``.

    Raises:
        ConfigError: there is no such model, its weights do not fit, it has another task's head, or
            too few positions.
    """
    import transformers

    source, what = model_source(key, name), f"{key}: {name!r}"
    with loading(what), torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
        if has_head(config) and not fits(config, task):
            raise ConfigError(
                f"{key}: {name!r} is a {config.architectures[0]} of {config.num_labels} "
                f"outputs, which {task.name} with {task.outputs} cannot start from"
            )
        if has_head(config) and not same_order(config, task):
            raise ConfigError(
                f"{key}: expected the classes {', '.join(task.classes)} in this order, got "
                f"{', '.join(config.id2label.values())} in {name!r}"
            )
        auto = f"AutoModel{head(task)}"
        model, _ = load_weights(
            auto, source, what, fresh_head=not has_head(config), num_labels=task.outputs
        )
    most = longest(model)
    expect(max_length <= most, "--max_length", f"at most {most} ({name!r})", max_length)
    return model


def longest(model: Any) -> int:
    """Return how long a text may be. A batch is padded to a multiple of PAD_TO."""
    most = most_positions(model)
    return sys.maxsize if most is None else most // PAD_TO * PAD_TO


# As a share of the largest logit. Sums over another number of tokens differ by 4e-7 (measured in
# tiny models); a class that is read at the padding by 1e-1 and more.
PADDING_TOLERANCE = 1e-3


@torch.inference_mode()
def check_padding(what: str, model: Any, tokenizer: Any) -> None:
    """Check that a text's logits do not depend on the padding beside it.

    They do where a class is read at the last position (XLNet) and where a model has no attention
    mask (FNet). Its predictions would depend on the other texts of a batch.

    Args:
        what: the model's key and name, which begin an error.
        model: in eval mode, with a task's head, on the CPU.

    Raises:
        ConfigError: the logits differ by more than rounding.
    """
    pad_token, logits = tokenizer.pad_token_id, []
    with loading(what):
        set_padding(model, pad_token)
        ids = torch.tensor(tokenizer("a text", truncation=True, max_length=PAD_TO - 2)["input_ids"])
        n, takes = len(ids), _takes(model)
        for width in (n, PAD_TO):
            padded = ids.new_full((1, width), pad_token)
            padded[0, :n] = ids
            mask = (torch.arange(width) < n).long()[None]
            inputs = {"input_ids": padded, "attention_mask": mask, "token_type_ids": 0 * padded}
            logits.append(forward(model, {k: v for k, v in inputs.items() if k in takes}))
    alone, beside = logits[0], logits[1][..., : logits[0].shape[-1]]
    difference = float((alone - beside).abs().max() / alone.abs().max())
    if not difference <= PADDING_TOLERANCE:
        raise ConfigError(
            f"{what}: expected logits that do not depend on padding, got a difference of "
            f"{difference:.1e} of the largest logit in a {type(model).__name__}"
        )


def same_order(config: Any, task: Task) -> bool:
    """Return whether the outputs that have names are the task's classes in their order."""
    found = [str(config.id2label[i]).lower() for i in sorted(config.id2label)]
    wanted = [name.lower() for name in task.classes]
    return found == wanted or sorted(found) != sorted(wanted)


def head(task: Task) -> str:
    """Return how the class names of models with the task's head end."""
    return "ForQuestionAnswering" if task.spans else "ForSequenceClassification"


def has_head(config: Any) -> bool:
    """Return whether a model has been fine-tuned on some task."""
    kinds = ("SequenceClassification", "QuestionAnswering", "TokenClassification", "MultipleChoice")
    return any(a.endswith(kinds) for a in config.architectures or ())


def fits(config: Any, task: Task) -> bool:
    """Return whether a model's head has this task's shape."""
    kind = head(task)
    return any(a.endswith(kind) for a in config.architectures) and config.num_labels == task.outputs


def fine_tune(
    model: Any,
    train: Encoded,
    task: Task,
    settings: FineTuning,
    seed: int,
    *,
    pad_token: int,
    targets: SoftTargets | None = None,
    tell: Callable[[float], None] = lambda done: None,
) -> None:
    """Train ``model`` in place, on its device.

    Args:
        train: n examples.
        seed: that of the examples' order and of dropout. On a CPU, the same seed and number of
            threads give the same bits.
        targets: the soft targets; None: hard labels alone.
        tell: called with the share done, 0 to 1.

    Raises:
        FloatingPointError: the loss of a step is not finite.
    """
    device = next(model.parameters()).device
    epochs = settings.epochs or task.epochs
    steps = epochs * -(-len(train) // settings.batch_size)
    optimizer = torch.optim.AdamW(_groups(model, settings), lr=settings.learning_rate, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    generator = torch.Generator().manual_seed(seed)
    choose_attention(model, device, int(train.lengths.max()))
    set_padding(model, pad_token)
    takes = _takes(model)
    if device.type == "cpu" and settings.precision == "bf16":
        use_fp32_sums(model)
    model.train()
    step = 0
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for _ in range(epochs):
            for rows in order(train.lengths, settings.batch_size, generator):
                inputs = _inputs(train, rows, pad_token, takes, device)
                with _autocast(device, settings):
                    logits = forward(model, inputs)
                labels = train.labels[rows].to(device)
                soft = None if targets is None else targets.of(train, rows, device)
                loss = task_loss(task, logits, labels, soft)
                loss.backward()
                if settings.max_grad_norm:
                    nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
                # This waits for the device at every step, so that the error names the right step.
                if not math.isfinite(value := float(loss.detach())):
                    raise FloatingPointError(f"{task.name}: the loss of step {step + 1} is {value}")
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
                step += 1
                tell(step / steps)
    model.eval()


@torch.inference_mode()
def predict(model: Any, examples: Encoded, settings: FineTuning, *, pad_token: int) -> Tensor:
    """Return fp32 logits on the CPU, in the examples' order: (n, outputs), or (tokens, 2)."""
    device = next(model.parameters()).device
    set_padding(model, pad_token)
    takes = _takes(model)
    model.eval()
    logits = examples.empty_logits(model.config.num_labels)
    for rows in examples.lengths.argsort(stable=True).split(EVALUATION_BATCH):
        inputs = _inputs(examples, rows, pad_token, takes, device)
        with _autocast(device, settings):
            examples.put(logits, rows, forward(model, inputs).cpu())
    return logits


def forward(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return a batch's logits, fp32: (B, outputs), or for spans (B, 2, L), -inf at the padding."""
    out = model(**inputs)
    if not hasattr(out, "start_logits"):
        return out.logits.float()
    logits = torch.stack((out.start_logits, out.end_logits), 1).float()
    return logits.masked_fill(inputs["attention_mask"][:, None] == 0, -math.inf)


def task_loss(
    task: Task, logits: Tensor, labels: Tensor, targets: SoftTargets | None = None
) -> Tensor:
    """Return the loss of a batch, fp32.

    Args:
        logits: (B, outputs), or (B, 2, L).
        labels: (B,) class numbers or numbers, or (B, 2) positions; IGNORE_INDEX if there is none.
        targets: the soft targets of these examples.

    Classes: kd_weight T^2 KL(softmax(targets / T) || softmax(logits / T)) + ce_weight CE(labels).
    Without targets: CE alone. Spans: the same, with the positions of the window as classes and the
    mean over starts and ends. A number: the squared errors to the targets and to the labels, with
    the same weights.
    """
    logits = logits.float()
    if task.kind != "number":
        labels = labels.long()
        if targets is None:
            rows = logits.flatten(0, -2), labels.flatten()
            return nn.functional.cross_entropy(*rows, ignore_index=IGNORE_INDEX)
        return distillation_loss(
            logits,
            targets.logits,
            labels if targets.ce_weight else None,
            temperature=targets.temperature,
            kd_weight=targets.kd_weight,
            ce_weight=targets.ce_weight,
        ).loss
    labelled = labels != IGNORE_INDEX
    squares = (logits[:, 0] - labels).square().where(labelled, 0)
    hard = squares.sum() / labelled.sum().clamp_min(1)
    if targets is None:
        return hard
    soft = (logits[:, 0] - targets.logits[:, 0]).square().mean()
    return targets.kd_weight * soft + targets.ce_weight * hard


def _groups(model: Any, settings: FineTuning) -> list[dict[str, Any]]:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    return [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _takes(model: Any) -> set[str]:
    """Return the names of the inputs that the model takes.

    A model with at most one token type gets no types: GPT-2 would look them up as tokens.
    """
    takes = set(inspect.signature(model.forward).parameters)
    one_type = getattr(model.config, "type_vocab_size", 0) < 2
    return takes - {"token_type_ids"} if one_type else takes


def _inputs(
    examples: Encoded, rows: Tensor, pad_token: int, takes: set[str], device: torch.device
) -> dict[str, Tensor]:
    batch = examples.batch(rows, pad_token)
    return {k: v.to(device, non_blocking=True) for k, v in batch.items() if k in takes}


def _autocast(device: torch.device, settings: FineTuning) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=settings.precision == "bf16")
