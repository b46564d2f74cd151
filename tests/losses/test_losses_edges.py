"""distillation_loss at its edges: every sentence of "Edges" in docs/losses.md, and its gradient."""

from __future__ import annotations

import functools
import math
import os
import re
import warnings

import oracle
import pytest
import torch
from conftest import no_wait_for_the_gpu
from oracle import (
    ALL_PARTS,
    BF16,
    DIVERGENCES,
    FP16,
    FP32,
    IGNORE,
    INF,
    NAN,
    PARTS,
    REDUCTIONS,
    assert_double_backward_raises,
    assert_same,
    assert_second_backward_repeats,
    check,
    expect,
    logits_pair,
    make_labels,
    make_mask,
    read,
    value_and_grad,
)

from distilfast import (
    DistillationLoss,
    combine_teachers,
    distillation_loss,
    hidden_cosine_loss,
)

ROW_PARTS = {**ALL_PARTS, "ce_weight": 0.0}


def run(student, teacher, labels=None, **keywords):
    """(DistillationOutput, gradient of the student's logits)."""
    return value_and_grad(distillation_loss, student, teacher, **read(labels=labels, **keywords))


parity = functools.partial(oracle.parity, distillation_loss)


def with_part(part, divergence="forward_kl"):
    """The keywords that leave only one part."""
    keywords = {"kd_weight": 0.0, "divergence": divergence}
    return {**keywords, f"{part}_weight": 1.0}


def result_or_error(function, *args):
    """(what it returns, None), or (None, the message of its RuntimeError)."""
    try:
        return function(*args), None
    except RuntimeError as error:
        return None, str(error)


# Each part alone, kd once per divergence: the branches of a kernel
ALONE = [with_part("kd", name) for name in DIVERGENCES] + [with_part(p) for p in PARTS[1:]]
ALONE_IDS = [*DIVERGENCES, *PARTS[1:]]
alone = pytest.mark.parametrize("keywords", ALONE, ids=ALONE_IDS)
poison = pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=["nan", "inf", "-inf"])


# What is left out contributes exactly 0, whatever it holds


@poison
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_masked_rows_contribute_exactly_nothing(backend, device, divergence, kind, bad):
    # a plain where would give 0 * NaN in the gradient; a float mask would give 0 * inf
    student, teacher = logits_pair((4, 9), device=device)
    mask = torch.tensor([True, False, True, False], device=device)
    keep = mask.clone()
    if kind == "float":
        mask = torch.tensor([1.5, 0.0, 0.5, 0.0], device=device)
    student[1], teacher[1] = bad, bad
    student[3, 2] = bad  # one entry of a row is enough
    for reduction in REDUCTIONS:
        keywords = {"divergence": divergence, "reduction": reduction, **ROW_PARTS}
        output, gradient = run(student, teacher, mask=mask, backend=backend, **keywords)
        assert (gradient[~keep] == 0).all()
        filtered = expect(student[keep], teacher[keep], mask=mask[keep], **keywords)
        if reduction == "none":
            assert all((getattr(output, part)[~keep] == 0).all() for part in ("loss", *PARTS))
            output = type(output)(*(number[keep] for number in output))
        check(output, gradient[keep], filtered)


@poison
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_labels_contribute_exactly_nothing(backend, device, reduction, bad):
    student, teacher = logits_pair((4, 9), device=device)
    labels = torch.tensor([3, IGNORE, 0, IGNORE], device=device)
    keep = labels != IGNORE
    student[~keep] = bad
    keywords = {"kd_weight": 0.0, "ce_weight": 2.0, "reduction": reduction}
    output, gradient = run(student, teacher, labels, backend=backend, **keywords)
    assert (gradient[~keep] == 0).all()
    if reduction == "none":
        assert (output.loss[~keep] == 0).all()
        output = type(output)(*(number[keep] for number in output))
    check(output, gradient[keep], expect(student[keep], teacher[keep], labels[keep], **keywords))


