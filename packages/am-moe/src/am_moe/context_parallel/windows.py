"""What a query sees under one of transformers' mask functions, found from the function's own answers.

A mask function says for batch, head, query and key indices whether the query sees the key. It may close over tensors,
such as the image that each token belongs to. A *window* describes it:

    tokens    t i i i t t      i: of an image; before 2
    queries 0 s
            1 s s s s          an image's tokens see each other,
            2 s s s s          and no more than the window before themselves
            3   s s s
            4     s s s
            5       s s s

The description is made of few answers and compared with many, all of them where the sequence is short.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import FunctionType
from typing import Any

import torch

_ALL = 2**20  # answers that are compared at most where all are
_SPREAD = 32  # queries that are compared at least


class UnknownMaskError(ValueError):
    """A mask is none that context parallelism knows, in whatever way a forward is divided."""


@dataclass(frozen=True, eq=False)
class Window:
    """Which keys a query sees.

    Attributes:
        before: how many tokens before itself at most; None for all.
        after: how many after itself; 0 for a causal mask, None for all.
        reach_BN: where images see themselves whole, for each token the one after the last that it sees, int64; None
            where `after` says it.
    """

    before: int | None
    after: int | None
    reach_BN: torch.Tensor | None = None


def recognise(mask_function: Callable, rows: int, seq_len: int, device: torch.device) -> Window:
    """The window of a mask function over whole sequences.

    Args:
        mask_function: of batch, head, query and key indices, which broadcast.
        rows, seq_len: of the batch, B and N.
        device: where the function's tensors are.

    Raises:
        UnknownMaskError: a mask that is neither causal nor full, with or without a sliding window, and with or without
            images whose tokens see each other.
    """
    at = torch.arange(seq_len, device=device)
    try:
        first, last = (_answers(mask_function, rows, at[place, None], at)[:, 0] for place in (0, -1))
        onward = _pairs(mask_function, rows, at[:-1], at[1:])
        found = torch.stack([last[0].long().argmax(), first[0].sum() - 1, onward.all(), onward.any()]).tolist()
        before = seq_len - 1 - found[0] if found[0] else None
        if found[2]:
            window = Window(before, found[1] if found[1] < seq_len - 1 else None)
        else:
            window = Window(before, 0, _reach(onward, at) if found[3] else None)
        if _agrees(mask_function, window, rows, at, onward):
            return window
    except (IndexError, RuntimeError, TypeError) as error:
        raise UnknownMaskError(f"the model's attention mask depends on more than positions: {error}") from error
    raise UnknownMaskError(
        "the model's attention mask is neither causal nor full, with or without a sliding window or images that see "
        "themselves whole; context parallelism knows no other"
    )


def contents(mask_function: Any) -> tuple[Any, list[torch.Tensor]]:
    """What a function does, to be compared, and the tensors that it closes over; the first is None if nobody knows."""
    tensors: list[torch.Tensor] = []
    try:
        return _contents(mask_function, tensors), tensors
    except ValueError:
        return None, tensors


def _contents(value: Any, tensors: list[torch.Tensor]) -> Any:
    if isinstance(value, FunctionType):
        return value.__code__, *(_contents(cell.cell_contents, tensors) for cell in value.__closure__ or ())
    if isinstance(value, (tuple, list)):
        return tuple([_contents(item, tensors) for item in value])
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return None
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    raise ValueError(f"a {type(value).__name__}")


def _answers(function: Callable, rows: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`(B, Q, K)` for some queries and keys."""
    batch = torch.arange(rows, device=keys.device)[:, None, None, None]
    answers = function(batch, batch.new_zeros(1, 1, 1, 1), queries[None, None, :, None], keys[None, None, None, :])
    return answers.expand(rows, 1, len(queries), len(keys))[:, 0]


def _pairs(function: Callable, rows: int, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """`(B, Q)` for each query and the key in its place."""
    batch = torch.arange(rows, device=keys.device)[:, None]
    return function(batch, batch.new_zeros(1, 1), queries[None], keys[None]).expand(rows, len(queries))


def _reach(onward_BM: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """For each token the one after the last of those that see the next, one after the other, from it on."""
    stops = torch.nn.functional.pad(~onward_BM, (0, 1), value=True)
    return torch.where(stops, at + 1, len(at)).flip(1).cummin(1).values.flip(1)


def _agrees(function: Callable, window: Window, rows: int, at: torch.Tensor, onward_BM: torch.Tensor) -> bool:
    """Whether a window says what the function does, of every key to these queries: all, or those at edges and more."""
    seq_len, queries = len(at), at
    if rows * seq_len**2 > _ALL:
        edges = onward_BM.diff(dim=1).any(0).nonzero().flatten()
        spread = torch.linspace(0, seq_len - 1, _SPREAD, device=at.device).long()
        near = torch.cat([edges, edges + 1, edges + 2, spread, spread + 1, at[:3]])
        queries = near.clamp(max=seq_len - 1).unique()
    right = torch.ones((), dtype=torch.bool, device=at.device)
    for some in queries.split(max(1, _ALL // (rows * seq_len))):
        ahead = (at - some[:, None])[None]
        expected = torch.ones_like(ahead, dtype=torch.bool)
        if window.before is not None:
            expected &= ahead >= -window.before
        if window.reach_BN is not None:
            expected = expected & (at < window.reach_BN[:, some, None])
        elif window.after is not None:
            expected &= ahead <= window.after
        right &= (_answers(function, rows, some, at) == expected).all()
    return bool(right)
