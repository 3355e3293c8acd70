"""What this package takes from torch beyond its public names; `test_torch_compat.py` fails when torch changes it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _resolve_process_group

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


def side_by_side(first: DeviceMesh, second: DeviceMesh) -> DeviceMesh:
    """One mesh of two axes of the same root mesh, either of which may have been flattened; no collective."""
    return DeviceMesh._concatenate([first, second])


def fake_mode() -> Any:
    """A mode whose tensors have shapes, dtypes and strides on the CPU, and no memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: torch.Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)


def needs_numbers(error: Exception) -> bool:
    """Whether an operator failed because its result's shape, or a number read, depends on what is in tensors."""
    from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

    return isinstance(error, (DataDependentOutputException, DynamicOutputShapeException))


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Operators that do not fit tensors without memory raise, and are not logged as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of a tensor's memory, the same for all views of it as long as one of them lives."""
    return tensor.untyped_storage()._cdata


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
