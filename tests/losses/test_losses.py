"""distillation_loss: constants by hand, gradients by finite differences, parity with the oracle."""

from __future__ import annotations

import functools
import math

import hypothesis.strategies as st
import oracle
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracle import (
    ALL_PARTS,
    BF16,
    DIVERGENCES,
    FP16,
    FP32,
    IGNORE,
    PARTS,
    REDUCTIONS,
    assert_same,
    ce_rows,
    compiled,
    cos_rows,
    divergence_rows,
    expect,
    logits_pair,
    make_labels,
    make_mask,
    mse_rows,
    plain_rows,
    read,
    value_and_grad,
)

from distilfast import DistillationLoss, distillation_loss, hidden_cosine_loss

LN2, LN3 = math.log(2), math.log(3)


def run(student, teacher, labels=None, **keywords):
    """(DistillationOutput, gradient of the student's logits)."""
    return value_and_grad(distillation_loss, student, teacher, **read(labels=labels, **keywords))


parity = functools.partial(oracle.parity, distillation_loss)


def close(actual, wanted, tolerance=2e-6):
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    torch.testing.assert_close(
        actual.detach().cpu().double(), wanted, rtol=tolerance, atol=tolerance
    )


# By hand
#
# At T = 2, s = [0, 2 ln 3] gives p_s = [1/4, 3/4] and t = [0, 0] gives p_t = [1/2, 1/2]. With two
# classes a softmax gradient is p1 p2 (g2 - g1) on the second logit and its negative on the first.


def hand_logits(device):
    return torch.tensor([[0.0, 2 * LN3]], device=device), torch.zeros(1, 2, device=device)


@pytest.mark.parametrize(
    ("divergence", "beta", "value", "slope"),
    [
        # KL(p_t || p_s) = 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4) = 1/2 ln(4/3), times T^2 = 4;
        # gradient T (p_s - p_t) = 2 (3/4 - 1/2)
        ("forward_kl", 0.5, 2 * math.log(4 / 3), 0.5),
        # KL(p_s || p_t) = 1/4 ln(1/2) + 3/4 ln(3/2) = 3/4 ln 3 - ln 2, times 4;
        # gradient T p1 p2 (ln(3/2) - ln(1/2)) = 2 * 3/16 * ln 3
        ("reverse_kl", 0.5, 3 * LN3 - 4 * LN2, 3 / 8 * LN3),
        # m = [3/8, 5/8]: KL(p_t || m) = 1/2 ln(16/15), KL(p_s || m) = 1/4 ln(2/3) + 3/4 ln(6/5);
        # gradient T (1-beta) p1 p2 (ln(p_s2/m2) - ln(p_s1/m1)) = 3/16 (ln(6/5) - ln(2/3))
        (
            "jsd",
            0.5,
            math.log(16 / 15) + 0.5 * math.log(2 / 3) + 1.5 * math.log(6 / 5),
            3 / 16 * math.log(9 / 5),
        ),
        # beta = 1/4 tells the two sides apart: m = [5/16, 11/16], KL(p_t || m) = 1/2 ln(64/55),
        # KL(p_s || m) = 1/4 ln(4/5) + 3/4 ln(12/11); gradient 2 * 3/4 * 3/16 * ln(15/11)
        (
            "jsd",
            0.25,
            0.5 * math.log(64 / 55) + 0.75 * math.log(4 / 5) + 2.25 * math.log(12 / 11),
            9 / 32 * math.log(15 / 11),
        ),
    ],
)
def test_kd_at_temperature_two_equals_hand_value(backend, device, divergence, beta, value, slope):
    student, teacher = hand_logits(device)
    output, gradient = run(
        student, teacher, divergence=divergence, jsd_beta=beta, temperature=2.0, backend=backend
    )
    close(output.loss, value)
    close(output.kd, value)
    close(gradient, [[-slope, slope]])


def test_ce_is_taken_at_temperature_one(backend, device):
    # softmax([0, 2 ln 3]) = [1/10, 9/10]: -ln 9/10 and -ln 1/10, whatever T is
    student, teacher = hand_logits(device)
    keywords = {"kd_weight": 0.0, "ce_weight": 1.0, "temperature": 7.0, "backend": backend}
    for label, value, gradient in ((1, math.log(10 / 9), 0.1), (0, math.log(10), -0.9)):
        output, got = run(student, teacher, torch.tensor([label], device=device), **keywords)
        close(output.loss, value)
        close(output.ce, value)
        close(got, [[gradient, -gradient]])


