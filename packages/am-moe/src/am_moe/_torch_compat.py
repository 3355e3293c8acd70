"""What this package takes from torch beyond its public names; `test_torch_compat.py` fails when torch changes it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import BackwardCFunction
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState

# torch 2.13 renamed them, and warns of the names before.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def in_backward() -> bool:
    """Whether autograd is running a backward on this thread, as when an activation checkpoint recomputes."""
    return torch._C._current_graph_task_id() != -1


def group_of(name: str) -> dist.ProcessGroup:
    """The process group of a name: custom operators take names."""
    return _resolve_process_group(name)


def handed_out(tensor: torch.Tensor) -> torch.Tensor:
    """What the forward of an autograd function returns in place of a tensor that it wrote in place, as collectives do.

    Under `torch.compile`, torch 2.11 takes such a tensor for a constant: its gradient would be zero.
    """
    return tensor.view_as(tensor)


def reduce_unused(unit: FSDPModule) -> None:
    """Let the parameters of a unit that a rank did not use take part in the reduction of gradients, as zeros.

    Raises:
        ValueError: this torch cannot do that.
    """
    if not hasattr(unit, "set_reduce_scatter_unused_params"):
        raise ValueError(
            f"{type(unit).__name__} may use other parameters on each rank, which FSDP2 of torch {torch.__version__} "
            "cannot reduce; use torch 2.13 or newer, or spread the experts with apply_ep"
        )
    unit.set_reduce_scatter_unused_params(True)


def side_by_side(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """One mesh of two axes of the same root mesh, either of which may have been flattened; no collective."""
    return DeviceMesh._concatenate([first, second])


def is_unsharded(module: FSDPModule) -> bool:
    """Whether an FSDP module holds its whole parameters right now; False for one that manages none."""
    groups = _groups(module._get_fsdp_state())
    return bool(groups) and all(group.is_unsharded for group in groups)


def reduces_unused(module: FSDPModule) -> bool:
    """Whether the parameters of a unit that a rank did not use take part in the reduction of gradients, as zeros."""
    return any(getattr(group, "reduce_scatter_unused_params", False) for group in _groups(module._get_fsdp_state()))


def unit_key(module: FSDPModule) -> int:
    """The same for modules that FSDP2 gathers together."""
    return id(module._get_fsdp_state())


def unit_parameters(module: FSDPModule) -> list[tuple[str, torch.Tensor, torch.Tensor | None]]:
    """Name, shard and gathered form of each parameter of a unit; None where it was never gathered.

    Names are those in the model once it has run.
    """
    managed = [parameter for group in _groups(module._get_fsdp_state()) for parameter in group.fsdp_params]
    return [
        (p._param_fqn or p._module_info.param_name, p.sharded_param, getattr(p, "_unsharded_param", None))
        for p in managed
    ]


def end_forward(module: FSDPModule) -> None:
    """Shard a unit, also one of several modules of which a forward has run some and no other will come."""
    state: Any = module._get_fsdp_state()
    if state._modules_to_run_forward:
        state._modules_to_run_forward.clear()
        if state._state_ctx.iter_forward_root is state:
            state._state_ctx.iter_forward_root = None
        for held in (state, *_groups(state)):
            held._training_state = TrainingState.IDLE
    module.reshard()


def reduce_as_asked(module: FSDPModule) -> None:
    """Let a unit that was frozen at its first forward reduce gradients in the dtypes of its policy once it is trained.

    FSDP2 looks at what is trained in the first forward alone.
    """
    for group in _groups(module._get_fsdp_state()):
        frozen_at_first = getattr(group, "_orig_dtype", torch.float32) is None
        if frozen_at_first and any(p.sharded_param.requires_grad for p in group.fsdp_params):
            group._init_mp_dtypes()


def has_gradient_hooks(parameter: torch.Tensor) -> bool:
    """Whether hooks were registered on a leaf, which memory of its own would lose."""
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def writes(tensor: torch.Tensor) -> int:
    """How many operations have written to a tensor in place; 0 where inference mode does not count."""
    return 0 if tensor.is_inference() else tensor._version


def _groups(state: Any) -> list[Any]:
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # torch before 2.13 has one group per state
        groups = [g for g in [getattr(state, "_fsdp_param_group", None)] if g is not None]
    return groups


def axis(mesh: DeviceMesh | None, name: str) -> DeviceMesh | None:
    """A named axis of a mesh, flattened ones included; None where there is no such axis."""
    if mesh is None:
        return None
    try:
        return mesh[name]
    except (KeyError, RuntimeError, ValueError):
        return None


def python_functions(tensors: Iterable[torch.Tensor], seen: set[Any]) -> list[type]:
    """The autograd functions in Python that backwards from tensors come through; `seen` keeps the nodes looked at."""
    found: list[type] = []
    nodes: list[Any] = [tensor.grad_fn for tensor in tensors]
    while nodes:
        if (node := nodes.pop()) is None or node in seen:
            continue
        seen.add(node)
        if isinstance(node, BackwardCFunction):
            found.append(node._forward_cls)  # type: ignore[attr-defined]
        nodes += [following for following, _ in node.next_functions]
    return found


def is_getter(function: Any, name: str) -> bool:
    """Whether what a torch function mode sees is the look at an attribute of a tensor, such as `grad_fn`."""
    return getattr(function, "__self__", None) is getattr(torch.Tensor, name)


def needs_numbers(error: Exception) -> bool:
    """Whether an operator failed because its result's shape, or a number read, depends on what is in tensors."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))


def operator_name(function: Any) -> str:
    """An operator's name without its overload, such as `sum` or `add_`."""
    return function._schema.name.removeprefix("aten::")


def by_argument(function: Any, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What an operator is given, by the names of its schema, with defaults."""
    given = {}
    for index, argument in enumerate(function._schema.arguments):
        given[argument.name] = args[index] if index < len(args) else kwargs.get(argument.name, argument.default_value)
    return given


def written_arguments(function: Any, given: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator writes into."""
    written: list[torch.Tensor] = []
    for argument in function._schema.arguments:
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = given[argument.name]
            written += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    return written
