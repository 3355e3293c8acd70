"""What a layer computes on this rank's shards: its own forward, between the two exchanges of `edges.py`.

A layer's state here is one plain attribute, its `Edges`, so that a deep copy computes with its own weights, a pickled
module comes back, and `to_empty` and FSDP2 may exchange its parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from am_tp_styles._torch_compat import exchanged_tensors
from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over
from am_tp_styles.communication import once
from am_tp_styles.dropout import shard_dropout
from am_tp_styles.edges import Edges, enter, leave
from am_tp_styles.layer_parameters import note_local
from am_tp_styles.local_parameters import local, local_parameters, local_views
from am_tp_styles.vocabulary import rows_here


def compute_on_shards(module: Any, edges: Edges) -> None:
    """Let a layer compute on this rank's shards: one of torch's own, or with kind `sequence` any that takes tokens.

    A layer is of torch's own if its forward is that of `nn.Linear`, `TPLinear` or `nn.Embedding`.
    """
    module.edges = edges
    for child in module.modules() if edges.kind == "sequence" else [module]:
        note_local(child, dict.fromkeys(child._parameters, edges.kind in ("sequence", "heads")))
        if edges.kind == "sequence":
            shard_dropout(child, edges.axis, edges.takes)
    put_over(module, OnShards)


class OnShards:
    """Over a layer's class."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward_on_shards(self, super().forward, *args, **kwargs)


def forward_on_shards(module: Any, forward: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`forward` of a layer with `edges`, on this rank's shards. Collectives: those of `enter` and `leave`."""
    edges: Edges = module.edges
    x = enter(x, edges)
    if edges.kind == "sequence":
        return leave(_on_tokens(module, forward, x, *args, **kwargs), edges, 0)
    held = module._parameters
    # not by a context manager, which costs as much again
    module._parameters = views = local_views(module, edges.axis, held if edges.kind == "heads" else ())
    try:
        if edges.kind == "rows":
            out = look_up_rows(x, module, module.num_embeddings, edges.axis)
        else:
            if edges.kind == "row" and views["bias"] is not None:
                views["bias"] = once(views["bias"], edges.axis)
            if edges.kind == "heads":
                views |= {name: edges.rows_of_own_head(v) for name, v in views.items() if v is not None}
            out = forward(x)
    finally:
        module._parameters = held
    return leave(out, edges, _width(module) if edges.kind in ("column", "features") else 0)


def _on_tokens(module: Any, forward: Callable, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if not module._modules:
        if all(type(parameter) is torch.Tensor for parameter in module._parameters.values()):
            return forward(x, *args, **kwargs)  # exchanged for the whole model
        with local_parameters(module, module.edges.axis, module._parameters):
            return forward(x, *args, **kwargs)
    with exchanged_tensors(module, partial(_summed_view, module.edges.axis)):
        return forward(x, *args, **kwargs)


def _summed_view(axis: Axis, _name: str, tensor: torch.Tensor) -> torch.Tensor:
    return local(tensor, axis)


def look_up_rows(ids: torch.Tensor, embedding: Any, whole: int, axis: Axis) -> torch.Tensor:
    """Zeros for ids that lie elsewhere, so that the ranks' sum is the lookup."""
    rows, here, padding = rows_here(ids, embedding.weight.shape[0], whole, axis, embedding.padding_idx)
    return F.embedding(rows, embedding.weight, padding).masked_fill(~here.unsqueeze(-1), 0)


def _width(module: Any) -> int:
    return module.out_features if isinstance(module, nn.Linear) else module.embedding_dim