@poison
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_padded_columns_contribute_exactly_nothing(backend, device, divergence, bad):
    student, teacher = logits_pair((3, 40), device=device)
    student[:, 33:], teacher[:, 33:] = bad, bad
    labels = torch.tensor([32, IGNORE, 0], device=device)
    for reduction in REDUCTIONS:
        keywords = {"divergence": divergence, "reduction": reduction, **ALL_PARTS}
        output, gradient = run(student, teacher, labels, vocab_size=33, backend=backend, **keywords)
        assert (gradient[:, 33:] == 0).all()
        narrow = expect(student[:, :33], teacher[:, :33], labels, **keywords)
        check(output, gradient[:, :33], narrow)


@poison
def test_masked_row_with_a_label_is_scored_by_its_label_alone(backend, device, bad):
    # mask and labels are two different choices; the teacher of a row outside the mask is not read,
    # and of a row with neither nothing is
    student, teacher = logits_pair((4, 9), device=device)
    labels = torch.tensor([3, 4, IGNORE, IGNORE], device=device)
    mask = torch.tensor([False, True, True, False], device=device)
    spoilt, other = student.clone(), teacher.clone()
    other[0] = other[3] = spoilt[3] = bad
    for reduction in REDUCTIONS:
        keywords = {"mask": mask, "reduction": reduction, **ALL_PARTS}
        output, gradient = run(spoilt, other, labels, backend=backend, **keywords)
        check(output, gradient, expect(student, teacher, labels, **keywords))
        assert (gradient[3] == 0).all()


@poison
def test_part_of_weight_zero_does_not_read_the_teacher(backend, device, bad):
    # hard labels alone: "a part of weight 0 is 0 and costs nothing"
    student, teacher = logits_pair((3, 9), device=device)
    labels = torch.tensor([3, 0, IGNORE], device=device)
    wanted = expect(student, teacher, labels, **with_part("ce"))
    teacher[:] = bad
    output, gradient = run(student, teacher, labels, backend=backend, **with_part("ce"))
    check(output, gradient, wanted)
    assert output.kd == output.cos == output.mse == 0


# -inf


@pytest.mark.parametrize("columns", [[0], [4, 11], list(range(8))], ids=["first", "two", "block"])
@alone
def test_column_minus_inf_in_both_adds_nothing(backend, device, keywords, columns):
    # a banned token: 0 * log 0 = 0 in every divergence, cos leaves the column out
    student, teacher = logits_pair((3, 12), device=device)
    student[:, columns], teacher[:, columns] = -INF, -INF
    left = [column for column in range(12) if column not in columns]
    labels = torch.tensor([left[0], IGNORE, left[-1]], device=device)
    among_left = torch.tensor([0, IGNORE, len(left) - 1], device=device)
    for reduction in REDUCTIONS:
        keywords = {**keywords, "reduction": reduction}
        output, gradient = run(student, teacher, labels, backend=backend, **keywords)
        assert (gradient[:, columns] == 0).all()
        narrow = expect(student[:, left], teacher[:, left], among_left, **keywords)
        check(output, gradient[:, left], narrow)


def test_minus_inf_leading_columns_do_not_break_a_running_maximum(backend, device):
    # the first block of a sweep may hold nothing but -inf: its maximum is -inf
    student, teacher = logits_pair((2, 5000), device=device)
    student[:, :4500], teacher[:, :4500] = -INF, -INF
    labels = torch.tensor([4500, 4999], device=device)
    keywords = {"reduction": "none", "ce_weight": 1.0, "backend": backend}
    for divergence in DIVERGENCES:
        parity(student, teacher, labels, divergence=divergence, **keywords)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 7.3])
def test_forward_kl_of_an_impossible_token_is_inf_with_a_finite_gradient(
    backend, device, temperature
):
    # the student gives 0 to what the teacher believes possible: T (p_s - p_t) still points there
    student, teacher = logits_pair((3, 7), device=device)
    student[1, 4] = -INF
    keywords = {"temperature": temperature, "backend": backend}
    output, gradient = parity(student, teacher, reduction="none", **keywords)
    assert output.kd.isinf().tolist() == [False, True, False]
    assert gradient[1, 4] < 0
    output, gradient = parity(student, teacher, **keywords)
    assert output.loss == output.kd == INF
    assert gradient.isfinite().all()


