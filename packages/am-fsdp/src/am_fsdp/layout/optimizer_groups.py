"""Move an optimizer's parameter groups to other parameters of the same names, and watch its steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class OptimizerGroups:
    """The names of the parameters in each group of an optimizer, in order."""

    groups: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, optimizer: torch.optim.Optimizer) -> OptimizerGroups:
        """Read the groups of an optimizer over a model's parameters.

        Raises:
            ValueError: the optimizer has state, which would be lost, or holds a parameter of something else.
        """
        if optimizer.state:
            raise ValueError(
                "the optimizer has state already, which sharding would lose; shard before the first step, and load the "
                "state afterwards"
            )
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        groups = []
        for index, group in enumerate(optimizer.param_groups):
            strangers = [i for i, parameter in enumerate(group["params"]) if id(parameter) not in names]
            if strangers:
                raise ValueError(
                    f"parameter {strangers[0]} of group {index} of the optimizer is none of {type(model).__name__}'s; "
                    "make the optimizer of the model's own parameters"
                )
            groups.append(tuple(names[id(parameter)] for parameter in group["params"]))
        return cls(tuple(groups))

    @property
    def names(self) -> tuple[str, ...]:
        """Of all parameters, in the optimizer's order."""
        return tuple(name for names in self.groups for name in names)

    def move_to(self, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> None:
        """Give the optimizer the parameters that have these names now; its groups and their settings stay."""
        for group, names in zip(optimizer.param_groups, self.groups, strict=True):
            group["params"] = [parameters[name] for name in names]


@contextmanager
def without_update(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let steps with zero gradients make the optimizer's state and change neither weights nor the count of steps.

    An AdamW step with zero gradients decays weights, and every Adam counts it in its bias correction.
    """
    before = [{key: group[key] for key in ("lr", "weight_decay") if key in group} for group in optimizer.param_groups]
    for group, settings in zip(optimizer.param_groups, before, strict=True):
        group.update({key: value * 0 for key, value in settings.items()})
    try:
        yield
    finally:
        for group, settings in zip(optimizer.param_groups, before, strict=True):
            group.update(settings)
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"] * 0


def check_gradients_before_step(optimizer: torch.optim.Optimizer, names: tuple[str, ...]) -> None:
    """Make every step raise on all ranks, and change nothing, when a gradient is not finite.

    Args:
        optimizer: the same on every rank of the default group.
        names: of its parameters, in order, for the message.

    Collectives: per step one all-reduce of one number over the default group.
    """

    def check(optimizer: torch.optim.Optimizer, _args: Any, _kwargs: Any) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        gradients = {
            name: parameter.grad.to_local() if isinstance(parameter.grad, DTensor) else parameter.grad
            for name, parameter in zip(names, parameters, strict=True)
            if parameter.grad is not None
        }
        held = [gradient for gradient in gradients.values() if gradient.numel()]
        device = held[0].device if held else parameters[0].device
        bad = torch.zeros((), device=device)
        for gradient in held:
            bad = torch.maximum(bad, (~torch.isfinite(gradient)).any().to(bad.dtype))
        if dist.is_initialized():
            dist.all_reduce(bad, dist.ReduceOp.MAX)
        if bad.item():
            here = [name for name, gradient in gradients.items() if not bool(torch.isfinite(gradient).all())]
            raise RuntimeError(f"gradients are not finite; on this rank: {', '.join(here) or 'none'}")

    optimizer.register_step_pre_hook(check)
