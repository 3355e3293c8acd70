"""Tensors that are described before there is anything in them, so that a rank can read just its part.

A `Lazy` has a shape and a dtype and knows how to fill a box of itself. Stacking, concatenating, splitting and
transposing `Lazy` tensors gives others, which read from their sources what a box needs of them:

    gate (24, 32), up (24, 32) of 8 experts on disk
      stack each        -> (8, 24, 32) twice
      cat along dim 1   -> (8, 48, 32)
      box of this rank  -> experts 2..4: four slices read, twelve not touched

So code that was written for tensors describes a conversion by running it. What it does besides these operations works
too, on the whole of its inputs, except to change one in place.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Box = list[tuple[int, int]]  # [start, stop) per dim
Read = Callable[[torch.Tensor, Box], None]


def _undescribed(out: torch.Tensor, box: Box) -> None:
    raise RuntimeError("nothing says how to read this tensor")


class Lazy(torch.Tensor):
    """A tensor on the meta device with `read_into(out, box)`, which copies a box into `out`, converting its dtype."""

    read_into: Read = staticmethod(_undescribed)

    @classmethod
    def of(cls, shape: Sequence[int], dtype: torch.dtype, read_into: Read) -> Lazy:
        lazy = torch.empty(tuple(shape), dtype=dtype, device="meta").as_subclass(cls)
        lazy.read_into = read_into
        return lazy

    def fill(self, out: torch.Tensor) -> torch.Tensor:
        """Read all of it into `out`."""
        self.read_into(out, [(0, size) for size in self.shape])
        return out

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__setitem__" or (name.endswith("_") and not name.startswith("__")):
            raise TypeError(f"{name} changes a tensor in place, which is only described yet")
        result = super().__torch_function__(func, types, args, kwargs)
        several = isinstance(result, (tuple, list))
        made = [r for r in (result if several else [result]) if isinstance(r, Lazy) and r.read_into is _undescribed]
        if made:
            rule = _RULES.get(name) if all(isinstance(t, Lazy) for t in _tensors(args)) else None
            reads = rule(made, *args, **kwargs) if rule else None
            if reads is None:
                reads = [_computed(func, args, kwargs, i if several else None) for i in range(len(made))]
            for lazy, read in zip(made, reads, strict=True):
                lazy.read_into = read
        return result


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _stack(made: list[Lazy], tensors: Sequence[Lazy], dim: int = 0) -> list[Read]:
    dim %= made[0].dim()

    def read(out: torch.Tensor, box: Box) -> None:
        rest = box[:dim] + box[dim + 1 :]
        for index in range(*box[dim]):
            tensors[index].read_into(out.select(dim, index - box[dim][0]), rest)

    return [read]


def _cat(made: list[Lazy], tensors: Sequence[Lazy], dim: int = 0) -> list[Read]:
    dim %= made[0].dim()
    starts = [0, *itertools.accumulate(t.shape[dim] for t in tensors)]

    def read(out: torch.Tensor, box: Box) -> None:
        first, last = box[dim]
        for tensor, start, stop in zip(tensors, starts, starts[1:], strict=False):
            low, high = max(first, start), min(last, stop)
            if low < high:
                part = out.narrow(dim, low - first, high - low)
                tensor.read_into(part, [*box[:dim], (low - start, high - start), *box[dim + 1 :]])

    return [read]


def _parts(made: list[Lazy], tensor: Lazy, _how: Any, dim: int = 0) -> list[Read]:
    dim %= tensor.dim()
    starts = itertools.accumulate((part.shape[dim] for part in made[:-1]), initial=0)

    def reader(start: int) -> Read:
        def read(out: torch.Tensor, box: Box) -> None:
            low, high = box[dim]
            tensor.read_into(out, [*box[:dim], (start + low, start + high), *box[dim + 1 :]])

        return read

    return [reader(start) for start in starts]


def _unbind(made: list[Lazy], tensor: Lazy, dim: int = 0) -> list[Read]:
    dim %= tensor.dim()

    def reader(index: int) -> Read:
        return lambda out, box: tensor.read_into(out.unsqueeze(dim), [*box[:dim], (index, index + 1), *box[dim:]])

    return [reader(index) for index in range(len(made))]


def _squeeze(made: list[Lazy], tensor: Lazy, dim: int | None = None) -> list[Read] | None:
    if not isinstance(dim, int) or tensor.shape[dim] != 1:
        return None
    return _unbind(made, tensor, dim)


def _transpose(_made: list[Lazy], tensor: Lazy, dim0: int, dim1: int) -> list[Read]:
    def read(out: torch.Tensor, box: Box) -> None:
        swapped = list(box)
        swapped[dim0], swapped[dim1] = box[dim1], box[dim0]
        tensor.read_into(out.transpose(dim0, dim1), swapped)

    return [read]


def _same(_made: list[Lazy], tensor: Lazy, **_how: Any) -> list[Read]:
    return [tensor.read_into]


_RULES: dict[str, Callable[..., list[Read] | None]] = {
    "stack": _stack,
    "cat": _cat,
    "chunk": _parts,
    "split": _parts,
    "unbind": _unbind,
    "squeeze": _squeeze,
    "transpose": _transpose,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
}


def _computed(func: Any, args: Any, kwargs: Any, index: int | None) -> Read:
    """Any other operation: read its inputs whole, run it, keep the box."""

    def read(out: torch.Tensor, box: Box) -> None:
        if out.is_meta:  # only what would be read is asked
            for tensor in _tensors([*args, *kwargs.values()]):
                if isinstance(tensor, Lazy):
                    tensor.fill(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
            return
        result = func(*_whole(args), **{name: _whole(value) for name, value in kwargs.items()})
        result = result if index is None else result[index]
        out.copy_(result[tuple(slice(*ends) for ends in box)])

    return read


def _whole(value: Any) -> Any:
    if isinstance(value, Lazy):
        return value.fill(torch.empty(value.shape, dtype=value.dtype))
    if isinstance(value, (list, tuple)) and not isinstance(value, torch.Size):
        return type(value)(map(_whole, value))
    return value
