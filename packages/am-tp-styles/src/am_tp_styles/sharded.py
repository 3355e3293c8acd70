"""What a layer computes on this rank's shards: its own forward, between the two exchanges of `edges.py`.

A layer's state here is one plain attribute, its `Edges`, so that a deep copy computes with its own weights, a pickled
module comes back, and `to_empty` and FSDP2 may exchange its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over
from am_tp_styles.communication import once
from am_tp_styles.edges import Edges, enter, leave
from am_tp_styles.local_parameters import local_parameters
from am_tp_styles.summed_together import note_summed
from am_tp_styles.vocabulary import rows_here


def compute_on_shards(module: Any, edges: Edges) -> None:
    """Let a layer compute on this rank's shards: one of torch's own, or with kind `sequence` any that takes tokens.

    A layer is of torch's own if its forward is that of `nn.Linear`, `TPLinear` or `nn.Embedding`.
    """
    module.edges = edges
    if edges.kind == "sequence":
        note_summed(module, set(module._parameters))
    put_over(module, OnShards)


class OnShards:
    """Over a layer's class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward_on_shards(self, super().forward, *args, **kwargs)


def forward_on_shards(module: Any, forward: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`forward` of a layer with `edges`, on this rank's shards. Collectives: those of `enter` and `leave`."""
    edges: Edges = module.edges
    x = enter(x, edges)
    summed = module._parameters if edges.kind == "sequence" else ()
    with local_parameters(module, edges.axis, summed):
        if edges.kind == "rows":
            out = look_up_rows(x, module, module.num_embeddings, edges.axis)
        elif edges.kind == "row" and module._parameters["bias"] is not None:
            module._parameters["bias"] = once(module._parameters["bias"], edges.axis)
            out = forward(x)
        else:
            out = forward(x, *args, **kwargs)
    return leave(out, edges, _width(module) if edges.kind in ("column", "features") else out.shape[-1])


def look_up_rows(ids: torch.Tensor, embedding: Any, whole: int, axis: Axis) -> torch.Tensor:
    """Zeros for ids that lie elsewhere, so that the ranks' sum is the lookup."""
    rows, here, padding = rows_here(ids, embedding.weight.shape[0], whole, axis, embedding.padding_idx)
    return F.embedding(rows, embedding.weight, padding).masked_fill(~here.unsqueeze(-1), 0)


def _width(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
