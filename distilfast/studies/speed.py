"""Measures time and memory of models, each in its own process, in turn.

Every model in every mode has its own process, so that its peak memory can be told apart. The
processes of one mode are alive together and measured one at a time, so that a noisy machine affects
all alike. A time is wall clock until the result is there.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import multiprocessing
import signal
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distilfast import models
from distilfast.progress import Bar
from distilfast.studies.sizes import MIB, Candidate

log = logging.getLogger("distilfast.studies.speed")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TEXTS_A_TURN = 32
WARM_UP = 2  # calls; the first one compiles
START_STEPS = 10  # steps of the progress bar for a start, which takes seconds; a turn is one step
ENDING_S = 10.0


@dataclass(frozen=True)
class Mode:
    """How a model is run."""

    precision: str
    compiled: bool

    def __str__(self) -> str:
        return f"{self.precision}, torch.compile" if self.compiled else self.precision


@dataclass(frozen=True)
class Plan:
    """The settings of the measurements."""

    device: str
    threads: int
    batches: list[int]
    sequence_length: int
    rounds: int


# A request to a process. None: load the model and return its memory. A batch size, or a range of
# texts: return the time that they take.
Request = int | range | None


class MeasurementError(RuntimeError):
    """A measurement failed; the message says which and why, in one line."""


def work(pipe: Connection, candidate: Candidate, mode: Mode, plan: Plan) -> None:
    """Answer requests until the parent closes the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    runner = Runner(candidate, mode, plan)
    try:
        while True:
            request = pipe.recv()
            pipe.send(runner.start() if request is None else runner.time_ms(request))
    except (EOFError, ConnectionError):
        return
    except Exception as error:
        text = " ".join(str(error).split())
        pipe.send(MeasurementError(f"{type(error).__name__}: {text[:200]}"))


class Runner:
    """One model in one mode."""

    def __init__(self, candidate: Candidate, mode: Mode, plan: Plan):
        self.candidate, self.mode, self.plan = candidate, mode, plan
        self.device = torch.device(plan.device)

    def start(self) -> dict[str, Any]:
        """Load and warm up the model; return all figures except times."""
        import transformers

        torch.set_num_threads(self.plan.threads)
        if self.mode.compiled:
            importlib.import_module("torch._inductor.compile_fx")
        _ = transformers.MODEL_MAPPING[type(self.candidate.config)]  # imports the model's code
        before = resident_mib("VmRSS")
        with models.quiet():
            model = self.candidate.build().eval()
        models.cast(model, self.device, DTYPES[self.mode.precision])
        for parameter in model.parameters():
            # Loaded weights are mapped from their file. Such pages do not count as this process's
            # memory, and are read from disk only at their first use.
            parameter.data = parameter.data.clone()
        self.model = torch.compile(model, dynamic=False) if self.mode.compiled else model
        rows = model.get_input_embeddings().num_embeddings
        generator = torch.Generator().manual_seed(0)
        self.batches = {
            batch: torch.randint(rows, (batch, self.plan.sequence_length), generator=generator)
            for batch in self.plan.batches
        }
        self.texts = [torch.tensor([ids]) for ids in self.candidate.texts]
        first_call_s, peak_mib = {}, {}
        for batch, input_ids in self.batches.items():
            began = time.perf_counter()
            self.forward(input_ids)
            first_call_s[batch] = time.perf_counter() - began
            for _ in range(WARM_UP - 1):
                self.forward(input_ids)
            peak_mib[batch] = self.peak_mib(input_ids, before)
        return {
            "attention": model.config._attn_implementation,
            "first_call_s": first_call_s,
            "peak_mib": peak_mib,
        }

    @torch.inference_mode()
    def forward(self, input_ids: Tensor) -> None:
        """Run one pass of (B, L) token ids, and wait for its result."""
        input_ids = input_ids.to(self.device)
        self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time_ms(self, request: int | range) -> float:
        """Time one pass of a batch, or a pass over each of the texts."""
        inputs = (
            [self.batches[request]]
            if isinstance(request, int)
            else [self.texts[i] for i in request]
        )
        self.forward(inputs[0])  # refill the caches, which another process has used meanwhile
        began = time.perf_counter()
        for input_ids in inputs:
            self.forward(input_ids)
        return (time.perf_counter() - began) * 1e3

    def peak_mib(self, input_ids: Tensor, before: float | None) -> float | None:
        """Return the peak memory of a pass, weights included, above ``before``."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.forward(input_ids)
            return torch.cuda.max_memory_allocated() / MIB
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
            self.forward(input_ids)
            peak = resident_mib("VmHWM")
            return None if peak is None or before is None else peak - before
        return None


def resident_mib(key: str) -> float | None:
    """Return this process's memory now (VmRSS) or at its high-water mark (VmHWM).

    Pages of files do not count: those of libraries are read as their code is used. None: the system
    does not provide the figure.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = dict(line.split(":", 1) for line in lines)
        whole, of_files = (int(values[name].split()[0]) for name in (key, "RssFile"))
    except (OSError, KeyError):
        return None
    return (whole - of_files) / 1024


# --- Measuring ------------------------------------------------------------------------------------


