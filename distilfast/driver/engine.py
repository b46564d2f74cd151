"""DeepSpeed, made exact: the optimiser step and its state.

Only this module does the following:

- It cancels DeepSpeed's averages over micro-batches and ranks. The losses are already divided by
  the counts of the whole step, so gradients have to be summed.
- It accumulates gradients in fp32 at any precision.
- It keeps DeepSpeed from compiling anything. A first run neither waits for a build nor hangs on a
  stale lock.
- It finds master weights and moments by parameter name in every layout, and restores them into any
  other.
"""

from __future__ import annotations

import contextlib
import functools
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from distilfast import models
from distilfast.config import Config
from distilfast.driver import optimizers
from distilfast.driver.checkpoint import Piece, Saved
from distilfast.driver.processes import World, alone, import_deepspeed
from distilfast.errors import ConfigError
from distilfast.losses import backends

# At ZeRO 3, a weight of at most this many elements stays whole on every rank. DeepSpeed's default.
PERSISTENT = 100_000
NORM_OF = 4096  # elements that are summed in fp32 at a time
MOMENTS = ("exp_avg", "exp_avg_sq")  # torch's names of Adam's moments
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# DeepSpeed must neither print nor measure. Its throughput timer is on by default. From the third
# step on it waits for the GPU in every forward.
QUIET = {"steps_per_print": 2**31, "timers": {"throughput": {"enabled": False}}}


