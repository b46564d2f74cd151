"""The losses once more, in float64 and from docs/losses.md alone: what every backend is held to.

Nothing here imports distilfast. The values and the gradients are the closed forms, written per row;
the yardstick beside them ("plain") is what a user would write in fp32 PyTorch, differentiated by
autograd. The budget (docs/error-budget.md) lets a backend err by twice what the yardstick errs,
plus a little:

    loss      |ours - o| <= 2 |plain - o| + 1e-5 |o| + 1e-5 max(1, T^2)      (cos: 1e-6)
    gradient  the same in the row's maximum norm, with 1e-5 (fp32), 2^-10 (fp16), 2^-7 (bf16) of the
              row's largest entry and one subnormal of the dtype

The budget of a row is reduced (masked, weighted, divided) exactly as its loss is. One thing is
added to the contract's line: most gradients are differences of probabilities, and beside a near
teacher the yardstick may by luck be exact where fp32 cannot be relied on to be. So its error counts
as at least half a unit in the last place of the terms it subtracts ("size" below).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional

PARTS = ("kd", "ce", "cos", "mse")
ALL_PARTS = {"kd_weight": 5.0, "ce_weight": 2.0, "cos_weight": 1.5, "mse_weight": 0.25}
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
REDUCTIONS = ("mean", "sum", "none")
MODES = ("probability", "logit")  # of an ensemble
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
IGNORE = -100
INF = math.inf
NAN = math.nan

# The gradient's relative budget: one unit in the last place of the dtype it is rounded to.
GRAD_EPS = {
    torch.float64: 1e-11,
    torch.float32: 1e-5,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
SUBNORMAL = {
    torch.float64: 2.0**-1074,
    torch.float32: 2.0**-149,
    torch.float16: 2.0**-24,
    torch.bfloat16: 2.0**-133,
}


class Rows(NamedTuple):
    """One part of the loss before masks, weights and reduction."""

    value: Tensor  # (N,)
    grad: Tensor  # (N, V), with respect to the student's logits
    size: Tensor | float = 0.0  # (N,), the largest of the terms whose difference the gradient is


class Expected(NamedTuple):
    """What a call should return, with the budget of each number."""

    value: dict[str, Tensor]  # "loss" and the four parts, reduced
    slack: dict[str, Tensor]  # same shapes
    grad: Tensor  # the student's shape
    grad_slack: Tensor  # (..., 1)


# The closed forms, float64


def _times_log_ratio(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """p * log(p / q) with 0 * log 0 = 0; NaN stays NaN since NaN == 0 is false."""
    return torch.where(p == 0, 0.0, p * (log_p - log_q))


def divergence_rows(s: Tensor, t: Tensor, temperature: float, kind: str, beta: float) -> Rows:
    scale = temperature
    log_s, log_t = torch.log_softmax(s / scale, -1), torch.log_softmax(t / scale, -1)
    p_s, p_t = log_s.exp(), log_t.exp()
    if kind == "forward_kl":
        kl = _times_log_ratio(p_t, log_t, log_s).sum(-1)
        size = _row_max(scale * torch.maximum(p_s, p_t))
        return Rows(scale**2 * kl, scale * (p_s - p_t), size)
    if kind == "reverse_kl":
        kl = _times_log_ratio(p_s, log_s, log_t).sum(-1)
        grad = torch.where(p_s == 0, 0.0, scale * p_s * (log_s - log_t - kl[:, None]))
        terms = scale * p_s * (log_s.abs() + log_t.abs() + kl[:, None])
        size = _row_max(torch.where(p_s == 0, 0.0, terms))
        return Rows(scale**2 * kl, torch.where(kl.isfinite()[:, None], grad, NAN), size)
    assert kind == "jsd", kind
    log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
    kl_t = _times_log_ratio(p_t, log_t, log_m).sum(-1)
    kl_s = _times_log_ratio(p_s, log_s, log_m).sum(-1)
    inner = torch.where(p_s == 0, 0.0, p_s * (log_s - log_m - kl_s[:, None]))
    value = scale**2 * (beta * kl_t + (1 - beta) * kl_s)
    grad = torch.where(value.isfinite()[:, None], scale * (1 - beta) * inner, NAN)
    terms = scale * (1 - beta) * p_s * (log_s.abs() + log_m.abs() + kl_s[:, None])
    return Rows(value, grad, _row_max(torch.where(p_s == 0, 0.0, terms)))


def ce_rows(s: Tensor, labels: Tensor) -> Rows:
    """labels must be inside the vocabulary; the caller hides the ignored rows."""
    one_hot = functional.one_hot(labels, s.shape[-1]).to(s.dtype)
    value = -torch.log_softmax(s, -1).gather(-1, labels[:, None]).squeeze(-1)
    return Rows(value, torch.softmax(s, -1) - one_hot, 1.0)


def cos_rows(s: Tensor, t: Tensor) -> Rows:
    both = torch.isneginf(s) & torch.isneginf(t)
    s, t = s.masked_fill(both, 0.0), t.masked_fill(both, 0.0)
    norm_s, norm_t = s.norm(dim=-1, keepdim=True), t.norm(dim=-1, keepdim=True)
    dot = (s * t).sum(-1, keepdim=True)
    zero = (norm_s == 0) | (norm_t == 0)
    value = torch.where(zero, 1.0, 1 - dot / (norm_s * norm_t))
    grad = torch.where(zero, 0.0, dot * s / (norm_s**3 * norm_t) - t / (norm_s * norm_t))
    size = _row_max(t.abs()) / (norm_s * norm_t).squeeze(-1)
    return Rows(value.squeeze(-1), grad, size)


def mse_rows(s: Tensor, t: Tensor) -> Rows:
    both = torch.isneginf(s) & torch.isneginf(t)
    gap = torch.where(both, 0.0, s - t)
    value = gap.square().sum(-1)
    return Rows(value, torch.where(value.isfinite()[:, None], 2 * gap, NAN))


def combined_rows(
    teachers: Sequence[Tensor], weights: Sequence[float], temperature: float, mode: str
) -> Tensor:
    """An ensemble's logits; teachers of weight 0 are not looked at."""
    total = sum(weights)
    used = [(t.double(), w / total) for t, w in zip(teachers, weights, strict=True) if w > 0]
    if mode == "logit":
        return torch.stack([w * t for t, w in used]).sum(0)
    shares = [math.log(w) + torch.log_softmax(t / temperature, -1) for t, w in used]
    return temperature * torch.logsumexp(torch.stack(shares), 0)


