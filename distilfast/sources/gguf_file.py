"""Read a language model and its tokenizer from a GGUF file, whose weights may be quantised.

The tokenizer that transformers makes of such a file does not split digits as the file says, so that
two spaces or two line breaks before a number give other tokens. This is mended here.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

DIGIT_BY_DIGIT = ("smollm", "starcoder")  # GGUF's names of how a text is split before BPE


def read(file: Path) -> tuple[Any, Any]:
    """Return a causal language model, fp32 and no longer quantised, and its tokenizer.

    Needs the package gguf.

    Raises:
        Exception: anything that transformers raises for a file that it cannot read.
    """
    import torch
    import transformers

    # Otherwise the weights would stay quantised where the package `kernels` is installed, and
    # transformers does not save such a model.
    config = transformers.GgufConfig(dequantize=True)
    source = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
        model = transformers.AutoModelForCausalLM.from_pretrained(
            **source, dtype=torch.float32, quantization_config=config
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    _split_digits(tokenizer, file)
    tokenizer.model_max_length = model.config.max_position_embeddings
    return model, tokenizer


def _split_digits(tokenizer: Any, file: Path) -> None:
    """Make a tokenizer split digits before all else, if its GGUF file says so."""
    import gguf
    from tokenizers import pre_tokenizers

    if gguf.GGUFReader(file).fields["tokenizer.ggml.pre"].contents() in DIGIT_BY_DIGIT:
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
