"""Does a resumed run end as if it had not been stopped?

    python bench/resume.py

Runs eight steps with a checkpoint after each, then resumes from each of the first seven in a new
engine and runs to the end: on one process and on two ranks, under every ZeRO stage with every
offload, in fp32 and bf16, with dropout. Steps 1 to 4 are warm-up, and the examples' order is drawn
anew within steps 4 and 7. Losses, gradient norms, weights and both moments have to be equal, bit
for bit.

Elastic: it also resumes from step 4 in another layout on the other number of ranks, in fp32 without
dropout. It reports the norm of the difference over the norm of all weights at the end, limit 1e-5,
and the number of examples that an epoch trained on twice or not at all. Appends to
bench/results/resume.csv.
"""

from __future__ import annotations

import argparse
import collections
import copy
import dataclasses
import gc
import math
import os
import random
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from kit import measure
from safetensors.torch import load_file, save_file
from torch import Tensor

from distilfast import config as configs
from distilfast.driver import checks, engine, processes
from distilfast.driver.checkpoint import Checkpoints, Saved
from distilfast.driver.micro_batch import Distillation, TeacherSide
from distilfast.driver.processes import Stop
from distilfast.driver.step import optimiser_step

CSV = Path(__file__).parent / "results" / "resume.csv"
STEPS, SEQUENCES, MIDDLE = 8, 16, 4
LIMIT = 1e-5
LAYOUTS = [
    *((stage, "none") for stage in range(4)),
    *((stage, "optimizer") for stage in (1, 2, 3)),
    (3, "parameters"),
]
Layout = tuple[int, str]
Trained = list[tuple[int, int]]  # epoch and example


class Runs:
    """Runs of one precision and dropout, which share their data and teacher."""

    def __init__(self, world: processes.World, folder: Path, precision: str, dropout: float):
        changes = f"--precision={precision}", f"--student.dropout={dropout}", "--zero.stage=1"
        self.config = configs.parse(["--config", str(folder / "recipe.yaml"), *changes])
        self.world, self.setup = world, checks.prepare(self.config, world)
        self.student = copy.deepcopy(self.setup.student)
        dtype = engine.DTYPES[precision]
        self.teacher = TeacherSide(self.setup.teachers, self.config.loss, world.device, dtype)
        self.trained: Trained = []
        make = self.setup.batches._micro_batch

        def record(split: str, examples: Tensor, epochs: Tensor) -> Any:
            self.trained += zip(epochs.tolist(), examples.tolist(), strict=True)
            return make(split, examples, epochs)

        self.setup.batches._micro_batch = record

    def start(self, layout: Layout) -> engine.Engine:
        """The student as it was, in an engine of its own."""
        gc.collect()
        gc.freeze()  # DeepSpeed collects at every start, ever more slowly
        self.trained.clear()
        self.config = dataclasses.replace(self.config, zero=configs.ZeroConfig(*layout))
        module = Distillation(copy.deepcopy(self.student), self.config.loss, self.teacher)
        return engine.Engine(module, self.config, self.world)

    def step(self, runner: engine.Engine, number: int) -> list[float]:
        """Loss and gradient norm."""
        things = self.config, self.world, self.setup, runner, self.teacher
        line, _ = optimiser_step(*things, number, Stop())
        return [line["loss"], line["grad_norm"]]

    def everyone(self, value: Any) -> list[Any]:
        """What each rank has to say."""
        values = [value]
        if self.world.ranks > 1:
            values = [None] * self.world.ranks
            torch.distributed.all_gather_object(values, value)
        return values


def state(runner: engine.Engine) -> tuple[dict[Any, Tensor], dict[Any, Tensor]]:
    """Weights and moments of this rank's, and the weights that are computed with."""
    pieces = runner.pieces()
    weights: dict[Any, Tensor] = {(p.name, "master"): p.tensors["weight"].clone() for p in pieces}
    weights |= {name: weight.clone() for name, weight in runner.weights().items()}
    moments = {(p.name, k): p.tensors[k].clone() for p in pieces for k in engine.MOMENTS}
    return weights, moments


