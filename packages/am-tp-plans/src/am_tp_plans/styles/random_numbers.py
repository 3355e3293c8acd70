"""Dropout on the ranks of a tensor-parallel axis: whole values are dropped alike on every rank, shares differently.

All ranks start from one random state, the *common* one (`check_seeds`). Between a colwise layer and the rowwise layer
that sums its share, a rank draws from a state of its *own*; with sequence parallelism in all layers, which see tokens::

    common   embedding, dropout | q k v |                   | out | dropout | up |             | down | dropout
    own                                 | attention dropout |                    | dropout ... |

The own state is made of the common one and the rank, and nothing else is remembered from one layer to the next. So
whatever restores the generators, as a recomputation of a layer and a resumed run do, draws the same numbers again. The
common state moves on by one number for every stretch in which own ones were drawn, on all ranks alike; where there is
none, the ranks draw what one process would.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle, RowwiseParallel

from am_tp_plans.proof.check import has_dropout
from am_tp_plans.styles.basic import (
    SequenceGatherOutput,
    SequenceParallelAllGatherActivation,
    SequenceShardInput,
    SequenceWholeBlock,
    each,
    is_open_colwise,
)
from am_tp_plans.styles.fused import Conv1DRowwiseParallel
from am_tp_styles.axis import Axis
from am_tp_styles.classes import put_over


def check_dropout(model: nn.Module, concrete: dict[str, ParallelStyle]) -> None:
    """
    Raises:
        ValueError: a block that sees the whole sequence between layers that see a part has dropout.
    """
    for name, style in concrete.items():
        whole = any(isinstance(part, SequenceWholeBlock) for part in each(style))
        if whole and has_dropout(model.get_submodule(name)):
            raise ValueError(
                f"{name} has dropout and sees the whole sequence between layers that see a part of it, so that the "
                "ranks would drop different values of it; set its dropout to 0, or use a plan without sequence "
                "parallelism"
            )


def draw_for_shares(model: nn.Module, concrete: dict[str, ParallelStyle], axis: Axis, *, shards_sequence: bool) -> None:
    """Let a model with dropout, whose styles are attached, draw as this module says while it trains.

    Args:
        model: or a pipeline part of one.
        concrete: its plan.
        axis: of the plan.
        shards_sequence: whether the layers see parts of the sequence.

    Issues no collective.
    """
    if axis.size == 1 or not has_dropout(model):
        return
    states = _States(axis)
    ends = ends_of_shares(model, concrete, shards_sequence=shards_sequence)
    names = {name.rsplit(".", levels)[0] for name, _ in ends for levels in range(1, name.count(".") + 1)}
    for name in ("", *sorted(names)):
        if not isinstance(model.get_submodule(name), (nn.ModuleList, nn.ModuleDict)):
            _put(model.get_submodule(name), _Frame, states)
    for name, behaviour in ends:
        _put(model.get_submodule(name), behaviour, states)


def ends_of_shares(
    model: nn.Module, concrete: dict[str, ParallelStyle], *, shards_sequence: bool
) -> list[tuple[str, type[Draws]]]:
    """The names of the modules where shares begin and end, and what is drawn in and after them."""
    return list(_ends_of_sequence(concrete) if shards_sequence else _ends_of_features(model, concrete))


def _ends_of_features(model: nn.Module, concrete: dict[str, ParallelStyle]) -> Iterator[tuple[str, type[Draws]]]:
    for name, style in concrete.items():
        rowwise = isinstance(style, (RowwiseParallel, Conv1DRowwiseParallel))
        if is_open_colwise(style):
            yield name, _BeginsShare
        elif rowwise and not isinstance(model.get_submodule(name), nn.Embedding):
            yield name, _EndsShare


def _ends_of_sequence(concrete: dict[str, ParallelStyle]) -> Iterator[tuple[str, type[Draws]]]:
    """Where the sequence is first split, and where it is gathered for the last time."""
    first = [name for name, style in concrete.items() if any(isinstance(p, SequenceShardInput) for p in each(style))]
    yield from ((name, _BeginsSequence) for name in first or [""])  # a part of a pipeline gets a part of the sequence
    for name, style in concrete.items():
        after = isinstance(style, SequenceParallelAllGatherActivation) and not re.search(r"\.\d+\.", name)
        if after or any(isinstance(part, SequenceGatherOutput) for part in each(style)):
            yield name, _EndsSequence


def _put(module: Any, behaviour: type, states: _States) -> None:
    module.random_states = states
    put_over(module, behaviour)


class _States:
    """The generator of a device: its common state, and where its own state began, while the rank draws from that."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis
        self.common: torch.Tensor | None = None
        self.own: torch.Tensor | None = None
        self.device = torch.device("cpu")
        self.frames = 0

    @torch.compiler.disable
    def begin_own(self, device: torch.device) -> None:
        if self.common is not None:
            return
        self.device, self.common = device, _state(device)
        digest = hashlib.sha256(self.common.numpy().tobytes() + self.axis.rank.to_bytes(4, "big")).digest()
        _seed(device, int.from_bytes(digest[:7], "big"))
        self.own = _state(device)

    @torch.compiler.disable
    def end_own(self) -> None:
        if self.common is None or self.own is None:
            return
        drew = not _state(self.device).equal(self.own)
        _set_state(self.device, self.common)
        self.common = self.own = None
        if drew:
            torch.rand(1, device=self.device)


class _Frame:
    """Over a module in which shares begin and end. An error in it, such as the end of a recomputation, ends them."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        states: _States = self.random_states
        states.frames += 1
        try:
            output = super().forward(*args, **kwargs)
        except BaseException:
            states.end_own()
            raise
        finally:
            states.frames -= 1
        if states.frames == 0:
            states.end_own()
        return output


class Draws:
    """What a rank draws in a module and after it: numbers of its own, or common ones; None for those from before it."""

    own_inside: bool | None = None
    own_afterwards = False


class _BeginsShare(Draws):
    """Over a colwise layer: what it draws itself, for its whole input, is common."""

    own_inside, own_afterwards = False, True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.training:
            return super().forward(*args, **kwargs)
        self.random_states.end_own()
        output = super().forward(*args, **kwargs)
        self.random_states.begin_own(output.device)
        return output


class _EndsShare(Draws):
    """Over a rowwise layer."""

    own_inside = False

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        self.random_states.end_own()
        return super().forward(*args, **kwargs)


class _BeginsSequence(_Frame, Draws):
    """Over the first layer of a stack whose tokens are sharded."""

    own_inside = own_afterwards = True

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training:
            self.random_states.begin_own(next(self.parameters()).device)
        return super().forward(*args, **kwargs)


class _EndsSequence(_Frame, Draws):
    """Over the module that gathers the tokens again."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        self.random_states.end_own()
        return output


def _state(device: torch.device) -> torch.Tensor:
    if device.type == "cpu":
        return torch.get_rng_state()
    return torch.get_device_module(device).get_rng_state(device)


def _set_state(device: torch.device, state: torch.Tensor) -> None:
    if device.type == "cpu":
        torch.set_rng_state(state)
    else:
        torch.get_device_module(device).set_rng_state(state, device)


def _seed(device: torch.device, seed: int) -> None:
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
        return
    with torch.get_device_module(device).device(device):
        torch.get_device_module(device).manual_seed(seed)
