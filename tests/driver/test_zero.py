"""ZeRO 0 to 3 with and without offload, on two ranks and on one, against one process at stage 0.

This file is also the program of the two ranks, which go through all layouts in one launch. Weights
of any size are partitioned at stage 3: by default models as small as these would stay whole.
"""

from __future__ import annotations

import gc
import math
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_teacher
from families import make_causal, make_family
from launches import torchrun
from torch import Tensor

from distilfast import config as configs
from distilfast.driver import checks, engine, loop, processes, results
from distilfast.driver.checkpoint import Checkpoints, Saved
from distilfast.driver.heldout import Evaluator
from distilfast.driver.micro_batch import Distillation
from distilfast.driver.processes import Stop
from distilfast.driver.step import TrainingError, optimiser_step

pytestmark = pytest.mark.thorough

LAYOUTS = [
    *((stage, "none") for stage in range(4)),
    *((stage, "optimizer") for stage in (1, 2, 3)),
    (3, "parameters"),
]
MODELS = ("tied", "untied")  # one teacher and all tokens; an ensemble and the masked tokens alone
FAMILIES = ("roberta", "modernbert")  # positions from the padding on, windows; no token types
# Packed: one teacher with a tied head; an ensemble whose heads are untied and of other sizes.
CAUSAL = ("gpt2", "llama")
FAMILY_LAYOUTS = [*((stage, "none") for stage in range(4)), (3, "parameters")]
SHARDED = (  # teachers
    ("tied", "none", "fp32"),
    ("tied", "none", "bf16"),
    ("untied", "parameters", "fp32"),
)
SMALL_SUM = 512  # micro-batches of 2^-9 each: bf16 would stand still at a half


