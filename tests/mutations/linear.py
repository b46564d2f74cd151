"""Mutations of the fused head and of its products, each for the backend that notices it."""

from __future__ import annotations

import test_linear as tests
import test_near as near
from oracle import NAN

from mutations import Mutation, call

TORCH, CPP = "torch", "cpp"
PADDED = call(
    tests.test_padded_heads_contribute_nothing_whatever_they_hold,
    student_vocab=28,
    teacher_vocab=25,
    bad=NAN,
    logit_softcap=None,
)
IN_PARTS = call(tests.test_large_heads_share_goes_by_parts)
MEAN, NONE = (
    call(tests.test_any_chunk_equals_materialised_logits, reduction=reduction, chunk_rows=3)
    for reduction in ("mean", "none")
)
IN_FP32 = call(tests.test_weight_gradient_of_many_chunks_is_accumulated_in_fp32)
SCALED = call(
    tests.test_scale_and_softcap_equal_materialised,
    logit_scale=(0.3, 2.0),
    logit_softcap=(4.0, 1.5),
)
BIASES = {
    which: call(tests.test_biases_are_optional, which=which) for which in ("student", "teacher")
}
THREE = {
    mode: call(tests.test_ensemble_of_three_equals_combined_logits, mode=mode)
    for mode in ("probability", "logit")
}
PADDED_TEACHERS = call(tests.test_ensemble_members_may_be_padded_and_scaled, mode="logit")
NOTHING_COUNTS = call(tests.test_total_of_zero_reaches_no_gradient_whatever_the_rows_hold)
AS_ON_A_GPU = call(tests.test_rows_left_in_a_chunk_contribute_nothing_if_not_needed, bad=NAN)
PROJECTED = call(tests.test_rows_that_are_not_needed_are_not_projected)
ONE_AT_A_TIME = call(tests.test_one_teachers_logits_are_there_at_a_time, n_teachers=5)
CHUNKS, EVEN_CHUNKS = (
    call(
        tests.test_chunks_cover_the_rows_once_and_fit_the_budget,
        device_type="cpu",
        vocab=80_000,
        n_rows=n_rows,
    )
    for n_rows in (100_000, 4500)
)
LATE = call(tests.test_gradient_is_scaled_before_it_is_rounded)
UNUSED = call(
    tests.test_nothing_to_do_gives_zero_and_zero_gradients, reduction="mean", chunk_rows=1
)
NEAR = call(
    near.test_head_is_exact_near_the_teacher,
    machine="here",
    divergence="forward_kl",
    temperature=1.0,
    noise=0.05,
    shared=True,
    bias=True,
)
ROUNDED = call(
    near.test_rounded_logits_are_taken_where_they_are_asked_for, machine="here", bias=True
)
TWINS_ROUNDED = call(near.test_capped_ensemble_of_rounded_logits_is_capped_in_fp32)
COUNTED = call(
    near.test_statistics_of_a_head_are_those_of_its_softmaxes, chunk_rows=5, reduction="mean"
)
SEVERAL_BLOCKS = call(near.test_head_of_several_blocks_is_exact_near_the_teacher, bias=True)
SETTINGS = call(near.test_settings_of_the_process_are_left_as_they_were)
FP32_SUM = call(tests.test_fp32_parameters_under_autocast_get_an_fp32_sum, chunk_rows=1000)

