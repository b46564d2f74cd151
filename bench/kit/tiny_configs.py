"""How a configuration of transformers is made small: fields that many have, and types of their own.

A configuration whose default for a field is None or a list keeps it: the class works it out from
the others, which is the per-layer pattern that its real models have.
"""

from __future__ import annotations

from typing import Any

VOCABULARY = 128
# The layers of what is no language model: a vision tower, an audio encoder.
FEW = 2

_COMMON: list[tuple[Any, str]] = [
    # as many as the caller asks for
    ("layers", """num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_layers_per_stack num_blocks"""),
    (VOCABULARY, """vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size"""),
    # positions; the width of Falcon-H1's state-space branch
    (128, """max_position_embeddings max_seq_len max_target_positions max_source_positions
        model_max_length context_length original_max_position_embeddings n_ctx mamba_d_ssm"""),
    # widths
    (64, """hidden_size hidden_size_global d_model emb_dim embedding_dim attention_hidden_size
        lru_width pooler_hidden_size backbone_hidden_size"""),
    (96, """intermediate_size intermediate_size_mlp dense_intermediate_size hidden_dim d_inner
        ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff ffn_hidden_size feed_forward_size"""),
    (32, """moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size
        shared_experts_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size embedding_size input_embedding_size word_embed_proj_dim
        entity_emb_size pronunciation_embed_dim shape_embed_dim embedding_rank true_hidden_size
        intra_bottleneck_size router_hidden_size attention_head_dim"""),
    (24, "q_lora_rank kv_lora_rank qk_nope_head_dim output_embedding_size"),
    (16, """head_dim v_head_dim qk_rope_head_dim swa_head_dim index_head_dim d_head dim_head
        kv_channels attention_head_size query_pre_attn_scalar linear_head_dim
        linear_key_head_dim linear_value_head_dim mamba_headdim mamba_d_head mamba_head_dim
        hidden_size_per_layer_input laurel_rank adapter_rank o_lora_rank gated_norm_rank
        time_step_rank mamba_dt_rank mamba_chunk_size"""),
    (8, """rotary_dim d_rel state_size ssm_state_size mamba_d_state mamba_n_heads
        mamba_num_heads chunk_size lsh_attn_chunk_length local_attn_chunk_length"""),
    # heads, experts; windows, shorter than a test's sequence
    (4, """num_attention_heads encoder_attention_heads decoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads n_head n_heads num_heads
        swa_num_attention_heads linear_num_heads linear_num_value_heads index_n_heads
        num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num
        sliding_window sliding_window_size attention_chunk_size local_attention window_size
        attention_window_size local_attention_window_len keep_window_size index_topk
        index_block_size max_window_layers prompt_length prompt_types segment_types"""),
    # heads of keys and values, chosen experts; where kinds of layers begin, or how often they come
    (2, """num_key_value_heads swa_num_key_value_heads num_kv_heads num_query_groups
        linear_num_key_heads n_mamba_heads n_groups mamba_n_groups mamba_ngroups o_groups
        num_experts_per_tok moe_k moe_topk n_group num_expert_group index_topk_blocks
        num_mem_blocks first_k_dense_replace num_dense_layers moe_layer_start_index
        decoder_sparse_step interleave_moe_layer_step num_kv_shared_layers"""),
    (1, "topk_group"),
    (True, "use_sliding_window lm_head_bias"),
    # scales whose default is 1, which would hide that they were forgotten
    (2.0, "logits_scaling embedding_multiplier lm_head_multiplier"),
    (0.5, "residual_multiplier"),
]  # fmt: skip
FIELDS: dict[str, Any] = {name: value for value, names in _COMMON for name in names.split()}

# Special tokens whose id is too large for this vocabulary.
IDS = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 4, "sep": 5, "cls": 6}

# Set even where the default is None: some of the classes cannot do without.
FORCED = {
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "vocab_size",
}


def _dense_first(layers: int) -> list[str]:
    return ["dense", "dense", *["sparse"] * (layers - 2)]


