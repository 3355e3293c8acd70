"""Styles for modules whose own forward runs on this rank's part: plain local tensors, with the sums that that needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import Placement

from am_tp_plans.styles.around import change_input, change_output
from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over
from am_tp_styles.communication import sum_gradients, sum_over_ranks
from am_tp_styles.layer_parameters import note_local
from am_tp_styles.local_parameters import local, local_parameters
from am_tp_styles.style import LocalStyle


class LocalShards(LocalStyle):
    """Shard some of a module's own parameters and run its forward on this rank's shards of them.

    For parameters that a module uses in its own forward, such as attention sinks per head or stacked shared experts.

    Args:
        layouts: how to shard which parameters; the others stay as they are.
        sum_input_gradients: the input is whole on every rank and its gradient is a part: sum it over the ranks.
        sum_output: the output is a part of a sum over the ranks.
        partial: own parameters that stay whole but meet sharded activations: their gradients are summed.

    Collectives (the given axis): when applied, a scatter per parameter in `layouts`; then one all-reduce per tensor of
    the input in backward, and one per output in forward, where asked for.
    """

    def __init__(
        self,
        layouts: Mapping[str, Placement] | None = None,
        *,
        sum_input_gradients: bool = False,
        sum_output: bool = False,
        partial: Iterable[str] = (),
    ) -> None:
        super().__init__()
        self.partial = set(partial)
        self.layouts = dict(layouts or {})
        self.sum_input_gradients = sum_input_gradients
        self.sum_output = sum_output

    def layout(self, module: nn.Module, ranks: int) -> dict[str, Placement]:
        # some layers have a parameter, others do not
        return {name: p for name, p in self.layouts.items() if module._parameters.get(name) is not None}

    def attach(self, module: Any, axis: Axis) -> None:
        held = self.partial | set(self.layouts)
        note_local(module, {name: name in self.partial for name in module._parameters if name in held})
        module.local_shards = _Shards(axis, frozenset(self.partial), self.sum_input_gradients, self.sum_output)
        put_over(module, _OnOwnShards)


@dataclass(frozen=True)
class _Shards:
    axis: Axis
    summed: frozenset[str]
    sum_input_gradients: bool
    sum_output: bool


class _OnOwnShards:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        shards: _Shards = self.local_shards
        if shards.sum_input_gradients:
            args = tuple(_with_summed_gradient(value, shards.axis) for value in args)
            kwargs = {name: _with_summed_gradient(value, shards.axis) for name, value in kwargs.items()}
        with local_parameters(self, shards.axis, shards.summed):
            output = super().forward(*args, **kwargs)
        return sum_over_ranks(output, shards.axis) if shards.sum_output else output


def _with_summed_gradient(value: Any, axis: Axis) -> Any:
    differentiable = isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad
    return sum_gradients(value, axis) if differentiable else value


class ReplicatedWithGradAllReduce(LocalStyle):
    """Whole parameters on every rank that see only the rank's part of the activations: their gradients are summed.

    For norms on a rank's own heads. The gradients are whole when `backward()` returns.

    Collectives (the given axis): one all-reduce per trainable parameter and backward; with `apply_plan`, one for all.

    Args:
        names: which of the module's own parameters; None for all, those of its children too.
    """

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.names = None if names is None else set(names)

    def attach(self, module: Any, axis: Axis) -> None:
        summed = {}
        for name, owner in module.named_modules():
            dot = name + "." if name else ""
            own = [leaf for leaf in owner._parameters if self.names is None or dot + leaf in self.names]
            if own:
                note_local(owner, dict.fromkeys(own, True))
                summed[name] = frozenset(own)
        module.summed_parameters = (axis, summed)
        put_over(module, _SumsGradients)


class _SumsGradients:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _summed_parameters(self):
            return super().forward(*args, **kwargs)


@contextmanager
def _summed_parameters(module: Any) -> Iterator[None]:
    """Exchange parameters for views whose gradients are summed, unless that was done for the whole model."""
    axis, summed = module.summed_parameters
    owners = [(module.get_submodule(name) if name else module, names) for name, names in summed.items()]
    held = [owner._parameters for owner, _ in owners]
    try:
        for owner, names in owners:
            owner._parameters = {
                name: local(p, axis) if name in names and p is not None else p for name, p in owner._parameters.items()
            }
        yield
    finally:
        for (owner, _), parameters in zip(owners, held, strict=True):
            owner._parameters = parameters


class MlaKvAProjection(LocalStyle):
    """The first projection of multi-head latent attention: whole, but its rotary part goes to each rank's heads alone.

    Of the output's last dim, the latent part is read by a colwise projection, which sums its gradient; the last
    `rope_dim` columns go straight to the heads, so their gradient is summed here.

    Args:
        rope_dim: width of the rotary part, `qk_rope_head_dim` of the config.

    Collectives (the given axis): one all-reduce of `(B, S, rope_dim)` in backward.
    """

    def __init__(self, rope_dim: int | None = None) -> None:
        super().__init__()
        self.rope_dim = rope_dim

    def attach(self, module: nn.Module, axis: Axis) -> None:
        if not self.rope_dim:
            raise ValueError("MlaKvAProjection needs rope_dim, the config's qk_rope_head_dim")
        change_output(module, partial(_sum_rotary, self.rope_dim, axis))


def _sum_rotary(rope_dim: int, axis: Axis, output: torch.Tensor) -> torch.Tensor:
    if axis.size == 1:
        return output
    latent, rotary = output.split([output.shape[-1] - rope_dim, rope_dim], dim=-1)
    return torch.cat([latent, sum_gradients(rotary, axis)], dim=-1)


class DividedInput(LocalStyle):
    """Divide a module's input by the number of ranks: what runs on every rank inside a sum over the ranks."""

    def attach(self, module: nn.Module, axis: Axis) -> None:
        change_input(module, partial(_divided, axis.size))


def _divided(ranks: int, tensor: torch.Tensor) -> torch.Tensor:
    return tensor / ranks


class Replicated(LocalStyle):
    """Whole on every rank, with whole gradients: nothing to do but say so."""

    def attach(self, module: nn.Module, axis: Axis) -> None:
        pass
