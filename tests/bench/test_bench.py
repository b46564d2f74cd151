"""The benches measure what they say: run as programs, since nothing may import them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import make_task
from programs import assert_written_with_their_environment, bench, result_of, rows_of

CASE = "--device cpu --rows 8 --vocab 64".split()
N, V = 8, 64


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run of the bench: its JSON and its CSV."""
    path = tmp_path_factory.mktemp("bench") / "losses.csv"
    loss = "--loss kl_ce hidden_cosine --labels some".split()
    only = "--only distilfast eager Liger Cut".split()
    report = json.loads(bench("losses.py", *CASE, *loss, *only, "--csv", path, "--json"))
    return {**report, "csv": rows_of(path)}


def by_name(rows: list[dict[str, Any]], loss: str = "kl_ce") -> dict[str, dict[str, Any]]:
    return {row["contestant"]: row for row in rows if row["loss"] == loss}


def test_losses_measures_time_memory_and_bandwidth(measured: dict[str, Any]) -> None:
    rows = by_name(measured["rows"])
    eager, ours = rows["PyTorch eager, fp32"], rows["distilfast torch"]
    for row in (eager, ours, rows["distilfast torch, in place"]):
        assert row["status"] == "ok"
        assert row["agreement"] == "ok"
        assert 0 < row["time_ms_p20"] <= row["time_ms"] <= row["time_ms_p80"]
        assert row["rounds"] >= 5
        # Two reads and one write of N x V in bf16.
        assert row["expected_mib"] == pytest.approx(3 * N * V * 2 / 2**20)
        rate = row["expected_mib"] * 2**20 / row["time_ms"] / 1e6
        assert row["gb_per_s"] == pytest.approx(rate)
        assert row["copy_fraction"] == pytest.approx(rate / row["copy_gb_per_s"])
    assert eager["speedup"] == 1
    assert ours["speedup"] == pytest.approx(eager["time_ms"] / ours["time_ms"])
    hidden = by_name(measured["rows"], "hidden_cosine")["distilfast torch"]
    assert hidden["expected_mib"] == pytest.approx(3 * 6 * N * V * 2 / 2**20)
    assert hidden["agreement"] == "ok"


@pytest.mark.thorough
def test_losses_writes_the_rows_with_their_environment(measured: dict[str, Any]) -> None:
    assert "triton" in measured["environment"]
    assert_written_with_their_environment(measured)


@pytest.mark.thorough
def test_who_cannot_take_part_is_a_row_with_a_reason(measured: dict[str, Any]) -> None:
    rows = by_name(measured["rows"])
    assert rows["Liger, fp32"]["status"] == "skipped: its kernels need a CUDA device"
    assert "temperature" in rows["Liger, fp32"]["lacks"]
    linear = rows["Cut Cross Entropy"]
    assert linear["status"] == "skipped: takes hidden states and a weight, not logits"
    assert linear["time_ms"] is None
    assert rows["distilfast triton"]["status"].startswith("skipped: ")


def assert_failures_are_told(rows: dict[str, dict[str, Any]]) -> None:
    assert rows["crash"]["status"] == "failed: RuntimeError: no such luck"
    assert rows["out of memory"]["status"] == "failed: out of memory"
    assert rows["absent"]["status"] == "skipped: no-such-distribution is not installed"