def name(layout: Layout) -> str:
    return f"ZeRO {layout[0]}, offload {layout[1]}"


def equal(a: dict[Any, Tensor], b: dict[Any, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def resumed(runs: Runs, folder: Path, layout: Layout) -> dict[str, Any]:
    """From each of a straight run's checkpoints to its end: how often that ends the same."""
    runner = runs.start(layout)
    checkpoints = Checkpoints(folder, runs.world.rank, runs.world.ranks, STEPS)
    values = []
    for number in range(STEPS):
        values.append(runs.step(runner, number))
        if number + 1 < STEPS:
            checkpoints.save(number + 1, runner.pieces())
    checkpoints.wait()
    runs.world.first(lambda: None)
    straight = state(runner)
    same = collections.Counter()
    for begin in range(1, STEPS):
        runner = runs.start(layout)
        runner.restore(Saved(folder, begin))
        losses = [runs.step(runner, number) for number in range(begin, STEPS)]
        found = state(runner)
        pairs = [losses == values[begin:], *map(equal, found, straight)]
        told = runs.everyone(pairs)
        for what, each in zip(
            ("losses", "weights", "moments"), zip(*told, strict=True), strict=True
        ):
            same[f"same_{what}"] += all(each)
    stage = name(layout)
    return {"kind": "same layout", "from": stage, "to": stage, "resumed": STEPS - 1, **same}


def half(runs: Runs, folder: Path, layout: Layout) -> None:
    """A run with a checkpoint in the middle: its last weights, and what it saw before that."""
    runner = runs.start(layout)
    checkpoints = Checkpoints(folder, runs.world.rank, runs.world.ranks, 1)
    trained: Trained = []
    for number in range(STEPS):
        runs.step(runner, number)
        if number + 1 == MIDDLE:
            checkpoints.save(MIDDLE, runner.pieces())
            trained = list(runs.trained)
    checkpoints.wait()
    weights, told = runner.weights(), runs.everyone(trained)
    if runs.world.rank == 0:
        save_file({k: w.clone() for k, w in weights.items()}, folder / "end.safetensors")
        torch.save([pair for each in told for pair in each], folder / "trained.pt")
    runs.world.first(lambda: None)


def other_half(runs: Runs, folder: Path, before: Layout, layout: Layout) -> dict[str, Any]:
    """The same run from its middle on, in another layout."""
    runner = runs.start(layout)
    runner.restore(Saved(folder, MIDDLE))
    for number in range(MIDDLE, STEPS):
        runs.step(runner, number)
    told = runs.everyone(list(runs.trained))
    trained = collections.Counter(map(tuple, torch.load(folder / "trained.pt")))
    trained.update(pair for each in told for pair in each)
    wanted = collections.Counter()
    for number in range(STEPS):
        examples, epochs = runs.setup.batches.examples(number)
        wanted.update(zip(epochs.tolist(), examples.tolist(), strict=True))
    ends, weights = load_file(folder / "end.safetensors"), runner.weights()
    off = sum(float((weights[k] - ends[k]).double().square().sum()) for k in ends)
    norm = sum(float(w.double().square().sum()) for w in ends.values())
    return {
        "kind": "elastic",
        "from": name(before),
        "to": name(layout),
        "resumed": 1,
        "difference": math.sqrt(off / norm),
        "twice": sum((trained - wanted).values()),
        "skipped": sum((wanted - trained).values()),
    }


def rank(folder: Path, part: str) -> None:
    """One of the ranks, in one of the parts; the first one appends the rows."""
    engine.PERSISTENT = 0  # at ZeRO 3 models as small as this one would stay whole
    world = processes.start()
    ranks, rows = world.ranks, []
    if part == "straight":
        for precision in ("fp32", "bf16"):
            runs = Runs(world, folder, precision, dropout=0.1)
            for layout in LAYOUTS:
                if skipped(ranks, precision, layout):
                    continue
                place = folder / f"{precision}-{ranks}-{layout[0]}-{layout[1]}"
                row = {"ranks": ranks, "to_ranks": ranks, "precision": precision}
                rows.append({**row, **resumed(runs, place, layout)})
                say(world, rows[-1])
        runs = Runs(world, folder, "fp32", dropout=0.0)
        for layout in LAYOUTS:
            half(runs, folder / f"elastic-{ranks}-{layout[0]}-{layout[1]}", layout)
    else:
        runs = Runs(world, folder, "fp32", dropout=0.0)
        for number, layout in enumerate(LAYOUTS):
            before = LAYOUTS[(number + 3) % len(LAYOUTS)]
            place = folder / f"elastic-{3 - ranks}-{before[0]}-{before[1]}"
            row = {"ranks": 3 - ranks, "to_ranks": ranks, "precision": "fp32"}
            rows.append({**row, **other_half(runs, place, before, layout)})
            say(world, rows[-1])
    if world.rank == 0:
        environment = measure.environment(world.device)
        columns = ("kind", "precision", "ranks", "from", "to_ranks", "to", "resumed")
        figures = ("same_losses", "same_weights", "same_moments", "difference", "twice", "skipped")
        measure.append_csv(
            CSV, [{**environment, **{c: row.get(c, "") for c in columns + figures}} for row in rows]
        )
    processes.finish()
    sys.exit(not all(map(holds, rows)))


def skipped(ranks: int, precision: str, layout: Layout) -> bool:
    """bf16 is not offered at stage 0, and one process in fp32 without offload is at stage 0."""
    if precision == "bf16":
        return layout[0] == 0
    return ranks == 1 and layout[0] > 0 and layout[1] == "none"


def holds(row: dict[str, Any]) -> bool:
    if row["kind"] == "elastic":
        return row["difference"] <= LIMIT and row["twice"] == row["skipped"] == 0
    return {row[f"same_{name}"] for name in ("losses", "weights", "moments")} == {row["resumed"]}


def say(world: processes.World, row: dict[str, Any]) -> None:
    if world.rank == 0:
        print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)


def write_recipe(folder: Path) -> None:
    """A teacher of some thousand parameters and a text of 64 lines: 57 are trained on."""
    words = [f"word{i}" for i in range(60)]
    draw = random.Random(0)
    lines = [" ".join(draw.choices(words, k=draw.randint(6, 22))) for _ in range(64)]
    (folder / "text.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder / "teacher")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        initializer_range=0.2,
    )
    transformers.BertForMaskedLM(config).save_pretrained(folder / "teacher")
    (folder / "recipe.yaml").write_text(
        f"""\
teacher: {folder / "teacher"}
data: {{source: {folder / "text.txt"}, prepared: {folder / "tokens"}, max_length: 24, heldout: 0.1}}
optimizer: {{learning_rate: 1.0e-3, max_grad_norm: 1.0, weight_decay: 0.01, warmup_ratio: 0.5}}
batch: {{sequences: {SEQUENCES}, micro_sequences: 4}}
steps: {STEPS}
output: {folder / "run"}
""",
        encoding="utf-8",
    )


def launch(ranks: int, folder: Path, part: str) -> int:
    """The worst exit status of the ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **shared}
    command = [sys.executable, __file__, "--folder", str(folder), "--part", part]
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(ranks)
    ]
    return max(process.wait() for process in processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)  # the ranks', and
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        rank(options.folder, options.part)
    with tempfile.TemporaryDirectory() as folder:
        write_recipe(Path(folder))
        parts = ((1, "straight"), (2, "straight"), (2, "elastic"), (1, "elastic"))
        sys.exit(max([launch(ranks, Path(folder), part) for ranks, part in parts]))


if __name__ == "__main__":
    main()
