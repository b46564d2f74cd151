"""What a fused head leaves to the loss kernels: bias, scale and softcap, and the bias' gradient."""

from __future__ import annotations

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
    NAN,
    PARTS,
    assert_within,
    expect,
    logits_pair,
    make_labels,
    make_mask,
)

from distilfast.losses import backends
from distilfast.losses.reference import Options

EPSILON = {FP32: 1e-5, FP16: 2**-10, BF16: 2**-7}
KD_AND_CE = {"kd_weight": 5.0, "ce_weight": 2.0, "cos_weight": 0.0, "mse_weight": 0.0}


@pytest.fixture(autouse=True)
def as_in_a_chunk(monkeypatch):
    """The torch backend in blocks of a few rows: its sums go over several calls, too."""
    monkeypatch.setattr(backends, "BLOCK_ELEMENTS", {"cpu": 4000, "cuda": 4000})


def call(
    backend, student, teacher, labels=None, mask=None, heads=None, *, bias_gradient=None, **keywords
):
    """(rows, gradient in place of a copy of student) of the backend's own function."""
    values = {"temperature": 2.0, **KD_AND_CE, "jsd_beta": 0.3, "divergence": "forward_kl"}
    values |= {"ignore_index": IGNORE, "vocab_size": student.shape[1], **keywords}
    heads = backends.reference.PLAIN if heads is None else heads
    gradient = student.clone()
    by = [torch.ones((), device=student.device)] * 2
    rest = Options(**values), gradient, heads, bias_gradient
    kernel = backends.BACKENDS[backend].distillation
    return kernel(gradient, teacher, labels, mask, *by, *rest), gradient


def logits64(x, head):
    y = x.double() if head.bias is None else x.double() + head.bias.double()
    y = head.scale * y
    return head.softcap * torch.tanh(y / head.softcap) if head.softcap else y


def slope64(y, head):
    return head.scale * (1 - (y / head.softcap) ** 2 if head.softcap else torch.ones_like(y))


def check(backend, student, teacher, labels, mask, heads, **keywords):
    """Losses, gradient and bias gradient against the oracle's, in float64."""
    vocab = keywords.get("vocab_size", student.shape[1])
    s, t = (logits64(x[:, :vocab], h) for x, h in zip((student, teacher), heads, strict=True))
    wanted = {**KD_AND_CE, "jsd_beta": 0.3, **keywords}
    wanted.pop("vocab_size", None)
    expected = expect(s, t, labels, mask=mask, reduction="none", dtype=student.dtype, **wanted)
    slope = slope64(s, heads[0]).cpu()
    exact = expected.grad * slope
    start = torch.arange(vocab, dtype=FP32, device=student.device) / vocab
    sums = start.clone()
    rows, gradient = call(
        backend, student, teacher, labels, mask, heads, bias_gradient=sums, **keywords
    )
    for part, ours in zip(PARTS, rows, strict=True):
        # twice: a logit is made here, with roundings of its own
        assert_within(part, ours, expected.value[part], 2 * expected.slack[part] + 1e-6)
    room = EPSILON[student.dtype] * exact.abs().amax(1, keepdim=True)
    room = room + 2 * expected.grad_slack * slope.abs().amax(1, keepdim=True) + 1e-9
    off = (gradient[:, :vocab].cpu().double() - exact).abs()
    assert (off <= room).all(), (off / room).max()
    assert (gradient[:, vocab:] == 0).all()
    # Summed before it is rounded, so that fp32's own budget holds; triton's comes from the rounded.
    epsilon = 1e-5 if backend != "triton" else EPSILON[student.dtype]
    room = epsilon * exact.abs().amax(1).sum() + 1e-6
    off = ((sums - start).cpu().double() - exact.sum(0)).abs()
    assert (off <= room).all(), (off / room).max()


def heads_of(vocab, device, *, scale=1.0, softcap=0.0, bias=False):
    """Of student and teacher, not the same."""
    biases = [None, None]
    if bias:
        generator = torch.Generator().manual_seed(5)
        biases = [torch.randn(vocab, generator=generator).to(device) for _ in range(2)]
    head = backends.reference.Head  # or a mutated one
    other = (2 * scale if scale != 1 else 1.0, softcap and softcap + 1)
    return head(scale, softcap, biases[0]), head(*other, biases[1])


HEADS = {
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 4.0},
    "both": {"scale": 1.7, "softcap": 3.0},
    "bias": {"bias": True},
    "all": {"scale": 0.6, "softcap": 5.0, "bias": True},
}


def heads_for(backend, name, vocab, device):
    if "bias" in HEADS[name] and backend == "triton":
        pytest.skip("a GPU's product adds the bias")
    return heads_of(vocab, device, **HEADS[name])


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("name", HEADS)
def test_parity_with_the_oracle(backend, device, name, divergence, dtype):
    # 70 rows: more than the blocks that a bias' gradient is summed in, of two rows then;
    # 203 columns: whole vectors and a rest at every width
    lead, vocab = (70,), 203
    if backend == "triton":
        lead = (9,)
    student, teacher = (x.to(dtype) for x in logits_pair((*lead, vocab), device=device))
    labels, mask = make_labels(lead, vocab, "some", device), make_mask(lead, "float", device)
    heads = heads_for(backend, name, vocab, device)
    check(backend, student, teacher, labels, mask, heads, divergence=divergence, **ALL_PARTS)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16), (FP16, BF16)], ids=str)
