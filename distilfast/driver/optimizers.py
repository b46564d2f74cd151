"""Optimisers and the learning rate's schedule.

LAMB needs the norm of each matrix. But ZeRO gives an optimiser flat slices, one for each parameter
group and rank, and an ordinary LAMB would take the norms of those without an error. Here each
matrix has its own group, so a slice belongs to one matrix. The squares are summed over the ranks.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from distilfast.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The rate of a step (0, 1, ...): a pure function, so resuming needs no scheduler state."""
    warmup = round(config.warmup_ratio * steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / (warmup + 1)
    if config.decay == "constant":
        return config.learning_rate
    return config.learning_rate * (steps - step) / max(1, steps - warmup)


class Ranks(Protocol):
    """The processes among which each parameter is sliced, in the order of their ranks."""

    @property
    def rank(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def sum(self, values: Tensor) -> Tensor:
        """The sum of ``values`` over all ranks. They must be on ``device``."""


def make(
    module: nn.Module, config: OptimizerConfig, ranks: Ranks | None = None
) -> torch.optim.Optimizer:
    """Make the optimiser of a module's trainable parameters.

    Args:
        module: the module, not yet partitioned.
        config: the optimiser and its constants. Before each step, set the rate in every group.
        ranks: the ranks over which ZeRO will partition the parameters; None: they stay whole.
    """
    rate, betas, eps = config.learning_rate, config.betas, config.epsilon
    groups = _groups(module, config.weight_decay)
    if config.name == "lamb":
        return Lamb(_a_group_a_matrix(groups), lr=rate, betas=betas, eps=eps, ranks=ranks)
    return torch.optim.AdamW(groups, lr=rate, betas=betas, eps=eps, fused=True)


def _groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Group parameters by weight decay. Vectors (biases, LayerNorms) have none."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _a_group_a_matrix(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put each matrix into its own group, with its size, as a padded slice does not show it. The
    vectors are not adapted and share a group of size None."""
    split: list[dict[str, Any]] = []
    for group in groups:
        if group["params"][0].ndim > 1:
            split += [{**group, "params": [p], "numel": p.numel()} for p in group["params"]]
        else:
            split.append({**group, "numel": None})
    return split


class Lamb(torch.optim.AdamW):
    """LAMB: You et al. 2020, arXiv:1904.00962, algorithm 2, with phi(x) = x.

    Let u be a matrix w's AdamW direction with the decay added. The matrix takes a step of
    ``lr * |w| / |u|`` times u, or of ``lr`` times u if w or u is 0. Vectors take AdamW's steps, as
    in the authors' code. The state and its names are AdamW's. A step needs memory for one more copy
    of the parameters that it updates.

    Args:
        groups: parameter groups with the key numel: the number of elements of the group's one
            matrix, or None for parameters that are not adapted.
        ranks: the ranks that each hold a slice of every parameter; None: parameters are whole.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        ranks: Ranks | None = None,
    ):
        super().__init__(groups, lr=lr, betas=betas, eps=eps, fused=True)
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step of the groups that hold parameters. DeepSpeed may empty the others and call
        this several times. Collective: all ranks must step the same groups, even if a slice is only
        padding."""
        held = [
            (group, parameter, parameter.data)
            for group in self.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        # From zero weights, at a rate of -1, AdamW's result is its direction, without rounding.
        groups = self.param_groups
        self.param_groups = [{**group, "lr": -1.0, "weight_decay": 0.0} for group in groups]
        for _, parameter, weight in held:
            parameter.data = torch.zeros_like(weight)
        try:
            super().step()
            updates = [parameter.data for _, parameter, _ in held]
        finally:
            self.param_groups = groups
            for _, parameter, weight in held:
                parameter.data = weight

        for (group, _, weight), update in zip(held, updates, strict=True):
            update.add_(weight, alpha=group["weight_decay"])
        adapted = [
            (self._own(weight, group["numel"]), self._own(update, group["numel"]))
            for (group, _, weight), update in zip(held, updates, strict=True)
            if group["numel"]
        ]
        ratios = iter(self._trust_ratios(adapted))
        for (group, _, weight), update in zip(held, updates, strict=True):
            if group["numel"]:
                update *= next(ratios)
            weight.sub_(update, alpha=group["lr"])

    def _trust_ratios(self, adapted: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
        """|w| / |u| of each pair, 0-d; 1 where either is 0."""
        if not adapted:
            return []
        # Not vector_norm: on a CPU it adds one by one, 1.5e-3 off for 30,522 x 768 elements.
        squares = torch.stack([x.square().sum() for pair in adapted for x in pair])
        if self.ranks is not None:
            squares = self.ranks.sum(squares.to(self.ranks.device)).to(squares.device)
        weight, update = squares.sqrt().view(-1, 2).unbind(1)
        one = torch.ones_like(weight)
        return list(torch.where((weight > 0) & (update > 0), weight / update, one).unbind())

    def _own(self, tensor: Tensor, numel: int) -> Tensor:
        """A slice without its padding. At ZeRO 3, the padding is uninitialised memory."""
        if self.ranks is None:
            return tensor
        return tensor[: max(0, numel - self.ranks.rank * len(tensor))]
