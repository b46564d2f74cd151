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
    (
        "layers",
        "num_hidden_layers num_layers encoder_layers decoder_layers num_encoder_layers "
        "num_decoder_layers n_layer n_layers num_blocks num_layers_per_stack",
    ),
    (
        VOCABULARY,
<<<<<<< HEAD
        "vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size "
        "encoder_hash_byte_group_vocab",
    ),
    (
        128,
        "max_position_embeddings n_ctx max_seq_len mamba_d_ssm max_target_positions "
        "max_source_positions model_max_length context_length original_max_position_embeddings",
    ),
    (
        64,
        "hidden_size hidden_size_global d_model emb_dim embedding_size embedding_dim "
        "attention_hidden_size lru_width word_embed_proj_dim input_embedding_size output_embedding_size "
        "pooler_hidden_size backbone_hidden_size",
=======
        "vocab_size decoder_vocab_size vocab_size_per_layer_input entity_vocab_size",
    ),
    (
        128,
        "max_position_embeddings n_ctx max_seq_len max_target_positions max_source_positions "
        "model_max_length context_length original_max_position_embeddings",
    ),
    (
        64,
        "hidden_size d_model emb_dim embedding_size embedding_dim attention_hidden_size "
        "lru_width word_embed_proj_dim input_embedding_size output_embedding_size "
        "pooler_hidden_size mamba_d_ssm backbone_hidden_size",
>>>>>>> 5434f67 (Tiny random models of every type that transformers builds as masked or causal LM)
    ),
    (
        96,
        "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim dim_ff dff d_inner "
        "ffn_hidden_size feed_forward_size hidden_dim dense_intermediate_size "
        "intermediate_size_mlp",
    ),
    (
        32,
        "moe_intermediate_size shared_expert_intermediate_size "
        "shared_experts_intermediate_size moe_shared_expert_intermediate_size "
        "expert_ffn_hidden_size shared_intermediate_size entity_emb_size attention_head_dim "
        "embedding_rank router_hidden_size",
    ),
    (
        24,
<<<<<<< HEAD
        "q_lora_rank kv_lora_rank qk_nope_head_dim",
    ),
    (
        16,
        "head_dim qk_rope_head_dim kv_channels dim_head attention_head_size v_head_dim "
=======
        "q_lora_rank kv_lora_rank",
    ),
    (
        16,
        "head_dim kv_channels dim_head attention_head_size v_head_dim qk_nope_head_dim "
>>>>>>> 5434f67 (Tiny random models of every type that transformers builds as masked or causal LM)
        "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim "
        "mamba_headdim mamba_d_head mamba_head_dim swa_head_dim hidden_size_per_layer_input "
        "laurel_rank adapter_rank o_lora_rank d_head query_pre_attn_scalar time_step_rank "
        "mamba_dt_rank mamba_chunk_size gated_norm_rank global_head_dim",
    ),
    (
        8,
<<<<<<< HEAD
        "mamba_n_heads mamba_num_heads rotary_dim ssm_state_size state_size mamba_d_state "
=======
        "qk_rope_head_dim rotary_dim ssm_state_size state_size mamba_d_state "
>>>>>>> 5434f67 (Tiny random models of every type that transformers builds as masked or causal LM)
        "lsh_attn_chunk_length local_attn_chunk_length chunk_size moe_latent_size d_rel",
    ),
    (
        4,
        "num_attention_heads encoder_attention_heads decoder_attention_heads attention_heads "
        "num_encoder_attention_heads num_decoder_attention_heads n_head n_heads num_heads "
        "linear_num_heads linear_num_value_heads index_n_heads swa_num_attention_heads "
        "num_experts num_local_experts n_routed_experts moe_num_experts zero_expert_num "
        "sliding_window sliding_window_size attention_chunk_size index_topk local_attention "
        "window_size attention_window_size attention_window max_window_layers "
<<<<<<< HEAD
        "keep_window_size prompt_length prompt_types "
        "segment_types index_block_size",
=======
        "keep_window_size mamba_n_heads mamba_num_heads prompt_length prompt_types "
        "segment_types mamba_expand_heads",
>>>>>>> 5434f67 (Tiny random models of every type that transformers builds as masked or causal LM)
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads "
        "swa_num_key_value_heads num_experts_per_tok moe_k moe_topk n_groups mamba_n_groups "
        "mamba_ngroups num_landmarks num_mem_blocks n_mamba_heads num_kv_shared_layers "
        "first_k_dense_replace num_dense_layers moe_layer_start_index decoder_sparse_step "
<<<<<<< HEAD
        "interleave_moe_layer_step n_group topk_group num_expert_group "
=======
        "attn_layer_period_ interleave_moe_layer_step n_group topk_group num_expert_group "
>>>>>>> 5434f67 (Tiny random models of every type that transformers builds as masked or causal LM)
        "global_num_key_value_heads o_groups index_topk_blocks",
    ),
    (
        True,
        "use_sliding_window",
    ),
]
FIELDS: dict[str, Any] = {name: value for value, names in _COMMON for name in names.split()}

