"""What the launchers of the kernels have in common, Triton's and for each instruction set C++'s."""

from __future__ import annotations

import pytest
import torch
from conftest import backends_and_levels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_calls import (
    assert_nothing_else_was_written,
    check_combination,
    check_hidden,
    check_launch,
    hole,
    launch,
    placed,
    some_labels,
)
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
    assert_same,
    logits_pair,
)

from distilfast.losses import backends

pytestmark = pytest.mark.parametrize(
    "backend", [name for name in backends_and_levels() if name != "torch"], indirect=True
)


# distillation


def test_labels_mask_and_scales_may_have_any_stride(backend, device):
    # every other element, and one for all: neither is dense
    student, teacher = logits_pair((5, 40), device=device)
    labels = some_labels(5, 40, device).repeat_interleave(2)[::2]
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0], device=device).repeat_interleave(2)[::2]
    assert labels.stride() == mask.stride() == (2,)
    gradient = hole(5, 40, FP32, device)
    by = torch.tensor([1.0, -2.0, 0.0, 0.25, 3.0], device=device)
    for scale in (1.0, by, by.repeat_interleave(3)[::3], by[1].expand(5)):
        keywords = {"gradient": gradient.fill_(NAN), "scale": scale, **ALL_PARTS}
        check_launch(backend, student, teacher, labels, mask, **keywords)
    if backend == "cpp":  # its launcher takes rows of any stride, too
        check_launch(backend, student.T.contiguous().T, teacher, gradient=gradient)
        check_launch(backend, student, teacher[:1].expand(5, 40), gradient=gradient)


@pytest.mark.parametrize("label", [-1, 300, 303, 2**31, 2**40 + 3, -(2**40), -(2**63)])
def test_wrong_label_makes_its_own_row_nan_and_no_other(backend, device, label):
    # nobody looks at labels before a GPU does; 300 and 303 are in the padding of a wider head
    student, teacher = logits_pair((5, 304), dtypes=(BF16, BF16), device=device)
    labels = torch.tensor([7, 8, IGNORE, 299, 0], device=device)
    mask = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0], device=device)
    for row, weights in ((1, ALL_PARTS), (2, ALL_PARTS), (2, {"kd_weight": 0.0, "ce_weight": 1.0})):
        clean, wrong = (hole(5, 304, BF16, device) for _ in range(2))
        keywords = {"vocab_size": 300, **weights}
        wanted = launch(backend, student, teacher, labels, mask, gradient=clean, **keywords)
        spoilt = labels.clone()
        spoilt[row] = label
        parts = launch(backend, student, teacher, spoilt, mask, gradient=wrong, **keywords)
        assert parts[1].isnan().tolist() == [i == row for i in range(5)]
        assert wrong[row, :300].isnan().all()
        assert (wrong[:, 300:] == 0).all()
        others = [i for i in range(5) if i != row]
        assert_same([parts[:, others], wrong[others]], [wanted[:, others], clean[others]])
        assert_same([parts[[0, 2, 3]]], [wanted[[0, 2, 3]]])  # its other parts are what they were
        assert_nothing_else_was_written(wrong)


