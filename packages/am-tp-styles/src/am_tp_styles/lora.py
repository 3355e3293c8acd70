"""Torch's three parallel styles, for linears that carry a LoRA adapter.

The layer is an `nn.Linear` (or a subclass) with its own `weight` and `bias`, children `lora_A` (r, in) and `lora_B`
(out, r), and, for DoRA, a parameter `lora_magnitude` (out,). It is recognised by this structure. How each style lays
the parameters over the tensor-parallel axis:

                 colwise      rowwise      sequence
    weight       Shard(0)     Shard(1)     Replicate
    bias         Shard(0)     Replicate    Replicate
    lora_A       Replicate    Shard(1)     Replicate
    lora_B       Shard(0)     Replicate    Replicate
    magnitude    Shard(0)     Replicate    Replicate

The LoRA rank is never sharded, so any rank works with any number of devices. The adapter's hidden activation is
replicated; rowwise sums it over the ranks, which costs an all-reduce of (tokens, r).
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel

from am_tp_styles.gradients import reduce_replicated_gradients


class ColwiseParallelLora(ColwiseParallel):
    """`ColwiseParallel` for a linear with a LoRA adapter (or without one), and for `nn.Embedding`.

    Same arguments and layouts as `ColwiseParallel`. Every gradient is whole when `backward()` returns, `requires_grad`
    and parameter names are kept, `src_data_rank` is honoured.

    Collectives (the given axis): when applied, a scatter or broadcast per parameter unless `src_data_rank` is None. In
    backward, beyond those of `ColwiseParallel`, an all-reduce of `lora_A`'s gradient.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if name:  # lora_A, lora_B: done together with the layer that owns them
            return
        layout = {"weight": Shard(0), "bias": Shard(0), "lora_magnitude": Shard(0)}
        _partition(self, module, device_mesh, layout)
        if _has_adapter(module):
            _partition(self, module.lora_A, device_mesh, {"weight": Replicate()})
            _partition(self, module.lora_B, device_mesh, {"weight": Shard(0), "bias": Shard(0)})
        reduce_replicated_gradients(module)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not name:
            _partition(self, module, device_mesh, {"weight": Shard(1)})


class RowwiseParallelLora(RowwiseParallel):
    """`RowwiseParallel` for a linear with a LoRA adapter (or without one), and for `nn.Embedding`.

    Same arguments and layouts as `RowwiseParallel`. Every gradient is whole when `backward()` returns, `requires_grad`
    and parameter names are kept, `src_data_rank` is honoured.

    Collectives (the given axis): when applied, a scatter or broadcast per parameter unless `src_data_rank` is None. In
    forward, beyond those of `RowwiseParallel`, an all-reduce of the adapter's hidden activation.
    """

    def _partition_linear_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if name:  # lora_A, lora_B: done together with the layer that owns them
            return
        _partition(self, module, device_mesh, {"weight": Shard(1)})
        if _has_adapter(module):
            _partition(self, module.lora_A, device_mesh, {"weight": Shard(1)})
            _partition(self, module.lora_B, device_mesh, {})
            module.lora_A.register_forward_hook(_replicate_output)
        reduce_replicated_gradients(module)

    def _partition_embedding_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        if not name:
            _partition(self, module, device_mesh, {"weight": Shard(0)})


class SequenceParallelLora(SequenceParallel):
    """`SequenceParallel` for a norm, or for a linear with a LoRA adapter: every parameter replicated.

    Same arguments and layouts as `SequenceParallel`. Unlike it, parameters are broadcast from `src_data_rank` (torch
    assumes that they agree), `requires_grad` is kept, and gradients are whole when `backward()` returns.

    Collectives (the given axis): when applied, a broadcast per parameter unless `src_data_rank` is None. In backward,
    an all-reduce per trainable parameter.
    """

    def _replicate_module_fn(self, name: str, module: nn.Module, device_mesh: DeviceMesh) -> None:
        _partition(self, module, device_mesh, {})
        if not name:
            reduce_replicated_gradients(module)


def _has_adapter(module: nn.Module) -> bool:
    """Whether `module` carries `lora_A` and `lora_B`; an adapter of another shape is an error."""
    children = {name: getattr(module, name, None) for name in ("lora_A", "lora_B")}
    if all(child is None for child in children.values()):
        return False
    for name, child in children.items():
        if not isinstance(child, nn.Linear):
            raise TypeError(
                f"{type(module).__name__}.{name} is a {type(child).__name__}; a LoRA layer must hold nn.Linear "
                "children lora_A and lora_B (peft's ModuleDict layout is not this one)"
            )
    return True


def _partition(style, module: nn.Module, device_mesh: DeviceMesh, layout: dict[str, Placement]) -> None:
    """Distribute the module's own parameters as `layout` says; those it does not name are replicated."""
    for name, _ in list(module.named_parameters(recurse=False)):
        _distribute_param(module, name, device_mesh, style.src_data_rank, [layout.get(name, Replicate())])


def _distribute_param(
    _module: nn.Module,
    name: str,
    device_mesh: DeviceMesh,
    src_data_rank: int | None,
    placements: Sequence[Placement],
) -> None:
    """Replace the parameter `name` of `_module` by a DTensor parameter with these placements.

    `requires_grad` is kept. Meta tensors move no data. Collectives (`device_mesh`): a scatter or broadcast from
    `src_data_rank`, none if that is None.
    """
    parameter = getattr(_module, name)
    source = None if parameter.is_meta else src_data_rank
    sharded = distribute_tensor(parameter.detach(), device_mesh, placements, src_data_rank=source)
    _module.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


def _replicate_output(_module: nn.Module, _args: tuple, output):
    """Sum the ranks' parts of the adapter's hidden activation here, where it is small."""
    return output.redistribute(placements=[Replicate()]) if isinstance(output, DTensor) else output
