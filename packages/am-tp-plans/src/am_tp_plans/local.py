"""Styles for modules whose own forward runs on this rank's part: plain local tensors, with the sums that that needs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle


class LocalShards(ParallelStyle):
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

    lora_neutral = True

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

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        group = device_mesh.get_group()
        for name, placement in self.layouts.items():
            parameter: Any = module._parameters.get(name)
            if parameter is None:
                continue  # some layers have it, others do not
            source = None if parameter.is_meta else getattr(self, "src_data_rank", 0)
            sharded = distribute_tensor(parameter.detach(), device_mesh, [placement], src_data_rank=source)
            module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))
        if self.partial:
            _sum_gradients_of(module, self.partial, group)
        forward = module.forward

        def on_shards(*args: Any, **kwargs: Any) -> Any:
            if self.sum_input_gradients:
                args = tuple(sum_gradients(a, group) if _differentiable(a) else a for a in args)
                kwargs = {k: sum_gradients(v, group) if _differentiable(v) else v for k, v in kwargs.items()}
            with local_parameters(module):
                output = forward(*args, **kwargs)
            return sum_over_ranks(output, group) if self.sum_output else output

        module.forward = on_shards
        return module


class ReplicatedWithGradAllReduce(ParallelStyle):
    """Whole parameters on every rank that see only the rank's part of the activations: their gradients are summed.

    For norms on a rank's own heads. The gradients are whole when `backward()` returns.

    Collectives (the given axis): one all-reduce per trainable parameter and backward.

    Args:
        names: which of the module's own parameters; None for all, those of its children too.
    """

    lora_neutral = True

    def __init__(self, names: Iterable[str] | None = None) -> None:
        super().__init__()
        self.names = None if names is None else set(names)

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        names = {name for name, _ in module.named_parameters()} if self.names is None else self.names
        _sum_gradients_of(module, names, device_mesh.get_group())
        return module


def _sum_gradients_of(module: nn.Module, names: set[str], group: dist.ProcessGroup) -> None:
    done = "_am_tp_plans_sums_gradient"

    def hook(module: nn.Module, _args: tuple) -> None:
        # Looked up at each forward: `to_empty`, `to` and FSDP2 exchange the tensors behind a parameter.
        for name, parameter in module.named_parameters():
            if name in names and parameter.requires_grad and not hasattr(parameter, done):
                parameter.register_hook(lambda gradient: _summed(gradient, group))
                setattr(parameter, done, True)

    module.register_forward_pre_hook(hook)


class MlaKvAProjection(ParallelStyle):
    """The first projection of multi-head latent attention: whole, but its rotary part goes to each rank's heads alone.

    Of the output's last dim, the latent part is read by a colwise projection, which sums its gradient; the last
    `rope_dim` columns go straight to the heads, so their gradient is summed here.

    Args:
        rope_dim: width of the rotary part, `qk_rope_head_dim` of the config.

    Collectives (the given axis): one all-reduce of `(B, S, rope_dim)` in backward.
    """

    lora_neutral = True

    def __init__(self, rope_dim: int | None = None) -> None:
        super().__init__()
        self.rope_dim = rope_dim

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not self.rope_dim:
            raise ValueError("MlaKvAProjection needs rope_dim, the config's qk_rope_head_dim")
        rope_dim, group = self.rope_dim, device_mesh.get_group()

        def sum_rotary(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            latent, rotary = output.split([output.shape[-1] - rope_dim, rope_dim], dim=-1)
            return torch.cat([latent, sum_gradients(rotary, group)], dim=-1)

        module.register_forward_hook(sum_rotary)
        return module


class DividedInput(ParallelStyle):
    """Divide a module's input by the number of ranks: what runs on every rank inside a sum over the ranks."""

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(lambda _module, args: (args[0] / device_mesh.size(), *args[1:]))
        return module


class Replicated(ParallelStyle):
    """Whole on every rank, with whole gradients: nothing to do but say so."""

    lora_neutral = True

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return module


@contextmanager
def local_parameters(module: Any) -> Iterator[list[torch.Tensor]]:
    """The module's own DTensor parameters as this rank's local tensors, for the length of a forward."""
    distributed = module._parameters
    local = {n: p.to_local() if isinstance(p, DTensor) else p for n, p in distributed.items() if p is not None}
    module._parameters = {**distributed, **local}
    try:
        yield list(local.values())
    finally:
        module._parameters = distributed


def sum_gradients(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The tensor itself; its gradient is summed over the ranks."""
    return SumGradients.apply(group, tensor)[0]


def sum_over_ranks(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks; the gradient, the same on every rank, goes back as it is."""
    return SumOutputs.apply(group, tensor)


class SumGradients(torch.autograd.Function):
    """Identity; backward sums over the ranks, in one node so that the collectives have one order."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *(_summed(g, ctx.group) for g in gradients)


class SumOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, group, tensor):
        return _summed(tensor, group)

    @staticmethod
    def backward(ctx, *gradients):
        return None, gradients[0]


def _summed(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return handed_out(total)


def handed_out(tensor: torch.Tensor) -> torch.Tensor:
    """What the forward of an autograd function returns in place of a tensor that it wrote in place, as collectives do.

    Under `torch.compile`, torch 2.11 takes such a tensor for a constant: its gradient would be zero.
    """
    return tensor.view_as(tensor)


def _differentiable(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.requires_grad
