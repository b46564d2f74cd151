"""Near the teacher, where a distillation ends: small divergences, and heads close together.

Two softmaxes that nearly cancel. What counts here is the error relative to the divergence itself
and to its own gradient, down to 1e-6 nats, against float64 of the same inputs.
"""

from __future__ import annotations

import math

import pytest
import torch
from oracle import BF16, DIVERGENCES, FP16, FP32, IGNORE, INF, MODES, Rows, divergence_rows, read
from torch import Tensor

from distilfast import distillation_loss, linear_distillation_loss
from distilfast.losses import backends, products

NOISES = (1e-3, 3e-3, 0.02, 0.15, 0.6)  # of logits; a KL of 4e-7 to 0.2 nats, a JSD of a fifth


def exact(student: Tensor, teacher: Tensor, divergence: str, temperature: float, beta=0.5) -> Rows:
    """The divergence of each row times T^2 and its gradient, in float64."""
    return divergence_rows(student.double(), teacher.double(), temperature, divergence, beta)


def relative(got: Tensor, wanted: Tensor) -> float:
    """The norm of the difference over that of the exact one."""
    return float((got.double() - wanted).norm() / wanted.norm())


def check_small(student, teacher, beta=0.5, *, worst, **keywords):
    """Rows and gradient of distillation_loss, relative to the small divergence itself."""
    wanted = exact(student, teacher, keywords["divergence"], keywords["temperature"], beta)
    leaf = student.clone().requires_grad_()
    found = distillation_loss(leaf, teacher, jsd_beta=beta, reduction="none", **keywords)
    assert ((found.kd.double() - wanted.value).abs() <= 1e-3 * wanted.value).all()
    (got,) = torch.autograd.grad(found.loss.sum(), leaf)
    assert got.isfinite().all()
    assert relative(got, wanted.grad) < worst
    return wanted.value


# --- Dense logits -------------------------------------------------------------------------------


def pair(noise: float, vocab: int = 1003, rows: int = 6, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(int(1 / noise))
    teacher = 3 * torch.randn(rows, vocab, generator=generator)
    student = teacher + noise * torch.randn(rows, vocab, generator=generator)
    return [student.to(device), teacher.to(device)]


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergence_keeps_its_digits(backend, device, divergence, noise, temperature):
    student, teacher = pair(noise, device=device)
    keywords = {"divergence": divergence, "temperature": temperature, "backend": backend}
    assert (check_small(student, teacher, 0.3, worst=2e-5, **keywords) > 2e-8).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=["bf16", "fp16", "fp32"])
def test_equal_logits_are_no_divergence_at_all(backend, device, dtype, divergence):
    _, teacher = pair(1.0, device=device)
    teacher = teacher.to(dtype)
    teacher[:, 5::7] = -INF
    student = teacher.clone().requires_grad_()
    keywords = {"divergence": divergence, "reduction": "none", "backend": backend}
    found = distillation_loss(student, teacher, **keywords)
    assert (found.kd == 0).all()
    (gradient,) = torch.autograd.grad(found.loss.sum(), student)
    assert (gradient == 0).all()
    # nor are logits that a constant lies between, which no softmax sees
    apart = distillation_loss(teacher + 2.0, teacher, **keywords)
    assert (apart.kd >= 0).all()
    assert apart.kd.max() < (1e-9 if dtype == FP32 else 1e-2)


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("seed", range(3))
def test_divergence_is_never_negative(backend, device, divergence, seed):
    # nor is one of a row that is nearly one token's, whose sums have few terms
    generator = torch.Generator().manual_seed(seed)
    for noise in (1e-7, 1e-5, 1e-4):
        teacher = 8 * torch.randn(8, 300, generator=generator)
        teacher[::2, 17] += 40
        student = teacher + noise * torch.randn(8, 300, generator=generator)
        keywords = {"divergence": divergence, "reduction": "none", "backend": backend}
        found = distillation_loss(student.to(device), teacher.to(device), **keywords)
        assert (found.kd >= 0).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergence_with_few_columns_far_apart_keeps_its_digits(backend, device, divergence):
    # beyond the range of the series, on either side, and next to nothing in sum
    student, teacher = pair(3e-3, device=device)
    for column, gap in ((3, 0.2), (40, -0.3), (500, 2.0), (501, -2.0), (999, 9.0)):
        teacher[:, column] = teacher.amax(-1) - 14.0
        student[:, column] = teacher[:, column] + gap
    keywords = {"divergence": divergence, "temperature": 1.0, "backend": backend}
    check_small(student, teacher, worst=1e-3, **keywords)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_small_divergence_with_excluded_columns_keeps_its_digits(backend, device, divergence):
    # excluded by both they add nothing; by the teacher alone the student's share counts
    student, teacher = pair(3e-3, device=device)
    student[:, 1::5] = teacher[:, 1::5] = -INF
    if divergence != "reverse_kl":  # infinite there
        teacher[:, 2] = -INF
        student[:, 2] = student[:, 3:].amax(-1) - 12.0
    keywords = {"divergence": divergence, "temperature": 1.0, "backend": backend}
    assert (check_small(student, teacher, worst=1e-3, **keywords) < 0.01).all()


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_label_beside_a_small_divergence_adds_its_own_gradient(backend, device, divergence):
    student, teacher = pair(3e-3, device=device)
    labels = torch.tensor([0, 1002, IGNORE, 7, 7, IGNORE], device=device)
    keywords = {"divergence": divergence, "reduction": "sum", "backend": backend}
    gradients = []
    for weights in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        leaf = student.clone().requires_grad_()
        named = dict(zip(("kd_weight", "ce_weight"), weights, strict=True))
        loss = distillation_loss(leaf, teacher, **read(labels=labels, **named), **keywords).loss
        gradients.append(torch.autograd.grad(loss, leaf)[0])
    torch.testing.assert_close(gradients[2], gradients[0] + gradients[1], rtol=1e-4, atol=1e-7)