class Engine:
    """A module and its optimiser under DeepSpeed.

    A step is any number of calls of backward(loss), then one of step(rate). ``loss`` is a share of
    the step's loss: gradients add up over micro-batches and ranks. At stages 2 and 3, every rank
    must call backward equally often.
    """

    def __init__(self, module: nn.Module, config: Config, world: World):
        self.config, self.world = config, world
        dtype = DTYPES[config.precision]
        # One process has nothing to partition, and ZeRO would copy every gradient for it. In bf16
        # it uses stage 1 for the fp32 master weights and sums.
        whole = world.ranks == 1 and config.zero.offload == "none"
        self.stage = config.zero.stage if not whole else 0 if dtype == torch.float32 else 1
        # If every rank has the whole fp32 gradient, we reduce, measure and clip it ourselves.
        # DeepSpeed would take its norm in fp32, which on a CPU is off by 1e-3 for an embedding.
        split = self.stage > 1 or config.zero.offload != "none"
        self.whole = self.stage == 0 or (dtype == torch.bfloat16 and not split)
        options = config.optimizer
        ranks = world if self.stage else None
        self.adam = optimizers.make(module, options, ranks)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # required, but of no effect here
            "managed_gradient_accumulation": False,  # we decide when a step ends
            "gradient_clipping": 0.0 if self.whole else options.max_grad_norm,
            "zero_optimization": _partitioning(self.stage, config.zero.offload),
            "bf16": {"enabled": dtype == torch.bfloat16, "immediate_grad_update": False},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own Adam would have to be compiled
            **QUIET,
        }
        self.deepspeed, self.optimizer = _initialize(module, world, settings, self.adam)

        # One process has nothing to send. But at stages 2 and 3, and with offload, the same call
        # also brings gradients to the place where they are added up.
        if self.whole or (world.ranks == 1 and not split):
            self.deepspeed.enable_backward_allreduce = False

        if self.whole and self.stage == 1:
            _sum_in_one_pass(self.optimizer, world.device)

    def __call__(self, *arguments: Any) -> Any:
        # At ZeRO 3, DeepSpeed reads LOCAL_RANK in every forward.
        with alone() if self.stage == 3 else contextlib.nullcontext():
            return self.deepspeed(*arguments)

    @torch.no_grad()
    def predict(self, batch: Any) -> Any:
        """Call the module with a batch alone, in eval mode.

        Collective: every rank must call this equally often, as ZeRO 3 gathers the weights.
        """
        self.deepspeed.eval()
        try:
            return self(batch)
        finally:
            self.deepspeed.train()

    def backward(self, loss: Tensor) -> None:
        # DeepSpeed averages the ranks' gradients; we want their sum.
        self.deepspeed.backward(loss * self.world.ranks, scale_wrt_gas=False)

    def step(self, rate: float) -> float:
        """Apply the gradients and return their norm before clipping. If the norm is not finite,
        nothing is applied (with ZeRO, DeepSpeed ensures this)."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if not self.whole:
            self.deepspeed.step()
            return float(self.deepspeed.get_global_grad_norm())
        if self.stage == 0:
            for weight in self.deepspeed.module.parameters():
                if weight.requires_grad and weight.grad is None:
                    weight.grad = torch.zeros_like(weight)  # as in ZeRO, so that it still decays
        if self.world.ranks > 1:
            self.deepspeed.buffered_allreduce_fallback()
        gradients = self._whole_gradients()
        norm, limit = float(total_norm(gradients)), self.config.optimizer.max_grad_norm
        if math.isfinite(norm):
            if 0 < limit < norm:
                torch._foreach_mul_(gradients, limit / norm)
            self.deepspeed.step()
        return norm

    def _whole_gradients(self) -> list[Tensor]:
        if self.stage == 0:
            named = self.deepspeed.module.parameters()
            return [p.grad for p in named if p.grad is not None]
        gradients: list[Tensor] = self.optimizer.get_grads_for_norm(for_clipping=True)
        return gradients

    def weights(self) -> dict[str, Tensor]:
        """The fp32 weights by name, on the CPU. Collective: every rank must call this."""
        from deepspeed.utils import safe_get_full_fp32_param

        named = self.deepspeed.module.named_parameters(remove_duplicate=False)
        if self.stage == 0:
            return {name: p.detach().float().cpu() for name, p in named}
        return {name: safe_get_full_fp32_param(p).cpu() for name, p in named}

    # --- The state of training, in pieces ---------------------------------------------------------

    def pieces(self) -> list[Piece]:
        """This rank's pieces of the master weights and moments, as views to use between two steps.
        Over all ranks, each element is in exactly one piece."""
        made = []
        for name, at in self._own_slices():
            state = self.adam.state[at.flat]
            tensors = {"weight": at.flat, **{kind: state[kind] for kind in MOMENTS}}
            made.append(Piece(name, at.start, {k: at.of(t) for k, t in tensors.items()}))
        return made

    def piece_bytes(self) -> int:
        """The size of `pieces`, known before the first step creates them."""
        return sum(4 * at.length * (1 + len(MOMENTS)) for _, at in self._own_slices())

    @torch.no_grad()
    def restore(self, saved: Saved) -> None:
        """Restore a saved state of any layout. The engine must not have taken a step yet.

        Raises:
            ConfigError: the saved state has other parameters.
        """
        named = self.deepspeed.module.named_parameters()
        sizes = {n: getattr(p, "ds_numel", p.numel()) for n, p in named if p.requires_grad}
        if differing := sorted({name for name, _ in sizes.items() ^ saved.sizes.items()}):
            raise ConfigError(
                f"resume: expected the parameters of this student in {str(saved.path)!r}, got "
                f"others: {', '.join(differing)}"
            )
        for name, _, at in self._slices():
            if at.flat not in self.adam.state:
                zeros = {kind: torch.zeros_like(at.flat) for kind in MOMENTS}
                step = torch.tensor(float(saved.step), device=at.flat.device)
                self.adam.state[at.flat] = {"step": step, **zeros}
            tensors = {"weight": at.flat, **self.adam.state[at.flat]}
            for kind in ("weight", *MOMENTS):
                at.of(tensors[kind]).copy_(saved.read(name, kind, at.start, at.start + at.length))
        # Except at stage 0, the weights that the module computes with are copies of the masters.
        for name, weight in self.deepspeed.module.named_parameters():
            if not weight.requires_grad:
                continue
            if self.stage == 3:
                _set_partition(weight, saved, name)
            if self.stage < 3 or weight.numel() == weight.ds_numel:
                weight.copy_(saved.read(name, "weight", 0, weight.numel()).view_as(weight))

    def _own_slices(self) -> list[tuple[str, Slice]]:
        slices = [(name, at) for name, _, at in self._slices()]
        if self.stage > 0:
            return slices
        # Every rank holds everything, so each saves a share of every parameter.
        rank, ranks = self.world.rank, self.world.ranks
        shares = []
        for name, at in slices:
            start, stop = at.length * rank // ranks, at.length * (rank + 1) // ranks
            if start < stop:
                shares.append((name, Slice(at.flat, start, stop - start, start)))
        return shares

    def _slices(self) -> Iterator[tuple[str, nn.Parameter, Slice]]:
        """Each trained parameter that this rank has optimiser state of, and that state's place."""
        zero = self.deepspeed.optimizer
        for name, weight in self.deepspeed.module.named_parameters():
            if not weight.requires_grad:
                continue
            if self.stage == 0:
                yield name, weight, Slice(weight, 0, weight.numel(), 0)
            elif self.stage == 3:
                group, offset, length = zero.grad_position[zero.get_param_id(weight)]
                start = length * self.world.rank
                length = min(length, weight.ds_numel - start)  # the rest is padding
                if length > 0:
                    flat = zero.fp32_partitioned_groups_flat[group]
                    yield name, weight, Slice(flat, offset, length, start)
            elif (link := weight._hp_mapping) is not None:
                flat = self.adam.param_groups[link.param_group_index]["params"][0]
                at = link.hp_fragment_address
                yield name, weight, Slice(flat, at.start, at.numel, link.lp_fragment_address.start)


@dataclass(frozen=True)
class Slice:
    """The place of a parameter's elements in one of the tensors that the optimiser updates."""

    flat: Tensor  # master weights, fp32
    offset: int  # of the first element in flat
    length: int
    start: int  # of the first element in the flattened parameter

    def of(self, tensor: Tensor) -> Tensor:
        """The elements, 1-D, of ``flat`` or of another tensor of its shape."""
        return tensor.detach().view(-1)[self.offset : self.offset + self.length]


