"""The kernels broken on purpose, one line at a time: the suite has to notice each.

A mutation is a text that stands in a file exactly once, what to put in its place, and a test that
fails then. The mutated package is imported instead of the real one while that test runs, called as
a function and by an assertion: any other exception means that the mutation is malformed.

Left out is what only a GPU can tell (int32 offsets, misaligned accesses, rows read in vain), what
would leave the tensors, and what changes no number.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import math
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import distilfast_kernels
import pytest
import test_combine_teachers as ensembles
import test_heads as heads
import test_hidden_cosine as hidden
import test_linear as fused
import test_losses as values
import test_losses_edges as edges
import test_near as near
import test_triton as launches
import torch

from distilfast.losses import backends, reference


class Call(NamedTuple):
    """A test with concrete arguments; what fixtures would bring is added."""

    test: Callable[..., None]
    arguments: dict[str, Any]

    def __call__(self, backend: str) -> None:
        wanted = inspect.signature(self.test).parameters
        with pytest.MonkeyPatch.context() as monkeypatch:
            fixtures = {"backend": backend, "device": "cpu", "monkeypatch": monkeypatch}
            used = {name: value for name, value in fixtures.items() if name in wanted}
            self.test(**self.arguments, **used)


def call(test: Callable[..., None], **arguments: Any) -> Call:
    return Call(test, arguments)


class Mutation(NamedTuple):
    name: str
    file: str
    old: str
    new: str
    caught_by: Call


FORWARD, REVERSE, JSD, CE, COS, MSE = edges.ALONE
INF, NAN, FP32, BF16 = math.inf, math.nan, torch.float32, torch.bfloat16

# Near the teacher.
SMALL = {
    (kind, noise): call(
        near.test_small_divergence_keeps_its_digits,
        divergence=kind,
        noise=noise,
        temperature=1.0,
    )
    for kind in ("forward_kl", "reverse_kl", "jsd")
    for noise in (1e-3, 0.15)
}
FAR_APART, EXCLUDED = (
    {kind: call(test, divergence=kind) for kind in ("forward_kl", "reverse_kl", "jsd")}
    for test in (
        near.test_few_columns_far_apart_in_a_small_divergence,
        near.test_small_divergence_with_excluded_columns,
    )
)
COUNTED = call(
    near.test_statistics_are_the_softmaxes, divergence="forward_kl", noise=0.5, vocab=1003
)
FIRST_OF_EQUALS = call(near.test_first_of_equal_largest_logits_counts)
SATURATED = call(near.test_saturated_jsd_keeps_its_gradient)

# The cheapest calls that notice something. Several tiles, edges at every alignment, gradients that
# hold NaN beforehand, surroundings that must not change:
AROUND_TILES = {
    kind: call(
        launches.test_poisoned_gradient_is_written_whole_around_each_boundary,
        divergence=kind,
        dtype=BF16,
        warps=1,
    )
    for kind in edges.DIVERGENCES
}
NOT_NEEDED = call(
    launches.test_poisoned_rows_that_nothing_needs_become_zero_around_each_boundary,
    aligned=True,
    dtype=BF16,
)
PADDED = call(
    launches.test_poisoned_gradient_of_padded_rows_is_written_whole,
    dtype=FP32,
    vocab=257,
    width=600,
    stride=601,
)
NARROW = {
    who: call(
        launches.test_unaligned_rows_take_the_narrow_path_and_agree,
        dtype=BF16,
        layout="another_stride",
        who=who,
    )
    for who in ("teacher", "gradient")
}
UNALIGNED = call(
    launches.test_unaligned_rows_take_the_narrow_path_and_agree,
    dtype=BF16,
    layout="one_element_later",
    who="teacher",
)
OTHER_STRIDES = call(
    launches.test_poisoned_gradient_beside_other_strides_and_dtypes_is_written_whole,
    dtypes=(BF16, BF16),
)
MOVING_MAXIMA = call(
    launches.test_maxima_that_move_apart_keep_the_divergence, gap=40.0, temperature=1.0
)
FAR_MAXIMA = call(
    launches.test_maxima_that_move_apart_keep_the_divergence, gap=150.0, temperature=1.0
)
WRONG_LABEL = call(launches.test_wrong_label_makes_its_own_row_nan_and_no_other, label=303)
NEGATIVE_LABEL = call(launches.test_wrong_label_makes_its_own_row_nan_and_no_other, label=-1)
ANY_STRIDE = call(launches.test_labels_mask_and_scales_may_have_any_stride)
AT = {
    (kind, temperature): call(
        values.test_parity_at_every_temperature,
        divergence=kind,
        temperature=temperature,
        near=False,
    )
    for kind in edges.DIVERGENCES
    for temperature in (1.0, 2.0, 3.0, 7.3)
}
PARTS = call(values.test_loss_is_the_weighted_sum_of_unweighted_parts)
PEAK = call(launches.test_maxima_that_move_apart_keep_the_divergence, gap=40.0, temperature=7.3)
MASKS = call(values.test_float_mask_weights_rows_and_their_divisor)
DIVISORS = call(values.test_mean_divides_each_part_by_its_own_count)
PARITY_UNDER_MASKS = call(
    values.test_parity_under_masks_and_labels, which_labels="all", which_mask="float"
)
BANNED = {
    name: call(
        edges.test_column_minus_inf_in_both_adds_nothing, keywords=keywords, columns=list(range(8))
    )
    for name, keywords in zip(edges.ALONE_IDS, edges.ALONE, strict=True)
}
MASKED_NAN = call(
    edges.test_masked_rows_contribute_exactly_nothing, divergence="jsd", kind="bool", bad=NAN
)
LEADING_MINUS_INF = call(edges.test_minus_inf_leading_columns_do_not_break_a_running_maximum)
ANY_IGNORE_INDEX = call(edges.test_ignore_index_may_be_any_number, ignore_index=-1)
IMPOSSIBLE = call(edges.test_reverse_kl_of_an_impossible_token_is_inf_with_a_nan_row)
UNDERFLOW = call(edges.test_tiny_probability_against_an_impossible_token_is_inf_and_not_nan)
ZERO_VECTOR = call(edges.test_zero_vector_has_cosine_loss_one_and_no_gradient, side="both")
NAN_OR_ZERO = call(launches.test_nan_in_a_row_is_not_taken_for_a_zero_vector, side="student")
OUTSIDE_THE_MASK = {
    low: call(
        launches.test_row_outside_the_mask_is_scored_by_its_label_whatever_its_logits,
        divergence="forward_kl",
        low=low,
    )
    for low in (-INF, -1e20, NAN)
}
NO_GRADIENT = call(
    launches.test_launch_without_a_gradient_loses_nothing_and_writes_nothing,
    divergence="forward_kl",
)
HIDDEN_MASKED = call(
    hidden.test_masked_rows_contribute_exactly_nothing, reduction="mean", kind="bool", bad=NAN
)
HIDDEN_VALUES = call(hidden.test_hand_values)
HIDDEN_WEIGHTS = call(hidden.test_mask_weights_rows_and_normalizer_replaces_their_sum)
HIDDEN_LAYERS = call(
    hidden.test_layers_equal_the_mean_of_single_calls, which="absent", reduction="sum"
)
HIDDEN_LONG = call(launches.test_hidden_rows_longer_than_a_tile_are_read_again)
HIDDEN_POISONED = call(
    launches.test_poisoned_gradient_of_hidden_rows_is_written_whole_around_each_boundary, width=513
)
HIDDEN_ZERO = call(hidden.test_zero_vector_gives_one_and_no_gradient, dtype=FP32, side="student")
TEACHERS = {
    mode: call(launches.test_combination_of_teachers_equals_the_definition, count=2, mode=mode)
    for mode in ("probability", "logit")
}
TEACHERS_ALIKE = call(
    launches.test_combination_of_any_rows_equals_the_definition, n_rows=3, mode="probability"
)
TEACHERS_GROW = call(launches.test_combination_whose_maximum_grows_from_tile_to_tile)
HEAD = {
    name: call(heads.test_parity_with_the_oracle, name=name, divergence="forward_kl", dtype=FP32)
    for name in ("both", "bias")
}
HEAD_BESIDE_PADDING = call(
    heads.test_parity_at_every_temperature_beside_padding, name="softcap", temperature=3.7
)
HEAD_LONG = call(heads.test_rows_longer_than_the_first_columns, divergence="forward_kl")
SOFTCAP = call(heads.test_softcap_of_large_small_and_infinite_products, softcap=30.0)
HEAD_NOT_NEEDED = call(heads.test_rows_that_nothing_needs_add_nothing, name="softcap")
SCALES = call(launches.test_scale_multiplies_in_fp32_and_rounds_once, shift=0, dtype=BF16)
SCALE_BY_ONE = call(launches.test_scaling_by_one_changes_no_bit, dtype=FP32)

SCALE_SEVERAL = call(launches.test_scale_of_several_gradients_by_few_programs)
PROJECTED = call(fused.test_rows_that_are_not_needed_are_not_projected)
COUNTS = call(launches.test_counts_are_the_references, block=4)
SUMS = call(launches.test_sums_are_the_references, block=16)
NOTHING_COUNTS = call(
    values.test_total_of_zero_counts_nothing_whatever_the_rows_hold, as_tensor=True
)

K, N, R, W = "distillation.py", "reductions.py", "reference.py", "rows.py"
MUTATIONS = [
    # The scalars of the losses
    Mutation(
        "T squared is forgotten",
        K,
        "kd * (LN_2 * temperature * temperature) * weight",
        "kd * LN_2 * weight",
        AT["forward_kl", 2.0],
    ),
    Mutation(
        "T squared becomes T",
        K,
        "kd * (LN_2 * temperature * temperature) * weight",
        "kd * (LN_2 * temperature) * weight",
        AT["forward_kl", 2.0],
    ),
    Mutation(
        "the gradient forgets T",
        K,
        "by_kd = by_row * kd_weight * temperature",
        "by_kd = by_row * kd_weight",
        AT["forward_kl", 2.0],
    ),
    Mutation(
        "the gradient forgets the weight",
        K,
        "by_kd = by_row * kd_weight * temperature",
        "by_kd = by_row * temperature",
        PARTS,
    ),
    Mutation("bits for nats", K, "kd * (LN_2 * temp", "kd * (temp", AT["forward_kl", 2.0]),
    Mutation("bits for nats in CE", K, "ce = LN_2 * (", "ce = (", PARTS),
    Mutation(
        "CE at T",
        K,
        "x_label = temperature * (at_label * scale - top_s)",
        "x_label = at_label * scale - top_s",
        PARTS,
    ),
    Mutation(
        "CE at T where T is no power",
        K,
        "x_label = at_label * LOG2_E - top_1",
        "x_label = at_label * scale - top_s",
        AT["forward_kl", 7.3],
    ),
    Mutation(
        "CE's sum at T",
        K,
        "rows.thread_sum(_power(e_s, power))",
        "rows.thread_sum(e_s)",
        PARTS,
    ),
    Mutation(
        "CE's sum at T where T is no power",
        K,
        "rows.exponents(s, LOG2_E, m_1)",
        "rows.exponents(s, scale, m_1)",
        AT["forward_kl", 7.3],
    ),
    Mutation(
        "CE's gradient at T",
        K,
        "g += by_1 * _power(e_s, power)",
        "g += by_1 * e_s",
        PARTS,
    ),
    Mutation(
        "CE's gradient at T where T is no power",
        K,
        "g += by_1 * tl.exp2(s * LOG2_E - top_1)",
        "g += by_1 * e_s",
        AT["forward_kl", 7.3],
    ),
    Mutation(
        "one factor too few for a power",
        K,
        "if power > 2:",
        "if power > 3:",
        AT["forward_kl", 3.0],
    ),
    Mutation(
        "a power where T is not whole",
        K,
        "int(temperature) if temperature in (1, 2, 3, 4) else 0",
        "int(temperature) if temperature < 8 else 0",
        AT["forward_kl", 7.3],
    ),
    Mutation(
        "CE's gradient forgets the label", K, "tl.where(cols == label, by_label, 0.0)", "0.0", PARTS
    ),
    Mutation(
        "the label is a column further",
        K,
        "cols == label,",
        "cols == label + 1,",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "CE is that of the column before",
        K,
        "tl.load(s_ptr + offset_s + label,",
        "tl.load(s_ptr + offset_s + tl.maximum(label - 1, 0),",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "columns of full tiles counted from the boundary",
        K,
        "s, t, head + at + tile, row, how",
        "s, t, at + tile, row, how",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "columns of the last tile counted from the boundary",
        K,
        "s, t, head + rest, row, how",
        "s, t, rest, row, how",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "CE's gradient forgets its weight", K, "by_label = ce_weight * tl", "by_label = tl", PARTS
    ),
    Mutation(
        "kd takes ce's normaliser",
        K,
        "by_row = weight * tl.load(kd_scale_ptr + row * stride_kd_scale)",
        "by_row = weight * tl.load(ce_scale_ptr + row * stride_ce_scale)",
        DIVISORS,
    ),
    Mutation(
        "ce takes kd's normaliser",
        K,
        "by_label = ce_weight * tl.load(ce_scale_ptr + row * stride_ce_scale)",
        "by_label = ce_weight * tl.load(kd_scale_ptr + row * stride_kd_scale)",
        DIVISORS,
    ),
    Mutation(
        "every row takes the first one's scale",
        K,
        "kd_scale.stride(0) if kd_scale.ndim else 0",
        "0",
        ANY_STRIDE,
    ),
    # Zero, and other rows
    Mutation("no gradient", K, "    return g\n", "    return g * 0\n", PARTS),
    Mutation("no kd", K, "tl.store(out, kd)", "tl.store(out, 0.0)", PARTS),
    Mutation("no ce", K, "tl.store(out + n_rows, ce)", "tl.store(out + n_rows, 0.0)", PARTS),
    Mutation("no cos", K, "n_rows + n_rows, cos)", "n_rows + n_rows, 0.0)", PARTS),
    Mutation("no mse", K, "n_rows + n_rows, mse)", "n_rows + n_rows, 0.0)", PARTS),
    Mutation(
        "a row's losses go to its neighbour",
        K,
        "out = rows_ptr + row\n",
        "out = rows_ptr + row // 2 * 2\n",
        AROUND_TILES["forward_kl"],
    ),
    # Where the elements are
    Mutation(
        "the first sweep forgets full tiles",
        K,
        "sums = _add_sums(s, t, sums, how, KD, CE, WHOLE, COS, MSE)\n    if",
        "pass\n    if",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "the first sweep forgets the last tile",
        K,
        "sums = _add_sums(s, t, sums, how, KD, CE, WHOLE, COS, MSE)\n    merged",
        "pass\n    merged",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "the first sweep forgets the edges",
        K,
        "sums = _add_sums(edge_s, edge_t, sums, how, KD, CE, WHOLE, COS, MSE)",
        "pass",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "the last sweep forgets full tiles",
        K,
        "tl.store(g_body + at + tile, g.to(dtype), eviction",
        "tl.store(g_body + at + tile, g.to(dtype), mask=tile < 0, eviction",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "the last sweep forgets the last tile",
        K,
        "tl.store(g_body + rest, g.to(dtype), mask=rest < body)",
        "tl.store(g_body + rest, g.to(dtype), mask=rest < 0)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "the last sweep forgets the edges",
        K,
        "tl.store(g_row + edge, g.to(dtype), mask=is_edge)",
        "tl.store(g_row + edge, g.to(dtype), mask=edge < 0)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "the last tile is written too far",
        K,
        "tl.store(g_body + rest, g.to(dtype), mask=rest < body)",
        "tl.store(g_body + rest, g.to(dtype), mask=rest < body + VECTOR)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "a row skips its first elements",
        "rows.py",
        "tl.where(i < VECTOR, i < head, cols < n_cols)",
        "tl.where(i < VECTOR, i < 0, cols < n_cols)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "a row skips its last elements",
        "rows.py",
        "tl.where(i < VECTOR, i < head, cols < n_cols)",
        "tl.where(i < VECTOR, i < head, cols < 0)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "a row begins at a boundary",
        "rows.py",
        "tl.minimum((VECTOR - offset % VECTOR) % VECTOR, n_cols)",
        "tl.minimum((offset - offset) % VECTOR, n_cols)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "strides need not agree",
        "rows.py",
        "len({x.stride(0) % vector for x in tensors}) == 1 and",
        "",
        NARROW["teacher"],
    ),
    Mutation("storage need not be aligned", "rows.py", "x.data_ptr() % 16 == 0", "True", UNALIGNED),
    Mutation(
        "padding keeps what it held",
        K,
        "tl.store(g_row + padding, 0.0, mask=padding < n_padded)",
        "tl.store(g_row + padding, 0.0, mask=padding < 0)",
        PADDED,
    ),
    Mutation(
        "padding is not the launcher's business",
        K,
        "        student.shape[1],",
        "        options.vocab_size,",
        PADDED,
    ),
    Mutation(
        "more padding than a tile",
        K,
        "for start in range(n_cols, n_padded, BLOCK_V):",
        "for start in range(n_cols, n_cols + 1, BLOCK_V):",
        PADDED,
    ),
    Mutation("labels are taken for dense", K, "labels.contiguous()", "labels", ANY_STRIDE),
    Mutation("the mask is taken for dense", K, "mask.contiguous()", "mask", ANY_STRIDE),
    Mutation(
        "padding is written where no gradient is wanted",
        K,
        "if GRADIENT:\n        for start",
        "if True:\n        for start",
        NO_GRADIENT,
    ),
    Mutation(
        "a row that nothing needs is overwritten where no gradient is wanted",
        K,
        "if GRADIENT:\n            nothing",
        "if True:\n            nothing",
        NO_GRADIENT,
    ),
    Mutation(
        "the teacher's rows are as far apart as the student's",
        K,
        "row * stride_s, row * stride_t, row * stride_g",
        "row * stride_s, row * stride_s, row * stride_g",
        NARROW["teacher"],
    ),
    Mutation(
        "the gradient's rows are as far apart as the student's",
        K,
        "row * stride_s, row * stride_t, row * stride_g",
        "row * stride_s, row * stride_t, row * stride_s",
        NARROW["gradient"],
    ),
    Mutation(
        "the student's edges are where the teacher's are",
        K,
        "s_row, s_body = s_ptr + offset_s,",
        "s_row, s_body = s_ptr + offset_t,",
        OTHER_STRIDES,
    ),
    Mutation(
        "the teacher's edges are where the gradient's are",
        K,
        "t_row, t_body = t_ptr + offset_t,",
        "t_row, t_body = t_ptr + offset_g,",
        OTHER_STRIDES,
    ),
    Mutation(
        "the gradient's edges are where the student's are",
        K,
        "g_row, g_body = g_ptr + offset_g,",
        "g_row, g_body = g_ptr + offset_s,",
        OTHER_STRIDES,
    ),
    # Sums in bits
    Mutation(
        "the student's sum is not rescaled",
        K,
        "l_s = l_s * a_s + rows",
        "l_s = l_s + rows",
        MOVING_MAXIMA,
    ),
    Mutation(
        "the teacher's sum is not rescaled",
        K,
        "l_t = l_t * a_t + rows",
        "l_t = l_t + rows",
        MOVING_MAXIMA,
    ),
    Mutation(
        "CE's sum is not rescaled",
        K,
        "l_1 = l_1 * _power(a_s, power) + rows",
        "l_1 = l_1 + rows",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "CE's sum is not rescaled where T is no power",
        K,
        "l_1 = l_1 * rows.exp2_whole(fall_1) + rows",
        "l_1 = l_1 + rows",
        PEAK,
    ),
    Mutation(
        "CE's sum is rescaled at T",
        K,
        "l_1 = l_1 * _power(a_s, power) + rows",
        "l_1 = l_1 * a_s + rows",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "forward KL's d is not rescaled",
        K,
        "d = a_t * (d + l_t * (fall_t - fall_s)) + rows",
        "d = d + l_t * (fall_t - fall_s) + rows",
        MOVING_MAXIMA,
    ),
    Mutation(
        "forward KL's d is not shifted",
        K,
        "d = a_t * (d + l_t * (fall_t - fall_s)) + rows",
        "d = a_t * d + rows",
        MOVING_MAXIMA,
    ),
    Mutation(
        "reverse KL's d is not shifted",
        K,
        "d = a_s * (d + l_s * (fall_s - fall_t)) + rows",
        "d = a_s * d + rows",
        MOVING_MAXIMA,
    ),
    Mutation(
        "forward KL's d is merged without a shift",
        K,
        "d = a_t * (d + l_t * ((m_t - top_t) - (m_s - top_s)))",
        "d = a_t * d",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "reverse KL's d is merged without a shift",
        K,
        "d = a_s * (d + l_s * ((m_s - top_s) - (m_t - top_t)))",
        "d = a_s * d",
        AROUND_TILES["reverse_kl"],
    ),
    Mutation(
        "threads are merged as if their maxima were one",
        K,
        "rows.sum_four(l_s * a_s, l_t * a_t, d, l_1)",
        "rows.sum_four(l_s, l_t, d, l_1)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "CE's threads are merged at T",
        K,
        "l_1 = l_1 * _power(a_s, power)\n",
        "l_1 = l_1 * a_s\n",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "CE's threads are merged as one where T is no power",
        K,
        "l_1 = l_1 * rows.exp2_whole(m_1 - top_1)",
        "pass",
        PEAK,
    ),
    Mutation(
        "a maximum need not be whole",
        "rows.py",
        "tl.ceil(highest * scale)",
        "(highest * scale)",
        AROUND_TILES["forward_kl"],
    ),
    Mutation(
        "a maximum is that of the last tile",
        "rows.py",
        "tl.maximum(m, tl.ceil(highest * scale))",
        "tl.ceil(highest * scale)",
        LEADING_MINUS_INF,
    ),
    Mutation(
        "a thread without a finite logit starts from -inf",
        "rows.py",
        "FLOOR = tl.constexpr(-1.0e30)",
        "FLOOR = tl.constexpr(float('-inf'))",
        LEADING_MINUS_INF,
    ),
    Mutation(
        "powers of two wrap around",
        "rows.py",
        "(tl.maximum(x, -127.0).to(tl.int32) + 127) << 23",
        "(x.to(tl.int32) + 127) << 23",
        FAR_MAXIMA,
    ),
    # The divergences
    Mutation(
        "reverse KL's gradient without the mean",
        K,
        "_gap(x_s, x_t) - mean)",
        "_gap(x_s, x_t))",
        AT["reverse_kl", 2.0],
    ),
    Mutation(
        "reverse KL is forward KL",
        K,
        "kd = mean - tl.log2(l_s) + tl.log2(l_t)",
        "kd = mean + tl.log2(l_s) - tl.log2(l_t)",
        AT["reverse_kl", 2.0],
    ),
    Mutation(
        "an infinite reverse KL has a gradient",
        K,
        'spoilt = tl.where(kd < INF, 0.0, float("nan"))',
        "spoilt = 0.0",
        IMPOSSIBLE,
    ),
    Mutation(
        "JSD's beta is the student's share",
        K,
        "share_s, share_t = 1 - beta, beta * to_s",
        "share_s, share_t = beta, (1 - beta) * to_s",
        AT["jsd", 2.0],
    ),
    Mutation(
        "JSD weighs its two sides alike",
        K,
        "+ tl.log2(to_s)) + (1 - beta) * mean",
        "+ tl.log2(to_s)) + beta * mean",
        AT["jsd", 2.0],
    ),
    Mutation(
        "JSD's gradient forgets 1 - beta",
        K,
        "by_kd * LN_2 * (1 - beta) / l_s",
        "by_kd * LN_2 / l_s",
        AT["jsd", 2.0],
    ),
    Mutation(
        "JSD's gradient without the mean",
        K,
        "_gap(x_s, mixture) - mean)",
        "_gap(x_s, mixture))",
        AT["jsd", 2.0],
    ),
    Mutation(
        "JSD's second sweep forgets full tiles",
        K,
        "sums = _add_more(s, t, head + at + tile, sums, row, WHAT, KD)",
        "pass",
        AROUND_TILES["jsd"],
    ),
    Mutation(
        "JSD's second sweep forgets the last tile",
        K,
        "sums = _add_more(s, t, head + rest, sums, row, WHAT, KD)",
        "pass",
        AROUND_TILES["jsd"],
    ),
    Mutation(
        "JSD's second sweep forgets the edges",
        K,
        "sums = _add_more(edge_s, edge_t, edge, sums, row, WHAT, KD)",
        "pass",
        AROUND_TILES["jsd"],
    ),
    Mutation(
        "a NaN row's JSD has a gradient",
        K,
        'tl.where(kd == kd, by_kd * LN_2 * (1 - beta) / l_s, float("nan"))',
        "by_kd * LN_2 * (1 - beta) / l_s",
        call(launches.test_nan_row_is_nan_where_a_maximum_drops_it, keywords=JSD, side="teacher"),
    ),
    Mutation(
        "0 log 0 is NaN", K, "tl.where(gap > -1024.0, gap, -1024.0)", "gap", BANNED["forward_kl"]
    ),
    Mutation(
        "the mixture may be 0",
        K,
        "log2(tl.maximum(share_s * e_s + share_t * e_t, TINY))",
        "log2(share_s * e_s + share_t * e_t)",
        call(values.test_parity_of_confident_models, divergence="jsd"),
    ),
    Mutation(
        "tiny times infinite is NaN",
        K,
        "(d != d) & (l_s == l_s)",
        "(d == INF) & (l_s == l_s)",
        UNDERFLOW,
    ),
    # Cosine and squares
    Mutation(
        "a zero vector has a direction",
        K,
        "zero = ((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)",
        "zero = ss < 0",
        ZERO_VECTOR,
    ),
    Mutation(
        "NaN beside a zero vector is none",
        K,
        "((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)",
        "((ss == 0) | (tt == 0))",
        NAN_OR_ZERO,
    ),
    Mutation(
        "the cosine's gradient forgets the projection",
        K,
        "by_cos * (tl.where(out, 0.0, s) * ratio - tl.where(out, 0.0, t))",
        "by_cos * (0.0 - tl.where(out, 0.0, t))",
        PARITY_UNDER_MASKS,
    ),
    Mutation(
        "the cosine's gradient forgets its weight",
        K,
        "by_row * cos_weight * by_length",
        "by_row * by_length",
        PARITY_UNDER_MASKS,
    ),
    Mutation(
        "the cosine looks at excluded columns",
        K,
        "return (s == -INF) & (t == -INF)",
        "return (s == -INF) & (t == INF)",
        BANNED["cos"],
    ),
    Mutation(
        "a column that the teacher alone excludes is left out",
        K,
        "return (s == -INF) & (t == -INF)",
        "return t == -INF",
        call(launches.test_column_that_one_side_alone_excludes_is_not_left_out, side="teacher"),
    ),
    Mutation("half of MSE's gradient", K, "by_row * mse_weight * 2", "by_row * mse_weight", PARTS),
    Mutation(
        "an infinite MSE has a gradient",
        K,
        'tl.where(sq < INF, by_row * mse_weight * 2, float("nan"))',
        "by_row * mse_weight * 2",
        call(edges.test_infinite_mse_has_a_nan_row, side="student"),
    ),
    # Masks and labels
    Mutation(
        "the mask is ignored",
        K,
        "weight = tl.load(mask_ptr + row).to(tl.float32)",
        "weight = tl.load(mask_ptr + row).to(tl.float32) * 0 + 1",
        MASKS,
    ),
    Mutation(
        "a row of weight 0 is read", K, "soft &= weight != 0", "soft &= weight >= 0", MASKED_NAN
    ),
    Mutation(
        "kd forgets the row's weight",
        K,
        "temperature) * weight, 0.0)",
        "temperature), 0.0)",
        PARITY_UNDER_MASKS,
    ),
    Mutation(
        "cos forgets the row's weight",
        K,
        "(1 - cosine) * weight, 0.0)",
        "(1 - cosine), 0.0)",
        PARITY_UNDER_MASKS,
    ),
    Mutation("mse forgets the row's weight", K, "sq * weight", "sq", MASKS),
    Mutation(
        "the gradient forgets the row's weight", K, "by_row = weight * tl", "by_row = tl", MASKS
    ),
    Mutation(
        "a row that nothing needs keeps its loss",
        K,
        "            tl.store(rows_ptr + row, 0.0)",
        "            tl.store(rows_ptr + row, 1.0)",
        NOT_NEEDED,
    ),
    Mutation(
        "a row that nothing needs keeps all losses but one",
        K,
        "            rows_ptr += n_rows",
        "            rows_ptr += 0",
        NOT_NEEDED,
    ),
    Mutation(
        "outside the mask an infinite length spoils CE",
        K,
        "tl.where(soft & (zero == 0), tl.div_rn(st, ss), 0.0)",
        "tl.where(zero == 0, tl.div_rn(st, ss), 0.0)",
        OUTSIDE_THE_MASK[-1e20],
    ),
    Mutation(
        "a row that nothing needs keeps full tiles",
        K,
        "tl.store(g_body + i * BLOCK_V + tile, nothing)",
        "pass",
        NOT_NEEDED,
    ),
    Mutation(
        "a row that nothing needs keeps its last tile",
        K,
        "tl.store(g_body + rest, nothing, mask=rest < body)",
        "pass",
        NOT_NEEDED,
    ),
    Mutation(
        "a row that nothing needs keeps its edges",
        K,
        "tl.store(g_row + edge, 0.0, mask=is_edge)",
        "pass",
        NOT_NEEDED,
    ),
    Mutation(
        "outside the mask the last tile of a teacher is -inf",
        K,
        "-INF)\n        t = tl.where(soft, t, s)",
        "-INF)",
        OUTSIDE_THE_MASK[-INF],
    ),
    Mutation(
        "outside the mask full tiles of a teacher are 0",
        K,
        "        t = tl.where(soft, t, s)\n    return s, t\n\n\n@triton.jit\ndef _load_some",
        "    return s, t\n\n\n@triton.jit\ndef _load_some",
        OUTSIDE_THE_MASK[-INF],
    ),
    Mutation(
        "outside the mask NaN has a kd",
        K,
        "kd = tl.where(soft, kd * (LN_2 * temperature * temperature) * weight, 0.0)",
        "kd = kd * (LN_2 * temperature * temperature) * weight",
        OUTSIDE_THE_MASK[NAN],
    ),
    Mutation(
        "outside the mask NaN has a cos",
        K,
        "cos = tl.where(soft, (1 - cosine) * weight, 0.0)",
        "cos = (1 - cosine) * weight",
        OUTSIDE_THE_MASK[NAN],
    ),
    Mutation(
        "outside the mask NaN has an mse",
        K,
        "mse = tl.where(soft, sq * weight, 0.0)",
        "mse = sq * weight",
        OUTSIDE_THE_MASK[NAN],
    ),
    Mutation(
        "ignore_index is -100",
        K,
        "labelled = (wanted != ignore_index)",
        "labelled = (wanted != -100)",
        ANY_IGNORE_INDEX,
    ),
    Mutation(
        "ignore_index is a label",
        K,
        "labelled = (wanted != ignore_index)",
        "labelled = (wanted == wanted)",
        DIVISORS,
    ),
    Mutation(
        "a total of 0 leaves kd in",
        K,
        "soft &= tl.load(kd_scale_ptr + row * stride_kd_scale) != 0",
        "pass",
        NOTHING_COUNTS,
    ),
    Mutation(
        "a total of 0 leaves ce in",
        K,
        "(wanted != ignore_index) & counted",
        "wanted != ignore_index",
        NOTHING_COUNTS,
    ),
    Mutation(
        "a wrong label has a loss",
        K,
        'tl.where(known, ce, float("nan"))',
        "ce",
        WRONG_LABEL,
    ),
    Mutation(
        "a wrong label has a gradient",
        K,
        'by_label = tl.where(known, by_label, float("nan"))',
        "pass",
        WRONG_LABEL,
    ),
    Mutation(
        "a label in the padding is known",
        K,
        "(wanted >= 0) & (wanted < n_cols)",
        "(wanted >= 0) & (wanted < n_padded)",
        WRONG_LABEL,
    ),
    Mutation(
        "a negative label is known",
        K,
        "(wanted >= 0) & (wanted < n_cols)",
        "(wanted >= -1) & (wanted < n_cols)",
        NEGATIVE_LABEL,
    ),
    # hidden_cosine.py
    Mutation(
        "layers are added up",
        "hidden_cosine.py",
        "total += (1 - st * by_length) * share",
        "total += 1 - st * by_length",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "layers' gradients are added up",
        "hidden_cosine.py",
        "* weight * share",
        "* weight",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "a layer of another width starts anew",
        "hidden_cosine.py",
        "starts.append(layer)",
        "starts = [layer]",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "the mean is that of a launch",
        "hidden_cosine.py",
        "1 / len(student)",
        "1 / len(s)",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "launches overwrite each other's rows",
        "hidden_cosine.py",
        "ADD=launch > 0,",
        "ADD=False,",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "hidden: masked rows are read",
        "hidden_cosine.py",
        "used = inside & (weight != 0)",
        "used = inside",
        HIDDEN_MASKED,
    ),
    Mutation(
        "hidden: the row's weight is ignored",
        "hidden_cosine.py",
        "share * weight\n",
        "share\n",
        HIDDEN_WEIGHTS,
    ),
    Mutation(
        "hidden: the gradient ignores the row's weight",
        "hidden_cosine.py",
        "scale = scale * weight * share",
        "scale = scale * share",
        HIDDEN_WEIGHTS,
    ),
    Mutation(
        "hidden: every row takes the first one's scale",
        "hidden_cosine.py",
        "scale.stride(0) if scale.ndim else 0",
        "0",
        call(launches.test_hidden_rows_of_any_layout_are_taken),
    ),
    Mutation(
        "hidden: a zero vector has a direction",
        "hidden_cosine.py",
        "zero = ((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)",
        "zero = ss < 0",
        HIDDEN_ZERO,
    ),
    Mutation(
        "hidden: NaN beside a zero vector is none",
        "hidden_cosine.py",
        "((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)",
        "((ss == 0) | (tt == 0))",
        NAN_OR_ZERO,
    ),
    Mutation(
        "hidden: a long row is cut off",
        "hidden_cosine.py",
        "ONCE=block_d >= n_cols",
        "ONCE=True",
        HIDDEN_LONG,
    ),
    Mutation(
        "hidden: of a long row the last tile counts",
        "hidden_cosine.py",
        "ss, tt, st = ss + tl.sum(s * s, 1), tt + tl.sum(t * t, 1), st + tl.sum(s * t, 1)",
        "ss, tt, st = tl.sum(s * s, 1), tl.sum(t * t, 1), tl.sum(s * t, 1)",
        HIDDEN_LONG,
    ),
    Mutation(
        "hidden: a long row's end is not written",
        "hidden_cosine.py",
        "mask=inside[:, None] & exists)",
        "mask=inside[:, None] & (i == 0))",
        HIDDEN_LONG,
    ),
    Mutation(
        "hidden: the last program's rows are not written",
        "hidden_cosine.py",
        "tl.store(g_ptr + first, g, mask=inside[:, None] & (cols < n_cols)[None, :])",
        "tl.store(g_ptr + first, g, mask=(row < n_rows - 1)[:, None] & (cols < n_cols)[None, :])",
        HIDDEN_POISONED,
    ),
    Mutation(
        "hidden: a column that one side excludes is left out",
        "hidden_cosine.py",
        "out = (s == -INF) & (t == -INF)",
        "out = (s == -INF) | (t == -INF)",
        call(launches.test_column_that_one_side_alone_excludes_is_not_left_out, side="student"),
    ),
    Mutation(
        "hidden: a column that both exclude counts",
        "hidden_cosine.py",
        "out = (s == -INF) & (t == -INF)",
        "out = (s == -INF) & (t == INF)",
        call(launches.test_column_that_one_side_alone_excludes_is_not_left_out, side="student"),
    ),
    Mutation(
        "hidden: layers of other widths share a launch",
        "hidden_cosine.py",
        "widths[layer] != widths[layer - 1] or",
        "widths[layer] != widths[layer - 2] or",
        call(
            launches.test_hidden_layers_of_any_number_and_width_are_averaged, widths=[8, 12, 8, 12]
        ),
    ),
    Mutation(
        "hidden: half a gradient",
        "hidden_cosine.py",
        "g = tl.where(used[:, None], by * (s * ratio - t), 0.0).to(g_ptr.dtype.element_ty)",
        "g = tl.where(used[:, None], by * (0.0 - t), 0.0).to(g_ptr.dtype.element_ty)",
        HIDDEN_VALUES,
    ),
    # ensemble.py
    Mutation(
        "teachers' weights are ignored",
        "ensemble.py",
        "shifts += (log2_weights[k] - ",
        "shifts += (0.0 - ",
        TEACHERS["probability"],
    ),
    Mutation(
        "the first logit's weight is ignored",
        "ensemble.py",
        "z = t * weights[0]",
        "z = t",
        TEACHERS["logit"],
    ),
    Mutation(
        "the others' logits are not weighed",
        "ensemble.py",
        "z += t * weights[k]",
        "z += t",
        TEACHERS["logit"],
    ),
    Mutation(
        "teachers are combined at T = 1",
        "ensemble.py",
        "scale = LOG2_E / temperature",
        "scale = LOG2_E / 1.0",
        TEACHERS["probability"],
    ),
    Mutation(
        "z is not multiplied by T",
        "ensemble.py",
        "by = temperature * LN_2",
        "by = LN_2",
        TEACHERS["probability"],
    ),
    Mutation(
        "a teacher's sum is not rescaled",
        "ensemble.py",
        "total * rows.exp2_whole(fall) + rows",
        "total + rows",
        TEACHERS_GROW,
    ),
    Mutation(
        "a teacher's threads are merged as one",
        "ensemble.py",
        "tl.sum(total * rows.exp2_whole(m - top), 0)",
        "tl.sum(total, 0)",
        TEACHERS["probability"],
    ),
    Mutation(
        "a larger teacher is added as a smaller one",
        "ensemble.py",
        "total = tl.where(y > top, total * e + 1.0, total + e)",
        "total = total + e",
        call(
            launches.test_combination_of_teachers_equals_the_definition,
            count=4,
            mode="probability",
        ),
    ),
    Mutation(
        "two teachers that are equal count as three",
        "ensemble.py",
        "tl.where(y == top, 0.0, -tl.abs(y - top))",
        "tl.where(y == top, 1.0, -tl.abs(y - top))",
        TEACHERS_ALIKE,
    ),
    Mutation(
        "a teacher's sum starts from 2^0",
        "ensemble.py",
        "m = tl.full([THREADS], FLOOR, tl.float32)",
        "m = tl.full([THREADS], 0.0, tl.float32)",
        TEACHERS_ALIKE,
    ),
    Mutation(
        "teachers are taken for dense",
        "ensemble.py",
        "t if t.stride(1) == 1 else t.contiguous()",
        "t",
        TEACHERS_ALIKE,
    ),
    Mutation(
        "z's last tile is an element too long",
        "ensemble.py",
        "tl.store(z_body + rest, z, mask=rest < body)",
        "tl.store(z_body + rest, z, mask=rest <= body)",
        TEACHERS_ALIKE,
    ),
    Mutation(
        "teachers' strides need not agree",
        "ensemble.py",
        "vector if rows.is_aligned([*teachers, z], vector) else 1",
        "vector",
        call(
            launches.test_combination_of_padded_rows_equals_the_definition,
            strides=(517, 518),
            dtypes=(torch.float16, BF16),
            stride_z=517,
            mode="logit",
        ),
    ),
    Mutation(
        "all teachers' rows are as far apart as the first one's",
        "ensemble.py",
        "row_k = row * (odd_strides[k] // 2)",
        "row_k = row * (odd_strides[0] // 2)",
        call(
            launches.test_combination_of_padded_rows_equals_the_definition,
            strides=(517, 525),
            dtypes=(FP32, BF16),
            stride_z=533,
            mode="logit",
        ),
    ),
    Mutation(
        "a column that all teachers exclude is NaN",
        "ensemble.py",
        "tl.where(y == top, 0.0, -tl.abs(y - top))",
        "-tl.abs(y - top)",
        TEACHERS["probability"],
    ),
    Mutation(
        "the sum forgets a teacher's edges",
        "ensemble.py",
        "m, total = _add(t, m, total, scale)\n            for",
        "pass\n            for",
        TEACHERS["probability"],
    ),
    Mutation(
        "the sum forgets a teacher's full tiles",
        "ensemble.py",
        "m, total = _add(tl.load(t_ptrs[k] + at + tile), m, total, scale)",
        "pass",
        TEACHERS["probability"],
    ),
    Mutation(
        "the sum forgets a teacher's last tile",
        "ensemble.py",
        "m, total = _add(u, m, total, scale)",
        "pass",
        TEACHERS["probability"],
    ),
    Mutation(
        "z's full tiles are not written",
        "ensemble.py",
        "tl.store(z_body + at, z)",
        "pass",
        TEACHERS["logit"],
    ),
    Mutation(
        "z's last tile is not written",
        "ensemble.py",
        "tl.store(z_body + rest, z, mask=rest < body)",
        "pass",
        TEACHERS["logit"],
    ),
    Mutation(
        "z's edges are not written",
        "ensemble.py",
        "tl.store(z_ptr + row * stride_z + edge, z_edge, mask=is_edge)",
        "pass",
        TEACHERS["logit"],
    ),
    # scale.py
    Mutation(
        "every row is scaled by the first factor",
        "scale.py",
        "by = tl.load(by_ptr + row * stride_by)",
        "by = tl.load(by_ptr)",
        SCALES,
    ),
    Mutation("every factor is 1", "scale.py", "if by != 1:", "if by != by:", SCALES),
    Mutation(
        "a factor of 1 is rounded to -1", "scale.py", "if by != 1:", "if by != -1:", SCALE_BY_ONE
    ),
    Mutation(
        "every program leaves", "scale.py", "tl.load(by_ptr) == 1:", "tl.load(by_ptr) != 1:", SCALES
    ),
    Mutation(
        "a program takes one row",
        "scale.py",
        "odd_n_rows[k] // 2, tl.num_programs(0)",
        "min(odd_n_rows[k] // 2, 2), tl.num_programs(0)",
        SCALE_SEVERAL,
    ),
    Mutation(
        "every gradient has the first one's width",
        "scale.py",
        "                    odd_n_cols[k] // 2,",
        "                    odd_n_cols[0] // 2,",
        SCALE_SEVERAL,
    ),
    Mutation(
        "gradients beyond the first launch are left",
        "scale.py",
        "filled[start : start + MAX_GRADIENTS]",
        "filled[:1]",
        SCALE_SEVERAL,
    ),
    # reductions.py
    Mutation(
        "a masked row counts 1",
        N,
        "masked += weight",
        "masked += (weight != 0).to(tl.float32)",
        COUNTS,
    ),
    Mutation("every label counts", N, "hard = label != ignore_index", "hard = inside", COUNTS),
    Mutation(
        "a label beyond the last row counts",
        N,
        "mask=inside, other=ignore_index",
        "mask=inside, other=0",
        COUNTS,
    ),
    Mutation("0 / 0 is 1", N, "tl.where(total <= 0, 0.0,", "tl.where(total < 0, 0.0,", COUNTS),
    Mutation(
        "the totals change places",
        N,
        "tl.store(scales_ptr + 1, _reciprocal(ce_total))",
        "tl.store(scales_ptr + 1, _reciprocal(kd_total))",
        COUNTS,
    ),
    Mutation("a row needs both", N, "soft | hard, mask", "soft & hard, mask", COUNTS),
    Mutation("of a total of 0 rows are needed", N, "if not COUNT_MASK:", "if COUNT_MASK:", COUNTS),
    Mutation(
        "of a total of 0 labels are needed", N, "if not COUNT_LABELS:", "if COUNT_LABELS:", COUNTS
    ),
    Mutation(
        "only the last rows are summed", N, "total += tl.load(first", "total = tl.load(first", SUMS
    ),
    Mutation("ce takes kd's scale", N, "(part == 1).to", "(part == 9).to", SUMS),
    Mutation("the sum has no weights", N, "weight * reduced", "reduced", SUMS),
    Mutation("rows have no weights", N, "weight * values", "values", SUMS),
    Mutation(
        "full tiles are not scaled",
        "scale.py",
        "tl.store(at, (tl.load(at).to(tl.float32) * by).to(dtype))",
        "pass",
        SCALES,
    ),
    Mutation(
        "the last tile is not scaled",
        "scale.py",
        "tl.store(g_body + rest, (g * by).to(dtype), mask=rest < body)",
        "pass",
        SCALES,
    ),
    Mutation(
        "the edges are not scaled",
        "scale.py",
        "tl.store(at, (edge_g * by).to(dtype), mask=is_edge)",
        "pass",
        SCALES,
    ),
    Mutation(
        "the factor is rounded first",
        "scale.py",
        "by_ptr + row * stride_by).to(tl.float32)",
        "by_ptr + row * stride_by).to(g_ptrs[k].dtype.element_ty).to(tl.float32)",
        SCALES,
    ),
    # reference.py
    Mutation(
        "reference: a total of 0 leaves kd in",
        R,
        "if not scale.is_cuda and bool((scale != 0).all()):",
        "if True:",
        NOTHING_COUNTS,
    ),
    Mutation(
        "reference: a total of 0 leaves ce in",
        R,
        "(labels != options.ignore_index) & (ce_scale != 0)",
        "labels != options.ignore_index",
        NOTHING_COUNTS,
    ),
    Mutation(
        "reference: 1 / 0",
        R,
        "masked_fill_(total <= 0, 0)",
        "masked_fill_(total < 0, 0)",
        NOTHING_COUNTS,
    ),
    Mutation(
        "reference: one scale for all",
        R,
        "[kd_scale, ce_scale, kd_scale, kd_scale]",
        "[kd_scale, kd_scale, kd_scale, kd_scale]",
        DIVISORS,
    ),
    Mutation(
        "reference: the mask needs every row", R, "needed = needed & (mask != 0)", "pass", PROJECTED
    ),
    Mutation(
        "reference: a label needs no row",
        R,
        "needed = needed | ((labels != ignore_index) & (ce_scale != 0))",
        "pass",
        PROJECTED,
    ),
    Mutation("reference: T squared", R, "temperature**2 * loss", "loss", AT["forward_kl", 2.0]),
    Mutation(
        "reference: the gradient's T", R, "grad.mul_(temperature)", "grad", AT["forward_kl", 2.0]
    ),
    Mutation(
        "reference: the mean",
        R,
        "(d.masked_fill(q_is_0, 0) - loss[:, None])",
        "d.masked_fill(q_is_0, 0)",
        AT["reverse_kl", 2.0],
    ),
    Mutation("reference: 1 - beta", R, "(1 - beta) * q * _from", "q * _from", AT["jsd", 2.0]),
    Mutation(
        "reference: half of MSE's gradient", R, "(2 * difference)", "difference.clone()", PARTS
    ),
    Mutation(
        "reference: ce at T",
        R,
        "log_q = s.log_softmax(-1)\n    loss",
        "log_q = (s / 2).log_softmax(-1)\n    loss",
        PARTS,
    ),
    Mutation(
        "reference: zero vectors",
        R,
        "zero = ((ss == 0) | (tt == 0)) & ~(ss + tt).isnan()",
        "zero = ss < 0",
        ZERO_VECTOR,
    ),
    Mutation(
        "reference: masked NaN",
        R,
        "(loss * used).masked_fill(used == 0, 0)",
        "loss * used",
        MASKED_NAN,
    ),
    Mutation(
        "reference: masked NaN's gradient",
        R,
        "grad.masked_fill_((used == 0)[:, None], 0)",
        "pass",
        MASKED_NAN,
    ),
    Mutation(
        "reference: the mean over layers",
        R,
        "total += loss / len(student)",
        "total += loss",
        HIDDEN_LAYERS,
    ),
    Mutation(
        "reference: teachers' weights",
        R,
        " + math.log(weight)",
        "",
        call(
            ensembles.test_parity_with_the_definition,
            weights=[0.2, 0.5, 0.3],
            dtype=FP32,
            temperature=2.0,
            mode="probability",
        ),
    ),
    # what a fused head leaves to the kernels
    Mutation(
        "one head for both sides",
        K,
        "t = _logits(t, heads[2], heads[3])\n        t = tl.where",
        "t = _logits(t, heads[0], heads[1])\n        t = tl.where",
        HEAD_LONG,
    ),
    Mutation(
        "no column is capped, too",
        K,
        "s = tl.where(exists, _logits(s, heads[0], heads[1]), -INF)",
        "s = _logits(s, heads[0], heads[1])",
        HEAD_BESIDE_PADDING,
    ),
    Mutation(
        "no column of the teacher is capped, too",
        K,
        "t = tl.where(exists, _logits(t, heads[2], heads[3]), -INF)",
        "t = _logits(t, heads[2], heads[3])",
        HEAD_BESIDE_PADDING,
    ),
    Mutation(
        "the gradient does not bend",
        K,
        "g *= _slope(s, heads[0], heads[1])",
        "g *= heads[0]",
        HEAD["both"],
    ),
    Mutation("the gradient is not scaled", K, "tl.float32) * scale", "tl.float32)", HEAD["both"]),
    Mutation("tanh cancels", K, "tl.where(y2 > 0.0625, far,", "tl.where(y2 >= 0, far,", SOFTCAP),
    Mutation("tanh is a line", K, "y + y * (y2 * series)", "y", SOFTCAP),
    Mutation(
        "the label's product for its logit",
        K,
        "at_label = _logits(at_label, heads[0], heads[1])",
        "pass",
        HEAD["both"],
    ),
    Mutation(
        "the bias' gradient has another sign",
        K,
        "bias_gradient += gradient",
        "bias_gradient -= gradient",
        HEAD["both"],
    ),
    Mutation("the bias is taken away", R, "x += self.bias", "x -= self.bias", HEAD["bias"]),
    Mutation("no scale", R, "x *= self.scale", "pass", HEAD["both"]),
    Mutation("the cap is 1", R, "x.div_(self.softcap).tanh_()", "x.tanh_()", HEAD["both"]),
    Mutation("the gradient is straight", R, "1 - (logits /", "1 - 0 * (logits /", HEAD["both"]),
    Mutation("the gradient has no scale", R, "gradient.mul_(self.scale)", "gradient", HEAD["both"]),
    Mutation(
        "0 * NaN is NaN in a row left out",
        R,
        "slope.masked_fill_(gradient == 0, 0)",
        "slope",
        HEAD_NOT_NEEDED,
    ),
    Mutation(
        "one side's head",
        R,
        "h.logits_(x.clone()) for h, x in zip(heads,",
        "h.logits_(x.clone()) for h, x in zip(heads[:1] * 2,",
        HEAD["both"],
    ),
    Mutation(
        "the bias' gradient is the last block's",
        R,
        "bias_gradient += total.sum(0)",
        "bias_gradient[:] = total.sum(0)",
        HEAD["bias"],
    ),
    Mutation(
        "small divergences are differences",
        K,
        "small = soft & (kd < SMALL_BITS)",
        "small = soft & (kd < -1.0)",
        SMALL["forward_kl", 1e-3],
    ),
    Mutation(
        "phi is a square",
        K,
        "return x * x * (0.5 + x * p)\n\n\n@triton.jit\ndef _psi",
        "return x * x * 0.5\n\n\n@triton.jit\ndef _psi",
        SMALL["forward_kl", 0.15],
    ),
    Mutation(
        "psi is a square",
        K,
        "return x * x * (0.5 + x * p)\n\n\n@triton.jit\ndef _apart",
        "return x * x * 0.5\n\n\n@triton.jit\ndef _apart",
        SMALL["jsd", 0.15],
    ),
    Mutation(
        "the sums' ratio is not in d",
        K,
        "log_ratio = tl.log2(to_s)",
        "log_ratio = 0.0 * to_s",
        SMALL["forward_kl", 0.15],
    ),
    Mutation(
        "small KL's terms are not of one scale", K, "e_t *= to_s", "pass", FAR_APART["forward_kl"]
    ),
    Mutation(
        "small KL leaves out what is far",
        K,
        "tl.where(near, e_t * _phi(nats), e_s - e_t - e_t * nats)",
        "tl.where(near, e_t * _phi(nats), 0.0)",
        FAR_APART["forward_kl"],
    ),
    Mutation(
        "small reverse KL leaves out what is far",
        K,
        "tl.where(near, e_s * _phi(-nats), e_t - e_s + e_s * nats)",
        "tl.where(near, e_s * _phi(-nats), 0.0)",
        FAR_APART["reverse_kl"],
    ),
    Mutation(
        "small JSD forgets the mixture",
        K,
        "tl.where(near, 0.0, mixture - e_t)",
        "tl.where(near, 0.0, 0.0)",
        FAR_APART["jsd"],
    ),
    Mutation(
        "small KL's gradient is a line",
        K,
        "g = by_s * tl.where(near, e_t * (nats + _phi(nats)), e_s - e_t)",
        "g = by_s * (e_t * nats)",
        FAR_APART["forward_kl"],
    ),
    Mutation(
        "small reverse KL's gradient has no mean",
        K,
        "if KD == REVERSE_KL:\n                mean = kd",
        "if KD == REVERSE_KL:\n                mean = 0.0 * kd",
        SMALL["reverse_kl", 0.15],
    ),
    Mutation(
        "small JSD's gradient has no mean",
        K,
        "of_q * LOG2_E - mean",
        "of_q * LOG2_E",
        SMALL["jsd", 0.15],
    ),
    Mutation(
        "a small row's weight in the JSD",
        K,
        "kd = beta * kd + (1 - beta) * mean",
        "kd = (1 - beta) * kd + beta * mean",
        SMALL["jsd", 0.15],
    ),
    Mutation(
        "no bound of d",
        K,
        "tl.where(d > -100.0, tl.minimum(d, 100.0), -100.0)",
        "d",
        EXCLUDED["forward_kl"],
    ),
    Mutation(
        "entropy of the sums alone",
        K,
        "tl.log2(l_s) - tl.sum(h_s, 0) / l_s",
        "tl.log2(l_s)",
        COUNTED,
    ),
    Mutation(
        "the teacher's entropy is the student's",
        K,
        "tl.log2(l_t) - tl.sum(h_t, 0) / l_t",
        "tl.log2(l_s) - tl.sum(h_t, 0) / l_t",
        COUNTED,
    ),
    Mutation("statistics outside the mask", K, "tl.where(soft, h_s, 0.0)", "h_s", COUNTED),
    Mutation(
        "the last of equal columns",
        W,
        "tl.where(here == highest, tl.minimum(at, col), col)",
        "tl.where(here == highest, tl.maximum(at, col), col)",
        FIRST_OF_EQUALS,
    ),
    Mutation(
        "the threads' last column",
        W,
        "return tl.min(tl.where(highest == tl.max(highest, 0), col",
        "return tl.max(tl.where(highest == tl.max(highest, 0), col",
        FIRST_OF_EQUALS,
    ),
    Mutation(
        "reference: no series",
        R,
        "near = d.abs() < NEAR",
        "near = d.abs() < 0",
        SMALL["forward_kl", 1e-3],
    ),
    Mutation(
        "reference: phi",
        R,
        "range(15 if x.dtype == torch.float64 else 8, 2, -1)",
        "range(15 if x.dtype == torch.float64 else 8, 3, -1)",
        SMALL["forward_kl", 0.15],
    ),
    Mutation(
        "reference: psi",
        R,
        "series.mul_(-x).add_(1 / k)",
        "series.mul_(x).add_(1 / k)",
        SMALL["jsd", 0.15],
    ),
    Mutation(
        "reference: what rounding left",
        R,
        "    d = d - torch.where",
        "    torch.where",
        SMALL["forward_kl", 1e-3],
    ),
    Mutation(
        "reference: saturated",
        R,
        "saturated = (kl_q_m > farthest / 2)",
        "saturated = (kl_q_m > 2 * farthest)",
        SATURATED,
    ),
    Mutation(
        "reference: entropy", R, "entropies.append(-(log_p", "entropies.append((log_p", COUNTED
    ),
    Mutation(
        "reference: agreement of the last",
        R,
        ".where(x == x.amax(-1, keepdim=True), s.shape[-1]).amin(-1)",
        ".where(x == x.amax(-1, keepdim=True), -1).amax(-1)",
        FIRST_OF_EQUALS,
    ),
]


# The mutated code in place of the real


@contextmanager
def kernels_of(folder: Path) -> Iterator[None]:
    """distilfast_kernels is the package in this folder."""

    def forget() -> dict[str, ModuleType]:
        names = [x for x in sys.modules if x.split(".")[0] == "distilfast_kernels"]
        return {name: sys.modules.pop(name) for name in names}

    real = forget()
    try:
        load("distilfast_kernels", folder / "__init__.py", folder)
        yield
    finally:
        forget()
        sys.modules.update(real)


@contextmanager
def reference_of(folder: Path) -> Iterator[None]:
    """The torch backend computes what reference.py in this folder says."""
    module = load("distilfast_mutated_reference", folder / "reference.py")
    torch_backend = backends.BACKENDS["torch"]
    torch_backend = dataclasses.replace(
        torch_backend,
        **{name: getattr(module, name) for name in ("hidden_cosine", "row_scales", "reduce_rows")},
    )
    # "auto" means the reference, too
    without_cpp = dataclasses.replace(
        backends.BACKENDS["cpp"], unavailable=lambda: "the reference is asked"
    )
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends, "reference", module)
            patch.setitem(backends.BACKENDS, "torch", torch_backend)
            patch.setitem(backends.BACKENDS, "cpp", without_cpp)
            yield
    finally:
        del sys.modules[module.__name__]


def load(name: str, path: Path, package: Path | None = None) -> ModuleType:
    where = None if package is None else [str(package)]
    spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=where)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def copy_of(file: str, folder: Path) -> tuple[str, Path]:
    """(the backend that a file belongs to, a copy of its package)."""
    backend, module = ("torch", reference) if file == R else ("triton", distilfast_kernels)
    reason = backends.unavailable(backend)
    if reason is None and backend == "triton" and not distilfast_kernels.interpreted():
        reason = "broken kernels are for the interpreter: on a GPU one of them could take it down"
    if reason is not None:
        pytest.skip(reason)
    shutil.copytree(
        Path(module.__file__).parent,
        folder / "package",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    return backend, folder / "package"


def instead(backend: str, folder: Path) -> Any:
    return reference_of(folder) if backend == "torch" else kernels_of(folder)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    backend, folder = copy_of(mutation.file, tmp_path)
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1, f"{mutation.old!r} is not in {mutation.file} exactly once"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    with instead(backend, folder), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, on inf and NaN
        try:
            mutation.caught_by(backend)
        except AssertionError:
            return
        except Exception as error:
            pytest.fail(f"malformed, it raises {error!r}")
    pytest.fail(f"{mutation.caught_by.test.__name__} did not notice")


@pytest.mark.parametrize("file", [K, R])
def test_unmutated_copy_passes_the_same_calls(file: str, tmp_path: Path) -> None:
    backend, folder = copy_of(file, tmp_path)
    calls = {repr(x.caught_by): x.caught_by for x in MUTATIONS if (x.file == R) == (file == R)}
    with instead(backend, folder):
        for caught_by in calls.values():
            caught_by(backend)
    # and the real ones are back
    assert sys.modules["distilfast_kernels"] is distilfast_kernels
    assert backends.reference is reference
