"""Which modules become FSDP units: the layers of every stack wherever they are, and what stands before and after."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard


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
    names = names_of_parameters(module)
    for stack in layer_stacks(module):
        layers = [layer for layer in stack if any(True for _ in layer.parameters())]
        layers = [layer for layer in layers if shares_nothing([layer], names)]
        layers = [layer for layer in layers if not isinstance(layer, (nn.ModuleList, FSDPModule))]
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


def units_of_another_dtype(
    model: nn.Module, mp_policy: MixedPrecisionPolicy
) -> list[tuple[list[nn.Module], MixedPrecisionPolicy]]:
    """The modules whose own parameters have another dtype than most of the model, and how they compute.

    FSDP2 wants one dtype in a unit. Each keeps its dtype and reduces gradients in float32 or wider. A head casts what
    it gets to its dtype; norms and the embedding cast what they return to that of the model, as the layers behind them
    need; others, such as routers, take and return what they do in one process. Where parameters keep their dtypes
    anyhow and all that are trained have the same, as adapters over a frozen model, nothing is a unit of its own.

    Args:
        model: a model or a part of it; nothing is changed.
        mp_policy: of the other units.

    Returns:
        Units, inner ones first; modules that share parameters are one.

    Raises:
        ValueError: one module holds parameters of two dtypes itself.
    """
    trained = {p.dtype for p in model.parameters() if p.requires_grad}
    if mp_policy.param_dtype is None and len(trained) < 2:
        return []
    numbers: Counter[torch.dtype] = Counter()
    for parameter in model.parameters():
        numbers[parameter.dtype] += parameter.numel()
    usual = max(numbers, key=lambda dtype: numbers[dtype], default=None)
    first, last = _held(model, "get_input_embeddings"), _held(model, "get_output_embeddings")
    units: list[list[nn.Module]] = []
    of_parameter: dict[int, list[nn.Module]] = {}
    for name, module in reversed(list(model.named_modules())):  # inner ones first: a unit takes all that is below it
        own = list(module.parameters(recurse=False))
        dtypes = {p.dtype for p in own}
        if len(dtypes) > 1:
            raise ValueError(f"{name} holds parameters of {sorted(map(str, dtypes))}; FSDP2 shards one dtype in a unit")
        if not dtypes or dtypes == {usual}:
            continue
        owners = next((of_parameter[id(p)] for p in own if id(p) in of_parameter), None)
        if owners is None:
            units.append(owners := [])
        owners.append(module)
        of_parameter |= {id(p): owners for p in own}
    return [(owners, _own_policy(owners, first, last, mp_policy.param_dtype or usual)) for owners in units]


def _own_policy(
    owners: list[nn.Module], first: nn.Module | None, last: nn.Module | None, usual: torch.dtype | None
) -> MixedPrecisionPolicy:
    dtype = next(p.dtype for module in owners for p in module.parameters(recurse=False))
    is_head = any(module is last for module in owners)
    feeds_layers = any(module is first or "norm" in type(module).__name__.lower() for module in owners)
    return MixedPrecisionPolicy(
        param_dtype=dtype if is_head else None,
        reduce_dtype=torch.promote_types(dtype, torch.float32),
        output_dtype=usual if feeds_layers else None,
        cast_forward_inputs=is_head,
    )


def edges(model: nn.Module) -> list[list[nn.Module]]:
    """What becomes a unit of its own besides layers: the token embedding; the final norm together with the head.

    Not what shares a parameter with another module, such as embedding and head, or the embeddings of two stacks (all
    stay in the root, which gathers it once); nothing where the model does not say which modules they are, or where a
    pipeline left them on another stage.
    """
    embedding, head = _held(model, "get_input_embeddings"), _held(model, "get_output_embeddings")
    units = [[embedding]] if embedding is not None else []
    if head is not None:
        norm = _final_norm(model, head)
        units.append([head] if norm is None else [norm, head])
    names = names_of_parameters(model)
    return [unit for unit in units if shares_nothing(unit, names)]


def names_of_parameters(*modules: nn.Module) -> Counter[int]:
    """How many names each parameter has, by its id."""
    return Counter(id(p) for module in modules for _, p in module.named_parameters(remove_duplicate=False))


def shares_nothing(unit: list[nn.Module], names: Counter[int]) -> bool:
    """Whether no parameter of these modules has a name elsewhere in the model: FSDP2 wants all of them in one unit."""
    return all(names[parameter] == number for parameter, number in names_of_parameters(*unit).items())


def _held(model: nn.Module, getter: str) -> nn.Module | None:
    """The module that a method of the model returns, if there is one and it has parameters."""
    try:
        found = getattr(model, getter, lambda: None)()
    except NotImplementedError:  # transformers does not know either
        return None
    return found if isinstance(found, nn.Module) and any(True for _ in found.parameters()) else None


def _final_norm(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """The one module with parameters of its own between the last stack and the head."""
    stacks = list(layer_stacks(model))
    after: list[nn.Module] = []
    for module in model.modules():
        if stacks and module is stacks[-1]:
            after = []
        elif module is head:
            break
        elif any(True for _ in module.parameters(recurse=False)):
            after.append(module)
    inside = {id(module) for stack in stacks for module in stack.modules()}
    after = [module for module in after if id(module) not in inside]
    return after[0] if len(after) == 1 and "norm" in type(after[0]).__name__.lower() else None


def layer_stacks(module: nn.Module) -> Iterator[nn.ModuleList]:
    """The outermost `ModuleList`s below a module: decoder layers, the layers of an encoder tower."""
    if isinstance(module, nn.ModuleList):
        yield module
        return
    for child in module.children():
        yield from layer_stacks(child)