EVALUATED = {
    "cpp": ((FP32, 69), (BF16, 2117), (FP16, 700)),  # whole vectors, and a late maximum
    "triton": ((BF16, 669),),  # several tiles
}


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_launch_without_a_gradient_loses_nothing_and_writes_nothing(backend, device, divergence):
    # evaluation: padding, rows that nothing needs
    for dtype, vocab in EVALUATED[backend]:
        pair = logits_pair((5, vocab + 31), dtypes=(dtype, dtype), device=device)
        student, teacher = (placed(x) for x in pair)
        labels = torch.tensor([0, IGNORE, vocab - 1, IGNORE, 5], device=device)
        mask = torch.tensor([1.0, 0.0, 0.0, 0.5, 2.0], device=device)
        inputs = student, teacher, labels, mask
        before = [x.clone() for x in inputs]
        keywords = {"vocab_size": vocab, "divergence": divergence, **ALL_PARTS}
        wanted = launch(backend, *inputs, gradient=torch.empty_like(student), **keywords)
        parts = launch(backend, *inputs, gradient=None, **keywords)
        # Triton's is another kernel, which a compiler may sum otherwise
        room = 0 if backend == "cpp" else 1e-6
        torch.testing.assert_close(parts, wanted, rtol=room, atol=room)
        assert_same(inputs, before)
        assert_nothing_else_was_written(student)
        assert_nothing_else_was_written(teacher)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_nan_in_a_row_is_not_taken_for_a_zero_vector(backend, device, side):
    # one side has no direction, the other is not a number
    student, teacher = logits_pair((2, 20), device=device)
    (student if side == "teacher" else teacher)[0] = 0
    (student if side == "student" else teacher)[0, 3] = NAN
    gradient, hidden = hole(2, 20, FP32, device), hole(2, 20, FP32, device)
    weights = {"kd_weight": 0.0, "cos_weight": 1.0}
    parts = launch(backend, student, teacher, gradient=gradient, **weights)
    one = torch.ones((), device=device)
    rows = backends.BACKENDS[backend].hidden_cosine([student], [teacher], None, one, [hidden])
    for values, slopes in ((parts[2], gradient), (rows, hidden)):
        assert values.isnan().tolist() == [True, False]
        assert slopes.isnan().all(-1).tolist() == [True, False]


@pytest.mark.thorough
@settings(
    max_examples=120,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_parity_of_drawn_launches(backend, device, data):
    draw, few = data.draw, backend == "triton"  # interpreted
    n_rows = draw(st.integers(1, 4) if few else st.integers(0, 9), label="rows")
    # around one and several tiles of 1 and 2 warps
    near_a_tile = st.tuples(st.sampled_from([256, 512, 1024, 2560]), st.integers(-9, 9)).map(sum)
    vocabs = st.one_of(st.integers(1, 40), near_a_tile) if few else st.integers(1, 200)
    vocab = draw(vocabs, label="vocab")
    dtypes = draw(st.tuples(*[st.sampled_from([FP32, FP16, BF16])] * 2), label="dtypes")
    width = vocab + draw(st.sampled_from([0, 0, 1, 8, 30, 300]), label="padding")
    layout = st.tuples(st.sampled_from([0, 0, 1, 3, 8]), st.just(0) | st.integers(0, 16))
    layouts = [draw(layout, label=name) for name in ("student", "teacher", "gradient")]
    if draw(st.booleans(), label="alike"):
        layouts = layouts[:1] * 3
    student, teacher = logits_pair(
        (n_rows, width),
        seed=draw(st.integers(0, 10_000), label="seed"),
        scale=draw(st.sampled_from([0.5, 3.0, 8.0, *([] if few else [30.0])]), label="size"),
        offset=draw(st.sampled_from([0.0] if few else [0.0, 0.0, -100.0, 300.0]), label="offset"),
        near=draw(st.booleans(), label="near"),
        dtypes=dtypes,
        device=device,
    )
    student[:, vocab:], teacher[:, vocab:] = NAN, INF
    where = [{"stride": width + more, "shift": shift} for more, shift in layouts]
    student, teacher = placed(student, **where[0]), placed(teacher, **where[1])
    weight = st.sampled_from([0.0, 0.3, 1.0, 5.0])
    keywords = {f"{part}_weight": draw(weight, label=part) for part in PARTS}
    keywords["gradient"] = hole(n_rows, width, dtypes[0], device, **where[2])
    temperatures = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 3.9, 4.0, 7.3, 20.0])
    keywords["temperature"] = draw(temperatures, label="temperature")
    keywords["divergence"] = draw(st.sampled_from(DIVERGENCES), label="divergence")
    keywords["jsd_beta"] = draw(st.floats(0.05, 0.95), label="beta")
    # a loss scale of 128 times 5 times a squared error's slope is more than fp16 holds
    scales = st.sampled_from([1.0, -0.5, 2.0 if dtypes[0] == FP16 else 128.0])
    keywords["scale"] = draw(scales, label="scale")
    column = st.just(IGNORE) | st.integers(0, vocab - 1)
    labels = draw(st.lists(column, min_size=n_rows, max_size=n_rows), label="labels")
    labels = torch.tensor(labels, dtype=torch.int64, device=device)
    weight = st.sampled_from([0.0, 0.5, 1.0, 3.0])
    mask = draw(st.none() | st.lists(weight, min_size=n_rows, max_size=n_rows), label="mask")
    mask = None if mask is None else torch.tensor(mask, dtype=FP32, device=device)
    check_launch(backend, student, teacher, labels, mask, vocab_size=vocab, **keywords)


