"""LAMB against the paper, against another implementation, and under every ZeRO stage; the schedule.

This file is also the program of the two ranks, which go through all layouts in one launch.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_optimizer
import torch
from launches import torchrun
from torch import Tensor, nn

from distilfast import config as configs
from distilfast.config import OptimizerConfig
from distilfast.driver import engine, optimizers, processes

STEPS = 4
LAYOUTS = [
    *((stage, "none", "fp32") for stage in range(4)),
    *((stage, "none", "bf16") for stage in (1, 2, 3)),
    *((stage, "optimizer", dtype) for stage in (1, 2, 3) for dtype in ("fp32", "bf16")),
    *((3, "parameters", dtype) for dtype in ("fp32", "bf16")),
]
LAMB = OptimizerConfig(
    name="lamb",
    learning_rate=0.02,
    weight_decay=0.1,
    betas=(0.8, 0.9),
    warmup_ratio=0.3,
    max_grad_norm=1.0,  # the first gradient is smaller, the last is a hundred times as large
)
SHAPES = {
    "large": (7, 5),  # of an odd size: the last rank's slice is padded
    "one": (1, 1),  # of which one of two ranks holds padding alone
    "zero": (3, 4),
    "vector": (6,),
    "single": (1,),
}
PARTS = 4  # micro-batches of a step, all ranks together


class Given(nn.Module):
    """Whose gradient is what is asked for, by name. Halves of a weight have norms far apart."""

    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        for name, shape in SHAPES.items():
            weight = torch.randn(shape, generator=g).bfloat16().float()  # no precision rounds it
            if name in ("large", "zero"):
                weight[: len(weight) // 2] *= 0 if name == "zero" else 16
                weight[len(weight) // 2 :] *= 0 if name == "zero" else 1
            setattr(self, name, nn.Parameter(weight))

    def forward(self, gradients: dict[str, Tensor]) -> Tensor:
        return sum((getattr(self, n).float() * gradients[n]).sum() for n in SHAPES)


def gradients(step: int) -> list[dict[str, Tensor]]:
    """Of the micro-batches of a step, in bf16's numbers, small and large."""
    g = torch.Generator().manual_seed(step + 1)
    return [
        {
            name: (torch.randn(shape, generator=g) * 10 ** (step - 2)).bfloat16().float()
            for name, shape in SHAPES.items()
        }
        for _ in range(PARTS)
    ]


def textbook(config: OptimizerConfig) -> dict[str, Tensor]:
    """Algorithm 2 of the paper in float64, after clipping to a global norm; vectors take Adam's
    step without decay."""
    weights = {n: w.detach().double() for n, w in Given().named_parameters()}
    first = {n: torch.zeros_like(w) for n, w in weights.items()}
    second = {n: torch.zeros_like(w) for n, w in weights.items()}
    beta1, beta2 = config.betas
    for t in range(1, STEPS + 1):
        parts = gradients(t - 1)
        summed = {n: sum(part[n].double() for part in parts) for n in weights}
        norm = math.sqrt(sum(float(g.square().sum()) for g in summed.values()))
        clip = min(1.0, config.max_grad_norm / norm) if config.max_grad_norm else 1.0
        rate = optimizers.learning_rate(config, t - 1, STEPS)
        for n, w in weights.items():
            g = summed[n] * clip
            first[n] = beta1 * first[n] + (1 - beta1) * g
            second[n] = beta2 * second[n] + (1 - beta2) * g**2
            m, v = first[n] / (1 - beta1**t), second[n] / (1 - beta2**t)
            u = m / (v.sqrt() + config.epsilon)
            ratio = 1.0
            if w.ndim > 1:
                u = u + config.weight_decay * w
                ratio = float(w.norm() / u.norm()) or 1.0
            weights[n] = w - rate * ratio * u
    return weights


