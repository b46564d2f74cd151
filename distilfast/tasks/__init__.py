"""Tasks to fine-tune on (GLUE, IMDb, SQuAD, or your own): their files, metrics and tokens.

A task is one entry in TASKS, with its columns, classes and metrics. The protocol is that of Sanh et
al. 2019 (DistilBERT) for GLUE (Wang et al. 2019): docs/evaluation.md.
"""

from distilfast.tasks.catalogue import (
    ENTAILMENT,
    GLUE,
    GLUE_HUB,
    IMDB,
    SENTENCES,
    SQUAD,
    TASKS,
    Task,
)
from distilfast.tasks.files import (
    HUBS,
    IGNORE_INDEX,
    Examples,
    find,
    read,
    read_sentences,
    read_texts,
)
from distilfast.tasks.metrics import METRICS
from distilfast.tasks.tokens import (
    PAD_TO,
    Encoded,
    Windows,
    encode,
    encode_windows,
    encoded,
    order,
    predictions,
    score,
)

__all__ = [
    "ENTAILMENT",
    "GLUE",
    "GLUE_HUB",
    "HUBS",
    "IGNORE_INDEX",
    "IMDB",
    "METRICS",
    "PAD_TO",
    "SENTENCES",
    "SQUAD",
    "TASKS",
    "Encoded",
    "Examples",
    "Task",
    "Windows",
    "encode",
    "encode_windows",
    "encoded",
    "find",
    "order",
    "predictions",
    "read",
    "read_sentences",
    "read_texts",
    "score",
]
