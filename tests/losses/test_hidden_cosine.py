"""hidden_cosine_loss: 1 - cos between hidden states, per row, averaged over layers."""

from __future__ import annotations

import functools

import pytest
import torch
from oracle import (
    BF16,
    FP16,
    FP32,
    INF,
    NAN,
    REDUCTIONS,
    assert_double_backward_raises,
    assert_same,
    assert_second_backward_repeats,
    assert_within,
    compiled,
    expect,
    logits_pair,
    make_mask,
    value_and_grad,
    value_error,
)

from distilfast import hidden_cosine_loss

MASKS = ("absent", "none", "some", "all", "float")
COSINE = {"kd_weight": 0.0, "cos_weight": 1.0}  # the oracle's, of logits, is the same mathematics
run = functools.partial(value_and_grad, hidden_cosine_loss)


def parity(student, teacher, mask=None, *, backend, normalizer=None, **keywords):
    """(loss, gradient of the student's hidden states), within the budget."""
    loss, gradient = run(student, teacher, mask, backend=backend, normalizer=normalizer, **keywords)
    keywords |= {"mask": mask, "kd_normalizer": normalizer, **COSINE}
    wanted = expect(student, teacher, **keywords)
    assert gradient.dtype == student.dtype
    assert_within("loss", loss, wanted.value["cos"], wanted.slack["cos"])
    assert_within("gradient", gradient, wanted.grad, wanted.grad_slack)
    return loss, gradient


def hand_rows(device):
    # per row: 1 - 24/25 with gradient 24 s / (125 * 5) - t / 25; orthogonal: 1 with gradient
    # -t / (|s||t|) = [0, -1/2]; opposite: 2 with no gradient (already as far as it goes)
    student = torch.tensor([[3.0, 4.0], [2.0, 0.0], [1.0, 1.0]], device=device)
    teacher = torch.tensor([[4.0, 3.0], [0.0, 5.0], [-2.0, -2.0]], device=device)
    values = torch.tensor([0.04, 1.0, 2.0])
    slopes = torch.tensor([[-0.0448, 0.0336], [0.0, -0.5], [0.0, 0.0]])
    return student, teacher, values, slopes


def test_loss_and_gradient_equal_hand_values(backend, device):
    student, teacher, values, slopes = hand_rows(device)
    for reduction, wanted, divisor in (
        ("none", values, 1),
        ("sum", values.sum(), 1),
        ("mean", values.sum() / 3, 3),
    ):
        loss, gradient = run(student, teacher, reduction=reduction, backend=backend)
        torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient.cpu(), slopes / divisor, rtol=1e-6, atol=1e-6)


def test_mask_weights_rows_and_normalizer_replaces_their_sum(backend, device):
    student, teacher, _, slopes = hand_rows(device)
    mask = torch.tensor([2.0, 0.5, 0.0], device=device)
    loss, gradient = run(student, teacher, mask, backend=backend)
    assert loss.item() == pytest.approx((2 * 0.04 + 0.5 * 1) / 2.5, rel=1e-5)
    wanted = slopes * torch.tensor([[2.0], [0.5], [0.0]]) / 2.5
    torch.testing.assert_close(gradient.cpu(), wanted, rtol=1e-6, atol=1e-6)
    for normalizer in (8, 8.0, torch.tensor(8.0, device=device), torch.tensor(8, device=device)):
        loss, _ = run(student, teacher, mask, normalizer=normalizer, backend=backend)
        assert loss.item() == pytest.approx((2 * 0.04 + 0.5 * 1) / 8, rel=1e-5)
    loss, _ = run(student, teacher, mask.bool(), backend=backend)
    assert loss.item() == pytest.approx((0.04 + 1) / 2, rel=1e-5)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", ["absent", "float"])