@pytest.mark.thorough
def test_contestants_that_are_wrong_or_fail_are_seen(tmp_path: Path) -> None:
    result = result_of(
        f"""
import losses
from kit import peers
from kit.peers import Case, Contestant
def changed(change):
    return lambda case: lambda *inputs: change(peers.formula(case)(*inputs))
peers.contestants = lambda: [Contestant(name, ("kl",), changed(change)) for name, change in {{
    "right": lambda loss: loss,
    "no T^2": lambda loss: loss / 4,
    "half the gradient": HalfGradient.apply,
    "NaN": lambda loss: loss * torch.nan,
    "crash": crash,
    "out of memory": out_of_memory,
}}.items()] + [Contestant("absent", ("kl",), peers.formula, package="no-such-distribution")]
losses.main({[*CASE, "--loss", "kl", "--csv", str(tmp_path / "a"), "--json", str(tmp_path / "b")]})
result = json.load(open({str(tmp_path / "b")!r}))["rows"]
"""
    )
    rows = by_name(result, "kl")
    agreement = {name: row["agreement"] for name, row in rows.items()}
    assert agreement["right"] == "ok"
    assert agreement["no T^2"] == "loss off by 7.5e-01, gradient off by 7.5e-01"
    assert agreement["half the gradient"] == "gradient off by 5.0e-01"
    assert agreement["NaN"] == "loss off by nan, gradient off by inf"
    assert_failures_are_told(rows)
    assert rows["right"]["time_ms"] > 0


HEAD = "--device cpu --rows 64 --width 16 --teacher-width 24 --vocab 64 --dtype fp32 --bias".split()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A small run of the bench of the fused head: its JSON, its CSV and its table."""
    path = tmp_path_factory.mktemp("bench") / "linear.csv"
    loss = "--loss kl_ce jsd ce --quick".split()
    only = "--only distilfast eager Liger Unfiltered linear_cross".split()
    report = path.with_suffix(".json")
    table = bench("linear.py", *HEAD, *loss, *only, "--csv", path, "--json", report)
    return {**json.loads(report.read_text()), "csv": rows_of(path), "table": table}


@pytest.mark.thorough
def test_linear_measures_time_memory_and_the_share_of_the_matrix_rate(head: dict[str, Any]) -> None:
    rows = by_name(head["rows"])
    bare = rows["bare products"]
    assert bare["gemm_ratio"] == bare["matrix_fraction"] == 1
    assert bare["gemm_chunk_rows"] == 64  # fewer rows than the smallest chunk
    for name in ("distilfast auto", "distilfast torch", "PyTorch eager, fp32"):
        row = rows[name]
        assert row["status"] == row["agreement"] == "ok"
        assert 0 < row["time_ms_p20"] <= row["time_ms"] <= row["time_ms_p80"]
        assert row["rounds"] == bare["rounds"] >= 5  # they took turns
        assert row["gemm_ms"] == bare["time_ms"]
        assert row["gemm_ratio"] == pytest.approx(row["time_ms"] / bare["time_ms"])
        assert row["matrix_fraction"] == pytest.approx(1 / row["gemm_ratio"])
        # The student's logits and both gradients, and the teacher's logits.
        assert row["tflop"] == pytest.approx(2 * 64 * 64 * (3 * 16 + 24) / 1e12)
        assert row["tflop_per_s"] == pytest.approx(row["tflop"] / row["time_ms"] * 1e3)
        assert row["inputs_mib"] == pytest.approx((4 * 128 * (16 + 24) + 4 * 128 + 8 * 64) / 2**20)
        assert row["gradients_mib"] == pytest.approx(4 * (128 * 16 + 64) / 2**20)
    assert rows["PyTorch eager, fp32"]["speedup"] == 1
    labels_alone = by_name(head["rows"], "ce")
    assert labels_alone["distilfast auto"]["tflop"] == pytest.approx(2 * 64 * 64 * 3 * 16 / 1e12)
    assert labels_alone["distilfast auto"]["agreement"] == "ok"
    assert by_name(head["rows"], "jsd")["distilfast auto"]["agreement"] == "ok"
    assert "| distilfast auto (" in head["table"]


@pytest.mark.thorough
def test_linear_writes_its_rows_and_who_cannot_take_part(head: dict[str, Any]) -> None:
    assert_written_with_their_environment(head)
    rows, labels_alone = by_name(head["rows"]), by_name(head["rows"], "ce")
    assert rows["Liger JSD"]["status"] == "skipped: its kernels need a CUDA device"
    assert "bias" in rows["Liger JSD"]["lacks"]
    chunked = rows["Liger chunked JSD"]["status"]
    assert chunked == "skipped: its KL leaves out the rows without a label"
    assert rows["F.linear_cross_entropy, auto"]["status"] == "skipped: has CE only"
    unfiltered = labels_alone["Cut Cross Entropy, unfiltered"]
    assert unfiltered["status"] == "skipped: its kernels need a CUDA device"
    assert unfiltered["time_ms"] is None


@pytest.mark.thorough
def test_heads_that_are_wrong_or_fail_are_seen(tmp_path: Path) -> None:
    result = result_of(
        f"""