# The yardstick: the same rows as a user would write them


def plain_rows(
    part: str,
    s: Tensor,
    t: Tensor,
    labels: Tensor | None,
    temperature: float,
    kind: str,
    beta: float,
) -> Rows:
    s = s.clone().requires_grad_()
    if part == "kd":
        log_s = functional.log_softmax(s / temperature, -1)
        log_t = functional.log_softmax(t / temperature, -1)
        if kind == "forward_kl":
            terms = functional.kl_div(log_s, log_t, reduction="none", log_target=True)
        elif kind == "reverse_kl":
            terms = functional.kl_div(log_t, log_s, reduction="none", log_target=True)
        else:
            log_m = torch.logaddexp(log_t + math.log(beta), log_s + math.log1p(-beta))
            from_t = functional.kl_div(log_m, log_t, reduction="none", log_target=True)
            from_s = functional.kl_div(log_m, log_s, reduction="none", log_target=True)
            terms = beta * from_t + (1 - beta) * from_s
        value = temperature**2 * terms.sum(-1)
    elif part == "ce":
        value = functional.cross_entropy(s, labels, reduction="none")
    elif part == "cos":
        value = 1 - functional.cosine_similarity(s, t, dim=-1)
    else:
        value = functional.mse_loss(s, t, reduction="none").sum(-1)
    (grad,) = torch.autograd.grad(value.sum(), s)
    return Rows(value.detach(), grad)


# Assembly: masks, weights, divisors


def _rows_of(tensor: Tensor, dtype: torch.dtype, width: int) -> Tensor:
    return tensor.detach().cpu().to(dtype).reshape(-1, tensor.shape[-1])[:, :width]


def _row_weights(mask: Tensor | None, lead: torch.Size) -> Tensor:
    weights = torch.ones(lead) if mask is None else mask.detach().cpu()
    return weights.double().reshape(-1)


