"""bench/resources.py, held: what the compiler makes of the vocabulary kernel for the GPUs we name.

It compiles for them on any machine and reads the machine code, so that a change that spills a
register or narrows a load is found where there is no GPU. Its own process: Triton compiles only
where it was not imported for the interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT

pytestmark = pytest.mark.thorough

RESOURCES = ROOT / "bench" / "resources.py"
VOCABULARIES = (30_522, 50_257, 128_256)
TARGETS = (80, 90, 100)
# Exponentials and logarithms a pair, over all sweeps of a kernel with gradient. Where T is 1 to 4
# the cross entropy of a labelled row is a power and takes none.
ALLOWED = {
    "forward KL": (4, 0),
    "forward KL + CE": (4, 0),
    "forward KL + CE, T = 7.3": (6, 0),
    "reverse KL + CE": (3, 0),
    "JSD": (6, 2),
    "forward KL + CE, softcap": (8, 0),
}

# Imports the script by its path, and prints what it sees in kernels that are known to be worse.
WORSE = """
import importlib.util
import json
import sys

spec = importlib.util.spec_from_file_location("resources", sys.argv[1])
resources = importlib.util.module_from_spec(spec)
sys.modules["resources"] = resources
spec.loader.exec_module(resources)


def variant(loss):
    options = resources.options(30522, **resources.LOSSES[loss])
    # without the sweeps of small divergences, which would be counted with the others
    found = resources.distillation.variant(options, True, True, True, [2, 2], True)
    return found._replace(EXACT=False)


def seen(variant, power=None, student="bf16"):
    made = resources.compiled(variant, student, 90, power, teacher="bf16")
    usage, code = resources.disassembled(made["cubin"])
    loops = resources.loops(code)
    return {
        "sweeps": len(loops),
        "load_bits": min(bits for loop in loops for bits in loop.loads),
        "store_bits": min(bits for loop in loops for bits in loop.stores),
        "exponentials": sum(loop.exponentials for loop in loops),
        "barriers": sum(loop.barriers for loop in loops),
        "spilled": usage["STACK"] + usage["LOCAL"],
    }


def crowded(*arguments, options, **keywords):
    return compile_as_told(*arguments, options={**options, "maxnreg": 32}, **keywords)


forward = variant("forward KL + CE")
found = {
    "chosen": seen(forward, power=2),
    "any temperature": seen(variant("forward KL + CE, T = 7.3")),
    "narrow": seen(forward._replace(VECTOR=1, TILES=8), power=2),
    "too wide": seen(forward._replace(VECTOR=8, TILES=1), power=2, student="fp32"),
}
compile_as_told = resources.triton.compile
resources.triton.compile = crowded
found["crowded"] = seen(forward, power=2)
print(json.dumps(found))
"""


def python(*arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("triton")
    compiling = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**compiling, **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    path = tmp_path_factory.mktemp("resources") / "report.json"
    arguments = [RESOURCES, "--json", path, "--dtypes", "bf16", "--losses", *ALLOWED]
    arguments += ["--vocab", *VOCABULARIES, "--targets", *TARGETS]
    done = python(*arguments)
    assert done.returncode == 0, done.stderr
    assert "spilled_bytes" in done.stdout  # the table
    return json.loads(path.read_text(encoding="utf-8"))


def missed(reports: list[dict[str, Any]], good: Any) -> list[str]:
    return [
        f"{r['loss']}, V = {r['vocab']}, {r['target']}, gradient={r['gradient']}: {r}"
        for r in reports
        if not good(r)
    ]


def test_report_covers_every_case_once(reports: list[dict[str, Any]]) -> None:
    found = [(r["loss"], r["vocab"], r["target"], r["gradient"]) for r in reports]
    wanted = {
        (loss, vocab, f"sm_{target}", gradient)
        for loss in ALLOWED
        for vocab in VOCABULARIES
        for target in TARGETS
        for gradient in (True, False)
    }
    assert len(found) == len(wanted)
    assert set(found) == wanted
    assert {r["dtype"] for r in reports} == {"bf16"}


def test_no_kernel_spills_more_than_a_few_words(reports: list[dict[str, Any]]) -> None:
    # 32 warps have 64 registers a thread and no more: the sweep of small divergences costs a few
    # words there
    assert not missed(reports, lambda r: r["spilled_bytes"] <= (16 if r["warps"] == 32 else 0))


def test_all_loads_and_stores_move_16_bytes(reports: list[dict[str, Any]]) -> None:
    # rows of 30,522 and 50,257 elements begin anywhere, their bodies at a 16-byte boundary
    assert not missed(reports, lambda r: r["load_bits"] == 128)
    assert not missed(reports, lambda r: r["store_bits"] == (128 if r["gradient"] else 0))


def test_no_sweep_has_a_barrier(reports: list[dict[str, Any]]) -> None:
    assert not missed(reports, lambda r: r["barriers"] == 0)


def test_exponentials_of_a_pair_are_as_few_as_promised(reports: list[dict[str, Any]]) -> None:
    def few(r: dict[str, Any]) -> bool:
        exponentials, logarithms = ALLOWED[r["loss"]]
        return 0 < r["exponentials_a_pair"] <= exponentials and r["logarithms_a_pair"] <= logarithms

    assert not missed(reports, few)


def test_every_multiprocessor_holds_a_program(reports: list[dict[str, Any]]) -> None:
    # 65,536 registers and 64 warps each
    assert not missed(reports, lambda r: r["programs_an_sm"] >= 1)
    assert not missed(reports, lambda r: r["registers"] * 32 * r["warps"] <= 65_536)


def test_a_multiprocessor_holds_32_warps_at_berts_vocabulary(reports: list[dict[str, Any]]) -> None:
    # two programs of 16, or one of 32: fewer leave the memory waiting
    bert = [r for r in reports if r["vocab"] == 30_522 and r["gradient"]]
    assert not missed(bert, lambda r: r["programs_an_sm"] * r["warps"] >= 32)


def test_report_tells_what_is_worse() -> None:
    done = python("-c", WORSE, RESOURCES)
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    chosen = seen["chosen"]
    assert chosen["sweeps"] == 2
    assert chosen["load_bits"] == chosen["store_bits"] == 128
    assert chosen["spilled"] == chosen["barriers"] == 0
    # an element at a time
    assert seen["narrow"]["load_bits"] < 128
    assert seen["narrow"]["store_bits"] < 128
    # 32 bytes of the gradient beside 16 of the teacher: the tile goes through shared memory
    assert seen["too wide"]["barriers"] > 0
    # an exponential a sweep for T = 1
    assert seen["any temperature"]["exponentials"] > chosen["exponentials"] > 0
    # no more than 32 registers a thread
    assert seen["crowded"]["spilled"] > 0


@pytest.mark.parametrize("value", ["1", "true"])
def test_report_refuses_the_interpreter(value: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    done = python(RESOURCES, "--json", path, TRITON_INTERPRET=value)
    assert done.returncode != 0
    assert "TRITON_INTERPRET" in done.stderr
    assert not path.exists()
