"""Every causal-LM architecture of the installed transformers, small: sizes derived from its config class."""

from __future__ import annotations

import importlib.metadata
import inspect
from typing import Any

import torch
from torch import nn

# Some models of today's transformers are absent from, or written otherwise in, the oldest that is supported.
OLDEST = importlib.metadata.version("transformers").startswith("5.17.")

# What an integer of a config means, by the names that transformers gives it.
_SIZES: dict[int, str] = {
    96: "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size audio_vocab_size "
    "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab ngram_vocab_size_base",
    128: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_source_positions "
    "context_length model_max_length original_max_position_embeddings",
    48: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff feed_forward_size "
    "mlp_dim d_inner intermediate_size_mlp dense_intermediate_size",
    32: "hidden_size d_model n_embd emb_dim embedding_dim embedding_size word_embed_proj_dim lru_width "
    "attention_hidden_size input_embedding_size output_embedding_size backbone_hidden_size input_size out_hidden_size "
    "hidden_size_global rel_extent adapter_out_dim projector_input_dim projector_output_dim output_channels",
    24: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "shared_intermediate_size moe_shared_expert_intermediate_size router_hidden_size",
    16: "q_lora_rank kv_lora_rank o_lora_rank mamba_d_head mamba_head_dim mamba_headdim hidden_size_per_layer_input "
    "ple_embed_dim mamba_dt_rank time_step_rank laurel_rank hc_lowrank pronunciation_embed_dim shape_embed_dim",
    8: "head_dim swa_head_dim d_head dim_head attention_head_size qk_head_dim v_head_dim index_head_dim "
    "linear_head_dim linear_key_head_dim linear_value_head_dim kv_channels mamba_d_state state_size ssm_state_size "
    "chunk_size mamba_chunk_size attention_chunk_size query_pre_attn_scalar gated_norm_rank adapter_rank",
    6: "sliding_window sliding_window_size attention_window_size window_size local_attention "
    "local_attention_window_len keep_window_size index_topk",
    4: "num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads num_heads attention_heads "
    "swa_num_attention_heads linear_num_key_heads linear_num_value_heads linear_num_heads index_n_heads mamba_n_heads "
    "mamba_num_heads num_encoder_attention_heads num_decoder_attention_heads num_experts n_routed_experts "
    "num_local_experts moe_num_experts qk_rope_head_dim qk_nope_head_dim d_rel rotary_dim conf_num_attention_heads "
    "",
    2: "num_key_value_heads swa_num_key_value_heads num_experts_per_tok num_experts_per_token moe_k moe_topk "
    "num_encoder_layers o_groups zero_expert_num conf_num_hidden_layers",
    1: "n_group topk_group num_expert_group mamba_n_groups n_groups mamba_ngroups",
}
_MEANS = {name: size for size, names in _SIZES.items() for name in names.split()}
# Not a decoder of text by itself, or not to be had small.
NOT_BUILT = {
    "dots3_note": "the vision and audio parts of its default config contradict each other when small",
    "gemma3n": "its vision tower needs the timm library (gemma3n_text is its decoder)",
    "gemma4_assistant": "a draft model that runs on another model's keys and values",
    "gemma4_unified_assistant": "a draft model that runs on another model's keys and values",
    "musicgen": "takes audio codes of shape (B * codebooks, S)",
    "musicgen_melody": "takes audio codes of shape (B * codebooks, S)",
}
_UNSET = ["head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok"]
_LAYERS = [
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_blocks",
    "depth",
    "encoder_layers",
]


# A type of each mechanism, run always; all others have it too, in other words, and run with `AM_SWEEP`.
MECHANISMS = {
    "afmoe": "gated attention, experts",
    "bert": "post-norm, token types",
    "bitnet": "ternary linears",
    "bloom": "biases by position, one fused projection with its heads interleaved",
    "blt": "patches of bytes made by a model of its own",
    "dbrx": "clipped and fused projections, experts",
    "deepseek_v3": "latent attention, groups of experts",
    "falcon_mamba": "no attention at all",
    "fuyu": "images, or none, as tokens",
    "gemma3": "sliding windows, a tower beside the decoder",
    "gemma4": "embeddings per layer, shared keys and values, two head widths",
    "gpt2": "learned positions, Conv1D",
    "gpt_neox": "parallel residual, interleaved heads",
    "gpt_oss": "sinks, experts with biases",
    "hrm_text": "layers run in cycles",
    "jetmoe": "experts of attention",
    "lfm2": "short convolutions",
    "llama": "what most are",
    "longcat_flash": "two attentions in a layer, experts that are the identity",
    "mllama": "cross-attention to images",
    "mpt": "biases by position, one fused projection",
    "opt": "projections around the stack",
    "phi3": "fused projections",
    "prophetnet": "several streams of predictions",
    "qwen3_next": "linear attention",
    "reformer": "a custom autograd function",
    "recurrent_gemma": "recurrent blocks",
    "xlnet": "relative positions, the sequence first",
    "zamba": "shared blocks",
}