class Aligned(torch.nn.Module):
    """Whose gradient is what is asked for, in each weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(64, 64))

    def forward(self, gradient: float) -> Tensor:
        return self.weight.float().sum() * gradient


class Run:
    """A run in the hands of the test."""

    def __init__(self, world: processes.World, recipe: Path, *changes: str):
        self.config = configs.parse(["--config", str(recipe), *changes])
        self.world, self.setup = world, checks.prepare(self.config, world)
        self.teacher = loop.teacher_side(self.config, world, self.setup.teachers)
        module = Distillation(self.setup.student, self.config.loss, self.teacher)
        self.engine = engine.Engine(module, self.config, world)
        self.evaluator = Evaluator(
            self.setup.batches, world, 5, 15
        )  # three batches: the ranks have different shares
        self.stop = Stop()

    def steps(self, first: int, last: int) -> list[float]:
        """Loss and gradient norm of each."""
        values = []
        for step in range(first, last):
            things = self.config, self.world, self.setup, self.engine, self.teacher
            line, _ = optimiser_step(*things, step, self.stop)
            values += [line["loss"], line["grad_norm"]]
        return values

    def weights(self) -> dict[str, Tensor]:
        return {name: weight.clone() for name, weight in self.engine.weights().items()}

    def score(self) -> dict[str, Any]:
        return self.evaluator.student(self.engine.predict).line()


def layout_changes(layout: tuple[int, str]) -> tuple[str, str]:
    return f"--zero.stage={layout[0]}", f"--zero.offload={layout[1]}"


def train_and_score(run: Run) -> dict[str, Any]:
    """Three steps, scored before, between and after."""
    run.evaluator.teacher(run.teacher.predict)
    scores, values, weights = [run.score()], [], []
    for step in range(3):
        values += run.steps(step, step + 1)
        weights.append(run.weights())
        scores.append(run.score())
    return {"scores": scores, "values": values, "weights": weights}


def stop_and_resume(world: processes.World, recipe: Path, folder: Path, *changes: str) -> bool:
    """Whether two steps after a checkpoint end with the same bits when it is gone on from. With
    dropout, and an evaluation in between."""
    changes = (*changes, "--student.dropout=0.1")
    run = Run(world, recipe, *changes)
    run.steps(0, 2)
    save(world, run, folder, 2)
    straight = run.steps(2, 4), run.weights()
    run = Run(world, recipe, *changes)
    run.engine.restore(Saved(folder, 2))
    run.score()
    values, weights = run.steps(2, 4), run.weights()
    same = all(torch.equal(weights[name], straight[1][name]) for name in weights)
    return same and values == straight[0]


def go_on(world: processes.World, recipe: Path, folder: Path, *changes: str) -> dict[str, Tensor]:
    """Weights after steps 3 and 4, from a checkpoint after step 2."""
    run = Run(world, recipe, *changes)
    run.engine.restore(Saved(folder, 2))
    run.steps(2, 4)
    return run.weights()


def save(world: processes.World, run: Run, folder: Path, step: int) -> None:
    checkpoints = Checkpoints(folder, world.rank, world.ranks, 1)
    checkpoints.save(step, run.engine.pieces())
    checkpoints.wait()
    world.first(lambda: None)


def sums(world: processes.World, layout: tuple[int, str]) -> tuple[float, float]:
    """The gradient's norm over sqrt(n): of many small micro-batches, and of ranks whose shares are
    far apart, in bf16."""
    norms = []
    for steps in (SMALL_SUM, 1):
        config = configs.Config(
            precision="bf16",
            batch=configs.BatchConfig(sequences=steps * world.ranks, micro_sequences=1),
            zero=configs.ZeroConfig(*layout),
            steps=1,
        )
        runner = engine.Engine(Aligned(), config, world)
        for _ in range(steps):
            far = 1.0 if world.rank == 0 else 2**-9
            runner.backward(runner(1 / SMALL_SUM if steps > 1 else far))
        norms.append(runner.step(1e-3) / 64)
    return norms[0], norms[1]


def overflow(world: processes.World, recipe: Path, *changes: str) -> bool:
    """Whether a gradient that overflows on the last rank stops every rank with its weights kept."""
    run = Run(world, recipe, *changes)
    run.steps(0, 1)
    before, backward = run.weights(), run.engine.backward
    huge = 1e30 if world.rank == world.ranks - 1 else 1.0
    run.engine.backward = lambda loss: backward(loss * huge * huge)
    try:
        run.steps(1, 2)
    except TrainingError:
        after = run.weights()
        return all(torch.equal(before[name], after[name]) for name in before)
    return False


def sharded(world: processes.World, recipe: Path, folder: Path, *changes: str) -> dict[str, Any]:
    """As `train_and_score`, with the teachers partitioned and with them whole: the share of their
    weights that this rank holds before and after; their sizes; the bytes of a checkpoint."""
    found: dict[str, Any] = {}
    for shard in ("true", "false"):
        run = Run(world, recipe, *changes, f"--zero.shard_teacher={shard}")
        teachers = [t.model for t in run.setup.teachers]
        before = held(teachers)
        found[shard] = train_and_score(run)
        found[shard]["held"] = [before, held(teachers)]
        found[shard]["sizes"] = [results._count(teacher) for teacher in teachers]
        save(world, run, folder / shard, 3)
        files = (folder / shard).rglob("*.*")
        found[shard]["checkpoint"] = sum(path.stat().st_size for path in files)
    return found


def held(teachers: list[Any]) -> float:
    """The share of the teachers' weights that this rank has in memory."""
    weights = [p for teacher in teachers for p in teacher.parameters()]
    pieces = [p.ds_tensor for p in weights if hasattr(p, "ds_tensor")]
    here = sum(x.numel() for x in (*weights, *pieces))
    return here / sum(results._count(teacher) for teacher in teachers)