def test_saturated_jsd_keeps_its_gradient(backend, device):
    # both sides' mass in different columns: log(q / m) is nearly the same everywhere
    if backend == "triton" and device == "cpu":
        pytest.skip("the interpreter takes long")
    generator = torch.Generator().manual_seed(3)
    student, teacher = (4 * torch.randn(4, 50_257, generator=generator) for _ in range(2))
    wanted = exact(student, teacher, "jsd", 0.7)
    leaf = student.to(device).requires_grad_()
    keywords = {"divergence": "jsd", "temperature": 0.7, "backend": backend}
    found = distillation_loss(leaf, teacher.to(device), reduction="none", **keywords)
    torch.testing.assert_close(found.kd.double().cpu(), wanted.value, rtol=1e-5, atol=0)
    (got,) = torch.autograd.grad(found.loss.sum(), leaf)
    assert relative(got.cpu(), wanted.grad) < 3e-4


# --- The fused head -----------------------------------------------------------------------------


@pytest.fixture(params=["here", "bf16 products"])
def machine(request):
    """This machine's products, and those of one that multiplies bf16."""
    if request.param != "here" and products.multiplies_bf16():
        pytest.skip("it is this machine")
    return request.param


def as_on(machine, monkeypatch):
    if machine != "here":
        monkeypatch.setattr(products, "multiplies_bf16", lambda: True)


def head_pair(
    noise: float, shared: bool, bias: bool, dtype=BF16, width: int = 32, vocab: int = 211
):
    """Hidden states, weight and bias of a teacher, and of a student that is it and some noise."""
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=generator)).to(dtype)

    hidden, weight = draw(24, width), draw(vocab, width, scale=3 / math.sqrt(width))
    offset = draw(vocab) if bias else None
    near = (hidden.float() + noise * torch.randn(24, width, generator=generator)).to(dtype)
    other = weight.clone()
    if not shared:
        change = noise * 3 / math.sqrt(width) * torch.randn(vocab, width, generator=generator)
        other = (weight.float() + change).to(dtype)
    return (near, other, offset), (hidden, weight, offset)


def exact_head(student, teacher, divergence: str, temperature: float, scale=1.0, softcap=None):
    """Loss and gradients of hidden states, weight and bias in float64 of the same inputs."""
    leaves = [None if x is None else x.double().requires_grad_() for x in student]

    def logits(hidden, weight, bias):
        made = hidden @ weight.T
        made = scale * (made if bias is None else made + bias)
        return made if softcap is None else softcap * torch.tanh(made / softcap)

    given = [None if x is None else x.double() for x in teacher]
    loss = exact(logits(*leaves), logits(*given), divergence, temperature).value.mean()
    return loss.detach(), torch.autograd.grad(loss, [x for x in leaves if x is not None])


