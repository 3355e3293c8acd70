"""Shrink a config of transformers: few layers and small widths, everything else as it was."""

from __future__ import annotations

from typing import Any

_LAYERS = "num_hidden_layers n_layer n_layers num_layers decoder_layers num_decoder_layers num_blocks encoder_layers"
_HEADS = "num_attention_heads decoder_attention_heads encoder_attention_heads n_head n_heads num_heads"
_KEY_HEADS = "num_key_value_heads multi_query_group_num n_head_kv num_kv_heads"
_WIDTHS = "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim lru_width embedding_dim"
# The largest that a small model has, by what the names of transformers' configs mean.
_SIZES = {
    256: "vocab_size unpadded_vocab_size decoder_vocab_size vocab_size_per_layer_input",
    512: "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions max_sequence_length",
    96: "intermediate_size decoder_ffn_dim encoder_ffn_dim ffn_dim ffn_hidden_size dff dim_ff feed_forward_size "
    "n_inner intermediate_size_mlp dense_intermediate_size",
    32: "moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size expert_ffn_hidden_size "
    "shared_intermediate_size q_lora_rank kv_lora_rank hidden_size_per_layer_input",
    16: "head_dim qk_nope_head_dim v_head_dim qk_head_dim d_head kv_channels attention_head_size linear_key_head_dim "
    "linear_value_head_dim query_pre_attn_scalar sliding_window attention_window_size local_attention",
    8: "num_experts n_routed_experts num_local_experts moe_num_experts qk_rope_head_dim rotary_dim index_head_dim",
    4: "linear_num_key_heads linear_num_value_heads index_n_heads",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk n_group first_k_dense_replace",
    1: "topk_group",
}
_LARGEST = {name: size for size, names in _SIZES.items() for name in names.split()}
_UNSET = ("head_dim", "num_key_value_heads")  # derived from other sizes where a config leaves them open


def shrink(config: Any, layers: int, ranks_of_heads: int) -> Any:
    """A config of the same class with small sizes and without dropout; its sub-configs likewise.

    Args:
        config: of transformers.
        layers: how many of them are kept, of as many kinds as there are.
        ranks_of_heads: between how many tensor ranks key heads must divide.
    """
    key_heads = max(2, ranks_of_heads)
    heads = 2 * key_heads
    meant = {_HEADS: heads, _KEY_HEADS: key_heads, _WIDTHS: 16 * heads}
    largest = _LARGEST | {name: size for names, size in meant.items() for name in names.split()}
    return _shrunk(config, layers, largest)


def _shrunk(config: Any, layers: int, largest: dict[str, int]) -> Any:
    values = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    count = next((values[name] for name in _LAYERS.split() if isinstance(values.get(name), int)), 0)
    kept: dict[str, Any] = {}
    by_layer = {n: v for n, v in values.items() if isinstance(v, (list, tuple)) and len(v) == count > 0}
    layers = min(layers, count) if by_layer else layers  # a kind that is listed for each cannot be made up
    places = _of_every_kind(list(zip(*by_layer.values(), strict=True)), layers) if by_layer else []
    for name, value in values.items():
        if hasattr(value, "to_dict"):
            kept[name] = _shrunk(value, layers, largest).to_dict()
        elif name in by_layer:
            kept[name] = [value[place] for place in places]
        elif value is None and name in _UNSET and name in largest:
            kept[name] = largest[name]
        elif name in _LAYERS.split() and isinstance(value, int):
            kept[name] = layers
        elif name in largest and isinstance(value, int) and value > 0:
            kept[name] = min(value, largest[name])
        elif name.endswith("token_id") and isinstance(value, int):
            kept[name] = min(value, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3))
        elif isinstance(value, float) and ("drop" in name or name.endswith("pdrop")):
            kept[name] = 0.0
    if "qk_rope_head_dim" in kept:  # attention through latent vectors has as many key heads as query heads
        kept["num_key_value_heads"] = kept["num_attention_heads"]
        kept["head_dim"] = kept["qk_rope_head_dim"]
    kind = type(config)
    return kind(**{name: value for name, value in config.to_dict().items() if name in values} | kept)


def _of_every_kind(rows: list[tuple], count: int) -> list[int]:
    """The places of `count` rows, in order, that show as many different ones as can be."""
    first = [place for place, row in enumerate(rows) if row not in rows[:place]][:count]
    rest = [place for place in range(len(rows)) if place not in first]
    return sorted(first + rest[: count - len(first)])
