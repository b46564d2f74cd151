"""The kit of exactness.py and accumulation.py: a small recipe, programs on several ranks, and the
gradient at the end of a step.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilfast import config as configs
from distilfast import data
from distilfast.driver import checks, engine, processes
from distilfast.driver.micro_batch import Distillation, Normalizers, TeacherSide, vocabulary_rows
from distilfast.driver.processes import Stop
from distilfast.driver.step import optimiser_step

WORDS, LINES = 1000, 400
# Every layout that is offered. One process in fp32 and without offload is at stage 0 whatever is
# asked for; bf16 is refused there.
LAYOUTS = [
    *((stage, "none") for stage in range(4)),
    *((stage, "optimizer") for stage in (1, 2, 3)),
    (3, "parameters"),
]


def layouts(precision: str, ranks: int) -> list[tuple[int, str]]:
    """Those that differ from one another: one process without offload has one, of the lowest stage
    that there is for the precision."""
    lowest = 1 if precision == "bf16" else 0
    found = [x for x in LAYOUTS if x[0] >= lowest]
    return found if ranks > 1 else [x for x in found if x == (lowest, "none") or x[1] != "none"]


# --- Programs on several ranks --------------------------------------------------------------------


def launch(program: str, ranks: int, folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """The rows that a bench's ``worker`` made on so many ranks."""
    port = str(processes.free_port())
    launcher = [sys.executable, "-m", "torch.distributed.run", "--master_port", port]
    command = [*launcher, "--nproc_per_node", str(ranks), program, "--folder", str(folder)]
    done = subprocess.run(
        [*command, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{program} on {ranks} ranks failed:\n{done.stderr[-5000:]}")
    return json.loads((folder / f"ranks-{ranks}.json").read_text())


def worker(folder: Path, work: Callable[[processes.World], list[dict[str, Any]]]) -> None:
    """One rank of a bench; ``work`` makes the rows."""
    warnings.simplefilter("error")
    engine.PERSISTENT = 0  # or models as small as these would stay whole at stage 3
    world = processes.start()
    rows = work(world)
    if world.rank == 0:
        (folder / f"ranks-{world.ranks}.json").write_text(json.dumps(rows))
    processes.finish()


# --- What runs ------------------------------------------------------------------------------------


def make_recipe(folder: Path, layers: int, max_length: int) -> Path:
    """A BERT of ``layers`` x 64 with its tokenizer, lines of 4 to 60 words, and the recipe of a
    student of half the layers: kd, ce and hidden cosine, without dropout and clipping."""
    import transformers

    rng = random.Random(0)
    words = [f"w{i}" for i in range(WORDS)]
    weights = [1 / (i + 1) for i in range(WORDS)]
    lines = [" ".join(rng.choices(words, weights, k=rng.randint(4, 60))) for _ in range(LINES)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]
    torch.manual_seed(0)
    model = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    transformers.BertForMaskedLM(model).save_pretrained(folder / "teacher")
    tokenizer = transformers.BertTokenizer(vocab={w: i for i, w in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder / "teacher")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        f"""\
teacher: {folder / "teacher"}
student: {{dropout: 0}}
data: {{source: {folder / "text.txt"}, prepared: {folder / "tokens"}, max_length: {max_length}}}
optimizer: {{learning_rate: 1.0e-3, max_grad_norm: 0}}
steps: 5
output: {folder / "run"}
""",
        encoding="utf-8",
    )
    return recipe


class Run:
    """A run in the hands of a bench."""

    def __init__(
        self, world: processes.World, recipe: Path, *changes: str, kind: type = engine.Engine
    ):
        self.config = configs.parse(["--config", str(recipe), *changes])
        self.world, self.setup = world, checks.prepare(self.config, world)
        dtype = engine.DTYPES[self.config.precision]
        self.teacher = TeacherSide(self.setup.teachers, self.config.loss, world.device, dtype)
        module = Distillation(self.setup.student, self.config.loss, self.teacher)
        self.engine = kind(module, self.config, world)

    def step(self, number: int) -> None:
        things = self.config, self.world, self.setup, self.engine, self.teacher
        optimiser_step(*things, number, Stop())

    def micro_batches(self, count: int) -> list[data.MicroBatch]:
        """This rank's of so many steps."""
        share = self.world.rank, self.world.ranks, self.config.batch.micro_sequences
        return [b for step in range(count) for b in self.setup.batches.step(step, *share)]

    def normalizers(self, batches: Sequence[data.MicroBatch]) -> Normalizers:
        """Of a step of these micro-batches and the other ranks'."""
        loss = self.config.loss
        counts = [[len(vocabulary_rows(b, loss)), len(b.labelled), len(b.tokens)] for b in batches]
        return Normalizers(*self.world.sum(torch.tensor(counts).sum(0)).float())

    def accumulate(self, batches: Sequence[data.MicroBatch]) -> None:
        """A step of these micro-batches but for its end."""
        normalizers = self.normalizers(batches)
        for batch in batches:
            loss, _ = self.engine(batch, self.teacher(batch), normalizers)
            self.engine.backward(loss)


class Caught:
    """The gradient that the optimiser is handed in a step: all of it, fp32, the ranks' sum."""

    def __init__(self, runner: engine.Engine):
        self.runner = runner
        self.flat: dict[int, Tensor] = {}  # by the id of what it is the gradient of

    def __enter__(self) -> Caught:
        self.hook = self.runner.adam.register_step_pre_hook(self._catch)
        return self

    def __exit__(self, *_: object) -> None:
        self.hook.remove()

    def _catch(self, adam: torch.optim.Optimizer, *_: object) -> None:
        """At ZeRO 3 for each of its groups in turn."""
        for group in adam.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.flat[id(weight)] = weight.grad.detach().clone()

    def by_name(self) -> dict[str, Tensor]:
        """Whole, on every rank; every rank has to ask."""
        runner = self.runner
        trained = [x for x in runner.deepspeed.module.named_parameters() if x[1].requires_grad]
        found = {name: torch.zeros(getattr(p, "ds_numel", p.numel())) for name, p in trained}
        for name, _, at in runner._slices():
            found[name][at.start : at.start + at.length] = at.of(self.flat[id(at.flat)])
        if runner.stage > 0:  # where everybody holds everything
            for gradient in found.values():
                runner.world.sum(gradient)
        return found


def distance(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """The norm of the difference over the norm of ``b``, all parameters together."""
    if a.keys() != b.keys():
        raise ValueError(f"expected the parameters {sorted(b)}, got {sorted(a)}")
    off = sum(float((a[k].flatten() - b[k].flatten()).double().square().sum()) for k in b)
    return math.sqrt(off / sum(float(x.double().square().sum()) for x in b.values()))