def train(world: processes.World, layout: tuple[int, str, str]) -> dict[str, Any]:
    """The weights after STEPS steps, and whether one more on an infinite gradient of the last rank
    keeps them."""
    stage, offload, precision = layout
    config = configs.Config(
        optimizer=LAMB,
        batch=configs.BatchConfig(sequences=PARTS, micro_sequences=1),
        zero=configs.ZeroConfig(stage, offload),
        precision=precision,
        steps=STEPS,
    )
    runner = engine.Engine(Given(), config, world)
    if runner.stage == 3:
        spoil_padding(runner.optimizer, world)
    for step in range(STEPS):
        for part in gradients(step)[world.rank :: world.ranks]:
            runner.backward(runner(part))
        runner.step(optimizers.learning_rate(config.optimizer, step, STEPS))
    weights = {name: weight.clone() for name, weight in runner.weights().items()}
    for part in gradients(STEPS)[world.rank :: world.ranks]:
        if world.rank == world.ranks - 1:
            part["large"][0, 0] = math.inf
        runner.backward(runner(part))
    norm, after = runner.step(0.1), runner.weights()
    kept = all(torch.equal(after[name], weights[name]) for name in weights)
    return {"weights": weights, "stopped": kept and not math.isfinite(norm)}


def spoil_padding(partitioned: Any, world: processes.World) -> None:
    """At stage 3 DeepSpeed leaves it as memory comes: NaN, at worst."""
    slices = partitioned.fp32_partitioned_groups_flat
    for piece, group in zip(slices, partitioned.fp16_groups, strict=True):
        if len(group) == 1:
            piece.data[max(0, group[0].ds_numel - world.rank * len(piece)) :] = math.nan


def everything(world: processes.World) -> dict[Any, Any]:
    return {layout: train(world, layout) for layout in LAYOUTS}


def main(folder: Path) -> None:
    warnings.simplefilter("error")
    engine.PERSISTENT = 0
    world = processes.start()
    found = everything(world)
    if world.rank == 0:
        torch.save(found, folder / "ranks.pt")
    processes.finish()


# --- Under ZeRO -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one() -> dict[Any, Any]:
    """One process. Without offload it is at stage 0 (bf16: 1) whatever is asked for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "PERSISTENT", 0)
        return everything(processes.start())


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    folder = tmp_path_factory.mktemp("ranks")
    assert "untested" not in torchrun(__file__, folder)
    return torch.load(folder / "ranks.pt", weights_only=False)


@pytest.fixture(params=[1, 2], ids=["one process", "two ranks"])
def found(request: pytest.FixtureRequest) -> dict[Any, Any]:
    return request.getfixturevalue("one" if request.param == 1 else "two")


def distance(a: Tensor, b: Tensor) -> float:
    """The norm of the difference over the norm."""
    return float((a - b).norm() / b.norm())


@pytest.mark.thorough
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_layout_does_not_change_lamb(found: dict[Any, Any], layout: tuple[int, str, str]) -> None:
    """Each weight by itself: the norms of a slice, or of a slice and its padding, would show."""
    wanted = textbook(LAMB)
    for name, weight in found[layout]["weights"].items():
        assert distance(weight, wanted[name]) <= 1e-6, name


@pytest.mark.thorough
def test_clipping_matters_to_lamb() -> None:
    """Or the test above would not show that it is done."""
    free = textbook(dataclasses.replace(LAMB, max_grad_norm=0.0))
    assert distance(free["large"], textbook(LAMB)["large"]) > 1e-3


@pytest.mark.thorough
def test_infinite_gradient_on_one_rank_reaches_no_weight(found: dict[Any, Any]) -> None:
    stopped = {key: run["stopped"] for key, run in found.items()}
    assert all(stopped.values()), stopped


# --- The optimiser alone --------------------------------------------------------------------------


def test_lamb_equals_another_implementation() -> None:
    """pytorch_optimizer's, which leaves out Adam's bias correction: of a direction without decay
    the trust ratio takes any factor out again, and the decay is given with that factor."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(20, 30, generator=g)
    a, b = nn.ParameterList([start.clone()]), nn.Parameter(start.clone())
    config = OptimizerConfig(name="lamb", weight_decay=0.1, epsilon=1e-12)
    ours = optimizers.make(a, config)

    class Unclamped(pytorch_optimizer.Lamb):
        clamp = math.inf

    (beta1, beta2), options = config.betas, {"weight_decouple": False, "adam_debias": True}
    theirs = Unclamped([b], betas=config.betas, eps=1e-12, foreach=False, **options)
    for step in range(1, 11):
        a[0].grad = torch.randn(20, 30, generator=g)
        b.grad = a[0].grad.clone()
        (group,) = theirs.param_groups
        group["weight_decay"] = 0.1 * (1 - beta1**step) / math.sqrt(1 - beta2**step)
        ours.param_groups[0]["lr"] = group["lr"] = 0.1 / step
        ours.step()
        theirs.step()
    assert distance(a[0].detach(), start) > 0.1
    assert distance(a[0].detach(), b.detach()) <= 1e-6


