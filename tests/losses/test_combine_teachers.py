"""combine_teachers: several teachers as one, by their probabilities or by their logits."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import (
    BF16,
    FP16,
    FP32,
    INF,
    MODES,
    NAN,
    assert_same,
    combined_rows,
    compiled,
    logits_pair,
    value_error,
)

from distilfast import combine_teachers, distillation_loss

LN3 = math.log(3)
both_modes = pytest.mark.parametrize("mode", MODES)


def teachers_of(lead, *, vocab=9, count=2, dtype=FP32, device="cpu"):
    made = (logits_pair((*lead, vocab), seed=i, device=device) for i in range(count))
    return [teacher.to(dtype) for teacher, _ in made]


def test_probability_mode_equals_hand_value(device):
    # at T = 2: [1/4, 3/4] and [1/2, 1/2] average to [3/8, 5/8], and to [5/16, 11/16] at 3 to 1
    teachers = [torch.tensor([[0.0, 2 * LN3]]), torch.tensor([[7.0, 7.0]])]
    teachers = [t.to(device) for t in teachers]
    z = combine_teachers(teachers, temperature=2.0)
    wanted = 2 * torch.tensor([[math.log(3 / 8), math.log(5 / 8)]])
    torch.testing.assert_close(z.cpu(), wanted, rtol=1e-6, atol=1e-6)
    z = combine_teachers(teachers, [3, 1], temperature=2.0)
    wanted = 2 * torch.tensor([[math.log(5 / 16), math.log(11 / 16)]])
    torch.testing.assert_close(z.cpu(), wanted, rtol=1e-6, atol=1e-6)


def test_logit_mode_equals_hand_value(device):
    teachers = [
        torch.tensor([[1.0, -2.0]], device=device),
        torch.tensor([[3.0, 4.0]], device=device),
    ]
    for weights, wanted in ((None, [2.0, 1.0]), ([1.0, 3.0], [2.5, 2.5]), ((8, 0), [1.0, -2.0])):
        z = combine_teachers(teachers, weights, temperature=5.0, mode="logit")
        torch.testing.assert_close(z.cpu(), torch.tensor([wanted]), rtol=1e-6, atol=1e-6)


@both_modes
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.3])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("weights", [None, [0.2, 0.5, 0.3], [5, 0, 15], [7.0]], ids=str)
def test_parity_with_the_definition(device, weights, dtype, temperature, mode):
    count = len(weights or "abc")
    teachers = teachers_of((2, 3), vocab=17, count=count, dtype=dtype, device=device)
    before = [t.clone() for t in teachers]
    z = combine_teachers(teachers, weights, temperature=temperature, mode=mode)
    assert z.dtype == FP32
    wanted = combined_rows(teachers, weights or [1.0] * count, temperature, mode)
    torch.testing.assert_close(z.double(), wanted, rtol=1e-5, atol=1e-5 * max(1, temperature))
    assert_same(teachers, before)


# Edges


@both_modes
def test_column_minus_inf_in_all_teachers_stays_minus_inf(device, mode):
    # a token no teacher can say: -inf, not NaN, and the others as without it
    teachers = teachers_of((3,), device=device)
    for teacher in teachers:
        teacher[:, [0, 5]] = -INF
    left = [1, 2, 3, 4, 6, 7, 8]
    z = combine_teachers(teachers, [1, 2], temperature=2.0, mode=mode)
    assert torch.isneginf(z[:, [0, 5]]).all()
    narrow = combine_teachers([t[:, left] for t in teachers], [1, 2], temperature=2.0, mode=mode)
    torch.testing.assert_close(z[:, left], narrow)


@pytest.mark.parametrize("place", [0, 1])
def test_column_minus_inf_in_one_teacher_keeps_the_others_share(device, place):
    teachers = teachers_of((3,), device=device)
    teachers[place][:, 5] = -INF
    z = combine_teachers(teachers, [1, 3], temperature=2.0)
    assert z.isfinite().all()
    wanted = combined_rows(teachers, [1, 3], 2.0, "probability")
    torch.testing.assert_close(z.double(), wanted, rtol=1e-5, atol=1e-5)
    # a mean of logits with -inf in it is -inf
    z = combine_teachers(teachers, [1, 3], temperature=2.0, mode="logit")
    assert torch.isneginf(z[:, 5]).all()
    assert z[:, :5].isfinite().all()


def test_far_tails_stay_finite(device):
    # softmax underflows to 0 here; its logarithm is still -300 and -600, and a reverse KL or a
    # teacher that reads -inf instead would be infinitely wrong
    teachers = [torch.tensor([[0.0, -300.0, -600.0]], device=device)] * 2
    z = combine_teachers(teachers, temperature=1.0)
    torch.testing.assert_close(z, teachers[0], rtol=1e-5, atol=1e-4)


@both_modes
@pytest.mark.parametrize("bad", [NAN, INF, -INF], ids=str)
@pytest.mark.parametrize("place", [0, 1])
def test_teacher_of_weight_zero_is_ignored_whatever_it_holds(device, place, bad, mode):
    teachers, weights = teachers_of((3,), device=device), [0.3, 0.7]
    wanted = combine_teachers(teachers, weights, temperature=2.0, mode=mode)
    teachers.insert(place, torch.full((3, 9), bad, device=device))
    weights.insert(place, 0.0)
    z = combine_teachers(teachers, weights, temperature=2.0, mode=mode)
    torch.testing.assert_close(z, wanted)


@both_modes
def test_nan_row_leaves_the_others_alone(device, mode):
    teachers = teachers_of((3,), device=device)
    wanted = combine_teachers(teachers, temperature=2.0, mode=mode)
    teachers[1][1] = NAN
    z = combine_teachers(teachers, temperature=2.0, mode=mode)
    assert z.isnan().all(-1).tolist() == [False, True, False]
    assert_same([z[[0, 2]]], [wanted[[0, 2]]])


@both_modes
@pytest.mark.parametrize("bad", [NAN, 1e4], ids=str)
def test_padding_does_not_enter_the_ensemble(device, mode, bad):
    teachers = [logits_pair((3, width), seed=width, device=device)[0] for width in (12, 9, 16)]
    wanted = combine_teachers([t[:, :9] for t in teachers], temperature=2.0, mode=mode)
    for teacher in teachers:
        teacher[:, 9:] = bad
    z = combine_teachers(teachers, temperature=2.0, mode=mode, vocab_size=9)
    assert z.shape[-1] >= 9
    torch.testing.assert_close(z[:, :9], wanted)
    # whatever stands behind the vocabulary, a loss told of vocab_size takes z as it is
    student, _ = logits_pair((3, 9), device=device)
    output = distillation_loss(student, z, vocab_size=9, backend="torch")
    torch.testing.assert_close(output, distillation_loss(student, wanted, backend="torch"))


@both_modes
@pytest.mark.parametrize("lead", [(), (0,), (2, 3)], ids=str)
def test_any_leading_shape_works(device, mode, lead):
    teachers = teachers_of(lead, device=device)
    z = combine_teachers(teachers, temperature=2.0, mode=mode)
    assert z.shape == (*lead, 9)
    torch.testing.assert_close(
        z.double(), combined_rows(teachers, [1, 1], 2.0, mode), rtol=1e-5, atol=1e-5
    )


@both_modes
def test_memory_layout_and_mixed_dtypes_do_not_matter(device, mode):
    first, second = logits_pair((4, 6), dtypes=(BF16, FP32), device=device)
    wanted = combine_teachers([first.float(), second], [1, 2], temperature=2.0, mode=mode)
    z = combine_teachers(
        [first.T.contiguous().T, torch.stack([second, second], -1)[..., 0]],
        [1, 2],
        temperature=2.0,
        mode=mode,
    )
    torch.testing.assert_close(z, wanted)


@both_modes
def test_result_has_no_graph_and_feeds_the_loss(backend, device, mode):
    student, teacher = logits_pair((4, 9), device=device)
    other, _ = logits_pair((4, 9), seed=3, device=device)
    z = combine_teachers([teacher, other], temperature=2.0, mode=mode)
    assert not z.requires_grad
    output = distillation_loss(student.requires_grad_(), z, backend=backend)
    output.loss.backward()
    p = torch.softmax(z / 2, -1)
    wanted = 2 * (torch.softmax(student.detach() / 2, -1) - p) / 4
    torch.testing.assert_close(student.grad, wanted, rtol=1e-4, atol=1e-6)


@both_modes
def test_compiled_call_equals_eager(device, mode):
    teachers = teachers_of((4,), device=device)

    def combine(teachers):
        return combine_teachers(teachers, [1, 2], temperature=2.0, mode=mode, vocab_size=8)

    torch.testing.assert_close(compiled(combine)(teachers), combine(teachers))


# Bad calls


@both_modes
def test_teacher_that_requires_grad_is_told_to_detach(device, mode):
    first, second = logits_pair((3, 9), device=device)
    with pytest.raises(ValueError, match=r"\.detach\(\)"):
        combine_teachers([first, second.requires_grad_()], temperature=2.0, mode=mode)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"weights": [1.0]}, ("weights", 2, 1)),
        ({"weights": [1.0, 1.0, 1.0]}, ("weights", 2, 3)),
        ({"weights": [1.0, -0.5]}, ("weights", -0.5)),
        ({"weights": [1.0, NAN]}, ("weights", "nan")),
        ({"weights": [1.0, INF]}, ("weights", "inf")),
        ({"weights": [0.0, 0.0]}, ("weights", 0)),
        ({"temperature": 0.0}, ("temperature", "0.0")),
        ({"temperature": -2.0}, ("temperature", "-2.0")),
        ({"temperature": NAN}, ("temperature", "nan")),
        ({"temperature": INF}, ("temperature", "inf")),
        ({"mode": "mean"}, ("mode", "mean", "probability", "logit")),
        ({"vocab_size": 99}, ("vocab_size", 99, 9)),
        ({"vocab_size": 0}, ("vocab_size", 0)),
    ],
    ids=str,
)
def test_bad_arguments_are_refused(device, changes, words):
    teachers = list(logits_pair((3, 9), device=device))
    with value_error(*words):
        combine_teachers(teachers, **{"temperature": 2.0, **changes})


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((3, 9), (4, 9)), (3, 4)),
        (((3, 9), (3, 3, 9)), ("3, 3",)),
        (((3, 9), (9,)), (3,)),
        (((3, 9), (3, 11)), ("vocab_size", 9, 11)),
        ((), ()),
    ],
    ids=str,
)
def test_bad_shapes_are_refused(device, shapes, words):
    with value_error(*words):
        combine_teachers([torch.ones(shape, device=device) for shape in shapes], temperature=2.0)


def test_bad_dtypes_and_devices_are_refused(device):
    good = torch.ones(3, 9, device=device)
    with pytest.raises(ValueError, match="int64"):
        combine_teachers([good, good.long()], temperature=2.0)
    with pytest.raises(ValueError, match="meta"):
        combine_teachers([good, torch.ones(3, 9, device="meta")], temperature=2.0)
