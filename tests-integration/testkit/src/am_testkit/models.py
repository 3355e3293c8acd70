"""Small, real transformers models, the same on every rank."""

from __future__ import annotations

import torch
from torch import nn

_TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}

_FAMILY = {
    "qwen3_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2, "sliding_window": None},
}


def tiny(
    family: str,
    *,
    layers: int = 4,
    tied: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    attention: str = "eager",
    kind: str = "AutoModelForCausalLM",
    **overrides,
) -> nn.Module:
    """A model of the given transformers `model_type` with small sizes and seeded random weights; a causal LM unless
    `kind` names another of transformers' auto classes.

    Norm weights, biases and every other parameter are drawn at random too, so that no gradient is trivially
    zero or one. Dropout is whatever the config's default is (none for the families used here).
    """
    import transformers

    settings = _TINY | _FAMILY.get(family, {}) | overrides
    config = transformers.AutoConfig.for_model(
        family, num_hidden_layers=layers, tie_word_embeddings=tied, attn_implementation=attention, **settings
    )
    torch.manual_seed(seed)
    # The grouped matmul that transformers prefers for experts does not exist in float64.
    experts = {"experts_implementation": "eager"} if hasattr(config, "num_experts_per_tok") else {}
    model = getattr(transformers, kind).from_config(config, dtype=dtype, **experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model


def token_batch(batch: int, seq_len: int, *, vocab_size: int = 96, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and labels, both `(batch, seq_len)` int64, the same on every rank for one seed."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocab_size, (batch, seq_len + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def next_token_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of `(B, S, V)` logits against `(B, S)` labels."""
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
