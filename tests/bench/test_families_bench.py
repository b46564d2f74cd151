"""bench/families.py: what it says of a dozen families, and that it notices mistakes."""

from __future__ import annotations

import pytest
from programs import bench, result_of

RIGHT = "albert bamba deberta-v2 deepseek_v3 diffllama esm gpt_neo minicpm3 modernbert qwen2"
REFUSED = "beam mobilebert"


def test_dozen_families_are_right_or_refused_by_name() -> None:
    said = bench("families.py", *RIGHT.split(), *REFUSED.split()).splitlines()
    assert said[-1] == "right 10, refused 2, wrong 0, not built 0"
    found = (line.split() for line in said if line.split()[0] in ("right", "refused"))
    states = {words[2]: words[0] for words in found if words[1] in ("causal", "masked")}
    assert states == {
        **dict.fromkeys(RIGHT.split(), "right"),
        **dict.fromkeys(REFUSED.split(), "refused"),
    }


@pytest.mark.thorough
def test_mistakes_are_verdicts() -> None:
    """Of the product: refused. Of the student after all checks: wrong."""
    code = """
import families, torch
from distilfast.models import parts, student
result = {}
parts.SCALES, kept = (), parts.SCALES
result["scale"] = families.verdict("causal", "granite")["state"]
parts.SCALES = kept
prove, student.prove = student.prove, lambda *_: None
load = student._load
def noisy(made, *rest):
    load(made, *rest)
    with torch.no_grad():
        made.lm_head.weight.mul_(1.001)
student._load = noisy
result["weights"] = families.verdict("causal", "granite")["state"]
student._load, student.prove = load, prove
fused = families._fused
families._fused = lambda *inputs: 1.01 * fused(*inputs)
result["loss"] = families.verdict("causal", "granite")["state"]
families._fused = fused
result["none"] = families.verdict("causal", "granite")["state"]
"""
    assert result_of(code) == {
        "scale": "refused",
        "weights": "wrong",
        "loss": "wrong",
        "none": "right",
    }
