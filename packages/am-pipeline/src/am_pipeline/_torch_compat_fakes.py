"""Private names of torch for tensors without memory, beside `_torch_compat.py`: a proof runs thousands of operators.

`tests/test_torch_compat.py` fails when torch changes them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager


@functools.cache
def fake_mode() -> Any:
    """The one mode whose tensors have shapes, dtypes and strides on the CPU, and no memory."""
    fake: Any = FakeTensorMode(allow_non_fake_inputs=True)
    fake.known_shapes = {}  # of `run_without_memory`
    return fake


def run_without_memory(fake: Any, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """What an operator returns for tensors of a mode: as the mode does it, in a third of the time.

    Views are taken by the kernel for tensors without memory. What another operator returns depends on nothing but the
    forms of its arguments, and is made of what it was for these the first time.
    """
    tensors = list(_tensors((*args, *kwargs.values())))
    if function._schema.is_mutable or not all(isinstance(t, FakeTensor) or t.dim() == 0 for t in tensors):
        return function(*args, **kwargs)
    if function.is_view or function is torch.ops.aten._unsafe_view.default:
        with in_kernel_invocation_manager(fake):
            seen = function(*args, **kwargs)
        if isinstance(seen, torch.Tensor):
            return FakeTensor(fake, seen, _CPU)
        return type(seen)(FakeTensor(fake, each, _CPU) for each in seen)
    form = _form((args, kwargs))
    key = (function, torch.get_default_dtype(), form)
    try:
        known = fake.known_shapes.get(key)
    except TypeError:  # an argument that has no hash
        return function(*args, **kwargs)
    if known is None:
        result = function(*args, **kwargs)
        fake.known_shapes[key] = _forms_made(result, tensors)
        return result
    if known is _OTHERWISE:
        return function(*args, **kwargs)
    kind, forms = known
    made = [FakeTensor(fake, torch.empty_strided(*form[:2], dtype=form[2], device="meta"), _CPU) for form in forms]
    return made[0] if kind is torch.Tensor else kind(made)


_OTHERWISE = object()
_CPU = torch.device("cpu")


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)


def _form(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return tuple(value.shape), value.stride(), value.storage_offset(), value.dtype
    if isinstance(value, dict):
        return tuple((name, _form(each)) for name, each in value.items())
    return (type(value), *map(_form, value)) if isinstance(value, (tuple, list)) else (type(value), value)


def _forms_made(result: Any, given: list[torch.Tensor]) -> Any:
    """The forms of fresh tensors, each with memory of its own; what else an operator returns is not remembered."""
    made = [result] if isinstance(result, torch.Tensor) else result
    if not isinstance(made, (tuple, list)) or not all(isinstance(t, torch.Tensor) and is_fake(t) for t in made):
        return _OTHERWISE
    memories = {storage_key(t) for t in made} - {storage_key(t) for t in given}
    if len(memories) < len(made) or any(t.storage_offset() for t in made):
        return _OTHERWISE
    kind = torch.Tensor if isinstance(result, torch.Tensor) else type(result)
    return kind, [(tuple(t.shape), t.stride(), t.dtype) for t in made]


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Operators that do not fit tensors without memory raise, and are not logged as well."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def is_fake(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, FakeTensor)


def storage_key(tensor: torch.Tensor) -> int:
    """The identity of a tensor's memory, the same for all views of it as long as one of them lives."""
    return tensor.untyped_storage()._cdata
