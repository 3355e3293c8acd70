"""Attention as one kernel, where values are narrower than queries, as in DeepSeek's.

On a GPU it is; torch's kernel for the CPU, which traces run, wants them alike and would fall back to products that hold
every score. In the trace values are padded; transformers' own registries take the function, under a name of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_NAME = "sdpa_with_padded_values"


def fuse_attention(model: Any) -> None:
    """Let a transformers model that attends by sdpa pad its values; other models are left as they are."""
    configs = {id(m.config): m.config for m in model.modules() if getattr(m, "config", None) is not None}.values()
    mine = [config for config in configs if getattr(config, "_attn_implementation", None) == "sdpa"]
    if not mine:
        return
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(_NAME, _padded)
    AttentionMaskInterface.register(_NAME, sdpa_mask)
    for config in mine:
        config._attn_implementation = _NAME


def _padded(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    narrower = query.shape[-1] - value.shape[-1]
    if narrower <= 0:
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)
    out, weights = sdpa_attention_forward(module, query, key, nn.functional.pad(value, (0, narrower)), *args, **kwargs)
    return out[..., : value.shape[-1]], weights
