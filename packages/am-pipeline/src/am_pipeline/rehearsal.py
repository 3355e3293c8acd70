"""Run a model's own forward with every module that has parameters replaced, to learn whether it can be cut.

The skeleton has no parameters, so this costs nothing and works for a model on meta. Four runs tell how the hidden state
is shaped and that nothing else that depends on the batch reaches a layer or the head: a later stage would not
have it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from am_pipeline.anatomy import Anatomy
from am_pipeline.boundary import Boundary, hidden_state_of
from am_pipeline.skeleton import copy_without


@dataclass(frozen=True)
class Residual:
    """How the tensor that runs between layers is shaped: `dims` with None where the batch or the sequence is.

    A Llama's is `(None, None, hidden_size)` with `batch_dim=0`, `sequence_dim=1`.
    """

    dims: tuple[int | None, ...]
    batch_dim: int
    sequence_dim: int
    returns_tuple: bool

    def shape(self, batch: int, seq_len: int) -> tuple[int, ...]:
        dims: list[Any] = list(self.dims)
        dims[self.batch_dim], dims[self.sequence_dim] = batch, seq_len
        return tuple(dims)


def rehearse(model: nn.Module, anatomy: Anatomy) -> Residual:
    """Learn how the hidden state travels between the layers of a model.

    Raises:
        ValueError: the model cannot be cut between its layers, and why.
    """
    reason = ""
    for returns_tuple in (False, True):
        try:
            runs = _four_runs(model, anatomy, returns_tuple)
        except Exception as error:  # whatever the model's own code raises is the reason it cannot be cut
            reason = reason or f"its forward failed with its layers replaced: {type(error).__name__}: {error}"
            continue
        why_not = _why_not(anatomy, *runs)
        if not why_not:
            return _residual(runs[0].hidden[0].shape, runs[1].hidden[0].shape, returns_tuple)
        reason = reason or why_not
    raise ValueError(f"{type(model).__name__} cannot be cut between the layers of {anatomy.stack}: {reason}")


@dataclass
class _Run:
    """What one run showed: per layer call its index, the hidden state taken and returned, and the other inputs."""

    order: list[int] = field(default_factory=list)
    hidden: list[torch.Tensor] = field(default_factory=list)
    returned: list[torch.Tensor] = field(default_factory=list)
    beside: list[list[torch.Tensor]] = field(default_factory=list)
    output: torch.Tensor | None = None


def _four_runs(model: nn.Module, anatomy: Anatomy, returns_tuple: bool) -> tuple[_Run, _Run, _Run, _Run]:
    boundary = Boundary(True, True, 0, 1)
    skeleton = copy_without(model, anatomy, set(), boundary, returns_tuple)
    for module in skeleton.modules():
        for name, buffer in module.named_buffers(recurse=False):
            persistent = name not in module._non_persistent_buffers_set
            module.register_buffer(name, torch.zeros_like(buffer, device="cpu"), persistent)
    boundary.install(skeleton)

    layers: Any = skeleton.get_submodule(anatomy.stack)

    def run(batch: int, seq_len: int, *, first_id: int = 0, fill: float = 1.0) -> _Run:
        seen = _Run()
        boundary.fill = fill
        ids = torch.zeros(batch, seq_len, dtype=torch.int64)
        ids[:, seq_len // 2 :] = first_id
        hooks = [
            layer.register_forward_hook(_recorder(index, seen), with_kwargs=True) for index, layer in enumerate(layers)
        ]
        try:
            with torch.no_grad():
                seen.output = skeleton(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return seen

    return run(3, 8), run(5, 16), run(3, 8, first_id=3), run(3, 8, fill=2.0)


def _recorder(index: int, seen: _Run):
    def record(_module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        hidden = hidden_state_of(args, kwargs)
        seen.order.append(index)
        seen.hidden.append(hidden)
        seen.returned.append(output[0] if isinstance(output, tuple) else output)
        seen.beside.append([t for t in _tensors((args, kwargs)) if t is not hidden])

    return record


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _why_not(anatomy: Anatomy, plain: _Run, larger: _Run, other_ids: _Run, other_hidden: _Run) -> str:
    if plain.order != list(range(anatomy.num_layers)):
        return f"its forward runs the layers in the order {plain.order}"
    for index, (returned, taken) in enumerate(zip(plain.returned[:-1], plain.hidden[1:], strict=True)):
        if returned is not taken:
            return f"its forward changes the hidden state between layer {index} and layer {index + 1}"
    for name, other in (("the ids", other_ids), ("the embedded ids", other_hidden)):
        for index, (before, after) in enumerate(zip(plain.beside, other.beside, strict=True)):
            if not _equal(before, after):
                return f"besides the hidden state, layer {index} takes an input that depends on {name}"
    if not _equal([plain.output], [other_ids.output]):
        return "what follows the layers reads the ids, which only the first stage has"
    return ""


def _equal(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(
        a.shape == b.shape and torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )


def _residual(first: torch.Size, second: torch.Size, returns_tuple: bool) -> Residual:
    """Tell batch and sequence apart from the shapes at (3, 8) and (5, 16) tokens."""
    pairs = list(itertools.zip_longest(first, second))
    if pairs.count((3, 5)) != 1 or pairs.count((8, 16)) != 1:
        raise ValueError(
            f"the hidden state between layers has shape {tuple(first)} for 3 sequences of 8 tokens and "
            f"{tuple(second)} for 5 of 16: it must have one batch dim and one sequence dim"
        )
    batch_dim, sequence_dim = pairs.index((3, 5)), pairs.index((8, 16))
    dims = tuple(None if i in (batch_dim, sequence_dim) else size for i, size in enumerate(second))
    return Residual(dims, batch_dim, sequence_dim, returns_tuple)