def test_cos_and_mse_equal_hand_values(backend, device):
    # s = [3, 4], t = [4, 3]: cos = 1 - 24/25, its gradient 24 s / (125 * 5) - t / 25;
    # mse = 1 + 1 summed over the vocabulary, its gradient 2 (s - t)
    student = torch.tensor([[3.0, 4.0]], device=device)
    teacher = torch.tensor([[4.0, 3.0]], device=device)
    output, gradient = run(student, teacher, kd_weight=0.0, cos_weight=1.0, backend=backend)
    close(output.cos, 0.04)
    close(gradient, [[-0.0448, 0.0336]])
    output, gradient = run(student, teacher, kd_weight=0.0, mse_weight=1.0, backend=backend)
    close(output.mse, 2.0)
    close(gradient, [[-2.0, 2.0]])


def test_loss_is_the_weighted_sum_of_unweighted_parts(backend, device):
    # kd = 2 ln(4/3) and its slope 1/2, ce = ln(10/9) and its slope -1/10, from above;
    # t = 0 makes cos = 1 without a gradient; mse = (2 ln 3)^2 with slope 4 ln 3
    student, teacher = hand_logits(device)
    label = torch.ones(1, dtype=torch.int64, device=device)
    output, gradient = run(student, teacher, label, backend=backend, **ALL_PARTS)
    kd, ce, cos, mse = 2 * math.log(4 / 3), math.log(10 / 9), 1.0, (2 * LN3) ** 2
    for part, value in zip(PARTS, (kd, ce, cos, mse), strict=True):
        close(getattr(output, part), value)
    close(output.loss, 5 * kd + 2 * ce + 1.5 * cos + 0.25 * mse)
    slope = 5 * 0.5 - 2 * 0.1 + 0.25 * 4 * LN3
    close(gradient, [[5 * -0.5 + 2 * 0.1, slope]])


# Three rows with mse 1, 4, 9 (V = 2, teacher 0) and ce ln 2 for s = [0, 0] alone would not show
# the divisors, so kd-like parts are read off mse and ce off rows of known softmax.


def three_rows(device):
    # mse per row 1, 4, 9; ce per row (label 0) ln(1 + e^x) with x = 1, 2, 3
    student = torch.tensor([[0.0, 1.0], [0.0, 2.0], [0.0, 3.0]], device=device)
    return student, torch.zeros(3, 2, device=device), [math.log1p(math.exp(x)) for x in (1, 2, 3)]


def test_mean_divides_each_part_by_its_own_count(backend, device):
    student, teacher, ce = three_rows(device)
    labels = torch.tensor([0, 0, IGNORE], device=device)
    mask = torch.tensor([False, False, True], device=device)
    weights = {"kd_weight": 0.0, "mse_weight": 2.0, "ce_weight": 3.0}
    output, gradient = run(student, teacher, labels, mask=mask, backend=backend, **weights)
    close(output.mse, 9.0)  # one row in the mask
    close(output.ce, (ce[0] + ce[1]) / 2)  # two rows with a label, both outside the mask
    close(output.loss, 2 * 9.0 + 1.5 * (ce[0] + ce[1]))
    p1, p2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    close(gradient, [[-1.5 * p1, 1.5 * p1], [-1.5 * p2, 1.5 * p2], [0.0, 12.0]])


def test_float_mask_weights_rows_and_their_divisor(backend, device):
    student, teacher, _ = three_rows(device)
    mask = torch.tensor([2.0, 0.5, 0.0], device=device)
    keywords = {"kd_weight": 0.0, "mse_weight": 1.0, "backend": backend}
    for dtype in (FP32, FP16, BF16, torch.float64):
        output, gradient = run(student, teacher, mask=mask.to(dtype), **keywords)
        close(output.loss, (2 * 1 + 0.5 * 4) / 2.5)
        close(gradient, [[0.0, 2 * 2 * 1 / 2.5], [0.0, 0.5 * 2 * 2 / 2.5], [0.0, 0.0]])
        assert output.loss.dtype == gradient.dtype == FP32
    for reduction, wanted in (("sum", 4.0), ("none", [2.0, 2.0, 0.0])):
        output, _ = run(student, teacher, mask=mask, reduction=reduction, **keywords)
        close(output.loss, wanted)


@pytest.mark.parametrize("kind", ["int", "float", "float_tensor", "int_tensor"])
def test_normalizers_replace_the_divisors(backend, device, kind):
    # the count of a whole optimiser step, of which these rows are a micro-batch
    student, teacher, ce = three_rows(device)
    labels = torch.tensor([IGNORE, 0, IGNORE], device=device)
    mask = torch.tensor([True, False, True], device=device)
    cast = {
        "int": int,
        "float": float,
        "float_tensor": lambda x: torch.tensor(float(x), device=device),
        "int_tensor": lambda x: torch.tensor(x, device=device),
    }[kind]
    kd, both = {"kd_normalizer": cast(8)}, {"kd_normalizer": cast(8), "ce_normalizer": cast(5)}
    weights = {"kd_weight": 0.0, "mse_weight": 1.0, "ce_weight": 1.0}
    p = 1 / (1 + math.exp(-2))
    for normalizers, n_ce in ((both, 5), (kd, 1)):  # one leaves the other divisor alone
        output, gradient = run(
            student, teacher, labels, mask=mask, backend=backend, **normalizers, **weights
        )
        close(output.mse, (1 + 9) / 8)
        close(output.ce, ce[1] / n_ce)
        close(gradient, [[0.0, 2 / 8], [-p / n_ce, p / n_ce], [0.0, 6 / 8]])
    output, _ = run(student, teacher, labels, ce_normalizer=cast(5), backend=backend, **weights)
    close(output.mse, 14 / 3)
    close(output.ce, ce[1] / 5)


