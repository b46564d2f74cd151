"""Tiny teachers of other families than BERT, each with a tokenizer of its family's kind.

They differ where a driver that knows BERT alone would go wrong: where positions begin, whether
there are token types, how wide the embeddings are, which tokens are special, and whether a
vocabulary has more rows than tokens. Their tokenizers are trained on the tests' own words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from conftest import WORDS
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

POSITIONS = 40  # tokens that the families with a table of positions take
BERTS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
ROBERTAS = ("<s>", "<pad>", "</s>", "<unk>")
SIZES: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2},
    **{"intermediate_size": 48, "initializer_range": 0.2},
}


@functools.cache
def byte_pairs(special: tuple[str, ...]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-level vocabulary whose first tokens are special, and its merges."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=380,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(_texts(), trainer)
    model = json.loads(made.to_str())["model"]
    return model["vocab"], [(first, second) for first, second in model["merges"]]


@functools.cache
def pieces(special: tuple[str, ...]) -> list[tuple[str, float]]:
    """A unigram vocabulary whose first pieces are special, with scores: 0, as SentencePiece has."""
    made = Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=160, special_tokens=["<unk>"], unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(_texts(), trainer)
    scores = json.loads(made.to_str())["model"]["vocab"]
    found = [(piece, score) for piece, score in scores if piece != "<unk>"]
    return [*((piece, 0.0) for piece in special), *found]


def _texts() -> list[str]:
    """Each word at the start of a text and within one, where byte-level tokens differ."""
    return [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 2


def masks(word: str) -> AddedToken:
    """A mask token that takes the space before it, as RoBERTa's and ModernBERT's do."""
    return AddedToken(word, lstrip=True, special=True)


def roberta_tokenizer() -> Any:
    vocabulary, merges = byte_pairs(ROBERTAS)
    vocabulary = {**vocabulary, "<mask>": len(vocabulary)}
    return transformers.RobertaTokenizer(vocabulary, merges, mask_token=masks("<mask>"))


def modernbert_tokenizer() -> Any:
    """Its special tokens come last, and after them words that no text has."""
    vocabulary, merges = byte_pairs(())
    made = Tokenizer(models.BPE(dict(vocabulary), merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([*BERTS, masks("[MASK]")])
    made.add_tokens([AddedToken(f"[unused{i}]", normalized=False) for i in range(5)])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:0 [SEP]:0",
        special_tokens=[(word, made.token_to_id(word)) for word in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad", "unk", "cls", "sep"), BERTS, strict=True))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        mask_token=masks("[MASK]"),
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": word for name, word in names.items()},
    )


def xlm_roberta_tokenizer() -> Any:
    vocabulary = [*pieces(ROBERTAS), ("<mask>", 0.0)]
    return transformers.XLMRobertaTokenizer(vocabulary, mask_token=masks("<mask>"))


def albert_tokenizer() -> Any:
    vocabulary = pieces(("<pad>", "<unk>", "[CLS]", "[SEP]", "[MASK]"))
    return transformers.AlbertTokenizer(vocabulary, mask_token=masks("[MASK]"))


def deberta_v2_tokenizer() -> Any:
    vocabulary = [*pieces(("[PAD]", "[CLS]", "[SEP]", "[UNK]")), ("[MASK]", 0.0)]
    return transformers.DebertaV2Tokenizer(vocabulary, unk_id=3)


def deberta_tokenizer() -> Any:
    vocabulary, merges = byte_pairs(("[CLS]", "[PAD]", "[SEP]", "[UNK]"))
    vocabulary = {**vocabulary, "[MASK]": len(vocabulary)}
    return transformers.DebertaTokenizer(vocabulary, merges, mask_token=masks("[MASK]"))


def electra_tokenizer() -> Any:
    words = [*BERTS, "[MASK]", *WORDS]
    return transformers.ElectraTokenizer({word: i for i, word in enumerate(words)})


@dataclass(frozen=True)
class Family:
    """A family's tokenizer, the name of its classes, and what its configuration has of its own."""

    tokenizer: Callable[[], Any]
    name: str
    settings: dict[str, Any]
    spare_rows: int = 0  # of the embeddings, beyond the tokenizer's ids