# fmt: off
TABLE = {
    "products.py": [
        ("no bias in the products", TORCH, BIASES["student"],
         "return torch.addmm(bias, h, weight.T, **how)", "return torch.mm(h, weight.T, **how)"),
        ("the products are rounded on the way", TORCH, NEAR,
         "wide = h.to(torch.float32)", "wide = h.to(torch.float32) * (1 + 2.0**-9)"),
        ("blocks after the first begin the sum again", TORCH, SEVERAL_BLOCKS,
         "beta=int(columns.start > 0)", "beta=0"),
        ("every block is the first's columns", TORCH, SEVERAL_BLOCKS,
         "to = out[:, columns]", "to = out[:, : block.shape[0]]"),
        ("every block's bias is the first's", TORCH, SEVERAL_BLOCKS,
         "None if bias is None else bias[columns]",
         "None if bias is None else bias[: block.shape[0]]"),
        ("the setting stays", TORCH, SETTINGS,
         "        settings.fp32_precision = before", "        pass"),
        ("the gradient is rounded although the machine does not gain by it", TORCH, FP32_SUM,
         "return self.widened and not self.in_bf16", "return False"),
    ],
    "chunks.py": [
        ("the last chunk alone", TORCH, MEAN, "self.begun = True", "self.begun = False"),
        ("every part of a share is the first's", CPP, IN_PARTS,
         "self.products.weight_gradient(some, hidden, share, False)",
         "self.products.weight_gradient(gradient[:, : len(total)], hidden, share, False)"),
        ("shares after the first are forgotten", CPP, IN_FP32,
         "self.accumulate(total, share, self.begun)", "self.accumulate(total, share, False)"),
        ("the sum is rounded", TORCH, PADDED,
         "result = self.like.new_empty(self.like.shape)",
         "total = total.bfloat16()\n        result = self.like.new_empty(self.like.shape)"),
        ("padding has a gradient", TORCH, PADDED,
         "result[vocab_size:] = 0", "result[vocab_size:] = 1"),
        ("no chunk, no zeros", TORCH, UNUSED,
         "else self.total.zero_()", "else self.total.fill_(1)"),
        ("no bias in the kernel", CPP, BIASES["teacher"],
         "head._replace(bias=in_fp32), None", "head, None"),
        ("a teacher's head is plain", CPP, SCALED, "self.sides[0].head", "Head()"),
        ("an ensemble's heads are plain", TORCH, PADDED_TEACHERS,
         "if not side.head.plain:", "if False:"),
        ("a mixture is heard twice", TORCH, THREE["probability"],
         "[mixed / (mixed + share), share / (mixed + share)]", "[0.5, 0.5]"),
        ("a mixture weighs as its last teacher", CPP, THREE["logit"],
         "mixed += share", "mixed = share"),
        ("all teachers at once", TORCH, ONE_AT_A_TIME,
         "self.dtypes = list({side.logits_dtype for side in sides})",
         "self.dtypes = [side.logits_dtype for side in sides]"),
        ("every row is projected", TORCH, PROJECTED, "and not hidden.is_cuda:", "and False:"),
        ("the rest of the rows is left out", TORCH, CHUNKS,
         "range(0, n, rows)]", "range(0, n - rows + 1, rows)]"),
        ("chunks of any size", TORCH, EVEN_CHUNKS, "rows = -(-n // -(-n // most))", "rows = most"),
        ("a budget for each side", TORCH, CHUNKS,
         "sum(dtype.itemsize for dtype in dtypes)", "dtypes[0].itemsize"),
        ("a capped ensemble is capped in the products' memory of 16 bits", TORCH, TWINS_ROUNDED,
         "if logits.dtype != z.dtype:", "if False:"),
    ],
    "linear_operator.py": [
        ("sums in the products' dtype", TORCH, IN_FP32,
         "student, accum_dtype, student_weight", "student, student.weight.dtype, student_weight"),
        ("heads change sides", TORCH, SCALED,
         "Head(teacher_scale, teacher_softcap)", "Head(scale, softcap)"),
        ("teachers that are not heard are asked", TORCH, PROJECTED,
         "for k, share in enumerate(numbers.shares) if share]",
         "for k, share in enumerate(numbers.shares)]"),
        ("rows left out are in the weight's gradient", TORCH, AS_ON_A_GPU,
         "hidden = torch.where(needed[chunk, None], hidden, 0)", "pass"),
        ("the first rows' labels for all", TORCH, MEAN,
         "else labels[chunk],", "else labels[: len(hidden)],"),
        ("the first rows' mask for all", TORCH, MEAN,
         "else mask[chunk],", "else mask[: len(hidden)],"),
        ("the first rows' teacher for all", TORCH, MEAN,
         "teacher_hidden[k][chunk] for k", "teacher_hidden[k][: len(hidden)] for k"),
        ("rows are not scaled one by one", TORCH, NONE,
         "late_scales(scales, grad_loss)", "late_scales(scales, torch.ones_like(grad_loss))"),
        ("the kd's scale serves labels, too", TORCH, MEAN,
         "kd_scale, ce_scale = by.unbind()", "kd_scale = ce_scale = by[0]"),
        ("finished gradients are scaled again", TORCH, LATE,
         "finished(g, loss, call.backend)", "finished(g * grad_loss.sum(), loss, call.backend)"),
        ("a total of 0 asks for no row's zeros", TORCH, NOTHING_COUNTS,
         "or isinstance(totals[0], Tensor) or totals[0] == 0:",
         "or (isinstance(totals[0], float) and totals[0] == 0):"),
        ("a gradient is doubled", TORCH, MEAN,
         "return loss, parts, d_hidden, d_weight, d_bias, by, statistics",
         "return loss, parts, d_hidden * 2, d_weight, d_bias, by, statistics"),
        ("logits are rounded to bf16", CPP, NEAR,
         "return hidden.dtype if kept else torch.float32", "return hidden.dtype"),
        ("statistics of the last chunk alone", TORCH, COUNTED,
         "statistics[:, chunk] = found", "statistics[:, : found.shape[1]] = found"),
    ],
    "linear.py": [
        ("accum_dtype is not asked", TORCH, IN_FP32,
         "    return wanted\n\n\ndef _logits_dtype", "    return widest\n\n\ndef _logits_dtype"),
        ("fp16 is rounded first", TORCH, LATE,
         'reduction == "none" or student_hidden.dtype == torch.float16', 'reduction == "none"'),
        ("logits_dtype is not asked", TORCH, ROUNDED,
         "    return wanted\n\n\ndef _check_head", "    return torch.float32\n\n\ndef _check_head"),
    ],
}
# fmt: on
MUTATIONS = [Mutation(file, *row) for file, table in TABLE.items() for row in table]
