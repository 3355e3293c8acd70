"""Every layer of a model as an FSDP2 unit, each gathered before the one before it is done."""

from __future__ import annotations

import itertools
from typing import Any, cast

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from am_fsdp.layout.units import stacks_of_units, units_of_another_dtype


def apply_fsdp_sharding_recursively(
    module: nn.Module,
    mesh: DeviceMesh,
    mp_policy: MixedPrecisionPolicy | None,
    offload_policy: CPUOffloadPolicy | None = None,
) -> None:
    """Make every layer of every outermost `ModuleList` an FSDP2 unit; the caller shards what is left with the root.

    The last layer of a stack is not resharded after forward, because backward needs it at once. Layers without
    parameters, which a pipeline leaves where another stage's layers were, are passed over; so are layers that share
    parameters with what is outside of them, which stay with the root. A module whose parameters have another dtype than
    most, such as a float32 router, norm or head, becomes a unit of its own that computes in it
    (`units_of_another_dtype`). A layer gathers the next one before it computes.

    Args:
        module: the model or a part of it; changed in place.
        mesh: the data axis, one-dimensional, or two-dimensional for HSDP (replicate, shard).
        mp_policy: None for no mixed precision.
        offload_policy: None to keep shards on the device.
    """
    for owners, policy in units_of_another_dtype(module, mp_policy or MixedPrecisionPolicy()):
        fully_shard(
            owners if len(owners) > 1 else owners[0],
            mesh=mesh,
            mp_policy=policy,
            offload_policy=offload_policy or OffloadPolicy(),
        )
    for stack in stacks_of_units(module):
        layers = [layer for layer in stack if not isinstance(layer, FSDPModule)]
        for index, layer in enumerate(layers):
            fully_shard(
                layer,
                mesh=mesh,
                mp_policy=mp_policy or MixedPrecisionPolicy(),
                offload_policy=offload_policy or OffloadPolicy(),
                reshard_after_forward=index < len(layers) - 1,
            )
        for layer, following in itertools.pairwise(cast(list[Any], layers)):
            layer.set_modules_to_forward_prefetch([following])