# The first, the middle and the last one are in the quick selection of tests.
FAMILIES = {
    "roberta": Family(
        roberta_tokenizer,
        "Roberta",
        {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
    ),
    "xlm-roberta": Family(
        xlm_roberta_tokenizer,
        "XLMRoberta",
        {"max_position_embeddings": POSITIONS + 2, "type_vocab_size": 1},
    ),
    "electra": Family(
        electra_tokenizer, "Electra", {"embedding_size": 16, "max_position_embeddings": POSITIONS}
    ),
    "modernbert": Family(
        modernbert_tokenizer,
        "ModernBert",
        {
            **{"max_position_embeddings": POSITIONS, "local_attention": 8},
            **{"global_attn_every_n_layers": 2, "initializer_cutoff_factor": 3.0},
        },
        spare_rows=11,
    ),
    "albert": Family(
        albert_tokenizer,
        "Albert",
        {"embedding_size": 16, "max_position_embeddings": POSITIONS, "num_hidden_groups": 1},
    ),
    "deberta": Family(
        deberta_tokenizer,
        "Deberta",
        {
            **{"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "type_vocab_size": 0},
            **{"position_biased_input": False, "max_position_embeddings": POSITIONS},
        },
    ),
    "deberta-v2": Family(  # as DeBERTa-v3
        deberta_v2_tokenizer,
        "DebertaV2",
        {
            **{"relative_attention": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"},
            **{"position_biased_input": False, "pos_att_type": ["p2c", "c2p"]},
            **{"share_att_key": True, "type_vocab_size": 0, "max_relative_positions": -1},
            **{"max_position_embeddings": POSITIONS},
        },
    ),
}


def make_family(kind: str, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A folder with a tiny masked LM of a family and its tokenizer."""
    family = FAMILIES[kind]
    tokenizer = family.tokenizer()
    names = ("pad", "bos", "eos", "cls", "sep")
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id", None) for name in names}
    rows = max(tokenizer.get_vocab().values()) + 1 + family.spare_rows
    config = getattr(transformers, f"{family.name}Config")(
        **{"vocab_size": rows, **SIZES, **ids, **family.settings, **settings}
    )
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family.name}ForMaskedLM")(config)
    with torch.no_grad():  # biases, which a fresh model has at 0
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.2 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- Causal LMs -----------------------------------------------------------------------------------

END = "<|endoftext|>"
DECODER = SIZES | {"max_position_embeddings": POSITIONS, "num_key_value_heads": 1}
CAUSAL: dict[str, dict[str, Any]] = {
    "gpt2": {
        **{"n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": POSITIONS},
        **{"initializer_range": 0.2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    "llama": DECODER | {"tie_word_embeddings": False},
    "mistral": DECODER | {"sliding_window": 16},
    "mamba": {"hidden_size": 32, "num_hidden_layers": 4, "state_size": 4, "initializer_range": 0.2},
}


def end_tokenizer() -> Any:
    """A byte-level one that has an end token and no other: no padding, no mask, no CLS."""
    vocabulary, merges = byte_pairs((END,))
    made = Tokenizer(models.BPE(dict(vocabulary), merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([END])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        eos_token=END,
        bos_token=END,
        unk_token=END,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_causal(folder: Path, kind: str, seed: int = 0, **settings: Any) -> Path:
    """A causal LM of a family, with its tokenizer, saved as transformers saves one.

    Args:
        settings: the configuration's; a vocabulary larger than the tokenizer's is padded.
    """
    tokenizer = end_tokenizer()
    end = tokenizer.eos_token_id
    config = transformers.CONFIG_MAPPING[kind](
        **{
            "vocab_size": len(tokenizer),
            "bos_token_id": end,
            "eos_token_id": end,
            "pad_token_id": None,
        }
        | CAUSAL[kind]
        | settings
    )
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # a fresh model has all its biases at 0, where a mistake hides
        for weight in model.parameters():
            if weight.ndim == 1:
                weight.add_(0.1 * torch.randn_like(weight))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
