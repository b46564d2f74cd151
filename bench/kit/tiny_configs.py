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
        "q_lora_rank kv_lora_rank",
    ),
    (
        16,
        "head_dim kv_channels dim_head attention_head_size v_head_dim qk_nope_head_dim "
        "linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim "
        "mamba_headdim mamba_d_head mamba_head_dim swa_head_dim hidden_size_per_layer_input "
        "laurel_rank adapter_rank o_lora_rank d_head query_pre_attn_scalar time_step_rank "
        "mamba_dt_rank mamba_chunk_size gated_norm_rank global_head_dim",
    ),
    (
        8,
        "qk_rope_head_dim rotary_dim ssm_state_size state_size mamba_d_state "
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
        "keep_window_size mamba_n_heads mamba_num_heads prompt_length prompt_types "
        "segment_types mamba_expand_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads num_query_groups linear_num_key_heads "
        "swa_num_key_value_heads num_experts_per_tok moe_k moe_topk n_groups mamba_n_groups "
        "mamba_ngroups num_landmarks num_mem_blocks n_mamba_heads num_kv_shared_layers "
        "first_k_dense_replace num_dense_layers moe_layer_start_index decoder_sparse_step "
        "attn_layer_period_ interleave_moe_layer_step n_group topk_group num_expert_group "
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

OVERRIDES: dict[str, dict[str, Any]] = {}
REASONS: dict[str, str] = {}
