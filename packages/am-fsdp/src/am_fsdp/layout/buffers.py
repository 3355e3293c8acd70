"""Buffers that no folder holds, such as rotary frequencies: computed where the model on meta left them out."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Container, Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from am_fsdp._torch_compat import writes
from am_fsdp.weights.hf_names import of_transformers, own_classes


@dataclasses.dataclass(frozen=True)
class Computed:
    """A module with buffers on meta, and whose initialisation may write them: its own, or that of what holds it."""

    name: str
    module: nn.Module
    buffers: tuple[str, ...]
    askable: tuple[tuple[nn.Module, nn.Module], ...]  # (transformers model, module that its `_init_weights` is given)


def planned_buffers(model: nn.Module, held: Container[str]) -> list[Computed]:
    """What has to be computed: buffers on meta that are not among the names held by a folder.

    Raises:
        ValueError: a tensor on meta that nothing says how to compute.
    """
    planned = []
    for name, module in model.named_modules():
        stray = [n for n, value in vars(module).items() if isinstance(value, torch.Tensor) and value.is_meta]
        if stray:
            raise ValueError(
                f"{_in(name, stray[0])} is on meta and neither parameter nor buffer; set it before loading"
            )
        own = module.named_buffers(recurse=False, remove_duplicate=False)
        buffers = tuple(n for n, buffer in own if buffer.is_meta and _in(name, n) not in held)
        if buffers:
            askable = _askable(model, name)
            if not askable:
                raise ValueError(f"{_in(name, buffers[0])} is on meta, and no folder holds it; set it before loading")
            planned.append(Computed(name, module, buffers, askable))
    return planned


def _in(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name


def _askable(model: nn.Module, name: str) -> tuple[tuple[nn.Module, nn.Module], ...]:
    parts = name.split(".") if name else []
    line = [model.get_submodule(".".join(parts[:n])) for n in range(len(parts), -1, -1)]
    owners = [next((m for m in line[i:] if of_transformers(m)), None) for i in range(len(line))]
    return tuple((owner, module) for owner, module in zip(owners, line, strict=True) if owner is not None)


def compute_buffers(model: nn.Module, planned: list[Computed], device: torch.device) -> None:
    """Let transformers' own initialisation write the buffers, as it does after `from_pretrained`.

    Raises:
        ValueError: it leaves one alone.
    """
    given: list[list[tuple[str, torch.Tensor, int]]] = []
    for one in planned:
        given.append([])
        for name in one.buffers:
            buffer = torch.zeros_like(one.module.get_buffer(name), device=device)
            setattr(one.module, name, buffer)
            given[-1].append((name, buffer, writes(buffer)))
    with _nothing_else_written(model, {id(buffer) for group in given for _, buffer, _ in group}):
        for one, buffers in zip(planned, given, strict=True):
            for owner, module in one.askable:
                if _untouched(one, buffers):
                    cast(Any, owner)._init_weights(module)
            for name in _untouched(one, buffers):
                kind = type(one.askable[0][0]).__name__
                raise ValueError(f"{_in(one.name, name)}: {kind} does not say how to compute this buffer")


def _untouched(one: Computed, given: list[tuple[str, torch.Tensor, int]]) -> list[str]:
    return [n for n, buffer, count in given if one.module.get_buffer(n) is buffer and writes(buffer) == count]


@contextmanager
def _nothing_else_written(model: nn.Module, buffers: set[int]) -> Generator[None, None, None]:
    """Mark all else as initialised, which is what transformers' initialisation passes over."""
    if not buffers:
        yield
        return
    initialization = importlib.import_module("transformers.initialization")
    loaded = [t for t in (*model.parameters(), *model.buffers()) if id(t) not in buffers]
    marked = [t for t in loaded if not hasattr(t, "_is_hf_initialized")]
    for tensor in marked:
        tensor._is_hf_initialized = True
    try:
        with own_classes(model), initialization.guard_torch_init_functions():
            yield
    finally:
        for tensor in marked:
            del tensor._is_hf_initialized