import linear
from kit import heads, measure
from kit.heads import HeadContestant, materialised
def changed(change):
    return lambda case: lambda x: change(materialised(case), x)
def few(loss, x):  # half the rows count for nothing
    return loss(x._replace(hidden=torch.cat([x.hidden[:32], x.hidden[32:].detach()])))
def no_bias(case):
    loss = materialised(case)
    return lambda x: loss(x.without_bias()) + (0 if x.bias is None else 0 * x.bias.sum())
changes = {{
    "right": lambda loss, x: loss(x),
    "no T^2": lambda loss, x: loss(x) / 4,
    "half of dW": lambda loss, x: loss(x._replace(weight=HalfGradient.apply(x.weight))),
    "half of dX": few,
    "NaN": lambda loss, x: loss(x) * torch.nan,
    "crash": crash,
    "out of memory": out_of_memory,
}}
field = [HeadContestant(name, ("kl",), changed(change)) for name, change in changes.items()]
field.append(HeadContestant("forgets the bias", ("kl",), no_bias))
field.append(HeadContestant("takes no bias", ("kl",), no_bias, takes_bias=False, lacks="bias"))
field.append(HeadContestant("absent", ("kl",), materialised, package="no-such-distribution"))
heads.contestants = lambda: field
rounds, interleave = [], measure.interleave
measure.interleave = lambda calls, *more, **options: (
    rounds.append(list(calls)), interleave(calls, *more, **options)
)[1]
linear.main({[*HEAD, "--loss", "kl", "--csv", str(tmp_path / "a"), "--json", str(tmp_path / "b")]})
result = {{"rows": json.load(open({str(tmp_path / "b")!r}))["rows"], "rounds": rounds}}
"""
    )
    rows = by_name(result["rows"], "kl")
    agreement = {name: row["agreement"] for name, row in rows.items()}
    assert agreement["right"] == agreement["takes no bias"] == "ok"
    assert (
        agreement["no T^2"] == "loss off by 7.5e-01, dX off by 7.5e-01, dW or dbias off by 7.5e-01"
    )
    assert agreement["half of dW"] == "dW or dbias off by 5.0e-01"
    assert agreement["half of dX"] == "dX off by 1.0e+00"
    assert agreement["NaN"] == "loss off by nan, dX off by inf, dW or dbias off by inf"
    assert agreement["forgets the bias"].startswith("loss off by ")
    assert_failures_are_told(rows)
    # The bare products choose their chunk alone, and are then timed in the rounds of all others.
    assert result["rounds"][0] == ["64"]
    timed = {name for name, row in rows.items() if row["time_ms"]}
    assert set(result["rounds"][1]) == timed >= {"bare products", "right", "takes no bias"}


@pytest.mark.thorough
def test_linear_measures_the_peak_by_rows(tmp_path: Path) -> None:
    path = tmp_path / "memory.csv"
    small = "--device cpu --width 16 --vocab 2048 --rows 256 2048 --dtype fp32".split()
    only = ["--only", "distilfast auto", "eager, fp32"]
    rows = json.loads(bench("linear.py", "--memory", *small, *only, "--csv", path, "--json"))[
        "rows"
    ]
    assert [row["rows"] for row in rows] == [256, 256, 2048, 2048]
    assert all(row["status"] == row["agreement"] == "ok" for row in rows)
    if Path("/proc/self/clear_refs").exists():
        # N x V in fp32, at least the student's and the teacher's, and not the gradients.
        peaks = {row["rows"]: row["peak_mib"] for row in rows if "eager" in row["contestant"]}
        assert peaks[2048] > 2 * 2048 * 2048 * 4 / 2**20 > peaks[256]


@pytest.mark.thorough
def test_step_measures_the_whole_and_the_loss_inside(tmp_path: Path) -> None:
    path = tmp_path / "step.csv"
    small = "--shape minilm --sequences 1 --length 8 --seconds 0 --dtype fp32".split()
    only = ["--only", "distilfast torch", "same dtype"]
    table = bench("step.py", *small, "--device", "cpu", *only, "--csv", path)
    rows = {row["contestant"]: row for row in rows_of(path)}
    fused = "distilfast, fused head"
    assert list(rows) == ["no loss", fused, "distilfast torch", "PyTorch eager, same dtype"]
    assert float(rows[fused]["step_ms"]) > 0
    assert rows["no loss"]["loss_inside_ms"] == ""
    for name in ("distilfast torch", "PyTorch eager, same dtype"):
        row = rows[name]
        assert 0 < float(row["loss_inside_ms"]) < float(row["step_ms"])
        assert float(row["loss_alone_ms"]) > 0
        assert f"| {name}" in table


@pytest.mark.thorough
def test_batches_measures_times_and_memory(tmp_path: Path) -> None:
    path = tmp_path / "batches.csv"
    small = "--sequences 8 16 --micro_sequences 4 --length 8 --rounds 1".split()
    bench("batches.py", *small, "--csv", path)
    rows = rows_of(path)
    assert [row["sequences"] for row in rows] == ["8", "16"]
    for row in rows:
        assert all(float(row[name]) > 0 for name in ("count_ms", "make_ms", "student_ms"))
        assert float(row["memory_mib"]) >= 0


@pytest.mark.thorough
def test_chunks_measures_times_and_errors(tmp_path: Path) -> None:
    path = tmp_path / "chunks.csv"
    small = "--rows 256 --width 8 --vocab 50 --seconds 0 --device cpu".split()
    table = bench("chunks.py", *small, "--csv", path)
    rows = {row["what"]: row for row in rows_of(path)}
    timed = {name for name, row in rows.items() if row["time_ms"]}
    assert {"products, chunks of 128", "fused, chunks of 256", "fused, auto"} <= timed
    assert min(float(rows[name]["of_best_products"]) for name in timed if "products" in name) == 1
    errors = [float(row["d_weight_error"]) for row in rows.values() if row["d_weight_error"]]
    # of bf16 logits and gradients
    assert len(errors) == 4
    assert all(0 < error < 0.02 for error in errors)
    assert "error of dW" in table


@pytest.mark.thorough
def test_kit_interleaves_and_appends(tmp_path: Path) -> None:
    result = result_of(
        f"""
