"""Plain pytest: every rank of a test is forked from the process that has imported everything already."""

from __future__ import annotations

import gc
import select
import socket
import time
from collections.abc import Callable

from am_testkit.ranks import Rank, fork_rank
from am_testkit.verdict import Verdict, judge

# How long peers may go on after a rank has failed: enough to fail in the same collective by themselves.
GRACE = 0.5


def run_forked(
    body: Callable[[], object], render: Callable[[BaseException], str], world: int, timeout: float
) -> Verdict:
    """Run a test on `world` forked ranks and judge it, within `timeout` seconds and a little."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=world * 4)
    address = listener.getsockname()[:2]
    deadline = time.monotonic() + timeout
    gc.freeze()  # ranks need not look through what was there before them, which would copy its memory
    ranks = [
        fork_rank(body, render, rank, world, timeout, address, listener if rank == 0 else None) for rank in range(world)
    ]
    gc.unfreeze()
    listener.close()
    try:
        _watch(ranks, deadline, timeout)
        return judge([rank.outcome for rank in ranks])
    finally:
        for rank in ranks:
            rank.leave()


def _watch(ranks: list[Rank], deadline: float, timeout: float) -> None:
    failed_at = None
    while running := [rank for rank in ranks if not rank.poll()]:
        now = time.monotonic()
        culprits = [r for r in ranks if r.outcome and r.outcome.status in ("failed", "crashed")]
        if culprits and failed_at is None:
            failed_at = now
        if failed_at is not None and now > failed_at + GRACE:
            for rank in running:
                rank.stop("killed", f"stopped because rank {culprits[0].rank} had failed")
        elif now > deadline:
            for rank in running:
                rank.stop("hung", f"still running after {timeout:g} seconds")
        else:
            until = deadline if failed_at is None else min(deadline, failed_at + GRACE)
            select.select([r.report for r in running], [], [], max(0.0, until - now) + 0.01)
