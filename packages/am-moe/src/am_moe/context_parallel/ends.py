"""Tokens of a rank from whole sequences and back, with gradients, at the two ends of a model's stack."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from am_moe.context_parallel.batch import in_order, shard_sequence
from am_moe.context_parallel.mixers import gather_parts
from am_moe.context_parallel.rules import Part

_TOKENS = Part(1)


def cut_tokens(tensor: torch.Tensor, mesh: DeviceMesh, dim: int = 1) -> torch.Tensor:
    """This rank's tokens along a dim; the gradient of the others is zero here, as theirs have it."""
    return shard_sequence(tensor, mesh, dim)


def gather_tokens(tensor: torch.Tensor, mesh: DeviceMesh, part: Part = _TOKENS) -> torch.Tensor:
    """Whole sequences from each rank's tokens, which are at `part`, in order.

    The result is contiguous, as a batch is that nobody cut: models view masks and labels as they like.

    Every rank computes the same with them, so each of their losses is the loss: gradients are summed over the ranks,
    which an average over the ranks divides again.

    Collectives: for each axis of the mesh an all-gather, and a reduce-scatter in the backward.
    """
    dim = part.dim
    tokens = tensor.unflatten(dim, (part.outer, -1, part.inner)).movedim(dim + 1, 0)[None]
    for axis in reversed(range(mesh.ndim)):
        tokens = gather_parts(tokens, mesh.get_group(axis))
    return in_order(tokens, mesh.size())[0].movedim(0, dim + 1).flatten(dim, dim + 2).contiguous()