class Worker:
    """A measuring process, as its parent sees it."""

    def __init__(self, candidate: Candidate, mode: Mode, plan: Plan):
        # A fork would share the memory, and the threads, of this process.
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(
            target=work, args=(theirs, candidate, mode, plan), daemon=True
        )
        self.process.start()
        theirs.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.pipe.close()  # the process ends once it reads from the pipe again
        self.process.join(ENDING_S)
        self.process.kill()
        self.process.join()

    def ask(self, request: Request) -> Any:
        """Return the process's answer.

        Raises:
            MeasurementError: there is no answer.
        """
        try:
            self.pipe.send(request)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            raise MeasurementError(_ending(self.process.exitcode)) from None
        if isinstance(answer, MeasurementError):
            raise answer
        return answer


def _ending(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "its process was killed, as the system does when memory runs out"
    return f"its process ended with status {code}"


def turns(candidates: Sequence[Candidate], mode: Mode, plan: Plan) -> Iterator[tuple[str, Request]]:
    """Yield models and requests in order.

    Each round begins with another model, so that no model always follows the same one.
    """
    order = [candidate.name for candidate in candidates]
    yield from ((name, None) for name in order)
    for _ in range(plan.rounds):
        yield from ((name, batch) for batch in plan.batches for name in order)
        order = [*order[1:], order[0]]
    if not mode.compiled:  # torch.compile would compile anew for every length
        n_texts = len(candidates[0].texts)
        for start in range(0, n_texts, TEXTS_A_TURN):
            texts = range(start, min(start + TEXTS_A_TURN, n_texts))
            yield from ((name, texts) for name in order)
            order = [*order[1:], order[0]]


def measure(
    candidates: Sequence[Candidate], modes: Sequence[Mode], plan: Plan
) -> list[dict[str, Any]]:
    """Measure one mode after the other; return the content of results.json.

    If a model cannot be measured in a mode, a warning is logged, and its entry is an `error`
    instead of figures.
    """
    results = []
    total = sum(_steps(request) for mode in modes for _, request in turns(candidates, mode, plan))
    done = 0
    with Bar("compare", total) as bar:
        for mode in modes:
            answers: dict[tuple[str, Request], list[Any]] = defaultdict(list)
            failures: dict[str, str] = {}
            with contextlib.ExitStack() as stack:
                workers = {c.name: stack.enter_context(Worker(c, mode, plan)) for c in candidates}
                for name, request in turns(candidates, mode, plan):
                    try:
                        if name not in failures:
                            answers[name, request].append(workers[name].ask(request))
                    except MeasurementError as failure:
                        failures[name] = str(failure)
                        log.warning("%s in %s: %s", name, mode, failure)
                    done += _steps(request)
                    bar.update(done, str(mode))
            results += gather(candidates, mode, plan, answers, failures)
    return results


def _steps(request: Request) -> int:
    return START_STEPS if request is None else 1


def gather(
    candidates: Sequence[Candidate],
    mode: Mode,
    plan: Plan,
    answers: dict[tuple[str, Request], list[Any]],
    failures: dict[str, str],
) -> list[dict[str, Any]]:
    """Turn the answers of one mode into measurements: one for each batch, and one for the texts."""
    results: list[dict[str, Any]] = []
    for c in candidates:
        row = {"model": c.name, "precision": mode.precision, "compile": mode.compiled}
        if c.name in failures:
            results.append({**row, "error": failures[c.name]})
            continue
        row |= {
            "parameters": c.parameters,
            "embedding_parameters": c.embedding_parameters,
            "size_mib": c.parameters * DTYPES[mode.precision].itemsize / MIB,
            "disk_mib": c.disk_mib,
        }
        [start] = answers[c.name, None]
        for batch in plan.batches:
            samples = answers[c.name, batch]
            first = [] if candidates[0].name in failures else answers[candidates[0].name, batch]
            ratios = [theirs / ours for theirs, ours in zip(first, samples, strict=False)]
            ms, p20, p80 = spread(samples)
            results.append(
                {
                    **row,
                    "batch": batch,
                    "sequence_length": plan.sequence_length,
                    "attention": start["attention"],
                    "rounds": len(samples),
                    "latency_ms": ms,
                    "latency_p20_ms": p20,
                    "latency_p80_ms": p80,
                    "sequences_per_s": batch / ms * 1e3,
                    "tokens_per_s": batch * plan.sequence_length / ms * 1e3,
                    "speedup": statistics.median(ratios) if ratios else None,
                    "peak_mib": start["peak_mib"][batch],
                    "first_call_s": start["first_call_s"][batch],
                }
            )
        pass_ms = sum(
            sum(samples)
            for (name, request), samples in answers.items()
            if name == c.name and isinstance(request, range)
        )
        if pass_ms:
            tokens = sum(map(len, c.texts))
            results.append(
                {**row, "texts": len(c.texts), "tokens": tokens, "pass_s": pass_ms / 1e3}
            )
    return results


def spread(samples: Sequence[float]) -> tuple[float, float, float]:
    """Return median, 20th and 80th percentile."""
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return statistics.median(samples), fifths[0], fifths[3]
