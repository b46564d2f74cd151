"""What does the compiler make of the Triton kernels, and what speed does that allow? Needs no GPU.

    python bench/resources.py [--targets 80 90 100] [--vocab 30522 ...] [--json FILE]

Compiles every variant of the vocabulary kernel that the launcher would choose for these
vocabularies, and reads the machine code: registers, spilled bytes, the width of the loads and
stores in the main loops, barriers, and the exponentials and instructions for each pair (one student
and one teacher logit) over all sweeps.

From these and an H200's data sheet follow three lower bounds on the time of a pair, in picoseconds:
by the bytes it moves, by its exponentials, and by the instructions issued. They also tell whether
the rows in flight fit the L2 cache, which decides if a later sweep reads from there or from memory.
(The gradient's rows are stored to be evicted first and not counted; they would add half as much.)

If a row has a label, T = 2 is compiled in to count the exponentials: the kernel takes that branch
at run time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    import triton
except ModuleNotFoundError:
    sys.exit("triton is not installed; `make test` installs it")
from distilfast_kernels import distillation
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from distilfast.losses.reference import Options

VOCABULARIES = (30_522, 50_257, 128_256)
TARGETS = (80, 90, 100)
DTYPES = {"bf16": 2, "fp32": 4}
# NVIDIA's data sheet of the H200, and per multiprocessor and cycle its 16 special functions, 128
# instruction lanes, 65,536 registers.
H200 = {"sms": 132, "ghz": 1.98, "tb_per_s": 4.8, "l2_mib": 50}

FORWARD = {"kd_weight": 1.0}
CAPPED = "forward KL + CE, softcap"  # of both sides, as a fused head leaves it to the kernel
LOSSES: dict[str, dict[str, Any]] = {
    "forward KL": FORWARD,
    "forward KL + CE": {**FORWARD, "ce_weight": 1.0},
    "forward KL + CE, T = 7.3": {**FORWARD, "ce_weight": 1.0, "temperature": 7.3},
    "reverse KL + CE": {**FORWARD, "ce_weight": 1.0, "divergence": "reverse_kl"},
    "JSD": {**FORWARD, "divergence": "jsd"},
    "JSD + CE": {**FORWARD, "ce_weight": 1.0, "divergence": "jsd"},
    "CE": {"ce_weight": 1.0},
    "cosine": {"cos_weight": 1.0},
    "all": {**FORWARD, "ce_weight": 1.0, "cos_weight": 1.0, "mse_weight": 1.0},
    CAPPED: {**FORWARD, "ce_weight": 1.0},
}


@dataclass
class Loop:
    """A loop over a row's tiles, per thread and turn."""

    loads: list[int]  # bits of each
    stores: list[int]
    exponentials: int
    logarithms: int
    instructions: int
    barriers: int


@dataclass
class Report:
    loss: str
    mask: bool
    gradient: bool
    vocab: int
    dtype: str
    target: str
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    load_bits: int
    store_bits: int
    exponentials_a_pair: float
    logarithms_a_pair: float
    instructions_a_pair: float
    barriers: int
    bytes_ps: float
    exponentials_ps: float
    instructions_ps: float
    programs_an_sm: int
    mib_in_flight: float
    passes: int


def options(vocab: int, **keywords: Any) -> Options:
    weights = {f"{part}_weight": 0.0 for part in ("kd", "ce", "cos", "mse")}
    fixed = {"temperature": 2.0, "jsd_beta": 0.5, "divergence": "forward_kl"}
    return Options(**{**fixed, **weights, **keywords, "ignore_index": -100, "vocab_size": vocab})


def compiled(
    variant: distillation.Variant,
    dtype: str,
    target: int,
    power: int | None = None,
    teacher: str | None = None,
    gradient: str | None = None,
) -> dict[str, Any]:
    """The kernel as the launcher would have it compiled, at aligned pointers; ``teacher`` and
    ``gradient`` are dtypes where they are another."""
    kernel = distillation.distillation_kernel
    constants: dict[str, Any] = dict(variant._asdict())
    if power is not None:
        constants["power"] = power
    pointers = {
        "s_ptr": dtype,
        "t_ptr": teacher or dtype,
        "g_ptr": gradient or dtype,
        "labels_ptr": "i64",
    }
    floats = ("temperature", "beta", *(f"{p}_weight" for p in ("kd", "ce", "cos", "mse")))

    def type_of(name: str) -> str | tuple[str, ...]:
        if name in constants:
            return "constexpr"
        if name == "heads":
            return ("fp32",) * 4
        if name.endswith("_ptr"):
            return "*" + pointers.get(name, "fp32")
        return "fp32" if name in floats else "i32"

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={name: type_of(name) for name in names},
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n.endswith("_ptr")},
    )
    built = triton.compile(
        source,
        target=GPUTarget("cuda", target, 32),
        options={"num_warps": variant.num_warps, "maxnreg": variant.maxnreg},
    )
    return dict(built.asm)


def disassembled(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage by name, and the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        tools = triton.knobs.nvidia
        usage = _output(tools.cuobjdump.path, "-res-usage", path)
        code = _output(tools.nvdisasm.path, "-c", path)
    return {name: int(n) for name, n in re.findall(r"(\w+):(\d+)", usage.splitlines()[-1])}, code


def _output(*command: Any) -> str:
    return subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, check=True
    ).stdout.strip()