def test_reverse_kl_of_an_impossible_token_is_inf_with_a_nan_row(backend, device):
    student, teacher = logits_pair((3, 7), device=device)
    teacher[1, 4] = -INF
    output, gradient = run(
        student, teacher, divergence="reverse_kl", reduction="none", backend=backend
    )
    assert output.kd.isinf().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    assert gradient[[0, 2]].isfinite().all()
    parity(student, teacher, divergence="reverse_kl", backend=backend)


def test_tiny_probability_against_an_impossible_token_is_inf_and_not_nan(backend, device):
    # exp(-400) underflows to 0 in fp32, yet it is not 0: 0 * inf would be NaN
    believed = torch.tensor([[0.0, 1.0, -400.0], [0.0, 1.0, 2.0]], device=device)
    excluded = torch.tensor([[1.0, 0.0, -INF], [1.0, 0.0, 2.0]], device=device)
    keywords = {"temperature": 1.0, "reduction": "none", "backend": backend}
    output, gradient = parity(excluded, believed, **keywords)
    assert output.kd.isinf().tolist() == [True, False]
    assert gradient.isfinite().all()
    output, gradient = parity(believed, excluded, divergence="reverse_kl", **keywords)
    assert output.kd.isinf().tolist() == [True, False]
    assert gradient.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_infinite_mse_has_a_nan_row(backend, device, side):
    student, teacher = logits_pair((3, 7), device=device)
    (student if side == "student" else teacher)[1, 4] = -INF
    keywords = with_part("mse")
    output, gradient = run(student, teacher, reduction="none", backend=backend, **keywords)
    assert output.mse.isinf().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    parity(student, teacher, backend=backend, **keywords)


def test_infinite_ce_keeps_its_gradient_beside_an_infinite_kd(backend, device):
    # the label's own logit is -inf: softmax - onehot is what torch's cross entropy gives too
    student, teacher = logits_pair((3, 7), device=device)
    student[1, 4] = -INF
    labels = torch.tensor([0, 4, 4], device=device)
    for weights in ({"kd_weight": 0.0, "ce_weight": 1.0}, {"kd_weight": 2.0, "ce_weight": 3.0}):
        keywords = {"reduction": "none", "backend": backend, **weights}
        output, gradient = parity(student, teacher, labels, **keywords)
        assert output.loss.isinf().tolist() == [False, True, False]
        assert gradient[1].isfinite().all()


@pytest.mark.parametrize(
    ("divergence", "side"),
    [
        ("forward_kl", "teacher"),  # p_t = 0 there: 0 * log(0 / p_s) = 0
        ("reverse_kl", "student"),  # p_s = 0 there
        ("jsd", "teacher"),  # the mixture is never 0 where one of the two is not
        ("jsd", "student"),
    ],
)
def test_minus_inf_on_the_harmless_side_stays_finite(backend, device, divergence, side):
    student, teacher = logits_pair((3, 7), device=device)
    (student if side == "student" else teacher)[:, 2] = -INF
    keywords = {"divergence": divergence, "reduction": "none", "backend": backend}
    output, gradient = parity(student, teacher, **keywords)
    assert output.kd.isfinite().all()
    assert gradient.isfinite().all()
    if side == "student":
        assert (gradient[:, 2] == 0).all()  # p_s = 0: nothing moves it


def test_disjoint_supports_give_the_jsd_its_bound(backend, device):
    # p_t = [1, 0], p_s = [0, 1]: m = [beta, 1 - beta], so T^2 times the entropy of beta; with all
    # of p_s on one token its gradient is 0
    student = torch.tensor([[-INF, 0.0]], device=device)
    teacher = torch.tensor([[0.0, -INF]], device=device)
    output, gradient = run(
        student, teacher, divergence="jsd", jsd_beta=0.25, temperature=2.0, backend=backend
    )
    entropy = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert output.kd.item() == pytest.approx(4 * entropy, rel=1e-6)
    assert (gradient == 0).all()


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_finite_logits_never_give_an_infinite_divergence(backend, device, divergence, temperature):
    # exp(-400) is 0 in fp32, its logarithm is not: far apart is not impossible
    student = torch.tensor([[0.0, -400.0, 1.0], [0.0, 400.0, 1.0]], device=device)
    teacher = torch.tensor([[-400.0, 0.0, 1.0], [0.0, -400.0, 1.0]], device=device)
    keywords = {"divergence": divergence, "temperature": temperature, "reduction": "none"}
    output, gradient = parity(student, teacher, backend=backend, **keywords)
    assert output.kd.isfinite().all()
    assert gradient.isfinite().all()


