"""Mutations of the Triton kernels and of reference.py.

Left out is what only a GPU can tell (int32 offsets, misaligned accesses, rows read in vain), what
would leave the tensors, and what changes no number.
"""

from __future__ import annotations

import test_combine_teachers as ensembles
import test_heads as heads
import test_hidden_cosine as hidden
import test_launchers as launchers
import test_linear as fused
import test_losses as values
import test_losses_edges as edges
import test_near as near
import test_triton as launches
from oracle import BF16, DIVERGENCES, FP16, FP32, INF, MODES, NAN

from mutations import Mutation, call
from mutations.calls import (
    AT,
    COUNTED,
    DIVISORS,
    EXCLUDED,
    FAR_COLUMNS,
    FIRST_OF_EQUALS,
    HEAD,
    IMPOSSIBLE,
    INFINITE_MSE,
    MASKED_NAN,
    MASKS,
    NEAR,
    NOTHING_COUNTS,
    SOFTCAP,
    UNDERFLOW,
)

THE_REFERENCE = ("divergences.py", "reference.py")

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
    for kind in DIVERGENCES
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
WRONG_LABEL = call(launchers.test_wrong_label_makes_its_own_row_nan_and_no_other, label=303)
NEGATIVE_LABEL = call(launchers.test_wrong_label_makes_its_own_row_nan_and_no_other, label=-1)
ANY_STRIDE = call(launchers.test_labels_mask_and_scales_may_have_any_stride)
PARTS = call(values.test_loss_is_the_weighted_sum_of_unweighted_parts)
PEAK = call(launches.test_maxima_that_move_apart_keep_the_divergence, gap=40.0, temperature=7.3)
PARITY_UNDER_MASKS = call(
    values.test_parity_under_masks_and_labels, which_labels="all", which_mask="float"
)
BANNED = {
    name: call(
        edges.test_column_minus_inf_in_both_adds_nothing, keywords=keywords, columns=list(range(8))
    )
    for name, keywords in zip(edges.ALONE_IDS, edges.ALONE, strict=True)
}
LEADING_MINUS_INF = call(edges.test_minus_inf_leading_columns_do_not_break_a_running_maximum)
ANY_IGNORE_INDEX = call(edges.test_ignore_index_may_be_any_number, ignore_index=-1)
ZERO_VECTOR = call(edges.test_zero_vector_has_cosine_loss_one_and_no_gradient, side="both")
NAN_OR_ZERO = call(launchers.test_nan_in_a_row_is_not_taken_for_a_zero_vector, side="student")
OUTSIDE_THE_MASK = {
    low: call(
        launches.test_row_outside_the_mask_is_scored_by_its_label_whatever_its_logits,
        divergence="forward_kl",
        low=low,
    )
    for low in (-INF, -1e20, NAN)
}
NO_GRADIENT = call(
    launchers.test_launch_without_a_gradient_loses_nothing_and_writes_nothing,
    divergence="forward_kl",
)
HIDDEN_MASKED = call(
    hidden.test_masked_rows_contribute_exactly_nothing, reduction="mean", kind="bool", bad=NAN
)
HIDDEN_VALUES = call(hidden.test_loss_and_gradient_equal_hand_values)
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
    for mode in MODES
}
TEACHERS_ALIKE = call(
    launchers.test_combination_of_any_rows_equals_the_definition, n_rows=3, mode="probability"
)
TEACHERS_GROW = call(launches.test_combination_equals_the_definition_where_a_maximum_grows)
HEAD_BESIDE_PADDING = call(
    heads.test_parity_at_every_temperature_beside_padding, name="softcap", temperature=3.7
)
HEAD_LONG = call(heads.test_parity_of_rows_longer_than_the_first_columns, divergence="forward_kl")
HEAD_NOT_NEEDED = call(heads.test_rows_that_nothing_needs_add_nothing, name="softcap")
SCALES = call(launchers.test_scale_multiplies_in_fp32_and_rounds_once, shift=0, dtype=BF16)
SCALE_BY_ONE = call(launches.test_scaling_by_one_changes_no_bit, dtype=FP32)

SCALE_SEVERAL = call(launches.test_few_programs_scale_several_gradients)
PROJECTED = call(fused.test_rows_that_are_not_needed_are_not_projected)
COUNTS = call(launches.test_counts_are_the_references, block=4)
SUMS = call(launches.test_sums_are_the_references, block=16)
NAN_DROPPED = call(
    launches.test_nan_row_is_nan_where_a_maximum_drops_it,
    keywords=edges.with_part("kd", "jsd"),
    side="teacher",
)
CONFIDENT = call(values.test_parity_of_confident_models, divergence="jsd")
EXCLUDED_BY = {
    side: call(launches.test_column_that_one_side_alone_excludes_is_not_left_out, side=side)
    for side in ("student", "teacher")
}
HIDDEN_ANY_LAYOUT = call(launchers.test_hidden_rows_of_any_layout_are_taken)
HIDDEN_WIDTHS = call(
    launches.test_hidden_layers_of_any_number_and_width_are_averaged, widths=[8, 12, 8, 12]
)
FOUR_TEACHERS = call(
    launches.test_combination_of_teachers_equals_the_definition, count=4, mode="probability"
)
TEACHERS_UNALIGNED = call(
    launches.test_combination_of_padded_rows_equals_the_definition,
    strides=(517, 518),
    dtypes=(FP16, BF16),
    stride_z=517,
    mode="logit",
)
TEACHERS_STRIDES = call(
    launches.test_combination_of_padded_rows_equals_the_definition,
    strides=(517, 525),
    dtypes=(FP32, BF16),
    stride_z=533,
    mode="logit",
)
TEACHERS_WEIGHED = call(
    ensembles.test_parity_with_the_definition,
    weights=[0.2, 0.5, 0.3],
    dtype=FP32,
    temperature=2.0,
    mode="probability",
)

