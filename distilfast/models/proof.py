"""Prove that a student is its teacher without the dropped layers.

The student's logits have to equal those of the teacher in which each dropped layer returns what it
was given. This holds for every family, so it finds a field that was not renumbered, a weight in
another layer's place, and a scale that depends on the number of layers. Windows are made shorter
than the text for it, since a wrong window does not show in a text that fits into it.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distilfast.errors import ConfigError
from distilfast.models.layers import exceptional, stacks
from distilfast.models.parts import difference, evaluating
from distilfast.models.positions import most_positions

LENGTH, WINDOW = 24, 4  # tokens of the text, and of a window
# As a share of the largest logit. Layers that were dropped right differ by nothing, or by 1e-6
# where a scale is folded into weights; others by 1e-2 and more.
TOLERANCE = 1e-5
WINDOWS = ("sliding_window", "attention_chunk_size", "index_topk", "local_attention", "window_size")


@torch.no_grad()
def prove(teacher: Any, student: Any, kept: Sequence[int]) -> None:
    """Check a student that has all its weights from its teacher.

    Args:
        teacher, student: of one class, in fp32 on one device.
        kept: the teacher's layers that the student has.

    Raises:
        ConfigError: their logits differ by more than rounding.
    """
    input_ids = text(teacher)
    try:
        with narrow(teacher), narrow(student):
            wanted, found = bypassed(teacher, kept, input_ids), logits(student, input_ids)
    except Exception as error:  # what a class does in a form that it was not made for
        said = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"student.layers: expected a {teacher.config.model_type} whose layers can be bypassed, "
            f"to prove the student, got {type(error).__name__}: {said}"
        ) from error
    off = difference(wanted, found)
    if not off <= TOLERANCE:
        kind = teacher.config.model_type
        fields = ", ".join(_suspects(teacher.config.get_text_config(), len(kept))) or "none"
        raise ConfigError(
            f"student.layers: expected logits of the teacher without the dropped layers, got a "
            f"difference of {off:.1e} of the largest logit in a {kind} with layers {list(kept)}: "
            f"something depends on a layer's number (fields that say something for each layer, and "
            f"were renumbered: {fields}); keep all layers, or give a student with `student.model`"
        )


def text(model: Any) -> Tensor:
    """(2, LENGTH) tokens from all over the vocabulary."""
    config = model.config.get_text_config()
    length = min(LENGTH, most_positions(model) or LENGTH)
    generator = torch.Generator().manual_seed(0)
    shape = 2, length
    ids = torch.randint(config.vocab_size // 2, config.vocab_size, shape, generator=generator)
    return ids.to(next(model.parameters()).device)


def logits(model: Any, input_ids: Tensor) -> Tensor:
    """A model's logits of tokens without padding, in eval mode."""
    with evaluating(model):
        found: Tensor = model(input_ids, attention_mask=torch.ones_like(input_ids)).logits
    return found.float()


def bypassed(model: Any, kept: Sequence[int], input_ids: Tensor) -> Tensor:
    """The logits of a model in which the other layers return what they are given."""
    exception = exceptional(model)
    with contextlib.ExitStack() as patches:
        if exception.repeated:
            layer = model.base_model.get_submodule(exception.repeated)
            patches.enter_context(_forward(layer, _counted(layer, kept)))
            return logits(model, input_ids)
        dropped = [
            (layer, name.endswith(exception.branches))
            for name, layers in stacks(model).items()
            for i, layer in enumerate(layers)
            if i not in kept
        ]
        outputs: dict[nn.Module, Any] = {}
        with contextlib.ExitStack() as recording:
            for layer, _ in dropped:
                recording.enter_context(_forward(layer, _recorded(layer, outputs)))
            logits(model, input_ids)
        for layer, branch in dropped:
            patches.enter_context(_forward(layer, _identity(outputs.get(layer), branch)))
        return logits(model, input_ids)


def _counted(layer: nn.Module, kept: Sequence[int]) -> Any:
    """A forward that works in the calls whose numbers are in ``kept``, and else is the identity."""
    own, calls = layer.forward, itertools.count()
    return lambda hidden, *args, **kw: own(hidden, *args, **kw) if next(calls) in kept else hidden


def _recorded(layer: nn.Module, outputs: dict[nn.Module, Any]) -> Any:
    """A layer's forward that notes the form of what it returns."""
    own = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = own(*args, **kwargs)
        outputs[layer] = output
        return output

    return forward


def _identity(output: Any, branch: bool) -> Any:
    """A forward that returns its first argument, in the form of ``output``. Zeros instead if the
    result is added to it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.zeros_like(hidden) if branch else hidden
        if isinstance(output, dict):  # SqueezeBERT
            return {**output, next(iter(output)): hidden}
        if not isinstance(output, tuple | list):
            return hidden
        others = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, Tensor)]
        rest = [
            next((x for x in others if isinstance(made, Tensor) and x.shape == made.shape), None)
            for made in output[1:]
        ]
        return type(output)((hidden, *rest))

    return forward


@contextlib.contextmanager
def _forward(module: nn.Module, forward: Any) -> Iterator[None]:
    """Give a module another forward for a while. Some models call it directly, past all hooks."""
    was = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if was is None:
            del module.forward
        else:
            module.forward = was


@contextlib.contextmanager
def narrow(model: Any) -> Iterator[None]:
    """Make a model's windows shorter than the text for a while."""
    holders = [model.config, model.config.get_text_config(), *model.modules()]
    changes: list[tuple[Any, str, Any, Any]] = [
        (holder, name, value, WINDOW)
        for holder in holders
        for name in WINDOWS
        if type(value := getattr(holder, name, None)) is int and value > WINDOW
    ]
    for module in model.modules():  # GPT-Neo's window is a mask that it makes when it is built
        mask = getattr(module, "bias", None)
        if getattr(module, "attention_type", None) == "local" and isinstance(mask, Tensor):
            changes.append((module, "bias", mask, mask & ~mask.tril(-WINDOW)))
    for holder, name, _, small in changes:
        setattr(holder, name, small)
    try:
        yield
    finally:
        for holder, name, value, _ in changes:
            setattr(holder, name, value)


def _suspects(config: Any, n: int) -> list[str]:
    return [k for k, v in config.to_dict().items() if isinstance(v, list | tuple) and len(v) == n]
