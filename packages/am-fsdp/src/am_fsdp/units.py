"""Which modules become FSDP units: the layers of every stack, wherever they are."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def apply_fsdp_sharding_recursively(
    module: nn.Module,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: CPUOffloadPolicy | None = None,
) -> None:
    """Make every layer of every outermost `ModuleList` an FSDP2 unit; the caller shards what is left with the root.

    The last layer of a stack is not resharded after forward, because backward needs it at once. Layers without
    parameters, which a pipeline leaves where another stage's layers were, are passed over.

    Args:
        module: the model or a part of it; changed in place.
        mesh: the data axis, one-dimensional.
        mp_policy: None for no mixed precision.
        offload_policy: None to keep shards on the device.
    """
    for stack in layer_stacks(module):
        layers = [layer for layer in stack if any(True for _ in layer.parameters())]
        for index, layer in enumerate(layers):
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=mp_policy or MixedPrecisionPolicy(),
                offload_policy=offload_policy or OffloadPolicy(),
                reshard_after_forward=index < len(layers) - 1,
            )


def layer_stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost `ModuleList`s below a module: decoder layers, the layers of an encoder tower."""
    if isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from layer_stacks(child)
