"""Tiny random models of every type that transformers builds as a masked or a causal LM.

    cd bench && python -m kit.tiny_models [TYPE ...]     # which can be built and run, one a line

The list of types is transformers' own registry. `tiny_configs.py` says how a configuration is made
small; the weights are drawn again here, because those that the classes draw are too small for a
wrong layer, bias or norm to show in the logits.
"""

from __future__ import annotations

import inspect
import math
import multiprocessing
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

from kit.tiny_configs import FEW, FIELDS, FORCED, IDS, OVERRIDES, REASONS, VOCABULARY

ROWS, TOKENS = 2, 24
# Ids below this one are those of padding, of masks, of images: leave them out of the input.
FIRST_WORD = 16
# Parameters that are no weights of a product, whatever their shape: a state-space model computes
# its decay and its steps from them.
KEPT = ("A_log", "dt_proj_bias")
# The standard deviation of logits that show what the model does.
LEAST, MOST = 0.05, 20.0
TASKS = {
    "causal": (AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
}


def kinds() -> list[tuple[str, str]]:
    """Every (task, model type) of transformers' two registries, sorted; task: causal or masked."""
    return sorted((task, kind) for task, (_, names) in TASKS.items() for kind in names)


def tiny_config(task: str, model_type: str, layers: int = 6) -> Any:
    """The small configuration of a type; of a composite with small parts."""
    own = OVERRIDES.get(model_type, {})
    return _shrunk(CONFIG_MAPPING[model_type], task, layers, own)


def tiny_model(task: str, model_type: str, layers: int = 6, seed: int = 0) -> Any:
    """A model of random weights: fp32, on the CPU, in eval mode, with a vocabulary of 128.

    Windows, chunks and numbers of selected keys are 4, shorter than a sequence of `TOKENS`.
    `model(input_ids=ids, attention_mask=ones)` with ids (N, T) from `FIRST_WORD` on returns
    logits (N, T, V). The weights depend on the seed alone. The patterns of layers are made for six.

    Raises:
        ValueError: `REASONS` says why this one cannot be built, or does not run on text alone.
        Exception: whatever transformers raises; an ImportError if a part needs another package.
    """
    if model_type in REASONS:
        raise ValueError(f"{model_type}: {REASONS[model_type]}")
    config = tiny_config(task, model_type, layers)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = TASKS[task][0].from_config(config, dtype=torch.float32)
        redraw(model)
    return model.eval()


def _shrunk(kind: type[PretrainedConfig], task: str, layers: int, own: dict[str, Any]) -> Any:
    """A configuration of this class: the common fields that it has, small parts, then `own`."""
    values: dict[str, Any] = {}
    parameters = inspect.signature(kind).parameters
    for name, value in FIELDS.items():
        field = name if name in parameters else kind.attribute_map.get(name)
        if field not in parameters:
            continue
        default = parameters[field].default
        if name in FORCED or not (default is None or isinstance(default, (list, tuple, dict))):
            values[field] = layers if value == "layers" else value
    for name, parameter in parameters.items():
        default = parameter.default
        if "dropout" in name or name.endswith(("pdrop", "layerdrop", "_drop", "jitter_noise")):
            values[name] = 0.0 if isinstance(default, float) else default
        elif name.endswith(("token_id", "token_index")) and default is not None:
            values[name] = _small_id(name, default)
    if "is_decoder" in parameters:
        values["is_decoder"] = task == "causal"
    if "kv_lora_rank" in parameters:  # latent attention has keys and values for every head
        values["num_key_value_heads"] = values["num_attention_heads"]
    whole = kind(**{k: _cycled(v, layers) for k, v in own.items()}) if kind.sub_configs else None
    for name in kind.sub_configs:
        part = getattr(whole, name)
        if part is not None and name not in own:
            deep = layers if name in ("text_config", "decoder", "global_config") else FEW
            small = _shrunk(type(part), task, deep, OVERRIDES.get(part.model_type, {}))
            values[name] = small
    values |= {name: _cycled(value, layers) for name, value in own.items()}
    return kind(**values)


def _small_id(name: str, default: Any) -> Any:
    """An id below `FIRST_WORD` for a special token."""
    if isinstance(default, (list, tuple)):
        return [_small_id(name, default[0])]
    return default if default < FIRST_WORD else IDS.get(name.split("_token")[0], FIRST_WORD - 1)


def _cycled(value: Any, layers: int) -> Any:
    """A tuple of the table is a pattern over the layers, a function depends on their number."""
    if callable(value):
        return value(layers)
    if isinstance(value, tuple):
        return [value[i % len(value)] for i in range(layers)]
    return value


@torch.no_grad()
def redraw(model: PreTrainedModel) -> None:
    """Draws the weights again, so that every part of the model shows in the logits.

    Matrices: a standard deviation of 1/sqrt(inputs); embeddings: 1, with their rows of zeros left;
    norms, biases and scales: a tenth of noise on what they are. Tied weights stay tied.
    """
    seen: set[int] = set()
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fixed = name in KEPT or not weight.requires_grad  # what needs none is a table of sines
            if id(weight) in seen or fixed or not weight.numel():
                continue
            seen.add(id(weight))
            values = weight.flatten()
            constant = bool((values == values[0]).all())
            matrix = weight.dim() > 1 and not (constant and values[0] != 0)
            vector = weight.numel() == max(weight.shape, default=1)
            if id(weight) in embeddings:
                zero = (weight == 0).all(-1, keepdim=True) & (weight != 0).any()
                weight.copy_(torch.randn_like(weight).masked_fill(zero, 0))
            elif (isinstance(module, nn.Linear) and name == "weight") or (matrix and not vector):
                weight.normal_(0, 1 / math.sqrt(_inputs(module, weight)))
            elif constant or values.abs().max() < 0.1:
                weight += 0.1 * torch.randn_like(weight)


def _inputs(module: nn.Module, weight: torch.Tensor) -> int:
    """How many inputs an output of this weight has."""
    if type(module).__name__ == "Conv1D":
        return weight.shape[0]
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return math.prod(weight.shape[1:])
    return weight.shape[-1]


def logits(model: Any, seed: int = 0) -> torch.Tensor:
    """The model's logits (N, T, V) on random words, without a cache."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(FIRST_WORD, VOCABULARY, (ROWS, TOKENS), generator=generator)
    more = (
        {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    )
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=torch.ones_like(ids), **more).logits


# --- The script -----------------------------------------------------------------------------------


def _try(task: str, kind: str, answer: Any) -> None:
    """Sends one line: what came of this kind, or why nothing."""
    start = time.perf_counter()
    try:
        model = tiny_model(task, kind)
        built = time.perf_counter() - start
        out = logits(model)
        size = sum(p.numel() for p in model.parameters())
        problem = "" if out.shape[:2] == (ROWS, TOKENS) else f" shape {tuple(out.shape)}"
        problem += "" if out.isfinite().all() else " not finite"
        problem += "" if LEAST <= out.std() <= MOST else " std"
        answer.send(
            f"{'odd' if problem else 'runs'} {built:5.1f} s {time.perf_counter() - start:5.1f} s "
            f"{size:9,} parameters  V {out.shape[-1]}  std {out.std():.3g}{problem}"
        )
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        answer.send(f"not: {type(error).__name__}: {' '.join(x.strip() for x in lines)[:300]}")


def survey(chosen: list[str], seconds: float = 60) -> Iterator[tuple[str, str, str]]:
    """(task, type, what came of it), each in a process of its own, since one may crash or hang."""
    context = multiprocessing.get_context("fork")
    for task, kind in kinds():
        if chosen and kind not in chosen:
            continue
        answer, sender = context.Pipe(duplex=False)
        process = context.Process(target=_try, args=(task, kind, sender))
        process.start()
        sender.close()
        try:
            line = answer.recv() if answer.poll(seconds) else f"not: more than {seconds} seconds"
        except EOFError:
            process.join()
            line = f"not: the process ended with {process.exitcode}"
        process.kill()
        process.join()
        yield task, kind, line


if __name__ == "__main__":
    torch.set_num_threads(1)
    lines = []
    for task, kind, line in survey(sys.argv[1:]):
        lines.append(line)
        print(f"{task} {kind:30} {line}", flush=True)
    print(f"{sum(line.startswith('runs') for line in lines)} of {len(lines)} run")