def test_lamb_without_a_norm_takes_adams_step() -> None:
    """A weight of 0 moves by the rate; without gradient and decay nothing moves, or is NaN."""
    module = nn.ParameterDict({"zero": torch.zeros(2, 3), "still": torch.ones(2, 3)})
    lamb = optimizers.make(module, OptimizerConfig(name="lamb", learning_rate=0.5, epsilon=1e-9))
    module["zero"].grad = torch.full((2, 3), -7.0)
    module["still"].grad = torch.zeros(2, 3)
    lamb.step()
    torch.testing.assert_close(module["zero"].detach(), torch.full((2, 3), 0.5))
    assert torch.equal(module["still"], torch.ones(2, 3))


def test_lambs_state_is_adamws() -> None:
    """Checkpoints store it by name."""
    lamb = optimizers.make(Given(), LAMB)
    for group in lamb.param_groups:
        for weight in group["params"]:
            weight.grad = torch.ones_like(weight)
    before = [group.copy() for group in lamb.param_groups]
    lamb.step()
    assert lamb.param_groups == before
    assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in lamb.state.values())
    assert all(state["step"] == 1 for state in lamb.state.values())


def test_norm_of_a_large_matrix_is_right() -> None:
    """fp32 sums that add one by one are 1.5e-3 off here."""
    weight = torch.rand(30522, 768, generator=torch.Generator().manual_seed(0))
    module = nn.ParameterList([weight.clone()])
    module[0].grad = torch.ones_like(weight)
    lamb = optimizers.make(module, OptimizerConfig(name="lamb", learning_rate=1.0, epsilon=1e-12))
    lamb.step()
    ratio = weight.double().norm() / math.sqrt(weight.numel())
    moved = (weight - module[0].detach()).double().mean()
    assert float(moved) == pytest.approx(float(ratio), rel=1e-6)


# --- The learning rate ----------------------------------------------------------------------------


def rates(steps: int, **settings: Any) -> list[float]:
    config = OptimizerConfig(learning_rate=1.0, **settings)
    return [optimizers.learning_rate(config, i, steps) for i in range(steps)]


def test_learning_rate_equals_hand_value() -> None:
    """Three steps of warm-up rise in quarters; seven steps fall in sevenths."""
    wanted = [1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7]
    assert rates(10, warmup_ratio=0.3) == pytest.approx(wanted)
    wanted = [1 / 4, 2 / 4, 3 / 4] + 7 * [1.0]
    assert rates(10, warmup_ratio=0.3, decay="constant") == pytest.approx(wanted)
    assert rates(4, warmup_ratio=0.0) == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4])
    assert rates(1, warmup_ratio=0.05) == [1.0]


@pytest.mark.parametrize("steps", [1, 2, 7, 100, 1000])
@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.5, 0.99])
def test_learning_rate_rises_and_falls_to_zero(warmup: float, steps: int) -> None:
    config = OptimizerConfig(learning_rate=3e-4, warmup_ratio=warmup)
    made = [optimizers.learning_rate(config, i, steps) for i in range(steps)]
    assert all(0 < rate <= 3e-4 * (1 + 1e-12) for rate in made)
    assert optimizers.learning_rate(config, steps, steps) == 0
    peak = made.index(max(made))
    assert peak == pytest.approx(min(warmup * steps, steps - 1), abs=0.5 + 1e-9)
    assert made[: peak + 1] == sorted(made[: peak + 1])
    assert made[peak:] == sorted(made[peak:], reverse=True)


def test_learning_rate_is_that_of_the_recipe() -> None:
    made = rates(1000)  # 5 % of warm-up, linear decay
    assert made[50] == 1.0
    assert max(made[:50]) < 1
    assert made[25] == pytest.approx(26 / 51)
    assert made[525] == pytest.approx(0.5)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
