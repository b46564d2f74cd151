"""bench/near.py in a small run, as a program, since nothing may import a bench."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from programs import WRONG, assert_written_with_their_environment, bench, rows_of

pytestmark = pytest.mark.thorough

SMALL = "--device cpu --rows 64 --width 32 --vocab 300".split()
ERRORS = ("loss_error", "hidden_error", "weight_error")
# Of both losses at three distances: the smallest divergence of a row, and the largest difference.
REFERENCE = """
import math, torch
generator = torch.Generator().manual_seed(3)
teacher = 3 * torch.randn(20, 1000, generator=generator, dtype=torch.float64)
change = torch.randn(20, 1000, generator=generator, dtype=torch.float64)
def definition(loss, s, t):
    p, q = t.log_softmax(-1), s.log_softmax(-1)
    kl = lambda a, b: (a.exp() * (a - b)).sum(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return kl(p, q) if loss == "kl" else (kl(p, m) + kl(q, m)) / 2
result = []
for loss in near.LOSSES:
    for noise in (1e-3, 0.1, 3.0):
        student = (teacher + noise * change).requires_grad_()
        wanted = definition(loss, student, teacher)
        (gradient,) = torch.autograd.grad(wanted.sum(), student)
        rows, found = near.divergence(loss, student.detach(), teacher)
        off = (rows / wanted.detach() - 1).abs().max()
        result.append([float(rows.min()), float(off), near.relative(found, gradient)])
"""


def run(code: str) -> str:
    return bench("-c", f"import sys\nsys.path.insert(0, '.')\nimport near\n{code}")


@pytest.fixture(scope="module")
def near(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run with three contestants more: its JSON, its CSV and its table. In the same
    process: the reference next to the definition, and a run that is refused."""
    path = tmp_path_factory.mktemp("near") / "near.csv"
    arguments = [*SMALL, "--noise", "0.05", "--csv", str(path), "--json", str(path) + ".json"]
    table = run(
        f"""
{WRONG}
from kit import heads
near.ROUNDS_SECONDS["cpu"] = 0
def half_of_weight(case):
    loss = near.eager_in_fp32(case)
    return lambda x: loss(x._replace(weight=HalfGradient.apply(x.weight)))
def slow(case):
    import time
    return lambda x: time.sleep(0.5) or near.eager_in_fp32(case)(x)
near.LONGEST_CALL_SECONDS = 0.4
more = [
    heads.HeadContestant("half of d_weight", near.LOSSES, half_of_weight),
    heads.HeadContestant("too slow", near.LOSSES, slow),
    heads.HeadContestant("absent", near.LOSSES, heads.materialised, package="no-such-package"),
]
field = [*near.contestants(), *more]
# Who is installed where the tests run is not what they are about.
field = [c for c in field if not c.package or c.name in ("absent", "Liger JSD")]
near.contestants = lambda: field
near.main({arguments})
{REFERENCE}
refused = ""
try:
    near.main({[*SMALL, "--noise", "0.1", "0"]})
except SystemExit as error:
    refused = str(error)
import json
print(json.dumps([result, refused]))
"""
    )
    reference, refused = json.loads(table.splitlines()[-1])
    more = {"csv": rows_of(path), "table": table, "reference": reference, "refused": refused}
    return {**json.loads(Path(f"{path}.json").read_text()), **more}


def by_name(near: dict[str, Any], loss: str, noise: str) -> dict[str, dict[str, Any]]:
    rows = [row for row in near["rows"] if (row["loss"], row["noise"]) == (loss, noise)]
    return {row["contestant"]: row for row in rows}


@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_errors_near_the_teacher_are_relative_to_what_is_left(near: dict[str, Any], loss: str):
    rows = by_name(near, loss, "0.05")
    ours, rounded = rows["distilfast"], rows["distilfast, bf16 logits"]
    assert ours["status"] == rounded["status"] == "ok"
    for column in ERRORS:
        assert ours[column] < 0.01 < rounded[column]
    # In fp32 only the rounding of the result to bf16 is left, and it is seen.
    eager = rows["PyTorch eager, fp32 logits"]
    assert 1e-3 < eager["hidden_error"] < 0.01
    assert rows["PyTorch eager, bf16 logits"]["hidden_error"] > 0.01
    assert rows["half of d_weight"]["weight_error"] == pytest.approx(0.5, rel=0.01)
    assert rows["half of d_weight"]["hidden_error"] == eager["hidden_error"]
    # A logit is off by 0.05 times 3, so the divergence is about a half of that squared.
    nats = 0.15**2 / 2 * (1 if loss == "kl" else 1 / 4)
    assert ours["loss_nats"] == pytest.approx(nats, rel=0.2)
    assert len({row["loss_nats"] for row in rows.values()}) == 1


@pytest.mark.parametrize("loss", ["kl", "jsd"])
def test_far_from_the_teacher_rounded_logits_are_better(near: dict[str, Any], loss: str):
    rounded = (by_name(near, loss, x)["distilfast, bf16 logits"] for x in ("0.05", "far"))
    close, far = ([row[column] for column in ERRORS] for row in rounded)
    assert all(a < b / 5 for a, b in zip(far, close, strict=True))


def test_times_and_memory_are_measured_in_every_case(near: dict[str, Any]):
    for loss in ("kl", "jsd"):
        for noise in ("0.05", "far"):
            rows = by_name(near, loss, noise)
            for row in rows.values():
                if row["status"] == "ok":
                    assert row["rounds"] == 5
                    assert 0 < row["time_ms_p20"] <= row["time_ms"] <= row["time_ms_p80"]
                    ratio = row["time_ms"] / rows["distilfast"]["time_ms"]
                    assert row["time_ratio"] == pytest.approx(ratio)
                    assert row["peak_mib"] is None or row["peak_mib"] >= 0
            assert rows["distilfast"]["heads"] == ("own" if noise == "far" else "same")


def test_who_cannot_take_part_is_named_with_the_reason(near: dict[str, Any]):
    reasons = {
        "absent": "no-such-package is not installed",
        "Liger JSD": "its kernels need a CUDA device",
        "F.linear_cross_entropy, accurate": "computes no divergence, CE only",
    }
    for loss in ("kl", "jsd"):
        for noise in ("0.05", "far"):
            rows = by_name(near, loss, noise)
            for name, reason in reasons.items():
                assert rows[name]["status"] == f"skipped: {reason}"
                assert rows[name]["time_ms"] is rows[name]["hidden_error"] is None
            assert rows["too slow"]["status"].startswith("skipped: a call would take about ")
    for name, reason in reasons.items():  # once a loss, below its table
        assert near["table"].count(f"- {name}: {reason}") == 2


def test_rows_are_written_with_their_environment(near: dict[str, Any]):
    assert_written_with_their_environment(near)


def test_reference_is_the_definition_and_keeps_its_digits(near: dict[str, Any]):
    # down to 1e-6 nats, where the definition in float64 has lost about half of them
    for nats, off, gradient_off in near["reference"]:
        assert nats > 0
        assert off < 1e-7
        assert gradient_off < 1e-9
    assert min(nats for nats, *_ in near["reference"]) < 1e-6


def test_student_without_noise_is_refused(near: dict[str, Any]):
    assert near["refused"].startswith("--noise: expected numbers above 0")


@pytest.mark.skipif(
    not any(map(importlib.util.find_spec, ("trl", "orda_kernel"))),
    reason="neither TRL nor ORDA is installed",
)
def test_peers_compute_the_same_far_from_the_teacher(tmp_path: Path):
    only = ["--only", "TRL", "ORDA torch", "--csv", str(tmp_path / "csv"), "--json"]
    code = 'near.ROUNDS_SECONDS["cpu"] = 0\n'
    rows = json.loads(run(f"{code}near.main({[*SMALL, '--noise', '0.5', *only]})"))["rows"]
    rows = [row for row in rows if row["noise"] == "far" and row["status"] == "ok"]
    assert rows
    for row in rows:
        assert all(row[column] < 0.02 for column in ERRORS)