_SLIDING = ("sliding_attention", "full_attention")
_LINEAR = ("linear_attention", "linear_attention")
_DISENTANGLED = {
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
}
# Fields of a type beside the common ones: what it cannot be built without, and what makes its
# layers differ where the class's own values make them all alike, unlike its published models.
# A tuple is a pattern that the layers repeat; a function gives the value for a number of layers.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "big_bird": {"block_size": 2, "num_random_blocks": 1},
    "bigbird_pegasus": {"block_size": 2, "num_random_blocks": 1},
    "cohere2_moe": {"mlp_layer_types": _dense_first},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "deberta": _DISENTANGLED,
    # as in deberta-v2-xlarge; v3 has no convolution
    "deberta-v2": {
        **_DISENTANGLED,
        "share_att_key": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "conv_kernel_size": 3,
        "conv_act": "gelu",
    },
    "deepseek_v4": {
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 8}
    },
    "dots1": {"n_shared_experts": 1},
    "dots3_note_text": {
        "sliding_window": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision_encoder": {
        "mlp_layer_types": ("dense",),
        "adapter_in_dim": 64,
        "adapter_out_dim": 64,
    },
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
    "esm": {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": 4},
    "funnel": {"block_sizes": lambda n: [n // 3] * 3, "num_decoder_layers": 2},
    "gemma3n_text": {
        "layer_types": _SLIDING,
        "intermediate_size": (96, 80, 96),
        "activation_sparsity_pattern": (0.5, 0.0, 0.0),
    },
    "gemma4_text": {"layer_types": _SLIDING, "global_head_dim": 32},
    "gemma4_unified_text": {"layer_types": _SLIDING, "global_head_dim": 32},
    "glm_moe_dsa": {"indexer_types": ("full", "full", "shared")},
    "gpt_neo": {"attention_types": lambda n: [[["global", "local"], n // 2]]},
    "granite_swa": {"layer_rope_theta": (10000.0, 100.0, 1000.0)},
    "granitemoe_swa": {"layer_rope_theta": (10000.0, 100.0, 1000.0)},
    "granitemoehybrid": {"layer_types": (*_LINEAR, "full_attention")},
    "inkling2_text": {"n_layers_per_attn_res_block": 3},
    "inkling_text": {"mlp_layer_types": _dense_first},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "laguna": {"layer_types": _SLIDING, "num_attention_heads_per_layer": (4, 2)},
    "lfm2": {"full_attn_idxs": [1, 4]},
    "lfm2_moe": {"layer_types": ("conv", "full_attention", "conv")},
    "longformer": {"attention_window": (4, 8, 4)},
    "mamba2": {"num_heads": 8},
    "mellum": {"layer_types": _SLIDING},
    "minicpm3": {"dim_model_base": 32},
    "minimax_m3_vl_text": {
        "layer_types": ("full_attention", "minimax_m3_sparse"),
        "mlp_layer_types": _dense_first,
    },
    "nemotron_h": {"layers_block_type": ("linear_attention", "moe", "full_attention", "mlp")},
    "neomme": {
        "per_layer_config": lambda n: {
            i: {"sliding_window": None if i == n - 1 else 8} for i in range(n - 1, 0, -2)
        }
    },
    # It reshapes to this length: no other runs.
    "nystromformer": {"segment_means_seq_len": 24, "num_landmarks": 4},
    # Its logits are as many as its positions.
    "perceiver": {
        "num_blocks": 1,
        "num_self_attends_per_block": lambda n: n,
        "num_latents": 16,
        "d_latents": 64,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 24,
    },
    "qwen3_moe": {"mlp_only_layers": [3]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
        "ple_layer_ids": [2, 3],
        "ngram_vocab_size_base": 50,
        "heads_per_ngram": 2,
        "hc_lowrank": 16,
        "eos_token_id": 2,
    },
    # Without a seed it draws its hashes anew in every call.
    "reformer": {
        "attn_layers": ("local", "lsh"),
        "axial_pos_embds": False,
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "rwkv": {"rescale_every": 2},
    "smollm3": {"sliding_window": 4},
    "squeezebert": {"embedding_size": 64},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": (*_LINEAR, "hybrid")},
    "zamba2": {
        "layers_block_type": ("linear_attention", "hybrid"),
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}
# Types that transformers cannot build from their own configuration, or not run on ids alone.
_ASSISTANT = "predicts from another model's keys and values; it does not run on ids"
_MUSIC = "transformers hands its causal LM, which predicts audio codes, the config of the composite"
REASONS: dict[str, str] = {
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}
