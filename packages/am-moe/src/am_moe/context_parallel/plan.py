"""Which tokens each rank holds, and which blocks of attention it computes. Pure: no processes, no tensors.

A rank's tokens are *intervals* of the sequence, and attention is computed in *blocks*: queries of one interval against
keys of another, cut to what the mask lets through. The same rule that cuts a rank's work cuts what is sent to it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from itertools import pairwise

Interval = tuple[int, int]  # first token, and the one after the last


class Kind(Enum):
    """What of a block the mask lets through."""

    FULL = "full"  # every query sees every key
    CAUSAL = "causal"  # queries and keys are the same tokens, and each query sees those up to itself
    REVERSED = "reversed"  # as many of each, and each query sees the keys from the one in its place on
    PARTIAL = "partial"  # anything else: token by token


@dataclass(frozen=True)
class Block:
    """Queries of one interval against keys of another."""

    queries: Interval
    keys: Interval
    kind: Kind


@dataclass(frozen=True)
class Rule:
    """Which keys a query sees, by positions in the sequence.

    Attributes:
        before: how many tokens before itself at most; None for all. A sliding window of w tokens has `w - 1`.
        after: how many after itself; 0 for a causal mask, None for all.
        earliest, latest: where documents are packed, the first token of each token's document, one number per token,
            smallest and largest over the rows of the batch; None without documents.
        farthest, nearest: where the tokens of an image see each other, for each token the one after the last that it
            sees, largest and smallest over the rows of the batch; None without images. `after` is then 0.
        padded: some keys are padding, which no block knows beforehand.
        keys: the stretch of tokens outside of which all are padding; None where none is.
    """

    before: int | None = None
    after: int | None = 0
    earliest: Sequence[int] | None = None
    latest: Sequence[int] | None = None
    farthest: Sequence[int] | None = None
    nearest: Sequence[int] | None = None
    padded: bool = False
    keys: Interval | None = None

    def block(self, queries: Interval, keys: Interval) -> Block | None:
        """The part of a block that the mask may let through, as small as intervals can say; None for nothing."""
        q0, q1 = queries
        k0, k1 = keys
        if self.keys is not None:
            k0, k1 = max(k0, self.keys[0]), min(k1, self.keys[1])
        if self.after is not None:
            k1 = min(k1, q1 + self.after if self.farthest is None else self.farthest[q1 - 1])
        if self.before is not None:
            k0 = max(k0, q0 - self.before)
        if self.earliest is not None:
            k0 = max(k0, self.earliest[q0])
        if k0 >= k1:
            return None
        if self.after is not None:
            q0 = max(q0, k0 - self.after if self.farthest is None else bisect_right(self.farthest, k0))
        if self.before is not None:
            q1 = min(q1, k1 + self.before)
        if q0 >= q1:
            return None
        return Block((q0, q1), (k0, k1), self._kind(q0, q1, k0, k1))

    def parts(self, block: Block) -> list[Block]:
        """`cut_up`, found once: every layer of a forward, and its backward, asks for the same."""
        if block not in self._parts:
            self._parts[block] = self.cut_up(block)
        return self._parts[block]

    @cached_property
    def _parts(self) -> dict[Block, list[Block]]:
        return {}

    def cut_up(self, block: Block) -> list[Block]:
        """A block as blocks of the other kinds where documents and a causal window allow that, else as it is.

        A window of four over eight tokens; `c` causal, `r` reversed::

            c
            c c
            c c c
            c c c c
              r r r c
                r r c c
                  r c c c
                    c c c c
        """
        if block.kind is not Kind.PARTIAL or self.padded or not self._rows_agree:
            return [block]
        cut = [block]
        if self.earliest is not None or self.farthest is not None:
            cut = [part for q in self._stretches(block.queries) if (part := self.block(q, block.keys)) is not None]
        if self.after != 0:
            return cut
        return [piece for part in cut for piece in (self._edges(part) if part.kind is Kind.PARTIAL else [part])]

    @cached_property
    def _rows_agree(self) -> bool:
        return self.earliest == self.latest and self.farthest == self.nearest

    @cached_property
    def _starts(self) -> list[int]:
        """Where documents and images start, and where images end."""
        starts = {token for token, first in enumerate(self.earliest or ()) if first == token}
        for start, stop in self._images:
            starts |= {start, stop}
        return sorted(starts)

    @cached_property
    def _images(self) -> list[Interval]:
        """Stretches of tokens of which one at least sees another after itself, in any row."""
        found: list[Interval] = []
        for token, stop in enumerate(self.farthest or ()):
            if stop > token + 1 and (not found or token >= found[-1][1]):
                found.append((token, stop))
            elif found and token < found[-1][1] < stop:
                found[-1] = found[-1][0], stop
        return found

    def _in_image(self, start: int, stop: int) -> bool:
        """Whether one of these tokens sees another after itself, in any row."""
        place = bisect_right(self._images, start, key=lambda image: image[1] - 1)
        return place < len(self._images) and self._images[place][0] < stop

    def _stretches(self, queries: Interval) -> Iterator[Interval]:
        starts = self._starts[bisect_right(self._starts, queries[0]) : bisect_left(self._starts, queries[1])]
        yield from pairwise([queries[0], *starts, queries[1]])

    def _edges(self, block: Block) -> Iterator[Block]:
        """Along a causal diagonal, and the other edge of a window: in tiles of its size both are diagonals."""
        if self.before is None:
            yield from _below(*block.queries, *block.keys)
            return
        before = self.before
        size = before + 1
        k0, k1 = block.keys
        if self._in_image(*block.queries):  # which sees all keys up to its end
            yield from _above(*block.queries, k0, k1, before)
            return
        for tile in range(block.queries[0] // size * size, block.queries[1], size):
            q0, q1 = max(tile, block.queries[0]), min(tile + size, block.queries[1])
            yield from _below(q0, q1, max(k0, tile), min(k1, q1))
            yield from _above(q0, q1, max(k0, q0 - before), min(k1, tile), before)

    def _kind(self, q0: int, q1: int, k0: int, k1: int) -> Kind:
        one_document = self.latest is None or self.latest[q1 - 1] <= k0
        if self.padded or not one_document or (self.before is not None and q1 - 1 - k0 > self.before):
            return Kind.PARTIAL
        if self.after is None or k1 <= (q0 + 1 + self.after if self.nearest is None else self.nearest[q0]):
            return Kind.FULL
        causal = self.after == 0 and (q0, q1) == (k0, k1) and not self._in_image(q0, q1 - 1)
        return Kind.CAUSAL if causal else Kind.PARTIAL


def _below(q0: int, q1: int, k0: int, k1: int) -> Iterator[Block]:
    """Queries that see the keys up to themselves."""
    if k0 < min(q0, k1):
        yield Block((q0, q1), (k0, min(q0, k1)), Kind.FULL)
    start = max(k0, q0)
    if start < k1:
        yield Block((start, k1), (start, k1), Kind.CAUSAL)
        if k1 < q1:
            yield Block((k1, q1), (start, k1), Kind.FULL)


def _above(q0: int, q1: int, k0: int, k1: int, before: int) -> Iterator[Block]:
    """Queries that see the keys from `before` ahead of themselves on."""
    if max(k0, q1 - before) < k1:
        yield Block((q0, q1), (max(k0, q1 - before), k1), Kind.FULL)
    start, stop = max(k0, q0 - before), min(k1, q1 - before)
    if start < stop:
        if q0 < start + before:
            yield Block((q0, start + before), (start, stop), Kind.FULL)
        yield Block((start + before, stop + before), (start, stop), Kind.REVERSED)


def head_tail(seq_len: int, ranks: int) -> tuple[tuple[Interval, ...], ...]:
    """The intervals of each rank: one chunk from the head and one from the tail, so that causal work is even.

    Eight chunks on four ranks::

        rank 0: 0 . . . . . . 7
        rank 1: . 1 . . . . 6 .
        rank 2: . . 2 . . 5 . .
        rank 3: . . . 3 4 . . .     one interval: they touch

    Raises:
        ValueError: a length that does not divide into `2 * ranks` chunks.
    """
    if seq_len % (2 * ranks) or not seq_len:
        below, above = seq_len // (2 * ranks) * 2 * ranks, -(-seq_len // (2 * ranks)) * 2 * ranks
        fits = f"cut it to {below} or pad it to {above}" if below else f"pad it to {above or 2 * ranks}"
        raise ValueError(
            f"a sequence of {seq_len} tokens does not divide into 2 x {ranks} chunks, two for each rank of the "
            f"context axis; {fits} (labels of padding are -100)"
        )
    size = seq_len // (2 * ranks)
    layout = []
    for rank in range(ranks):
        head, tail = rank * size, (2 * ranks - 1 - rank) * size
        layout.append(((head, head + size), (tail, tail + size)) if head + size < tail else ((head, tail + size),))
    return tuple(layout)


@dataclass(frozen=True)
class Plan:
    """Attention over the ranks of an axis: `layout[rank]` are the rank's intervals, `rule` is the mask."""

    layout: tuple[tuple[Interval, ...], ...]
    rule: Rule

    def blocks(self, rank: int, source: int) -> tuple[Block, ...]:
        """What a rank computes with the keys of another (or its own); found once for all layers."""
        if (rank, source) not in self._blocks:
            found = (self.rule.block(q, k) for k in self.layout[source] for q in self.layout[rank])
            self._blocks[rank, source] = tuple(block for block in found if block is not None)
        return self._blocks[rank, source]

    @cached_property
    def _blocks(self) -> dict[tuple[int, int], tuple[Block, ...]]:
        return {}

    def wanted(self, rank: int, source: int) -> tuple[Interval, ...]:
        """The keys of `source` that those blocks read: at most one stretch of each of its intervals."""
        stretches = []
        for start, stop in self.layout[source]:
            reads = [b.keys for b in self.blocks(rank, source) if start <= b.keys[0] and b.keys[1] <= stop]
            if reads:
                stretches.append((min(k[0] for k in reads), max(k[1] for k in reads)))
        return tuple(stretches)

    def offset(self, rank: int, token: int) -> int:
        """Where a token is among those that its rank holds."""
        held = 0
        for start, stop in self.layout[rank]:
            if start <= token < stop:
                return held + token - start
            held += stop - start
        raise ValueError(f"rank {rank} holds {self.layout[rank]}, not token {token}")

    @cached_property
    def seq_len(self) -> int:
        return sum(stop - start for held in self.layout for start, stop in held)

    def tokens_sent(self, rank: int) -> int:
        """How many tokens' keys and values a rank sends to others, in one forward of point-to-point exchange."""
        others = [other for other in range(len(self.layout)) if other != rank]
        return sum(stop - start for other in others for start, stop in self.wanted(other, rank))

    def __str__(self) -> str:
        lines = []
        for rank, held in enumerate(self.layout):
            lines.append(f"rank {rank} holds {', '.join(f'{a}-{b - 1}' for a, b in held)}")
            for step in range(len(self.layout)):
                source = (rank - step) % len(self.layout)
                for block in self.blocks(rank, source):
                    (q0, q1), (k0, k1) = block.queries, block.keys
                    lines.append(f"  step {step}, from rank {source}: {q0}-{q1 - 1} x {k0}-{k1 - 1} {block.kind.value}")
        return "\n".join(lines)