# The oracle itself


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 7.3])
def test_oracle_agrees_with_autograd_in_float64(divergence, temperature):
    # two derivations of every row: closed form, and plain PyTorch differentiated by autograd
    student, teacher = (x.double() for x in logits_pair((4, 9)))
    labels = make_labels((4,), 9, "all")
    ours = {
        "kd": divergence_rows(student, teacher, temperature, divergence, 0.3),
        "ce": ce_rows(student, labels),
        "cos": cos_rows(student, teacher),
        "mse": mse_rows(student, teacher),
    }
    for part in PARTS:
        theirs = plain_rows(part, student, teacher, labels, temperature, divergence, 0.3)
        torch.testing.assert_close(ours[part].value, theirs.value, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(ours[part].grad, theirs.grad, rtol=1e-10, atol=1e-12)


# Finite differences (float64 is the torch backend's)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(
    "keywords",
    [
        *({"divergence": name, "jsd_beta": 0.3} for name in DIVERGENCES),
        *({"kd_weight": 0.0, f"{part}_weight": 1.0} for part in PARTS[1:]),
        *({"divergence": name, "jsd_beta": 0.7, **ALL_PARTS} for name in DIVERGENCES),
    ],
    ids=["forward", "reverse", "jsd", "ce", "cos", "mse", "forward+", "reverse+", "jsd+"],
)
def test_gradcheck_in_float64(keywords, reduction):
    student, teacher = (x.double() for x in logits_pair((4, 6), scale=1.0))
    labels, mask = make_labels((4,), 5, "some"), make_mask((4,), "float")
    fixed = {"mask": mask, "temperature": 1.7, "vocab_size": 5, "reduction": reduction}

    def loss(logits):
        used = read(labels=labels, backend="torch", **fixed, **keywords)
        return distillation_loss(logits, teacher, **used).loss

    assert torch.autograd.gradcheck(loss, student.requires_grad_())


# Parity


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 3.0, 4.0, 7.3, 20.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity_at_every_temperature(backend, device, divergence, temperature, near):
    # whole temperatures may be powers of one exponential, 7.3 and 0.5 may not
    student, teacher = logits_pair((6, 37), near=near, device=device)
    labels = make_labels((6,), 37, "some", device)
    keywords = {"temperature": temperature, "divergence": divergence, "jsd_beta": 0.3}
    for extra in ({}, {"reduction": "none"}, {"reduction": "sum", **ALL_PARTS}):
        parity(student, teacher, labels, backend=backend, **keywords, **extra)


@pytest.mark.parametrize("near", [False, True], ids=["far", "near"])
@pytest.mark.parametrize(
    "dtypes",
    [(FP16, FP16), (BF16, BF16), (BF16, FP32), (FP32, BF16), (FP16, BF16), (FP32, FP16)],
    ids=lambda pair: "-".join(str(x).removeprefix("torch.") for x in pair),
)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity_in_every_dtype(backend, device, divergence, dtypes, near):
    student, teacher = logits_pair((6, 41), near=near, dtypes=dtypes, device=device)
    labels = make_labels((6,), 41, "some", device)
    for extra in ({}, ALL_PARTS, {"kd_weight": 0.0, "ce_weight": 1.0}):
        for temperature in (1.0, 2.0, 7.3):
            keywords = {"divergence": divergence, "temperature": temperature, **extra}
            parity(student, teacher, labels, backend=backend, **keywords)


@pytest.mark.parametrize(
    "vocab",
    [
        *(2, 3),  # the smallest vocabulary: all tail
        # one under, at and over 8: a vector of fp32 in AVX2, 16 bytes of bf16; 16: a vector of fp32
        # in AVX-512, the alignment Triton looks for; 32: a vector of bf16 in AVX-512; 128: small
        # blocks, several vectors unrolled; then the blocks a kernel may choose
        *(n + more for n in (8, 16, 32, 128, 1024, 2048, 4096) for more in (-1, 0, 1)),
        6152,  # a block, a half and 8 columns: a full main loop and an aligned tail
        30522,  # BERT's: rows are only 4-byte aligned in bf16
    ],
)
def test_parity_around_block_boundaries(backend, device, vocab):
    # three rows, so that in an odd vocabulary each starts at another alignment
    labels = torch.tensor([0, IGNORE, vocab - 1], device=device)  # first and last column are hit
    for dtype, divergence in ((FP32, "jsd"), (BF16, "forward_kl"), (BF16, "reverse_kl")):
        student, teacher = logits_pair((3, vocab), dtypes=(dtype, dtype), device=device)
        keywords = {"divergence": divergence, "reduction": "none", **ALL_PARTS}
        parity(student, teacher, labels, backend=backend, **keywords)