@pytest.mark.parametrize("name", HEADS)
def test_dtypes_of_the_sides_may_differ(backend, device, name, dtypes):
    vocab = 50
    pair = logits_pair((4, vocab), device=device)
    student, teacher = (x.to(dtype) for x, dtype in zip(pair, dtypes, strict=True))
    labels = make_labels((4,), vocab, "some", device)
    check(backend, student, teacher, labels, None, heads_for(backend, name, vocab, device))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.7])
@pytest.mark.parametrize("name", HEADS)
def test_parity_at_every_temperature_beside_padding(backend, device, name, temperature):
    # CE from a power of the same exponential, and from one of its own; padding holds NaN
    vocab = 40
    student, teacher = logits_pair((6, 48), device=device)
    student[:, vocab:], teacher[:, vocab:] = NAN, INF
    labels = make_labels((6,), vocab, "all", device)
    heads = heads_for(backend, name, vocab, device)
    keywords = {"temperature": temperature, "vocab_size": vocab}
    check(backend, student, teacher, labels, None, heads, **keywords)
    check(backend, student, teacher, labels, None, heads, **keywords, kd_weight=0.0)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_parity_of_rows_longer_than_the_first_columns(backend, device, divergence):
    # past the columns from which C++ takes its first guess of a maximum, and past Triton's tile
    vocab = 2500
    student, teacher = logits_pair((2, vocab), device=device)
    student[0, 2400], teacher[1, 2450] = 300.0, 200.0  # the maximum comes late
    labels = torch.tensor([2400, 3], device=device)
    for name in ("scale", "all") if backend != "triton" else ("scale",):
        heads = heads_for(backend, name, vocab, device)
        for mask in (None, torch.tensor([1.0, 0.5], device=device)):
            check(backend, student, teacher, labels, mask, heads, divergence=divergence)


@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_parity_of_capped_large_small_and_infinite_products(backend, device, softcap):
    # the bend, what is flat, what is nearly a line (where 1 - 2 / (1 + e^2y) cancels), both ends
    values = [0.0, 1e-6, -1e-3, 0.1, -0.24, 0.26, 1.0, -9.0, 88.0, -89.0, 500.0, -3e38, INF, -INF]
    student = torch.tensor([[softcap * x for x in values]], device=device)
    teacher = student.flip(1).contiguous()
    head = backends.reference.Head(1.0, softcap)
    keywords = {"cos_weight": 1.0, "mse_weight": 1.0, "kd_weight": 1.0, "ce_weight": 1.0}
    labels = torch.tensor([6], device=device)
    check(backend, student, teacher, labels, None, (head, head), **keywords)
    # a logit near 0 keeps its digits: the squared error of one against 0
    small = torch.tensor([[1e-5 * softcap, 0.0]], device=device)
    keywords = {"heads": (head, head), "kd_weight": 0.0, "ce_weight": 0.0, "mse_weight": 1.0}
    rows, _ = call(backend, small, torch.zeros_like(small), **keywords)
    assert abs(rows[3].item() / (1e-5 * softcap) ** 2 - 1) < 1e-5


@pytest.mark.parametrize("name", HEADS)
def test_rows_that_nothing_needs_add_nothing(backend, device, name):
    # neither to the gradient nor to the bias'
    vocab = 37
    student, teacher = logits_pair((5, vocab), device=device)
    labels = torch.tensor([IGNORE, 4, IGNORE, 5, IGNORE], device=device)
    mask = torch.tensor([0.0, 0.0, 1.0, 2.0, 0.0], device=device)
    student[0], teacher[0], teacher[1], student[4] = NAN, NAN, INF, INF
    heads = heads_for(backend, name, vocab, device)
    sums = torch.zeros(vocab, device=device)
    rows, gradient = call(backend, student, teacher, labels, mask, heads, bias_gradient=sums)
    assert (rows[:, [0, 4]] == 0).all()
    assert (gradient[[0, 4]] == 0).all()
    assert rows.isfinite().all()
    torch.testing.assert_close(sums, gradient.sum(0), rtol=1e-5, atol=1e-5)
    assert gradient[[1, 2, 3]].abs().amax(1).min() > 0


def test_bias_gradient_is_added_to_and_not_only_by_whole_blocks(backend, device):
    # rows around the 64 blocks of the C++ kernels and their remainders
    if backend == "triton":
        pytest.skip("a sum of PyTorch's")
    for n_rows in (1, 63, 64, 65, 129, 200):
        student, teacher = logits_pair((n_rows, 9), device=device)
        sums = torch.full((9,), 7.0, device=device)
        _, gradient = call(backend, student, teacher, bias_gradient=sums, ce_weight=0)
        torch.testing.assert_close(sums - 7, gradient.sum(0), rtol=1e-5, atol=1e-5)


def test_bias_gradient_does_not_depend_on_the_number_of_threads(backend, device):
    if backend != "cpp":
        pytest.skip("the C++ kernels' own promise")
    student, teacher = logits_pair((300, 501))
    results = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3, 1):
        torch.set_num_threads(threads)
        sums = torch.zeros(501)
        call(backend, student, teacher, bias_gradient=sums, ce_weight=0)
        results.append(sums)
    torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])