import pathlib, torch, losses
from kit import measure
cpu, log = torch.device("cpu"), []
def failing(turn):
    if len(log) > 5:
        raise MemoryError
calls = {{name: lambda turn, name=name: log.append((name, turn)) for name in "abc"}}
samples, failures = measure.interleave({{**calls, "d": failing}}, measure.Stopwatch(cpu), 0.0)
path = pathlib.Path({str(tmp_path / "x.csv")!r})
for value in (1, 2):
    measure.append_csv(path, [{{"a": value, "b": "x, y"}}])
refused = []
for columns in ({{"b": 3, "a": 3}}, {{"a": 3}}):
    try:
        measure.append_csv(path, [columns])
    except ValueError as error:
        refused.append(str(error))
try:
    losses.main({[*CASE, "--csv", str(tmp_path / "x.csv")]})
except SystemExit as error:
    refused.append(str(error))
peak = measure.peak_mib(lambda: torch.ones(1 << 24).add(1), cpu)
result = [log, {{k: len(v) for k, v in samples.items()}}, failures, path.read_text(), refused, peak]
"""
    )
    log, counts, failures, text, refused, peak = result
    rounds = [log[i : i + 3] for i in range(0, len(log), 3)]
    assert all({name for name, _ in part} == set("abc") for part in rounds)
    assert len({part[0][0] for part in rounds}) > 1  # not always the same one first
    turns = [turn for _, turn in log]
    assert turns == sorted(set(turns))
    assert counts == {"a": 5, "b": 5, "c": 5, "d": 2}
    assert failures == {"d": "out of memory"}
    assert text == 'a,b\n1,"x, y"\n2,"x, y"\n'
    assert len(refused) == 3
    assert all("expected the columns" in message for message in refused)
    if Path("/proc/self/clear_refs").exists():
        assert 128 <= peak < 136  # two tensors of 64 MiB


@pytest.mark.thorough
def test_finetuning_compares_loops_that_end_with_the_same_weights(
    teacher: Path, tmp_path: Path
) -> None:
    data = make_task(tmp_path / "data" / "words").parent
    arguments = f"--data {data} --task words --model {teacher} --max_length 32".split()
    path = tmp_path / "a.csv"
    bench("finetuning.py", *arguments, *"--steps 2 --rounds 2 --csv".split(), path)
    (row,) = rows_of(path)
    assert row["same_weights"] == "True"
    assert 0 < float(row["ratio_min"]) <= float(row["ratio"]) <= float(row["ratio_max"])
    assert float(row["glue_s"]) > float(row["training_s"]) > 0


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the scripts say they would do on a GPU, all asked in one process."""
    pytest.importorskip("triton")
    return result_of(
        f"""
import sys, torch
import losses, step, tune
from kit import measure, peers, products
from torch import testing
cuda, cpu, result = torch.device("cuda"), torch.device("cpu"), {{}}

# losses.py: the cases of a plan, and who takes part
plans = {{}}
for kind in ("cuda", "cpu"):
    plan = losses.plan(losses.parser().parse_args([]), kind)
    plans[kind] = [(x.case.loss, x.case.rows, x.case.columns, x.slow) for x in plan]
chosen = losses.parser().parse_args("--loss kl_ce jsd --vocab 9 7 --labels none some".split())
plans["chosen"] = [(x.case.loss, x.case.columns, x.slow) for x in losses.plan(chosen, "cuda")]
(slow,) = (c for c in peers.contestants() if c.name == "torch.compile")
case = peers.Case("kl", 8, 64)
result["plans"] = plans
result["skips"] = [
    losses.skip(slow, losses.Planned(case, asked), device)
    for asked, device in ((False, cuda), (True, cuda), (False, cpu))
]

# step.py: sequences a batch
parse = lambda *more: step.parse(["--device", *more]).sequences
result["step"] = [parse("cuda"), parse("cuda:0"), parse("cpu"), parse("cuda", "--sequences", "3")]

# products.py
student, teacher = ((torch.randn(10, 4), torch.randn(100, 4)) for _ in range(2))
padded = products.BareProducts(student, teacher, [3, 5], multiple=64)
plain = products.BareProducts(student, None, [10])
padded.run(5)
testing.assert_close(padded.logits[1][:, :100], teacher[0][5:] @ teacher[1].T)
testing.assert_close(padded.d_hidden[5:], padded.logits[0] @ padded.weight)
assert not padded.weight[100:].any() and not padded.logits[1][:, 100:].any()
few = products.BareProducts(student, teacher, [1 << 50, 5])  # the larger does not fit
result["products"] = [
    products.MULTIPLES["cuda"],
    [len(x.weight) for x in (padded, plain)],
    [len(x.logits) for x in (padded, plain)],
    padded.sizes, few.sizes,
]

# measure.py: a device that is done with the leading reads before the call is queued, or not
class Event:
    done = False
    def __init__(self, enable_timing): pass
    record = synchronize = lambda self: None
    def query(self): return Event.done
    def elapsed_time(self, end): return 2.0
torch.cuda.Event = Event
watch = measure.Stopwatch(cpu)
watch.lead = torch.ones(1)
times = [watch.ms(lambda: None)]
Event.done = True
times.append(watch.ms(lambda: None))
result["stopwatch"] = [times, watch.exposed, measure.LEADS]

# tune.py: a tile of 24 elements is none; and the order of a timed run
result["tile"] = tune.compile_tile("kl", 30522, tune.Tile(4, 24), 90)["status"]
order = result["order"] = []
def instead(loss, vocab, tiles, n_rows, device, seconds):
    order.append([loss, vocab])
    row = dict(loss=loss, vocab=vocab, warps=4, elements=8, status="ok", time_ms="1",
               gb_per_s="1", over_best="1.5", launcher="chosen")
    return [row | dict(launcher="", warps=8, over_best="1.0"), row]
tune.tune = instead
sys.argv = ["tune.py", "--device", "cpu", "--csv", {str(tmp_path_factory.mktemp("a") / "a")!r}]
tune.main()
"""
    )


