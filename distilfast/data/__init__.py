"""From text to tokens to batches.

`files` says which files a source has, and `texts` reads them. `prepare` turns text into a store:
two `datasets` folders of token ids (train and held out), the tokens' counts, and a record of the
source, its contents and the settings. `Store` opens one. `Batches` distributes a step's examples
over ranks and micro-batches, and a `Masker` or a `Shift` gives their labels. A step is counted
before its first forward, so that every loss can be divided by the counts; its micro-batches are
then made one at a time.
"""

from distilfast.data.batches import Batches, MicroBatch, Share, copy_to, on_device, prefetch
from distilfast.data.corpus import check, locate, prepare
from distilfast.data.masking import IGNORE_INDEX, Masker
from distilfast.data.shifting import Shift
from distilfast.data.store import Store, describe_texts
from distilfast.data.texts import Source

__all__ = [
    "IGNORE_INDEX",
    "Batches",
    "Masker",
    "MicroBatch",
    "Share",
    "Shift",
    "Source",
    "Store",
    "check",
    "copy_to",
    "describe_texts",
    "locate",
    "on_device",
    "prefetch",
    "prepare",
]
