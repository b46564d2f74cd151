"""Mutations of the fused head and its products, each noticed by a test of test_linear.py or
test_near.py.

As test_mutations.py does for the kernels: a list of plausible mistakes, and for each a call of a
test that has to fail.
"""

from __future__ import annotations

import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import test_linear as tests
import test_near as near
import torch
from oracle import NAN
from test_mutations import Call, call, load

from distilfast.losses import backends, linear, products

BF16, FP32 = torch.bfloat16, torch.float32
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
LEFT_OUT = call(
    tests.test_rows_that_nothing_needs_contribute_nothing_whatever_they_hold,
    bad=NAN,
    chunk_rows=4,
    logit_softcap=None,
)
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


NEAR = {
    machine: call(
        near.test_head_is_exact_near_the_teacher,
        machine=machine,
        divergence="forward_kl",
        temperature=1.0,
        noise=0.05,
        shared=True,
        bias=True,
    )
    for machine in ("here", "bf16 products")
}
ROUNDED = call(
    near.test_rounded_logits_are_taken_where_they_are_asked_for, machine="here", bias=True
)
TWINS_ROUNDED = call(near.test_capped_ensemble_of_rounded_logits)
COUNTED = call(near.test_statistics_of_a_head, chunk_rows=5, reduction="mean")
SEVERAL_BLOCKS = call(near.test_head_of_several_blocks, bias=True)
SETTINGS = call(near.test_settings_of_the_process_are_left_as_they_were)
FP32_SUM = call(tests.test_fp32_parameters_under_autocast_get_an_fp32_sum, chunk_rows=1000)


class Mutation(NamedTuple):
    name: str
    backend: str
    old: str
    new: str
    caught_by: Call