@pytest.mark.parametrize("where", ["first", "last", "middle"])
@pytest.mark.parametrize("vocab", [17, 2049])
def test_parity_with_a_peak_anywhere(backend, device, vocab, where):
    # the row's maximum decides every rescaling of an online softmax: first, last or after a block
    student, teacher = logits_pair((2, vocab), device=device)
    column = {"first": 0, "last": vocab - 1, "middle": vocab // 2}[where]
    # A reverse KL subtracts two logarithms of about twice this, which costs as many ulps: at 40 the
    # difference has fewer digits than the budget where the processor's own errors are small.
    student[:, column] += 20.0
    teacher[:, vocab - 1 - column] += 20.0
    labels = torch.full((2,), column, device=device)
    for divergence in DIVERGENCES:
        keywords = {"divergence": divergence, "ce_weight": 1.0, "reduction": "none"}
        parity(student, teacher, labels, backend=backend, **keywords)


@pytest.mark.parametrize("low", [-95.0, -math.inf], ids=str)
def test_parity_of_labels_alone_with_a_late_maximum(backend, device, low):
    # nothing of the first columns tells how high the row goes
    student, teacher = logits_pair((3, 2051), scale=0.5, device=device)
    student[:, :2048] = low
    labels = torch.tensor([2048, 2049, 2050], device=device)
    parity(student, teacher, labels, backend=backend, kd_weight=0.0, ce_weight=1.0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("value", [-2e7, -1e10, 3e38, -3e38])
def test_rows_of_one_huge_value_are_uniform(backend, device, value, dtype):
    # what is left of a row that was masked with a number: a whole row of it, where x - max is 0
    if backend == "triton" and abs(value) > 1e9:
        pytest.skip("beyond its limits (docs/kernels.md)")
    student = torch.full((2, 1000), value, dtype=dtype, device=device, requires_grad=True)
    teacher = logits_pair((2, 1000), device=device)[1].to(dtype)
    labels = torch.tensor([0, 999], device=device)
    out = distillation_loss(student, teacher, labels, ce_weight=1.0, backend=backend)
    flat = torch.zeros(2, 1000, dtype=dtype, device=device)
    expected = distillation_loss(flat, teacher, labels, ce_weight=1.0, backend="torch")
    torch.testing.assert_close(out.ce, expected.ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.kd, expected.kd, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert student.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_column_masked_with_the_lowest_number_is_no_infinity(
    backend, device, divergence, side, dtype
):
    # a probability that underflows times a difference of 1e38 is 0, whatever rounding makes of it
    student, teacher = (x.to(dtype) for x in logits_pair((3, 50), device=device))
    (student if side == "student" else teacher)[:, 7] = torch.finfo(dtype).min
    values = {"divergence": divergence, "temperature": 2.0, "reduction": "none"}
    results = []
    for s, t, name in ((student, teacher, backend), (student.double(), teacher.double(), "torch")):
        s = s.clone().requires_grad_()
        out = distillation_loss(s, t, backend=name, **values)
        out.loss.sum().backward()
        results.append((out.loss.double(), s.grad.double()))
    (loss, grad), (exact_loss, exact_grad) = results
    torch.testing.assert_close(loss, exact_loss, rtol=1e-5, atol=4e-5)
    tolerance = (1e-5 if dtype == FP32 else 2**-7) * exact_grad.abs().amax()
    assert (grad - exact_grad).abs().amax() <= tolerance


@pytest.mark.parametrize("offset", [100.0, -100.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity_of_logits_that_are_not_centred(backend, device, divergence, offset):
    # exp(100 / 0.5) is infinite and exp(-100 / 0.5) is 0 unless the maximum is taken off first
    student, teacher = logits_pair((4, 33), offset=offset, device=device)
    labels = make_labels((4,), 33, "all", device)
    keywords = {"divergence": divergence, "temperature": 0.5, "ce_weight": 1.0}
    parity(student, teacher, labels, backend=backend, **keywords)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity_of_confident_models(backend, device, divergence):
    # at T = 1/2 these probabilities underflow to 0 in fp32: 0 * log 0 inside finite logits
    student, teacher = logits_pair((5, 65), scale=25.0, device=device)
    keywords = {"divergence": divergence, "temperature": 0.5, "reduction": "none"}
    output, _ = parity(student, teacher, backend=backend, **keywords)
    assert output.loss.isfinite().all()


@pytest.mark.parametrize("which_mask", ["absent", "none", "some", "all", "float"])
@pytest.mark.parametrize("which_labels", ["absent", "none", "some", "all"])
def test_parity_under_masks_and_labels(backend, device, which_labels, which_mask):
    lead, vocab = (2, 5), 19
    student, teacher = logits_pair((*lead, vocab), device=device)
    labels = None if which_labels == "absent" else make_labels(lead, vocab, which_labels, device)
    keywords = {**ALL_PARTS, "ce_weight": 0.0 if labels is None else 2.0, "backend": backend}
    mask = make_mask(lead, which_mask, device)
    for reduction in REDUCTIONS:
        parity(student, teacher, labels, reduction=reduction, mask=mask, **keywords)


@pytest.mark.parametrize(
    "lead",
    [
        (),  # one row without any leading dimension
        (1,),
        (5,),
        (2, 3),  # batch and sequence
        (2, 1, 3),
        (0,),  # an empty batch
        (2, 0),
    ],
    ids=str,
)
def test_parity_at_every_leading_shape(backend, device, lead):
    student, teacher = logits_pair((*lead, 11), device=device)
    labels, mask = make_labels(lead, 11, "all", device), make_mask(lead, "float", device)
    keywords = {"mask": mask, "backend": backend, **ALL_PARTS}
    for reduction in REDUCTIONS:
        output, gradient = parity(student, teacher, labels, reduction=reduction, **keywords)
        wanted = lead if reduction == "none" else ()
        assert all(part.shape == wanted for part in output[:5])
        assert gradient.shape == (*lead, 11)


@pytest.mark.parametrize(
    ("student_width", "teacher_width", "vocab_size"),
    [
        (24, 21, 21),  # the student's head is padded
        (21, 24, 21),  # the teacher's is
        (24, 32, 21),  # both, differently
        (24, 24, 21),  # both, alike
        (24, 24, 24),  # vocab_size says what is already so
        (136, 129, 128),  # padding of one column and of a vector
        (30528, 30522, 30522),  # BERT's head padded to a multiple of 64
    ],
)
def test_parity_of_a_padded_vocabulary(backend, device, student_width, teacher_width, vocab_size):
    # the padding holds the largest logits, so counting it would show
    student, _ = logits_pair((3, student_width), device=device)
    teacher, _ = logits_pair((3, teacher_width), seed=1, device=device)
    student[:, vocab_size:], teacher[:, vocab_size:] = 50.0, 60.0
    labels = torch.tensor([0, vocab_size - 1, IGNORE], device=device)
    keywords = {"vocab_size": vocab_size, "backend": backend, **ALL_PARTS}
    for divergence in DIVERGENCES:
        _, gradient = parity(student, teacher, labels, divergence=divergence, **keywords)
        assert (gradient[:, vocab_size:] == 0).all()


# The same values in another memory layout.
LAYOUTS = {
    "column_stride": lambda x: torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0],
    # a slice of a wider tensor, not a multiple of anything
    "row_stride": lambda x: torch.nn.functional.pad(x, (0, 3), value=math.nan)[..., :-3],
    # (sequence, batch) storage seen as (batch, sequence)
    "transposed_lead": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "transposed_vocab": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    # the storage begins one element later
    "unaligned": lambda x: torch.cat([x.new_full((1,), math.nan), x.flatten()])[1:].view(x.shape),
    "every_other_row": lambda x: torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0],
    "slice_of_batch": lambda x: torch.cat([x, torch.full_like(x, math.nan)], 1)[:, : x.shape[1]],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_parity_is_blind_to_memory_layout(backend, device, dtype, layout):
    student, teacher = logits_pair((3, 4, 19), dtypes=(dtype, dtype), device=device)
    labels, mask = make_labels((3, 4), 19, "some", device), make_mask((3, 4), "float", device)
    s, t = (LAYOUTS[layout](x) for x in (student, teacher))
    assert torch.equal(s, student)
    keywords = {"backend": backend, **ALL_PARTS}
    labels, mask = labels.t().contiguous().t(), mask.t().contiguous().t()
    first, grad_first = parity(s, teacher, labels, mask=mask, **keywords)
    second, grad_second = parity(student, t, labels, mask=mask, **keywords)
    third, grad_third = parity(s, t, labels, mask=mask, **keywords)
    # a layout may change the order of a sum, nothing more
    for output, gradient in ((second, grad_second), (third, grad_third)):
        torch.testing.assert_close(output.loss, first.loss)
        torch.testing.assert_close(gradient, grad_first)


def test_expanded_inputs_accumulate_their_gradient(backend, device):
    # stride 0: one row stands for four; its gradient is the sum over them
    row, teacher = logits_pair((4, 13), device=device)
    row = row[:1].clone().requires_grad_()
    label, mask = torch.tensor([3], device=device), torch.tensor([0.5], device=device)
    keywords = {"reduction": "sum", **ALL_PARTS}
    expanded = row.expand(4, 13), teacher, label.expand(4)
    named = {"mask": mask.expand(4), "backend": backend, **keywords}
    distillation_loss(*expanded, **named).loss.backward()
    repeated = row.detach().repeat(4, 1), teacher, label.repeat(4)
    wanted = expect(*repeated, mask=mask.repeat(4), **keywords).grad.sum(0, keepdim=True)
    torch.testing.assert_close(row.grad.cpu().double(), wanted, rtol=1e-5, atol=1e-5)
    # a teacher shared by all rows
    parity(teacher, row.detach().expand(4, 13), label.expand(4), backend=backend, **ALL_PARTS)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_float64_stays_float64(divergence, reduction):
    student, teacher = (x.double() for x in logits_pair((3, 8)))
    keywords = {"divergence": divergence, "reduction": reduction, **ALL_PARTS}
    labels = make_labels((3,), 8, "some")
    output, _ = parity(student, teacher, labels, backend="torch", **keywords)
    assert output.loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_output_is_fp32_and_parts_are_detached(backend, device, dtype):
    student, teacher = logits_pair((3, 8), dtypes=(dtype, dtype), device=device)
    student.requires_grad_()
    output = distillation_loss(
        student, teacher, make_labels((3,), 8, "all", device), backend=backend, **ALL_PARTS
    )
    assert all(number.dtype == FP32 for number in output)
    assert output._fields == ("loss", "kd", "ce", "cos", "mse")
    assert output.loss.requires_grad
    assert not any(getattr(output, part).requires_grad for part in PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_part_of_weight_zero_is_zero(backend, device, part):
    student, teacher = logits_pair((3, 8), device=device)
    labels = make_labels((3,), 8, "all", device)
    weights = {**ALL_PARTS, f"{part}_weight": 0.0}
    for reduction in ("mean", "none"):
        output, _ = parity(
            student, teacher, labels, reduction=reduction, backend=backend, **weights
        )
        assert (getattr(output, part) == 0).all()
        assert all((getattr(output, other) > 0).any() for other in PARTS if other != part)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_follows_grad_output(backend, device, reduction, dtype):
    student, teacher = logits_pair((4, 9), dtypes=(dtype, dtype), device=device)
    labels, mask = make_labels((4,), 9, "some", device), make_mask((4,), "some", device)
    shape = (4,) if reduction == "none" else ()
    upstreams = [torch.full(shape, -3.5, device=device), torch.zeros(shape, device=device)]
    if reduction == "none":
        upstreams.append(torch.tensor([1.0, -2.0, 0.0, 0.25], device=device))
        upstreams.append(torch.tensor(2.0, device=device).expand(4))  # what sum() sends back
    keywords = {"mask": mask, "reduction": reduction, "backend": backend, **ALL_PARTS}
    for upstream in upstreams:
        _, gradient = parity(student, teacher, labels, grad_output=upstream, **keywords)
        assert (gradient[upstream.expand(4) == 0] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_gradient_is_scaled_before_it_is_rounded(backend, device, reduction):
    # a loss scale of 2^20 meets a divisor of 2^20: rounding a gradient to fp16 between the two
    # would flush it to 0, which is how small fp16 gradients die
    student, teacher = logits_pair((3, 40), dtypes=(FP16, FP16), device=device)
    big = torch.tensor(2.0**20, device=device)
    keywords = {"kd_normalizer": 2.0**20, "grad_output": big}
    if reduction == "none":
        keywords = {"mask": (1 / big).expand(3), "grad_output": big.expand(3)}
    _, gradient = parity(student, teacher, reduction=reduction, backend=backend, **keywords)
    assert (gradient != 0).float().mean() > 0.9


def test_micro_batches_with_global_normalizers_add_up_to_the_batch(backend, device):
    # "a batch is exact": any split, each part divided by the count of the whole step
    student, teacher = logits_pair((12, 17), device=device)
    labels, mask = make_labels((12,), 17, "some", device), make_mask((12,), "some", device)
    whole, gradient = run(student, teacher, labels, mask=mask, backend=backend, **ALL_PARTS)
    counts = {"kd_normalizer": mask.sum(), "ce_normalizer": (labels != IGNORE).sum()}
    for sizes in ((12,), (5, 7), (1,) * 12):
        pieces = [
            run(s, t, y, mask=m, backend=backend, **counts, **ALL_PARTS)
            for s, t, y, m in zip(
                *(x.split(sizes) for x in (student, teacher, labels, mask)), strict=True
            )
        ]
        torch.testing.assert_close(sum(output.loss for output, _ in pieces), whole.loss)
        torch.testing.assert_close(torch.cat([grad for _, grad in pieces]), gradient)


# Properties


# The fixtures hold strings, so that sharing them between examples is harmless.
@pytest.mark.thorough
@settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_parity_of_drawn_calls(backend, device, data):
    draw = data.draw
    lead = tuple(draw(st.lists(st.integers(1, 4), max_size=3), label="lead"))
    vocab = draw(st.integers(2, 70), label="vocab")
    padding = draw(st.tuples(st.integers(0, 9), st.integers(0, 9)), label="padding")
    dtype = st.sampled_from([FP32, FP16, BF16])
    dtypes = draw(st.tuples(dtype, dtype), label="dtypes")
    seed = draw(st.integers(0, 10_000), label="seed")
    scale, near = draw(st.sampled_from([0.5, 3.0, 8.0])), draw(st.booleans(), label="near")
    wide = (*lead, vocab + max(padding))
    student, teacher = logits_pair(
        wide, seed=seed, scale=scale, near=near, dtypes=dtypes, device=device
    )
    student = student[..., : vocab + padding[0]]
    teacher = teacher[..., : vocab + padding[1]]
    weight = st.sampled_from([0.0, 0.3, 1.0, 5.0])
    weights = {f"{part}_weight": draw(weight, label=part) for part in PARTS}
    if not any(weights.values()):
        weights["kd_weight"] = 1.0
    reduction = draw(st.sampled_from(["mean", "sum", "none"]), label="reduction")
    labels = make_labels(lead, vocab, draw(st.sampled_from(["none", "some", "all"])), device)
    which = draw(st.sampled_from(["absent", "none", "some", "all", "float"]), label="mask")
    normalizers = {}
    if reduction == "mean" and draw(st.booleans(), label="normalised"):
        normalizers = {"kd_normalizer": 3.5, "ce_normalizer": 11}
    parity(
        student,
        teacher,
        labels,
        backend=backend,
        mask=make_mask(lead, which, device),
        temperature=draw(st.floats(0.5, 20.0), label="temperature"),
        divergence=draw(st.sampled_from(DIVERGENCES), label="divergence"),
        jsd_beta=draw(st.floats(0.05, 0.95), label="beta"),
        vocab_size=vocab,
        reduction=reduction,
        grad_output=draw(st.sampled_from([1.0, -0.5, 128.0]), label="upstream"),
        **weights,
        **normalizers,
    )


# The module


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module_equals_the_function(backend, device, reduction):
    student, teacher = logits_pair((2, 3, 11), device=device)
    labels, mask = make_labels((2, 3), 9, "some", device), make_mask((2, 3), "some", device)
    keywords = {
        "temperature": 3.0,
        "divergence": "jsd",
        "jsd_beta": 0.3,
        "vocab_size": 9,
        "ignore_index": IGNORE,
        "reduction": reduction,
        "backend": backend,
        **ALL_PARTS,
    }
    call = {"mask": mask}
    if reduction == "mean":
        call |= {"kd_normalizer": 8, "ce_normalizer": torch.tensor(3.0, device=device)}
    module = DistillationLoss(**keywords)
    assert isinstance(module, torch.nn.Module)
    assert not list(module.parameters())
    ours, gradient = value_and_grad(module, student, teacher, labels, **call)
    theirs, wanted = run(student, teacher, labels, **keywords, **call)
    assert_same([*ours, gradient], [*theirs, wanted])
    # defaults are the function's defaults
    ours, gradient = value_and_grad(DistillationLoss(), student, teacher)
    theirs, wanted = run(student, teacher)
    assert_same([*ours, gradient], [*theirs, wanted])


# torch.compile


@pytest.mark.thorough
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_compiled_function_equals_eager(backend, device, divergence):
    def loss(logits, teacher, labels, mask, count):
        keywords = {"mask": mask, "ce_normalizer": count, "divergence": divergence}
        return distillation_loss(
            2 * logits, teacher, labels, vocab_size=11, backend=backend, **keywords, **ALL_PARTS
        )

    fast = compiled(loss)
    for rows in (4, 6):  # the second call meets another batch size
        student, teacher = logits_pair((rows, 12), device=device)
        labels = make_labels((rows,), 11, "some", device)
        mask = make_mask((rows,), "float", device)
        count = (labels != IGNORE).sum()
        eager = value_and_grad(loss, student, teacher, labels, mask, count)
        ours = value_and_grad(fast, student, teacher, labels, mask, count)
        torch.testing.assert_close(ours[0][:5], eager[0][:5])
        torch.testing.assert_close(ours[1], eager[1])


@pytest.mark.thorough
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_compiled_kd_alone_equals_eager(backend, device, reduction, inplace, dtype):
    # half precision and inplace_backward may take other ways through autograd
    def loss(logits, teacher):
        output = distillation_loss(
            logits * 1, teacher, reduction=reduction, inplace_backward=inplace, backend=backend
        )
        return output.loss.sum()

    student, teacher = logits_pair((2, 4, 12), dtypes=(dtype, dtype), device=device)
    eager = value_and_grad(loss, student, teacher)
    ours = value_and_grad(compiled(loss), student, teacher)
    torch.testing.assert_close(ours, eager)


def test_compiled_module_without_gradient_equals_eager(backend, device):
    student, teacher = logits_pair((4, 12), device=device)
    loss = DistillationLoss(cos_weight=1.0, backend=backend)
    with torch.no_grad():
        torch.testing.assert_close(compiled(loss)(student, teacher)[:5], loss(student, teacher)[:5])


@pytest.mark.thorough
@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_call_follows_temperature_and_weights(backend, device, dynamic):
    # numbers that change are symbols to torch.compile, and may not be looked at
    student, teacher = logits_pair((4, 9), device=device)

    def loss(s, t, temperature, weight):
        keywords = {"temperature": temperature, "kd_weight": weight, "backend": backend}
        return distillation_loss(s, t, **keywords).loss

    fast = compiled(loss, dynamic=dynamic)
    for arguments in ((2.0, 1.0), (3.0, 1.0), (7.3, 0.25)):
        ours = fast(student, teacher, *arguments)
        torch.testing.assert_close(ours, loss(student, teacher, *arguments))


# Totals of 0


@pytest.mark.parametrize("as_tensor", [True, False])
def test_total_of_zero_counts_nothing_whatever_the_rows_hold(backend, device, as_tensor):
    # a rank without a single labelled token passes the global count; a step without any passes 0.
    # Row 1 has no label, row 2 has one: of each the side that its own loss reads is clean
    student, teacher = logits_pair((4, 19), device=device)
    labels = torch.tensor([3, IGNORE, 5, IGNORE], device=device)
    student[1], teacher[2] = math.nan, math.nan
    zero, two = (torch.tensor(x, device=device) if as_tensor else x for x in (0.0, 2.0))
    keywords = {"ce_weight": 1.0, "cos_weight": 1.0, "mse_weight": 1.0, "kd_normalizer": zero}
    for bad in (math.nan, -math.inf):
        spoilt = student.clone()
        spoilt[0, 2] = bad  # of a row with a label
        output, gradient = run(
            spoilt, teacher, labels, ce_normalizer=zero, backend=backend, **keywords
        )
        assert_same([*output, gradient], [torch.zeros_like(x) for x in (*output, gradient)])
    ours = run(student, teacher, labels, ce_normalizer=two, backend=backend, **keywords)
    alone = {"kd_weight": 0.0, "ce_weight": 1.0, "ce_normalizer": 2.0, "backend": backend}
    wanted = run(student, teacher, labels, **alone)
    torch.testing.assert_close((*ours[0], ours[1]), (*wanted[0], wanted[1]))


# What others make of the operators


@pytest.mark.parametrize("loss", ["dense", "hidden"])
def test_compiled_call_is_compiled_once_for_any_normalizer(backend, device, loss):
    student, teacher = logits_pair((4, 19), device=device)
    leaf = student.requires_grad_()
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=keep)
    def compiled(n):
        if loss == "hidden":
            return hidden_cosine_loss(leaf, teacher, normalizer=n, backend=backend)
        return distillation_loss(leaf, teacher, kd_normalizer=n, backend=backend).loss

    torch.compiler.reset()
    one = compiled(1.0)
    for n in (2.5, 3.5, 4.25, 7.125):
        torch.testing.assert_close(compiled(n), one / n)
    assert len(graphs) <= 2  # for a number, and for any


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_recorded_graph_holds_the_gradients_scaling(backend, device, reduction):
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes no recorded tensors")
    student, teacher = logits_pair((4, 19), device=device)
    upstream = torch.tensor([2.0, 3.0, 4.0, 5.0], device=device)

    def gradient(x):
        x = x.detach().requires_grad_()
        loss = distillation_loss(x, teacher, reduction=reduction, backend=backend).loss
        return torch.autograd.grad(loss, x, upstream if reduction == "none" else upstream[0])[0]

    recorded = torch.fx.experimental.proxy_tensor.make_fx(gradient)(student)
    other = student * 0.5
    torch.testing.assert_close(recorded(other), gradient(other))


@pytest.mark.parametrize("n", [1e39, 1e-40])
def test_normalizer_that_fp32_does_not_have_is_refused(backend, device, n):
    student, teacher = logits_pair((4, 19), device=device)
    with pytest.raises(ValueError, match=r"kd_normalizer: expected 0 or a number from"):
        distillation_loss(student, teacher, kd_normalizer=n, backend=backend)
