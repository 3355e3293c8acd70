"""Ranks of a tensor-parallel axis that are threads of one process, to run a sharded model without process groups.

One thread runs at a time, from one exchange to the next. Each has random state of its own, grad mode and contexts as a
new thread has them; backward runs in the thread that calls it::

    rank 0   forward ... all_reduce |                 ... next exchange |
    rank 1                          | ... all_reduce                    | ...

A rank that fails, or that exchanges something else than the others, ends all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle

from am_tp_styles.axis import part_of
from am_tp_styles.edges import NeedsRealRanksError

T = TypeVar("T")


def on_simulated_ranks(ranks: int, work: Callable[[SimulatedAxis], T]) -> list[T]:
    """What `work` returns on each rank of a simulated axis.

    Every rank starts with the same random state of the CPU; the caller's is afterwards as it was.

    Raises:
        ExchangeError: the ranks exchange different things, or one ends while others wait.
        Exception: whatever `work` raised on the first rank that failed.
    """
    meeting = _Meeting(ranks)
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(axis: SimulatedAxis, random: torch.Tensor) -> None:
        with meeting.turn:
            torch.set_rng_state(random)
            try:
                results[axis.rank] = work(axis)
                meeting.exchange(axis.rank, ("the end of its work",), None)
            except BaseException as error:
                errors.append(error)
                meeting.all_arrived.abort()

    before, start = torch.get_rng_state(), torch.Generator().manual_seed(0).get_state()
    axes = [SimulatedAxis(ranks, rank, meeting) for rank in range(ranks)]
    threads = [threading.Thread(target=run, args=(axis, start), daemon=True) for axis in axes]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        meeting.all_arrived.abort()
        torch.set_rng_state(before)
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    return [results[rank] for rank in range(ranks)]


def shard_on_simulated_rank(
    module: nn.Module, style: ParallelStyle, axis: SimulatedAxis, parts: dict[int, tuple]
) -> dict[str, Placement]:
    """Give a module the parts that its rank holds under a style, and let it compute on them.

    Args:
        module: of this rank's own copy of a model.
        style: one with `layout` and `attach` (see `style.py`).
        axis: of this rank.
        parts: what was sharded before, by the id of the whole parameter, so that tied weights stay tied; filled here.

    Returns:
        How each parameter lies on the axis.

    Raises:
        NeedsRealRanksError: the style computes on DTensors here, which need a device mesh.
    """
    if not runs_on_simulated_ranks(style, module):
        raise NeedsRealRanksError(f"{type(style).__name__} computes on DTensors in a {type(module).__name__}")
    layout = style.layout(module, axis.size)  # type: ignore[attr-defined]
    for name, placement in layout.items():
        owner, _, leaf = name.rpartition(".")
        parameter = module.get_parameter(name)
        _, part = parts.setdefault(id(parameter), (parameter, _part(parameter, placement, axis)))
        module.get_submodule(owner)._parameters[leaf] = part
    style.attach(module, axis)  # type: ignore[attr-defined]
    return layout


def runs_on_simulated_ranks(style: ParallelStyle, module: nn.Module) -> bool:
    """Whether a style lets this module compute on plain local tensors; DTensors need a mesh of real ranks."""
    on_shards = getattr(style, "computes_on_shards", None)
    return hasattr(style, "attach") and (on_shards is None or on_shards(module))


def _part(parameter: nn.Parameter, placement: Placement, axis: SimulatedAxis) -> nn.Parameter:
    if not isinstance(placement, Shard):
        return parameter
    dim = placement.dim % parameter.dim()
    part = parameter.detach().narrow(dim, *part_of(parameter.shape[dim], axis)).clone()
    return nn.Parameter(part, requires_grad=parameter.requires_grad)


class ExchangeError(RuntimeError):
    """The ranks would exchange different things: a real axis would hang, or compute with another's tensor."""


class SimulatedAxis:
    """An `Axis` whose ranks are threads; see `on_simulated_ranks`."""

    def __init__(self, size: int, rank: int, meeting: _Meeting) -> None:
        self.size = size
        self.rank = rank
        self._meeting = meeting

    def all_reduce(self, tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
        if self.size == 1:
            return tensor
        together = torch.stack(self._exchange(tensor, f"{op} of", tuple(tensor.shape)))
        return together.sum(0) if op == "sum" else together.amax(0)

    def all_gather(self, tensor: torch.Tensor, dim: int, whole: int | None = None) -> torch.Tensor:
        if self.size == 1:
            return tensor
        dim %= tensor.dim()
        whole = tensor.shape[dim] * self.size if whole is None else whole
        shape = (*tensor.shape[:dim], whole, *tensor.shape[dim + 1 :])
        gathered = torch.cat(self._exchange(tensor, f"gather along dim {dim} to", shape), dim)
        if gathered.shape[dim] != whole:
            raise ExchangeError(f"the parts of {shape} along dim {dim} make {tuple(gathered.shape)}")
        return gathered

    def reduce_scatter(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        if self.size == 1:
            return tensor
        dim %= tensor.dim()
        together = torch.stack(self._exchange(tensor, f"scatter along dim {dim} of", tuple(tensor.shape)))
        return together.sum(0).narrow(dim, *part_of(tensor.shape[dim], self)).contiguous()

    def all_to_all(self, tensor: torch.Tensor, receives: Sequence[int], sends: Sequence[int]) -> torch.Tensor:
        if self.size == 1:
            return tensor
        blocks = tensor.detach().clone().split(list(sends))
        received = [theirs[self.rank] for theirs in self._meeting.exchange(self.rank, ("rows",), blocks)]
        if [len(block) for block in received] != list(receives):
            raise ExchangeError(f"rank {self.rank} is sent other numbers of rows than {list(receives)}")
        return torch.cat(received)

    def _exchange(self, tensor: torch.Tensor, kind: str, shape: tuple[int, ...]) -> list[torch.Tensor]:
        copy = tensor.detach().clone()  # its owner goes on, and may write into it
        return self._meeting.exchange(self.rank, (kind, shape, tensor.dtype), copy)

    def __deepcopy__(self, memo: dict) -> SimulatedAxis:
        return self


class _Meeting:
    """Where the threads wait for each other. `turn` is held by the one that runs."""

    def __init__(self, ranks: int) -> None:
        self.turn = threading.Lock()
        self.all_arrived = threading.Barrier(ranks, action=self._collect)
        self._brought: list[Any] = [None] * ranks
        self._collected: list[Any] = []

    def exchange(self, rank: int, kind: tuple, what: Any) -> list[Any]:
        """What every rank brought; nobody can bring something new before all have it."""
        self._brought[rank] = (kind, what)
        random = torch.get_rng_state()
        self.turn.release()
        try:
            self.all_arrived.wait()
        finally:
            self.turn.acquire()
            torch.set_rng_state(random)
        other = next((number for number, (theirs, _) in enumerate(self._collected) if theirs != kind), None)
        if other is not None:
            theirs = " ".join(map(str, self._collected[other][0]))
            raise ExchangeError(f"rank {rank} exchanges the {' '.join(map(str, kind))}, rank {other} the {theirs}")
        return [brought for _, brought in self._collected]

    def _collect(self) -> None:
        self._collected = list(self._brought)
