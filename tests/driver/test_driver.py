"""The driver, from the outside: exact batches, resume, stops, what a run leaves.

The recipe takes ten steps of sixteen sequences of different lengths, in fp32 without dropout, so
that a mean per micro-batch instead of per step would show at once.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from conftest import ROOT, WORDS, make_teacher, no_wait_for_the_gpu

from distilfast import cli, data, train
from distilfast import config as configs
from distilfast.data.masking import permutation
from distilfast.driver import checkpoint, checks, engine, loop, optimizers, processes
from distilfast.driver.micro_batch import Distillation, Normalizers, TeacherSide
from distilfast.driver.processes import Stop
from distilfast.driver.step import count, optimiser_step
from distilfast.errors import ConfigError
from distilfast.losses import chunks, distillation_loss, hidden_cosine_loss
from distilfast.machine import code_version

TRAIN = str(ROOT / "distilfast" / "train.py")
TIMES = ("tokens_per_second",)


def run(recipe: list[str], *changes: str) -> Path:
    """A run in this process; its folder."""
    assert train.main([*recipe, *changes]) == 0
    return Path(configs.parse([*recipe, *changes]).output)


def run_processes(command: list[str], recipe: list[str], *changes: str, **environment: str) -> None:
    done = subprocess.run(
        [*command, TRAIN, *recipe, *changes],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def launcher(name: str, ranks: int) -> list[str]:
    port = str(processes.free_port())
    binaries = Path(sys.executable).parent
    if name == "deepspeed":
        options = ["--num_accelerators", str(ranks), "--master_port", port]
        return [str(binaries / "deepspeed"), *options]
    options = ["--nproc_per_node", str(ranks), "--master_port", port]
    return [str(binaries / "torchrun"), *options]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run, without their times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model" / "model.safetensors")


def assert_same_curve(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    a, b = metrics(one), metrics(other)
    assert len(a) == len(b) == 10 + 3
    for x, y in zip(a, b, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert x[key] == pytest.approx(y[key], rel=tolerance, abs=tolerance), (key, x, y)


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path
) -> tuple[list[str], Path]:
    """The recipe's run in one process with one micro-batch a step, and its arguments."""
    folder = tmp_path_factory.mktemp("whole")
    config = folder / "recipe.yaml"
    text = f"""\
teacher: {teacher}
student: {{dropout: 0}}
data: {{source: {corpus}, prepared: {folder / "tokens"}, max_length: 24, heldout: 0.1}}
masking: {{probability: 0.3}}
optimizer: {{learning_rate: 1.0e-3, max_grad_norm: 1.0, weight_decay: 0.01}}
batch: {{sequences: 16, micro_sequences: 16}}
steps: 10
evaluate: {{every: 5}}
precision: fp32
tensorboard: false
output: {folder / "run"}
"""
    config.write_text(text)
    recipe = ["--config", str(config)]
    return recipe, run(recipe)


# --- Exact batches --------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [2, 7])
def test_micro_batches_do_not_change_the_curve(
    whole: tuple[list[str], Path], tmp_path: Path, micro: int
) -> None:
    recipe, folder = whole
    other = run(recipe, f"--output={tmp_path / 'run'}", f"--batch.micro_sequences={micro}")
    assert_same_curve(folder, other)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activation_checkpointing_changes_no_bit(
    whole: tuple[list[str], Path], tmp_path: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dropout, whose draws the backward has to repeat."""
    recipe, _ = whole
    changes = ("--student.dropout=0.1", f"--precision={precision}", "--batch.micro_sequences=4")
    plain = run(recipe, *changes, f"--output={tmp_path / 'plain'}")
    calls, checkpoint = [], transformers.modeling_utils.checkpoint

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options)
        return checkpoint(*arguments, **options)

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", counted)
    changes = (*changes, "--batch.activation_checkpointing=true")
    other = run(recipe, *changes, f"--output={tmp_path / 'other'}")
    layers = transformers.AutoConfig.from_pretrained(other / "model").num_hidden_layers
    assert len(calls) == 10 * 4 * layers  # steps, micro-batches: none of the teacher's layers
    assert metrics(other) == metrics(plain)
    one, two = weights(plain), weights(other)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.thorough
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_activation_checkpointing_holds_at_every_stage(
    whole: tuple[list[str], Path], tmp_path: Path, stage: int
) -> None:
    """At stage 3 the backward gathers a layer's weights twice."""
    recipe, folder = whole
    changes = ("--batch.activation_checkpointing=true", f"--zero.stage={stage}")
    changes = (*changes, "--batch.micro_sequences=4", f"--output={tmp_path / 'run'}")
    run_processes(launcher("torchrun", 2), recipe, *changes)
    assert_same_curve(folder, tmp_path / "run")


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("name", "ranks", "micro", "stage"),
    [
        *(("deepspeed", 2, 2, 1), ("torchrun", 2, 8, 0), ("torchrun", 2, 4, 3)),
        ("torchrun", 3, 4, 2),  # micro-batches of 3, 3, 3, 3, 2, 2
        ("torchrun", 3, 1, 3),  # of 1; two ranks sit out the last turn
    ],
    ids=["1", "0", "3", "2-ragged", "3-spare"],
)
def test_ranks_and_stages_do_not_change_the_curve(
    whole: tuple[list[str], Path], tmp_path: Path, name: str, ranks: int, micro: int, stage: int
) -> None:
    """Both launchers, two or three ranks, ZeRO 0 to 3, 3 with offload. Nothing is compiled on the
    way: the folder for DeepSpeed's operators stays empty."""
    recipe, folder = whole
    changes = (
        f"--output={tmp_path / 'run'}",
        f"--batch.micro_sequences={micro}",
        f"--zero.stage={stage}",
        f"--zero.offload={'parameters' if stage == 3 else 'none'}",
    )
    extensions = tmp_path / "extensions"
    run_processes(launcher(name, ranks), recipe, *changes, TORCH_EXTENSIONS_DIR=str(extensions))
    assert_same_curve(folder, tmp_path / "run")
    one, other = weights(folder), weights(tmp_path / "run")
    assert one.keys() == other.keys()
    assert all(torch.allclose(one[name], other[name], atol=1e-4) for name in one)
    assert not extensions.exists() or not any(extensions.iterdir())