# hidden_cosine


def test_hidden_rows_of_any_layout_are_taken(backend, device):
    # copied first where they are not dense; one scale a row, as reduction none brings
    student, teacher = logits_pair((4, 10), device=device)
    gradient, dense = hole(4, 10, FP32, device), teacher.T.contiguous().T
    check_hidden(backend, [placed(student, stride=13)], [dense], None, [gradient])
    by = torch.tensor([1.0, -2.0, 0.0, 0.5], device=device)
    for scale in (by, by.repeat_interleave(2)[::2]):
        check_hidden(backend, [student], [teacher], None, [gradient.fill_(NAN)], scale)


# combine_teachers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n_rows", [0, 1, 3])
def test_combination_of_any_rows_equals_the_definition(backend, device, n_rows, mode):
    # one teacher twice, so that two are exactly equal; far below 0; one whose columns are not
    # dense; the last row ends at a 16-byte boundary inside a tile
    first, other = logits_pair((n_rows, 264), offset=-700.0, device=device)
    teachers = [first, first.clone(), other.T.contiguous().T]
    z = hole(n_rows, 264, FP32, device)
    check_combination(backend, teachers, [0.25, 0.25, 0.5], 0.5, mode, z, size=700)


# scale

# columns and strides
SCALED = {
    "triton": ((2047, 2047), (2048, 2048), (2049, 2049), (4100, 4112), (1, 1), (3, 17)),  # a tile
    "cpp": [(n, n + more) for n in (*range(1, 71), 255, 256, 257, 2049) for more in (0, 3)],
}


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("shift", [0, 1])
def test_scale_multiplies_in_fp32_and_rounds_once(backend, device, shift, dtype):
    # at every alignment; shift: the narrow path
    scale = backends.BACKENDS[backend].scale
    n_rows = 16 // dtype.itemsize
    rows = torch.linspace(-3, 3, n_rows, device=device)
    rows[1], rows[2] = 1.0, 0.0
    factors = (torch.tensor(1 / 3, device=device), rows, rows.repeat_interleave(2)[::2])
    for columns, stride in SCALED[backend]:
        values, _ = logits_pair((n_rows, columns), dtypes=(dtype, dtype), device=device)
        for by in (*factors, factors[0].expand(n_rows)):
            gradient = placed(values, stride=stride, shift=shift * (2 * (columns % 8) + 1))
            scale([gradient], by)
            exact = values.float() * (by[:, None] if by.ndim else by)
            assert_same([gradient], [exact.to(dtype)])
            assert_nothing_else_was_written(gradient)


def test_scale_takes_everything_that_a_backward_brings(backend, device):
    scale = backends.BACKENDS[backend].scale
    gradient = torch.ones(2, 40, device=device)
    for by in (INF, -0.0, NAN):
        scaled = gradient.clone()
        scale([scaled], torch.tensor(by, device=device))
        assert_same([scaled], [gradient * by])
    for empty in (torch.ones(0, 5, device=device), torch.ones(3, 0, device=device)):
        scale([empty], torch.tensor(2.0, device=device))
    for by in (torch.tensor([2.0]), torch.tensor(2.0), torch.tensor(2.0, dtype=BF16)):
        single = torch.ones(1, 40, device=device)
        scale([single], by.to(device))
        assert (single == 2).all()
    half = gradient.to(FP16)
    scale([half], torch.tensor(2.0**20, device=device))
    assert half.isinf().all()
