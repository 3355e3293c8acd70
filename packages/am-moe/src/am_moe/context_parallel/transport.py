"""How keys and values reach the queries, and gradients the keys: rank to rank, or gathered.

Both hand out the keys of one source rank after another, and bring home the gradients that the sources are given back.
A *piece* is a stretch of tokens with its keys `(B, K, T, D)` and values `(B, K, T, E)`, or their gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from am_moe._torch_compat import all_gather, reduce_scatter
from am_moe.context_parallel.plan import Interval, Plan

# What to wait for, the tokens that arrive, the tensor they arrive in, and the one that is sent.
_Messages = tuple[list[dist.Work], tuple[Interval, ...], torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """Keys and values of the tokens of an interval."""

    tokens: Interval
    k: torch.Tensor
    v: torch.Tensor


class PointToPoint:
    """At step i every rank sends to the one i further on, directly, and only what that rank's mask lets it read.

    Four ranks, the sources that each reads in turn::

        rank 0: 0 3 2 1     rank 1: 1 0 3 2     rank 2: 2 1 0 3     rank 3: 3 2 1 0

    A ring in which each rank hands everything on to its neighbour moves all keys over all ranks. The same steps with
    direct messages leave out what a causal mask, a window or a document's end hides. The next step's keys travel
    while this step's are computed on; gradients return to the owner in one message each.

    Collectives: `pieces` and `give_back` exchange messages at every step that has any; every rank calls them alike.
    """

    def __init__(self, plan: Plan, group: dist.ProcessGroup | None, k: torch.Tensor, v: torch.Tensor) -> None:
        self.plan, self.group, self.k, self.v = plan, group, k, v
        self.rank, self.ranks = place(group)
        self._returning: _Messages = ([], (), k, k)

    def pieces(self) -> Iterator[tuple[int, list[Piece]]]:
        """The keys of each source in turn, this rank's own first."""
        arriving = self._post(1)
        yield self.rank, [self._own(tokens) for tokens in self.plan.layout[self.rank]]
        for step in range(1, self.ranks):
            works, wanted, incoming, _outgoing = arriving
            for work in works:
                work.wait()
            arriving = self._post(step + 1)
            yield (self.rank - step) % self.ranks, _unpacked(incoming, wanted, self.k, self.v)

    def give_back(self, source: int, gradients: list[Piece]) -> list[Piece]:
        """Send a source the gradients of its pieces, in the dtype of the keys; called once for each in turn.

        Returns the gradients for this rank's own keys that have come home since the last call.
        """
        step = (self.rank - source) % self.ranks
        if step == 0:
            return gradients
        asker = (self.rank + step) % self.ranks
        home = self.returned()
        self._returning = self._exchange(_packed(gradients, self.k), source, self.plan.wanted(asker, self.rank), asker)
        return home

    def returned(self) -> list[Piece]:
        """What comes home last."""
        works, lent, incoming, _outgoing = self._returning
        for work in works:
            work.wait()
        return _unpacked(incoming, lent, self.k, self.v)

    def _own(self, tokens: Interval) -> Piece:
        start = self.plan.offset(self.rank, tokens[0])
        at = slice(start, start + tokens[1] - tokens[0])
        return Piece(tokens, self.k[:, :, at], self.v[:, :, at])

    def _post(self, step: int) -> _Messages:
        """Start the messages of a step; after the last, of none."""
        if step >= self.ranks:
            return [], (), self.k, self.k
        source, asker = (self.rank - step) % self.ranks, (self.rank + step) % self.ranks
        outgoing = _packed([self._own(tokens) for tokens in self.plan.wanted(asker, self.rank)], self.k)
        return self._exchange(outgoing, asker, self.plan.wanted(self.rank, source), source)

    def _exchange(self, outgoing: torch.Tensor, to: int, wanted: tuple[Interval, ...], source: int) -> _Messages:
        """Start a message each way, leaving out those of nothing; the tensors live until the caller has waited."""
        incoming = outgoing.new_empty(sum(b - a for a, b in wanted) * _numbers_per_token(self.k, self.v))
        messages = []
        if outgoing.numel():
            messages.append(dist.P2POp(dist.isend, outgoing, group=self.group, group_peer=to))
        if incoming.numel():
            messages.append(dist.P2POp(dist.irecv, incoming, group=self.group, group_peer=source))
        works = dist.batch_isend_irecv(messages) if messages else []
        return works, wanted, incoming, outgoing


class Gathered:
    """All keys are gathered at once, and again for the backward; gradients are reduce-scattered.

    Collectives: `pieces` gathers once, `returned` reduce-scatters once.
    """

    def __init__(self, plan: Plan, group: dist.ProcessGroup | None, k: torch.Tensor, v: torch.Tensor) -> None:
        self.plan, self.group, self.k, self.v = plan, group, k, v
        self.rank, self.ranks = place(group)

    def pieces(self) -> Iterator[tuple[int, list[Piece]]]:
        """The keys of each source in turn."""
        mine, start = [], 0
        for tokens in self.plan.layout[self.rank]:
            at = slice(start, start + tokens[1] - tokens[0])
            mine.append(Piece(tokens, self.k[:, :, at], self.v[:, :, at]))
            start = at.stop
        sent = _packed(mine, self.k)
        self._all = sent.new_empty(self.ranks, sent.numel())
        all_gather(self._all.flatten(), sent, group=self.group)
        for source in range(self.ranks):
            yield source, _unpacked(self._all[source], self.plan.layout[source], self.k, self.v)

    def give_back(self, source: int, gradients: list[Piece]) -> list[Piece]:
        """Keep the gradients of a source's pieces until all are there."""
        self._all[source] = _packed(gradients, self.k)  # its keys are not read again
        return []

    def returned(self) -> list[Piece]:
        """The sum of all ranks' gradients for this one's keys."""
        total = torch.empty_like(self._all[0])
        reduce_scatter(total, self._all.flatten(), group=self.group)
        return _unpacked(total, self.plan.layout[self.rank], self.k, self.v)


def place(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """This rank's place in a group and the group's size; without a group, alone."""
    return (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))


def _packed(pieces: Iterable[Piece], like: torch.Tensor) -> torch.Tensor:
    """Pieces as one flat message in the dtype of the keys."""
    flat = [x.to(like.dtype).flatten() for piece in pieces for x in (piece.k, piece.v)]
    return torch.cat(flat) if flat else like.new_empty(0)


def _unpacked(message: torch.Tensor, stretches: tuple[Interval, ...], k: torch.Tensor, v: torch.Tensor) -> list[Piece]:
    """The pieces of a message about these stretches of tokens, as views of it."""
    pieces, at = [], 0
    for tokens in stretches:
        parts = []
        for like in (k, v):
            shape = (*like.shape[:2], tokens[1] - tokens[0], like.shape[3])
            size = shape[0] * shape[1] * shape[2] * shape[3]
            parts.append(message[at : at + size].view(shape))
            at += size
        pieces.append(Piece(tokens, *parts))
    return pieces


def _numbers_per_token(k: torch.Tensor, v: torch.Tensor) -> int:
    return k.shape[0] * k.shape[1] * (k.shape[3] + v.shape[3])