def loops(code: str) -> list[Loop]:
    """The loops that load in 16 bytes or less and do not contain another such loop, in order."""
    lines = code.splitlines()
    labels = {m[1]: i for i, x in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", x))}
    spans = []
    for end, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and labels[jump[1]] < end and any("LDG" in x for x in lines[labels[jump[1]] : end]):
            spans.append((labels[jump[1]], end))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    found = []
    for start, end in sorted(inner):
        body = [x for x in lines[start : end + 1] if re.search(r"/\*[0-9a-f]{4,}\*/\s+\S", x)]
        found.append(
            Loop(
                loads=[_bits(x) for x in body if re.search(r"\bLDG\b", x)],
                stores=[_bits(x) for x in body if re.search(r"\bSTG\b", x)],
                exponentials=sum("MUFU.EX2" in x for x in body),
                logarithms=sum("MUFU.LG2" in x for x in body),
                instructions=len(body),
                barriers=sum(bool(re.search(r"\bBAR\b", x)) for x in body),
            )
        )
    return found


def _bits(line: str) -> int:
    """The width of a load or store; 32 where the instruction names none."""
    width = re.search(r"\.(?:U|S)?(8|16|64|128|256)\b", line.split("desc")[0])
    return int(width[1]) if width else 32


def report(
    loss: str, vocab: int, dtype: str, target: int, mask: bool = True, gradient: bool = True
) -> Report:
    chosen = options(vocab, **LOSSES[loss])
    itemsizes = [DTYPES[dtype]] * 3
    labels = bool(chosen.ce_weight)
    variant = distillation.variant(
        chosen, labels, mask, gradient, itemsizes, True, heads=loss == CAPPED
    )
    usage, code = disassembled(compiled(variant, dtype, target)["cubin"])
    # Without the sweeps of small divergences, which would be counted with the others.
    power = 2 if variant.WHOLE else None
    _, code = disassembled(compiled(variant._replace(EXACT=False), dtype, target, power)["cubin"])
    main = loops(code)
    a_thread = variant.TILES * variant.VECTOR
    sweeps = 1 + (distillation.DIVERGENCES["jsd"] == variant.KD) + gradient
    soft = bool(variant.KD or variant.COS or variant.MSE)
    reads = DTYPES[dtype] * (1 + soft)
    # Registers are given to a warp in units of 256.
    a_warp = -(-usage["REG"] * 32 // 256) * 256
    programs = min(65_536 // (a_warp * variant.num_warps), 64 // variant.num_warps, 32)
    in_flight = H200["sms"] * programs * reads * vocab / 2**20
    passes = sweeps if in_flight > H200["l2_mib"] else 1
    exponentials = sum(x.exponentials for x in main) / a_thread
    instructions = sum(x.instructions for x in main) / a_thread
    cycles_ps = 1000 / H200["ghz"] / H200["sms"]
    return Report(
        loss=loss,
        mask=mask,
        gradient=gradient,
        vocab=vocab,
        dtype=dtype,
        target=f"sm_{target}",
        warps=variant.num_warps,
        registers=usage["REG"],
        spilled_bytes=usage["STACK"] + usage["LOCAL"],
        shared_bytes=usage["SHARED"],
        load_bits=min(b for x in main for b in x.loads),
        store_bits=min((b for x in main for b in x.stores), default=0),
        exponentials_a_pair=exponentials,
        logarithms_a_pair=sum(x.logarithms for x in main) / a_thread,
        instructions_a_pair=instructions,
        barriers=sum(x.barriers for x in main),
        bytes_ps=(passes * reads + gradient * DTYPES[dtype]) / H200["tb_per_s"],
        exponentials_ps=exponentials / 16 * cycles_ps,
        instructions_ps=instructions / 128 * cycles_ps,
        programs_an_sm=programs,
        mib_in_flight=in_flight,
        passes=passes * (1 + soft) + gradient,
    )


def table(reports: list[Report]) -> str:
    names = list(asdict(reports[0]))
    rows = [names]
    for r in reports:
        values = asdict(r).values()
        rows.append([f"{v:.2f}" if isinstance(v, float) else str(v) for v in values])
    widths = [max(len(row[i]) for row in rows) for i in range(len(names))]
    lines = [
        "| " + " | ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)) + " |" for r in rows
    ]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--targets", type=int, nargs="+", default=TARGETS)
    parser.add_argument("--vocab", type=int, nargs="+", default=VOCABULARIES)
    parser.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: nothing is compiled; unset it")
    cases = itertools.product(
        arguments.targets, arguments.dtypes, arguments.vocab, arguments.losses, (True, False)
    )
    reports = []
    for target, dtype, vocab, loss, gradient in cases:
        print(f"\rsm_{target} {dtype} {vocab} {loss:<24}", end="", file=sys.stderr, flush=True)
        reports.append(report(loss, vocab, dtype, target, gradient=gradient))
    print(file=sys.stderr)
    print(f"triton {triton.__version__}, ps a pair on an H200 by its data sheet")
    print(table(reports))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(r) for r in reports], indent=1) + "\n")


if __name__ == "__main__":
    main()
