"""Attention in a trace as it is on a GPU: one kernel, and causal without a mask.

torch's kernel for the CPU, which traces run, wants values as wide as queries, which DeepSeek's are not, and would fall
back to products that hold every score: they are padded. And transformers makes a mask of fake tensors where it would
make none. Its own registries take both functions, under a name of their own.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

_NAME = "sdpa_of_a_trace"


def fuse_attention(model: Any) -> None:
    """Let a transformers model that attends by sdpa do so; other models are left as they are."""
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}.values()
    mine = [config for config in configs if getattr(config, "_attn_implementation", None) == "sdpa"]
    if not mine:
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(_NAME, _padded)
    AttentionMaskInterface.register(_NAME, _mask)
    for config in mine:
        config._attn_implementation = _NAME


def _mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """None where every token sees all before it: transformers cannot tell that fake positions are of one text."""
    from transformers.masking_utils import sdpa_mask

    seen = kwargs.get("local_size") or math.inf
    plain = kwargs.get("attention_mask") is None and seen >= kwargs.get("kv_length", 0)
    return None if plain else sdpa_mask(*args, **kwargs)


def _padded(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    narrower = query.shape[-1] - value.shape[-1]
    if narrower <= 0:
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    out, weights = sdpa_attention_forward(module, query, key, nn.functional.pad(value, (0, narrower)), *args, **kwargs)
    return out[..., : value.shape[-1]], weights