def _divide(weights: Tensor, reduction: str, normalizer: float | Tensor | None) -> Tensor:
    """The coefficient of each row: its weight over the part's own divisor; 0 / 0 is 0."""
    if reduction != "mean":
        return weights
    divisor = float(weights.sum() if normalizer is None else normalizer)
    return weights / divisor if divisor != 0 else torch.zeros_like(weights)


def _reduce(rows: Tensor, reduction: str, lead: torch.Size) -> Tensor:
    return rows.reshape(lead) if reduction == "none" else rows.sum()


def expect(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor | None = None,
    *,
    temperature: float = 2.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    cos_weight: float = 0.0,
    mse_weight: float = 0.0,
    divergence: str = "forward_kl",
    jsd_beta: float = 0.5,
    mask: Tensor | None = None,
    ignore_index: int = IGNORE,
    vocab_size: int | None = None,
    reduction: str = "mean",
    kd_normalizer: float | Tensor | None = None,
    ce_normalizer: float | Tensor | None = None,
    grad_output: float | Tensor = 1.0,
    dtype: torch.dtype | None = None,
) -> Expected:
    """distillation_loss by hand: same arguments; dtype is the gradient's (the student's)."""
    lead = student_logits.shape[:-1]
    width = student_logits.shape[-1] if vocab_size is None else vocab_size
    dtype = student_logits.dtype if dtype is None else dtype
    exact = dtype == torch.float64
    working = torch.float64 if exact else torch.float32  # the yardstick's dtype
    unit = 1e-11 if exact else 1e-5

    s64, t64 = (_rows_of(x, torch.float64, width) for x in (student_logits, teacher_logits))
    s32, t32 = (_rows_of(x, working, width) for x in (student_logits, teacher_logits))
    n_rows = s64.shape[0]
    in_mask = _row_weights(mask, lead)
    if labels is None:
        labelled, safe = torch.zeros(n_rows).double(), None
    else:
        flat = labels.detach().cpu().reshape(-1)
        labelled = (flat != ignore_index).double()
        safe = torch.where(flat == ignore_index, 0, flat)
    upstream = torch.as_tensor(grad_output).detach().cpu().double()
    upstream = upstream.expand(lead).reshape(-1) if reduction == "none" else upstream.expand(n_rows)

    weights = {"kd": kd_weight, "ce": ce_weight, "cos": cos_weight, "mse": mse_weight}
    floors = {"kd": unit * max(1.0, temperature**2), "ce": unit, "cos": unit / 10, "mse": unit}
    zero = _reduce(torch.zeros(n_rows).double(), reduction, lead)
    value, slack = {"loss": zero}, {"loss": zero}
    grad, plain_grad = torch.zeros_like(s64), torch.zeros_like(s64)
    luck = torch.zeros(n_rows).double()
    for part in PARTS:
        if weights[part] == 0:
            value[part] = slack[part] = zero
            continue
        if part == "kd":
            exact_rows = divergence_rows(s64, t64, temperature, divergence, jsd_beta)
        elif part == "ce":
            exact_rows = ce_rows(s64, safe)
        else:
            exact_rows = (cos_rows if part == "cos" else mse_rows)(s64, t64)
        yardstick = plain_rows(part, s32, t32, safe, temperature, divergence, jsd_beta)

        used = labelled if part == "ce" else in_mask
        coefficient = _divide(used, reduction, ce_normalizer if part == "ce" else kd_normalizer)
        keep = coefficient != 0  # a row that is not used contributes 0 whatever it holds

        def pick(rows: Tensor, keep: Tensor = keep, by: Tensor = coefficient) -> Tensor:
            shape = (-1,) + (1,) * (rows.dim() - 1)
            return torch.where(keep.reshape(shape), by.reshape(shape) * rows, 0.0)

        off = (yardstick.value.double() - exact_rows.value).abs().nan_to_num(0.0, 0.0)
        budget = 2 * off + unit * exact_rows.value.abs() + floors[part]
        value[part] = _reduce(pick(exact_rows.value), reduction, lead)
        slack[part] = _reduce(pick(budget), reduction, lead)
        value["loss"] = value["loss"] + weights[part] * value[part]
        slack["loss"] = slack["loss"] + weights[part] * slack[part]
        grad = grad + weights[part] * pick(exact_rows.grad)
        plain_grad = plain_grad + weights[part] * pick(yardstick.grad.double())
        size = torch.as_tensor(exact_rows.size).double().expand(n_rows).nan_to_num(0.0, 0.0)
        luck = luck + weights[part] * torch.finfo(working).eps / 2 * pick(size)

    grad, plain_grad = grad * upstream[:, None], plain_grad * upstream[:, None]
    off = (plain_grad - grad).abs().nan_to_num(0.0, 0.0)
    largest = grad.abs().nan_to_num(0.0, 0.0)
    off = torch.maximum(_row_max(off), luck * upstream.abs())
    grad_slack = 2 * off + GRAD_EPS[dtype] * _row_max(largest) + SUBNORMAL[dtype]
    full = torch.zeros(n_rows, student_logits.shape[-1]).double()
    full[:, :width] = grad
    return Expected(value, slack, full.reshape(student_logits.shape), grad_slack.reshape(*lead, 1))


