"""How long does a fine-tuning take, and what does the harness add to a bare loop?

    python bench/finetuning.py --data FOLDER [--task SST-2] [--steps 20] [--rounds 5]

First it times the loop alone: `fine_tuning.fine_tune` and a plain PyTorch loop, in turn in one
process, over the same batches, made beforehand. Then it times a whole `distilfast glue`, from the
start of the process to the report, for one seed of the whole task: its wall time, and that of the
training in it. The default model is all-MiniLM-L6-v2: 6 layers, 384 wide. FOLDER is in GLUE's
official layout. Appends to bench/results/finetuning.csv.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kit import measure

from distilfast import models, tasks
from distilfast.machine import best_precision
from distilfast.sources import lookup
from distilfast.tasks import Encoded, Task, fine_tuning
from distilfast.tasks.fine_tuning import FineTuning

RESULTS = Path(__file__).parent / "results" / "finetuning.csv"


def plain_loop(model: Any, batches: list[Any], settings: FineTuning, seed: int) -> None:
    """The loop as one would write it by hand."""
    torch.manual_seed(seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(batches))
    model.train()
    for inputs, labels in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(logits.float(), labels).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def subset(train: Encoded, count: int) -> Encoded:
    """The first examples."""
    offsets = train.offsets[: count + 1]
    end = int(offsets[-1])
    return Encoded(train.input_ids[:end], train.token_type_ids[:end], offsets, train.labels[:count])


def pairs(
    source: str, task: Task, train: Encoded, settings: FineTuning, rounds: int, pad_token: int
) -> Any:
    """Seconds of the harness and of the plain loop, a pair a round, and whether the weights are
    the same bits."""
    times, same = ([], []), True

    def model() -> Any:
        made = fine_tuning.load(source, task, 0, settings.max_length)
        models.choose_attention(made, torch.device("cpu"), int(train.lengths.max()))
        return made

    generator = torch.Generator().manual_seed(0)
    rows = tasks.order(train.lengths, settings.batch_size, generator)
    batches = [(train.batch(r, pad_token), train.labels[r].long()) for r in rows]
    for number in range(rounds + 1):
        ours, theirs = model(), model()
        sides = (
            lambda m=ours: fine_tuning.fine_tune(m, train, task, settings, 0, pad_token=pad_token),
            lambda m=theirs: plain_loop(m, batches, settings, 0),
        )
        for side in (0, 1) if number % 2 else (1, 0):
            began = time.perf_counter()
            sides[side]()
            if number:  # the first warms up
                times[side].append(time.perf_counter() - began)
        same &= all(map(torch.equal, ours.state_dict().values(), theirs.state_dict().values()))
    return *times, same


def whole(source: str, data: str, max_length: int, task: Task, folder: Path) -> dict[str, float]:
    """Seconds of `distilfast glue`, and of the training in it."""
    command = [sys.executable, "-m", "distilfast", "glue"]
    command += ["--model", f"model={source}", "--data", data, "--tasks", task.name]
    began = time.perf_counter()
    subprocess.run(
        [
            *command,
            "--seeds=1",
            "--processes=1",
            f"--max_length={max_length}",
            f"--output={folder}",
        ],
        check=True,
    )
    seconds = time.perf_counter() - began
    result = json.loads((folder / "results.json").read_text(encoding="utf-8"))["model"][task.name]
    return {"glue_s": seconds, "training_s": result["train_time_s"], "score": result["median"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--task", default="SST-2")
    parser.add_argument("--model", default="asset:all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=RESULTS)
    options = parser.parse_args()
    import transformers

    source = lookup.model_source("--model", options.model)
    task = tasks.find(options.task, options.data)
    precision = best_precision(torch.device("cpu"))
    settings = FineTuning(precision=precision, epochs=1, max_length=options.max_length)
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    examples = tasks.read(task, options.data)["train"]
    encoded = tasks.encode(examples, tokenizer, options.max_length)
    train = subset(encoded, options.steps * settings.batch_size)
    ours, theirs, same = pairs(
        source, task, train, settings, options.rounds, tokenizer.pad_token_id
    )
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    row = {
        "model": options.model,
        "task": task.name,
        "examples": len(encoded),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "steps": options.steps,
        "rounds": options.rounds,
        "harness_ms_a_step": statistics.median(ours) / options.steps * 1e3,
        "plain_ms_a_step": statistics.median(theirs) / options.steps * 1e3,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "same_weights": same,
    }
    with tempfile.TemporaryDirectory() as folder:
        row |= whole(source, options.data, options.max_length, task, Path(folder) / "glue")
    row["glue_over_training"] = row["glue_s"] / row["training_s"]
    for key, value in row.items():
        print(f"{key:20} {value:.4g}" if isinstance(value, float) else f"{key:20} {value}")
    environment = measure.environment(torch.device("cpu"))
    measure.append_csv(options.csv, [{**environment, **row}])
    print(f"appended to {options.csv}")


if __name__ == "__main__":
    main()
