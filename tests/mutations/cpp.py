"""Mutations of the C++ kernels, each for one instruction set, and of their launcher.

Left out is what changes no number (prefetch, threads, large pages, streaming as such), what would
crash or write outside the tensors' memory, and what no number can tell: how far from its maximum a
row is taken while its exponentials stay in fp32's range, TINY, which half of a tie between teachers
counts as larger, and rules for a NaN that every way ends in NaN.
"""

from __future__ import annotations

import test_combine_teachers as ensembles
import test_cpp as kernels
import test_cpp_digits as digits
import test_cpp_rows as rows
import test_heads as heads
import test_hidden_cosine as hidden
import test_launchers as launchers
import test_losses as values
import test_losses_edges as edges
from oracle import BF16, DIVERGENCES, FP16, FP32, MODES, NAN

from mutations import Mutation, call, calls
from mutations.calls import (
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

PLAIN, AVX2, AVX512, AVX512_BF16 = "plain", "avx2", "avx512", "avx512bf16"
LAUNCHER = "cpp.py"

# The cheapest calls that notice something.
ROWS = {
    (kind, dtype): call(
        rows.test_rows_inside_wider_ones_are_read_and_written_whole,
        divergence=kind,
        dtypes=(dtype, dtype),
    )
    for kind in DIVERGENCES
    for dtype in (FP32, BF16, FP16)
}
FORWARD, REVERSE, JSD = (ROWS[kind, FP32] for kind in DIVERGENCES)
MIXED = {
    dtypes: call(
        rows.test_rows_inside_wider_ones_are_read_and_written_whole,
        divergence="forward_kl",
        dtypes=dtypes,
    )
    for dtypes in ((FP32, FP16), (BF16, FP32))
}
HIDDEN = {
    dtypes: call(rows.test_hidden_rows_inside_wider_ones_are_read_and_written_whole, dtypes=dtypes)
    for dtypes in ((FP32, FP32, FP32), (FP16, BF16, FP32))
}
HIDDEN_FP32, HIDDEN_MIXED = HIDDEN.values()
TEACHERS = {
    mode: call(
        rows.test_teachers_inside_wider_rows_are_read_and_written_whole,
        mode=mode,
        dtypes=(FP32, FP32, FP32),
    )
    for mode in MODES
}
BY_PROBABILITY, BY_LOGIT = TEACHERS["probability"], TEACHERS["logit"]
HEAD_MIXED = call(heads.test_dtypes_of_the_sides_may_differ, name="bias", dtypes=(BF16, FP32))
OVER_LOGITS = call(kernels.test_padding_beside_logits_that_their_gradient_overwrites_is_zeroed)
PRODUCT = call(kernels.test_product_of_bf16_is_one_of_fp32, n=9, vocab=100, bias=True)
ACCUMULATED = call(kernels.test_accumulate_adds_in_fp32_inside_wider_rows, dtype=FP32, width=131)
BIAS_OF_MANY_ROWS = call(heads.test_bias_gradient_is_added_to_and_not_only_by_whole_blocks)
IN_PLACE = call(
    kernels.test_gradient_in_place_of_the_logits_is_the_same_to_the_bit,
    divergence="reverse_kl",
    temperature=2.0,
    vocab=37,
)
WIDENED = {
    (dtype, n_cols): call(digits.test_every_half_is_widened_exactly, dtype=dtype, n_cols=n_cols)
    for dtype in (BF16, FP16)
    for n_cols in (64, 3)
}
SCALED = call(launchers.test_scale_multiplies_in_fp32_and_rounds_once, shift=1, dtype=FP32)
STREAMED = {
    dtype: call(
        kernels.test_streamed_gradient_of_short_rows_is_that_of_small_batches_to_the_bit,
        dtype=dtype,
    )
    for dtype in (FP32, BF16, FP16)
}
FAR = call(
    kernels.test_maximum_behind_the_first_columns_costs_no_digits,
    divergence="forward_kl",
    dtype=FP32,
)
LABELS_ALONE = call(values.test_parity_of_labels_alone_with_a_late_maximum, low=-95.0)
ANY_STRIDE = call(launchers.test_labels_mask_and_scales_may_have_any_stride)
NAN_OR_ZERO = call(launchers.test_nan_in_a_row_is_not_taken_for_a_zero_vector, side="student")
UNKNOWN = {
    label: call(launchers.test_wrong_label_makes_its_own_row_nan_and_no_other, label=label)
    for label in (-1, 300)
}
ANY_FACTOR = call(launchers.test_scale_takes_everything_that_a_backward_brings)
ROUNDED = {
    dtype: call(digits.test_rounding_is_to_nearest_even, dtype=dtype) for dtype in (BF16, FP16)
}
LABEL_ROUNDED = {
    dtype: call(digits.test_label_column_is_rounded_to_nearest_even, dtype=dtype)
    for dtype in (BF16, FP16)
}
EXPONENTIAL = {
    dtype: call(digits.test_exponential_is_as_exact_as_fp32, dtype=dtype) for dtype in (FP32, BF16)
}
LOGARITHM = call(digits.test_logarithm_is_as_exact_as_fp32)
DIGITS = call(digits.test_fp32_probabilities_keep_their_digits)
PEAKS = call(digits.test_peak_in_any_column_stays_in_range, dtype=FP32)
TWO_DTYPES = call(
    values.test_parity_in_every_dtype,
    divergence="forward_kl",
    dtypes=(FP32, BF16),
    near=False,
)
BLOCKS = call(values.test_parity_with_a_peak_anywhere, vocab=4200, where="last")
FAR_DIGITS = call(digits.test_maximum_far_above_the_first_columns_costs_no_digits)
NAN_TWICE = call(rows.test_nan_on_both_sides_is_no_excluded_column, part="mse")
NAN_HALF = {
    side: call(rows.test_nan_of_halves_makes_its_row_nan, divergence="forward_kl", side=side)
    for side in ("student", "teacher")
}
ASKED_FOR = call(kernels.test_level_asked_for_is_the_level_used)
UNKNOWN_LEVEL = call(kernels.test_library_refuses_a_level_above_the_best_and_below_the_first)
BEST_LEVEL = call(kernels.test_best_level_is_the_default_and_one_that_runs_here)
AT = {t: noticed for (kind, t), noticed in calls.AT.items() if kind == "forward_kl"}
REVERSE_FAR, JSD_FAR = calls.AT["reverse_kl", 2.0], calls.AT["jsd", 2.0]
NOT_CENTRED = {
    offset: call(
        values.test_parity_of_logits_that_are_not_centred, divergence="forward_kl", offset=offset
    )
    for offset in (100.0, -100.0)
}
NO_KD = call(values.test_part_of_weight_zero_is_zero, part="kd")
NO_CE = call(values.test_part_of_weight_zero_is_zero, part="ce")
OUTSIDE_THE_MASK = call(edges.test_labelled_row_outside_the_mask_keeps_its_ce_beside_a_cosine)
BANNED = {
    name: call(edges.test_column_minus_inf_in_both_adds_nothing, keywords=keywords, columns=[4, 11])
    for name, keywords in zip(edges.ALONE_IDS, edges.ALONE, strict=True)
}
NAN_ROW = {
    (kind, side): call(
        edges.test_nan_row_gives_a_nan_row_and_leaves_the_others_alone,
        keywords=edges.with_part("kd", kind),
        side=side,
        columns=3,
    )
    for kind in DIVERGENCES
    for side in ("student", "teacher")
}
FAR_APART = call(
    edges.test_finite_logits_never_give_an_infinite_divergence,
    divergence="forward_kl",
    temperature=0.5,
)
ZERO_VECTOR = call(edges.test_zero_vector_has_cosine_loss_one_and_no_gradient, side="student")
ANY_IGNORE_INDEX = call(edges.test_ignore_index_may_be_any_number, ignore_index=0)
HIDDEN_LAYERS = call(
    hidden.test_layers_equal_the_mean_of_single_calls, which="float", reduction="sum"
)
LAYERS_ALIKE = call(hidden.test_only_layers_that_require_grad_get_one)
ONE_TEACHER_EXCLUDES = call(
    ensembles.test_column_minus_inf_in_one_teacher_keeps_the_others_share, place=0
)
NAN_TEACHER = call(ensembles.test_nan_row_leaves_the_others_alone, mode="probability")
SILENT_TEACHER = call(
    ensembles.test_teacher_of_weight_zero_is_ignored_whatever_it_holds,
    place=0,
    bad=NAN,
    mode="probability",
)


# fmt: off
TABLE = {
    "distillation.h": [
        # exponentials
        ("no square", AVX2, AT[2.0], "power > 1 ? e * e : e", "power > 2 ? e * e : e"),
        ("no third power", AVX512, AT[3.0], "power == 3 ? «square * e»", "square"),
        ("fp32 has the exponential of halves", AVX2, DIGITS,
         "«if constexpr (sizeof(E) < sizeof(float)) return exp2(x);»",
         "if constexpr (sizeof(E) <= sizeof(float)) return exp2(x);"),
        ("x_t is the student's", AVX512, FORWARD, "(t - top_t) * scale", "(t - top_s) * scale"),
        ("CE at T where T is no power", PLAIN, AT[7.3],
         "«return exponential<S>(s - top_s, float(LOG2_E));»", "return e_s;"),
        ("a power where T is not whole", AVX512, AT[7.3], "row.power = 0;", ""),
        ("no temperature", AVX2, FORWARD, "float(LOG2_E / temperature)", "float(LOG2_E)"),
        # the range of a row
        ("any l_s will do", PLAIN, FAR, "l_s <= RANGE", "l_s == l_s"),
        ("any l_t will do", AVX2, FAR, "l_t <= RANGE", "l_t == l_t"),
        ("any l_1 will do", AVX512, FAR, "l_1 <= RANGE", "l_1 == l_1"),
        ("a range of 2^120", AVX512, FAR_DIGITS,
         "l_s <= RANGE && l_t <= RANGE && (power > 1 || l_1 <= RANGE)",
         "l_s <= 0x1p120 && l_t <= 0x1p120 && (power > 1 || l_1 <= 0x1p120)"),
        ("the teacher's maximum is the student's", PLAIN, FAR_APART,
         "top_t.add(k, get(t + i, n, -INF))", "top_t.add(k, get(s + i, n, -INF))"),
        ("no maximum", AVX2, NOT_CENTRED[100.0], "row.top_s = «top_s.total()»", "0"),
        # its sums
        ("forward: the sign", PLAIN, AT[2.0], "gap(x_t, x_s)", "gap(x_s, x_t)"),
        ("reverse: the mean", AVX2, REVERSE_FAR,
         "d.add(k, «e_s», gap(x_s, x_t))", "e_s * Vec(2.f)"),
        ("l_t is l_s", AVX512, FORWARD, "l_t.add(k, e_t)", "l_t.add(k, e_s)"),
        ("e_t is e_s", PLAIN, FORWARD, "scratch.e_t + i, «e_t»)", "e_s"),
        ("tiny against impossible is NaN", AVX2, UNDERFLOW, "row.d = «INFINITY»", "row.d"),
        ("JSD: the mixture of unnormalised ones", PLAIN, JSD,
         "float(beta * row.l_s / row.l_t)", "float(beta)"),
        ("JSD: b is doubled", AVX2, JSD_FAR, "b.add(k, «e_s»,", "e_s * Vec(2.f)"),
        # what makes the sum less is not seen: a small one is computed again
        ("JSD: a from the student", AVX512, JSD_FAR,
         "gap(row.x_t(get(t + i, n, -INF)), mixture)", "Vec(0.f) - from_m"),
        ("JSD: no mean", AVX2, JSD, "row.mean = «float(kl_s)»", "0"),
        ("JSD: sums of two sizes", AVX512, JSD,
         "(a.total() / row.l_t + ::log2(row.l_s / row.l_t))", "(a.total() / row.l_t)"),
        # cosine and MSE
        ("MSE ignores the mask", AVX512, MASKS,
         "float(found.squares * weight)", "float(found.squares)"),
        ("cos goes where MSE does", PLAIN, FORWARD,
         "a.rows[2 * a.n_rows + r]", "a.rows[3 * a.n_rows + r]"),
        ("cos forgets its weight", AVX2, FORWARD,
         "a.cos_weight * scale * found.by", "scale * found.by"),
        ("half of MSE's gradient", AVX512, FORWARD,
         "2 * a.mse_weight * scale", "a.mse_weight * scale"),
        ("infinite MSE has a gradient", PLAIN, INFINITE_MSE,
         "found.squares < INFINITY", "found.squares <= INFINITY"),
        ("cos: the sign", AVX2, FORWARD, "«Vec(0.f) - y») * Vec(by_cos)", "y"),
        ("MSE: the sign", AVX512, FORWARD, "fma(x - y, by_gap, c)", "fma(y - x, by_gap, c)"),
        # the gradient
        ("forward: l_s for l_t", PLAIN, FORWARD, "row.ratio = «float(row.l_s / row.l_t)»", "1"),
        ("reverse: no mean", AVX2, REVERSE, "«(apart - Vec(row.mean))», row.by_s", "apart"),
        ("reverse: infinite has a gradient", AVX512, IMPOSSIBLE, "row.by_s, «row.spoilt»)", "0.f"),
        ("JSD's gradient has no mean", PLAIN, JSD,
         "(load(scratch.e_t + i) - Vec(row.mean))", "load(scratch.e_t + i)"),
        ("CE's gradient stands alone", AVX2, FORWARD, "row.by_1, «g»)", "0.f"),
        ("cos and MSE stand alone", AVX512, FORWARD,
         "g = «g + load(scratch.extra + i)»", "load(scratch.extra + i)"),
        ("the label is not taken off", PLAIN, FORWARD,
         "«(first(e_1) - row.l_1)» / row.l_1", "first(e_1)"),
        ("the label's column has CE alone", AVX2, FORWARD,
         "ce + «first(gradient_at<KD, false>(row, s, t, scratch, extra, label, 1))»", "0"),
        ("the label is column 0", AVX2, FORWARD, "narrow(«g[label]», at_label)", "g[0]"),
        ("the label's column is read when overwritten", AVX512, IN_PLACE,
         "narrow(g[label], «at_label»)",
         "float(by * (first(row.template e_1<S>(load(scratch.e_s + label), 0.f)) - row.l_1) / "
         "row.l_1 + first(gradient_at<KD, false>(row, s, t, scratch, extra, label, 1)))"),
        # a row
        ("no mask", PLAIN, FORWARD, "a.mask ? a.mask[r] : 1", "1"),
        ("a total of 0 leaves kd in", PLAIN, NOTHING_COUNTS,
         "if (a.kd_scale[r * a.kd_scale_stride] == 0) return 0;", ""),
        ("a total of 0 leaves ce in", PLAIN, NOTHING_COUNTS,
         "a.ignore_index && «ce_scale != 0»", "true"),
        ("every row takes the first one's scale", AVX2, FORWARD,
         "kd_scale = a.kd_scale[«r» *", "0"),
        ("masked rows have a divergence", PLAIN, MASKED_NAN,
         "weight != 0 ? int(a.divergence) : NO_KD", "int(a.divergence)"),
        ("masked rows have a cosine", AVX2, OUTSIDE_THE_MASK, "extra = «weight != 0» &&", "true"),
        ("what is ignored is negative", AVX512, ANY_IGNORE_INDEX,
         "a.labels[r] != a.ignore_index", "a.labels[r] >= 0"),
        ("labels without a weight", PLAIN, FORWARD, "«a.ce_weight != 0» && a.labels", "true"),
        ("parts begin at 1", AVX2, NO_CE, "a.rows[part * a.n_rows + r] = «0»", "1"),
        ("the padding is not written", AVX512, FORWARD, "i < a.n_padded", "i < n_cols"),
        ("the gradient forgets T", PLAIN, FORWARD,
         "a.kd_weight * kd_scale * a.temperature", "a.kd_weight * kd_scale"),
        ("forward: l_s is forgotten", AVX512, FORWARD,
         "row.d / row.l_t - ::log2(row.l_t) + ::log2(row.l_s)",
         "row.d / row.l_t - ::log2(row.l_t)"),
        ("reverse: l_t is forgotten", AVX2, REVERSE,
         "row.d / row.l_s - ::log2(row.l_s) + ::log2(row.l_t)",
         "row.d / row.l_s - ::log2(row.l_s)"),
        ("reverse: bits for nats in the gradient", PLAIN, REVERSE,
         "float(by_kd * LN_2 / row.l_s)", "float(by_kd / row.l_s)"),
        ("JSD: a NaN teacher has a gradient", AVX2, NAN_ROW["jsd", "teacher"],
         "bits == bits", "true"),
        ("JSD's gradient forgets 1 - beta", AVX512, JSD,
         "by_kd * LN_2 * (1 - a.beta)", "by_kd * LN_2"),
        ("T squared becomes T", PLAIN, FORWARD,
         "bits * LN_2 * a.temperature * a.temperature * weight",
         "bits * LN_2 * a.temperature * weight"),
        ("kd ignores the mask", AVX512, FORWARD,
         "bits * LN_2 * a.temperature * a.temperature * weight",
         "bits * LN_2 * a.temperature * a.temperature"),
        ("a negative label is known", PLAIN, UNKNOWN[-1], "known = «label >= 0» &&", "true"),
        ("n_cols is a known label", AVX2, UNKNOWN[300], "label < n_cols", "label <= n_cols"),
        ("CE's logit is not below the maximum", AVX512, FORWARD,
         "double(widen(s[label])) - row.top_s", "double(widen(s[label]))"),
        ("CE at T in the gradient", PLAIN, AT[7.3],
         "exponential<S>(s - top_s, float(LOG2_E))", "exponential<S>(s - top_s, scale)"),
        ("bits for nats in CE", AVX2, FORWARD,
         "LN_2 * ::log2(row.l_1) - above", "::log2(row.l_1) - above"),
        ("ce takes kd's divisor", AVX512, DIVISORS,
         "a.ce_scale[r * a.ce_scale_stride]", "a.kd_scale[r * a.kd_scale_stride]"),
        ("CE's gradient is not normalised", PLAIN, FORWARD,
         "float(by_ce / row.l_1)", "float(by_ce)"),
        ("half of a row that nothing needs", AVX2, FORWARD, "a.n_padded * sizeof(G)", "a.n_padded"),
        ("kd does not need the teacher", AVX512, TWO_DTYPES,
         "extra || a.divergence != NO_KD", "extra"),
        ("the gradient has the student's stride", PLAIN, ROWS["forward_kl", BF16],
         "(E*)a.gradient.data + r * a.gradient.stride",
         "(E*)a.gradient.data + r * a.student.stride"),
        ("divergences in another order", AVX512, FORWARD,
         "weight != 0 ? «int(a.divergence)»",
         "a.divergence % JSD ? JSD - int(a.divergence) : int(a.divergence)"),
        ("NaN is 0", AVX512, UNKNOWN[300], "- above) : «NOT_A_NUMBER»", "0"),
        ("log2(e)", PLAIN, FORWARD, "row.scale = float(«LOG2_E»", "1.4436950408889634"),
        ("ln(2)", AVX2, FORWARD, "bits * «LN_2» * a.temperature", "0.6932471805599453"),
        ("labels alone never look for a maximum", AVX2, LABELS_ALONE,
         "(«power > 1» || l_1", "power"),
        # what a fused head leaves to the kernels
        ("tanh is a line", AVX512, SOFTCAP, "fma(p * y2, y, y)", "y"),
        ("tanh cancels", PLAIN, SOFTCAP, "greater(y2, 0.0625f)", "equal(y, y)"),
        ("the scale is under no cap", AVX2, HEAD["both"], "tanh(«x * scale» * Vec(inverse))", "x"),
        ("the gradient has no scale", AVX512, HEAD["scale"],
         "fma(cosine, Vec(0.f) - cosine, 1.f) * scale", "fma(cosine, Vec(0.f) - cosine, 1.f)"),
        ("the gradient does not bend", PLAIN, HEAD["softcap"],
         "softcap != 0 ? y * inverse : Vec(0.f)", "0.f"),
        ("a scale alone is nothing", AVX2, HEAD["scale"],
         "return «scale == 1 && softcap == 0»;", "softcap == 0"),
        ("the label's gradient does not bend", AVX512, HEAD["softcap"],
         "at_label *= first(head.slope(widen(s[label])));", ""),
        ("no other gradient bends", AVX2, HEAD["softcap"],
         "x = x * head.slope(get(s + i, n, 0.f));", ""),
        ("the label has no bias gradient of its own", PLAIN, HEAD["bias"],
         "if (sums) sums[label] = sum_at_label + at_label;", ""),
        ("the label's bias gradient begins anew", AVX512, HEAD["bias"],
         "sum_at_label + at_label", "at_label"),
        ("a block's bias gradient is its last row's", AVX2, HEAD["bias"],
         "if («r % block == 0») memset", "true"),
        ("the bias gradient is the last block's", AVX512, BIAS_OF_MANY_ROWS,
         "sum = «sum + load(sums + b * room_for(n_cols) + start + i)»",
         "load(sums + b * room_for(n_cols) + start + i)"),
        ("the bias gradient is not added to", PLAIN, BIAS_OF_MANY_ROWS,
         "get(to + start + i, n, 0.f) + sum", "sum"),
        ("one head for both sides", AVX2, HEAD["both"],
         "a.n_cols, «teacher_head», wide_t", "student_head"),
        ("one bias for both sides", AVX512, HEAD["bias"],
         "a.teacher.stride, «teacher_head.bias»}", "student_head.bias"),
        ("the biases of other dtypes", AVX2, HEAD_MIXED,
         "«a.student.dtype == DISTILFAST_FP32» &&", "true"),
        ("a cap without its bias", PLAIN, HEAD["all"],
         "head.bias ? product + get(head.bias + i, n, 0.f) : product", "product"),
        # near the teacher
        ("small divergences are differences", AVX2, NEAR["forward_kl", 0.001],
         "if («bits < SMALL») bits = add_small<FORWARD_KL>", "bits < -1"),
        ("small reverse divergences are differences", PLAIN, NEAR["reverse_kl", 0.001],
         "if («bits < SMALL») bits = add_small<REVERSE_KL>", "bits < -1"),
        ("small mixtures are differences", AVX2, NEAR["jsd", 0.001],
         "if («bits < SMALL») bits = add_small<JSD>", "bits < -1"),
        ("phi is a square", PLAIN, NEAR["forward_kl", 0.15],
         "«p = fma(p, x, 1.6666667e-1f);\n    p = fma(p, x, 5e-1f);»", "p = 5e-1f;"),
        ("psi is a square", AVX2, NEAR["jsd", 0.15],
         "«p = fma(p, x, -3.3333333e-1f);\n    p = fma(p, x, 5e-1f);»", "p = 5e-1f;"),
        ("the sums' ratio is not in d", AVX512, NEAR["forward_kl", 0.15],
         "«::log(row.l_s / row.l_t)» + (tops", "0"),
        ("the maxima are not in d", AVX2, NEAR["forward_kl", 0.15],
         "get(s + i, n, -INF) - logit_t - Vec(offset)", "get(s + i, n, -INF) - logit_t"),
        ("small KL leaves out what is far", AVX2, FAR_COLUMNS["forward_kl"],
         "e_s - e_t - e_t * d", "Vec(0.f)"),
        ("small reverse KL leaves out what is far", PLAIN, FAR_COLUMNS["reverse_kl"],
         "fma(e_s, d, e_t - e_s)", "Vec(0.f)"),
        ("small JSD forgets the mixture", AVX2, FAR_COLUMNS["jsd"],
         "fma(e_t, far_t, mixture - e_t)", "e_t * far_t"),
        ("small JSD takes a vector for near", AVX2, FAR_COLUMNS["jsd"], "!all(near)", "false"),
        ("small JSD takes what the mixture's sweep left", PLAIN, NEAR["jsd", 0.15],
         "«KD == JSD» ? exponential", "KD == NO_KD"),
        ("small KL's gradient is off by the constant", AVX2, NEAR["forward_kl", 0.001],
         "row.keep = «float(-off)»", "1"),
        ("small reverse KL's gradient has no mean", PLAIN, NEAR["reverse_kl", 0.15],
         "row.mean = «float(LOG2_E * (a.total() / row.l_s + off))»", "0"),
        ("small reverse KL's gradient is the large one's", AVX2, NEAR["reverse_kl", 0.001],
         "apart = «row.small»", "false"),
        ("no bound of d", AVX2, EXCLUDED, "min(max(apart, -1024.f), 1024.f)", "apart"),
        ("entropy of the sums alone", AVX2, COUNTED,
         "::log2(row.l_s) - h_s.total() / row.l_s", "::log2(row.l_s)"),
        ("the teacher's entropy is the student's", PLAIN, COUNTED,
         "::log2(row.l_t) - h_t.total() / row.l_t", "::log2(row.l_s) - h_s.total() / row.l_s"),
        ("padding is zeroed over logits that are still to be read", AVX2, OVER_LOGITS,
         "«»    Row row;\n    const double temperature",
         "for (int64_t i = n_cols; g && i < a.n_padded; i++) narrow(g[i], 0.f);"),
    ],
    "rows.h": [
        ("columns before the first aligned vector are not written", AVX2, STREAMED[FP32],
         "if (i) f(int64_t(0), int(i), Constant<0>());", ""),
        ("one vector for another", AVX512, SCALED, "f(«i + 2 * WIDTH»,", "i + WIDTH"),
        ("a long tail", AVX2, FORWARD, "int(n_cols - i)", "int(n_cols - i) + 1"),
        ("a tail full of zeros", AVX2, FORWARD, "load(p, n, «other»);", "0.f"),
        ("a part of a sum is its last vector", AVX512, AT[2.0], "part[k] = «part[k] + x»", "x"),
        ("a lane is not summed", PLAIN, FORWARD, "«i < WIDTH»; i++) total", "i < WIDTH - 1"),
        ("the last part is the sum", AVX2, FORWARD,
         "«blocks += __builtin_convertvector(x.v, Doubles);»",
         "blocks = __builtin_convertvector(x.v, Doubles);"),
        ("blocks are added again", AVX512, BLOCKS, "x = 0.f;", ""),
        ("every block is the first", PLAIN, BLOCKS, "f(«start + i», n, k)", "i"),
        ("products are squares", AVX2, FORWARD, "fma(x, y, part[k])", "fma(x, x, part[k])"),
        ("the maximum of half a row", AVX512, PEAKS,
         "max(max(part[0], part[1]), max(part[2], part[3]))", "max(part[0], part[1])"),
        ("a maximum of 0 at least", PLAIN, NOT_CENTRED[-100.0], "part[4] = {«-INF», -INF", "0.f"),
        ("0 log 0", AVX2, BANNED["forward_kl"], "max(x - y, «-1024.f»)", "-INF"),
        ("one side alone excludes", PLAIN, INFINITE_MSE,
         "both(equal(s, -INF), equal(t, -INF))", "equal(s, -INF)"),
        ("MSE is a product", AVX512, FORWARD, "sq.add(k, a - b, «a - b»)", "a"),
        ("half of a zero rule", PLAIN, ZERO_VECTOR, "s2 == 0 || t2 == 0", "s2 == 0 && t2 == 0"),
        ("NaN is a zero vector", AVX2, NAN_OR_ZERO, "&& «s2 + t2 == s2 + t2»)", "true"),
        ("the teacher's length", PLAIN, HIDDEN_FP32,
         "::sqrt(s2) * ::sqrt(t2)", "::sqrt(t2) * ::sqrt(t2)"),
        ("cosine's ratio", AVX2, HIDDEN_FP32, "float(dot / s2)", "float(dot / t2)"),
        ("dtypes in another order", PLAIN, ROWS["forward_kl", BF16], "switch («m.dtype»)",
         "m.dtype == DISTILFAST_FP32 ? m.dtype : DISTILFAST_BF16 + DISTILFAST_FP16 - m.dtype"),
        ("all rows are the first", AVX512, FORWARD, "at = «r * m.stride»", "0"),
        ("bf16 is fp16", PLAIN, ROWS["forward_kl", BF16],
         "f((bf16*)m.data + at)", "f((fp16*)m.data + at)"),
        ("the teacher has the student's stride", AVX2, FORWARD,
         "(const S*)teacher.data + r * teacher.stride",
         "(const S*)teacher.data + r * student.stride"),
        ("an fp32 teacher has the student's stride", AVX512, MIXED[BF16, FP32],
         "(const float*)teacher.data + r * teacher.stride",
         "(const float*)teacher.data + r * student.stride"),
        ("a teacher is widened by halves", PLAIN, MIXED[FP32, FP16],
         "store(«wide + i»,", "wide + i / 2"),
        ("one buffer for all", AVX2, FORWARD, "buffers + room * number", "buffers"),
        ("no bias", AVX2, HEAD["bias"],
         "get(x.p, n, other) + get(x.bias, n, 0.f)", "get(x.p, n, other)"),
        ("the label has no bias", AVX512, HEAD["bias"], "widen(p[i]) + bias[i]", "widen(p[i])"),
        ("the first columns' bias for all", AVX512_BF16, HEAD["bias"],
         "{p + i, «bias + i»}", "bias"),
        ("the last of equal columns", AVX2, FIRST_OF_EQUALS,
         "columns[j] < columns[best]", "columns[j] > columns[best]"),
        ("a column is its vector's first", PLAIN, FIRST_OF_EQUALS, "columns[j] += «float(j)»", "0"),
    ],
    "hidden_cosine.h": [
        ("hidden: no mask", PLAIN, HIDDEN_FP32, "a.mask ? a.mask[r] : 1", "1"),
        ("hidden: half a row is zeroed", AVX512, HIDDEN_FP32, "a.n_cols * sizeof(G)", "a.n_cols"),
        ("hidden: the last layer counts", PLAIN, HIDDEN_LAYERS,
         "«a.rows[r] += float(found.distance * a.share * weight);»",
         "a.rows[r] = float(found.distance * a.share * weight);"),
        ("hidden: the sum over layers", AVX2, HIDDEN_LAYERS,
         "found.distance * a.share * weight", "found.distance * weight"),
        ("hidden: the gradient of the sum over layers", AVX512, HIDDEN_LAYERS,
         "a.scale[r * a.scale_stride] * weight * a.share * found.by",
         "a.scale[r * a.scale_stride] * weight * found.by"),
        ("hidden: the sign", AVX2, HIDDEN_FP32, "«Vec(0.f) - y») * by", "y"),
        ("hidden: excluded columns have a gradient", AVX512, HIDDEN_FP32,
         "x = «drop(u, u, w)»", "u"),
        ("hidden: the gradient has the student's dtype", PLAIN, HIDDEN_MIXED,
         "a.gradient.dtype == a.student.dtype", "true"),
        ("hidden: the gradient is dense", AVX2, HIDDEN_FP32,
         "r * a.gradient.stride", "r * a.n_cols"),
    ],
    "ensemble.h": [
        ("logits are not weighed", AVX512, BY_LOGIT,
         "get(t + i, n, 0.f) * weight", "get(t + i, n, 0.f)"),
        ("the last logit counts", PLAIN, BY_LOGIT, "k == 0 ? x : x + get(z + i, n, 0.f)", "x"),
        ("teachers at T = 1", AVX2, BY_PROBABILITY,
         "float(LOG2_E / a.temperature)", "float(LOG2_E)"),
        ("a teacher without a maximum", AVX512, BY_PROBABILITY, "m = «top.total()»", "0.f"),
        ("a teacher's tail is full of 100", PLAIN, BY_PROBABILITY,
         "exp2((get(t + i, n, «-INF»)", "100.f"),
        ("teachers are not normalised", AVX512, BY_PROBABILITY,
         "::log2(a.weights[k]) - ::log2(l.total())", "::log2(a.weights[k])"),
        ("totals begin at 0", PLAIN, BY_PROBABILITY, "store(total + i, «1.f»)", "0.f"),
        ("a larger teacher is added as a smaller one", AVX2, BY_PROBABILITY,
         "select(more, fma(sum, e, 1.f), sum + e)", "sum + e"),
        ("the smaller of two teachers", AVX512, BY_PROBABILITY,
         "select(more, «y», select(", "so_far"),
        ("a NaN does not reach z", AVX2, NAN_TEACHER, "select(equal(y, y), so_far, y)", "so_far"),
        ("the largest teacher alone", AVX512, BY_PROBABILITY,
         "get(z + i, n, 0.f) + log2(load(total + i))", "get(z + i, n, 0.f)"),
        ("z is not multiplied by T", PLAIN, BY_PROBABILITY, "LN_2 * a.temperature", "LN_2 * 1"),
        ("z is dense", AVX2, BY_LOGIT, "r * a.stride_z", "r * a.n_cols"),
    ],
    "scale.h": [
        ("every row takes the first factor", PLAIN, SCALED, "a.by[r * a.by_stride]", "a.by[0]"),
        ("nothing is scaled", AVX2, SCALED, "get(g + i, n, 0.f) * by", "get(g + i, n, 0.f)"),
    ],
    "vec.h": [
        # AVX-512
        ("the tail is a column longer", AVX512, FORWARD, "(1u << n) - 1", "(2u << n) - 1"),
        ("fma subtracts", AVX512, FORWARD,
         "_mm512_fmadd_ps(a.v, b.v, c.v)", "_mm512_fmsub_ps(a.v, b.v, c.v)"),
        ("the maximum of a NaN is it", AVX512, BANNED["forward_kl"],
         "_mm512_max_ps(a.v, b.v)", "_mm512_max_ps(b.v, a.v)"),
        ("NaN equals all", AVX512, NAN_TWICE,
         "_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)", "_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_UQ)"),
        ("greater is less", AVX512, ONE_TEACHER_EXCLUDES,
         "_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)", "_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)"),
        ("yes is no", AVX512, ROWS["forward_kl", BF16],
         "_mm512_mask_blend_ps(m, no.v, yes.v)", "_mm512_mask_blend_ps(m, yes.v, no.v)"),
        ("the lowest", AVX512, PEAKS, "_mm512_reduce_max_ps(a.v)", "_mm512_reduce_min_ps(a.v)"),
        ("bf16 shifted too little", AVX512, WIDENED[BF16, 64],
         "_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)",
         "_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 15)"),
        ("fp16 read as bf16", AVX512, WIDENED[FP16, 64],
         "load(const fp16* p) { return «_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))»",
         "widen16(_mm256_loadu_si256((const __m256i*)p))"),
        ("an fp32 tail is full of zeros", AVX512, FORWARD,
         "_mm512_mask_loadu_ps(«_mm512_set1_ps(other)»,", "_mm512_setzero_ps()"),
        ("a bf16 tail is full of zeros", AVX512, ROWS["forward_kl", BF16],
         "select(leading(n), widen16(_mm256_maskz_loadu_epi16(leading(n), p)), other)",
         "widen16(_mm256_maskz_loadu_epi16(leading(n), p))"),
        ("an fp16 tail read as bf16", AVX512, WIDENED[FP16, 3],
         "_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(leading(n), p))",
         "widen16(_mm256_maskz_loadu_epi16(leading(n), p))"),
        ("bf16 is cut off", AVX512_BF16, ROUNDED[BF16],
         "(__m256i)_mm512_cvtneps_pbh(x.v)",
         "_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_castps_si512(x.v), 16))"),
        ("bf16 ties go to odd", AVX512, ROUNDED[BF16],
         "_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(«1»)", "0"),
        ("bf16 NaNs are rounded", AVX512, ROUNDED[BF16],
         "_mm512_mask_blend_epi32(nan, up, _mm512_set1_epi32(0x7fc00000))", "up"),
        ("fp16 is cut off", AVX512, ROUNDED[FP16],
         "_mm512_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)",
         "_mm512_cvtps_ph(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)"),
        ("a tail is written as a whole", AVX512, SCALED,
         "_mm512_mask_storeu_ps(p, leading(n), x.v)", "_mm512_storeu_ps(p, x.v)"),
        ("fp16 is streamed as bf16", AVX512, STREAMED[FP16],
         "_mm256_stream_si256((__m256i*)p, to_fp16(x))",
         "_mm256_stream_si256((__m256i*)p, to_bf16(x))"),
        ("the nearest whole number", AVX512, FORWARD,
         "_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)",
         "_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)"),
        ("the nearest's fraction", AVX512, ROWS["forward_kl", BF16],
         "_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)",
         "_mm512_reduce_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)"),
        ("no power of two", AVX512, FORWARD, "_mm512_scalef_ps(a.v, x.v)", "a.v"),
        ("an exponent from 1 on", AVX512, JSD,
         "_mm512_castps_si512(x.v), _mm512_set1_epi32(«0x3f3504f3»)", "0x3f800000"),
        ("a mantissa from 1 on", AVX512, JSD,
         "base = _mm512_set1_epi32(«0x3f3504f3»)", "0x3f800000"),
        ("a mantissa too short", AVX512, JSD,
         "_mm512_set1_epi32(0x7fffff)", "_mm512_set1_epi32(0x3fffff)"),
        ("the first element is the highest", AVX512, FORWARD,
         "_mm512_cvtss_f32(a.v)", "highest(a)"),
        # AVX2
        ("fma rounds twice", AVX2, DIGITS,
         "_mm256_fmadd_ps(a.v, b.v, c.v)", "_mm256_add_ps(_mm256_mul_ps(a.v, b.v), c.v)"),
        ("the maximum of a NaN is it", AVX2, BANNED["reverse_kl"],
         "_mm256_max_ps(a.v, b.v)", "_mm256_max_ps(b.v, a.v)"),
        ("the minimum of a NaN is no NaN", AVX2, NAN_HALF["teacher"],
         "_mm256_min_ps(a.v, b.v)", "_mm256_min_ps(b.v, a.v)"),
        ("NaN equals all", AVX2, NAN_TWICE,
         "_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)", "_mm256_cmp_ps(a.v, b.v, _CMP_EQ_UQ)"),
        ("greater is less", AVX2, ONE_TEACHER_EXCLUDES,
         "_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)", "_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)"),
        ("both is either", AVX2, INFINITE_MSE, "_mm256_and_ps(a, b)", "_mm256_or_ps(a, b)"),
        ("yes is no", AVX2, FORWARD,
         "_mm256_blendv_ps(no.v, yes.v, m)", "_mm256_blendv_ps(yes.v, no.v, m)"),
        ("the lowest", AVX2, PEAKS, "most = «y > most» ?", "y < most"),
        ("bf16 shifted too little", AVX2, WIDENED[BF16, 64],
         "_mm256_slli_epi32(x, 16)", "_mm256_slli_epi32(x, 15)"),
        ("bf16 ties go to odd", AVX2, ROUNDED[BF16],
         "_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(«1»)", "0"),
        ("bf16 NaNs are rounded", AVX2, ROUNDED[BF16],
         "_mm256_blendv_epi8(up, _mm256_set1_epi32(0x7fc00000), nan)", "up"),
        ("bf16 out of order", AVX2, ROWS["forward_kl", BF16],
         "_mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0xd8)",
         "_mm256_permute4x64_epi64(_mm256_packus_epi32(up, up), 0xe4)"),
        ("fp16 is cut off", AVX2, ROUNDED[FP16],
         "_mm256_cvtps_ph(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)",
         "_mm256_cvtps_ph(x.v, _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC)"),
        ("bf16 is streamed as fp16", AVX2, STREAMED[BF16],
         "_mm_stream_si128((__m128i*)p, to_bf16(x))", "_mm_stream_si128((__m128i*)p, to_fp16(x))"),
        ("2^-inf is not 0", AVX2, BANNED["reverse_kl"],
         "max(«-126.5f», x)); }\ninline Vec whole(Vec x) {\n    return _mm256", "-125.5f"),
        ("the nearest whole number", AVX2, EXPONENTIAL[BF16],
         "_mm256_round_ps(x.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)",
         "_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)"),
        ("another bias of the exponent", AVX2, FORWARD,
         "_mm256_cvtps_epi32(whole(x).v), _mm256_set1_epi32(«127»)", "126"),
        ("an exponent from 1 on", AVX2, LOGARITHM,
         "_mm256_castps_si256(x.v), _mm256_set1_epi32(«0x3f3504f3»)", "0x3f800000"),
        ("a mantissa too short", AVX2, LOGARITHM,
         "_mm256_set1_epi32(0x7fffff)", "_mm256_set1_epi32(0x3fffff)"),
        ("the first element is the highest", AVX2, FORWARD, "_mm256_cvtss_f32(a.v)", "highest(a)"),
        # any machine
        ("fma subtracts", PLAIN, FORWARD, "a.v * b.v + c.v", "a.v * b.v - c.v"),
        ("the exact fma subtracts", PLAIN, FORWARD,
         "x * y + __builtin_convertvector(c.v, Doubles)",
         "x * y - __builtin_convertvector(c.v, Doubles)"),
        ("the exact fma rounds twice", PLAIN, DIGITS,
         "«return __builtin_convertvector(x * y + __builtin_convertvector(c.v, Doubles), Floats);»",
         "return fma(a, b, c);"),
        ("the maximum of a NaN is it", PLAIN, BANNED["forward_kl"],
         "«a.v > b.v ? a.v : b.v»; }\ninline Vec min", "a.v < b.v ? b.v : a.v"),
        ("the minimum of a NaN is no NaN", PLAIN, NAN_HALF["student"],
         "return «a.v < b.v ? a.v : b.v»", "a.v > b.v ? b.v : a.v"),
        ("NaN equals all", PLAIN, NAN_TWICE, "return «a.v == b.v»", "~((a.v < b.v) | (a.v > b.v))"),
        ("greater is less", PLAIN, ONE_TEACHER_EXCLUDES,
         "Mask greater(Vec a, Vec b) { return «a.v > b.v»", "a.v < b.v"),
        ("yes is no", PLAIN, FORWARD, "return «m ? yes.v : no.v»", "m ? no.v : yes.v"),
        ("the highest of two", PLAIN, PEAKS, "return «x > y ? x : y»", "x"),
        ("the second element first", PLAIN, FORWARD, "return «a.v[0]»;", "a.v[1]"),
        ("infinite fp16 is 65536", PLAIN, WIDENED[FP16, 64],
         "magnitude >= 0x7c00 ? other : finite", "finite"),
        ("bf16 ties go to odd", PLAIN, ROUNDED[BF16],
         "rounded = «(bits + 0x7fff + (bits >> 16 & 1))»", "(bits + 0x7fff)"),
        ("bf16 NaNs are rounded", PLAIN, ROUNDED[BF16], "x.v == x.v ? rounded : nan", "rounded"),
        ("fp16 ties go to odd", PLAIN, ROUNDED[FP16],
         "Bits half = «(magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1))»",
         "(magnitude - 0x38000000 + 0xfff)"),
        ("fp16 has no subnormals", PLAIN, ROUNDED[FP16],
         "half = magnitude < 0x38800000 ? subnormal : half;", ""),
        ("fp16 does not overflow", PLAIN, ROUNDED[FP16],
         "half = «magnitude >= 0x477ff000» ?", "magnitude >= 0x48000000"),
        ("fp16 has no NaN", PLAIN, ROUNDED[FP16],
         "half = «magnitude > 0x7f800000» ?", "magnitude > 0x7fffffff"),
        ("2^200 is negative", PLAIN, FAR,
         "min(«128.5f», max(-126.5f, x)); }\n//", "130.5f"),
        ("NaN is 2^-126.5", PLAIN, NAN_HALF["student"],
         "«max(-126.5f, x)»); }\n//", "max(x, -126.5f)"),
        ("the nearest whole number", PLAIN, FORWARD,
         "return «(x.v - 0.5f + 0x1.8p23f)» - 0x1.8p23f", "(x.v + 0x1.8p23f)"),
        ("another bias of the exponent", PLAIN, FORWARD,
         "(Bits)(x.v - 0.5f + 0x1.8p23f) + 127", "(Bits)(x.v - 0.5f + 0x1.8p23f) + 126"),
        ("an exponent a bit short", PLAIN, JSD,
         "(Ints)((Bits)x.v - 0x3f3504f3) >> 23", "(Ints)((Bits)x.v - 0x3f3504f3) >> 24"),
        ("a mantissa from 1 on", PLAIN, JSD,
         "(((Bits)x.v - 0x3f3504f3) & 0x7fffff) + 0x3f3504f3",
         "(((Bits)x.v - 0x3f3504f3) & 0x7fffff) + 0x3f800000"),
        # one element, and the tails without AVX-512
        ("one bf16 shifted too little", AVX2, WIDENED[BF16, 3],
         "as_float(uint32_t(x.bits) << 16)", "as_float(uint32_t(x.bits) << 15)"),
        ("one fp16 is half of itself", AVX2, WIDENED[FP16, 3],
         "as_float(magnitude << 13) * 0x1p112f", "as_float(magnitude << 13) * 0x1p111f"),
        ("one infinite fp16 is 65536", PLAIN, WIDENED[FP16, 3],
         "if («magnitude >= 0x7c00»)", "magnitude > 0x7c00"),
        ("one NaN of bf16 is rounded", AVX512, LABEL_ROUNDED[BF16], "if («x != x») {", "false"),
        ("one bf16's ties go to odd", AVX2, LABEL_ROUNDED[BF16],
         "uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)", "uint16_t((bits + 0x7fff) >> 16)"),
        ("one fp16's ties go to odd", AVX512, LABEL_ROUNDED[FP16],
         "uint16_t(sign | ((magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13))",
         "uint16_t(sign | ((magnitude - 0x38000000 + 0xfff) >> 13))"),
        ("one subnormal fp16 is cut off", PLAIN, LABEL_ROUNDED[FP16],
         "as_bits(as_float(magnitude) + 0.5f)", "as_bits(as_float(magnitude) + 0.25f)"),
        ("one fp16 is subnormal too late", AVX2, LABEL_ROUNDED[FP16],
         "if («magnitude < 0x38800000») {", "magnitude < 0x38000000"),
        ("one fp16 overflows too late", AVX512, LABEL_ROUNDED[FP16],
         "if («magnitude >= 0x477ff000») {", "magnitude >= 0x48000000"),
        ("one NaN of fp16 is infinite", AVX2, LABEL_ROUNDED[FP16],
         "to.bits = «uint16_t(sign | 0x7e00)»;", "uint16_t(sign | 0x7c00)"),
        ("a tail reads one column more", AVX2, FORWARD, "x[i] = «i < n» ?", "i <= n"),
        ("a tail writes one column more", PLAIN, SCALED, "n * sizeof(E)", "(n + 1) * sizeof(E)"),
        # the polynomials
        ("2^x: the 5th", AVX512, EXPONENTIAL[BF16], "1.86713008e-3f", "1.86813008e-3f"),
        ("2^x: the 3rd", PLAIN, EXPONENTIAL[BF16], "5.57999131e-2f", "5.58099131e-2f"),
        ("2^x: the 1st", AVX2, EXPONENTIAL[BF16], "6.93151312e-1f", "6.93251312e-1f"),
        ("fp32's 2^x: the 6th", PLAIN, EXPONENTIAL[FP32], "2.1612915e-4f", "2.1712915e-4f"),
        ("fp32's 2^x: the 4th", AVX2, EXPONENTIAL[FP32], "9.67545157e-3f", "9.67645157e-3f"),
        ("fp32's 2^x: the 2nd", AVX512, EXPONENTIAL[FP32], "2.40229306e-1f", "2.40329306e-1f"),
        ("fp32's 2^x: the 1st", AVX2, EXPONENTIAL[FP32], "6.93147044e-1f", "6.93247044e-1f"),
        ("log2: the 9th", PLAIN, LOGARITHM, "1.25836446e-1f", "1.35836446e-1f"),
        ("log2: the 6th", AVX2, LOGARITHM, "-2.38944867e-1f", "-2.39944867e-1f"),
        ("log2: the 2nd", AVX512, LOGARITHM, "-7.21347347e-1f", "-7.21447347e-1f"),
        ("log2: the 1st", AVX2, LOGARITHM, "1.442695f", "1.443695f"),
        ("all: of AVX2 is any", AVX2, FAR_COLUMNS["jsd"],
         "_mm256_movemask_ps(m) == 0xff", "_mm256_movemask_ps(m) != 0"),
        ("all: of the plain vectors is the first", PLAIN, FAR_COLUMNS["jsd"],
         "m[0] && m[1] && m[2] && m[3]", "m[0]"),
    ],
    "dispatch.cpp": [
        ("AVX-512 is AVX2", AVX512, SCALED,
         "case DISTILFAST_AVX512: return «function##_avx512(args, threads)»",
         "function##_avx2(args, threads)"),
        ("AVX-512 with bf16 is that without", AVX512_BF16, SCALED,
         "IF_BF16(«function##_avx512bf16(args, threads)»)", "function##_avx512(args, threads)"),
        ("AVX2 is any machine's", AVX2, SCALED,
         "function##_avx2(args, threads)", "function##_plain(args, threads)"),
        ("a level beyond the best", PLAIN, UNKNOWN_LEVEL,
         "level < 0 || level > distilfast_best_level()", "level < 0"),
        ("a level below the first", PLAIN, UNKNOWN_LEVEL, "«level < 0» || level >", "false"),
        ("AVX-512 with bf16 is not the best", AVX512_BF16, BEST_LEVEL,
         "? «DISTILFAST_AVX512BF16» :", "DISTILFAST_AVX2"),
    ],
    "level.h": [
        ("scaling does nothing", AVX2, SCALED, "scale(*a, threads)", "0"),
    ],
    "accumulate.h": [
        ("shares are not added", AVX2, ACCUMULATED,
         "a.begun ? get(total + i, n, 0.f) + share : share", "share"),
        ("the first share is added to what is there", AVX512, ACCUMULATED,
         "a.begun ? get(total + i, n, 0.f) + share : share", "get(total + i, n, 0.f) + share"),
        ("rows of the sum lie side by side", PLAIN, ACCUMULATED,
         "r * a.stride_total", "r * a.n_cols"),
    ],
    "product.h": [
        ("the last of an odd depth is left out", AVX512_BF16, PRODUCT,
         "if («depth % 2») add", "false"),
        ("the bias of the first panel", AVX512_BF16, PRODUCT,
         "a.bias ? a.bias + column : nullptr", "a.bias"),
        ("the first rows for all", AVX512_BF16, PRODUCT,
         "(const bf16*)a.hidden.data + r * a.hidden.stride", "(const bf16*)a.hidden.data"),
        ("a transposition of lanes", AVX512_BF16, PRODUCT,
         "_mm512_shuffle_i32x4(odd_low, odd_high, 0x88)",
         "_mm512_shuffle_i32x4(odd_low, odd_high, 0xdd)"),
        ("a tile is written too far", AVX512_BF16, PRODUCT,
         "store(at, tile[i][j], left);", "store(at, tile[i][j]);"),
    ],
    LAUNCHER: [
        ("fp16 for bf16", PLAIN, ROWS["forward_kl", BF16],
         "torch.bfloat16: 1, torch.float16: 2", "torch.bfloat16: 2, torch.float16: 1"),
        ("JSD for reverse KL", PLAIN, REVERSE,
         '"reverse_kl": 2, "jsd": 3', '"reverse_kl": 3, "jsd": 2'),
        ("teacher and student change places", PLAIN, FORWARD,
         "        _matrix(student),\n        _matrix(teacher),",
         "        _matrix(teacher),\n        _matrix(student),"),
        ("every row is the first", PLAIN, FORWARD,
         "_Matrix(x.data_ptr(), x.stride(0),", "_Matrix(x.data_ptr(), 0,"),
        ("rows are taken for dense", PLAIN, ANY_STRIDE,
         "return x if x.stride(1) == 1 else x.contiguous()", "return x"),
        ("vectors are taken for dense", PLAIN, ANY_STRIDE,
         "return None if x is None else x.to(dtype).contiguous()", "return x"),
        ("every row takes the first scale", PLAIN, FORWARD,
         "int(x.stride(0)) if x.ndim else 0", "0"),
        ("the mask is kd's scale", PLAIN, FORWARD,
         "        _pointer(mask),\n        _pointer(kd_scale),",
         "        _pointer(kd_scale),\n        _pointer(mask),"),
        ("the divisors change places", PLAIN, DIVISORS,
         "        _pointer(kd_scale),\n        _pointer(ce_scale),",
         "        _pointer(ce_scale),\n        _pointer(kd_scale),"),
        ("the padding is part of the vocabulary", PLAIN, FORWARD,
         "        options.vocab_size,\n        student.shape[1],",
         "        student.shape[1],\n        student.shape[1],"),
        ("the padding is nothing's", PLAIN, FORWARD,
         "        options.vocab_size,\n        student.shape[1],",
         "        options.vocab_size,\n        options.vocab_size,"),
        ("labels are ignored at -100", PLAIN, ANY_IGNORE_INDEX,
         "        options.ignore_index,", "        -100,"),
        ("a divergence of weight 0", PLAIN, NO_KD,
         "DIVERGENCES[options.divergence] if options.kd_weight else 0",
         "DIVERGENCES[options.divergence]"),
        ("T for kd's weight", PLAIN, FORWARD,
         "        options.temperature,\n        options.kd_weight,",
         "        options.kd_weight,\n        options.temperature,"),
        ("cos and MSE change weights", PLAIN, FORWARD,
         "        options.cos_weight,\n        options.mse_weight,",
         "        options.mse_weight,\n        options.cos_weight,"),
        ("heads change sides", PLAIN, HEAD["both"],
         "for scale, softcap, bias in heads)", "for scale, softcap, bias in heads[::-1])"),
        ("beta is 1/2", PLAIN, JSD, "        options.jsd_beta,", "        0.5,"),
        ("hidden: the sum over layers", PLAIN, HIDDEN_LAYERS, "1 / len(student)", "1"),
        ("hidden: every layer's gradient is the first's", PLAIN, LAYERS_ALIKE,
         "gradients[layer] if gradients", "gradients[0] if gradients"),
        ("hidden: rows begin at 1", PLAIN, HIDDEN_FP32,
         "losses = torch.zeros(", "losses = torch.ones("),
        ("silent teachers are heard", PLAIN, SILENT_TEACHER, "strict=True) if w]", "strict=True)]"),
        ("probabilities for logits", PLAIN, BY_LOGIT, 'mode == "probability"', 'mode == "logit"'),
        ("z is dense", PLAIN, BY_LOGIT, "        z.stride(0),", "        vocab_size,"),
        ("factors of any dtype", PLAIN, ANY_FACTOR,
         "by.to(torch.float32).contiguous()", "by.contiguous()"),
        ("another level than asked for", PLAIN, ASKED_FOR,
         'os.environ.get("DISTILFAST_CPU_LEVEL") or best_level()', "best_level()"),
    ],
}
# fmt: on
MUTATIONS = [Mutation(file, *row) for file, table in TABLE.items() for row in table]


def of_level(level: str) -> list[Mutation]:
    """Those of the kernels for this instruction set, the launcher's aside."""
    return [x for x in MUTATIONS if x.needs == level and x.file != LAUNCHER]