def everything(world: processes.World, folder: Path) -> dict[Any, Any]:
    """All that is compared, by what it is."""
    found: dict[Any, Any] = {"ranks": world.ranks}
    for layout in LAYOUTS:
        changes = layout_changes(layout)
        for name in (*MODELS, *((*FAMILIES, *CAUSAL) if layout in FAMILY_LAYOUTS else ())):
            run = Run(world, folder / f"{name}.yaml", *changes)
            found[name, *layout] = train_and_score(run)
        if layout[0] > 0:
            bf16 = (*changes, "--precision=bf16")
            found["bf16", *layout] = train_and_score(Run(world, folder / "tied.yaml", *bf16))
            found["sums", *layout] = sums(world, layout)
        gc.collect()  # DeepSpeed collects at every start, ever more slowly
        recipe = folder / "tied.yaml"
        if layout in ((2, "none"), (3, "none"), (1, "optimizer"), (3, "parameters")):
            for precision in ("fp32", "bf16"):
                both = (*changes, f"--precision={precision}")
                found["overflow", precision, *layout] = overflow(world, recipe, *both)
        for precision in ("fp32", "bf16") if layout[0] > 0 else ("fp32",):
            place = folder / f"checkpoints-{world.ranks}-{precision}-{layout[0]}-{layout[1]}"
            both = (*changes, f"--precision={precision}")
            found["resume", precision, *layout] = stop_and_resume(world, recipe, place, *both)
        if layout in FAMILY_LAYOUTS:
            place = folder / f"causal-{world.ranks}-{layout[0]}-{layout[1]}"
            same = stop_and_resume(world, folder / "gpt2.yaml", place, *changes)
            found["resume", "causal", *layout] = same
        place = folder / f"elastic-{world.ranks}-{layout[0]}-{layout[1]}"
        run = Run(world, recipe, *changes)
        run.steps(0, 2)
        save(world, run, place, 2)
        other = folder / f"elastic-{3 - world.ranks}-{layout[0]}-{layout[1]}"
        if other.exists():  # of one process; it comes first
            found["elastic", *layout] = go_on(world, recipe, other, *changes)
        gc.collect()
    for name, offload, precision in SHARDED:
        changes = (*layout_changes((3, offload)), f"--precision={precision}")
        place = folder / f"sharded-{world.ranks}-{name}-{precision}"
        run = sharded(world, folder / f"{name}.yaml", place, *changes)
        found["sharded", name, offload, precision] = run
    return found


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    engine.PERSISTENT = 0
    world = processes.start()
    found = everything(world, folder)
    if world.rank == 0:
        torch.save(found, folder / "ranks.pt")
    processes.finish()


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, teacher: Path, corpus: Path) -> Path:
    import transformers

    folder = tmp_path_factory.mktemp("zero")
    for i in range(2):
        place = make_teacher(folder / f"untied-{i}")
        config = transformers.BertConfig.from_pretrained(place, tie_word_embeddings=False)
        torch.manual_seed(i)
        transformers.BertForMaskedLM(config).save_pretrained(place)
    teachers = {
        "tied": str(teacher),
        "untied": f"[{folder / 'untied-0'}, {{name: {folder / 'untied-1'}, weight: 3.0}}]",
    }
    teachers |= {kind: str(make_family(kind, folder / kind)) for kind in FAMILIES}
    teachers["gpt2"] = str(make_causal(folder / "gpt2", "gpt2"))
    llamas = [
        make_causal(folder / f"llama-{i}", "llama", seed=i, vocab_size=rows)
        for i, rows in enumerate((383, 400))
    ]
    teachers["llama"] = f"[{llamas[0]}, {{name: {llamas[1]}, weight: 3.0}}]"
    for name in teachers:
        tokens = folder / (f"tokens-{name}" if name in (*FAMILIES, *CAUSAL) else "tokens")
        shortest = 3 if name in CAUSAL else 12  # the ends of long texts share a sequence
        text = f"""\
teacher: {teachers[name]}
student: {{dropout: 0}}
data: {{source: {corpus}, prepared: {tokens}, max_length: 24, min_length: {shortest}, heldout: 0.1}}
masking: {{probability: 0.3}}
loss: {{kd_rows: {"masked" if name == "untied" else "all"}}}
optimizer: {{learning_rate: 1.0e-3, max_grad_norm: 1.0, weight_decay: 0.01}}
batch: {{sequences: 16, micro_sequences: 4}}
steps: 10
precision: fp32
output: {folder / "run"}
"""
        (folder / f"{name}.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[Any, Any]:
    """One process. Without offload it is at stage 0 (bf16: 1) whatever is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PERSISTENT", 0)
        return everything(processes.start(), folder)


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[Any, Any]) -> dict[Any, Any]:
    """Two ranks (after ``one``, which has tokenised)."""
    torchrun(__file__, folder, timeout=1200)
    return torch.load(folder / "ranks.pt", weights_only=False)


@pytest.fixture(params=[1, 2], ids=["one process", "two ranks"])
def found(request: pytest.FixtureRequest, one: dict[Any, Any]) -> dict[Any, Any]:
    return one if request.param == 1 else request.getfixturevalue("two")


def distance(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The norm of the difference over the norm, all parameters together."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).double().square().sum()) for name in b)
    return math.sqrt(difference / sum(float(x.double().square().sum()) for x in b.values()))


@pytest.mark.parametrize(
    ("model", "layout"),
    [*product(MODELS, LAYOUTS), *product((*FAMILIES, *CAUSAL), FAMILY_LAYOUTS)],
    ids=str,
)
def test_layout_does_not_change_the_weights(
    found: dict[Any, Any], one: dict[Any, Any], model: str, layout: tuple[int, str]
) -> None:
    """After one, two and three steps: what goes wrong under ZeRO-3 often starts at the second."""
    got, wanted = found[model, *layout], one[model, 0, "none"]
    for a, b in zip(got["weights"], wanted["weights"], strict=True):
        assert distance(a, b) <= 1e-6
    assert distance(wanted["weights"][0], wanted["weights"][2]) > 1e-3
    assert got["values"] == pytest.approx(wanted["values"], rel=1e-6)
    for a, b in zip(got["scores"], wanted["scores"], strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-6)  # a KL is a difference of logarithms


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_layout_changes_bf16_by_its_rounding_alone(
    found: dict[Any, Any], one: dict[Any, Any], layout: tuple[int, str]
) -> None:
    """bf16 itself is 1.6e-3 away from fp32. At stage 3 the backward adds up in another order."""
    got, wanted = found["bf16", *layout], one["bf16", 1, "none"]
    for a, b in zip(got["weights"], wanted["weights"], strict=True):
        assert distance(a, b) <= 5e-4
    assert got["values"] == pytest.approx(wanted["values"], rel=2e-2)
    for a, b in zip(got["scores"], wanted["scores"], strict=True):
        assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=5e-3)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_bf16_sum_loses_nothing(found: dict[Any, Any], layout: tuple[int, str]) -> None:
    """Over micro-batches, and over ranks: 1 + 2^-9 is 1 in bf16."""
    ranks, (micro_batches, across) = found["ranks"], found["sums", *layout]
    assert micro_batches == pytest.approx(ranks, rel=1e-5)
    assert across == pytest.approx(1 + (ranks - 1) * 2**-9, rel=1e-5)


def test_resume_is_to_the_bit(found: dict[Any, Any]) -> None:
    resumed = {key: same for key, same in found.items() if key[0] == "resume"}
    assert len(resumed) == 8 + 7 + len(FAMILY_LAYOUTS)
    assert all(resumed.values()), resumed


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_checkpoint_is_gone_on_with_on_other_ranks(
    folder: Path, one: dict[Any, Any], two: dict[Any, Any], layout: tuple[int, str]
) -> None:
    """Of one process by two ranks, and the other way round, in every layout."""
    wanted = one["tied", 0, "none"]["weights"]  # after one, two, three steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PERSISTENT", 0)
        place = folder / f"elastic-2-{layout[0]}-{layout[1]}"
        run = Run(processes.start(), folder / "tied.yaml", *layout_changes(layout))
        run.engine.restore(Saved(place, 2))
        assert distance(run.weights(), wanted[1]) <= 1e-6
        run.steps(2, 4)
    assert distance(run.weights(), two["elastic", *layout]) <= 1e-6


def test_norm_of_a_large_gradient_is_exact() -> None:
    """On which clipping depends; one by one in fp32, 23 million squares are 1e-3 off on a CPU."""
    torch.manual_seed(0)
    gradients = [torch.randn(30522, 768), torch.randn(5), torch.randn(0), torch.tensor(2.0)]
    wanted = math.sqrt(sum(float(g.double().square().sum()) for g in gradients))
    assert float(engine.total_norm(gradients)) == pytest.approx(wanted, rel=1e-7)


def test_overflow_on_one_rank_reaches_no_weight(found: dict[Any, Any]) -> None:
    stopped = {key: kept for key, kept in found.items() if key[0] == "overflow"}
    assert len(stopped) == 8
    assert all(stopped.values()), stopped


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_sharded_teacher_changes_nothing(found: dict[Any, Any], case: tuple[str, str, str]) -> None:
    sharded, whole = found["sharded", *case]["true"], found["sharded", *case]["false"]
    for a, b in zip(sharded["weights"], whole["weights"], strict=True):
        assert distance(a, b) <= 1e-6
    assert sharded["values"] == pytest.approx(whole["values"], rel=1e-6)
    for a, b in zip(sharded["scores"], whole["scores"], strict=True):
        assert a == pytest.approx(b, rel=1e-6)
    assert sharded["sizes"] == whole["sizes"]


@pytest.mark.parametrize("case", SHARDED, ids=str)
def test_sharded_teacher_is_held_in_parts_and_in_no_checkpoint(
    found: dict[Any, Any], case: tuple[str, str, str]
) -> None:
    sharded, whole = found["sharded", *case]["true"], found["sharded", *case]["false"]
    share = 1 / found["ranks"]
    assert sharded["held"] == pytest.approx([share, share], rel=1e-3)
    assert whole["held"] == [1, 1]
    assert sharded["checkpoint"] == whole["checkpoint"]


def test_ranks_have_different_shares_of_the_heldout_texts(
    folder: Path, one: dict[Any, Any]
) -> None:
    """Or the scores above would not show that the ranks take as many forwards."""
    run = Run(processes.World(0, 1, torch.device("cpu")), folder / "tied.yaml")
    assert len(run.evaluator.batches) % 2 == 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