# NaN


@pytest.mark.parametrize("columns", [slice(None), 3], ids=["whole", "one_entry"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@alone
def test_nan_row_gives_a_nan_row_and_leaves_the_others_alone(
    backend, device, keywords, side, columns
):
    student, teacher = logits_pair((4, 9), device=device)
    labels = make_labels((4,), 9, "all", device)
    keywords = {"reduction": "none", "backend": backend, **keywords}
    clean, clean_gradient = run(student, teacher, labels, **keywords)
    (student if side == "student" else teacher)[1, columns] = NAN
    output, gradient = run(student, teacher, labels, **keywords)
    others = [0, 2, 3]
    if side == "teacher" and "ce_weight" in keywords:
        others = [0, 1, 2, 3]  # the hard labels do not look at the teacher
    else:
        # the squared difference is the one part whose columns do not meet in a sum
        spread = torch.any if "mse_weight" in keywords and columns == 3 else torch.all
        assert output.loss[1].isnan()
        assert spread(gradient[1].isnan())
    assert_same(
        [output.loss[others], gradient[others]], [clean.loss[others], clean_gradient[others]]
    )


@alone
def test_nan_row_makes_the_mean_nan_but_not_the_other_gradients(backend, device, keywords):
    student, teacher = logits_pair((3, 9), device=device)
    labels = make_labels((3,), 9, "all", device)
    _, clean = run(student, teacher, labels, backend=backend, **keywords)
    student[1] = NAN
    output, gradient = run(student, teacher, labels, backend=backend, **keywords)
    assert output.loss.isnan()
    assert gradient[1].isnan().all()
    assert_same([gradient[[0, 2]]], [clean[[0, 2]]])


# Where a row, a length or a size is extreme


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_zero_vector_has_cosine_loss_one_and_no_gradient(backend, device, side):
    student, teacher = logits_pair((3, 9), device=device)
    if side != "teacher":
        student[1] = 0
    if side != "student":
        teacher[1] = 0
    output, gradient = parity(
        student, teacher, reduction="none", backend=backend, **with_part("cos")
    )
    assert output.cos[1] == 1
    assert (gradient[1] == 0).all()
    assert (gradient[[0, 2]] != 0).any()


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_cosine_does_not_depend_on_length(backend, device, size):
    # squares of 1e-24 and of 1e24 * V are representable in fp32, their product is not
    student, teacher = logits_pair((3, 9), device=device)
    near, _ = run(student, teacher, reduction="none", backend=backend, **with_part("cos"))
    far, gradient = run(
        size * student, size * teacher, reduction="none", backend=backend, **with_part("cos")
    )
    torch.testing.assert_close(far.cos, near.cos, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


def test_more_rows_than_a_grid_dimension_work(backend, device):
    # CUDA allows 65,535 programs in the second dimension of a grid
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes minutes for 70,000 programs")
    rows = 70_001
    student, teacher = logits_pair((rows, 3), device=device)
    labels = make_labels((rows,), 3, "some", device)
    parity(
        student, teacher, labels, reduction="none", kd_weight=1.0, ce_weight=1.0, backend=backend
    )


def test_more_elements_than_int32_work(backend, device):
    # 70,400 * 30,522 > 2^31: int32 offsets wrap around in the last rows
    if device != "cuda" or torch.cuda.get_device_properties(0).total_memory < 60 * 2**30:
        pytest.skip("needs a GPU of 60 GiB")
    if backend == "torch":
        pytest.skip("plain PyTorch holds several fp32 copies of the logits")
    rows, vocab, tail = 70_400, 30_522, 8
    student = torch.zeros(rows, vocab, dtype=BF16, device=device)
    teacher = torch.zeros(rows, vocab, dtype=BF16, device=device)
    last_student, last_teacher = logits_pair((tail, vocab), dtypes=(BF16, BF16), device=device)
    student[-tail:], teacher[-tail:] = last_student, last_teacher
    labels = torch.full((rows,), IGNORE, device=device)
    labels[-tail:] = torch.arange(tail, device=device)
    output, gradient = run(
        student, teacher, labels, reduction="none", ce_weight=1.0, backend=backend
    )
    wanted = expect(last_student, last_teacher, labels[-tail:], reduction="none", ce_weight=1.0)
    last = type(output)(*(number[-tail:] for number in output))
    check(last, gradient[-tail:], wanted)
    assert (gradient[:-tail] == 0).all()
    assert (output.loss[:-tail] == 0).all()


# Labels


@pytest.mark.parametrize("ignore_index", [-1, 0, 8, 1000])
def test_ignore_index_may_be_any_number(backend, device, ignore_index):
    # 0 is many a tokenizer's padding: a column that exists, but not a label
    student, teacher = logits_pair((4, 9), device=device)
    labels = torch.tensor([ignore_index, 3, ignore_index, 7], device=device)
    keywords = {"ignore_index": ignore_index, "reduction": "none", **with_part("ce")}
    output, gradient = parity(student, teacher, labels, backend=backend, **keywords)
    assert output.ce.gt(0).tolist() == [False, True, False, True]
    assert (gradient[[0, 2]] == 0).all()


@pytest.mark.parametrize(
    ("label", "vocab_size"),
    [(9, None), (-1, None), (7, 7), (2**40, None)],
    ids=["at_vocab", "negative", "in_the_padding", "huge"],
)
def test_label_out_of_range_is_an_error_or_a_nan_row(backend, device, label, vocab_size):
    student, teacher = logits_pair((3, 9), device=device)
    labels = torch.tensor([0, label, IGNORE], device=device)
    keywords = {"vocab_size": vocab_size, "ce_weight": 1.0, "backend": backend}
    if device == "cpu":
        with pytest.raises(ValueError) as caught:
            distillation_loss(student, teacher, labels, **keywords)
        message, vocab = str(caught.value), vocab_size or 9
        assert "labels" in message
        assert re.search(rf"(?<!\d){label}\b", message)
        assert re.search(rf"\b({vocab}|{vocab - 1})\b", message)
        return
    output, gradient = run(student, teacher, labels, reduction="none", **keywords)
    assert output.loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]


# Autograd


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_inplace_backward_gives_the_same_gradient_and_spends_nothing_but_the_logits(
    backend, device, divergence, dtype, inplace
):
    head, teacher = logits_pair((4, 19), dtypes=(dtype, dtype), device=device)
    labels, mask = make_labels((4,), 17, "some", device), make_mask((4,), "float", device)
    counts = [torch.tensor(x, device=device) for x in (3.0, 2.0)]
    keywords = {"mask": mask, "kd_normalizer": counts[0], "ce_normalizer": counts[1], **ALL_PARTS}
    keywords |= {"divergence": divergence, "vocab_size": 17, "backend": backend}
    output, wanted = run(head, teacher, labels, grad_output=-2.0, **keywords)
    leaf = head.clone().requires_grad_()
    logits = leaf * 1  # a head's output: not a leaf, nobody else's
    others = [teacher, labels, mask, *counts, *([] if inplace else [logits])]
    before = [x.detach().clone() for x in others]
    ours = distillation_loss(logits, teacher, labels, inplace_backward=inplace, **keywords)
    (-2 * ours.loss).backward()
    assert_same([*ours, leaf.grad], [*output, wanted])
    assert_same([x.detach() for x in others], before)


@pytest.mark.parametrize("layout", ["transposed", "row_slice", "column_slice", "expanded"])
def test_inplace_backward_stays_inside_the_logits(backend, device, layout):
    # the logits are a window into a larger tensor, or many rows share one storage: what lies
    # beside the window keeps its bits, and shared rows do not overwrite each other's gradient
    base, teacher = logits_pair((4, 3, 12), device=device)
    window = {
        "transposed": lambda x: x.transpose(0, 1),
        "row_slice": lambda x: x[:, :2],
        "column_slice": lambda x: x[..., 1:10],
        "expanded": lambda x: x[0, :1].expand(4, 12),
    }[layout]
    results = []
    for inplace in (False, True):
        leaf = base.clone().requires_grad_()
        storage = leaf * 1
        logits = window(storage)
        keep = storage.detach().clone()
        target = teacher.reshape(-1)[: logits.numel()].reshape(logits.shape)
        output = distillation_loss(
            logits, target, inplace_backward=inplace, backend=backend, cos_weight=1.0
        )
        output.loss.backward()
        outside = torch.ones_like(keep, dtype=torch.bool)
        (outside[0, :1] if layout == "expanded" else window(outside)).fill_(False)
        assert_same([storage.detach()[outside]], [keep[outside]])
        results.append(leaf.grad)
    assert_same(results[1:], results[:1])


def test_inplace_backward_without_gradient_leaves_the_inputs(backend, device):
    student, teacher = logits_pair((4, 19), device=device)
    before = student.clone()
    with torch.no_grad():
        distillation_loss(student, teacher, inplace_backward=True, backend=backend)
    distillation_loss(student, teacher, inplace_backward=True, backend=backend)
    assert_same([student], [before])


def test_inplace_backward_is_never_silently_wrong_for_another_user(backend, device):
    # exp saves its output, which inplace_backward may overwrite: an error or the right gradient
    head, teacher = logits_pair((4, 19), scale=1.0, device=device)

    def total(inplace):
        leaf = head.clone().requires_grad_()
        logits = leaf.exp()
        penalty = logits.square().sum()
        loss = distillation_loss(logits, teacher, inplace_backward=inplace, backend=backend).loss
        (loss + penalty).backward()
        return leaf.grad

    wanted = total(False)
    ours, message = result_or_error(total, True)
    if message is None:
        torch.testing.assert_close(ours, wanted)
    else:
        assert re.search("in.?place", message)


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_changing_an_input_before_backward_is_never_silently_wrong(backend, device, which):
    head, other = logits_pair((4, 19), device=device)
    _, wanted = run(head, other, backend=backend)
    leaf, teacher = head.clone().requires_grad_(), other.clone()
    logits = leaf * 1
    loss = distillation_loss(logits, teacher, backend=backend).loss
    with torch.no_grad():
        (logits if which == "student" else teacher).add_(torch.randn_like(other))
    _, message = result_or_error(loss.backward)
    if message is None:
        torch.testing.assert_close(leaf.grad, wanted)
    else:
        assert "modified by an inplace operation" in message


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_backward_over_a_retained_graph_is_the_same(backend, device, reduction, dtype):
    student, teacher = logits_pair((4, 9), dtypes=(dtype, dtype), device=device)
    keywords = {"cos_weight": 1.0, "reduction": reduction, "backend": backend}
    loss = distillation_loss(student.requires_grad_(), teacher, **keywords).loss
    assert_second_backward_repeats(loss, [student])


def test_second_backward_in_place_is_right_or_an_error(backend, device):
    student, teacher = logits_pair((4, 9), device=device)
    _, wanted = run(student, teacher, backend=backend)
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf * 1, teacher, inplace_backward=True, backend=backend).loss
    loss.backward(retain_graph=True)
    assert_same([leaf.grad], [wanted])
    leaf.grad = None
    _, message = result_or_error(loss.backward)
    if message is None:
        torch.testing.assert_close(leaf.grad, wanted)
    else:  # ours, or autograd's own about a changed tensor: not a wrong number
        assert re.search("in.?place|twice|second", message)


@pytest.mark.parametrize("upstream_needs_grad", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(("dtype", "inplace"), [(FP32, False), (FP32, True), (FP16, False)])
def test_double_backward_raises(backend, device, dtype, inplace, reduction, upstream_needs_grad):
    student, teacher = logits_pair((3, 9), dtypes=(dtype, dtype), device=device)
    leaf = student.requires_grad_()
    keywords = {"reduction": reduction, "inplace_backward": inplace, "backend": backend}
    loss = distillation_loss(leaf * 1, teacher, **keywords).loss
    assert_double_backward_raises(loss, [leaf], upstream_needs_grad)


def test_teacher_that_requires_grad_is_told_to_detach(backend, device):
    student, teacher = logits_pair((3, 9), device=device)
    with pytest.raises(ValueError, match=r"teacher_logits.*\.detach\(\)"):
        distillation_loss(student, teacher.requires_grad_(), backend=backend)
    run(student, teacher.detach(), backend=backend)


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_loss_without_gradient_is_the_same(backend, device, guard):
    student, teacher = logits_pair((3, 9), device=device)
    labels = make_labels((3,), 9, "some", device)
    keywords = {"backend": backend, **ALL_PARTS}
    wanted, _ = run(student, teacher, labels, **keywords)
    plain = distillation_loss(student, teacher, labels, **keywords)
    assert not plain.loss.requires_grad
    with guard():
        guarded = distillation_loss(student.requires_grad_(), teacher, labels, **keywords)
    assert not guarded.loss.requires_grad
    for output in (plain, guarded):
        torch.testing.assert_close(output[:5], wanted[:5])


@pytest.mark.thorough
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_two_runs_are_bitwise_the_same(backend, device, divergence, reduction):
    student, teacher = logits_pair((64, 1500), dtypes=(BF16, BF16), device=device)
    labels, mask = make_labels((64,), 1500, "some", device), make_mask((64,), "float", device)
    keywords = {"mask": mask, "divergence": divergence, "reduction": reduction, **ALL_PARTS}
    first, second = (
        run(student.clone(), teacher.clone(), labels, backend=backend, **keywords) for _ in range(2)
    )
    assert_same([*first[0], first[1]], [*second[0], second[1]])


def test_row_does_not_depend_on_its_neighbours(backend, device):
    # what makes a micro-batch exact: no row's number depends on the batch around it
    student, teacher = logits_pair((7, 130), device=device)
    labels = make_labels((7,), 130, "some", device)
    keywords = {"reduction": "none", "backend": backend, **ALL_PARTS}
    whole, gradient = run(student, teacher, labels, **keywords)
    for row in range(7):
        one = slice(row, row + 1)
        alone_output, alone_gradient = run(student[one], teacher[one], labels[one], **keywords)
        torch.testing.assert_close(alone_output.loss, whole.loss[one], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(alone_gradient, gradient[one], rtol=1e-6, atol=1e-7)


# Backends and devices


def test_backend_asked_for_by_name_never_falls_back(backend, device):
    student, teacher = logits_pair((3, 9), device=device)
    if backend != "torch":
        with pytest.raises(ValueError) as caught:  # float64 is the torch backend's alone
            distillation_loss(student.double(), teacher.double(), backend=backend)
        assert backend in str(caught.value)
        assert "float64" in str(caught.value)
    elif device == "cpu" and os.environ.get("TRITON_INTERPRET", "0") == "0":
        with pytest.raises((ValueError, RuntimeError, ImportError), match="triton"):
            distillation_loss(student, teacher, backend="triton")


@pytest.mark.parametrize("dtype", [FP32, BF16, torch.float64], ids=str)
def test_auto_backend_is_right_whatever_it_chooses(device, dtype):
    student, teacher = logits_pair((3, 9), dtypes=(dtype, dtype), device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it may say, once, which backend it took
        output, gradient = run(student, teacher, backend="auto")
        default, default_gradient = run(student, teacher)
    check(output, gradient, expect(student, teacher))
    assert_same([*default, default_gradient], [*output, gradient])


def test_no_host_sync_on_a_gpu(backend, device):
    if device != "cuda":
        pytest.skip("a CPU has no device to wait for")
    student, teacher = logits_pair((8, 129), dtypes=(BF16, BF16), device=device)
    labels, mask = make_labels((8,), 129, "some", device), make_mask((8,), "some", device)
    totals = [torch.tensor(x, device=device) for x in (4.0, 3.0)]
    counts = dict(zip(("kd_normalizer", "ce_normalizer"), totals, strict=True))
    upstream = torch.tensor(3.0, device=device)

    def step(**keywords):
        leaf = student.detach().requires_grad_()
        z = combine_teachers([teacher, student], temperature=2.0)
        named = {"mask": mask, "backend": backend, **ALL_PARTS, **keywords}
        distillation_loss(leaf * 1, z, labels, **named).loss.backward(upstream)
        hidden_cosine_loss([leaf] * 2, [z] * 2, mask, backend=backend).backward(upstream)

    for keywords in ({}, counts, {"divergence": "jsd"}, {"inplace_backward": True}):
        step(**keywords)  # compiles
        with no_wait_for_the_gpu():
            step(**keywords)


def test_module_runs_under_autocast(backend, device):
    # a loss inside the autocast region: its own arithmetic stays fp32
    student, teacher = logits_pair((3, 19), dtypes=(BF16, BF16), device=device)
    wanted, gradient = run(student, teacher, backend=backend)
    with torch.autocast(device, dtype=BF16):
        ours, got = value_and_grad(DistillationLoss(backend=backend), student, teacher)
    assert_same([*ours, got], [*wanted, gradient])


@pytest.mark.parametrize("temperature", [50.0, 110.0, 127.0, 150.0, 1000.0])
def test_ce_beside_kd_holds_at_any_temperature(backend, device, temperature):
    # 2^(T x) of logits a hair above a whole number of bits: T = 1 needs a maximum of its own
    student, teacher = logits_pair((4, 37), scale=0.1, offset=0.05, device=device)
    labels = make_labels((4,), 37, "some", device)
    keywords = {"ce_weight": 1.0, "reduction": "none", "backend": backend}
    output, gradient = run(student, teacher, labels, temperature=temperature, **keywords)
    alone, _ = run(student, teacher, labels, kd_weight=0.0, **keywords)
    torch.testing.assert_close(output.ce, alone.ce, rtol=1e-6, atol=1e-6)
    assert gradient.isfinite().all()
    parity(student, teacher, labels, temperature=temperature, **keywords)


def test_labelled_row_outside_the_mask_keeps_its_ce_beside_a_cosine(backend, device):
    # the sums of a masking value overflow; outside the mask they must not reach the gradient
    student, teacher = logits_pair((2, 9), device=device)
    student[:, 3] = torch.finfo(torch.float32).min
    labels = torch.tensor([1, 2], device=device)
    mask = torch.tensor([False, True], device=device)
    keywords = {"kd_weight": 0.0, "ce_weight": 1.0, "reduction": "none", "backend": backend}
    _, gradient = run(student, teacher, labels, mask=mask, cos_weight=1.0, **keywords)
    _, alone = run(student, teacher, labels, **keywords)
    torch.testing.assert_close(gradient[0], alone[0])


def test_inplace_backward_takes_padded_rows(backend, device):
    padded = torch.full((6, 32), 7.0, device=device)
    student, teacher = logits_pair((6, 30), device=device)
    _, wanted = run(student, teacher, backend=backend)
    padded[:, :30] = student
    logits = padded[:, :30].requires_grad_()
    loss = distillation_loss(logits, teacher, inplace_backward=True, backend=backend).loss
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient.data_ptr() == padded.data_ptr()
    torch.testing.assert_close(gradient, wanted)
    assert (padded[:, 30:] == 7).all()


# Memory


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("grad_output", [1.0, 0.5])
def test_backward_allocates_nothing_as_large_as_the_logits(backend, device, grad_output, dtype):
    # the gradient is made in the forward: the backward scales it where it is, and autograd must not
    # fill zeros for the operator's other outputs
    student, teacher = logits_pair((8, 4096), dtypes=(dtype, dtype), device=device)
    output = distillation_loss(student.requires_grad_(), teacher, backend=backend)
    upstream = torch.tensor(grad_output, device=device)
    torch.autograd.grad(output.loss, student, upstream, retain_graph=True)  # warms up
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    # acc_events: torch 2.11 warns where a profiler's events may be cleared
    with torch.profiler.profile(activities=kinds, profile_memory=True, acc_events=True) as profile:
        (gradient,) = torch.autograd.grad(output.loss, student, upstream)
    assert gradient.shape == student.shape
    key = "self_device_memory_usage" if device == "cuda" else "self_cpu_memory_usage"
    allocated = max((getattr(event, key) for event in profile.events()), default=0)
    # plain PyTorch upcasts a block of rows to scale it
    allowed = 0 if grad_output == 1.0 or backend == "triton" else 4 * student.numel()
    assert allocated <= max(allowed, 4096)
