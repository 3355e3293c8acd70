"""The three ways transformers calls an experts module, each as a dispatch: tokens, ids and weights out, results back.

T tokens      D model dim      K choices      E experts, L of them on this rank
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from am_moe.expert_parallel.dispatch import Dispatcher, Received
from am_moe.expert_parallel.experts import Experts
from am_moe.expert_parallel.local_experts import run_local_experts
from am_moe.expert_parallel.shared_tokens import share_of, whole_again


@dataclass(frozen=True)
class Spread:
    """How an experts module is spread, kept at the module as `spread_experts`.

    Attributes:
        experts: what the module is.
        mesh: the expert axis.
        local: L, the experts of this rank.
        dispatcher: how tokens travel.
        tp_mesh: ranks that hold the same tokens, if the expert axis goes across those.
        given_forward: the forward that the module had of its own, instead of its class's.
    """

    experts: Experts
    mesh: DeviceMesh
    local: int
    dispatcher: Dispatcher
    tp_mesh: DeviceMesh | None
    given_forward: Callable[..., Any] | None = None

    @property
    def gradient_scale(self) -> float:
        """Tokens of all ranks of the axis contribute; those of ranks with the same tokens are one data rank's."""
        return (self.tp_mesh.size() if self.tp_mesh else 1) / self.mesh.size()


# Takes `x_TD`, `ids_TK` and `weights_TK` to the experts' ranks, through their experts, and back.
Through = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def routed(through: Through, experts: Experts, hidden_states, top_k_index, top_k_weights) -> torch.Tensor:
    """Tokens `(..., D)` with their choices `(T, K)`; ids beyond the experts return the token where it is."""
    x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
    y_TD = through(x_TD, top_k_index, top_k_weights)
    if experts.identity:
        kept_TK = top_k_weights * (top_k_index >= experts.num_experts)
        y_TD = y_TD + (x_TD * kept_TK.sum(-1, keepdim=True)).to(y_TD.dtype)
    return y_TD.reshape(hidden_states.shape)


def rows(through: Through, experts: Experts, hidden_states) -> torch.Tensor:
    """`(E C, D)`: C rows for each expert, one expert after the other, zero where an expert is not wanted.

    A bias-free expert gives zeros, and gradients of zero, for a row of zeros, so only the others travel.
    """
    each = hidden_states.shape[0] // experts.num_experts
    index_N = (hidden_states.detach() != 0).any(-1).nonzero().squeeze(-1)
    ids_N1 = torch.div(index_N, max(each, 1), rounding_mode="floor")[:, None]
    x_ND = hidden_states.index_select(0, index_N)
    y_ND = through(x_ND, ids_N1, x_ND.new_ones(ids_N1.shape))
    return torch.zeros_like(hidden_states).index_copy(0, index_N, y_ND)


def linear(through: Through, experts: Experts, inputs, expert_size) -> torch.Tensor:
    """`(N, in)` sorted by expert, and how many rows are each expert's."""
    sizes_E = torch.as_tensor(expert_size, device=inputs.device)
    ids_N1 = torch.arange(len(sizes_E), device=inputs.device).repeat_interleave(sizes_E)[:, None]
    return through(inputs, ids_N1, inputs.new_ones(ids_N1.shape))


CALLS = {"routed": routed, "rows": rows, "linear": linear}


def through_ranks(module: Any, spread: Spread, x_TD, ids_TK, weights_TK) -> torch.Tensor:
    """To the experts' ranks, through their experts, and back: `(T, F)` in the dtype of the tokens."""
    group = spread.mesh.get_group()
    whole_T = x_TD.shape[0]
    if spread.tp_mesh is not None:
        x_TD, ids_TK, weights_TK = share_of(spread.tp_mesh, x_TD, ids_TK, weights_TK)
    received: Received = spread.dispatcher.dispatch(x_TD, ids_TK, weights_TK, spread.local, group)
    out_RF = run_local_experts(module, spread.experts, spread.local, spread.gradient_scale, received)
    y_TF = spread.dispatcher.combine(out_RF, received, group)
    return y_TF if spread.tp_mesh is None else whole_again(spread.tp_mesh, y_TF, whole_T)
