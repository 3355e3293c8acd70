"""Stacked experts over the tensor-parallel axis: each rank holds a slice of the experts and sees every token."""

from __future__ import annotations

import functools
import importlib.metadata
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement, Shard

from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over
from am_tp_styles.communication import sum_gradients, sum_gradients_in_order, sum_over_ranks
from am_tp_styles.layer_parameters import note_local
from am_tp_styles.local_parameters import local_parameters
from am_tp_styles.style import LocalStyle


class ExpertsOverTensorAxis(LocalStyle):
    """Shard stacked experts `(E, ...)` on the expert dim over ranks that hold the same tokens.

    The module's own forward runs on every rank with that rank's experts; choices of other ranks' experts become
    the id that transformers skips, and the ranks' outputs are summed. The router stays replicated.

    Collectives (the given axis): one all-reduce of the output `(T, D)` forward; backward one of the tokens' gradient
    and one of the routing weights'.
    """

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        return {name: Shard(0) for name, _ in module.named_parameters(recurse=False)}

    def attach(self, module: Any, axis: Axis) -> None:
        module.num_global_experts = module.num_experts
        module.num_experts //= axis.size
        # transformers' grouped and batched kernels handle the id that means "no expert" only if they see this.
        module._is_expert_parallel = True
        module.tensor_axis = axis
        note_local(module, dict.fromkeys(module._parameters, False))
        put_over(module, _OwnExperts)


class _OwnExperts:
    def forward(
        self: Any,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        axis: Axis = self.tensor_axis
        if top_k_index is None or top_k_weights is None:
            return self._forward_in_blocks(hidden_states)
        hidden_states, top_k_weights = sum_gradients_in_order(axis, hidden_states, top_k_weights)
        ids = top_k_index - axis.rank * self.num_experts
        elsewhere = (ids < 0) | (ids >= self.num_experts)
        with local_parameters(self, axis):
            out = super().forward(
                hidden_states, ids.masked_fill(elsewhere, _no_expert(self)), top_k_weights.masked_fill(elsewhere, 0)
            )
            # A rank whose experts nobody chose still has a graph through all, so that every rank reduces the same.
            for tensor in (hidden_states, top_k_weights, *self._parameters.values()):
                if tensor is not None:
                    out = out + tensor.flatten()[:0].sum()
        return sum_over_ranks(out, axis)

    def _forward_in_blocks(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        """Experts that take `(E * T, D)`, each expert's own T rows in order, and return them: run this rank's rows."""
        axis: Axis = self.tensor_axis
        hidden_states = sum_gradients(hidden_states, axis)
        blocks = hidden_states.unflatten(0, (axis.size, -1))
        with local_parameters(self, axis):
            mine = super().forward(blocks[axis.rank].clone())
        rows = torch.zeros_like(hidden_states).unflatten(0, (axis.size, -1))
        place = torch.tensor([axis.rank], device=rows.device)
        return sum_over_ranks(rows.index_copy(0, place, mine[None]).flatten(0, 1), axis)


def _no_expert(module: Any) -> int:
    """The id that a module skips. With transformers 5.17 some do not: then the first expert, whose weight is zero."""
    if not type(module).__module__.startswith("transformers."):
        return module.num_experts
    return module.num_experts if _transformers_version() >= (5, 18) else 0


@functools.cache
def _transformers_version() -> tuple[int, int]:
    """Read once: a forward asks."""
    major, minor = importlib.metadata.version("transformers").split(".")[:2]
    return int(major), int(minor)