def _set_partition(weight: Any, saved: Saved, name: str) -> None:
    """Restore this rank's part of a weight that ZeRO 3 has partitioned."""
    part = weight.ds_tensor
    start = part.ds_numel * torch.distributed.get_rank()
    length = min(part.ds_numel, weight.ds_numel - start)
    if length > 0:
        part.data.view(-1)[:length].copy_(saved.read(name, "weight", start, start + length))


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients together, 0-d fp64, computed from fp32 norms of pieces.

    On a CPU, PyTorch adds one by one in fp32: its norm of 23 million normal numbers is off by
    1.3e-3. On a GPU, PyTorch sums in pieces itself and takes the norms of all tensors at once.
    """
    if gradients[0].is_cuda:
        return torch.stack(torch._foreach_norm(list(gradients))).double().norm()
    norms = []
    for gradient in gradients:
        flat = gradient.detach().flatten()
        rows = flat[: len(flat) // NORM_OF * NORM_OF].view(-1, NORM_OF)
        norms += [rows.norm(dim=1), flat[rows.numel() :].norm()[None]]
    return torch.cat(norms).double().norm()


def shard(module: nn.Module, config: Config, world: World) -> Callable[..., Any]:
    """Partition a frozen module over the ranks as in ZeRO 3, and return its forward.

    The forward is collective: every rank must call it equally often, as it gathers each layer's
    weights in turn.
    """
    partitioning = _partitioning(3, config.zero.offload)
    partitioning.pop("offload_optimizer", None)  # a frozen module has no optimiser
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # required, but of no effect here
        "zero_optimization": partitioning,
        "bf16": {"enabled": config.precision == "bf16"},
        **QUIET,
    }
    sharded, _ = _initialize(module, world, settings)

    def forward(*arguments: Any) -> Any:
        with alone():  # as in Engine.__call__
            return sharded(*arguments)

    return forward


def _initialize(
    module: nn.Module,
    world: World,
    settings: dict[str, Any],
    optimizer: torch.optim.Optimizer | None = None,
) -> tuple[Any, Any]:
    """Make DeepSpeed's engine and its optimiser."""
    deepspeed = import_deepspeed()
    # It prints its memory use again and again, and imports modules that warn of being deprecated.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with alone(), quiet, warnings.catch_warnings(), models.kept_buffers(module):
        warnings.simplefilter("ignore", DeprecationWarning)
        engine, wrapped, _, _ = deepspeed.initialize(
            model=module.to(world.device),
            optimizer=optimizer,
            config=settings,
            dist_init_required=False,
        )
    return engine, wrapped


def _sum_in_one_pass(optimizer: Any, device: torch.device) -> None:
    """Make DeepSpeed's bf16 optimiser add gradients to the fp32 sums in one pass. By itself it
    first copies each gradient to fp32."""
    if device.type == "cuda":
        optimizer.update_hp_grads = functools.partial(_add_gradients, optimizer)
        return
    accumulate = backends.BACKENDS[backends.choose("auto", device, ())].accumulate

    def add(weight: nn.Parameter, group: int, index: int, clear: bool) -> None:
        assert not clear  # backward() drops the gradient before the next one
        if weight.grad is None:
            return
        share, total = weight.grad.contiguous(), optimizer.fp32_groups_gradients[group][index]
        share = share if share.ndim == 2 else share.view(1, -1)
        accumulate(total.view_as(share), share, True)
        weight._hp_grad = total  # type: ignore[attr-defined]
        optimizer.fp32_groups_has_gradients[group][index] = True

    optimizer._update_hp_grad = add


@torch.no_grad()
def _add_gradients(optimizer: Any, clear_lp_grads: bool = False) -> None:
    """Add the gradients of all weights to their sums, in one call.

    If Python added them one by one, the GPU would wait for Python. The kernel converts to fp32 as
    it adds. The gradients are then dropped. DeepSpeed would set them to 0, and the next backward
    would have to add to them.
    """
    sums, shares = [], []
    for group, weights in enumerate(optimizer.bf16_groups):
        for index, weight in enumerate(weights):
            if weight.grad is None:
                continue
            weight._hp_grad = optimizer.fp32_groups_gradients[group][index]
            optimizer.fp32_groups_has_gradients[group][index] = True
            sums.append(weight._hp_grad.view_as(weight))
            shares.append(weight.grad)
            weight.grad = None
    if sums:
        torch._foreach_add_(sums, shares)


def _partitioning(stage: int, offload: str) -> dict[str, Any]:
    """DeepSpeed's setting zero_optimization."""
    settings: dict[str, Any] = {"stage": stage}
    if stage == 3:
        settings["stage3_param_persistence_threshold"] = PERSISTENT
    if offload != "none":
        settings["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters":
        settings["offload_param"] = {"device": "cpu"}
    return settings
