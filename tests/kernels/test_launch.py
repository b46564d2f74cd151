"""The Triton launchers, as on a GPU but for the launch itself: arguments are specialised, kernels
compiled for an H200 and looked up again by triton's own code. The interpreter skips all of that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest

# Stands in for a driver, and stops every launch where the GPU would begin.
SCRIPT = """
import json
import re
import sys

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver, jit


class NoDriver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


driver.set_active(NoDriver())
run, built = jit.JITFunction.run, []


def compile_only(self, *arguments, grid, warmup, **keywords):
    built.append(run(self, *arguments, grid=grid, warmup=True, **keywords))


jit.JITFunction.run = compile_only

from distilfast_kernels import distillation, ensemble, hidden_cosine, reductions, scale

from distilfast.losses.reference import Options

one, labels = torch.ones(()), torch.zeros(3, dtype=torch.int64)


def logits(columns, stride=None, dtype=torch.bfloat16, rows=3):
    return torch.zeros(rows, stride or columns, dtype=dtype)[:, :columns]


def losses(student, teacher, gradient, labels=None, mask=None, by=one, **keywords):
    weights = {f"{part}_weight": 0.0 for part in ("kd", "ce", "cos", "mse")} | {"kd_weight": 1.0}
    fixed = {"temperature": 2.0, "jsd_beta": 0.5, "divergence": "forward_kl", "ignore_index": -100}
    options = Options(**{**fixed, **weights, "vocab_size": student.shape[1], **keywords})
    distillation.distillation(student, teacher, labels, mask, by, one, options, gradient)


def distil(columns, stride=None, **keywords):
    losses(*(logits(columns, stride) for _ in range(3)), **keywords)


CASES = {
    "temperatures and weights": lambda: [
        distil(30522, temperature=t, kd_weight=w, ce_weight=w / 2, labels=labels)
        for t, w in ((2.0, 1.0), (3.0, 0.5), (4.0, 5.0), (1.0, 2.0))
    ],
    "other temperatures": lambda: [
        distil(30522, temperature=t, ce_weight=1.0, labels=labels) for t in (0.5, 2.5, 7.3)
    ],
    "temperatures without labels": lambda: [
        distil(30522, temperature=t, kd_weight=t) for t in (0.5, 2.0, 7.3)
    ],
    "sizes of one kind": lambda: [distil(v, s) for v, s in ((30522, None), (30528, None),
                                                          (30522, 30528), (29999, None))],
    "scales a row": lambda: [distil(500, by=torch.ones(3), mask=torch.ones(3)), distil(500, by=one,
                                                                      mask=torch.ones(3))],
    "scales anywhere": lambda: [distil(500, by=torch.ones(4)[n], mask=torch.ones(5)[n : n + 3],
                                       labels=torch.zeros(5, dtype=torch.int64)[n : n + 3],
                                       ce_weight=1.0) for n in (0, 1, 2)],
    "forward KL": lambda: distil(50257),
    "forward KL, no gradient": lambda: losses(logits(50257), logits(50257), None),
    "JSD": lambda: distil(30522, divergence="jsd"),
    "everything": lambda: distil(128256, labels=labels, ce_weight=1.0, cos_weight=1.0,
                                 mse_weight=1.0, mask=torch.ones(3)),
    "mixed dtypes": lambda: losses(logits(30528), logits(30528, dtype=torch.float32),
                                   logits(30528)),
    "fp32 beside bf16": lambda: losses(logits(30528, dtype=torch.float32), logits(30528),
                                       logits(30528, dtype=torch.float32)),
    "unaligned": lambda: losses(logits(30522), logits(30522, 30528), logits(30522)),
    "hidden cosine": lambda: hidden_cosine.hidden_cosine(
        [logits(768)] * 3, [logits(768, dtype=torch.float32)] * 3, torch.ones(3), one,
        [logits(768)] * 3),
    "ensemble, probability": lambda: ensemble.combine_teachers(
        [logits(30522)] * 2, [0.3, 0.7], 2.0, "probability", 30522, logits(30522,
                                                             dtype=torch.float32)),
    "ensemble, logit": lambda: ensemble.combine_teachers(
        [logits(30522)] * 3, [0.2, 0.3, 0.5], 2.0, "logit", 30522, logits(30522,
                                                                dtype=torch.float32)),
    "scale": lambda: scale.scale([logits(30522)], one),
    "scale, several": lambda: [
        scale.scale([logits(768, rows=n), logits(768, rows=31), logits(v, rows=1)], one)
        for n, v in ((1, 30522), (3, 30528), (16, 30521), (17, 1))
    ],
    "ensembles of other sizes": lambda: [
        ensemble.combine_teachers([logits(v)] * 2, [0.3, 0.7], 2.0, "probability", v,
                                  logits(v, dtype=torch.float32)) for v in (30522, 30528, 29999)
    ],
    "counts": lambda: [
        reductions.row_scales((None, None), torch.zeros(n, dtype=torch.int64), torch.ones(n), n,
                              -100, torch.float32, one.device) for n in (1, 3, 16)
    ],
    "counts of what is given": lambda: [
        reductions.row_scales(totals, torch.zeros(3, dtype=torch.int64), mask, 3, -100,
                              torch.float32, one.device, torch.empty(3, dtype=torch.bool))
        for totals in ((one, one), (2.0, None), (one.long(), one.double()))
        for mask in (None, torch.ones(3, dtype=torch.bool), torch.ones(3, dtype=torch.float16))
    ],
    "sums": lambda: [
        reductions.reduce_rows(torch.ones(4, n), torch.ones(2), (5.0, 2.0, 0.0, 1.0), "mean")
        for n in (1, 3, 16)
    ],
    "weighted rows": lambda: [
        reductions.reduce_rows(torch.ones(4, n), torch.ones(2), (w, 0.0, 0.0, 1.0), "none")
        for n, w in ((1, 1.0), (3, 0.0), (16, 2.0))
    ],
}
# of a sweep; the edges, one element a thread, may be moved once a row
MOVED = r"ttg.convert_layout .*: tensor<[0-9]+x[0-9]+x(?!1x)[0-9]+x"
found = {}
for name, call in CASES.items():
    built.clear()
    call()
    code = [kernel.asm["ptx"] for kernel in built]
    found[name] = {
        "launches": len(built),
        "compiled": len({id(kernel) for kernel in built}),
        "moved": sum(len(re.findall(MOVED, kernel.asm["ttgir"])) for kernel in built),
        "wide": all("global" in x and re.search(r"(ld|st).global.*v4.b32", x) for x in code),
    }
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def launched() -> dict[str, dict[str, object]]:
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(re.sub(r"^[^{]*", "", done.stdout))


@pytest.mark.parametrize(
    "what",
    [
        "temperatures and weights",
        "sizes of one kind",
        "scales a row",
        "scales anywhere",
        "scale, several",
        "ensembles of other sizes",
        "counts",
        "sums",
        "weighted rows",
    ],
)
def test_scalars_and_sizes_do_not_recompile(launched, what):
    assert launched[what]["launches"] > launched[what]["compiled"] == 1


AROUND = {"counts", "counts of what is given", "sums", "weighted rows"}


def test_every_launcher_compiles_with_wide_accesses(launched):
    wide = {name for name, case in launched.items() if case["wide"]}
    # What stands around the row kernels reads a few bytes a row, wherever they begin.
    assert set(launched) - wide == {"unaligned", *AROUND}


def test_no_tile_goes_through_shared_memory(launched):
    # A thread that stores more than 16 bytes is given the tile in another layout, behind barriers.
    assert {name: case["moved"] for name, case in launched.items() if case["moved"]} == {}