def _row_max(rows: Tensor) -> Tensor:
    return rows.amax(-1) if rows.numel() else rows.new_zeros(rows.shape[0])


# Comparison


def assert_within(name: str, ours: Tensor, exact: Tensor, slack: Tensor | float) -> None:
    """|ours - exact| <= slack everywhere; where exact is not finite, ours is the same thing."""
    ours = ours.detach().cpu().double()
    assert ours.shape == exact.shape, f"{name}: shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    slack = torch.as_tensor(slack).double().expand(exact.shape)
    finite = exact.isfinite()
    same = torch.where(exact.isnan(), ours.isnan(), ours == exact)
    good = torch.where(finite, (ours - exact).abs() <= slack, same)
    if bool(good.all()):
        return
    bad = (~good).nonzero()[0]
    where = tuple(bad.tolist())
    raise AssertionError(
        f"{name}{list(where)}: {ours[where].item()!r} instead of {exact[where].item()!r} "
        f"(budget {slack[where].item():.3g}, {int((~good).sum())} of {good.numel()} out of it)"
    )


def check(output: Any, gradient: Tensor | None, expected: Expected) -> None:
    """A DistillationOutput and the student's gradient against the oracle, inside the budget."""
    for name in ("loss", *PARTS):
        assert_within(name, getattr(output, name), expected.value[name], expected.slack[name])
    if gradient is not None:
        assert_within("gradient", gradient, expected.grad, expected.grad_slack)


def assert_max_norm(name: str, ours: Tensor, exact: Tensor, plain: Tensor, eps: float) -> None:
    """The gradient's budget for a whole matrix: against its largest entry and plain PyTorch."""
    exact = exact.detach().cpu().double()
    off = (plain.detach().cpu().double() - exact).abs().max()
    assert_within(name, ours, exact, 2 * off + eps * exact.abs().max())


def assert_same(ours: Sequence[Tensor | None], theirs: Sequence[Tensor | None]) -> None:
    """Bit for bit, with NaN equal to NaN."""
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        if a is None or b is None:
            assert a is b
            continue
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def read(**arguments: Any) -> dict[str, Any]:
    """A loss's arguments without those that its weights leave unread: it refuses them."""
    soft = arguments.get("kd_weight", 1.0) or any(
        arguments.get(name) for name in ("cos_weight", "mse_weight")
    )
    unread = [] if arguments.get("ce_weight") else ["labels", "ce_normalizer"]
    if not soft:
        unread += ["mask", "kd_normalizer", "teacher_weights"]
        unread += ["teacher_hidden", "teacher_weight", "teacher_bias"]
    return {k: None if k in unread else v for k, v in arguments.items()}


def value_and_grad(
    loss_fn: Callable[..., Any],
    student: Tensor,
    *args: Any,
    grad_output: float | Tensor | None = None,
    **keywords: Any,
) -> tuple[Any, Tensor]:
    """Call loss_fn on a fresh leaf and return (its output, the leaf's gradient).

    The leaf is made by detaching, so the student's strides reach the loss as they are.
    """
    leaf = student.detach().requires_grad_()
    output = loss_fn(leaf, *args, **keywords)
    loss = output if isinstance(output, Tensor) else output.loss
    upstream = torch.ones_like(loss) if grad_output is None else grad_output
    if not isinstance(upstream, Tensor):
        upstream = torch.full_like(loss, upstream)
    (gradient,) = torch.autograd.grad(loss, leaf, upstream.to(loss))
    return output, gradient


