"""A GGUF file becomes the model that it was made of, and its tokenizer gives the file's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from distilfast.sources import gguf_file

gguf = pytest.importorskip("gguf")

CONTROL = 3  # the type of a special token
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>")
WORDS = "the emu is a large bird of plains  12 345\n\n"
# How llama.cpp splits a text with the pre-tokenizer "smollm": digits first, then as GPT-2 does.
DIGITS = r"\p{N}"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers": "blk",
}


def vocabulary() -> tuple[list[str], list[str]]:
    """Special tokens, all bytes and some merges, among them one of two spaces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = ["Ġ Ġ", "t h", "th e", "Ġ the", "e m", "em u", "Ċ Ċ"]
    return [*SPECIAL, *alphabet, *("".join(m.split()) for m in merges)], merges


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """A projection's rows in the order that llama.cpp's rotary embedding wants."""
    by_head = weight.reshape(heads, 2, -1, weight.shape[-1])
    return by_head.swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A GGUF file of 4-bit weights, and the Llama with these weights."""
    words, merges = vocabulary()
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    file = tmp_path_factory.mktemp("gguf") / "tiny.Q4_1.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([CONTROL] * len(SPECIAL) + [1] * (len(words) - len(SPECIAL)))
    writer.add_token_merges(merges)
    for role, token in {"bos": 1, "eos": 2, "unk": 0, "pad": 2}.items():
        getattr(writer, f"add_{role}_token_id")(token)
    kind = gguf.GGMLQuantizationType.Q4_1
    for name, weight in model.named_parameters():
        own, values = name, weight.detach().numpy()
        for ours, theirs in NAMES.items():
            own = own.replace(ours, theirs)
        if values.ndim == 1:
            writer.add_tensor(own, values)
            continue
        packed = gguf.quants.quantize(values, kind)
        weight.data = torch.from_numpy(gguf.quants.dequantize(packed, kind))
        for projection, heads in {"q_proj": 4, "k_proj": 2}.items():
            if projection in name:  # whole rows move, and so do their blocks
                packed = interleaved(packed, heads)
        writer.add_tensor(own, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model


@pytest.fixture(scope="module")
def found(made: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """The model and the tokenizer, read from the file, saved, and loaded as any others."""
    folder = tmp_path_factory.mktemp("model")
    for part in gguf_file.read(made[0]):
        part.save_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def test_weights_are_those_of_the_file(made: tuple[Path, Any], found: tuple[Any, Any]) -> None:
    model, (own, _) = made[1], found
    assert {p.dtype for p in own.parameters()} == {torch.float32}
    assert own.lm_head.weight is own.model.embed_tokens.weight
    assert not hasattr(own.config, "quantization_config")
    wanted, state = model.state_dict(), own.state_dict()
    assert wanted.keys() == state.keys()
    assert all(torch.equal(wanted[name], state[name]) for name in wanted)
    input_ids = torch.arange(20)[None]
    assert torch.equal(own(input_ids).logits, model(input_ids).logits)


@pytest.mark.parametrize(
    "text", ["the emu  12 is\n\n3", " 345", "é½²", "<repo_name>the<|im_end|>", "  the \t 7"]
)
def test_tokens_are_those_of_the_file(found: tuple[Any, Any], text: str) -> None:
    words, merges = vocabulary()
    pairs = [tuple(merge.split()) for merge in merges]
    own = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, pairs))
    own.add_special_tokens(list(SPECIAL))
    own.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGITS), "isolated"),
            pre_tokenizers.Split(Regex(GPT2), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer = found[1]
    assert tokenizer(text).input_ids == own.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_those_of_the_file(found: tuple[Any, Any]) -> None:
    tokenizer = found[1]
    roles = tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token
    assert roles == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert tokenizer.model_max_length == 128
    assert tokenizer("the").input_ids == tokenizer("the", add_special_tokens=False).input_ids
