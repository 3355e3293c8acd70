"""The LoRA layer these styles are for, as a user would write it."""

from __future__ import annotations

import torch
from torch import nn


class LoraLinear(nn.Linear):
    """base(x) + scale * B(A(dropout(x))), with `dora` each output row rescaled to `lora_magnitude`."""

    def __init__(self, in_features, out_features, *, rank=3, bias=True, dora=False, frozen=True, dropout=0.0):
        super().__init__(in_features, out_features, bias=bias, dtype=torch.float64)
        self.lora_A = nn.Linear(in_features, rank, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(rank, out_features, bias=False, dtype=torch.float64)
        self.scale = 0.5
        self.dropout = nn.Dropout(dropout)
        if dora:
            self.lora_magnitude = nn.Parameter(torch.rand(out_features, dtype=torch.float64) + 0.5)
        if frozen:
            self.weight.requires_grad_(False)

    def forward(self, x):
        adapter = self.scale * self.lora_B(self.lora_A(self.dropout(x)))
        if not hasattr(self, "lora_magnitude"):
            return super().forward(x) + adapter
        merged = self.weight + self.scale * (self.lora_B.weight @ self.lora_A.weight)
        rescale = self.lora_magnitude / torch.linalg.vector_norm(merged, dim=1)
        out = (nn.functional.linear(x, self.weight) + adapter) * rescale
        return out if self.bias is None else out + self.bias


class Block(nn.Module):
    """A colwise layer, a non-linearity, a rowwise layer: `up` and `down`."""

    def __init__(self, make, **kwargs):
        super().__init__()
        torch.manual_seed(0)
        self.up = make(8, 12, **kwargs)
        self.down = make(12, 8, **kwargs)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))