def tokens_a_step(folder: Path) -> list[int]:
    taken = [0, *(line["tokens"] for line in metrics(folder) if "loss" in line)]
    return [b - a for a, b in itertools.pairwise(taken)]


def test_steps_of_tokens_do_not_depend_on_their_split(
    whole: tuple[list[str], Path], tmp_path: Path
) -> None:
    recipe, _ = whole
    changes = ("--batch.sequences=null", "--batch.tokens=300")
    one = run(recipe, *changes, f"--output={tmp_path / 'one'}")
    other = run(recipe, *changes, f"--output={tmp_path / 'other'}", "--batch.micro_sequences=3")
    assert_same_curve(one, other)
    steps = tokens_a_step(one)
    assert all(abs(tokens - 300) < 24 for tokens in steps)
    assert len(set(steps)) > 1


def test_batch_grows_as_configured(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    """From 4 to 16 sequences over four steps: 4, 7, 10, 13, then 16."""
    recipe, _ = whole
    changes = ("--batch.warmup_from=4", "--batch.warmup_steps=4", "--batch.micro_sequences=3")
    folder = run(recipe, *changes, "--steps=6", f"--output={tmp_path / 'run'}")
    config = configs.parse(recipe)
    lengths = data.Store.open(config.token_folder).lengths("train")
    order = permutation(config.seed, 0, len(lengths))
    borders = itertools.pairwise([0, 4, 11, 21, 34, 50, 66])
    assert tokens_a_step(folder) == [int(lengths[order[a:b]].sum()) for a, b in borders]


def test_driver_equals_a_plain_loop(whole: tuple[list[str], Path]) -> None:
    """Against transformers' own logits of the whole batch at once, the dense losses and AdamW: the
    same loss, parts and gradient norm at every step."""
    recipe, folder = whole
    config = configs.parse(recipe)
    world = processes.World(0, 1, torch.device("cpu"))
    setup = checks.prepare(configs.parse([*recipe, f"--output={folder.parent / 'nothing'}"]), world)
    student, teacher = setup.student, setup.teachers[0].model
    optimizer = torch.optim.AdamW(
        optimizers._groups(student, config.optimizer.weight_decay),
        betas=config.optimizer.betas,
        eps=config.optimizer.epsilon,
    )
    expected = [line for line in metrics(folder) if "loss" in line]
    for step, line in enumerate(expected):
        (batch,) = setup.batches.step(step, 0, 1, 16)
        mask = torch.zeros(batch.input_ids.numel(), dtype=torch.bool)
        mask[batch.tokens] = True
        mask = mask.view_as(batch.input_ids)
        inputs = {"input_ids": batch.input_ids, "attention_mask": mask.long()}
        out = student(**inputs, output_hidden_states=True)
        with torch.no_grad():
            target = teacher(**inputs, output_hidden_states=True)
        loss = distillation_loss(
            out.logits,
            target.logits,
            batch.labels.view_as(batch.input_ids),
            kd_weight=5.0,
            ce_weight=2.0,
            mask=mask,
        )
        cosine = hidden_cosine_loss(out.hidden_states[-1], target.hidden_states[-1], mask)
        total = loss.loss + cosine
        optimizer.zero_grad()
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = optimizers.learning_rate(config.optimizer, step, 10)
        optimizer.step()
        found = {"loss": total, "kd": loss.kd, "ce": loss.ce, "hidden_cos": cosine}
        found["grad_norm"] = norm
        agreed = out.logits.argmax(-1) == target.logits.argmax(-1)
        found["agreement"] = agreed[mask].float().mean()
        for name, value in found.items():
            assert line[name] == pytest.approx(value.item(), rel=1e-5), (step, name)


class Aligned(torch.nn.Module):
    """Whose gradient is 2^-10 in each weight, every micro-batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 64))

    def forward(self) -> torch.Tensor:
        return self.weight.float().sum() * 2**-10


def sum_of_a_thousand(*layout: Any) -> float:
    """The gradient's norm over sqrt(64 * 64): the sum in each weight."""
    world = processes.start()
    config = configs.Config(
        batch=configs.BatchConfig(sequences=1024, micro_sequences=1),
        zero=configs.ZeroConfig(*layout),
        steps=1,
        precision="bf16",
    )
    runner = engine.Engine(Aligned(), config, world)
    for _ in range(1024):
        runner.backward(runner())
    return runner.step(1e-3) / 64


def test_bf16_sum_of_a_thousand_gradients_loses_nothing() -> None:
    """Added up in bf16 the sum would stand still at a quarter: 2^-10 is less than half of what bf16
    can tell apart there."""
    assert sum_of_a_thousand() == pytest.approx(1, rel=1e-6)


@pytest.mark.thorough
def test_gradients_are_summed_in_one_call_to_the_same_bits(
    whole: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they are for a GPU, which drops each as soon as it is in the sum."""
    recipe, _ = whole
    changes = ("--precision=bf16", "--batch.micro_sequences=4")
    one = run(recipe, *changes, f"--output={tmp_path / 'one'}")
    add, backward = engine._sum_in_one_pass, engine.Engine.backward
    left = []

    def watch(self: engine.Engine, loss: torch.Tensor) -> None:
        backward(self, loss)
        left.extend(p for p in self.deepspeed.module.parameters() if p.grad is not None)

    monkeypatch.setattr(engine.Engine, "backward", watch)
    monkeypatch.setattr(
        engine, "_sum_in_one_pass", lambda optimizer, _: add(optimizer, torch.device("cuda"))
    )
    other = run(recipe, *changes, f"--output={tmp_path / 'other'}")
    assert not left
    assert metrics(other) == metrics(one)
    assert all(torch.equal(x, weights(other)[name]) for name, x in weights(one).items())


def test_mean_over_no_tokens_is_null(
    whole: tuple[list[str], Path], tmp_path: Path, capsys: Any
) -> None:
    """Where nothing is masked, as 0.0 would be the best loss there is."""
    recipe, _ = whole
    changes = ("--masking.probability=1e-9", "--steps=2", "--tensorboard=true")
    both = run(recipe, *changes, f"--output={tmp_path / 'both'}")
    assert "step 2: no held-out token was masked" in capsys.readouterr().err
    *_, first, last, heldout = map(json.loads, (both / "metrics.jsonl").read_text().splitlines())
    undefined = dict.fromkeys(("eval_loss", "eval_accuracy", "eval_agreement"))
    assert heldout == {"step": 2, **undefined}
    assert first["ce"] is None  # what the labels alone would give
    assert min(last["loss"], last["kd"], last["hidden_cos"], last["agreement"]) > 0
    summary = json.loads((both / "summary.json").read_text())
    assert set(summary["scores"]) == {"teacher", "untrained student", "student"}
    assert all(scores == undefined for scores in summary["scores"].values())
    for file in ("model/README.md", "report.html"):
        assert "no held-out token was masked, so nothing was measured." in (both / file).read_text()
    assert "| both | – | – | – |" in (both / "model" / "README.md").read_text()

    alone = ("--loss.kd_rows=masked", "--loss.hidden_cos_weight=0")
    alone = run(recipe, *changes, *alone, f"--output={tmp_path / 'alone'}")
    line = json.loads((alone / "metrics.jsonl").read_text().splitlines()[1])
    assert [line[key] for key in ("loss", "kd", "ce", "agreement")] == [None] * 4
    assert cli.main(["replay", "--step=2", "--config", str(alone / "config.yaml")]) == 0
    assert "recorded: loss not defined" in capsys.readouterr().out
    page = tmp_path / "page.html"
    assert cli.main(["report", str(both), str(alone), f"--output={page}"]) == 0


# --- Resume and stops -----------------------------------------------------------------------------


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_run_goes_on_to_the_same_bits(
    whole: tuple[list[str], Path],
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With dropout: its draws are a function of the step, too."""
    recipe, _ = whole
    changes = ("--student.dropout=0.1", f"--precision={precision}", "--batch.micro_sequences=8")
    straight = run(recipe, *changes, f"--output={tmp_path / 'straight'}")

    step = loop.optimiser_step

    def stop_after_four(*arguments: Any) -> Any:
        if arguments[5] == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(loop, "optimiser_step", stop_after_four)
    folder = run(recipe, *changes, f"--output={tmp_path / 'stopped'}")
    # The step that was under way is given up: it would have been taken the same way again.
    assert [p.name for p in (folder / "checkpoints").iterdir()] == ["step-3"]
    assert metrics(folder)[-1]["step"] == 3
    assert not (folder / "summary.json").exists()
    # What a killed process may have written after its last checkpoint must not stay.
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "loss": 0.0, "tokens": 1}\n{"step": 5, "lo')
    monkeypatch.undo()
    run(recipe, *changes, f"--output={folder}")
    assert metrics(folder) == metrics(straight)
    one, other = weights(folder), weights(straight)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_run_stopped_in_its_first_step_begins_anew(
    whole: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And one that is stopped again where it went on from saves nothing twice."""
    recipe, straight = whole
    step = loop.optimiser_step

    by = signal.SIGTERM

    def stopped(*arguments: Any) -> Any:
        os.kill(os.getpid(), by)
        return step(*arguments)

    changes = (f"--output={tmp_path / 'run'}", "--checkpoint.every=4")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "optimiser_step", stopped)
        folder = run(recipe, *changes)
        assert not list(folder.glob("checkpoints/*"))

    def stop_in_the_sixth(*arguments: Any) -> Any:
        return (stopped if arguments[5] == 5 else step)(*arguments)

    # Ctrl-C saves too; its exit status is what shells expect.
    for signalled, status in ((signal.SIGTERM, 0), (signal.SIGINT, 130)):
        by = signalled
        with monkeypatch.context() as patch:
            patch.setattr(loop, "optimiser_step", stop_in_the_sixth)
            capsys.readouterr()
            assert train.main([*recipe, *changes]) == status
        told = f"stopped after step 5 of 10; the same command resumes {folder}\n"
        out = capsys.readouterr().out
        assert out.endswith(told)
        assert (f"{folder} has no checkpoint: it begins anew" in out) == (status == 0)
        found = sorted(p.name for p in (folder / "checkpoints").iterdir())
        assert found == ["step-4", "step-5"]
    run(recipe, *changes)
    assert metrics(folder) == metrics(straight)


def test_only_a_later_ctrl_c_interrupts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun sends its ranks a second SIGINT at once, in the middle of a step."""
    with Stop() as stop:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        assert stop.requested
        monkeypatch.setattr(processes, "ECHO_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_damaged_and_unfinished_checkpoints_are_passed_over(
    whole: tuple[list[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe, _ = whole
    changes = (f"--output={tmp_path / 'run'}", "--checkpoint.every=2", "--checkpoint.keep=2")
    folder = run(recipe, *changes)
    checkpoints = folder / "checkpoints"
    assert sorted(p.name for p in checkpoints.iterdir()) == ["step-6", "step-8"]
    shard = next((checkpoints / "step-8").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    (checkpoints / "tmp-step-9").mkdir()
    assert checkpoint.newest(checkpoints) == 6
    assert "step-8 is damaged (state-00000-of-00001.safetensors was changed)" in caplog.text
    assert sorted(p.name for p in checkpoints.glob("*step-8")) == ["damaged-step-8"]


@pytest.mark.thorough
@pytest.mark.parametrize(("by", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_signal_saves_and_exits(
    whole: tuple[list[str], Path], tmp_path: Path, by: signal.Signals, status: int
) -> None:
    recipe, _ = whole
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, TRAIN, *recipe, f"--output={folder}", "--steps=100000"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / "metrics.jsonl").exists() or len(metrics_safely(folder)) < 4:
            assert time.monotonic() < deadline, "no step within two minutes"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.2)
        process.send_signal(by)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, err
    step = checkpoint.newest(folder / "checkpoints")
    assert f"stopped after step {step} of 100000; the same command resumes" in out
    assert step > 0
    assert metrics(folder)[-1]["step"] == step


def metrics_safely(folder: Path) -> list[str]:
    return (folder / "metrics.jsonl").read_text().splitlines()


@pytest.mark.thorough
def test_two_ranks_resume_to_the_same_bits(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    """Checkpoints at 4 and 8; the second run starts from the first of them, as after a kill."""
    recipe, _ = whole
    shared = ("--student.dropout=0.1", "--batch.micro_sequences=4", "--checkpoint.every=4")
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    run_processes(launcher("torchrun", 2), recipe, *shared, f"--output={straight}")
    shutil.copytree(straight, resumed, ignore=shutil.ignore_patterns("summary.json", "step-8"))
    run_processes(launcher("torchrun", 2), recipe, *shared, f"--output={resumed}")
    assert metrics(resumed) == metrics(straight)
    one, other = weights(resumed), weights(straight)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_complete_run_is_left_alone(
    whole: tuple[list[str], Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not even its models and texts are read: texts may be large, and gone."""
    recipe, folder = whole
    monkeypatch.setattr(loop, "prepare", None)
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    run(recipe)
    assert "is complete" in capsys.readouterr().out
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_every_rank_tries_its_backend(recipe: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Another host may have no compiler."""
    monkeypatch.setattr(processes.World, "first", lambda _, work: "fp32")  # not done on this rank
    monkeypatch.setattr(processes.World, "together", lambda _, work: work())
    monkeypatch.setattr(checks, "distillation_loss", None)
    second = processes.World(1, 2, torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"^loss\.backend: expected one that works here"):
        loop.distil(configs.parse(recipe), second, Stop())


@pytest.mark.thorough
def test_folder_that_is_not_whole_or_in_use_is_refused(
    whole: tuple[list[str], Path], teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resumed run would have taken its next evaluation for that of the untrained student."""
    own = shutil.copytree(teacher, tmp_path / "teacher")
    changes = (f"--output={tmp_path / 'run'}", "--checkpoint.every=4", f"--teacher={own}")
    folder = run(whole[0], *changes)

    def refused(said: str, *others: str) -> None:
        before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
        assert train.main([*whole[0], *changes, *others]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("distilfast: ")
        assert said in line
        assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*")}

    shutil.rmtree(folder / "model")
    refused("expected the model of a complete run")
    (folder / "summary.json").unlink()
    with checks.locked(folder):
        refused("expected a folder of no other run")
    refused("differs in evaluate.max_examples", "--evaluate.max_examples=2")

    tensors = safetensors.torch.load_file(own / "model.safetensors")
    tensors["cls.predictions.bias"][0] += 1
    safetensors.torch.save_file(tensors, own / "model.safetensors", {"format": "pt"})
    refused(f"expected the contents that the run in '{folder}' began with, got others for teacher")
    shutil.copy(teacher / "model.safetensors", own)
    before = Path(configs.parse(whole[0]).data.prepared or "")
    tokens = shutil.copytree(before, tmp_path / "tokens")
    record = json.loads((tokens / "store.json").read_text())
    record["texts"]["read"] += 1
    (tokens / "store.json").write_text(json.dumps(record))
    refused("got others for the tokens", f"--data.prepared={tokens}", "--data.source=null")

    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    for some, said in (
        (lines[1:], "got 8 lines of them"),
        (lines[:4], "got 3 lines of them"),
        (lines + lines, "got 16 lines of them"),
        ([], "got 0 lines of them"),
        ([*lines[:3], "{\n", *lines[4:]], "line 4: expected a JSON object"),
    ):
        file.write_text("".join(some))
        refused(said)
    file.write_text("".join(lines[:-1]) + lines[-1][:9])
    assert metrics(run(whole[0], *changes)) == metrics(whole[1])


@pytest.mark.thorough
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 3)])
def test_run_of_two_ranks_goes_on_in_another_layout(
    whole: tuple[list[str], Path], tmp_path: Path, ranks: int, stage: int
) -> None:
    """The same command with other ranks, another stage and other micro-batches."""
    recipe, folder = whole
    output = (f"--output={tmp_path / 'run'}", "--checkpoint.every=4")
    first = ("--batch.micro_sequences=4", "--zero.stage=2")
    run_processes(launcher("torchrun", 2), recipe, *output, *first)
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "step-8")
    (tmp_path / "run" / "summary.json").unlink()
    second = ("--batch.micro_sequences=8", f"--zero.stage={stage}")
    run_processes(launcher("torchrun", ranks), recipe, *output, *second)
    assert_same_curve(folder, tmp_path / "run")


# --- What can go wrong while it runs --------------------------------------------------------------


@pytest.fixture(scope="module")
def poisoned(
    whole: tuple[list[str], Path], tmp_path_factory: pytest.TempPathFactory, corpus: Path
) -> tuple[list[str], int]:
    """A recipe whose teacher says NaN where it reads one rare token, and that token."""
    import transformers

    folder = tmp_path_factory.mktemp("poisoned")
    place = make_teacher(folder / "teacher", words=[*WORDS[:-1], "rare", WORDS[-1]])
    token = 5 + len(WORDS) - 1
    config = transformers.BertConfig.from_pretrained(place, tie_word_embeddings=False)
    torch.manual_seed(0)
    model = transformers.BertForMaskedLM(config)
    model.bert.embeddings.word_embeddings.weight.data[token] = torch.finfo().max
    model.save_pretrained(place)
    lines = corpus.read_text().splitlines()
    for i in range(60, 64):
        lines[i] += " rare"
    (folder / "text.txt").write_text("\n".join(lines))
    recipe = folder / "recipe.yaml"
    text = Path(whole[0][1]).read_text().splitlines()
    text[:3] = [
        f"teacher: {place}",
        "student: {dropout: 0, init: random}",
        f"data: {{source: {folder / 'text.txt'}, prepared: {folder / 'tokens'}, max_length: 40}}",
    ]
    recipe.write_text("\n".join(text))
    return ["--config", str(recipe)], token


@pytest.mark.thorough
@pytest.mark.parametrize("ranks", [1, 2])
def test_non_finite_loss_reaches_no_weight_and_is_taken_apart(
    poisoned: tuple[list[str], int],
    tmp_path: Path,
    ranks: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (recipe, token), folder = poisoned, tmp_path / "run"
    changes = [f"--output={folder}", "--batch.micro_sequences=2", "--zero.stage=1"]
    command = [*(launcher("torchrun", ranks) if ranks > 1 else [sys.executable]), TRAIN]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *recipe, *changes], env=environment, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 1, done.stderr
    (error,) = [x for x in done.stderr.splitlines() if x.startswith("distilfast: step")]
    step = int(re.match(r"distilfast: step (\d+): loss is nan, kd is nan", error)[1])
    assert "no weight was changed" in error

    # What the teacher read, by rank and micro-batch.
    setup = checks.prepare(configs.parse([*recipe, *changes]), processes.start())
    for rank in range(ranks):
        share = setup.batches.step(step - 1, rank, ranks, 2)
        reading = [
            part[0] for part, b in zip(share.parts(), share, strict=True) if token in b.input_ids
        ]
        named = ", ".join(str(int(e)) for examples in reading for e in examples)
        assert (f"rank {rank}: examples {named}" in error) == bool(named), error
    # The weights are those of the step before.
    lines = [line for line in metrics(folder) if "loss" in line]
    assert len(lines) == step - 1
    assert checkpoint.newest(folder / "checkpoints") == step - 1

    command = re.search("`distilfast (.*)`", error)[1].split()
    assert cli.main(command) == 1
    out = capsys.readouterr().out
    alone = {int(x) for x in re.findall(r"example (\d+) alone: .*nan", out)}
    guilty = {
        int(example)
        for rank in range(ranks)
        for share in [setup.batches.step(step - 1, rank, ranks, 1)]
        for (examples, *_), batch in zip(share.parts(), share, strict=True)
        for example in examples
        if token in batch.input_ids
    }
    assert alone == guilty != set()


@pytest.mark.thorough
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_replay_of_a_sound_step_is_that_step(
    whole: tuple[list[str], Path],
    tmp_path: Path,
    precision: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From a checkpoint two steps before, with dropout; nothing is written."""
    recipe, _ = whole
    changes = (f"--precision={precision}", "--student.dropout=0.1", "--batch.micro_sequences=4")
    folder = run(recipe, *changes, f"--output={tmp_path / 'run'}", "--checkpoint.every=4")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
    # A run that had to be new is looked at all the same.
    arguments = ["--config", str(folder / "config.yaml"), "--resume=never"]
    assert cli.main(["replay", "--step=7", *arguments]) == 0
    out = capsys.readouterr().out
    assert "from the checkpoint after step 4, in the micro-batches of 1 rank" in out
    again, recorded = (
        dict(re.findall(r"(\w+) ([\d.e-]+)(?:  |$)", line))
        for line in out.splitlines()
        if line.startswith(("step 7:", "recorded:"))
    )
    for name, value in recorded.items():
        assert float(again[name]) == pytest.approx(
            float(value), rel=1e-5 if precision == "fp32" else 2e-3
        )
    assert before == {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def test_replay_says_where_a_step_on_its_way_is_not_finite(
    poisoned: tuple[list[str], int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, _ = poisoned
    changes = [f"--output={tmp_path / 'run'}", "--batch.micro_sequences=2"]
    assert train.main([*recipe, *changes]) == 1
    assert cli.main(["replay", "--step=10", *recipe, *changes]) == 1
    assert "loss is nan" in capsys.readouterr().err.splitlines()[-1]


def test_ranks_have_to_share_the_output(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    recipe, folder = whole
    config = configs.parse([*recipe, "--objective=masked"])
    checks.check_shared(config, folder)
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(configs.ConfigError, match="output: expected a folder that all ranks"):
            checks.check_shared(config, place)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--step: expected the number of a step, got none"),
        (["--step=x"], "--step: expected a number from 1, got 'x'"),
        (["--step=1", "--ranks", "0"], "--ranks: expected a number from 1, got '0'"),
        (["--step=11"], "--step: expected 1 to 10, got 11"),
        (["--step=1", "--output=nowhere"], "output: expected the folder of a run, got 'nowhere'"),
    ],
)
def test_replay_refuses(
    whole: tuple[list[str], Path],
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["replay", *arguments, "--config", str(whole[1] / "config.yaml")]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp32", "bf16"])  # the first at ZeRO 0, the second at 1
def test_non_finite_gradient_stops_the_run(
    whole: tuple[list[str], Path],
    tmp_path: Path,
    precision: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The loss is finite; its gradient overflows. DeepSpeed would pass over the step in silence."""
    recipe, _ = whole
    backward = engine.Engine.backward
    seen: list[engine.Engine] = []

    def overflow(self: engine.Engine, loss: torch.Tensor) -> None:
        seen.append(self)
        backward(self, loss * 1e30 * 1e30 if len(seen) == 3 else loss)

    monkeypatch.setattr(engine.Engine, "backward", overflow)
    changes = (f"--output={tmp_path / 'run'}", f"--precision={precision}")
    assert train.main([*recipe, *changes]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "step 3: grad_norm is" in error
    assert all(w.isfinite().all() for w in seen[0].weights().values())


@pytest.mark.parametrize("where", ["_micro_batch", "backward"])
def test_error_within_a_step_ends_the_run_and_its_thread(
    whole: tuple[list[str], Path], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In making a micro-batch, ahead of the training, and in training on one."""
    recipe, _ = whole
    owner = data.Batches if where == "_micro_batch" else engine.Engine
    work, calls = getattr(owner, where), []

    def fail(self: Any, *arguments: Any) -> Any:
        if arguments[0] != "heldout":
            calls.append(arguments)
        if len(calls) == 6:
            raise OSError("disk gone")
        return work(self, *arguments)

    monkeypatch.setattr(owner, where, fail)
    changes = (f"--output={tmp_path / 'run'}", "--batch.micro_sequences=1")
    with pytest.raises(OSError, match="disk gone") as kept:  # and with it the step's frame
        train.main([*recipe, *changes])
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")], kept


def test_step_is_never_held_whole(
    whole: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, _ = whole
    made, alive = [], []
    make = data.Batches._micro_batch

    def watch(self: data.Batches, split: str, *arguments: Any) -> data.MicroBatch:
        batch = make(self, split, *arguments)
        if split == "train":
            made.append(weakref.ref(batch.input_ids))
            alive.append(sum(ids() is not None for ids in made))
        return batch

    monkeypatch.setattr(data.Batches, "_micro_batch", watch)
    changes = ("--batch.sequences=64", "--batch.micro_sequences=1", "--steps=1")
    run(recipe, *changes, f"--output={tmp_path / 'run'}")
    assert len(made) == 64
    assert max(alive) <= 4  # one being trained on, two ahead of it, one being made


# --- What a run leaves ----------------------------------------------------------------------------


def test_run_leaves_what_it_promises(whole: tuple[list[str], Path]) -> None:
    recipe, folder = whole
    names = {p.name for p in folder.iterdir()}
    assert {"config.yaml", "metrics.jsonl", "model", "report.html", "summary.json"} <= names
    assert not [n for n in names if "tmp" in n]
    written = configs.parse(["--config", str(folder / "config.yaml")])
    assert written == configs.parse([*recipe, "--objective=masked"])
    lines = metrics(folder)
    steps = [line for line in lines if "loss" in line]
    keys = {"step", "tokens", "loss", "kd", "ce", "hidden_cos", "agreement", "grad_norm"}
    keys.add("learning_rate")
    assert all(line.keys() == keys for line in steps)
    assert [line["step"] for line in steps] == list(range(1, 11))
    for line in steps:
        whole_loss = 5 * line["kd"] + 2 * line["ce"] + line["hidden_cos"]
        assert line["loss"] == pytest.approx(whole_loss, rel=1e-5)
    evaluations = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluations] == [0, 5, 10]
    assert evaluations[-1]["eval_agreement"] > evaluations[0]["eval_agreement"] + 0.1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["scores"]["student"]["eval_loss"] == evaluations[-1]["eval_loss"]
    assert summary["tokens"] == steps[-1]["tokens"]
    assert summary["student_layers"] == 2
    assert summary["code"] == code_version()
    held = summary["heldout"]
    mean = sum(held["losses"]) / sum(held["tokens"])
    assert mean == pytest.approx(evaluations[-1]["eval_loss"], rel=1e-5)


def test_tensorboard_holds_the_metrics(whole: tuple[list[str], Path], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recipe, _ = whole
    changes = (f"--output={tmp_path / 'run'}", "--tensorboard=true", "--steps=2")
    folder = run(recipe, *changes)
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("loss")]
    lines = [line["loss"] for line in metrics(folder) if "loss" in line]
    assert written == pytest.approx(lines, rel=1e-6)


def test_labels_alone_run_without_a_teacher(
    whole: tuple[list[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 0 cost nothing: the teacher's forward is never called in training."""
    recipe, _ = whole
    monkeypatch.setattr(loop.TeacherSide, "__call__", None)
    folder = run(
        recipe,
        f"--output={tmp_path / 'run'}",
        "--loss.kd_weight=0",
        "--loss.hidden_cos_weight=0",
    )
    steps = [line for line in metrics(folder) if "loss" in line]
    assert all(not {"kd", "hidden_cos", "agreement"} & line.keys() for line in steps)
    assert all(line["loss"] == pytest.approx(2 * line["ce"]) for line in steps)


def test_ensemble_of_one_teacher_twice_is_that_teacher(
    whole: tuple[list[str], Path], tmp_path: Path, teacher: Path
) -> None:
    recipe, folder = whole
    config = tmp_path / "ensemble.yaml"
    text = Path(recipe[1]).read_text().splitlines()
    text[0] = f"teacher: [{teacher}, {{name: {teacher}, weight: 3.0}}]"
    config.write_text("\n".join(text))
    other = run(["--config", str(config)], f"--output={tmp_path / 'run'}")
    assert_same_curve(folder, other)


def test_ensemble_of_two_teachers_differs(
    whole: tuple[list[str], Path], tmp_path: Path, teacher: Path
) -> None:
    recipe, folder = whole
    second = make_teacher(tmp_path / "second", seed=7)
    config = tmp_path / "ensemble.yaml"
    text = Path(recipe[1]).read_text().splitlines()
    text[0] = f"teacher: [{teacher}, {second}]"
    config.write_text("\n".join(text))
    other = run(["--config", str(config)], f"--output={tmp_path / 'run'}", "--loss.kd_rows=masked")
    assert metrics(other)[1]["kd"] != pytest.approx(metrics(folder)[1]["kd"], rel=1e-2)


def test_masked_rows_alone_are_projected(
    recipe: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # in student and teacher: the counts of every micro-batch, in the order of their products
    projected: list[int] = []
    logits = chunks.Side.logits

    def count(side: chunks.Side, hidden: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        projected.append(len(hidden))
        return logits(side, hidden, out)

    monkeypatch.setattr(chunks.Side, "logits", count)
    rows = {}
    for kd_rows in ("all", "masked"):
        projected.clear()
        changes = [f"--output={tmp_path / kd_rows}", f"--loss.kd_rows={kd_rows}", "--steps=1"]
        run(recipe, *changes)
        assert projected[0::2] == projected[1::2]  # student, teacher
        rows[kd_rows] = sum(projected[0::2])
    line = metrics(tmp_path / "all")[1]
    assert rows["all"] == line["tokens"]
    assert 0.2 < rows["masked"] / rows["all"] < 0.4  # masking.probability is 0.3


# --- On a GPU, and nowhere else -------------------------------------------------------------------
#
# DeepSpeed has one accelerator a process, so here the CPU takes its steps without DeepSpeed.

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU can tell")
GPU_LAYOUTS = [(0, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]


class OnAGpu:
    """A run's parts on the GPU."""

    def __init__(self, recipe: list[str], *changes: str):
        self.config = configs.parse([*recipe, *changes])
        self.world = processes.start()
        assert self.world.device.type == "cuda"
        self.setup = checks.prepare(self.config, self.world)
        self.teacher = loop.teacher_side(self.config, self.world, self.setup.teachers)
        module = Distillation(self.setup.student, self.config.loss, self.teacher)
        self.engine = engine.Engine(module, self.config, self.world)

    def step(self, number: int) -> dict[str, Any]:
        things = self.config, self.world, self.setup, self.engine, self.teacher
        line, _ = optimiser_step(*things, number, Stop())
        assert line is not None
        return line


def steps_of_a_cpu(recipe: list[str], steps: int) -> tuple[list[list[float]], dict[str, Any]]:
    """Loss and gradient norm of each step, and the last weights: the module's own gradients, and
    PyTorch's AdamW."""
    config, cpu = configs.parse(recipe), torch.device("cpu")
    setup = checks.prepare(config, processes.World(0, 1, cpu))
    teacher = TeacherSide(setup.teachers, config.loss, cpu, torch.float32)
    module = Distillation(setup.student, config.loss, teacher)
    optimizer = optimizers.make(module, config.optimizer)
    values = []
    for step in range(steps):
        share = setup.batches.step(step, 0, 1, config.batch.micro_sequences)
        counts = count(config, processes.World(0, 1, cpu), share)
        total = 0.0
        for batch in share:
            loss, _ = module(batch, teacher(batch), Normalizers(*counts.float()))
            loss.backward()
            total += float(loss.detach())
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), config.optimizer.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = optimizers.learning_rate(config.optimizer, step, setup.steps)
        optimizer.step()
        optimizer.zero_grad()
        values.append([total, float(norm)])
    return values, dict(module.named_parameters(remove_duplicate=False))


@on_a_gpu
@pytest.mark.parametrize("layout", GPU_LAYOUTS, ids=str)
def test_steps_are_a_cpus_on_a_gpu(recipe: list[str], layout: tuple[int, str]) -> None:
    """In fp32, three of them, with clipping. Nothing is compiled."""
    changes = (f"--zero.stage={layout[0]}", f"--zero.offload={layout[1]}")
    values, wanted = steps_of_a_cpu(recipe, 3)
    on = OnAGpu(recipe, *changes)
    lines = [on.step(number) for number in range(3)]
    found = [[line["loss"], line["grad_norm"]] for line in lines]
    assert found == [pytest.approx(pair, rel=1e-4) for pair in values]
    got = on.engine.weights()
    difference = sum(float((got[name] - x.detach()).square().sum()) for name, x in wanted.items())
    moved = sum(float(x.detach().square().sum()) for x in wanted.values())
    assert math.sqrt(difference / moved) <= 1e-4


@on_a_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_micro_batch_waits_for_nothing_on_a_gpu(
    recipe: list[str], precision: str, padded: bool
) -> None:
    """From the examples to the sum of the gradients, and an evaluation: a copy that waits, a value
    that is read, would be an error. The second of its kind: the first compiles and allocates."""
    on = OnAGpu(recipe, f"--precision={precision}", "--zero.stage=1")
    lengths = on.setup.batches.lengths["train"]
    examples = (lengths < 24 if padded else lengths == 24).nonzero()[:4, 0]
    assert len(examples) == 4
    share = data.Share(on.setup.batches, examples, torch.zeros(4).long(), [4], torch.ones(4).long())
    assert [batch.attention_mask is None for batch in share] == [not padded]
    for number in range(2):
        torch.cuda.synchronize()
        with no_wait_for_the_gpu() if number else contextlib.nullcontext():
            counts = count(on.config, on.world, share)
            normalizers = Normalizers(*counts.float())
            for batch in data.prefetch(data.on_device(share, on.world.device)):
                loss, _ = on.engine(batch, on.teacher(batch), normalizers)
                on.engine.backward(loss)
                on.engine.predict(batch)
    assert math.isfinite(on.engine.step(1e-3))


@on_a_gpu
@pytest.mark.parametrize("layout", [(1, "none"), *GPU_LAYOUTS[1:4]], ids=str)
def test_bf16_sum_of_a_thousand_gradients_loses_nothing_on_a_gpu(layout: tuple[int, str]) -> None:
    assert sum_of_a_thousand(*layout) == pytest.approx(1, rel=1e-6)


@on_a_gpu
def test_norm_of_a_large_gradient_is_exact_on_a_gpu() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(30522, 768), torch.randn(5), torch.tensor(2.0)]
    wanted = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    there = [g.cuda() for g in gradients]
    assert float(engine.total_norm(there)) == pytest.approx(wanted, rel=1e-6)


@on_a_gpu
def test_layers_lose_little_of_a_bf16_gradient_on_a_gpu() -> None:
    """PyTorch's own, which are not replaced there: sums over rows that point one way. An embedding
    of at most 3,072 tokens adds up 32 rows in fp32, and those sums in bf16."""
    for rows in (2048, 4096, 70_000):
        gradient = (torch.rand(rows, 64, device="cuda") + 0.5).bfloat16()
        norm = torch.nn.LayerNorm(64).cuda().bfloat16()
        norm(torch.randn(rows, 64, device="cuda").bfloat16()).backward(gradient)
        table = torch.nn.Embedding(10, 64).cuda().bfloat16()
        table(torch.full((rows,), 3, device="cuda")).backward(gradient)
        wanted = gradient.float().sum(0)
        for found in (norm.bias.grad, table.weight.grad[3]):
            error = float((found.float() - wanted).norm() / wanted.norm())
            assert error <= 0.02, (rows, error)


@on_a_gpu
def test_checkpoint_of_a_gpu_holds_its_bits_on_a_gpu(recipe: list[str], tmp_path: Path) -> None:
    """Written through pinned memory, and put back into another engine and another layout."""
    on = OnAGpu(recipe, "--precision=bf16", "--zero.stage=1")
    for number in range(2):
        on.step(number)
    pieces = {p.name: p for p in on.engine.pieces()}
    writer = checkpoint.Checkpoints(tmp_path, 0, 1, 1)
    writer.reserve(on.engine.piece_bytes(), True)
    writer.save(2, list(pieces.values()))
    writer.wait()
    saved = checkpoint.Saved(tmp_path, 2)
    for layout in ((1, "none"), (2, "optimizer")):
        changes = (f"--zero.stage={layout[0]}", f"--zero.offload={layout[1]}")
        other = OnAGpu(recipe, "--precision=bf16", *changes)
        other.engine.restore(saved)
        restored = {p.name: p for p in other.engine.pieces()}
        assert restored.keys() == pieces.keys()
        for name, piece in pieces.items():
            for kind, tensor in piece.tensors.items():
                read = saved.read(name, kind, 0, piece.length)
                assert torch.equal(tensor.cpu(), read), (name, kind)
                assert torch.equal(restored[name].tensors[kind].cpu(), read), (name, kind)
        assert math.isfinite(other.step(2)["loss"])


@on_a_gpu
def test_run_goes_on_on_a_cpu_from_steps_on_a_gpu(recipe: list[str], tmp_path: Path) -> None:
    """The whole driver on a GPU, and the second half of its run again on a CPU."""
    for needed in ("matplotlib", "rich", "jinja2"):  # by a report
        pytest.importorskip(needed)
    folder = run(recipe, "--checkpoint.every=4")
    again = tmp_path / "again"
    shutil.copytree(folder, again, ignore=shutil.ignore_patterns("summary.json", "step-8", "model"))
    run_processes([sys.executable], recipe, f"--output={again}", DS_ACCELERATOR="cpu")
    assert_same_curve(folder, again, tolerance=1e-3)
