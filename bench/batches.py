"""How long does it take to make a batch, and how much memory does it hold?

    python bench/batches.py [--sequences 1024 65536] [--micro_sequences 32] [--length 128]

Measures for each size of a step, on random tokens: the time of the pass that counts it, and the
time in which a thread makes its micro-batches ahead, both per micro-batch; and the peak of the
process's anonymous memory above what it held before. For comparison it times forward and backward
of one micro-batch in a student of 6 layers of 384, with random weights, in bf16, with the cross
entropy of 15 % of the rows. Appends to bench/results/batches.csv.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from kit import measure
from kit.measure import Spread, figure

from distilfast import linear_distillation_loss, models
from distilfast.config import BatchConfig, MaskingConfig
from distilfast.data import Batches, Store, prefetch
from distilfast.data.masking import Masker
from distilfast.data.store import FORMAT

CSV = Path(__file__).parent / "results" / "batches.csv"
VOCABULARY, SPECIAL = 30522, [0, 100, 101, 102, 103]


def make_store(folder: Path, examples: int, length: int) -> Store:
    """Examples of random words, on disk as `prepare` leaves them."""
    import datasets

    datasets.disable_progress_bars()
    tokens = np.random.default_rng(0).integers(1000, VOCABULARY, (examples, length), np.int32)
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    datasets.Dataset.from_dict({"input_ids": list(tokens)}, features).save_to_disk(folder)
    loaded = datasets.load_from_disk(str(folder))
    counts = torch.from_numpy(np.bincount(tokens.flatten(), minlength=VOCABULARY))
    return Store(loaded, loaded, counts, {"format": FORMAT, "max_length": length})


def anonymous_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(x for x in lines if x.startswith("RssAnon")).split()[1]) / 1024


def measure_step(batches: Batches, step: int, micro: int) -> dict[str, float]:
    """Milliseconds by micro-batch, and MiB."""
    share = batches.step(step, 0, 1, micro)
    before = most = anonymous_mib()
    began = time.perf_counter()
    share.count()
    counted = time.perf_counter()
    most = max(most, anonymous_mib())
    for _ in prefetch(share):
        most = max(most, anonymous_mib())
    made = time.perf_counter()
    parts = len(share) / 1e3
    return {
        "count_ms": (counted - began) / parts,
        "make_ms": (made - counted) / parts,
        "memory_mib": most - before,
    }


class Student:
    """The forward and backward that a micro-batch is made for."""

    def __init__(self, dtype: torch.dtype):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=VOCABULARY,
            num_hidden_layers=6,
            hidden_size=384,
            num_attention_heads=12,
            intermediate_size=1536,
        )
        self.model = transformers.BertForMaskedLM(config).to(dtype)
        self.model.set_attn_implementation("eager")
        self.parts = models.take_apart(self.model)

    def ms(self, batch: Any) -> float:
        began = time.perf_counter()
        hidden = self.parts.hidden(batch.input_ids, batch.attention_mask).flatten(0, 1)
        head = self.parts.head
        features = self.parts.features(hidden[batch.labelled])
        labels = batch.labels[batch.labelled]
        linear_distillation_loss(
            *(features, head.weight, None, None, labels),
            student_bias=head.bias,
            kd_weight=0.0,
            ce_weight=1.0,
        ).loss.backward()
        return (time.perf_counter() - began) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, nargs="+", default=[1024, 65536])
    parser.add_argument("--micro_sequences", type=int, default=32)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--csv", type=Path, default=CSV, help="append to this file")
    options = parser.parse_args()
    environment, micro = measure.environment(torch.device("cpu")), options.micro_sequences
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder), max(options.sequences), options.length)
        masker = Masker.from_counts(store.counts, SPECIAL, 103, MaskingConfig(), 56)
        student = Student(torch.bfloat16)
        made = [Batches(store, masker, 0, BatchConfig(n)) for n in options.sequences]
        (warm,) = prefetch(Batches(store, masker, 0, BatchConfig(micro)).step(0, 0, 1, micro))
        for batches in made:
            measure_step(batches, 0, micro)
        student.ms(warm)
        trained: list[float] = []
        found: dict[int, list[dict[str, float]]] = {n: [] for n in options.sequences}
        for number in range(options.rounds):
            for batches in made:
                found[batches.batch.size].append(measure_step(batches, number, micro))
                trained.append(student.ms(warm))
        for sequences, rounds in found.items():
            columns = {key: Spread.of([r[key] for r in rounds]) for key in rounds[0]}
            rows.append(
                {
                    "sequences": sequences,
                    "micro_sequences": micro,
                    "length": options.length,
                    "rounds": options.rounds,
                    **{key: spread.median for key, spread in columns.items()},
                    "memory_mib_most": max(r["memory_mib"] for r in rounds),
                    "student_ms": Spread.of(trained).median,
                }
            )
    measure.append_csv(options.csv, [environment | row for row in rows])
    lines = [
        {
            "sequences a step": f"{row['sequences']:,}",
            "count, ms a micro-batch": figure(row["count_ms"]),
            "of the student's": f"{row['count_ms'] / row['student_ms']:.2%}",
            "make, ms a micro-batch": figure(row["make_ms"]),
            "student, ms a micro-batch": figure(row["student_ms"]),
            "memory, MiB": figure(row["memory_mib_most"]),
        }
        for row in rows
    ]
    print(measure.markdown(lines))


if __name__ == "__main__":
    main()