@pytest.mark.thorough
def test_losses_on_a_gpu_begin_with_the_main_question(asked: dict[str, Any]) -> None:
    cuda = [tuple(x) for x in asked["plans"]["cuda"]]
    assert [x[:3] for x in cuda[:4]] == [
        ("kl", 8192, 30522),
        ("kl", 8192, 128256),
        ("kl_ce", 8192, 30522),
        ("kl_ce", 8192, 128256),
    ]
    assert {x[2] for x in cuda} >= {30522, 30528, 50257, 128256}
    # Who compiles for long takes part once, after every loss was measured without.
    (slow,) = (number for number, x in enumerate(cuda) if x[3])
    before = {x[0] for x in cuda[:slow]}
    assert before == {"kl", "kl_ce", "ce", "reverse_kl", "jsd", "hidden_cosine", "combine"}
    assert cuda[slow][:3] == ("kl_ce", 8192, 30522)
    assert sum(x[3] for x in asked["plans"]["cpu"]) == 1
    unasked, on_request, on_a_cpu = asked["skips"]
    assert unasked.startswith("slow to get ready")
    assert on_request is on_a_cpu is None
    # Vocabularies take turns; whoever chose the sizes has everybody in every case.
    cases = [("kl", 9), ("kl", 7), ("kl_ce", 9), ("kl_ce", 7), ("jsd", 9), ("jsd", 7)]
    assert asked["plans"]["chosen"] == [[*case, True] for _ in range(3) for case in cases]