def test_layers_equal_the_mean_of_single_calls(backend, device, which, reduction):
    mask = make_mask((2, 5), which, device)
    # layers of different widths, as some families have
    layers = [logits_pair((2, 5, width), seed=width, device=device) for width in (8, 12, 5)]
    students = [student.requires_grad_() for student, _ in layers]
    teachers = [teacher for _, teacher in layers]
    keywords = {"reduction": reduction, "backend": backend}
    ours = hidden_cosine_loss(students, teachers, mask, **keywords)
    singles = [
        hidden_cosine_loss(s, t, mask, **keywords) for s, t in zip(students, teachers, strict=True)
    ]
    wanted = sum(singles) / 3
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(ours.sum(), students), torch.autograd.grad(wanted.sum(), students)
    )
    # transformers returns hidden states as a tuple
    one = hidden_cosine_loss(tuple(students[:1]), tuple(teachers[:1]), mask, **keywords)
    torch.testing.assert_close(one, singles[0])


# Parity


# at width 1 every cosine is +1 or -1; around one vector of fp32 (AVX2) and 16 bytes of bf16; around
# the blocks of a kernel; DistilBERT's
WIDTHS = (1, 2, 7, 8, 9, 16, 33, 127, 128, 129, 768, 1025, 4097)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_parity_at_every_width(backend, device, dtype, width):
    for near in (False, True):
        student, teacher = logits_pair((3, width), near=near, dtypes=(dtype, dtype), device=device)
        parity(student, teacher, reduction="none", backend=backend)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16), (FP16, BF16)], ids=str)
def test_parity_of_mixed_dtypes(backend, device, dtypes):
    student, teacher = logits_pair((4, 19), dtypes=dtypes, device=device)
    loss, _ = parity(student, teacher, backend=backend)
    assert loss.dtype == FP32


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("which", MASKS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (0,)], ids=str)
def test_parity_under_masks_and_reductions(backend, device, lead, which, reduction):
    student, teacher = logits_pair((*lead, 11), device=device)
    mask = make_mask(lead, which, device)
    loss, gradient = parity(
        student, teacher, mask, reduction=reduction, grad_output=-2.5, backend=backend
    )
    assert loss.shape == (lead if reduction == "none" else ())
    assert gradient.shape == student.shape


def test_parity_is_blind_to_memory_layout(backend, device):
    student, teacher = logits_pair((3, 4, 10), device=device)
    mask = make_mask((3, 4), "float", device)
    for layout in (
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        lambda x: torch.stack([x, torch.full_like(x, NAN)], -1)[..., 0],
        lambda x: torch.cat([x, torch.full_like(x, NAN)], 1)[:, :4],  # [CLS]-like slices
    ):
        parity(layout(student), layout(teacher), mask.T.contiguous().T, backend=backend)
    row = teacher[:1, :1]
    parity(student, row.expand(3, 4, 10), mask, backend=backend)
    leaf = row.clone().requires_grad_()
    hidden_cosine_loss(leaf.expand(3, 4, 10), student, reduction="sum", backend=backend).backward()
    wanted = expect(row.repeat(3, 4, 1), student, reduction="sum", **COSINE).grad
    wanted = wanted.sum((0, 1), keepdim=True)
    torch.testing.assert_close(leaf.grad.cpu().double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("layers", [1, 3])
def test_gradcheck_in_float64(layers, reduction):
    pairs = [logits_pair((3, 4), seed=i) for i in range(layers)]
    students = [s.double().requires_grad_() for s, _ in pairs]
    teachers = [t.double() for _, t in pairs]
    mask = make_mask((3,), "float")

    def loss(*hidden):
        return hidden_cosine_loss(
            list(hidden), teachers, mask, reduction=reduction, backend="torch"
        )

    assert loss(*students).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, students)


# Edges