def fused(student, teacher, divergence: str, temperature: float, device: str, **keywords):
    """(kd, gradients); of several teachers the tensors are lists."""
    leaves = [None if x is None else x.detach().to(device).requires_grad_() for x in student]
    given = [
        [x.to(device) for x in xs] if isinstance(xs, list) else xs if xs is None else xs.to(device)
        for xs in teacher
    ]
    keywords |= {"divergence": divergence, "temperature": temperature}
    keywords |= {"student_bias": leaves[2], "teacher_bias": given[2]}
    found = linear_distillation_loss(*leaves[:2], *given[:2], **keywords)
    gradients = torch.autograd.grad(found.loss, [x for x in leaves if x is not None])
    return found.kd.double().cpu(), [g.cpu() for g in gradients]


def check_head(
    student,
    teacher,
    device,
    divergence="forward_kl",
    temperature=1.0,
    *,
    worst_loss=1e-3,
    worst=5e-3,
    twice=False,
    **keywords,
):
    """The fused head, relative to the small divergence. The gradient of the logits is rounded to
    bf16 on its way, element by element."""
    head = (keywords.get("logit_scale", 1.0), keywords.get("logit_softcap"))
    wanted, gradients = exact_head(student, teacher, divergence, temperature, *head)
    assert wanted >= 1e-7, "the inputs are equal"
    if twice:
        teacher = [[x, x] for x in teacher]
    kd, got = fused(student, teacher, divergence, temperature, device, **keywords)
    assert abs(kd - wanted) <= worst_loss * wanted
    for a, b in zip(got, gradients, strict=True):
        assert relative(a, b) < worst


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("shared", [True, False], ids=["one head", "two heads"])
@pytest.mark.parametrize("noise", [0.003, 0.05, 0.5])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_head_is_exact_near_the_teacher(
    backend, device, machine, monkeypatch, divergence, temperature, noise, shared, bias
):
    as_on(machine, monkeypatch)
    sides = head_pair(noise, shared, bias)
    check_head(*sides, device, divergence, temperature, backend=backend)


def test_fp16_head_is_exact_near_the_teacher(backend, device):
    check_head(*head_pair(0.02, True, False, dtype=FP16), device, backend=backend)


@pytest.mark.parametrize(("scale", "softcap"), [(0.5, None), (1.0, 5.0)], ids=["scale", "softcap"])
@pytest.mark.parametrize("chunk_rows", [7, "auto"])
def test_scaled_and_capped_head_is_exact_near_the_teacher(
    backend, device, machine, monkeypatch, scale, softcap, chunk_rows
):
    as_on(machine, monkeypatch)
    keywords = {"logit_scale": scale, "logit_softcap": softcap, "chunk_rows": chunk_rows}
    # a chunk's share of the weight's gradient may be rounded to bf16
    check_head(*head_pair(0.02, True, True), device, worst=6e-3, backend=backend, **keywords)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_rounded_logits_are_taken_where_they_are_asked_for(
    backend, device, machine, monkeypatch, bias
):
    as_on(machine, monkeypatch)
    # and cost what the documentation says: near the teacher the gradient
    student, teacher = head_pair(0.02, True, bias)
    _, gradients = exact_head(student, teacher, "forward_kl", 1.0)
    keywords = {"backend": backend, "logits_dtype": BF16}
    _, got = fused(student, teacher, "forward_kl", 1.0, device, **keywords)
    assert 0.05 < relative(got[0], gradients[0]) < 3
    # far from it they are good enough
    student, teacher = head_pair(1.0, False, bias)
    wanted, gradients = exact_head(student, teacher, "forward_kl", 1.0)
    kd, got = fused(student, teacher, "forward_kl", 1.0, device, **keywords)
    assert abs(kd - wanted) <= 0.01 * wanted
    assert relative(got[0], gradients[0]) < 0.03


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [0.01, 0.1])
def test_split_of_the_rows_changes_a_small_divergence_by_less_than_1e_5(
    backend, device, divergence, noise
):
    # as micro-batches and ranks split a step of a student that begins with its teacher's layers
    sides = ([x.to(device) for x in side] for side in head_pair(noise, True, True, dtype=FP32))
    (hidden, weight, bias), (given, other, offset) = sides
    keywords = {"divergence": divergence, "kd_normalizer": 24.0, "backend": backend}
    keywords |= {"student_bias": bias, "teacher_bias": offset}
    whole, *splits = (
        sum(
            linear_distillation_loss(s, weight, t, other, **keywords).kd.item()
            for s, t in zip(hidden.split(size), given.split(size), strict=True)
        )
        for size in (24, 7, 1)
    )
    assert whole > 0
    assert splits == pytest.approx([whole] * 2, rel=1e-5)


