"""How many tokens each expert gets: counters, what a training loop logs of them, and balancing without a loss."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from am_moe._torch_compat import in_backward
from am_moe.expert_parallel.experts import Experts, describe_experts

# The biases that routers add to their scores to choose experts, but not to weigh them.
_BIASES = ("e_score_correction_bias", "expert_bias", "score_correction_bias")


class ExpertLoad:
    """Counts the choices of every layer's experts from now on, in forward only: recomputation counts nothing.

    A count is a sum over this rank's tokens; `total` adds up the ranks. Choices of no expert are not counted. Works
    before and after `apply_ep`, and without it::

        load = ExpertLoad(model)
        ...                                        # forward and backward of a step
        print(load.metrics(mesh["dp"]))
        load.balance(mesh["dp"], rate=1e-3)        # for routers with a correction bias
        load.reset()

    Args:
        model: any model in which `find_experts` finds something.

    Attributes:
        chosen: for each experts module by name, `(E,)` int64: how often this rank's tokens chose each expert.
        computed: for each experts module that is spread, how many rows this rank's experts computed, 0-dim int64.

    Raises:
        ValueError: the model has no experts.
    """

    def __init__(self, model: nn.Module) -> None:
        self._found = describe_experts(model)
        if not self._found:
            raise ValueError(f"{type(model).__name__} has no experts whose load could be counted")
        self._model = model
        self.chosen: dict[str, torch.Tensor] = {}
        self.computed: dict[str, torch.Tensor] = {}
        self._hooks = []
        for experts in self._found:
            module = model.get_submodule(experts.name)
            hook = _Count(self, experts)
            self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            module.when_computed = hook.computed
        self.reset()

    def reset(self) -> None:
        """Start from zero."""
        for experts in self._found:
            device = next(self._model.get_submodule(experts.name).parameters()).device
            self.chosen[experts.name] = torch.zeros(experts.num_experts, dtype=torch.int64, device=device)
            self.computed[experts.name] = torch.zeros((), dtype=torch.int64, device=device)

    def remove(self) -> None:
        """Stop counting."""
        for hook in self._hooks:
            hook.remove()
        for experts in self._found:
            del self._model.get_submodule(experts.name).when_computed

    def total(self, mesh: DeviceMesh | None = None) -> dict[str, torch.Tensor]:
        """The counts of all tokens: for each experts module `(E,)` int64.

        Args:
            mesh: the ranks with different tokens: data and context axes. Ranks of a tensor-parallel group count the
                same tokens, so their axis stays out. None for this rank's own.

        Collectives: one all-reduce over each axis of the mesh.
        """
        stacked = torch.cat([self.chosen[experts.name] for experts in self._found])
        _sum_over(stacked, mesh)
        sizes = [experts.num_experts for experts in self._found]
        return {e.name: part for e, part in zip(self._found, stacked.split(sizes), strict=True)}

    def metrics(self, mesh: DeviceMesh | None = None) -> dict[str, float]:
        """What a loop can log, over all layers: the load of the busiest expert, the least busy one, and what got lost.

        Returns:
            `load_max`: the most choices of an expert over its layer's mean, of the worst layer; 1 is even.
            `load_min`: the fewest, of the worst layer.
            `load_rank_max`: the most choices that fall on one rank of the expert axis over the mean of its ranks.
            `dropped`: choices that no expert computed, as a share of all: 0, since dispatchers drop nothing.

        Args:
            mesh: as in `total`. For `dropped` it must cover the expert axis.

        Collectives: two all-reduces over each axis of the mesh, and one over `tp_mesh` if `apply_ep` got one.
        """
        totals = self.total(mesh)
        computed = torch.stack([self.computed[experts.name] for experts in self._found])
        spreads = [getattr(self._model.get_submodule(e.name), "spread_experts", None) for e in self._found]
        _sum_over(computed, mesh)
        _sum_over(computed, spreads[0].tp_mesh if spreads[0] is not None else None)
        numbers = []
        for experts, spread, rows in zip(self._found, spreads, computed.unbind(), strict=True):
            counts = totals[experts.name].double()
            mean, ranks = counts.mean().clamp(min=1e-30), spread.mesh.size() if spread is not None else 1
            lost, choices = (counts.sum() - rows, counts.sum()) if spread is not None else (counts.new_zeros(()),) * 2
            by_rank = counts.view(ranks, -1).sum(-1) / (mean * (len(counts) // ranks))
            numbers.append(torch.stack([counts.max() / mean, counts.min() / mean, by_rank.max(), lost, choices]))
        most, least, busiest, lost, choices = torch.stack(numbers, dim=1).tolist()  # the one host sync
        return {
            "load_max": max(1.0, *most),
            "load_min": min(1.0, *least),
            "load_rank_max": max(1.0, *busiest),
            "dropped": sum(lost) / sum(choices) if sum(choices) else 0.0,
        }

    def balance(self, mesh: DeviceMesh | None = None, rate: float = 1e-3) -> None:
        """Raise the correction bias of experts with less than their layer's mean load, lower that of the others.

        Auxiliary-loss-free balancing (arXiv 2408.15664): the bias moves by `rate` in the direction of the error. Call
        it once after each step, before `reset`; every rank gets the same biases.

        Args:
            mesh: as in `total`.
            rate: how far a bias moves.

        Collectives: those of `total`. Units of FSDP2 that are gathered are sharded again first.

        Raises:
            ValueError: no router has a correction bias with an entry for each expert.
        """
        for module in self._model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # what a forward has gathered is a copy: a change of it would be lost
        biases = [(experts, _bias_of(self._model, experts)) for experts in self._found]
        if all(bias is None for _, bias in biases):
            raise ValueError(f"no router of {type(self._model).__name__} has a correction bias: none of {_BIASES}")
        totals = self.total(mesh)
        with torch.no_grad():
            for experts, bias in biases:
                if bias is not None:
                    counts = totals[experts.name].double()
                    _add(bias, rate * (counts.mean() - counts).sign())


class _Count:
    """A hook that counts the ids an experts module is called with, whatever way it is called."""

    def __init__(self, load: ExpertLoad, experts: Experts) -> None:
        self.load, self.experts = load, experts

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if in_backward():
            return
        number = self.experts.num_experts
        first, *rest = [*args, *(kwargs[name] for name in self.experts.arguments[len(args) :])]
        if self.experts.call == "routed":
            ids = rest[0].flatten().long().clamp(max=number)
            counts = ids.new_zeros(number + 1).scatter_add_(0, ids, torch.ones_like(ids))[:number]
        elif self.experts.call == "linear":
            counts = torch.as_tensor(rest[0], device=first.device)
        else:
            counts = (first.detach() != 0).any(-1).view(number, -1).sum(-1)
        self.load.chosen[self.experts.name] += counts

    def computed(self, rows: torch.Tensor) -> None:
        if not in_backward():
            self.load.computed[self.experts.name] += rows


def _sum_over(counts: torch.Tensor, mesh: DeviceMesh | None) -> None:
    for axis in range(mesh.ndim if mesh is not None else 0):
        dist.all_reduce(counts, group=mesh.get_group(axis))


def _add(bias: torch.Tensor, change_E: torch.Tensor) -> None:
    """Add to a bias, or to this rank's part of one that FSDP2 has sharded."""
    change = change_E.to(bias.dtype).view(bias.shape)
    if isinstance(bias, DTensor):
        change = DTensor.from_local(change, bias.device_mesh, run_check=False).redistribute(placements=bias.placements)
    bias += change


def _bias_of(model: nn.Module, experts: Experts) -> torch.Tensor | None:
    """The correction bias beside an experts module: what its block holds of such a name with an entry per expert."""
    block = model.get_submodule(experts.name.rpartition(".")[0])
    for name, tensor in [*block.named_buffers(), *block.named_parameters()]:
        if name.rpartition(".")[2] in _BIASES and tensor.numel() == experts.num_experts:
            return tensor
    return None