@pytest.mark.parametrize("side", ["student", "teacher", "both"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_zero_vector_gives_one_and_no_gradient(backend, device, dtype, side):
    student, teacher = logits_pair((3, 9), dtypes=(dtype, dtype), device=device)
    if side != "teacher":
        student[1] = 0
    if side != "student":
        teacher[1] = 0
    loss, gradient = parity(student, teacher, reduction="none", backend=backend)
    assert loss[1] == 1
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_masked_rows_contribute_exactly_nothing(backend, device, reduction, kind, bad):
    # padding tokens: whatever the models computed there
    student, teacher = logits_pair((4, 9), device=device)
    mask = torch.tensor([1.0, 0.0, 0.5, 0.0], device=device)
    mask = mask.bool() if kind == "bool" else mask
    wanted = run(student, teacher, mask, reduction=reduction, backend=backend)
    student[1], teacher[1], student[3, 0] = bad, bad, bad
    loss, gradient = run(student, teacher, mask, reduction=reduction, backend=backend)
    assert_same([loss, gradient], wanted)
    assert (gradient[[1, 3]] == 0).all()


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_row_gives_a_nan_row_and_leaves_the_others_alone(backend, device, side):
    student, teacher = logits_pair((3, 9), device=device)
    clean, clean_gradient = run(student, teacher, reduction="none", backend=backend)
    (student if side == "student" else teacher)[1, 4] = NAN
    loss, gradient = run(student, teacher, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False]
    assert_same([loss[[0, 2]], gradient[[0, 2]]], [clean[[0, 2]], clean_gradient[[0, 2]]])


@pytest.mark.parametrize("size", [1e-12, 1e12], ids=str)
def test_cosine_does_not_depend_on_length(backend, device, size):
    # the product of two squared norms leaves fp32's range where the norms themselves do not
    student, teacher = logits_pair((3, 9), device=device)
    near, _ = run(student, teacher, reduction="none", backend=backend)
    far, gradient = run(size * student, size * teacher, reduction="none", backend=backend)
    torch.testing.assert_close(far, near, rtol=1e-5, atol=1e-6)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_to_average_gives_zero(backend, device, reduction):
    student, teacher = logits_pair((3, 9), device=device)
    mask = torch.zeros(3, device=device)
    for this_mask in (mask, mask.bool()):
        loss, gradient = run(student, teacher, this_mask, reduction=reduction, backend=backend)
        assert (loss == 0).all()
        assert (gradient == 0).all()
    if reduction == "mean":
        for zero in (0, torch.tensor(0.0, device=device)):
            loss, gradient = run(student, teacher, normalizer=zero, backend=backend)
            assert loss == 0
            assert (gradient == 0).all()


# Autograd


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_scaled_before_it_is_rounded(backend, device, reduction):
    # a loss scale of 2^20 meets a divisor of 2^20; between the two fp16 would flush to 0
    student, teacher = logits_pair((3, 40), dtypes=(FP16, FP16), device=device)
    big = torch.tensor(2.0**20, device=device)
    if reduction == "mean":
        arguments = {"normalizer": big, "grad_output": big}
    else:
        arguments = {"mask": torch.full((3,), 1 / big.item(), device=device)}
        arguments["grad_output"] = big.expand(3)
    _, gradient = parity(student, teacher, reduction=reduction, backend=backend, **arguments)
    assert (gradient != 0).float().mean() > 0.9


def test_only_layers_that_require_grad_get_one(backend, device):
    # frozen embeddings: the first hidden state of a model may not be trained
    pairs = [logits_pair((3, 9), seed=i, device=device) for i in range(3)]
    students = [s.clone().requires_grad_(i != 1) for i, (s, _) in enumerate(pairs)]
    hidden_cosine_loss(students, [t for _, t in pairs], backend=backend).backward()
    assert students[1].grad is None
    for i in (0, 2):
        _, wanted = run(*pairs[i], backend=backend)
        torch.testing.assert_close(students[i].grad, wanted / 3)


def test_loss_without_gradient_is_the_same(backend, device):
    student, teacher = logits_pair((3, 9), device=device)
    wanted, _ = run(student, teacher, backend=backend)
    plain = hidden_cosine_loss(student, teacher, backend=backend)
    with torch.no_grad():
        guarded = hidden_cosine_loss(student.requires_grad_(), teacher, backend=backend)
    for loss in (plain, guarded):
        assert not loss.requires_grad
        torch.testing.assert_close(loss, wanted.detach())


def test_inputs_are_bit_identical_and_runs_repeat(backend, device):
    student, teacher = logits_pair((40, 300), dtypes=(BF16, BF16), device=device)
    mask = make_mask((40,), "float", device)
    before = [x.clone() for x in (student, teacher, mask)]
    first = run(student, teacher, mask, backend=backend)
    second = run(student.clone(), teacher.clone(), mask, backend=backend)
    assert_same(first, second)
    assert_same([student, teacher, mask], before)


@pytest.mark.parametrize("layers", [1, 2])
def test_teacher_that_requires_grad_is_told_to_detach(backend, device, layers):
    student, teacher = logits_pair((3, 9), device=device)
    teachers = [teacher] * (layers - 1) + [teacher.clone().requires_grad_()]
    arguments = (student, teachers[0]) if layers == 1 else ([student] * 2, teachers)
    with pytest.raises(ValueError, match=r"teacher_hidden.*\.detach\(\)"):
        hidden_cosine_loss(*arguments, backend=backend)


def test_second_backward_over_a_retained_graph_is_the_same(backend, device):
    student, teacher = logits_pair((3, 9), device=device)
    loss = hidden_cosine_loss(student.requires_grad_(), teacher, backend=backend)
    assert_second_backward_repeats(loss, [student])


@pytest.mark.parametrize("upstream_needs_grad", [False, True])
def test_double_backward_raises(backend, device, upstream_needs_grad):
    student, teacher = logits_pair((3, 9), device=device)
    loss = hidden_cosine_loss(student.requires_grad_(), teacher, backend=backend)
    assert_double_backward_raises(loss, [student], upstream_needs_grad)


@pytest.mark.parametrize("layers", [0, 3], ids=["tensor", "list"])
def test_compiled_call_equals_eager(backend, device, layers):
    pairs = [logits_pair((2, 5, 12), seed=i, device=device) for i in range(layers or 1)]
    students = [s.requires_grad_() for s, _ in pairs]
    teachers = [t for _, t in pairs]
    mask = make_mask((2, 5), "some", device)

    def loss(students, teachers, mask):
        if layers == 0:
            return hidden_cosine_loss(students[0], teachers[0], mask, backend=backend)
        return hidden_cosine_loss(students, teachers, mask, backend=backend)

    ours, wanted = (x(students, teachers, mask) for x in (compiled(loss), loss))
    torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(
        torch.autograd.grad(ours, students), torch.autograd.grad(wanted, students)
    )


# Bad calls


@pytest.fixture
def spoil(backend, device):
    """Expect a ValueError with some words in it, from one spoilt argument of a good call."""
    student, teacher = logits_pair((2, 3, 8), device=device)
    arguments = {"student_hidden": student, "teacher_hidden": teacher, "backend": backend}
    hidden_cosine_loss(**arguments)

    def spoil(*words, **changes):
        with value_error(*words):
            hidden_cosine_loss(**{**arguments, **changes})

    return spoil


def test_wrong_shapes_are_refused_with_both_sizes(spoil, device):
    def ones(*shape):
        return torch.ones(*shape, device=device)

    spoil("teacher_hidden", 8, 9, teacher_hidden=ones(2, 3, 9))  # another width
    spoil("teacher_hidden", "3, 2", "2, 3", teacher_hidden=ones(3, 2, 8))
    spoil("teacher_hidden", teacher_hidden=ones(8))  # would broadcast
    spoil("mask", "3, 2", "2, 3", mask=ones(3, 2))
    spoil("mask", "2, 3", mask=ones(3))
    spoil("normalizer", normalizer=ones(1))
    spoil("student_hidden", student_hidden=torch.tensor(1.0, device=device))


def test_wrong_lists_are_refused(spoil, device):
    layer = torch.ones(2, 3, 8, device=device)
    spoil("teacher_hidden", 2, 3, student_hidden=[layer] * 2, teacher_hidden=[layer] * 3)
    spoil("student_hidden", student_hidden=[], teacher_hidden=[])
    # a stacked tensor is one layer, whatever its first dimension is
    spoil("teacher_hidden", student_hidden=[layer[0]] * 2, teacher_hidden=layer)


def test_wrong_dtypes_and_devices_are_refused(spoil, device):
    for name in ("student_hidden", "teacher_hidden"):
        spoil(name, "int64", **{name: torch.ones(2, 3, 8, dtype=torch.int64, device=device)})
    spoil("teacher_hidden", "meta", teacher_hidden=torch.ones(2, 3, 8, device="meta"))
    spoil("mask", "int64", mask=torch.ones(2, 3, dtype=torch.int64, device=device))


def test_wrong_names_are_refused(spoil):
    spoil("reduction", "avg", reduction="avg")
    spoil("backend", "numpy", backend="numpy")
    for reduction in ("sum", "none"):
        spoil("normalizer", "mean", reduction, reduction=reduction, normalizer=3)
