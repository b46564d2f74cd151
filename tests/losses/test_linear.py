"""linear_distillation_loss: the head and the loss in one, without the logits of a whole batch."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from oracle import (
    ALL_PARTS,
    BF16,
    DIVERGENCES,
    FP16,
    FP32,
    IGNORE,
    INF,
    MODES,
    NAN,
    PARTS,
    REDUCTIONS,
    assert_double_backward_raises,
    assert_max_norm,
    assert_same,
    assert_second_backward_repeats,
    assert_within,
    compiled,
    expect,
    make_labels,
    make_mask,
    read,
    value_error,
)

from distilfast import combine_teachers, distillation_loss, linear_distillation_loss
from distilfast.losses import chunks, linear_operator, products, scratch

FP64 = torch.float64
LEAD, VOCAB = (2, 5), 23
N_ROWS = math.prod(LEAD)
NAMES = ("hidden", "weight", "bias")


class Side:
    """One model's last hidden states and head; every tensor of the student is a leaf."""

    def __init__(
        self,
        width,
        *,
        vocab=VOCAB,
        lead=LEAD,
        bias=True,
        seed=0,
        dtype=FP32,
        device="cpu",
        requires_grad=False,
    ):
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape, scale=1.0):
            tensor = scale * torch.randn(*shape, generator=generator)
            return tensor.to(device, dtype).requires_grad_(requires_grad)

        self.hidden = draw(*lead, width)
        self.weight = draw(vocab, width, scale=2 / math.sqrt(width))
        self.bias = draw(vocab) if bias else None

    def leaves(self):
        return [x for x in (self.hidden, self.weight, self.bias) if x is not None]

    def logits(self, scale=1.0, softcap=None):
        """softcap * tanh(scale * (h W^T + b) / softcap)"""
        logits = self.hidden @ self.weight.T
        logits = scale * (logits if self.bias is None else logits + self.bias)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def sides(*, device="cpu", student=None, teacher=None, **both):
    """A student of width 8 and a teacher of width 12: heads of two models seldom agree."""
    return (
        Side(8, seed=1, device=device, requires_grad=True, **{**both, **(student or {})}),
        Side(12, seed=2, device=device, **{**both, **(teacher or {})}),
    )


def call(student, teacher, labels=None, **keywords):
    """linear_distillation_loss of two Sides; several teachers are an ensemble."""
    if isinstance(teacher, Side):
        hidden, weight, bias = teacher.hidden, teacher.weight, teacher.bias
    else:
        hidden, weight = [x.hidden for x in teacher], [x.weight for x in teacher]
        bias = None if teacher[0].bias is None else [x.bias for x in teacher]
    return linear_distillation_loss(
        student.hidden,
        student.weight,
        student_bias=student.bias,
        **read(
            teacher_hidden=hidden,
            teacher_weight=weight,
            teacher_bias=bias,
            labels=labels,
            **keywords,
        ),
    )


def gradients(loss, student, grad_output=None):
    upstream = torch.ones_like(loss) if grad_output is None else grad_output.to(loss)
    return torch.autograd.grad(loss, student.leaves(), upstream)


def pair_of(value):
    return value if isinstance(value, tuple) else (value, value)


def compare(
    student,
    teacher,
    labels=None,
    *,
    grad_output=None,
    logit_scale=1.0,
    logit_softcap=None,
    chunk_rows="auto",
    rtol=1e-4,
    atol=2e-5,
    ensemble=None,
    **keywords,
):
    """The fused call equals distillation_loss of the logits: value, parts and every gradient.

    ensemble: its mode and the weights of its teachers.
    """
    (scale_s, scale_t), (cap_s, cap_t) = pair_of(logit_scale), pair_of(logit_softcap)
    fused = {"logit_scale": logit_scale, "logit_softcap": logit_softcap, "chunk_rows": chunk_rows}
    with torch.no_grad():
        if ensemble is None:
            teacher_logits = teacher.logits(scale_t, cap_t)
        else:
            mode, weights = ensemble
            fused |= {"ensemble": mode, "teacher_weights": weights}
            each = [x.logits(scale_t, cap_t)[..., :VOCAB] for x in teacher]
            temperature = keywords.get("temperature", 2.0)
            teacher_logits = combine_teachers(each, weights, temperature=temperature, mode=mode)
    wanted = distillation_loss(student.logits(scale_s, cap_s), teacher_logits, labels, **keywords)
    output = call(student, teacher, labels, **fused, **keywords)
    close = {"rtol": rtol, "atol": atol}
    torch.testing.assert_close(output[:5], wanted[:5], **close)
    got = gradients(output.loss, student, grad_output)
    torch.testing.assert_close(got, gradients(wanted.loss, student, grad_output), **close)
    assert [x.dtype for x in got] == [x.dtype for x in student.leaves()]
    assert not any(part.requires_grad for part in output[1:])
    return output, got


# Values and gradients


