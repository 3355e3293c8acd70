"""The collectives of the dispatchers as operators of their own, by which selective checkpointing knows their results.

None has a gradient: the autograd functions of the dispatchers say what each one's backward is. Recomputation may have
kept what they returned: whoever is `asked` in this thread decides whether they run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
import torch.distributed as dist

from am_moe import _torch_compat
from am_moe._torch_compat import group_of


@torch.library.custom_op(
    "am_moe::all_to_all", mutates_args=(), schema="(Tensor rows, int[] sent, int[] received, str group) -> Tensor"
)
def _all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group_of(group))
    return out


@torch.library.custom_op("am_moe::all_gather", mutates_args=(), schema="(Tensor rows, str group) -> Tensor")
def _all_gather(rows: torch.Tensor, group: str) -> torch.Tensor:
    ranks = dist.get_world_size(group_of(group))
    out = rows.new_empty(ranks * rows.shape[0], *rows.shape[1:])
    _torch_compat.all_gather(out, rows.contiguous(), group=group_of(group))
    return out


@torch.library.custom_op("am_moe::reduce_scatter", mutates_args=(), schema="(Tensor rows, str group) -> Tensor")
def _reduce_scatter(rows: torch.Tensor, group: str) -> torch.Tensor:
    out = rows.new_empty(rows.shape[0] // dist.get_world_size(group_of(group)), *rows.shape[1:])
    _torch_compat.reduce_scatter(out, rows.contiguous(), group=group_of(group))
    return out


@torch.library.custom_op("am_moe::counts_of_all", mutates_args=(), schema="(Tensor counts, str group) -> Tensor")
def _counts_of_all(counts: torch.Tensor, group: str) -> torch.Tensor:
    ranks = dist.get_world_size(group_of(group))
    out = counts.new_empty(ranks * counts.shape[0], *counts.shape[1:])
    _torch_compat.all_gather(out, counts.contiguous(), group=group_of(group))
    return out.view(ranks, *counts.shape).cpu()


@_counts_of_all.register_fake
def _(counts: torch.Tensor, group: str) -> torch.Tensor:
    return torch.empty(dist.get_world_size(group_of(group)), *counts.shape, dtype=counts.dtype)


@_all_to_all.register_fake
def _(rows: torch.Tensor, sent: list[int], received: list[int], group: str) -> torch.Tensor:
    return rows.new_empty(sum(received), *rows.shape[1:])


@_all_gather.register_fake
def _(rows: torch.Tensor, group: str) -> torch.Tensor:
    return rows.new_empty(dist.get_world_size(group_of(group)) * rows.shape[0], *rows.shape[1:])


@_reduce_scatter.register_fake
def _(rows: torch.Tensor, group: str) -> torch.Tensor:
    return rows.new_empty(rows.shape[0] // dist.get_world_size(group_of(group)), *rows.shape[1:])


class Keeper(Protocol):
    """Decides whether a collective runs."""

    def exchange(self, name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The result of a collective, by running it or from what was kept."""
        ...


_THREAD = threading.local()


@contextmanager
def asked(keeper: Keeper) -> Iterator[None]:
    """Ask a keeper about every collective of this thread."""
    before, _THREAD.keeper = asked_now(), keeper
    try:
        yield
    finally:
        _THREAD.keeper = before


def asked_now() -> Keeper | None:
    """Whoever is asked in this thread."""
    return getattr(_THREAD, "keeper", None)


def all_to_all(rows: torch.Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """Rows to each rank, in order: `(sum(sent), ...)` to `(sum(received), ...)`."""
    return _ask("all_to_all", lambda: _all_to_all(rows, sent, received, group.group_name))


def all_gather(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The rows of all ranks, as many of each: `(N, ...)` to `(P N, ...)`."""
    return _ask("all_gather", lambda: _all_gather(rows, group.group_name))


def reduce_scatter(rows: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The sum over the ranks of this rank's part of the rows: `(P N, ...)` to `(N, ...)`."""
    return _ask("reduce_scatter", lambda: _reduce_scatter(rows, group.group_name))


def counts_of_all(counts: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """The counts of all ranks, in the host's memory: `(N, ...)` to `(P, N, ...)`. The one host sync of a dispatch."""
    return _ask("counts_of_all", lambda: _counts_of_all(counts, group.group_name))


def _ask(name: str, run: Callable[[], torch.Tensor]) -> torch.Tensor:
    keeper = asked_now()
    return run() if keeper is None else keeper.exchange(name, run)