MUTATIONS = [
    Mutation("the last chunk alone", "torch", "self.begun = True", "self.begun = False", MEAN),
    Mutation(
        "sums in the products' dtype",
        "torch",
        "student, accum_dtype, student_weight",
        "student, student.weight.dtype, student_weight",
        IN_FP32,
    ),
    Mutation(
        "accum_dtype is not asked",
        "torch",
        "    return wanted\n\n\ndef _logits_dtype",
        "    return widest\n\n\ndef _logits_dtype",
        IN_FP32,
    ),
    Mutation(
        "every part of a share is the first's",
        "cpp",
        "self.products.weight_gradient(some, hidden, share, False)",
        "self.products.weight_gradient(gradient[:, : len(total)], hidden, share, False)",
        IN_PARTS,
    ),
    Mutation(
        "shares after the first are forgotten",
        "cpp",
        "self.accumulate(total, share, self.begun)",
        "self.accumulate(total, share, False)",
        IN_FP32,
    ),
    Mutation(
        "the sum is rounded",
        "torch",
        "result = self.like.new_empty(self.like.shape)",
        "total = total.bfloat16()\n        result = self.like.new_empty(self.like.shape)",
        PADDED,
    ),
    Mutation(
        "padding has a gradient",
        "torch",
        "result[vocab_size:] = 0",
        "result[vocab_size:] = 1",
        PADDED,
    ),
    Mutation(
        "no chunk, no zeros", "torch", "else self.total.zero_()", "else self.total.fill_(1)", UNUSED
    ),
    Mutation(
        "no bias in the products",
        "torch",
        "return torch.addmm(bias, h, weight.T, **how)",
        "return torch.mm(h, weight.T, **how)",
        BIASES["student"],
    ),
    Mutation(
        "no bias in the kernel",
        "cpp",
        "head._replace(bias=in_fp32), None",
        "head, None",
        BIASES["teacher"],
    ),
    Mutation(
        "heads change sides",
        "torch",
        "Head(teacher_scale, teacher_softcap)",
        "Head(scale, softcap)",
        SCALED,
    ),
    Mutation("a teacher's head is plain", "cpp", "self.sides[0].head", "Head()", SCALED),
    Mutation(
        "an ensemble's heads are plain",
        "torch",
        "if not side.head.plain:",
        "if False:",
        PADDED_TEACHERS,
    ),
    Mutation(
        "a mixture is heard twice",
        "torch",
        "[mixed / (mixed + share), share / (mixed + share)]",
        "[0.5, 0.5]",
        THREE["probability"],
    ),
    Mutation(
        "a mixture weighs as its last teacher",
        "cpp",
        "mixed += share",
        "mixed = share",
        THREE["logit"],
    ),
    Mutation(
        "teachers that are not heard are asked",
        "torch",
        "for k, share in enumerate(numbers[SHARES]) if share]",
        "for k, share in enumerate(numbers[SHARES])]",
        PROJECTED,
    ),
    Mutation(
        "all teachers at once",
        "torch",
        "self.dtypes = list({side.logits_dtype for side in sides})",
        "self.dtypes = [side.logits_dtype for side in sides]",
        ONE_AT_A_TIME,
    ),
    Mutation(
        "rows left out are in the weight's gradient",
        "torch",
        "hidden = torch.where(needed[chunk, None], hidden, 0)",
        "pass",
        AS_ON_A_GPU,
    ),
    Mutation("every row is projected", "torch", "and not hidden.is_cuda:", "and False:", PROJECTED),
    Mutation(
        "the rest of the rows is left out",
        "torch",
        "range(0, n, rows)]",
        "range(0, n - rows + 1, rows)]",
        CHUNKS,
    ),
    Mutation(
        "chunks of any size", "torch", "rows = -(-n // -(-n // most))", "rows = most", EVEN_CHUNKS
    ),
    Mutation(
        "a budget for each side",
        "torch",
        "sum(dtype.itemsize for dtype in dtypes)",
        "dtypes[0].itemsize",
        CHUNKS,
    ),
    Mutation(
        "the first rows' labels for all",
        "torch",
        "else labels[chunk],",
        "else labels[: len(hidden)],",
        MEAN,
    ),
    Mutation(
        "the first rows' mask for all",
        "torch",
        "else mask[chunk],",
        "else mask[: len(hidden)],",
        MEAN,
    ),
    Mutation(
        "the first rows' teacher for all",
        "torch",
        "teacher_hidden[k][chunk] for k",
        "teacher_hidden[k][: len(hidden)] for k",
        MEAN,
    ),
    Mutation(
        "rows are not scaled one by one",
        "torch",
        "late_scales(scales, grad_loss)",
        "late_scales(scales, torch.ones_like(grad_loss))",
        NONE,
    ),
    Mutation(
        "the kd's scale serves labels, too",
        "torch",
        "kd_scale, ce_scale = by.unbind()",
        "kd_scale = ce_scale = by[0]",
        MEAN,
    ),
    Mutation(
        "finished gradients are scaled again",
        "torch",
        "finished(g, loss, call.backend)",
        "finished(g * grad_loss.sum(), loss, call.backend)",
        LATE,
    ),
    Mutation(
        "a total of 0 asks for no row's zeros",
        "torch",
        "or isinstance(totals[0], Tensor) or totals[0] == 0:",
        "or (isinstance(totals[0], float) and totals[0] == 0):",
        NOTHING_COUNTS,
    ),
    Mutation(
        "fp16 is rounded first",
        "torch",
        'reduction == "none" or student_hidden.dtype == torch.float16',
        'reduction == "none"',
        LATE,
    ),
    Mutation(
        "a gradient is doubled",
        "torch",
        "return loss, parts, d_hidden, d_weight, d_bias, by, statistics",
        "return loss, parts, d_hidden * 2, d_weight, d_bias, by, statistics",
        MEAN,
    ),
    Mutation(
        "teachers are read for labels alone",
        "torch",
        "t_hidden, t_weight, t_bias, shares = [], [], [], []",
        "pass",
        PROJECTED,
    ),
    Mutation(
        "logits are rounded to bf16",
        "cpp",
        "return hidden.dtype if kept else torch.float32",
        "return hidden.dtype",
        NEAR["here"],
    ),
    Mutation(
        "logits_dtype is not asked",
        "torch",
        "    return wanted\n\n\ndef _check_head",
        "    return torch.float32\n\n\ndef _check_head",
        ROUNDED,
    ),
    Mutation(
        "a capped ensemble is capped in the products' memory of 16 bits",
        "torch",
        "if logits.dtype != z.dtype:",
        "if False:",
        TWINS_ROUNDED,
    ),
    Mutation(
        "statistics of the last chunk alone",
        "torch",
        "statistics[:, chunk] = found",
        "statistics[:, : found.shape[1]] = found",
        COUNTED,
    ),
    Mutation(
        "the products are rounded on the way",
        "torch",
        "wide = h.to(torch.float32)",
        "wide = h.to(torch.float32) * (1 + 2.0**-9)",
        NEAR["here"],
    ),
    Mutation(
        "blocks after the first begin the sum again",
        "torch",
        "beta=int(columns.start > 0)",
        "beta=0",
        SEVERAL_BLOCKS,
    ),
    Mutation(
        "every block is the first's columns",
        "torch",
        "to = out[:, columns]",
        "to = out[:, : block.shape[0]]",
        SEVERAL_BLOCKS,
    ),
    Mutation(
        "every block's bias is the first's",
        "torch",
        "None if bias is None else bias[columns]",
        "None if bias is None else bias[: block.shape[0]]",
        SEVERAL_BLOCKS,
    ),
    Mutation(
        "the setting stays",
        "torch",
        "        settings.fp32_precision = before",
        "        pass",
        SETTINGS,
    ),
    Mutation(
        "the gradient is rounded although the machine does not gain by it",
        "torch",
        "return self.widened and not self.in_bf16",
        "return False",
        FP32_SUM,
    ),
]