def test_head_equals_hand_value(backend, device):
    # h = 1, W = [0, ln 9], b = [0, ln 9]: logits [0, 2 ln 9] times 1/2 = [0, 2 ln 3], the pair
    # whose softmax at T = 2 is [1/4, 3/4]; the teacher's [1/2, 1/2]. kd = 2 ln(4/3), its gradient
    # on the logits [-1/2, 1/2], so on W and on b half of it, and on h half of ln 9 / 2
    student = Side(1, vocab=2, lead=(1,))
    ln9 = math.log(9)
    student.hidden = torch.ones(1, 1, device=device, requires_grad=True)
    student.weight = torch.tensor([[0.0], [ln9]], device=device, requires_grad=True)
    student.bias = torch.tensor([0.0, ln9], device=device, requires_grad=True)
    teacher = Side(1, vocab=2, lead=(1,), device=device, bias=False)
    teacher.hidden.zero_()
    output = call(student, teacher, logit_scale=(0.5, 1.0), backend=backend)
    d_hidden, d_weight, d_bias = gradients(output.loss, student)
    torch.testing.assert_close(output.loss.item(), 2 * math.log(4 / 3), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(d_hidden.cpu(), torch.tensor([[ln9 / 4]]))
    torch.testing.assert_close(d_weight.cpu(), torch.tensor([[-0.25], [0.25]]))
    torch.testing.assert_close(d_bias.cpu(), torch.tensor([-0.25, 0.25]))


def oracle_gradients(student, expected, scale, softcap):
    """The closed-form logit gradient carried through the head by hand, in float64."""
    hidden, weight, bias = (x.detach().double() for x in student.leaves())
    flat = hidden.reshape(-1, hidden.shape[-1])
    by_logit = expected.grad.reshape(-1, weight.shape[0])
    if softcap is not None:
        raw = scale * (flat @ weight.T + bias)
        by_logit = by_logit * (1 - torch.tanh(raw / softcap) ** 2)
    by_logit = scale * by_logit
    return (by_logit @ weight).reshape(hidden.shape), by_logit.T @ flat, by_logit.sum(0)


@pytest.mark.parametrize(
    ("scale", "softcap", "temperature"), [(1.0, None, 3.0), (0.25, None, 7.3), (1.5, 3.0, 0.5)]
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity_with_the_oracle(backend, device, divergence, scale, softcap, temperature):
    student, teacher = sides(device=device)
    labels, mask = make_labels(LEAD, VOCAB, "some", device), make_mask(LEAD, "float", device)
    keywords = {"mask": mask, "divergence": divergence, "jsd_beta": 0.3, **ALL_PARTS}
    keywords["temperature"] = temperature
    head = {"logit_scale": scale, "logit_softcap": softcap, "chunk_rows": 4, "backend": backend}
    output = call(student, teacher, labels, **head, **keywords)
    got = gradients(output.loss, student)
    plain_logits = [side.logits(scale, softcap) for side in (student, teacher)]
    plain = distillation_loss(*plain_logits, labels, backend="torch", **keywords)
    exact_student, exact_teacher = sides(device="cpu")
    for side in (exact_student, exact_teacher):
        for name in NAMES:
            setattr(side, name, getattr(side, name).detach().double())
    exact_logits = [side.logits(scale, softcap) for side in (exact_student, exact_teacher)]
    expected = expect(*exact_logits, labels, dtype=FP32, **keywords)
    # the logits themselves carry an fp32 GEMM's rounding: ten times the loss's own budget
    for name in ("loss", *PARTS):
        assert_within(name, getattr(output, name), expected.value[name], 10 * expected.slack[name])
    exact = oracle_gradients(exact_student, expected, scale, softcap)
    for name, a, b, c in zip(NAMES, got, exact, gradients(plain.loss, student), strict=True):
        assert_max_norm(name, a, b, c, 1e-5)


@pytest.mark.parametrize("chunk_rows", [1, 3, 7, N_ROWS, 1000, "auto"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_any_chunk_equals_materialised_logits(backend, device, reduction, chunk_rows):
    # 10 rows: chunks of one, with a remainder of one, of three, exactly one chunk, more than that
    student, teacher = sides(device=device)
    labels, mask = make_labels(LEAD, VOCAB, "some", device), make_mask(LEAD, "float", device)
    upstream = torch.linspace(-1, 2, N_ROWS, device=device).reshape(LEAD)
    keywords = {"mask": mask, "reduction": reduction, "chunk_rows": chunk_rows, **ALL_PARTS}
    keywords["grad_output"] = upstream if reduction == "none" else torch.tensor(-3.0)
    compare(student, teacher, labels, backend=backend, **keywords)


@pytest.mark.parametrize("chunk_rows", [3, "auto"])
def test_normalizers_span_all_chunks(backend, device, chunk_rows):
    student, teacher = sides(device=device)
    labels, mask = make_labels(LEAD, VOCAB, "some", device), make_mask(LEAD, "some", device)
    totals = {"kd_normalizer": torch.tensor(64.0, device=device), "ce_normalizer": 17}
    keywords = {"mask": mask, "chunk_rows": chunk_rows, "backend": backend, **ALL_PARTS}
    compare(student, teacher, labels, **totals, **keywords)


@pytest.mark.parametrize("which", ["none", "student", "teacher", "both"])
def test_biases_are_optional(backend, device, which):
    student, teacher = sides(
        device=device,
        student={"bias": which in ("student", "both")},
        teacher={"bias": which in ("teacher", "both")},
    )
    _, got = compare(student, teacher, chunk_rows=4, backend=backend)
    assert len(got) == (3 if which in ("student", "both") else 2)


@pytest.mark.parametrize(
    ("logit_scale", "logit_softcap"),
    [
        (0.3, None),
        ((0.3, 2.0), None),
        (1.0, 2.5),  # logits of about 2: well into the bend of tanh
        (1.0, (2.5, None)),
        (1.0, (None, 2.5)),
        ((0.3, 2.0), (4.0, 1.5)),
    ],
    ids=str,
)
def test_scale_and_softcap_equal_materialised(backend, device, logit_scale, logit_softcap):
    # a family without its scale is off by a factor 8, another without its cap by 100
    student, teacher = sides(device=device)
    labels = make_labels(LEAD, VOCAB, "some", device)
    head = {"logit_scale": logit_scale, "logit_softcap": logit_softcap, "chunk_rows": 4}
    output, _ = compare(student, teacher, labels, backend=backend, **head, **ALL_PARTS)
    plain = call(student, teacher, backend=backend)
    assert abs(output.kd - plain.kd) > 1e-2


@pytest.mark.parametrize(
    ("student_vocab", "teacher_vocab"), [(28, 23), (23, 28), (28, 25), (28, 28)]
)
@pytest.mark.parametrize("bad", [NAN, 1e4], ids=str)
@pytest.mark.parametrize("logit_softcap", [None, 3.0], ids=["plain", "softcap"])
def test_padded_heads_contribute_nothing_whatever_they_hold(
    backend, device, student_vocab, teacher_vocab, bad, logit_softcap
):
    # 0 * NaN in the product with the padded rows of the head would reach every hidden state
    widths = {"student": {"vocab": student_vocab}, "teacher": {"vocab": teacher_vocab}}
    wide, narrow = sides(device=device, **widths), sides(device=device, **widths)
    for full, cut in zip(wide, narrow, strict=True):
        trained = full is wide[0]
        for name in ("weight", "bias"):
            values = getattr(full, name).detach()
            values[VOCAB:] = bad
            setattr(full, name, values.requires_grad_(trained))
            setattr(cut, name, values[:VOCAB].clone().requires_grad_(trained))
    labels = make_labels(LEAD, VOCAB, "some", device)
    keywords = {"chunk_rows": 4, "backend": backend, "logit_softcap": logit_softcap, **ALL_PARTS}
    wanted, wanted_gradients = compare(*narrow, labels, **keywords)
    output = call(*wide, labels, vocab_size=VOCAB, **keywords)
    torch.testing.assert_close(output[:5], wanted[:5])
    d_hidden, d_weight, d_bias = gradients(output.loss, wide[0])
    assert d_weight.shape == (student_vocab, 8)
    assert (d_weight[VOCAB:] == 0).all()
    assert (d_bias[VOCAB:] == 0).all()
    got = d_hidden, d_weight[:VOCAB], d_bias[:VOCAB]
    torch.testing.assert_close(got, tuple(wanted_gradients), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("chunk_rows", [1, 4, "auto"])
@pytest.mark.parametrize("logit_softcap", [None, 3.0], ids=["plain", "softcap"])
def test_rows_that_nothing_needs_contribute_nothing_whatever_they_hold(
    backend, device, logit_softcap, chunk_rows, bad
):
    # padding tokens: their hidden states meet dW as 0 * NaN unless the rows are left out
    student, teacher = sides(device=device)
    labels = make_labels(LEAD, VOCAB, "some", device)
    mask = torch.ones(LEAD, device=device)
    unused = [(0, 0), (1, 1), (1, 2)]
    for row in unused:
        mask[row], labels[row] = 0.0, IGNORE
    keep = mask.bool()
    with torch.no_grad():
        student.hidden[~keep], teacher.hidden[~keep] = bad, bad
    for reduction in REDUCTIONS:
        keywords = {"reduction": reduction, "chunk_rows": chunk_rows, "backend": backend}
        keywords |= {"logit_softcap": logit_softcap, **ALL_PARTS}
        output = call(student, teacher, labels, mask=mask, **keywords)
        d_hidden, d_weight, d_bias = gradients(output.loss, student)
        assert (d_hidden[~keep] == 0).all()
        kept, kept_teacher = sides(device=device, lead=(int(keep.sum()),))
        for side, whole in ((kept, student), (kept_teacher, teacher)):
            side.weight, side.bias = whole.weight, whole.bias
            side.hidden = whole.hidden.detach()[keep].requires_grad_(side is kept)
        wanted = call(kept, kept_teacher, labels[keep], **keywords)
        loss = output.loss
        if reduction == "none":
            assert (loss[~keep] == 0).all()
            loss = loss[keep]
        torch.testing.assert_close(loss, wanted.loss)
        torch.testing.assert_close(
            (d_hidden[keep], d_weight, d_bias), gradients(wanted.loss, kept), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("masked", [True, False], ids=["outside the mask", "labels alone"])
def test_teacher_is_not_read_where_labels_alone_count(backend, device, masked):
    # the student's side of such a row is used
    student, teacher = sides(device=device)
    labels, mask = make_labels(LEAD, VOCAB, "all", device), make_mask(LEAD, "some", device)
    keywords = {"chunk_rows": 4, "backend": backend}
    keywords |= {"mask": mask, **ALL_PARTS} if masked else {"kd_weight": 0.0, "ce_weight": 1.0}
    wanted = call(student, teacher, labels, **keywords)
    wanted_gradients = gradients(wanted.loss, student)
    teacher.hidden[~mask if masked else ...] = NAN
    output = call(student, teacher, labels, **keywords)
    torch.testing.assert_close(output[:5], wanted[:5])
    torch.testing.assert_close(gradients(output.loss, student), wanted_gradients)


def test_nan_row_leaves_the_other_rows_alone(backend, device):
    student, teacher = sides(device=device)
    keywords = {"reduction": "none", "chunk_rows": 4, "backend": backend}
    clean = call(student, teacher, **keywords)
    with torch.no_grad():
        student.hidden[0, 1] = NAN
    output = call(student, teacher, **keywords)
    nan = torch.zeros(LEAD, dtype=torch.bool, device=device)
    nan[0, 1] = True
    assert torch.equal(output.loss.isnan(), nan)
    torch.testing.assert_close(output.loss[~nan], clean.loss[~nan])
    assert torch.equal(gradients(output.loss, student)[0].isnan().all(-1), nan)


def test_banned_tokens_add_nothing(backend, device):
    # a bias of -inf in both heads: columns that are -inf in both rows
    student, teacher = sides(device=device)
    with torch.no_grad():
        student.bias[[2, 20]], teacher.bias[[2, 20]] = -INF, -INF
    for divergence in DIVERGENCES:
        output, got = compare(
            student, teacher, divergence=divergence, chunk_rows=4, backend=backend
        )
        assert output.loss.isfinite()
        assert all(x.isfinite().all() for x in got)
        assert (got[1][[2, 20]] == 0).all()


@pytest.mark.parametrize("lead", [(), (1,), (7,), (2, 1, 3)], ids=str)
def test_any_leading_shape_equals_materialised(backend, device, lead):
    student, teacher = sides(device=device, lead=lead)
    labels, mask = make_labels(lead, VOCAB, "all", device), make_mask(lead, "all", device)
    keywords = {"mask": mask, "chunk_rows": 2, "backend": backend, **ALL_PARTS}
    for reduction in REDUCTIONS:
        output, got = compare(student, teacher, labels, reduction=reduction, **keywords)
        wanted = lead if reduction == "none" else ()
        assert all(part.shape == wanted for part in output[:5])
        assert got[0].shape == student.hidden.shape


@pytest.mark.parametrize("chunk_rows", [1, "auto"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_do_gives_zero_and_zero_gradients(backend, device, reduction, chunk_rows):
    keywords = {"reduction": reduction, "chunk_rows": chunk_rows, "backend": backend, **ALL_PARTS}
    for lead in ((0,), (2, 0), (3,)):  # empty batches, and one in which everything is left out
        student, teacher = sides(device=device, lead=lead)
        labels = torch.full(lead, IGNORE, device=device)
        mask = torch.zeros(lead, device=device)
        output = call(student, teacher, labels, mask=mask, **keywords)
        assert output.loss.shape == (lead if reduction == "none" else ())
        assert all((part == 0).all() for part in output[:5])
        for leaf, gradient in zip(student.leaves(), gradients(output.loss, student), strict=True):
            assert gradient.shape == leaf.shape
            assert (gradient == 0).all()


def test_memory_layout_does_not_matter(backend, device):
    student, teacher = sides(device=device)
    labels = make_labels(LEAD, VOCAB, "some", device)
    wanted, wanted_gradients = compare(student, teacher, labels, backend=backend, **ALL_PARTS)
    for side in (student, teacher):
        hidden, weight = side.hidden.detach(), side.weight.detach()
        side.hidden = hidden.transpose(0, 1).contiguous().transpose(0, 1)
        side.weight = weight.T.contiguous().T
        side.bias = torch.stack([side.bias.detach(), torch.full_like(side.bias, NAN)], -1)[:, 0]
    for leaf in student.leaves():
        leaf.requires_grad_()
    output = call(student, teacher, labels, chunk_rows=3, backend=backend, **ALL_PARTS)
    torch.testing.assert_close(output[:5], wanted[:5], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradients(output.loss, student), wanted_gradients, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("chunk_rows", [4, 1000])
def test_transposed_memory_does_not_matter_when_scaled(backend, device, dtype, chunk_rows):
    # what the backward scales in place must not have the inputs' strides
    student, teacher = sides(device=device, dtype=dtype, lead=(N_ROWS,))
    keywords = {"chunk_rows": chunk_rows, "backend": backend}
    wanted = gradients(call(student, teacher, **keywords).loss, student, torch.tensor(3.0))
    for name in ("hidden", "weight"):
        x = getattr(student, name).detach()
        setattr(student, name, x.T.contiguous().T.requires_grad_())
    got = gradients(call(student, teacher, **keywords).loss, student, torch.tensor(3.0))
    torch.testing.assert_close(got, wanted)
    # and the operator's fake has the strides of the real one
    options, totals, heads = [2.0, 1.0, 0.0, 0.0, 0.0, 0.5], [1.0, 1.0], [1.0, 0.0, 1.0, 0.0]
    flags = False, True, True, True, False
    how = "forward_kl", "sum", backend, "probability", *2 * ["float32"], *flags
    arguments = (
        *student.leaves(),
        *([x] for x in teacher.leaves()),
        *(None, None, None, None, None),
        [*options, *totals, *heads, 1.0],
        [IGNORE, VOCAB, chunk_rows],
        str(linear_operator.HeadCall(*how)),
    )
    operator = linear_operator.linear_distillation_op
    torch.library.opcheck(operator, arguments, test_utils="test_faketensor")


def test_expanded_hidden_states_accumulate_their_gradient(backend, device):
    student, teacher = sides(device=device)
    with torch.no_grad():
        row = student.hidden[:, :1].clone()
    row.requires_grad_()
    keywords = {"reduction": "sum", "chunk_rows": 4, "backend": backend}
    student.hidden = row.expand(*LEAD, 8)
    (got,) = torch.autograd.grad(call(student, teacher, **keywords).loss, row)
    student.hidden = student.hidden.detach().clone().requires_grad_()
    wanted = gradients(call(student, teacher, **keywords).loss, student)[0]
    torch.testing.assert_close(got, wanted.sum(1, keepdim=True), rtol=1e-4, atol=1e-5)


# Dtypes


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_half_precision_keeps_its_dtype_and_stays_near_the_truth(backend, device, dtype):
    student, teacher = sides(device=device, dtype=dtype)
    labels = make_labels(LEAD, VOCAB, "some", device)
    output = call(student, teacher, labels, chunk_rows=4, backend=backend, **ALL_PARTS)
    assert all(part.dtype == FP32 for part in output[:5])
    got = gradients(output.loss, student)
    assert all(x.dtype == dtype for x in got)

    def reference(labels):
        logits = student.logits(), teacher.logits()
        loss = distillation_loss(*logits, labels, backend="torch", **ALL_PARTS).loss
        return loss.detach(), gradients(loss, student)

    plain, plain_gradients = reference(labels)
    for side in (student, teacher):
        for name in NAMES:
            value = getattr(side, name).detach().double().cpu()
            setattr(side, name, value.requires_grad_(side is student))
    exact, exact_gradients = reference(labels.cpu())
    off, eps = (plain.double().cpu() - exact).abs().item(), torch.finfo(dtype).eps
    assert_within("loss", output.loss, exact, 2 * off + eps * exact.item())
    for name, a, b, c in zip(NAMES, got, exact_gradients, plain_gradients, strict=True):
        assert_max_norm(name, a, b, c, 2 * eps)


def test_dtypes_of_the_two_sides_may_differ(backend, device):
    student, teacher = sides(device=device, student={"dtype": BF16})
    _, got = compare(student, teacher, chunk_rows=4, backend=backend, rtol=2e-2, atol=1e-2)
    assert all(x.dtype == BF16 for x in got)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_rows", [3, "auto"])
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
def test_autocast_computes_in_half_and_returns_the_parameters_dtype(
    backend, device, dtype, chunk_rows
):
    student, teacher = sides(device=device)
    labels = make_labels(LEAD, VOCAB, "some", device)
    keywords = {"backend": backend, **ALL_PARTS}
    full = call(student, teacher, labels, **keywords)
    with torch.autocast(device, dtype=dtype):
        output = call(student, teacher, labels, chunk_rows=chunk_rows, **keywords)
        logits = [
            torch.nn.functional.linear(side.hidden, side.weight, side.bias)
            for side in (student, teacher)
        ]
        assert logits[0].dtype == dtype
        wanted = distillation_loss(*logits, labels, **keywords)
    assert output.loss.dtype == FP32
    got = gradients(output.loss, student)
    assert all(x.dtype == FP32 for x in got)
    torch.testing.assert_close(output[:5], wanted[:5], rtol=1e-2, atol=5e-3)
    for a, b in zip(got, gradients(wanted.loss, student), strict=True):
        assert (a - b).abs().max() <= 0.03 * b.abs().max()
    # it did follow autocast: fp32 would agree with the full computation to seven digits
    assert abs(output.loss - full.loss) > 1e-6 * full.loss


@pytest.mark.thorough
def test_weight_gradient_of_many_chunks_is_accumulated_in_fp32(backend, device):
    # 256 chunks added up in bf16 lose what is below the running sum's last bit
    lead, width, vocab = (256,), 4, 8
    student = Side(width, vocab=vocab, lead=lead, dtype=BF16, device=device, requires_grad=True)
    teacher = Side(width, vocab=vocab, lead=lead, seed=5, dtype=BF16, device=device)
    with torch.no_grad():  # gradients of one sign, so that the sum grows
        student.hidden.abs_()
        student.bias[0] += 3
    keywords = {"reduction": "sum", "backend": backend}
    one = gradients(call(student, teacher, chunk_rows=256, **keywords).loss, student)
    many = gradients(call(student, teacher, chunk_rows=1, **keywords).loss, student)
    for a, b in zip(many[1:], one[1:], strict=True):
        assert (a - b).abs().max() <= 2.0**-7 * b.abs().max()
    # asked for, it is done: a sum of its own dtype, that rounds at every chunk
    keywords["accum_dtype"] = BF16
    rounded = gradients(call(student, teacher, chunk_rows=1, **keywords).loss, student)[1]
    off = (rounded - one[1]).abs().max() / one[1].abs().max()
    assert 2.0**-7 < off < 0.9


@pytest.mark.parametrize("chunk_rows", [3, 1000])
def test_fp32_parameters_under_autocast_get_an_fp32_sum(backend, device, chunk_rows):
    # not one that has been rounded to the products' dtype on the way
    student, teacher = sides(device=device)
    with torch.autocast(device, dtype=BF16):
        output = call(student, teacher, chunk_rows=chunk_rows, backend=backend)
    _, d_weight, d_bias = gradients(output.loss, student)
    # On a CPU that multiplies bf16 a chunk's own share is bf16.
    several = chunk_rows < N_ROWS or device != "cpu" or not products.multiplies_bf16()
    assert ((d_weight != d_weight.to(BF16)).float().mean() > 0.5) == several
    assert (d_bias != d_bias.to(BF16)).float().mean() > 0.5


def test_large_heads_share_goes_by_parts(backend, device, monkeypatch):
    if device != "cpu":
        pytest.skip("a GPU's product adds to the sum itself")
    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)  # else there are no shares
    student, teacher = sides(dtype=BF16)
    keywords = {"chunk_rows": 4, "backend": backend}
    whole = gradients(call(student, teacher, **keywords).loss, student)
    for rows in (1, 7, VOCAB):  # of the weight, each of 8 numbers of 2 bytes
        monkeypatch.setattr(chunks, "SHARE_BYTES", rows * 16)
        parts = gradients(call(student, teacher, **keywords).loss, student)
        torch.testing.assert_close(parts, whole)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "keywords",
    [
        *({"divergence": name} for name in DIVERGENCES),
        {**ALL_PARTS, "logit_scale": (0.7, 1.3), "logit_softcap": (2.0, 5.0)},
        {"divergence": "jsd", "jsd_beta": 0.3, "logit_softcap": 3.0, "ce_weight": 1.0},
        *({"ensemble": mode, "teacher_weights": [1.0, 3.0]} for mode in MODES),
    ],
    ids=["forward", "reverse", "jsd", "all+scale+softcap", "jsd+softcap", *MODES],
)
def test_gradcheck_in_float64(keywords, reduction):
    student, teacher = sides(lead=(3,), vocab=6, dtype=FP64, student={"vocab": 7})
    if "ensemble" in keywords:
        teacher = [teacher, Side(5, lead=(3,), vocab=6, dtype=FP64, seed=9)]
    labels, mask = make_labels((3,), 6, "some"), make_mask((3,), "float")
    fixed = {"mask": mask, "vocab_size": 6, "temperature": 1.7, "chunk_rows": 2}
    fixed["reduction"] = reduction

    def loss(*leaves):
        side = Side(1)
        side.hidden, side.weight, side.bias = leaves
        return call(side, teacher, labels, backend="torch", **fixed, **keywords).loss

    assert torch.autograd.gradcheck(loss, student.leaves())


# Ensembles


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("weights", [None, [0.25, 0.75], [2.0, 6.0]], ids=str)
@pytest.mark.parametrize("chunk_rows", [3, "auto"])
def test_ensemble_equals_combined_logits(backend, device, mode, weights, chunk_rows):
    student, teacher = sides(device=device)
    teachers = [teacher, Side(5, seed=9, device=device)]  # of widths of their own
    labels, mask = make_labels(LEAD, VOCAB, "some", device), make_mask(LEAD, "float", device)
    parts = ALL_PARTS if mode == "logit" else {"kd_weight": 5.0, "ce_weight": 2.0}
    keywords = {"mask": mask, "temperature": 3.0, "chunk_rows": chunk_rows, **parts}
    keywords |= {"ensemble": (mode, weights), "backend": backend}
    for divergence in DIVERGENCES:
        compare(student, teachers, labels, divergence=divergence, **keywords)


@pytest.mark.parametrize("mode", MODES)
def test_ensemble_of_three_equals_combined_logits(backend, device, mode):
    # a mixture of a mixture; one teacher has no bias
    student, teacher = sides(device=device)
    others = [Side(5, seed=9, device=device, bias=False), Side(6, seed=10, device=device)]
    keywords = {"ensemble": (mode, [0.2, 0.5, 0.3]), "chunk_rows": 4, "backend": backend}
    compare(student, [teacher, *others], temperature=3.0, **keywords)


@pytest.mark.parametrize("mode", MODES)
def test_ensemble_of_twins_is_the_one_teacher(backend, device, mode):
    student, teacher = sides(device=device)
    keywords = {"backend": backend}
    if mode == "logit":  # of probabilities there is neither
        keywords |= {"mse_weight": 1.0, "cos_weight": 1.0}
    wanted = call(student, teacher, **keywords)
    output = call(student, (teacher, teacher), ensemble=mode, **keywords)
    torch.testing.assert_close(output[:5], wanted[:5], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_ensemble_members_may_be_padded_and_scaled(backend, device, mode):
    student, teacher = sides(device=device, teacher={"vocab": 25})
    other = Side(5, vocab=30, seed=9, device=device)
    other.weight[VOCAB:] = NAN
    head = {"vocab_size": VOCAB, "logit_scale": (2.0, 0.5), "logit_softcap": (None, 4.0)}
    keywords = {"ensemble": (mode, None), "chunk_rows": 4, "backend": backend, "atol": 1e-5}
    compare(student, [teacher, other], **head, **keywords)


@pytest.mark.parametrize("mode", MODES)
def test_ensemble_member_of_weight_zero_is_ignored(backend, device, mode):
    student, teacher = sides(device=device)
    silent = Side(5, seed=9, device=device)
    silent.hidden.fill_(NAN)
    wanted = call(student, teacher, backend=backend)
    output = call(
        student, [teacher, silent], teacher_weights=[2.0, 0.0], ensemble=mode, backend=backend
    )
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-4, atol=1e-5)


# Autograd


@pytest.mark.parametrize("trained", ["hidden", "weight", "bias", "hidden+bias", "weight+bias"])
def test_only_what_requires_grad_gets_one(backend, device, trained):
    # a frozen head (tied to frozen embeddings) costs no dW and gets none
    student, teacher = sides(device=device)
    wanted = gradients(call(student, teacher, chunk_rows=4, backend=backend).loss, student)
    for name in NAMES:
        getattr(student, name).requires_grad_(name in trained.split("+"))
    call(student, teacher, chunk_rows=4, backend=backend).loss.backward()
    for name, gradient in zip(NAMES, wanted, strict=True):
        if name in trained.split("+"):
            torch.testing.assert_close(getattr(student, name).grad, gradient)
        else:
            assert getattr(student, name).grad is None


def test_no_grad_gives_the_same_loss_without_a_graph(backend, device):
    student, teacher = sides(device=device)
    labels = make_labels(LEAD, VOCAB, "some", device)
    keywords = {"chunk_rows": 4, "backend": backend, **ALL_PARTS}
    wanted = call(student, teacher, labels, **keywords)
    with torch.no_grad():
        output = call(student, teacher, labels, **keywords)
    assert not output.loss.requires_grad
    torch.testing.assert_close(output[:5], wanted[:5])
    for leaf in student.leaves():
        leaf.requires_grad_(False)
    assert not call(student, teacher, labels, **keywords).loss.requires_grad


def test_teacher_head_is_detached(backend, device):
    # a model's parameters require grad by default: no error, and no gradient either
    student, teacher = sides(device=device)
    wanted = call(student, teacher, backend=backend)
    wanted_gradients = gradients(wanted.loss, student)
    teacher.weight.requires_grad_()
    teacher.bias.requires_grad_()
    for teachers in (teacher, [teacher, teacher]):
        output = call(student, teachers, backend=backend)
        output.loss.backward()
        assert teacher.weight.grad is None
        assert teacher.bias.grad is None
        torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(student.weight.grad, 2 * wanted_gradients[1], rtol=1e-4, atol=1e-5)


def test_teacher_hidden_that_requires_grad_is_told_to_detach(backend, device):
    student, teacher = sides(device=device)
    other = Side(5, seed=9, device=device)
    teacher.hidden.requires_grad_()
    for teachers in (teacher, [other, teacher]):
        with pytest.raises(ValueError, match=r"teacher_hidden.*\.detach\(\)"):
            call(student, teachers, backend=backend)


def test_second_backward_over_a_retained_graph_is_the_same(backend, device):
    student, teacher = sides(device=device)
    loss = call(student, teacher, chunk_rows=4, backend=backend).loss
    assert_second_backward_repeats(loss, student.leaves())


@pytest.mark.parametrize("upstream_needs_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_double_backward_raises(backend, device, reduction, upstream_needs_grad):
    student, teacher = sides(device=device)
    loss = call(student, teacher, reduction=reduction, backend=backend).loss
    assert_double_backward_raises(loss, student.leaves(), upstream_needs_grad)


@pytest.mark.parametrize("inplace", [False, True])
def test_inputs_are_bit_identical_afterwards(backend, device, inplace):
    # inplace_backward may only spend the logits, which are the call's own here
    student, teacher = sides(device=device)
    labels, mask = make_labels(LEAD, VOCAB, "some", device), make_mask(LEAD, "float", device)
    inputs = [*student.leaves(), *teacher.leaves(), labels, mask]
    before = [x.detach().clone() for x in inputs]
    keywords = {"mask": mask, "backend": backend}
    wanted = gradients(call(student, teacher, labels, **keywords).loss, student)
    keywords |= {"inplace_backward": inplace, "chunk_rows": 4}
    got = gradients(call(student, teacher, labels, **keywords).loss, student)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert_same([x.detach() for x in inputs], before)


@pytest.mark.thorough
@pytest.mark.parametrize("chunk_rows", [7, "auto"])
def test_two_runs_are_bitwise_the_same(backend, device, chunk_rows):
    student, teacher = sides(device=device, lead=(40,), vocab=300, dtype=BF16)
    labels = make_labels((40,), 300, "some", device)
    runs = []
    for _ in range(2):
        output = call(student, teacher, labels, chunk_rows=chunk_rows, backend=backend, **ALL_PARTS)
        runs.append([*(x.detach() for x in output[:5]), *gradients(output.loss, student)])
    assert_same(*runs)


def largest_allocation(function):
    """Bytes of the largest single allocation while function runs, wherever it happens."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the profiler's own
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
        ) as profile:
            function()
    events = profile.profiler.kineto_results.events()
    return max(event.nbytes() for event in events if event.name() == "[memory]")


@pytest.mark.thorough
def test_whole_logits_are_never_held(backend, device):
    # "never holds (N, V) of anything", not even a byte per logit
    if device != "cpu":
        pytest.skip("the allocations that are counted are the CPU's")
    rows, vocab, chunk = 512, 400, 16
    student, teacher = sides(lead=(rows,), vocab=vocab)
    labels = make_labels((rows,), vocab, "some")

    def fused():
        output = call(student, teacher, labels, chunk_rows=chunk, backend=backend, **ALL_PARTS)
        gradients(output.loss, student)

    fused()
    assert largest_allocation(lambda: student.logits()) >= 4 * rows * vocab  # the ruler works
    assert largest_allocation(fused) < rows * vocab


def test_gradient_is_scaled_before_it_is_rounded(backend, device):
    # a loss scale of 2^20 meets a divisor of 2^20; between them fp16 would flush to 0
    student, teacher = sides(device=device, dtype=FP16)
    big = torch.tensor(2.0**20, device=device)
    keywords = {"chunk_rows": 4, "backend": backend}
    wanted = gradients(call(student, teacher, reduction="sum", **keywords).loss, student)
    loss = call(student, teacher, kd_normalizer=big, **keywords).loss
    got = gradients(loss, student, big)
    for a, b in zip(got, wanted, strict=True):
        assert (a - b).abs().max() <= 2.0**-8 * b.abs().max()


# torch.compile


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("teachers", "chunk_rows", "reduction", "dtype"),
    [
        ("one", 4, "mean", FP32),
        ("one", "auto", "none", FP32),  # these two may take other ways through autograd
        ("one", 4, "mean", FP16),
        ("ensemble", "auto", "sum", FP32),
    ],
)
def test_compiled_call_equals_eager(backend, device, teachers, chunk_rows, reduction, dtype):
    student, teacher = sides(device=device, dtype=dtype)
    other = Side(5, seed=9, device=device, dtype=dtype)
    labels, mask = make_labels(LEAD, VOCAB, "some", device), make_mask(LEAD, "float", device)
    given = teacher.hidden, teacher.weight
    if teachers == "ensemble":
        given = [teacher.hidden, other.hidden], [teacher.weight, other.weight]
    keywords = {"ce_weight": 1.0, "logit_softcap": 9.0, "chunk_rows": chunk_rows}
    keywords |= {"reduction": reduction, "backend": backend}

    def loss(hidden, weight, bias, labels, mask):
        named = {"student_bias": bias, "mask": mask, **keywords}
        return linear_distillation_loss(hidden, weight, *given, labels, **named)

    output, wanted = (x(*student.leaves(), labels, mask) for x in (compiled(loss), loss))
    torch.testing.assert_close(output[:5], wanted[:5])
    torch.testing.assert_close(gradients(output.loss, student), gradients(wanted.loss, student))


# Bad calls


@pytest.fixture
def spoil(backend, device):
    """Expect a ValueError with some words in it, from one spoilt argument of a good call."""
    student, teacher = sides(device=device)
    arguments = {
        "student_hidden": student.hidden,
        "student_weight": student.weight,
        "teacher_hidden": teacher.hidden,
        "teacher_weight": teacher.weight,
        "labels": make_labels(LEAD, VOCAB, "all", device),
        "student_bias": student.bias,
        "teacher_bias": teacher.bias,
        "ce_weight": 1.0,
        "backend": backend,
    }
    linear_distillation_loss(**arguments)

    def spoil(*words, **changes):
        with value_error(*words):
            linear_distillation_loss(**{**arguments, **changes})

    return spoil


def test_wrong_shapes_are_refused_with_both_sizes(spoil, device):
    def ones(*shape):
        return torch.ones(*shape, device=device)

    spoil("student_weight", 8, 9, student_weight=ones(VOCAB, 9))
    spoil("teacher_weight", 12, 13, teacher_weight=ones(VOCAB, 13))
    spoil("student_weight", student_weight=ones(8))
    spoil("teacher_weight", teacher_weight=ones(1, VOCAB, 12))
    spoil("student_bias", VOCAB, 22, student_bias=ones(22))
    spoil("teacher_bias", VOCAB, 22, teacher_bias=ones(22))
    spoil("student_bias", student_bias=ones(VOCAB, 1))
    spoil("teacher_hidden", "5, 2", teacher_hidden=ones(5, 2, 12))
    spoil("labels", "5, 2", labels=ones(5, 2).long())
    spoil("mask", "5, 2", mask=ones(5, 2))
    spoil("vocab_size", VOCAB, 25, teacher_weight=ones(25, 12), teacher_bias=None)
    spoil("vocab_size", VOCAB, 99, vocab_size=99)
    spoil("student_hidden", student_hidden=torch.tensor(1.0, device=device))


def test_wrong_dtypes_and_devices_are_refused(spoil, device):
    for name, shape in {
        "student_hidden": (*LEAD, 8),
        "student_weight": (VOCAB, 8),
        "teacher_hidden": (*LEAD, 12),
        "teacher_weight": (VOCAB, 12),
        "student_bias": (VOCAB,),
        "teacher_bias": (VOCAB,),
    }.items():
        spoil(name, "int64", **{name: torch.ones(shape, dtype=torch.int64, device=device)})
        spoil(name, "meta", **{name: torch.ones(shape, device="meta")})
    spoil("labels", "float32", labels=torch.ones(LEAD, device=device))
    spoil("mask", "int64", mask=torch.ones(LEAD, dtype=torch.int64, device=device))


def test_the_losses_own_errors_are_kept(spoil):
    spoil("temperature", "0.0", temperature=0.0)
    spoil("kd_weight", "-1.0", kd_weight=-1.0)
    spoil("kd_weight", kd_weight=0.0, ce_weight=0.0)
    spoil("labels", "ce_weight", labels=None)
    spoil("kd_normalizer", "mean", "sum", kd_normalizer=3, reduction="sum")
    spoil("divergence", "tv", divergence="tv")
    spoil("jsd_beta", "1.0", divergence="jsd", jsd_beta=1.0)
    spoil("reduction", "avg", reduction="avg")
    spoil("backend", "numpy", backend="numpy")


def test_wrong_chunks_and_sums_are_refused(spoil):
    for value in (0, -3, "many", 2.5):
        spoil("chunk_rows", value, chunk_rows=value)
    for value in (FP16, torch.int64, "fp32", FP64):  # neither fp32 nor the inputs'
        spoil("accum_dtype", value, accum_dtype=value)


def test_label_out_of_range_is_refused_on_a_cpu(spoil, device):
    if device != "cpu":
        pytest.skip("a GPU makes the row NaN instead")
    labels = make_labels(LEAD, VOCAB, "all")
    labels[1, 2] = 23
    spoil("labels", 23, labels=labels)
    labels[1, 2] = 20
    spoil("labels", 20, labels=labels, vocab_size=19)


def test_bad_ensembles_are_refused(spoil, device):
    _, teacher = sides(device=device)
    pair = {
        "teacher_hidden": [teacher.hidden] * 2,
        "teacher_weight": [teacher.weight] * 2,
        "teacher_bias": [teacher.bias] * 2,
    }
    # probabilities have no logits: a squared or a cosine distance to them means nothing
    spoil("mse", "probability", mse_weight=1.0, ensemble="probability", **pair)
    spoil("cos", "probability", cos_weight=1.0, ensemble="probability", **pair)
    spoil("ensemble", "mean", ensemble="mean", **pair)
    spoil("teacher_weight", 2, 1, **{**pair, "teacher_weight": [teacher.weight]})
    spoil("teacher_bias", 2, 1, **{**pair, "teacher_bias": [teacher.bias]})
    spoil("teacher_weights", 2, 3, teacher_weights=[1.0, 1.0, 1.0], **pair)
    spoil("teacher_weights", "-1.0", teacher_weights=[2.0, -1.0], **pair)
    spoil("teacher_weights", "nan", teacher_weights=[1.0, NAN], **pair)
    spoil("teacher_weights", teacher_weights=[0.0, 0.0], **pair)
    empty = {"teacher_hidden": [], "teacher_weight": [], "teacher_bias": None}
    spoil("teacher_hidden", **empty)


# Chunks and memory


@pytest.mark.parametrize("n_rows", [1, 63, 64, 65, 1000, 4096, 100_000])
@pytest.mark.parametrize("vocab", [2, 65, 30_522, 151_936])
@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_chunks_cover_the_rows_once_and_fit_the_budget(monkeypatch, device_type, vocab, n_rows):
    for limit in (chunks.CHUNK_BYTES, chunks.FEWEST_ROWS, chunks.MOST_ROWS):
        monkeypatch.setitem(limit, "cpu", limit[device_type])
    hidden = torch.empty(n_rows, 1)
    parts = chunks.chunks_of(hidden, None, 0, vocab, [BF16, BF16])
    assert [row for c in parts for row in range(c.start, c.stop)] == list(range(n_rows))
    sizes = [c.stop - c.start for c in parts]
    width = -(-vocab // 64) * 64  # of the memory that a row takes
    fewest, most = chunks.FEWEST_ROWS[device_type], chunks.MOST_ROWS[device_type]
    assert max(sizes) <= most
    assert max(sizes) <= fewest or max(sizes) * 4 * width <= chunks.CHUNK_BYTES[device_type]
    # of one size, in multiples of 64 rows, and never more of them than the budget asks for
    assert len(set(sizes[:-1])) <= 1
    assert len(sizes) == 1 or (sizes[0] % 64 == 0 and sizes[-1] > sizes[0] - 64 * len(sizes))
    room = chunks.CHUNK_BYTES[device_type] // (4 * width) // 64 * 64
    room = min(max(room, fewest), most)
    assert len(sizes) == -(-n_rows // room)
    # the same for many rows: what a chunk takes does not grow with N
    if len(sizes) > 20:
        assert sizes[0] > room * 0.9


def test_rows_that_are_not_needed_are_not_projected(backend, device, monkeypatch):
    if device != "cpu":
        pytest.skip("on a GPU counting them would wait for the device")
    student, teacher = sides(device=device)
    labels = torch.full(LEAD, IGNORE)
    labels[0, 1] = 3
    mask = torch.zeros(LEAD)
    mask[1, 2] = 1.0
    projected = []
    logits = chunks.Side.logits

    def count(side, hidden, out):
        projected.append(len(hidden))
        return logits(side, hidden, out)

    monkeypatch.setattr(chunks.Side, "logits", count)
    call(student, teacher, labels, mask=mask, ce_weight=1.0, backend=backend)
    assert projected == [2, 2]  # of student and teacher
    # nor a teacher whom nobody hears, nor any for the labels alone
    projected.clear()
    call(student, [teacher, teacher], mask=mask, teacher_weights=[1.0, 0.0], backend=backend)
    call(student, teacher, labels, kd_weight=0.0, ce_weight=1.0, backend=backend)
    assert projected == [1, 1, 1]


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
def test_rows_left_in_a_chunk_contribute_nothing_if_not_needed(backend, device, monkeypatch, bad):
    # as on a GPU, where the rows are not selected
    every = slice(0, N_ROWS)
    monkeypatch.setattr(linear_operator, "chunks_of", lambda *_: [every])
    student, teacher = sides(device=device)
    mask = torch.ones(LEAD, device=device)
    mask[0, 0] = mask[1, 3] = 0.0
    wanted = gradients(call(student, teacher, mask=mask, backend=backend).loss, student)
    with torch.no_grad():
        student.hidden[mask == 0] = bad
        teacher.hidden[mask == 0] = bad
    got = gradients(call(student, teacher, mask=mask, backend=backend).loss, student)
    torch.testing.assert_close(got, wanted)


def test_total_of_zero_reaches_no_gradient_whatever_the_rows_hold(backend, device):
    # the driver's normalisers are tensors: only the device knows that one is 0
    student, teacher = sides(device=device)
    with torch.no_grad():
        student.hidden[0, 0] = teacher.hidden[1, 1] = NAN
    zero = torch.zeros((), device=device)
    output = call(student, teacher, kd_normalizer=zero, backend=backend)
    assert output.loss == 0
    assert all((x == 0).all() for x in gradients(output.loss, student))
    # beside it a label counts, in its own row
    labels = torch.full(LEAD, IGNORE, device=device)
    labels[1, 1] = 3
    got, wanted = (
        gradients(
            call(student, teacher, labels, ce_weight=1.0, backend=backend, **no_kd).loss, student
        )
        for no_kd in ({"kd_normalizer": zero}, {"kd_weight": 0.0})
    )
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("n_teachers", [2, 5])
def test_one_teachers_logits_are_there_at_a_time(backend, device, monkeypatch, n_teachers):
    # the student's, a teacher's and the mixture, however many teachers there are
    made = []
    empty = scratch.Scratch.empty

    def record(kept, shape, dtype, where):
        made.append((*shape, dtype))
        return empty(kept, shape, dtype, where)

    monkeypatch.setattr(scratch.Scratch, "empty", record)
    student, _ = sides(device=device, dtype=BF16)
    teachers = [Side(5 + k, seed=k, device=device, dtype=BF16) for k in range(n_teachers)]
    with torch.no_grad():
        call(student, teachers, backend=backend)
    assert [dtype for *_, dtype in made] == [FP32] * 3
    assert {rows for rows, *_ in made} == {N_ROWS}
    assert {width % chunks.ALIGNMENT for _, width, _ in made} == {0}


@pytest.mark.thorough
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_bf16_ensemble_of_twins_is_as_exact_as_the_one(backend, device, softcap):
    # bias, scale and cap are applied in fp32 to each of them, as to one teacher alone
    student, teacher = sides(device=device, dtype=BF16, lead=(64,))
    with torch.no_grad():
        student.weight.mul_(4)
        teacher.weight.mul_(4)
    keywords = {"logit_softcap": softcap, "backend": backend}
    one = call(student, teacher, **keywords).kd
    two = call(student, [teacher, teacher], **keywords).kd
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-5)


PEAK = """
import pathlib, sys, torch
from distilfast import linear_distillation_loss
from distilfast.losses.scratch import Scratch
n_rows, vocab, width = map(int, sys.argv[1:])
def inputs(n):
    return torch.randn(n, width).bfloat16(), torch.randn(vocab, width).bfloat16()
def kib(key):
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(dict(line.split(":", 1) for line in lines)[key].split()[0])
def step(n):
    s, t = inputs(n), inputs(n)
    labels = torch.randint(vocab, (n,))
    for x in s:
        x.requires_grad_()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = kib("VmRSS")
    linear_distillation_loss(*s, *t, labels, ce_weight=1.0).loss.backward()
    gradients = sum(x.grad.nbytes for x in s) // 1024
    return (kib("VmHWM") - before - gradients) // 1024
step(64)
Scratch.release()
print(step(n_rows))
"""


@pytest.mark.thorough
def test_peak_memory_is_bounded_at_any_number_of_rows():
    # 30,522 columns: the logits of 4,096 rows would be 238 MiB a side, and again in fp32. Narrow
    # hidden states: without bf16 instructions a product takes minutes.
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no high-water mark of memory that begins anew here")
    peaks = []
    for n_rows in (1024, 4096):
        command = [sys.executable, "-c", PEAK, str(n_rows), "30522", "128"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        peaks.append(int(done.stdout))
    assert max(peaks) < 400
    assert peaks[1] - peaks[0] < 40
