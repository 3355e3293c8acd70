"""Whether a layer treats every token alike, and so may run on a part of the sequence: found out on a small input."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn


def treats_tokens_alike(module: Any, dim: int) -> bool:
    """Whether what a layer returns for some of the tokens is what it returns for them among all.

    Args:
        module: takes a tensor `(B, S, ..., D)`; its weights may be on meta.
        dim: of the tokens; 2 for a norm on heads `(B, S, heads, head_dim)`.

    Issues no collective, and leaves random state as it is.
    """
    if type(module) in (nn.LayerNorm, nn.RMSNorm, nn.Linear, nn.Dropout, nn.Identity):
        return dim < 2 or dim < 4 - len(getattr(module, "normalized_shape", (1,)))
    random = torch.Generator().manual_seed(0)
    twin = copy.deepcopy(module, _on_the_cpu(module, random)).eval()
    width = next((p.shape[-1] for p in module.parameters()), 8)
    x = torch.randn(2, *([3] * (dim - 1)), 4, width, generator=random, dtype=torch.float64)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            whole, halves = twin(x), [twin(half) for half in x.chunk(2, dim)]
            return whole.shape[: dim + 1] == x.shape[: dim + 1] and torch.allclose(
                torch.cat(halves, dim), whole, rtol=1e-4, atol=1e-6
            )
    except Exception:  # whatever the layer's own code raises on such an input
        return False


def _on_the_cpu(module: Any, random: torch.Generator) -> dict[int, Any]:
    """What a deep copy shall have in place of the parameters and buffers."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
        memo[id(parameter)] = nn.Parameter(values, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.ones(buffer.shape, dtype=torch.float64 if buffer.is_floating_point() else buffer.dtype)
    return memo
