"""Take a language model apart: its body, the features before its head, its head.

The fused head needs these parts, as it never holds the logits. They are found by following one
forward of the model's own code, so no family has to be known by name. `check_head` then proves that
the parts give the model's own logits.

    hidden    (B, L, D), what the body returns
    features  (n, D'), what the head's product with the vocabulary reads: hidden, or the output of
              the modules that the model calls between body and head, such as BERT's transform
    head      the weight and the bias of this product
    scale, softcap   what becomes of the product: softcap tanh(scale product / softcap)
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from distilfast.errors import ConfigError
from distilfast.models.positions import most_positions

# Names in a model's configuration. Some classes multiply by such a scale, others divide: the one
# that gives the model's logits is taken.
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")
SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
# Bodies in which every token attends to every other, and whose mask may be of four dimensions.
ALL_TO_ALL = ("bert", "camembert", "distilbert", "electra", "roberta", "xlm-roberta")


class Head(NamedTuple):
    """The product with the vocabulary: weight (V, D'), bias (V,) or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Parts:
    """A model and the names of its parts. `take_apart` finds them.

    body: the module that turns tokens into hidden states.
    chain: the modules between it and the head, in the order of their calls. The last one holds the
        head where the head is not the model's own child.
    product: the module whose weight is the head's.
    bias: the head's bias, a parameter; None if there is none.
    options: what the body is called with beside the tokens and their mask.
    """

    model: Any
    body: str
    chain: tuple[str, ...]
    product: str
    bias: str | None
    scale: float = 1.0
    softcap: float | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        """The body's last hidden states, (B, L, D).

        Args:
            attention_mask: (B, L), 0 at padding; None if there is none.
            position_ids: (B, L), of packed texts, where they restart: for a model that `packs`,
                without a mask. None: each row is one text.
        """
        mask = attend(self.model, attention_mask)
        body = self.model.get_submodule(self.body)
        options = dict(self.options)
        if position_ids is not None:
            options["position_ids"] = position_ids
        return last_hidden(body(input_ids, attention_mask=mask, **options))

    def features(self, hidden: Tensor) -> Tensor:
        """What the head's product reads, (n, D'), from (n, D) hidden states."""
        with self._cut():
            for name in self.chain:
                hidden = self.model.get_submodule(name)(hidden)
        return hidden

    @property
    def head(self) -> Head:
        """The head's weights. Under ZeRO-3 they have to be read where they are used."""
        bias = None
        if self.bias is not None:
            owner, _, name = self.bias.rpartition(".")
            bias = getattr(self.model.get_submodule(owner), name)
        return Head(self.model.get_submodule(self.product).weight, bias)

    def logits(self, features: Tensor, head: Head | None = None) -> Tensor:
        """The (n, V) logits of (n, D') features. ``head`` is the model's own, or a copy."""
        weight, bias = self.head if head is None else head
        product = nn.functional.linear(features, weight, bias)
        if self.scale != 1:
            product = product * self.scale
        return product if self.softcap is None else self.softcap * (product / self.softcap).tanh()

    def logits_at(self, input_ids: Tensor, attention_mask: Tensor | None, rows: Tensor) -> Tensor:
        """The (n, V) logits at ``rows`` of the B x L positions.

        `linear_distillation_loss` computes the same chunk by chunk.
        """
        hidden = self.hidden(input_ids, attention_mask).flatten(0, 1)
        return self.logits(self.features(hidden[rows]))

    @contextlib.contextmanager
    def _cut(self) -> Iterator[None]:
        """Make the module that holds the head return the head's input. Its hooks run as always."""
        owner, _, name = self.product.rpartition(".")
        holder = self.model.get_submodule(owner)
        if holder is self.model:
            yield
            return
        own, head = holder.forward, holder._modules[name]

        def forward(*args: Any, **kwargs: Any) -> Tensor:
            try:
                own(*args, **kwargs)
            except _HeadReached as reached:
                return reached.features
            raise AssertionError("the head was not called")

        was = holder.__dict__.get("forward")
        holder.forward, holder._modules[name] = forward, _Cut()
        try:
            yield
        finally:
            holder._modules[name] = head
            if was is None:
                del holder.forward
            else:
                holder.forward = was


class _HeadReached(Exception):  # noqa: N818  not an error
    """The head was called; what it was given."""

    def __init__(self, features: Tensor):
        self.features = features


class _Cut(nn.Module):
    """Stands in for a head. Its hooks, such as those that fetch partitioned weights, do not run."""

    def forward(self, features: Tensor) -> Tensor:
        raise _HeadReached(features)


def last_hidden(output: Any) -> Tensor:
    """The last hidden states of a body's output."""
    found = getattr(output, "last_hidden_state", None)
    return output[0] if found is None else found


def attend(model: Any, mask: Tensor | None) -> Tensor | None:
    """The attention mask for a body.

    In every forward, transformers reads a (B, L) mask to see whether there is padding, and waits
    for the GPU to do so. Where every token attends to every other, it uses a (B, 1, L, L) mask as
    it is.

    Args:
        mask: (B, L), 0 at padding; None if there is none.
    """
    if mask is None or mask.device.type == "cpu":
        return mask
    config = model.config
    causal = getattr(config, "is_decoder", False) or config.model_type not in ALL_TO_ALL
    if causal or config._attn_implementation != "sdpa":
        return mask
    return spread(mask)


def spread(mask: Tensor) -> Tensor:
    """A (B, L) mask as (B, 1, L, L) bool, as transformers has it for PyTorch's fused attention."""
    batch, length = mask.shape
    return mask.bool()[:, None, None, :].expand(batch, 1, length, length)


# --- Finding the parts ----------------------------------------------------------------------------


@torch.no_grad()
def take_apart(model: Any, what: str = "the model") -> Parts:
    """Find the parts of a masked or causal language model.

    The model runs once, on 13 tokens, in eval mode. Its weights have to be whole on their device.

    Args:
        model: a model of transformers, on any device and in any dtype.
        what: the model's name in the error.

    Raises:
        ConfigError: it has no body and head of this form.
    """
    kind = model.config.model_type
    if getattr(model.config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{what}: expected an encoder or a decoder, got {kind!r}, which has both: its logits "
            "follow from two texts"
        )
    body = _body(model)
    if body is None:
        raise ConfigError(f"{what}: expected a body below a head, got {type(model).__name__}")
    input_ids, mask = probe(model)
    # OPT's forward calls the decoder inside its body, and never the body.
    try:
        calls, own = _follow(model, {body, *body.children()}, input_ids, mask)
    except Exception as error:  # what a class says to a text that it is not made for
        raise ConfigError(
            f"{what}: expected logits of a {kind} for {input_ids.shape[1]} tokens, got "
            f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error
    called = dict(calls)
    body = next((m for m in (body, *body.children()) if m in called), body)
    names = {module: name for name, module in model.named_modules()}
    width = own.shape[-1]
    inside = set(body.modules())
    heads = [m for m, x in calls if m not in inside and _is_head(m, x, width)]
    if not heads or body not in called:
        raise ConfigError(
            f"{what}: expected a head that is one product with the vocabulary, got none in a "
            f"{type(model).__name__}: it multiplies in another way, or calls no module for it"
        )
    head = heads[-1]
    order = [m for m, _ in calls]
    between = order[order.index(body) + 1 : len(order) - order[::-1].index(head)]
    without = {names[head], names[body].split(".")[0]}
    chain = dict.fromkeys(names[m] for m in between if {names[m]} - without and "." not in names[m])
    if "." in names[head]:  # the call of the child that holds it ends later
        chain[names[head].split(".")[0]] = None
    options = {"use_cache": False}
    takes = inspect.signature(body.forward).parameters
    parts = Parts(
        model,
        names[body],
        tuple(chain),
        names[head],
        _bias(model, body, names[head], input_ids, mask, own),
        options=tuple((k, v) for k, v in options.items() if k in takes),
    )
    try:
        return _scaled(parts, own, last_hidden(called[body]), mask)
    except (RuntimeError, TypeError) as error:  # what a module says to what it is not made for
        raise ConfigError(
            f"{what}: expected a {kind} whose head gets what its body returns, by way of modules "
            f"called one after the other ({', '.join(chain) or 'none'}), got "
            f"{' '.join(str(error).split())[:200]}"
        ) from error


def _body(model: Any) -> nn.Module | None:
    """The module below the head: the one that transformers names, or that holds the embeddings."""
    named = getattr(model, model.base_model_prefix or "", None)
    if isinstance(named, nn.Module) and named is not model:
        return named
    embeddings = model.get_input_embeddings()
    return next((m for m in model.children() if embeddings in set(m.modules())), None)


def probe(model: Any) -> tuple[Tensor, Tensor]:
    """13 tokens from all over the vocabulary, and padding: (2, 8) ids and their mask."""
    config, device = model.config.get_text_config(), next(model.parameters()).device
    width = min(8, most_positions(model) or 8)
    input_ids = torch.linspace(0, config.vocab_size - 1, 2 * width, device=device).long()
    mask = torch.ones(2, width, dtype=torch.int64, device=device)
    mask[1, -3:] = 0
    return input_ids.view(2, width), mask


@contextlib.contextmanager
def evaluating(*models: Any) -> Iterator[None]:
    """Put models in eval mode for a while, and let them keep no keys and values.

    A hybrid that is left without attention layers has no cache that it could make. A short text
    turns BigBird's sparse attention into full attention, for good; that is undone.
    """
    with contextlib.ExitStack() as restore:
        for model in models:
            restore.callback(model.train, model.training)
            model.eval()
            config, body = model.config.get_text_config(), model.base_model
            if hasattr(body, "set_attention_type"):
                restore.callback(body.set_attention_type, body.attention_type)
            if getattr(config, "use_cache", False):
                restore.callback(setattr, config, "use_cache", True)
                config.use_cache = False
        yield


def _follow(
    model: Any, bodies: set[nn.Module], input_ids: Tensor, mask: Tensor
) -> tuple[list[tuple[nn.Module, Any]], Tensor]:
    """Run a model. Return its modules in the order in which their calls end, each with its first
    input (each of ``bodies`` with its output), and the logits."""
    calls: list[tuple[nn.Module, Any]] = []

    def called(module: nn.Module, args: Any, output: Any) -> None:
        calls.append((module, output if module in bodies else args[0] if args else None))

    hooks = [m.register_forward_hook(called) for m in model.modules() if m is not model]
    try:
        with evaluating(model):
            output = model(input_ids, attention_mask=mask)
    finally:
        for hook in hooks:
            hook.remove()
    if not isinstance(getattr(output, "logits", None), Tensor):
        raise TypeError(f"a {type(output).__name__} without logits of its tokens")
    return calls, output.logits


def _is_head(module: nn.Module, given: Any, width: int) -> bool:
    """Whether a module multiplies its input with a (width, D') weight."""
    weight = getattr(module, "weight", None)
    if not (isinstance(weight, Tensor) and isinstance(given, Tensor)):
        return False
    return tuple(weight.shape) == (width, given.shape[-1])


def _bias(
    model: Any, body: nn.Module, head: str, input_ids: Tensor, mask: Tensor, own: Tensor
) -> str | None:
    """The name of the head's bias: its own, or a weight that moves the logits as a bias does."""
    if getattr(model.get_submodule(head), "bias", None) is not None:
        return f"{head}.bias"
    below = {id(p) for p in body.parameters()}
    for name, weight in model.named_parameters():
        if weight.shape != own.shape[-1:] or id(weight) in below:
            continue
        before = weight.clone()
        weight.add_(1)
        with evaluating(model):
            moved = model(input_ids, attention_mask=mask).logits
        weight.copy_(before)
        if not torch.equal(moved, own):
            return name
    return None


def _scaled(parts: Parts, own: Tensor, hidden: Tensor, mask: Tensor) -> Parts:
    """Add the scale and the softcap that the model's configuration names."""
    config = parts.model.config.get_text_config()
    values = [getattr(config, name, None) for name in SCALES]
    base = getattr(config, "dim_model_base", None)  # MiniCPM3 scales the features
    values.append(base / config.hidden_size if base else None)
    numbers = {float(v) for v in values if isinstance(v, int | float) and v and v != 1}
    caps = [getattr(config, name, None) for name in SOFTCAPS]
    softcap = next((float(c) for c in caps if isinstance(c, int | float) and c), None)
    found = [
        Parts(**{**vars(parts), "scale": scale, "softcap": softcap})
        for scale in (1.0, *numbers, *(1 / number for number in numbers))
    ]
    rows = mask.flatten().bool()
    features = parts.features(hidden.flatten(0, 1)[rows])
    wanted = own.flatten(0, 1)[rows].float()
    reads = parts.head.weight.shape[1]
    if features.shape[-1] != reads:
        raise RuntimeError(f"{features.shape[-1]} numbers for each token where it reads {reads}")
    return min(found, key=lambda p: difference(wanted, p.logits(features).float()))


def difference(own: Tensor, ours: Tensor) -> float:
    """The largest difference, as a share of the largest logit. NaN counts as infinite."""
    share = (own - ours).abs().max() / own.abs().max().clamp_min(torch.finfo(own.dtype).tiny)
    return float(share) if share.isfinite() else float("inf")