def test_logits_dtype_is_for_the_side_of_that_dtype_alone(backend, device):
    # a teacher of bf16 keeps its fp32 logits where the student's fp16 is asked for
    student, _ = head_pair(0.5, True, False, dtype=FP16)
    _, teacher = head_pair(0.5, True, False, dtype=BF16)
    keywords = {"divergence": "forward_kl", "temperature": 1.0, "backend": backend}
    sides = [x.to(device) for x in (*student[:2], *teacher[:2])]
    asked = linear_distillation_loss(*sides, logits_dtype=FP16, **keywords).kd
    exact = [h.double() @ w.double().T for h, w in (student[:2], teacher[:2])]
    wanted = distillation_loss(exact[0].to(FP16).double(), exact[1], temperature=1.0).kd
    torch.testing.assert_close(asked.double().cpu(), wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("dtype", [BF16, FP32, torch.float64], ids=["bf16", "fp32", "fp64"])
@pytest.mark.parametrize("wanted", [FP16, torch.float64, torch.int64, "bf16"], ids=str)
def test_wrong_dtype_of_the_logits_is_refused(dtype, wanted):
    student, teacher = head_pair(0.1, True, False, dtype=dtype)
    with pytest.raises(ValueError, match=r"logits_dtype: expected None or torch.float32"):
        linear_distillation_loss(*student[:2], *teacher[:2], logits_dtype=wanted)


@pytest.mark.parametrize("mode", MODES)
def test_ensemble_of_one_teacher_twice_is_exact_near_it(
    backend, device, machine, monkeypatch, mode
):
    as_on(machine, monkeypatch)
    keywords = {"twice": True, "worst_loss": 2e-3, "ensemble": mode, "backend": backend}
    check_head(*head_pair(0.02, True, True), device, **keywords)


@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_head_of_several_blocks_is_exact_near_the_teacher(backend, device, monkeypatch, bias):
    # of 64 columns, the last of them not whole
    monkeypatch.setattr(products, "BLOCK_BYTES", 1)
    check_head(*head_pair(0.05, False, bias), device, backend=backend)


def test_capped_ensemble_of_rounded_logits_is_capped_in_fp32(backend, device):
    # not in the memory of the rounded products
    student, teacher = head_pair(1.0, False, False)
    twice = [[x.to(device)] * 2 for x in teacher[:2]]
    keywords = {"logit_softcap": 3.0, "logits_dtype": BF16, "backend": backend}
    own = [x.to(device) for x in student[:2]]
    one = linear_distillation_loss(*own, *(x[0] for x in twice), **keywords).kd
    two = linear_distillation_loss(*own, *twice, **keywords).kd
    torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


def test_settings_of_the_process_are_left_as_they_were(backend, device, monkeypatch):
    if device != "cpu":
        pytest.skip("a CPU's setting")
    monkeypatch.setattr(products, "multiplies_bf16", lambda: True)
    student, teacher = head_pair(0.02, True, True)
    settings = torch.backends.mkldnn.matmul
    found = settings.fp32_precision
    try:
        for before in ("none", "ieee"):
            settings.fp32_precision = before
            fused(student, teacher, "forward_kl", 1.0, device, backend=backend)
            assert settings.fp32_precision == before
            with pytest.raises(RuntimeError), products._multiplying_in_bf16(True):
                raise RuntimeError
            assert settings.fp32_precision == before
    finally:
        settings.fp32_precision = found


# --- Statistics ---------------------------------------------------------------------------------


def wanted_statistics(student: Tensor, teacher: Tensor, temperature: float) -> list[Tensor]:
    entropies = []
    for x in (student, teacher):
        log_p = (x.double() / temperature).log_softmax(-1)
        entropies.append(-(log_p.exp() * log_p.masked_fill(log_p == -INF, 0)).sum(-1))
    agreement = student.argmax(-1) == teacher.argmax(-1)
    return [*entropies, agreement.double()]


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("noise", [3e-3, 0.5, 3.0])
@pytest.mark.parametrize("vocab", [5, 1003, 4100])
def test_statistics_are_the_softmaxes(backend, device, divergence, noise, vocab):
    student, teacher = pair(noise, vocab=vocab, rows=6, device=device)
    student[:, 3] = teacher[:, 3] = -INF
    student[0, -1] = teacher[0, -1] = 40.0  # the last column's
    mask = torch.tensor([1.0, 1.0, 0.0, 0.5, 1.0, 1.0], device=device)
    labels = torch.zeros(6, dtype=torch.int64, device=device)  # each row counts for something
    keywords = {"divergence": divergence, "ce_weight": 1.0, "mask": mask, "backend": backend}
    plain = distillation_loss(student, teacher, labels, **keywords)
    found = distillation_loss(student, teacher, labels, statistics=True, **keywords)
    assert torch.equal(found.loss, plain.loss)
    assert len(plain) == 5
    for got, wanted in zip(found[5:], wanted_statistics(student, teacher, 2.0), strict=True):
        wanted = wanted.masked_fill(mask == 0, 0)
        torch.testing.assert_close(got.double(), wanted, rtol=1e-4, atol=1e-5)
        assert not got.requires_grad
    assert 0 < found.agreement.sum() <= 5


def test_first_of_equal_largest_logits_counts(backend, device):
    # in other tiles, vectors and threads, or in the same
    columns = [
        ([1, 600], [1, 30], 1.0),
        ([1, 257], [1, 30], 1.0),
        ([1, 600], [30, 600], 0.0),
        ([17, 18], [17, 650], 1.0),
        ([17], [18], 0.0),
    ]
    student, teacher = torch.zeros(5, 700, device=device), torch.zeros(5, 700, device=device)
    for row, (of_student, of_teacher, _) in enumerate(columns):
        student[row, of_student] = teacher[row, of_teacher] = 2.0
    found = distillation_loss(student, teacher, statistics=True, backend=backend)
    assert found.agreement.tolist() == [agreement for *_, agreement in columns]


def test_row_with_a_nan_has_no_statistics(backend, device):
    student, teacher = pair(0.5, vocab=300, device=device)
    student[1, 7] = math.nan
    teacher[2, 9] = math.nan
    found = distillation_loss(student, teacher, statistics=True, backend=backend)
    unknown = found.agreement.isnan()
    assert unknown.tolist() == [False, True, True, False, False, False]
    assert (found.student_entropy + found.teacher_entropy).isnan().tolist() == unknown.tolist()


@pytest.mark.parametrize("chunk_rows", [5, "auto"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_statistics_of_a_head_are_those_of_its_softmaxes(backend, device, chunk_rows, reduction):
    student, teacher = head_pair(0.4, False, True)
    shaped = [student[0].reshape(4, 6, -1), teacher[0].reshape(4, 6, -1)]
    mask = torch.ones(4, 6, dtype=torch.bool, device=device)
    mask[0, 1] = False
    found = linear_distillation_loss(
        shaped[0].to(device).requires_grad_(),
        student[1].to(device),
        shaped[1].to(device),
        teacher[1].to(device),
        student_bias=student[2].to(device),
        teacher_bias=teacher[2].to(device),
        mask=mask,
        chunk_rows=chunk_rows,
        reduction=reduction,
        statistics=True,
        backend=backend,
    )
    logits = [h.double() @ w.double().T + b.double() for h, w, b in (student, teacher)]
    for got, wanted in zip(found[5:], wanted_statistics(*logits, 2.0), strict=True):
        assert got.shape == (4, 6)
        wanted = wanted.reshape(4, 6).masked_fill(~mask.cpu(), 0)
        torch.testing.assert_close(got.double().cpu(), wanted, rtol=1e-3, atol=1e-4)
    found.loss.sum().backward()


def test_statistics_need_soft_targets(backend, device):
    student, teacher = pair(0.5, vocab=30, device=device)
    labels = torch.zeros(6, dtype=torch.int64, device=device)
    keywords = {"kd_weight": 0.0, "ce_weight": 1.0, "statistics": True, "backend": backend}
    with pytest.raises(ValueError, match="statistics: needs kd_weight > 0"):
        distillation_loss(student, teacher, labels, **keywords)
    with pytest.raises(ValueError, match="statistics: expected True or False, got 1"):
        distillation_loss(student, teacher, statistics=1, backend=backend)


def test_every_backend_says_how_it_takes_narrow_gradients():
    assert {name: b.overwrites for name, b in backends.BACKENDS.items()} == {
        "triton": False,
        "cpp": True,
        "torch": True,
    }