@contextmanager
def instead(folder: Path) -> Any:
    """The tests' calls go to the modules in this folder, whose operator has its own name."""
    path = folder / "linear.py"
    text = path.read_text(encoding="utf-8")
    name = '"distilfast::linear_distillation"'
    assert text.count(name) == 1
    path.write_text(text.replace(name, '"distilfast_mutated::linear_distillation"'), "utf-8")
    its_products = load("distilfast_mutated_products", folder / "products.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, products.__name__, its_products)
        module = load("distilfast_mutated_linear", path)
        for suite in (tests, near):
            patch.setattr(suite, "products", its_products)
            patch.setattr(suite, "linear_distillation_loss", module.linear_distillation_loss)
        patch.setattr(tests, "linear", module)
        yield


def copy_of_both(folder: Path) -> list[Path]:
    return [Path(shutil.copy(x.__file__, folder)) for x in (linear, products)]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_mutation_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    if backends.unavailable(mutation.backend):
        pytest.skip(f"no {mutation.backend} here")
    texts = {path: path.read_text(encoding="utf-8") for path in copy_of_both(tmp_path)}
    found = [path for path, text in texts.items() if mutation.old in text]
    assert sum(text.count(mutation.old) for text in texts.values()) == 1, (
        f"not once: {mutation.old!r}"
    )
    found[0].write_text(texts[found[0]].replace(mutation.old, mutation.new), encoding="utf-8")
    with instead(tmp_path):
        try:
            mutation.caught_by(mutation.backend)
        except AssertionError:
            return
        except Exception as error:
            pytest.fail(f"malformed, it raises {error!r}")
    pytest.fail(f"{mutation.caught_by.test.__name__} did not notice")


def test_unmutated_copy_passes_the_same_calls(tmp_path: Path) -> None:
    copy_of_both(tmp_path)
    calls = {(x.backend, repr(x.caught_by)): x.caught_by for x in MUTATIONS}
    with instead(tmp_path):
        for (backend, _), caught_by in calls.items():
            if not backends.unavailable(backend):
                caught_by(backend)
    assert tests.linear is linear