# Special tokens whose id is too large for this vocabulary.
IDS = {"bos": 0, "pad": 1, "eos": 2, "unk": 3, "mask": 4, "sep": 5, "cls": 6}

<<<<<<< HEAD
# Set although the class leaves them open: it or its layers cannot do without.
FORCED = {
    "head_dim",
    "num_key_value_heads",
    "num_experts_per_tok",
    "n_routed_experts",
    "vocab_size",
}

_LINEAR_TWICE = ("linear_attention", "linear_attention")
_SLIDING = ("sliding_attention", "full_attention")
# Fields of a type beside the common ones. A tuple is a pattern that the layers repeat; a function
# gives the value for a number of layers. "task:type" is for one task only.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2, 5]},
    "cohere_compass_text": {
        "layer_types": _SLIDING,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": None,
        },
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "dots1": {"n_shared_experts": 1, "first_k_dense_replace": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 24,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "dots3_note_vision": {"mlp_layer_types": ("dense",)},
    "esm": {"pad_token_id": 1, "mask_token_id": 4, "position_embedding_type": "rotary"},
    "gemma3n_text": {"layer_types": _SLIDING, "num_kv_shared_layers": 2},
    "gemma4_text": {"layer_types": _SLIDING, "global_head_dim": 32},
    "gemma4_unified_text": {"layer_types": _SLIDING, "global_head_dim": 32},
    "gpt_neo": {"attention_types": lambda n: [[["global", "local"], n // 2]]},
    "granitemoehybrid": {"layer_types": (*_LINEAR_TWICE, "full_attention")},
    "inkling_text": {"logits_mup_width_multiplier": 2.0},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 2},
    "lfm2_moe": {"layer_types": ("conv", "full_attention", "conv")},
    "mamba2": {"num_heads": 8},
    "minicpm3": {"dim_model_base": 32},
    "nemotron_h": {"layers_block_type": ("linear_attention", "moe", "full_attention", "mlp")},
    "nystromformer": {"segment_means_seq_len": 24, "num_landmarks": 4},
    "perceiver": {
        "num_blocks": 1,
        "num_self_attends_per_block": lambda n: n,
        "num_latents": 16,
        "d_latents": 64,
        "num_self_attention_heads": 4,
        "num_cross_attention_heads": 4,
        "max_position_embeddings": 24,
    },
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
    },
    "reformer": {
        "attn_layers": ("local", "lsh"),
        "axial_pos_embds": False,
        "hash_seed": 0,
        "num_buckets": 4,
    },
    "rwkv": {"rescale_every": 2},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": (*_LINEAR_TWICE, "hybrid")},
    "zamba2": {
        "layers_block_type": ("linear_attention", "hybrid"),
        "num_key_value_heads": 4,
        "use_shared_attention_adapter": True,
    },
    "zaya": {"num_experts_per_tok": 1},
}
_ASSISTANT = "predicts from another model's keys and values; it does not run on ids"
_MUSIC = "transformers hands its causal LM, which predicts audio codes, the config of the composite"
REASONS: dict[str, str] = {
    "gemma4_assistant": _ASSISTANT,
    "gemma4_unified_assistant": _ASSISTANT,
    "musicgen": _MUSIC,
    "musicgen_melody": _MUSIC,
}
=======
OVERRIDES: dict[str, dict[str, Any]] = {}
REASONS: dict[str, str] = {}
>>>>>>> 5434f67 (Tiny random models of every type that transformers builds as masked or causal LM)