def parity(
    loss_fn: Callable[..., Any],
    student: Tensor,
    teacher: Tensor,
    labels: Tensor | None = None,
    *,
    backend: str,
    **keywords: Any,
) -> tuple[Any, Tensor]:
    """value_and_grad of a loss of logits, whose loss, parts and gradient are within the budget."""
    used = read(labels=labels, backend=backend, **keywords)
    output, gradient = value_and_grad(loss_fn, student, teacher, **used)
    assert gradient.dtype == student.dtype
    check(output, gradient, expect(student, teacher, labels, **keywords))
    return output, gradient


@contextmanager
def value_error(*words: object) -> Iterator[None]:
    """A ValueError whose message holds every word; sizes compare without brackets."""
    with pytest.raises(ValueError) as caught:
        yield
    message = re.sub(r"[\[\]()]", "", str(caught.value))
    missing = [word for word in words if str(word) not in message]
    assert not missing, f"{missing} not in {message!r}"


def assert_second_backward_repeats(loss: Tensor, leaves: Sequence[Tensor]) -> None:
    """A backward that scales a saved gradient in place would be wrong the second time."""
    first, second, third = (
        torch.autograd.grad(loss, leaves, torch.full_like(loss, by), retain_graph=True)
        for by in (1.0, 4.0, 1.0)
    )
    # a power of two rounds as it does
    torch.testing.assert_close(second, tuple(4 * x for x in first))
    assert_same(third, first)


def assert_double_backward_raises(
    loss: Tensor, leaves: Sequence[Tensor], upstream_needs_grad: bool
) -> None:
    """The penalty also holds the leaves themselves, so that a first gradient cut off from the graph
    would pass silently with half of the second one missing."""
    upstream = torch.ones_like(loss, requires_grad=upstream_needs_grad)

    def penalise() -> None:
        gradients = torch.autograd.grad(loss, leaves, upstream, create_graph=True)
        torch.stack([x.square().sum() for x in (*gradients, *leaves)]).sum().backward()

    with pytest.raises(RuntimeError, match=r"(?i)double|twice|second"):
        penalise()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """fullgraph: a graph break is an error; aot_eager: the tracing without the code generation."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


# Data


def logits_pair(
    shape: Sequence[int],
    *,
    seed: int = 0,
    near: bool = False,
    scale: float = 3.0,
    offset: float = 0.0,
    dtypes: tuple[torch.dtype, torch.dtype] = (torch.float32, torch.float32),
    device: str = "cpu",
) -> tuple[Tensor, Tensor]:
    """Student and teacher logits; a near teacher is the student plus noise of 0.1.

    Equal ones would prove nothing: every divergence and every gradient is 0 there.
    """
    generator = torch.Generator().manual_seed(seed)
    student = scale * torch.randn(*shape, generator=generator) + offset
    noise = torch.randn(*shape, generator=generator)
    teacher = student + 0.1 * noise if near else scale * noise + offset
    return student.to(device, dtypes[0]), teacher.to(device, dtypes[1])


def make_labels(lead: Sequence[int], vocab: int, which: str, device: str = "cpu") -> Tensor:
    """which: "none" | "some" | "all" rows carry a label; the others hold ignore_index."""
    generator = torch.Generator().manual_seed(17)
    labels = torch.randint(0, vocab, tuple(lead), generator=generator)
    every_third = torch.arange(labels.numel()).reshape(labels.shape) % 3 == 0
    ignored = {"none": torch.ones_like(every_third), "some": every_third}.get(which)
    return (labels if ignored is None else labels.masked_fill(ignored, IGNORE)).to(device)


def make_mask(lead: Sequence[int], which: str, device: str = "cpu") -> Tensor | None:
    """which: "absent" | "none" | "some" | "all" | "float" (row weights, some of them 0)."""
    if which == "absent":
        return None
    rows = torch.arange(math.prod(lead)).reshape(tuple(lead))
    if which == "float":
        return (0.75 * (rows % 4)).to(device)
    keep = {"none": rows < 0, "some": rows % 3 != 1, "all": rows >= 0}[which]
    return keep.to(device)
