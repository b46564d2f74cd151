"""What is Triton's own: tiles, alignment, memory, launches. The mathematics is tested for every
backend in test_losses.py and its neighbours, and what the launchers share in test_launchers.py.

On a CPU this runs in Triton's interpreter; what only a GPU can tell is skipped there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools
import warnings

import pytest
import test_losses_edges as edges
import torch
from conftest import no_wait_for_the_gpu
from kernel_calls import (
    assert_nothing_else_was_written,
    calls_of,
    hole,
    options,
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
    assert_same,
    logits_pair,
    read,
    value_and_grad,
)

from distilfast import distillation_loss
from distilfast.losses import backends, operators, reference
from distilfast.losses.rows import rows_like

launch, check_launch, check_hidden, check_combination = calls_of("triton")
every_divergence = pytest.mark.parametrize("divergence", DIVERGENCES)
every_dtype = pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can tell")


@pytest.fixture
def backend() -> str:
    reason = backends.unavailable("triton")
    if reason is not None:
        pytest.skip(reason)
    return "triton"


def kernels(file):
    """A file of kernels, as `backends.py` finds it."""
    return importlib.import_module(f"distilfast_kernels.{file}")


def tile_boundary(warps, itemsize):
    """A vocabulary of whole tiles, two at least, for which the launcher takes so many warps."""
    distillation = kernels("distillation")
    for tiles in itertools.count(2):
        vocab = tiles * 256 * warps
        chosen = [
            distillation.variant(options(v), True, True, True, [itemsize] * 2, True)
            for v in (vocab - 16, vocab + 16)
        ]
        if all(x.num_warps == warps for x in chosen):
            assert {x.TILES * x.THREADS * x.VECTOR for x in chosen} == {256 * warps}
            return vocab


# Tiles and alignment


@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@every_divergence
def test_poisoned_gradient_is_written_whole_around_each_boundary(
    backend, device, divergence, dtype, warps
):
    # the last tile is full, or misses or exceeds it by an element or 16 bytes; odd lengths make
    # each row begin at another offset from a 16-byte boundary
    vector = 16 // dtype.itemsize
    boundary = tile_boundary(warps, dtype.itemsize)
    for extra in (-1, 0, 1, vector, vector + 1):
        n_rows, vocab = vector if extra % 2 else 2, boundary + extra
        student, teacher = logits_pair((n_rows, vocab), dtypes=(dtype, dtype), device=device)
        gradient = hole(n_rows, vocab, dtype, device)
        assert kernels("rows").is_aligned([student, teacher, gradient], vector)
        labels = some_labels(n_rows, vocab, device)
        keywords = {"gradient": gradient, "divergence": divergence, "jsd_beta": 0.3}
        check_launch(student, teacher, labels, **keywords, **ALL_PARTS)
        gradient.fill_(NAN)  # beside the others the cosine's gradient is too small to be seen
        check_launch(student, teacher, gradient=gradient, kd_weight=0.0, cos_weight=1.0)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("aligned", [True, False])
def test_poisoned_rows_that_nothing_needs_become_zero_around_each_boundary(
    backend, device, aligned, dtype
):
    # the early exit: no row is read, each is overwritten, at every offset from a boundary
    vector = 16 // dtype.itemsize
    for vocab in (1, vector, 255, 256, 257, 511, 512, 513 + vector):
        rows = [hole(2 * vector, vocab, dtype, device, shift=0 if aligned else 1) for _ in range(3)]
        student, teacher, gradient = rows
        assert kernels("rows").is_aligned(rows, vector) == aligned
        ignored = torch.full((2 * vector,), IGNORE, device=device)
        for labels in (None, ignored):
            mask = torch.zeros(2 * vector, device=device)
            keywords = {**ALL_PARTS, "ce_weight": 0.0 if labels is None else 1.0}
            keywords["gradient"] = gradient.fill_(NAN)
            assert (launch(student, teacher, labels, mask, **keywords) == 0).all()
            assert (gradient == 0).all()
            assert_nothing_else_was_written(gradient)
    # without soft targets a label alone decides
    keywords = {"gradient": gradient.fill_(NAN), "kd_weight": 0.0, "ce_weight": 1.0}
    assert (launch(student, teacher, ignored, **keywords) == 0).all()
    assert (gradient == 0).all()


@pytest.mark.parametrize("who", ["student", "teacher", "gradient"])
@pytest.mark.parametrize("layout", ["one_element_later", "another_stride"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_unaligned_rows_take_the_narrow_path_and_agree(backend, device, dtype, layout, who):
    # VECTOR = 1, with two full tiles and a rest; 16-byte loads would be an error on a GPU and the
    # wrong elements in the interpreter
    n_rows, vocab = 3, 2 * 256 + 5
    student, teacher = logits_pair((n_rows, vocab), dtypes=(dtype, dtype), device=device)
    where = {"shift": 1} if layout == "one_element_later" else {"stride": vocab + 2}
    layouts = {name: where if name == who else {} for name in ("student", "teacher", "gradient")}
    student = placed(student, **layouts["student"])
    teacher = placed(teacher, **layouts["teacher"])
    gradient = hole(n_rows, vocab, dtype, device, **layouts["gradient"])
    assert not kernels("rows").is_aligned([student, teacher, gradient], 16 // dtype.itemsize)
    labels, mask = some_labels(n_rows, vocab, device), torch.tensor([1.0, 0.0, 0.5], device=device)
    for divergence in DIVERGENCES:
        keywords = {"gradient": gradient.fill_(NAN), "divergence": divergence, **ALL_PARTS}
        check_launch(student, teacher, labels, mask, **keywords)


@pytest.mark.parametrize(
    ("vocab", "width", "stride"),
    [
        (500, 500, 512),  # rows padded to a multiple of 128 bytes
        (509, 509, 521),  # strides that are odd but agree: boundaries at the same columns
        (250, 256, 256),  # a padded head: 6 columns of zeros, and the last tile is not full
        (257, 600, 601),  # more padding than a tile
        (3, 9, 11),  # shorter than 16 bytes
    ],
)
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])
def test_poisoned_gradient_of_padded_rows_is_written_whole(
    backend, device, dtype, vocab, width, stride
):
    n_rows = 5
    student, teacher = (
        placed(x, stride=stride)
        for x in logits_pair((n_rows, width), dtypes=(dtype, dtype), device=device)
    )
    student[:, vocab:], teacher[:, vocab:] = NAN, NAN
    gradient = hole(n_rows, width, dtype, device, stride=stride)
    assert kernels("rows").is_aligned([student, teacher, gradient], 16 // dtype.itemsize)
    for mask in (None, torch.tensor([1.0, 0.0, 2.0, 0.0, 0.5], device=device)):
        keywords = {"gradient": gradient.fill_(NAN), "vocab_size": vocab, **ALL_PARTS}
        check_launch(student, teacher, some_labels(n_rows, vocab, device), mask, **keywords)


@pytest.mark.parametrize("dtypes", [(BF16, FP32), (FP32, BF16), (BF16, BF16)], ids=str)
def test_poisoned_gradient_beside_other_strides_and_dtypes_is_written_whole(
    backend, device, dtypes
):
    # three strides that agree modulo 16 bytes, of which bf16 takes 8 columns and fp32 then as many
    student, teacher = logits_pair((9, 517), dtypes=dtypes, device=device)
    student, teacher = placed(student, stride=525), placed(teacher, stride=533)
    gradient = hole(9, 517, dtypes[0], device)
    assert kernels("rows").is_aligned([student, teacher, gradient], 8)
    labels = some_labels(9, 517, device)
    mask = torch.arange(9, device=device).remainder(3).float()
    for divergence in DIVERGENCES:
        keywords = {"divergence": divergence, **ALL_PARTS}
        check_launch(student, teacher, labels, mask, gradient=gradient.fill_(NAN), **keywords)


def test_gradient_has_the_rows_of_padded_logits(backend, device):
    # so that all three reach their 16-byte boundaries at the same column
    student, teacher = (
        placed(x, stride=520) for x in logits_pair((4, 517), dtypes=(BF16, BF16), device=device)
    )
    numbers, sizes = [*options(517)[:6], 1.0, 1.0], [IGNORE, 517]
    how = str(operators.Call("forward_kl", "none", backend, wanted=True, late=False, inplace=False))
    _, _, gradient, *_ = operators.distillation_op(
        student, teacher, None, None, None, None, numbers, sizes, how
    )
    assert gradient.stride() == student.stride() == (520, 1)
    assert kernels("rows").is_aligned([student, teacher, gradient], 8)
    # a window into something much wider is not padding
    assert rows_like(placed(student, stride=2000), 517, BF16).stride() == (517, 1)


@every_divergence
@pytest.mark.parametrize("vocab", [517, 2600])
def test_gradient_in_place_of_the_logits_is_the_same_to_the_bit(backend, device, vocab, divergence):
    # two warps and more than one tile: what a sweep still needs must not be overwritten by another
    student, teacher = logits_pair((4, vocab), dtypes=(BF16, BF16), device=device)
    labels = some_labels(4, vocab, device)
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0], device=device)
    keywords = {"divergence": divergence, "scale": -0.5, **ALL_PARTS}
    beside = hole(4, vocab, BF16, device)
    wanted = launch(student, teacher, labels, mask, gradient=beside, **keywords)
    inside = placed(student)
    parts = launch(inside, teacher, labels, mask, gradient=inside, **keywords)
    assert_same([parts, inside], [wanted, beside])
    assert_nothing_else_was_written(inside)


# Rows


@pytest.mark.parametrize("low", [-INF, -3e38, -1e20, NAN], ids=str)
@every_divergence
def test_row_outside_the_mask_is_scored_by_its_label_whatever_its_logits(
    backend, device, divergence, low
):
    # banned tokens: -inf or the dtype's lowest number, whose square is infinite, in a full tile
    # and in the last. The soft parts of such a row weigh 0, and 0 times what they would be is not 0
    student, teacher = logits_pair((3, 300), device=device)
    student[:, 4:7], student[:, -3:-1] = low, low
    labels, mask = torch.tensor([0, IGNORE, 299], device=device), torch.zeros(3, device=device)
    wanted, gradient = (hole(3, 300, FP32, device) for _ in range(2))
    hard = launch(student, teacher, labels, gradient=wanted, kd_weight=0.0, ce_weight=2.0)
    for weights in (ALL_PARTS, {"cos_weight": 1.0}, {"mse_weight": 1.0}, {"kd_weight": 1.0}):
        keywords = {"kd_weight": 0.0, **weights, "ce_weight": 2.0, "divergence": divergence}
        parts = launch(student, teacher, labels, mask, gradient=gradient, **keywords)
        assert (parts[[0, 2, 3]] == 0).all()
        close = {"rtol": 1e-5, "atol": 1e-6, "equal_nan": True}
        torch.testing.assert_close(parts[1], hard[1], **close)
        torch.testing.assert_close(gradient, wanted, **close)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_column_that_one_side_alone_excludes_is_not_left_out(backend, device, side):
    # an infinite vector has no direction, and its distance from a finite one is infinite; row 1
    # has columns that both exclude
    student, teacher = logits_pair((2, 20), device=device)
    (student if side == "student" else teacher)[0, 3] = -INF
    student[1, 5:7], teacher[1, 5:7] = -INF, -INF
    gradient = hole(2, 20, FP32, device)
    check_launch(student, teacher, gradient=gradient, kd_weight=0.0, cos_weight=1.0)
    check_launch(student, teacher, gradient=gradient, kd_weight=0.0, mse_weight=1.0)
    check_hidden([student], [teacher], None, [gradient])
    assert gradient.isnan().all(-1).tolist() == [True, False]


@pytest.mark.parametrize("side", ["student", "teacher"])
@edges.alone
def test_nan_row_is_nan_where_a_maximum_drops_it(backend, device, keywords, side, monkeypatch):
    # max(x, NaN) is x on the hardware and NaN in the interpreter
    if not torch.cuda.is_available():
        import numpy as np
        from triton.runtime.interpreter import InterpreterBuilder

        def fmax(self, left, right):
            return self.binary_op(left, right, np.fmax)

        monkeypatch.setattr(InterpreterBuilder, "create_maxnumf", fmax)
    for columns in (slice(None), 3):
        edges.test_nan_row_gives_a_nan_row_and_leaves_the_others_alone(
            backend, device, keywords, side, columns
        )


@pytest.mark.parametrize(("gap", "temperature"), [(40.0, 1.0), (150.0, 1.0), (40.0, 7.3)])
def test_maxima_that_move_apart_keep_the_divergence(backend, device, gap, temperature):
    # each thread's maxima grow from tile to tile, one side's before the other's; their sums are
    # shifted against one another, by less and by more than fp32's range of exponents; at T = 7.3
    # the cross entropy keeps a maximum of its own
    vocab = 4 * 256
    student, teacher = logits_pair((3, vocab), device=device)
    steps = torch.arange(4, device=device).repeat_interleave(256)
    early, late = gap * (steps >= 1), gap * (steps == 3)
    student += torch.stack([late, early, gap * steps])
    teacher += torch.stack([early, late, -gap * steps])
    for divergence in DIVERGENCES:
        gradient = hole(3, vocab, FP32, device)
        keywords = {"divergence": divergence, "temperature": temperature, "ce_weight": 1.0}
        check_launch(student, teacher, some_labels(3, vocab, device), gradient=gradient, **keywords)


# Temperature and weights are arguments


def test_variant_depends_on_neither_temperature_nor_the_size_of_weights():
    # but for one thing: beside a cross entropy, whether T is one of 1, 2, 3, 4
    pytest.importorskip("triton")
    distillation = kernels("distillation")

    def variants(*terms, temperatures=(0.5, 2.0, 3.0, 7.3), **keywords):
        found = set()
        for temperature, weight in itertools.product(temperatures, (0.5, 1.0, 5.0)):
            told = {"kd_weight": 0.0, **{f"{part}_weight": weight for part in terms}, **keywords}
            told |= {"jsd_beta": weight / 10, "ignore_index": int(weight)}
            chosen = options(30_522, temperature=temperature, **told)
            found.add(distillation.variant(chosen, True, True, True, [2, 2], True))
        return found

    for terms in (("kd",), ("ce",), ("cos", "ce"), ("kd", "cos", "mse")):
        assert len(variants(*terms)) == 1
    for terms in (("kd", "ce"), ("kd", "ce", "cos", "mse")):
        for temperatures in ((1.0, 2.0, 3.0, 4.0), (0.5, 2.5, 5.0, 7.3, 20.0)):
            assert len(variants(*terms, temperatures=temperatures)) == 1
    assert variants("kd") != variants("kd", "ce")
    assert variants("kd") != variants("kd", divergence="jsd")
    kernel = inspect.signature(distillation.distillation_kernel.fn).parameters
    constants = {name for name, known in kernel.items() if "constexpr" in str(known.annotation)}
    assert constants == set(distillation.Variant._fields)


# scale


@every_dtype
def test_scaling_by_one_changes_no_bit(backend, device, dtype):
    # NaN with any payload and -0 included: the row is not even written
    integers = torch.randint(-(2**15), 2**15, (6, 700), device=device)
    gradient = (integers << 16 if dtype == FP32 else integers).to(
        torch.int32 if dtype == FP32 else torch.int16
    )
    before = gradient.clone()
    for one in (torch.ones((), device=device), torch.ones(6, device=device)):
        backends.BACKENDS["triton"].scale([gradient.view(dtype)], one)
        assert torch.equal(gradient, before)


def test_few_programs_scale_several_gradients(backend, device, monkeypatch):
    # a program takes several rows, and each gradient has its own shape, stride and dtype
    monkeypatch.setattr(kernels("scale"), "MAX_PROGRAMS", 2)
    shapes = ((3, 9), (5, 700), (1, 33))
    made = [
        logits_pair(shape, dtypes=(dtype, dtype), device=device)[0]
        for shape, dtype in zip(shapes, (FP16, BF16, FP32), strict=True)
    ]
    gradients = [placed(x, stride=x.shape[1] + 8) for x in made]
    backends.BACKENDS["triton"].scale(gradients, torch.tensor(1 / 3, device=device))
    assert_same(gradients, [(x.float() * torch.tensor(1 / 3)).to(x.dtype) for x in made])
    for gradient in gradients:
        assert_nothing_else_was_written(gradient)


# Before and after the rows


@pytest.mark.parametrize("block", [4, 4096])
def test_counts_are_the_references(backend, device, block, monkeypatch):
    # several turns and one; every way to give a total
    monkeypatch.setattr(kernels("reductions"), "BLOCK_N", block)
    n_rows = 11
    labels = some_labels(n_rows, 9, device)
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0] * 3, device=device)[:n_rows]
    zero, two = torch.zeros((), device=device), torch.tensor(2, device=device)
    masks = [None, mask, mask != 0, mask.to(FP16), torch.zeros_like(mask), mask.repeat(2)[::2]]
    every_total = [(None, None), (3.0, None), (None, two), (zero, two), (two, zero), (0.0, None)]
    for rows, which, totals in itertools.product(masks, (None, labels), every_total):
        ours, wanted = (
            (count(totals, which, rows, n_rows, IGNORE, FP32, labels.device, needed), needed)
            for count in (backends.BACKENDS["triton"].row_scales, reference.row_scales)
            for needed in [torch.zeros(n_rows, dtype=torch.bool, device=device)]
        )
        assert_same(ours, wanted)


@pytest.mark.parametrize("block", [16, 4096])
def test_sums_are_the_references(backend, device, block, monkeypatch):
    monkeypatch.setattr(kernels("reductions"), "BLOCK_N", block)
    scales = torch.tensor([0.25, 3.0], device=device)
    for weights in ((5.0, 2.0, 1.5, 0.25), (0.0, 2.0, 0.0, 0.0), (1.0,)):
        rows = logits_pair((len(weights), 37), device=device)[0].abs()
        rows[[w == 0 for w in weights]] = 0
        for reduction in ("mean", "none"):
            ours, wanted = (
                reduce(rows, scales, weights, reduction)
                for reduce in (backends.BACKENDS["triton"].reduce_rows, reference.reduce_rows)
            )
            torch.testing.assert_close(ours, wanted, rtol=1e-6, atol=0)


# combine_teachers


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_combination_of_teachers_equals_the_definition(backend, device, count, mode):
    # around one and two tiles; each row at another alignment; a weight of 0 is not read
    weights = {1: [1.0], 2: [0.25, 0.75], 3: [0.2, 0.0, 0.8], 4: [0.1, 0.2, 0.3, 0.4]}[count]
    for vocab, temperature in ((2, 1.0), (256, 0.5), (255, 2.0), (517, 7.3), (519, 20.0)):
        teachers = [
            logits_pair((5, vocab), seed=i, dtypes=(BF16, BF16), device=device)[0]
            for i in range(count)
        ]
        for k in range(count):
            teachers[k][1, :: 2 + k] = -INF  # columns that some, and some that all exclude
        for teacher, weight in zip(teachers, weights, strict=True):
            if not weight:
                teacher.fill_(NAN)
        z = hole(5, vocab, FP32, device)
        check_combination(teachers, weights, temperature, mode, z)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("strides", "dtypes", "stride_z"),
    [
        ((520, 520), (BF16, BF16), 520),  # padded rows, aligned
        ((517, 525), (FP32, BF16), 533),  # strides that agree modulo 8: boundaries do too
        ((517, 518), (FP16, BF16), 517),  # strides that do not: the narrow path
        ((520, 520), (BF16, FP32), 517),  # nor does the result's
    ],
)
def test_combination_of_padded_rows_equals_the_definition(
    backend, device, strides, dtypes, stride_z, mode
):
    teachers = [
        placed(logits_pair((5, 517), seed=i, dtypes=(d, d), device=device)[0], stride=stride)
        for i, (stride, d) in enumerate(zip(strides, dtypes, strict=True))
    ]
    vocab = 513  # and a padded vocabulary
    for teacher in teachers:
        teacher[:, vocab:] = NAN
    z = hole(5, vocab, FP32, device, stride=stride_z)
    check_combination(teachers, [0.3, 0.7], 2.0, mode, z)


def test_combination_equals_the_definition_where_a_maximum_grows(backend, device):
    # each thread's sum is rescaled, and merged with those of threads that stand elsewhere
    teachers = list(logits_pair((2, 4 * 256), device=device))
    steps = torch.arange(4, device=device).repeat_interleave(256)
    teachers[0] += 30.0 * steps
    teachers[1] -= 30.0 * steps
    z = hole(2, 4 * 256, FP32, device)
    check_combination(teachers, [0.5, 0.5], 8.0, "probability", z)


# hidden_cosine


@pytest.mark.parametrize(
    "widths",
    [
        [12] * 10,  # more layers than one launch takes
        [8, 12, 12, 5, 8],  # several launches, some of one layer
        [5] * 9 + [6],  # both
        [8, 12, 8, 12],  # neighbours differ, the next but one are alike
    ],
    ids=str,
)
def test_hidden_layers_of_any_number_and_width_are_averaged(backend, device, widths):
    pairs = [
        logits_pair((7, width), seed=i, dtypes=(BF16, FP32), device=device)
        for i, width in enumerate(widths)
    ]
    gradients = [hole(7, width, BF16, device) for width in widths]
    mask = torch.tensor([1.0, 0.0, 0.5, 2.0, 1.0, 0.0, 1.0], device=device)
    for s, t in pairs:
        s[1], t[1] = NAN, INF
    check_hidden([s for s, _ in pairs], [t for _, t in pairs], mask, gradients, scale=-2.0)


@pytest.mark.parametrize("width", [1, 511, 512, 513, 1024, 2049])
def test_poisoned_gradient_of_hidden_rows_is_written_whole_around_each_boundary(
    backend, device, width
):
    # a program takes several short rows, the last one fewer; widths around powers of two
    block_rows, _, _ = kernels("hidden_cosine").tile(width)
    n_rows = min(block_rows, 40) + 3
    student, teacher = logits_pair((n_rows, width), dtypes=(BF16, BF16), device=device)
    gradient = hole(n_rows, width, BF16, device)
    check_hidden([student], [teacher], None, [gradient])
    mask = (torch.arange(n_rows, device=device) % 3).float()
    check_hidden([student], [teacher], mask, [gradient.fill_(NAN)])


def test_hidden_rows_longer_than_a_tile_are_read_again(backend, device):
    # 8,200: a full tile of the widest kind and 8 elements
    assert kernels("hidden_cosine").MAX_BLOCK_D < 8200
    student, teacher = logits_pair((3, 8200), dtypes=(BF16, FP32), device=device)
    student[1], teacher[1] = NAN, NAN
    gradient = hole(3, 8200, BF16, device)
    check_hidden([student], [teacher], torch.tensor([1.0, 0.0, 3.0], device=device), [gradient])


# Memory


@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("upstream", [1.0, -3.0])
def test_gradient_reaches_the_logits_in_the_memory_it_was_written_to(
    backend, device, upstream, inplace, dtype, monkeypatch
):
    # one buffer from the kernel to .grad, none in place: no copy in between, scaled or not
    triton, written = backends.BACKENDS["triton"], []

    def spy(*arguments):
        written.append(arguments[7])
        return triton.distillation(*arguments)

    entry = dataclasses.replace(triton, distillation=spy)
    monkeypatch.setitem(backends.BACKENDS, "triton", entry)
    student, teacher = logits_pair((3, 40), dtypes=(dtype, dtype), device=device)
    leaf, seen = student.requires_grad_(), []
    logits = leaf * 1
    logits.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    output = distillation_loss(logits, teacher, inplace_backward=inplace, backend=backend)
    (upstream * output.loss).backward()
    (buffer,) = (x for x in written if x is not None)
    assert seen == [buffer.data_ptr()]
    assert (buffer.data_ptr() == logits.data_ptr()) == inplace


@on_a_gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_peak_memory_above_the_inputs_is_one_gradient(backend, device, inplace):
    student, teacher = logits_pair((1024, 30_522), dtypes=(BF16, BF16), device=device)
    labels = some_labels(1024, 30_522, device)
    leaf = student.requires_grad_()
    size = student.numel() * student.element_size()

    def peak():
        logits = leaf * 1
        leaf.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = distillation_loss(
            logits, teacher, labels, ce_weight=1.0, inplace_backward=inplace, backend=backend
        )
        torch.autograd.grad(output.loss, logits)
        return torch.cuda.max_memory_allocated() - before

    peak()  # compiles
    assert peak() <= (0 if inplace else size) + 2**20


# Streams and graphs


def test_mode_that_finds_waits_ends_with_its_test_however_that_ends(monkeypatch):
    modes = []

    def set_mode(mode):  # as torch has it: it warns, once a process
        modes.append(mode)
        if len(modes) == 1:
            warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    with pytest.raises(ZeroDivisionError), no_wait_for_the_gpu():
        _ = 1 / 0
    assert modes == ["error", "default"]


@on_a_gpu
@every_divergence
def test_captured_graph_replays_on_new_logits(backend, device, divergence):
    student, teacher = logits_pair((8, 1030), dtypes=(BF16, BF16), device=device)
    labels = some_labels(8, 1030, device)
    leaf = student.clone().requires_grad_()
    keywords = {"divergence": divergence, "backend": backend, **ALL_PARTS}

    def step():
        return value_and_grad(distillation_loss, leaf, teacher, **read(labels=labels, **keywords))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, gradient = step()
    for seed in (1, 2):
        fresh = logits_pair((8, 1030), seed=seed, dtypes=(BF16, BF16), device=device)
        with torch.no_grad():
            leaf.copy_(fresh[0])
            teacher.copy_(fresh[1])
        graph.replay()
        wanted = step()
        assert_same([*output, gradient], [*wanted[0], wanted[1]])


# The choice


def test_auto_takes_triton_for_cuda_tensors(monkeypatch):
    cuda, half = torch.device("cuda"), (BF16, FP32)
    monkeypatch.setattr(backends.distilfast_kernels, "unavailable", lambda name: None)
    assert backends.choose("auto", cuda, half) == "triton"
    assert backends.choose("auto", cuda, (BF16, torch.float64)) == "torch"
    monkeypatch.setattr(backends.distilfast_kernels, "unavailable", lambda name: "no driver")
    assert backends.choose("auto", cuda, half) == "torch"
