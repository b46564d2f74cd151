"""From text to tokens to batches.

`prepare` turns text into a store: two `datasets` folders of token ids (train and held out), the
tokens' counts, and a record of the source and settings. `Store` opens one. `Batches` distributes a
step's examples over ranks and micro-batches. A step is counted before its first forward, so that
every loss can be divided by the counts; its micro-batches are then made one at a time.
"""

from distilfast.data.batches import Batches, MicroBatch, Share, copy_to, on_device, prefetch
from distilfast.data.corpus import check, locate, prepare
from distilfast.data.masking import IGNORE_INDEX, Masker
from distilfast.data.store import Store

__all__ = [
    "IGNORE_INDEX",
    "Batches",
    "Masker",
    "MicroBatch",
    "Share",
    "Store",
    "check",
    "copy_to",
    "locate",
    "on_device",
    "prefetch",
    "prepare",
]