# fmt: off
TABLE = {
    "distillation.py": [
        # The scalars of the losses
        ("T squared is forgotten", AT["forward_kl", 2.0],
         "kd * (LN_2 * temperature * temperature) * weight", "kd * LN_2 * weight"),
        ("T squared becomes T", AT["forward_kl", 2.0],
         "kd * (LN_2 * temperature * temperature) * weight", "kd * (LN_2 * temperature) * weight"),
        ("the gradient forgets T", AT["forward_kl", 2.0],
         "by_kd = by_row * kd_weight * temperature", "by_kd = by_row * kd_weight"),
        ("the gradient forgets the weight", PARTS,
         "by_kd = by_row * kd_weight * temperature", "by_kd = by_row * temperature"),
        ("bits for nats", AT["forward_kl", 2.0], "kd * (LN_2 * temp", "kd * (temp"),
        ("bits for nats in CE", PARTS, "ce = LN_2 * (", "ce = ("),
        ("CE at T", PARTS,
         "x_label = temperature * (at_label * scale - top_s)",
         "x_label = at_label * scale - top_s"),
        ("CE at T where T is no power", AT["forward_kl", 7.3],
         "x_label = at_label * LOG2_E - top_1", "x_label = at_label * scale - top_s"),
        ("CE's sum at T", PARTS, "rows.thread_sum(_power(e_s, power))", "rows.thread_sum(e_s)"),
        ("CE's sum at T where T is no power", AT["forward_kl", 7.3],
         "rows.exponents(s, LOG2_E, m_1)", "rows.exponents(s, scale, m_1)"),
        ("CE's gradient at T", PARTS, "g += by_1 * _power(e_s, power)", "g += by_1 * e_s"),
        ("CE's gradient at T where T is no power", AT["forward_kl", 7.3],
         "g += by_1 * tl.exp2(s * LOG2_E - top_1)", "g += by_1 * e_s"),
        ("one factor too few for a power", AT["forward_kl", 3.0], "if power > 2:", "if power > 3:"),
        ("a power where T is not whole", AT["forward_kl", 7.3],
         "int(temperature) if temperature in (1, 2, 3, 4) else 0",
         "int(temperature) if temperature < 8 else 0"),
        ("CE's gradient forgets the label", PARTS, "tl.where(cols == label, by_label, 0.0)", "0.0"),
        ("the label is a column further", AROUND_TILES["forward_kl"],
         "cols == label,", "cols == label + 1,"),
        ("CE is that of the column before", AROUND_TILES["forward_kl"],
         "tl.load(s_ptr + offset_s + label,",
         "tl.load(s_ptr + offset_s + tl.maximum(label - 1, 0),"),
        ("columns of full tiles counted from the boundary", AROUND_TILES["forward_kl"],
         "s, t, head + at + tile, row, how", "s, t, at + tile, row, how"),
        ("columns of the last tile counted from the boundary", AROUND_TILES["forward_kl"],
         "s, t, head + rest, row, how", "s, t, rest, row, how"),
        ("CE's gradient forgets its weight", PARTS, "by_label = ce_weight * tl", "by_label = tl"),
        ("kd takes ce's normaliser", DIVISORS,
         "by_row = weight * tl.load(kd_scale_ptr + row * stride_kd_scale)",
         "by_row = weight * tl.load(ce_scale_ptr + row * stride_ce_scale)"),
        ("ce takes kd's normaliser", DIVISORS,
         "by_label = ce_weight * tl.load(ce_scale_ptr + row * stride_ce_scale)",
         "by_label = ce_weight * tl.load(kd_scale_ptr + row * stride_kd_scale)"),
        ("every row takes the first one's scale", ANY_STRIDE,
         "kd_scale.stride(0) if kd_scale.ndim else 0", "0"),
        # Zero, and other rows
        ("no gradient", PARTS, "    return g\n", "    return g * 0\n"),
        ("no kd", PARTS, "tl.store(out, kd)", "tl.store(out, 0.0)"),
        ("no ce", PARTS, "tl.store(out + n_rows, ce)", "tl.store(out + n_rows, 0.0)"),
        ("no cos", PARTS, "n_rows + n_rows, cos)", "n_rows + n_rows, 0.0)"),
        ("no mse", PARTS, "n_rows + n_rows, mse)", "n_rows + n_rows, 0.0)"),
        ("a row's losses go to its neighbour", AROUND_TILES["forward_kl"],
         "out = rows_ptr + row\n", "out = rows_ptr + row // 2 * 2\n"),
        # Where the elements are
        ("the first sweep forgets full tiles", AROUND_TILES["forward_kl"],
         "sums = _add_sums(s, t, sums, how, KD, CE, WHOLE, COS, MSE)\n    if", "pass\n    if"),
        ("the first sweep forgets the last tile", AROUND_TILES["forward_kl"],
         "sums = _add_sums(s, t, sums, how, KD, CE, WHOLE, COS, MSE)\n    merged",
         "pass\n    merged"),
        ("the first sweep forgets the edges", AROUND_TILES["forward_kl"],
         "sums = _add_sums(edge_s, edge_t, sums, how, KD, CE, WHOLE, COS, MSE)", "pass"),
        ("the last sweep forgets full tiles", AROUND_TILES["forward_kl"],
         "tl.store(g_body + at + tile, g.to(dtype), eviction",
         "tl.store(g_body + at + tile, g.to(dtype), mask=tile < 0, eviction"),
        ("the last sweep forgets the last tile", AROUND_TILES["forward_kl"],
         "tl.store(g_body + rest, g.to(dtype), mask=rest < body)",
         "tl.store(g_body + rest, g.to(dtype), mask=rest < 0)"),
        ("the last sweep forgets the edges", AROUND_TILES["forward_kl"],
         "tl.store(g_row + edge, g.to(dtype), mask=is_edge)",
         "tl.store(g_row + edge, g.to(dtype), mask=edge < 0)"),
        ("the last tile is written too far", AROUND_TILES["forward_kl"],
         "tl.store(g_body + rest, g.to(dtype), mask=rest < body)",
         "tl.store(g_body + rest, g.to(dtype), mask=rest < body + VECTOR)"),
        ("padding keeps what it held", PADDED,
         "tl.store(g_row + padding, 0.0, mask=padding < n_padded)",
         "tl.store(g_row + padding, 0.0, mask=padding < 0)"),
        ("padding is not the launcher's business", PADDED,
         "        student.shape[1],", "        options.vocab_size,"),
        ("more padding than a tile", PADDED,
         "for start in range(n_cols, n_padded, BLOCK_V):",
         "for start in range(n_cols, n_cols + 1, BLOCK_V):"),
        ("labels are taken for dense", ANY_STRIDE, "labels.contiguous()", "labels"),
        ("the mask is taken for dense", ANY_STRIDE, "mask.contiguous()", "mask"),
        ("padding is written where no gradient is wanted", NO_GRADIENT,
         "if GRADIENT:\n        for start", "if True:\n        for start"),
        ("a row that nothing needs is overwritten where no gradient is wanted", NO_GRADIENT,
         "if GRADIENT:\n            nothing", "if True:\n            nothing"),
        ("the teacher's rows are as far apart as the student's", NARROW["teacher"],
         "row * stride_s, row * stride_t, row * stride_g",
         "row * stride_s, row * stride_s, row * stride_g"),
        ("the gradient's rows are as far apart as the student's", NARROW["gradient"],
         "row * stride_s, row * stride_t, row * stride_g",
         "row * stride_s, row * stride_t, row * stride_s"),
        ("the student's edges are where the teacher's are", OTHER_STRIDES,
         "s_row, s_body = s_ptr + offset_s,", "s_row, s_body = s_ptr + offset_t,"),
        ("the teacher's edges are where the gradient's are", OTHER_STRIDES,
         "t_row, t_body = t_ptr + offset_t,", "t_row, t_body = t_ptr + offset_g,"),
        ("the gradient's edges are where the student's are", OTHER_STRIDES,
         "g_row, g_body = g_ptr + offset_g,", "g_row, g_body = g_ptr + offset_s,"),
        # Sums in bits
        ("the student's sum is not rescaled", MOVING_MAXIMA,
         "l_s = l_s * a_s + rows", "l_s = l_s + rows"),
        ("the teacher's sum is not rescaled", MOVING_MAXIMA,
         "l_t = l_t * a_t + rows", "l_t = l_t + rows"),
        ("CE's sum is not rescaled", AROUND_TILES["forward_kl"],
         "l_1 = l_1 * _power(a_s, power) + rows", "l_1 = l_1 + rows"),
        ("CE's sum is not rescaled where T is no power", PEAK,
         "l_1 = l_1 * rows.exp2_whole(fall_1) + rows", "l_1 = l_1 + rows"),
        ("CE's sum is rescaled at T", AROUND_TILES["forward_kl"],
         "l_1 = l_1 * _power(a_s, power) + rows", "l_1 = l_1 * a_s + rows"),
        ("forward KL's d is not rescaled", MOVING_MAXIMA,
         "d = a_t * (d + l_t * (fall_t - fall_s)) + rows",
         "d = d + l_t * (fall_t - fall_s) + rows"),
        ("forward KL's d is not shifted", MOVING_MAXIMA,
         "d = a_t * (d + l_t * (fall_t - fall_s)) + rows", "d = a_t * d + rows"),
        ("reverse KL's d is not shifted", MOVING_MAXIMA,
         "d = a_s * (d + l_s * (fall_s - fall_t)) + rows", "d = a_s * d + rows"),
        ("forward KL's d is merged without a shift", AROUND_TILES["forward_kl"],
         "d = a_t * (d + l_t * ((m_t - top_t) - (m_s - top_s)))", "d = a_t * d"),
        ("reverse KL's d is merged without a shift", AROUND_TILES["reverse_kl"],
         "d = a_s * (d + l_s * ((m_s - top_s) - (m_t - top_t)))", "d = a_s * d"),
        ("threads are merged as if their maxima were one", AROUND_TILES["forward_kl"],
         "rows.sum_four(l_s * a_s, l_t * a_t, d, l_1)", "rows.sum_four(l_s, l_t, d, l_1)"),
        ("CE's threads are merged at T", AROUND_TILES["forward_kl"],
         "l_1 = l_1 * _power(a_s, power)\n", "l_1 = l_1 * a_s\n"),
        ("CE's threads are merged as one where T is no power", PEAK,
         "l_1 = l_1 * rows.exp2_whole(m_1 - top_1)", "pass"),
        # The divergences
        ("reverse KL's gradient without the mean", AT["reverse_kl", 2.0],
         "_gap(x_s, x_t) - mean)", "_gap(x_s, x_t))"),
        ("reverse KL is forward KL", AT["reverse_kl", 2.0],
         "kd = mean - tl.log2(l_s) + tl.log2(l_t)", "kd = mean + tl.log2(l_s) - tl.log2(l_t)"),
        ("an infinite reverse KL has a gradient", IMPOSSIBLE,
         'spoilt = tl.where(kd < INF, 0.0, float("nan"))', "spoilt = 0.0"),
        ("JSD's beta is the student's share", AT["jsd", 2.0],
         "share_s, share_t = 1 - beta, beta * to_s", "share_s, share_t = beta, (1 - beta) * to_s"),
        ("JSD weighs its two sides alike", AT["jsd", 2.0],
         "+ tl.log2(to_s)) + (1 - beta) * mean", "+ tl.log2(to_s)) + beta * mean"),
        ("JSD's gradient forgets 1 - beta", AT["jsd", 2.0],
         "by_kd * LN_2 * (1 - beta) / l_s", "by_kd * LN_2 / l_s"),
        ("JSD's gradient without the mean", AT["jsd", 2.0],
         "_gap(x_s, mixture) - mean)", "_gap(x_s, mixture))"),
        ("JSD's second sweep forgets full tiles", AROUND_TILES["jsd"],
         "sums = _add_more(s, t, head + at + tile, sums, row, WHAT, KD)", "pass"),
        ("JSD's second sweep forgets the last tile", AROUND_TILES["jsd"],
         "sums = _add_more(s, t, head + rest, sums, row, WHAT, KD)", "pass"),
        ("JSD's second sweep forgets the edges", AROUND_TILES["jsd"],
         "sums = _add_more(edge_s, edge_t, edge, sums, row, WHAT, KD)", "pass"),
        ("a NaN row's JSD has a gradient", NAN_DROPPED,
         'tl.where(kd == kd, by_kd * LN_2 * (1 - beta) / l_s, float("nan"))',
         "by_kd * LN_2 * (1 - beta) / l_s"),
        ("0 log 0 is NaN", BANNED["forward_kl"], "tl.where(gap > -1024.0, gap, -1024.0)", "gap"),
        ("the mixture may be 0", CONFIDENT,
         "log2(tl.maximum(share_s * e_s + share_t * e_t, TINY))",
         "log2(share_s * e_s + share_t * e_t)"),
        ("tiny times infinite is NaN", UNDERFLOW,
         "(d != d) & (l_s == l_s)", "(d == INF) & (l_s == l_s)"),
        # Cosine and squares
        ("a zero vector has a direction", ZERO_VECTOR,
         "zero = ((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)", "zero = ss < 0"),
        ("NaN beside a zero vector is none", NAN_OR_ZERO,
         "((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)", "((ss == 0) | (tt == 0))"),
        ("the cosine's gradient forgets the projection", PARITY_UNDER_MASKS,
         "by_cos * (tl.where(out, 0.0, s) * ratio - tl.where(out, 0.0, t))",
         "by_cos * (0.0 - tl.where(out, 0.0, t))"),
        ("the cosine's gradient forgets its weight", PARITY_UNDER_MASKS,
         "by_row * cos_weight * by_length", "by_row * by_length"),
        ("the cosine looks at excluded columns", BANNED["cos"],
         "return (s == -INF) & (t == -INF)", "return (s == -INF) & (t == INF)"),
        ("a column that the teacher alone excludes is left out", EXCLUDED_BY["teacher"],
         "return (s == -INF) & (t == -INF)", "return t == -INF"),
        ("half of MSE's gradient", PARTS, "by_row * mse_weight * 2", "by_row * mse_weight"),
        ("an infinite MSE has a gradient", INFINITE_MSE,
         'tl.where(sq < INF, by_row * mse_weight * 2, float("nan"))', "by_row * mse_weight * 2"),
        # Masks and labels
        ("the mask is ignored", MASKS,
         "weight = tl.load(mask_ptr + row).to(tl.float32)",
         "weight = tl.load(mask_ptr + row).to(tl.float32) * 0 + 1"),
        ("a row of weight 0 is read", MASKED_NAN, "soft &= weight != 0", "soft &= weight >= 0"),
        ("kd forgets the row's weight", PARITY_UNDER_MASKS,
         "temperature) * weight, 0.0)", "temperature), 0.0)"),
        ("cos forgets the row's weight", PARITY_UNDER_MASKS,
         "(1 - cosine) * weight, 0.0)", "(1 - cosine), 0.0)"),
        ("mse forgets the row's weight", MASKS, "sq * weight", "sq"),
        ("the gradient forgets the row's weight", MASKS, "by_row = weight * tl", "by_row = tl"),
        ("a row that nothing needs keeps its loss", NOT_NEEDED,
         "            tl.store(rows_ptr + row, 0.0)", "            tl.store(rows_ptr + row, 1.0)"),
        ("a row that nothing needs keeps all losses but one", NOT_NEEDED,
         "            rows_ptr += n_rows", "            rows_ptr += 0"),
        ("outside the mask an infinite length spoils CE", OUTSIDE_THE_MASK[-1e+20],
         "tl.where(soft & (zero == 0), tl.div_rn(st, ss), 0.0)",
         "tl.where(zero == 0, tl.div_rn(st, ss), 0.0)"),
        ("a row that nothing needs keeps full tiles", NOT_NEEDED,
         "tl.store(g_body + i * BLOCK_V + tile, nothing)", "pass"),
        ("a row that nothing needs keeps its last tile", NOT_NEEDED,
         "tl.store(g_body + rest, nothing, mask=rest < body)", "pass"),
        ("a row that nothing needs keeps its edges", NOT_NEEDED,
         "tl.store(g_row + edge, 0.0, mask=is_edge)", "pass"),
        ("outside the mask the last tile of a teacher is -inf", OUTSIDE_THE_MASK[-INF],
         "-INF)\n        t = tl.where(soft, t, s)", "-INF)"),
        ("outside the mask full tiles of a teacher are 0", OUTSIDE_THE_MASK[-INF],
         "        t = tl.where(soft, t, s)\n    return s, t\n\n\n@triton.jit\ndef _load_some",
         "    return s, t\n\n\n@triton.jit\ndef _load_some"),
        ("outside the mask NaN has a kd", OUTSIDE_THE_MASK[NAN],
         "kd = tl.where(soft, kd * (LN_2 * temperature * temperature) * weight, 0.0)",
         "kd = kd * (LN_2 * temperature * temperature) * weight"),
        ("outside the mask NaN has a cos", OUTSIDE_THE_MASK[NAN],
         "cos = tl.where(soft, (1 - cosine) * weight, 0.0)", "cos = (1 - cosine) * weight"),
        ("outside the mask NaN has an mse", OUTSIDE_THE_MASK[NAN],
         "mse = tl.where(soft, sq * weight, 0.0)", "mse = sq * weight"),
        ("ignore_index is -100", ANY_IGNORE_INDEX,
         "labelled = (wanted != ignore_index)", "labelled = (wanted != -100)"),
        ("ignore_index is a label", DIVISORS,
         "labelled = (wanted != ignore_index)", "labelled = (wanted == wanted)"),
        ("a total of 0 leaves kd in", NOTHING_COUNTS,
         "soft &= tl.load(kd_scale_ptr + row * stride_kd_scale) != 0", "pass"),
        ("a total of 0 leaves ce in", NOTHING_COUNTS,
         "(wanted != ignore_index) & counted", "wanted != ignore_index"),
        ("a wrong label has a loss", WRONG_LABEL, 'tl.where(known, ce, float("nan"))', "ce"),
        ("a wrong label has a gradient", WRONG_LABEL,
         'by_label = tl.where(known, by_label, float("nan"))', "pass"),
        ("a label in the padding is known", WRONG_LABEL,
         "(wanted >= 0) & (wanted < n_cols)", "(wanted >= 0) & (wanted < n_padded)"),
        ("a negative label is known", NEGATIVE_LABEL,
         "(wanted >= 0) & (wanted < n_cols)", "(wanted >= -1) & (wanted < n_cols)"),
        # what a fused head leaves to the kernels
        ("one head for both sides", HEAD_LONG,
         "t = _logits(t, heads[2], heads[3])\n        t = tl.where",
         "t = _logits(t, heads[0], heads[1])\n        t = tl.where"),
        ("no column is capped, too", HEAD_BESIDE_PADDING,
         "s = tl.where(exists, _logits(s, heads[0], heads[1]), -INF)",
         "s = _logits(s, heads[0], heads[1])"),
        ("no column of the teacher is capped, too", HEAD_BESIDE_PADDING,
         "t = tl.where(exists, _logits(t, heads[2], heads[3]), -INF)",
         "t = _logits(t, heads[2], heads[3])"),
        ("the gradient does not bend", HEAD["both"],
         "g *= _slope(s, heads[0], heads[1])", "g *= heads[0]"),
        ("the gradient is not scaled", HEAD["both"], "tl.float32) * scale", "tl.float32)"),
        ("tanh cancels", SOFTCAP, "tl.where(y2 > 0.0625, far,", "tl.where(y2 >= 0, far,"),
        ("tanh is a line", SOFTCAP, "y + y * (y2 * series)", "y"),
        ("the label's product for its logit", HEAD["both"],
         "at_label = _logits(at_label, heads[0], heads[1])", "pass"),
        ("the bias' gradient has another sign", HEAD["both"],
         "bias_gradient += gradient", "bias_gradient -= gradient"),
        ("small divergences are differences", NEAR["forward_kl", 0.001],
         "small = soft & (kd < SMALL_BITS)", "small = soft & (kd < -1.0)"),
        ("phi is a square", NEAR["forward_kl", 0.15],
         "return x * x * (0.5 + x * p)\n\n\n@triton.jit\ndef _psi",
         "return x * x * 0.5\n\n\n@triton.jit\ndef _psi"),
        ("psi is a square", NEAR["jsd", 0.15],
         "return x * x * (0.5 + x * p)\n\n\n@triton.jit\ndef _apart",
         "return x * x * 0.5\n\n\n@triton.jit\ndef _apart"),
        ("the sums' ratio is not in d", NEAR["forward_kl", 0.15],
         "log_ratio = tl.log2(to_s)", "log_ratio = 0.0 * to_s"),
        ("small KL's terms are not of one scale", FAR_COLUMNS["forward_kl"], "e_t *= to_s", "pass"),
        ("small KL leaves out what is far", FAR_COLUMNS["forward_kl"],
         "tl.where(near, e_t * _phi(nats), e_s - e_t - e_t * nats)",
         "tl.where(near, e_t * _phi(nats), 0.0)"),
        ("small reverse KL leaves out what is far", FAR_COLUMNS["reverse_kl"],
         "tl.where(near, e_s * _phi(-nats), e_t - e_s + e_s * nats)",
         "tl.where(near, e_s * _phi(-nats), 0.0)"),
        ("small JSD forgets the mixture", FAR_COLUMNS["jsd"],
         "tl.where(near, 0.0, mixture - e_t)", "tl.where(near, 0.0, 0.0)"),
        ("small KL's gradient is a line", FAR_COLUMNS["forward_kl"],
         "g = by_s * tl.where(near, e_t * (nats + _phi(nats)), e_s - e_t)",
         "g = by_s * (e_t * nats)"),
        ("small reverse KL's gradient has no mean", NEAR["reverse_kl", 0.15],
         "if KD == REVERSE_KL:\n                mean = kd",
         "if KD == REVERSE_KL:\n                mean = 0.0 * kd"),
        ("small JSD's gradient has no mean", NEAR["jsd", 0.15],
         "of_q * LOG2_E - mean", "of_q * LOG2_E"),
        ("a small row's weight in the JSD", NEAR["jsd", 0.15],
         "kd = beta * kd + (1 - beta) * mean", "kd = (1 - beta) * kd + beta * mean"),
        ("no bound of d", EXCLUDED, "tl.where(d > -100.0, tl.minimum(d, 100.0), -100.0)", "d"),
        ("entropy of the sums alone", COUNTED,
         "tl.log2(l_s) - tl.sum(h_s, 0) / l_s", "tl.log2(l_s)"),
        ("the teacher's entropy is the student's", COUNTED,
         "tl.log2(l_t) - tl.sum(h_t, 0) / l_t", "tl.log2(l_s) - tl.sum(h_t, 0) / l_t"),
        ("statistics outside the mask", COUNTED, "tl.where(soft, h_s, 0.0)", "h_s"),
    ],
    "rows.py": [
        ("a row skips its first elements", AROUND_TILES["forward_kl"],
         "tl.where(i < VECTOR, i < head, cols < n_cols)",
         "tl.where(i < VECTOR, i < 0, cols < n_cols)"),
        ("a row skips its last elements", AROUND_TILES["forward_kl"],
         "tl.where(i < VECTOR, i < head, cols < n_cols)",
         "tl.where(i < VECTOR, i < head, cols < 0)"),
        ("a row begins at a boundary", AROUND_TILES["forward_kl"],
         "tl.minimum((VECTOR - offset % VECTOR) % VECTOR, n_cols)",
         "tl.minimum((offset - offset) % VECTOR, n_cols)"),
        ("strides need not agree", NARROW["teacher"],
         "len({x.stride(0) % vector for x in tensors}) == 1 and", ""),
        ("storage need not be aligned", UNALIGNED, "x.data_ptr() % 16 == 0", "True"),
        ("a maximum need not be whole", AROUND_TILES["forward_kl"],
         "tl.ceil(highest * scale)", "(highest * scale)"),
        ("a maximum is that of the last tile", LEADING_MINUS_INF,
         "tl.maximum(m, tl.ceil(highest * scale))", "tl.ceil(highest * scale)"),
        ("a thread without a finite logit starts from -inf", LEADING_MINUS_INF,
         "FLOOR = tl.constexpr(-1.0e30)", "FLOOR = tl.constexpr(float('-inf'))"),
        ("powers of two wrap around", FAR_MAXIMA,
         "(tl.maximum(x, -127.0).to(tl.int32) + 127) << 23", "(x.to(tl.int32) + 127) << 23"),
        ("the last of equal columns", FIRST_OF_EQUALS,
         "tl.where(here == highest, tl.minimum(at, col), col)",
         "tl.where(here == highest, tl.maximum(at, col), col)"),
        ("the threads' last column", FIRST_OF_EQUALS,
         "return tl.min(tl.where(highest == tl.max(highest, 0), col",
         "return tl.max(tl.where(highest == tl.max(highest, 0), col"),
    ],
    "hidden_cosine.py": [
        ("layers are added up", HIDDEN_LAYERS,
         "total += (1 - st * by_length) * share", "total += 1 - st * by_length"),
        ("layers' gradients are added up", HIDDEN_LAYERS, "* weight * share", "* weight"),
        ("a layer of another width starts anew", HIDDEN_LAYERS,
         "starts.append(layer)", "starts = [layer]"),
        ("the mean is that of a launch", HIDDEN_LAYERS, "1 / len(student)", "1 / len(s)"),
        ("launches overwrite each other's rows", HIDDEN_LAYERS, "ADD=launch > 0,", "ADD=False,"),
        ("hidden: masked rows are read", HIDDEN_MASKED,
         "used = inside & (weight != 0)", "used = inside"),
        ("hidden: the row's weight is ignored", HIDDEN_WEIGHTS, "share * weight\n", "share\n"),
        ("hidden: the gradient ignores the row's weight", HIDDEN_WEIGHTS,
         "scale = scale * weight * share", "scale = scale * share"),
        ("hidden: every row takes the first one's scale", HIDDEN_ANY_LAYOUT,
         "scale.stride(0) if scale.ndim else 0", "0"),
        ("hidden: a zero vector has a direction", HIDDEN_ZERO,
         "zero = ((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)", "zero = ss < 0"),
        ("hidden: NaN beside a zero vector is none", NAN_OR_ZERO,
         "((ss == 0) | (tt == 0)) & (ss + tt == ss + tt)", "((ss == 0) | (tt == 0))"),
        ("hidden: a long row is cut off", HIDDEN_LONG, "ONCE=block_d >= n_cols", "ONCE=True"),
        ("hidden: of a long row the last tile counts", HIDDEN_LONG,
         "ss, tt, st = ss + tl.sum(s * s, 1), tt + tl.sum(t * t, 1), st + tl.sum(s * t, 1)",
         "ss, tt, st = tl.sum(s * s, 1), tl.sum(t * t, 1), tl.sum(s * t, 1)"),
        ("hidden: a long row's end is not written", HIDDEN_LONG,
         "mask=inside[:, None] & exists)", "mask=inside[:, None] & (i == 0))"),
        ("hidden: the last program's rows are not written", HIDDEN_POISONED,
         "tl.store(g_ptr + first, g, mask=inside[:, None] & (cols < n_cols)[None, :])",
         "tl.store(g_ptr + first, g, mask=(row < n_rows - 1)[:, None] & (cols < n_cols)[None, :])"),
        ("hidden: a column that one side excludes is left out", EXCLUDED_BY["student"],
         "out = (s == -INF) & (t == -INF)", "out = (s == -INF) | (t == -INF)"),
        ("hidden: a column that both exclude counts", EXCLUDED_BY["student"],
         "out = (s == -INF) & (t == -INF)", "out = (s == -INF) & (t == INF)"),
        ("hidden: layers of other widths share a launch", HIDDEN_WIDTHS,
         "widths[layer] != widths[layer - 1] or", "widths[layer] != widths[layer - 2] or"),
        ("hidden: half a gradient", HIDDEN_VALUES,
         "g = tl.where(used[:, None], by * (s * ratio - t), 0.0).to(g_ptr.dtype.element_ty)",
         "g = tl.where(used[:, None], by * (0.0 - t), 0.0).to(g_ptr.dtype.element_ty)"),
    ],
    "ensemble.py": [
        ("teachers' weights are ignored", TEACHERS["probability"],
         "shifts += (log2_weights[k] - ", "shifts += (0.0 - "),
        ("the first logit's weight is ignored", TEACHERS["logit"], "z = t * weights[0]", "z = t"),
        ("the others' logits are not weighed", TEACHERS["logit"], "z += t * weights[k]", "z += t"),
        ("teachers are combined at T = 1", TEACHERS["probability"],
         "scale = LOG2_E / temperature", "scale = LOG2_E / 1.0"),
        ("z is not multiplied by T", TEACHERS["probability"],
         "by = temperature * LN_2", "by = LN_2"),
        ("a teacher's sum is not rescaled", TEACHERS_GROW,
         "total * rows.exp2_whole(fall) + rows", "total + rows"),
        ("a teacher's threads are merged as one", TEACHERS["probability"],
         "tl.sum(total * rows.exp2_whole(m - top), 0)", "tl.sum(total, 0)"),
        ("a larger teacher is added as a smaller one", FOUR_TEACHERS,
         "total = tl.where(y > top, total * e + 1.0, total + e)", "total = total + e"),
        ("two teachers that are equal count as three", TEACHERS_ALIKE,
         "tl.where(y == top, 0.0, -tl.abs(y - top))", "tl.where(y == top, 1.0, -tl.abs(y - top))"),
        ("a teacher's sum starts from 2^0", TEACHERS_ALIKE,
         "m = tl.full([THREADS], FLOOR, tl.float32)", "m = tl.full([THREADS], 0.0, tl.float32)"),
        ("teachers are taken for dense", TEACHERS_ALIKE,
         "t if t.stride(1) == 1 else t.contiguous()", "t"),
        ("z's last tile is an element too long", TEACHERS_ALIKE,
         "tl.store(z_body + rest, z, mask=rest < body)",
         "tl.store(z_body + rest, z, mask=rest <= body)"),
        ("teachers' strides need not agree", TEACHERS_UNALIGNED,
         "vector if rows.is_aligned([*teachers, z], vector) else 1", "vector"),
        ("all teachers' rows are as far apart as the first one's", TEACHERS_STRIDES,
         "row_k = row * (odd_strides[k] // 2)", "row_k = row * (odd_strides[0] // 2)"),
        ("a column that all teachers exclude is NaN", TEACHERS["probability"],
         "tl.where(y == top, 0.0, -tl.abs(y - top))", "-tl.abs(y - top)"),
        ("the sum forgets a teacher's edges", TEACHERS["probability"],
         "m, total = _add(t, m, total, scale)\n            for", "pass\n            for"),
        ("the sum forgets a teacher's full tiles", TEACHERS["probability"],
         "m, total = _add(tl.load(t_ptrs[k] + at + tile), m, total, scale)", "pass"),
        ("the sum forgets a teacher's last tile", TEACHERS["probability"],
         "m, total = _add(u, m, total, scale)", "pass"),
        ("z's full tiles are not written", TEACHERS["logit"], "tl.store(z_body + at, z)", "pass"),
        ("z's last tile is not written", TEACHERS["logit"],
         "tl.store(z_body + rest, z, mask=rest < body)", "pass"),
        ("z's edges are not written", TEACHERS["logit"],
         "tl.store(z_ptr + row * stride_z + edge, z_edge, mask=is_edge)", "pass"),
    ],
    "scale.py": [
        ("every row is scaled by the first factor", SCALES,
         "by = tl.load(by_ptr + row * stride_by)", "by = tl.load(by_ptr)"),
        ("every factor is 1", SCALES, "if by != 1:", "if by != by:"),
        ("a factor of 1 is rounded to -1", SCALE_BY_ONE, "if by != 1:", "if by != -1:"),
        ("every program leaves", SCALES, "tl.load(by_ptr) == 1:", "tl.load(by_ptr) != 1:"),
        ("a program takes one row", SCALE_SEVERAL,
         "odd_n_rows[k] // 2, tl.num_programs(0)",
         "min(odd_n_rows[k] // 2, 2), tl.num_programs(0)"),
        ("every gradient has the first one's width", SCALE_SEVERAL,
         "                    odd_n_cols[k] // 2,", "                    odd_n_cols[0] // 2,"),
        ("gradients beyond the first launch are left", SCALE_SEVERAL,
         "filled[start : start + MAX_GRADIENTS]", "filled[:1]"),
        ("full tiles are not scaled", SCALES,
         "tl.store(at, (tl.load(at).to(tl.float32) * by).to(dtype))", "pass"),
        ("the last tile is not scaled", SCALES,
         "tl.store(g_body + rest, (g * by).to(dtype), mask=rest < body)", "pass"),
        ("the edges are not scaled", SCALES,
         "tl.store(at, (edge_g * by).to(dtype), mask=is_edge)", "pass"),
        ("the factor is rounded first", SCALES,
         "by_ptr + row * stride_by).to(tl.float32)",
         "by_ptr + row * stride_by).to(g_ptrs[k].dtype.element_ty).to(tl.float32)"),
    ],
    "reductions.py": [
        ("a masked row counts 1", COUNTS,
         "masked += weight", "masked += (weight != 0).to(tl.float32)"),
        ("every label counts", COUNTS, "hard = label != ignore_index", "hard = inside"),
        ("a label beyond the last row counts", COUNTS,
         "mask=inside, other=ignore_index", "mask=inside, other=0"),
        ("0 / 0 is 1", COUNTS, "tl.where(total <= 0, 0.0,", "tl.where(total < 0, 0.0,"),
        ("the totals change places", COUNTS,
         "tl.store(scales_ptr + 1, _reciprocal(ce_total))",
         "tl.store(scales_ptr + 1, _reciprocal(kd_total))"),
        ("a row needs both", COUNTS, "soft | hard, mask", "soft & hard, mask"),
        ("of a total of 0 rows are needed", COUNTS, "if not COUNT_MASK:", "if COUNT_MASK:"),
        ("of a total of 0 labels are needed", COUNTS, "if not COUNT_LABELS:", "if COUNT_LABELS:"),
        ("only the last rows are summed", SUMS, "total += tl.load(first", "total = tl.load(first"),
        ("ce takes kd's scale", SUMS, "(part == 1).to", "(part == 9).to"),
        ("the sum has no weights", SUMS, "weight * reduced", "reduced"),
        ("rows have no weights", SUMS, "weight * values", "values"),
    ],
    "divergences.py": [
        ("reference: T squared", AT["forward_kl", 2.0], "temperature**2 * loss", "loss"),
        ("reference: the gradient's T", AT["forward_kl", 2.0], "grad.mul_(temperature)", "grad"),
        ("reference: the mean", AT["reverse_kl", 2.0],
         "(d.masked_fill(q_is_0, 0) - loss[:, None])", "d.masked_fill(q_is_0, 0)"),
        ("reference: 1 - beta", AT["jsd", 2.0], "(1 - beta) * q * _from", "q * _from"),
        ("reference: no series", NEAR["forward_kl", 0.001],
         "near = d.abs() < NEAR", "near = d.abs() < 0"),
        ("reference: phi", NEAR["forward_kl", 0.15],
         "range(15 if x.dtype == torch.float64 else 8, 2, -1)",
         "range(15 if x.dtype == torch.float64 else 8, 3, -1)"),
        ("reference: psi", NEAR["jsd", 0.15],
         "series.mul_(-x).add_(1 / k)", "series.mul_(x).add_(1 / k)"),
        ("reference: what rounding left", NEAR["forward_kl", 0.001],
         "    d = d - torch.where", "    torch.where"),
        ("reference: saturated", SATURATED,
         "saturated = (kl_q_m > farthest / 2)", "saturated = (kl_q_m > 2 * farthest)"),
    ],
    "reference.py": [
        ("reference: a total of 0 leaves kd in", NOTHING_COUNTS,
         "if not scale.is_cuda and bool((scale != 0).all()):", "if True:"),
        ("reference: a total of 0 leaves ce in", NOTHING_COUNTS,
         "(labels != options.ignore_index) & (ce_scale != 0)", "labels != options.ignore_index"),
        ("reference: 1 / 0", NOTHING_COUNTS,
         "masked_fill_(total <= 0, 0)", "masked_fill_(total < 0, 0)"),
        ("reference: one scale for all", DIVISORS,
         "[kd_scale, ce_scale, kd_scale, kd_scale]", "[kd_scale, kd_scale, kd_scale, kd_scale]"),
        ("reference: the mask needs every row", PROJECTED, "needed = needed & (mask != 0)", "pass"),
        ("reference: a label needs no row", PROJECTED,
         "needed = needed | ((labels != ignore_index) & (ce_scale != 0))", "pass"),
        ("reference: half of MSE's gradient", PARTS, "(2 * difference)", "difference.clone()"),
        ("reference: ce at T", PARTS,
         "log_q = s.log_softmax(-1)\n    loss", "log_q = (s / 2).log_softmax(-1)\n    loss"),
        ("reference: zero vectors", ZERO_VECTOR,
         "zero = ((ss == 0) | (tt == 0)) & ~(ss + tt).isnan()", "zero = ss < 0"),
        ("reference: masked NaN", MASKED_NAN,
         "(loss * used).masked_fill(used == 0, 0)", "loss * used"),
        ("reference: masked NaN's gradient", MASKED_NAN,
         "grad.masked_fill_((used == 0)[:, None], 0)", "pass"),
        ("reference: the mean over layers", HIDDEN_LAYERS,
         "total += loss / len(student)", "total += loss"),
        ("reference: teachers' weights", TEACHERS_WEIGHED, " + math.log(weight)", ""),
        ("the bias is taken away", HEAD["bias"], "x += self.bias", "x -= self.bias"),
        ("no scale", HEAD["both"], "x *= self.scale", "pass"),
        ("the cap is 1", HEAD["both"], "x.div_(self.softcap).tanh_()", "x.tanh_()"),
        ("the gradient is straight", HEAD["both"], "1 - (logits /", "1 - 0 * (logits /"),
        ("the gradient has no scale", HEAD["both"], "gradient.mul_(self.scale)", "gradient"),
        ("0 * NaN is NaN in a row left out", HEAD_NOT_NEEDED,
         "slope.masked_fill_(gradient == 0, 0)", "slope"),
        ("one side's head", HEAD["both"],
         "h.logits_(x.clone()) for h, x in zip(heads,",
         "h.logits_(x.clone()) for h, x in zip(heads[:1] * 2,"),
        ("the bias' gradient is the last block's", HEAD["bias"],
         "bias_gradient += total.sum(0)", "bias_gradient[:] = total.sum(0)"),
        ("reference: entropy", COUNTED, "entropies.append(-(log_p", "entropies.append((log_p"),
        ("reference: agreement of the last", FIRST_OF_EQUALS,
         ".where(x == x.amax(-1, keepdim=True), s.shape[-1]).amin(-1)",
         ".where(x == x.amax(-1, keepdim=True), -1).amax(-1)"),
    ],
}
# fmt: on
MUTATIONS = [
    Mutation(file, name, backend, caught_by, old, new)
    for file, table in TABLE.items()
    for backend in ["torch" if file in THE_REFERENCE else "triton"]
    for name, caught_by, old, new in table
]