@pytest.mark.thorough
def test_stopwatch_counts_the_calls_whose_launches_show(asked: dict[str, Any]) -> None:
    times, exposed, leads = asked["stopwatch"]
    assert times == [2.0, 2.0]
    assert exposed == 1
    assert leads >= 12


@pytest.mark.thorough
def test_step_and_products_are_larger_on_a_gpu(asked: dict[str, Any]) -> None:
    assert asked["step"] == [64, 64, 8, 3]
    assert asked["products"] == [64, [128, 100], [2, 1], [3, 5], [5]]  # padded to whole 64s


@pytest.mark.thorough
def test_tune_asks_the_main_question_first(asked: dict[str, Any]) -> None:
    assert asked["order"][:3] == [["kl", 30522], ["kl", 128256], ["kl", 50257]]
    assert [loss for loss, _ in asked["order"][::3]] == ["kl", "kl_ce", "jsd", "ce"]


@pytest.mark.thorough
def test_tune_compiles_without_a_gpu_and_times_nothing(
    asked: dict[str, Any], tmp_path: Path
) -> None:
    tile = "--losses kl --warps 4 --elements 8 --jobs 1".split()
    path = tmp_path / "tune.csv"
    told = bench("tune.py", "--compile-only", *tile, "--csv", path)
    assert "1 tiles compiled, 0 failed" in told
    assert not path.exists()
    assert asked["tile"] != "ok"
