"""The driver beside DeepSpeed's CUDA accelerator, where there is no GPU.

DeepSpeed takes other paths on a GPU: streams, events, pinned memory, its own list of operators.
Here it is told that it has one, whose tensors are the CPU's and whose streams do nothing, and every
layout takes its steps. An operator that would be compiled, and any program that would be started to
find out, is an error. This file is also the program of the two ranks.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from launches import torchrun
from torch import Tensor, nn

from distilfast import config as configs
from distilfast.driver import engine, processes

pytestmark = pytest.mark.thorough

LAYOUTS = [
    *((stage, "none") for stage in range(4)),
    *((stage, "optimizer") for stage in (1, 2, 3)),
    (3, "parameters"),
]
CASES = [
    (*layout, precision)
    for layout in LAYOUTS
    for precision in ("fp32", "bf16")
    if layout[0] > 0 or precision == "fp32"
]
done: Counter[str] = Counter()  # what the accelerator was asked for


class Small(nn.Module):
    """Of a table, a matrix and vectors; the loss of some tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(40, 16), nn.LayerNorm(16), nn.Linear(16, 40)

    def forward(self, tokens: Tensor) -> Tensor:
        logits = self.head(self.norm(self.table(tokens))).float()
        return nn.functional.cross_entropy(logits.flatten(0, 1), tokens.roll(1).flatten())


class Stream:
    """One that is never behind."""

    def __init__(self, *_: Any, **__: Any) -> None:
        done["streams"] += 1

    def query(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        if name not in ("wait_stream", "wait_event", "record", "record_event", "synchronize"):
            raise AttributeError(name)
        done[f"{name} of a stream or event"] += 1
        return lambda *_: None


@contextlib.contextmanager
def nothing(*_: Any) -> Iterator[None]:
    yield


def pretend() -> None:
    """DeepSpeed's CUDA accelerator, with the CPU in the place of the GPU."""
    os.environ["DS_ACCELERATOR"] = "cuda"
    import deepspeed
    from deepspeed.accelerator import get_accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.ops.op_builder import builder

    cpu, only = torch.device("cpu"), Stream()

    def pin(_: Any, tensor: Tensor) -> Tensor:
        done["pinned"] += 1
        return tensor

    def refuse(self: Any, *_: Any, **__: Any) -> None:
        raise AssertionError(f"{self!r} is asked for")

    answers: dict[str, Any] = {
        "is_available": lambda _: True,
        "is_bf16_supported": lambda _: True,
        "device_count": lambda _: 1,
        "current_device": lambda _: 0,
        "set_device": lambda *_: None,
        "device": lambda *_: cpu,
        "device_name": lambda *_: "cpu",
        "current_device_name": lambda _: "cpu",
        "communication_backend_name": lambda _: "gloo",
        "on_accelerator": lambda *_: True,
        "available_memory": lambda *_: 2**40,
        "reset_peak_memory_stats": lambda *_: None,
        "synchronize": lambda *_: done.update(["synchronize"]),
        "Stream": Stream,
        "Event": Stream,
        "stream": nothing,
        "current_stream": lambda *_: only,
        "default_stream": lambda *_: only,
        "range_push": lambda *_, **__: None,
        "range_pop": lambda *_, **__: None,
        "_torch_pin_memory": pin,
        **{
            f"{kind}Tensor": functools.partial(torch.tensor, dtype=dtype)
            for kind, dtype in (("Float", torch.float32), ("Byte", torch.uint8))
        },
    }
    accelerator = get_accelerator()
    assert type(accelerator) is CUDA_Accelerator
    for name, answer in answers.items():
        assert hasattr(accelerator, name), name
        setattr(CUDA_Accelerator, name, answer)
    Tensor.record_stream = lambda *_: done.update(["record_stream"])  # type: ignore[method-assign]
    builder.OpBuilder.load = builder.OpBuilder.jit_load = refuse
    subprocess.Popen.__init__ = refuse  # type: ignore[method-assign]
    with pytest.raises(AssertionError, match="is asked for"):
        accelerator.create_op_builder("FusedAdamBuilder").load()
    # What it does for a GPU alone when an engine is made.
    assert deepspeed.runtime.engine.is_deepcompile_supported is not None
    deepspeed.runtime.engine.is_deepcompile_supported = lambda: True


def train(world: processes.World, stage: int, offload: str, precision: str) -> dict[str, Any]:
    """Three steps of two micro-batches, each rank its own: norms, weights, what the accelerator was
    asked for, and that of the last step."""
    torch.manual_seed(0)
    done.clear()
    config = configs.Config(
        batch=configs.BatchConfig(sequences=4, micro_sequences=1),
        optimizer=configs.OptimizerConfig(learning_rate=1e-2, max_grad_norm=0.5),
        zero=configs.ZeroConfig(stage, offload),
        precision=precision,
        steps=3,
    )
    runner = engine.Engine(Small(), config, world)
    norms = []
    for step in range(3):
        before = Counter(done)
        for i in range(2):
            generator = torch.Generator().manual_seed(100 * step + 10 * i + world.rank)
            runner.backward(runner(torch.randint(40, (2, 8), generator=generator)) / 4)
        norms.append(runner.step(1e-2))
    asked = {"asked": dict(done), "last": dict(done - before)}
    return {"norms": norms, "weights": runner.weights(), **asked}


def main(folder: Path, accelerator: str) -> None:
    warnings.simplefilter("error")
    if accelerator == "cuda":
        pretend()
    engine.PERSISTENT = 0
    world = processes.start()
    found: dict[Any, Any] = {case: train(world, *case) for case in CASES}
    if world.rank == 0:
        torch.save(found, folder / f"{accelerator}.pt")
    processes.finish()


# --- The tests ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[Any, Any]]:
    """What two ranks find, by accelerator."""
    folder, results = tmp_path_factory.mktemp("rehearsal"), {}
    for accelerator in ("cpu", "cuda"):
        torchrun(__file__, folder, accelerator, CUDA_VISIBLE_DEVICES="")
        file = folder / f"{accelerator}.pt"
        results[accelerator] = torch.load(file, weights_only=False)
    return results


@pytest.mark.parametrize("case", CASES, ids=str)
def test_paths_of_a_gpu_compile_nothing_and_give_the_same_bits(
    found: dict[str, dict[Any, Any]], case: tuple[int, str, str]
) -> None:
    one, other = found["cpu"][case], found["cuda"][case]
    assert one["norms"] == other["norms"]
    for name, weight in one["weights"].items():
        assert torch.equal(weight, other["weights"][name]), name


def test_gpus_paths_were_taken(found: dict[str, dict[Any, Any]]) -> None:
    """Or the test above would tell nothing: streams, events, pinned memory."""
    assert not any(one["asked"] for one in found["cpu"].values())
    uses: Counter[str] = Counter()
    for one in found["cuda"].values():
        uses.update(one["asked"])
    assert {"streams", "record_stream", "pinned", "wait_stream of a stream or event"} <= uses.keys()


def test_nothing_waits_for_all_of_the_gpu(found: dict[str, dict[Any, Any]]) -> None:
    """DeepSpeed's throughput timer would, twice a micro-batch, from the third step on."""
    for stage, offload, precision in CASES:
        if stage < 3 and offload == "none":
            asked = found["cuda"][stage, offload, precision]["last"]
            assert not any("synchronize" in what for what in asked), (stage, precision, asked)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
