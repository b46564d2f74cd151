"""Cast a model to another dtype as loading it in that dtype does.

`module.to(torch.bfloat16)`, which DeepSpeed calls too, also casts what a class has computed from
its configuration, such as the frequencies of rotary embeddings. transformers leaves those in fp32
when it loads a model in bf16. In bf16 a frequency is off by up to 1/256 of itself, so a token 1,000
places away is turned by another angle: the teacher would be another one than the model that was
loaded, and the student another one than the model that is exported.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


def cast(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Move a model to a device, and cast its weights to a dtype."""
    with kept_buffers(model):
        model.to(device, dtype)


@contextlib.contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Keep the values of a model's computed buffers, whatever becomes of its dtype meanwhile.

    They are those that its files do not have. They go to the device to which the model goes.
    """
    before = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if name in module._non_persistent_buffers_set
        and buffer is not None
        and buffer.is_floating_point()
    ]
    yield
    for module, name, buffer in before:
        now = module._buffers[name]
        assert now is not None
        module._buffers[name] = buffer.to(now.device)