def model_types() -> list[str]:
    """Every model type of `AutoModelForCausalLM`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def small_config(model_type: str, layers: int = 4, **overrides: Any):
    """A config of the type with small sizes, no dropout, no noise and random-access sub-configs shrunk alike."""
    from transformers import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], layers, _SPECIAL.get(model_type, {}) | overrides)


def small(
    model_type: str,
    layers: int = 4,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attention: str | None = "eager",
    **overrides,
) -> nn.Module:
    """A causal LM of the type with seeded random weights, in evaluation mode (what is random in training is off).

    Args:
        model_type: of `model_types()`.
        layers, dtype, seed: of the model.
        attention: transformers' name of it; None for what transformers takes by itself: sdpa where the type has it.
        overrides: of the config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    config = small_config(model_type, layers, **overrides)
    torch.manual_seed(seed)
    if model_type.startswith("musicgen"):  # its causal LM takes the decoder's config, which AutoModel does not accept
        config = config.decoder
        config._attn_implementation = attention
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(small_config(model_type))]
        model = kind._from_config(config, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
    let_weights_count(model)
    return model.train(model_type in _ONLY_IN_TRAINING)


def let_weights_count(model: nn.Module) -> None:
    """Noise on every parameter, since zeros and ones hide errors, and experts one by one; in place."""
    for module in model.modules():
        if hasattr(getattr(module, "config", None), "_experts_implementation"):
            module.config._experts_implementation = "eager"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)


def runnable(model_type: str, **settings: Any) -> tuple[nn.Module, torch.dtype]:
    """The small model in float64, or in float32 where its own code mixes the two, and which of them it is.

    Args:
        model_type: of `model_types()`.
        settings: of `small`, besides the dtype.
    """
    for dtype in (torch.float64, torch.float32):
        model = small(model_type, dtype=dtype, **settings)
        try:
            with torch.no_grad():
                logits_of(model, torch.ones(1, 16, dtype=torch.int64))
        except RuntimeError:
            continue
        return model, dtype
    raise AssertionError(f"{model_type} runs neither in float64 nor in float32")


def logits_of(model: nn.Module, ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
    """What a causal LM returns for ids `(B, S)`, whatever it calls it, without a cache."""
    settings = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    output = model(input_ids=ids, **inputs, **settings)
    return output.logits if hasattr(output, "logits") else output[0]


# They have no backward in evaluation mode; their configs here have nothing random but reformer's seeded hashes.
_ONLY_IN_TRAINING = ("reformer", "rwkv")


def _shrunk(kind: type, layers: int, settings: dict[str, Any]):
    """An instance of a config class: its defaults with every known size replaced, its sub-configs likewise."""
    settings = dict(settings)
    nested = [name for name, value in settings.items() if isinstance(value, dict) and name.endswith("config")]
    inner = {name: settings.pop(name) for name in nested}
    default = settings.pop("_default", None) or kind()
    values = {name: value for name, value in vars(default).items() if not name.startswith("_")}
    count = next((values[name] for name in _LAYERS if isinstance(values.get(name), int)), 0)
    per_layer = {n: v for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count > layers}
    picked = _varied(list(zip(*per_layer.values(), strict=True)), layers) if per_layer else []
    kwargs: dict[str, Any] = {}
    for name, value in values.items():
        if hasattr(value, "to_dict"):
            kwargs[name] = _shrunk(type(value), layers, inner.pop(name, {}) | {"_default": value}).to_dict()
        elif name in per_layer:
            kwargs[name] = [value[index] for index in picked]
        elif name == "is_decoder":
            kwargs[name] = True
        elif value is None and name in _UNSET:
            kwargs[name] = _MEANS[name]
        elif isinstance(value, bool):
            continue
        elif isinstance(value, int):
            small_value = _small(name, value, layers)
            if small_value != value:
                kwargs[name] = small_value
        elif isinstance(value, float) and ("drop" in name or "jitter" in name):
            kwargs[name] = 0.0
    if "qk_rope_head_dim" in kwargs:  # multi-head latent attention has as many key heads as query heads
        kwargs |= {name: 4 for name in ("num_key_value_heads", "head_dim") if name in kwargs}
    return kind(**(kwargs | settings))


def _small(name: str, value: int, layers: int) -> int:
    if name in _LAYERS:
        return layers
    if name in _MEANS:
        return min(value, _MEANS[name]) if value > 0 else value
    if name.endswith(("token_id", "token_index")) and value >= 90:
        return {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 60 + sum(map(ord, name)) % 30)
    return value


def _varied(rows: list[tuple], count: int) -> list[int]:
    """The places of `count` rows, in order, that show as many different ones as can be."""
    first = [index for index, row in enumerate(rows) if row not in rows[:index]][:count]
    rest = [index for index in range(len(rows)) if index not in first]
    return sorted(first + rest[: count - len(first)])


_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 4,
    "indexer_compress_ratio": 2,
}
_HYBRID = {
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
# What the defaults of a class leave contradictory once they are small.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 2]},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots1": {"n_shared_experts": 1},
    "dots3_note": {"text_config": {"per_layer_config": {}, "head_dim": 8}, "vision_config": {"adapter_in_dim": 32}},
    "dots3_note_text": {"per_layer_config": {}, "head_dim": 8},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen4_exp": {"text_config": _INDEXER | {"head_dim": 8}},
    "qwen4_exp_text": _INDEXER,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "mamba2": {"head_dim": 16},
    "reformer": {
        "attn_layers": ["local", "lsh", "local", "lsh"],
        "axial_pos_embds": False,
        "num_buckets": 4,
        "hash_seed": 1,
    },
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "mode": "train"},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID | {"mamba_dt_rank": 2},
    "zamba2": _HYBRID | {"mamba_headdim": 16, "n_mamba_heads": 4, "num_mem_blocks": 1},
}
